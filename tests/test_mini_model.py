"""The built-in model and its speech are what the documentation says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tools.mini.build_speech import reserved_english
from tools.mini.sentences import base_corpus, normalised
from trimlingual.app.translate import translate_files
from trimlingual.data.audio import load_audio
from trimlingual.data.sources import read_source
from trimlingual.data.splits import Split
from trimlingual.decoding.translate_clips import translate_clips
from trimlingual.evaluation.quality import corpus_score
from trimlingual.models.family import family_of_processor
from trimlingual.models.loading import load_model, load_processor, resolve_base
from trimlingual.models.tree import layer_list
from trimlingual.recipe import BuiltinSource, load_recipe

MINI = Path(__file__).parents[1] / "src" / "trimlingual" / "mini"
COUNTS = {"train": 300, "select": 60, "test": 100, "everyday": 1}


def records(split: str) -> list[dict]:
    return [json.loads(line) for line in (MINI / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def mini():
    folder = resolve_base("builtin:mini")
    return load_model(folder, "float32", torch.device("cpu")), load_processor(folder)


def test_small_enough_to_ship():
    assert sum(p.stat().st_size for p in (MINI / "model").iterdir()) <= 30e6
    assert sum(p.stat().st_size for p in (MINI / "data").rglob("*.ogg")) <= 8e6


def test_speech_is_complete_and_fits_the_window(mini):
    for split, least in COUNTS.items():
        clips = records(split)
        assert len(clips) >= least
        for clip in clips:
            assert set(clip["references"]) == {"de", "zh"}
            assert clip["duration_s"] <= family_of_processor(mini[1]).window_s(mini[1])
    assert len(load_audio(MINI / "data" / records("test")[0]["audio"])) / 16_000 == pytest.approx(
        records("test")[0]["duration_s"], abs=0.05
    )


def test_one_voice_is_heard_in_the_test_only():
    heard = {split: {clip["voice"] for clip in records(split)} for split in COUNTS}
    assert len(heard["train"]) >= 6
    assert len(heard["test"] - heard["train"] - heard["select"]) == 1


def test_no_sentence_is_in_two_splits_or_in_the_base_corpus():
    said = {split: [normalised(clip["source"]) for clip in records(split)] for split in COUNTS}
    everything = [sentence for sentences in said.values() for sentence in sentences]
    assert len(set(everything)) == len(everything)
    corpus = base_corpus(56_000, 6_000, 0, reserved_english())  # as benchmarks/results/mini_train.json was made
    assert not {normalised(sentence.en) for sentence in corpus} & set(everything)


def test_good_at_everyday_talk_and_clearly_weaker_in_domain(mini):
    model, processor = mini
    recipe = load_recipe("mini")
    assert len(layer_list(model, "decoder")) >= 12
    scores = {}
    for name in ("everyday", "test"):
        clips = read_source(BuiltinSource(kind="builtin", split=name), ["de", "zh"], Path("unused"))[:24]
        done = translate_clips(model, processor, recipe.task, Split(name, tuple(clips)).clips, recipe.decode)
        for language in ("de", "zh"):
            hypotheses = [t.hypothesis for t in done if t.language == language]
            references = [clip.references[language] for clip in clips]
            scores[name, language] = corpus_score("chrf", hypotheses, references, language).value
    assert scores["everyday", "de"] > 90
    assert scores["everyday", "zh"] > 90
    assert scores["test", "de"] < 70
    assert scores["test", "zh"] < 70


def test_translate_files():
    clip = records("everyday")[0]
    lines = list(
        translate_files(resolve_base("builtin:mini"), [MINI / "data" / clip["audio"]], ["de"], load_recipe("mini"))
    )
    assert [line["text"] for line in lines] == [clip["references"]["de"]]
