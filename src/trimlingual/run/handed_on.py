"""What one stage of a run computes and a later one needs again: it lies in the run folder between them.

A stage takes it into its own scratch, uses it there, and gives it back. Both are renamings: it is always whole, and never two
stages' at once. Of several processes the main one calls these functions.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from trimlingual.run.artifacts import put_in_place, write_json
from trimlingual.run.ownership import WORK_FILE, read_record, real_folder, remove

TEACHER_TOKENS = "teacher-tokens.partial"  # in a run folder: the teacher's reading of the training examples


def take(place: Path, key: str, folder: Path) -> None:
    """Move what lies at `place` to `folder` if it was given there with this key, and remove it if with another one."""
    record = read_record(place / WORK_FILE)
    if record is None:
        return  # nothing, or the user's
    if record["fingerprint"] != key:
        discard(place)
    elif not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another stage was faster
            put_in_place(real_folder(place), folder)


def give(folder: Path, key: str, place: Path) -> None:
    """Move `folder` to `place`, for whoever takes it with this key; it stays where it is if something stands there."""
    write_json(folder / WORK_FILE, {"fingerprint": key})
    with suppress(OSError):
        put_in_place(folder, real_folder(place))


def discard(place: Path) -> None:
    """Remove what was given at `place` and was not taken."""
    if read_record(place / WORK_FILE):
        with suppress(FileNotFoundError):  # another stage is taking it
            remove(real_folder(place))
