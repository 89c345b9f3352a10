"""Models whose weights are packed integers (compressed-tensors): computed on as they are, or made plain when they are loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from trimlingual.models.humming_layers import compile_all
from trimlingual.models.packed_layers import PackedEmbedding, head_of, linear_of, words_of_bytes
from trimlingual.run.progress import say


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
    sizes = {name: _num_bytes(module) for name, module in model.named_modules() if is_packed(module)}
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        model.set_submodule(name, _computing(model.get_submodule(name), dtype, device))
    _forget_packing(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)
    model.to(device).requires_grad_(False)
    compile_all(model.modules())
    say_kernels(model)


def _num_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def say_kernels(model: nn.Module) -> None:
    """Say how the model's packed layers are computed."""
    kinds = Counter(module.kernel for module in model.modules() if hasattr(module, "kernel"))
    say("  packed weights: " + ", ".join(f"{number} layers {kind}" for kind, number in kinds.items()))


def _computing(module: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """What computes on `device` on the tensors of a packed module."""
    scale, num_bits = module.weight_scale.data.to(device, dtype), module.quantization_scheme.weights.num_bits
    packed = getattr(module, "weight_packed", None)  # else 8-bit integers, a byte each
    stored = (module.weight if packed is None else packed).data.to(device)
    if isinstance(module, nn.Embedding):
        return PackedEmbedding(words_of_bytes(stored) if packed is None else stored, scale, num_bits)
    if packed is None:
        return head_of(stored, scale)
    bias = None if module.bias is None else module.bias.data.to(device, dtype)
    return linear_of(stored, scale, bias, num_bits)


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
