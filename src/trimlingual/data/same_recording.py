"""Whether two files hold the same recording, also after lossy coding, resampling or a change of loudness.

After Haitsma and Kalker, "A Highly Robust Audio Fingerprinting System" (ISMIR 2002): every 16 ms the signs of the differences in energy
between neighbouring bands and moments make 32 bits. Copies of a recording agree in most bits, unlike recordings in half of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.signal import resample_poly

FINGERPRINT_S = 30.0  # seconds from the start that are compared
RATE = 4_000  # Hz; what is compared lies below 1,700 Hz, which every codec keeps
FRAME = 1_536  # samples, 0.38 s: so long that a shift by half a hop changes little
HOP = 64  # samples, 16 ms
BANDS = np.geomspace(300, 1_700, 34)  # Hz, borders of 33 bands
COMMON = 16  # a frame's 32 bits that stand in more clips than this (silence, hum) say nothing
FEWEST = 32  # frames of a fingerprint (0.9 s of audio) from which a comparison is sure enough
FEWEST_EQUAL = 2  # frames that are equal to the bit, for a pair to be compared
OVERLAP = 0.8  # of the shorter fingerprint that must be compared
BIT_ERRORS = 0.25  # share of unequal bits up to which it is one recording (0.35 in the paper, for music)


def fingerprint(mono: np.ndarray, rate: int) -> np.ndarray:
    """uint32 [frames] of samples at `rate` Hz, empty for less than a frame (0.4 s)."""
    common = math.gcd(RATE, rate)
    samples = resample_poly(mono.astype(np.float32), RATE // common, rate // common) if rate != RATE else mono
    if len(samples) < FRAME + HOP:
        return np.zeros(0, np.uint32)
    frames = np.lib.stride_tricks.sliding_window_view(samples, FRAME)[::HOP]
    power = np.square(np.abs(np.fft.rfft(frames * np.hanning(FRAME).astype(np.float32), axis=1)))
    borders = np.searchsorted(np.fft.rfftfreq(FRAME, 1 / RATE), BANDS)
    energy = np.add.reduceat(power, borders, axis=1)[:, :-1]  # [frames, 33]
    bands = energy[:, :-1] - energy[:, 1:]
    return np.packbits(bands[1:] > bands[:-1], axis=1).view(np.uint32).ravel()


def same_recordings(fingerprints: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of fingerprints of the same recording, in order. Only pairs with frames in common are compared."""
    lengths = [len(found) for found in fingerprints]
    if not sum(lengths):
        return []
    values = np.concatenate(fingerprints)
    order = np.argsort(values, kind="stable")  # equal frames stand together, in the order of their clips
    values = values[order]
    clips = np.repeat(np.arange(len(lengths)), lengths)[order]
    frames = np.concatenate([np.arange(num) for num in lengths])[order]
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    rare = sizes[group] <= COMMON
    found = []  # rows (i, j, by how many frames j is late)
    for step in range(1, COMMON):
        a, b = np.s_[:-step], np.s_[step:]
        hits = (group[a] == group[b]) & rare[a] & (clips[a] != clips[b])
        found.append(np.stack([clips[a][hits], clips[b][hits], frames[b][hits] - frames[a][hits]], axis=1))
    shifts, counts = np.unique(np.concatenate(found), axis=0, return_counts=True)
    candidates = shifts[counts >= FEWEST_EQUAL].tolist()
    return sorted({(i, j) for i, j, shift in candidates if _agree(fingerprints[i], fingerprints[j], shift)})


def _agree(first: np.ndarray, second: np.ndarray, shift: int) -> bool:
    """Whether most bits are equal where `second`, `shift` frames late, lies over `first`."""
    a, b = (first, second[shift:]) if shift >= 0 else (first[-shift:], second)
    num = min(len(a), len(b))
    if num < max(FEWEST, OVERLAP * min(len(first), len(second))):
        return False
    return int(np.bitwise_count(a[:num] ^ b[:num]).sum()) <= BIT_ERRORS * 32 * num
