"""Attention of a decoding step over prompts that many rows share: a prompt's keys and values are read once for all of its rows.

The candidates of the layer search translate the same clips. In the layers below the one that a candidate lacks, the prompt's keys
and values are those of the parent model, so they are the same for every candidate. Attention there has two parts. The prefix part
is over the prompt, for all rows of that prompt at once. The suffix part is over each row's answer, row by row. Their log-sum-exps
say how to weigh the two (Juravsky et al. 2024, Hydragen, section 3.1).

Shapes: L layers, B rows, Q entries, P prefixes, H heads, K key-value heads, E head size, S slots. Row, slot, entry and place: see
decoding/__init__.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimlingual.decoding.attention import attention_of_one, flash_attention, join
from trimlingual.decoding.slots import Slots

MOST_ROWS = 128  # that may share a prefix: one tile of the attention kernel


@dataclass
class Prefixes:
    """The P prompts that B rows begin with. The keys and values of prefix p are in the slots of row B + p."""

    lengths: list[int]  # (P,) tokens of each prefix
    of_row: list[int]  # (B,) number of the row's prefix
    below: list[int]  # (B,) the row shares its prefix in the layers below this one


class SharedPrefixes:
    """The prefixes of the CUDA graphs' entries. Tensors are filled in place, because graphs read the memory they were captured with."""

    def __init__(self, num_layers: int, num_entries: int, num_prefixes: int, device: torch.device):
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # Per prefix, (P + 1,) and (P,): its first slot, and its tokens.
        self.first_slot = zeros(num_prefixes + 1)
        self.length = zeros(num_prefixes)
        # Per entry, (Q,): its prefix, and the layer below which it shares the prefix.
        self.of_entry, self.below = zeros(num_entries, dtype=torch.long), zeros(num_entries, dtype=torch.long)
        # Per layer, (L, Q): the entries in the order of their places, those that share nothing last; and each entry's place, -1 if
        # it shares nothing. (L, P + 1): the first place of each prefix, and in the end the number of entries that share.
        self.entry_at_place = zeros(num_layers, num_entries, dtype=torch.long)
        self.place = zeros(num_layers, num_entries)
        self.first_place = zeros(num_layers, num_prefixes + 1)
        # Per layer and entry, (L, Q): tokens that are read as a prefix, 0 if it shares nothing; the slot where the suffix begins,
        # (L, Q + 1); and slots of the suffix that are read.
        self.prefix_length = zeros(num_layers, num_entries)
        self.suffix_start = zeros(num_layers, num_entries + 1)
        self.suffix_used = zeros(num_layers, num_entries)

    def load(self, prefixes: Prefixes, rows: Sequence[int], slots: Slots) -> None:
        """Take over the prefixes of new rows. `rows[e]` is the row of entry e; entries beyond them share nothing."""
        num_prefixes, device = len(prefixes.lengths), self.length.device
        num_rows = len(prefixes.of_row)
        self.first_slot.zero_()
        self.length.zero_()
        self.first_slot[:num_prefixes] = slots.start[num_rows : num_rows + num_prefixes]
        self.length[:num_prefixes] = torch.tensor(prefixes.lengths, device=device)
        self.below.zero_()
        self.of_entry[:num_rows] = torch.tensor([prefixes.of_row[row] for row in rows], device=device)
        self.below[:num_rows] = torch.tensor([prefixes.below[row] for row in rows], device=device)

    def move(self, order: Tensor) -> None:
        """Reorder the first entries: the new entry e is the old entry `order[e]`."""
        for tensor in (self.of_entry, self.below):
            tensor[: len(order)] = tensor[order]

    def plan(self, start: Tensor) -> None:
        """Find the places of the first `len(start)` entries in every layer. `start[e]` is the first slot of entry e's row."""
        size, num_prefixes, device = len(start), len(self.length), start.device
        prefix = self.of_entry[:size]
        shares = self.below[:size] > torch.arange(len(self.place), device=device)[:, None]  # (L, size)
        sorted_prefix, order = torch.where(shares, prefix, num_prefixes).sort(dim=1, stable=True)
        place = torch.empty_like(order).scatter_(1, order, torch.arange(size, device=device).expand_as(order))
        numbers = torch.arange(num_prefixes + 1, device=device).expand(len(sorted_prefix), -1).contiguous()
        self.entry_at_place[:, :size] = order
        self.place[:, :size] = torch.where(shares, place, -1)
        self.first_place[:] = torch.searchsorted(sorted_prefix, numbers)
        self.prefix_length[:, :size] = torch.where(shares, self.length[prefix], 0)
        self.suffix_start[:, :size] = start + self.prefix_length[:, :size]

    def begin(self, used: Tensor) -> None:
        """Begin a step in which entry e reads the first `used[e]` slots of its row, prefix included."""
        size = len(used)
        self.suffix_used[:, :size] = (used - self.prefix_length[:, :size]).clamp_(min=1)

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, slots: Slots) -> Tensor:
        """Attention (size, H, E) in a layer: one query (size, H, E) of each of the first entries over keys and values (S, K, E)."""
        size = len(query)
        suffix_start, suffix_used = self.suffix_start[layer, : size + 1], self.suffix_used[layer, :size]
        suffix, suffix_log_sums = attention_of_one(query, keys, values, suffix_start, suffix_used, slots)
        by_place = query[self.entry_at_place[layer, :size]]
        prefix, prefix_log_sums = flash_attention(
            by_place, keys, values, self.first_place[layer], self.first_slot, MOST_ROWS, slots.width,
            causal=False, used=self.length,
        )  # fmt: skip
        return join(suffix, suffix_log_sums, prefix, prefix_log_sums, self.place[layer, :size])
