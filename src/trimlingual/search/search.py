"""The iterative layer search (Moslem 2025, section 4): every round removes the layer whose removal hurts the translation score least.

A round's candidates are shared out over the processes of a distributed run in waves: some candidates each, then everybody hears
everybody's results and the main process writes it down, so that a killed search goes on from its last wave.
"""

from __future__ import annotations

import math
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
from trimlingual.search.approximate import better_half, not_beaten, race
from trimlingual.search.plan import PrunePlan, Removal
from trimlingual.search.scorer import Candidate, Scorer, Tally

JOURNAL_FILE = "candidates.jsonl"
TIE = 1e-9  # scores closer than this are equal: bounds are sums in another order than scores
Advance = Callable[..., None]


@dataclass
class Search:
    """A search under way."""

    scorer: Scorer
    journal: Path
    # Fine-tunes after a removal, if the recipe asks for it: (lineage without the layer, removal).
    after_removal: Callable[[Lineage, Removal], None] | None = None
    removals: list[Removal] = field(default_factory=list)
    scored: list[dict[str, Any]] = field(default_factory=list)  # records of all rounds
    curve: list[dict[str, Any]] = field(default_factory=list)

    def run(self) -> PrunePlan:
        """Search; every record is in the journal as soon as everybody has heard of it."""
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
            self._note(0, baseline)
            lineage, parent = scorer.lineage, baseline
            for number in range(1, settings.num_layers_to_remove + 1):
                gone = {tower: [r.layer for r in self.removals if r.tower == tower] for tower in TOWERS}
                keeps = self.after_removal is None  # a trained model's translations are new
                scorer.begin_round(gone, _tokens(parent) if keeps or number == 1 else None)
                started = time.perf_counter()
                best, records = self._round(number, scorer.candidates(lineage), advance)
                self.scored += records
                if not self._note(number, best):
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
        """Records of the candidates on these blocks of clips, in order: from the journal, or scored now, shared by all processes.

        `floor(records so far)` is the score below which a candidate is given up. `earlier` holds the candidates' records on other
        clips, all the same, which are added to.
        """
        earlier = earlier or {}
        clips = sum(map(len, blocks)) + (earlier[candidates[0]]["num_clips"] if earlier else 0)
        records = [r for c in candidates if (r := self.known.get(_key(number, c, clips)))]
        if advance:
            advance(len(records))
        pending = [c for c in candidates if _key(number, c, clips) not in self.known]
        size = self._wave_size(len(pending))
        for start in range(0, len(pending), size):
            wave = pending[start : start + size]
            limit = floor(records) if floor else None
            mine = self._score(number, wave[process_index() :: num_processes()], blocks, limit, earlier)
            for record in chain.from_iterable(gather(mine)):
                self._keep(record)
                records.append(record)
            if advance:
                best = max((r["score"] for r in records if r["score"] is not None), default=None)
                advance(len(wave), f"round {number}, best {best:.2f}" if best is not None else "")
        by_candidate = {_identity(r): r for r in records}
        return [by_candidate[_key(number, c, clips)] for c in candidates]

    def _keep(self, record: dict[str, Any]) -> None:
        self.known[_identity(record)] = record
        if is_main_process():
            append_jsonl(self.journal, record)

    def _baseline(self) -> dict[str, Any]:
        """The unpruned model's record; everybody goes on from the main process's translations."""
        key = _key(0, None, len(self.scorer.select.clips))
        if key not in self.known:
            started, record = time.perf_counter(), None
            if is_main_process():
                scratch = self.journal.parent / SCRATCH
                scratch.mkdir(exist_ok=True)
                record = _record(0, None, self.scorer.parent_tally(scratch / "unpruned.jsonl"), True, started)
            self._keep(gather(record)[0])
        return self.known[key]

    def tally(self, record: dict[str, Any]) -> Tally:
        """A record's translations, to be scored again."""
        tally = Tally(self.scorer)
        if record["tokens"]:
            tally.add(_tokens(record))
        for language, sums in record["losses"].items():
            tally.losses[language] = {int(clip): tuple(pair) for clip, pair in sums.items()}
        return tally

    def statistics(self, record: dict[str, Any]) -> list[SentenceStatistics]:
        """A record's counts, language by language."""
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
        """Records of some candidates of round `number`, scored together; the score is None of one that was given up."""
        started = time.perf_counter()
        tallies = {c: self.tally(earlier[c]) if c in earlier else Tally(self.scorer) for c in candidates}
        standing = dict(tallies)
        for i, block in enumerate(blocks):
            done = self.scorer.add(standing, block, floor) if standing else {}
            standing = {c: tally for c, tally in standing.items() if done[c]}
            if floor is not None and i + 1 < len(blocks):
                standing = {c: tally for c, tally in standing.items() if tally.bound() >= floor}
        records = [_record(number, c, tally, c in standing, started) for c, tally in tallies.items()]
        for candidate, record in zip(candidates, records):
            record["seconds"] = round(record["seconds"] / len(candidates), 4)
            if candidate in earlier:
                record["seconds"] += earlier[candidate]["seconds"]
            record["num_clips"] = sum(map(len, blocks)) + (earlier[candidate]["num_clips"] if earlier else 0)
        return records

    def _round(
        self, number: int, candidates: Sequence[Candidate], advance: Advance
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The best candidate's record and all of the round's records."""
        settings = self.scorer.settings
        # A race looks at all candidates first, in any order: what ordering takes (a pass of the parent) would be wasted on it.
        ordered = self._ordered(number, candidates) if settings.selection == "exact" else candidates
        if number == 1:
            self._probe(candidates)
        if settings.selection != "exact":
            halving = settings.selection == "successive-halving"
            won = race(
                candidates,
                len(self.scorer.select.clips),
                settings.first_clips,
                lambda standing, clips, last: self.share_out(number, standing, [clips], earlier=last),
                better_half if halving else partial(not_beaten, statistics=self.statistics),
            )
            advance(len(candidates), f"round {number}")
            return won
        floor = second_best if settings.early_stopping else None
        records = self.share_out(number, ordered, self.scorer.blocks, floor, advance)
        records = sorted(records, key=lambda r: candidates.index(Candidate(r["tower"], r["layer"])))
        whole = [record for record in records if record["score"] is not None]
        return max(whole, key=lambda record: record["score"]), records  # of equal ones the first, so the order is fixed

    def _ordered(self, number: int, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Most promising first, so that the others are given up early: by the last round's score, else by Block Influence."""
        clips = len(self.scorer.select.clips)
        if all(_key(number, candidate, clips) in self.known for candidate in candidates):
            return list(candidates)
        last = {(r["tower"], r["layer"]): r["score"] for r in self.scored if r["round"] == number - 1}

        def promise(candidate: Candidate) -> tuple[float, float]:
            score = last.get(candidate)
            return (-score if score is not None else 0.0, self.scorer.influence(candidate))

        return gather(sorted(candidates, key=promise))[0]

    def _probe(self, candidates: Sequence[Candidate]) -> None:
        """Time some candidates, and say how long the whole search will take."""
        total = self._num_candidates()
        count = self._wave_size(len(candidates))
        first = (len(candidates) - count) // 2  # of middle depth: what lies above the missing layer is what takes time
        started = time.perf_counter()
        probed = self.share_out(1, candidates[first : first + count], self.scorer.blocks)
        seconds = max(time.perf_counter() - started, max(r["seconds"] for r in probed) / num_processes()) / len(probed)
        expected = f"{seconds * total / 60:.1f} minutes" if seconds * total > 90 else f"{seconds * total:.0f} s"
        say(f"  about {expected} at {seconds:.2f} s a candidate, if none is given up")

    def _wave_size(self, count: int) -> int:
        """Candidates of all processes in a wave, of `count` that are left: in waves of equal size."""
        most = self.scorer.group_size() * num_processes()
        return math.ceil(count / math.ceil(count / most)) if count else 1

    def _num_candidates(self) -> int:
        first = len(self.scorer.candidates(self.scorer.lineage))
        return sum(first - removed for removed in range(self.scorer.settings.num_layers_to_remove))

    def _note(self, number: int, record: dict[str, Any]) -> bool:
        """Add to the curve; whether enough of the score is kept to go on."""
        entry: dict[str, Any] = {"num_removed": number, "score": record["score"]}
        if "loss" not in self.scorer.metrics.values():
            entry["retained"] = (
                record["score"] / self.curve[0]["score"] if self.curve and self.curve[0]["score"] else 1.0
            )
        self.curve.append(entry)
        least = self.scorer.settings.min_retained
        if least is None or entry["retained"] >= least:
            return True
        say(f"  {number} layers removed would keep {entry['retained']:.1%} of the score, below {least:.1%}: stopping")
        return False

    def _removal(self, number: int, best: dict[str, Any], records: Sequence[dict[str, Any]]) -> Removal:
        """The removal, with how sure it is against the runner-up."""
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
    """Below this a candidate is neither the best of its round nor the runner-up."""
    scores = sorted((r["score"] for r in records if r["score"] is not None), reverse=True)
    return scores[1] - TIE if len(scores) > 1 else None


def _record(number: int, candidate: Candidate | None, tally: Tally, whole: bool, started: float) -> dict[str, Any]:
    """What the journal remembers; score None and no translations of a candidate that was given up."""
    scores = tally.scores() if whole else {}
    return {
        "round": number,
        "tower": candidate.tower if candidate else None,
        "layer": candidate.layer if candidate else None,
        "num_clips": len(tally.scorer.select.clips),
        "score": sum(scores.values()) / len(scores) if whole else None,
        "scores": scores,
        "num_truncated": tally.num_runaways(),
        "seconds": round(time.perf_counter() - started, 4),
        "tokens": {str(clip): rows for clip, rows in sorted(tally.tokens.items())} if whole else {},
        "losses": tally.losses,
    }


def _key(number: int, candidate: Candidate | None, num_clips: int) -> tuple[Any, ...]:
    tower, layer = candidate or (None, None)
    return (number, tower, layer, num_clips)


def _identity(record: dict[str, Any]) -> tuple[Any, ...]:
    return (record["round"], record["tower"], record["layer"], record["num_clips"])


def _tokens(record: dict[str, Any]) -> dict[int, list[list[int]]]:
    return {int(clip): rows for clip, rows in record["tokens"].items()}


def _without_tokens(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("tokens", "losses")}
