"""What people see of long work, on a terminal, in a file and in the log."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from trimlingual.evaluation.cost import disk_bytes
from trimlingual.exports.transformers import LEFT_BEHIND
from trimlingual.run import interruptions, progress
from trimlingual.run.artifacts import produce


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(progress, "EVERY_S", 0.01)


def lines(path: Path) -> list[str]:
    """Without their time stamps, which are looked at here."""
    found = path.read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ", line) for line in found)
    return [line.partition(" ")[2] for line in found]


def some_work(path: Path) -> None:
    with progress.log_to(path), progress.progress("searching", 4) as advance:
        advance(1, earlier=True)
        advance(1, "best 41.2")
        while not any("2 of 4" in line for line in lines(path)):
            time.sleep(0.01)  # one item takes long, and it is told all the same
        advance(2)


@pytest.mark.parametrize("terminal", [False, True])
def test_work_is_told_while_it_goes_on(tmp_path, monkeypatch, capsys, terminal):
    monkeypatch.setattr(progress, "console", Console(stderr=True, force_terminal=terminal))
    some_work(tmp_path / "log.txt")
    told = lines(tmp_path / "log.txt")
    assert told[0].endswith("starts")
    assert told[1] == "searching: 4 to do"
    assert re.fullmatch(r"searching 2 of 4, best 41.2, \d+ s left", told[2])
    assert re.fullmatch(r"searching 4 of 4, best 41.2, \d+ s taken", told[-1])
    seen = capsys.readouterr().err
    assert ("searching: 4 to do" in seen) != terminal  # a terminal has the bar instead


def test_time_left_counts_only_what_this_run_did():
    work = progress._Work("x", 10)
    work._started -= 60
    work.advance(5, "", earlier=True)
    assert work._left() == "for 60 s"
    work.advance(1, "", earlier=False)
    assert work._left() == "4 min left"


def test_a_restart_writes_on(tmp_path):
    log = tmp_path / "log.txt"

    @progress.log_to(log)
    def breaks() -> None:
        progress.say("first")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        breaks()
    with progress.log_to(log):
        progress.say("second")
    progress.say("no log any more")
    told = lines(log)
    assert told[1:3] == ["first", "ended early: broken"]
    assert told[3].endswith("starts again")
    assert told[4:] == ["second"]


def test_the_log_does_not_count_and_does_not_ship(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = disk_bytes(tmp_path)
    with progress.log_to(tmp_path / progress.LOG_FILE):
        progress.say("a line")
    assert disk_bytes(tmp_path) == before
    assert progress.LOG_FILE in LEFT_BEHIND


def test_work_ends_where_it_was_advanced_when_the_run_is_asked_to_stop(monkeypatch, tmp_path):
    done = []

    def work() -> None:
        with progress.log_to(tmp_path / "log.txt"), progress.progress("translating", 3) as advance:
            for i in range(3):
                done.append(i)
                if i == 1:
                    monkeypatch.setattr(interruptions, "_asked", 15)
                advance(1)

    with pytest.raises(interruptions.Interrupted) as stop:
        work()
    assert done == [0, 1]
    assert stop.value.exit_code == 143
    assert lines(tmp_path / "log.txt")[-1] == "ended early: translating 2 of 3"


def test_the_log_stays_with_the_artefact(tmp_path):
    def work(partial: Path) -> dict:
        with progress.log_to(partial / progress.LOG_FILE):
            progress.say("at work")
        return {}

    artifact = produce(tmp_path / "made", "test", {}, {}, work)
    assert lines(artifact.path / progress.LOG_FILE)[-1] == "at work"
