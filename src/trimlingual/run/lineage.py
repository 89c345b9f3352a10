"""Where a model comes from: its base, the layers that are left, and every clip that trained it or chose its layers.

`lineage.json` travels in the model folder. It is what lets `evaluate` refuse a test split that was used before, and what makes layer
maps compose: positions change with every pruning, original layer numbers do not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from trimlingual.run.artifacts import as_json, write_json
from trimlingual.run.fingerprint import hub_commit
from trimlingual.run.progress import say
from trimlingual.run.records import brief, read_record

LINEAGE_FILE = "lineage.json"


class LineageError(ValueError):
    """A model folder whose origin cannot be read."""


class LeakError(ValueError):
    """A test split that a training run or a layer search has seen."""


@dataclass(frozen=True)
class Lineage:
    """Origin of a model.

    `layers[tower][position]` is the original layer that stands at `position` now; `seen[use]` holds the SHA-256 of every audio
    file used, for use in `train` and `select`. What ships has `seen_digests` instead: a count and one digest a use.
    """

    base: str
    layers: dict[str, list[int]]
    num_base_layers: dict[str, int]
    stages: list[str] = field(default_factory=list)
    seen: dict[str, list[str]] = field(default_factory=dict)
    quantization: dict[str, Any] | None = None
    seen_digests: dict[str, dict[str, Any]] = field(default_factory=dict)

    def after(self, stage: str) -> Lineage:
        """The lineage of what `stage` makes of this model."""
        return replace(self, stages=[*self.stages, stage])

    def unpacked(self) -> Lineage:
        """The lineage of a model that is saved with whole weights, whatever those it was made of were packed as."""
        return replace(self, quantization=None)

    def with_seen(self, use: str, hashes: Iterable[str]) -> Lineage:
        """Add clips to what this model has seen."""
        return replace(self, seen={**self.seen, use: sorted({*self.seen.get(use, ()), *hashes})})

    def without(self, removed: dict[str, list[int]]) -> Lineage:
        """Drop original layers from the map; ValueError if one is not there."""
        layers = {}
        for tower, current in self.layers.items():
            gone = removed.get(tower, [])
            missing = sorted(set(gone) - set(current))
            if missing:
                raise ValueError(f"{tower} layers {missing} are not in this model; it has {current}")
            layers[tower] = [layer for layer in current if layer not in gone]
        return replace(self, layers=layers)

    def removed(self, tower: str) -> list[int]:
        """Original layers that are gone."""
        return sorted(set(range(self.num_base_layers[tower])) - set(self.layers[tower]))

    def to_ship(self) -> Lineage:
        """The same without what is nobody else's: no list of clips, and of a local base only the folder's name."""
        digests = {
            use: {"count": len(set(hashes)), "sha256": _digest(hashes)} for use, hashes in self.seen.items() if hashes
        }
        return replace(self, base=public_name(self.base), seen={}, seen_digests=self.seen_digests | digests)

    def save(self, folder: Path) -> None:
        """Write `lineage.json`."""
        write_json(folder / LINEAGE_FILE, asdict(self))

    def bytes_to_ship(self) -> int:
        """Size of the `lineage.json` that an export of this model has."""
        return len(as_json(asdict(self.to_ship())).encode())


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk, and where it comes from."""

    path: Path
    lineage: Lineage

    @property
    def public_name(self) -> str:
        """Its name for others: on the Hub, as the recipe's base model, or of what was made of that the folder's."""
        if hub_commit(self.path):
            return self.path.parents[1].name.removeprefix("models--").replace("--", "/")
        return self.path.name if (self.path / LINEAGE_FILE).is_file() else public_name(self.lineage.base)


def public_name(base: str) -> str:
    """A base model's name for others: of a local one only the folder's name."""
    return Path(base).name if Path(base).is_dir() or base.startswith(("/", ".", "~")) else base


def read_lineage(folder: Path, name: str | None = None) -> Lineage:
    """The lineage of a model folder; for a folder made elsewhere, one that starts here."""
    path = folder / LINEAGE_FILE
    if path.is_file():
        return read_record(
            path, Lineage, LineageError, "copy the model's folder again, or run the stage that made it again"
        )
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig  # it knows each family's spelling and defaults

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        counts = {
            "decoder": config.text_config.num_hidden_layers,
            "encoder": config.audio_config.num_hidden_layers,
        }
    except (OSError, ValueError, AttributeError, StrictDataclassError) as problem:
        raise LineageError(
            f"{folder / 'config.json'} is missing or damaged ({brief(problem)}); it must be a folder of a supported model"
        ) from problem
    return Lineage(
        base=name or str(folder), layers={k: list(range(n)) for k, n in counts.items()}, num_base_layers=counts
    )


def _digest(hashes: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(set(hashes))).encode()).hexdigest()


def check_unseen(lineage: Lineage, split_name: str, clips: Iterable[tuple[str, str]]) -> None:
    """LeakError if any of the (id, audio SHA-256) clips was used to train this model or to choose its layers."""
    clips = list(clips)
    digest = _digest(digest for _, digest in clips)
    for use, known_as in lineage.seen_digests.items():
        if known_as["sha256"] == digest:
            raise LeakError(
                f"split {split_name!r} is the very set of clips that this model used to {use}: scores on it say nothing"
            )
        say(
            f"note: this model's folder has only a digest of the {known_as['count']} clips it used to {use}; whether some of them "
            f"are in split {split_name!r} cannot be checked. The run that made it has the list."
        )
    for use, verb in (("train", "trained on"), ("select", "chose its layers by")):
        known = set(lineage.seen.get(use, ()))
        leaked = [clip_id for clip_id, digest in clips if digest in known]
        if leaked:
            raise LeakError(
                f"{len(leaked)} clip(s) of split {split_name!r} are among those this model {verb} "
                f"({', '.join(leaked[:5])}{', ...' if len(leaked) > 5 else ''}): scores on them would say nothing. "
                "Evaluate on clips that no stage has used."
            )
