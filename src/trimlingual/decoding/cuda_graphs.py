"""The decoding step on a GPU: one CUDA graph per layer, and one each for the beginning and the end of a step.

A step replays the graphs of the layers that are to run, so every choice of layers runs on the same graphs. Graphs read and write
the memory that they were captured with, so all their tensors are made once and filled in place.

Shapes: B rows, Q entries, L layers, D width. Row, slot, entry and position: see decoding/__init__.py.
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

SMALLEST_STEP = 8  # entries: a step over fewer takes no less time
LAG = 2  # steps that the GPU may be ahead when the host learns that all rows have ended


class Graphs:
    """The captured steps, and their state: one entry per row.

    A step runs over the first `size` entries. When few enough rows go on, their entries are moved to the front, and the step is
    that over half, a quarter, ... of the entries. Only entries move. The keys and values of a row stay in its slots.
    """

    def __init__(
        self,
        decoder: PackedDecoder,
        slots: Slots,
        eos: Sequence[int],
        num_entries: int,
        max_new_tokens: int,
        num_prefixes: int,
    ):
        self.decoder, self.slots, self.num_prefixes = decoder, slots, num_prefixes
        device, num_layers = decoder.device, len(decoder.layers)
        self.eos = torch.tensor(eos, dtype=torch.long, device=device)
        # Per entry, (Q,): its row, the token that comes next and its position, new tokens so far and the most there may be, and the
        # slot of this step.
        self.row, self.token, self.position, self.length, self.budget, self.slot = (
            torch.zeros(num_entries, dtype=torch.long, device=device) for _ in range(6)
        )
        self.start = torch.zeros(num_entries + 1, dtype=torch.int32, device=device)  # first slot of each entry's row
        self.alive = torch.zeros(num_entries, dtype=torch.bool, device=device)  # whether the row goes on
        self.used = torch.ones(num_entries, dtype=torch.int32, device=device)  # slots that the entry reads
        self.lacks = torch.zeros(
            (num_layers, num_entries, 1), dtype=torch.bool, device=device
        )  # layers it goes without
        self.shared = SharedPrefixes(num_layers, num_entries, num_prefixes, device) if num_prefixes else None
        self.hidden = torch.zeros((num_entries, decoder.decoder.config.hidden_size), dtype=decoder.dtype, device=device)
        cosine, sine = decoder.rope(self.position)
        self.rope = (cosine.clone(), sine.clone())
        # New tokens by row, (Q, max_new_tokens + 1). Entries that have ended write to the last column, which is never read.
        self.out = torch.zeros((num_entries, max_new_tokens + 1), dtype=torch.long, device=device)
        self.num_alive = torch.zeros((), dtype=torch.long, device=device)
        # Rows that go on after each step, copied to the host without waiting.
        self.num_alive_after = torch.zeros(max_new_tokens + LAG + 2, dtype=torch.long).pin_memory()
        self.sizes = [num_entries]
        while slots.ragged and self.sizes[-1] >= 2 * SMALLEST_STEP:
            self.sizes.append(self.sizes[-1] // 2)
        self.sharing = False  # whether the present rows share prefixes
        self.steps: dict[tuple[int, bool], list[Callable[[], None]]] = {}
        self.views: dict[
            int, Slots
        ] = {}  # by size: the slots with the entries' `start`; kept, because graphs read their memory
        self.pool = torch.cuda.graph_pool_handle()

    def fits(self, num_rows: int, max_new_tokens: int, num_prefixes: int) -> bool:
        """Whether the tensors are large enough for so many rows, new tokens per row and prefixes."""
        fits_entries = num_rows <= len(self.row) and max_new_tokens < self.out.shape[1]
        return fits_entries and num_prefixes <= self.num_prefixes

    def extend(self, active: Sequence[int], rows: Rows, watch: Watch | None) -> None:
        """Decode as `Stepper.extend` does: through the layers `active`, until every row has ended; fills `rows.out`."""
        self._load(rows)
        num_alive, size, next_watch = sum(rows.alive), self.sizes[0], FIRST_WATCH
        events: list[torch.cuda.Event] = []  # one per step
        while True:
            new_size = min((s for s in self.sizes if s >= num_alive), default=size)
            if new_size < size and events:
                self._move_alive_to_front(size)
            if self.sharing and self.shared and (new_size < size or not events):
                self.shared.plan(self.start[:new_size])
            size = min(size, new_size)
            begin, end, *layers = self._step(size)
            begin()
            step = len(events)
            self.num_alive_after[step].copy_(self.num_alive, non_blocking=True)
            events.append(torch.cuda.Event())
            events[-1].record()
            if step >= LAG:
                events[step - LAG].synchronize()
                num_alive = int(self.num_alive_after[step - LAG])
                if not num_alive:
                    break
            if watch and step + 1 == next_watch:
                next_watch *= 2
                self._give_up(rows, watch)
            for layer in active:
                layers[layer]()
            end()
        rows.out[:] = self._read(len(rows.out))[0]

    def _load(self, rows: Rows) -> None:
        """Give every row an entry, and those that go on the first entries."""
        num_rows, device, num_entries = len(rows.out), self.out.device, len(self.row)
        order = list(range(num_rows))  # the row of each entry
        if self.slots.ragged:
            order.sort(key=lambda row: not rows.alive[row])
        row_of_entry = torch.tensor(order, device=device)
        self.row.copy_(torch.tensor([*order, *range(num_rows, num_entries)]))
        self.start[:num_entries] = self.slots.start[self.row]
        if self.slots.ragged:
            # Entries without a row write to the slot that belongs to nobody: what follows the rows' slots may be prefixes.
            self.start[num_rows:num_entries] = self.slots.start[-1]
        self.token[:num_rows], self.position[:num_rows] = rows.token[row_of_entry], rows.position[row_of_entry]
        self.alive.zero_()
        self.alive[:num_rows] = torch.tensor([rows.alive[row] for row in order], device=device)
        self.budget[:num_rows] = torch.tensor([rows.budget[row] for row in order], device=device)
        self.length[:num_rows] = torch.tensor([len(rows.out[row]) for row in order], device=device)
        longest = max(map(len, rows.out))
        padded = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in rows.out], dtype=torch.long)
        self.out[:num_rows, :longest] = padded.to(device)
        self.lacks.zero_()
        without = torch.tensor([-1 if w is None else w for w in rows.without or [None] * num_rows], device=device)
        for layer in set(rows.without or ()) - {None}:
            self.lacks[layer, :num_rows, 0] = without[row_of_entry] == layer
        self.sharing = rows.prefixes is not None
        if self.shared and rows.prefixes:
            self.shared.load(rows.prefixes, order, self.slots)

    def _move_alive_to_front(self, size: int) -> None:
        """Reorder the first `size` entries: those that go on come first, otherwise in the order that they had."""
        order = torch.argsort(~self.alive[:size], stable=True)
        for tensor in (self.row, self.token, self.position, self.length, self.budget, self.alive, self.start):
            tensor[:size] = tensor[:size][order]
        self.lacks[:, :size] = self.lacks[:, :size][:, order]
        if self.sharing and self.shared:
            self.shared.move(order)

    def _read(self, num_rows: int) -> tuple[list[list[int]], list[bool]]:
        """New tokens so far of each row, and whether it goes on."""
        out, lengths, alive_rows = (
            self.out[:, : int(self.length.max())].tolist(),
            [0] * len(self.row),
            [False] * len(self.row),
        )
        for row, length, alive in zip(self.row.tolist(), self.length.tolist(), self.alive.tolist()):
            lengths[row], alive_rows[row] = length, alive
        return [out[row][: lengths[row]] for row in range(num_rows)], alive_rows[:num_rows]

    def _give_up(self, rows: Rows, watch: Watch) -> None:
        """Show the tokens to the watch, and end the rows that it names."""
        hopeless = watch(*self._read(len(rows.out)))
        given_up = torch.tensor(hopeless, dtype=torch.long, device=self.row.device)
        self.alive &= ~torch.isin(self.row, given_up)

    def _step(self, size: int) -> list[Callable[[], None]]:
        """The work of a step over the first `size` entries: its beginning, its end, then every layer."""
        key = (size, self.sharing)
        if key not in self.steps:
            slots = self.views.setdefault(size, replace(self.slots, start=self.start[: size + 1]))
            works = [lambda: self._begin(size), lambda: self._end(size)]
            works += [partial(self._layer, layer, size, slots) for layer in range(len(self.decoder.layers))]
            self.steps[key] = self._captured(works)
        return self.steps[key]

    def _begin(self, size: int) -> None:
        """Append the predicted tokens, decide which rows go on, and embed the tokens."""
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
        for target, value in zip(self.rope, self.decoder.rope(position)):
            target[:size] = value

    def _layer(self, layer: int, size: int, slots: Slots) -> None:
        """Run a layer. Entries that go without it keep their hidden state."""
        rope = (self.rope[0][:size], self.rope[1][:size])
        hidden = self.hidden[:size]
        over: OverSlots = partial(self.decoder.over_slots, used=self.used[:size], slots=slots)
        if self.sharing and self.shared:
            over = partial(self.shared.attend, layer, slots=slots)
        output = self.decoder.step(layer, hidden, rope, self.slot[:size], slots, over)
        torch.where(self.lacks[layer, :size], hidden, output, out=hidden)

    def _end(self, size: int) -> None:
        """Predict the next token of each entry."""
        self.token[:size] = self.decoder.next_tokens(self.hidden[:size])
        self.position[:size].add_(1)

    def _captured(self, works: Sequence[Callable[[], None]]) -> list[Callable[[], None]]:
        """Capture each piece of work as a graph. Where the device refuses, warn and return the work itself."""
        graphs: list[Callable[[], None]] = []
        before = [tensor.clone() for tensor in self._state()]
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # a library sets itself up in its first call, which cannot be captured
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
        for tensor, value in zip(self._state(), before):
            tensor.copy_(value)
        return graphs

    def _state(self) -> list[Tensor]:
        """What a step changes that the next one reads."""
        return [self.token, self.position, self.length, self.alive, self.out]
