"""What a small model of one family is made of: its processor, its sizes, and how training runs its encoder.

Shapes: N clips, S samples, M mel frames, F audio states of a clip, A their width, P positions of the encoder (50 per second).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tools.mini.speech import SAMPLE_RATE
from trimlingual.models.family import Family, family_named

HOP = 160  # samples per mel frame
BLUEPRINTS = ("qwen2_audio", "voxtral")


class Blueprint(ABC):
    """A small model of the family whose name the subclass's file has."""

    window_s: ClassVar[int]  # of the encoder
    masks_padding: ClassVar[bool]  # whether the encoder is told where a clip ends

    @abstractmethod
    def processor(self, texts: Sequence[str], folder: Path) -> Any:
        """A processor whose tokenizer is learned on `texts`, for clips of the window; `folder` is where it will be saved."""

    @abstractmethod
    def config(self, processor: Any) -> Any:
        """Sizes. Linear layers read multiples of 64 and write multiples of 32, which is what nf4 needs on a CPU."""

    @abstractmethod
    def encode(self, model: Any, mel: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder states (N, P, width), which the CTC head reads, and audio states (N, F, A), as the family's own.

        `mel` (N, mels, M) may be as short as `padded` says; `frames` (N,) are the clips' own.
        """

    @property
    def family(self) -> Family:
        """What the package knows of the family."""
        return family_named(type(self).__module__.rpartition(".")[2])

    @property
    def window(self) -> int:
        """Samples of the window."""
        return self.window_s * SAMPLE_RATE

    def padded(self, longest: int) -> int:
        """Samples to fill clips up to if the longest has so many: the window or, with masked padding, what the encoder looks at.

        That is at least four frames of silence behind the longest clip (see `Blueprint.encode`), to a multiple of 0.32 s.
        """
        if not self.masks_padding:
            return self.window
        return min(self.window, -(-(longest + 4 * HOP) // 5120) * 5120)

    def num_states(self, frames: np.ndarray) -> np.ndarray:
        """Audio states of clips with so many mel frames."""
        counted = torch.from_numpy(frames if self.masks_padding else np.full_like(frames, self.window // HOP))
        return self.family.num_states(counted).numpy()

    def model_arguments(self, mel: Tensor, frames: Tensor) -> dict[str, Tensor]:
        """The audio as the model's own forward takes it: log-mels of whole windows and, where it has one, their mask."""
        if not self.masks_padding:
            return {"input_features": mel}
        heard = torch.arange(mel.shape[-1], device=mel.device) < frames.to(mel.device)[:, None]
        return {"input_features": mel, "feature_attention_mask": heard.long()}


def blueprint_named(model_type: str) -> Blueprint:
    """The small model of a family."""
    blueprint: Blueprint = import_module(f"tools.mini.{model_type}").BLUEPRINT
    return blueprint
