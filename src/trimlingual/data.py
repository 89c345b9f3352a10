"""The data of a run: sources read, clips fitted to the model's window, held out, and the splits proved disjoint.

`prepare_data` writes one JSONL file for each split and `load_splits` reads them back. No clip, by its id or by the hash
of its file, may stand in two splits, and none is dropped without being counted.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from trimlingual.audio import DataError
from trimlingual.jsonl import read_jsonl, write_jsonl
from trimlingual.processes import is_main_process
from trimlingual.recipe import DataSettings, HubSource, Source, TaskSettings
from trimlingual.records import checked
from trimlingual.sources import COMMIT_FILE, Clip, absolute, read_source

SPLITS = ("train", "select", "test", "out_of_domain")
MAX_NAMED = 5  # clips named in one line of an error


@dataclass(frozen=True)
class Split:
    """Clips in a fixed order."""

    name: str
    clips: tuple[Clip, ...]

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 over (id, audio hash, references) in order: equal hash, equal data."""
        digest = hashlib.sha256()
        for clip in self.clips:
            digest.update(json.dumps([clip.id, clip.audio_sha256, clip.references], sort_keys=True).encode() + b"\n")
        return digest.hexdigest()[:16]

    @property
    def hours(self) -> float:
        """Length of all audio, in hours."""
        return sum(clip.duration_s for clip in self.clips) / 3600

    @property
    def ids(self) -> set[str]:
        return {clip.id for clip in self.clips}

    @property
    def audio_hashes(self) -> set[str]:
        return {clip.audio_sha256 for clip in self.clips}


@dataclass(frozen=True)
class DataSplits:
    """What is trained on, what layers are chosen by, what is reported, and further speech for recovery."""

    train: Split
    select: Split
    test: Split
    out_of_domain: Split | None


def prepare_data(
    settings: DataSettings, task: TaskSettings, out_dir: Path, *, window_s: float | None
) -> dict[str, Any]:
    """Read the sources, check and split them, write `out_dir/{train,select,test[,out_of_domain]}.jsonl`.

    `window_s` is the longest audio the model hears (None: no bound). Returns each split's number of clips, hours and
    hash, and how many clips of each source were dropped for length. Raises DataError. In a distributed run only the
    main process works, the others return {}.
    """
    if not is_main_process():
        return {}
    out_dir = absolute(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    held = {role: getattr(settings, role) for role in SPLITS}
    sources = {role: source for role, source in held.items() if source is not None and not isinstance(source, int)}
    clips = {role: read_source(source, task.target_languages, out_dir / role) for role, source in sources.items()}
    _name_apart(sources, clips)
    num_too_long = _fit_window(clips, window_s, settings.too_long)
    _hold_out(settings, clips)
    splits = {role: Split(role, tuple(clips[role])) for role in SPLITS if role in clips}
    check_disjoint(splits)
    for role, split in splits.items():
        write_jsonl(out_dir / f"{role}.jsonl", (clip.record(out_dir) for clip in split.clips))
    described = {
        role: {"num_clips": len(split.clips), "hours": round(split.hours, 4), "hash": split.hash}
        for role, split in splits.items()
    }
    commits = {role: path.read_text() for role in sources if (path := out_dir / role / COMMIT_FILE).is_file()}
    return {"splits": described, "num_too_long_dropped": num_too_long, "commits": commits}


def _name_apart(sources: Mapping[str, Source], clips: dict[str, list[Clip]]) -> None:
    """Default Hub ids (`train-0`) say nothing across data sets: where they clash, put the role before them, in place.

    The same recording twice is still found, by its hash.
    """
    taken: set[str] = set()
    for role, source in sources.items():
        ids = {clip.id for clip in clips[role]}
        if isinstance(source, HubSource) and source.id is None and ids & taken:
            clips[role] = [replace(clip, id=f"{role}-{clip.id}") for clip in clips[role]]
        taken |= {clip.id for clip in clips[role]}


def _fit_window(clips: dict[str, list[Clip]], window_s: float | None, too_long: str) -> dict[str, int]:
    """Refuse clips longer than the model's window, or take them out in place; returns how many went, by source."""
    if window_s is None:
        return {role: 0 for role in clips}
    longer = {role: [clip for clip in found if clip.duration_s > window_s] for role, found in clips.items()}
    every = [clip for found in longer.values() for clip in found]
    if every and too_long == "error":
        longest = max(every, key=lambda clip: clip.duration_s)
        where = ", ".join(f"{len(found)} in {role}" for role, found in longer.items() if found)
        raise DataError(
            f"{len(every)} clip(s) are longer than the model's window of {window_s:g} s ({where}), so their end "
            f"would not be heard. The longest is {longest.id!r} with {longest.duration_s:.1f} s; first ids: "
            f"{_some([repr(clip.id) for clip in every])}. Set data.too_long: drop to leave them out, or split them."
        )
    for role, found in clips.items():
        clips[role] = [clip for clip in found if clip.duration_s <= window_s]
        if not clips[role]:
            raise DataError(
                f"all clips of data.{role} are longer than the model's window of {window_s:g} s; split them"
            )
    return {role: len(found) for role, found in longer.items()}


def _hold_out(settings: DataSettings, clips: dict[str, list[Clip]]) -> None:
    """Take `test`, then `select`, out of `train` in place where they are numbers; the source's order is no matter."""
    wanted = {role: num for role in ("test", "select") if isinstance(num := getattr(settings, role), int)}
    if not wanted:
        return
    pool = sorted(clips["train"], key=lambda clip: clip.id)
    if sum(wanted.values()) >= len(pool):
        asked = " and ".join(f"data.{role} {num}" for role, num in wanted.items())
        raise DataError(
            f"data.train has {len(pool)} usable clips but {asked} are to be held out of it, which leaves "
            f"{len(pool) - sum(wanted.values())} for training, at least 1 is needed; hold out fewer or add data"
        )
    random.Random(settings.split_seed).shuffle(pool)
    for role, num in wanted.items():
        clips[role], pool = sorted(pool[:num], key=lambda clip: clip.id), pool[num:]
    clips["train"] = sorted(pool, key=lambda clip: clip.id)


def check_disjoint(splits: Mapping[str, Split]) -> None:
    """Raise DataError if an id stands twice in a split or two splits share an id or recording; names ids and files."""
    problems = []
    for name, split in splits.items():
        twice = [f"{id!r} ({num} times)" for id, num in Counter(clip.id for clip in split.clips).items() if num > 1]
        if twice:
            problems.append(f"{name} holds {len(twice)} id(s) more than once: {_some(twice)}")
    for (a, first), (b, second) in combinations(splits.items(), 2):
        by_id = {clip.id: clip for clip in first.clips}
        by_audio = {clip.audio_sha256: clip for clip in first.clips}
        ids = [(by_id[clip.id], clip) for clip in second.clips if clip.id in by_id]
        audio = [(by_audio[clip.audio_sha256], clip) for clip in second.clips if clip.audio_sha256 in by_audio]
        for what, pairs in (("id(s)", ids), ("recording(s)", audio)):
            if pairs:
                shared = [f"{x.id!r} ({x.audio}) = {y.id!r} ({y.audio})" for x, y in pairs]
                problems.append(f"{a} and {b} share {len(shared)} {what}: {_some(shared)}")
    if problems:
        advice = (
            "Take these clips out of one of the splits; where only ids are equal, rename them (`id` in the source)."
        )
        raise DataError("\n".join(["The splits are not disjoint:", *(f"  {problem}" for problem in problems), advice]))


def _some(items: Sequence[str]) -> str:
    more = f", ... and {len(items) - MAX_NAMED} more" if len(items) > MAX_NAMED else ""
    return ", ".join(items[:MAX_NAMED]) + more


def load_splits(folder: Path) -> DataSplits:
    """Read what `prepare_data` wrote; DataError if a file is missing or damaged."""
    folder = absolute(folder)
    splits: dict[str, Split | None] = {}
    for role in SPLITS:
        path = folder / f"{role}.jsonl"
        if role == "out_of_domain" and not path.is_file():
            splits[role] = None
            continue
        try:
            found = [checked(record, Clip) for record in read_jsonl(path)]
            splits[role] = Split(role, tuple(replace(clip, audio=folder / clip.audio) for clip in found))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path} is missing or damaged ({error}); run the data stage again with --force") from error
    return DataSplits(**splits)  # type: ignore[arg-type]
