"""Models whose weights are packed integers (compressed-tensors), made plain when they are loaded."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn


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
    hook = getattr(model, "ct_decompress_hook", None)
    if hook is not None:
        hook.remove()
        del model.ct_decompress_hook
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(parameter.is_floating_point())


def alone() -> AbstractContextManager[None]:
    """compressed_tensors without its sharing of modules among processes: of several, one packs, or each loads for itself."""
    from compressed_tensors.offload import as_single_threaded

    return as_single_threaded()
