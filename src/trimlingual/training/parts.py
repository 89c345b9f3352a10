"""What a training needs of every clip or example, computed once before it and kept on disk until it ends, so that a restart has it.

It is written in parts, so that little is lost, and shared out over the processes. A row is what belongs to one clip or example: a few
tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimlingual.run import interruptions
from trimlingual.run.artifacts import put_in_place
from trimlingual.run.processes import gather, num_processes, process_index, wait_for_everyone
from trimlingual.run.progress import progress, say

PART_S = 2.0  # seconds of work that are written together

Row = tuple[Tensor, ...]
Batches = Sequence[Sequence[int]]


def rows_in_parts(
    folder: Path,
    digest: str,
    batches: Batches,
    make: Callable[[Batches], Generator[Sequence[Row], None, None]],
    title: str,
    made: str,
) -> list[Row]:
    """The rows 0 to n - 1 that `batches` divide among them, in every process. What `folder` has with this digest is not made again.

    `make` is given the batches of this process and yields the rows of each; it is not called where there are none. `title` is for the
    progress, `made` what is said of what is there: "3 of 9 `made` before". `folder` belongs to one stage with one
    fingerprint: the digest tells apart what that stage does not, such as the order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = _read(folder, digest)
    missing = gather([batch for batch in batches if not all(i in rows for i in batch)])[0]
    if rows:
        say(f"  {len(rows)} of {sum(map(len, batches))} {made} before")
    if mine := missing[process_index() :: num_processes()]:
        with progress(title, sum(map(len, mine))) as advance, closing(make(mine)) as found:
            rows |= _written(folder, digest, mine, found, advance)
    wait_for_everyone()
    if num_processes() > 1:
        rows |= _read(folder, digest)
    return [rows[i] for i in range(len(rows))]


def _written(
    folder: Path,
    digest: str,
    batches: Batches,
    found: Generator[Sequence[Row], None, None],
    advance: Callable[..., None],
) -> dict[int, Row]:
    """All rows that `found` yields, written every few seconds."""
    rows: dict[int, Row] = {}
    part: dict[int, Row] = {}
    written = time.monotonic()
    for batch, made in zip(batches, found, strict=True):
        part |= dict(zip(batch, made, strict=True))
        if time.monotonic() - written >= PART_S or interruptions.asked():
            rows |= _write(folder, digest, part)
            part, written = {}, time.monotonic()
        advance(len(batch))
    return rows | _write(folder, digest, part)


def _write(folder: Path, digest: str, part: dict[int, Row]) -> dict[int, Row]:
    if part:
        path = folder / f"{min(part)}.safetensors"
        made = path.with_name(path.name + ".new")
        tensors = {f"{i}.{number}": tensor.contiguous() for i, row in part.items() for number, tensor in enumerate(row)}
        save_file(tensors, made, {"digest": digest})
        put_in_place(made, path)
    return part


def _read(folder: Path, digest: str) -> dict[int, Row]:
    rows: dict[int, Row] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("digest") != digest:
                continue
            names = sorted(file.keys(), key=lambda name: tuple(map(int, name.split("."))))
            for name in names:
                i = int(name.split(".")[0])
                rows[i] = (*rows.get(i, ()), file.get_tensor(name))
    return rows
