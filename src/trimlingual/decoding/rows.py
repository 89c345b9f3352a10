"""Rows in the middle of decoding, and the look that is taken at them now and then. Shapes: B rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from trimlingual.decoding.shared_prompts import Prefixes

# Called with all tokens so far and whether each row goes on; returns the rows to give up.
Watch = Callable[[list[list[int]], list[bool]], list[int]]


FIRST_WATCH = 64  # steps before the first look, then twice as many each time: looking costs the host's time


@dataclass
class Rows:
    """Rows in the middle of decoding."""

    token: Tensor  # (B,) predicted, not yet appended
    position: Tensor  # (B,) where it goes
    out: list[list[int]]  # new tokens so far
    budget: list[int]  # how many there may be in all
    alive: list[bool]
    without: list[int | None] | None = None  # position of the layer that each row goes without
    prefixes: Prefixes | None = None  # beginnings that rows share, on a GPU with flash attention
