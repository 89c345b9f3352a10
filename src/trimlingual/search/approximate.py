"""Rounds of the layer search that do not score every candidate on every clip. They are cheaper, and may miss the best candidate.

Successive halving and bootstrap racing both score all candidates on a few clips, drop some of them, and score the others on more
clips.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trimlingual.evaluation.quality import SentenceStatistics, paired_bootstrap_difference
from trimlingual.search.allowed import Candidate

Record = dict[str, Any]
# Scores candidates on further clips: called with the candidates, the clips and the candidates' earlier records, which it adds to.
ScoreOn = Callable[[Sequence[Candidate], Sequence[int], Mapping[Candidate, Record]], list[Record]]


def better_half(records: Sequence[Record]) -> list[Record]:
    """The better half of the records stays: successive halving (Jamieson & Talwalkar 2016)."""
    return sorted(records, key=lambda record: -record["score"])[: (len(records) + 1) // 2]


def not_beaten(records: Sequence[Record], statistics: Callable[[Record], Sequence[SentenceStatistics]]) -> list[Record]:
    """Records worse than the best one on 97.5 % of paired bootstrap resamples are dropped: racing (Maron & Moore 1994)."""
    leader = max(records, key=lambda record: record["score"])
    leader_statistics = statistics(leader)
    kept = []
    for record in records:
        interval, _ = paired_bootstrap_difference(statistics(record), leader_statistics)
        if record is leader or interval.high >= 0:
            kept.append(record)
    return kept


def race(
    candidates: Sequence[Candidate],
    num_clips: int,
    first_clips: int,
    score_on: ScoreOn,
    survivors: Callable[[list[Record]], list[Record]],
) -> tuple[Record, list[Record]]:
    """Score on `first_clips` of `num_clips` clips, keep the survivors, double the clips, and so on.

    It ends when all clips were used or one candidate is left, which is then scored on all clips, as the winners of other rounds
    are.

    Returns the winner's record and the last record of every candidate.
    """
    order = random.Random(0).sample(range(num_clips), num_clips)  # shuffled, so that the first clips are a fair sample
    remaining, num_scored, size = list(candidates), 0, min(first_clips, num_clips)
    last: dict[Candidate, Record] = {}
    while True:
        records = score_on(remaining, sorted(order[num_scored:size]), last)
        last.update(zip(remaining, records))
        num_scored = size
        if num_scored == num_clips:
            break
        kept = survivors(records)
        remaining = [candidate for candidate in remaining if any(last[candidate] is record for record in kept)]
        size = num_clips if len(remaining) == 1 else min(2 * size, num_clips)
    best = max((last[candidate] for candidate in remaining), key=lambda record: record["score"])
    return best, [last[candidate] for candidate in candidates]
