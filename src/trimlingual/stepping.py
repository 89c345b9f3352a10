"""Greedy continuation of many rows at once, one token a step.

On the CPU rows that have ended leave the batch. On a GPU the step is replayed from CUDA graphs, one a layer, so that any choice of
layers runs without being captured again; rows that have ended stay and see a single slot, which costs next to nothing.

Shapes: B rows, D width, K new tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimlingual.packed import PackedDecoder, Slots

logger = logging.getLogger(__name__)

# Called with all tokens so far and whether each row goes on; returns the rows to give up.
Watch = Callable[[list[list[int]], list[bool]], list[int]]
FIRST_WATCH = 64  # steps before the first look, then twice as many each time: looking costs the host's time
SLOTS_SHARE = 0.7  # of the memory that is free, the keys and values of a batch may take
LAG = 2  # steps that a GPU may run ahead of the host's knowing that all rows have ended


@dataclass
class Rows:
    """Rows in the middle of decoding."""

    token: Tensor  # (B,) predicted, not yet appended
    position: Tensor  # (B,) where it goes
    out: list[list[int]]  # new tokens so far
    budget: list[int]  # how many there may be in all
    alive: list[bool]
    without: list[int | None] | None = None  # position of the layer that each row goes without


class Stepper:
    """Continues rows with the model behind `decoder`; keeps what can be used again (slots, graphs) between batches."""

    def __init__(self, decoder: PackedDecoder, eos: Sequence[int]):
        self.decoder = decoder
        self.eos = tuple(eos)
        self._slots: Slots | None = None
        self._graphs: _Graphs | None = None

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
            if len(keep) < len(row):
                slots = slots.kept(keep)
                row, token, position, budget, length, alive, without = (
                    t[keep] for t in (row, token, position, budget, length, alive, without)
                )
            rope, slot, used = decoder.rope(position), slots.start[: len(position)] + position, position + 1
            hidden, lacking = decoder.embed(token), set(without.tolist())
            for layer in active:
                output = decoder.step(layer, hidden, rope, slot, used, slots)
                hidden = torch.where((without == layer)[:, None], hidden, output) if layer in lacking else output
            token, position = decoder.next_tokens(hidden), position + 1

    def _extend_static(self, slots: Slots, active: Sequence[int], rows: Rows, watch: Watch | None) -> None:
        graphs, most = self._graphs, max(rows.budget)
        if graphs is None or graphs.slots is not slots or graphs.out.shape[1] <= most:
            self._graphs = graphs = None
            graphs = self._graphs = _Graphs(self.decoder, slots, self.eos, most)
        graphs.extend(active, rows, watch)


class _Graphs:
    """One step for a fixed number of rows, as CUDA graphs: its beginning, each layer, its end."""

    def __init__(self, decoder: PackedDecoder, slots: Slots, eos: Sequence[int], most: int):
        self.decoder, self.slots = decoder, slots
        device, count = decoder.device, slots.num_rows
        self.eos = torch.tensor(eos, dtype=torch.long, device=device)
        self.token, self.position, self.length, self.budget, self.slot = (
            torch.zeros(count, dtype=torch.long, device=device) for _ in range(5)
        )
        self.alive = torch.zeros(count, dtype=torch.bool, device=device)
        self.used = torch.ones(count, dtype=torch.int32, device=device)
        self.out = torch.zeros(
            (count, most + 1), dtype=torch.long, device=device
        )  # the last column takes what is not kept
        self.num_alive = torch.zeros((), dtype=torch.long, device=device)
        self.hidden = torch.zeros((count, decoder.decoder.config.hidden_size), dtype=decoder.dtype, device=device)
        self.lacks = torch.zeros((len(decoder.layers), count, 1), dtype=torch.bool, device=device)
        cosine, sine = decoder.rope(self.position)
        self.rope = (cosine.clone(), sine.clone())
        works: list[Callable[[], None]] = [self._begin, self._end]
        works += [self._layer(position) for position in range(len(decoder.layers))]
        self.begin, self.end, *self.layers = self._captured(works)
        self.flags = torch.zeros(most + LAG + 2, dtype=torch.long).pin_memory()

    def extend(self, active: Sequence[int], rows: Rows, watch: Watch | None) -> None:
        """Stepper.extend, replayed."""
        count, device = len(rows.token), self.out.device
        self.alive.zero_()
        self.position.zero_()
        self.token[:count], self.position[:count] = rows.token, rows.position
        self.alive[:count] = torch.tensor(rows.alive, device=device)
        self.budget[:count] = torch.tensor(rows.budget, device=device)
        lengths = [len(tokens) for tokens in rows.out]
        self.length[:count] = torch.tensor(lengths, device=device)
        kept = torch.zeros((count, max(lengths, default=0)), dtype=torch.long)
        for i, tokens in enumerate(rows.out):
            kept[i, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        self.out[:count, : kept.shape[1]] = kept.to(device)
        self.lacks.zero_()
        for layer in set(rows.without or ()) - {None}:
            self.lacks[layer, :count, 0] = torch.tensor([w == layer for w in rows.without or ()], device=device)
        look = FIRST_WATCH
        events: list[torch.cuda.Event] = []
        while True:
            self.begin()
            step = len(events)
            self.flags[step].copy_(self.num_alive, non_blocking=True)
            events.append(torch.cuda.Event())
            events[-1].record()
            if step >= LAG:
                events[step - LAG].synchronize()
                if not self.flags[step - LAG]:
                    break
            if watch and step + 1 == look:
                look *= 2
                for row in watch(self._read(count), self.alive[:count].tolist()):
                    self.alive[row] = False
            for position in active:
                self.layers[position]()
            self.end()
        rows.out[:] = self._read(count)

    def _read(self, count: int) -> list[list[int]]:
        out, lengths = self.out[:count].tolist(), self.length[:count].tolist()
        return [tokens[:length] for tokens, length in zip(out, lengths)]

    def _begin(self) -> None:
        """Append the predicted tokens, see who goes on, and embed."""
        column = torch.where(self.alive, self.length, self.out.shape[1] - 1)
        self.out.scatter_(1, column[:, None], self.token[:, None])
        self.length.add_(self.alive)
        ended = (self.token[:, None] == self.eos[None, :]).any(-1)
        self.alive.logical_and_(~ended & (self.length < self.budget))
        self.num_alive.copy_(self.alive.sum())
        self.position.mul_(self.alive)
        self.slot.copy_(self.slots.start[:-1] + self.position)
        self.used.copy_(self.position + 1)
        self.hidden.copy_(self.decoder.embed(self.token))
        for held, now in zip(self.rope, self.decoder.rope(self.position)):
            held.copy_(now)

    def _layer(self, position: int) -> Callable[[], None]:
        def work() -> None:
            hidden = self.decoder.step(position, self.hidden, self.rope, self.slot, self.used, self.slots)
            self.hidden.copy_(torch.where(self.lacks[position], self.hidden, hidden))

        return work

    def _end(self) -> None:
        self.token.copy_(self.decoder.next_tokens(self.hidden))
        self.position.add_(1)

    def _captured(self, works: Sequence[Callable[[], None]]) -> list[Callable[[], None]]:
        """Each piece of work as a graph; as it is, with a word, where the device refuses to capture it."""
        pool = torch.cuda.graph_pool_handle()
        graphs = []
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries set themselves up at the first call, which cannot be captured
                for work in works:
                    work()
            torch.cuda.current_stream().wait_stream(stream)
            for work in works:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    work()
                graphs.append(graph.replay)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            logger.warning(
                "no CUDA graphs for this model (%s); going on without, more slowly", str(error).split("\n")[0]
            )
            return list(works)
        return graphs
