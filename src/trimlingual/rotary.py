"""Rotary position embedding (Su et al. 2021) of queries and keys in place, and the new keys and values written to their slots.

In 16 bits on a GPU it is one Triton kernel, because PyTorch takes more than ten and a decode step of a 7B model has 32 layers to
launch them for. Each product and the sum are rounded as in transformers' `apply_rotary_pos_emb`, so the results are the same bits.

Shapes: N tokens, H heads, K key-value heads, E head size, S slots.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of PyTorch come without it
    triton = None

Destination = tuple[Tensor, Tensor, Tensor]  # keys (S, K, E), values (S, K, E), slot of each token (N,)


def rotate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rope: tuple[Tensor, Tensor],
    to: Destination | None,
    wanted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotated queries (N, H, E) and keys (N, K, E) for cosines and sines (N, E); the given tensors are used up.

    With `wanted` (M,) the queries are those of these tokens alone, (M, H, E).
    """
    if triton is not None and query.device.type == "cuda" and query.dtype != torch.float32 and wanted is None:
        heads, kv_heads, half = query.shape[1], key.shape[1], query.shape[2] // 2
        tile = math.gcd(heads, kv_heads, 8)
        keys, values, slot = to or (key, value, torch.empty(0, dtype=torch.long, device=key.device))
        _kernel[len(query), (heads + 2 * kv_heads) // tile](
            query, key, value, *rope, keys, values, slot,
            H=heads, K=kv_heads, HALF=half, BLOCK=triton.next_power_of_2(half), TILE=tile, WRITE=to is not None,
            num_warps=2, enable_fp_fusion=False,  # fused, a product would not be rounded before the sum
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


def _rotary_kernel(
    query, key, value, cosine, sine, keys, values, slot,
    H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """One program a token and TILE heads: the queries' first, then the keys', then the values'."""
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


if triton is not None:
    _kernel = triton.jit(_rotary_kernel)
