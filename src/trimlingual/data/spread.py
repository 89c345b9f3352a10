"""A few of many: what stands for the whole where the whole would take too long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def spread(items: Sequence[Item], num: int) -> list[Item]:
    """`num` of the items, spread evenly from the first to the last stretch of them, in their order; all where there are no more.

    A slice `[::step][:num]` with a whole step does not do that: of 881 items it takes 256 among the first 766.
    """
    num = min(num, len(items))
    return [items[place * len(items) // num] for place in range(num)]
