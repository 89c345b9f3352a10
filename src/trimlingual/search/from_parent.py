"""Translate the candidates of the layer search faster, by starting from what their parent has computed.

A candidate is its parent model without one decoder layer. This saves work in two ways, and neither changes a translation:

* The layers below the missing one get the same input as in the parent. Their hidden states, keys and values are the parent's.
* The candidate's translation often begins like the parent's, which therefore is its draft. One forward pass predicts every token of
  the draft. Decoding goes on from the first token that differs (speculative decoding with a fixed draft; Stern et al. 2018,
  blockwise parallel decoding).

`trace` runs the parent once and keeps what is needed. `translate_without` translates candidates from the trace.

Shapes: B rows, one per clip and language (n * B with n candidates), N tokens packed (prompts and drafts, each draft without its
last token), C of them computed, K key-value heads, E head size, T longest draft, D width. Row, position, slot: see
decoding/__init__.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimlingual.decoding.decoder import PackedDecoder
from trimlingual.decoding.loop import Stepper
from trimlingual.decoding.ragged import Packed, chunks, common_beginnings
from trimlingual.decoding.rows import Rows
from trimlingual.decoding.shared_prompts import MOST_ROWS, Prefixes
from trimlingual.decoding.slots import Slots

NO_DRAFT = [-1]  # a draft whose only token is never right, so that decoding begins with the first token


@dataclass(frozen=True)
class _Chunk:
    """The parent's pass over consecutive rows, as many as are run at once."""

    packed: Packed
    first_row: int
    hidden: Mapping[int, Tensor]  # per layer that may go: its input (C, D)
    keys: Mapping[int, Tensor]  # per layer (C, K, E); none for losses
    values: Mapping[int, Tensor]  # per layer (C, K, E); none for losses
    prompt_tokens: Tensor  # packed_index of the prompts' tokens
    draft_tokens: Tensor  # packed_index of the drafts' tokens


@dataclass(frozen=True)
class Trace:
    """The parent's pass over a batch of prompts, each followed by the parent's translation. It is kept for the candidates."""

    active: list[int]  # the parent's layers
    lengths: list[int]  # (B,) tokens of each prompt
    drafts: list[list[int]]  # (B,) the parent's translations
    limits: list[int]  # (B,) most new tokens
    chunks: list[_Chunk]
    # Block Influence per layer that may go: 1 - E[cos(input, output)] over the computed tokens (Men et al. 2024, ShortGPT, eq. 1).
    influence: dict[int, float]

    @staticmethod
    def together(traces: Sequence[Trace]) -> Trace:
        """Traces of one parent over several batches as one over all rows, without a copy. `influence` is the first's."""
        first, *others = traces
        lengths, drafts, limits, chunks = [*first.lengths], [*first.drafts], [*first.limits], [*first.chunks]
        for other in others:
            chunks += [replace(chunk, first_row=chunk.first_row + len(lengths)) for chunk in other.chunks]
            lengths, drafts, limits = lengths + other.lengths, drafts + other.drafts, limits + other.limits
        return Trace(first.active, lengths, drafts, limits, chunks, first.influence)

    @staticmethod
    def num_bytes(
        decoder: PackedDecoder,
        num_active: int,
        num_candidates: int,
        prompts: Sequence[Tensor],
        drafts: Sequence[Sequence[int]],
    ) -> int:
        """Bytes of a trace: per computed token the keys and values of `num_active` layers, and the input of `num_candidates` layers."""
        num_computed = 0
        for rows in chunks(_lengths(prompts, drafts), decoder.device):
            shared = common_beginnings([prompts[row] for row in rows])
            num_computed += sum(len(prompts[row]) + len(drafts[row]) - 1 for row in rows) - sum(shared)
        keys_values = decoder.slot_bytes // len(decoder.layers) * num_active
        width = decoder.decoder.config.hidden_size
        return num_computed * (keys_values + num_candidates * width * decoder.dtype.itemsize)


@torch.inference_mode()
def trace(
    decoder: PackedDecoder,
    prompts: Sequence[Tensor],
    drafts: Sequence[list[int]],
    limits: Sequence[int],
    active: Sequence[int],
    candidates: Sequence[int],
    for_losses: bool = False,
) -> Trace:
    """Run the parent, the layers `active`, over each prompt (T_i, D) followed by its draft. `candidates` are the layers that may go.

    Losses need no keys and values of the parent: `for_losses` does not keep them.
    """
    traced_chunks, influence = [], {layer: 0.0 for layer in candidates}
    for rows in chunks(_lengths(prompts, drafts), decoder.device):
        packed, hidden = decoder.packed([prompts[row] for row in rows], [drafts[row][:-1] for row in rows])
        inputs, keys, values = {}, {}, {}
        # The last layer's output is needed for its Block Influence alone. If it may not go, one token per row will do.
        tail = None if active[-1] in influence else [1] * len(rows)
        for layer, output, key, value in decoder.forward(hidden, packed, active, tail=tail):
            if layer in influence:
                inputs[layer] = hidden
                distance = 1 - torch.nn.functional.cosine_similarity(hidden.float(), output.float(), dim=-1)
                influence[layer] += distance.sum().item()
            if not for_losses:  # where they are parts of a joined product, the queries beside them are not kept
                keys[layer], values[layer] = key.contiguous(), value.contiguous()
            hidden = output
        prompt_length = torch.tensor([len(prompts[row]) for row in rows], device=decoder.device)
        in_draft = packed.position >= prompt_length[packed.row]
        prompt_tokens, draft_tokens = (~in_draft).nonzero()[:, 0], in_draft.nonzero()[:, 0]
        traced_chunks.append(_Chunk(packed, rows.start, inputs, keys, values, prompt_tokens, draft_tokens))
    num_computed = sum(sum(chunk.packed.computed.lengths) for chunk in traced_chunks)
    influence = {layer: distance / num_computed for layer, distance in influence.items()}
    lengths = [len(prompt) for prompt in prompts]
    return Trace(list(active), lengths, [list(draft) for draft in drafts], list(limits), traced_chunks, influence)


def _lengths(prompts: Sequence[Tensor], drafts: Sequence[Sequence[int]]) -> list[int]:
    """Tokens that are run per row: the prompt and the draft without its last token, which is predicted and never read."""
    return [len(prompt) + len(draft) - 1 for prompt, draft in zip(prompts, drafts)]


# Called with the index of a candidate and its rows' tokens so far. True gives the candidate up.
Hopeless = Callable[[int, list[list[int]]], bool]


@torch.inference_mode()
def translate_without(
    stepper: Stepper, traced: Trace, layers: Sequence[int], hopeless: Hopeless | None = None
) -> list[list[list[int]] | None]:
    """What the traced parent would translate without each of these layers: per layer the new tokens of B rows, or None if given up.

    The result equals decoding each prompt anew with the layer left out (tests/test_from_parent.py).

    All candidates are decoded in one batch, whose rows go without different layers. A step therefore reads the weights once for all
    candidates. With flash attention it also reads a prompt's keys and values once for all candidates, in the layers below theirs.
    """
    return _translate(stepper, traced, layers, True, hopeless)


@torch.inference_mode()
def translate_changed(stepper: Stepper, traced: Trace, layer: int) -> list[list[int]]:
    """What the traced parent would translate with `layer`, and all that follows it, as it is now: weights have changed since the trace.

    What only the head has changed in is translated from the last layer.
    """
    (rows,) = _translate(stepper, traced, [layer], False, None)
    assert rows is not None
    return rows


def _translate(
    stepper: Stepper, traced: Trace, layers: Sequence[int], left_out: bool, hopeless: Hopeless | None
) -> list[list[list[int]] | None]:
    """Translations of candidates that differ from the parent from `layers` on, one candidate each; whether that layer is left out."""
    decoder, count = stepper.decoder, len(traced.lengths)
    capacities = [length + limit for length, limit in zip(traced.lengths, traced.limits)] * len(layers)
    prefixes = None
    if decoder.flash and 1 < len(layers) <= MOST_ROWS:
        prefixes = Prefixes(traced.lengths, [*range(count)] * len(layers), [i for i in layers for _ in range(count)])
        slots = stepper.slots([*capacities, *traced.lengths])
        shared = [layer for layer in traced.active if layer < max(layers)]
        for chunk in traced.chunks:
            _fill(slots, chunk, shared, len(capacities) + chunk.first_row, chunk.prompt_tokens)
    else:
        slots = stepper.slots(capacities)
    draft = _padded(traced.drafts, decoder.device)
    predicted = torch.full_like(draft, -1).repeat(len(layers), 1)
    for number, layer in enumerate(layers):
        for chunk in traced.chunks:
            not_shared = chunk.draft_tokens if prefixes else None
            active = [i for i in traced.active if i > layer or (i == layer and not left_out)]
            hidden = _run_above(decoder, traced, chunk, layer, active, slots, number * count, not_shared)
            row, column = _draft_indices(traced.drafts, chunk)
            predicted[number * count + row, column] = decoder.next_tokens(hidden)
    differs = (predicted != draft.repeat(len(layers), 1)) & (predicted >= 0)
    first = differs.int().argmax(-1)  # in each draft, the index of the first token that differs
    changed = differs.any(-1)
    drafts = traced.drafts * len(layers)
    rows = Rows(
        token=predicted.gather(1, first[:, None])[:, 0],
        position=torch.tensor(traced.lengths * len(layers), device=decoder.device) + first,
        out=[tokens[:n] if new else list(tokens) for tokens, n, new in zip(drafts, first.tolist(), changed.tolist())],
        budget=traced.limits * len(layers),
        alive=changed.tolist(),
        without=[layer for layer in layers for _ in range(count)] if left_out else None,
        prefixes=prefixes,
    )
    given_up: set[int] = set()

    def watch(out: list[list[int]], alive: list[bool]) -> list[int]:
        assert hopeless is not None
        for number in range(len(layers)):
            candidate_rows = slice(number * count, (number + 1) * count)
            if number not in given_up and any(alive[candidate_rows]) and hopeless(number, out[candidate_rows]):
                given_up.add(number)
        return [row for row in range(len(out)) if row // count in given_up]

    active = [layer for layer in traced.active if len(layers) > 1 or not left_out or layer not in layers]
    stepper.extend(slots, active, rows, watch if hopeless else None)
    return [
        None if number in given_up else rows.out[number * count : (number + 1) * count] for number in range(len(layers))
    ]


@torch.inference_mode()
def losses_without(decoder: PackedDecoder, traced: Trace, layer: int) -> list[float]:
    """Loss of each draft (B,), in nats summed over its tokens, under the traced parent without `layer` (teacher-forced)."""
    return _losses_above(decoder, traced, layer, [i for i in traced.active if i > layer])


@torch.inference_mode()
def losses_changed(decoder: PackedDecoder, traced: Trace, layer: int) -> list[float]:
    """As `losses_without`, with `layer` and all that follows it as it is now (see `translate_changed`)."""
    return _losses_above(decoder, traced, layer, [i for i in traced.active if i >= layer])


def _losses_above(decoder: PackedDecoder, traced: Trace, layer: int, active: Sequence[int]) -> list[float]:
    """Losses of the drafts, run from the parent's input of `layer` through `active`."""
    sums = torch.zeros(len(traced.drafts), dtype=torch.float64, device=decoder.device)
    draft = _padded(traced.drafts, decoder.device)
    for chunk in traced.chunks:
        hidden = _run_above(decoder, traced, chunk, layer, active, None)
        row, column = _draft_indices(traced.drafts, chunk)
        sums.index_add_(0, row, _token_losses(decoder, hidden, draft[row, column]))
    return sums.tolist()


@torch.inference_mode()
def losses(
    decoder: PackedDecoder, prompts: Sequence[Tensor], answers: Sequence[list[int]], active: Sequence[int]
) -> list[float]:
    """Loss of each answer (B,), in nats summed over its tokens, after its prompt (T_i, D), through the layers `active`."""
    sums = torch.zeros(len(prompts), dtype=torch.float64, device=decoder.device)
    targets = _padded(answers, decoder.device)
    for rows in chunks(_lengths(prompts, answers), decoder.device):
        packed, hidden = decoder.packed([prompts[row] for row in rows], [answers[row][:-1] for row in rows])
        hidden = decoder.ends(hidden, packed, active, [len(answers[row]) for row in rows])
        answer = Packed.of([len(answers[row]) for row in rows], decoder.device)
        row, column = rows.start + answer.row, answer.position
        sums.index_add_(0, row, _token_losses(decoder, hidden, targets[row, column]))
    return sums.tolist()


def _token_losses(decoder: PackedDecoder, hidden: Tensor, targets: Tensor) -> Tensor:
    """Loss in nats of each target (tokens,), from the last layer's output (tokens, D)."""
    return torch.nn.functional.cross_entropy(decoder.logits(hidden).float(), targets, reduction="none").double()


def _run_above(
    decoder: PackedDecoder,
    traced: Trace,
    chunk: _Chunk,
    layer: int,
    active: Sequence[int],
    slots: Slots | None,
    first_row: int = 0,
    not_shared: Tensor | None = None,
) -> Tensor:
    """The candidate run from the input of `layer` on, through `active`: the last layer's output (draft tokens, D) where it predicts
    these tokens.

    Its keys and values are written to `slots`, for the rows from `first_row` on. Below `layer` they are copies of the parent's: of
    all tokens, or of the tokens `not_shared` (packed_index) alone.
    """
    packed, hidden, first_row = chunk.packed, chunk.hidden[layer], first_row + chunk.first_row
    if slots is not None:
        _fill(slots, chunk, [below for below in traced.active if below < layer], first_row, not_shared)
    drafts = traced.drafts[chunk.first_row :][: len(packed.lengths)]
    return decoder.ends(hidden, packed, active, [len(draft) for draft in drafts], slots, first_row)


def _fill(slots: Slots, chunk: _Chunk, layers: Sequence[int], first_row: int, tokens: Tensor | None) -> None:
    """Copy the parent's keys and values of these layers to the slots of the rows from `first_row` on.

    All tokens are copied, or the tokens with these packed indices alone.
    """
    row, position, computed_index = chunk.packed.row, chunk.packed.position, chunk.packed.computed_index
    if tokens is not None:
        row, position = row[tokens], position[tokens]
        computed_index = tokens if computed_index is None else computed_index[tokens]
    slot = slots.start[row + first_row] + position
    for layer in layers:
        key, value = chunk.keys[layer], chunk.values[layer]
        if computed_index is not None:
            key, value = key[computed_index], value[computed_index]
        slots.keys[layer][slot], slots.values[layer][slot] = key, value


def _draft_indices(drafts: Sequence[list[int]], chunk: _Chunk) -> tuple[Tensor, Tensor]:
    """For each token of the chunk's drafts: its row in the batch, and its index in the draft."""
    chunk_drafts = drafts[chunk.first_row :][: len(chunk.packed.lengths)]
    packed = Packed.of([len(draft) for draft in chunk_drafts], chunk.packed.row.device)
    return packed.row + chunk.first_row, packed.position


def _padded(drafts: Sequence[list[int]], device: torch.device) -> Tensor:
    """Drafts as one tensor (B, T), with -1 behind the end of each."""
    rows = [torch.tensor(draft) for draft in drafts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).to(device)
