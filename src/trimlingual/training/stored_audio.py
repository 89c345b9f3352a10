"""What a frozen audio tower makes of every clip: computed once a training, and kept on disk until it ends, so that a restart has it.

Written in parts, so that little is lost, and shared out over the processes. Shapes: F audio states of a clip, A tower width.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimlingual.data.audio import load_audio
from trimlingual.data.sources import Clip
from trimlingual.decoding.translate_clips import encode_audio, split_on_oom
from trimlingual.run import interruptions
from trimlingual.run.artifacts import put_in_place
from trimlingual.run.processes import gather, num_processes, process_index, wait_for_everyone
from trimlingual.run.progress import progress, say
from trimlingual.training.ahead import prepared_ahead

FOLDER = "audio-states"
BATCH = 16  # clips encoded at once; not a result-changing setting
PART_S = 2.0  # seconds of work that are written together


def stored_states(
    model: Any, processor: Any, clips: Sequence[Clip], work_dir: Path, num_workers: int = 0
) -> list[Tensor]:
    """Audio tower output of every clip, (F, A), on the CPU. What stands in `work_dir` of the same clips is not computed again.

    `num_workers` processes load the audio. That the model is the same one is for the caller to see to: `work_dir` belongs to one
    stage with one fingerprint.
    """
    folder = work_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256("\n".join(clip.audio_sha256 for clip in clips).encode()).hexdigest()
    states = _read(folder, digest)
    batches = [range(start, min(start + BATCH, len(clips))) for start in range(0, len(clips), BATCH)]
    missing = gather([batch for batch in batches if not all(i in states for i in batch)])[0]
    if states:
        say(f"  {len(states)} of {len(clips)} clips were encoded by an earlier run")
    mine = missing[process_index() :: num_processes()]
    with (
        progress("encoding audio", sum(map(len, mine))) as advance,
        closing(prepared_ahead(partial(_samples, clips), mine, num_workers)) as loaded,
    ):
        states |= _encode(model, processor, loaded, folder, digest, advance)
    wait_for_everyone()
    if num_processes() > 1:
        states |= _read(folder, digest)
    return [states[i] for i in range(len(clips))]


def _samples(clips: Sequence[Clip], batch: Sequence[int]) -> dict[int, np.ndarray]:
    return {i: load_audio(clips[i].audio) for i in batch}


@torch.inference_mode()
def _encode(
    model: Any,
    processor: Any,
    loaded: Iterable[Mapping[int, np.ndarray]],
    folder: Path,
    digest: str,
    advance: Callable[..., None],
) -> dict[int, Tensor]:
    """The states of these batches of samples, written every few seconds."""
    states: dict[int, Tensor] = {}
    part: dict[int, Tensor] = {}
    written = time.monotonic()
    for batch in loaded:
        encoded = split_on_oom(partial(encode_audio, model, processor, keep_on="cpu"), list(batch.values()))
        # Copies: what the tower returns are rows of a padded batch, which would be kept whole.
        part |= {i: row.clone() for i, row in zip(batch, encoded)}
        if time.monotonic() - written >= PART_S or interruptions.asked():
            states |= _write(folder, digest, part)
            part, written = {}, time.monotonic()
        advance(len(batch))
    return states | _write(folder, digest, part)


def _write(folder: Path, digest: str, part: dict[int, Tensor]) -> dict[int, Tensor]:
    if part:
        path = folder / f"{min(part)}.safetensors"
        made = path.with_name(path.name + ".new")
        save_file({str(i): row.contiguous() for i, row in part.items()}, made, {"clips": digest})
        put_in_place(made, path)
    return part


def _read(folder: Path, digest: str) -> dict[int, Tensor]:
    states: dict[int, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("clips") == digest:
                states |= {int(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return states
