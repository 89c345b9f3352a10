"""Whose a folder is. Only what this tool made is ever replaced or removed, with or without --force.

A finished artefact is known by its artifact.json, unfinished work (`NAME.partial`) by its work.json. Everything else is the user's,
and so is a file that somebody put into, or changed in, one of the tool's folders.
"""

from __future__ import annotations

import calendar
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from filelock import FileLock

ARTIFACT_FILE = "artifact.json"
WORK_FILE = (
    "work.json"  # in a .partial folder: the fingerprint the work in it belongs to, its settings, and who is at it
)
IGNORED = (".DS_Store", "Thumbs.db", "desktop.ini")  # left in the tool's folders by file managers
_NAMED = 3  # files named in a message


def real_folder(folder: Path) -> Path:
    """What a link leads to, so that a renaming moves the folder and not the link."""
    return Path(os.path.realpath(folder)) if folder.is_symlink() else folder


def partial_of(folder: Path) -> Path:
    """Where a stage works until its folder is whole."""
    folder = real_folder(folder)
    return folder.parent / f"{folder.name}.partial"


def aside_of(folder: Path) -> Path:
    """Where an old artefact stands for the moment in which the new one gets its name."""
    return folder.parent / f".{folder.name}.replaced"


def temporary_of(file: Path) -> Path:
    """Where a file is written before it gets its name: beside it, under a name that no file of the user's has."""
    return file.with_name(f".{file.name}.trimlingual.tmp")


def lock_of(folder: Path) -> Path:
    """The file that keeps a second run out."""
    return folder.parent / f".{folder.name}.lock"


def lock_at(path: Path) -> FileLock:
    """A lock that a process which dies lets go of; taking it is an OSError or NotImplementedError on a disk without such locks.

    Newer versions of filelock would there take a file for a lock, which outlives a process that is killed.
    """
    never_a_file: dict[str, Any] = {"fallback_to_soft": False} if hasattr(FileLock, "fallback_to_soft") else {}
    return FileLock(path, **never_a_file)


def read_record(path: Path) -> dict[str, Any] | None:
    """What an artifact.json or work.json of this tool says; None if there is none, or it is not this tool's."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("fingerprint"), str) else None


def is_finished(folder: Path) -> bool:
    """Whether a folder is a finished artefact of this tool."""
    record = read_record(folder / ARTIFACT_FILE)
    return record is not None and "stage" in record


def remove(folder: Path) -> None:
    """Remove one of the tool's folders, its mark last: what is left by a kill is still known as the tool's."""
    marks = [folder / name for name in (ARTIFACT_FILE, WORK_FILE)]
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path not in marks:
            path.unlink()
    for mark in marks:
        mark.unlink(missing_ok=True)
    folder.rmdir()


def tool_files(folder: Path) -> dict[str, int]:
    """Every file below `folder` with its size in bytes, but for the tool's own records: what the tool made."""
    files = {path.relative_to(folder).as_posix(): path.lstat().st_size for path in _files(folder)}
    return {name: size for name, size in files.items() if name not in (ARTIFACT_FILE, WORK_FILE)}


def why_not_ours(folder: Path, *, replaces: bool) -> str:
    """Why this tool must not write to `folder`, or nothing. With `replaces`, what stands there would be removed."""
    place = Path(os.path.abspath(folder))
    here = Path(os.path.abspath("."))
    if place == here or place in here.parents:
        return f"{folder} is the folder this command runs in, or one above it; name a folder that is to be made, e.g. ./out"
    if problem := why_not_below(folder):
        return problem
    for path, marks in (
        (folder, (ARTIFACT_FILE,)),
        (partial_of(folder), (WORK_FILE, ARTIFACT_FILE)),
        (aside_of(folder), (ARTIFACT_FILE,)),
    ):
        if problem := _why_not_writable(path, *marks):
            return problem
    if problem := why_not_our_lock(folder):
        return problem
    return _why_kept(folder) if replaces else ""


def why_not_below(folder: Path) -> str:
    """Refuses a folder that cannot be made since a file stands where a folder above it would."""
    place = Path(os.path.abspath(folder))
    above = next((parent for parent in place.parents if parent.exists()), place)
    if above.is_dir():
        return ""
    return f"{above} is a file, so {folder} cannot be made; move it away or choose another folder"


def why_not_our_lock(folder: Path) -> str:
    """Refuses a lock that is the user's, whose content taking it would remove: ours are empty files."""
    lock = lock_of(folder)
    if not os.path.lexists(lock) or (lock.is_file() and not lock.is_symlink() and not lock.stat().st_size):
        return ""
    return f"{lock} was not made by this tool, which needs that name; move it away or choose another folder"


def _why_not_writable(folder: Path, *marks: str) -> str:
    """Refuses a file, and a folder that holds something but no mark of this tool."""
    if not folder.exists() or any(read_record(folder / mark) for mark in marks):
        return ""
    if not folder.is_dir():
        return f"{folder} is a file; move it away or choose another folder"
    contents = sorted(path.name for path in folder.iterdir() if path.name != temporary_of(folder / WORK_FILE).name)
    if not contents:
        return ""
    return (
        f"{folder} was not made by this tool and is not empty (it holds {_some(contents)}); nothing in it will be touched, with "
        "--force neither: choose another folder, or move it away"
    )


def _why_kept(folder: Path) -> str:
    """Refuses an artefact in which there is something that the tool did not write, or that was changed since."""
    made = (read_record(folder / ARTIFACT_FILE) or {}).get("files")
    if not isinstance(made, dict):  # of a version that did not list them
        return ""
    found = tool_files(folder)
    foreign = sorted(name for name in found if name not in made and Path(name).name not in IGNORED)
    changed = sorted(name for name, size in found.items() if name in made and made[name] != size)
    problems = [f"files that it did not make ({_some(foreign)})"] if foreign else []
    problems += [f"files that were changed since ({_some(changed)})"] if changed else []
    if not problems:
        return ""
    return (
        f"{folder} was made by this tool but holds {' and '.join(problems)}, which making it again would remove: move them away, or "
        "choose another folder"
    )


def why_not_as_made(folder: Path) -> str:
    """Says which files of a finished artefact are cut off or edited: of another size than when it was made. Cards may be edited."""
    made = (read_record(folder / ARTIFACT_FILE) or {}).get("files")
    sizes = {folder / name: size for name, size in made.items()} if isinstance(made, dict) else {}
    there = {path: size for path, size in sizes.items() if path.is_file() and path.suffix != ".md"}
    changed = [path.name for path, size in there.items() if path.stat().st_size != size]
    return f"{folder} was changed since it was made ({_some(changed)})" if changed else ""


def describe_work(partial: Path) -> str:
    """What unfinished work holds: checkpoints, lines of journals, when it was begun and for how long it was worked on."""
    contents = []
    steps = [path.name.rpartition("-")[2] for path in partial.rglob("checkpoint-*") if path.is_dir()]
    if numbers := [int(step) for step in steps if step.isdigit()]:
        contents.append(f"a checkpoint after step {max(numbers)}")
    for journal in sorted(partial.rglob("*.jsonl")):
        with journal.open("rb") as file:
            if lines := sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b"")):
                contents.append(f"{lines} line{'s' * (lines > 1)} in {journal.relative_to(partial).as_posix()}")
    created = (read_record(partial / WORK_FILE) or {}).get("created")
    if created:
        begun = calendar.timegm(time.strptime(created, "%Y-%m-%dT%H:%M:%SZ"))
        last = max((path.lstat().st_mtime for path in _files(partial)), default=begun)
        contents.append(f"begun {created}, last written {max(last - begun, 0) / 60:.0f} minutes later")
    return ", ".join(contents) or "nothing yet"


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() or path.is_symlink()]


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + rest
