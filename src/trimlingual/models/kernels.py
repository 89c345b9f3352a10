"""Triton kernels for what takes PyTorch several: a decode step of a 7B model has 32 layers to launch them for.

Each function but `attend_one` falls back on PyTorch where there is no GPU, or no Triton, or in 32 bits. Products and sums are rounded
where PyTorch rounds them, so Triton may not fuse the two.

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
ENOUGH_PROGRAMS = 2048  # of `attend_one` to keep a GPU busy; fewer are larger


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


def join(own: Tensor, own_sums: Tensor, shared: Tensor, shared_sums: Tensor, place: Tensor) -> Tensor:
    """Attention over two sets of keys from that over each, (N, H, E), and its log-sum-exps (H, N); `own` is overwritten.

    Row n stands at `place[n]` of the shared ones; at -1 it has only its own.
    """
    if not usable(own):
        there = place.clamp(min=0).long()
        weight = torch.sigmoid(own_sums - shared_sums[:, there]).T[..., None]
        mixed = weight * own.float() + (1 - weight) * shared[there].float()
        return torch.where(place[:, None, None] < 0, own, mixed.to(own.dtype))
    rows, heads, size = own.shape
    tile = math.gcd(heads, 8)
    _join[rows, heads // tile](
        own, own_sums, shared, shared_sums, place, rows,
        H=heads, E=size, BLOCK=triton.next_power_of_2(size), TILE=tile, num_warps=2,
    )  # fmt: skip
    return own


def attend_one(query: Tensor, keys: Tensor, values: Tensor, start: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Attention (N, H, E) of one token a row over the first `used` (N,) of the slots from `start` on, and its log-sum-exps (H, N).

    Flash attention's kernel works with tiles of many queries, of which one would be real. This one reads and adds, at the speed of
    memory. Only where `usable`.
    """
    rows, heads, size = query.shape
    mixed, sums = torch.empty_like(query), torch.empty((heads, rows), dtype=torch.float32, device=query.device)
    block, warps = (32, 2) if rows * heads >= ENOUGH_PROGRAMS else (64, 4)
    _attend_one[heads, rows](
        query, keys, values, start, used, mixed, sums, size**-0.5, rows,
        H=heads, K=keys.shape[1], E=size, BLOCK_E=triton.next_power_of_2(size), BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return mixed, sums


def gated(act: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up, (N, F); `gate` is used up."""
    if not usable(gate) or not isinstance(act, (nn.SiLU, SiLUActivation)):
        return act(gate) * up
    count = gate.numel()
    _gated[(triton.cdiv(count, BLOCK),)](gate, up, count, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False)
    return gate


def add_norm(hidden: Tensor, more: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """hidden + more (N, D), and its Qwen2RMSNorm; `more` is used up."""
    weight, epsilon = norm.weight, norm.variance_epsilon
    if not usable(hidden):
        hidden = hidden + more
        return hidden, nn.functional.rms_norm(hidden, weight.shape, weight, epsilon)
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


def _join_kernel(
    own, own_sums, shared, shared_sums, place, rows,
    H: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program a row and TILE heads."""
    row = tl.program_id(0)
    there = tl.load(place + row)
    if there >= 0:
        head = tl.program_id(1) * TILE + tl.arange(0, TILE)
        lane = tl.arange(0, BLOCK)
        weight = tl.sigmoid(tl.load(own_sums + head * rows + row) - tl.load(shared_sums + head * rows + there))[:, None]
        at = head[:, None] * E + lane[None, :]
        inside = (lane < E)[None, :] & (head < H)[:, None]
        mixed = weight * tl.load(own + row * H * E + at, mask=inside).to(tl.float32)
        mixed += (1 - weight) * tl.load(shared + there * H * E + at, mask=inside).to(tl.float32)
        tl.store(own + row * H * E + at, mixed.to(own.dtype.element_ty), mask=inside)


def _attend_one_kernel(
    query, keys, values, start, used, mixed, sums, scale, rows,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a head and row, BLOCK slots at a time; each of the BLOCK has a softmax of its own until the end."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    lane, step = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK)
    own = (row * H + head) * E + lane
    asked = tl.load(query + own, mask=lane < E, other=0).to(tl.float32) * scale
    count = tl.load(used + row)
    at = ((tl.load(start + row).to(tl.int64) + step) * K + head // (H // K))[:, None] * E + lane[None, :]
    highest = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sum_of_values = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    for first in range(0, count, BLOCK):
        there = first + step < count
        inside = there[:, None] & (lane < E)[None, :]
        key = tl.load(keys + at, mask=inside, other=0).to(tl.float32)
        value = tl.load(values + at, mask=inside, other=0).to(tl.float32)
        score = tl.where(there, tl.sum(key * asked[None, :], 1), -1e30)
        higher = tl.maximum(highest, score)
        weight = tl.where(there, tl.exp(score - higher), 0)
        before = tl.exp(highest - higher)
        total = total * before + weight
        sum_of_values = sum_of_values * before[:, None] + weight[:, None] * value
        highest = higher
        at += BLOCK * K * E
    top = tl.max(highest, 0)
    share = tl.exp(highest - top)
    whole = tl.sum(total * share, 0)
    result = tl.sum(sum_of_values * share[:, None], 0) / whole
    tl.store(mixed + own, result.to(mixed.dtype.element_ty), mask=lane < E)
    tl.store(sums + head * rows + row, top + tl.log(whole))


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
    # What is given here are views into longer tensors, aligned in one layer and not in the next: one program does for all.
    _attend_one, _join = (
        triton.jit(kernel, do_not_specialize=["rows"], do_not_specialize_on_alignment=views)
        for kernel, views in ((_attend_one_kernel, ["start", "used"]), (_join_kernel, ["place"]))
    )
