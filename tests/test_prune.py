from __future__ import annotations

import json

import pytest
import torch

from trimlingual.models.errors import ModelError, ProofError
from trimlingual.models.loading import load_model
from trimlingual.models.saving import save_model
from trimlingual.run.lineage import ModelFolder, read_lineage
from trimlingual.stages import prune as module
from trimlingual.stages.prune import prune

from .conftest import EVERY_FAMILY

CPU = torch.device("cpu")


def plan_file(folder, layers, tower="decoder"):
    folder.mkdir(exist_ok=True)
    path = folder / "plan.json"
    path.write_text(json.dumps({"removals": [{"layer": layer, "tower": tower} for layer in layers]}))
    return path


@EVERY_FAMILY
def test_hand_written_plan_is_applied_and_proven(given, model_dir, model_settings, tmp_path):
    info = prune(given, plan_file(tmp_path, [1, 4]), model_settings, tmp_path / "out")
    assert info["num_decoder_layers"] == 4
    assert info["proof"]["reload_equal"] is True
    assert info["proof"]["layers_bit_equal"] == 4 + 2
    assert 0 < info["proof"]["cached_difference"] < 1e-4
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 4
    assert len(config["text_config"].get("layer_types", "1234")) == 4
    full, cut = load_model(model_dir, "float32", CPU), load_model(tmp_path / "out", "float32", CPU)
    for position, original in enumerate([0, 2, 3, 5]):
        ours, theirs = cut.model.language_model.layers[position], full.model.language_model.layers[original]
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


def test_maps_compose_over_two_prunings(given, model_settings, tmp_path):
    prune(given, plan_file(tmp_path, [1]), model_settings, tmp_path / "a")
    once = read_lineage(tmp_path / "a")
    prune(ModelFolder(tmp_path / "a", once), plan_file(tmp_path, [3, 4]), model_settings, tmp_path / "b")
    prune(given, plan_file(tmp_path, [4, 1, 3]), model_settings, tmp_path / "c")
    assert read_lineage(tmp_path / "b").layers["decoder"] == [0, 2, 5]
    b, c = (load_model(tmp_path / name, "float32", CPU).state_dict() for name in "bc")
    assert all(torch.equal(b[name], c[name]) for name in c)


@EVERY_FAMILY
def test_encoder_layers_too(given, model_settings, tmp_path):
    prune(given, plan_file(tmp_path, [0], "encoder"), model_settings, tmp_path / "out")
    assert load_model(tmp_path / "out", "float32", CPU).config.audio_config.encoder_layers == 1


@EVERY_FAMILY
def test_storage_in_bfloat16_is_what_is_proven(given, model_settings, tmp_path):
    settings = model_settings.model_copy(update={"storage_dtype": "bfloat16"})
    info = prune(given, plan_file(tmp_path, [2]), settings, tmp_path / "out")
    assert info["proof"]["reload_equal"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("damage", ["changed-layer", "lost-config"])
def test_the_proof_can_fail(given, model_settings, tmp_path, monkeypatch, damage):
    save = module.save_model

    def spoiled(model, processor, folder, dtype):
        if damage == "changed-layer":
            layer = model.model.language_model.layers[1]
            original = layer.mlp.up_proj.weight.detach().clone()
            layer.mlp.up_proj.weight.data.mul_(1.001)
            save(model, processor, folder, dtype)
            layer.mlp.up_proj.weight.data.copy_(original)
        else:
            save(model, processor, folder, dtype)
            config = json.loads((folder / "config.json").read_text())
            config["text_config"]["rope_parameters"]["rope_theta"] = 5000.0
            (folder / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(module, "save_model", spoiled)
    with pytest.raises(ProofError):
        prune(given, plan_file(tmp_path, [2]), model_settings, tmp_path / "out")


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "float32"), (1e5, "float16")])
def test_weights_that_are_not_finite_are_not_saved(make_model, processor, tmp_path, value, dtype):
    """A last step may break them after the last loss; and float16 ends at 65,504."""
    model = make_model(layers=2)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = value
    with pytest.raises(ModelError, match=r"1 of \d+ weight tensors .* hold infinity or NaN \(first: lm_head.weight\)"):
        save_model(model, processor, tmp_path / "saved", dtype)
    assert not list(tmp_path.iterdir())
