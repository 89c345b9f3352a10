"""How a round of the layer search is divided between the processes of a run, and what one process decodes together.

A decoding step takes as long as reading the weights, with few rows or with many. So a process that has fewer candidates, because
others have the rest, decodes more clips of each at a time: its share of the round then takes its share of the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from trimlingual.recipe import Tower

T = TypeVar("T")

GPU_BLOCK_ROWS = 13  # rows of a block on a GPU: few, because a block takes as long as its longest row
ROWS_IN_FLIGHT = 256  # rows on a GPU up to which a decoding step takes as long as reading the weights


def wave_size(count: int, group_size: int, processes: int) -> int:
    """Candidates in a wave, over all processes, when `count` are left and one process scores `group_size` together.

    Waves are of about equal size and give as many to each process: for one more in one of them all others would wait, wave by wave.
    """
    waves = math.ceil(count / (group_size * processes))
    return processes * math.ceil(count / (waves * processes)) if count else 1


def longest_first(layer: tuple[Tower, int]) -> tuple[bool, int]:
    """A key to sort by: without a layer of the decoder the layers above it are run, without one of the audio tower everything."""
    tower, index = layer
    return tower == "decoder", index


def share_of(wave: Sequence[T], index: int, processes: int, order: Callable[[T], Any]) -> list[T]:
    """What process `index` scores of a wave; all shares together are the wave, and take about as long.

    In this order the wave is dealt out to the processes in turn, forwards and backwards, so that no process gets the longest of each
    turn.
    """
    by_cost = sorted(wave, key=order)
    turns = [by_cost[start : start + processes] for start in range(0, len(by_cost), processes)]
    places = [index if number % 2 == 0 else processes - 1 - index for number in range(len(turns))]
    return [turn[place] for turn, place in zip(turns, places) if place < len(turn)]


def gpu_block_rows(count: int, processes: int) -> int:
    """Rows of a block when so many processes share `count` candidates: as many rows in flight as in a process that has all."""
    group_size = ROWS_IN_FLIGHT // GPU_BLOCK_ROWS
    alone, shared = (wave_size(count, group_size, n) // n for n in (1, processes))
    return GPU_BLOCK_ROWS * alone // max(1, shared)
