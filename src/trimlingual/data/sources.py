"""Where speech with reference translations comes from: manifests, folders, CoVoST 2, Hub sets, the built-in speech.

Each kind of source is read into rows by its own function (rows.py, hub.py); then every file is decoded once to prove it whole, and all
problems of a source are reported in one DataError with the place of each. Nothing is dropped or cut silently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import soundfile

from trimlingual.data.audio import DataError, Recording, is_file
from trimlingual.data.hub import hub_rows, is_spelled_as_folder, missing_columns, stored_columns
from trimlingual.data.inspection import inspect_all
from trimlingual.data.rows import Rows, columns_of, listed_rows, listing, read_text
from trimlingual.data.spread import spread
from trimlingual.recipe import Covost2Source, FolderSource, HubSource, References, Source
from trimlingual.run.artifacts import hash_file
from trimlingual.run.progress import progress

NUM_HEADERS = 64  # files whose length stands for that of all of a source
MAX_LISTED = 3  # in one line of the check before a run


@dataclass(frozen=True)
class Clip:
    """One utterance. `references` maps each asked language to its text; `audio_sha256` is of the decoded samples (audio.Recording)."""

    id: str
    audio: Path
    references: dict[str, str]
    source: str | None
    duration_s: float
    audio_sha256: str

    def languages(self, asked: Sequence[str]) -> list[str]:
        """Those of the asked languages that the clip is translated into: where it has a reference, or all if it has none at all."""
        return [language for language in asked if language in self.references or not self.references]

    def record(self, folder: Path | None = None) -> dict[str, Any]:
        """The JSON form; audio inside `folder` is written relative to it, so that the folder can be moved."""
        audio = self.audio.relative_to(folder) if folder and self.audio.is_relative_to(folder) else self.audio
        return {**asdict(self), "audio": audio.as_posix()}


def read_source(source: Source, languages: Sequence[str], work_dir: Path) -> list[Clip]:
    """The clips of `read_recordings`."""
    return read_recordings(source, languages, work_dir)[0]


def read_recordings(
    source: Source, languages: Sequence[str], work_dir: Path, wanted: References = "all"
) -> tuple[list[Clip], dict[Path, Recording]]:
    """Read a source's clips in its own order, each file decoded once to prove it whole; and what was heard, by file.

    `wanted`: each clip has a reference in all languages, or in any of them.

    Audio that comes as bytes or samples (Hub sets) is written under `work_dir/audio`. One DataError has all of its problems.
    """
    languages = _asked(source, languages, wanted)
    rows = hub_rows(source, languages, work_dir) if isinstance(source, HubSource) else listed_rows(source, languages)
    if wanted == "all":
        rows.require_all_languages()
    clips, recordings = _verify(rows)
    rows.check()
    if not clips:
        raise DataError(f"{rows.origin} holds no clips; it needs at least 1")
    return clips, recordings


def _asked(source: Source, languages: Sequence[str], wanted: References) -> list[str]:
    """The languages that a source is asked for: all, or those of them that it says it has."""
    has = list(languages)
    if wanted == "any" and isinstance(source, (FolderSource, HubSource)):
        has = list(source.references)
    elif wanted == "any" and isinstance(source, Covost2Source):
        has = [source.target_language]
    return [language for language in languages if language in has] or list(languages)


def listing_problems(
    source: Source,
    asked: Sequence[str],
    sources_wanted: bool = False,
    wanted: References = "all",
    scored: bool = False,
) -> list[str]:
    """What is wrong with a source as far as can be told without decoding audio or downloading anything; empty if nothing is.

    Its listing, columns, references in every language and audio files; with `sources_wanted` also the source texts. What is `scored`
    needs each language in some clip. Of a set on the Hub only what the recipe says about its columns is known, of one in a folder its
    columns too.
    """
    languages = _asked(source, asked, wanted)
    lacking = [language for language in asked if language not in languages] if scored else []
    try:
        if isinstance(source, HubSource) and is_spelled_as_folder(source) and not Path(source.path).is_dir():
            return [f"{source.path} does not exist or is no folder; correct the path in the recipe's data section"]
        if isinstance(source, HubSource):
            columns_of(source, languages)
            if lacking:
                return [f"{source.path} names no column of references in {', '.join(map(repr, lacking))}"]
            if sources_wanted and not source.source:
                return [f"{source.path} names no column with the source text (`source`)"]
            has = stored_columns(source)
            missing = [] if has is None else missing_columns(source, has)
            return (
                [f"{source.path} has no column {', '.join(missing)} (it has {', '.join(has or ())})"] if missing else []
            )
        rows = listed_rows(source, languages)
    except DataError as error:
        return [str(error)]
    if not rows and not rows.problems:
        return [f"{rows.origin} holds no clips; it needs at least 1"]
    if wanted == "all":
        rows.require_all_languages()
    if rows and (wanted == "all" or scored):
        lacking += [language for language in languages if not any(row.references.get(language) for row in rows)]
    if lacking:
        return [f"{rows.origin} has no reference in {', '.join(map(repr, lacking))} in any of its {len(rows)} clips"]
    found = [what for _, what in rows.problems]
    found += [f"{row.where}: {row.audio} does not exist or is not a file" for row in rows if not is_file(row.audio)]
    if sources_wanted:
        found += [f"{row.where}: no source text" for row in rows if not row.source]
    more = f"; ... and {len(found) - MAX_LISTED} more" if len(found) > MAX_LISTED else ""
    return [f"{rows.origin}: {'; '.join(found[:MAX_LISTED])}{more}"] if found else []


def _verify(rows: Rows) -> tuple[list[Clip], dict[Path, Recording]]:
    """Decode every file once, on all cores; what is wrong is added to the rows' problems."""
    paths = list(dict.fromkeys(row.audio for row in rows))
    found: dict[Path, Recording | DataError] = {}
    with progress("checking audio", len(paths)) as advance, closing(inspect_all(paths)) as results:
        for path, result in zip(paths, results):
            found[path] = result
            advance(1)
    clips = []
    for position, row in enumerate(rows):
        heard = found[row.audio]
        if isinstance(heard, DataError):
            rows.problems.append((position, f"{row.where}: {heard}"))
        else:
            clip = Clip(row.id, row.audio, row.references, row.source, heard.duration_s, heard.samples_sha256)
            clips.append(clip)
    return clips, {path: heard for path, heard in found.items() if isinstance(heard, Recording)}


def speech_seconds(source: Source, languages: Sequence[str], encoded_s: Callable[[float], float]) -> float | None:
    """About how many seconds of a source's speech are encoded, by the headers of a few of its files; None for a set on the Hub.

    `encoded_s` says how many of a clip's own seconds.
    """
    if isinstance(source, HubSource):
        return None
    try:
        rows = listed_rows(source, languages)
    except DataError:
        return None
    durations = []
    for row in spread(list(rows), NUM_HEADERS):
        if not is_file(row.audio):  # opening a pipe waits for who writes to it
            continue
        with suppress(RuntimeError, OSError):  # whoever reads the source says what is wrong with a file
            durations.append(encoded_s(soundfile.info(row.audio).duration))
    return len(rows) * fmean(durations) if durations else None


def source_files(source: Source) -> list[Path]:
    """Every file that a source's content is made of, but for the listing itself, in a fixed order; none for a set on the Hub.

    Raises DataError if the listing cannot be read. Wrong rows are left out: reading the source names them.
    """
    if isinstance(source, HubSource):
        return sorted(path for path in Path(source.path).rglob("*") if path.is_file())
    languages = {FolderSource: [], Covost2Source: [getattr(source, "target_language", "")]}.get(type(source), [""])
    return [row.audio for row in listed_rows(source, languages)]


def source_fingerprint(source: Source) -> dict[str, Any]:
    """Cheap description of a source's content for stage fingerprints: the hash of the file that lists its clips.

    A Hub set: path, name, revision; if local, also its files' names and sizes and the content of its JSON files.
    """
    if not isinstance(source, HubSource):
        path = listing(source)
        read_text(path)
        return {"kind": source.kind, "sha256": hash_file(path)}
    described: dict[str, Any] = {"kind": "hub", "path": source.path, "name": source.name, "revision": source.revision}
    root = Path(source.path)
    if root.is_dir():
        digest = hashlib.sha256()
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            content = hash_file(path) if path.suffix == ".json" else ""
            digest.update(f"{path.relative_to(root).as_posix()}\t{path.stat().st_size}\t{content}\n".encode())
        described["files"] = digest.hexdigest()
    return described
