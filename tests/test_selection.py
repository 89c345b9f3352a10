"""The best weights by the selection clips are kept; those that training started from count too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trimlingual.models.inputs import Example, TrainingData
from trimlingual.models.loading import load_model, pick_device
from trimlingual.recipe import TrainSettings
from trimlingual.run.lineage import read_lineage
from trimlingual.stages.finetune import finetune
from trimlingual.training.selection import SCORES_FILE, Guide, KeepBest

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def train(given, split, shared):
    examples = [Example(i, clip.id, "de", clip.references["de"]) for i, clip in enumerate(split.clips)]
    data = TrainingData(split.clips, examples)

    def run(out: Path, **settings):
        defaults = {"max_steps": 4, "batch_size": 4, "freeze": ["audio_tower"], "selection_checks": 2}
        return finetune(given, data, shared, TrainSettings(**{**defaults, **settings}), out, Guide(split))

    return run


@pytest.fixture
def scored(monkeypatch):
    """Gives the selection clips these scores, one after the other, without a translation."""

    def use(*scores: float) -> None:
        remaining = iter(scores)
        monkeypatch.setattr(KeepBest, "_translations", lambda self: {})
        monkeypatch.setattr(KeepBest, "_score", lambda self, said: {"de": next(remaining)})

    return use


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder, "float32", pick_device("cpu")).state_dict()


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(
    ("scores", "best"), [((10, 30, 20), 2), ((10, 20, 30), 4), ((30, 20, 10), 0), ((30, 30, 30), 0)]
)
def test_best_weights_are_kept(train, model_dir, tmp_path: Path, scored, capsys, method, scores, best) -> None:
    rate = {"learning_rate": 1e-2, "method": method}
    scored(*scores)
    info = train(tmp_path / "kept", **rate)
    assert info["selection"]["best_step"] == best
    assert [record["score"] for record in info["selection"]["scores"]] == list(scores)
    assert ("WARNING" in capsys.readouterr().err) == (best == 0)
    if best == 0:
        expected = weights(model_dir)
    else:
        train(tmp_path / "other", **rate, selection_checks=0, max_steps=4)
        expected = weights(tmp_path / "other")
    same = all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "kept").items())
    assert same == (best != 2)


def test_scores_are_real_and_the_clips_are_remembered(train, split, tmp_path: Path) -> None:
    info = train(tmp_path / "out", learning_rate=1e-4)
    assert len(info["selection"]["scores"]) == 3
    assert set(info["selection"]["scores"][0]["scores"]) == {"de", "zh"}
    assert set(read_lineage(tmp_path / "out").seen["select"]) == split.audio_hashes


@pytest.mark.parametrize("better", [True, False])
def test_a_gain_that_may_be_chance_is_said(train, split, tmp_path: Path, monkeypatch, capsys, better: bool) -> None:
    """The interval is that of the clips: all of them right is beyond doubt, one word of one clip is not."""
    right = {code: {clip.id: clip.references[code] for clip in split.clips} for code in ("de", "zh")}
    wrong = {code: dict.fromkeys(said, "Unsinn") for code, said in right.items()}
    first = split.clips[0].id
    looks = iter([wrong, right if better else wrong | {"de": wrong["de"] | {first: right["de"][first]}}])
    monkeypatch.setattr(KeepBest, "_translations", lambda self: next(looks))
    info = train(tmp_path / "out", learning_rate=1e-4, selection_checks=1)["selection"]
    assert info["best_step"] == 4
    assert (info["gain"]["de"]["low"] > 0) == better
    assert "said" not in info["scores"][0]
    said = capsys.readouterr().err
    assert ("cannot tell that training made the model better (de +" in said) == (not better)


def test_a_killed_training_repeats_no_look(train, killed_in_step, tmp_path: Path, monkeypatch) -> None:
    calls = []
    real = KeepBest._score
    monkeypatch.setattr(KeepBest, "_score", lambda self, said: calls.append(1) or real(self, said))
    whole = train(tmp_path / "whole", learning_rate=1e-2)
    assert len(calls) == 3
    calls.clear()
    with killed_in_step(3):
        train(tmp_path / "killed", learning_rate=1e-2, save_steps=1)
    journal = next((tmp_path / "killed").rglob(SCORES_FILE)).read_text(encoding="utf-8").strip().split("\n")
    assert [json.loads(line)["step"] for line in journal] == [0, 2]
    again = train(tmp_path / "killed", learning_rate=1e-2, save_steps=1)
    assert len(calls) == 3
    assert again["selection"] == whole["selection"]


def test_the_rate_that_the_selection_clips_like_best_is_kept(train, tmp_path: Path, scored) -> None:
    rates = {"sweep": [1e-4, 1e-2, 3e-2], "selection_checks": 1}
    scored(10, 20, 10, 30, 10, 25)
    info = train(tmp_path / "swept", **rates)
    assert info["learning_rate"] == 1e-2
    assert [(tried["learning_rate"], tried["score"]) for tried in info["sweep"]] == [(1e-4, 20), (1e-2, 30), (3e-2, 25)]
    scored(10, 30)
    train(tmp_path / "alone", learning_rate=1e-2, selection_checks=1)
    swept, alone = weights(tmp_path / "swept"), weights(tmp_path / "alone")
    assert all(torch.equal(tensor, alone[name]) for name, tensor in swept.items())


def test_a_killed_sweep_tries_no_rate_again(train, tmp_path: Path, monkeypatch) -> None:
    rates = {"sweep": [1e-4, 1e-2], "selection_checks": 1, "save_steps": 1}
    calls = []
    real = KeepBest._score

    def score(self, said):
        calls.append(1)
        if len(calls) == die_at:
            raise KeyboardInterrupt
        return real(self, said)

    die_at = 0
    monkeypatch.setattr(KeepBest, "_score", score)
    whole = train(tmp_path / "whole", **rates)
    calls.clear()
    die_at = 4  # before and after the first rate, before the second, then
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", **rates)
    again = train(tmp_path / "killed", **rates)
    assert len(calls) == 5
    assert again["sweep"] == whole["sweep"]
    assert again["losses"] == whole["losses"]


def test_a_sweep_needs_clips_to_choose_by() -> None:
    with pytest.raises(ValueError, match="sweep needs selection_checks"):
        TrainSettings(sweep=[1e-5, 1e-4])
    with pytest.raises(ValueError, match="names a rate twice"):
        TrainSettings(sweep=[1e-5, 1e-5], selection_checks=1)
