"""Training material: generated sentences spoken by many voices, kept on the device and drawn in batches."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tools.mini import network
from tools.mini.build_speech import (
    EVERYDAY_HELD_OUT,
    MAX_CLIP_S,
    SPLIT_SIZES,
    reserved_english,
    split_sentences,
)
from tools.mini.network import Packer
from tools.mini.sentences import Sentence, base_corpus, normalised
from tools.mini.speech import SAMPLE_RATE, TEST_ONLY_VOICE, VOICES, Engines, Voice, synthesise_many
from tools.mini.tokens import LANGUAGES


def say(text: str) -> None:
    """A progress line that is seen at once, also through a pipe."""
    print(text, flush=True)


@dataclass
class Speech:
    """Clips on the device: one int16 array and where each clip begins, so a batch is one gather."""

    samples: Tensor
    offsets: np.ndarray
    sentences: list[Sentence]
    voices: list[Voice]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def hours(self) -> float:
        return float(self.offsets[-1]) / SAMPLE_RATE / 3600

    def every(self, step: int) -> Speech:
        """Every `step`-th clip, as a smaller sample of the same mixture."""
        chosen = range(0, len(self.sentences), step)
        parts = [self.samples[self.offsets[i] : self.offsets[i + 1]] for i in chosen]
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
        return Speech(torch.cat(parts), offsets, [self.sentences[i] for i in chosen], [self.voices[i] for i in chosen])

    def waves(self, chosen: np.ndarray, length: int) -> Tensor:
        """Float clips, zero-padded on the right to `length` samples."""
        device = self.samples.device
        starts = torch.from_numpy(self.offsets[chosen]).to(device)
        sizes = torch.from_numpy(self.lengths[chosen]).to(device)
        place = torch.arange(min(length, int(self.lengths[chosen].max())), device=device)
        index = (starts[:, None] + place).clamp_(max=len(self.samples) - 1)
        waves = (self.samples[index].float() / 32767) * (place < sizes[:, None])
        return torch.nn.functional.pad(waves, (0, length - waves.shape[1]))


def speak(
    pairs: Sequence[tuple[Sentence, Voice]], engines: Engines, workers: int, limit_s: float = math.inf
) -> tuple[np.ndarray, np.ndarray]:
    """Synthesise with a progress line now and then; clips that turn out too long are dropped by the caller."""
    began = last = time.monotonic()

    def progress(done: int, total: int) -> bool:
        nonlocal last
        now = time.monotonic()
        if now - last > 15 or done == total:
            say(f"speech: {done}/{total} clips, {now - began:.0f} s")
            last = now
        return now - began < limit_s

    return synthesise_many([(sentence.en, voice) for sentence, voice in pairs], engines, workers, progress)


def training_pairs(args: argparse.Namespace) -> list[tuple[Sentence, Voice]]:
    """Every sentence with `--renditions` different speakers; whole passes first, in case the synthesis is cut short."""
    reserved = reserved_english()
    sentences = base_corpus(args.num_everyday, args.num_research, seed=args.seed, exclude=reserved)
    leaked = reserved & {normalised(sentence.en) for sentence in sentences}
    if leaked:
        raise RuntimeError(f"{len(leaked)} shipped sentences are in the base corpus, such as {min(leaked)!r}.")
    rng = np.random.default_rng(args.seed)
    first = rng.permutation(len(VOICES))
    pairs: list[tuple[Sentence, Voice]] = []
    for rendition in range(args.renditions):
        for place in rng.permutation(len(sentences)):
            # Neighbours in the voice list are of one accent: a stride keeps a sentence's renditions far apart.
            voice = VOICES[first[(int(place) + 7 * rendition) % len(VOICES)]]
            pairs.append((sentences[place], voice.jittered(rng)))
    return pairs


def evaluation_pairs(limit: int | None = None) -> list[tuple[Sentence, Voice]]:
    """Unseen everyday sentences and the in-domain test's own, every fourth by the voice that training never uses."""
    rng = np.random.default_rng(7)
    pools = split_sentences()
    pairs = []
    for name, size in (("everyday_held_out", EVERYDAY_HELD_OUT), ("test", SPLIT_SIZES["test"])):
        for number, sentence in enumerate(pools[name][: min(size, limit or size)]):
            voice = TEST_ONLY_VOICE if number % 4 == 3 else VOICES[number % len(VOICES)]
            pairs.append((sentence, voice.jittered(rng)))
    return pairs


def as_speech(pairs: Sequence[tuple[Sentence, Voice]], samples: np.ndarray, offsets: np.ndarray) -> Speech:
    """Pair audio with text again. Clips beyond the limit stay in the array but are never drawn: see `Batches`."""
    spoken = pairs[: len(offsets) - 1]
    return Speech(torch.from_numpy(samples), offsets, [pair[0] for pair in spoken], [pair[1] for pair in spoken])


@dataclass(frozen=True)
class Batch:
    """A training step's worth of clips."""

    waves: Tensor
    samples: Tensor
    frames: Tensor
    num_audio: Tensor
    packed: network.Packed
    characters: Tensor  # CTC targets, all clips in a row
    character_counts: Tensor  # these two stay on the host: the CTC loss reads them there, and would wait for a copy
    ctc_steps: Tensor


class Batches:
    """Endless batches of similar length, shuffled anew at every pass."""

    def __init__(self, speech: Speech, packer: Packer, size: int, seed: int) -> None:
        self._speech, self._packer, self._rng = speech, packer, np.random.default_rng(seed)
        self._usable = np.flatnonzero(speech.lengths <= MAX_CLIP_S * SAMPLE_RATE)
        self.size = min(size, len(self._usable))
        self.dropped = len(speech.sentences) - len(self._usable)
        answers = {s: [packer.answer(getattr(s, language)) for language in LANGUAGES] for s in set(speech.sentences)}
        self._answers = [answers[sentence] for sentence in speech.sentences]
        self.alphabet = sorted({char for sentence in answers for char in normalised(sentence.en)})
        number = {char: place for place, char in enumerate(self.alphabet, start=1)}  # 0 is the CTC blank
        self._characters = [np.array([number[c] for c in normalised(s.en)], np.int32) for s in speech.sentences]
        self.longest_answer = max(len(answer) for pair in self._answers for answer in pair)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            order = self._rng.permutation(self._usable)
            batches: list[np.ndarray] = []
            for start in range(0, len(order), self.size * 16):
                near = order[start : start + self.size * 16]
                near = near[np.argsort(self._speech.lengths[near], kind="stable")]
                whole = len(near) // self.size
                batches.extend(np.split(near[: whole * self.size], whole) if whole else [])
            for place in self._rng.permutation(len(batches)):
                yield self._batch(batches[place])

    def _batch(self, chosen: np.ndarray) -> Batch:
        device = self._speech.samples.device
        lengths = self._speech.lengths[chosen]
        frames = network.feature_frames(lengths)
        num_audio = self._packer.blueprint.num_states(frames)
        packed = self._packer.pack(num_audio.tolist(), [self._answers[i] for i in chosen])
        padded = self._packer.blueprint.padded(int(lengths.max()))
        characters = [self._characters[i] for i in chosen]

        def move(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        return Batch(
            waves=self._speech.waves(chosen, padded),
            samples=move(lengths),
            frames=move(frames),
            num_audio=move(num_audio),
            packed=packed.to(device),
            characters=move(np.concatenate(characters).astype(np.int64)),
            character_counts=torch.tensor([len(c) for c in characters]),
            ctc_steps=torch.from_numpy((frames - 1) // 2 + 1),
        )
