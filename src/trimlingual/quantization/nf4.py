"""4 bits by bitsandbytes (nf4, fp4): what becomes 4-bit, whether it did, and the weights that it stands for.

This file and training/lora.py, for layers on 4-bit weights, alone import bitsandbytes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from trimlingual.models.saving import DTYPES
from trimlingual.models.tree import PARTS, part_of
from trimlingual.recipe import QuantizeSettings


class QuantizationError(ValueError):
    """A model whose 4-bit modules are not the ones that were asked for."""


def bitsandbytes_config(settings: QuantizeSettings) -> BitsAndBytesConfig:
    """The 4-bit configuration to train on; an int4 model is trained as nf4, which bitsandbytes computes with.

    Modules are skipped by their names in memory; other spellings match nothing and are ignored.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4" if settings.scheme == "int4" else settings.scheme,
        bnb_4bit_use_double_quant=settings.double_quantization,
        bnb_4bit_compute_dtype=DTYPES[settings.compute_dtype],
        llm_int8_skip_modules=[prefix for part, prefix in PARTS.items() if part not in settings.parts],
    )


def is_4bit(module: nn.Module) -> bool:
    """Whether this is a bitsandbytes 4-bit linear layer."""
    import bitsandbytes

    return isinstance(module, bitsandbytes.nn.Linear4bit)


def check_quantized(model: Any, settings: QuantizeSettings) -> None:
    """QuantizationError unless exactly the linear layers of the chosen parts are 4-bit."""
    wrong, missed = [], []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        to_quantize = part_of(name) in settings.parts
        if is_4bit(module) and not to_quantize:
            wrong.append(name)
        if to_quantize and not is_4bit(module):
            missed.append(name)
    if wrong or missed:
        raise QuantizationError(
            f"quantize.parts is {sorted(settings.parts)}, but after loading "
            + "; ".join(
                f"{len(names)} module(s) {verb} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                for names, verb in ((wrong, "are 4-bit that should not be"), (missed, "are not 4-bit that should be"))
                if names
            )
        )


def dequantized(module: nn.Module) -> Tensor:
    """The weights a 4-bit layer stands for, float32, (out, in)."""
    import bitsandbytes

    # On CPUs with AVX512-BF16 a first forward in eval mode re-packs the weight into another layout, which dequantize_4bit
    # then reads as garbage; building the state dict is the public call that puts the standard layout back.
    module.state_dict()
    weight: Any = module.weight
    return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
