"""The benchmark of training speed runs, on small models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "train_speed.py"


@pytest.mark.slow
@pytest.mark.parametrize("part", ["qlora", "full"])
def test_every_set_up_trains(tmp_path, part):
    out = tmp_path / "out.json"
    command = [sys.executable, str(SCRIPT), "--size", "small", "--clips", "8", "--blocks", "2", "--workers", "0"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        [*command, "--parts", part, "--commit", "0", "--out", str(out)],
        check=True,
        env=environment,
        capture_output=True,
    )
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["results"]["equal_loss_float32"]["difference"] < 1e-4
    assert not {name: result["error"] for name, result in record["results"].items() if "error" in result}
    assert set(record["speedup"][part]) == {"epoch", "median", "min", "max"}
