"""What decides a result: the settings that can change it, and the content of every file that it is made from.

A fingerprint is a hash of the two. Settings that cannot change a result are marked where they are declared (`result: False`), and a
setting at its neutral value is left out, so that a new setting makes nothing stale. The neutral value is the default a setting was
born with; a field whose default changed later states it (`neutral: ...`).
Files count by their whole content. A content is read once and remembered in the user's cache by size and time of change.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from stat import S_ISREG
from typing import Any

from pydantic import BaseModel

from trimlingual.run.ownership import lock_at
from trimlingual.run.progress import say

# Bump when a stage's output for equal settings changes meaning: old artefacts are then stale instead of silently mixed in.
FORMAT = 2
TELL_FROM = 2e9  # bytes whose reading takes long enough to be told
UNREAD = "unread"  # stands for a content that --dry-run would have to read; whatever depends on it is unknown


def fingerprint(stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """SHA-256 (first 16 hex digits) of what determines a stage's output; UNREAD if one of the inputs is."""
    if UNREAD in inputs.values():
        return UNREAD
    payload = json.dumps(
        {"stage": stage, "settings": decisive(settings), "inputs": dict(inputs), "format": FORMAT},
        sort_keys=True,
        ensure_ascii=False,
    )
    return hashlib.sha256(payload.encode()).hexdigest()[:16]


def plain(value: Any) -> Any:
    """Everything in `value` as JSON has it, sections of a recipe as mappings."""
    if isinstance(value, BaseModel):
        return plain(value.model_dump())
    if isinstance(value, Mapping):
        return {str(key): plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(child) for child in value]
    return json.loads(json.dumps(value))


def decisive(value: Any) -> Any:
    """The part of `value` that can change a result; of sections, only what is not neutral.

    A mapping's entry whose section is wholly neutral is left out too, as if there were no such section.
    """
    if isinstance(value, BaseModel):
        return _decisive_section(value)
    if isinstance(value, Mapping):
        parts = {str(key): (child, decisive(child)) for key, child in value.items()}
        return {key: part for key, (child, part) in parts.items() if part or not isinstance(child, BaseModel)}
    if isinstance(value, (list, tuple)):
        return [decisive(child) for child in value]
    return json.loads(json.dumps(value))


def _decisive_section(section: BaseModel) -> dict[str, Any]:
    found = {}
    for name, field in type(section).model_fields.items():
        marks = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        if marks.get("result", True) is False:
            continue
        value = decisive(getattr(section, name))
        if field.is_required() and "neutral" not in marks:
            found[name] = value
            continue
        neutral = (
            marks["neutral"] if "neutral" in marks else field.get_default(call_default_factory=True, validated_data={})
        )
        if value != decisive(neutral):
            found[name] = value
    return found


def differences(
    old: Mapping[str, Any], settings: Mapping[str, Any], inputs: Mapping[str, str], stage: str | None = None
) -> list[str]:
    """What has changed since the record `old` was made (an artefact's or unfinished work's), as `path: old -> new` lines.

    Inputs that were not read are no change.
    """
    lines = []
    if stage is not None and old.get("stage", stage) != stage:
        lines.append(f"it was made by stage {old['stage']!r}")
    before_inputs = old.get("inputs", {})
    for role in sorted({*before_inputs, *inputs}):
        if inputs.get(role) != UNREAD and before_inputs.get(role) != inputs.get(role):
            lines.append(f"input {role} changed")
    before, after = flatten(old.get("decisive", {})), flatten(decisive(settings))
    old_values, new_values = flatten(old.get("settings", {})), flatten(plain(settings))
    for key in sorted({*before, *after}):
        if before.get(key) != after.get(key):
            was = before.get(key, old_values.get(key, "unset"))
            lines.append(f"{key}: {was!r} -> {after.get(key, new_values.get(key, 'unset'))!r}")
    if (
        old.get("format", FORMAT) != FORMAT
    ):  # older records do not say what decided, so their settings cannot be compared
        return [f"artefact format {old['format']} -> {FORMAT}"]
    return lines


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted paths."""
    if isinstance(value, Mapping) and (value or not prefix):
        flat: dict[str, Any] = {}
        for key, child in value.items():
            flat.update(flatten(child, f"{prefix}.{key}" if prefix else str(key)))
        return flat
    return {prefix: value}


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class HashCache:
    """Hashes of files, remembered by path, size and time of change; one small file a folder in the user's cache.

    With `reading=False` (--dry-run) nothing is read: a file that is not remembered is added to `unread`. Safe against other processes,
    which wait for one another's reading. A cache that cannot be written is done without.
    """

    def __init__(self, folder: Path | None = None, *, reading: bool = True) -> None:
        self.folder = folder or user_cache() / "hashes"
        self.reading = reading
        self.unread: dict[Path, int] = {}  # bytes
        self.absent: list[str] = []  # what would have to be downloaded
        self._known: dict[Path, dict[str, list[Any]]] = {}

    def hashes(self, paths: Iterable[Path]) -> list[str]:
        """SHA-256 of each file; UNREAD for what would have to be read, "missing" for what is not there."""
        absolute = [Path(os.path.abspath(path)) for path in paths]
        by_folder: dict[Path, list[str]] = {}
        for path in dict.fromkeys(absolute):
            by_folder.setdefault(path.parent, []).append(path.name)
        found: dict[Path, str] = {}
        for folder, names in by_folder.items():
            for name, value in self._hashes_in(folder, names).items():
                found[folder / name] = value
        return [found[path] for path in absolute]

    def _hashes_in(self, folder: Path, names: Sequence[str]) -> dict[str, str]:
        stamps = {name: _stamp(folder / name) for name in names}
        found = {name: "missing" for name, stamp in stamps.items() if stamp is None}
        present = {name: stamp for name, stamp in stamps.items() if stamp is not None}
        found |= self._remembered(folder, present)
        left = [name for name in present if name not in found]
        if left and not self.reading:
            self.unread |= {folder / name: present[name][0] for name in left}
            found |= dict.fromkeys(left, UNREAD)
        elif left:
            with self._alone(folder):
                self._known.pop(folder, None)
                found |= self._remembered(folder, present)  # another process may have read them meanwhile
                left = [name for name in present if name not in found]
                if (size := sum(present[name][0] for name in left)) > TELL_FROM:
                    say(f"reading {len(left)} files in {folder}, {size / 1e9:.1f} GB, once to know them again")
                with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets go of the interpreter lock
                    read = dict(zip(left, pool.map(lambda name: hash_file(folder / name), left)))
                self._remember(folder, {name: [*present[name], value] for name, value in read.items()})
            found |= read
        return found

    def _remembered(self, folder: Path, stamps: Mapping[str, list[int]]) -> dict[str, str]:
        if folder not in self._known:
            self._known[folder] = read_object(self._file(folder)).get("files", {})
        known = self._known[folder]
        return {name: known[name][3] for name, stamp in stamps.items() if known.get(name, [])[:3] == stamp}

    def _remember(self, folder: Path, entries: Mapping[str, list[Any]]) -> None:
        if not entries:
            return
        known = {name: entry for name, entry in self._known[folder].items() if (folder / name).exists()}
        self._known[folder] = {**known, **entries}
        self.write(self._file(folder), {"folder": str(folder), "files": self._known[folder]})

    def _file(self, folder: Path) -> Path:
        return self.folder / f"{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}.json"

    def _alone(self, folder: Path) -> AbstractContextManager[Any]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return lock_at(self._file(folder).with_suffix(".lock")).acquire()
        except (OSError, NotImplementedError):  # a home that cannot be written, or a disk without locks
            return nullcontext()

    def named(self, name: str) -> str | None:
        """What `remember_named` kept under a name, e.g. the content of a Hub model that is not on this machine."""
        return read_object(self.folder / "named.json").get(name)

    def remember_named(self, name: str, value: str) -> None:
        """Keep a fingerprint under a name."""
        names = read_object(self.folder / "named.json")
        if names.get(name) != value:
            self.write(self.folder / "named.json", {**names, name: value})

    @staticmethod
    def write(path: Path, value: Any) -> None:
        """All of it or nothing; what cannot be written is only not remembered."""
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(value), encoding="utf-8")
            os.replace(temporary, path)
        except OSError:
            pass


def _stamp(path: Path) -> list[int] | None:
    """Size, time of the last change of the content, and of the entry (which no copying program can set back).

    None where there is no file: also for a pipe or a device, whose reading would never end.
    """
    try:
        stat = path.stat()
    except (OSError, ValueError):  # the latter for a name with a zero byte
        return None
    if not S_ISREG(stat.st_mode):
        return None
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where the file is missing, damaged or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def user_cache() -> Path:
    """Folder for what is remembered between runs: XDG_CACHE_HOME/trimlingual, or ~/.cache/trimlingual."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimlingual"


def hash_files(paths: Iterable[Path], remembered: HashCache, root: Path | None = None) -> str:
    """One hash (16 hex digits) over the whole content of files in their order; UNREAD if one would have to be read.

    With `root`, the files' names below it count as well; without, only the contents do, so that a folder can move.
    """
    listed = list(paths)
    contents = remembered.hashes(listed)
    if UNREAD in contents:
        return UNREAD
    digest = hashlib.sha256()
    for path, content in zip(listed, contents):
        name = path.relative_to(root).as_posix() if root else ""
        digest.update(json.dumps([name, content]).encode() + b"\n")
    return digest.hexdigest()[:16]


# Files of a model folder that decide what it says, as a download from the Hub brings them.
_MODEL_SUFFIXES = (".json", ".safetensors", ".jinja", ".model")
_MODEL_TEXTS = ("merges.txt", "vocab.txt")
_NOT_MODEL = ("artifact.json", "work.json", "lineage.json")


def model_files(folder: Path) -> list[Path]:
    """Configuration, weights, tokenizer, chat template and processor of a model folder, sorted; no hidden folders."""
    return sorted(
        path
        for path in folder.rglob("*")
        if (path.suffix in _MODEL_SUFFIXES or path.name in _MODEL_TEXTS)
        and path.name not in _NOT_MODEL
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def hash_model(folder: Path, remembered: HashCache) -> str:
    """What stands for a model folder's content, wherever it stands; the name that its lineage gives the base does not count."""
    content = hash_files(model_files(folder), remembered, folder)
    lineage = {key: value for key, value in read_object(folder / "lineage.json").items() if key != "base"}
    if not lineage or content == UNREAD:
        return content
    return hashlib.sha256(json.dumps([content, lineage], sort_keys=True).encode()).hexdigest()[:16]


def is_whole(folder: Path) -> bool:
    """Whether a model folder has its configuration, a tokenizer and all of its weights (a download may have been stopped)."""
    index = read_object(folder / "model.safetensors.index.json").get("weight_map", {})
    weights = {*index.values()} or {path.name for path in folder.glob("*.safetensors")}
    names = ("tokenizer.json", "vocab.json", "tokenizer.model", "tekken.json")
    return (
        bool(weights)
        and all((folder / name).is_file() for name in ("config.json", *weights))
        and any((folder / name).is_file() for name in names)
    )


def hub_commit(folder: Path) -> str | None:
    """The commit of a snapshot that the Hub's client downloaded (`.../snapshots/<commit>`), else None."""
    return folder.name if folder.parent.name == "snapshots" and len(folder.name) == 40 else None
