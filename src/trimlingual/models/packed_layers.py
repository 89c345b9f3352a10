"""Layers that compute on packed integers: linear layers, output heads and embedding tables of 1 to 8 bits.

A weight is an integer times the scale of its group. Integers of b bits stand in words of 32 without a gap, 2^(b-1) added to each, the
first in the lowest bits, as compressed-tensors writes them. Each class of linear layers is a way to compute; `linear_of` picks one.
Layers that are given the same inputs may be `Part`s of one.

Shapes: N outputs, K inputs, G groups of inputs that share a scale, W = K b / 32 words, T tokens, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import lcm
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from trimlingual.models import humming_layers

HEAD_ROWS = 16_384  # of an output head are unpacked at once: 134 MB at a width of 4096
# For more tokens than these PyTorch's kernels are slower than unpacking first: measured on a CPU with AVX-512; for a GPU reckoned from
# the kernel's time (22 ms for 24 layers of a 7B model and 64 tokens on an H100) and the bytes that unpacking moves.
KERNEL_TOKENS = {"cpu": 256, "cuda": 64}
VECTORISED = ("AVX2", "AVX512")  # elsewhere PyTorch's kernel for CPUs goes weight by weight, as it does in float32
TORCH_GROUPS = (32, 64, 128, 256)  # weights that share a scale, for PyTorch's kernels
TILE_ROWS = {"cpu": 64, "cuda": 8}  # rows whose integers PyTorch's layouts keep together
ALL = slice(None)


class PackedLinear(nn.Module):
    """A linear layer that unpacks its weights whenever it is called, and so runs in every dtype and on every device."""

    kernel: ClassVar[str] = "unpacked layer by layer"
    words: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, words: Tensor, scale: Tensor, bias: Tensor | None, num_bits: int):
        """`words` (N, W) int32, `scale` (N, G) and `bias` (N,) in the dtype of the computation."""
        super().__init__()
        self.out_features, self.in_features, self.num_bits = len(words), words.shape[1] * 32 // num_bits, num_bits
        self.group_size = self.in_features // scale.shape[1]
        self.register_buffer("bias", bias)
        self.pack(words, scale)

    def pack(self, words: Tensor, scale: Tensor) -> None:
        """Keep the weights in the layout that `product` reads."""
        self.register_buffer("words", words)
        self.register_buffer("scale", scale)

    def integers(self, rows: slice = ALL) -> Tensor:
        """The weights' integers (N, K), uint8, with half their range added; or some rows of them."""
        return integers_of(self.words[rows], self.num_bits)

    def scales(self) -> Tensor:
        """The weights' scales (N, G)."""
        return self.scale

    def unpacked(self, rows: slice = ALL) -> Tensor:
        """The weights (N, K), or some rows of them."""
        return times_scales(self.integers(rows), self.scales()[rows], self.num_bits)

    def product(self, tokens: Tensor) -> Tensor:
        """The outputs (T, N) of `tokens` (T, K)."""
        if self.out_features <= HEAD_ROWS:
            return linear(tokens, self.unpacked(), self.bias)
        starts = range(0, self.out_features, HEAD_ROWS)
        out = torch.cat([linear(tokens, self.unpacked(slice(start, start + HEAD_ROWS))) for start in starts], -1)
        return out if self.bias is None else out.add_(self.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., K) to (..., N)."""
        return self.product(inputs.reshape(-1, self.in_features)).view(*inputs.shape[:-1], self.out_features)

    @property
    def num_weights(self) -> int:
        """Logical weights, with the bias."""
        return self.out_features * (self.in_features + (self.bias is not None))


class TorchLinear(PackedLinear):
    """PyTorch's kernels for 4 bits: 16 bits on a CPU, bfloat16 on a GPU. More than a few tokens are faster with unpacked weights.

    Integers of 2 and 3 bits are held in 4, which takes more memory and is as fast.
    """

    kernel = "PyTorch's int4 kernel"
    scale_and_zero: Tensor

    @staticmethod
    def fits(words: Tensor, scale: Tensor, num_bits: int) -> bool:
        """Whether the kernel takes weights of this shape and device in the scales' dtype."""
        rows, width = len(words), words.shape[1] * 32 // num_bits
        if num_bits > 4 or width // scale.shape[1] not in TORCH_GROUPS:
            return False
        if words.device.type == "cpu":
            return no_slower_packed(words.device, scale.dtype) and rows % TILE_ROWS["cpu"] == 0
        return words.device.type == "cuda" and scale.dtype == torch.bfloat16 and rows % 8 == 0 and width % 128 == 0

    def pack(self, words: Tensor, scale: Tensor) -> None:
        """The words as the kernel wants them, and each scale beside the zero point 0: (G, N, 2)."""
        integers = integers_of(words, self.num_bits).add_(8 - 2 ** (self.num_bits - 1))
        self.num_bits = 4
        self.register_buffer("words", _torch_layout(integers))
        self.register_buffer("scale_and_zero", torch.stack([scale.T, torch.zeros_like(scale.T)], -1).contiguous())

    def integers(self, rows: slice = ALL) -> Tensor:
        """Read back tile by tile; `rows` begin and end with a tile."""
        order = _torch_order(self.words.device, self.in_features)
        start, stop, _ = rows.indices(self.out_features)
        tile = TILE_ROWS[self.words.device.type]
        tiles = self.words.view(torch.uint8).view(self.out_features // tile, -1)[start // tile : stop // tile]
        return _stream(tiles).view(-1, len(order))[:, order].view(stop - start, self.in_features)

    def scales(self) -> Tensor:
        """(N, G)."""
        return self.scale_and_zero[..., 0].T

    def product(self, tokens: Tensor) -> Tensor:
        """The outputs (T, N) of `tokens` (T, K)."""
        device = tokens.device.type
        if len(tokens) > KERNEL_TOKENS[device]:
            return super().product(tokens)
        name = "_weight_int4pack_mm_for_cpu" if device == "cpu" else "_weight_int4pack_mm"
        kernel = getattr(torch.ops.aten, name)
        out = kernel(tokens.contiguous(), self.words, self.group_size, self.scale_and_zero)
        return out if self.bias is None else out.add_(self.bias)


class Part(nn.Module):
    """One of several layers for the same inputs that are computed as one. `together` does so; asked alone, it computes all."""

    def __init__(self, whole: nn.Module, rows: slice):
        """`rows` are its outputs among those of `whole`."""
        super().__init__()
        self.whole, self.rows = whole, rows

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., K) to (..., N)."""
        return self.whole(inputs)[..., self.rows]


def together(inputs: Tensor, *layers: nn.Module) -> list[Tensor]:
    """The outputs (..., N) of each layer for the same inputs (..., K): of one product, where they are parts of one."""
    parts = [layer for layer in layers if isinstance(layer, Part)]
    if len(parts) < len(layers) or len({part.whole for part in parts}) > 1:
        return [layer(inputs) for layer in layers]
    outputs = parts[0].whole(inputs)
    return [outputs[..., part.rows] for part in parts]


class EightBitLinear(nn.Module):
    """An output head on 8-bit integers with one scale a row."""

    kernel: ClassVar[str] = "unpacked in parts"
    integers: Tensor
    scale: Tensor

    def __init__(self, integers: Tensor, scale: Tensor):
        """`integers` (V, D) int8, `scale` (V, 1) in the dtype of the computation."""
        super().__init__()
        self.out_features, self.in_features = integers.shape
        self.register_buffer("integers", integers)
        self.register_buffer("scale", scale[:, 0].contiguous())

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., D) to (..., V)."""
        tokens = inputs.reshape(-1, self.in_features)
        out = torch.cat(list(self._parts(tokens)), -1).mul_(self.scale)
        return out.view(*inputs.shape[:-1], self.out_features)

    def _parts(self, tokens: Tensor) -> Iterator[Tensor]:
        for rows in self.integers.split(HEAD_ROWS):
            yield linear(tokens, rows.to(tokens.dtype))  # -128 to 127 are exact in every dtype

    @property
    def num_weights(self) -> int:
        """Logical weights."""
        return self.out_features * self.in_features


class PackedEmbedding(nn.Module):
    """An embedding table that looks rows up packed and unpacks only those."""

    words: Tensor
    scale: Tensor

    def __init__(self, words: Tensor, scale: Tensor, num_bits: int):
        """`words` (V, W) int32, `scale` (V, G) in the dtype of the computation."""
        super().__init__()
        self.num_embeddings, self.num_bits = len(words), num_bits
        self.register_buffer("words", words)
        self.register_buffer("scale", scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (...) to embeddings (..., D)."""
        ids = tokens.flatten()
        rows = times_scales(integers_of(self.words[ids], self.num_bits), self.scale[ids], self.num_bits)
        return rows.view(*tokens.shape, -1)

    @property
    def num_weights(self) -> int:
        """Logical weights."""
        return self.words.numel() * 32 // self.num_bits


def no_slower_packed(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model whose weights stay packed is no slower than one that is unpacked once.

    In float32 it never stays packed: transformers 5.17 rounds unpacked weights to the scales' dtype, and what is scored is to be what
    ships.
    """
    if dtype == torch.float32:
        return False
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability() in VECTORISED


def linear_of(words: Tensor, scale: Tensor, bias: Tensor | None, num_bits: int) -> nn.Module:
    """The fastest linear layer on `words` (N, W) and `scale` (N, G) that is installed and fits."""
    if humming_layers.fits(len(words), words.shape[1] * 32 // num_bits, scale):
        return humming_layers.HummingLinear(words, scale, bias, num_bits)
    kind = TorchLinear if TorchLinear.fits(words, scale, num_bits) else PackedLinear
    return kind(words, scale, bias, num_bits)


def head_of(integers: Tensor, scale: Tensor) -> nn.Module:
    """The fastest output head on `integers` (V, D) int8 and `scale` (V, 1)."""
    if humming_layers.fits(len(integers), integers.shape[1], scale):
        return humming_layers.HummingLinear(words_of_bytes(integers), scale, None, 8)
    return EightBitLinear(integers, scale)


def words_of_bytes(integers: Tensor) -> Tensor:
    """Words (N, K / 4) of 8-bit integers (N, K) int8."""
    return integers.view(torch.uint8).bitwise_xor(128).view(torch.int32)  # 128 added to each


def integers_of(words: Tensor, num_bits: int) -> Tensor:
    """Integers (N, K), uint8, of words (N, W)."""
    if num_bits == 8:
        return words.view(torch.uint8)
    num_bytes = lcm(num_bits, 8) // 8  # the fewest that hold whole integers
    parts = words.view(torch.uint8).view(len(words), -1, num_bytes)
    whole = parts[..., 0]
    if num_bytes > 1:
        kind = torch.int32 if num_bytes < 4 else torch.int64  # of 5 and 7 bits
        whole = torch.stack([parts[..., i].to(kind) << 8 * i for i in range(num_bytes)]).sum(0, dtype=kind)
    shifts = torch.arange(0, 8 * num_bytes, num_bits, dtype=whole.dtype, device=words.device)
    return (whole[..., None] >> shifts & 2**num_bits - 1).to(torch.uint8).view(len(words), -1)


def times_scales(integers: Tensor, scale: Tensor, num_bits: int) -> Tensor:
    """The weights (N, K) of integers (N, K) with half their range added, and scales (N, G)."""
    centred = integers.to(scale.dtype).sub_(2 ** (num_bits - 1)).unflatten(1, (scale.shape[1], -1))
    return centred.mul_(scale[..., None]).flatten(1)


def _stream(words: Tensor) -> Tensor:
    """The 4-bit integers of a tensor in the order of its memory, the lower half of a byte first: uint8."""
    packed = words.view(torch.uint8)
    return torch.stack([packed & 15, packed >> 4], -1).flatten()


def _torch_layout(integers: Tensor) -> Tensor:
    """Integers (N, K), uint8, in the layout of PyTorch's kernel for their device."""
    if integers.device.type == "cpu":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers.int(), 1)
    return torch.ops.aten._convert_weight_to_int4pack(integers[:, ::2] << 4 | integers[:, 1::2], 8)


@cache
def _torch_order(device: torch.device, width: int) -> Tensor:
    """Where PyTorch's layout keeps each integer of a tile, (rows * K,): found by giving it the numbers of the places, digit by digit.

    The layout depends on the device and, on a CPU, on its instructions.
    """
    rows = TILE_ROWS[device.type]
    number = torch.arange(rows * width, device=device).view(rows, width)
    digits = [
        _stream(_torch_layout((number >> shift & 15).to(torch.uint8))).long() << shift for shift in range(0, 24, 4)
    ]
    return torch.stack(digits).sum(0).argsort()
