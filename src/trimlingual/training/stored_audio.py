"""What a frozen audio tower makes of every clip, computed once a training. Shapes: F audio states of a clip, A tower width."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimlingual.data.audio import load_audio
from trimlingual.data.sources import Clip
from trimlingual.decoding.translate_clips import encode_audio, split_on_oom
from trimlingual.training.ahead import prepared_ahead
from trimlingual.training.parts import Batches, Row, rows_in_parts

FOLDER = "audio-states"
BATCH = 16  # clips encoded at once; not a result-changing setting


def stored_states(
    model: Any, processor: Any, clips: Sequence[Clip], work_dir: Path, num_workers: int = 0
) -> list[Tensor]:
    """Audio tower output of every clip, (F, A), on the CPU. What stands in `work_dir` of the same clips is not computed again.

    `num_workers` processes load the audio. That the model is the same one is for the caller to see to: `work_dir` belongs to one
    stage with one fingerprint.
    """
    digest = hashlib.sha256("\n".join(clip.audio_sha256 for clip in clips).encode()).hexdigest()
    batches = [range(start, min(start + BATCH, len(clips))) for start in range(0, len(clips), BATCH)]
    make = partial(_encoded, model, processor, clips, num_workers)
    rows = rows_in_parts(work_dir / FOLDER, digest, batches, make, "encoding audio", "clips were encoded")
    return [states for (states,) in rows]


def _samples(clips: Sequence[Clip], batch: Sequence[int]) -> list[np.ndarray]:
    return [load_audio(clips[i].audio) for i in batch]


@torch.inference_mode()
def _encoded(
    model: Any, processor: Any, clips: Sequence[Clip], num_workers: int, batches: Batches
) -> Generator[list[Row], None, None]:
    """The states of each batch of clips."""
    with closing(prepared_ahead(partial(_samples, clips), batches, num_workers)) as loaded:
        for samples in loaded:
            encoded = split_on_oom(partial(encode_audio, model, processor, keep_on="cpu"), samples)
            # Copies: what the tower returns are rows of a padded batch, which would be kept whole.
            yield [(row.clone(),) for row in encoded]
