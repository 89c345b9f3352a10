"""Segments of many requests, translated together as they come.

One thread owns the model. Whatever waits when a batch is done goes into the next one, first come first served: a new request joins at
the next batch, not inside the one that is being decoded.

Clients that were answered together ask again together. The first of them would have a batch of its own, and the others would wait for
it; so the next batch waits for as many as the last one had, at most a tenth of the time that the last one took.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

from trimlingual.app.metrics import Metrics
from trimlingual.app.translate import App, Key, Piece, Segment

Said = dict[Key, Segment]
PATIENCE = 0.1  # of a batch's time


class Batcher:
    """The thread that translates."""

    def __init__(self, app: App, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._waiting: deque[tuple[Piece, Future[Said]]] = deque()
        self._changed = threading.Condition()
        self._stopping = self._ended = False
        self._began: float | None = None
        self._last_size, self._last_s = 0, 0.0
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    def submit(self, piece: Piece) -> Future[Said]:
        """The translations of a segment, when they are there. A future that is cancelled before its batch begins costs nothing."""
        future: Future[Said] = Future()
        with self._changed:
            if self._ended:
                future.set_exception(_ended())
            else:
                self._waiting.append((piece, future))
                self._changed.notify()
        return future

    @property
    def num_waiting(self) -> int:
        """Segments that no batch has taken yet."""
        return len(self._waiting)

    @property
    def is_alive(self) -> bool:
        """Whether the thread works; it should end with `stop` alone."""
        return self._thread.is_alive()

    @property
    def busy_s(self) -> float:
        """Seconds since the batch under way began; 0 where there is none."""
        began = self._began
        return time.perf_counter() - began if began is not None else 0.0

    def stop(self) -> None:
        """End the thread once nothing waits."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        batch: list[tuple[Piece, Future[Said]]] = []
        try:
            while batch := self._next():
                self._began = time.perf_counter()
                self._translate(batch)
                self._last_size, self._last_s = len(batch), self.busy_s
                self._began = None
        finally:
            with self._changed:
                self._ended = True
            for _, future in [*batch, *self._waiting]:  # nobody is to wait for a thread that has died
                if not future.done():
                    future.set_exception(_ended())

    def _next(self) -> list[tuple[Piece, Future[Said]]]:
        """What goes into the next batch; nothing at the end."""
        batch: list[tuple[Piece, Future[Said]]] = []
        with self._changed:
            while not batch:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                if not self._waiting:
                    return []
                self._changed.wait_for(lambda: len(self._waiting) >= self._last_size, PATIENCE * self._last_s)
                while self._waiting and len(batch) < self._app.batch_size:
                    piece, future = self._waiting.popleft()
                    if future.set_running_or_notify_cancel():
                        batch.append((piece, future))
        return batch

    def _translate(self, batch: Sequence[tuple[Piece, Future[Said]]]) -> None:
        try:
            said = self._app.translated([piece for piece, _ in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            for each in batch:  # one request's trouble is not to be another's
                self._translate([each])
            return
        self._metrics.count_batch(list(said.values()), len(batch))
        for piece, future in batch:
            future.set_result({key: said[key] for key in piece.keys})


def _ended() -> RuntimeError:
    return RuntimeError("the thread that translates has ended")
