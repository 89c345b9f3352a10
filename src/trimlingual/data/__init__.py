"""Speech in, splits out: sources are read, sound files proved whole, splits proved disjoint."""
