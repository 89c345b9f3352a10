"""Rounds of the layer search that do not score every candidate on every clip: cheaper, and not sure to find the best.

Both look at the candidates on a growing number of clips, the same for all, and keep those that still have a chance.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from trimlingual.evaluation.quality import paired_bootstrap_difference
from trimlingual.search.scorer import Candidate

if TYPE_CHECKING:
    from trimlingual.search.search import Search

Record = dict[str, Any]
Race = tuple[Record, list[Record]]


def successive_halving(
    search: Search, number: int, candidates: Sequence[Candidate], advance: Callable[..., None]
) -> Race:
    """Keep the better half, double the clips, until one is left or all clips were used (Jamieson & Talwalkar 2016)."""

    def better_half(records: list[Record]) -> list[Record]:
        return sorted(records, key=lambda record: -record["score"])[: (len(records) + 1) // 2]

    return _race(search, number, candidates, better_half, advance)


def bootstrap_racing(
    search: Search, number: int, candidates: Sequence[Candidate], advance: Callable[..., None]
) -> Race:
    """Drop whoever is worse than the leader on 97.5 % of paired bootstrap resamples (a race: Maron & Moore 1994)."""

    def not_beaten(records: list[Record]) -> list[Record]:
        leader = max(records, key=lambda record: record["score"])
        leading = search.statistics(leader)
        kept = []
        for record in records:
            interval, _ = paired_bootstrap_difference(search.statistics(record), leading)
            if record is leader or interval.high >= 0:
                kept.append(record)
        return kept

    return _race(search, number, candidates, not_beaten, advance)


def _race(
    search: Search,
    number: int,
    candidates: Sequence[Candidate],
    survivors: Callable[[list[Record]], list[Record]],
    advance: Callable[..., None],
) -> Race:
    """Score on `first_clips` clips, keep the survivors, double the clips; the records of every candidate's last look.

    The winner is scored on all clips in the end, so that its score can be compared with the other rounds'.
    """
    count = len(search.scorer.select.clips)
    order = random.Random(0).sample(range(count), count)  # the first clips must stand for all
    standing, seen, size = list(candidates), 0, min(search.scorer.settings.first_clips, len(order))
    last: dict[Candidate, Record] = {}
    while True:
        records = search.share_out(number, standing, [sorted(order[seen:size])], earlier=last)
        last.update(zip(standing, records))
        seen = size
        if seen == len(order):
            break
        kept = survivors(records)
        standing = [candidate for candidate in standing if any(last[candidate] is record for record in kept)]
        size = len(order) if len(standing) == 1 else min(2 * size, len(order))
    advance(len(candidates), f"round {number}")
    best = max((last[candidate] for candidate in standing), key=lambda record: record["score"])
    return best, [last[candidate] for candidate in candidates]
