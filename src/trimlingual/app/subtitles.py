"""Subtitles that can be read: SRT (SubRip) and WebVTT (W3C), from translated segments.

The limits are those that broadcasters and streaming services nearly agree on: two lines, 42 characters per line (16 where words are
not spaced), 17 characters per second (9), between 1 and 7 seconds on the screen. A segment whose text does not fit one subtitle
becomes several, which share its time by their length.

A subtitle that its time is too short for gets more, in this order: it becomes one with a neighbour; it stays into the pause that
follows; the next one, if that has time to spare, comes up to `LATE_S` late. What is too fast after that stays so: the text is never
cut, and nothing is shown after the recording has ended.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from trimlingual.recipe.languages import language

LINES = 2
SHORTEST_S, LONGEST_S = 1.0, 7.0
GAP_S = 0.08  # between two subtitles, two frames of film
LATE_S = 1.0  # that a subtitle may begin after its speech
PAUSE_S = 1.0  # in speech, over which two subtitles do not become one


@dataclass(frozen=True)
class Cue:
    """A subtitle: its time on the screen in seconds, and its text, lines parted by line feeds."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Limits:
    """How much a viewer can read."""

    line: int  # characters
    per_second: float


SPACED, UNSPACED = Limits(42, 17.0), Limits(16, 9.0)


def limits_of(code: str) -> Limits:
    """The limits of a language; one that is not in the table counts as spaced."""
    return SPACED if language(code).spaced else UNSPACED


def cues(segments: Sequence[tuple[float, float, str]], code: str, end_s: float) -> list[Cue]:
    """Subtitles of (start, end, text) in time's order, in the language `code`, of a recording of `end_s` seconds."""
    limits = limits_of(code)
    found = [
        cue
        for start, end, text in segments
        for cue in _of_segment(start, min(end, end_s), " ".join(text.split()), limits)
    ]
    return list(_timed(_merged(found, end_s, limits), end_s, limits))


def to_srt(found: Iterable[Cue]) -> str:
    """The text of an .srt file."""
    return "".join(
        f"{i}\n{_clock(c.start, ',')} --> {_clock(c.end, ',')}\n{c.text}\n\n" for i, c in enumerate(found, 1)
    )


def to_vtt(found: Iterable[Cue]) -> str:
    """The text of a .vtt file."""
    parts = [f"{_clock(c.start, '.')} --> {_clock(c.end, '.')}\n{_escaped(c.text)}\n\n" for c in found]
    return "WEBVTT\n\n" + "".join(parts)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _clock(seconds: float, point: str) -> str:
    whole, thousandths = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{point}{thousandths:03}"


def _of_segment(start: float, end: float, text: str, limits: Limits) -> Iterator[Cue]:
    """The segment's subtitles; each gets the share of its time that it has of the text."""
    pieces = [part for part in _parts(text, limits) if part]
    total = sum(map(len, pieces))
    for piece in pieces:
        until = start + (end - start) * len(piece) / total
        yield Cue(start, until, "\n".join(_lines(piece, limits)))
        total, start = total - len(piece), until


def _parts(text: str, limits: Limits) -> list[str]:
    """The text in parts that fit a subtitle, of much the same length, cut after a sentence or a clause where one ends nearby."""
    room = LINES * limits.line
    if len(_lines(text, limits)) <= LINES:
        return [text]
    count = max(2, -(-len(text) // room))
    middle = len(text) / count
    places = [match.end() for match in re.finditer(r"[.!?;:,…]\s+|[。！？；：，、]|\s+", text)] or list(
        range(1, len(text))
    )
    fitting = [
        place for place in places if 0 < place < len(text) and len(_lines(text[:place].strip(), limits)) <= LINES
    ]
    if not fitting:
        fitting = [limits.line]  # one endless word

    def badness(place: int) -> float:
        before = text[:place].rstrip()
        bonus = 0.5 if before[-1:] in ".!?。！？…" else 0.25 if before[-1:] in ",;:，、；：" else 0.0
        return abs(place - middle) / middle - bonus

    best = min(fitting, key=badness)
    return [text[:best].strip(), *_parts(text[best:].strip(), limits)]


def _lines(text: str, limits: Limits) -> list[str]:
    """The text in lines, two of much the same length rather than a long one and a word."""
    if len(text) <= limits.line:
        return [text]
    if limits is UNSPACED and " " not in text:
        half = -(-len(text) // 2)
        return [text[:half], text[half:]] if half <= limits.line else textwrap.wrap(text, limits.line)
    for width in range(-(-len(text) // 2), limits.line + 1):
        lines = textwrap.wrap(text, width, break_long_words=limits is UNSPACED, break_on_hyphens=False)
        if len(lines) <= LINES and max(map(len, lines)) <= limits.line:
            return lines
    return textwrap.wrap(text, limits.line)


def _needed_s(cue: Cue, limits: Limits) -> float:
    """Seconds that it takes to read."""
    return max(SHORTEST_S, len(cue.text) / limits.per_second)


def _merged(found: Sequence[Cue], end_s: float, limits: Limits) -> list[Cue]:
    """Neighbours as one subtitle, where the time that they lack is at least halved by that."""

    def lacking(cue: Cue, until: float) -> float:
        return max(0.0, _needed_s(cue, limits) - (until - cue.start))

    merged: list[Cue] = []
    for cue, following in zip(found, [*found[1:], None]):
        until = following.start - GAP_S if following else end_s
        if merged and (both := _as_one(merged[-1], cue, limits)):
            apart = lacking(merged[-1], cue.start - GAP_S) + lacking(cue, until)
            if apart and lacking(both, until) <= apart / 2:
                merged[-1] = both
                continue
        merged.append(cue)
    return merged


def _as_one(first: Cue, second: Cue, limits: Limits) -> Cue | None:
    """Two subtitles as one, if they fit one; two lines stay lines."""
    lines = [first.text, second.text]
    if any("\n" in line for line in lines):
        between = " " if limits is SPACED else ""
        lines = _lines(between.join(line.replace("\n", between) for line in lines), limits)
    close = second.start - first.end <= PAUSE_S and second.end - first.start <= LONGEST_S
    return Cue(first.start, second.end, "\n".join(lines)) if close and len(lines) <= LINES else None


def _timed(found: Sequence[Cue], end_s: float, limits: Limits) -> Iterator[Cue]:
    """The subtitles as long on the screen as they take to read, where there is time for that, and never two at once."""
    needed = [_needed_s(cue, limits) for cue in found]
    latest = [end_s] * (len(found) + 1)  # when each may begin and can still be read; behind the last, the end
    for i in reversed(range(len(found))):
        until = latest[i + 1] - (GAP_S if i + 1 < len(found) else 0.0)
        latest[i] = min(max(found[i].start, until - needed[i]), found[i].start + LATE_S)
    start = 0.0
    for i, cue in enumerate(found):
        start = max(start, cue.start)
        following = found[i + 1].start if i + 1 < len(found) else end_s
        gap = min(GAP_S, (latest[i + 1] - start) / 2) if i + 1 < len(found) else 0.0
        spoken = min(cue.end, following - gap, start + LONGEST_S)
        end = min(max(spoken, start + needed[i]), latest[i + 1] - gap)
        yield replace(cue, start=start, end=end)
        start = end + gap
