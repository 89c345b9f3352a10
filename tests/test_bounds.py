"""The bound on what can still be scored never falls below what is reached."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimlingual.evaluation.quality import corpus_score, sentence_statistics
from trimlingual.search.bounds import best_possible, settled_counts

# Few letters, so that n-grams match often; a space, punctuation that chrF++ splits off, a letter of three bytes.
TEXT = st.text(alphabet="aab  .,é狗", max_size=14)


@st.composite
def half_translated(draw):
    """References, finished translations, and where each unfinished one stands."""
    count = draw(st.integers(1, 5))
    references = [draw(TEXT.filter(str.strip)) for _ in range(count)]
    final = [draw(st.one_of(TEXT, st.just(reference))) for reference in references]
    finished = np.array([draw(st.booleans()) for _ in range(count)])
    cut = [len(text) if done else draw(st.integers(0, len(text))) for text, done in zip(final, finished)]
    return references, final, finished, cut


@pytest.mark.parametrize("metric", ["chrf", "chrfpp"])
@given(case=half_translated())
@settings(max_examples=400, deadline=None)
def test_never_below_what_is_reached(metric, case):
    references, final, finished, cut = case
    counts = sentence_statistics(metric, final, references, "de").counts
    prefixes = [text[:n].strip() for text, n in zip(final, cut)]
    counts[~finished] = settled_counts(metric, prefixes, references, "de")[~finished]
    bound = best_possible(metric, counts, finished)
    assert bound >= corpus_score(metric, final, references, "de").value - 1e-9


@pytest.mark.parametrize("metric", ["chrf", "chrfpp"])
@given(case=half_translated())
@settings(max_examples=100, deadline=None)
def test_knowing_more_never_raises_it(metric, case):
    references, final, finished, cut = case
    nothing = sentence_statistics(metric, [""] * len(final), references, "de").counts
    counts = nothing.copy()
    counts[finished] = sentence_statistics(metric, final, references, "de").counts[finished]
    at_first = best_possible(metric, counts, finished)
    counts[~finished] = settled_counts(metric, [t[:n] for t, n in zip(final, cut)], references, "de")[~finished]
    assert best_possible(metric, counts, finished) <= at_first + 1e-9


@pytest.mark.parametrize("metric", ["chrf", "chrfpp", "bleu"])
def test_the_ends(metric):
    references = ["der hund sieht den ball", "das ist gut"]
    counts = sentence_statistics(metric, references, references, "de").counts
    everything, nothing = np.array([True, True]), np.array([False, False])
    assert best_possible(metric, counts, everything) == pytest.approx(100)
    empty = sentence_statistics(metric, ["", ""], references, "de").counts
    assert best_possible(metric, empty, nothing) == pytest.approx(100)
    if metric != "bleu":
        wrong = sentence_statistics(metric, ["xyz xyz xyz", references[1]], references, "de").counts
        score = corpus_score(metric, ["xyz xyz xyz", references[1]], references, "de").value
        assert best_possible(metric, wrong, everything) == pytest.approx(score)
        assert score < best_possible(metric, wrong, np.array([False, True])) < 100


def test_half_a_character_and_half_a_word_do_not_count():
    """`ein` may still become `eine`; a replacement character stands for bytes of which the rest is to come."""
    reference = ["ein hund"]
    counts = settled_counts("chrfpp", ["ein hu\ufffd"], reference, "de")
    whole = sentence_statistics("chrfpp", ["ein hu"], reference, "de").counts
    assert counts[0, :18].tolist() == whole[0, :18].tolist()
    assert counts[0, 18:].tolist() == sentence_statistics("chrfpp", ["ein"], reference, "de").counts[0, 18:].tolist()
