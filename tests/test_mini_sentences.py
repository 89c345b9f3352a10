"""The built-in corpus: its grammar is checked against hand-made translations, its splits against what they promise."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from trimlingual.mini import lexicon, sentences
from trimlingual.mini.sentences import EVERYDAY, RESEARCH, Sentence, normalised

# Written and checked by hand; each must come out of the grammar word for word (see test_gold_sentences).
GOLD = """
GOLD_ROWS
"""
