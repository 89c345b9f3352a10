"""English speech for the mini model: eSpeak NG and CMU Flite, driven in-process through ctypes.

Why these two. The mini model exists so that the whole pipeline can be tried, and its numbers reproduced, with no
download and no licence question. Both synthesisers are small, offline and fast (some hundred times real time on one
core), so the tens of hours of speech the base model needs are made in minutes, and everyone can make them again. eSpeak
NG (https://github.com/espeak-ng/espeak-ng) gives many accents and speakers of a formant kind; Flite
(http://cmuflite.org) gives three voices built from recordings of people (the CMU Arctic speakers slt, rms and awb), so
the encoder does not learn one synthesiser's habits only.

Why ctypes. Starting a process per sentence costs more than speaking it. Neither library is thread-safe and both keep
global state, so each worker *process* owns its own copy: see `synthesise_many`. Nothing of either program is shipped
with this package; this module only calls an installed copy, or one in a folder the caller names.
"""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import zlib
from collections.abc import Callable, Iterator, Sequence
from ctypes.util import find_library
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

SAMPLE_RATE = 16_000
EDGE_SILENCE_S = 0.1
PEAK = 0.7
_ESPEAK_WORDS_PER_MINUTE = 165  # a calm reading speed; `Voice.rate` multiplies it
_ESPEAK_PITCH = 50  # eSpeak's scale runs 0..99 with 50 as the voice's own pitch
_FLITE_F0 = {"slt": 170.0, "rms": 100.0, "awb": 125.0}  # rough mean pitch in Hz, only to have a point to shift from


@dataclass(frozen=True)
class Voice:
    """One speaker. `rate` above 1 is faster and `pitch` above 1 higher than the speaker's own."""

    name: str
    engine: str  # "espeak" or "flite"
    voice_id: str  # eSpeak "accent+variant", or the Flite speaker
    rate: float = 1.0
    pitch: float = 1.0

    def jittered(self, rng: np.random.Generator) -> Voice:
        """The same speaker on another day. Flite's recorded voices turn metallic sooner, so they move less."""
        spread = 0.18 if self.engine == "espeak" else 0.10
        rate, pitch = np.exp(rng.uniform(-spread, spread, 2))
        return replace(self, rate=round(self.rate * float(rate), 3), pitch=round(self.pitch * float(pitch), 3))


def _espeak(accent: str, variant: str) -> Voice:
    # eSpeak's plain "en" is British; asked for "en-gb" it finds no voice of that name
    short = "gb" if accent == "en" else accent.removeprefix("en-").replace("gb-x-", "")
    return Voice(f"espeak-{short}-{variant.lower()}", "espeak", f"{accent}+{variant}")


VOICES: tuple[Voice, ...] = (
    _espeak("en-us", "m3"),
    _espeak("en-us", "f2"),
    _espeak("en-us", "Alex"),
    _espeak("en-us", "Annie"),
    _espeak("en-us-nyc", "linda"),
    _espeak("en", "m1"),
    _espeak("en", "f4"),
    _espeak("en", "Lee"),
    _espeak("en-gb-x-rp", "m7"),
    _espeak("en-gb-x-rp", "f1"),
    _espeak("en-gb-scotland", "m2"),
    _espeak("en-gb-scotland", "f3"),
    _espeak("en-gb-x-gbclan", "m4"),
    _espeak("en-gb-x-gbcwmd", "belinda"),
    _espeak("en-029", "m5"),
    Voice("flite-slt", "flite", "slt"),
    Voice("flite-rms", "flite", "rms"),
    Voice("flite-awb", "flite", "awb"),
)
# A speaker the model never hears in training, so that a test can tell "learned the task" from "learned the voices".
TEST_ONLY_VOICE = _espeak("en", "Andrea")


@dataclass(frozen=True)
class Engines:
    """Folders that hold the two synthesisers; None means the system's libraries."""

    espeak_root: str | None = None
    flite_root: str | None = None


def _load(names: Sequence[str], root: str | None, install: str, option: str) -> list[ctypes.CDLL]:
    """Open shared libraries from `root` or from the system. Flite's parts look each other up, hence RTLD_GLOBAL."""
    opened = []
    for name in names:
        if root is not None:
            found = sorted(Path(root).glob(f"lib{name}.so*"))
            path = str(found[0]) if found else None
        else:
            path = find_library(name)
        if path is None:
            where = f"in {root}" if root is not None else "on this system"
            raise RuntimeError(f"lib{name} was not found {where}. On Debian or Ubuntu: apt-get install {install}; "
                               f"or name a folder that holds it with {option}.")  # fmt: skip
        opened.append(ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL))
    return opened


class EspeakEngine:
    """eSpeak NG through its C interface (speak_lib.h), synchronous, samples handed over by callback."""

    _SYNCHRONOUS, _DONT_EXIT, _UTF8 = 2, 0x8000, 1
    _PARAM_RATE, _PARAM_PITCH = 1, 3
    _CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

    def __init__(self, root: str | None) -> None:
        (self._lib,) = _load(["espeak-ng"], root, "espeak-ng", "--espeak-root")
        data_parent = None if root is None else root.encode()
        self._rate = self._lib.espeak_Initialize(self._SYNCHRONOUS, 0, data_parent, self._DONT_EXIT)
        if self._rate <= 0:
            raise RuntimeError(f"eSpeak NG did not start: is the folder espeak-ng-data in {root or 'its usual place'}?")
        self._parts: list[np.ndarray] = []
        self._callback = self._CALLBACK(self._collect)  # a reference must outlive every call from C
        self._lib.espeak_SetSynthCallback(self._callback)
        self._current = ""

    def _collect(self, samples: ctypes.Array, count: int, _events: int) -> int:
        if samples and count > 0:
            self._parts.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    def speak(self, text: str, voice: Voice) -> tuple[np.ndarray, int]:
        if voice.voice_id != self._current:
            if self._lib.espeak_SetVoiceByName(voice.voice_id.encode()) != 0:
                raise RuntimeError(f"eSpeak NG has no voice {voice.voice_id!r}: its data lacks that accent or variant.")
            self._current = voice.voice_id
        self._lib.espeak_SetParameter(self._PARAM_RATE, round(_ESPEAK_WORDS_PER_MINUTE * voice.rate), 0)
        self._lib.espeak_SetParameter(self._PARAM_PITCH, min(99, max(0, round(_ESPEAK_PITCH * voice.pitch))), 0)
        # Breathy variants draw noise; eSpeak seeds it from the clock. A seed per sentence makes the build repeatable.
        if hasattr(self._lib, "espeak_ng_SetRandSeed"):
            self._lib.espeak_ng_SetRandSeed(ctypes.c_long(zlib.crc32(text.encode())))
        self._parts = []
        raw = text.encode() + b"\0"
        status = self._lib.espeak_Synth(raw, ctypes.c_size_t(len(raw)), 0, 0, 0, self._UTF8, None, None)
        if status != 0 or self._lib.espeak_Synchronize() != 0 or not self._parts:
            raise RuntimeError(f"eSpeak NG said nothing for {text!r} with {voice.voice_id}.")
        return np.concatenate(self._parts), self._rate


class _FliteWave(ctypes.Structure):
    """cst_wave of cst_wave.h."""

    _fields_ = [("type", ctypes.c_char_p), ("sample_rate", ctypes.c_int), ("num_samples", ctypes.c_int),
                ("num_channels", ctypes.c_int), ("samples", ctypes.POINTER(ctypes.c_short))]  # fmt: skip


class _FliteVoice(ctypes.Structure):
    """The first two members of cst_voice of cst_voice.h; the rest is not touched."""

    _fields_ = [("name", ctypes.c_char_p), ("features", ctypes.c_void_p)]


class FliteEngine:
    """CMU Flite with the CMU Arctic voices slt, rms and awb."""

    def __init__(self, root: str | None) -> None:
        self._root = root
        if root is not None:  # libflite may have been linked against ALSA, which a bare machine lacks
            for alsa in sorted(Path(root).glob("libasound.so*")):
                ctypes.CDLL(str(alsa), mode=ctypes.RTLD_GLOBAL)
        self._lib, *_ = _load(["flite", "flite_usenglish", "flite_cmulex"], root, "flite", "--flite-root")
        self._lib.flite_init()
        self._lib.flite_text_to_wave.restype = ctypes.POINTER(_FliteWave)
        self._lib.flite_text_to_wave.argtypes = [ctypes.c_char_p, ctypes.POINTER(_FliteVoice)]
        self._lib.flite_feat_set_float.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_float]
        self._lib.delete_wave.argtypes = [ctypes.POINTER(_FliteWave)]

    @functools.cache  # noqa: B019 - one engine lives as long as its process
    def _voice(self, speaker: str) -> ctypes._Pointer[_FliteVoice]:
        (library,) = _load([f"flite_cmu_us_{speaker}"], self._root, "flite", "--flite-root")
        register = getattr(library, f"register_cmu_us_{speaker}")
        register.restype, register.argtypes = ctypes.POINTER(_FliteVoice), [ctypes.c_char_p]
        return register(None)

    def speak(self, text: str, voice: Voice) -> tuple[np.ndarray, int]:
        handle = self._voice(voice.voice_id)
        features = handle.contents.features
        self._lib.flite_feat_set_float(features, b"duration_stretch", 1.0 / voice.rate)
        self._lib.flite_feat_set_float(features, b"int_f0_target_mean", _FLITE_F0[voice.voice_id] * voice.pitch)
        wave = self._lib.flite_text_to_wave(text.encode("ascii", "ignore"), handle)
        samples = np.ctypeslib.as_array(wave.contents.samples, shape=(wave.contents.num_samples,)).copy()
        rate = wave.contents.sample_rate
        self._lib.delete_wave(wave)
        return samples, rate


@functools.cache
def _engine(kind: str, engines: Engines) -> EspeakEngine | FliteEngine:
    return EspeakEngine(engines.espeak_root) if kind == "espeak" else FliteEngine(engines.flite_root)


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """To 16 kHz through the spectrum: exact for a band-limited signal, and its wrap-around meets only silence.

    The clip is padded so that both lengths are whole numbers (22,050 : 16,000 = 441 : 320), so no drift creeps in.
    """
    if rate == SAMPLE_RATE:
        return samples
    step_out = SAMPLE_RATE // int(np.gcd(rate, SAMPLE_RATE))
    step_in = rate * step_out // SAMPLE_RATE
    blocks = -(-len(samples) // step_in)
    blocks += blocks % 2  # even lengths keep the spectrum's last bin simple
    spectrum = np.fft.rfft(np.pad(samples, (0, blocks * step_in - len(samples))))
    length = blocks * step_out
    bins = np.zeros(length // 2 + 1, spectrum.dtype)
    kept = min(len(bins), len(spectrum))
    bins[:kept] = spectrum[:kept]
    return np.fft.irfft(bins, length) * (length / (blocks * step_in))


def synthesise(text: str, voice: Voice, engines: Engines = Engines()) -> np.ndarray:
    """`text` spoken by `voice`: float32, mono, 16 kHz, 0.1 s of silence at both ends, peak at 0.7."""
    samples, rate = _engine(voice.engine, engines).speak(text, voice)
    wave = resample(samples.astype(np.float64) / 32768, rate)
    loud = np.flatnonzero(np.abs(wave) > 0.02 * np.abs(wave).max())
    if len(loud) == 0:
        raise RuntimeError(f"{voice.name} produced silence for {text!r}.")
    edge = int(EDGE_SILENCE_S * SAMPLE_RATE)
    wave = wave[max(0, loud[0] - edge) : loud[-1] + edge]
    return (wave * (PEAK / np.abs(wave).max())).astype(np.float32)


def _synthesise_chunk(job: tuple[Sequence[tuple[str, Voice]], Engines]) -> tuple[np.ndarray, list[int]]:
    """A worker's portion as one int16 block and its clip lengths: one large message instead of many small ones."""
    chunk, engines = job
    clips = [np.round(synthesise(text, voice, engines) * 32767).astype(np.int16) for text, voice in chunk]
    return np.concatenate(clips), [len(clip) for clip in clips]


def synthesise_many(
    items: Sequence[tuple[str, Voice]],
    engines: Engines,
    workers: int,
    progress: Callable[[int, int], bool] | None = None,
    chunk: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    """All `items` as one int16 array and the clips' offsets in it (length len(items) + 1), in the order given.

    `progress(done, total)` may return False to stop early; the first `done` items are then returned.
    Workers are forked: spawning would import PyTorch once more in each. So call it before CUDA starts.
    """
    jobs = [(items[start : start + chunk], engines) for start in range(0, len(items), chunk)]
    blocks: list[np.ndarray] = []
    lengths: list[int] = []

    def gather(results: Iterator[tuple[np.ndarray, list[int]]]) -> None:
        for block, block_lengths in results:
            blocks.append(block)
            lengths.extend(block_lengths)
            if progress is not None and not progress(len(lengths), len(items)):
                return

    if workers <= 1:
        gather(map(_synthesise_chunk, jobs))
    else:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            gather(pool.imap(_synthesise_chunk, jobs))
    return np.concatenate(blocks), np.concatenate([[0], np.cumsum(lengths)])
