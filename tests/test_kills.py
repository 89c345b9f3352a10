"""The whole pipeline killed at random moments, on a small run; `benchmarks/kills.py` at the full number."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from .test_budgets import SEARCH, SIZES, STORED
from .test_pipeline import SMALL

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "kills.py"
LONGER = ["finetune.max_steps=12", "recover.max_steps=12", "quantize.train.max_steps=8"]


BUDGETS = [
    *STORED, SEARCH, "distill=null", "recover=null", "decode.max_new_tokens=8", "evaluate.models=[teacher, quantized]",
    "rank.protect_first=5", "rank.protect_last=5", "export=null",
]  # fmt: skip


@pytest.fixture
def kills(monkeypatch):
    """The benchmark as a module, its folder on the path as Python puts a script's there."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("kills")


def killed(folder: Path, settings: list[str], *words: str) -> dict:
    """The result of the benchmark, which must end well."""
    overrides = [word for value in settings for word in ("--set", value)]
    command = [sys.executable, str(SCRIPT), "--run-dir", str(folder), "--threads", "1", *words, *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_kills_change_nothing(manifests, tmp_path):
    result = killed(tmp_path / "kills", [*SMALL, *LONGER, *manifests], "--kills", "10", "--seconds", "8,40")
    assert (result["kills"], result["compared_kills"], result["different"]) == (10, 10, 0)
    assert result["complete"]
    assert result["compared_things"] > 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_change_no_budgets_run(manifests, tmp_path):
    sizes = [word for size in SIZES for word in ("--budget", size)]
    result = killed(tmp_path / "kills", [*SMALL, *BUDGETS, *manifests], *sizes, "--kills", "6", "--seconds", "8,40")
    assert (result["kills"], result["compared_kills"], result["different"]) == (6, 6, 0)
    assert result["complete"]
    assert any(stage.startswith("budgets/") for stage in result["kills_by_stage"])


@pytest.mark.parametrize("made", ["rank", "evaluations/base", "budgets/5MB/rank", "budgets/5MB/evaluations/quantized"])
def test_what_is_being_made_is_found_where_it_is_made(kills, tmp_path, made):
    (tmp_path / "teacher").mkdir()
    (tmp_path / f"{made}.partial").mkdir(parents=True)
    assert kills.under_way(tmp_path) == made


def test_every_runs_plan_and_words_are_compared(kills, tmp_path):
    for run in ("", "budgets/5MB"):
        folder = tmp_path / run / "evaluations" / "quantized"
        folder.mkdir(parents=True)
        (folder / "translations.de.jsonl").write_text(run)
        (tmp_path / run / "rank").mkdir()
        (tmp_path / run / "rank" / "plan.json").write_text('{"removals": [], "bits": [{"part": "lm_head", "bits": 4}]}')
    found = kills.outcome(tmp_path)
    (tmp_path / "budgets" / "5MB" / "rank" / "plan.json").write_text('{"removals": [], "bits": []}')
    (tmp_path / "budgets" / "5MB" / "evaluations" / "quantized" / "translations.de.jsonl").write_text("other")
    changed = kills.outcome(tmp_path)
    assert {name for name in found if found[name] != changed[name]} == {
        "budgets/5MB/rank/plan.json:bits", "budgets/5MB/evaluations/quantized/translations.de.jsonl",
    }  # fmt: skip
