"""The search for the best model of a size: layers and bits, by translation score lost per byte saved.

It starts from the model as `quantize` would store it. In every round each possible action (actions.py) is scored by real
translations, as the layer search does it: an action in a decoder layer shares with its parent all that is below, and the parent's
translations are its drafts. The action that loses least per byte is done, or the best few, each in a layer of its own; then
everything is scored again, or what was most promising by its last score (`scored_again`), until the budget holds. A score above
the parent's counts as no loss, and of actions without loss the one that saves most goes first. Bytes below the budget count for
nothing, unless they are spent (`spend_rest`): then parts get more bits while the budget holds, first the one that gains most per byte,
until none gains. What is missing to the budget is negative then, and so is what an action saves.

The processes of a distributed run share a round's actions. Each score is in the journal, so a search that was killed goes on. A
search for another size of the same model goes through the same states as long as its choices are the same, and takes the scores of
`others` there. A candidate that was given up is known to stay below a score; it is scored after all where that is not enough.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimlingual.recipe import TOWERS
from trimlingual.run.artifacts import append_jsonl, read_journal
from trimlingual.run.processes import gather, is_main_process, num_processes, process_index
from trimlingual.run.progress import progress, say
from trimlingual.search.actions import GONE, Action, Smaller, bits_after, layer_of, removed_by
from trimlingual.search.budget_scorer import BudgetScorer
from trimlingual.search.plan import FewerBits, PrunePlan, Removal
from trimlingual.search.scorer import Tally

State = tuple[Action, ...]


@dataclass
class BudgetSearch:
    """The search and its results so far. Every process has one, with the same results."""

    scorer: BudgetScorer
    smaller: Smaller
    journal: Path
    others: Sequence[Path] = ()  # journals of searches that differ in the size alone
    records: list[dict[str, Any]] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)  # per round: layers removed, bytes, score and share kept

    def run(self) -> PrunePlan:
        """Run all rounds. ValueError, before anything is scored, if no actions reach the budget."""
        settings = self.scorer.settings.budget
        assert settings is not None
        target = settings.num_bytes
        if problem := self.smaller.problem():
            raise ValueError(problem)
        self.known = _known(gather(self._read() if is_main_process() else [])[0])
        state: State = ()
        parent = baseline = self._parent(state, None)
        taken: list[tuple[Action, dict[str, Any]]] = []
        self._add_to_curve(state, baseline)
        start = self.smaller.num_bytes()
        say(
            f"search under a budget: {start / 1e6:.1f} MB before it, score {baseline['score']:.2f}; to reach {settings.size}"
        )
        while (missing := self.smaller.num_bytes(state) - target) > 0 or settings.spend_rest:
            number, started = len({record["round"] for record in self.records}) + 1, time.perf_counter()
            chosen = self._choose(self._round(number, state, parent, missing), missing)
            if not chosen:
                assert missing <= 0
                break  # no part gains by more bits
            for record in chosen:
                action = Action(record["part"], record["bits"])
                state = (*state, action)
                taken.append((action, record))
                if action.bits != GONE:
                    self.scorer.rounded.round_(*action)
            parent = self._parent(state, chosen[0] if len(chosen) == 1 else None)
            self._add_to_curve(state, parent)
            done = ", ".join(f"{r['part']} {'goes' if r['bits'] == GONE else str(r['bits']) + ' bits'}" for r in chosen)
            say(
                f"  round {number}: {done}; {self.smaller.num_bytes(state) / 1e6:.1f} MB, score {parent['score']:.2f}, "
                f"{time.perf_counter() - started:.1f} s"
            )
        return self._plan(taken, baseline)

    def _parent(self, state: State, record: dict[str, Any] | None) -> dict[str, Any]:
        """The record of the model after `state`, from which the next round starts. `record` has it where it is known already."""
        scorer = self.scorer
        removed = removed_by(state)
        found = self.known.get((_words(state), None, None))
        tokens = _tokens(record or found or {"tokens": {}})
        scorer.begin_round(removed, tokens or None)
        if not record and not found:
            started, made = time.perf_counter(), None
            if is_main_process():
                made = _record(0, state, None, scorer.parent_tally(), 0, 0.0)
                made["seconds"] = round(time.perf_counter() - started, 4)
            found = gather(made)[0]
            self._add_to_journal(found)
            scorer.begin_round(removed, _tokens(found))
        result = record or found
        assert result is not None
        return result

    def _round(self, number: int, state: State, parent: dict[str, Any], missing: int) -> list[dict[str, Any]]:
        """The records of the actions that are scored now."""
        saves = self._candidates(state, missing)
        if not saves:  # nothing fits any more
            return []
        known = {a: self.known[key] for a in saves if (key := (_words(state), a.part, a.bits)) in self.known}
        records = [_after(r, number, parent) for r in known.values() if r["score"] is not None]
        pending = [a for a in saves if a not in known or known[a]["score"] is None]
        prepared = False
        with progress(f"round {number}", len(saves)) as advance:
            advance(len(records))
            while pending:
                limit = self._worst_of_the_best(records, missing)
                wave = [
                    a for a in pending if a in known and known[a]["below"] <= _floor(parent, limit, saves[a], missing)
                ]
                if wave:  # given up before, and would be now
                    scored = [known[a] for a in wave]
                else:
                    if not prepared:
                        self.scorer.prepare()
                    wave, prepared = self._wave(pending), True
                    here = {a: saves[a] for a in wave[process_index() :: num_processes()]}
                    scored_here = self._scored(number, state, here, parent, missing, limit) if here else []
                    scored = [r for part in gather(scored_here) for r in part]
                    for record in scored:
                        self._add_to_journal(record)
                records += [_after(record, number, parent) for record in scored]
                pending = [a for a in pending if a not in wave]
                advance(len(wave))
        self.records += records
        return records

    def _read(self) -> list[dict[str, Any]]:
        """The records of other searches, marked as such, and of this one."""
        theirs = [{**record, "shared": True} for journal in self.others for record in read_journal(journal)]
        return [*theirs, *read_journal(self.journal)]

    def _candidates(self, state: State, missing: int) -> dict[Action, int]:
        """The actions that are scored in this round and the bytes that each saves; the most promising by their last score first."""
        size = self.smaller.num_bytes(state)
        spends = missing <= 0
        found = self.smaller.more_bits(state) if spends else self.smaller.possible(state)
        saves = {a: size - self.smaller.num_bytes([*state, a]) for a in found}
        last = {
            Action(r["part"], r["bits"]): _loss_per_byte(r, missing)
            for r in self.records
            if (r["saved_bytes"] < 0) == spends
        }
        if spends:
            possible = [a for a, saved in saves.items() if saved >= missing]
        else:  # a small layer that goes instead of a large one can put the budget out of reach
            possible = [a for a in found if saves[a] > 0 and self.smaller.smallest([*state, a]) <= size - missing]
        possible.sort(key=lambda a: (last.get(a, 0.0), -min(saves[a], missing)))
        budget = self.scorer.settings.budget
        assert budget is not None
        again = [a for a in possible if a in last][: budget.scored_again]
        return {a: saves[a] for a in possible if a in again or a not in last}

    def _wave(self, pending: Sequence[Action]) -> list[Action]:
        """The next actions to be scored together: layers that go, as many as are decoded at once, or one action per process."""
        if pending[0].bits != GONE:
            return [a for a in pending if a.bits != GONE][: num_processes()]
        return [a for a in pending if a.bits == GONE][: self.scorer.group_size() * num_processes()]

    def _scored(
        self,
        number: int,
        state: State,
        saves: Mapping[Action, int],
        parent: dict[str, Any],
        missing: int,
        limit: float | None,
    ) -> list[dict[str, Any]]:
        """The records of some actions and the bytes they save. One is given up once it must lose more than `limit` per byte."""
        started = time.perf_counter()
        floor = None if limit is None else _floor(parent, limit, max(saves.values()), missing)
        tallies = self.scorer.tallies(list(saves), floor)
        seconds = (time.perf_counter() - started) / len(saves)
        records = [_record(number, state, a, t, saved, seconds) for (a, saved), t in zip(saves.items(), tallies)]
        for record in records:
            if record["score"] is None:
                record["below"] = floor
        return records

    def _worst_of_the_best(self, records: Sequence[dict[str, Any]], missing: int) -> float | None:
        """Loss per byte that an action must stay below, to be among those that are done in this round."""
        settings = self.scorer.settings
        assert settings.budget is not None
        if not settings.early_stopping:
            return None
        # Twice as many as are done, because of several in the same layer only one is.
        values = sorted(_loss_per_byte(r, missing) for r in records if r["score"] is not None)
        values += [0.0] * (missing <= 0)  # what gains nothing is not done
        count = 2 * settings.budget.actions_per_round
        return min(values[count - 1 :], default=0.0 if missing <= 0 else None)

    def _choose(self, records: Sequence[dict[str, Any]], missing: int) -> list[dict[str, Any]]:
        """The best actions that do not touch the same layer, until the budget holds; or parts that gain by more bits, while it does."""
        budget = self.scorer.settings.budget
        assert budget is not None
        ordered = sorted(
            (r for r in records if r["score"] is not None),
            key=lambda r: (_loss_per_byte(r, missing), -min(r["saved_bytes"], missing), r["part"], r["bits"]),
        )
        chosen: list[dict[str, Any]] = []
        touched: set[str | None] = set()
        spends = missing <= 0
        for record in ordered:
            action = Action(record["part"], record["bits"])
            place = action.layer or action.part
            if place in touched or (chosen and record["bits"] == GONE):  # a layer that goes changes all others
                continue
            if spends and (record["lost"] >= 0 or record["saved_bytes"] < missing):
                continue
            chosen.append(record)
            touched.add(place)
            missing -= record["saved_bytes"]
            if len(chosen) == budget.actions_per_round or (missing <= 0 and not spends) or record["bits"] == GONE:
                break
        return chosen

    def _add_to_curve(self, state: State, record: Mapping[str, Any]) -> None:
        first = self.curve[0]["score"] if self.curve else record["score"]
        entry = {"num_removed": sum(map(len, removed_by(state).values())), "num_bytes": self.smaller.num_bytes(state)}
        self.curve.append({**entry, "score": record["score"], "retained": record["score"] / first if first else 1.0})

    def _add_to_journal(self, record: dict[str, Any]) -> None:
        self.known[_identity(record)] = record
        if is_main_process():
            append_jsonl(self.journal, record)

    def _plan(self, taken: Sequence[tuple[Action, dict[str, Any]]], baseline: dict[str, Any]) -> PrunePlan:
        state = tuple(action for action, _ in taken)
        final = bits_after(state)
        assert self.scorer.settings.budget is not None
        again = self.scorer.settings.budget.scored_again
        removals: list[Removal] = []
        fewer: dict[str, FewerBits] = {}
        for action, record in taken:
            if action.bits == GONE:
                tower, layer = layer_of(action)
                removals.append(Removal(tower=tower, layer=layer, round=record["round"], score=record["score"]))
            elif final.get(action.part) == action.bits != self.smaller.settings.bits_of(action.part):
                fewer.pop(action.part, None)  # it was in these bits before, and went lower meanwhile
                values = {k: record[k] for k in ("part", "bits", "round", "score", "saved_bytes")}
                fewer[action.part] = FewerBits(**values)
        return PrunePlan(
            removals=removals,
            bits=list(fewer.values()),
            num_bytes=self.smaller.num_bytes(state),
            baseline_score=baseline["score"],
            baseline_scores=baseline["scores"],
            candidates=[_for_plan(record) for record in self.records],
            curve=self.curve,
            selection_mode="budget" if again is None else f"budget, {again} scored again",
        )


def _known(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str | None, int | None], dict[str, Any]]:
    """By identity what is known best: a score, or the lowest that a candidate which was given up stays below."""
    found: dict[tuple[str, str | None, int | None], dict[str, Any]] = {}
    for record in records:
        identity, given_up = _identity(record), record["score"] is None
        if given_up and "below" not in record:  # of an earlier version
            continue
        before = found.get(identity)
        if before and given_up and (before["score"] is not None or before["below"] <= record["below"]):
            continue
        found[identity] = record
    return found


def _after(record: Mapping[str, Any], number: int, parent: Mapping[str, Any]) -> dict[str, Any]:
    """A record as of round `number`, with the score that it loses against its parent."""
    return {**record, "round": number, "lost": None if record["score"] is None else parent["score"] - record["score"]}


def _floor(parent: Mapping[str, Any], limit: float | None, saved: int, missing: int) -> float:
    """The score below which an action that saves (or spends) so many bytes loses more than `limit` per byte for certain."""
    num_bytes = min(saved, missing) if saved > 0 else -saved
    return -math.inf if limit is None else parent["score"] - limit * num_bytes - 1e-9


def _loss_per_byte(record: Mapping[str, Any], missing: int) -> float:
    """Of a candidate that was given up, infinite; of one that spends bytes what it loses per byte spent, a gain below 0."""
    if record["lost"] is None:
        return math.inf
    if record["saved_bytes"] < 0:
        return float(record["lost"]) / -record["saved_bytes"]
    return max(0.0, record["lost"]) / max(1, min(record["saved_bytes"], missing))


def _record(
    number: int, state: State, action: Action | None, tally: Tally | None, saved: int, seconds: float
) -> dict[str, Any]:
    scores = tally.scores() if tally else {}
    return {
        "round": number,
        "state": _words(state),
        "part": action.part if action else None,
        "bits": action.bits if action else None,
        "saved_bytes": saved,
        "score": sum(scores.values()) / len(scores) if scores else None,
        "scores": scores,
        "seconds": round(seconds, 4),
        "tokens": {str(clip): rows for clip, rows in sorted(tally.tokens.items())} if tally else {},
    }


def _for_plan(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as the plan has it; a layer that may go is named as the layer search names it."""
    kept = {key: value for key, value in record.items() if key not in ("tokens", "state")}
    if record["bits"] == GONE:
        kept |= dict(zip(("tower", "layer"), layer_of(Action(record["part"], GONE))))
    return kept


def _words(state: State) -> str:
    """A state by its last bits and missing layers: in what order actions were done does not matter to the model."""
    gone = [f"{tower}.{layer}=0" for tower in TOWERS for layer in removed_by(state)[tower]]
    return " ".join(sorted([*gone, *(f"{part}={bits}" for part, bits in bits_after(state).items())]))


def _identity(record: Mapping[str, Any]) -> tuple[str, str | None, int | None]:
    return record["state"], record["part"], record["bits"]


def _tokens(record: Mapping[str, Any]) -> dict[int, list[list[int]]]:
    return {int(clip): rows for clip, rows in record["tokens"].items()}
