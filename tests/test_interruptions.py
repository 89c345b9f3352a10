"""SIGTERM and Ctrl-C, sent to real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from trimlingual.run.interruptions import Interrupted

from .test_pipeline import SMALL

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def started(folder: Path, manifests: list[str], *settings: str, launcher: Sequence[str] = ()) -> subprocess.Popen:
    words = [sys.executable, *launcher, "-m", "trimlingual", "finetune", "mini", "--run-dir", str(folder)]
    words += [word for value in [*SMALL, *manifests, *settings] for word in ("--set", value)]
    return subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(process: subprocess.Popen, there) -> None:
    while not there():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def position(folder: Path) -> int:
    """Steps done so far, as the training itself writes down."""
    try:
        return json.loads((folder / "teacher.partial" / "scratch" / "start.json").read_text())["step"]
    except (OSError, ValueError):
        return -1


@pytest.mark.slow
def test_all_processes_of_torchrun_stop_at_the_same_step(manifests, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = started(tmp_path, manifests, "finetune.max_steps=1000", "finetune.batch_size=2", launcher=launcher)
    until(process, lambda: position(tmp_path) >= 2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    step = position(tmp_path)
    assert f"stopped: training stopped after step {step} of 1000, which is saved" in said
    assert (tmp_path / "teacher.partial" / "scratch" / f"checkpoint-{step}" / "complete.json").is_file()
    assert said.count("Traceback") == said.count("SignalException: Process")  # torchrun's own, none of ours


def test_sigterm_saves_the_step_under_way_and_ends(manifests, tmp_path):
    long = ["finetune.max_steps=1000", "finetune.save_steps=1000", "finetune.save_minutes=1000"]
    process = started(tmp_path, manifests, *long)
    until(process, lambda: position(tmp_path) >= 2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert "Traceback" not in said
    scratch = tmp_path / "teacher.partial" / "scratch"
    step = position(tmp_path)
    assert f"stopped: training stopped after step {step} of 1000, which is saved" in said
    assert (scratch / f"checkpoint-{step}" / "complete.json").is_file()
    log = (tmp_path / "teacher.partial" / "log.txt").read_text(encoding="utf-8")
    assert f"training, step {step} of 1000" in log

    again = started(tmp_path, manifests, *long)
    until(again, lambda: position(tmp_path) > step)
    again.send_signal(signal.SIGINT)
    again.send_signal(signal.SIGINT)  # the second ends it at once
    _, said = again.communicate(timeout=60)
    assert again.returncode in (-signal.SIGINT, 130)
    assert f"training goes on at step {step} of 1000; no step was lost" in said
    assert "Traceback" not in said


WORK = """
import signal, sys, time
from trimlingual import cli
from trimlingual.run import interruptions

def work():
    if sys.argv[1] == "deferred":
        with interruptions.deferred():
            print("begun", flush=True)
            time.sleep(1.0)
            print("done", flush=True)
    else:
        print("begun", flush=True)
    time.sleep(30)

cli.app = work
cli.main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("kind", ["deferred", "plain"])
def test_what_can_be_saved_is_what_else_ends_at_once(kind, number, code):
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    out, said = process.communicate(timeout=20)
    assert process.returncode == code
    assert out == ("done\n" if kind == "deferred" else "")
    assert "stopped: " in said
    assert "Traceback" not in said


def test_no_error_handler_goes_on_from_it():
    assert not issubclass(Interrupted, Exception)
