"""Attention of the decoder on a GPU: flash attention over rows of unlike length, one token a row, and two parts put together.

`attend_one` and the second half of `join` are Triton kernels.

Shapes: B rows, N tokens, M queries, H heads, K key-value heads, E head size, S slots.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trimlingual.decoding.slots import Slots
from trimlingual.models.kernels import usable

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of PyTorch come without it
    triton = None

ENOUGH_PROGRAMS = 2048  # of `attend_one` to keep a GPU busy; fewer are larger


def attention_of_one(
    query: Tensor, keys: Tensor, values: Tensor, start: Tensor, used: Tensor, slots: Slots
) -> tuple[Tensor, Tensor]:
    """Attention (B, H, E) of one token a row over `used` (B,) slots from `start` (B + 1,) on, and its log-sum-exps (H, B)."""
    if usable(query):
        return attend_one(query, keys, values, start, used)
    each = slots.each[: len(query) + 1]
    return flash_attention(query, keys, values, each, start, 1, slots.width, causal=False, used=used)


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, offsets_q: Tensor, offsets_k: Tensor, max_q: int, max_k: int, *,
    causal: bool, used: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Flash attention (Dao 2023) of M queries (M, H, E) over rows of unlike length, and its log-sum-exps (H, M).

    `used` (B,) limits the keys of each row. The operator itself, because the public `varlen_attn` has no `used` before PyTorch 2.13.
    """
    operator = torch.ops.aten._flash_attention_forward
    mixed, sums, *_ = operator(
        query, key, value, offsets_q, offsets_k, max_q, max_k, 0.0, causal, False, seqused_k=used
    )
    return mixed, sums


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


if triton is not None:
    # What is given here are views into longer tensors, aligned in one layer and not in the next: one program does for all.
    _attend_one, _join = (
        triton.jit(kernel, do_not_specialize=["rows"], do_not_specialize_on_alignment=views)
        for kernel, views in ((_attend_one_kernel, ["start", "used"]), (_join_kernel, ["place"]))
    )
