"""Being asked to stop: SIGTERM (a scheduler's warning), SIGINT (Ctrl-C) and SIGHUP (the terminal was closed).

Work that saves what it has done runs inside `deferred()`: there the first signal is only noted, and the work ends at its next safe
place (the end of a training step, which is saved; the end of a batch or a candidate, which is in a journal). Anywhere else it ends at
once; what stands on disk goes on from there. A second signal ends the process without ado.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))

_asked: int | None = None  # the signal that came
_depth = 0  # blocks of `deferred` we are in


class Interrupted(BaseException):
    """The run was asked to stop, and does. No Exception: nothing that handles errors is to go on from it."""

    def __init__(self, message: str = "", signum: int | None = None):
        super().__init__(message)
        self.exit_code = 128 + (signum or _asked or signal.SIGTERM)


def install() -> None:
    """Handle the signals from here on; for programs, not for libraries. To be called in the main thread."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(number, _note)


def _note(signum: int, _frame: Any) -> None:
    global _asked
    _asked = signum
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # so that a second one ends the process at once, whatever it is doing
    if not _depth:
        raise Interrupted("nothing that is on disk is lost", signum)
    with suppress(OSError):  # who listened may be gone
        os.write(
            2, f"{signal.Signals(signum).name}: stopping at the next safe place; a second one ends at once\n".encode()
        )


def asked() -> bool:
    """Whether the run was asked to stop."""
    return _asked is not None


def check(message: str = "") -> None:
    """End here, if the run was asked to; what is done must be on disk."""
    if asked():
        raise Interrupted(message)


@contextmanager
def deferred() -> Iterator[None]:
    """In this block a signal is only noted; the block asks by `asked` or `check`. It takes effect at the latest when the block ends."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
    if not _depth:
        check()


def ignored_here() -> None:
    """In a helper process (a data loader's worker): the main one decides, and needs its helpers until it has saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
