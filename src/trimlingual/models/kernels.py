"""Triton kernels for what takes PyTorch several: a decode step of a 7B model has 32 layers to launch them for.

Each function falls back on PyTorch where there is no GPU, or no Triton, or in 32 bits. Products and sums are rounded where PyTorch
rounds them, so Triton may not fuse the two. The attention of a decode step is in decoding/attention.py.

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
    wanted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (Su et al. 2021) in place, and the new keys and values written to their slots.

    Rotated queries (N, H, E) and keys (N, K, E) for cosines and sines (N, E); the given tensors are used up.

    With `wanted` (M,) the queries are those of these tokens alone, (M, H, E).
    """
    if usable(query) and wanted is None:
        heads, kv_heads, half = query.shape[1], key.shape[1], query.shape[2] // 2
        tile = math.gcd(heads, kv_heads, 8)
        keys, values, slot = to or (key, value, torch.empty(0, dtype=torch.long, device=key.device))
        _rotary[len(query), (heads + 2 * kv_heads) // tile](
            query, key, value, *rope, keys, values, slot,
            H=heads, K=kv_heads, HALF=half, BLOCK=triton.next_power_of_2(half), TILE=tile, WRITE=to is not None,
            num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip
        return query, key
    if wanted is None:
        query, key = apply_rotary_pos_emb(query, key, *rope)
    else:
        query, _ = apply_rotary_pos_emb(query, query, rope[0][wanted], rope[1][wanted])
        key, _ = apply_rotary_pos_emb(key, key, *rope)
    if to is not None:
        keys, values, slot = to
        keys[slot] = key
        values[slot] = value
    return query, key


def rms_norm(norm: Any, hidden: Tensor) -> Tensor:
    """A root-mean-square norm (..., D) of transformers in one kernel, where its own takes six."""
    return nn.functional.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def gated(act: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up, (N, F); `gate` is used up."""
    if not usable(gate) or not isinstance(act, (nn.SiLU, SiLUActivation)):
        return act(gate) * up
    count = gate.numel()
    _gated[(triton.cdiv(count, BLOCK),)](gate, up, count, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False)
    return gate


def add_norm(hidden: Tensor, more: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """hidden + more (N, D), and its root-mean-square norm; `more` is used up."""
    weight, epsilon = norm.weight, norm.variance_epsilon
    if not usable(hidden):
        hidden = hidden + more
        return hidden, rms_norm(norm, hidden)
    rows, width = hidden.shape
    normed = torch.empty_like(hidden)
    block = triton.next_power_of_2(width)
    _add_norm[(rows,)](
        hidden, more, weight, normed, epsilon, D=width, BLOCK=block, num_warps=max(1, min(8, block // 512)), enable_fp_fusion=False
    )  # fmt: skip
    return more, normed


def _rotary_kernel(
    query, key, value, cosine, sine, keys, values, slot,
    H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """One program a token and TILE heads: the queries' first, then the keys', then the values'.

    So many parameters because a kernel is given everything one by one.
    """
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * TILE
    head = tl.arange(0, TILE)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    there = (lane < HALF) & (head < TILE)
    kind = query.dtype.element_ty
    if first < H + K:
        base = query + (token * H + first) * 2 * HALF if first < H else key + (token * K + first - H) * 2 * HALF
        at = head * 2 * HALF + lane
        low = tl.load(base + at, mask=there).to(tl.float32)
        high = tl.load(base + at + HALF, mask=there).to(tl.float32)
        angle = token * 2 * HALF + lane  # the two halves have the same angles
        cosine_of = tl.load(cosine + angle, mask=lane < HALF).to(tl.float32)
        sine_of = tl.load(sine + angle, mask=lane < HALF).to(tl.float32)
        new_low = ((low * cosine_of).to(kind).to(tl.float32) - (high * sine_of).to(kind).to(tl.float32)).to(kind)
        new_high = ((high * cosine_of).to(kind).to(tl.float32) + (low * sine_of).to(kind).to(tl.float32)).to(kind)
        tl.store(base + at, new_low, mask=there)
        tl.store(base + at + HALF, new_high, mask=there)
        if WRITE and first >= H:
            place = keys + (tl.load(slot + token) * K + first - H) * 2 * HALF
            tl.store(place + at, new_low, mask=there)
            tl.store(place + at + HALF, new_high, mask=there)
    elif WRITE:
        at = head * 2 * HALF + lane
        source = value + (token * K + first - H - K) * 2 * HALF
        place = values + (tl.load(slot + token) * K + first - H - K) * 2 * HALF
        tl.store(place + at, tl.load(source + at, mask=there), mask=there)
        tl.store(place + at + HALF, tl.load(source + at + HALF, mask=there), mask=there)


def _gated_kernel(gate, up, count, BLOCK: tl.constexpr):
    """One program BLOCK elements; both results are rounded."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kind = gate.dtype.element_ty
    x = tl.load(gate + at, mask=at < count).to(tl.float32)
    act = (x / (1 + tl.exp(-x))).to(kind).to(tl.float32)
    tl.store(gate + at, (act * tl.load(up + at, mask=at < count).to(tl.float32)).to(kind), mask=at < count)


def _add_norm_kernel(hidden, more, weight, normed, epsilon, D: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row; the sum is rounded before it is normed, and stands where `more` was."""
    row = tl.program_id(0).to(tl.int64) * D
    lane = tl.arange(0, BLOCK)
    kind = hidden.dtype.element_ty
    x = tl.load(hidden + row + lane, mask=lane < D, other=0).to(tl.float32)
    x = (x + tl.load(more + row + lane, mask=lane < D, other=0).to(tl.float32)).to(kind)
    tl.store(more + row + lane, x, mask=lane < D)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / D + epsilon)
    scaled = x * scale * tl.load(weight + lane, mask=lane < D, other=0).to(tl.float32)
    tl.store(normed + row + lane, scaled.to(kind), mask=lane < D)


if triton is not None:
    _rotary, _gated, _add_norm = (triton.jit(kernel) for kernel in (_rotary_kernel, _gated_kernel, _add_norm_kernel))
