"""Speech with reference translations: read from any source, every file proved whole, split, the splits proved disjoint.

Nothing is dropped or cut silently: every file is decoded once while its source is read, all problems of a source are
reported in one DataError with the place of each, and no clip (by id or by its file's hash) may stand in two splits.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
from rich.console import Console
from rich.progress import track
from scipy.signal import resample_poly

from trimlingual.artifacts import hash_file, is_main_process, write_text
from trimlingual.recipe import (
    BuiltinSource,
    Covost2Source,
    DataSettings,
    FolderSource,
    HubSource,
    ManifestSource,
    Source,
    TaskSettings,
)

SAMPLE_RATE = 16_000  # Hz; what the Whisper feature extractor of Qwen2-Audio expects
MINI_DATA = Path(__file__).resolve().parent / "mini" / "data"
SPLITS = ("train", "select", "test", "out_of_domain")
MAX_REPORTED = 20  # problems spelled out in one error
MAX_NAMED = 5  # clips named in one line of an error
BAR_FROM = 200  # files; fewer are checked before a progress bar could be read
READ_FRAMES = 1 << 20  # decoded at a time while checking, so that hours of audio do not fill the memory
UNKNOWN_SIZE = 0x7FFFF000  # bytes; recorders that cannot seek back leave a placeholder from here up in the header


class DataError(ValueError):
    """Data that cannot be used as it is; the message names the file or line and what to do."""


# --- audio


def load_audio(path: Path) -> np.ndarray:
    """Decode to float32 mono at 16 kHz, shape [samples]: mean of the channels, polyphase resampling where needed.

    Raises DataError for a file that is missing, empty, cut short, not audio, without samples, or with NaN or infinity.
    """
    rates, blocks = zip(*_decode(path, _read_bytes(path)))
    mono = np.concatenate([block.mean(axis=1) for block in blocks])
    if rates[0] != SAMPLE_RATE:
        common = math.gcd(SAMPLE_RATE, rates[0])
        mono = resample_poly(mono, SAMPLE_RATE // common, rates[0] // common)
    return np.ascontiguousarray(mono, dtype=np.float32)


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file; correct the path or restore the file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions and the disk") from error


def _decode(path: Path, data: bytes) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (rate in Hz, float32 [frames, channels]) at least once; DataError for anything but a whole recording."""
    fix = "copy or download it again, or take it out of the data"
    if not data:
        raise DataError(f"{path} is empty (0 bytes); {fix}")
    if data[:4] == b"OggS" and not _ogg_is_whole(data):
        raise DataError(f"{path} is cut short (its last Ogg page is missing); {fix}")
    try:
        file = sf.SoundFile(path)
    except (sf.SoundFileError, TypeError) as error:  # TypeError: headerless .raw
        reason = str(error).rpartition(": ")[2]
        raise DataError(f"{path} is not audio libsndfile can read ({reason}); convert it to WAV or FLAC") from error
    num_frames = 0
    with file:
        # libsndfile repairs a RIFF, AIFF or AU header that promises more than there is, and tells only its log.
        repaired = r"^\s*(?:data|SSND|Data Size)\s*:\s*(\d+) \(should be (\d+)\)"
        for promised, there in re.findall(repaired, file.extra_info, re.MULTILINE):
            if int(there) < int(promised) < UNKNOWN_SIZE:
                raise DataError(f"{path} is cut short ({there} bytes of audio, its header promises {promised}); {fix}")
        try:
            while len(block := file.read(READ_FRAMES, dtype="float32", always_2d=True)):
                if not np.isfinite(block).all():
                    raise DataError(f"{path} has NaN or infinite samples; export it again or take it out of the data")
                num_frames += len(block)
                yield file.samplerate, block
        except sf.SoundFileError as error:
            raise DataError(f"{path} is cut short or damaged ({error}); {fix}") from error
        # An MP3 without one of these headers states no length: libsndfile's count is an estimate and proves nothing.
        states_length = file.format != "MP3" or any(tag in data[: 1 << 16] for tag in (b"Xing", b"Info", b"VBRI"))
        if num_frames < file.frames and states_length:
            raise DataError(f"{path} is cut short ({num_frames:,} of {file.frames:,} frames); {fix}")
    if not num_frames:
        raise DataError(f"{path} holds no samples; record it again or take it out of the data")


def _ogg_is_whole(data: bytes) -> bool:
    """True if the last Ogg page is complete and marked as the end of its stream (RFC 3533: flag 4 in byte 5)."""
    start = data.rfind(b"OggS")
    header = data[start : start + 27]
    if len(header) < 27 or not header[5] & 4:
        return False
    sizes = data[start + 27 : start + 27 + header[26]]
    return len(sizes) == header[26] and start + 27 + len(sizes) + sum(sizes) <= len(data)


def _inspect(path: Path) -> tuple[float, str] | DataError:
    """(length in seconds, SHA-256 of the bytes) of a file that decodes to its end, or what is wrong with it."""
    try:
        data = _read_bytes(path)
        num_frames = rate = 0
        for rate, block in _decode(path, data):  # noqa: B007
            num_frames += len(block)
        return num_frames / rate, hashlib.sha256(data).hexdigest()
    except DataError as error:
        return error


# --- sources


@dataclass(frozen=True)
class Clip:
    """One utterance. `references` maps each asked language to its text; `audio_sha256` is of the file's bytes."""

    id: str
    audio: Path
    references: dict[str, str]
    source: str | None
    duration_s: float
    audio_sha256: str

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
    if isinstance(source, HubSource):
        rows = _hub_rows(source, languages, work_dir)
    elif isinstance(source, FolderSource):
        rows = _folder_rows(source, languages)
    elif isinstance(source, Covost2Source):
        rows = _covost2_rows(source, languages)
    else:
        rows = _manifest_rows(_listing(source), languages)
    clips = _verify(rows)
    if rows.problems:
        lines = [f"  {what}" for _, what in sorted(rows.problems, key=lambda problem: problem[0])]
        more = [f"  ... and {len(lines) - MAX_REPORTED} more"] if len(lines) > MAX_REPORTED else []
        raise DataError("\n".join([f"{rows.origin} has {len(lines)} problem(s):", *lines[:MAX_REPORTED], *more]))
    if not clips:
        raise DataError(f"{rows.origin} holds no clips; it needs at least 1")
    return clips


def _verify(rows: _Rows) -> list[Clip]:
    """Decode every file once, on all cores; what is wrong is added to the rows' problems."""
    paths = list(dict.fromkeys(row.audio for row in rows))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # libsndfile decodes outside the interpreter lock
        results = track(
            pool.map(_inspect, paths),
            description="Checking audio",
            total=len(paths),
            console=Console(stderr=True),
            transient=True,
            disable=len(paths) <= BAR_FROM,
        )
        found = dict(zip(paths, results))
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


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _open_text(path: Path) -> str:
    """A UTF-8 file (with or without BOM), line ends as they are; DataError if it is missing or not UTF-8."""
    if not path.is_file():
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
    # splitlines() would also split at a U+2028 inside a text
    for number, line in enumerate(_open_text(path).split("\n"), start=1):
        where = f"line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
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
        rows.add(where, _absolute(path.parent / record["audio"]), references, record.get("source"), record.get("id"))
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
        audio = _absolute(Path(source.path) / row["file_name"])
        rows.add(where, audio, texts, row.get(source.source or ""), row[source.id] if source.id else None)
    return rows


def _covost2_rows(source: Covost2Source, languages: Sequence[str]) -> _Rows:
    """CoVoST 2's TSV files are unquoted with backslash escapes, as fairseq reads them; `sentence` may be absent."""
    path, clips_dir = Path(source.tsv), _absolute(Path(source.common_voice) / "clips")
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
    missing = [row["path"] for _, row in table if not (clips_dir / str(row["path"])).is_file()]
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
    wanted = [source.audio, *source.references.values(), *(column for column in (source.source, source.id) if column)]
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
    folder = _absolute(work_dir / "audio")
    folder.mkdir(parents=True, exist_ok=True)
    for split in source.splits:
        for index, row in enumerate(_load_hub_split(source, split)):
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


# --- splits


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
    out_dir = _absolute(out_dir)
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
        lines = [json.dumps(clip.record(out_dir), ensure_ascii=False) + "\n" for clip in split.clips]
        write_text(out_dir / f"{role}.jsonl", "".join(lines))
    described = {
        role: {"num_clips": len(split.clips), "hours": round(split.hours, 4), "hash": split.hash}
        for role, split in splits.items()
    }
    return {"splits": described, "num_too_long_dropped": num_too_long}


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
    folder = _absolute(folder)
    splits: dict[str, Split | None] = {}
    for role in SPLITS:
        path = folder / f"{role}.jsonl"
        if role == "out_of_domain" and not path.is_file():
            splits[role] = None
            continue
        try:
            records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
            splits[role] = Split(role, tuple(Clip.from_record(record, folder) for record in records))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path} is missing or damaged ({error}); run the data stage again with --force") from error
    return DataSplits(**splits)  # type: ignore[arg-type]
