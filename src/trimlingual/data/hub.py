"""Rows of a data set that the library `datasets` loads: from the Hub, from local files, or from a folder written by `save_to_disk`."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
from scipy.io import wavfile

from trimlingual.data.audio import DataError
from trimlingual.data.rows import Rows, absolute, cell, columns_of, id_of
from trimlingual.recipe import HubSource
from trimlingual.run.hub_errors import hub_errors

PATIENCE_S = 20.0  # for the Hub's answer to which commit a branch stands at
COMMIT_FILE = "commit.txt"  # beside the audio of a Hub set: the commit that it came from


def hub_rows(source: HubSource, languages: Sequence[str], work_dir: Path) -> Rows:
    """Rows of a data set, its audio written under `work_dir/audio`. What is wrong with texts and ids is said before audio is read."""
    rows, columns = Rows(f"{source.path} ({', '.join(source.splits)})", languages), columns_of(source, languages)
    folder = absolute(work_dir / "audio")
    splits = {split: _load_split(source, split) for split in source.splits}
    for split, loaded in splits.items():
        for index, row in enumerate(loaded.remove_columns(source.audio)):
            texts = {language: _translation(row, column, language) for language, column in columns.items()}
            text = cell(row, source.source) if source.source else None
            stem = f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', split)}-{index}"
            rows.add(f"{split}[{index}]", folder / stem, texts, text, id_of(row, source.id, stem))
    rows.check()
    folder.mkdir(parents=True, exist_ok=True)
    asked = source.revision if is_commit(source.revision) else None
    for commit in filter(None, (hub_set_commit(split) or asked for split in splits.values())):
        if asked not in (None, commit):
            raise DataError(
                f"{source.path} was to be read at commit {asked}, but this machine has {commit} of it, and without the network the "
                "library takes what it has; connect, or name that commit as `revision`"
            )
        (work_dir / COMMIT_FILE).write_text(commit, encoding="utf-8")
    audio = (value for loaded in splits.values() for value in loaded.select_columns([source.audio]))
    texts_only = list(rows)
    rows.clear()
    for row, value in zip(texts_only, audio, strict=True):
        try:
            data = _sound_file(value[source.audio])
        except ValueError as error:
            rows.problem(row.where, f"column {source.audio!r}: {error}")
            continue
        rows.append(replace(row, audio=_write_once(folder, row.audio.name, data)))
    return rows


def _load_split(source: HubSource, split: str) -> Any:
    """One split as a `datasets.Dataset` with undecoded audio and the columns that are asked for."""
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
    except (ValueError, IndexError, *hub_errors(), datasets.exceptions.DatasetsError) as error:  # IndexError: no rows
        raise DataError(
            f"split {split!r} of {source.path} (name {source.name}, revision {source.revision}) cannot be loaded: "
            f"{error}; correct path, name, splits or revision in the recipe, or check the network"
        ) from error
    if missing := missing_columns(source, loaded.column_names):
        has = ", ".join(loaded.column_names)
        raise DataError(f"{source.path} has no column {', '.join(missing)} (it has {has}); correct the recipe")
    loaded = loaded.select_columns(list(_wanted_columns(source, loaded.column_names)))
    kind = loaded.features[source.audio]
    if isinstance(kind, dict) and {"array", "sampling_rate"} <= kind.keys():
        return loaded
    try:
        return loaded.cast_column(source.audio, datasets.Audio(decode=False))
    except (ValueError, TypeError, ImportError) as error:
        raise DataError(
            f"column {source.audio!r} of {source.path} holds {kind}, not audio ({error}); name the audio column in `audio`, with "
            "sound files or {array, sampling_rate} (samples alone do not tell their rate)"
        ) from error


def _wanted_columns(source: HubSource, has: Sequence[str]) -> dict[str, str]:
    """Column -> how the recipe names it (`translation.de` is in the column `translation`)."""
    named = [source.audio, *source.references.values(), *(column for column in (source.source, source.id) if column)]
    return {name if name in has else name.partition(".")[0]: name for name in named}


def missing_columns(source: HubSource, has: Sequence[str]) -> list[str]:
    """Columns that the recipe names and the data set has not."""
    return [name for column, name in _wanted_columns(source, has).items() if column not in has]


def stored_columns(source: HubSource) -> list[str] | None:
    """Columns of a data set that `save_to_disk` wrote to a folder, from its JSON; None where that is not at hand."""
    paths = [Path(source.path, name) for name in ("dataset_info.json", f"{source.splits[0]}/dataset_info.json")]
    for path in paths:
        if path.is_file():
            try:
                return list(json.loads(path.read_text(encoding="utf-8"))["features"])
            except (ValueError, KeyError, TypeError):
                return None
    return None


def is_spelled_as_folder(source: HubSource) -> bool:
    """Whether the set's path can be no name on the Hub."""
    return source.path.startswith((".", "/", "~"))


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a commit, and no branch or tag, which may move."""
    return bool(re.fullmatch(r"[0-9a-f]{40}", revision or ""))


def resolve_commit(source: HubSource, ask: bool) -> str | None:
    """The commit that a set's revision stands for: as the Hub's client noted it on this machine, else, if it may be asked, by the Hub.

    None where that cannot be told: the set is a folder, or the Hub is out of reach.
    """
    if Path(source.path).is_dir() or source.path.count("/") > 1 or is_spelled_as_folder(source):
        return None
    if is_commit(source.revision):
        return source.revision
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=source.path, repo_type="dataset")
    with suppress(OSError):
        noted = (
            Path(constants.HF_HUB_CACHE, folder, "refs", source.revision or "main").read_text(encoding="utf-8").strip()
        )
        if is_commit(noted):
            return noted
    if ask:
        with suppress(Exception):  # of the network, whichever library it goes by; loading the set says what is wrong
            return HfApi().dataset_info(source.path, revision=source.revision, timeout=PATIENCE_S).sha
    return None


def hub_set_commit(loaded: Any) -> str | None:
    """The commit of the Hub's repository that a `datasets.Dataset` was read from; None for one from elsewhere."""
    found = {
        match[1] for name in loaded.info.download_checksums or () if (match := re.search(r"@([0-9a-f]{40})/", name))
    }
    return found.pop() if len(found) == 1 else None


def _translation(row: Mapping[str, Any], column: str, language: str) -> Any:
    """The text in a column, `translation.de` or plain `translation` where that maps languages to texts."""
    value = cell(row, column)
    return value.get(language) if isinstance(value, Mapping) else value


def _sound_file(value: Mapping[str, Any] | None) -> bytes:
    """The bytes of a sound file as `datasets` holds it, or of a float WAV made from samples; ValueError says why there are none."""
    if value and value.get("array") is not None:
        return _wav(value["array"], value.get("sampling_rate"))
    stored = Path((value or {}).get("path") or "")
    data = (value or {}).get("bytes") or (stored.read_bytes() if stored.is_file() else None)
    if not data:
        raise ValueError("no audio; take the row out of the data set")
    return data


def _wav(array: Any, rate: Any) -> bytes:
    """A float WAV, bit by bit the same for the same samples. [samples] or [channels, samples]; floats in -1..1 or 16-bit integers."""
    samples = np.asarray(array)
    if samples.ndim not in (1, 2) or not samples.size or samples.dtype.kind not in "fiu":
        raise ValueError(f"array is {samples.dtype} {list(samples.shape)} but must be [samples] or [channels, samples]")
    if not isinstance(rate, int) or rate < 1:
        raise ValueError(f"sampling_rate is {rate!r} but must be a positive number of Hz")
    if samples.dtype == np.int16:
        samples = samples / np.float32(32768)
    if samples.ndim == 2 and len(samples) < samples.shape[1]:
        samples = samples.T
    file = io.BytesIO()
    wavfile.write(file, rate, samples.astype(np.float32))  # libsndfile would put the time of day into a float WAV
    return file.getvalue()


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
