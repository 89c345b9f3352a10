"""The whole pipeline killed at random moments, on a small run; `benchmarks/kills.py` at the full number."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .test_pipeline import SMALL

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "kills.py"
LONGER = ["finetune.max_steps=12", "recover.max_steps=12", "quantize.train.max_steps=8"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_kills_change_nothing(manifests, tmp_path):
    settings = [word for value in [*SMALL, *LONGER, *manifests] for word in ("--set", value)]
    command = [sys.executable, str(SCRIPT), "--run-dir", str(tmp_path / "kills"), "--kills", "10", "--seconds", "8,40"]
    done = subprocess.run([*command, "--threads", "1", *settings], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["kills"], result["compared_kills"], result["different"]) == (10, 10, 0)
    assert result["complete"]
    assert result["compared_things"] > 20
