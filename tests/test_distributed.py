"""Fine-tuning under torchrun: two processes on the CPU (gloo)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from trimlingual.artifacts import read_artifact

from .test_pipeline import SMALL


@pytest.mark.slow
def test_two_processes_train_one_model(manifests, tmp_path):
    """Two processes with batch 2 are one process with batch 4, but for the order of additions."""
    losses = {}
    for processes, batch in ((1, 4), (2, 2)):
        folder = tmp_path / str(processes)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += ["-m", "trimlingual", "finetune", "mini", "--run-dir", str(folder)]
        for override in [
            *SMALL,
            *manifests,
            f"finetune.batch_size={batch}",
            "finetune.logging_steps=1",
            "model.device=cpu",
        ]:
            command += ["--set", override]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        info = read_artifact(folder / "teacher").info
        assert info["steps"] == 4
        losses[processes] = [entry["loss"] for entry in info["losses"]]
    assert losses[1] == pytest.approx(losses[2], rel=1e-3)
