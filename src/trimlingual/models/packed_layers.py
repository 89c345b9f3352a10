"""Layers that compute on packed integers: 4-bit linear layers, 8-bit output heads and embedding tables.

A weight is an integer times the scale of its group. 4-bit integers stand eight to a word, 8 added to each, the first in the lowest
bits, as compressed-tensors writes them. Each class of linear layers is a way to compute; `linear_of` picks one.

Shapes: N outputs, K inputs, G groups of inputs that share a scale, T tokens, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
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
TILE_ROWS = {"cpu": 64, "cuda": 8}  # rows whose integers PyTorch's layouts keep together


class PackedLinear(nn.Module):
    """A linear layer that unpacks its 4-bit weights whenever it is called, and so runs in every dtype and on every device."""

    kernel: ClassVar[str] = "unpacked layer by layer"
    words: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, words: Tensor, scale: Tensor, bias: Tensor | None):
        """`words` (N, K / 8) int32, `scale` (N, G) and `bias` (N,) in the dtype of the computation."""
        super().__init__()
        self.out_features, self.in_features = len(words), words.shape[1] * 8
        self.group_size = self.in_features // scale.shape[1]
        self.register_buffer("bias", bias)
        self.pack(words, scale)

    def pack(self, words: Tensor, scale: Tensor) -> None:
        """Keep the weights in the layout that `product` reads."""
        self.register_buffer("words", words)
        self.register_buffer("scale", scale)

    def integers(self) -> Tensor:
        """The weights' integers (N, K), uint8, with 8 added."""
        return integers_of(self.words)

    def scales(self) -> Tensor:
        """The weights' scales (N, G)."""
        return self.scale

    def unpacked(self) -> Tensor:
        """The weights (N, K)."""
        scale = self.scales()
        weight = self.integers().to(scale.dtype).sub_(8).view(self.out_features, -1, self.group_size)
        return weight.mul_(scale[..., None]).view(self.out_features, self.in_features)

    def product(self, tokens: Tensor) -> Tensor:
        """The outputs (T, N) of `tokens` (T, K)."""
        return linear(tokens, self.unpacked(), self.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., K) to (..., N)."""
        return self.product(inputs.reshape(-1, self.in_features)).view(*inputs.shape[:-1], self.out_features)

    @property
    def num_weights(self) -> int:
        """Logical weights, with the bias."""
        return self.out_features * (self.in_features + (self.bias is not None))


class TorchLinear(PackedLinear):
    """PyTorch's int4 kernels: 16 bits on a CPU, bfloat16 on a GPU. More than a few tokens are faster with unpacked weights."""

    kernel = "PyTorch's int4 kernel"
    scale_and_zero: Tensor

    @staticmethod
    def fits(words: Tensor, scale: Tensor) -> bool:
        """Whether the kernel takes weights of this shape and device in the scales' dtype."""
        rows, width = len(words), words.shape[1] * 8
        if words.device.type == "cpu":
            return no_slower_packed(words.device, scale.dtype) and rows % TILE_ROWS["cpu"] == 0
        return words.device.type == "cuda" and scale.dtype == torch.bfloat16 and rows % 8 == 0 and width % 128 == 0

    def pack(self, words: Tensor, scale: Tensor) -> None:
        """The words as the kernel wants them, and each scale beside the zero point 0: (G, N, 2)."""
        self.register_buffer("words", _torch_layout(integers_of(words)))
        self.register_buffer("scale_and_zero", torch.stack([scale.T, torch.zeros_like(scale.T)], -1).contiguous())

    def integers(self) -> Tensor:
        """Read back tile by tile."""
        order = _torch_order(self.words.device, self.in_features)
        return _stream(self.words).view(-1, len(order))[:, order].view(self.out_features, self.in_features)

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


class EightBitEmbedding(nn.Module):
    """An embedding table of 8-bit integers with one scale a row."""

    integers: Tensor
    scale: Tensor

    def __init__(self, integers: Tensor, scale: Tensor):
        """`integers` (V, D) int8, `scale` (V, 1) in the dtype of the computation."""
        super().__init__()
        self.register_buffer("integers", integers)
        self.register_buffer("scale", scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (...) to embeddings (..., D)."""
        return self.integers[tokens].to(self.scale.dtype) * self.scale[tokens]

    @property
    def num_weights(self) -> int:
        """Logical weights."""
        return self.integers.numel()


def no_slower_packed(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model whose weights stay packed is no slower than one that is unpacked once.

    In float32 it never stays packed: transformers 5.17 rounds unpacked weights to the scales' dtype, and what is scored is to be what
    ships.
    """
    if dtype == torch.float32:
        return False
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability() in VECTORISED


def linear_of(words: Tensor, scale: Tensor, bias: Tensor | None) -> nn.Module:
    """The fastest linear layer on `words` (N, K / 8) and `scale` (N, G) that is installed and fits."""
    if humming_layers.fits(len(words), words.shape[1] * 8, scale):
        return humming_layers.HummingLinear(words, scale, bias, 4)
    return (TorchLinear if TorchLinear.fits(words, scale) else PackedLinear)(words, scale, bias)


def head_of(integers: Tensor, scale: Tensor) -> nn.Module:
    """The fastest output head on `integers` (V, D) int8, which are used up, and `scale` (V, 1)."""
    if humming_layers.fits(len(integers), integers.shape[1], scale):
        words = integers.view(torch.uint8).bitwise_xor_(128).view(torch.int32)  # 128 added to each
        return humming_layers.HummingLinear(words, scale, None, 8)
    return EightBitLinear(integers, scale)


def integers_of(words: Tensor) -> Tensor:
    """Integers (N, K), uint8, of words (N, K / 8)."""
    return _stream(words).view(len(words), -1)


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
