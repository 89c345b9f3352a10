"""The decoder's forward over packed tokens: rows of unlike length without padding, keys and values in slots.

Every row owns a stretch of slots, one a position, so a rejected draft is overwritten where it stands and nothing is ever shifted.
On a GPU in 16 bits the attention is the flash kernel for rows of unlike length; elsewhere rows are padded for PyTorch's own attention,
in stretches of equal size. Any subset of the layers can be run: a candidate of the layer search is a choice of layers, not a model.

Shapes: B rows, N tokens of all rows packed, S slots, H heads, K key-value heads, E head size, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trimlingual.models import decoder_layer, embed, layer_list, lm_head, rms_norm, text_decoder
from trimlingual.rotary import rotate

# Tokens prefilled at once: on a GPU enough to fill it, with activations below 2 GB for 7B parameters; on a CPU what its caches hold.
CHUNK_TOKENS = {"cuda": 16384, "cpu": 4096}


@dataclass(frozen=True)
class Packed:
    """Which row and which position each of N packed tokens has."""

    lengths: tuple[int, ...]
    row: Tensor  # (N,)
    position: Tensor  # (N,)
    offsets: Tensor  # (B + 1,) int32, where each row's tokens begin

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Packed:
        """Rows of the given lengths, one after the other."""
        counts = torch.tensor(lengths, device=device)
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        row = torch.repeat_interleave(torch.arange(len(lengths), device=device), counts, output_size=sum(lengths))
        position = torch.arange(sum(lengths), device=device) - offsets[row]
        return cls(tuple(lengths), row, position, offsets.int())

    def tail(self, counts: Sequence[int]) -> tuple[Packed, Tensor]:
        """The last `counts` tokens of each row: as rows of their own, and their indices among all tokens."""
        ends = Packed.of(counts, self.row.device)
        skipped = torch.tensor([n - count for n, count in zip(self.lengths, counts)], device=self.row.device)
        return ends, self.offsets[ends.row] + skipped[ends.row] + ends.position


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

    def kept(self, rows: Tensor) -> Slots:
        """A copy with only the given rows (stretches of equal length)."""

        def chosen(tensor: Tensor) -> Tensor:
            return tensor.unflatten(0, (-1, self.width))[rows].flatten(0, 1)

        keys, values = [chosen(k) for k in self.keys], [chosen(v) for v in self.values]
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
        """Run whole rows, hidden states (N, D), through the layers at positions `active`, causally within each row.

        Yields after every layer: its position, its output (N, D), its keys and its values (N, K, E). These are also written to the
        rows' `slots`, from row `first_row` on. The last layer's output is that of the last `tail` tokens of each row alone, which is
        all that is ever read of a prompt.
        """
        rope = self.rope(packed.position)
        index = slots.start[packed.row + first_row] + packed.position if slots else None
        for position in active:
            kept: list[Tensor] = []
            to = (slots.keys[position], slots.values[position], index) if slots and index is not None else None
            ends, wanted = packed.tail(tail) if tail and position == active[-1] else (packed, None)

            def attend(
                query: Tensor,
                key: Tensor,
                value: Tensor,
                kept: Any = kept,
                to: Any = to,
                ends: Packed = ends,
                wanted: Any = wanted,
            ) -> Tensor:
                query, key = rotate(query, key, value, rope, to, wanted)
                kept += [key, value]
                return self._causal(query, key, value, packed, ends)

            hidden = decoder_layer(self.layers[position], hidden, attend, wanted)
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
            return hidden[packed.tail(tail)[1]]
        for _, output, _, _ in self.forward(hidden, packed, active, slots, first_row, tail):
            hidden = output
        return hidden

    def prefill(self, prompts: Sequence[Tensor], active: Sequence[int], slots: Slots) -> Tensor:
        """Run prompts (T_i, D), filling `slots`; returns the last layer's output (B, D) at each prompt's last token."""
        last = []
        for rows in chunks([len(prompt) for prompt in prompts], self.device):
            packed = Packed.of([len(prompts[row]) for row in rows], self.device)
            hidden = torch.cat([prompts[row] for row in rows])
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
        self, position: int, hidden: Tensor, rope: tuple[Tensor, Tensor], slot: Tensor, used: Tensor, slots: Slots
    ) -> Tensor:
        """One new token a row, (B, D), through one layer: its keys go to `slot` (B,); it sees the row's first `used` (B,) slots."""

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = slots.keys[position], slots.values[position]
            query, _ = rotate(query, key, value, rope, (keys, values, slot))
            return self._over_slots(query, keys, values, used, slots)

        return decoder_layer(self.layers[position], hidden, attend)

    def _causal(self, query: Tensor, key: Tensor, value: Tensor, packed: Packed, ends: Packed) -> Tensor:
        """Causal attention of the tokens at the `ends` of rows (all of them, if it is `packed` itself)."""
        if self.flash:
            longest = max(ends.lengths), max(packed.lengths)
            return _flash(query, key, value, ends.offsets, packed.offsets, *longest, causal=True)

        def padded(tensor: Tensor, rows: Packed) -> Tensor:
            target = tensor.new_zeros((len(rows.lengths), max(rows.lengths), *tensor.shape[1:]))
            target[rows.row, rows.position] = tensor
            return target.transpose(1, 2)

        mask = None
        if ends is not packed:
            skipped = torch.tensor([n - m for n, m in zip(packed.lengths, ends.lengths)], device=query.device)
            positions = torch.arange(max(packed.lengths), device=query.device)
            last = (
                skipped[:, None] + positions[: max(ends.lengths)]
            )  # (B, longest end), what each query sees as its own position
            mask = (positions <= last[..., None])[:, None]
        mixed = scaled_dot_product_attention(
            padded(query, ends), padded(key, packed), padded(value, packed),
            attn_mask=mask, is_causal=mask is None, enable_gqa=self._grouped(query, key),
        )  # fmt: skip
        return mixed.transpose(1, 2)[ends.row, ends.position]

    def _over_slots(self, query: Tensor, keys: Tensor, values: Tensor, used: Tensor, slots: Slots) -> Tensor:
        if self.flash:
            each = slots.each[: len(query) + 1]
            return _flash(query, keys, values, each, slots.start, 1, slots.width, causal=False, used=used)
        longest = slots.width if self.device.type == "cuda" else int(used.max())  # a CUDA graph needs one shape

        def rows(tensor: Tensor) -> Tensor:
            stretches = tensor[: len(query) * slots.width].unflatten(0, (-1, slots.width))
            return stretches[:, :longest].transpose(1, 2)

        seen = torch.arange(longest, device=query.device)[None, :] < used[:, None]
        mixed = scaled_dot_product_attention(
            query[:, :, None],
            rows(keys),
            rows(values),
            attn_mask=seen[:, None, None],
            enable_gqa=self._grouped(query, keys),
        )
        return mixed[:, :, 0]

    @staticmethod
    def _grouped(query: Tensor, key: Tensor) -> bool:
        return query.shape[1] != key.shape[1]


def _flash(
    query: Tensor, key: Tensor, value: Tensor, offsets_q: Tensor, offsets_k: Tensor, max_q: int, max_k: int, *,
    causal: bool, used: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Flash attention (Dao 2023) over rows of unlike length; `used` (B,) limits the keys of each row.

    The operator itself, because the public `varlen_attn` has no `used` before PyTorch 2.13.
    """
    operator = torch.ops.aten._flash_attention_forward
    return operator(query, key, value, offsets_q, offsets_k, max_q, max_k, 0.0, causal, False, seqused_k=used)[0]
