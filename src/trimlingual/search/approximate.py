"""Rounds of the layer search that do not score every candidate on every clip: cheaper, and not sure to find the best.

Both look at the candidates on a growing number of clips, the same for all, and keep those that still have a chance.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trimlingual.evaluation.quality import SentenceStatistics, paired_bootstrap_difference
from trimlingual.search.scorer import Candidate

Record = dict[str, Any]
# Records of these candidates on these further clips, added to the earlier records.
Look = Callable[[Sequence[Candidate], Sequence[int], Mapping[Candidate, Record]], list[Record]]


def better_half(records: Sequence[Record]) -> list[Record]:
    """Successive halving (Jamieson & Talwalkar 2016): the better half stays."""
    return sorted(records, key=lambda record: -record["score"])[: (len(records) + 1) // 2]


def not_beaten(records: Sequence[Record], statistics: Callable[[Record], Sequence[SentenceStatistics]]) -> list[Record]:
    """Bootstrap racing (Maron & Moore 1994): whoever is worse than the leader on 97.5 % of paired bootstrap resamples goes."""
    leader = max(records, key=lambda record: record["score"])
    leading = statistics(leader)
    kept = []
    for record in records:
        interval, _ = paired_bootstrap_difference(statistics(record), leading)
        if record is leader or interval.high >= 0:
            kept.append(record)
    return kept


def race(
    candidates: Sequence[Candidate],
    num_clips: int,
    first_clips: int,
    look: Look,
    survivors: Callable[[list[Record]], list[Record]],
) -> tuple[Record, list[Record]]:
    """Score on `first_clips` of `num_clips` clips, keep the survivors, double the clips, until one is left or all clips were used.

    Returns the winner's record and that of every candidate's last look. The winner is scored on all clips in the end, so that its
    score can be compared with the other rounds'.
    """
    order = random.Random(0).sample(range(num_clips), num_clips)  # the first clips must stand for all
    standing, seen, size = list(candidates), 0, min(first_clips, num_clips)
    last: dict[Candidate, Record] = {}
    while True:
        records = look(standing, sorted(order[seen:size]), last)
        last.update(zip(standing, records))
        seen = size
        if seen == num_clips:
            break
        kept = survivors(records)
        standing = [candidate for candidate in standing if any(last[candidate] is record for record in kept)]
        size = num_clips if len(standing) == 1 else min(2 * size, num_clips)
    best = max((last[candidate] for candidate in standing), key=lambda record: record["score"])
    return best, [last[candidate] for candidate in candidates]
