"""Recordings of any length: read as a stream, cut at pauses, faulty answers tried again."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from hypothesis import given as cases
from hypothesis import settings as tried
from hypothesis import strategies as st

from trimlingual.app.second_try import SecondTry, _completing, _may_be_in, fault
from trimlingual.app.segments import FRAME_S, Cutting, Span, SpeechProbabilities, cut_at_pauses, samples_of, windows
from trimlingual.app.translate import translate_files
from trimlingual.data import audio as audio_module
from trimlingual.data.audio import SAMPLE_RATE, load_audio, stream_audio
from trimlingual.data.rows import MINI_DATA
from trimlingual.decoding.translate_clips import Translation
from trimlingual.models.inputs import Prompter
from trimlingual.models.loading import load_model, load_processor, resolve_base
from trimlingual.recipe import load_recipe
from trimlingual.recipe.languages import count_scripts
from trimlingual.run.jsonl import read_jsonl

CLIPS = read_jsonl(MINI_DATA / "everyday.jsonl")[:4]


@pytest.fixture(scope="module")
def talk(tmp_path_factory) -> tuple[Path, list[Span]]:
    """Four clips with pauses, 44.1 kHz and two channels, and where their speech stands."""
    parts, spans, now = [], [], 0
    for clip in CLIPS:
        samples = load_audio(MINI_DATA / clip["audio"])
        parts += [samples, np.zeros(11_200, np.float32)]
        spans.append(Span(now / SAMPLE_RATE, (now + len(samples)) / SAMPLE_RATE))
        now += len(samples) + 11_200
    path = tmp_path_factory.mktemp("talk") / "talk.wav"
    sf.write(path, np.concatenate(parts), SAMPLE_RATE)
    return path, spans


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("length", [900, 50_000, 183_457])
def test_a_stream_is_what_would_be_loaded(tmp_path, monkeypatch, rate, length):
    monkeypatch.setattr(audio_module, "READ_FRAMES", 20_000)
    path = tmp_path / "noise.wav"
    sf.write(path, 0.1 * np.random.default_rng(0).standard_normal((length, 2)), rate, subtype="FLOAT")
    blocks = list(stream_audio(path))
    assert np.array_equal(np.concatenate(blocks), load_audio(path))
    assert length < 60_000 or len(blocks) > 2


def test_a_stream_is_never_held_whole():
    held = []

    def blocks():
        for i in range(100):
            held.append(i)
            yield np.full(SAMPLE_RATE, i, dtype=np.float32)

    spans = [Span(0.5, 2.25), Span(40.0, 41.0), Span(98.5, 100.0)]
    found = samples_of(blocks(), spans)
    assert np.array_equal(np.unique(next(found)), [0, 1, 2])
    assert len(held) == 3
    assert np.array_equal(next(found), np.full(SAMPLE_RATE, 40))
    assert len(next(found)) == 1.5 * SAMPLE_RATE


@tried(max_examples=200, deadline=None)
@cases(
    st.lists(st.tuples(st.integers(1, 300), st.sampled_from([0.0, 0.2, 0.4, 0.6, 1.0])), max_size=20),
    st.floats(3.0, 30.0),
    st.floats(0.1, 1.0),
    st.floats(0.0, 3.0),
)
def test_segments_fit_ascend_and_lose_no_speech(stretches, max_s, pause_s, usual_s):
    probabilities = [value for length, value in stretches for _ in range(length)]
    spans = cut_at_pauses(probabilities, max_s, pause_s, usual_s)
    assert all(0 <= span.start < span.end <= len(probabilities) * FRAME_S + 1e-9 for span in spans)
    assert all(span.duration_s <= max_s + 1e-9 for span in spans)
    assert all(first.end <= second.start + 1e-9 for first, second in pairwise(spans))
    position = 0
    for length, value in stretches:
        if value == 1.0 and length * FRAME_S > 0.3:
            covered = sum(
                max(0.0, min(span.end, (position + length) * FRAME_S) - max(span.start, position * FRAME_S))
                for span in spans
            )
            assert covered == pytest.approx(length * FRAME_S)
        position += length


def test_speech_without_a_pause_is_cut_where_it_is_weakest():
    probabilities = [0.9] * 400
    probabilities[150:160] = [0.55] * 10
    first, second = cut_at_pauses(probabilities, 10.0, 0.3)
    assert 150 <= first.end / FRAME_S <= 160
    assert first.end == second.start


def test_short_neighbours_are_joined_the_closest_first():
    probabilities = [1.0] * 40 + [0.0] * 15 + [1.0] * 30 + [0.0] * 12 + [1.0] * 40 + [0.0] * 50
    assert len(cut_at_pauses(probabilities, 30.0, 0.3)) == 3
    apart, together = cut_at_pauses(probabilities, 30.0, 0.3, usual_s=3.0)
    assert apart.end < 50 * FRAME_S
    assert together.end - together.start > 82 * FRAME_S


def test_a_talk_is_cut_between_its_sentences(talk):
    pytest.importorskip("silero_vad")
    path, spans = talk
    threads = torch.get_num_threads()
    probabilities = list(SpeechProbabilities()(stream_audio(path)))
    assert torch.get_num_threads() == threads  # silero-vad's import sets it to 1
    found = cut_at_pauses(probabilities, 30.0, 0.3)
    assert len(found) == len(spans)
    for ours, theirs in zip(found, spans):
        assert abs(ours.start - theirs.start) < 0.5
        assert abs(ours.end - theirs.end) < 0.5


def test_a_talk_is_translated_as_its_clips_are(talk, tmp_path, monkeypatch):
    pytest.importorskip("silero_vad")
    (record,) = translate_files("builtin:mini", [talk[0]], ["de"], cutting=Cutting(max_s=6.0))
    assert [segment["text"] for segment in record["segments"]] == [clip["references"]["de"] for clip in CLIPS]
    assert record["text"] == " ".join(clip["references"]["de"] for clip in CLIPS)
    assert record["duration_s"] == pytest.approx(talk[1][-1].end + 0.7, abs=0.01)
    sound = tmp_path / "ends-in-speech.wav"
    sf.write(sound, load_audio(talk[0])[: round((talk[1][-1].end - 0.3) * SAMPLE_RATE)], SAMPLE_RATE)
    (record,) = translate_files("builtin:mini", [sound], ["de"], cutting=Cutting(max_s=6.0))
    assert record["segments"][-1]["end"] == record["duration_s"]
    monkeypatch.setitem(__import__("sys").modules, "silero_vad", None)  # as where it is not installed
    (record,) = translate_files("builtin:mini", [talk[0]], ["de"], cutting=Cutting(max_s=6.0))
    assert [segment["end"] - segment["start"] <= 6.0 for segment in record["segments"]]
    assert len(record["segments"]) == len(windows(record["duration_s"], 6.0))


# --- second tries


@pytest.fixture(scope="module")
def again():
    folder, recipe = resolve_base("builtin:mini"), load_recipe("mini")
    model = load_model(folder, "float32", torch.device("cpu"))
    return SecondTry(model, Prompter(load_processor(folder), recipe.task), recipe.decode)


ENGLISH = "The weather was very nice yesterday, and we went to the market together."


@pytest.mark.parametrize("language", ["de", "zh"])
def test_an_answer_in_the_wrong_language_is_tried_again(again, language):
    clip = CLIPS[0]
    first = Translation("x", language, ENGLISH, 12, truncated=False)
    assert fault(first) == "wrong language"
    samples = load_audio(MINI_DATA / clip["audio"])
    second, left = again(first, samples, len(samples) / SAMPLE_RATE)
    assert left is None
    assert second.hypothesis == clip["references"][language]


def test_an_answer_that_turns_in_a_circle_is_tried_again_without_repeats(again):
    circle = Translation("x", "de", "und dann " * 20, 40, truncated=True)
    samples = load_audio(MINI_DATA / CLIPS[1]["audio"])
    second, left = again(circle, samples, len(samples) / SAMPLE_RATE)
    assert left is None
    assert second.hypothesis == CLIPS[1]["references"]["de"]
    assert fault(replace(second, truncated=True)) == "runaway"


def test_tokens_of_other_scripts_are_banned_and_no_others(again):
    tokenizer = again.prompter.processor.tokenizer
    banned = set(again._foreign("zh"))
    for text, allowed in (("Benchmark", False), ("我们", True), ("，", True), ("3", True)):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert (not banned & set(ids)) == allowed, text
    assert set(count_scripts("".join(tokenizer.decode([i]) for i in banned))) == {"LATIN"}
    assert again._foreign("xx") == []


def test_a_language_in_latin_letters_is_not_tried_in_chinese(again, monkeypatch):
    """Asked for a language that it was not made for, the built-in model says something Chinese."""
    tried, decode = [], again._decode
    monkeypatch.setattr(again, "_decode", lambda *how: tried.append(decode(*how)) or tried[-1])
    samples = load_audio(MINI_DATA / CLIPS[0]["audio"])
    first = Translation("x", "fr", CLIPS[0]["references"]["zh"], 12, truncated=False)
    again(first, samples, len(samples) / SAMPLE_RATE)
    texts = [again.prompter.processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in tried]
    assert all(set(count_scripts(text)) == {"LATIN"} for text in texts), texts


def test_a_second_answer_in_another_script_is_none_however_short():
    assert [_may_be_in("ru", text) for text in (",亮。", "Да.", "3.", "BERT, да.")] == [False, True, True, True]
    assert _may_be_in("xx", "什么")  # nothing is known of that language


def test_what_would_repeat_four_tokens_is_found():
    assert _completing([1, 2, 3, 4, 1, 2, 3], 4) == [4]
    assert _completing([1, 2, 3, 4, 1, 2], 4) == []
    assert _completing([7], 4) == []
