"""Decoding speech, and telling a damaged or truncated recording from a whole one, in every format we accept."""

from __future__ import annotations

import math
import os
import sys

import numpy as np
import pytest
import soundfile as sf

from trimlingual.data import audio
from trimlingual.data.audio import DataError, describe_audio, load_audio, stated_s


def sine(seconds: float = 0.5, rate: int = 16_000, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (8_000, 1), (44_100, 2), (48_000, 1)])
def test_any_format_and_rate_becomes_16_khz_mono_of_the_same_pitch_and_length(tmp_path, ending, rate, channels):
    path = tmp_path / f"a.{ending}"
    sf.write(path, np.repeat(sine(1.0, rate)[:, None], channels, axis=1), rate)
    audio = load_audio(path)
    assert audio.dtype == np.float32
    assert audio.shape == (16_000,)
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio))))  # 1 s long: bin = Hz
    assert spectrum.argmax() == 440
    assert np.abs(audio[2000:-2000]).max() == pytest.approx(0.5, abs=0.05)


def test_16_khz_is_not_resampled(tmp_path):
    samples = sine()
    sf.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav"), samples)


def test_stereo_is_averaged(tmp_path):
    stereo = np.stack([np.full(100, 0.5), np.full(100, -0.25)], axis=1).astype(np.float32)
    sf.write(tmp_path / "a.wav", stereo, 16_000, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav"), np.full(100, 0.125, np.float32))


def test_audio_longer_than_one_block_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "READ_FRAMES", 1000)
    sf.write(tmp_path / "a.wav", sine(), 16_000, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav"), sine())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"this is not audio at all" * 50, "not audio"),
        ("no samples", "no samples"),
        ("nan", "NaN"),
        ("infinite", "infinite"),
    ],
)
def test_bad_files_are_named(tmp_path, content, says):
    path = tmp_path / "bad.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        samples = {"no samples": [], "nan": [0.0, np.nan], "infinite": [0.0, np.inf]}[content]
        sf.write(path, np.array(samples, np.float32), 16_000, subtype="FLOAT")
    with pytest.raises(DataError, match=says) as caught:
        load_audio(path)
    assert str(path) in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_not_utf_8_is_said(tmp_path):
    path = tmp_path / os.fsdecode(b"gr\xfcn.wav")
    path.write_bytes(b"no matter what")
    with pytest.raises(DataError, match="has a name that is not UTF-8"):
        load_audio(path)
    assert stated_s(path) == math.inf


def test_a_folder_is_not_audio(tmp_path):
    with pytest.raises(DataError, match="not a file"):
        load_audio(tmp_path)


@pytest.mark.parametrize("keep", [0.98, 0.5])
@pytest.mark.parametrize(
    ("ending", "subtype"),
    [
        ("wav", "PCM_16"),
        ("wav", "FLOAT"),
        ("flac", None),
        ("ogg", "VORBIS"),
        ("ogg", "OPUS"),
        ("mp3", None),
        ("aiff", None),
        ("au", "PCM_16"),
    ],
)
def test_a_truncated_file_is_never_taken_for_a_shorter_one(tmp_path, ending, subtype, keep):
    path = tmp_path / f"a.{ending}"
    sf.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 48_000), 16_000, subtype=subtype)
    assert len(load_audio(path)) == 48_000
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DataError, match="cut short"):
        load_audio(path)


def test_an_ogg_file_cut_between_two_pages_is_truncated(tmp_path):
    path = tmp_path / "a.ogg"
    sf.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 48_000), 16_000, subtype="OPUS")
    content = path.read_bytes()
    path.write_bytes(content[: content.rfind(b"OggS")])
    assert 0 < sf.info(path).frames < 48_000  # libsndfile takes it for a shorter file
    with pytest.raises(DataError, match="cut short"):
        load_audio(path)


def test_a_stream_recorded_to_a_pipe_is_not_taken_for_a_truncated_one(tmp_path):
    path = tmp_path / "a.wav"
    sf.write(path, sine(), 16_000)
    content = bytearray(path.read_bytes())
    at = content.index(b"data") + 4
    content[at : at + 4] = content[4:8] = b"\xff\xff\xff\xff"  # what ffmpeg writes when it cannot seek back
    path.write_bytes(content)
    assert len(load_audio(path)) == len(sine())


def test_float_samples_on_the_scale_of_integers_are_refused(tmp_path):
    path = tmp_path / "a.wav"
    sf.write(path, sine() * 2, 16_000, subtype="FLOAT")  # mastering overs
    assert np.abs(load_audio(path)).max() == pytest.approx(1.0, abs=0.01)
    sf.write(path, sine() * 32_768, 16_000, subtype="FLOAT")
    with pytest.raises(DataError, match=r"scale of integers .* divide them by 32768"):
        load_audio(path)


def stereo(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.stack([left, right], axis=1)


@pytest.mark.parametrize(
    ("samples", "unusable", "suspicious"),
    [
        (sine(), None, None),
        (sine(hertz=50.0) * 2, None, None),  # peak at full scale, but round
        (stereo(sine(), 0.5 * sine(hertz=300)), None, None),
        (np.zeros(16_000), "silent", None),
        (sine() * 1e-3, "silent", None),
        (sine(0.05), "too short", None),
        (np.array([0.1]), "too short", None),
        (stereo(sine(), -sine()), "opposite phase", None),
        (stereo(sine(), -0.95 * sine()), "opposite phase", None),
        (np.clip(sine() * 3, -1, 1), None, "clipped"),
        (np.clip(sine() * 3, -1, 32767 / 32768), None, "clipped"),
    ],
)
def test_what_cannot_be_heard_or_is_cut_off_is_told(tmp_path, samples, unusable, suspicious):
    sf.write(tmp_path / "a.wav", samples, 16_000)
    found = describe_audio(tmp_path / "a.wav")
    assert (unusable or "") in (found.unusable or "")
    assert bool(found.unusable) == bool(unusable)
    assert (suspicious or "") in (found.suspicious or "")
    assert bool(found.suspicious) == bool(suspicious)


def test_equal_samples_have_one_hash_whatever_the_file(tmp_path, monkeypatch):
    samples = np.rint(sine(1.0) * 30_000).astype(np.int16)
    padded = np.concatenate([np.zeros(700, np.int16), samples, np.zeros(900, np.int16)])
    kept = {}
    for name, content in {
        "a.wav": samples,
        "b.flac": samples,
        "c.aiff": stereo(samples, samples),
        "d.wav": padded,
    }.items():
        sf.write(tmp_path / name, content, 16_000)
        kept[name] = describe_audio(tmp_path / name).samples_sha256
    assert len(set(kept.values())) == 1
    monkeypatch.setattr(audio, "READ_FRAMES", 300)
    assert describe_audio(tmp_path / "d.wav").samples_sha256 == kept["a.wav"]
    samples[5_000] += 1
    sf.write(tmp_path / "a.wav", samples, 16_000)
    assert describe_audio(tmp_path / "a.wav").samples_sha256 != kept["a.wav"]
