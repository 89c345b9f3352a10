"""Where the keys and values of decoded rows stand: every row owns a stretch of slots, one a position.

Shapes: N tokens of all rows packed, C of them computed, S slots, K key-value heads, E head size.
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
    """Keys and values of every layer, (S, K, E) each, and the rows' stretches in them.

    Stretches are `ragged` (each as long as its row may get, the last slot belonging to nobody) or all `width` long.
    """

    keys: list[Tensor]
    values: list[Tensor]
    start: Tensor  # (rows + 1,) int32, first slot of each row
    width: int
    ragged: bool

    @cached_property
    def each(self) -> Tensor:
        """(rows + 1,) int32: where each row's query begins when every row has one."""
        return torch.arange(len(self.start), dtype=torch.int32, device=self.start.device)

    @property
    def num_rows(self) -> int:
        """Rows there is room for."""
        return len(self.start) - 1

    def assign(self, capacities: Sequence[int]) -> bool:
        """Give the slots to new rows of at most these many positions; False if there are too few."""
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
        """A copy with only the given rows, of which `used` slots are filled (stretches of equal length), in the `active` layers."""

        def chosen(tensor: Tensor) -> Tensor:
            target = tensor.new_empty((len(rows), self.width, *tensor.shape[1:]))
            torch.index_select(tensor.unflatten(0, (-1, self.width))[:, :used], 0, rows, out=target[:, :used])
            target[:, used:] = 0
            return target.flatten(0, 1)

        keys, values = list(self.keys), list(self.values)
        for layer in active:
            keys[layer], values[layer] = chosen(keys[layer]), chosen(values[layer])
        return Slots(keys, values, self.start[: len(rows) + 1], self.width, self.ragged)


class Into:
    """Where packed rows stand in slots, from row `first_row` on."""

    def __init__(self, packed: Packed, slots: Slots, first_row: int):
        self.packed, self.slots = packed, slots
        self.start = slots.start[first_row : first_row + len(packed.lengths) + 1]
        self.lengths = packed.offsets.diff()
        self._place = slots.start[packed.row + first_row] + packed.position  # (N,) slot of each token
        self._from = self._again = None
        if packed.source is not None:
            computed, again = packed.computed.place, packed.repeated
            self._from, self._again = self._place[computed[packed.source[again]]], self._place[again]
            self._place = self._place[computed]

    def destination(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of a layer, and the slots (C,) of the computed tokens in them."""
        return self.slots.keys[position], self.slots.values[position], self._place

    def repeat(self, position: int) -> None:
        """Copy what a row has in common with the one before it."""
        if self._again is not None:
            for tensor in (self.slots.keys[position], self.slots.values[position]):
                tensor[self._again] = tensor[self._from]
