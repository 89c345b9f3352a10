"""Where a long recording is cut: at its pauses, and inside speech that goes on too long at its weakest moments.

Which moments hold speech is told by silero-vad (MIT; its weights come with its package), 32 ms at a time. Stretches of speech end at
pauses. One that is longer than the model takes is cut in two where speech is least sure, and so are its parts, until all fit (the
divide and conquer of Tsiamas et al. 2022, "SHAS", algorithm 1, on these probabilities). Without silero-vad the recording is cut into
windows of equal length, words in two where it so happens.

The recording is read as a stream: an hour takes as much memory as a minute. Times are in seconds, samples are at 16 kHz.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from trimlingual.data.audio import SAMPLE_RATE

FRAME = 512  # samples that get one probability
FRAME_S = FRAME / SAMPLE_RATE
SPEECH, STILL_SPEECH = (
    0.5,
    0.35,
)  # probability from which speech begins, and below which it ends (silero-vad's own defaults)
SHORTEST_S = 0.25  # a stretch of speech below is a click or a cough
PADDING_S = 0.1  # kept on both sides of a stretch: first and last sounds are often weak
SMOOTH_S = 0.3  # over which probabilities are averaged before the weakest moment is looked for
LEAST_S = 1.0  # of speech on each side of a cut inside speech


@dataclass(frozen=True)
class Span:
    """A part of a recording, from `start` to `end`."""

    start: float
    end: float

    @property
    def duration_s(self) -> float:
        """Its length."""
        return self.end - self.start


@dataclass(frozen=True)
class Cutting:
    """How a user wants long recordings cut: at pauses of `pause_s` seconds, into segments of at most `max_s`.

    By default a segment is at most as long as the clips that the model was trained on, as far as its folder says so.
    """

    max_s: float | None = None
    pause_s: float = 0.3


class SpeechProbabilities:
    """Probability of speech of every 32 ms of a stream, by silero-vad; ImportError where that is not installed."""

    def __init__(self) -> None:
        threads = torch.get_num_threads()
        from silero_vad import load_silero_vad

        torch.set_num_threads(threads)  # the import sets it to 1, for the whole process
        self._model = load_silero_vad()

    @torch.inference_mode()
    def __call__(self, blocks: Iterable[np.ndarray]) -> Iterator[float]:
        """One probability for each `FRAME` samples; what is left at the end is filled up with silence."""
        self._model.reset_states()
        left = np.empty(0, dtype=np.float32)
        for block in blocks:
            left = np.concatenate([left, block])
            whole = len(left) // FRAME * FRAME
            for start in range(0, whole, FRAME):
                yield self._of(left[start : start + FRAME])
            left = left[whole:]
        if len(left):
            yield self._of(np.pad(left, (0, FRAME - len(left))))

    def _of(self, frame: np.ndarray) -> float:
        return float(self._model(torch.from_numpy(frame), SAMPLE_RATE))


def cut_at_pauses(probabilities: Sequence[float], max_s: float, pause_s: float, usual_s: float = 0.0) -> list[Span]:
    """The stretches of speech, none longer than `max_s`, that are parted by pauses of at least `pause_s`.

    Neighbours are joined again as long as they come to no more than `usual_s` together: context helps.
    """
    smooth = _smoothed(np.asarray(probabilities, dtype=np.float64))
    end_s = len(probabilities) * FRAME_S
    stretches: list[tuple[int, int]] = []
    for start, end in _speech(probabilities):
        if stretches and (start - stretches[-1][1]) * FRAME_S < pause_s:
            stretches[-1] = (stretches[-1][0], end)
        else:
            stretches.append((start, end))
    stretches = _joined([(a, b) for a, b in stretches if (b - a) * FRAME_S >= SHORTEST_S], usual_s)
    spans: list[Span] = []
    for i, (start, end) in enumerate(stretches):
        # Padding is taken from the pause, and neighbours share it.
        before = (start - stretches[i - 1][1]) * FRAME_S / 2 if i else start * FRAME_S
        after = (stretches[i + 1][0] - end) * FRAME_S / 2 if i + 1 < len(stretches) else end_s - end * FRAME_S
        padding = (min(PADDING_S, before), min(PADDING_S, after))
        cuts = [start, *_cuts(smooth, start, end, math.floor((max_s - sum(padding)) / FRAME_S)), end]
        inner = [Span(first * FRAME_S, last * FRAME_S) for first, last in pairwise(cuts)]
        inner[0] = Span(inner[0].start - padding[0], inner[0].end)
        inner[-1] = Span(inner[-1].start, inner[-1].end + padding[1])
        spans += inner
    return spans


def _joined(stretches: Sequence[tuple[int, int]], usual_s: float) -> list[tuple[int, int]]:
    """Neighbours together where they come to no more than `usual_s`, the closest first."""
    joined = list(stretches)
    while True:
        fitting = [
            (joined[i + 1][0] - joined[i][1], i)
            for i in range(len(joined) - 1)
            if (joined[i + 1][1] - joined[i][0]) * FRAME_S <= usual_s
        ]
        if not fitting:
            return joined
        _, i = min(fitting)
        joined[i : i + 2] = [(joined[i][0], joined[i + 1][1])]


def windows(duration_s: float, max_s: float) -> list[Span]:
    """Windows of equal length, none longer than `max_s`."""
    count = math.ceil(duration_s / max_s)
    return [Span(duration_s * i / count, duration_s * (i + 1) / count) for i in range(count)]


def samples_of(blocks: Iterable[np.ndarray], spans: Sequence[Span]) -> Iterator[np.ndarray]:
    """The samples of each span, in order; `spans` ascend and do not overlap. Nothing before the next span is kept."""
    stream, kept, position = iter(blocks), np.empty(0, dtype=np.float32), 0
    for span in spans:
        start, end = round(span.start * SAMPLE_RATE), round(span.end * SAMPLE_RATE)
        while position + len(kept) < end and (block := next(stream, None)) is not None:
            kept = np.concatenate([kept, block])
            before = min(max(0, start - position), len(kept))
            kept, position = kept[before:], position + before
        yield kept[start - position : end - position].copy()


def _speech(probabilities: Sequence[float]) -> Iterator[tuple[int, int]]:
    """Stretches of frames (first, behind the last) that hold speech."""
    began: int | None = None
    for i, probability in enumerate(probabilities):
        if began is None and probability >= SPEECH:
            began = i
        elif began is not None and probability < STILL_SPEECH:
            yield began, i
            began = None
    if began is not None:
        yield began, len(probabilities)


def _smoothed(probabilities: np.ndarray) -> np.ndarray:
    if not len(probabilities):
        return probabilities
    width = round(SMOOTH_S / FRAME_S)
    return np.convolve(probabilities, np.ones(width) / width, mode="same")


def _cuts(smooth: np.ndarray, start: int, end: int, longest: int) -> list[int]:
    """Frames at which `start`..`end` is cut, so that no part is longer than `longest` frames."""
    if end - start <= longest:
        return []
    margin = min(math.ceil(LEAST_S / FRAME_S), (end - start) // 3)
    weakest = start + margin + int(np.argmin(smooth[start + margin : end - margin]))
    return [*_cuts(smooth, start, weakest, longest), weakest, *_cuts(smooth, weakest, end, longest)]
