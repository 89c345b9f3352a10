"""Sound files: decoded for the model, and proved whole.

A recording that is cut short or damaged must never pass for a shorter one, so decoding checks, format by format, that
everything the file promises is there. Everything wrong with data, here and in the modules above, is a DataError.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile as sf
from scipy.signal import resample_poly

SAMPLE_RATE = 16_000  # Hz; what the Whisper feature extractor of Qwen2-Audio expects
READ_FRAMES = 1 << 20  # decoded at a time while checking, so that hours of audio do not fill the memory
UNKNOWN_SIZE = 0x7FFFF000  # bytes; recorders that cannot seek back leave a placeholder from here up in the header


class DataError(ValueError):
    """Data that cannot be used as it is; the message names the file or line and what to do."""


def load_audio(path: Path) -> np.ndarray:
    """Decode to float32 mono at 16 kHz, shape [samples]: mean of the channels, polyphase resampling where needed.

    Raises DataError for a file that is missing, empty, cut short, not audio, without samples, or with NaN or infinity.
    """
    rates, blocks = zip(*_decode(path, _read_bytes(path)))
    mono = np.concatenate([block.mean(axis=1) for block in blocks])
    if rates[0] != SAMPLE_RATE:
        common = math.gcd(SAMPLE_RATE, rates[0])
        mono = resample_poly(mono, SAMPLE_RATE // common, rates[0] // common)
    return np.ascontiguousarray(mono, dtype=np.float32)


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that no file system takes (too long, with a zero byte) is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _read_bytes(path: Path) -> bytes:
    if not is_file(path):
        raise DataError(f"{path} does not exist or is not a file; correct the path or restore the file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions and the disk") from error


def _decode(path: Path, data: bytes) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (rate in Hz, float32 [frames, channels]) at least once; DataError for anything but a whole recording."""
    fix = "copy or download it again, or take it out of the data"
    if not data:
        raise DataError(f"{path} is empty (0 bytes); {fix}")
    if data[:4] == b"OggS" and not _ogg_is_whole(data):
        raise DataError(f"{path} is cut short (its last Ogg page is missing); {fix}")
    try:
        file = sf.SoundFile(path)
    except (sf.SoundFileError, TypeError) as error:  # TypeError: headerless .raw
        reason = str(error).rpartition(": ")[2]
        raise DataError(f"{path} is not audio libsndfile can read ({reason}); convert it to WAV or FLAC") from error
    num_frames = 0
    with file:
        # libsndfile repairs a RIFF, AIFF or AU header that promises more than there is, and tells only its log.
        repaired = r"^\s*(?:data|SSND|Data Size)\s*:\s*(\d+) \(should be (\d+)\)"
        for promised, there in re.findall(repaired, file.extra_info, re.MULTILINE):
            if int(there) < int(promised) < UNKNOWN_SIZE:
                raise DataError(f"{path} is cut short ({there} bytes of audio, its header promises {promised}); {fix}")
        try:
            while len(block := file.read(READ_FRAMES, dtype="float32", always_2d=True)):
                if not np.isfinite(block).all():
                    raise DataError(f"{path} has NaN or infinite samples; export it again or take it out of the data")
                num_frames += len(block)
                yield file.samplerate, block
        except sf.SoundFileError as error:
            raise DataError(f"{path} is cut short or damaged ({error}); {fix}") from error
        # An MP3 without one of these headers states no length: libsndfile's count is an estimate and proves nothing.
        states_length = file.format != "MP3" or any(tag in data[: 1 << 16] for tag in (b"Xing", b"Info", b"VBRI"))
        if num_frames < file.frames and states_length:
            raise DataError(f"{path} is cut short ({num_frames:,} of {file.frames:,} frames); {fix}")
    if not num_frames:
        raise DataError(f"{path} holds no samples; record it again or take it out of the data")


def _ogg_is_whole(data: bytes) -> bool:
    """True if the last Ogg page is complete and marked as the end of its stream (RFC 3533: flag 4 in byte 5)."""
    start = data.rfind(b"OggS")
    header = data[start : start + 27]
    if len(header) < 27 or not header[5] & 4:
        return False
    sizes = data[start + 27 : start + 27 + header[26]]
    return len(sizes) == header[26] and start + 27 + len(sizes) + sum(sizes) <= len(data)


def inspect_audio(path: Path) -> tuple[float, str] | DataError:
    """(length in seconds, SHA-256 of the bytes) of a file that decodes to its end, or what is wrong with it."""
    try:
        data = _read_bytes(path)
        num_frames = rate = 0
        for rate, block in _decode(path, data):  # noqa: B007
            num_frames += len(block)
        return num_frames / rate, hashlib.sha256(data).hexdigest()
    except DataError as error:
        return error
