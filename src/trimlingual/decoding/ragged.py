"""Rows of unlike length without padding: which row and position each token has, and what rows have in common.

Shapes: B rows, N tokens of all rows packed, C of them computed, M in rows' tails, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

# Tokens prefilled at once: on a GPU enough to fill it, with activations below 2 GB for 7B parameters; on a CPU what its caches hold.
CHUNK_TOKENS = {"cuda": 16384, "cpu": 4096}


@dataclass(frozen=True)
class Packed:
    """Which row and which position each of N tokens has, rows one after the other.

    A row may begin like the one before it. What they have in common is then computed once, so that C <= N tokens are computed.
    """

    lengths: tuple[int, ...]
    row: Tensor  # (N,)
    position: Tensor  # (N,)
    offsets: Tensor  # (B + 1,) int32, where each row's tokens begin
    shared: tuple[int, ...]  # tokens at the beginning of each row that are those of the row before
    source: Tensor | None  # (N,) which computed token each token is; None where each is its own
    _tails: dict[tuple[int, ...], Tail] = field(
        default_factory=dict, repr=False
    )  # made before; making one waits for the GPU

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device, shared: Sequence[int] = ()) -> Packed:
        """Rows of the given lengths."""
        counts = torch.tensor(lengths, device=device)
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        row = torch.repeat_interleave(torch.arange(len(lengths), device=device), counts, output_size=sum(lengths))
        position = torch.arange(sum(lengths), device=device) - offsets[row]
        source = torch.from_numpy(_sources(lengths, shared)).to(device) if any(shared) else None
        shared = tuple(shared) or (0,) * len(lengths)
        return cls(tuple(lengths), row, position, offsets.int(), shared, source)

    @cached_property
    def computed(self) -> Tail:
        """The tokens that are computed."""
        return self.tail([length - shared for length, shared in zip(self.lengths, self.shared)])

    def tail(self, counts: Sequence[int]) -> Tail:
        """The last `counts` tokens of each row, which must be computed ones."""
        if tuple(counts) not in self._tails:
            self._tails[tuple(counts)] = self._tail(counts)
        return self._tails[tuple(counts)]

    @cached_property
    def repeated(self) -> Tensor:
        """Which tokens are not computed (N - C,)."""
        there = torch.zeros_like(self.row, dtype=torch.bool)
        there[self.computed.place] = True
        return (~there).nonzero()[:, 0]

    def _tail(self, counts: Sequence[int]) -> Tail:
        device = self.row.device
        skipped = torch.tensor([length - count for length, count in zip(self.lengths, counts)], device=device)
        tokens = torch.tensor(counts, device=device)
        offsets = torch.nn.functional.pad(tokens.cumsum(0), (1, 0))
        row = torch.repeat_interleave(torch.arange(len(tokens), device=device), tokens, output_size=sum(counts))
        inner = torch.arange(sum(counts), device=device) - offsets[row]
        place = self.offsets[row] + skipped[row] + inner
        index = place if self.source is None else self.source[place]
        return Tail(tuple(counts), row, inner, offsets.int(), skipped, place, index, max(self.lengths))


@dataclass(frozen=True)
class Tail:
    """The last tokens of rows, M in all, as queries that see the whole rows."""

    lengths: tuple[int, ...]
    row: Tensor  # (M,)
    inner: Tensor  # (M,) position among the row's last tokens
    offsets: Tensor  # (B + 1,) int32
    skipped: Tensor  # (B,) tokens of the row before them
    place: Tensor  # (M,) which of all the rows' tokens they are
    index: Tensor  # (M,) which computed tokens they are
    longest: int  # row

    @property
    def position(self) -> Tensor:
        """(M,) position in the row."""
        return self.inner + self.skipped[self.row]

    @cached_property
    def groups(self) -> list[Group]:
        """The rows for attention with padding: those with long tails and, apart, those with less than half as much."""
        counts = torch.tensor(self.lengths, device=self.row.device)
        short = 2 * counts < counts.max()
        return [self._group(rows) for rows in ((~short).nonzero()[:, 0], short.nonzero()[:, 0]) if len(rows)]

    def _group(self, rows: Tensor) -> Group:
        device = self.row.device
        number = torch.full((len(self.lengths),), -1, device=device)
        number[rows] = torch.arange(len(rows), device=device)
        tokens = (number[self.row] >= 0).nonzero()[:, 0]
        longest = max(self.lengths[row] for row in rows.tolist())
        skipped, mask = self.skipped[rows], None
        if skipped.any():
            positions = torch.arange(self.longest, device=device)
            itself = skipped[:, None] + positions[:longest]
            mask = (positions <= itself[..., None])[:, None]
        return Group(rows, tokens, number[self.row[tokens]], self.inner[tokens], longest, mask)


@dataclass(frozen=True)
class Group:
    """G rows whose tails are padded together."""

    rows: Tensor  # (G,)
    tokens: Tensor  # of the tails' tokens, those of these rows
    row: Tensor  # of each of them, among the G
    inner: Tensor  # position of each in its tail
    longest: int  # tail
    mask: Tensor | None  # (G, 1, longest tail, longest row), what each sees; None when the tails are whole rows


def _sources(lengths: Sequence[int], shared: Sequence[int]) -> np.ndarray:
    """Which computed token each token of the rows is."""
    now, found, count = np.zeros(max(lengths), dtype=np.int64), [], 0
    for length, common in zip(lengths, shared):
        now[common:length] = np.arange(count, count + length - common)
        count += length - common
        found.append(now[:length].copy())
    return np.concatenate(found)


def common_beginnings(prompts: Sequence[Tensor]) -> list[int]:
    """How many inputs at the beginning of each prompt (T_i, D) are those of the prompt before; its last one is never counted.

    Prompts of a clip for several languages have the audio in common, all prompts what stands before it.
    """
    common = [torch.zeros((), dtype=torch.long, device=prompts[0].device)]
    for before, now in pairwise(prompts):
        length = min(len(before), len(now) - 1)
        same = (before[:length] == now[:length]).all(-1)
        common.append(same.long().cumprod(0).sum())
    return torch.stack(common).tolist()


def chunks(lengths: Sequence[int], device: torch.device) -> Iterator[range]:
    """Consecutive rows of at most CHUNK_TOKENS tokens together (a longer row alone)."""
    start, tokens = 0, 0
    for row, length in enumerate(lengths):
        if tokens and tokens + length > CHUNK_TOKENS.get(device.type, 4096):
            yield range(start, row)
            start, tokens = row, 0
        tokens += length
    yield range(start, len(lengths))
