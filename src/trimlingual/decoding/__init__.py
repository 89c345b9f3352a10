"""Audio to text, greedily: the one decoder that every stage translates with."""
