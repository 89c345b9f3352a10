from __future__ import annotations

import json
import shutil

import pytest
import torch

from trimlingual.models.errors import ModelError
from trimlingual.models.layers import drop_layers_, without_layers
from trimlingual.models.loading import load_model, pick_device
from trimlingual.models.tree import layer_list
from trimlingual.run.lineage import Lineage

from .conftest import EVERY_FAMILY


def logits(model):
    ids = torch.arange(10)[None] % 50
    with torch.inference_mode():
        return model(input_ids=ids).logits


@EVERY_FAMILY
def test_dropping_equals_building_without(make_model):
    """Removing layers 1 and 3 of 4 equals a two-layer model that was given the others' weights."""
    model, small = make_model(layers=4), make_model(layers=2, seed=9)
    state = model.state_dict()
    for name in small.state_dict():
        wanted = name.replace("language_model.layers.1.", "language_model.layers.2.")
        small.state_dict()[name].copy_(state[wanted])
    drop_layers_(model, {"decoder": [1, 3]})
    assert torch.equal(logits(model), logits(small))
    assert model.config.text_config.num_hidden_layers == 2
    assert len(getattr(model.config.text_config, "layer_types", "12")) == 2
    assert [layer.self_attn.layer_idx for layer in layer_list(model, "decoder")] == [0, 1]


@EVERY_FAMILY
def test_generation_with_a_cache_works_after_dropping(make_model):
    model = make_model(layers=4)
    drop_layers_(model, {"decoder": [0, 2]})
    ids = torch.arange(6)[None]
    mask = torch.ones_like(ids)
    cached = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=True)
    plain = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("tower", ["decoder", "encoder"])
def test_everything_is_put_back(make_model, tower):
    model = make_model(layers=4, encoder_layers=3)
    before, layers = logits(model), list(layer_list(model, tower))

    def fails_inside():
        with without_layers(model, {tower: [1]}):
            assert len(layer_list(model, tower)) == len(layers) - 1
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails_inside()
    assert list(layer_list(model, tower)) == layers
    assert model.config.text_config.num_hidden_layers == 4
    assert model.config.audio_config.encoder_layers == 3
    assert torch.equal(logits(model), before)


def test_wrong_positions_are_errors(make_model):
    model = make_model(layers=3)
    with pytest.raises(ValueError, match=r"positions \[3\] do not exist: this model has 3 decoder layers"):
        drop_layers_(model, {"decoder": [3]})
    with pytest.raises(ValueError, match="keep at least one"):
        drop_layers_(model, {"decoder": [0, 1, 2]})


def test_lineage_composes():
    lineage = Lineage("base", {"decoder": [0, 1, 2, 3, 4], "encoder": [0, 1]}, {"decoder": 5, "encoder": 2})
    once = lineage.without({"decoder": [1]})
    twice = once.without({"decoder": [3], "encoder": [0]})
    assert twice.layers == {"decoder": [0, 2, 4], "encoder": [1]}
    assert twice.removed("decoder") == [1, 3]
    with pytest.raises(ValueError, match=r"decoder layers \[1\] are not in this model"):
        once.without({"decoder": [1]})


@EVERY_FAMILY
def test_weights_that_lack_a_layer_are_refused(model_dir, tmp_path):
    """transformers would draw the layer at random, and what it says of it is easily missed."""
    folder = shutil.copytree(model_dir, tmp_path / "longer")
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    text["num_hidden_layers"] += 1
    if text.get("layer_types"):
        text["layer_types"].append(text["layer_types"][-1])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match=r"lack \d+ of the tensors that its config\.json asks for \(first: .*layers\.\d+\."
    ):
        load_model(folder, "float32", torch.device("cpu"))


def test_a_device_that_there_is_not_is_said_with_those_that_there_are():
    with pytest.raises(ModelError, match=r"device 'gpu' is unknown; choose auto, cpu, cuda"):
        pick_device("gpu")
