"""Greedy continuation of many rows at once, one token a step.

On the CPU rows that have ended leave the batch, some at a time. On a GPU the step is replayed from CUDA graphs, one a layer, so that
any choice of layers runs without being captured again; a row that has ended sees a single slot, which costs next to nothing, until
the step shrinks to half its rows.

Shapes: B rows, D width, K new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from trimlingual.decoding.cuda_graphs import Graphs
from trimlingual.decoding.decoder import PackedDecoder
from trimlingual.decoding.rows import FIRST_WATCH, Rows, Watch
from trimlingual.decoding.slots import Slots

SLOTS_SHARE = 0.7  # of the memory that is free, the keys and values of a batch may take
SHRINK = 0.7  # on the CPU rows that have ended are dropped once no more than this share goes on


class Stepper:
    """Continues rows with the model behind `decoder`; keeps what can be used again (slots, graphs) between batches."""

    def __init__(self, decoder: PackedDecoder, eos: Sequence[int]):
        self.decoder = decoder
        self.eos = tuple(eos)
        self._slots: Slots | None = None
        self._graphs: Graphs | None = None

    def slots(self, capacities: Sequence[int]) -> Slots:
        """Slots for rows of at most these many positions: those of the last batch, if they are large enough."""
        old = self._slots
        if old is not None and old.assign(capacities):
            return old
        rows, total, width = len(capacities), sum(capacities), max(capacities)
        if old is not None:  # no smaller in any way, so that batches of two kinds do not take turns in making new ones
            rows, total, width = max(rows, old.num_rows), max(total, len(old.keys[0]) - 1), max(width, old.width)
        self._slots = self._graphs = old = None  # freed before the new ones are made
        slots = self._slots = self.decoder.slots(rows, total, width)
        slots.assign(capacities)
        return slots

    def room(self) -> int:
        """Slots that a batch may take: what memory allows, or what it holds already."""
        held = len(self._slots.keys[0]) if self._slots else 0
        return max(held, int(SLOTS_SHARE * self.decoder.free_bytes() / self.decoder.slot_bytes))

    def extend(self, slots: Slots, active: Sequence[int], rows: Rows, watch: Watch | None = None) -> None:
        """Go on through the layers at positions `active` until every row has ended or used its budget; fills `rows.out`."""
        if any(rows.alive):
            extend = self._extend_static if self.decoder.device.type == "cuda" else self._extend_shrinking
            extend(slots, active, rows, watch)

    def _extend_shrinking(self, slots: Slots, active: Sequence[int], rows: Rows, watch: Watch | None) -> None:
        decoder, device = self.decoder, self.decoder.device
        row = torch.arange(len(rows.token), device=device)  # which row each of the batch is
        token, position, budget = rows.token, rows.position, torch.tensor(rows.budget, device=device)
        ends = torch.tensor(self.eos, dtype=torch.long, device=device)
        length = torch.tensor([len(tokens) for tokens in rows.out], device=device)
        alive = torch.tensor(rows.alive, device=device)
        without = torch.tensor([-1 if w is None else w for w in rows.without or [None] * len(row)], device=device)
        steps, look = 0, FIRST_WATCH
        while True:
            length = length + alive
            for i, value in zip(row[alive].tolist(), token[alive].tolist()):
                rows.out[i].append(value)
            alive = alive & ~torch.isin(token, ends) & (length < budget)
            steps += 1
            if watch and steps == look:
                look *= 2
                going = set(row[alive].tolist())
                hopeless = watch(rows.out, [i in going for i in range(len(rows.out))])
                alive = alive & ~torch.isin(row, torch.tensor(hopeless, dtype=torch.long, device=device))
            keep = alive.nonzero()[:, 0]
            if not len(keep):
                return
            if len(keep) <= SHRINK * len(row):  # moving keys and values costs more than a few idle rows
                slots = slots.kept(keep, int(position[keep].max()) + 1, active)
                row, token, position, budget, length, alive, without = (
                    t[keep] for t in (row, token, position, budget, length, alive, without)
                )
            rope, slot, used = decoder.rope(position), slots.start[: len(position)] + position, position + 1
            hidden, lacking = decoder.embed(token), set(without.tolist())
            over = partial(decoder.over_slots, used=used, slots=slots)
            for layer in active:
                output = decoder.step(layer, hidden, rope, slot, slots, over)
                hidden = torch.where((without == layer)[:, None], hidden, output) if layer in lacking else output
            token, position = decoder.next_tokens(hidden), position + alive

    def _extend_static(self, slots: Slots, active: Sequence[int], rows: Rows, watch: Watch | None) -> None:
        graphs, most, count = self._graphs, max(rows.budget), len(rows.out)
        num_prefixes = len(rows.prefixes.lengths) if rows.prefixes else 0
        if graphs is None or graphs.slots is not slots or not graphs.hold(count, most, num_prefixes):
            if graphs is not None and graphs.slots is slots:  # no smaller in any way
                count, most = max(count, len(graphs.row)), max(most, graphs.out.shape[1] - 1)
                num_prefixes = max(num_prefixes, graphs.num_prefixes)
            self._graphs = graphs = None
            graphs = self._graphs = Graphs(self.decoder, slots, self.eos, count, most, num_prefixes)
        graphs.extend(active, rows, watch)
