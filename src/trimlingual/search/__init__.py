"""Which layers can go: the layer search, how its candidates are scored, and the plan that comes out."""
