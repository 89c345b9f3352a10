"""Integers of 2, 3, 4 and 8 bits in one folder: the compressed-tensors layout, which plain `from_pretrained` loads.

bitsandbytes knows one number format a model, so it cannot hold 4-bit layers beside 8-bit embeddings. compressed-tensors (Apache-2.0,
of the vLLM project) can: integers with one scale a group of input weights, packed without a gap, and for the embedding table and
lm_head 8-bit integers with one scale a row. Plain transformers unpacks such a model at the first forward, but for an embedding table
of fewer than 8 bits, which it cannot load; vLLM and models/packed_layers.py compute on the packed weights. This file and
models/packed_weights.py, which reads what is written here, alone import compressed_tensors.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimlingual.models.packed_weights import alone, is_packed, unpack_
from trimlingual.models.saving import DTYPES, finish_saved, round_weights_
from trimlingual.models.tree import EMBEDDINGS, PARTS, PATTERNS, fine_part_of, pattern_of
from trimlingual.recipe import ROW_PARTS, Dtype, QuantizeSettings

# Scales tried for each group, as fractions of the one that puts its largest weight on the last step. Clipping the largest weight a
# little is better for the sum of squares: of 4 bits with 128 normal weights a group 20.3 dB instead of 19.7 (nf4 with blocks of 64:
# 20.7). Smaller fractions, or each tried twice, add less than 0.05 dB at 2, 3 and 4 bits.
CLIPPINGS = (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
CHUNK = 1 << 24  # weights searched at once
SHAPE_BYTES = 16  # `weight_shape`: two int64 beside each module's words


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

    `scales` (out, in / group_size) are those of modules whose weights stand on their steps already (rounding.py). `settings.bits` goes
    by the positions of layers in `model`.

    Everything that is not packed is rounded to `storage_dtype`. Returns how many modules have how many bits. Raises PackingError when
    `group_size` does not divide a layer's width, or `settings.bits` names a layer that is not there.
    """
    from compressed_tensors.compressors import ModelCompressor

    round_weights_(model, storage_dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[storage_dtype])
    config = packing_config(settings)
    bits_of = modules_to_pack(model, settings)
    _apply(model, config, bits_of, scales or {})
    pack = ModelCompressor(quantization_config=config)
    with alone():
        pack.compress_model(model, skip_compressed=True)  # all are: this marks the model as packed
    model.save_pretrained(folder, max_shard_size="4GB")
    pack.update_config(str(folder))
    processor.save_pretrained(folder)
    finish_saved(folder)
    unpack_(model, DTYPES[storage_dtype])
    return {f"num_{bits}bit_modules": number for bits, number in sorted(Counter(bits_of.values()).items())}


def packing_config(settings: QuantizeSettings) -> Any:
    """The compressed-tensors configuration of a recipe's section."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    by_group: dict[int, list[str]] = defaultdict(list)
    by_row: list[str] = []
    for part, number in [*((part, 8) for part in settings.eight_bit), *settings.bits.items()]:
        (by_row if has_row_scales(part, number) else by_group[number]).append(pattern_of(part))
    groups = {}
    if by_row:
        # Plain int8, not packed words: an embedding module must keep a `weight`, or transformers cannot initialise it.
        eight = QuantizationArgs(num_bits=8, strategy="channel", symmetric=True)
        groups["8_by_row"] = QuantizationScheme(targets=by_row, weights=eight, format="naive-quantized")
    by_group[4].append("Linear")
    for number, targets in by_group.items():
        args = QuantizationArgs(num_bits=number, strategy="group", group_size=settings.group_size, symmetric=True)
        # A class is tried after the patterns of groups before it, and what is saved is sorted by name.
        name = "default" if number == 4 else f"{number}_by_group"
        groups[name] = QuantizationScheme(targets=targets, weights=args, format="pack-quantized")
    return QuantizationConfig(
        config_groups=dict(sorted(groups.items())),
        format="mixed-precision" if by_row else "pack-quantized",
        ignore=[PATTERNS[part] for part in PARTS if settings.bits_of(part) is None],
    )


def bytes_by_module(model: Any, settings: QuantizeSettings, storage_dtype: Dtype) -> dict[str, int]:
    """Bytes of each module's own tensors as `save_packed` would store them, by name. `model` may be on the meta device.

    Their sum is what the safetensors files hold beside their headers. A part's bytes are the sum over its modules (`fine_part_of`), a
    layer's over those whose names begin with its own; those at another number of bits come from other `settings`.
    """
    bits_of, float_bytes = modules_to_pack(model, settings), DTYPES[storage_dtype].itemsize
    bytes_of: dict[str, int] = defaultdict(int)
    tensors = model.state_dict(keep_vars=True)
    for key, tensor in {id(tensor): (key, tensor) for key, tensor in tensors.items()}.values():  # tied ones once
        name, _, kind = key.rpartition(".")
        if kind == "weight" and name in bits_of:
            (rows, width), number = tensor.shape, bits_of[name]
            by_row = has_row_scales(fine_part_of(name) or "", number)
            scales = rows * (1 if by_row else width // settings.group_size)
            bytes_of[name] += rows * width * number // 8 + scales * float_bytes + (0 if by_row else SHAPE_BYTES)
        else:
            bytes_of[name] += tensor.numel() * (float_bytes if tensor.is_floating_point() else tensor.element_size())
    return dict(bytes_of)


def has_row_scales(part: str, num_bits: int) -> bool:
    """Whether a part, of those that a recipe's `quantize.bits` can name, has one scale a row instead of one a group of inputs."""
    return num_bits == 8 and part in ROW_PARTS


def modules_to_pack(model: Any, settings: QuantizeSettings) -> dict[str, int]:
    """Names of the modules to be packed, with their number of bits; PackingError when `group_size` or `bits` does not fit."""
    bits, missing = {}, {*settings.bits}
    for name, module in model.named_modules():
        part = fine_part_of(name)
        if part is None or not (isinstance(module, nn.Linear) or name == EMBEDDINGS):
            continue
        missing.discard(part)
        if number := settings.bits_of(part):
            bits[name] = number
            width = module.weight.shape[1]
            if not has_row_scales(part, number) and width % settings.group_size:
                raise PackingError(
                    f"quantize.group_size is {settings.group_size}, but {name} has {width} input weights, which it does not divide; "
                    "choose 32, 64 or 128 so that it does"
                )
    if missing:
        raise PackingError(f"quantize.bits names {sorted(missing)[0]}, which this model does not have")
    return bits


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
        _store(module, rounded, scale.to(module.weight))


def _store(module: Any, rounded: Tensor, scale: Tensor) -> None:
    """Give a module the tensors that it is saved as: the integers that its `rounded` weights (out, in) are of its `scale` (out, G).

    The library would find the integers again by dividing in the weights' dtype: in bfloat16 0.7 % of 8-bit ones, in groups of 128, are
    then off by one.
    """
    from compressed_tensors.compressors.pack_quantized import pack_to_int32
    from compressed_tensors.quantization import QuantizationStatus
    from compressed_tensors.utils import get_direct_state_dict, replace_direct_state_dict

    scheme, step = module.quantization_scheme, max(1, CHUNK // rounded.shape[1])
    integers = [
        nearest_integers(rows, scale[start : start + step], scheme.weights.num_bits).to(torch.int8)
        for start, rows in zip(range(0, len(rounded), step), rounded.split(step))
    ]
    others = {key: value for key, value in get_direct_state_dict(module).items() if not key.startswith("weight")}
    stored = others | {"weight_scale": scale}
    if scheme.format == "naive-quantized":
        stored["weight"] = torch.cat(integers)
    else:
        stored["weight_packed"] = torch.cat([pack_to_int32(rows, scheme.weights.num_bits) for rows in integers])
        stored["weight_shape"] = torch.tensor(rounded.shape)
    replace_direct_state_dict(module, stored)
    module.quantization_status = QuantizationStatus.COMPRESSED


def round_to_integers(weight: Tensor, num_bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Scales (out, in / group_size) and the weights (out, in) they stand for, in `weight`'s dtype.

    The integers are -2^(b-1) .. 2^(b-1) - 1 with b bits; the scale is the one with the least squared error of those tried. It may be
    negative, so that the largest weight of a group can stand on the lowest integer whatever its sign.
    """
    scales, values = weight.new_empty((len(weight), weight.shape[1] // group_size)), torch.empty_like(weight)
    step = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = weight[start : start + step]
        scale = best_scale(rows.float().reshape(-1, group_size), num_bits, weight.dtype).reshape(len(rows), -1)
        scales[start : start + step] = scale
        values[start : start + step] = on_steps(rows, scale, num_bits)
    return scales, values


def nearest_integers(weight: Tensor, scales: Tensor, num_bits: int) -> Tensor:
    """The integers (..., in), float32, whose products with the scales (..., G) of their groups are nearest to `weight` (..., in)."""
    limit = 2 ** (num_bits - 1)
    groups = weight.float().unflatten(-1, (scales.shape[-1], -1))
    return (groups / scales.float()[..., None]).round_().clamp_(-limit, limit - 1).flatten(-2)


def on_steps(weight: Tensor, scales: Tensor, num_bits: int) -> Tensor:
    """The weights (..., in), each on the nearest of the 2^num_bits steps of its group's scale (..., G); in `weight`'s dtype."""
    integers = nearest_integers(weight, scales, num_bits).unflatten(-1, (scales.shape[-1], -1))
    return (integers * scales.float()[..., None]).flatten(-2).to(weight.dtype)


def best_scale(groups: Tensor, num_bits: int, dtype: torch.dtype) -> Tensor:
    """The scale (G, 1) with the least squared error for each row of `groups` (G, group_size), as it is stored in `dtype`; float32."""
    limit = 2 ** (num_bits - 1)
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    best, least = _stored(-largest / limit, dtype), torch.full_like(largest, float("inf"))
    for clipping in CLIPPINGS:
        for sign in (-1, 1):
            tried = _stored(sign * clipping * largest / limit, dtype)
            integers = (groups / tried).round().clamp(-limit, limit - 1)
            # the least-squares scale for these integers, then the integers for that scale
            scale = _stored((groups * integers).sum(1, keepdim=True) / integers.square().sum(1, keepdim=True), dtype)
            error = (groups - (groups / scale).round().clamp(-limit, limit - 1) * scale).square().sum(1, keepdim=True)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
    return best


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as it will be read from disk, float32; 1 for a group of zeros."""
    scale = scale.to(dtype).float()
    return torch.where((scale == 0) | ~scale.isfinite(), 1.0, scale)
