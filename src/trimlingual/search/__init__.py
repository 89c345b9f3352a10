"""Which layers can go: the layer search, and the cheap strategies that it is compared with.

`allowed.py` says which may go, `search.py` runs the rounds, `scorer.py` scores candidates, `from_parent.py` translates them from what
their parent model has computed, `bounds.py` says when one cannot win any more, and `approximate.py` holds the modes that may miss the
best. `one_shot.py` chooses all layers at once. The result of all is the `PrunePlan` of `plan.py`.

A candidate is a layer that may go. Its `layer` counts in the base model, before any pruning. The decoder (decoding/) counts in the
model that is loaded, which may have fewer layers: `Scorer` converts. Row, position and slot are drawn in decoding/__init__.py.
"""
