"""Translate recordings of any length with any model folder this package can load.

A recording that is longer than a clip is cut at its pauses (segments.py); segments of all recordings are translated together in
batches and put together again. Faulty answers get a second try (second_try.py). Recordings are read as streams, so memory does not
grow with their length.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from trimlingual.app.recordings import Given, readable, recordings
from trimlingual.app.second_try import SecondTry, fault
from trimlingual.app.segments import PADDING_S, Cutting, Span, SpeechProbabilities, cut_at_pauses, samples_of, windows
from trimlingual.data.audio import DataError, describe_audio, stream_audio
from trimlingual.data.rows import MINI_DATA
from trimlingual.data.sources import Clip
from trimlingual.decoding.translate_clips import Translation, Translator, longest_first
from trimlingual.exports.shipped import SHIPPED_FILE, Shipped, clip_lengths, read_shipped
from trimlingual.models.family import family_of_processor
from trimlingual.models.folders import check_folder
from trimlingual.models.loading import load_model, load_processor, pick_device, resolve_base
from trimlingual.recipe import Recipe, load_recipe
from trimlingual.recipe.languages import language
from trimlingual.run import interruptions
from trimlingual.run.extras import install_line
from trimlingual.run.jsonl import read_jsonl
from trimlingual.run.progress import progress, say

USUAL_S, LONGEST_S = 8.0, 30.0  # of a segment, where nothing is known of the clips that the model was trained on
READ_AHEAD = 4  # batches of segments in memory, so that those of similar length go together


Key = tuple[str, str, str]
"""Recording, time, language: what a segment is known by."""


@dataclass(frozen=True)
class Segment:
    """What was said between two moments, in one language. `second_try` says why there was one, `fault` what is still wrong."""

    start: float
    end: float
    text: str
    truncated: bool = False
    second_try: str | None = None
    fault: str | None = None

    def record(self) -> dict[str, Any]:
        """The JSON form, without what does not apply."""
        return {name: value for name, value in asdict(self).items() if value is not None and value is not False}


@dataclass
class Heard:
    """A recording under way, into which languages it is translated, and what was found out about it."""

    given: Given
    languages: Sequence[str]
    duration_s: float = 0.0
    warning: str | None = None
    error: DataError | None = None
    spans: list[Span] = field(default_factory=list)
    given_up: bool = False

    def check(self) -> None:
        """DataError once nobody waits for it any more, and Interrupted once the command was asked to stop, so that reading it ends."""
        interruptions.check(f"while {self.given.name} was read")
        if self.given_up:
            raise DataError(f"{self.given.name} was given up")


@dataclass(frozen=True)
class Piece:
    """A segment that is to be translated."""

    heard: Heard
    span: Span
    samples: np.ndarray
    clip: Clip

    @property
    def keys(self) -> list[Key]:
        """What its translations are known by."""
        return [_key(self.heard.given.name, self.span, code) for code in self.heard.languages]


def translate_files(
    model_name: str | Path,
    audio: Sequence[str | Path],
    languages: Sequence[str],
    recipe: Recipe | None = None,
    device: str = "auto",
    cutting: Cutting | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield one record for each recording and language, in order, as soon as the recording is done.

    A record has `audio`, `language`, `text` and `segments` (`start`, `end`, `text`, and what was odd), `duration_s`, `truncated`, and a
    `warning` where the audio looks wrong. A recording that cannot be read has an `error` and no text; the others go on. What holds no
    speech is not given to the model: its text is empty.

    `model_name` is a folder, a Hub id or `builtin:mini`; `audio` holds files, folders, patterns, or `-` for standard input. Prompt,
    decoding settings and dtype are those of `recipe`; by default those that stand in the model's folder, else the published ones.

    Raises ModelError for what is no usable model, DataError for a folder or pattern without recordings.
    """
    with tempfile.TemporaryDirectory() as scratch:
        given = recordings(audio, Path(scratch))
        app = App(model_name, languages, recipe, device, cutting or Cutting())
        yield from app.translate(given, Path(scratch))


def made_for(model_name: str | Path, device: str = "auto") -> list[str]:
    """The languages that a model was made to translate into. Raises ModelError for what is no usable model."""
    return list(_settings(resolve_base(str(model_name)), None, pick_device(device)).task.target_languages)


class App:
    """A loaded model with all that translating recordings takes.

    Its `languages` are by default those that the model was made for; they may be changed to some of those it began with.
    A recording of more than `longest_s` seconds is an error.
    Without `second_tries` faulty answers are marked alone.
    `pieces` may be called in several threads at once, `translated` in one.
    """

    def __init__(
        self,
        model_name: str | Path,
        languages: Sequence[str] | None,
        recipe: Recipe | None,
        device: str,
        cutting: Cutting,
        longest_s: float = math.inf,
        second_tries: bool = True,
    ) -> None:
        model_dir = resolve_base(str(model_name))
        check_folder(model_dir, "translate")
        settings = _settings(model_dir, recipe, pick_device(device))
        languages = settings.task.target_languages if languages is None else languages
        if other := [code for code in languages if code not in settings.task.target_languages]:
            say(
                f"note: this model was made for {', '.join(settings.task.target_languages)}, not for {', '.join(other)}"
            )
        task = settings.task.model_copy(update={"target_languages": list(languages)})
        for code in languages:
            task.language_name(code)
        self.languages = list(languages)
        processor = load_processor(model_dir)
        window = family_of_processor(processor).window_s(processor)
        self.usual_s, long_s = settings.clip_s or (USUAL_S, LONGEST_S)
        self.max_s = min(cutting.max_s or long_s + 2 * PADDING_S, window)
        self.pause_s, self.longest_s = cutting.pause_s, longest_s
        model = load_model(model_dir, settings.dtype, pick_device(device), keep_packed=True)
        self.weight_bytes = sum(weight.nbytes for weight in (*model.parameters(), *model.buffers()))
        self._samples: dict[str, np.ndarray] = {}
        self._translate = Translator(model, processor, task, settings.decode, lambda clip: self._samples[clip.id])
        self.batch_size = self._translate.batch_size
        self._again = SecondTry(model, self._translate.prompter, settings.decode) if second_tries else None
        self._speech: SpeechProbabilities | None = None
        self._no_vad = False
        self._cutting = Lock()  # one recording at a time: silero-vad keeps a state

    def translate(
        self,
        given: Sequence[Given],
        scratch: Path,
        known: Mapping[Key, Segment] | None = None,
        remember: Callable[[Key, Segment], None] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """The records of `translate_files`. Segments that are `known` are not translated again, each new one is told to `remember`."""
        waiting: list[Heard] = []
        said: dict[Key, Segment] = dict(known or {})

        def pieces() -> Iterator[Piece]:
            for each in given:
                heard = Heard(each, self.languages)
                waiting.append(heard)
                yield from self.pieces(heard, scratch, said)

        stream = pieces()
        with progress("translating, recording", len(given)) as advance:
            while ahead := list(islice(stream, READ_AHEAD * self.batch_size)):
                for new in self._batches(ahead):
                    said |= new
                    if remember:
                        for key, segment in new.items():
                            remember(key, segment)
                    advance(0)
                # All but the last recording that was begun are whole.
                while len(waiting) > 1:
                    advance(1)
                    yield from self.records(waiting.pop(0), said)
                last = ahead[-1]
                advance(0, f"{last.heard.given.name}, {last.span.end:.0f} of {last.heard.duration_s:.0f} s")
            while waiting:
                yield from self.records(waiting.pop(0), said)
                advance(1)

    def pieces(self, heard: Heard, scratch: Path, said: Mapping[Key, Segment]) -> Iterator[Piece]:
        """The segments of a recording that are to be translated; what is wrong with it is noted in `heard`."""
        name, path = heard.given.name, heard.given.path
        try:
            path, suspicious = readable(heard.given, scratch, self.longest_s, heard.check)
            found = describe_audio(path, self.longest_s, heard.check)
            heard.duration_s = found.duration_s
            if found.unusable:
                heard.warning = f"not translated: the recording {found.unusable}"
                return
            if suspicious := suspicious or found.suspicious:
                heard.warning = f"the recording {suspicious}"
            heard.spans = self._spans(heard, path)
            if not heard.spans:
                heard.warning = "not translated: no speech was found"
            wanted = dict.fromkeys(heard.languages, "")  # a clip is translated into the languages of its references
            left = [span for span in heard.spans if any(_key(name, span, code) not in said for code in heard.languages)]
            for span, samples in zip(left, samples_of(stream_audio(path), left), strict=True):
                clip = Clip(f"{name}\n{span.start}", path, wanted, None, span.duration_s, "")
                yield Piece(heard, span, samples, clip)
        except DataError as error:
            heard.error = type(error)(str(error).replace(str(path), heard.given.shown))

    def _spans(self, heard: Heard, path: Path) -> list[Span]:
        if heard.duration_s <= self.max_s:
            return [Span(0.0, heard.duration_s)]
        with self._cutting:
            return self._cut(heard, path)

    def _cut(self, heard: Heard, path: Path) -> list[Span]:
        if self._speech is None and not self._no_vad:
            try:
                self._speech = SpeechProbabilities()
            except ImportError:
                self._no_vad = True
                say(
                    f"note: silero-vad is not installed, so long recordings are cut every {self.max_s:g} s, through words too; "
                    f"{install_line('vad')} cuts them at pauses"
                )
        if self._speech is None:
            return windows(heard.duration_s, self.max_s)
        probabilities = []
        for probability in self._speech(stream_audio(path)):
            heard.check()
            probabilities.append(probability)
        found = cut_at_pauses(probabilities, self.max_s, self.pause_s, self.usual_s)
        # The last probability is of a frame that was filled up.
        return [Span(span.start, min(span.end, heard.duration_s)) for span in found]

    def translated(self, ahead: Iterable[Piece]) -> dict[Key, Segment]:
        """The translations of segments, of any recordings and into each one's languages."""
        return {key: segment for new in self._batches(ahead) for key, segment in new.items()}

    def _batches(self, ahead: Iterable[Piece]) -> Iterator[dict[Key, Segment]]:
        """`translated`, batch by batch, those of similar length together."""
        pieces = {piece.clip.id: piece for piece in ahead}
        self._samples = {name: piece.samples for name, piece in pieces.items()}
        for batch in longest_first([piece.clip for piece in pieces.values()], self.batch_size):
            said: dict[Key, Segment] = {}
            for translation in self._translate(batch):
                piece = pieces[translation.id]
                name = piece.heard.given.name
                said[_key(name, piece.span, translation.language)] = self._segment(translation, piece)
            yield said
        self._samples = {}

    def _segment(self, first: Translation, piece: Piece) -> Segment:
        wrong, left, answer = fault(first), None, first
        if self._again is None:
            wrong, left = None, wrong
        elif wrong:
            answer, left = self._again(first, piece.samples, piece.span.duration_s)
        start, end = round(piece.span.start, 3), round(piece.span.end, 3)
        return Segment(start, end, answer.hypothesis, answer.truncated, wrong, left)

    def records(self, heard: Heard, said: Mapping[Key, Segment]) -> Iterator[dict[str, Any]]:
        """The records of a recording, once all its segments are `said`."""
        name = heard.given.name
        for code in heard.languages:
            record: dict[str, Any] = {"audio": name, "language": code}
            if heard.error:
                yield record | {"text": "", "error": str(heard.error)}
                continue
            segments = [said[_key(name, span, code)] for span in heard.spans]
            between = " " if language(code).spaced else ""
            record |= {
                "text": between.join(segment.text for segment in segments if segment.text),
                "truncated": any(segment.truncated for segment in segments),
                "duration_s": round(heard.duration_s, 3),
                "segments": [segment.record() for segment in segments],
            }
            yield record | ({"warning": heard.warning} if heard.warning else {})


def _key(name: str, span: Span, code: str) -> Key:
    return name, f"{span.start:.3f}-{span.end:.3f}", code


def _settings(folder: Path, recipe: Recipe | None, device: torch.device) -> Shipped:
    if recipe is None and (shipped := read_shipped(folder)):
        return shipped
    if recipe is not None:
        return Shipped(recipe.task, recipe.decode, recipe.model.dtype)
    mini = load_recipe("mini")  # the published prompt
    clip_s = None
    if folder == resolve_base(mini.model.base):
        clip_s = clip_lengths([row["duration_s"] for row in read_jsonl(MINI_DATA / "train.jsonl")])
    else:
        say(
            f"note: {folder} has no {SHIPPED_FILE}, which says how a model is asked: it is asked {mini.task.prompt!r}; "
            "--recipe gives another prompt and other decoding settings"
        )
    return Shipped(mini.task, mini.decode, "float32" if device.type == "cpu" else "bfloat16", clip_s)
