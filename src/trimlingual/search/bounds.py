"""An upper bound of a corpus score while some of the translations are unfinished. The final score is never above it.

Corpus chrF and chrF++ (Popović 2015, 2017) are computed from n-gram counts, summed over the sentences: n-grams in the hypothesis,
n-grams in the reference, and matches. Decoding only appends text, so an n-gram of an unfinished translation stays, also a wrong
one. The best continuation adds exactly the reference's n-grams that have no match yet. Then, for every n-gram order,

    matches    = n-grams in the reference
    hypothesis = n-grams so far + n-grams in the reference - matches so far

More matches never lower the score, so the score of these counts bounds the score of every continuation.

Shapes: N sentences, K counts in the layout of `evaluation.quality.SentenceStatistics`.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from trimlingual.evaluation.quality import sentence_statistics

CHAR_ORDERS = 6
_BETA_SQUARED = 4


def best_possible(metric: str, counts: np.ndarray, finished: np.ndarray) -> float:
    """Upper bound, 0 to 100, of the corpus score. `counts` (N, K) are those of the text so far, `finished` (N,) is bool.

    The bound of BLEU is always 100: its brevity penalty and smoothing are not followed.
    """
    if metric not in ("chrf", "chrfpp"):
        return 100.0
    hypothesis, reference, match = (counts[:, i::3] for i in range(3))
    unfinished = ~np.asarray(finished)[:, None]
    best_hypothesis = hypothesis + np.where(unfinished, reference - match, 0)
    sums = [np.where(unfinished, reference, match).sum(0), best_hypothesis.sum(0), reference.sum(0)]
    matches, hypotheses, references = (s.astype(np.float64) for s in sums)
    precision = np.where(hypotheses > 0, matches / np.maximum(hypotheses, 1), 0)
    recall = np.where(references > 0, matches / np.maximum(references, 1), 0)
    # sacreBLEU averages over the orders that have n-grams in both the hypothesis and the reference. An order that has none in the
    # hypothesis yet may never get one, and then it does not count. All such outcomes are tried.
    in_hypothesis, in_reference = hypothesis.sum(0) > 0, references > 0
    best = 0.0
    for chars, words in product(
        _num_orders(in_hypothesis[:CHAR_ORDERS], in_reference[:CHAR_ORDERS]),
        _num_orders(in_hypothesis[CHAR_ORDERS:], in_reference[CHAR_ORDERS:]),
    ):
        orders = [*range(chars), *range(CHAR_ORDERS, CHAR_ORDERS + words)]
        if orders:
            best = max(best, _f_score(precision[orders].mean(), recall[orders].mean()))
    return best


def _num_orders(in_hypothesis: np.ndarray, in_reference: np.ndarray) -> range:
    """How many orders may count in the end: the lowest ones, because an order has n-grams only if the order below has."""
    return range(int((in_hypothesis & in_reference).sum()), int(in_reference.sum()) + 1)


def _f_score(precision: float, recall: float) -> float:
    denominator = _BETA_SQUARED * precision + recall
    return 100 * (1 + _BETA_SQUARED) * precision * recall / denominator if denominator > 0 else 0.0


def settled_counts(metric: str, prefixes: list[str], references: list[str], language: str) -> np.ndarray:
    """Counts (N, K) of the part of unfinished translations that can no longer change.

    The last bytes may be half a character, and the last word may grow. Neither is counted.
    """
    complete = [prefix.rstrip("\ufffd") for prefix in prefixes]
    counts = sentence_statistics(metric, complete, references, language).counts
    if metric == "chrfpp":
        words = [" ".join(prefix.split()[:-1]) for prefix in complete]
        without_last = sentence_statistics(metric, words, references, language).counts
        counts[:, 3 * CHAR_ORDERS :] = without_last[:, 3 * CHAR_ORDERS :]
    return counts
