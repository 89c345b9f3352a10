"""What stands on disk: one folder an artefact, `artifact.json` written last, so that its existence means "finished".

A stage works in `<folder>.partial/` and the folder is renamed when it is whole, so a killed run never leaves half an artefact that
looks like one; a lock keeps a second run out meanwhile. Equal fingerprint (fingerprint.py): nothing to do.
Folders belong to the user (ownership.py): only what this tool made is ever replaced or removed.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import Timeout
from pydantic import TypeAdapter

from trimlingual.run.disk_full import explained_disk_full
from trimlingual.run.fingerprint import FORMAT, UNREAD, decisive, differences, fingerprint, hash_file, plain
from trimlingual.run.ownership import (
    ARTIFACT_FILE,
    WORK_FILE,
    aside_of,
    describe_work,
    is_finished,
    lock_at,
    lock_of,
    partial_of,
    read_record,
    real_folder,
    remove,
    temporary_of,
    tool_files,
    why_not_our_lock,
    why_not_ours,
)
from trimlingual.run.processes import gather, is_main_process, wait_for_everyone
from trimlingual.run.progress import LOG_FILE, say
from trimlingual.run.version import version as own_version

__all__ = [
    "ARTIFACT_FILE", "FORMAT", "SCRATCH", "WORK_FILE", "Artifact", "ArtifactError", "alone", "append_jsonl", "as_json",
    "find_artifact", "fingerprint", "hash_file", "machine", "produce", "put_in_place", "read_artifact", "read_journal", "sync",
    "write_json", "write_text",
]  # fmt: skip

SCRATCH = (
    "scratch"  # folder inside a .partial one for what only the work itself needs (checkpoints); removed at the end
)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # NFS without its lock service, Lustre mounted without flock
LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "flashoptim",
    "compressed-tensors",
    "datasets",
    "sacrebleu",
    "numpy",
)


class ArtifactError(ValueError):
    """An artefact that is missing, unfinished, of another kind, or made with other settings."""


@dataclass(frozen=True)
class Artifact:
    """The record beside an artefact's files.

    `settings` are all it was made with, `decisive` those of them that its fingerprint covers; `inputs` maps a role (teacher, data,
    plan) to the fingerprint it had, `origins` to where on the Hub it came from (`id@commit`); `info` is what the stage wants to be
    remembered; `files` are the files the tool wrote, with their size in bytes.
    """

    stage: str
    fingerprint: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    decisive: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    created: str = ""
    machine: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT
    path: Path = Path()

    def record(self) -> dict[str, Any]:
        """The JSON form."""
        record = asdict(self)
        del record["path"]
        return record


def machine() -> dict[str, Any]:
    """Versions and hardware a number was made with (no host name, no paths)."""
    versions = {"trimlingual": own_version(), "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    found: dict[str, Any] = {
        "system": platform.system(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "versions": versions,
    }
    torch = sys.modules.get("torch")  # never imported for this alone
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half."""
    write_text(path, as_json(value))


def as_json(value: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Atomic text write: temporary file in the same folder, flushed to disk, renamed."""
    temporary = temporary_of(path)
    temporary.write_text(text, encoding="utf-8")
    put_in_place(temporary, path)


def put_in_place(made: Path, path: Path) -> None:
    """Give a file, or a folder of files, that is whole the name by which it counts as that.

    It is on the disk itself before: a power cut may keep a new name and lose what was written under the old one.
    """
    sync([made] if made.is_file() else [file for file in made.rglob("*") if file.is_file()])
    os.replace(made, path)


def sync(paths: Iterable[Path]) -> None:
    """Have files on the disk itself, so that what is then marked as whole is whole after a power cut too."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record and flush it to disk at once: what was paid for is not lost."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Records of an append-only journal. A last line cut off by a kill is removed from the file and ignored."""
    if not path.exists():
        return []
    good: list[dict[str, Any]] = []
    kept = 0
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                record = None
            if record is None:
                break
            good.append(record)
            kept += len(line)
    if kept != path.stat().st_size:
        with path.open("rb+") as file:
            file.truncate(kept)
    return good


def read_artifact(folder: Path) -> Artifact:
    """Read a finished artefact; ArtifactError says what is wrong and what to do."""
    path = folder / ARTIFACT_FILE
    if not path.is_file():
        partial = partial_of(folder)
        if partial.is_dir():
            raise ArtifactError(
                f"{folder} is not finished (its work stands in {partial.name}); run the stage again to go on"
            )
        raise ArtifactError(f"{folder} holds no {ARTIFACT_FILE}: it is not an artefact of this tool, or was never made")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        known = {one.name for one in fields(Artifact)}
        values = {key: value for key, value in record.items() if key in known}
        return TypeAdapter(Artifact).validate_python({**values, "path": folder})
    except (ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); delete {folder} and run the stage again") from error


def find_artifact(folder: Path) -> Artifact | None:
    """The finished artefact in `folder`, or None."""
    return read_artifact(folder) if (folder / ARTIFACT_FILE).is_file() else None


def produce(
    folder: Path,
    stage: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    work: Callable[[Path], dict[str, Any]],
    *,
    force: bool = False,
    everyone: bool = False,
    origins: Mapping[str, str] | None = None,
) -> Artifact:
    """Return the artefact in `folder`, making it with `work(partial_folder) -> info` if it is not there.

    `settings` may hold sections of a recipe. Equal fingerprint: nothing is done. Different: ArtifactError, unless `force`, which
    replaces the old one. Work left over from a killed run with the same fingerprint is handed to `work` again, which goes on from it;
    other leftovers are an ArtifactError too, unless `force`. What this tool did not make is never touched: ArtifactError. A full disk,
    whoever meets it, is a DiskFullError. Of several processes (torchrun, accelerate launch) the main one works and the others wait,
    unless `everyone` takes part.
    """
    folder = real_folder(Path(folder))
    partial = partial_of(folder)
    expected = gather(fingerprint(stage, settings, inputs))[0]  # of several processes the main one decides
    assert expected != UNREAD, stage  # only --dry-run leaves things unread
    settled = settle(folder)
    problems = [problem for problem in gather(_check(folder, stage, settings, inputs, force)) if problem]
    if problems:
        raise ArtifactError(problems[0])
    existing = find_artifact(folder)
    if existing is not None and existing.fingerprint == expected and (settled or not force):
        return existing
    main = is_main_process()
    with explained_disk_full(partial), alone(folder):
        record = {"stage": stage, "settings": plain(settings), "decisive": decisive(settings), "inputs": dict(inputs)}
        if main:
            _prepare(partial, expected, record)
        wait_for_everyone()
        started = time.perf_counter()
        earlier = json.loads((partial / WORK_FILE).read_text(encoding="utf-8"))
        try:
            info = work(partial) if main or everyone else {}
        except Exception:
            if main and not tool_files(partial).keys() - {LOG_FILE}:
                remove(partial)  # corrected, say, the recipe must not meet unfinished work of other settings
            raise
        wait_for_everyone()
        if main:
            artifact = Artifact(
                **record,
                fingerprint=expected,
                origins=dict(origins or {}),
                info=json.loads(json.dumps(info)),
                files=_flushed_files(partial),
                seconds=round(time.perf_counter() - started, 3),
                created=earlier["created"],
                machine=machine(),
            )
            write_json(partial / ARTIFACT_FILE, artifact.record())
            _finish(partial, folder)
        wait_for_everyone()
    return read_artifact(folder)


def trespass(folder: Path, stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str], force: bool) -> str:
    """Why a stage may not write to `folder` (something there is the user's), or nothing; nothing where it need not write."""
    try:
        existing = find_artifact(folder)
    except ArtifactError as error:
        return str(error)
    if existing is not None and not force and fingerprint(stage, settings, inputs) in (existing.fingerprint, UNREAD):
        return ""
    return why_not_ours(real_folder(folder), replaces=existing is not None)


def unfinished_changes(folder: Path, stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> list[str]:
    """What differs between a stage and the unfinished work beside `folder`; empty if there is none or it is the stage's own."""
    earlier = read_record(partial_of(folder) / WORK_FILE)
    if earlier is None or earlier["fingerprint"] == (expected := fingerprint(stage, settings, inputs)):
        return []
    known = differences(earlier, settings, inputs, stage) if "decisive" in earlier else []
    return known if expected == UNREAD else known or ["made with other settings, or by an earlier version"]


def _check(folder: Path, stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str], force: bool) -> str:
    """What keeps a stage from being made here, or nothing. Touches nothing."""
    if problem := trespass(folder, stage, settings, inputs, force):
        return problem
    existing = find_artifact(folder)
    if force or (existing is not None and existing.fingerprint == fingerprint(stage, settings, inputs)):
        return ""
    if existing is not None:
        changed = "; ".join(differences(existing.record(), settings, inputs, stage)[:8]) or "other settings"
        return f"{folder} was made with other settings or inputs ({changed}). Use --force to make it again, or another folder."
    if changes := unfinished_changes(folder, stage, settings, inputs):
        partial = partial_of(folder)
        return (
            f"{partial} holds unfinished work of other settings or inputs ({'; '.join(changes[:8])}): {describe_work(partial)}. "
            "Go on with those, use another folder, or give it up with --force."
        )
    return ""


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other runs from making the same thing; ArtifactError if one does, or where the lock's name is taken by a file of the user's.

    A process that dies lets go of the lock.
    """
    if not is_main_process():
        yield
        return
    if problem := why_not_our_lock(folder):
        raise ArtifactError(problem)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = lock_at(lock_of(folder))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ArtifactError(
            f"another run is making {folder}{_who(partial_of(folder) / WORK_FILE)}; wait for it, or stop it and start this one "
            "again (processes of a torchrun that was killed may still be running)"
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        say(
            f"note: the disk of {folder.parent} has no locks ({error}), so nothing keeps a second run out: start one at a time"
        )
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # while it is held, so that it is not the next holder's
        lock.release()


def _who(work_file: Path) -> str:
    """Which process a `.partial` folder's work belongs to, if it says."""
    earlier = read_record(work_file) or {}
    return f" (process {earlier['process']} on {earlier['host']})" if {"process", "host"} <= earlier.keys() else ""


def settle(folder: Path) -> bool:
    """End what a run that was killed while renaming began: a whole `.partial` folder gets its name, an old one put aside goes.

    Returns whether a whole one was waiting.
    """
    folder = real_folder(folder)
    aside, partial = aside_of(folder), partial_of(folder)
    waiting = False
    if is_main_process() and (is_finished(partial) or is_finished(aside)):
        with alone(folder):
            waiting = is_finished(partial) and not why_not_ours(folder, replaces=True)
            if waiting:
                _finish(partial, folder)
            elif is_finished(aside) and not folder.exists():
                os.replace(aside, folder)
            if is_finished(aside) and is_finished(folder):
                remove(aside)
    return any(gather(waiting))


def _flushed_files(partial: Path) -> dict[str, int]:
    """What was made, as `tool_files`, and without what only the work needed; it is on the disk itself."""
    files = {name: size for name, size in tool_files(partial).items() if Path(name).parts[0] != SCRATCH}
    sync(partial / name for name in files)
    return files


def _finish(partial: Path, folder: Path) -> None:
    """Give a whole `.partial` folder its name. At every moment the old one or the new one is whole on disk.

    What only the work needed goes now, and not before: a kill meanwhile costs nothing that would have to be done again.
    """
    shutil.rmtree(partial / SCRATCH, ignore_errors=True)
    (partial / WORK_FILE).unlink(missing_ok=True)
    aside = aside_of(folder)
    if is_finished(aside):  # put aside by a run that was killed, and no longer needed
        remove(aside)
    if is_finished(folder):
        os.replace(folder, aside)
    elif folder.is_dir():
        folder.rmdir()  # empty
    os.replace(partial, folder)
    if is_finished(aside):
        remove(aside)


def _prepare(partial: Path, expected: str, record: Mapping[str, Any]) -> None:
    """Make `partial` ready: kept when its work belongs to the expected fingerprint, emptied otherwise (it is ours: `_check`)."""
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    earlier = read_record(partial / WORK_FILE)
    if earlier is not None and earlier["fingerprint"] == expected:
        created = earlier.get("created", created)
    else:
        if earlier is not None:
            remove(partial)
        partial.mkdir(parents=True, exist_ok=True)
    at_work = {"process": os.getpid(), "host": platform.node()}
    write_json(
        partial / WORK_FILE, {**record, "fingerprint": expected, "created": created, "format": FORMAT, **at_work}
    )
