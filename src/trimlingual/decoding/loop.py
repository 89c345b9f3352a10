"""Greedy continuation of many rows at once: one new token per row and step, until every row has ended.

On the CPU rows that have ended leave the batch, some at a time. On a GPU the steps are CUDA graphs (cuda_graphs.py). A row that has
ended stays in the step there, and reads a single slot, until the step shrinks to half its rows.

Shapes: B rows. Row, entry, slot and position: see decoding/__init__.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from trimlingual.decoding.cuda_graphs import Graphs
from trimlingual.decoding.decoder import PackedDecoder
from trimlingual.decoding.rows import FIRST_WATCH, Rows, Watch
from trimlingual.decoding.slots import Slots

SLOTS_SHARE = 0.7  # of the free memory may be taken by the keys and values of a batch
SHRINK = 0.7  # on the CPU, rows that have ended are dropped when at most this share of the batch goes on


class Stepper:
    """Continues rows with the model behind `decoder`. Slots and graphs are kept for the next batch.

    `eos` are the ids of the tokens that end a row.
    """

    def __init__(self, decoder: PackedDecoder, eos: Sequence[int]):
        self.decoder = decoder
        self.eos = tuple(eos)
        self._slots: Slots | None = None
        self._graphs: Graphs | None = None

    def slots(self, capacities: Sequence[int]) -> Slots:
        """Slots for rows with at most `capacities[b]` positions in row b: those of the last batch if they are large enough."""
        old = self._slots
        if old is not None and old.assign(capacities):
            return old
        rows, total, width = len(capacities), sum(capacities), max(capacities)
        # In no respect smaller than the last: otherwise a batch of many rows and one of long rows would replace each other's slots.
        if old is not None:
            rows, total, width = max(rows, old.num_rows), max(total, len(old.keys[0]) - 1), max(width, old.width)
        self._slots = self._graphs = old = None  # freed before the new ones are made
        slots = self._slots = self.decoder.slots(rows, total, width)
        slots.assign(capacities)
        return slots

    def release(self) -> None:
        """Give the memory of slots and graphs back; the next batch makes its own."""
        self._slots = self._graphs = None

    def room(self) -> int:
        """How many slots a batch may have: as many as the free memory allows, or as are there already."""
        present = len(self._slots.keys[0]) if self._slots else 0
        return max(present, int(SLOTS_SHARE * self.decoder.free_bytes() / self.decoder.slot_bytes))

    def extend(self, slots: Slots, active: Sequence[int], rows: Rows, watch: Watch | None = None) -> None:
        """Decode through the layers `active` until every row has ended, used its budget or was given up; fills `rows.out`.

        `watch` is called now and then, and names the rows to give up.
        """
        if any(rows.alive):
            extend = self._extend_static if self.decoder.device.type == "cuda" else self._extend_shrinking
            extend(slots, active, rows, watch)

    def _extend_shrinking(self, slots: Slots, active: Sequence[int], rows: Rows, watch: Watch | None) -> None:
        decoder, device = self.decoder, self.decoder.device
        row = torch.arange(len(rows.token), device=device)  # the row of each entry
        token, position, budget = rows.token, rows.position, torch.tensor(rows.budget, device=device)
        ends = torch.tensor(self.eos, dtype=torch.long, device=device)
        length = torch.tensor([len(tokens) for tokens in rows.out], device=device)
        alive = torch.tensor(rows.alive, device=device)
        without = torch.tensor([-1 if w is None else w for w in rows.without or [None] * len(row)], device=device)
        steps, next_watch = 0, FIRST_WATCH
        while True:
            length = length + alive
            for i, value in zip(row[alive].tolist(), token[alive].tolist()):
                rows.out[i].append(value)
            alive = alive & ~torch.isin(token, ends) & (length < budget)
            steps += 1
            if watch and steps == next_watch:
                next_watch *= 2
                alive_rows = set(row[alive].tolist())
                hopeless = watch(rows.out, [i in alive_rows for i in range(len(rows.out))])
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
            hidden, lacked_layers = decoder.embed(token), set(without.tolist())
            over = partial(decoder.over_slots, used=used, slots=slots)
            for layer in active:
                output = decoder.step(layer, hidden, rope, slot, slots, over)
                if layer in lacked_layers:
                    output = torch.where((without == layer)[:, None], hidden, output)
                hidden = output
            token, position = decoder.next_tokens(hidden), position + alive

    def _extend_static(self, slots: Slots, active: Sequence[int], rows: Rows, watch: Watch | None) -> None:
        graphs, max_new_tokens, num_entries = self._graphs, max(rows.budget), len(rows.out)
        num_prefixes = len(rows.prefixes.lengths) if rows.prefixes else 0
        if graphs is None or graphs.slots is not slots or not graphs.fits(num_entries, max_new_tokens, num_prefixes):
            if graphs is not None and graphs.slots is slots:  # in no respect smaller than the last
                num_entries = max(num_entries, len(graphs.row))
                max_new_tokens = max(max_new_tokens, graphs.out.shape[1] - 1)
                num_prefixes = max(num_prefixes, graphs.num_prefixes)
            self._graphs = graphs = None
            graphs = self._graphs = Graphs(self.decoder, slots, self.eos, num_entries, max_new_tokens, num_prefixes)
        graphs.extend(active, rows, watch)
