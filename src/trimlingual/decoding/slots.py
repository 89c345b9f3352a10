"""The memory of keys and values: every row owns a stretch of slots, one per position (drawn in decoding/__init__.py).

Shapes: B rows, N tokens of all rows packed, C of them computed, S slots, K key-value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trimlingual.decoding.ragged import Packed


@dataclass
class Slots:
    """Keys and values of every layer, and which slots each row owns.

    `ragged`: each row owns as many slots as it may get positions, and the last slot belongs to nobody. Otherwise each row owns `width`.
    """

    keys: list[Tensor]  # per layer (S, K, E)
    values: list[Tensor]  # per layer (S, K, E)
    start: Tensor  # (B + 1,) int32, first slot of each row
    width: int  # slots of the longest stretch
    ragged: bool

    @cached_property
    def one_query_per_row(self) -> Tensor:
        """(B + 1,) int32: where each row's queries begin when every row has exactly one."""
        return torch.arange(len(self.start), dtype=torch.int32, device=self.start.device)

    @property
    def num_rows(self) -> int:
        """How many rows fit."""
        return len(self.start) - 1

    def assign(self, capacities: Sequence[int]) -> bool:
        """Give the slots to new rows, row b with at most `capacities[b]` positions. False if rows or slots are too few."""
        if len(capacities) > self.num_rows or max(capacities) > self.width:
            return False
        if not self.ragged:
            return True
        nobody = len(self.keys[0]) - 1
        if sum(capacities) > nobody:
            return False
        self.start.fill_(nobody)
        first = torch.tensor([0, *capacities[:-1]]).cumsum(0)
        self.start[: len(capacities)] = first.to(self.start)
        return True

    def kept(self, rows: Tensor, used: int, active: Sequence[int]) -> Slots:
        """A copy of the given rows alone, for stretches of equal length.

        The first `used` slots of each row are copied in the layers `active`, and the slots behind them are zeros.
        """

        def chosen(tensor: Tensor) -> Tensor:
            target = tensor.new_empty((len(rows), self.width, *tensor.shape[1:]))
            torch.index_select(tensor.unflatten(0, (-1, self.width))[:, :used], 0, rows, out=target[:, :used])
            target[:, used:] = 0
            return target.flatten(0, 1)

        keys, values = list(self.keys), list(self.values)
        for layer in active:
            keys[layer], values[layer] = chosen(keys[layer]), chosen(values[layer])
        return Slots(keys, values, self.start[: len(rows) + 1], self.width, self.ragged)


class PackedInSlots:
    """Which slots the tokens of packed rows have. The first packed row is row `first_row` of the slots."""

    def __init__(self, packed: Packed, slots: Slots, first_row: int):
        self.packed, self.slots = packed, slots
        self.start = slots.start[first_row : first_row + len(packed.lengths) + 1]
        self.lengths = packed.offsets.diff()
        self._slot = slots.start[packed.row + first_row] + packed.position  # (N,) slot of each token
        self._copy_from = self._copy_to = None
        if packed.computed_index is not None:
            computed, copied = packed.computed.packed_index, packed.copied
            self._copy_from = self._slot[computed[packed.computed_index[copied]]]
            self._copy_to = self._slot[copied]
            self._slot = self._slot[computed]  # (C,)

    def destination(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """A layer's keys (S, K, E) and values (S, K, E), and the slots (C,) that the computed tokens have in them."""
        return self.slots.keys[layer], self.slots.values[layer], self._slot

    def copy_beginnings(self, layer: int) -> None:
        """Give each row the keys and values of the beginning that it has in common with the row before."""
        if self._copy_to is not None:
            for tensor in (self.slots.keys[layer], self.slots.values[layer]):
                tensor[self._copy_to] = tensor[self._copy_from]
