"""LoRA adapters, and their layers as one autograd node each.

PEFT's layer is a dozen operations forward and about twice as many back. A QLoRA step of a 7B model with 417 adapted layers and short
clips is bound by launching them, not by the GPU (benchmarks/train_speed.py), so for training the plain case runs as one node: two
products with the frozen weight, six with the low-rank factors, everything in the dtype of autocast. The layer's function, its
parameters and its checkpoints stay PEFT's.

Shapes: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn
from transformers import set_seed

from trimlingual.models.tree import EMBEDDINGS, PARTS, lm_head, text_decoder
from trimlingual.recipe import LoraSettings
from trimlingual.run.artifacts import write_json

BASE_TAG = "base_model:adapter:"  # of a card, by which the Hub lists a model's adapters


def add_lora(model: Any, settings: LoraSettings, seed: int, frozen: Sequence[str] = ()) -> Any:
    """The model with a trainable LoRA adapter (Hu et al. 2021; rank-stabilised scaling: Kalajdzievski 2023).

    The `frozen` parts (audio_tower, projector, embeddings, lm_head) get none. Raises ValueError when that leaves nothing to adapt.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import NoMatchingPeftModuleError

    set_seed(seed)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        target_modules=settings.target_modules,
        exclude_modules=_names_in(model, frozen),
        bias="none",
    )
    try:
        return get_peft_model(model, config)
    except NoMatchingPeftModuleError as error:
        raise ValueError(
            f"lora.target_modules {settings.target_modules!r} matches no module of the model outside freeze {list(frozen)}: "
            "there is nothing to train; name other modules, or freeze less"
        ) from error


def save_adapter(adapted: Any, folder: Path, base: str) -> None:
    """Save the adapter of a PEFT model, which names `base` as what it belongs to.

    PEFT would write the path that the model was loaded from, into the configuration and into the card. The name is put in its place
    afterwards: given it before, PEFT would ask the Hub for a model of that name.
    """
    adapted.save_pretrained(folder)
    config = folder / "adapter_config.json"
    write_json(config, json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": base})
    card = ModelCard.load(folder / "README.md")
    tags = [tag for tag in card.data.tags or [] if not tag.startswith(BASE_TAG)]
    card.data.base_model, card.data.tags = base, sorted([*tags, f"{BASE_TAG}{base}"])
    card.save(folder / "README.md")


def _names_in(model: Any, parts: Sequence[str]) -> str | None:
    """A pattern of the names of all modules in these parts. Tied embeddings are the output head, so one is frozen with the other."""
    names = PARTS | {"embeddings": EMBEDDINGS}
    chosen, tied = set(parts), {"embeddings", "lm_head"}
    if chosen & tied and text_decoder(model).embed_tokens.weight is lm_head(model).weight:
        chosen |= tied
    return "|".join(rf"{re.escape(names[part])}(\..*)?" for part in sorted(chosen)) or None


def fuse_lora_(model: Any) -> int:
    """Run every plain LoRA layer of a PEFT model as one node; returns how many.

    Plain is one adapter without dropout or bias on a frozen linear layer, dense or bitsandbytes 4-bit. Other layers stay as they are.
    """
    from peft.tuners.lora import LoraLayer

    count = 0
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and _is_plain(layer):
            layer.forward = partial(_forward, layer, layer.forward, _Weight(layer.base_layer))
            count += 1
    return count


def _is_plain(layer: Any) -> bool:
    base, names = layer.base_layer, list(layer.lora_A)
    return (
        (type(base) is nn.Linear or _is_four_bit(base))
        and not base.weight.requires_grad
        and len(names) == 1
        and layer.active_adapters == names
        and isinstance(layer.lora_dropout[names[0]], nn.Identity)
        and not layer.lora_variant
        and layer.lora_B[names[0]].bias is None
    )


def _is_four_bit(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


def _forward(layer: Any, plain: Any, weight: _Weight, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    (name,) = layer.lora_A
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    usual = layer.training and not (layer.merged or layer.disable_adapters or args or kwargs or weight.is_repacked)
    if not usual or not (autocast or a.dtype == x.dtype):
        return plain(x, *args, **kwargs)
    return _LoraLinear.apply(x, a, b, weight, layer.scaling[name], dtype)


class _Weight:
    """The frozen weight (O, I) and bias (O,) of a linear layer.

    The scales of nf4 with double quantisation are kept in float32 (4 bytes for 64 weights), or restoring them would be half the work.
    """

    def __init__(self, base: Any):
        self.base = base
        self._state: Any = None
        self._made_from: Any = None

    @property
    def is_repacked(self) -> bool:
        """Whether bitsandbytes has brought the weight into its order for inference on a CPU, which only its own layer reads."""
        return getattr(getattr(self.base.weight, "quant_state", None), "packing_format_for_cpu", False)

    def of(self, dtype: torch.dtype) -> Tensor:
        """In full, in `dtype`."""
        if not _is_four_bit(self.base):
            return self.base.weight.to(dtype)
        from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

        weight, state = self.base.weight, self.base.weight.quant_state
        if self._made_from is not state:
            self._made_from = state
            absmax = state.absmax
            if state.nested:
                absmax = (dequantize_blockwise(absmax, state.state2) + state.offset).float()
            self._state = QuantState(absmax, state.shape, state.code, state.blocksize, state.quant_type, state.dtype)
        return dequantize_4bit(weight.data, self._state).to(dtype)

    @property
    def bias(self) -> Tensor | None:
        """None for a layer without."""
        return self.base.bias


class _LoraLinear(torch.autograd.Function):
    """x W' + bias + scaling (x A') B', for x (..., I), A (R, I), B (O, R)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, weight: _Weight, scaling: float, dtype: torch.dtype
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        low_a, low_b, full = a.to(dtype), b.to(dtype), weight.of(dtype)
        out = rows @ full.t() if weight.bias is None else torch.addmm(weight.bias.to(dtype), rows, full.t())
        low = (rows @ low_a.t()).mul_(scaling)  # (N, R)
        out.addmm_(low, low_b.t())
        ctx.save_for_backward(rows, low_a, low_b, low)
        ctx.weight, ctx.scaling = weight, scaling
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, a.dtype, b.dtype)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        rows, low_a, low_b, low = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1]).to(rows.dtype)
        grad_low = (grad @ low_b).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ ctx.weight.of(rows.dtype)).addmm_(grad_low, low_a).view(ctx.shape).to(ctx.dtypes[0])
        return grad_x, (grad_low.t() @ rows).to(ctx.dtypes[1]), (grad.t() @ low).to(ctx.dtypes[2]), None, None, None
