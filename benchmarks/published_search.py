"""The published layer search, plainly, and its first two improvements: what `search.py` measures ours against."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimlingual.data.audio import load_audio
from trimlingual.data.splits import Split
from trimlingual.decoding.translate_clips import embed_prompt, max_new_tokens
from trimlingual.models.inputs import Prompter
from trimlingual.models.layers import drop_layers_
from trimlingual.models.qwen2_audio import FAMILY
from trimlingual.recipe import DecodeSettings, TaskSettings


@dataclass
class Case:
    """A model, the clips it is searched on, and how many tokens each translation has (None: until the model ends it)."""

    model: Any
    processor: Any
    split: Split
    task: TaskSettings
    decode: DecodeSettings
    num_tokens: list[int] | None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def limit(self, clip: int) -> int:
        if self.num_tokens:
            return self.num_tokens[clip]
        return max_new_tokens(self.split.clips[clip].duration_s, self.decode)

    def bounds(self, limit: int) -> dict[str, Any]:
        """Arguments of `generate`: greedy, and with a fixed number of tokens never ending before it."""
        fixed = {"min_new_tokens": limit} if self.num_tokens else {}
        pad = self.processor.tokenizer.pad_token_id
        return {"max_new_tokens": limit, "do_sample": False, "pad_token_id": pad, **fixed}


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def published_candidate(case: Case, removed: Sequence[int], clips: Sequence[int]) -> tuple[float, list[dict[str, Any]]]:
    """Deep copy, drop the layers, then processor, audio tower and `generate` a clip at a time.

    Returns the copy's seconds and, for each translation, clip, language, seconds, token ids.
    """
    started = clock(case.device)
    model = copy.deepcopy(case.model)
    drop_layers_(model, {"decoder": list(removed)})
    copied = clock(case.device) - started
    done = []
    for clip in clips:
        for language in case.task.target_languages:
            started = clock(case.device)
            audio = load_audio(case.split.clips[clip].audio)
            text = FAMILY.chat(case.processor, case.task.system_prompt, case.task.prompt_for(language))
            inputs = case.processor(text=text, audio=[audio], sampling_rate=16_000, return_tensors="pt").to(case.device)
            inputs["input_features"] = inputs["input_features"].to(model.dtype)
            ids = model.generate(**inputs, **case.bounds(case.limit(clip)))[0, inputs["input_ids"].shape[1] :].tolist()
            seconds = clock(case.device) - started
            done.append({"clip": clip, "language": language, "seconds": seconds, "tokens": ids})
    return copied, done


@torch.inference_mode()
def generate_embedded(case: Case, prompts: Sequence[Tensor], limit: int) -> list[list[int]]:
    """Hugging Face `generate` on a batch of embedded prompts (T_i, D), padded on the left: the clips encoded once before."""
    width = max(map(len, prompts))
    embeds = prompts[0].new_zeros((len(prompts), width, prompts[0].shape[-1]))
    mask = torch.zeros((len(prompts), width), dtype=torch.long, device=embeds.device)
    for i, prompt in enumerate(prompts):
        embeds[i, width - len(prompt) :] = prompt
        mask[i, width - len(prompt) :] = 1
    return case.model.generate(inputs_embeds=embeds, attention_mask=mask, **case.bounds(limit)).tolist()


def prompts_of(case: Case, states: Sequence[Tensor], clips: Sequence[int]) -> list[Tensor]:
    """Embedded prompts, clip by clip and language by language."""
    prompter = Prompter(case.processor, case.task)
    return [
        embed_prompt(case.model, prompter, states[c], language)
        for c in clips
        for language in case.task.target_languages
    ]
