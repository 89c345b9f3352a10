"""Decode attention over a beginning that many rows share: its keys and values are read once for all of them.

Candidates of the layer search translate the same clips, and below the layer that each lacks a prompt's keys and values are the
parent's. A step's attention there is one over the prompt, for all rows of a prompt at once, and one over each row's own tokens; the two
are put together by their log-sum-exps (Juravsky et al. 2024, Hydragen, section 3.1).

Shapes: L layers, B rows, P prefixes, H heads, K key-value heads, E head size, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimlingual.decoding.attention import attention_of_one, flash_attention, join
from trimlingual.decoding.slots import Slots

MOST_ROWS = 128  # of a prefix: one tile of the attention kernel


@dataclass
class Prefixes:
    """Which of B rows begins with which of P prefixes; prefix p stands in the slots of row B + p."""

    lengths: list[int]  # (P,)
    of: list[int]  # (B,) the row's prefix
    below: list[int]  # (B,) shared in the layers at positions below this one


class SharedPrefixes:
    """What CUDA graphs need of the prefixes of their entries, in tensors that stay where they are."""

    def __init__(self, num_layers: int, num_entries: int, num_prefixes: int, device: torch.device):
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.first = zeros(num_prefixes + 1)  # slot of each prefix
        self.length = zeros(num_prefixes)
        self.of, self.below = zeros(num_entries, dtype=torch.long), zeros(num_entries, dtype=torch.long)
        # By layer: entries that share, prefix by prefix, then the others; where each prefix's end in that order, beginning with 0; an
        # entry's place in it, -1 if it does not share.
        self.order = zeros(num_layers, num_entries, dtype=torch.long)
        self.ends = zeros(num_layers, num_prefixes + 1)
        self.place = zeros(num_layers, num_entries)
        # How many tokens of an entry's row are read as a prefix, the slot from which on it reads its own, and how many of these.
        self.skip = zeros(num_layers, num_entries)
        self.start = zeros(num_layers, num_entries + 1)
        self.used = zeros(num_layers, num_entries)

    def load(self, prefixes: Prefixes, entries: Sequence[int], slots: Slots) -> None:
        """Prefixes of these rows, one an entry."""
        count, device = len(prefixes.lengths), self.length.device
        rows = len(prefixes.of)
        self.first.zero_()
        self.length.zero_()
        self.first[:count] = slots.start[rows : rows + count]
        self.length[:count] = torch.tensor(prefixes.lengths, device=device)
        self.below.zero_()  # an entry without a row shares nothing
        self.of[:rows] = torch.tensor([prefixes.of[row] for row in entries], device=device)
        self.below[:rows] = torch.tensor([prefixes.below[row] for row in entries], device=device)

    def move(self, order: Tensor) -> None:
        """Entries change places."""
        for tensor in (self.of, self.below):
            tensor[: len(order)] = tensor[order]

    def plan(self, start: Tensor) -> None:
        """Who reads what in each layer, for entries whose rows start at these slots (size,)."""
        size, count, device = len(start), len(self.length), start.device
        of = self.of[:size]
        shares = self.below[:size] > torch.arange(len(self.place), device=device)[:, None]  # (L, size)
        key, order = torch.where(shares, of, count).sort(dim=1, stable=True)
        place = torch.empty_like(order).scatter_(1, order, torch.arange(size, device=device).expand_as(order))
        numbers = torch.arange(count + 1, device=device).expand(len(key), -1).contiguous()
        self.order[:, :size] = order
        self.place[:, :size] = torch.where(shares, place, -1)
        self.ends[:] = torch.searchsorted(key, numbers)
        self.skip[:, :size] = torch.where(shares, self.length[of], 0)
        self.start[:, :size] = start + self.skip[:, :size]

    def begin(self, used: Tensor) -> None:
        """Before a step in which the entries see the first `used` (size,) slots of their rows."""
        size = len(used)
        self.used[:, :size] = (used - self.skip[:, :size]).clamp_(min=1)

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, slots: Slots) -> Tensor:
        """Attention (size, H, E) of one token an entry over keys and values (S, K, E), in the layer at this position."""
        size = len(query)
        start, used = self.start[layer, : size + 1], self.used[layer, :size]
        own, own_sums = attention_of_one(query, keys, values, start, used, slots)
        shared, shared_sums = flash_attention(
            query[self.order[layer, :size]], keys, values, self.ends[layer], self.first, MOST_ROWS, slots.width,
            causal=False, used=self.length,
        )  # fmt: skip
        return join(own, own_sums, shared, shared_sums, self.place[layer, :size])
