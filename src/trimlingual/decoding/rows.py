"""Rows in the middle of decoding, and the watch that may give rows up. Shapes: B rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from trimlingual.decoding.shared_prompts import Prefixes

# Called with each row's new tokens so far, and whether the row goes on. Returns the rows to give up.
Watch = Callable[[list[list[int]], list[bool]], list[int]]


FIRST_WATCH = 64  # steps before the watch is called first; then after twice as many each time, because a call costs the host's time


@dataclass
class Rows:
    """The state of rows that decoding goes on from, and their new tokens."""

    token: Tensor  # (B,) next token of each row: predicted, and not yet in `out`
    position: Tensor  # (B,) position that this token will have
    out: list[list[int]]  # new tokens of each row so far
    budget: list[int]  # most new tokens of each row
    alive: list[bool]  # whether the row goes on
    without: list[int | None] | None = None  # the layer that each row goes without
    prefixes: Prefixes | None = None  # prompts that rows share; on a GPU with flash attention only
