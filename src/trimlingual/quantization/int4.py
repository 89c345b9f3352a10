"""4-bit and 8-bit integers in one folder: the compressed-tensors layout, which plain `from_pretrained` loads.

bitsandbytes knows one number format a model, so it cannot hold 4-bit layers beside 8-bit embeddings. compressed-tensors (Apache-2.0,
of the vLLM project) can: 4-bit integers with one scale a group of input weights in the layers, 8-bit integers with one scale a row in
the embedding table and lm_head. Plain transformers unpacks such a model at the first forward; vLLM and models/packed_layers.py compute
on the packed weights. This file and models/packed_weights.py, which reads what is written here, alone import compressed_tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimlingual.models.packed_weights import alone, is_packed, unpack_
from trimlingual.models.saving import DTYPES, explained_disk_full, finish_saved, round_weights_
from trimlingual.models.tree import EMBEDDINGS, PARTS, PATTERNS, part_of
from trimlingual.recipe import Dtype, QuantizeSettings
from trimlingual.run.extras import install_line

# Scales tried for each group, as fractions of the one that puts its largest weight on the last step. Clipping the largest weight a
# little is better for the sum of squares: with 128 normal weights a group 20.3 dB instead of 19.7 (nf4 with blocks of 64: 20.7).
CLIPPINGS = (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
CHUNK = 1 << 24  # weights searched at once


class PackingError(ValueError):
    """A model that cannot be packed as asked; the message says what to change."""


def save_packed(
    model: Any,
    processor: Any,
    folder: Path,
    settings: QuantizeSettings,
    storage_dtype: Dtype,
    scales: Mapping[str, Tensor] | None = None,
) -> dict[str, int]:
    """Pack `model` in place, save it and unpack it again, so that what is in memory is what `folder` loads as.

    `scales` (out, in / group_size) are those of modules whose weights stand on their steps already (rounding.py).

    Everything that is not packed is rounded to `storage_dtype`. Returns how many modules have 4 and 8 bits. Raises PackingError when
    the library is missing or `group_size` does not divide a layer's width.
    """
    compressor = _compressor()
    round_weights_(model, storage_dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[storage_dtype])
    config = packing_config(settings)
    bits_of = modules_to_pack(model, settings)
    _apply(model, config, bits_of, scales or {})
    with explained_disk_full(folder):
        pack = compressor(quantization_config=config)
        with alone():
            pack.compress_model(model)
        model.save_pretrained(folder, max_shard_size="4GB")
        pack.update_config(str(folder))
        processor.save_pretrained(folder)
        finish_saved(folder)
    unpack_(model, DTYPES[storage_dtype])
    return {f"num_{bits}bit_modules": list(bits_of.values()).count(bits) for bits in (4, 8)}


def packing_config(settings: QuantizeSettings) -> Any:
    """The compressed-tensors configuration of a recipe's section."""
    _compressor()
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    groups = {}
    if settings.eight_bit:
        # Plain int8, not packed words: an embedding module must keep a `weight`, or transformers cannot initialise it.
        eight = QuantizationArgs(num_bits=8, strategy="channel", symmetric=True)
        targets = [PATTERNS[name] for name in settings.eight_bit]
        groups["eight"] = QuantizationScheme(targets=targets, weights=eight, format="naive-quantized")
    four = QuantizationArgs(num_bits=4, strategy="group", group_size=settings.group_size, symmetric=True)
    groups["four"] = QuantizationScheme(targets=["Linear"], weights=four, format="pack-quantized")
    left_out = [part for part in PARTS if part not in settings.parts and part not in settings.eight_bit]
    return QuantizationConfig(
        config_groups=groups,
        format="mixed-precision" if settings.eight_bit else "pack-quantized",
        ignore=[PATTERNS[part] for part in left_out],
    )


def modules_to_pack(model: Any, settings: QuantizeSettings) -> dict[str, int]:
    """Names of the modules to be packed, with their number of bits; PackingError when `group_size` does not fit."""
    bits = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and part_of(name) in settings.parts:
            bits[name] = 4
    bits |= {name: 8 for name in (EMBEDDINGS, "lm_head") if name.rpartition(".")[2] in _eight_bit_names(settings)}
    for name, number in bits.items():
        width = model.get_submodule(name).weight.shape[1]
        if number == 4 and width % settings.group_size:
            raise PackingError(
                f"quantize.group_size is {settings.group_size}, but {name} has {width} input weights, which it does not divide; "
                "choose 32, 64 or 128 so that it does"
            )
    return bits


def _eight_bit_names(settings: QuantizeSettings) -> list[str]:
    return ["embed_tokens" if name == "embeddings" else name for name in settings.eight_bit]


@torch.no_grad()
def _apply(model: Any, config: Any, bits_of: dict[str, int], scales: Mapping[str, Tensor]) -> None:
    """Attach the scheme to each module, with its scales, and round its weights to what they will be read as."""
    from compressed_tensors.quantization import apply_quantization_config

    apply_quantization_config(model, config)
    found = {n: m.quantization_scheme.weights.num_bits for n, m in model.named_modules() if is_packed(m)}
    if found != bits_of:  # ours to get right, yet silent if it were wrong
        raise PackingError(
            f"packing matched other modules than asked: {sorted(set(found.items()) ^ set(bits_of.items()))[:4]}"
        )
    module: Any
    for name, number in bits_of.items():
        module = model.get_submodule(name)
        group = module.quantization_scheme.weights.group_size or module.weight.shape[1]
        if name in scales:
            scale, rounded = scales[name], module.weight.data
        else:
            scale, rounded = round_to_integers(module.weight, number, group)
        module.weight_scale.data.copy_(scale)
        module.weight_zero_point.data.zero_()
        module.weight.data.copy_(rounded)


def round_to_integers(weight: Tensor, num_bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Scales (out, in / group_size) and the weights (out, in) they stand for, in `weight`'s dtype.

    4 bits: integers -8..7, the scale with the least squared error of those tried; it may be negative, so that the largest weight of a
    group can stand on -8 whatever its sign. 8 bits: integers -127..127, the largest weight on 127.
    """
    dtype = weight.dtype
    scales, values = weight.new_empty((len(weight), weight.shape[1] // group_size)), torch.empty_like(weight)
    step = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = weight[start : start + step]
        groups = rows.float().reshape(-1, group_size)
        scale = best_scale(groups, dtype) if num_bits == 4 else _stored(groups.abs().amax(1, keepdim=True) / 127, dtype)
        limit = 2 ** (num_bits - 1)
        integers = (groups / scale).round().clamp(-limit, limit - 1)
        scales[start : start + step] = scale.reshape(len(rows), -1)
        values[start : start + step] = (integers * scale).reshape(rows.shape)
    return scales, values


def best_scale(groups: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale (G, 1) with the least squared error for each row of `groups` (G, group_size)."""
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    best, least = _stored(-largest / 8, dtype), torch.full_like(largest, float("inf"))
    for clipping in CLIPPINGS:
        for sign in (-1, 1):
            integers = (groups / _stored(sign * clipping * largest / 8, dtype)).round().clamp(-8, 7)
            # the least-squares scale for these integers, then the integers for that scale
            scale = _stored((groups * integers).sum(1, keepdim=True) / integers.square().sum(1, keepdim=True), dtype)
            error = (groups - (groups / scale).round().clamp(-8, 7) * scale).square().sum(1, keepdim=True)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
    return best


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as it will be read from disk, float32; 1 for a group of zeros."""
    scale = scale.to(dtype).float()
    return torch.where((scale == 0) | ~scale.isfinite(), 1.0, scale)


def _compressor() -> Any:
    try:
        from compressed_tensors.compressors import ModelCompressor
    except ImportError as error:
        raise PackingError(
            f"quantize.scheme int4 needs the compressed-tensors library: {install_line('int4')}"
        ) from error
    return ModelCompressor
