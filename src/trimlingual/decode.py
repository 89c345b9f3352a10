"""Batched greedy decoding: the one decoder behind `rank`, `distill`, `evaluate` and `translate`.

Clips are grouped by length, encoded once whatever the number of target languages, and decoded with left padding and a KV cache; rows
that have ended leave the batch. The number of new tokens is bounded by the audio's length, so that a runaway costs little. Greedy
results equal Hugging Face `generate` in float32 (tests/test_decode.py).

Shapes: B batch, T tokens, F audio states of a clip, A tower width, D decoder width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from trimlingual.artifacts import append_jsonl, read_journal
from trimlingual.audio import load_audio
from trimlingual.models import (
    embed,
    eos_token_ids,
    lm_head,
    num_audio_states,
    project,
    text_decoder,
    tower_states,
    unwrap,
)
from trimlingual.progress import progress
from trimlingual.prompts import Prompter, log_mels
from trimlingual.recipe import DecodeSettings, TaskSettings
from trimlingual.sources import Clip

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
    features, mask = log_mels(processor, audio)
    tower = unwrap(model).model.audio_tower
    device, dtype = tower.conv1.weight.device, tower.conv1.weight.dtype
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
    model: Any, prompts: Sequence[Tensor], limits: Sequence[int], eos: Sequence[int], batch_size: int
) -> list[list[int]]:
    """Greedy continuation of each prompt (T_i, D): new token ids, the end token included when it was given.

    `limits[i]` bounds the new tokens of prompt i. Prompts are grouped by length; the order of the result is the caller's.
    """
    results: list[list[int]] = [[] for _ in prompts]
    for chosen in length_groups(prompts, limits, batch_size):
        decoded = split_on_oom(
            lambda some: _greedy_batch(model, [prompts[i] for i in some], [limits[i] for i in some], eos), chosen
        )
        for i, tokens in zip(chosen, decoded):
            results[i] = tokens
    return results


def length_groups(prompts: Sequence[Tensor], limits: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices of the prompts in batches of similar length."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), limits[i], i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@dataclass
class Decoding:
    """A batch in the middle of decoding, one row a prompt: what `extend` goes on from."""

    cache: DynamicCache
    mask: Tensor  # (B, T) of what is in the cache
    position: Tensor  # (B,) position of the next token
    out: list[list[int]]  # new tokens so far
    budget: Tensor  # (B,) how many new tokens there may be in all


def _greedy_batch(model: Any, prompts: Sequence[Tensor], limits: Sequence[int], eos: Sequence[int]) -> list[list[int]]:
    decoder = text_decoder(model)
    embeds, mask = left_pad(prompts)
    cache = DynamicCache(config=decoder.config)
    hidden = decoder(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    budget = torch.tensor(limits, device=embeds.device)
    state = Decoding(cache, mask, mask.sum(-1), [[] for _ in prompts], budget)
    extend(model, state, lm_head(model)(hidden[:, -1]).argmax(-1), eos)
    return state.out


def extend(model: Any, state: Decoding, token: Tensor, eos: Sequence[int]) -> None:
    """Append `token` (B,) and go on greedily until every row has ended or used its budget; fills `state.out`.

    Rows that have ended leave the batch, so the state is used up.
    """
    decoder, head = text_decoder(model), lm_head(model)
    rows = torch.arange(len(token), device=token.device)  # which prompt each row of the batch is
    length = torch.tensor([len(tokens) for tokens in state.out], device=token.device)
    ends = torch.tensor(list(eos), device=token.device)
    mask, position, budget = state.mask, state.position, state.budget
    while True:
        length = length + 1
        for row, value in zip(rows.tolist(), token.tolist()):
            state.out[row].append(value)
        keep = (~torch.isin(token, ends) & (budget > length)).nonzero()[:, 0]
        if not len(keep):
            return
        if len(keep) < len(rows):
            state.cache.batch_select_indices(keep)
            rows, token, mask, position = rows[keep], token[keep], mask[keep], position[keep]
            budget, length = budget[keep], length[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        hidden = decoder(
            inputs_embeds=embed(model, token[:, None]),
            attention_mask=mask,
            position_ids=position[:, None],
            past_key_values=state.cache,
            use_cache=True,
        ).last_hidden_state
        position = position + 1
        token = head(hidden[:, -1]).argmax(-1)


def left_pad(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(B, T, D) with zeros on the left, and the attention mask (B, T)."""
    width = max(len(prompt) for prompt in prompts)
    embeds = prompts[0].new_zeros((len(prompts), width, prompts[0].shape[-1]))
    mask = torch.zeros((len(prompts), width), dtype=torch.long, device=embeds.device)
    for i, prompt in enumerate(prompts):
        embeds[i, width - len(prompt) :] = prompt
        mask[i, width - len(prompt) :] = 1
    return embeds, mask


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


def translate_clips(
    model: Any,
    processor: Any,
    task: TaskSettings,
    clips: Sequence[Clip],
    settings: DecodeSettings,
    *,
    label: str = "translating",
    journal: Path | None = None,
) -> list[Translation]:
    """Translate every clip into every target language; in the order of `clips`, languages in the task's order.

    With a `journal` (JSONL) every finished batch is on disk at once and a later call goes on from there. The batches are the same
    in a run that was stopped and in one that was not, so the translations are too.
    """
    prompter = Prompter(processor, task)
    eos = eos_token_ids(model, processor)
    done = {(r["id"], r["language"]): Translation(**r) for r in (read_journal(journal) if journal else ())}
    with progress(label, len(clips)) as advance:
        for batch in _batches(clips, settings.batch_size):
            wanted = [(clip, language) for clip in batch for language in task.target_languages]
            if any((clip.id, language) not in done for clip, language in wanted):
                for translation in _translate_batch(model, prompter, batch, wanted, settings, eos):
                    if journal and (translation.id, translation.language) not in done:
                        append_jsonl(journal, asdict(translation))
                    done[translation.id, translation.language] = translation
            advance(len(batch))
    return [done[clip.id, language] for clip in clips for language in task.target_languages]


def _batches(clips: Sequence[Clip], batch_size: int) -> Iterator[list[Clip]]:
    ordered = sorted(clips, key=lambda clip: (clip.duration_s, clip.id))
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


def _translate_batch(
    model: Any,
    prompter: Prompter,
    batch: Sequence[Clip],
    wanted: Sequence[tuple[Clip, str]],
    settings: DecodeSettings,
    eos: Sequence[int],
) -> Iterable[Translation]:
    encoded = split_on_oom(partial(_load_and_encode, model, prompter.processor), batch)
    states = {clip.id: tower for clip, tower in zip(batch, encoded)}
    prompts = [embed_prompt(model, prompter, states[clip.id], language) for clip, language in wanted]
    limits = [max_new_tokens(clip.duration_s, settings) for clip, _ in wanted]
    tokens = greedy(model, prompts, limits, eos, settings.batch_size)
    for (clip, language), ids in zip(wanted, tokens):
        yield to_translation(prompter, clip.id, language, ids, eos)


def to_translation(
    prompter: Prompter, clip_id: str, language: str, ids: Sequence[int], eos: Sequence[int]
) -> Translation:
    """A decoded answer as text, with its length and whether it ran into the bound."""
    return Translation(clip_id, language, prompter.decode(ids), len(ids), truncated=ids[-1] not in eos)
