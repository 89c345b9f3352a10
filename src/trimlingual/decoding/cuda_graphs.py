"""Decoding steps replayed as CUDA graphs, one a layer, so that any choice of layers runs without being captured again.

Shapes: B rows, D width, K new tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from trimlingual.decoding.decoder import OverSlots, PackedDecoder
from trimlingual.decoding.rows import FIRST_WATCH, Rows, Watch
from trimlingual.decoding.shared_prompts import SharedPrefixes
from trimlingual.decoding.slots import Slots

logger = logging.getLogger(__name__)

SMALLEST_STEP = 8  # rows: a step over fewer takes no less time


LAG = 2  # steps that a GPU may run ahead of the host's knowing that all rows have ended


class Graphs:
    """Decoding steps as CUDA graphs, over entries of which each stands for a row.

    A row's keys are found through its entry, so entries can change places: those that go on are moved to the front now and then, and
    the step runs over the first half, quarter, ... of them.
    """

    def __init__(
        self, decoder: PackedDecoder, slots: Slots, eos: Sequence[int], count: int, most: int, num_prefixes: int
    ):
        self.decoder, self.slots, self.num_prefixes = decoder, slots, num_prefixes
        device, num_layers = decoder.device, len(decoder.layers)
        self.eos = torch.tensor(eos, dtype=torch.long, device=device)
        self.row, self.token, self.position, self.length, self.budget, self.slot = (
            torch.zeros(count, dtype=torch.long, device=device) for _ in range(6)
        )
        self.start = torch.zeros(count + 1, dtype=torch.int32, device=device)
        self.alive = torch.zeros(count, dtype=torch.bool, device=device)
        self.used = torch.ones(count, dtype=torch.int32, device=device)
        self.lacks = torch.zeros((num_layers, count, 1), dtype=torch.bool, device=device)
        self.shared = SharedPrefixes(num_layers, count, num_prefixes, device) if num_prefixes else None
        self.hidden = torch.zeros((count, decoder.decoder.config.hidden_size), dtype=decoder.dtype, device=device)
        cosine, sine = decoder.rope(self.position)
        self.rope = (cosine.clone(), sine.clone())
        # The last column takes what is not kept.
        self.out = torch.zeros((count, most + 1), dtype=torch.long, device=device)
        self.num_alive = torch.zeros((), dtype=torch.long, device=device)
        self.flags = torch.zeros(most + LAG + 2, dtype=torch.long).pin_memory()
        self.sizes = [count]
        while slots.ragged and self.sizes[-1] >= 2 * SMALLEST_STEP:
            self.sizes.append(self.sizes[-1] // 2)
        self.sharing = False  # whether these rows do
        self.steps: dict[tuple[int, bool], list[Callable[[], None]]] = {}
        self.views: dict[int, Slots] = {}  # kept, because the graphs read their memory
        self.pool = torch.cuda.graph_pool_handle()

    def hold(self, count: int, most: int, num_prefixes: int) -> bool:
        """Whether there is room for so many rows, new tokens and prefixes."""
        return count <= len(self.row) and most < self.out.shape[1] and num_prefixes <= self.num_prefixes

    def extend(self, active: Sequence[int], rows: Rows, watch: Watch | None) -> None:
        """Stepper.extend, replayed."""
        self._load(rows)
        known, size, look = sum(rows.alive), self.sizes[0], FIRST_WATCH
        events: list[torch.cuda.Event] = []
        while True:
            smaller = min((s for s in self.sizes if s >= known), default=size)
            if smaller < size and events:
                self._pack(size)
            if self.sharing and self.shared and (smaller < size or not events):
                self.shared.plan(self.start[:smaller])
            size = min(size, smaller)
            begin, end, *layers = self._step(size)
            begin()
            number = len(events)
            self.flags[number].copy_(self.num_alive, non_blocking=True)
            events.append(torch.cuda.Event())
            events[-1].record()
            if number >= LAG:
                events[number - LAG].synchronize()
                known = int(self.flags[number - LAG])
                if not known:
                    break
            if watch and number + 1 == look:
                look *= 2
                self._look(rows, watch)
            for position in active:
                layers[position]()
            end()
        rows.out[:] = self._read(len(rows.out))[0]

    def _load(self, rows: Rows) -> None:
        """Entries for the rows, those that go on first."""
        count, device, total = len(rows.out), self.out.device, len(self.row)
        order = list(range(count))
        if self.slots.ragged:
            order.sort(key=lambda row: not rows.alive[row])
        entries = torch.tensor(order, device=device)
        self.row.copy_(torch.tensor([*order, *range(count, total)]))
        self.start[:total] = self.slots.start[self.row]
        if self.slots.ragged:
            self.start[count:total] = self.slots.start[-1]  # nobody's: what follows the rows may be prefixes
        self.token[:count], self.position[:count] = rows.token[entries], rows.position[entries]
        self.alive.zero_()
        self.alive[:count] = torch.tensor([rows.alive[row] for row in order], device=device)
        self.budget[:count] = torch.tensor([rows.budget[row] for row in order], device=device)
        self.length[:count] = torch.tensor([len(rows.out[row]) for row in order], device=device)
        longest = max(map(len, rows.out))
        kept = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in rows.out], dtype=torch.long)
        self.out[:count, :longest] = kept.to(device)
        self.lacks.zero_()
        lacking = torch.tensor([-1 if w is None else w for w in rows.without or [None] * count], device=device)
        for layer in set(rows.without or ()) - {None}:
            self.lacks[layer, :count, 0] = lacking[entries] == layer
        self.sharing = rows.prefixes is not None
        if self.shared and rows.prefixes:
            self.shared.load(rows.prefixes, order, self.slots)

    def _pack(self, size: int) -> None:
        """Move the entries that go on to the front of the first `size`."""
        order = torch.argsort(~self.alive[:size], stable=True)
        for tensor in (self.row, self.token, self.position, self.length, self.budget, self.alive, self.start):
            tensor[:size] = tensor[:size][order]
        self.lacks[:, :size] = self.lacks[:, :size][:, order]
        if self.sharing and self.shared:
            self.shared.move(order)

    def _read(self, count: int) -> tuple[list[list[int]], list[bool]]:
        """Tokens so far and whether it goes on, of each row."""
        out, lengths, going = (
            self.out[:, : int(self.length.max())].tolist(),
            [0] * len(self.row),
            [False] * len(self.row),
        )
        for row, length, alive in zip(self.row.tolist(), self.length.tolist(), self.alive.tolist()):
            lengths[row], going[row] = length, alive
        return [out[row][: lengths[row]] for row in range(count)], going[:count]

    def _look(self, rows: Rows, watch: Watch) -> None:
        hopeless = watch(*self._read(len(rows.out)))
        given_up = torch.tensor(hopeless, dtype=torch.long, device=self.row.device)
        self.alive &= ~torch.isin(self.row, given_up)

    def _step(self, size: int) -> list[Callable[[], None]]:
        """The beginning and the end of a step and each layer, over the first `size` entries."""
        kind = (size, self.sharing)
        if kind not in self.steps:
            slots = self.views.setdefault(size, replace(self.slots, start=self.start[: size + 1]))
            works = [lambda: self._begin(size), lambda: self._end(size)]
            works += [partial(self._layer, position, size, slots) for position in range(len(self.decoder.layers))]
            self.steps[kind] = self._captured(works)
        return self.steps[kind]

    def _begin(self, size: int) -> None:
        """Append the predicted tokens, see who goes on, and embed."""
        alive, length, token, position = (t[:size] for t in (self.alive, self.length, self.token, self.position))
        column = torch.where(alive, length, self.out.shape[1] - 1)
        self.out[self.row[:size], column] = token
        length.add_(alive)
        ended = (token[:, None] == self.eos[None, :]).any(-1)
        alive.logical_and_(~ended & (length < self.budget[:size]))
        self.num_alive.copy_(alive.sum())
        position.mul_(alive)
        self.slot[:size] = self.start[:size] + position
        self.used[:size] = position + 1
        if self.sharing and self.shared:
            self.shared.begin(self.used[:size])
        self.hidden[:size] = self.decoder.embed(token)
        for held, now in zip(self.rope, self.decoder.rope(position)):
            held[:size] = now

    def _layer(self, position: int, size: int, slots: Slots) -> None:
        rope = (self.rope[0][:size], self.rope[1][:size])
        hidden = self.hidden[:size]
        over: OverSlots = partial(self.decoder.over_slots, used=self.used[:size], slots=slots)
        if self.sharing and self.shared:
            over = partial(self.shared.attend, position, slots=slots)
        output = self.decoder.step(position, hidden, rope, self.slot[:size], slots, over)
        torch.where(self.lacks[position, :size], hidden, output, out=hidden)

    def _end(self, size: int) -> None:
        self.token[:size] = self.decoder.next_tokens(self.hidden[:size])
        self.position[:size].add_(1)

    def _captured(self, works: Sequence[Callable[[], None]]) -> list[Callable[[], None]]:
        """Each piece of work as a graph; as it is, with a word, where the device refuses to capture it."""
        graphs: list[Callable[[], None]] = []
        held = [tensor.clone() for tensor in self._state()]
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries set themselves up at the first call, which cannot be captured
                for work in works:
                    work()
            torch.cuda.current_stream().wait_stream(stream)
            for work in works:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool):
                    work()
                graphs.append(graph.replay)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            logger.warning(
                "no CUDA graphs for this model (%s); going on without, more slowly", str(error).split("\n")[0]
            )
            graphs = list(works)
        for tensor, before in zip(self._state(), held):
            tensor.copy_(before)
        return graphs

    def _state(self) -> list[Tensor]:
        return [self.token, self.position, self.length, self.alive, self.out]
