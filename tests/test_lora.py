"""LoRA layers as one node against PEFT's own."""

from __future__ import annotations

import copy
from itertools import combinations

import pytest
import torch
from torch import nn

from trimlingual.estimate import config_of, estimate
from trimlingual.models.family import meta_model
from trimlingual.models.inputs import Example, TrainingData
from trimlingual.models.tree import freeze_, text_decoder
from trimlingual.recipe import LoraSettings, TrainSettings, load_recipe
from trimlingual.training import lora
from trimlingual.training.lora import add_lora, fuse_lora_
from trimlingual.training.trainer import train_

from .conftest import EVERY_FAMILY


class Two(nn.Module):
    """A layer with a bias, one without, and something between."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 192, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adapted(four_bit=False, dtype=torch.float32, dropout=0.0):
    """PEFT's model and the same with fused layers."""
    torch.manual_seed(0)
    model = Two().to(dtype)
    if four_bit:
        bnb = pytest.importorskip("bitsandbytes")
        for name, module in list(model.named_children()):
            new = bnb.nn.Linear4bit(
                module.in_features, module.out_features, module.bias is not None, dtype, quant_type="nf4"
            )
            new.load_state_dict(module.state_dict())
            setattr(model, name, new.to("cpu"))
        model.is_loaded_in_4bit = True
    settings = LoraSettings(r=4, alpha=8, dropout=dropout, target_modules=["first", "second"])
    plain = add_lora(model, settings, 0)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    fused = copy.deepcopy(plain)
    return plain, fused, fuse_lora_(fused)


def results(model, x, autocast):
    """Output, gradient of the input, gradients of the adapter."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(x)
    out.float().square().sum().backward()
    return [out, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("four_bit", [False, True])
def test_same_outputs_and_gradients_in_float32(four_bit):
    plain, fused, count = adapted(four_bit)
    assert count == 2
    x = torch.randn(3, 5, 64)
    expected, got = results(plain, x, False), results(fused, x, False)
    assert len(got) == 6
    for a, b in zip(expected, got):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("four_bit", [False, True])
def test_close_under_autocast(four_bit):
    """Float32 adapters on bfloat16 weights, as QLoRA trains: within the rounding of bfloat16."""
    plain, fused, _ = adapted(four_bit, torch.bfloat16)
    x = torch.randn(3, 5, 64, dtype=torch.bfloat16)
    for a, b in zip(results(plain, x, True), results(fused, x, True)):
        assert a.dtype == b.dtype
        assert (a.float() - b.float()).norm() < 0.02 * a.float().norm()


def test_checkpointing_gives_the_same_gradients():
    _, fused, _ = adapted()
    x = torch.randn(2, 64)
    expected = results(fused, x, False)
    fused.zero_grad()
    x = x.clone().requires_grad_()
    out = torch.utils.checkpoint.checkpoint(fused, x, use_reentrant=False)
    out.square().sum().backward()
    for a, b in zip(expected, [out, x.grad, *(p.grad for p in fused.parameters() if p.requires_grad)]):
        assert torch.equal(a, b)


def test_inference_is_pefts_own(monkeypatch):
    _, fused, _ = adapted()
    monkeypatch.setattr(lora._Weight, "of", None)
    with torch.no_grad():
        fused.eval()(torch.randn(2, 64))
        with pytest.raises(TypeError):
            fused.train()(torch.randn(2, 64))


def test_training_goes_on_after_inference():
    """bitsandbytes may have brought 4-bit weights into another order on a CPU."""
    _, fused, _ = adapted(four_bit=True)
    x = torch.randn(3, 64)
    before = fused(x)
    with torch.no_grad():
        fused.eval()(x)
    torch.testing.assert_close(fused.train()(x), before, rtol=1e-2, atol=1e-2)


def test_layers_that_are_not_plain_are_left_alone():
    assert adapted(dropout=0.1)[2] == 0


def test_merged_and_disabled_adapters():
    plain, fused, _ = adapted()
    x = torch.randn(2, 64)
    with fused.disable_adapter(), torch.no_grad():
        base = fused(x)
    with plain.disable_adapter(), torch.no_grad():
        assert torch.equal(base, plain(x))
    with torch.no_grad():
        expected = plain(x)
        fused.merge_adapter()
        torch.testing.assert_close(fused(x), expected)
        torch.testing.assert_close(fused.merge_and_unload()(x), expected)
    assert not torch.allclose(base, expected)


@EVERY_FAMILY
def test_every_layer_of_a_model_is_fused(make_model):
    model = make_model()
    assert fuse_lora_(add_lora(model, LoraSettings(r=4, alpha=8), 0)) == sum(
        type(module).__name__ == "Linear" and "lora" in type(module).__module__ for module in model.modules()
    )
    assert "forward" in vars(text_decoder(model).layers[0].self_attn.q_proj)


PLACES = {
    "audio_tower": "model.audio_tower.",
    "projector": "model.multi_modal_projector.",
    "embeddings": "model.language_model.embed_tokens.",
    "lm_head": "lm_head.",
}
EVERYTHING = ["fc1", "q_proj", "down_proj", "linear", "embed_tokens", "lm_head"]  # a layer in every part


def trainable(model) -> dict[str, int]:
    """Trainable tensors by part."""
    names = [name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad]
    return {part: sum(name.startswith(place) for name in names) for part, place in PLACES.items()} | {"all": len(names)}


@pytest.mark.parametrize("targets", ["all-linear", EVERYTHING, r".*\.(q_proj|fc1|linear|embed_tokens)|lm_head"])
def test_nothing_trains_in_a_frozen_part(make_model, targets):
    settings = LoraSettings(r=2, alpha=4, target_modules=targets)
    free = trainable(add_lora(make_model(layers=2), settings, 0))
    assert all(free[part] for part in ("audio_tower", "projector"))
    assert targets == "all-linear" or all(free.values())
    for count in range(1, len(PLACES) + 1):
        for parts in combinations(PLACES, count):
            model = make_model(layers=2)
            freeze_(model, parts)
            left = trainable(add_lora(model, settings, 0, parts))
            assert {part: left[part] for part in PLACES} == {p: 0 if p in parts else free[p] for p in PLACES}
            assert left["all"] > 0


def test_a_tied_head_is_frozen_with_the_embeddings(make_model):
    """Merging its adapter would change them."""
    settings = LoraSettings(r=2, alpha=4, target_modules=EVERYTHING)
    for part in ("embeddings", "lm_head"):
        model = make_model(layers=2)
        model.lm_head.weight = model.model.language_model.embed_tokens.weight
        left = trainable(add_lora(model, settings, 0, [part]))
        assert (left["embeddings"], left["lm_head"]) == (0, 0)
        assert left["projector"] > 0


def test_nothing_left_to_train_is_explained(make_model):
    settings = LoraSettings(r=2, alpha=4, target_modules=["fc1", "fc2"])
    with pytest.raises(ValueError, match=r"matches no module of the model outside freeze \['audio_tower'\]"):
        add_lora(make_model(layers=2), settings, 0, ["audio_tower"])


def test_a_frozen_tower_stays_as_it_is_with_lora(make_model, processor, split, shared, tmp_path):
    """Not only counted: after training with adapters everywhere else the tower's weights are the same bits."""
    train = TrainSettings(
        method="lora", freeze=["audio_tower"], max_steps=2, learning_rate=1e-2, lora=LoraSettings(r=2, alpha=4)
    )
    model = make_model(layers=2)
    before = copy.deepcopy(model.model.audio_tower.state_dict())
    examples = [Example(i, clip.id, "de", clip.references["de"]) for i, clip in enumerate(split.clips)]
    trained = train_(model, processor, TrainingData(split.clips, examples), shared, train, tmp_path)["adapted"]
    assert trainable(trained)["audio_tower"] == 0
    after = trained.merge_and_unload().model.audio_tower.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("freeze", [[], ["audio_tower", "projector"], ["embeddings"]])
@pytest.mark.parametrize(
    "targets", ["all-linear", ".*language_model.*_proj", ["q_proj", "fc1", "embed_tokens", "lm_head"]]
)
def test_an_estimate_has_every_weight_of_an_adapter(targets, freeze):
    """Against the adapter that PEFT makes; it is on disk beside the model, and not in what ships."""
    recipe = load_recipe("mini", [f"quantize.train.lora.target_modules={targets}", f"quantize.train.freeze={freeze}"])
    recipe = recipe.model_copy(update={"quantize": recipe.quantize.model_copy(update={"start": "base"})})
    train = recipe.quantize.train
    model = add_lora(meta_model(config_of(recipe)), train.lora, 0, train.freeze)
    num = sum(each.numel() for each in model.parameters() if each.requires_grad)
    rows = estimate(recipe)
    assert num > 10_000
    assert rows["quantized"].disk - rows["exported"].disk == 4 * num
