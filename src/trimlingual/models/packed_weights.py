"""Models whose weights are packed integers (compressed-tensors): computed on as they are, or made plain when they are loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from trimlingual.models.humming_layers import compile_all
from trimlingual.models.packed_layers import PackedEmbedding, Part, head_of, linear_of, words_of_bytes
from trimlingual.models.tree import PARTS
from trimlingual.run.progress import say

JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers of a decoder layer with the same inputs


def is_packed(module: nn.Module) -> bool:
    """Whether compressed-tensors holds this module's weight."""
    return getattr(module, "quantization_scheme", None) is not None


@torch.no_grad()
def unpack_(model: Any, dtype: torch.dtype) -> None:
    """Turn a packed model into a plain one of `dtype`, as transformers does at the first forward of the whole model.

    Done at loading, because decoding here calls the model's parts and not the model.
    """
    from compressed_tensors.compressors import decompress_module

    for module in model.modules():
        if is_packed(module):
            decompress_module(module, leave_decompressed=False)
    _forget_packing(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(parameter.is_floating_point())


@torch.no_grad()
def keep_packed_(model: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Turn a packed model on the CPU into one on `device` that computes in `dtype` on its packed weights, and say how it does.

    The largest layer comes first, while the device is empty: arranging a layer takes a few times its own memory for a moment. What was
    there before stays on the CPU: its modules refer to each other in circles, and would keep the device's memory. Such a model cannot
    be trained, changed or saved.
    """
    modules = {name: module for name, module in model.named_modules() if is_packed(module)}
    for names in sorted(_products(modules), key=lambda names: sum(_num_bytes(modules[n]) for n in names), reverse=True):
        computing, first = _computing([modules[name] for name in names], dtype, device), 0
        for name in names:
            end = first + len(modules[name].weight_scale)
            model.set_submodule(name, computing if len(names) == 1 else Part(computing, slice(first, end)))
            first = end
    _forget_packing(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)
    model.to(device).requires_grad_(False)
    compile_all(model.modules())
    say_kernels(model)


def can_stay_packed(model: nn.Module) -> bool:
    """Whether every packed module is of a kind that packed_layers.py computes on; a folder that was made elsewhere may have others.

    These are symmetric integers in words or, with one scale a row and without a bias, in bytes.
    """
    return all(map(_is_known, filter(is_packed, model.modules())))


def _is_known(module: Any) -> bool:
    weights = module.quantization_scheme.weights
    if weights.type != "int" or not weights.symmetric or hasattr(module, "weight_g_idx"):
        return False
    if _words(module) is not None:
        return True
    by_row = module.weight.dtype == torch.int8 and module.weight_scale.shape[1] == 1
    return by_row and getattr(module, "bias", None) is None


def _num_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def say_kernels(model: nn.Module) -> None:
    """Say how the model's packed layers are computed."""
    kinds = Counter(module.kernel for module in model.modules() if hasattr(module, "kernel"))
    say("  packed weights: " + ", ".join(f"{number} layers {kind}" for kind, number in kinds.items()))


def _products(modules: dict[str, Any]) -> list[list[str]]:
    """The names of packed modules, those together that decoder layers give the same inputs and whose tensors can be joined."""
    groups: dict[Any, list[str]] = {}
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        siblings = next((names for names in JOINED if own in names), None)
        like: Any = name
        if siblings and name.startswith(PARTS["decoder"]) and _words(module) is not None:
            like = parent, siblings, _num_bits(module), module.weight_scale.shape[1], module.bias is None
        groups.setdefault(like, []).append(name)
    return list(groups.values())


def _computing(modules: Sequence[Any], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """What computes on `device` on the tensors of packed modules, whose outputs are one after the other."""
    first, num_bits = modules[0], _num_bits(modules[0])
    scale = torch.cat([module.weight_scale.data for module in modules]).to(device, dtype)
    if _words(first) is None:
        integers = first.weight.data.to(device)  # 8 bits, a byte each
        if isinstance(first, nn.Embedding):
            return PackedEmbedding(words_of_bytes(integers), scale, num_bits)
        return head_of(integers, scale)
    words = torch.cat([module.weight_packed.data for module in modules]).to(device)
    if isinstance(first, nn.Embedding):
        return PackedEmbedding(words, scale, num_bits)
    bias = None if first.bias is None else torch.cat([module.bias.data for module in modules]).to(device, dtype)
    return linear_of(words, scale, bias, num_bits)


def _words(module: Any) -> Any:
    """The packed words, if the integers are not a byte each."""
    return getattr(module, "weight_packed", None)


def _num_bits(module: Any) -> int:
    return module.quantization_scheme.weights.num_bits


def _forget_packing(model: Any) -> None:
    """What transformers would unpack the model by at its first forward."""
    hook = getattr(model, "ct_decompress_hook", None)
    if hook is not None:
        hook.remove()
        del model.ct_decompress_hook
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)


def alone() -> AbstractContextManager[None]:
    """compressed_tensors without its sharing of modules among processes: of several, one packs, or each loads for itself."""
    from compressed_tensors.offload import as_single_threaded

    return as_single_threaded()


@contextmanager
def loading() -> Iterator[None]:
    """In which transformers loads a packed model: each process for itself, and packed embedding tables too."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

    class Quantizer(CompressedTensorsHfQuantizer):
        """Transformers' own would also draw the `weight` of a packed embedding table, which has none."""

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            super()._process_model_before_weight_loading(model, **kwargs)
            for module in model.modules():
                if isinstance(module, nn.Embedding) and is_packed(module):
                    setattr(module, "_is_hf_initialized", True)  # noqa: B010  (no field of it for mypy)

    theirs = AUTO_QUANTIZER_MAPPING["compressed-tensors"]
    AUTO_QUANTIZER_MAPPING["compressed-tensors"] = Quantizer
    try:
        with alone():
            yield
    finally:
        AUTO_QUANTIZER_MAPPING["compressed-tensors"] = theirs
