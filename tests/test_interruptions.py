"""SIGTERM and Ctrl-C, sent to real processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trimlingual.run.interruptions import Interrupted

from .test_distributed import torchrun, until
from .test_pipeline import SMALL, as_words

LONG = ["finetune.max_steps=1000", "finetune.save_steps=1000", "finetune.save_minutes=1000"]


def finetune(folder: Path, *overrides: str) -> list[str]:
    return ["finetune", "mini", "--run-dir", str(folder), *as_words(*SMALL, *overrides)]


def position(folder: Path) -> int:
    """Steps done so far, as the training itself writes down."""
    try:
        return json.loads((folder / "teacher.partial" / "scratch" / "start.json").read_text())["step"]
    except (OSError, ValueError):
        return -1


@pytest.mark.slow
def test_all_processes_of_torchrun_stop_at_the_same_step(manifests, tmp_path):
    process = torchrun(2, finetune(tmp_path, *manifests, "finetune.max_steps=1000", "finetune.batch_size=2"))
    until(process, lambda: position(tmp_path) >= 2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    step = position(tmp_path)
    assert f"stopped: training stopped after step {step} of 1000, which is saved" in said
    assert (tmp_path / "teacher.partial" / "scratch" / f"checkpoint-{step}" / "complete.json").is_file()
    assert said.count("Traceback") == said.count("SignalException: Process")  # torchrun's own, none of ours


def test_sigterm_saves_the_step_under_way_and_ends(manifests, tmp_path, start):
    process = start(finetune(tmp_path, *manifests, *LONG))
    process.until(lambda: position(tmp_path) >= 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143, process.stderr()
    assert "Traceback" not in process.stderr()
    scratch = tmp_path / "teacher.partial" / "scratch"
    step = position(tmp_path)
    assert f"stopped: training stopped after step {step} of 1000, which is saved" in process.stderr()
    assert (scratch / f"checkpoint-{step}" / "complete.json").is_file()
    log = (tmp_path / "teacher.partial" / "log.txt").read_text(encoding="utf-8")
    assert f"training, step {step} of 1000" in log

    again = start(finetune(tmp_path, *manifests, *LONG))
    again.until(lambda: position(tmp_path) > step)
    again.send_signal(signal.SIGINT)
    again.send_signal(signal.SIGINT)  # the second ends it at once
    assert again.wait() in (-signal.SIGINT, 130)
    assert f"training goes on at step {step} of 1000; no step was lost" in again.stderr()
    assert "Traceback" not in again.stderr()


WORK = """
import signal, sys, time
from trimlingual import cli
from trimlingual.run import interruptions

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup would have it ignored

def work():
    if sys.argv[1] == "deferred":
        with interruptions.deferred():
            print("begun", flush=True)
            time.sleep(1.0)
            print("done", flush=True)
    else:
        print("begun", flush=True)
    time.sleep(300)

cli.app = work
cli.main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("kind", ["deferred", "plain"])
def test_what_can_be_saved_is_what_else_ends_at_once(kind, number, code):
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    out, said = process.communicate(timeout=120)
    assert process.returncode == code
    assert out == ("done\n" if kind == "deferred" else "")
    assert "stopped: " in said
    assert "Traceback" not in said


UNHEARD = """
import signal, sys, time
from trimlingual import cli
from trimlingual.run import interruptions
from trimlingual.run.progress import say

def work():
    with interruptions.deferred():
        print("begun", flush=True)
        while not interruptions.asked():
            time.sleep(0.01)
        say("saving")
        print("a library's warning", file=sys.stderr)
        print("saved", flush=True)

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup would have it ignored
cli.app = work
cli.main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_what_can_be_saved_is_when_nobody_listens_any_more(number, code):
    """Ctrl-C in `trimlingual ... 2>&1 | tee log.txt` ends `tee` too."""
    process = subprocess.Popen(
        [sys.executable, "-c", UNHEARD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    process.stderr.close()
    process.send_signal(number)
    assert process.stdout.read() == "saved\n"
    assert process.wait(timeout=120) == code


def test_no_error_handler_goes_on_from_it():
    assert not issubclass(Interrupted, Exception)


def test_a_training_that_fails_ends_with_its_workers(manifests, tmp_path, start):
    """The workers ignore signals, and an error's traceback holds on to them."""
    process = start(
        finetune(tmp_path, *manifests, "finetune.num_workers=2", "finetune.learning_rate=1e30", "finetune.max_steps=50")
    )
    assert process.wait(120) == 1, process.stderr()
    assert "the loss is nan at step" in process.stderr()
