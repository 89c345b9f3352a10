"""The laboratory's own parts: which experiments a command means, and stages that several runs share."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import threading
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from trimlingual.pipeline import run_stage
from trimlingual.recipe import load_recipe
from trimlingual.run.artifacts import find_artifact

LAB = Path(__file__).parents[1] / "benchmarks" / "lab"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(LAB))  # as Python puts a script's folder there

    def load(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(f"lab_{name}", LAB / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_names_with_seeds(script):
    run_all = script("run_all")
    assert run_all.jobs(["by-loss", "system-a:0,2"]) == [("by-loss", 0), ("system-a", 0), ("system-a", 2)]
    with pytest.raises(SystemExit, match=r"'by-lass' is not an experiment; there are: .*by-loss"):
        run_all.jobs(["by-lass"])
    everything = run_all.jobs([])
    assert {name for name, _ in everything} == set(run_all.EXPERIMENTS)
    assert ("system-b", 2) in everything
    assert len(everything) == len(set(everything))


def test_a_stage_is_made_once_for_all_runs(script, tmp_path):
    """Of two runs at once one makes it, and the other has it as hard links."""
    experiments = script("experiments")
    recipe = load_recipe("mini", ["model.device=cpu"])
    runs = [tmp_path / "runs" / name for name in ("one", "two")]
    made = []

    def make(run: Path) -> None:
        run.mkdir(parents=True)
        with experiments.shared(tmp_path, recipe, run, "data"):
            if find_artifact(run / "data") is None:
                run_stage(recipe, run, "data")
                made.append(run)

    threads = [threading.Thread(target=make, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    one, two = (run / "data" / "artifact.json" for run in runs)
    assert one.samefile(two)


def test_what_failed_is_tried_once_more_after_all_others(script, monkeypatch, tmp_path):
    """Also by the only slot; what fails twice does not hold up the end."""
    run_all = script("run_all")
    tried = []

    def run(self: Any, job: str, *words: str, mps: bool) -> bool:
        tried.append(job)
        if job == "third-0" or (job == "gold-0" and tried.count(job) == 1):
            self.failed.append(job)
            return False
        self.result(*job.rsplit("-", 1)).write_text("{}")
        return True

    (tmp_path / "results").mkdir()
    monkeypatch.setattr(run_all.Runner, "run", run)
    monkeypatch.setattr(run_all, "start_mps", lambda lab: None)
    options = {"lab": tmp_path, "minutes": 1.0, "at_once": 1, "commit": "", "out": None}
    run_all.Runner(argparse.Namespace(**options)).experiments([("gold", 0), ("third", 0), ("tokens", 0)])
    assert tried == ["gold-0", "third-0", "tokens-0", "gold-0", "third-0"]


def test_the_plots_in_the_documents_are_those_of_the_results(script, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["plots.py", "--out", str(tmp_path)])
    script("plots").main()
    images = LAB.parents[1] / "docs" / "images"
    drawn = sorted(tmp_path.iterdir())
    assert len(drawn) == 4
    assert [path.read_text() for path in drawn] == [(images / path.name).read_text() for path in drawn]
    for path in drawn:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
        assert path.name in (LAB.parents[1] / "docs" / "results.md").read_text()


def test_the_rows_in_the_documents_are_those_of_the_results(script):
    """Models by experiment, and one way to a size less another."""
    tables = script("tables")
    made: set[str] = set()
    for folder in (tables.RESULTS, *(tables.RESULTS / name for name in ("lab_first", "lab_third"))):
        rows = tables.read(folder)
        for voice in ("all", "heard", "unheard"):
            made |= {*tables.table(rows, list(rows), tables.ORDER, voice)}
        made |= {*tables.compared(folder)}
    cells = {tuple(cell.strip() for cell in line.split("|")) for line in made}
    document = (LAB.parents[1] / "docs" / "results.md").read_text("utf-8").splitlines()
    told = [tuple(cell.strip() for cell in line.split("|")) for line in document if line.startswith("|")]
    models = [row for row in told if len(row) > 2 and row[2] in tables.ORDER]
    pairs = [row for row in told if " less " in row[1]]
    assert len(models) > 80
    assert len(pairs) > 20
    assert [row for row in models + pairs if row not in cells] == []
