"""Qwen2-Audio-7B's true size with random weights, a small model with the same window, and clips of noise to train either on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import nn
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from trimlingual.data.audio import SAMPLE_RATE
from trimlingual.data.sources import Clip
from trimlingual.models.inputs import Example
from trimlingual.models.qwen2_audio import FAMILY
from trimlingual.models.tree import part_of

NUM_PARAMETERS = {"7b": 8_397_094_912}  # of Qwen/Qwen2-Audio-7B-Instruct


def config(size: str, processor: Any, layers: int | None = None) -> Qwen2AudioConfig:
    """Qwen2-Audio-7B's published shapes, or a small model with the same 30 s window; with `layers`, of so many decoder layers."""
    tokenizer = processor.tokenizer
    if size == "7b":
        audio, text = (FAMILY.shapes["qwen2-audio-7b"][name] for name in ("audio", "text"))
    else:
        audio = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 128}
        text = {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4,
            "num_key_value_heads": 4, "vocab_size": 8192, "max_position_embeddings": 8192,
        }  # fmt: skip
    if layers:
        text = {**text, "num_hidden_layers": layers}
    return Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", "num_mel_bins": 128, "max_source_positions": 1500, **audio},
        text_config={"model_type": "qwen2", "rope_theta": 10000.0, "tie_word_embeddings": False, "rms_norm_eps": 1e-5, **text},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
        tie_word_embeddings=False,
    )  # fmt: skip


def build(size: str, processor: Any, device: torch.device, dtype: torch.dtype, layers: int | None = None) -> Any:
    """A model with random weights, drawn where they will stay."""
    shapes = config(size, processor, layers)
    with torch.device("meta"):
        num = sum(p.numel() for p in Qwen2AudioForConditionalGeneration(shapes).parameters())
    assert layers or num == NUM_PARAMETERS.get(size, num), num
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Qwen2AudioForConditionalGeneration(shapes)
    finally:
        torch.set_default_dtype(default)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return model


def quantize_(model: Any) -> None:
    """Every linear layer but the head to nf4 with double quantisation, as loading with the recipe's configuration does."""
    import bitsandbytes as bnb

    linear = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    for name, module in linear:
        if part_of(name) == "lm_head":
            continue
        device = module.weight.device
        new = bnb.nn.Linear4bit(
            module.in_features, module.out_features, module.bias is not None, torch.bfloat16, quant_type="nf4", device="meta"
        )  # fmt: skip
        new.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4", module=new).to(device)
        new.bias = module.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
        module.weight = None
    model.requires_grad_(False)
    model.is_loaded_in_4bit = True


def make_data(folder: Path, count: int, processor: Any, seed: int = 0) -> tuple[list[Clip], list[Example]]:
    """Shaped noise of log-normal length (median 7.5 s, cut to 3 to 20 s) with random words of about 3 tokens a second."""
    rng = np.random.default_rng(seed)
    words = sorted(token[1:] for token in processor.tokenizer.get_vocab() if token[:1] == "Ġ" and token[1:].isalpha())
    clips, examples = [], []
    for i in range(count):
        seconds = float(np.clip(rng.lognormal(np.log(7.5), 0.5), 3, 20))
        time_s = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
        tone = np.sin(2 * np.pi * rng.uniform(80, 400) * time_s) * (0.5 + 0.5 * np.sin(2 * np.pi * 3 * time_s))
        path = folder / f"{i}.wav"
        soundfile.write(path, (0.3 * tone + 0.03 * rng.standard_normal(len(tone))).astype(np.float32), SAMPLE_RATE)
        text = " ".join(words[j] for j in rng.integers(0, len(words), int(seconds * rng.uniform(2.5, 3.2))))
        clips.append(Clip(str(i), path, {"de": text}, None, seconds, str(i)))
        examples.append(Example(i, str(i), "de", text))
    return clips, examples


def write_manifests(folder: Path, processor: Any, counts: Mapping[str, int]) -> dict[str, Path]:
    """Manifests of as many such clips for each split, the same ones every time."""
    found = {}
    for seed, (split, count) in enumerate(counts.items()):
        (folder / split).mkdir(parents=True, exist_ok=True)
        clips, _ = make_data(folder / split, count, processor, seed)
        records = [{"audio": str(c.audio), "id": f"{split}-{c.id}", "references": c.references} for c in clips]
        found[split] = folder / f"{split}.jsonl"
        found[split].write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return found
