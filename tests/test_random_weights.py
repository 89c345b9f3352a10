"""Base models with random weights: the true shapes, the same weights every time, and a whole run with them."""

from __future__ import annotations

import json

import pytest
import torch

from trimlingual.estimate import estimate, gb
from trimlingual.evaluation.cost import count_parameters, disk_bytes
from trimlingual.models.errors import ModelError
from trimlingual.models.family import family_of_processor, meta_model
from trimlingual.models.folders import FAMILIES
from trimlingual.models.loading import is_on_hub, load_model, load_processor, resolve_base
from trimlingual.models.qwen2_audio import FAMILY
from trimlingual.models.saving import save_model
from trimlingual.pipeline import compress
from trimlingual.quantization.nf4 import bitsandbytes_config, check_quantized
from trimlingual.recipe import QuantizeSettings, load_recipe
from trimlingual.stages.prune import layer_digests
from trimlingual.steps import base_ref

CPU = torch.device("cpu")
FULL, TINY = "random:qwen2-audio-7b", "random:qwen2-audio-tiny"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.parametrize(
    ("layers", "expected"), [(32, 8_397_094_912), (24, 6_777_929_728), (20, 5_968_347_136), (16, 5_158_764_544)]
)
def test_parameters_of_the_true_shapes(layers, expected):
    shape, processor = FAMILY.shapes["qwen2-audio-7b"], load_processor(resolve_base(FULL))
    model = meta_model(FAMILY.random_config(shape, processor, num_hidden_layers=layers))
    assert count_parameters(model) == expected


def test_the_folder_of_the_true_shapes():
    folder = resolve_base(FULL)
    processor = load_processor(folder)
    assert family_of_processor(processor).window_s(processor) == 30
    assert processor.feature_extractor.feature_size == 128
    assert 16_794_000_000 < disk_bytes(folder) < 16_795_000_000  # bfloat16, as if it were stored
    assert not list(folder.glob("*.safetensors"))
    assert not is_on_hub(FULL)


def test_weights_are_the_same_every_time():
    folder = resolve_base(TINY)
    assert resolve_base(TINY) == folder
    state = torch.random.get_rng_state()
    first, second = (layer_digests(load_model(folder, "float32", CPU)) for _ in range(2))
    assert first == second
    assert len(set(first.values())) == len(first)  # no two layers alike
    assert torch.equal(state, torch.random.get_rng_state())
    half = load_model(folder, "bfloat16", CPU)
    assert torch.equal(half.lm_head.weight.float(), load_model(folder, "float32", CPU).lm_head.weight)
    assert (
        base_ref(load_recipe("mini", [f"model.base={TINY}"])).fingerprint != base_ref(load_recipe("mini")).fingerprint
    )


def test_random_weights_are_quantised_as_read_ones_are():
    model = load_model(resolve_base(TINY), "bfloat16", CPU, bitsandbytes_config(QuantizeSettings(scheme="nf4")))
    check_quantized(model, QuantizeSettings(scheme="nf4"))
    assert torch.equal(model.lm_head.weight, load_model(resolve_base(TINY), "bfloat16", CPU).lm_head.weight)


def test_what_is_drawn_counts_as_if_it_were_stored(tmp_path):
    folder = resolve_base(TINY)
    save_model(load_model(folder, "bfloat16", CPU), load_processor(folder), tmp_path, "bfloat16")
    assert layer_digests(load_model(tmp_path, "float32", CPU)) == layer_digests(load_model(folder, "float32", CPU))
    assert disk_bytes(tmp_path) == pytest.approx(disk_bytes(folder), rel=0.02)


def test_unknown_shape():
    with pytest.raises(ModelError, match="random models: random:qwen2-audio-7b, random:qwen2-audio-tiny"):
        resolve_base("random:qwen3")


def test_the_shipped_recipe_can_be_planned_with_it():
    recipe = ["qwen2-audio-en-de", f"model.base={FULL}"]
    guesses = estimate(load_recipe(recipe[0], recipe[1:]))
    assert gb(guesses["teacher"].disk) == "~16.79 GB"
    assert gb(guesses["quantized"].disk) == "~6.08 GB"  # of which the adapter that stays beside it takes 0.67
    smaller = ["quantize.scheme=int4", "quantize.eight_bit=[embeddings, lm_head]"]
    assert estimate(load_recipe(recipe[0], [*recipe[1:], *smaller]))["quantized"].disk_text.startswith("~4.80 GB")


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name == "qwen2_audio" else pytest.mark.slow) for name in FAMILIES],
    indirect=True,
    scope="session",
)
def test_a_whole_run(family, manifests, tmp_path):
    """Every stage, from a base model that is quantised itself (system A) as well as pruned."""
    (tiny,) = [f"random:{name}" for name in family.shapes if name.endswith("-tiny")]
    few = ["finetune.max_steps=2", "recover.max_steps=2", "quantize.train.max_steps=2", "rank.num_layers_to_remove=1",
           "decode.max_new_tokens=8", "evaluate.bootstrap_samples=100", "quantize.start=base"]  # fmt: skip
    report = compress(load_recipe("mini", [f"model.base={tiny}", *few, *manifests]), tmp_path / "run")
    assert report["rehearsal"] is True
    sizes = {model["name"]: (model["num_decoder_layers"], model["disk_bytes"]) for model in report["models"]}
    assert sizes["base"][0] == sizes["teacher"][0] == 6
    assert sizes["pruned"][0] == 5
    assert sizes["base"][1] == pytest.approx(sizes["teacher"][1], rel=0.02)
    # nothing that a random teacher says is kept, yet recovery sees as much data as it would
    distilled = (tmp_path / "run" / "distilled" / "distilled.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(distilled) == 2 * 24
    for name in ("report.md", "report.html"):
        assert "Rehearsal" in (tmp_path / "run" / "report" / name).read_text(encoding="utf-8")
    card = (tmp_path / "run" / "exported" / "README.md").read_text(encoding="utf-8")
    assert "Rehearsal: the base model has random weights" in card
    assert "base_model:" not in card
    lineage = json.loads((tmp_path / "run" / "exported" / "lineage.json").read_text(encoding="utf-8"))
    assert lineage["base"] == tiny
