"""The journal of the search under a budget: a killed search goes on, searches for other sizes share, older scores are not taken."""

from __future__ import annotations

import json

import pytest

from trimlingual.data.splits import Split
from trimlingual.run.artifacts import append_jsonl
from trimlingual.search.budget_scorer import BudgetScorer
from trimlingual.stages.rank import JOURNAL_FILE

from .test_budget import EVERY, METRICS, bytes_of, folder, lines_of, searched  # noqa: F401


def test_a_restart_gives_the_same_plan_and_makes_nothing_twice(folder, split, task, tmp_path):  # noqa: F811
    size = f"{bytes_of(folder, num_layers_to_remove=2).num_bytes() * 0.75 / 1e3:.1f} kB"
    budget = {"size": size, "bits": EVERY, "shortlist": 0.4}
    plain = searched(folder, split, task, tmp_path / "plain", "", budget=budget)
    lines = lines_of(tmp_path / "plain" / JOURNAL_FILE)
    again = tmp_path / "again"
    for kept in (1, len(lines) // 2, len(lines) - 3):
        again.mkdir(exist_ok=True)
        (again / JOURNAL_FILE).write_text("".join(line + "\n" for line in lines[:kept]))
        resumed = searched(folder, split, task, again, "", budget=budget)
        assert (resumed.removals, resumed.bits) == (plain.removals, plain.bits)
        found = [json.loads(line) for line in lines_of(again / JOURNAL_FILE)]
        assert len(set(map(_identity, found))) == len(found) == len(lines)


def test_by_loss_only_the_first_model_translates(folder, split, task, tmp_path, monkeypatch):  # noqa: F811
    translated, translate = [], BudgetScorer._translate
    monkeypatch.setattr(BudgetScorer, "_translate", lambda *given: translated.extend(given[2]) or translate(*given))
    start = bytes_of(folder, num_layers_to_remove=2).num_bytes()
    settings = {"metric": "loss", "budget": {"size": f"{start * 0.75 / 1e3:.1f} kB", "bits": EVERY}}
    plan = searched(folder, split, task, tmp_path / "plain", "", **settings)
    assert sorted(translated) == list(range(len(split.clips)))
    assert plan.num_bytes <= start * 0.75
    first = [c for c in plan.candidates if c["round"] == 1]
    assert {c["bits"] for c in first} == {0, 3, 4}
    assert [c["score"] for c in first] == [-sum(c["loss"].values()) / 2 for c in first]
    per_byte = {(c["part"], c["bits"]): max(0, c["lost"]) / min(c["saved_bytes"], start / 4) for c in first}
    lines = lines_of(tmp_path / "plain" / JOURNAL_FILE)
    part, _, bits = next(state for line in lines if (state := json.loads(line)["state"])).partition("=")
    assert per_byte[part, int(bits)] == min(per_byte.values())
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / JOURNAL_FILE).write_text("".join(line + "\n" for line in lines[: len(lines) // 2]))
    assert searched(folder, split, task, tmp_path / "again", "", **settings).bits == plan.bits
    assert len(translated) == len(split.clips)  # the journal has them


def _identity(record):
    return record["state"], record["part"], record["bits"], "loss" in record


@pytest.mark.parametrize("shortlist", [0.3, 1])
def test_searches_for_other_sizes_share_scores_and_choose_as_alone(folder, split, task, tmp_path, shortlist):  # noqa: F811
    """Whichever goes first: each plan is the one that the search makes alone, and what was scored is not scored again."""
    split = Split("select", split.clips[:4])
    start = bytes_of(folder, num_layers_to_remove=2).num_bytes()
    budgets = [
        {"size": f"{start * share / 1e3:.1f} kB", "bits": EVERY, "shortlist": shortlist} for share in (0.92, 0.84, 0.75)
    ]
    alone = [searched(folder, split, task, tmp_path / f"alone {i}", "", budget=b) for i, b in enumerate(budgets)]
    for order in ([0, 1, 2], [2, 1, 0]):
        done = []
        for number in order:
            out = tmp_path / f"{order[0]} {number}"
            plan = searched(folder, split, task, out, "", budget=budgets[number], others=done)
            wanted = alone[number]
            assert (plan.removals, plan.bits, plan.num_bytes) == (wanted.removals, wanted.bits, wanted.num_bytes)
            assert [_without_time(c) for c in plan.candidates] == [_without_time(c) for c in wanted.candidates]
            assert any(c.get("shared") for c in plan.candidates) == bool(done)
            before = {_identity(json.loads(line)) for other in done for line in lines_of(other / JOURNAL_FILE)}
            assert not {_identity(json.loads(line)) for line in lines_of(out / JOURNAL_FILE)} & before
            done.append(out)


def test_a_candidate_that_an_earlier_version_gave_up_is_scored(folder, split, task, tmp_path):  # noqa: F811
    split, other = Split("select", split.clips[:2]), tmp_path / "other"
    size = f"{bytes_of(folder, num_layers_to_remove=2).num_bytes() * 0.97 / 1e3:.1f} kB"
    alone = searched(folder, split, task, tmp_path / "alone", size)
    other.mkdir()
    for record in map(json.loads, lines_of(tmp_path / "alone" / JOURNAL_FILE)):
        if "score" in record and record["part"]:
            append_jsonl(other / JOURNAL_FILE, record | {"score": None, "tokens": {}, "below": 1.0})
    plan = searched(folder, split, task, tmp_path / "again", size, others=[other])
    assert (plan.removals, plan.bits) == (alone.removals, alone.bits)


@pytest.mark.parametrize("metric", [METRICS, "loss"])
def test_losses_of_the_references_in_an_earlier_version_s_journal_are_not_taken(folder, split, task, tmp_path, metric):  # noqa: F811
    """Its translations are. By loss its scores are such losses too. Both in this search's journal and in another's."""
    split = Split("select", split.clips[:3])
    size = f"{bytes_of(folder, num_layers_to_remove=2).num_bytes() * 0.9 / 1e3:.1f} kB"
    alone = searched(folder, split, task, tmp_path / "alone", size, metric=metric)
    new = [json.loads(line) for line in lines_of(tmp_path / "alone" / JOURNAL_FILE)]
    for name, others in (("mine", []), ("again", [tmp_path / "theirs"])):
        journal = (others[0] if others else tmp_path / name) / JOURNAL_FILE
        journal.parent.mkdir()
        for record in new:
            old = {key: value for key, value in record.items() if key != "loss_of"}
            if "loss" in record:
                old["loss"] = dict.fromkeys(record["loss"], 9.0 - 1e-3 * len(record["part"] or ""))
            elif metric == "loss":
                old |= {"score": -9.0, "tokens": {}}
            append_jsonl(journal, old)
        plan = searched(folder, split, task, tmp_path / name, size, metric=metric, others=others)
        assert (plan.removals, plan.bits, plan.curve) == (alone.removals, alone.bits, alone.curve)
        assert [_without_time(c) for c in plan.candidates] == [_without_time(c) for c in alone.candidates]
        made = [json.loads(line) for line in lines_of(tmp_path / name / JOURNAL_FILE)][0 if others else len(new) :]
        assert {"score" in record for record in made} == ({False} if metric == METRICS else {True, False})


def _without_time(candidate):
    return {key: value for key, value in candidate.items() if key not in ("seconds", "shared")}
