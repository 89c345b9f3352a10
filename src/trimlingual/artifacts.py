"""What stands on disk: one folder an artefact, `artifact.json` written last, so that its existence means "finished".

A stage works in `<folder>.partial/` and the folder is renamed when it is whole, so a killed run never leaves half an artefact that
looks like one; a lock keeps a second run out meanwhile. The fingerprint is a hash of the stage's settings and of its inputs'
fingerprints: equal fingerprint, nothing to do.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trimlingual import __version__
from trimlingual.processes import is_main_process, wait_for_everyone

ARTIFACT_FILE = "artifact.json"
SCRATCH = (
    "scratch"  # folder inside a .partial one for what only the work itself needs (checkpoints); removed at the end
)
WORK_FILE = "work.json"  # in a .partial folder: the fingerprint the work in it belongs to, and who is at it
# Bump when a stage's output for equal settings changes meaning: old artefacts are then stale instead of silently mixed in.
FORMAT = 1
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

    `inputs` maps a role (teacher, data, plan) to the fingerprint it had; `info` is what the stage wants to be remembered.
    """

    stage: str
    fingerprint: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    info: dict[str, Any] = field(default_factory=dict)
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


def fingerprint(stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """SHA-256 (first 16 hex digits) of what determines a stage's output."""
    payload = json.dumps(
        {"stage": stage, "settings": settings, "inputs": dict(inputs), "format": FORMAT},
        sort_keys=True,
        ensure_ascii=False,
    )
    return hashlib.sha256(payload.encode()).hexdigest()[:16]


def machine() -> dict[str, Any]:
    """Versions and hardware a number was made with (no host name, no paths)."""
    versions = {"trimlingual": __version__, "python": platform.python_version()}
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
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Atomic text write: temporary file in the same folder, flushed to disk, renamed."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
        partial = _partial(folder)
        if partial.is_dir():
            raise ArtifactError(
                f"{folder} is not finished (its work stands in {partial.name}); run the stage again to go on"
            )
        raise ArtifactError(f"{folder} holds no {ARTIFACT_FILE}: it is not an artefact of this tool, or was never made")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Artifact(**record, path=folder)
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); delete {folder} and run the stage again") from error


def find_artifact(folder: Path) -> Artifact | None:
    """The finished artefact in `folder`, or None."""
    return read_artifact(folder) if (folder / ARTIFACT_FILE).is_file() else None


def differences(old: Artifact, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> list[str]:
    """What has changed since `old` was made, as `path: old -> new` lines."""
    lines = [f"input {k} changed" for k in sorted({*old.inputs, *inputs}) if old.inputs.get(k) != inputs.get(k)]
    before, after = flatten(old.settings), flatten(settings)
    for key in sorted({*before, *after}):
        if before.get(key) != after.get(key):
            lines.append(f"{key}: {before.get(key, 'unset')!r} -> {after.get(key, 'unset')!r}")
    if old.format != FORMAT:
        lines.append(f"artefact format {old.format} -> {FORMAT}")
    return lines


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted paths."""
    if isinstance(value, Mapping):
        flat: dict[str, Any] = {}
        for key, child in value.items():
            flat.update(flatten(child, f"{prefix}.{key}" if prefix else str(key)))
        return flat
    return {prefix: value}


def produce(
    folder: Path,
    stage: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    work: Callable[[Path], dict[str, Any]],
    *,
    force: bool = False,
    everyone: bool = False,
) -> Artifact:
    """Return the artefact in `folder`, making it with `work(partial_folder) -> info` if it is not there.

    Equal fingerprint: nothing is done. Different: ArtifactError, unless `force`, which removes the old one. Work left over from a
    killed run with the same fingerprint is handed to `work` again, which goes on from it; other leftovers are removed. Of several
    processes (torchrun, accelerate launch) the main one works and the others wait, unless `everyone` takes part.
    """
    folder, partial = Path(folder), _partial(Path(folder))
    plain_settings = json.loads(json.dumps(settings))
    wanted = fingerprint(stage, plain_settings, inputs)
    existing = find_artifact(folder)
    if existing is not None and not force:
        if existing.fingerprint == wanted:
            return existing
        changed = "; ".join(differences(existing, plain_settings, inputs)[:8]) or "other settings"
        raise ArtifactError(
            f"{folder} was made with other settings or inputs ({changed}). Use --force to make it again, or another folder."
        )
    main = is_main_process()
    with _alone(folder):
        if main:
            _prepare(partial, wanted)
        wait_for_everyone()
        if (partial / ARTIFACT_FILE).is_file():  # killed between the last write and the renaming
            return _finish(partial, folder)
        started = time.perf_counter()
        earlier = json.loads((partial / WORK_FILE).read_text(encoding="utf-8"))
        info = work(partial) if main or everyone else {}
        wait_for_everyone()
        artifact = Artifact(
            stage=stage,
            fingerprint=wanted,
            settings=plain_settings,
            inputs=dict(inputs),
            info=json.loads(json.dumps(info)),
            seconds=round(time.perf_counter() - started, 3),
            created=earlier["created"],
            machine=machine(),
        )
        if main:
            write_json(partial / ARTIFACT_FILE, artifact.record())
        return _finish(partial, folder)


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other runs from working on the same artefact; ArtifactError if one is. A process that dies lets go of the lock."""
    if not is_main_process():
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ArtifactError(
            f"another run is making {folder}{_who(_partial(folder) / WORK_FILE)}; wait for it, or stop it and start this one "
            "again (processes of a torchrun that was killed may still be running)"
        ) from None
    try:
        yield
    finally:
        lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)


def _who(work_file: Path) -> str:
    """Which process a `.partial` folder's work belongs to, if it says."""
    try:
        at_work = json.loads(work_file.read_text(encoding="utf-8"))
        return f" (process {at_work['process']} on {at_work['host']})"
    except (OSError, ValueError, KeyError):
        return ""


def _finish(partial: Path, folder: Path) -> Artifact:
    """Give a whole `.partial` folder its name."""
    wait_for_everyone()
    if is_main_process():
        shutil.rmtree(partial / SCRATCH, ignore_errors=True)
        (partial / WORK_FILE).unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    wait_for_everyone()
    return read_artifact(folder)


def _prepare(partial: Path, wanted: str) -> None:
    """Make `partial` ready: kept when its work belongs to the wanted fingerprint, emptied otherwise."""
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    for marker in (partial / ARTIFACT_FILE, partial / WORK_FILE):
        try:
            earlier = json.loads(marker.read_text(encoding="utf-8"))
            if earlier["fingerprint"] == wanted:
                created = earlier["created"]
                break
        except (OSError, ValueError, KeyError):
            continue
    else:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    at_work = {"process": os.getpid(), "host": platform.node()}
    write_json(partial / WORK_FILE, {"fingerprint": wanted, "created": created, **at_work})


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
