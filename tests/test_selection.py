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


def scores_of(*scores: float):
    remaining = iter(scores)
    return lambda self: {"de": next(remaining)}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder, "float32", pick_device("cpu")).state_dict()


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(
    ("scores", "best"), [((10, 30, 20), 2), ((10, 20, 30), 4), ((30, 20, 10), 0), ((30, 30, 30), 0)]
)
def test_best_weights_are_kept(train, model_dir, tmp_path: Path, monkeypatch, capsys, method, scores, best) -> None:
    rate = {"learning_rate": 1e-2, "method": method}
    monkeypatch.setattr(KeepBest, "_score", scores_of(*scores))
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


def test_a_killed_training_repeats_no_look(train, killed_in_step, tmp_path: Path, monkeypatch) -> None:
    calls = []
    real = KeepBest._score
    monkeypatch.setattr(KeepBest, "_score", lambda self: calls.append(1) or real(self))
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
