"""What splits must not share, and what they had better not: ids, recordings, sentences.

A shared id or recording is an error: a score on a clip that was trained on says nothing. Equal source sentences, and clips that sound
alike without being equal sample by sample, are warnings: other people may say the same, and one synthetic voice speaks a sentence twice
in nearly the same way.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from trimlingual.data.audio import DataError, Recording
from trimlingual.data.same_recording import same_recordings
from trimlingual.data.sources import Clip

MAX_NAMED = 5  # clips named in one line of an error
TRAINED_ON = ("train", "out_of_domain")
HELD_OUT = ("select", "test")

Splits = Mapping[str, Sequence[Clip]]
Pairs = Mapping[
    tuple[str, str], Sequence[tuple[Clip, Clip]]
]  # by the names of the splits, equal ones for a pair in one split


def same_audio(splits: Splits) -> Pairs:
    """Clips with the same recording, sample by sample, whatever lossless format it is in.

    Where more than two clips have equal samples, each of the later ones is paired with the first.
    """
    first: dict[str, tuple[str, Clip]] = {}
    pairs: dict[tuple[str, str], list[tuple[Clip, Clip]]] = {}
    for name, clips in splits.items():
        for clip in clips:
            other_name, other = first.setdefault(clip.audio_sha256, (name, clip))
            if other is not clip:
                pairs.setdefault((other_name, name), []).append((other, clip))
    return pairs


def alike_audio(splits: Splits, recordings: Mapping[Path, Recording]) -> Pairs:
    """Clips that are not equal but whose fingerprints agree (of files in `recordings`): most likely copies in a lossy format."""
    first = {clip.audio_sha256: (name, clip) for name, clips in splits.items() for clip in clips}
    pairs: dict[tuple[str, str], list[tuple[Clip, Clip]]] = {}
    unlike = [(name, clip) for name, clip in first.values() if clip.audio in recordings]
    for i, j in same_recordings([recordings[clip.audio].fingerprint for _, clip in unlike]):
        (name, clip), (other_name, other) = unlike[i], unlike[j]
        pairs.setdefault((name, other_name), []).append((clip, other))
    return pairs


def check_disjoint(splits: Splits, same: Pairs) -> None:
    """DataError if an id stands twice in a split or two splits share an id or (`same`) a recording; names ids and files."""
    problems = []
    for name, clips in splits.items():
        twice = [f"{id!r} ({num} times)" for id, num in Counter(clip.id for clip in clips).items() if num > 1]
        if twice:
            problems.append(f"{name} holds {len(twice)} id(s) more than once: {some(twice)}")
    for a, b in combinations(splits, 2):
        by_id = {clip.id: clip for clip in splits[a]}
        ids = [(by_id[clip.id], clip) for clip in splits[b] if clip.id in by_id]
        for what, pairs in (("id(s)", ids), ("recording(s)", same.get((a, b), ()))):
            if pairs:
                shared = [f"{x.id!r} ({x.audio}) = {y.id!r} ({y.audio})" for x, y in pairs]
                problems.append(f"{a} and {b} share {len(shared)} {what}: {some(shared)}")
    if problems:
        advice = (
            "Take these clips out of one of the splits; where only ids are equal, rename them (`id` in the source)."
        )
        raise DataError("\n".join(["The splits are not disjoint:", *(f"  {problem}" for problem in problems), advice]))


def repeated(same: Pairs) -> list[str]:
    """A warning for each split that holds a recording more than once."""
    return [
        f"{a} holds {len(pairs)} recording(s) again, which count twice: {some([f'{x.id!r} = {y.id!r}' for x, y in pairs])}"
        for (a, b), pairs in same.items()
        if a == b
    ]


def alike_warnings(alike: Pairs) -> list[str]:
    """A warning for each two splits, or one, with clips that sound alike."""
    return [
        f"{a if a == b else f'{a} and {b}'}: {len(pairs)} pair(s) of clips sound alike, perhaps copies in a lossy format; listen to "
        f"them, and take copies out: {some([f'{x.id!r} and {y.id!r}' for x, y in pairs])}"
        for (a, b), pairs in alike.items()
    ]


def sentence(clip: Clip) -> str:
    """The source text without case, punctuation and spaces, for comparing; empty if there is none."""
    text = unicodedata.normalize("NFKC", clip.source or "").casefold()
    return "".join(character for character in text if unicodedata.category(character)[0] in "LMNS")


def equal_sources(splits: Splits) -> Pairs:
    """Clips of `select` or `test` and of another split whose source sentences are equal; clips without a source are not compared."""
    pairs: dict[tuple[str, str], list[tuple[Clip, Clip]]] = {}
    for a, b in combinations(splits, 2):
        if a in TRAINED_ON and b in TRAINED_ON:
            continue
        by_text = {text: clip for clip in splits[a] if (text := sentence(clip))}
        found = [(by_text[text], clip) for clip in splits[b] if (text := sentence(clip)) in by_text]
        if found:
            pairs[a, b] = found
    return pairs


def drop_equal_sources(clips: dict[str, list[Clip]]) -> dict[str, int]:
    """Take clips whose source sentence is one of `select` or `test` out of what is trained on, in place; how many went, by split."""
    held = {text for name in HELD_OUT for clip in clips[name] if (text := sentence(clip))}
    num_dropped = {}
    for name in TRAINED_ON:
        if name in clips:
            kept = [clip for clip in clips[name] if sentence(clip) not in held]
            num_dropped[name] = len(clips[name]) - len(kept)
            clips[name] = kept
    if not clips["train"]:
        raise DataError(
            "every clip of data.train has a source sentence of data.select or data.test, so data.equal_sources: drop leaves none; "
            "take these sentences out of the held-out splits"
        )
    return num_dropped


def equal_source_warnings(pairs: Pairs) -> list[str]:
    """A warning for each two splits with equal source sentences."""
    return [
        f"{a} and {b} share {len(found)} source sentence(s), which flatters the score: "
        f"{some([f'{x.id!r} = {y.id!r}' for x, y in found])}"
        + ("; data.equal_sources: drop takes them out of training" if {a, b} & set(TRAINED_ON) else "")
        for (a, b), found in pairs.items()
    ]


def some(items: Sequence[str]) -> str:
    """The first few of a list, and how many more there are."""
    more = f", ... and {len(items) - MAX_NAMED} more" if len(items) > MAX_NAMED else ""
    return ", ".join(items[:MAX_NAMED]) + more
