"""Triton kernels for what takes PyTorch several: a decode step of a 7B model has 32 layers to launch them for.

Each function falls back on PyTorch where there is no GPU, or no Triton, or in 32 bits. Products and sums are rounded where PyTorch
rounds them, so Triton may not fuse the two. The attention of a decode step is in decoding/attention.py.

Rows of queries, keys, values and of the MLP's two inner products may be parts of longer rows, as those of a joined product are.

Shapes: N tokens, H heads, K key-value heads, E head size, S slots, D width, F width of the MLP.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of PyTorch come without it
    triton = None

Destination = tuple[Tensor, Tensor, Tensor]  # keys (S, K, E), values (S, K, E), slot of each token (N,)
BLOCK = 2048  # elements of a program that goes element by element


def usable(tensor: Tensor) -> bool:
    """Whether the kernels are for this tensor."""
    return triton is not None and tensor.device.type == "cuda" and tensor.dtype in (torch.bfloat16, torch.float16)


def rotate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rope: tuple[Tensor, Tensor],
    to: Destination | None,
    query_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (Su et al. 2021) in place, and the new keys and values written to their slots.

    Rotated queries (N, H, E) and keys (N, K, E) for cosines and sines (N, E); the given tensors are used up.

    With `query_tokens` (M,) the queries are those of these tokens alone, (M, H, E).
    """
    if usable(query) and query_tokens is None:
        heads, kv_heads, half = query.shape[1], key.shape[1], query.shape[2] // 2
        tile = math.gcd(heads, kv_heads, 8)
        keys, values, slot = to or (key, value, torch.empty(0, dtype=torch.long, device=key.device))
        _rotary[len(query), (heads + 2 * kv_heads) // tile](
            query, key, value, *rope, keys, values, slot, query.stride(0), key.stride(0), value.stride(0),
            H=heads, K=kv_heads, HALF=half, BLOCK=triton.next_power_of_2(half), TILE=tile, WRITE=to is not None,
            num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip
        return query, key
    if query_tokens is None:
        query, key = apply_rotary_pos_emb(query, key, *rope)
    else:
        query, _ = apply_rotary_pos_emb(query, query, rope[0][query_tokens], rope[1][query_tokens])
        key, _ = apply_rotary_pos_emb(key, key, *rope)
    if to is not None:
        keys, values, slot = to
        keys[slot] = key
        values[slot] = value
    return query, key


def rms_norm(norm: Any, hidden: Tensor) -> Tensor:
    """A root-mean-square norm (..., D) of transformers in one kernel, where its own takes six.

    It is rounded where transformers rounds it, before the weight and after: PyTorch's own, which rounds once, gives another number at
    every fourth element in 16 bits, and with it other translations than plain `generate()`.
    """
    if not usable(hidden):
        return norm.weight * nn.functional.rms_norm(hidden, norm.weight.shape, None, norm.variance_epsilon)
    return _normed(norm, hidden.contiguous(), None)


def gated(act: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up, (N, F), one row after the other; `gate` is used up."""
    if not usable(gate) or not isinstance(act, (nn.SiLU, SiLUActivation)):
        return act(gate) * up
    rows, width = gate.shape
    out = gate if gate.is_contiguous() else gate.new_empty(gate.shape)
    _gated[rows, triton.cdiv(width, BLOCK)](
        gate, up, out, gate.stride(0), up.stride(0), width, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False
    )
    return out


def add_norm(hidden: Tensor, update: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """hidden + update (N, D), and its root-mean-square norm; `update` is used up."""
    if not usable(hidden):
        hidden = hidden + update
        return hidden, rms_norm(norm, hidden)
    return update, _normed(norm, hidden, update)


def _normed(norm: Any, hidden: Tensor, update: Tensor | None) -> Tensor:
    """The norm of `hidden` or, with `update`, of their sum, which then stands in `update`."""
    normed, width = torch.empty_like(hidden), hidden.shape[-1]
    block = triton.next_power_of_2(width)
    _norm[(hidden.numel() // width,)](
        hidden, hidden if update is None else update, norm.weight, normed, norm.variance_epsilon,
        D=width, BLOCK=block, ADD=update is not None, num_warps=max(1, min(8, block // 512)), enable_fp_fusion=False,
    )  # fmt: skip
    return normed


def _rotary_kernel(
    query, key, value, cosine, sine, keys, values, slot, query_stride, key_stride, value_stride,
    H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """One program a token and TILE heads: the queries' first, then the keys', then the values'.

    So many parameters because a kernel is given everything one by one.
    """
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * TILE
    head = tl.arange(0, TILE)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    mask = (lane < HALF) & (head < TILE)
    dtype = query.dtype.element_ty
    if first < H + K:
        base = query + token * query_stride + first * 2 * HALF
        if first >= H:
            base = key + token * key_stride + (first - H) * 2 * HALF
        offsets = head * 2 * HALF + lane
        low = tl.load(base + offsets, mask=mask).to(tl.float32)
        high = tl.load(base + offsets + HALF, mask=mask).to(tl.float32)
        angle = token * 2 * HALF + lane  # the two halves have the same angles
        cosine_of = tl.load(cosine + angle, mask=lane < HALF).to(tl.float32)
        sine_of = tl.load(sine + angle, mask=lane < HALF).to(tl.float32)
        new_low = ((low * cosine_of).to(dtype).to(tl.float32) - (high * sine_of).to(dtype).to(tl.float32)).to(dtype)
        new_high = ((high * cosine_of).to(dtype).to(tl.float32) + (low * sine_of).to(dtype).to(tl.float32)).to(dtype)
        tl.store(base + offsets, new_low, mask=mask)
        tl.store(base + offsets + HALF, new_high, mask=mask)
        if WRITE and first >= H:
            place = keys + (tl.load(slot + token) * K + first - H) * 2 * HALF
            tl.store(place + offsets, new_low, mask=mask)
            tl.store(place + offsets + HALF, new_high, mask=mask)
    elif WRITE:
        offsets = head * 2 * HALF + lane
        source = value + token * value_stride + (first - H - K) * 2 * HALF
        place = values + (tl.load(slot + token) * K + first - H - K) * 2 * HALF
        tl.store(place + offsets, tl.load(source + offsets, mask=mask), mask=mask)
        tl.store(place + offsets + HALF, tl.load(source + offsets + HALF, mask=mask), mask=mask)


def _gated_kernel(gate, up, out, gate_stride, up_stride, width, BLOCK: tl.constexpr):
    """One program BLOCK elements of a row; both results are rounded."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype = gate.dtype.element_ty
    x = tl.load(gate + row * gate_stride + lane, mask=lane < width).to(tl.float32)
    act = (x / (1 + tl.exp(-x))).to(dtype).to(tl.float32)
    factor = tl.load(up + row * up_stride + lane, mask=lane < width).to(tl.float32)
    tl.store(out + row * width + lane, (act * factor).to(dtype), mask=lane < width)


def _norm_kernel(
    hidden, update, weight, normed, epsilon, D: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    """One program a row; with ADD of the sum, which is rounded before it is normed, and stands where `update` was."""
    row = tl.program_id(0).to(tl.int64) * D
    lane = tl.arange(0, BLOCK)
    dtype = hidden.dtype.element_ty
    x = tl.load(hidden + row + lane, mask=lane < D, other=0).to(tl.float32)
    if ADD:
        total = (x + tl.load(update + row + lane, mask=lane < D, other=0).to(tl.float32)).to(dtype)
        tl.store(update + row + lane, total, mask=lane < D)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / D + epsilon)
    scaled = (x * scale).to(dtype).to(tl.float32) * tl.load(weight + lane, mask=lane < D, other=0).to(tl.float32)
    tl.store(normed + row + lane, scaled.to(dtype), mask=lane < D)


if triton is not None:
    _rotary, _gated, _norm = (triton.jit(kernel) for kernel in (_rotary_kernel, _gated_kernel, _norm_kernel))
