"""The decoder's forward over packed tokens: rows of unlike length without padding, keys and values in slots.

Every row owns a stretch of slots, one a position, so a rejected draft is overwritten where it stands and nothing is ever shifted.
On a GPU in 16 bits the attention is the flash kernel for rows of unlike length; elsewhere rows are padded for PyTorch's own attention,
in stretches of equal size. Any subset of the layers can be run: a candidate of the layer search is a choice of layers, not a model.

Shapes: B rows, N tokens of all rows packed, C of them computed, M in rows' tails, S slots, H heads, K key-value heads, E head size,
D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trimlingual.kernels import rotate
from trimlingual.models import decoder_layer, embed, layer_list, lm_head, rms_norm, text_decoder

# Tokens prefilled at once: on a GPU enough to fill it, with activations below 2 GB for 7B parameters; on a CPU what its caches hold.
CHUNK_TOKENS = {"cuda": 16384, "cpu": 4096}


# Attention (B, H, E) of one token a row over keys and values (S, K, E) of the slots.
OverSlots = Callable[[Tensor, Tensor, Tensor], Tensor]


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
        device = self.row.device
        skipped = torch.tensor([length - count for length, count in zip(self.lengths, counts)], device=device)
        tokens = torch.tensor(counts, device=device)
        offsets = torch.nn.functional.pad(tokens.cumsum(0), (1, 0))
        row = torch.repeat_interleave(torch.arange(len(tokens), device=device), tokens, output_size=sum(counts))
        inner = torch.arange(sum(counts), device=device) - offsets[row]
        index = self.offsets[row] + skipped[row] + inner
        if self.source is not None:
            index = self.source[index]
        return Tail(tuple(counts), row, inner, offsets.int(), skipped, index, max(self.lengths))


@dataclass(frozen=True)
class Tail:
    """The last tokens of rows, M in all, as queries that see the whole rows."""

    lengths: tuple[int, ...]
    row: Tensor  # (M,)
    inner: Tensor  # (M,) position among the row's last tokens
    offsets: Tensor  # (B + 1,) int32
    skipped: Tensor  # (B,) tokens of the row before them
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


class PackedDecoder:
    """The text decoder of `model`, run over packed tokens."""

    def __init__(self, model: Any):
        self.model = model
        self.decoder, self.head = text_decoder(model), lm_head(model)
        self.layers = list(layer_list(model, "decoder"))
        weight = self.decoder.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        attention: Any = self.layers[0].self_attn
        self.head_dim = attention.head_dim
        self.num_kv_heads = attention.config.num_key_value_heads
        self.flash = self.device.type == "cuda" and self.dtype in (torch.bfloat16, torch.float16)

    @property
    def slot_bytes(self) -> int:
        """Keys and values of one position in all layers."""
        return 2 * len(self.layers) * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def free_bytes(self) -> int:
        """Memory that is free on the device, PyTorch's own unused reserve included."""
        if self.device.type != "cuda":
            return psutil.virtual_memory().available
        reserve = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + reserve

    def slots(self, rows: int, total: int, width: int) -> Slots:
        """Empty slots for this many rows, of at most `width` positions each and `total` together."""
        shape = (total + 1 if self.flash else rows * width, self.num_kv_heads, self.head_dim)
        # Zeros, not garbage: a masked NaN is still a NaN once it is multiplied by a weight of 0.
        keys, values = (
            [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in self.layers] for _ in range(2)
        )
        start = torch.arange(rows + 1, dtype=torch.int32, device=self.device) * width
        return Slots(keys, values, start, width, self.flash)

    def rope(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary cosines and sines (N, E) of positions (N,)."""
        probe = torch.empty(0, dtype=self.dtype, device=self.device)
        cosine, sine = self.decoder.rotary_emb(probe, position[None])
        return cosine[0], sine[0]

    def forward(
        self,
        hidden: Tensor,
        packed: Packed,
        active: Sequence[int],
        slots: Slots | None = None,
        first_row: int = 0,
        tail: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Run whole rows, hidden states (C, D), through the layers at positions `active`, causally within each row.

        Yields after every layer: its position, its output (C, D), its keys and its values (C, K, E). These are also written to the
        rows' `slots`, from row `first_row` on. The last layer's output is that of the last `tail` tokens of each row alone, which is
        all that is ever read of a prompt.
        """
        rope, source = self.rope(packed.computed.position), packed.source
        index = slots.start[packed.row + first_row] + packed.position if slots else None
        for position in active:
            kept: list[Tensor] = []
            to = (slots.keys[position], slots.values[position], index) if slots and index is not None else None
            last = packed.tail(tail) if tail and position == active[-1] else None

            def attend(
                query: Tensor,
                key: Tensor,
                value: Tensor,
                kept: Any = kept,
                to: Any = to,
                last: Tail | None = last,
            ) -> Tensor:
                wanted = last.index if last else None
                query, key = rotate(query, key, value, rope, to if source is None else None, wanted)
                kept += [key, value]
                if source is not None:
                    key, value = key[source], value[source]
                    if to:
                        to[0][to[2]], to[1][to[2]] = key, value
                return self._causal(query, key, value, packed, last or packed.computed)

            hidden = decoder_layer(self.layers[position], hidden, attend, last.index if last else None)
            yield position, hidden, kept[0], kept[1]

    def ends(
        self,
        hidden: Tensor,
        packed: Packed,
        active: Sequence[int],
        tail: Sequence[int],
        slots: Slots | None = None,
        first_row: int = 0,
    ) -> Tensor:
        """`forward` to its end: the last layer's output (sum of `tail`, D) at the last tokens of each row, not yet normed."""
        if not active:
            return hidden[packed.tail(tail).index]
        for _, output, _, _ in self.forward(hidden, packed, active, slots, first_row, tail):
            hidden = output
        return hidden

    def packed(self, prompts: Sequence[Tensor], more: Sequence[Sequence[int]] | None = None) -> tuple[Packed, Tensor]:
        """Rows of prompts (T_i, D), each followed by some tokens, and the input (C, D) of what is computed."""
        more = more or [()] * len(prompts)
        shared = common_beginnings(prompts)
        pieces = []
        for prompt, skip, tokens in zip(prompts, shared, more):
            pieces.append(prompt[skip:])
            if tokens:
                pieces.append(self.embed(torch.tensor(tokens, dtype=torch.long, device=self.device)))
        lengths = [len(prompt) + len(tokens) for prompt, tokens in zip(prompts, more)]
        return Packed.of(lengths, self.device, shared), torch.cat(pieces)

    def prefill(self, prompts: Sequence[Tensor], active: Sequence[int], slots: Slots) -> Tensor:
        """Run prompts (T_i, D), filling `slots`; returns the last layer's output (B, D) at each prompt's last token."""
        last = []
        for rows in chunks([len(prompt) for prompt in prompts], self.device):
            packed, hidden = self.packed([prompts[row] for row in rows])
            last.append(self.ends(hidden, packed, active, [1] * len(rows), slots, rows.start))
        return torch.cat(last)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of the last layer's output (..., D)."""
        return self.head(rms_norm(self.decoder.norm, hidden))

    def next_tokens(self, hidden: Tensor) -> Tensor:
        """Most likely next tokens (...) after the last layer's output (..., D)."""
        return self.logits(hidden).argmax(-1)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings (..., D)."""
        return embed(self.model, tokens)

    def step(
        self, position: int, hidden: Tensor, rope: tuple[Tensor, Tensor], slot: Tensor, slots: Slots, over: OverSlots
    ) -> Tensor:
        """One new token a row, (B, D), through one layer: its keys go to `slot` (B,), then `over` attends."""

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = slots.keys[position], slots.values[position]
            query, _ = rotate(query, key, value, rope, (keys, values, slot))
            return over(query, keys, values)

        return decoder_layer(self.layers[position], hidden, attend)

    def _causal(self, query: Tensor, key: Tensor, value: Tensor, packed: Packed, tail: Tail) -> Tensor:
        """Causal attention (M, H, E) of the tail's tokens over the rows' keys and values (N, K, E)."""
        if self.flash:
            longest = max(tail.lengths), max(packed.lengths)
            return flash_attention(query, key, value, tail.offsets, packed.offsets, *longest, causal=True)[0]

        def padded(tensor: Tensor, row: Tensor, position: Tensor, *shape: int) -> Tensor:
            target = tensor.new_zeros((*shape, *tensor.shape[1:]))
            target[row, position] = tensor
            return target.transpose(1, 2)

        keys, values = (padded(t, packed.row, packed.position, len(packed.lengths), tail.longest) for t in (key, value))
        mixed = torch.empty_like(query)
        for group in tail.groups:
            some = padded(query[group.tokens], group.row, group.inner, len(group.rows), group.longest)
            chosen = (keys, values) if len(tail.groups) == 1 else (keys[group.rows], values[group.rows])
            out = scaled_dot_product_attention(
                some,
                *chosen,
                attn_mask=group.mask,
                is_causal=group.mask is None,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            mixed[group.tokens] = out.transpose(1, 2)[group.row, group.inner]
        return mixed

    def over_slots(self, query: Tensor, keys: Tensor, values: Tensor, used: Tensor, slots: Slots) -> Tensor:
        """Attention (B, H, E) of one token a row over the row's first `used` (B,) slots."""
        if self.flash:
            each = slots.each[: len(query) + 1]
            return flash_attention(query, keys, values, each, slots.start, 1, slots.width, causal=False, used=used)[0]
        longest = slots.width if self.device.type == "cuda" else int(used.max())  # a CUDA graph needs one shape

        def rows(tensor: Tensor) -> Tensor:
            stretches = tensor[: len(query) * slots.width].unflatten(0, (-1, slots.width))
            return stretches[:, :longest].transpose(1, 2)

        seen = torch.arange(longest, device=query.device)[None, :] < used[:, None]
        # The queries of a key-value head as if they were so many tokens, so that nobody makes copies of it.
        grouped = query.unflatten(1, (keys.shape[1], -1))
        mixed = scaled_dot_product_attention(grouped, rows(keys), rows(values), attn_mask=seen[:, None, None])
        return mixed.flatten(1, 2)


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, offsets_q: Tensor, offsets_k: Tensor, max_q: int, max_k: int, *,
    causal: bool, used: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Flash attention (Dao 2023) of M queries (M, H, E) over rows of unlike length, and its log-sum-exps (H, M).

    `used` (B,) limits the keys of each row. The operator itself, because the public `varlen_attn` has no `used` before PyTorch 2.13.
    """
    operator = torch.ops.aten._flash_attention_forward
    mixed, sums, *_ = operator(
        query, key, value, offsets_q, offsets_k, max_q, max_k, 0.0, causal, False, seqused_k=used
    )
    return mixed, sums
