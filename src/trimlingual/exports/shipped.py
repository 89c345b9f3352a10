"""`trimlingual.json`: what a model was made to be asked, and how it is decoded and scored, so that `translate` needs no recipe.

Every stage that makes a model writes it, and so does the export.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from trimlingual.recipe.section import Dtype
from trimlingual.recipe.sections import DecodeSettings, TaskSettings
from trimlingual.run.artifacts import write_json
from trimlingual.run.records import read_record

SHIPPED_FILE = "trimlingual.json"
FORMAT = 1


class ShippedError(ValueError):
    """A folder whose settings cannot be read."""


@dataclass(frozen=True, config=ConfigDict(extra="ignore"))
class Shipped:
    """Prompt and languages, decoding settings, dtype; the median length of the clips of its training, and what 99 % are below."""

    task: TaskSettings
    decode: DecodeSettings
    dtype: Dtype
    clip_s: tuple[float, float] | None = None
    format: int = FORMAT

    def save(self, folder: Path) -> None:
        """Write `trimlingual.json`."""
        write_json(
            folder / SHIPPED_FILE,
            {
                "format": self.format,
                "task": self.task.model_dump(),
                "decode": self.decode.model_dump(),
                "dtype": self.dtype,
                **({"clip_s": self.clip_s} if self.clip_s else {}),
            },
        )


def clip_lengths(durations_s: Sequence[float]) -> tuple[float, float]:
    """Median and 99th percentile, in seconds: much longer speech is new to a model that was trained on such clips."""
    median, long = np.percentile(durations_s, [50, 99])
    return round(float(median), 1), round(float(long), 1)


def read_shipped(folder: Path) -> Shipped | None:
    """What the folder says of itself; None if it says nothing (a base model, say)."""
    path = folder / SHIPPED_FILE
    if not path.is_file():
        return None
    found: Shipped = read_record(path, Shipped, ShippedError, "make the model again, or give --recipe")
    if found.format > FORMAT:
        raise ShippedError(
            f"{path} has format {found.format}; this version reads up to {FORMAT}: install a newer trimlingual"
        )
    return found
