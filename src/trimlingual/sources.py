"""Where speech with reference translations comes from: manifests, folders, CoVoST 2, Hub sets, the built-in speech.

Each kind of source is read into rows by its own function; then every file is decoded once to prove it whole, and all
problems of a source are reported in one DataError with the place of each. Nothing is dropped or cut silently.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import random
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import soundfile as sf

from trimlingual.artifacts import hash_file
from trimlingual.audio import DataError, inspect_audio, is_file
from trimlingual.jsonl import numbered_lines, parse_json
from trimlingual.progress import progress
from trimlingual.recipe import (
    BuiltinSource,
    Covost2Source,
    FolderSource,
    HubSource,
    ManifestSource,
    Source,
)

MINI_DATA = Path(__file__).resolve().parent / "mini" / "data"
COMMIT_FILE = "commit.txt"  # beside the audio of a Hub set: the commit that it came from
MAX_REPORTED = 20  # problems spelled out in one error
MAX_LISTED = 3  # in one line of the check before a run


@dataclass(frozen=True)
class Clip:
    """One utterance. `references` maps each asked language to its text; `audio_sha256` is of the file's bytes."""

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

    @classmethod
    def from_record(cls, record: Mapping[str, Any], folder: Path | None = None) -> Clip:
        """Inverse of `record`; TypeError or KeyError if fields are missing or unknown."""
        return cls(**{**record, "audio": (folder or Path()) / record["audio"]})


@dataclass(frozen=True)
class _Row:
    where: str
    id: str
    audio: Path
    references: dict[str, str]
    source: str | None


class _Rows(list[_Row]):
    """Rows of one source in order, and what is wrong with it by row number; `origin` names the source in errors."""

    def __init__(self, origin: str, languages: Sequence[str]) -> None:
        super().__init__()
        self.origin = origin
        self.languages = languages
        self.problems: list[tuple[int, str]] = []  # (how many rows came before, what)

    def problem(self, where: str, what: str) -> None:
        self.problems.append((len(self), f"{where}: {what}"))

    def add(self, where: str, audio: Path, references: Mapping[str, Any], source: Any, id: Any = None) -> None:
        """Add a row; whatever is wrong with its texts or id becomes a problem."""
        texts = {language: _text(references.get(language)) for language in self.languages}
        for language in [language for language, text in texts.items() if not text]:
            self.problem(
                where, f"reference for {language!r} is missing, empty or not text; add it or take the line out"
            )
        name = audio.stem if id is None else _text(str(id) if type(id) is int else id)
        if not name:
            self.problem(where, f"id is {id!r} but must be text; correct it, or leave it out to use the file's name")
        self.append(_Row(where, name, audio, texts, _text(source) or None))


def read_source(source: Source, languages: Sequence[str], work_dir: Path) -> list[Clip]:
    """Read a source's clips in its own order, each file decoded once to prove it whole.

    Audio that comes as bytes (Hub sets) is written under `work_dir/audio`. One DataError has all of its problems.
    """
    rows = _hub_rows(source, languages, work_dir) if isinstance(source, HubSource) else _listed_rows(source, languages)
    clips = _verify(rows)
    if rows.problems:
        lines = [f"  {what}" for _, what in sorted(rows.problems, key=lambda problem: problem[0])]
        more = [f"  ... and {len(lines) - MAX_REPORTED} more"] if len(lines) > MAX_REPORTED else []
        raise DataError("\n".join([f"{rows.origin} has {len(lines)} problem(s):", *lines[:MAX_REPORTED], *more]))
    if not clips:
        raise DataError(f"{rows.origin} holds no clips; it needs at least 1")
    return clips


def listing_problems(source: Source, languages: Sequence[str], sources_wanted: bool = False) -> list[str]:
    """What is wrong with a source as far as can be told without decoding audio or downloading anything; empty if nothing is.

    Its listing, columns, references in every language and audio files; with `sources_wanted` also the source texts. Of a set on the
    Hub only what the recipe says about its columns is known, of one in a folder its columns too.
    """
    try:
        if isinstance(source, HubSource):
            _columns(source, languages)
            if sources_wanted and not source.source:
                return [f"{source.path} names no column with the source text (`source`)"]
            has = _stored_columns(source)
            missing = [] if has is None else [column for column in _wanted_columns(source) if column not in has]
            columns = ", ".join(missing)
            return [f"{source.path} has no column {columns} (it has {', '.join(has or ())})"] if missing else []
        rows = _listed_rows(source, languages)
    except DataError as error:
        return [str(error)]
    if not rows and not rows.problems:
        return [f"{rows.origin} holds no clips; it needs at least 1"]
    empty = [language for language in languages if rows and not any(row.references.get(language) for row in rows)]
    if empty:
        return [f"{rows.origin} has no reference in {', '.join(map(repr, empty))} in any of its {len(rows)} clips"]
    found = [what for _, what in rows.problems]
    found += [f"{row.where}: {row.audio} does not exist" for row in rows if not is_file(row.audio)]
    if sources_wanted:
        found += [f"{row.where}: no source text" for row in rows if not row.source]
    more = f"; ... and {len(found) - MAX_LISTED} more" if len(found) > MAX_LISTED else ""
    return [f"{rows.origin}: {'; '.join(found[:MAX_LISTED])}{more}"] if found else []


def _listed_rows(source: Source, languages: Sequence[str]) -> _Rows:
    """Rows of a source whose clips one local file lists."""
    if isinstance(source, FolderSource):
        return _folder_rows(source, languages)
    if isinstance(source, Covost2Source):
        return _covost2_rows(source, languages)
    return _manifest_rows(_listing(source), languages)


def _wanted_columns(source: HubSource) -> list[str]:
    return [source.audio, *source.references.values(), *(column for column in (source.source, source.id) if column)]


def _stored_columns(source: HubSource) -> list[str] | None:
    """Columns of a data set that `save_to_disk` wrote to a folder, from its JSON; None where that is not at hand."""
    paths = [Path(source.path, name) for name in ("dataset_info.json", f"{source.splits[0]}/dataset_info.json")]
    for path in paths:
        if path.is_file():
            try:
                return list(json.loads(path.read_text(encoding="utf-8"))["features"])
            except (ValueError, KeyError, TypeError):
                return None
    return None


def _verify(rows: _Rows) -> list[Clip]:
    """Decode every file once, on all cores; what is wrong is added to the rows' problems."""
    paths = list(dict.fromkeys(row.audio for row in rows))
    found: dict[Path, Any] = {}
    # libsndfile decodes outside the interpreter lock
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress("checking audio", len(paths)) as advance:
        results = pool.map(inspect_audio, paths)
        try:
            for path, result in zip(paths, results):
                found[path] = result
                advance(1)
        finally:
            results.close()  # type: ignore[attr-defined]  # a generator; what has not begun is not waited for
    first: dict[str, str] = {}
    clips = []
    for position, row in enumerate(rows):
        result = found[row.audio]
        if row.id and first.setdefault(row.id, row.where) != row.where:
            what = f"{row.where}: id {row.id!r} was used in {first[row.id]}; give each clip an id of its own"
            rows.problems.append((position, what))
        if isinstance(result, DataError):
            rows.problems.append((position, f"{row.where}: {result}"))
        else:
            clips.append(Clip(row.id, row.audio, row.references, row.source, *result))
    return clips


def _text(value: Any) -> str:
    """Stripped and NFC-normalised; empty for what is not text (nor is a lone surrogate, which UTF-8 cannot hold)."""
    if not isinstance(value, str) or any("\ud800" <= character <= "\udfff" for character in value):
        return ""
    return unicodedata.normalize("NFC", value).strip()


def absolute(path: Path) -> Path:
    """Without `..`, but with symbolic links kept, so that a linked folder stays where it is named."""
    return Path(os.path.abspath(path))


def _open_text(path: Path) -> str:
    """A UTF-8 file (with or without BOM), line ends as they are; DataError if it is missing or not UTF-8."""
    if not is_file(path):
        raise DataError(f"{path} does not exist or is not a file; correct the path in the recipe's data section")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error


def _listing(source: Source) -> Path:
    """The one file that lists a source's clips."""
    if isinstance(source, ManifestSource):
        return Path(source.path)
    if isinstance(source, FolderSource):
        return Path(source.path) / "metadata.csv"
    if isinstance(source, Covost2Source):
        return Path(source.tsv)
    assert isinstance(source, BuiltinSource), source
    return MINI_DATA / f"{source.split}.jsonl"


def _manifest_rows(path: Path, languages: Sequence[str]) -> _Rows:
    rows = _Rows(str(path), languages)
    for number, line in numbered_lines(_open_text(path)):
        where = f"line {number}"
        try:
            record = parse_json(line)
        except ValueError as error:
            rows.problem(where, f"not JSON ({error}); write one JSON object a line")
            continue
        if not isinstance(record, dict) or not _text(record.get("audio")):
            rows.problem(where, 'no audio; write {"audio": "path of a file", "references": {"<language>": "text"}}')
            continue
        references = record.get("references", {})
        if "reference" in record:
            if len(languages) > 1 or "references" in record:
                asked = ", ".join(languages)
                rows.problem(where, f"`reference` does not name its language; write `references` for {asked} instead")
                continue
            references = {languages[0]: record["reference"]}
        if not isinstance(references, dict):
            rows.problem(where, f"`references` is {references!r} but must map languages to texts")
            continue
        rows.add(where, absolute(path.parent / record["audio"]), references, record.get("source"), record.get("id"))
    return rows


def _table(path: Path, columns: Sequence[str], **dialect: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("line N", row) of a CSV or TSV file with a header; DataError if a column is missing."""
    reader = csv.DictReader(io.StringIO(_open_text(path), newline=""), **dialect)
    try:
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            has = ", ".join(reader.fieldnames or ())
            raise DataError(f"{path} has no column {', '.join(missing)} (it has {has}); correct the recipe or the file")
        for row in reader:
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}; write it as CSV with a header") from error


def _columns(source: FolderSource | HubSource, languages: Sequence[str]) -> dict[str, str]:
    """language -> column for the asked languages."""
    missing = [language for language in languages if language not in source.references]
    if missing:
        named = ", ".join(source.references)
        raise DataError(
            f"{source.path}: `references` names no column for {', '.join(missing)}, only for {named}; add it"
        )
    return {language: source.references[language] for language in languages}


def _folder_rows(source: FolderSource, languages: Sequence[str]) -> _Rows:
    rows, columns = _Rows(str(_listing(source)), languages), _columns(source, languages)
    optional = [column for column in (source.source, source.id) if column]
    for where, row in _table(_listing(source), ["file_name", *columns.values(), *optional]):
        if not _text(row["file_name"]):
            rows.problem(where, "file_name is empty; write the audio file's path in the folder")
            continue
        texts = {language: row[column] for language, column in columns.items()}
        audio = absolute(Path(source.path) / row["file_name"])
        rows.add(where, audio, texts, row.get(source.source or ""), row[source.id] if source.id else None)
    return rows


def _covost2_rows(source: Covost2Source, languages: Sequence[str]) -> _Rows:
    """CoVoST 2's TSV files are unquoted with backslash escapes, as fairseq reads them; `sentence` may be absent."""
    path, clips_dir = Path(source.tsv), absolute(Path(source.common_voice) / "clips")
    if list(languages) != [source.target_language]:
        asked = ", ".join(languages)
        raise DataError(
            f"{path} has target_language {source.target_language!r} but task.target_languages is {asked}; they must be "
            "equal, as a CoVoST 2 file has one language"
        )
    table = list(_table(path, ["path", "translation"], delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\"))
    if source.split and table and "split" in table[0][1]:
        table = [(where, row) for where, row in table if row["split"] == source.split]
    elif source.split and f".{source.split}." not in path.name:
        raise DataError(f"{path} has no split column to find {source.split!r} by; leave `split` out to read all of it")
    if source.max_clips:  # a fixed shuffle, so that the first 10k are part of the first 100k
        table.sort(key=lambda entry: entry[1]["path"] or "")
        random.Random(0).shuffle(table)
        table = table[: source.max_clips]
    missing = [row["path"] for _, row in table if not is_file(clips_dir / str(row["path"]))]
    if missing:
        examples = ", ".join(map(str, missing[:3]))
        raise DataError(
            f"{len(missing)} of {len(table)} clips of {path} are not in {clips_dir} (first: {examples}); unpack Common "
            "Voice 4 there (CoVoST 2 belongs to it), correct common_voice, or take those lines out of the TSV"
        )
    rows = _Rows(str(path), languages)
    for where, row in table:
        rows.add(where, clips_dir / row["path"], {source.target_language: row["translation"]}, row.get("sentence"))
    return rows


def _load_hub_split(source: HubSource, split: str) -> Any:
    """One split as a `datasets.Dataset` with undecoded audio; also from a folder written by `save_to_disk`."""
    import datasets  # takes seconds, and only Hub sources need it

    try:
        if (Path(source.path) / "dataset_dict.json").is_file() or (Path(source.path) / "state.json").is_file():
            loaded = datasets.load_from_disk(source.path)
            if isinstance(loaded, datasets.DatasetDict):
                if split not in loaded:
                    raise ValueError(f"it has the splits {', '.join(map(str, loaded))}")
                loaded = loaded[split]
            elif len(source.splits) > 1 or (loaded.split is not None and str(loaded.split) != split):
                raise ValueError(f"it is a single split ({loaded.split or 'unnamed'})")
        else:
            loaded = datasets.load_dataset(source.path, source.name, split=split, revision=source.revision)
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"split {split!r} of {source.path} (name {source.name}, revision {source.revision}) cannot be loaded: "
            f"{error}; correct path, name, splits or revision in the recipe, or check the network"
        ) from error
    wanted = _wanted_columns(source)
    missing = [column for column in wanted if column not in loaded.column_names]
    if missing:
        has = ", ".join(loaded.column_names)
        raise DataError(f"{source.path} has no column {', '.join(missing)} (it has {has}); correct the recipe")
    loaded = loaded.select_columns(list(dict.fromkeys(wanted)))
    try:
        return loaded.cast_column(source.audio, datasets.Audio(decode=False))
    except (ValueError, TypeError, ImportError) as error:  # ImportError: decoded arrays, which torchcodec would encode
        what = f"column {source.audio!r} of {source.path} holds {loaded.features[source.audio]}"
        raise DataError(f"{what}, not audio files ({error}); name the audio column in `audio`") from error


def _hub_rows(source: HubSource, languages: Sequence[str], work_dir: Path) -> _Rows:
    rows, columns = _Rows(f"{source.path} ({', '.join(source.splits)})", languages), _columns(source, languages)
    folder = absolute(work_dir / "audio")
    folder.mkdir(parents=True, exist_ok=True)
    for split in source.splits:
        loaded = _load_hub_split(source, split)
        if commit := hub_set_commit(loaded):
            (work_dir / COMMIT_FILE).write_text(commit, encoding="utf-8")
        for index, row in enumerate(loaded):
            where, stem = f"{split}[{index}]", f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', split)}-{index}"
            audio = row[source.audio] or {}
            stored = Path(audio.get("path") or "")
            data = audio.get("bytes") or (stored.read_bytes() if stored.is_file() else None)
            if not data:
                rows.problem(where, f"no audio in column {source.audio!r}; take the row out of the data set")
                continue
            path = _write_once(folder, stem, data)
            texts = {language: row[column] for language, column in columns.items()}
            text = row[source.source] if source.source else None
            rows.add(where, path, texts, text, row[source.id] if source.id else stem)
    return rows


def hub_set_commit(loaded: Any) -> str | None:
    """The commit of the Hub's repository that a `datasets.Dataset` was read from; None for one from elsewhere."""
    found = {
        match[1] for name in loaded.info.download_checksums or () if (match := re.search(r"@([0-9a-f]{40})/", name))
    }
    return found.pop() if len(found) == 1 else None


def _write_once(folder: Path, stem: str, data: bytes) -> Path:
    """Write audio bytes as `<stem>.<format>`, unless a killed run already did."""
    try:
        ending = sf.info(io.BytesIO(data)).format.lower()
    except sf.SoundFileError:
        ending = "bin"  # decoding it reports what is wrong
    path = folder / f"{stem}.{ending}"
    if not path.is_file() or path.read_bytes() != data:
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(data)
        os.replace(temporary, path)
    return path


def source_files(source: Source) -> list[Path]:
    """Every file that a source's content is made of, but for the listing itself, in a fixed order; none for a set on the Hub.

    Raises DataError if the listing cannot be read. Wrong rows are left out: reading the source names them.
    """
    if isinstance(source, HubSource):
        return sorted(path for path in Path(source.path).rglob("*") if path.is_file())
    if isinstance(source, FolderSource):
        rows = _folder_rows(source, [])
    elif isinstance(source, Covost2Source):
        rows = _covost2_rows(source, [source.target_language])
    else:
        rows = _manifest_rows(_listing(source), [""])
    return [row.audio for row in rows]


def source_fingerprint(source: Source) -> dict[str, Any]:
    """Cheap description of a source's content for stage fingerprints: the hash of the file that lists its clips.

    A Hub set: path, name, revision; if local, also its files' names and sizes and the content of its JSON files.
    """
    if not isinstance(source, HubSource):
        listing = _listing(source)
        _open_text(listing)
        return {"kind": source.kind, "sha256": hash_file(listing)}
    described: dict[str, Any] = {"kind": "hub", "path": source.path, "name": source.name, "revision": source.revision}
    root = Path(source.path)
    if root.is_dir():
        digest = hashlib.sha256()
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            content = hash_file(path) if path.suffix == ".json" else ""
            digest.update(f"{path.relative_to(root).as_posix()}\t{path.stat().st_size}\t{content}\n".encode())
        described["files"] = digest.hexdigest()
    return described
