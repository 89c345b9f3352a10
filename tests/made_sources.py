"""Sources of speech on disk for the tests of reading and splitting; every recording is written by libsndfile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf

from trimlingual.recipe import HubSource, ManifestSource


def write_wav(path: Path, seed: int, seconds: float = 0.2) -> Path:
    """A recording like no other seed's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * 16_000)), 16_000)
    return path


def write_manifest(path: Path, lines: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def make_manifest(folder: Path, name: str, num: int, seed: int = 0, seconds: float = 0.2) -> ManifestSource:
    """`num` clips with ids `<name>-<index>`."""
    lines = []
    for index in range(num):
        audio = write_wav(folder / "audio" / f"{name}-{index}.wav", seed + index, seconds)
        lines.append({"audio": f"audio/{audio.name}", "reference": f"Satz {index}", "source": f"sentence {index}"})
    return ManifestSource(path=str(write_manifest(folder / f"{name}.jsonl", lines)))


def make_hub_set(tmp_path: Path, name: str, num: int, seed: int = 0) -> Any:
    datasets = pytest.importorskip("datasets")
    rows: dict[str, list[Any]] = {"audio": [], "text_de": [], "text_en": [], "key": []}
    for index in range(num):
        content = write_wav(tmp_path / "made" / f"{name}{index}.wav", seed + index).read_bytes()
        rows["audio"].append({"bytes": content, "path": f"{index}.wav"})
        rows["text_de"].append(f"Satz {index}")
        rows["text_en"].append(f"sentence {index}")
        rows["key"].append(100 + index)
    return datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio())  # decoded by default, as on the Hub


def hub(path: Path, *splits: str, **more: Any) -> HubSource:
    return HubSource(kind="hub", path=str(path), splits=list(splits), references={"de": "text_de"}, **more)
