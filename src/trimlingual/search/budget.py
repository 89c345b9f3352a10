"""The search for the best model of a size: layers and bits, by translation score lost per byte saved.

It starts from the model as `quantize` would store it, and translates the selection clips. In every round the loss of these first
translations is computed for each possible action (actions.py). Those for which it rises least, per byte saved, are the shortlist, and
are scored by real translations, as in the layer search: an action in a decoder layer shares with its parent all that is below, and the
parent's translations are its drafts. (On a hundred clips a score's noise is larger than what most actions cost: the best of all by
score alone is often one of the worst. The loss has less noise, because it moves with every token and not only where a translation
changes. The references have a loss too, but the model may be far from their words.) The action that loses least per byte is
done, or the best few, each in a layer of its own; then everything is scored again, until the budget holds. A score above the parent's
counts as no loss, and of actions without loss the one that saves most goes first. Bytes below the budget count for nothing, unless they
are spent (`spend_rest`): then parts get more bits while the budget holds, first the one that gains most per byte, until none gains.
What is missing to the budget is negative then, and so is what an action saves. With the metric "loss" nothing else is translated: the
loss is the score.

The processes of a distributed run share a round's actions. Each result is in the journal, so a search that was killed goes on. A
search for another size of the same model goes through the same states as long as its choices are the same, and takes the results of
`others` there: its plan is the one that it would have found alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

from trimlingual.recipe import TOWERS
from trimlingual.run.artifacts import append_jsonl, read_journal
from trimlingual.run.processes import gather, is_main_process, num_processes, process_index
from trimlingual.run.progress import progress, say
from trimlingual.search.actions import GONE, Action, Smaller, bits_after, layer_of, removed_by
from trimlingual.search.budget_scorer import BudgetScorer
from trimlingual.search.plan import FewerBits, PrunePlan, Removal
from trimlingual.search.scorer import Tally
from trimlingual.search.sharing import longest_first, share_of, wave_size

State = tuple[Action, ...]
Identity = tuple[str, str | None, int | None]
LOSS_OF = {"loss_of": "own translations"}  # in records of losses; earlier versions took the references


@dataclass
class BudgetSearch:
    """The search and its results so far. Every process has one, with the same results."""

    scorer: BudgetScorer
    smaller: Smaller
    journal: Path
    others: Sequence[Path] = ()  # journals of searches that differ in the size alone
    records: list[dict[str, Any]] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)  # per round: layers removed, bytes, score and share kept
    # What is known of actions after a state, of the state itself under (state, None, None): their losses, and their translations.
    losses: dict[Identity, dict[str, Any]] = field(default_factory=dict)
    translated: dict[Identity, dict[str, Any]] = field(default_factory=dict)

    def run(self) -> PrunePlan:
        """Run all rounds. ValueError, before anything is scored, if no actions reach the budget."""
        settings = self.scorer.settings.budget
        assert settings is not None
        target = settings.num_bytes
        if problem := self.smaller.problem():
            raise ValueError(problem)
        for record in gather(self._read() if is_main_process() else [])[0]:
            self._remember(record)
        state: State = ()
        parent = baseline = self.begin()
        taken: list[tuple[Action, dict[str, Any]]] = []
        self._add_to_curve(state, baseline)
        start = self.smaller.num_bytes()
        say(
            f"search under a budget: {start / 1e6:.1f} MB before it, score {baseline['score']:.2f}; to reach {settings.size}"
        )
        while (missing := self.smaller.num_bytes(state) - target) > 0 or settings.spend_rest:
            number, started = len(self.curve), time.perf_counter()
            chosen = self._choose(self._round(number, state, parent, missing), missing)
            if not chosen:
                assert missing <= 0
                break  # no part gains by more bits
            before = state
            for record in chosen:
                action = Action(record["part"], record["bits"])
                state = (*state, action)
                taken.append((action, record))
                if action.bits != GONE:
                    self.scorer.rounded.round_(*action)
            if len(chosen) == 1:
                self.translated.setdefault((_words(state), None, None), self.translated[_words(before), *state[-1]])
            parent = self._parent(state)
            self._add_to_curve(state, parent)
            done = ", ".join(f"{r['part']} {'goes' if r['bits'] == GONE else str(r['bits']) + ' bits'}" for r in chosen)
            say(
                f"  round {number}: {done}; {self.smaller.num_bytes(state) / 1e6:.1f} MB, score {parent['score']:.2f}, "
                f"{time.perf_counter() - started:.1f} s"
            )
        return self._plan(taken, baseline)

    def begin(self) -> dict[str, Any]:
        """The record of the model before any action. Losses are of its translations."""
        record = self._parent(())
        self.scorer.answers = _tokens(record)
        return record

    @property
    def _by_loss(self) -> bool:
        return not self.scorer.translated

    def _read(self) -> list[dict[str, Any]]:
        """The records of other searches, marked as such, and of this one.

        Left out is what earlier versions made otherwise: losses of the references, and candidates that were given up.
        """
        theirs = [{**record, "shared": True} for journal in self.others for record in read_journal(journal)]
        every = [*theirs, *read_journal(self.journal)]
        return [record for record in every if self._holds(record)]

    def _holds(self, record: Mapping[str, Any]) -> bool:
        """Whether it is what this version would make."""
        of_loss = self._by_loss or "loss" in record
        return record.items() >= LOSS_OF.items() if of_loss else record["score"] is not None

    def _remember(self, record: dict[str, Any]) -> None:
        known = self.losses if "loss" in record else self.translated
        known[record["state"], record["part"], record["bits"]] = record

    def _add_to_journal(self, record: dict[str, Any]) -> None:
        self._remember(record)
        if is_main_process():
            append_jsonl(self.journal, record)

    def _parent(self, state: State) -> dict[str, Any]:
        """The record of the model after `state`, from which the next round starts."""
        scorer, removed, key = self.scorer, removed_by(state), (_words(state), None, None)
        if key not in self.translated:
            scorer.begin_round(removed, None)
            started, made = time.perf_counter(), None
            if is_main_process():
                tally = scorer.parent_tally()
                made = _record(state, None, time.perf_counter() - started) | _translations(tally)
                made |= LOSS_OF if self._by_loss else {}
            self._add_to_journal(gather(made)[0])
        parent = self.translated[key]
        scorer.begin_round(removed, _tokens(parent))
        return parent

    def _round(self, number: int, state: State, parent: dict[str, Any], missing: int) -> list[dict[str, Any]]:
        """The records of the actions that are possible now; those that were translated have a score, and what they lose."""
        saves = self._possible(state, missing)
        if not saves:  # nothing fits any more
            return []
        budget = self.scorer.settings.budget
        assert budget is not None
        title, short, words = f"round {number}, losses", [*saves], _words(state)
        if self._by_loss:  # the parent's loss is its score
            self._make(title, state, short, self.losses, self._with_losses)
            self.translated |= {(words, *action): _as_score(self.losses[words, *action]) for action in saves}
        else:
            self._make(title, state, [None, *short], self.losses, self._with_losses)
            loss = {a: mean(self.losses[words, *(a or (None, None))]["loss"].values()) for a in (None, *saves)}

            def first(a: Action) -> tuple[float, int, Action]:
                return _per_byte(loss[a] - loss[None], saves[a], missing), -min(saves[a], missing), a

            short = sorted(saves, key=first)[: math.ceil(budget.shortlist * len(saves))]
            if any((words, *action) not in self.translated for action in short):
                self.scorer.prepare()
            self._make(f"round {number}, translations", state, short, self.translated, self._with_translations)
        records = []
        for action, saved in saves.items():
            translated = self.translated[words, *action] if action in short else None
            record = _merged(self.losses[words, *action], translated) | {"round": number, "saved_bytes": saved}
            records.append(record | {"lost": parent["score"] - translated["score"] if translated else None})
        self.records += records
        return records

    def _possible(self, state: State, missing: int) -> dict[Action, int]:
        """The actions that are possible now and the bytes that each saves."""
        size = self.smaller.num_bytes(state)
        spends = missing <= 0
        found = self.smaller.more_bits(state) if spends else self.smaller.possible(state)
        saves = {a: size - self.smaller.num_bytes([*state, a]) for a in found}
        if spends:
            return {a: saved for a, saved in saves.items() if saved >= missing}
        # A small layer that goes instead of a large one can put the budget out of reach.
        return {a: s for a, s in saves.items() if s > 0 and self.smaller.smallest([*state, a]) <= size - missing}

    def _make(
        self,
        title: str,
        state: State,
        actions: Sequence[Action | None],
        known: Mapping[Identity, dict[str, Any]],
        make: Callable[[State, Sequence[Any]], list[dict[str, Any]]],
    ) -> None:
        """Make the records of actions that are not known yet. The processes share them, and each wave is in the journal at once."""
        pending = [a for a in actions if (_words(state), *(a or (None, None))) not in known]
        with progress(title, len(actions)) as advance:
            advance(len(actions) - len(pending), earlier=True)
            while pending:
                wave = self._wave(pending)
                mine = share_of(wave, process_index(), num_processes(), _order)
                for record in chain(*gather(make(state, mine) if mine else [])):
                    self._add_to_journal(record)
                pending = [a for a in pending if a not in wave]
                advance(len(wave))

    def _wave(self, pending: Sequence[Action | None]) -> list[Action | None]:
        """The next actions to be made together: layers that go, as many as are decoded at once, or one action per process."""
        gone = [a for a in pending if a and a.bits == GONE]
        if pending[0] not in gone:
            return [a for a in pending if a not in gone][: num_processes()]
        return list(gone[: wave_size(len(gone), self.scorer.group_size(), num_processes())])

    def _with_losses(self, state: State, actions: Sequence[Action | None]) -> list[dict[str, Any]]:
        records = []
        for action in actions:
            started = time.perf_counter()
            loss = self.scorer.loss(action)
            records.append(_record(state, action, time.perf_counter() - started) | {"loss": loss} | LOSS_OF)
        return records

    def _with_translations(self, state: State, actions: Sequence[Action]) -> list[dict[str, Any]]:
        started = time.perf_counter()
        tallies = self.scorer.tallies(actions)
        seconds = (time.perf_counter() - started) / len(actions)
        return [_record(state, action, seconds) | _translations(tally) for action, tally in zip(actions, tallies)]

    def _choose(self, records: Sequence[dict[str, Any]], missing: int) -> list[dict[str, Any]]:
        """The best actions that do not touch the same layer, until the budget holds; or parts that gain by more bits, while it does.

        Where a large part came last, what was chosen before it may not be needed any more, and is not done.
        """
        budget = self.scorer.settings.budget
        assert budget is not None

        def first(r: dict[str, Any]) -> tuple[float, int, str, int]:
            return (
                _per_byte(r["lost"], r["saved_bytes"], missing),
                -min(r["saved_bytes"], missing),
                r["part"],
                r["bits"],
            )

        left = [r for r in records if r["lost"] is not None]
        chosen: list[dict[str, Any]] = []
        touched: set[str | None] = set()
        spends = missing <= 0
        while left and len(chosen) < budget.actions_per_round and (missing > 0 or spends):
            record = min(left, key=first)  # anew: when little is missing a large part saves no more than a small one
            left.remove(record)
            action = Action(record["part"], record["bits"])
            place = action.layer or action.part
            if place in touched or (chosen and record["bits"] == GONE):  # a layer that goes changes all others
                continue
            if spends and (record["lost"] >= 0 or record["saved_bytes"] < missing):
                continue
            chosen.append(record)
            touched.add(place)
            missing -= record["saved_bytes"]
            if record["bits"] == GONE:
                break
        for record in [] if spends else sorted(chosen, key=lambda r: -r["lost"]):
            if missing + record["saved_bytes"] <= 0:
                chosen.remove(record)
                missing += record["saved_bytes"]
        return chosen

    def _add_to_curve(self, state: State, record: Mapping[str, Any]) -> None:
        first = self.curve[0]["score"] if self.curve else record["score"]
        entry = {"num_removed": sum(map(len, removed_by(state).values())), "num_bytes": self.smaller.num_bytes(state)}
        kept = {} if self._by_loss else {"retained": record["score"] / first if first else 1.0}
        self.curve.append({**entry, "score": record["score"], **kept})

    def _plan(self, taken: Sequence[tuple[Action, dict[str, Any]]], baseline: dict[str, Any]) -> PrunePlan:
        state = tuple(action for action, _ in taken)
        final = bits_after(state)
        assert self.scorer.settings.budget is not None
        shortlist = self.scorer.settings.budget.shortlist
        how = "by loss" if self._by_loss else f"{shortlist:.0%} translated"
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
            selection_mode="budget" if shortlist == 1 and not self._by_loss else f"budget, {how}",
        )


def _order(action: Action | None) -> tuple[bool, int]:
    """How a wave is dealt out: layers by what is run without them; anything else is one action per process."""
    return longest_first(layer_of(action)) if action and action.bits == GONE else (False, 0)


def _per_byte(lost: float, saved: int, missing: int) -> float:
    """Loss per byte saved, of those that are missing; of an action that spends bytes, per byte spent, a gain below 0."""
    return lost / -saved if saved < 0 else max(0.0, lost) / max(1, min(saved, missing))


def _record(state: State, action: Action | None, seconds: float) -> dict[str, Any]:
    part, bits = action or (None, None)
    return {"state": _words(state), "part": part, "bits": bits, "seconds": round(seconds, 4)}


def _translations(tally: Tally) -> dict[str, Any]:
    scores = tally.scores()
    tokens = {str(clip): rows for clip, rows in sorted(tally.tokens.items())}
    return {"score": mean(scores.values()), "scores": scores, "tokens": tokens}


def _as_score(loss: Mapping[str, Any]) -> dict[str, Any]:
    """A record of losses as one of scores, where the loss is the metric."""
    scores = {language: -value for language, value in loss["loss"].items()}
    record = {key: value for key, value in loss.items() if key != "loss"}
    return record | {"seconds": 0.0, "score": mean(scores.values()), "scores": scores, "tokens": {}}


def _merged(loss: Mapping[str, Any], translated: Mapping[str, Any] | None) -> dict[str, Any]:
    """All that is known of an action after a state; `shared` if what took longest came from another search."""
    if translated is None:
        return {**loss, "score": None}
    merged = {**loss, **translated, "seconds": loss["seconds"] + translated["seconds"]}
    return {key: value for key, value in merged.items() if key != "shared" or "shared" in translated}


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


def _tokens(record: Mapping[str, Any]) -> dict[int, list[list[int]]]:
    return {int(clip): rows for clip, rows in record["tokens"].items()}
