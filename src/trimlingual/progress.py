"""One look for all progress bars, on standard error so that results on standard output stay clean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trimlingual.processes import is_main_process

console = Console(stderr=True)


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar over `total` items; yields the function that advances it, with a note to show if there is news.

    Drawn on a terminal only.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    hidden = not (console.is_terminal and is_main_process())
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(label, total=total)

        def advance(count: int, note: str = "") -> None:
            bar.update(task, advance=count, description=f"{label}: {note}" if note else None)

        yield advance


def say(message: str) -> None:
    """One line to the person at the terminal (main process only)."""
    if is_main_process():
        console.print(message, highlight=False, markup=False, soft_wrap=True)
