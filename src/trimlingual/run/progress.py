"""What people see of the work: one look for all progress bars, lines for those who read a file, and the log beside what is made.

On standard error, so that results on standard output stay clean. On a terminal work shows a bar; elsewhere, and always in the log, a
line when it begins, one at least every half minute while it goes on, and one when it ends.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trimlingual.run import interruptions
from trimlingual.run.processes import is_main_process

LOG_FILE = "log.txt"  # beside what a stage makes: what was said while it was made
EVERY_S = 30.0  # seconds between two lines about the same work

console = Console(stderr=True)
_log: Path | None = None
_depth = 0  # works within works: only the outermost shows a bar and tells its beginning and end


class _Lasting(io.TextIOWrapper):
    """Standard error that may go away: a pipe whose reader has ended (Ctrl-C ends `tee` as well), a terminal that was closed.

    What is said after that goes nowhere, and the work goes on: a run that was asked to stop has to save first.
    """

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            self._silence()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            self._silence()

    def _silence(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


def outlive_listeners() -> None:
    """Let nothing that is said to standard error end the work; for programs, not for libraries."""
    heard = sys.__stderr__
    if heard is not None and sys.stderr is heard:
        sys.stderr = _Lasting(heard.buffer, encoding=heard.encoding, errors=heard.errors, line_buffering=True)


def _as_in_json(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def write_any_text() -> None:
    """Let no text end the work; for programs, not for libraries.

    What a stream's encoding lacks is written as in JSON (\\u00e4). A stream that was closed at the start is one that nobody reads.
    """
    codecs.register_error("as in json", _as_in_json)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="as in json")


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Write what is said in this block to `path` too, with time stamps, after what an earlier run left there."""
    global _log
    outer, _log = _log, path if is_main_process() else None
    _write(f"process {os.getpid()} starts" + (" again" if path.exists() else ""))
    try:
        yield
    except BaseException as error:
        _write(f"ended early: {str(error).strip() or type(error).__name__}")
        raise
    finally:
        _log = outer


def _write(message: str) -> None:
    """Append to the log. Opened anew each time: its folder gets another name when the stage is finished."""
    if _log is None or not _log.parent.is_dir():
        return
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with _log.open("a", encoding="utf-8") as file:
        file.writelines(f"{stamp} {line}\n" for line in message.splitlines())


def say(message: str) -> None:
    """One line to the person at the terminal, and to the log (main process only)."""
    if is_main_process():
        console.print(message, highlight=False, markup=False, soft_wrap=True)
        _write(message)


@contextmanager
def progress(label: str, total: int, stops: bool = True) -> Iterator[Callable[..., None]]:
    """Show work on `total` items, if there are any; yields `advance(count, note="", earlier=False)`.

    `note` is shown if there is news; `earlier` items were done by an earlier run, and tell nothing about the time that is left. A run
    that was asked to stop ends in `advance`, so what was advanced over must be on disk; without `stops` the caller sees to it.
    """
    if not is_main_process() or not total:
        with interruptions.deferred():
            yield lambda *_, **__: interruptions.check() if stops else None
        return
    global _depth
    work = _Work(label, total, outermost=not _depth)
    with interruptions.deferred(), _bar(work) as draw, work.told():

        def advance(count: int, note: str = "", earlier: bool = False) -> None:
            work.advance(count, note, earlier)
            draw(count, note)
            if stops:
                interruptions.check(f"{label} {work.done} of {total}")

        _depth += 1
        try:
            yield advance
        finally:
            _depth -= 1


@contextmanager
def _bar(work: _Work) -> Iterator[Callable[[int, str], None]]:
    label, total = work.label, work.total
    if not (console.is_terminal and work.outermost):
        yield lambda _count, _note: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count, note: bar.update(task, advance=count, description=f"{label}: {note}" if note else None)


class _Work:
    """How far some work is, told in lines."""

    def __init__(self, label: str, total: int, outermost: bool = True):
        self.label, self.total, self.outermost, self.note = label, total, outermost, ""
        self.done = self._earlier = 0
        self._started = time.monotonic()
        self._ended = threading.Event()

    def advance(self, count: int, note: str, earlier: bool) -> None:
        self.done += count
        self._earlier += count if earlier else 0
        self.note = note or self.note

    @contextmanager
    def told(self) -> Iterator[None]:
        """Tell the beginning, how it goes (also while a single item takes long), and the end."""
        if self.outermost:
            self._tell(f"{self.label}: {self.total} to do")
        clock = threading.Thread(target=self._tick, name="progress", daemon=True)
        clock.start()
        try:
            yield
        finally:
            self._ended.set()
            clock.join()
            if self.outermost:
                self._tell(self.line(f"{duration(time.monotonic() - self._started)} taken"))

    def _tick(self) -> None:
        while not self._ended.wait(EVERY_S):
            self._tell(self.line(self._left()))

    def _left(self) -> str:
        ours, elapsed = self.done - self._earlier, time.monotonic() - self._started
        return f"{duration(elapsed / ours * (self.total - self.done))} left" if ours else f"for {duration(elapsed)}"

    def line(self, clock: str) -> str:
        """Of what, how far, with what result, how long."""
        return ", ".join(part for part in (f"{self.label} {self.done} of {self.total}", self.note, clock) if part)

    def _tell(self, line: str) -> None:
        if not console.is_terminal:
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
        _write(line)


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
