"""Attention of the decoder on a GPU: over rows of unlike length, for one query per row, and joined from two parts.

`attend_one` and `join` are Triton kernels. Where Triton cannot run, flash attention and PyTorch do the same work.

Shapes: B rows, N queries, H heads, K key-value heads, E head size, S slots, P shared queries. On a GPU a decoding step has one
query per entry; wherever this file says row, it is the row that the entry stands for. Row, slot, entry and place: see
decoding/__init__.py.
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

ENOUGH_PROGRAMS = (
    2048  # with this many programs `attend_one` keeps a GPU busy; with fewer, each takes more slots at a time
)


def attention_of_one(
    query: Tensor, keys: Tensor, values: Tensor, start: Tensor, used: Tensor, slots: Slots
) -> tuple[Tensor, Tensor]:
    """Attention of one query per row: (B, H, E), and the log-sum-exp of its scores (H, B).

    `query` is (B, H, E), `keys` and `values` are (S, K, E). Row b reads `used[b]` slots, the first of which is `start[b]`. `start`
    is (B + 1,).
    """
    if usable(query):
        return attend_one(query, keys, values, start, used)
    query_offsets = slots.one_query_per_row[: len(query) + 1]
    return flash_attention(query, keys, values, query_offsets, start, 1, slots.width, causal=False, used=used)


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, offsets_q: Tensor, offsets_k: Tensor, max_q: int, max_k: int, *,
    causal: bool, used: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Flash attention (Dao 2023) over rows of unlike length: (N, H, E), and the log-sum-exp of each query's scores (H, N).

    `query` is (N, H, E). Row b has the queries from `offsets_q[b]` and the keys from `offsets_k[b]` on, up to those of row b + 1;
    at most `max_q` and `max_k`. With `used` (B,) row b reads only its first `used[b]` keys.

    This calls PyTorch's operator, because the public `varlen_attn` has no `used` before PyTorch 2.13.
    So many parameters because the operator has them.
    """
    operator = torch.ops.aten._flash_attention_forward
    mixed, log_sums, *_ = operator(
        query, key, value, offsets_q, offsets_k, max_q, max_k, 0.0, causal, False, seqused_k=used
    )
    return mixed, log_sums


def join(suffix: Tensor, suffix_log_sums: Tensor, prefix: Tensor, prefix_log_sums: Tensor, place: Tensor) -> Tensor:
    """Attention (N, H, E) over all keys of a row, from attention over its prefix and over its suffix.

    `suffix` (N, H, E) is attention over the keys that only this row reads, and is overwritten. `prefix` (P, H, E) is attention over
    the keys that rows share. The log-sum-exps are (H, N) and (H, P). Row n finds its prefix part at `place[n]`; where that is -1,
    the suffix is all that the row has.
    """
    if not usable(suffix):
        prefix_index = place.clamp(min=0).long()
        weight = torch.sigmoid(suffix_log_sums - prefix_log_sums[:, prefix_index]).T[..., None]
        mixed = weight * suffix.float() + (1 - weight) * prefix[prefix_index].float()
        return torch.where(place[:, None, None] < 0, suffix, mixed.to(suffix.dtype))
    rows, heads, size = suffix.shape
    tile = math.gcd(heads, 8)
    _join[rows, heads // tile](
        suffix, suffix_log_sums, prefix, prefix_log_sums, place, rows,
        H=heads, E=size, BLOCK=triton.next_power_of_2(size), TILE=tile, num_warps=2,
    )  # fmt: skip
    return suffix


def attend_one(query: Tensor, keys: Tensor, values: Tensor, start: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """`attention_of_one` as a Triton kernel: (B, H, E) and log-sum-exps (H, B). Call it only where `usable(query)` is true.

    Flash attention's kernel works on tiles of many queries per row, of which only one would be real here. This kernel has no tiles,
    so its time is that of reading the keys and values.
    """
    rows, heads, size = query.shape
    mixed, log_sums = query.new_empty(query.shape), query.new_empty((heads, rows), dtype=torch.float32)
    block, warps = (32, 2) if rows * heads >= ENOUGH_PROGRAMS else (64, 4)
    _attend_one[heads, rows](
        query, keys, values, start, used, mixed, log_sums, size**-0.5, rows, query.stride(0),
        H=heads, K=keys.shape[1], E=size, BLOCK_E=triton.next_power_of_2(size), BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return mixed, log_sums


def _join_kernel(
    suffix, suffix_log_sums, prefix, prefix_log_sums, place, rows,
    H: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`join`, with one program per row and TILE heads. So many parameters because a kernel is given every tensor by itself."""
    row = tl.program_id(0)
    prefix_index = tl.load(place + row)
    if prefix_index >= 0:
        head = tl.program_id(1) * TILE + tl.arange(0, TILE)
        lane = tl.arange(0, BLOCK)
        suffix_log_sum = tl.load(suffix_log_sums + head * rows + row)
        weight = tl.sigmoid(suffix_log_sum - tl.load(prefix_log_sums + head * rows + prefix_index))[:, None]
        offset = head[:, None] * E + lane[None, :]
        inside = (lane < E)[None, :] & (head < H)[:, None]
        mixed = weight * tl.load(suffix + row * H * E + offset, mask=inside).to(tl.float32)
        mixed += (1 - weight) * tl.load(prefix + prefix_index * H * E + offset, mask=inside).to(tl.float32)
        tl.store(suffix + row * H * E + offset, mixed.to(suffix.dtype.element_ty), mask=inside)


def _attend_one_kernel(
    query, keys, values, start, used, mixed, log_sums, scale, rows, query_stride,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`attend_one`, with one program per head and row.

    A program reads BLOCK slots at a time. It keeps BLOCK softmaxes: number i is over the slots i, i + BLOCK, ... of the row. They
    are joined at the end.

    So many parameters because a kernel is given every tensor by itself.
    """
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    lane, step = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK)
    scaled_query = tl.load(query + row * query_stride + head * E + lane, mask=lane < E, other=0).to(tl.float32) * scale
    count = tl.load(used + row)
    key_offset = ((tl.load(start + row).to(tl.int64) + step) * K + head // (H // K))[:, None] * E + lane[None, :]
    highest = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sum_of_values = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    for first in range(0, count, BLOCK):
        is_used = first + step < count
        inside = is_used[:, None] & (lane < E)[None, :]
        key = tl.load(keys + key_offset, mask=inside, other=0).to(tl.float32)
        value = tl.load(values + key_offset, mask=inside, other=0).to(tl.float32)
        score = tl.where(is_used, tl.sum(key * scaled_query[None, :], 1), -1e30)
        new_highest = tl.maximum(highest, score)
        weight = tl.where(is_used, tl.exp(score - new_highest), 0)
        rescale = tl.exp(highest - new_highest)
        total = total * rescale + weight
        sum_of_values = sum_of_values * rescale[:, None] + weight[:, None] * value
        highest = new_highest
        key_offset += BLOCK * K * E
    top = tl.max(highest, 0)
    part_weight = tl.exp(highest - top)
    denominator = tl.sum(total * part_weight, 0)
    result = tl.sum(sum_of_values * part_weight[:, None], 0) / denominator
    tl.store(mixed + (row * H + head) * E + lane, result.to(mixed.dtype.element_ty), mask=lane < E)
    tl.store(log_sums + head * rows + row, top + tl.log(denominator))


if triton is not None:
    # `start`, `used` and `place` are views into longer tensors, so their alignment differs from layer to layer. Triton would
    # compile a program per alignment; told not to, it compiles one for all.
    _attend_one, _join = (
        triton.jit(kernel, do_not_specialize=["rows"], do_not_specialize_on_alignment=views)
        for kernel, views in ((_attend_one_kernel, ["start", "used"]), (_join_kernel, ["place"]))
    )
