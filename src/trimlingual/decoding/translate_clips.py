"""Translate clips in batches, greedily: what `rank`, `distill`, `evaluate` and `translate` call.

Clips of similar length share a batch. A clip is encoded once, whatever the number of target languages, and its prompts are decoded
without padding (decoder.py, loop.py). The audio's length bounds the number of new tokens, so an answer that never ends costs
little. Results equal Hugging Face's greedy `generate` in float32 (tests/test_translate_clips.py).

Shapes: T tokens of a prompt, F audio states of a clip, A tower width, D decoder width.
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
from trimlingual.models.family import family_of
from trimlingual.models.inputs import Prompter, log_mels
from trimlingual.models.tree import audio_tower, embed
from trimlingual.recipe import DecodeSettings, TaskSettings
from trimlingual.run.artifacts import append_jsonl, read_journal
from trimlingual.run.processes import gather, is_main_process, num_processes, process_index
from trimlingual.run.progress import progress, say

CPU_BATCH = 16  # clips: on a CPU a larger batch is no faster, and a run that is killed loses the batch under way

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Translation:
    """The translation of a clip into one language. It is `truncated` if the answer reached the bound on new tokens before it ended."""

    id: str
    language: str
    hypothesis: str
    num_tokens: int
    truncated: bool


def max_new_tokens(duration_s: float, settings: DecodeSettings) -> int:
    """The most new tokens for a clip of `duration_s` seconds."""
    return min(settings.max_new_tokens, settings.min_new_tokens + int(settings.tokens_per_second * duration_s))


@torch.inference_mode()
def encode_audio(
    model: Any, processor: Any, audio: Sequence[np.ndarray], keep_on: torch.device | str | None = None
) -> list[Tensor]:
    """The audio tower's output for each clip, (F_i, A), without padding: parts of one tensor, on `keep_on` or the model's device."""
    family, weight = family_of(model), next(audio_tower(model).parameters())
    features, mask = log_mels(processor, audio, device=weight.device)
    states = family.audio_states(model, features.to(weight.device, weight.dtype), mask.to(weight.device))
    states = states.to(keep_on or states.device)
    return [row[:count] for row, count in zip(states, family.num_states(mask.sum(-1)).tolist())]


Load = Callable[[Clip], np.ndarray]
"""A clip's samples: float32 mono at 16 kHz."""


def _load_file(clip: Clip) -> np.ndarray:
    return load_audio(clip.audio)


def _load_and_encode(model: Any, processor: Any, load: Load, clips: Sequence[Clip]) -> list[Tensor]:
    return encode_audio(model, processor, [load(clip) for clip in clips])


@torch.inference_mode()
def encode_clips(model: Any, processor: Any, clips: Sequence[Clip], batch_size: int) -> list[Tensor]:
    """`encode_audio` of every clip, in order, with a progress bar. The states stay on the model's device."""
    states: list[Tensor] = []
    with progress("encoding audio", len(clips)) as advance:
        for start in range(0, len(clips), batch_size):
            batch = clips[start : start + batch_size]
            states.extend(split_on_oom(partial(_load_and_encode, model, processor, _load_file), batch))
            advance(len(batch))
    return states


@torch.inference_mode()
def embed_prompt(model: Any, prompter: Prompter, states: Tensor, language: str) -> Tensor:
    """The decoder's input (T, D) for one clip: the embedded text before the audio, the projected `states` (F, A), the text after it."""
    before, after = prompter.parts(language)
    projected = family_of(model).project(model, states)
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
    """The greedy answer to each prompt (T_i, D), in the order of `prompts`: token ids, with the end token if the model gave one.

    The answer to prompt i has at most `limits[i]` tokens. `active` are the indices of the decoder layers to run (default: all).
    """
    layers = range(len(stepper.decoder.layers)) if active is None else active
    results: list[list[int]] = [[] for _ in prompts]
    for chosen in length_groups(stepper, prompts, limits, batch_size):
        decoded = split_on_oom(
            lambda part: _greedy_batch(stepper, [prompts[i] for i in part], [limits[i] for i in part], layers), chosen
        )
        for i, tokens in zip(chosen, decoded):
            results[i] = tokens
    return results


def length_groups(
    stepper: Stepper, prompts: Sequence[Tensor], limits: Sequence[int], batch_size: int
) -> Iterator[list[int]]:
    """Batches of the prompts, as indices: longest prompts first, at most `batch_size` and as many as memory holds.

    Within a batch the indices ascend, so that a clip's prompts for several languages are neighbours and share their beginning.
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
    """`work(items)`. If the GPU's memory is not enough, each half of the items alone, with a warning."""
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
    """A split's translations, by clip and then in the task's order of languages, and what they took.

    `seconds` is the sum over all batches, whichever process and run made them: the time that one process would have needed.
    `num_processes` is the largest number of processes that shared the work. `peak_memory_bytes` is the largest peak of one process.
    """

    translations: list[Translation]
    seconds: float
    num_processes: int
    peak_memory_bytes: int


class Translator:
    """A model that is ready to translate batches of clips; `load` gives a clip's samples, by default those of its file."""

    def __init__(
        self, model: Any, processor: Any, task: TaskSettings, settings: DecodeSettings, load: Load = _load_file
    ):
        self.model, self.settings, self.load = model, settings, load
        self.prompter = Prompter(processor, task)
        self.stepper = Stepper(PackedDecoder(model), family_of(model).end_tokens(model, processor))
        self.device = self.stepper.decoder.device
        self.batch_size = clips_at_once(settings, self.device)

    def __call__(self, batch: Sequence[Clip]) -> list[Translation]:
        """Each clip in those of the task's languages that it has a reference in, or in all if it has none."""
        asked = self.prompter.task.target_languages
        translations = [(clip, language) for clip in batch for language in clip.languages(asked)]
        encode = partial(_load_and_encode, self.model, self.prompter.processor, self.load)
        states = {clip.id: tower for clip, tower in zip(batch, split_on_oom(encode, batch))}
        prompts = [
            embed_prompt(self.model, self.prompter, states[clip.id], language) for clip, language in translations
        ]
        limits = [max_new_tokens(clip.duration_s, self.settings) for clip, _ in translations]
        tokens = greedy(self.stepper, prompts, limits, self.settings.batch_size)
        return [
            to_translation(self.prompter, clip.id, language, ids, self.stepper.eos)
            for (clip, language), ids in zip(translations, tokens)
        ]


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

    The result is in the order of `clips`, and per clip in the task's order of languages.
    """
    translate = Translator(model, processor, task, settings)
    done: dict[tuple[str, str], Translation] = {}
    with progress(label, len(clips)) as advance:
        for batch in longest_first(clips, translate.batch_size):
            done |= {(t.id, t.language): t for t in translate(batch)}
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
    """`translate_clips` for stages: all processes share the clips, and a killed run goes on with the batches that are left.

    Each of N processes takes every N-th batch. It appends the translations and their seconds to its own file in the folder
    `journals`. The next run reads all files, however many processes it has. The batches do not depend on the number of processes or
    on where a run was killed, so neither do the translations. All processes must call this, and all get every translation.
    """
    translate = Translator(model, processor, task, settings)
    earlier = gather(_read_journals(journals) if is_main_process() else None)[0]
    known = {t["id"] for record in earlier for t in record["translations"]}
    device = translate.device
    batches = ([clip for clip in batch if clip.id not in known] for batch in longest_first(clips, translate.batch_size))
    mine = list(filter(None, batches))[process_index() :: num_processes()]
    if known:
        say(f"  {label}: {len(known)} of {len(clips)} clips were translated by an earlier run")
    made = []
    if num_processes() > 1:
        label += f" (share of process {process_index() + 1} of {num_processes()})"
    with progress(label, sum(map(len, mine))) as advance:
        for batch in mine:
            with Stopwatch(device) as watch:
                translations = translate(batch)
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
    by_clip = {(t["id"], t["language"]): Translation(**t) for record in records for t in record["translations"]}
    return SplitTranslations(
        [by_clip[clip.id, language] for clip in clips for language in clip.languages(task.target_languages)],
        sum(record["seconds"] for record in records),
        max(record["num_processes"] for record in records),
        max(record["peak_memory_bytes"] for record in records),
    )


def _read_journals(folder: Path) -> list[dict[str, Any]]:
    """The records of all batches that are on disk, whichever process wrote them."""
    folder.mkdir(parents=True, exist_ok=True)
    return [record for path in sorted(folder.glob("*.jsonl")) for record in read_journal(path)]


def clips_at_once(settings: DecodeSettings, device: torch.device) -> int:
    """How many clips a batch has."""
    return min(settings.batch_size, CPU_BATCH) if device.type == "cpu" else settings.batch_size


def longest_first(clips: Sequence[Clip], batch_size: int) -> Iterator[list[Clip]]:
    """Batches of clips of similar length."""
    ordered = sorted(
        clips, key=lambda clip: (-clip.duration_s, clip.id)
    )  # longest first: the first batch needs the most memory
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


def to_translation(
    prompter: Prompter, clip_id: str, language: str, ids: Sequence[int], eos: Sequence[int]
) -> Translation:
    """An answer `ids` as text, with its length. It is truncated if its last token is none of the end tokens `eos`."""
    return Translation(clip_id, language, prompter.decode(ids), len(ids), truncated=ids[-1] not in eos)
