"""Sound files: decoded for the model, and proved whole.

A recording that is cut short or damaged must never pass for a shorter one, so decoding checks, format by format, that
everything the file promises is there. Everything wrong with data, here and in the modules above, is a DataError.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf
from scipy.signal import resample_poly

from trimlingual.data.same_recording import FINGERPRINT_S, fingerprint

SAMPLE_RATE = 16_000  # Hz; what Whisper's feature extractors expect
LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000  # Hz; the filter that resamples grows with the rate
READ_FRAMES = 1 << 20  # decoded at a time while checking, so that hours of audio do not fill the memory
UNKNOWN_SIZE = 0x7FFFF000  # bytes; recorders that cannot seek back leave a placeholder from here up in the header
INTEGER_SCALE = 10.0  # float samples are within -1..1, with mastering overs a little beyond; integers reach thousands
SHORTEST_S = 0.1  # shorter than any word
SILENCE = 1e-3  # peak, -60 dB of full scale: below the noise of any room that was recorded with speech in it
OPPOSITE = 0.01  # energy of the channels' mean against that of the channels: 20 dB are lost when they are mixed
FULL_SCALE = 0.98  # amplitude from which equal samples in a row are a flat top
FLAT = 1e-4  # difference between samples that counts as none, 3 steps of 16 bits
CLIPPED = 1e-3  # share of the samples; a few flat tops are not heard


class DataError(ValueError):
    """Data that cannot be used as it is; the message names the file or line and what to do."""


class TooLongError(DataError):
    """A recording that is longer than the caller takes."""


def load_audio(path: Path) -> np.ndarray:
    """Decode to float32 mono at 16 kHz, shape [samples]: mean of the channels, polyphase resampling where needed.

    Raises DataError for a file that is missing, empty, cut short, not audio, without samples, or with NaN or infinity.
    """
    rates, blocks = zip(*_decode(path))
    mono = np.concatenate([block.mean(axis=1) for block in blocks])
    if rates[0] != SAMPLE_RATE:
        common = math.gcd(SAMPLE_RATE, rates[0])
        mono = resample_poly(mono, SAMPLE_RATE // common, rates[0] // common)
    return np.ascontiguousarray(mono, dtype=np.float32)


def stream_audio(path: Path) -> Iterator[np.ndarray]:
    """`load_audio` in pieces of up to a minute or so, one after the other, for recordings of hours: float32 mono at 16 kHz."""
    mono, rate = np.empty(0, dtype=np.float32), SAMPLE_RATE
    up = down = 1
    begins = True
    for rate, block in _decode(path):
        mono = np.concatenate([mono, block.mean(axis=1)])
        common = math.gcd(SAMPLE_RATE, rate)
        up, down = SAMPLE_RATE // common, rate // common
        whole = (len(mono) - _margin(up, down)) // down * down
        if rate == SAMPLE_RATE:
            yield mono
            mono = mono[:0]
        elif whole > _margin(up, down):
            yield _resampled(mono, up, down, begins, whole)
            mono, begins = mono[whole - _margin(up, down) :], False
    if rate != SAMPLE_RATE:
        yield _resampled(mono, up, down, begins, len(mono))


def _margin(up: int, down: int) -> int:
    """Input samples on either side that a resampled sample depends on, by the filter of `resample_poly`; in whole periods."""
    return math.ceil((10 * max(up, down) + 1) / up / down + 1) * down


def _resampled(mono: np.ndarray, up: int, down: int, begins: bool, until: int) -> np.ndarray:
    """`mono`[margin:until] resampled, with what stands around it heard; from its beginning where it is the recording's."""
    skip = 0 if begins else _margin(up, down) * up // down
    ends = None if until == len(mono) else until * up // down
    return resample_poly(mono, up, down)[skip:ends].astype(np.float32)


def stated_s(path: Path) -> float:
    """Seconds that a recording's header states, before anything is decoded; infinite where libsndfile reads no header."""
    try:
        return float(sf.info(path).duration)
    except (sf.SoundFileError, TypeError, UnicodeEncodeError):  # TypeError: headerless .raw
        return math.inf


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that no file system takes (too long, with a zero byte) is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


@contextmanager
def _opened(path: Path) -> Iterator[mmap.mmap]:
    """The file's bytes, read as they are needed; DataError where there are none."""
    if not is_file(path):
        raise DataError(f"{path} does not exist or is not a file; correct the path or restore the file")
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise DataError(f"{path} is empty (0 bytes); copy or download it again, or take it out of the data")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield data
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions and the disk") from error


def _decode(path: Path) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (rate in Hz, float32 [frames, channels]) at least once; DataError for anything but a whole recording."""
    fix = "copy or download it again, or take it out of the data"
    with _opened(path) as data:
        if data[:4] == b"OggS" and not _ogg_is_whole(data):
            raise DataError(f"{path} is cut short (its last Ogg page is missing); {fix}")
        # An MP3 without one of these headers states no length: libsndfile's count is an estimate and proves nothing.
        tagged = any(tag in data[: 1 << 16] for tag in (b"Xing", b"Info", b"VBRI"))
    try:
        file = sf.SoundFile(path)
    except UnicodeEncodeError as error:
        raise DataError(
            f"{path} has a name that is not UTF-8, which libsndfile does not take; rename the file"
        ) from error
    except (sf.SoundFileError, TypeError) as error:  # TypeError: headerless .raw
        reason = str(error).rpartition(": ")[2]
        raise DataError(f"{path} is not audio libsndfile can read ({reason}); convert it to WAV or FLAC") from error
    num_frames = 0
    with file:
        if not LOWEST_RATE <= file.samplerate <= HIGHEST_RATE:
            raise DataError(
                f"{path} says that it has {file.samplerate:,} samples per second; from {LOWEST_RATE:,} to {HIGHEST_RATE:,} are read, "
                "so its header is damaged; convert it again"
            )
        num_at_once = max(1, 2 * READ_FRAMES // max(2, file.channels))  # many channels fill no more memory than two
        # libsndfile repairs a RIFF, AIFF or AU header that promises more than there is, and tells only its log.
        repaired = r"^\s*(?:data|SSND|Data Size)\s*:\s*(\d+) \(should be (\d+)\)"
        for promised, there in re.findall(repaired, file.extra_info, re.MULTILINE):
            if int(there) < int(promised) < UNKNOWN_SIZE:
                raise DataError(f"{path} is cut short ({there} bytes of audio, its header promises {promised}); {fix}")
        try:
            while len(block := file.read(num_at_once, dtype="float32", always_2d=True)):
                if not np.isfinite(block).all():
                    raise DataError(f"{path} has NaN or infinite samples; export it again or take it out of the data")
                if (peak := float(np.abs(block).max())) > INTEGER_SCALE:
                    raise DataError(
                        f"{path} has float samples on the scale of integers (up to {peak:,.0f}, where 1 is full scale); divide "
                        "them by 32768 (16-bit sources) and write it again, or write it as 16-bit integers"
                    )
                num_frames += len(block)
                yield file.samplerate, block
        except sf.SoundFileError as error:
            raise DataError(f"{path} is cut short or damaged ({error}); {fix}") from error
        if num_frames < file.frames and (file.format != "MP3" or tagged):
            raise DataError(f"{path} is cut short ({num_frames:,} of {file.frames:,} frames); {fix}")
    if not num_frames:
        raise DataError(f"{path} holds no samples; record it again or take it out of the data")


def _ogg_is_whole(data: mmap.mmap) -> bool:
    """True if the last Ogg page is complete and marked as the end of its stream (RFC 3533: flag 4 in byte 5)."""
    start = data.rfind(b"OggS")
    header = data[start : start + 27]
    if len(header) < 27 or not header[5] & 4:
        return False
    sizes = data[start + 27 : start + 27 + header[26]]
    return len(sizes) == header[26] and start + 27 + len(sizes) + sum(sizes) <= len(data)


@dataclass(frozen=True)
class Recording:
    """What a file that decodes to its end holds.

    `samples_sha256` is of the decoded samples, not of the file: mean of the channels, rounded to 16 bits, digital silence at both
    ends cut off. So a lossless copy in another format or with other tags has the same one. `unusable` says why nothing can be
    learned from it or said of it, `suspicious` what may be wrong. `fingerprint` is for `recordings.same_recordings`.
    """

    duration_s: float
    samples_sha256: str
    unusable: str | None
    suspicious: str | None
    fingerprint: np.ndarray


def describe_audio(path: Path, longest_s: float = math.inf, each: Callable[[], None] = lambda: None) -> Recording:
    """Decode a file to its end, in pieces, and say what it holds. DataError as for `load_audio`.

    TooLongError, without decoding the rest, where it holds more than `longest_s` seconds. `each` is called for every piece; what it
    raises ends the work.
    """
    levels, samples = _Levels(), _SamplesHash()
    start: list[np.ndarray] = []  # for the fingerprint, which needs no more
    num_frames = rate = 0
    for rate, block in _decode(path):
        each()
        mono = block.mean(axis=1)
        levels.add(block, mono)
        samples.add(mono)
        if num_frames < FINGERPRINT_S * rate:
            start.append(mono)
        num_frames += len(block)
        if num_frames > longest_s * rate:
            raise TooLongError(f"{path} is longer than {longest_s:g} s, the most that is taken here; cut it into parts")
    duration_s = num_frames / rate
    return Recording(
        duration_s,
        samples.hexdigest(),
        levels.unusable(duration_s),
        levels.suspicious(),
        fingerprint(np.concatenate(start)[: round(FINGERPRINT_S * rate)], rate),
    )


def inspect_audio(path: Path) -> Recording | DataError:
    """As `describe_audio`, with the error as a value."""
    try:
        return describe_audio(path)
    except DataError as error:
        return error


class _Levels:
    """How loud a recording is, gathered block by block."""

    def __init__(self) -> None:
        self.num_frames = self.num_clipped = 0
        self.peak = 0.0
        self.energy = self.mono_energy = 0.0  # sums of squares, of the channels' mean energy and of their mean

    def add(self, block: np.ndarray, mono: np.ndarray) -> None:
        """Count a block, [frames, channels], and its mean over the channels."""
        self.num_frames += len(block)
        self.peak = max(self.peak, float(np.abs(block).max()))
        self.energy += float(np.square(block, dtype=np.float64).mean(axis=1).sum())
        self.mono_energy += float(np.square(mono, dtype=np.float64).sum())
        full = (np.abs(block[1:]) >= FULL_SCALE) & (np.abs(np.diff(block, axis=0)) < FLAT)
        self.num_clipped += int((full[1:] & full[:-1]).any(axis=1).sum())  # three equal samples in a row: a flat top

    def unusable(self, duration_s: float) -> str | None:
        """Why there is no speech to hear, as what is said of the recording; or None."""
        if duration_s < SHORTEST_S:
            return f"is too short for speech ({duration_s * 1000:.2g} ms; it takes at least {SHORTEST_S * 1000:g} ms)"
        if self.peak < SILENCE:
            return f"is silent ({_loudest(self.peak)})"
        if self.mono_energy < OPPOSITE * self.energy:
            return "is of opposite phase (its channels cancel each other when mixed to mono; keep one of them)"
        return None

    def suspicious(self) -> str | None:
        """What may be wrong, as what is said of the recording; or None."""
        share = self.num_clipped / self.num_frames
        return f"is clipped ({share:.1%} of the samples are cut off at full scale)" if share > CLIPPED else None


def _loudest(peak: float) -> str:
    if not peak:
        return "every sample is 0"
    return f"its loudest sample is at {20 * math.log10(peak):.0f} dB of full scale, speech above {20 * math.log10(SILENCE):.0f} dB"


class _SamplesHash:
    """SHA-256 of mono samples as 16-bit integers, without the zeros at both ends."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.num_zeros: int | None = None  # since the last other sample; None before the first

    def add(self, mono: np.ndarray) -> None:
        """Go on with samples in -1..1 (what is beyond is cut off)."""
        values = np.clip(np.rint(mono * 32768.0), -32768, 32767).astype("<i2")
        heard = np.flatnonzero(values)
        if not len(heard):
            self.num_zeros = None if self.num_zeros is None else self.num_zeros + len(values)
            return
        if self.num_zeros is not None:
            self.digest.update(bytes(2 * (self.num_zeros + int(heard[0]))))
        self.digest.update(values[heard[0] : heard[-1] + 1].tobytes())
        self.num_zeros = len(values) - 1 - int(heard[-1])

    def hexdigest(self) -> str:
        """Of everything added so far."""
        return self.digest.hexdigest()
