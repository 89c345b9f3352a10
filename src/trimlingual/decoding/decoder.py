"""The forward pass of the text decoder: over whole rows without padding (`forward`), and over one token per row (`step`).

Keys and values are in slots. Every row owns one slot per position, so a draft that was rejected is overwritten and nothing is
shifted. On a GPU in 16 bits attention is the flash kernel for rows of unlike length. Elsewhere rows are padded for PyTorch's own
attention, and all rows own equally many slots. Any subset of the layers can be run, so a candidate of the layer search needs no
model of its own.

Shapes: B rows, N tokens of all rows packed, C of them computed, M of them in tails, S slots, H heads, K key-value heads, E head
size, D width, V vocabulary. The indices are drawn in decoding/__init__.py.
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
from trimlingual.decoding.slots import PackedInSlots, Slots
from trimlingual.models.family import family_of
from trimlingual.models.kernels import rms_norm, rotate
from trimlingual.models.tree import embed, layer_list, lm_head, text_decoder

# Attention (B, H, E) of one query (B, H, E) per row over a layer's keys and values (S, K, E).
OverSlots = Callable[[Tensor, Tensor, Tensor], Tensor]


class PackedDecoder:
    """The text decoder of `model`, run over packed tokens."""

    def __init__(self, model: Any):
        self.model, self.family = model, family_of(model)
        self.decoder, self.head = text_decoder(model), lm_head(model)
        self.layers = list(layer_list(model, "decoder"))
        weight = self.decoder.norm.weight  # a tensor in every model; others may be packed
        self.device, self.dtype = weight.device, weight.dtype
        attention: Any = self.layers[0].self_attn
        self.head_dim = attention.head_dim
        self.num_kv_heads = attention.config.num_key_value_heads
        self.flash = self.device.type == "cuda" and self.dtype in (torch.bfloat16, torch.float16)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot: the keys and values of one position in all layers."""
        return 2 * len(self.layers) * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def free_bytes(self) -> int:
        """Memory of the device that this process may take: what is free, or what is left of its share if it was given one.

        What PyTorch has reserved and does not use counts as free.
        """
        if self.device.type != "cuda":
            return psutil.virtual_memory().available
        free, total = torch.cuda.mem_get_info(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        share = int(torch.cuda.get_per_process_memory_fraction(self.device) * total)
        return max(0, min(free, share - reserved)) + reserved - torch.cuda.memory_allocated(self.device)

    def slots(self, rows: int, total: int, width: int) -> Slots:
        """Empty slots for `rows` rows, with at most `width` positions per row and `total` positions in all."""
        shape = (total + 1 if self.flash else rows * width, self.num_kv_heads, self.head_dim)
        # Zeros, not garbage: a masked NaN is still a NaN once it is multiplied by a weight of 0.
        keys, values = (
            [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in self.layers] for _ in range(2)
        )
        start = torch.arange(rows + 1, dtype=torch.int32, device=self.device) * width
        return Slots(keys, values, start, width, self.flash)

    def rope(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary cosines and sines, (N, E) each, of positions (N,)."""
        return self.family.rope(self.model, position, self.dtype)

    def forward(
        self,
        hidden: Tensor,
        packed: Packed,
        active: Sequence[int],
        slots: Slots | None = None,
        first_row: int = 0,
        tail: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Run whole rows, hidden states (C, D), through the layers `active`. Each token sees its own row, up to itself.

        Yields per layer: its index, its output (C, D), its keys (C, K, E) and its values (C, K, E). With `slots`, keys and values
        of all N tokens are written to them as well, for the rows from `first_row` on.

        With `tail` the last layer computes its output for the last `tail[b]` tokens of each row b alone, (sum of `tail`, D).
        """
        rope = self.rope(packed.computed.position)
        in_slots = PackedInSlots(packed, slots, first_row) if slots else None
        for layer in active:
            keys_values: list[Tensor] = []
            last = packed.tail(tail) if tail and layer == active[-1] else None

            def attend(
                query: Tensor, key: Tensor, value: Tensor,
                keys_values: Any = keys_values, layer: int = layer, last: Tail | None = last,
            ) -> Tensor:  # fmt: skip
                to = in_slots.destination(layer) if in_slots else None
                query, key = rotate(query, key, value, rope, to, last.computed_index if last else None)
                keys_values += [key, value]
                if in_slots:
                    in_slots.copy_beginnings(layer)
                    if self.flash and packed.computed_index is not None:
                        return self._causal_over_slots(query, layer, in_slots, last or packed.computed)
                if packed.computed_index is not None:
                    key, value = key[packed.computed_index], value[packed.computed_index]
                return self._causal(query, key, value, packed, last or packed.computed)

            hidden = self.family.decoder_layer(
                self.layers[layer], hidden, attend, last.computed_index if last else None
            )
            yield layer, hidden, keys_values[0], keys_values[1]

    def ends(
        self,
        hidden: Tensor,
        packed: Packed,
        active: Sequence[int],
        tail: Sequence[int],
        slots: Slots | None = None,
        first_row: int = 0,
    ) -> Tensor:
        """Run `forward` to its end. Returns the last layer's output (sum of `tail`, D), before the norm, at each row's last tokens."""
        if not active:
            return hidden[packed.tail(tail).computed_index]
        for _, output, _, _ in self.forward(hidden, packed, active, slots, first_row, tail):
            hidden = output
        return hidden

    def packed(
        self, prompts: Sequence[Tensor], answers: Sequence[Sequence[int]] | None = None
    ) -> tuple[Packed, Tensor]:
        """Pack rows that are a prompt (T_i, D) followed by the tokens of an answer. Also the input (C, D) of the computed tokens."""
        answers = answers or [()] * len(prompts)
        shared = common_beginnings(prompts)
        pieces = []
        for prompt, skip, tokens in zip(prompts, shared, answers):
            pieces.append(prompt[skip:])
            if tokens:
                pieces.append(self.embed(torch.tensor(tokens, dtype=torch.long, device=self.device)))
        lengths = [len(prompt) + len(tokens) for prompt, tokens in zip(prompts, answers)]
        return Packed.of(lengths, self.device, shared), torch.cat(pieces)

    def prefill(self, prompts: Sequence[Tensor], active: Sequence[int], slots: Slots) -> Tensor:
        """Run prompts (T_i, D) and fill `slots`. Returns the last layer's output (B, D) at each prompt's last token."""
        last = []
        for rows in chunks([len(prompt) for prompt in prompts], self.device):
            packed, hidden = self.packed([prompts[row] for row in rows])
            last.append(self.ends(hidden, packed, active, [1] * len(rows), slots, rows.start))
        return torch.cat(last)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) from the last layer's output (..., D)."""
        return self.head(rms_norm(self.decoder.norm, hidden))

    def next_tokens(self, hidden: Tensor) -> Tensor:
        """The most likely next tokens (...) from the last layer's output (..., D)."""
        return self.logits(hidden).argmax(-1)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings (..., D)."""
        return embed(self.model, tokens)

    def step(
        self, layer: int, hidden: Tensor, rope: tuple[Tensor, Tensor], slot: Tensor, slots: Slots, over: OverSlots
    ) -> Tensor:
        """Run one token per row, (B, D), through one layer. Its keys and values go to `slot` (B,), and then `over` attends."""

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = slots.keys[layer], slots.values[layer]
            query, _ = rotate(query, key, value, rope, (keys, values, slot))
            return over(query, keys, values)

        return self.family.decoder_layer(self.layers[layer], hidden, attend)

    def _causal(self, query: Tensor, key: Tensor, value: Tensor, packed: Packed, tail: Tail) -> Tensor:
        """Causal attention (M, H, E) of the tails' queries (M, H, E) over the rows' keys and values (N, K, E)."""
        if self.flash:
            longest = max(tail.lengths), max(packed.lengths)
            return flash_attention(query, key, value, tail.offsets, packed.offsets, *longest, causal=True)[0]

        def padded(tensor: Tensor, row: Tensor, position: Tensor, *shape: int) -> Tensor:
            target = tensor.new_zeros((*shape, *tensor.shape[1:]))
            target[row, position] = tensor
            return target.transpose(1, 2)

        keys, values = (
            padded(t, packed.row, packed.position, len(packed.lengths), tail.longest_row) for t in (key, value)
        )
        mixed = torch.empty_like(query)
        for group in tail.groups:
            queries = padded(
                query[group.tokens], group.row_in_group, group.tail_position, len(group.rows), group.longest_tail
            )
            keys_values = (keys, values) if len(tail.groups) == 1 else (keys[group.rows], values[group.rows])
            out = scaled_dot_product_attention(
                queries,
                *keys_values,
                attn_mask=group.mask,
                is_causal=group.mask is None,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            mixed[group.tokens] = out.transpose(1, 2)[group.row_in_group, group.tail_position]
        return mixed

    def _causal_over_slots(self, query: Tensor, layer: int, rows: PackedInSlots, tail: Tail) -> Tensor:
        """`_causal` over keys and values that are in slots, with flash attention."""
        longest = max(tail.lengths), max(rows.packed.lengths)
        keys, values = rows.slots.keys[layer], rows.slots.values[layer]
        mixed, _ = flash_attention(
            query, keys, values, tail.offsets, rows.start, *longest, causal=True, used=rows.lengths
        )
        return mixed

    def over_slots(self, query: Tensor, keys: Tensor, values: Tensor, used: Tensor, slots: Slots) -> Tensor:
        """Attention (B, H, E) of one query (B, H, E) per row. Row b reads its first `used[b]` slots."""
        if self.flash:
            return attention_of_one(query, keys, values, slots.start[: len(query) + 1], used, slots)[0]
        longest = slots.width if self.device.type == "cuda" else int(used.max())  # a CUDA graph needs one shape

        def rows(tensor: Tensor) -> Tensor:
            stretches = tensor[: len(query) * slots.width].unflatten(0, (-1, slots.width))
            return stretches[:, :longest].transpose(1, 2)

        mask = torch.arange(longest, device=query.device)[None, :] < used[:, None]
        # The queries that have a key-value head in common pass as tokens of one head, so that its keys and values are not copied.
        grouped = query.unflatten(1, (keys.shape[1], -1))
        mixed = scaled_dot_product_attention(grouped, rows(keys), rows(values), attn_mask=mask[:, None, None])
        return mixed.flatten(1, 2)
