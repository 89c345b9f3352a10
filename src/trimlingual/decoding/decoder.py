"""The decoder's forward over packed tokens: rows of unlike length without padding, keys and values in slots.

Every row owns a stretch of slots, one a position, so a rejected draft is overwritten where it stands and nothing is ever shifted.
On a GPU in 16 bits the attention is the flash kernel for rows of unlike length; elsewhere rows are padded for PyTorch's own attention,
in stretches of equal size. Any subset of the layers can be run: a candidate of the layer search is a choice of layers, not a model.

Shapes: B rows, N tokens of all rows packed, C of them computed, M in rows' tails, S slots, H heads, K key-value heads, E head size,
D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trimlingual.decoding.attention import attention_of_one, flash_attention
from trimlingual.decoding.ragged import Packed, Tail, chunks, common_beginnings
from trimlingual.decoding.slots import Into, Slots
from trimlingual.models.kernels import rotate
from trimlingual.models.qwen2_audio import decoder_layer, embed, layer_list, lm_head, rms_norm, text_decoder

# Attention (B, H, E) of one token a row over keys and values (S, K, E) of the slots.
OverSlots = Callable[[Tensor, Tensor, Tensor], Tensor]


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
        rope, into = self.rope(packed.computed.position), Into(packed, slots, first_row) if slots else None
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

    def _causal_over_slots(self, query: Tensor, position: int, into: Into, tail: Tail) -> Tensor:
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
