"""What the server counts, in the text format that Prometheus reads (version 0.0.4). Nothing of what was said is in it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from trimlingual.app.translate import Segment

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)  # upper bounds of the times that are told apart
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Histogram:
    """How many values are at most as large as each bound, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts = bounds, [0] * len(bounds)
        self.total, self.sum = 0, 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.total, self.sum = self.total + 1, self.sum + value
        for i, bound in enumerate(self.bounds):
            self.counts[i] += value <= bound

    def lines(self, name: str) -> Iterator[str]:
        """Its samples."""
        for bound, count in zip(self.bounds, self.counts):
            yield f'{name}_bucket{{le="{bound:g}"}} {count}'
        yield f'{name}_bucket{{le="+Inf"}} {self.total}'
        yield f"{name}_sum {self.sum:.6f}"
        yield f"{name}_count {self.total}"


class Metrics:
    """All counts of a server; may be used from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._second_tries: Counter[str] = Counter()
        self._seconds, self._batches = Histogram(SECONDS), Histogram(BATCHES)
        self._translations = 0
        self._audio_s = 0.0

    @property
    def num_requests(self) -> int:
        """Requests that were answered, in whatever way."""
        return sum(self._requests.values())

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Count an answer."""
        with self._lock:
            self._requests[route, status] += 1
            self._seconds.add(seconds)

    def count_batch(self, segments: Iterable[Segment], size: int) -> None:
        """Count what a batch of `size` pieces of speech gave."""
        with self._lock:
            self._batches.add(size)
            for segment in segments:
                self._translations += 1
                if segment.second_try:
                    self._second_tries[segment.second_try] += 1

    def count_audio(self, seconds: float) -> None:
        """Count a recording that was translated."""
        with self._lock:
            self._audio_s += seconds

    def text(self, gauges: Mapping[str, tuple[float, str]]) -> str:
        """The page; `gauges` are values of this moment by name, each with what it is."""
        with self._lock:
            requests = [f'{{route="{r}",status="{s}"}} {n}' for (r, s), n in sorted(self._requests.items())]
            tries = [f'{{reason="{reason}"}} {n}' for reason, n in sorted(self._second_tries.items())]
            lines = [
                *_counter("requests_total", "Requests that were answered.", requests),
                *_counter("audio_seconds_total", "Seconds of audio that were translated.", [f" {self._audio_s:.3f}"]),
                *_counter(
                    "translations_total",
                    "Segments translated; one into two languages counts twice.",
                    [f" {self._translations}"],
                ),
                *_counter("second_tries_total", "Segments decoded again.", tries),
                *_histogram("request_seconds", "Time from a request to its answer.", self._seconds),
                *_histogram("batch_segments", "Segments that were translated together.", self._batches),
            ]
        for name, (value, meaning) in gauges.items():
            lines += [*_head(name, meaning, "gauge"), f"trimlingual_{name} {value:g}"]
        return "\n".join(lines) + "\n"


def _head(name: str, meaning: str, kind: str) -> list[str]:
    return [f"# HELP trimlingual_{name} {meaning}", f"# TYPE trimlingual_{name} {kind}"]


def _counter(name: str, meaning: str, samples: Sequence[str]) -> list[str]:
    return [*_head(name, meaning, "counter"), *(f"trimlingual_{name}{sample}" for sample in samples)]


def _histogram(name: str, meaning: str, values: Histogram) -> list[str]:
    return [*_head(name, meaning, "histogram"), *values.lines(f"trimlingual_{name}")]
