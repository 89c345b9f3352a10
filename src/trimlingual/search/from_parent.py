"""Translate a candidate of the layer search from what its parent has done already.

A candidate is its parent without one decoder layer. Two things follow, and neither changes the result:

* the layers below the missing one see the same input, so their hidden states and keys and values are the parent's;
* the parent's translation is a good draft: one pass verifies all its tokens, and decoding goes on from the first that differs
  (greedy speculative decoding with a fixed draft; Stern et al. 2018, blockwise parallel decoding).

Shapes: B rows, N tokens packed (prompts and their drafts but for the last token), C of them computed, K longest draft, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimlingual.decoding.decoder import PackedDecoder
from trimlingual.decoding.loop import Stepper
from trimlingual.decoding.ragged import Packed, chunks, common_beginnings
from trimlingual.decoding.rows import Rows
from trimlingual.decoding.shared_prompts import MOST_ROWS, Prefixes
from trimlingual.decoding.slots import Slots

NO_DRAFT = [-1]  # never right, so decoding begins at the beginning


@dataclass(frozen=True)
class _Chunk:
    """The parent's pass over some rows."""

    packed: Packed
    first_row: int
    hidden: Mapping[int, Tensor]  # input (C, D) of each layer that may go
    keys: Mapping[int, Tensor]  # (C, K, E) of each layer
    values: Mapping[int, Tensor]
    of_prompt: Tensor  # indices of the prompts' tokens
    of_draft: Tensor


@dataclass(frozen=True)
class Trace:
    """The parent's pass over a batch of prompts and its own translations of them, kept for its candidates."""

    active: list[int]  # positions of the parent's layers
    lengths: list[int]  # of the prompts
    drafts: list[list[int]]
    limits: list[int]
    chunks: list[_Chunk]
    # Block Influence of the layers that may go, 1 - E[cos(input, output)] (Men et al. 2024, ShortGPT, eq. 1), over what is computed.
    influence: dict[int, float]

    @staticmethod
    def num_bytes(
        decoder: PackedDecoder,
        num_active: int,
        num_candidates: int,
        prompts: Sequence[Tensor],
        drafts: Sequence[Sequence[int]],
    ) -> int:
        """Memory a trace takes: keys and values of every layer, and the input of those that may go, at every position computed."""
        positions = 0
        for rows in chunks(_lengths(prompts, drafts), decoder.device):
            shared = common_beginnings([prompts[row] for row in rows])
            positions += sum(len(prompts[row]) + len(drafts[row]) - 1 for row in rows) - sum(shared)
        keys_values = decoder.slot_bytes // len(decoder.layers) * num_active
        width = decoder.decoder.config.hidden_size
        return positions * (keys_values + num_candidates * width * decoder.dtype.itemsize)


@torch.inference_mode()
def trace(
    decoder: PackedDecoder,
    prompts: Sequence[Tensor],
    drafts: Sequence[list[int]],
    limits: Sequence[int],
    active: Sequence[int],
    candidates: Sequence[int],
) -> Trace:
    """Run the parent, the layers at positions `active`, over each prompt (T_i, D) followed by its translation.

    `candidates` are the positions that may go.
    """
    done, influence = [], {position: 0.0 for position in candidates}
    for rows in chunks(_lengths(prompts, drafts), decoder.device):
        packed, hidden = decoder.packed([prompts[row] for row in rows], [drafts[row][:-1] for row in rows])
        inputs, keys, values = {}, {}, {}
        unread = None if active[-1] in influence else [1] * len(rows)  # of the last layer's output nothing is needed
        for position, output, key, value in decoder.forward(hidden, packed, active, tail=unread):
            if position in influence:
                inputs[position] = hidden
                distance = 1 - torch.nn.functional.cosine_similarity(hidden.float(), output.float(), dim=-1)
                influence[position] += distance.sum().item()
            keys[position], values[position], hidden = key, value, output
        prompt = torch.tensor([len(prompts[row]) for row in rows], device=decoder.device)
        in_draft = packed.position >= prompt[packed.row]
        of_prompt, of_draft = (~in_draft).nonzero()[:, 0], in_draft.nonzero()[:, 0]
        done.append(_Chunk(packed, rows.start, inputs, keys, values, of_prompt, of_draft))
    total = sum(sum(chunk.packed.computed.lengths) for chunk in done)
    influence = {position: value / total for position, value in influence.items()}
    return Trace(list(active), [len(p) for p in prompts], [list(d) for d in drafts], list(limits), done, influence)


def _lengths(prompts: Sequence[Tensor], drafts: Sequence[Sequence[int]]) -> list[int]:
    """Of each prompt and its draft; the draft's last token is only predicted."""
    return [len(prompt) + len(draft) - 1 for prompt, draft in zip(prompts, drafts)]


# Called with a candidate's index and its tokens so far; True gives the candidate up.
Hopeless = Callable[[int, list[list[int]]], bool]


@torch.inference_mode()
def translate_without(
    stepper: Stepper, traced: Trace, positions: Sequence[int], hopeless: Hopeless | None = None
) -> list[list[list[int]] | None]:
    """What the traced parent would translate without its layer at each of these positions; None where `hopeless` gave up.

    Equal to decoding each prompt anew with that layer left out (tests/test_from_parent.py). The candidates are decoded in one batch,
    whose rows go without different layers, so that a step reads the weights once for all of them. With flash attention it also reads
    a prompt's keys and values below the missing layers once for all of them.
    """
    decoder, count = stepper.decoder, len(traced.lengths)
    capacities = [length + limit for length, limit in zip(traced.lengths, traced.limits)] * len(positions)
    prefixes = None
    if decoder.flash and 1 < len(positions) <= MOST_ROWS:
        prefixes = Prefixes(
            traced.lengths, [*range(count)] * len(positions), [p for p in positions for _ in range(count)]
        )
        slots = stepper.slots([*capacities, *traced.lengths])
        shared = [layer for layer in traced.active if layer < max(positions)]
        for chunk in traced.chunks:
            _fill(slots, chunk, shared, len(capacities) + chunk.first_row, chunk.of_prompt)
    else:
        slots = stepper.slots(capacities)
    draft = _padded(traced.drafts, decoder.device)
    predicted = torch.full_like(draft, -1).repeat(len(positions), 1)
    for number, position in enumerate(positions):
        for chunk in traced.chunks:
            own = chunk.of_draft if prefixes else None
            hidden = _above(decoder, traced, chunk, position, slots, number * count, own)
            row, column = _answers(traced.drafts, chunk)
            predicted[number * count + row, column] = decoder.next_tokens(hidden)
    differs = (predicted != draft.repeat(len(positions), 1)) & (predicted >= 0)
    first = differs.int().argmax(-1)  # index of the first token that differs
    changed = differs.any(-1)
    drafts = traced.drafts * len(positions)
    rows = Rows(
        token=predicted.gather(1, first[:, None])[:, 0],
        position=torch.tensor(traced.lengths * len(positions), device=decoder.device) + first,
        out=[tokens[:n] if new else list(tokens) for tokens, n, new in zip(drafts, first.tolist(), changed.tolist())],
        budget=traced.limits * len(positions),
        alive=changed.tolist(),
        without=[position for position in positions for _ in range(count)],
        prefixes=prefixes,
    )
    given_up: set[int] = set()

    def watch(out: list[list[int]], alive: list[bool]) -> list[int]:
        assert hopeless is not None
        for number in range(len(positions)):
            mine = slice(number * count, (number + 1) * count)
            if number not in given_up and any(alive[mine]) and hopeless(number, out[mine]):
                given_up.add(number)
        return [row for row in range(len(out)) if row // count in given_up]

    active = [layer for layer in traced.active if len(positions) > 1 or layer not in positions]
    stepper.extend(slots, active, rows, watch if hopeless else None)
    return [
        None if number in given_up else rows.out[number * count : (number + 1) * count]
        for number in range(len(positions))
    ]


@torch.inference_mode()
def losses_without(decoder: PackedDecoder, traced: Trace, position: int) -> list[float]:
    """Summed loss in nats of each draft under the traced parent without its layer at `position`, teacher-forced."""
    sums = torch.zeros(len(traced.drafts), dtype=torch.float64, device=decoder.device)
    draft = _padded(traced.drafts, decoder.device)
    for chunk in traced.chunks:
        hidden = _above(decoder, traced, chunk, position, None)
        row, column = _answers(traced.drafts, chunk)
        sums.index_add_(0, row, _token_losses(decoder, hidden, draft[row, column]))
    return sums.tolist()


@torch.inference_mode()
def losses(
    decoder: PackedDecoder, prompts: Sequence[Tensor], answers: Sequence[list[int]], active: Sequence[int]
) -> list[float]:
    """Summed loss in nats of each answer after its prompt (T_i, D), through the layers at positions `active`."""
    sums = torch.zeros(len(prompts), dtype=torch.float64, device=decoder.device)
    wanted = _padded(answers, decoder.device)
    for rows in chunks(_lengths(prompts, answers), decoder.device):
        packed, hidden = decoder.packed([prompts[row] for row in rows], [answers[row][:-1] for row in rows])
        hidden = decoder.ends(hidden, packed, active, [len(answers[row]) for row in rows])
        answer = Packed.of([len(answers[row]) for row in rows], decoder.device)
        row, column = rows.start + answer.row, answer.position
        sums.index_add_(0, row, _token_losses(decoder, hidden, wanted[row, column]))
    return sums.tolist()


def _token_losses(decoder: PackedDecoder, hidden: Tensor, targets: Tensor) -> Tensor:
    """Loss (tokens,) in nats of the targets, from hidden states (tokens, D)."""
    return torch.nn.functional.cross_entropy(decoder.logits(hidden).float(), targets, reduction="none").double()


def _above(
    decoder: PackedDecoder,
    traced: Trace,
    chunk: _Chunk,
    position: int,
    slots: Slots | None,
    first_row: int = 0,
    own: Tensor | None = None,
) -> Tensor:
    """The candidate's hidden states where it predicts the drafts' tokens, (tokens, D).

    Fills `slots` with its keys and values, which below the missing layer are the parent's: there only of the tokens `own`, if given.
    """
    packed, hidden, first_row = chunk.packed, chunk.hidden[position], first_row + chunk.first_row
    if slots is not None:
        _fill(slots, chunk, [layer for layer in traced.active if layer < position], first_row, own)
    above = [layer for layer in traced.active if layer > position]
    drafts = traced.drafts[chunk.first_row :][: len(packed.lengths)]
    return decoder.ends(hidden, packed, above, [len(draft) for draft in drafts], slots, first_row)


def _fill(slots: Slots, chunk: _Chunk, layers: Sequence[int], first_row: int, tokens: Tensor | None) -> None:
    """Write the parent's keys and values of these layers to the slots of rows from `first_row` on; all tokens' or these."""
    row, position, source = chunk.packed.row, chunk.packed.position, chunk.packed.source
    if tokens is not None:
        row, position = row[tokens], position[tokens]
        source = tokens if source is None else source[tokens]
    index = slots.start[row + first_row] + position
    for layer in layers:
        key, value = chunk.keys[layer], chunk.values[layer]
        if source is not None:
            key, value = key[source], value[source]
        slots.keys[layer][index], slots.values[layer][index] = key, value


def _answers(drafts: Sequence[list[int]], chunk: _Chunk) -> tuple[Tensor, Tensor]:
    """Of each token of the chunk's drafts: the row in the batch, and the index in the draft."""
    own = drafts[chunk.first_row :][: len(chunk.packed.lengths)]
    packed = Packed.of([len(draft) for draft in own], chunk.packed.row.device)
    return packed.row + chunk.first_row, packed.position


def _padded(drafts: Sequence[list[int]], device: torch.device) -> Tensor:
    """Drafts as one tensor (B, K), -1 after each one's end."""
    rows = [torch.tensor(draft) for draft in drafts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).to(device)
