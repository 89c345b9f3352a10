"""Batched greedy decoding: the one decoder behind `rank`, `distill`, `evaluate` and `translate`.

Clips are grouped by length, encoded once whatever the number of target languages, and decoded without padding by decoder.py and
loop.py. The number of new tokens is bounded by the audio's length, so that a runaway costs little. Greedy results equal Hugging
Face `generate` in float32 (tests/test_translate_clips.py).

Shapes: B batch, T tokens, F audio states of a clip, A tower width, D decoder width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimlingual.data.audio import load_audio
from trimlingual.data.sources import Clip
from trimlingual.decoding.decoder import PackedDecoder
from trimlingual.decoding.loop import Stepper
from trimlingual.decoding.rows import Rows
from trimlingual.evaluation.cost import Stopwatch, peak_bytes
from trimlingual.models.inputs import Prompter, log_mels
from trimlingual.models.qwen2_audio import (
    embed,
    eos_token_ids,
    num_audio_states,
    project,
    tower_states,
    unwrap,
)
from trimlingual.recipe import DecodeSettings, TaskSettings
from trimlingual.run.artifacts import append_jsonl, read_journal
from trimlingual.run.processes import gather, is_main_process, num_processes, process_index
from trimlingual.run.progress import progress, say

CPU_BATCH = 16  # clips: on a CPU a larger batch is no faster, and a run that is killed loses the batch it is at

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Translation:
    """A translated clip. `truncated`: the bound on new tokens was reached before the model ended its answer."""

    id: str
    language: str
    hypothesis: str
    num_tokens: int
    truncated: bool


def max_new_tokens(duration_s: float, settings: DecodeSettings) -> int:
    """Bound on new tokens for a clip of `duration_s` seconds."""
    return min(settings.max_new_tokens, settings.min_new_tokens + int(settings.tokens_per_second * duration_s))


@torch.inference_mode()
def encode_audio(model: Any, processor: Any, audio: Sequence[np.ndarray]) -> list[Tensor]:
    """Audio tower output of each clip, (F_i, A), without padding."""
    tower = unwrap(model).model.audio_tower
    device, dtype = tower.conv1.weight.device, tower.conv1.weight.dtype
    features, mask = log_mels(processor, audio, device=device)
    states = tower_states(model, features.to(device, dtype), mask.to(device))
    return [row[:count] for row, count in zip(states, num_audio_states(mask.sum(-1)).tolist())]


def _load_and_encode(model: Any, processor: Any, clips: Sequence[Clip]) -> list[Tensor]:
    return encode_audio(model, processor, [load_audio(clip.audio) for clip in clips])


@torch.inference_mode()
def encode_clips(model: Any, processor: Any, clips: Sequence[Clip], batch_size: int) -> list[Tensor]:
    """Audio tower output of every clip, in order, with a progress bar; kept on the model's device."""
    states: list[Tensor] = []
    with progress("encoding audio", len(clips)) as advance:
        for start in range(0, len(clips), batch_size):
            batch = clips[start : start + batch_size]
            states.extend(split_on_oom(partial(_load_and_encode, model, processor), batch))
            advance(len(batch))
    return states


@torch.inference_mode()
def embed_prompt(model: Any, prompter: Prompter, states: Tensor, language: str) -> Tensor:
    """Decoder input (T, D) of one clip: embedded prompt with the projected audio states (F, A) in their place."""
    before, after = prompter.parts(language)
    projected = project(model, states)
    device = projected.device
    parts = [embed(model, torch.tensor(ids, device=device)) for ids in (before, after)]
    return torch.cat([parts[0], projected.to(parts[0].dtype), parts[1]])


@torch.inference_mode()
def greedy(
    stepper: Stepper,
    prompts: Sequence[Tensor],
    limits: Sequence[int],
    batch_size: int,
    active: Sequence[int] | None = None,
) -> list[list[int]]:
    """Greedy continuation of each prompt (T_i, D): new token ids, the end token included when it was given.

    `limits[i]` bounds the new tokens of prompt i; `active` are the positions of the decoder layers that are run (default: all). The
    order of the result is the caller's.
    """
    layers = range(len(stepper.decoder.layers)) if active is None else active
    results: list[list[int]] = [[] for _ in prompts]
    for chosen in length_groups(stepper, prompts, limits, batch_size):
        decoded = split_on_oom(
            lambda some: _greedy_batch(stepper, [prompts[i] for i in some], [limits[i] for i in some], layers), chosen
        )
        for i, tokens in zip(chosen, decoded):
            results[i] = tokens
    return results


def length_groups(
    stepper: Stepper, prompts: Sequence[Tensor], limits: Sequence[int], batch_size: int
) -> Iterator[list[int]]:
    """Indices of the prompts in batches of similar length, longest first, as many as memory holds and at most `batch_size`.

    Within a batch the order is the caller's, so that a clip's prompts in several languages stand side by side.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), -limits[i], i))
    room = stepper.room()
    batch: list[int] = []
    slots = 0
    for i in order:
        capacity = len(prompts[i]) + limits[i]
        if batch and (len(batch) == batch_size or slots + capacity > room):
            yield sorted(batch)
            batch, slots = [], 0
        batch.append(i)
        slots += capacity
    if batch:
        yield sorted(batch)


def _greedy_batch(
    stepper: Stepper, prompts: Sequence[Tensor], limits: Sequence[int], active: Sequence[int]
) -> list[list[int]]:
    decoder = stepper.decoder
    slots = stepper.slots([len(prompt) + limit for prompt, limit in zip(prompts, limits)])
    token = decoder.next_tokens(decoder.prefill(prompts, active, slots))
    position = torch.tensor([len(prompt) for prompt in prompts], device=decoder.device)
    rows = Rows(token, position, [[] for _ in prompts], list(limits), [True] * len(prompts))
    stepper.extend(slots, active, rows)
    return rows.out


def split_on_oom(work: Callable[[Sequence[Any]], list[Any]], items: Sequence[Any]) -> list[Any]:
    """`work(items)`; out of GPU memory halves the batch and goes on, saying so."""
    try:
        return work(items)
    except torch.OutOfMemoryError:
        if len(items) == 1:
            raise
    # Outside the except block: the traceback would keep the failed batch's tensors alive.
    torch.cuda.empty_cache()
    half = len(items) // 2
    logger.warning("out of GPU memory with a batch of %d; going on with %d", len(items), half)
    return [*split_on_oom(work, items[:half]), *split_on_oom(work, items[half:])]


@dataclass(frozen=True)
class SplitTranslations:
    """A split's translations, in the clips' order, languages in the task's order, and what they took.

    `seconds` are those of all batches, summed over the processes and over the runs that made them: the time one process would have
    needed. `num_processes` is the most that shared them out, `peak_memory_bytes` the most that one of them held.
    """

    translations: list[Translation]
    seconds: float
    num_processes: int
    peak_memory_bytes: int


def translate_clips(
    model: Any,
    processor: Any,
    task: TaskSettings,
    clips: Sequence[Clip],
    settings: DecodeSettings,
    *,
    label: str = "translating",
) -> list[Translation]:
    """Translate every clip into every target language that it has a reference in, or into all if it has none.

    In the order of `clips`, languages in the task's order.
    """
    prompter = Prompter(processor, task)
    stepper = Stepper(PackedDecoder(model), eos_token_ids(model, processor))
    done: dict[tuple[str, str], Translation] = {}
    with progress(label, len(clips)) as advance:
        for batch in _batches(clips, clips_at_once(settings, stepper.decoder.device)):
            done |= {(t.id, t.language): t for t in _translate_batch(stepper, prompter, batch, settings)}
            advance(len(batch))
    return [done[clip.id, language] for clip in clips for language in clip.languages(task.target_languages)]


def translate_split(
    model: Any,
    processor: Any,
    task: TaskSettings,
    clips: Sequence[Clip],
    settings: DecodeSettings,
    journals: Path,
    *,
    label: str,
) -> SplitTranslations:
    """`translate_clips` for stages: the clips are shared out over all processes, and a killed run goes on where it was.

    Of the batches that are left, each of N processes takes every N-th and appends it, with its seconds, to a file of its own in the
    folder `journals`; however many processes start next read them all. The batches are those of one process that was never stopped,
    so the translations are too. All processes must call this, and all get everything.
    """
    prompter = Prompter(processor, task)
    stepper = Stepper(PackedDecoder(model), eos_token_ids(model, processor))
    earlier = gather(_read_journals(journals) if is_main_process() else None)[0]
    known = {t["id"] for record in earlier for t in record["translations"]}
    device = stepper.decoder.device
    batches = (
        [clip for clip in batch if clip.id not in known] for batch in _batches(clips, clips_at_once(settings, device))
    )
    mine = list(filter(None, batches))[process_index() :: num_processes()]
    if known:
        say(f"  {label}: {len(known)} of {len(clips)} clips were translated by an earlier run")
    made = []
    if num_processes() > 1:
        label += f" (share of process {process_index() + 1} of {num_processes()})"
    with progress(label, sum(map(len, mine))) as advance:
        for batch in mine:
            with Stopwatch(device) as watch:
                translations = _translate_batch(stepper, prompter, batch, settings)
            record = {
                "seconds": watch.seconds,
                "num_processes": num_processes(),
                "peak_memory_bytes": peak_bytes(device),
                "translations": [asdict(translation) for translation in translations],
            }
            append_jsonl(journals / f"{process_index()}.jsonl", record)
            made.append(record)
            advance(len(batch))
    records = [*earlier, *chain.from_iterable(gather(made))]
    said = {(t["id"], t["language"]): Translation(**t) for record in records for t in record["translations"]}
    return SplitTranslations(
        [said[clip.id, language] for clip in clips for language in clip.languages(task.target_languages)],
        sum(record["seconds"] for record in records),
        max(record["num_processes"] for record in records),
        max(record["peak_memory_bytes"] for record in records),
    )


def _read_journals(folder: Path) -> list[dict[str, Any]]:
    """Batches that are on disk, whichever process wrote them."""
    folder.mkdir(parents=True, exist_ok=True)
    return [record for path in sorted(folder.glob("*.jsonl")) for record in read_journal(path)]


def clips_at_once(settings: DecodeSettings, device: torch.device) -> int:
    """Clips in a batch."""
    return min(settings.batch_size, CPU_BATCH) if device.type == "cpu" else settings.batch_size


def _batches(clips: Sequence[Clip], batch_size: int) -> Iterator[list[Clip]]:
    ordered = sorted(
        clips, key=lambda clip: (-clip.duration_s, clip.id)
    )  # longest first: the first batch needs the most memory
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


def _translate_batch(
    stepper: Stepper,
    prompter: Prompter,
    batch: Sequence[Clip],
    settings: DecodeSettings,
) -> list[Translation]:
    """Each clip in its languages among the prompter's."""
    model = stepper.decoder.model
    wanted = [(clip, language) for clip in batch for language in clip.languages(prompter.task.target_languages)]
    encoded = split_on_oom(partial(_load_and_encode, model, prompter.processor), batch)
    states = {clip.id: tower for clip, tower in zip(batch, encoded)}
    prompts = [embed_prompt(model, prompter, states[clip.id], language) for clip, language in wanted]
    limits = [max_new_tokens(clip.duration_s, settings) for clip, _ in wanted]
    tokens = greedy(stepper, prompts, limits, settings.batch_size)
    return [
        to_translation(prompter, clip.id, language, ids, stepper.eos) for (clip, language), ids in zip(wanted, tokens)
    ]


def to_translation(
    prompter: Prompter, clip_id: str, language: str, ids: Sequence[int], eos: Sequence[int]
) -> Translation:
    """A decoded answer as text, with its length and whether it ran into the bound."""
    return Translation(clip_id, language, prompter.decode(ids), len(ids), truncated=ids[-1] not in eos)
