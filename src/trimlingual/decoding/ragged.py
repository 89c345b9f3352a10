"""Rows of unlike length without padding: which row and position each token has, and which beginnings rows have in common.

Shapes: B rows, N tokens of all rows packed one row after the other, C of them computed, M of them in tails, D width. Row, position,
packed_index and computed_index: see decoding/__init__.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

# Tokens of one prefill pass. On a GPU they are enough to keep it busy, with activations below 2 GB for 7B parameters; on a CPU its
# caches hold them.
CHUNK_TOKENS = {"cuda": 16384, "cpu": 4096}


@dataclass(frozen=True)
class Packed:
    """N tokens of B rows, one row after the other.

    A row may begin like the row before it. The beginning is then computed once, so C <= N tokens are computed.
    """

    lengths: tuple[int, ...]  # tokens of each row
    row: Tensor  # (N,) row of each token
    position: Tensor  # (N,) position of each token in its row
    offsets: Tensor  # (B + 1,) int32, packed_index of each row's first token
    shared: tuple[int, ...]  # tokens at the beginning of each row that are those of the row before
    computed_index: (
        Tensor | None
    )  # (N,) which computed token gives this token's values; None if all tokens are computed
    # Tails by their lengths. They are kept, because making one waits for the GPU.
    _tails: dict[tuple[int, ...], Tail] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device, shared: Sequence[int] = ()) -> Packed:
        """Rows of the given lengths; row b begins with `shared[b]` tokens of the row before (default: none)."""
        counts = torch.tensor(lengths, device=device)
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        row = torch.repeat_interleave(torch.arange(len(lengths), device=device), counts, output_size=sum(lengths))
        position = torch.arange(sum(lengths), device=device) - offsets[row]
        computed = torch.from_numpy(_computed_indices(lengths, shared)).to(device) if any(shared) else None
        shared = tuple(shared) or (0,) * len(lengths)
        return cls(tuple(lengths), row, position, offsets.int(), shared, computed)

    @cached_property
    def computed(self) -> Tail:
        """The C tokens that are computed, as the last tokens of their rows."""
        return self.tail([length - shared for length, shared in zip(self.lengths, self.shared)])

    def tail(self, counts: Sequence[int]) -> Tail:
        """The last `counts[b]` tokens of each row b. They must be tokens that are computed."""
        if tuple(counts) not in self._tails:
            self._tails[tuple(counts)] = self._tail(counts)
        return self._tails[tuple(counts)]

    @cached_property
    def copied(self) -> Tensor:
        """packed_index (N - C,) of the tokens that are not computed, but copied from the row before."""
        is_computed = torch.zeros_like(self.row, dtype=torch.bool)
        is_computed[self.computed.packed_index] = True
        return (~is_computed).nonzero()[:, 0]

    def _tail(self, counts: Sequence[int]) -> Tail:
        device = self.row.device
        skipped = torch.tensor([length - count for length, count in zip(self.lengths, counts)], device=device)
        tokens = torch.tensor(counts, device=device)
        offsets = torch.nn.functional.pad(tokens.cumsum(0), (1, 0))
        row = torch.repeat_interleave(torch.arange(len(tokens), device=device), tokens, output_size=sum(counts))
        tail_position = torch.arange(sum(counts), device=device) - offsets[row]
        packed_index = self.offsets[row] + skipped[row] + tail_position
        computed_index = packed_index if self.computed_index is None else self.computed_index[packed_index]
        return Tail(
            tuple(counts), row, tail_position, offsets.int(), skipped, packed_index, computed_index, max(self.lengths)
        )


@dataclass(frozen=True)
class Tail:
    """The last tokens of each row, M in all. In attention they are the queries, which see their whole row up to themselves."""

    lengths: tuple[int, ...]  # tokens of each tail
    row: Tensor  # (M,) row of each token
    tail_position: Tensor  # (M,) position counted from the tail's first token
    offsets: Tensor  # (B + 1,) int32, where each tail begins among the M tokens
    skipped: Tensor  # (B,) tokens of each row before its tail
    packed_index: Tensor  # (M,)
    computed_index: Tensor  # (M,)
    longest_row: int  # tokens

    @property
    def position(self) -> Tensor:
        """(M,) position of each token in its row."""
        return self.tail_position + self.skipped[self.row]

    @cached_property
    def groups(self) -> list[Group]:
        """The rows in one or two groups that are padded apart: tails of at least half the longest one's length, and shorter tails."""
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
            positions = torch.arange(self.longest_row, device=device)
            query_position = skipped[:, None] + positions[:longest]
            mask = (positions <= query_position[..., None])[:, None]
        return Group(rows, tokens, number[self.row[tokens]], self.tail_position[tokens], longest, mask)


@dataclass(frozen=True)
class Group:
    """G rows whose tails are padded to one length T, and the M' tokens of these tails. R is the longest row of all groups."""

    rows: Tensor  # (G,)
    tokens: Tensor  # (M',) which of the M tokens of all tails
    row_in_group: Tensor  # (M',) each token's row, as a number below G
    tail_position: Tensor  # (M',)
    longest_tail: int  # T, tokens
    mask: Tensor | None  # (G, 1, T, R) bool, which positions each token sees; None if every tail is its whole row


def _computed_indices(lengths: Sequence[int], shared: Sequence[int]) -> np.ndarray:
    """computed_index (N,) of each token of the rows."""
    row, rows, count = np.zeros(max(lengths), dtype=np.int64), [], 0
    for length, common in zip(lengths, shared):
        row[common:length] = np.arange(count, count + length - common)
        count += length - common
        rows.append(row[:length].copy())
    return np.concatenate(rows)


def common_beginnings(prompts: Sequence[Tensor]) -> list[int]:
    """How many inputs at the beginning of each prompt (T_i, D) are those of the prompt before. A prompt's last input never counts.

    All prompts have the text before the audio in common. A clip's prompts for several languages also have the audio in common.
    """
    common = [torch.zeros((), dtype=torch.long, device=prompts[0].device)]
    for before, prompt in pairwise(prompts):
        length = min(len(before), len(prompt) - 1)
        same = (before[:length] == prompt[:length]).all(-1)
        common.append(same.long().cumprod(0).sum())
    return torch.stack(common).tolist()


def chunks(lengths: Sequence[int], device: torch.device) -> Iterator[range]:
    """The rows in ranges of at most CHUNK_TOKENS tokens each. A row that is longer is a range of its own."""
    start, tokens = 0, 0
    for row, length in enumerate(lengths):
        if tokens and tokens + length > CHUNK_TOKENS.get(device.type, 4096):
            yield range(start, row)
            start, tokens = row, 0
        tokens += length
    yield range(start, len(lengths))
