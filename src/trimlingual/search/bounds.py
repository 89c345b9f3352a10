"""What a translation of a corpus can still score when only a part of it is known: never less than what is reached.

Corpus chrF and chrF++ (Popović 2015, 2017) are functions of summed n-gram counts. Of a sentence that is not finished, the n-grams that
stand already can only be added to. The best that can follow are exactly the reference's n-grams that have no match yet: every order
then has its reference count as matches, and as hypothesis count the n-grams that stand plus those that were missing. A wrong n-gram is
never taken back. The score rises with every added match, so these sums bound all continuations.

Shapes: N sentences, K counts laid out as in `metrics.SentenceStatistics`.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from trimlingual.evaluation.quality import sentence_statistics

CHAR_ORDERS = 6
_BETA_SQUARED = 4


def best_possible(metric: str, counts: np.ndarray, finished: np.ndarray) -> float:
    """Upper bound (0..100) of the corpus score; `counts` (N, K) of what stands so far, `finished` (N,) bool.

    100 for BLEU, whose brevity penalty and smoothing this does not follow.
    """
    if metric not in ("chrf", "chrfpp"):
        return 100.0
    hypothesis, reference, match = (counts[:, i::3] for i in range(3))
    going = ~np.asarray(finished)[:, None]
    most = hypothesis + np.where(going, reference - match, 0)
    sums = [np.where(going, reference, match).sum(0), most.sum(0), reference.sum(0)]
    matches, hypotheses, references = (s.astype(np.float64) for s in sums)
    precision = np.where(hypotheses > 0, matches / np.maximum(hypotheses, 1), 0)
    recall = np.where(references > 0, matches / np.maximum(references, 1), 0)
    # sacreBLEU averages over the orders that have n-grams on both sides. Where the hypothesis has none yet it may end without any,
    # which leaves the order out: all ways that this can turn out are tried.
    there, possible = hypothesis.sum(0) > 0, references > 0
    best = 0.0
    for chars, words in product(
        _choices(there[:CHAR_ORDERS], possible[:CHAR_ORDERS]), _choices(there[CHAR_ORDERS:], possible[CHAR_ORDERS:])
    ):
        orders = [*range(chars), *range(CHAR_ORDERS, CHAR_ORDERS + words)]
        if orders:
            best = max(best, _f_score(precision[orders].mean(), recall[orders].mean()))
    return best


def _choices(there: np.ndarray, possible: np.ndarray) -> range:
    """How many of the orders may count in the end: an order has n-grams only if the one below it has."""
    return range(int((there & possible).sum()), int(possible.sum()) + 1)


def _f_score(precision: float, recall: float) -> float:
    bottom = _BETA_SQUARED * precision + recall
    return 100 * (1 + _BETA_SQUARED) * precision * recall / bottom if bottom > 0 else 0.0


def settled_counts(metric: str, prefixes: list[str], references: list[str], language: str) -> np.ndarray:
    """Counts (N, K) of what can no longer change in translations that are still being decoded.

    The end of a prefix may be half a character, and its last word may grow: neither counts.
    """
    whole = [prefix.rstrip("\ufffd") for prefix in prefixes]
    counts = sentence_statistics(metric, whole, references, language).counts
    if metric == "chrfpp":
        words = [" ".join(prefix.split()[:-1]) for prefix in whole]
        without_last = sentence_statistics(metric, words, references, language).counts
        counts[:, 3 * CHAR_ORDERS :] = without_last[:, 3 * CHAR_ORDERS :]
    return counts
