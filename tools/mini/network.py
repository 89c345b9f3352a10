"""The small model's weights at the start, and a forward pass made for training.

The forward pass here differs from the library's in cost only, and `train.check_against_transformers` proves it:

* an encoder that masks padding runs on the frames that a batch needs, not on the whole window;
* both target languages share one sequence: prompt and audio once, then a German and a Chinese branch that cannot see
  each other and start from the same position. Encoder and prompt are thus computed once per clip, not twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, WhisperFeatureExtractor

from tools.mini.blueprint import HOP, Blueprint
from tools.mini.tokens import INSTRUCTIONS, SYSTEM_PROMPT


def build_model(blueprint: Blueprint, processor: Any) -> Any:
    """The architecture, freshly initialised (see `_initialise`)."""
    tokenizer, config = processor.tokenizer, blueprint.config(processor)
    config._attn_implementation = "sdpa"
    model = blueprint.family.build(config)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=128
    )
    _initialise(model)
    return model


def _initialise(model: Any) -> None:
    """Weights scaled by fan-in, and sinusoids as encoder positions.

    The library draws everything with a deviation of 0.02, meant for widths of a thousand and more. At width 192 the
    convolutions would then whisper below the position signal, and the first few hundred steps would go into growing
    the weights. Residual outputs are damped by depth as in GPT-2. Positions are Whisper's sinusoids, not trained.
    """
    tower, language_model = model.model.audio_tower, model.model.language_model
    depth = {"encoder": len(tower.layers), "decoder": len(language_model.layers)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            gain = 1.0
            if name.endswith(("o_proj", "down_proj", "out_proj", "fc2")):
                gain = (2 * depth["encoder" if "audio_tower" in name else "decoder"]) ** -0.5
            elif name.endswith(("lm_head", "multi_modal_projector.linear", "multi_modal_projector.linear_2")):
                gain = 0.3  # quiet logits at the start; audio states as loud as the token embeddings below
            nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv1d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(language_model.embed_tokens.weight, std=0.3)
    positions, width = tower.embed_positions.weight.shape
    rates = torch.exp(-math.log(10_000) / (width // 2 - 1) * torch.arange(width // 2))
    angles = torch.arange(positions)[:, None] * rates[None, :]
    with torch.no_grad():
        tower.embed_positions.weight.copy_(torch.cat([angles.sin(), angles.cos()], dim=1))


class LogMel(nn.Module):
    """`WhisperFeatureExtractor` for a batch on any device: same window, filters, logarithm and per-clip floor."""

    window: Tensor
    filters: Tensor

    def __init__(self, extractor: WhisperFeatureExtractor) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(extractor.n_fft))
        self.register_buffer("filters", torch.tensor(extractor.mel_filters, dtype=torch.float32).T.contiguous())

    def forward(self, waves: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(waves.device.type, enabled=False):  # a power spectrum has no place in bf16
            spectrum = torch.stft(waves, len(self.window), HOP, window=self.window, return_complex=True)
            mel = self.filters @ spectrum[..., :-1].abs().square()
            log = mel.clamp(min=1e-10).log10()
            return (torch.maximum(log, log.amax(dim=(1, 2), keepdim=True) - 8.0) + 4.0) / 4.0


def spec_augment(mel: Tensor, bands: int = 2, band_width: int = 12, gaps: int = 2, gap_frames: int = 15) -> Tensor:
    """Blank a few mel bands and short gaps of every clip (SpecAugment without warping; Park et al. 2019)."""
    clips, bins, frames = mel.shape
    hidden = torch.zeros(clips, bins, frames, dtype=torch.bool, device=mel.device)
    for count, widest, size, shape in ((bands, band_width, bins, (1, -1, 1)), (gaps, gap_frames, frames, (1, 1, -1))):
        place = torch.arange(size, device=mel.device).view(shape)
        for _ in range(count):
            width = torch.randint(0, widest + 1, (clips, 1, 1), device=mel.device)
            start = (torch.rand(clips, 1, 1, device=mel.device) * (size - width)).long()
            hidden |= (place >= start) & (place < start + width)
    return mel.masked_fill(hidden, 0.0)


def feature_frames(samples: np.ndarray) -> np.ndarray:
    """Log-mel frames of clips with so many samples, as the processor counts them."""
    return -(-samples // HOP)


@dataclass(frozen=True)
class Packed:
    """Clips ready for `decode`: one row a clip, holding the prompt, the audio and one branch per language."""

    ids: Tensor  # (clips, length)
    positions: Tensor
    branches: Tensor  # 0 shared, 1.. one per language, -1 padding
    target_index: Tensor  # where, in the flattened rows, an answer token is predicted
    targets: Tensor
    audio_start: int
    longest_audio: int

    def to(self, device: torch.device) -> Packed:
        """Copied without making the host wait for the device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

        return Packed(
            move(self.ids), move(self.positions), move(self.branches), move(self.target_index), move(self.targets),
            self.audio_start, self.longest_audio,
        )  # fmt: skip


class Packer:
    """Lays out rows. The prompt's halves are the package's own, so that training sees what inference sends."""

    def __init__(self, blueprint: Blueprint, processor: Any) -> None:
        self.blueprint, self._tokenizer = blueprint, processor.tokenizer
        self.audio_id = blueprint.family.audio_token(processor)
        halves = [blueprint.family.prompt(processor, SYSTEM_PROMPT, text) for text in INSTRUCTIONS.values()]
        (self.head,) = {tuple(before) for before, _ in halves}
        self.tails = [after for _, after in halves]

    def answer(self, text: str) -> list[int]:
        """Token ids, the end token included."""
        return [*self._tokenizer(text, add_special_tokens=False)["input_ids"], self._tokenizer.eos_token_id]

    def text(self, tokens: Sequence[int]) -> str:
        """Text of generated ids, special tokens left out."""
        return self._tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def pack(self, num_audio: Sequence[int], answers: Sequence[Sequence[list[int]]], pad_to: int = 32) -> Packed:
        """`answers` holds, per clip, one token list per language. Rows are padded on the right to a multiple of `pad_to`.

        A few fixed lengths keep the allocator and the kernels from meeting a new shape at every step.
        """
        longest = 0
        for audio, clip_answers in zip(num_audio, answers):
            branch_tokens = sum(len(tail) + len(answer) for tail, answer in zip(self.tails, clip_answers))
            longest = max(longest, len(self.head) + audio + branch_tokens)
        length = -(-longest // pad_to) * pad_to
        ids = np.full((len(answers), length), self._tokenizer.pad_token_id, np.int64)
        positions, branches = np.zeros_like(ids), np.full_like(ids, -1)
        index: list[np.ndarray] = []
        for row, (audio, clip_answers) in enumerate(zip(num_audio, answers)):
            shared = len(self.head) + audio
            ids[row, : len(self.head)] = self.head
            ids[row, len(self.head) : shared] = self.audio_id
            positions[row, :shared] = np.arange(shared)
            branches[row, :shared] = 0
            end = shared
            for number, (tail, answer) in enumerate(zip(self.tails, clip_answers), start=1):
                start, end = end, end + len(tail) + len(answer)
                ids[row, start:end] = tail + answer
                positions[row, start:end] = np.arange(shared, shared + end - start)
                branches[row, start:end] = number
                index.append(row * length + np.arange(start + len(tail) - 1, end - 1))
        flat = np.concatenate(index)
        targets = torch.from_numpy(ids.reshape(-1)[flat + 1])
        rows = torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(branches)
        return Packed(rows[0], rows[1], rows[2], torch.from_numpy(flat), targets, len(self.head), max(num_audio))


def decode(
    model: Any,
    packed: Packed,
    audio_states: Tensor,
    num_audio: Tensor,
    keep: Sequence[bool],
) -> Tensor:
    """Logits at `packed.target_index`. `keep` says which decoder layers run (LayerDrop; all True otherwise)."""
    language_model = model.model.language_model
    embedded = language_model.embed_tokens(packed.ids)
    start, count = packed.audio_start, packed.longest_audio
    projected = model.model.multi_modal_projector(audio_states[:, :count])
    is_audio = (torch.arange(count, device=projected.device) < num_audio[:, None])[..., None]
    window = torch.where(is_audio, projected.to(embedded.dtype), embedded[:, start : start + count])
    states = torch.cat([embedded[:, :start], window, embedded[:, start + count :]], dim=1)

    branch = packed.branches
    causal = torch.ones(branch.shape[1], branch.shape[1], dtype=torch.bool, device=branch.device).tril()
    # A padded query still sees the shared part, so no row of the softmax is empty.
    visible = causal & ((branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None]))
    rotary = language_model.rotary_emb(states, packed.positions)
    for layer, kept in zip(language_model.layers, keep, strict=True):
        if kept:
            states = layer(states, attention_mask=visible[:, None], position_embeddings=rotary)
    states = language_model.norm(states)
    return model.lm_head(states.reshape(-1, states.shape[-1])[packed.target_index])
