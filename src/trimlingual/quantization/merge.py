"""Add a trained adapter to the weights."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from trimlingual.quantization.nf4 import dequantized, is_4bit


@torch.no_grad()
def merge_(target: Any, adapted: Any, base: Literal["dequantized", "original"] = "dequantized") -> None:
    """Write `weight + adapter` of the PEFT model into the plain model `target`, in float32 before rounding.

    `target` may stand in host memory: the sums are made one layer at a time where the adapter is.

    The weight is the dequantised 4-bit one, which the adapter was trained on, or the `original` one, which `target` holds. Modules
    that are not adapted become their dequantised selves, or stay as they are.
    """
    from peft.tuners.lora import LoraLayer

    source = dict(adapted.get_base_model().named_modules())
    for name, module in target.named_modules():
        other = source.get(name)
        if not isinstance(module, nn.Linear) or other is None:
            continue
        trained_on = other.get_base_layer() if isinstance(other, LoraLayer) else other
        if base == "dequantized":
            weight = dequantized(trained_on) if is_4bit(trained_on) else trained_on.weight.float()
        else:
            weight = module.weight.to(trained_on.weight.device).float()
        if isinstance(other, LoraLayer):
            weight = weight + other.get_delta_weight(adapted.active_adapter).float()
        module.weight.copy_(weight.to(module.weight.dtype))
