"""Rows of speech with references, as they stand in manifests, folders with a table, and CoVoST 2's files.

Each kind of source has its own function, which reads texts and names audio files; no audio is read here. What is wrong is kept by row.
"""

from __future__ import annotations

import csv
import io
import os
import random
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimlingual.data.audio import DataError, is_file
from trimlingual.recipe import BuiltinSource, Covost2Source, FolderSource, HubSource, ManifestSource, Source
from trimlingual.run.jsonl import numbered_lines, parse_json

MINI_DATA = Path(__file__).resolve().parents[1] / "mini" / "data"
MAX_REPORTED = 20  # problems spelled out in one error
PART_KEYS = ("offset", "start", "begin")  # where other tools' manifests say that a line is a part of its recording


@dataclass(frozen=True)
class Row:
    """One line of a source; `where` names it in errors."""

    where: str
    id: str
    audio: Path
    references: dict[str, str]
    source: str | None


class Rows(list[Row]):
    """Rows of one source in order, and what is wrong with it by row number; `origin` names the source in errors."""

    def __init__(self, origin: str, languages: Sequence[str]) -> None:
        super().__init__()
        self.origin = origin
        self.languages = languages
        self.problems: list[tuple[int, str]] = []  # (how many rows came before, what)
        self.without_reference: list[tuple[int, str]] = []  # the same, of rows that lack some language, but not all
        self._first: dict[str, str] = {}  # id -> where it was used

    def problem(self, where: str, what: str) -> None:
        """Note what is wrong with the row that comes next."""
        self.problems.append((len(self), f"{where}: {what}"))

    def add(self, where: str, audio: Path, references: Mapping[str, Any], source: Any, id: Any = None) -> None:
        """Add a row; whatever is wrong with its texts or id becomes a problem."""
        texts = {language: clean_text(references.get(language)) for language in self.languages}
        given = {language: text for language, text in texts.items() if text}
        for language in [language for language in texts if language not in given]:
            what = f"{where}: reference for {language!r} is missing, empty or not text; add it or take the line out"
            (self.without_reference if given else self.problems).append((len(self), what))
        name = audio.stem if id is None else clean_text(str(id) if type(id) is int else id)
        if not name:
            self.problem(where, f"id is {id!r} but must be text; correct it, or leave it out to use the file's name")
        elif (first := self._first.setdefault(name, where)) != where:
            self.problem(where, f"id {name!r} was used in {first}; give each clip an id of its own")
        self.append(Row(where, name, audio, given, clean_text(source) or None))

    def require_all_languages(self) -> None:
        """A row that lacks a language is a problem, also where it has another."""
        self.problems += self.without_reference

    def check(self) -> None:
        """Raise one DataError with all problems there are, in the order of the rows."""
        if self.problems:
            lines = [f"  {what}" for _, what in sorted(self.problems, key=lambda problem: problem[0])]
            more = [f"  ... and {len(lines) - MAX_REPORTED} more"] if len(lines) > MAX_REPORTED else []
            raise DataError("\n".join([f"{self.origin} has {len(lines)} problem(s):", *lines[:MAX_REPORTED], *more]))


def clean_text(value: Any) -> str:
    """Stripped and NFC-normalised; empty for what is not text (nor is a lone surrogate, which UTF-8 cannot hold)."""
    if not isinstance(value, str) or any("\ud800" <= character <= "\udfff" for character in value):
        return ""
    return unicodedata.normalize("NFC", value).strip()


def absolute(path: Path) -> Path:
    """Without `..`, but with symbolic links kept, so that a linked folder stays where it is named."""
    return Path(os.path.abspath(path))


def find_audio(folder: Path, name: str) -> Path:
    """The file `name` in `folder`, also where another system wrote it: with backslashes, or with accents in the other normal form.

    Names look the same on a screen whether an accent is part of its letter (NFC) or follows it (NFD, as macOS' archives have it).
    The path as it is written if there is no such file.
    """
    written = absolute(folder / name)
    if is_file(written):
        return written
    for path in dict.fromkeys((name, name.replace("\\", "/"))):
        found = folder
        for part in Path(path).parts:
            forms = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
            found /= next((form for form in forms if _exists(found / form)), part)
        if is_file(found):
            return absolute(found)
    return written


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def read_text(path: Path) -> str:
    """A UTF-8 file (with or without BOM), line ends as they are; DataError if it is missing or not UTF-8."""
    if not is_file(path):
        raise DataError(f"{path} does not exist or is not a file; correct the path in the recipe's data section")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error


def listing(source: Source) -> Path:
    """The one file that lists a source's clips."""
    if isinstance(source, ManifestSource):
        return Path(source.path)
    if isinstance(source, FolderSource):
        table, lines = (Path(source.path) / f"metadata.{ending}" for ending in ("csv", "jsonl"))
        if table.is_file() and lines.is_file():
            raise DataError(f"{source.path} holds metadata.csv and metadata.jsonl; take one of them out")
        return lines if lines.is_file() else table
    if isinstance(source, Covost2Source):
        return Path(source.tsv)
    assert isinstance(source, BuiltinSource), source
    return MINI_DATA / f"{source.split}.jsonl"


def manifest_rows(path: Path, languages: Sequence[str]) -> Rows:
    """Rows of a JSONL manifest."""
    rows = Rows(str(path), languages)
    for where, record in _objects(path, rows):
        if not clean_text(record.get("audio")):
            rows.problem(where, 'no audio; write {"audio": "path of a file", "references": {"<language>": "text"}}')
            continue
        if part := next((key for key in PART_KEYS if _is_positive(record.get(key))), None):
            rows.problem(
                where,
                f"{part} is {record[part]!r}, but recordings are read whole: write each part into a file of its own "
                f"(where the file is the part already, take `{part}` out)",
            )
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
        audio = find_audio(path.parent, record["audio"])
        rows.add(where, audio, references, record.get("source"), record.get("id"))
    return rows


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and value > 0


def _objects(path: Path, rows: Rows) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("line N", object) of a JSONL file; what is no JSON object becomes a problem of `rows`."""
    for number, line in numbered_lines(read_text(path)):
        where = f"line {number}"
        try:
            record = parse_json(line)
        except ValueError as error:
            rows.problem(where, f"not JSON ({error}); write one JSON object a line")
            continue
        if isinstance(record, dict):
            yield where, record
        else:
            rows.problem(where, f"no audio: a {type(record).__name__}; write one JSON object a line")


def _table(path: Path, columns: Sequence[str], **dialect: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("line N", row) of a CSV or TSV file with a header.

    DataError where a column is missing or stands there twice, or a line has more cells than the header.
    """
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), **dialect)
    try:
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            has = ", ".join(reader.fieldnames or ())
            raise DataError(f"{path} has no column {', '.join(missing)} (it has {has}); correct the recipe or the file")
        if twice := [column for column in columns if (reader.fieldnames or []).count(column) > 1]:
            raise DataError(f"{path} has more than one column {', '.join(twice)}; rename or remove the others")
        for row in reader:
            if extra := row.get(None):
                raise DataError(
                    f"{path}, line {reader.line_num} has {len(extra)} cell(s) more than the header, the first {extra[0]!r}: put a "
                    "text with a delimiter in it in quotes, else only its beginning would be read"
                )
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        what = f"{error}; a quote in it may not be closed or not be doubled" if dialect.get("strict") else str(error)
        raise DataError(f"{path}, line {reader.line_num}: {what}; write it as CSV with a header") from error


def columns_of(source: FolderSource | HubSource, languages: Sequence[str]) -> dict[str, str]:
    """language -> column for the asked languages."""
    missing = [language for language in languages if language not in source.references]
    if missing:
        named = ", ".join(source.references)
        raise DataError(
            f"{source.path}: `references` names no column for {', '.join(missing)}, only for {named}; add it"
        )
    return {language: source.references[language] for language in languages}


def cell(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column; `translation.de` is the field `de` of a column `translation`. None if there is none."""
    if column in row:
        return row[column]
    head, dot, field = column.partition(".")
    inner = row.get(head) if dot else None
    return cell(inner, field) if isinstance(inner, Mapping) else None


def id_of(row: Mapping[str, Any], column: str | None, default: str | None) -> Any:
    """The row's id: the default where no column is named for it, empty (a problem) where its cell is."""
    if column is None:
        return default
    value = cell(row, column)
    return "" if value is None else value


def folder_rows(source: FolderSource, languages: Sequence[str]) -> Rows:
    """Rows of a folder's metadata.csv or metadata.jsonl."""
    path, columns = listing(source), columns_of(source, languages)
    rows = Rows(str(path), languages)
    optional = [column for column in (source.source, source.id) if column]
    lines: Iterator[tuple[str, dict[str, Any]]]
    if path.suffix == ".jsonl":
        lines = _objects(path, rows)
    else:
        lines = _table(path, ["file_name", *columns.values(), *optional], strict=True)
    for where, row in lines:
        if not clean_text(row.get("file_name")):
            rows.problem(where, "file_name is empty; write the audio file's path in the folder")
            continue
        texts = {language: cell(row, column) for language, column in columns.items()}
        audio = find_audio(Path(source.path), row["file_name"])
        text = cell(row, source.source) if source.source else None
        rows.add(where, audio, texts, text, id_of(row, source.id, None))
    return rows


def covost2_rows(source: Covost2Source, languages: Sequence[str]) -> Rows:
    """CoVoST 2's TSV files are unquoted with backslash escapes, as fairseq reads them; `sentence` may be absent.

    Rows of the split `train_covost` belong to `train`, as in the published splits.
    """
    path, clips_dir = Path(source.tsv), absolute(Path(source.common_voice) / "clips")
    if list(languages) != [source.target_language]:
        asked = ", ".join(languages)
        raise DataError(
            f"{path} has target_language {source.target_language!r} but task.target_languages is {asked}; they must be "
            "equal, as a CoVoST 2 file has one language"
        )
    table = list(_table(path, ["path", "translation"], delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\"))
    if source.split and table and "split" in table[0][1]:
        names = {"train", "train_covost"} if source.split == "train" else {source.split}
        table = [(where, row) for where, row in table if row["split"] in names]
    elif source.split and f".{source.split}." not in path.name:
        raise DataError(f"{path} has no split column to find {source.split!r} by; leave `split` out to read all of it")
    if source.max_clips:  # a fixed shuffle, so that the first 10k are part of the first 100k
        table.sort(key=lambda entry: entry[1]["path"] or "")
        random.Random(0).shuffle(table)
        table = table[: source.max_clips]
    found = [(where, row, find_audio(clips_dir, str(row["path"]))) for where, row in table]
    missing = [row["path"] for _, row, audio in found if not is_file(audio)]
    if missing:
        examples = ", ".join(map(str, missing[:3]))
        raise DataError(
            f"{len(missing)} of {len(table)} clips of {path} are not in {clips_dir} (first: {examples}); unpack Common "
            "Voice 4 there (CoVoST 2 belongs to it), correct common_voice, or take those lines out of the TSV"
        )
    rows = Rows(str(path), languages)
    for where, row, audio in found:
        rows.add(where, audio, {source.target_language: row["translation"]}, row.get("sentence"))
    return rows


def listed_rows(source: Source, languages: Sequence[str]) -> Rows:
    """Rows of a source whose clips one local file lists."""
    if isinstance(source, FolderSource):
        return folder_rows(source, languages)
    if isinstance(source, Covost2Source):
        return covost2_rows(source, languages)
    return manifest_rows(listing(source), languages)
