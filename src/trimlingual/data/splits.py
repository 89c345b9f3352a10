"""The data of a run: sources read, clips fitted to the model's window, held out, and the splits proved disjoint.

`prepare_data` writes one JSONL file for each split and `load_splits` reads them back. No clip, by its id or by
what is heard in it, may stand in two splits (disjoint.py), and none is dropped without being counted.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trimlingual.data.audio import DataError, Recording
from trimlingual.data.disjoint import (
    alike_audio,
    alike_warnings,
    check_disjoint,
    drop_equal_sources,
    equal_source_warnings,
    equal_sources,
    repeated,
    same_audio,
    some,
)
from trimlingual.data.hub import COMMIT_FILE
from trimlingual.data.rows import MAX_REPORTED, absolute
from trimlingual.data.sources import Clip, read_recordings
from trimlingual.recipe import DataSettings, HubSource, Source, TaskSettings
from trimlingual.run.jsonl import read_jsonl, write_jsonl
from trimlingual.run.processes import is_main_process
from trimlingual.run.progress import say
from trimlingual.run.records import checked

SPLITS = ("train", "select", "test", "out_of_domain")
# A reference may have so many characters per second of its clip, and some more: the fastest of the built-in speech has 34.
MOST_CHARACTERS_PER_S, SLACK_CHARACTERS = 50, 100


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

    `window_s` is the longest audio the model hears (None: no bound). Returns each split's number of clips, hours and hash, how many
    clips of each were dropped and why, and warnings, which are also said. Raises DataError. In a distributed run only the main
    process works, the others return {}.
    """
    if not is_main_process():
        return {}
    out_dir = absolute(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    held = {role: getattr(settings, role) for role in SPLITS}
    sources = {role: source for role, source in held.items() if source is not None and not isinstance(source, int)}
    clips: dict[str, list[Clip]] = {}
    recordings: dict[Path, Recording] = {}
    for role, source in sources.items():
        clips[role], heard = read_recordings(source, task.target_languages, out_dir / role, settings.references)
        recordings |= heard
    _name_apart(sources, clips)
    if settings.hold_out == "train_test_split":  # over all rows, as published
        _hold_out_rows(settings, clips)
    dropped = {
        "num_unusable_dropped": _drop_unusable(clips, recordings, settings.unusable),
        "num_too_long_dropped": _fit_window(clips, window_s, settings.too_long),
    }
    if settings.hold_out == "by_id":
        _hold_out_ids(settings, clips)
    clips = {role: clips[role] for role in SPLITS if role in clips}
    same = same_audio(clips)
    check_disjoint(clips, same)
    if settings.equal_sources == "drop":
        dropped["num_equal_sources_dropped"] = drop_equal_sources(clips)
    _every_language(clips, task.target_languages)
    splits = {role: Split(role, tuple(found)) for role, found in clips.items()}
    warnings = [
        *repeated(same), *alike_warnings(alike_audio(clips, recordings)), *equal_source_warnings(equal_sources(clips)),
        *_suspicious(clips, recordings), *_overlong(clips),
    ]  # fmt: skip
    for warning in warnings:
        say(f"warning: {warning}")
    for role, split in splits.items():
        write_jsonl(out_dir / f"{role}.jsonl", (clip.record(out_dir) for clip in split.clips))
    described = {
        role: {"num_clips": len(split.clips), "hours": round(split.hours, 4), "hash": split.hash}
        for role, split in splits.items()
    }
    commits = {role: path.read_text() for role in sources if (path := out_dir / role / COMMIT_FILE).is_file()}
    return {"splits": described, **dropped, "warnings": warnings, "commits": commits}


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


def _drop_unusable(clips: dict[str, list[Clip]], recordings: Mapping[Path, Recording], unusable: str) -> dict[str, int]:
    """Refuse clips without speech to hear, or take them out in place; returns how many went, by split."""
    num_dropped = {}
    named = []
    for role, found in clips.items():
        bad = [clip for clip in found if recordings[clip.audio].unusable]
        named += [f"{role} {clip.id!r} ({clip.audio}) {recordings[clip.audio].unusable}" for clip in bad]
        num_dropped[role] = len(bad)
        clips[role] = [clip for clip in found if not recordings[clip.audio].unusable]
    if named and unusable == "error":
        raise DataError(
            "\n".join(
                [
                    f"{len(named)} clip(s) hold nothing to learn from or to score:",
                    *(f"  {line}" for line in named[:MAX_REPORTED]),
                    *([f"  ... and {len(named) - MAX_REPORTED} more"] if len(named) > MAX_REPORTED else []),
                    "Record them again or take them out; data.unusable: drop leaves them out and counts them.",
                ]
            )
        )
    _none_empty(clips, "unusable (silent, too short, or with channels that cancel); record them again")
    return num_dropped


def _suspicious(clips: Mapping[str, Sequence[Clip]], recordings: Mapping[Path, Recording]) -> list[str]:
    """A warning for each split with clips that may not sound as they should."""
    warnings = []
    for role, found in clips.items():
        named = [f"{clip.id!r} {what}" for clip in found if (what := recordings[clip.audio].suspicious)]
        if named:
            warnings.append(f"{len(named)} clip(s) of {role} may be damaged: {some(named)}")
    return warnings


def _overlong(clips: Mapping[str, Sequence[Clip]]) -> list[str]:
    """A warning for each split with references that nobody says in so little time: the text of something else, mostly, and one such
    example can fill the memory of a training."""
    warnings = []
    for role, found in clips.items():
        named = [
            f"{clip.id!r} in {language!r} ({len(text):,} characters for {clip.duration_s:.1f} s)"
            for clip in found
            for language, text in clip.references.items()
            if len(text) > SLACK_CHARACTERS + MOST_CHARACTERS_PER_S * clip.duration_s
        ]
        if named:
            warnings.append(
                f"{len(named)} reference(s) of {role} are too long for their clips: {some(named)}. Shorten them or take the clips "
                "out: an answer is never as long, and training takes memory for every token of them"
            )
    return warnings


def _none_empty(clips: Mapping[str, Sequence[Clip]], what: str) -> None:
    for role, found in clips.items():
        if not found:
            raise DataError(f"all clips of data.{role} are {what}")


def _every_language(clips: Mapping[str, Sequence[Clip]], languages: Sequence[str]) -> None:
    """DataError if a split that models are scored on has no reference in one of the languages."""
    for role in ("select", "test"):
        lacking = [language for language in languages if not any(language in clip.references for clip in clips[role])]
        if lacking:
            raise DataError(
                f"no clip of data.{role} ({len(clips[role])}) has a reference in {', '.join(map(repr, lacking))}, so nothing could be "
                "scored there; add some, hold out more, or take the language out of task.target_languages"
            )


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
            f"{some([repr(clip.id) for clip in every])}. Set data.too_long: drop to leave them out, or split them."
        )
    for role, found in clips.items():
        clips[role] = [clip for clip in found if clip.duration_s <= window_s]
    _none_empty(clips, f"longer than the model's window of {window_s:g} s; split them")
    return {role: len(found) for role, found in longer.items()}


def _hold_out_ids(settings: DataSettings, clips: dict[str, list[Clip]]) -> None:
    """Take `test`, then `select`, out of `train` in place where they are numbers; the source's order is no matter."""
    wanted = _held_out(settings, len(clips["train"]))
    if not wanted:
        return
    pool = sorted(clips["train"], key=lambda clip: clip.id)
    random.Random(settings.split_seed).shuffle(pool)
    for role, num in wanted.items():
        clips[role], pool = sorted(pool[:num], key=lambda clip: clip.id), pool[num:]
    clips["train"] = sorted(pool, key=lambda clip: clip.id)


def _hold_out_rows(settings: DataSettings, clips: dict[str, list[Clip]]) -> None:
    """As `datasets`' train_test_split(test_size=test, seed=split_seed); `select` is what comes next in the same permutation."""
    rows = clips["train"]
    wanted = _held_out(settings, len(rows))
    if not wanted:
        return
    order = np.random.default_rng(settings.split_seed).permutation(len(rows))
    for role, num in wanted.items():
        clips[role], order = [rows[row] for row in sorted(order[:num])], order[num:]
    clips["train"] = [rows[row] for row in sorted(order)]


def _held_out(settings: DataSettings, num_clips: int) -> dict[str, int]:
    """How many clips `test` and `select` take out of `train`; DataError if none would be left."""
    wanted = {role: num for role in ("test", "select") if isinstance(num := getattr(settings, role), int)}
    if wanted and sum(wanted.values()) >= num_clips:
        asked = " and ".join(f"data.{role} {num}" for role, num in wanted.items())
        raise DataError(
            f"data.train has {num_clips} usable clips but {asked} are to be held out of it, which leaves "
            f"{num_clips - sum(wanted.values())} for training, at least 1 is needed; hold out fewer or add data"
        )
    return wanted


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
