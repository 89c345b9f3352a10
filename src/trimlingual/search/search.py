"""The iterative layer search (Moslem 2025, section 4): every round removes the layer whose removal hurts the translation score
least.

The processes of a distributed run share a round's candidates, in waves. In a wave every process scores some candidates, then all
processes exchange their results, and the main process writes them to the journal. A search that was killed goes on after its last
wave.

A record is the result of one candidate in one round, as a dict that the journal holds (`_record`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from trimlingual.evaluation.quality import SentenceStatistics, paired_bootstrap_difference
from trimlingual.recipe import TOWERS
from trimlingual.run.artifacts import SCRATCH, append_jsonl, read_journal
from trimlingual.run.lineage import Lineage
from trimlingual.run.processes import gather, is_main_process, num_processes, process_index
from trimlingual.run.progress import progress, say
from trimlingual.search.allowed import Candidate
from trimlingual.search.approximate import better_half, not_beaten, race
from trimlingual.search.plan import PrunePlan, Removal
from trimlingual.search.scorer import Scorer, Tally
from trimlingual.search.sharing import longest_first, share_of, wave_size

JOURNAL_FILE = "candidates.jsonl"
TIE = 1e-9  # scores closer than this count as equal, because a bound and a score are summed in different orders
Advance = Callable[..., None]


@dataclass
class Search:
    """A search and its results so far. Every process has one, with the same results."""

    scorer: Scorer
    journal: Path
    # Fine-tunes after each removal, if the recipe asks for it. Called with the lineage without the layer, and the removal.
    after_removal: Callable[[Lineage, Removal], None] | None = None
    removals: list[Removal] = field(default_factory=list)
    scored: list[dict[str, Any]] = field(default_factory=list)  # the records of all rounds
    curve: list[dict[str, Any]] = field(default_factory=list)  # per number of layers removed: score and share kept

    def run(self) -> PrunePlan:
        """Run all rounds. Records that are in the journal are not made again. ValueError if no layer can go."""
        scorer, settings = self.scorer, self.scorer.settings
        known = read_journal(self.journal) if is_main_process() else []
        self.known = {_identity(record): record for record in gather(known)[0]}
        total = self._num_candidates()
        say(
            f"layer search: up to {total} candidates of {len(scorer.select.clips)} clips each"
            + (f", {len(self.known)} records of an earlier run" if self.known else "")
        )
        with progress("searching layers", total + 1) as advance:
            baseline = self._baseline()
            advance(1)
            self._add_to_curve(0, baseline)
            lineage, parent = scorer.lineage, baseline
            for number in range(1, settings.num_layers_to_remove + 1):
                removed = {tower: [r.layer for r in self.removals if r.tower == tower] for tower in TOWERS}
                # A model that was fine-tuned since has other translations than its record.
                parent_is_known = self.after_removal is None or number == 1
                scorer.begin_round(removed, _tokens(parent) if parent_is_known else None)
                started = time.perf_counter()
                best, records = self._round(number, scorer.candidates(lineage), advance)
                self.scored += records
                if not self._add_to_curve(number, best):
                    break
                removal = self._removal(number, best, records)
                self.removals.append(removal)
                lineage = lineage.without({removal.tower: [removal.layer]})
                say(
                    f"  round {number}: {removal.tower} layer {removal.layer} goes, score {best['score']:.2f}, "
                    f"{time.perf_counter() - started:.1f} s"
                )
                if self.after_removal:
                    self.after_removal(lineage, removal)
                parent = best
        if not self.removals:
            raise ValueError(
                f"no layer can go: without the best one the selection score is {self.curve[-1]['retained']:.1%} of the "
                f"unpruned model's, and rank.min_retained is {settings.min_retained}; lower it, or set rank: null"
            )
        return PrunePlan(
            removals=self.removals,
            baseline_score=baseline["score"],
            baseline_scores=baseline["scores"],
            candidates=[_without_tokens(record) for record in self.scored],
            curve=self.curve,
            selection_mode=settings.selection,
            finetuned=self.after_removal is not None,
        )

    def share_out(
        self,
        number: int,
        candidates: Sequence[Candidate],
        blocks: Sequence[Sequence[int]],
        floor: Callable[[list[dict[str, Any]]], float | None] | None = None,
        advance: Advance | None = None,
        earlier: Mapping[Candidate, dict[str, Any]] | None = None,
    ) -> list[dict[str, Any]]:
        """Score candidates on blocks of clips, all processes together; their records, in order. Records in the journal are taken
        from it.

        `floor`, called with the records so far, gives the score below which a candidate is given up. `earlier` are the candidates'
        records on other clips, the same clips for all; the new records are over both.
        """
        earlier = earlier or {}
        num_clips = sum(map(len, blocks)) + (earlier[candidates[0]]["num_clips"] if earlier else 0)
        records = [r for c in candidates if (r := self.known.get(_key(number, c, num_clips)))]
        if advance:
            advance(len(records))
        pending = [c for c in candidates if _key(number, c, num_clips) not in self.known]
        size = self._wave_size(len(pending))
        for start in range(0, len(pending), size):
            wave = pending[start : start + size]
            limit = floor(records) if floor else None
            mine = share_of(wave, process_index(), num_processes(), longest_first)
            scored_here = self._score(number, mine, blocks, limit, earlier)
            for record in chain.from_iterable(gather(scored_here)):
                self._add_to_journal(record)
                records.append(record)
            if advance:
                best = max((r["score"] for r in records if r["score"] is not None), default=None)
                advance(len(wave), f"round {number}, best {best:.2f}" if best is not None else "")
        by_candidate = {_identity(r): r for r in records}
        return [by_candidate[_key(number, c, num_clips)] for c in candidates]

    def _add_to_journal(self, record: dict[str, Any]) -> None:
        self.known[_identity(record)] = record
        if is_main_process():
            append_jsonl(self.journal, record)

    def _baseline(self) -> dict[str, Any]:
        """The unpruned model's record. The main process makes it, and all processes go on from its translations."""
        key = _key(0, None, len(self.scorer.select.clips))
        if key not in self.known:
            started, record = time.perf_counter(), None
            if is_main_process():
                scratch = self.journal.parent / SCRATCH
                scratch.mkdir(exist_ok=True)
                record = _record(0, None, self.scorer.parent_tally(scratch / "unpruned.jsonl"), True, started)
            self._add_to_journal(gather(record)[0])
        return self.known[key]

    def tally(self, record: dict[str, Any]) -> Tally:
        """A record's translations and losses as a tally, which can be added to."""
        tally = Tally(self.scorer)
        if record["tokens"]:
            tally.add(_tokens(record))
        for language, sums in record["losses"].items():
            tally.losses[language] = {int(clip): tuple(pair) for clip, pair in sums.items()}
        return tally

    def statistics(self, record: dict[str, Any]) -> list[SentenceStatistics]:
        """A record's n-gram counts, one entry per language."""
        tally = self.tally(record)
        return [tally.statistics(language) for language in self.scorer.translated]

    def _score(
        self,
        number: int,
        candidates: Sequence[Candidate],
        blocks: Sequence[Sequence[int]],
        floor: float | None,
        earlier: Mapping[Candidate, dict[str, Any]],
    ) -> list[dict[str, Any]]:
        """Score some candidates of a round in one process, together; their records. A candidate that was given up has score None."""
        started = time.perf_counter()
        tallies = {c: self.tally(earlier[c]) if c in earlier else Tally(self.scorer) for c in candidates}
        remaining = dict(tallies)
        for i, block in enumerate(blocks):
            added = self.scorer.add(remaining, block, floor) if remaining else {}
            remaining = {c: tally for c, tally in remaining.items() if added[c]}
            if floor is not None and i + 1 < len(blocks):
                remaining = {c: tally for c, tally in remaining.items() if tally.bound() >= floor}
        records = [_record(number, c, tally, c in remaining, started) for c, tally in tallies.items()]
        for candidate, record in zip(candidates, records):
            record["seconds"] = round(record["seconds"] / len(candidates), 4)
            if candidate in earlier:
                record["seconds"] += earlier[candidate]["seconds"]
            record["num_clips"] = sum(map(len, blocks)) + (earlier[candidate]["num_clips"] if earlier else 0)
        return records

    def _round(
        self, number: int, candidates: Sequence[Candidate], advance: Advance
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Run a round: the best candidate's record, and the records of all candidates."""
        settings = self.scorer.settings
        # Only the exact mode uses the order; the others score all candidates on the first clips. Ordering takes a pass of the
        # parent.
        ordered = self._ordered(number, candidates) if settings.selection == "exact" else candidates
        if number == 1:
            self._probe(candidates)
        if settings.selection != "exact":
            halving = settings.selection == "successive-halving"
            best_and_records = race(
                candidates,
                len(self.scorer.select.clips),
                settings.first_clips,
                lambda remaining, clips, last: self.share_out(number, remaining, [clips], earlier=last),
                better_half if halving else partial(not_beaten, statistics=self.statistics),
            )
            advance(len(candidates), f"round {number}")
            return best_and_records
        floor = second_best if settings.early_stopping else None
        records = self.share_out(number, ordered, self.scorer.blocks, floor, advance)
        records = sorted(records, key=lambda r: candidates.index(Candidate(r["tower"], r["layer"])))
        scored = [record for record in records if record["score"] is not None]
        return max(scored, key=lambda record: record["score"]), records  # of equal scores the first candidate wins

    def _ordered(self, number: int, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The most promising candidates first, so that the others are given up early: by last round's score, then Block Influence."""
        num_clips = len(self.scorer.select.clips)
        if all(_key(number, candidate, num_clips) in self.known for candidate in candidates):
            return list(candidates)
        last_scores = {(r["tower"], r["layer"]): r["score"] for r in self.scored if r["round"] == number - 1}

        def promise(candidate: Candidate) -> tuple[float, float]:
            score = last_scores.get(candidate)
            return (-score if score is not None else 0.0, self.scorer.influence(candidate))

        return gather(sorted(candidates, key=promise))[0]

    def _probe(self, candidates: Sequence[Candidate]) -> None:
        """Score some candidates, and say how long the whole search will take at their speed."""
        total = self._num_candidates()
        count = self._wave_size(len(candidates))
        first = (len(candidates) - count) // 2  # of middle depth: the layers above the missing one take the time
        started = time.perf_counter()
        probed = self.share_out(1, candidates[first : first + count], self.scorer.blocks)
        # Records of an earlier run come at once, and say what they took.
        of_records = max(record["seconds"] for record in probed) / num_processes()
        seconds = max((time.perf_counter() - started) / len(probed), of_records)
        expected = f"{seconds * total / 60:.1f} minutes" if seconds * total > 90 else f"{seconds * total:.0f} s"
        say(f"  about {expected} at {seconds:.2f} s per candidate, if none is given up")

    def _wave_size(self, count: int) -> int:
        return wave_size(count, self.scorer.group_size(), num_processes())

    def _num_candidates(self) -> int:
        """Candidates of all rounds together."""
        in_first_round = len(self.scorer.candidates(self.scorer.lineage))
        return sum(in_first_round - removed for removed in range(self.scorer.settings.num_layers_to_remove))

    def _add_to_curve(self, number: int, record: dict[str, Any]) -> bool:
        """Add the score without `number` layers to the curve. True if `min_retained` of the unpruned score is kept."""
        entry: dict[str, Any] = {"num_removed": number, "score": record["score"]}
        if "loss" not in self.scorer.metrics.values():
            entry["retained"] = (
                record["score"] / self.curve[0]["score"] if self.curve and self.curve[0]["score"] else 1.0
            )
        self.curve.append(entry)
        min_retained = self.scorer.settings.min_retained
        if min_retained is None or entry["retained"] >= min_retained:
            return True
        say(
            f"  {number} layers removed would keep {entry['retained']:.1%} of the score, below {min_retained:.1%}: stopping"
        )
        return False

    def _removal(self, number: int, best: dict[str, Any], records: Sequence[dict[str, Any]]) -> Removal:
        """The removal of the best candidate, with its score difference to the runner-up, and that difference's interval."""
        removal = Removal(tower=best["tower"], layer=best["layer"], round=number, score=best["score"])
        others = [
            r for r in records if r["score"] is not None and r is not best and r["num_clips"] == best["num_clips"]
        ]
        if not others or set(self.scorer.translated) != set(self.scorer.metrics):
            return removal
        second = max(others, key=lambda record: record["score"])
        interval, p_value = paired_bootstrap_difference(self.statistics(best), self.statistics(second))
        margin = {"difference": interval.value, "low": interval.low, "high": interval.high, "p_value": p_value}
        return removal.model_copy(update={"runner_up": {"tower": second["tower"], "layer": second["layer"], **margin}})


def second_best(records: Sequence[dict[str, Any]]) -> float | None:
    """The second best score so far. A candidate below it is neither the best of its round nor the runner-up."""
    scores = sorted((r["score"] for r in records if r["score"] is not None), reverse=True)
    return scores[1] - TIE if len(scores) > 1 else None


def _record(number: int, candidate: Candidate | None, tally: Tally, complete: bool, started: float) -> dict[str, Any]:
    """The record of a candidate in round `number`, or of the unpruned model. If given up, score is None and there are no tokens."""
    scores = tally.scores() if complete else {}
    return {
        "round": number,
        "tower": candidate.tower if candidate else None,
        "layer": candidate.layer if candidate else None,
        "num_clips": len(tally.scorer.select.clips),
        "score": sum(scores.values()) / len(scores) if complete else None,
        "scores": scores,
        "num_truncated": tally.num_runaways(),
        "seconds": round(time.perf_counter() - started, 4),
        "tokens": {str(clip): rows for clip, rows in sorted(tally.tokens.items())} if complete else {},
        "losses": tally.losses,
    }


def _key(number: int, candidate: Candidate | None, num_clips: int) -> tuple[Any, ...]:
    """What names a record in the journal; `_identity` of that record."""
    tower, layer = candidate or (None, None)
    return (number, tower, layer, num_clips)


def _identity(record: dict[str, Any]) -> tuple[Any, ...]:
    return (record["round"], record["tower"], record["layer"], record["num_clips"])


def _tokens(record: dict[str, Any]) -> dict[int, list[list[int]]]:
    return {int(clip): rows for clip, rows in record["tokens"].items()}


def _without_tokens(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("tokens", "losses")}
