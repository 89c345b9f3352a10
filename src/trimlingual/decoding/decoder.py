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
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trimlingual.decoding.ragged import Packed, Tail, chunks, common_beginnings
from trimlingual.models.kernels import attend_one, rotate, usable
from trimlingual.models.qwen2_audio import decoder_layer, embed, layer_list, lm_head, rms_norm, text_decoder

# Attention (B, H, E) of one token a row over keys and values (S, K, E) of the slots.
OverSlots = Callable[[Tensor, Tensor, Tensor], Tensor]


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


class _Into:
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
        rope, into = self.rope(packed.computed.position), _Into(packed, slots, first_row) if slots else None
        for position in active:
            kept: list[Tensor] = []
            last = packed.tail(tail) if tail and position == active[-1] else None

            def attend(
                query: Tensor, key: Tensor, value: Tensor,
                kept: Any = kept, position: int = position, last: Tail | None = last,
            ) -> Tensor:  # fmt: skip
                to = into.destination(position) if into else None
                query, key = rotate(query, key, value, rope, to, last.index if last else None)
                kept += [key, value]
                if into:
                    into.repeat(position)
                    if self.flash and packed.source is not None:
                        return self._causal_over_slots(query, position, into, last or packed.computed)
                if packed.source is not None:
                    key, value = key[packed.source], value[packed.source]
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

    def _causal_over_slots(self, query: Tensor, position: int, into: _Into, tail: Tail) -> Tensor:
        """The same over rows that stand in slots, with flash attention."""
        longest = max(tail.lengths), max(into.packed.lengths)
        keys, values = into.slots.keys[position], into.slots.values[position]
        mixed, _ = flash_attention(
            query, keys, values, tail.offsets, into.start, *longest, causal=True, used=into.lengths
        )
        return mixed

    def over_slots(self, query: Tensor, keys: Tensor, values: Tensor, used: Tensor, slots: Slots) -> Tensor:
        """Attention (B, H, E) of one token a row over the row's first `used` (B,) slots."""
        if self.flash:
            return attention_of_one(query, keys, values, slots.start[: len(query) + 1], used, slots)[0]
        longest = slots.width if self.device.type == "cuda" else int(used.max())  # a CUDA graph needs one shape

        def rows(tensor: Tensor) -> Tensor:
            stretches = tensor[: len(query) * slots.width].unflatten(0, (-1, slots.width))
            return stretches[:, :longest].transpose(1, 2)

        seen = torch.arange(longest, device=query.device)[None, :] < used[:, None]
        # The queries of a key-value head as if they were so many tokens, so that nobody makes copies of it.
        grouped = query.unflatten(1, (keys.shape[1], -1))
        mixed = scaled_dot_product_attention(grouped, rows(keys), rows(values), attn_mask=seen[:, None, None])
        return mixed.flatten(1, 2)


def attention_of_one(
    query: Tensor, keys: Tensor, values: Tensor, start: Tensor, used: Tensor, slots: Slots
) -> tuple[Tensor, Tensor]:
    """Attention (B, H, E) of one token a row over `used` (B,) slots from `start` (B + 1,) on, and its log-sum-exps (H, B)."""
    if usable(query):
        return attend_one(query, keys, values, start, used)
    each = slots.each[: len(query) + 1]
    return flash_attention(query, keys, values, each, start, 1, slots.width, causal=False, used=used)


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
