"""Clips that have a reference in some of the target languages only: they are translated, scored and searched in those."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trimlingual.data.audio import DataError
from trimlingual.data.sources import listing_problems, read_recordings
from trimlingual.data.splits import Split, prepare_data
from trimlingual.decoding.translate_clips import translate_clips
from trimlingual.evaluation.results import read_result, read_translations
from trimlingual.models.loading import load_model, load_processor, pick_device
from trimlingual.pipeline import plan
from trimlingual.preflight import check
from trimlingual.recipe import (
    DataSettings,
    EvaluateSettings,
    HubSource,
    ManifestSource,
    RankSettings,
    SharedSettings,
    TaskSettings,
    load_recipe,
)
from trimlingual.run.jsonl import write_jsonl
from trimlingual.search.plan import read_plan
from trimlingual.search.scorer import Scorer
from trimlingual.stages.evaluate import evaluate
from trimlingual.stages.rank import rank

METRICS = {"de": "chrfpp", "zh": "chrf"}
MIXED = {"de": "chrfpp", "zh": "loss"}  # a clip in Chinese alone is not translated


@pytest.fixture
def parts(split: Split) -> dict[str, Split]:
    """Every second clip in German only, the others in Chinese only; and all of them."""
    clips = [
        replace(clip, references={code: clip.references[code]})
        for clip, code in zip(split.clips, ["de", "zh"] * len(split.clips))
    ]
    by_language = {code: Split("select", tuple(c for c in clips if code in c.references)) for code in METRICS}
    return by_language | {"both": Split("select", tuple(clips))}


def test_translated_into_their_own_languages(model_dir, parts, task, decode_settings):
    model, processor = load_model(model_dir, "float32", pick_device("cpu")), load_processor(model_dir)
    said = translate_clips(model, processor, task, parts["both"].clips, decode_settings)
    assert [(t.id, t.language) for t in said] == [(c.id, next(iter(c.references))) for c in parts["both"].clips]
    unasked = [replace(clip, references={}) for clip in parts["both"].clips[:2]]
    assert len(translate_clips(model, processor, task, unasked, decode_settings)) == 4


def test_scores_are_those_of_each_language_alone(given, parts, model_settings, decode_settings, tmp_path: Path):
    def result(name: str, languages: list[str], baseline: Path | None = None):
        out, asked = tmp_path / name, TaskSettings(target_languages=languages)
        out.mkdir()
        evaluate(
            name, given, parts[name], SharedSettings(asked, model_settings, decode_settings),
            EvaluateSettings(bootstrap_samples=100), baseline, out,
        )  # fmt: skip
        return read_result(out)["languages"], out

    both, out = result("both", ["de", "zh"])
    for code in METRICS:
        alone, _ = result(code, [code])
        assert both[code]["chrf"]["value"] == alone[code]["chrf"]["value"]
        assert both[code]["num_clips"] == len(parts[code].clips) == len(read_translations(out, code))


@pytest.mark.parametrize(
    ("metric", "batch_size"),
    [(METRICS, 4), ("loss", 4), (MIXED, 4), (MIXED, 1)],  # in batches of one clip some hold nothing to translate
)
def test_candidates_score_the_mean_of_each_language_alone(
    given, parts, model_settings, decode_settings, tmp_path: Path, metric, batch_size
):
    decode_settings = decode_settings.model_copy(update={"batch_size": batch_size})

    def ranked(name: str, languages: list[str]):
        out, asked = tmp_path / name, TaskSettings(target_languages=languages)
        out.mkdir()
        settings = RankSettings(num_layers_to_remove=1, metric=metric, early_stopping=False)
        rank(given, parts[name], SharedSettings(asked, model_settings, decode_settings), settings, None, out)
        return {record["layer"]: record["scores"] for record in read_plan(out).candidates}

    both = ranked("both", ["de", "zh"])
    for code in METRICS:
        for layer, scores in ranked(code, [code]).items():
            assert both[layer][code] == pytest.approx(scores[code], abs=1e-4)


def test_a_gpu_takes_clips_that_are_not_translated_last(given, parts, model_settings, decode_settings, monkeypatch):
    shared = SharedSettings(TaskSettings(target_languages=["de", "zh"]), model_settings, decode_settings)
    model, processor = load_model(given.path, "float32", pick_device("cpu")), load_processor(given.path)
    layers = given.lineage.layers
    scorer = Scorer(model, processor, parts["both"], shared, RankSettings(metric=MIXED), given.lineage, layers)
    monkeypatch.setattr(scorer._stepper.decoder, "device", torch.device("cuda"))
    scorer.begin_round({}, {i: [[1, 2]] * ("de" in clip.references) for i, clip in enumerate(parts["both"].clips)})
    ordered = [next(iter(parts["both"].clips[i].references)) for block in scorer.blocks for i in block]
    assert ordered == sorted(ordered)


def test_a_manifest_may_lack_languages_but_not_all(parts, tmp_path: Path):
    lines = [{"audio": str(clip.audio), "references": clip.references} for clip in parts["both"].clips]
    path = tmp_path / "m.jsonl"
    write_jsonl(path, lines)
    source = ManifestSource(path=str(path))
    with pytest.raises(DataError, match=r"reference for 'zh' is missing"):
        read_recordings(source, ["de", "zh"], tmp_path)
    clips, _ = read_recordings(source, ["de", "zh"], tmp_path, "any")
    assert [list(clip.references) for clip in clips] == [list(clip.references) for clip in parts["both"].clips]
    assert not listing_problems(source, ["de", "zh"], wanted="any")
    assert listing_problems(source, ["de", "zh"])
    assert not listing_problems(source, ["de", "zh"], wanted="any", scored=True)
    write_jsonl(path, [*lines, {"audio": str(parts["both"].clips[0].audio), "references": {}}])
    with pytest.raises(DataError, match=r"line 8: reference for 'de' is missing"):
        read_recordings(source, ["de", "zh"], tmp_path, "any")


@pytest.mark.parametrize("role", ["select", "test"])
def test_what_is_scored_needs_every_language(parts, tmp_path: Path, role):
    """Said by the check before a run and, where clips are held out, by the data stage: no model is trained first."""
    for name in ("both", "de"):
        clips = parts[name].clips
        lines = [{"audio": str(clip.audio), "id": clip.id, "references": clip.references} for clip in clips]
        write_jsonl(tmp_path / f"{name}.jsonl", lines)
    both, german = (ManifestSource(kind="manifest", path=str(tmp_path / f"{name}.jsonl")) for name in ("both", "de"))
    (found,) = listing_problems(german, ["de", "zh"], wanted="any", scored=True)
    assert "has no reference in 'zh' in any of its" in found
    assert not listing_problems(german, ["de", "zh"], wanted="any")
    recipe = load_recipe("mini", ["data.references=any", f"data.{role}={{kind: manifest, path: '{german.path}'}}"])
    assert f"data.{role}: {found}" in check(recipe, tmp_path / "run", plan(recipe, tmp_path / "run")).problems
    settings = DataSettings(train=both, select=1, test=1, references="any")
    with pytest.raises(DataError, match=r"no clip of data\.(select|test) \(1\) has a reference in '(de|zh)'"):
        prepare_data(settings, TaskSettings(target_languages=["de", "zh"]), tmp_path / "out", window_s=None)


def test_a_hub_set_without_a_language_cannot_be_scored_in_it():
    source = HubSource(kind="hub", path="some/set", splits=["test"], references={"de": "text_de"})
    assert listing_problems(source, ["de", "zh"], wanted="any", scored=True) == [
        "some/set names no column of references in 'zh'"
    ]
    assert not listing_problems(source, ["de", "zh"], wanted="any")
