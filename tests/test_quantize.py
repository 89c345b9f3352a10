from __future__ import annotations

import copy
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from trimlingual.decoding.translate_clips import translate_clips
from trimlingual.evaluation.cost import count_parameters
from trimlingual.models.inputs import Example
from trimlingual.models.loading import load_model, load_processor, resolve_base
from trimlingual.models.saving import save_model
from trimlingual.quantization.merge import merge_
from trimlingual.quantization.nf4 import QuantizationError, bitsandbytes_config, check_quantized, dequantized, is_4bit
from trimlingual.recipe import DecodeSettings, LoraSettings, QuantizeSettings, TrainSettings
from trimlingual.run.artifacts import SCRATCH, read_artifact
from trimlingual.run.lineage import read_lineage
from trimlingual.stages.quantize import quantize, sqnr_db
from trimlingual.training.selection import Guide, KeepBest

from .conftest import EVERY_FAMILY, assert_names_its_base
from .test_pipeline import as_words

CPU = torch.device("cpu")
NF4 = QuantizeSettings(scheme="nf4")
TRAIN = TrainSettings(method="lora", max_steps=3, learning_rate=5e-3, lora=LoraSettings(r=4, alpha=8))


@pytest.fixture
def examples(split, task):
    return [
        Example(i, c.id, lang, c.references[lang]) for i, c in enumerate(split.clips) for lang in task.target_languages
    ]


@EVERY_FAMILY
def test_qlora_merge_and_quantise_again(given, model_dir, shared, data, tmp_path):
    """What 4 bits cost is asked of the weights: where rounding undoes an adapter, logits say how far it had moved them."""
    settings = QuantizeSettings(scheme="nf4", compute_dtype="float32", merge_base="dequantized", train=TRAIN)
    info = quantize(given, data, shared, settings, tmp_path)
    change = info["change"]
    # Merging is exact in float32, but CPUs with AVX512-BF16 run 4-bit layers in bfloat16 whatever compute dtype is asked for.
    assert change["merged_sqnr_db"] > 30
    assert change["final_sqnr_db"] < change["merged_sqnr_db"]
    assert abs(change["final_loss"] - change["trained_loss"]) < 1.0  # wide random weights lose more than learned ones
    model = load_model(tmp_path, "float32", CPU)
    check_quantized(model, settings)
    assert count_parameters(model) == count_parameters(load_model(model_dir, "float32", CPU))
    assert read_lineage(tmp_path).quantization["scheme"] == "nf4"
    assert_names_its_base(tmp_path / "adapter", "tiny")
    base, merged = (load_model(model_dir, "float32", CPU, config) for config in (bitsandbytes_config(settings), None))
    merge_(merged, PeftModel.from_pretrained(base, tmp_path / "adapter"), settings.merge_base)
    kept = {
        name: sqnr_db(merged.get_submodule(name).weight, dequantized(module))
        for name, module in model.named_modules()
        if is_4bit(module)
    }
    assert min(kept.values()) > 19  # test_4bit_floor


@EVERY_FAMILY
def test_integers_that_ship(given, model_dir, shared, data, tmp_path):
    settings = QuantizeSettings(
        group_size=64, eight_bit=["embeddings", "lm_head"], compute_dtype="float32", train=TRAIN
    )
    info = quantize(given, data, shared, settings, tmp_path)
    assert info["num_4bit_modules"] > 40
    assert info["num_8bit_modules"] == 2
    assert info["change"]["final_sqnr_db"] > 2
    assert read_lineage(tmp_path).quantization["eight_bit"] == ["embeddings", "lm_head"]
    assert count_parameters(load_model(tmp_path, "float32", CPU)) == count_parameters(
        load_model(model_dir, "float32", CPU)
    )


ROUNDED = QuantizeSettings(
    group_size=32, compute_dtype="float32", parts=["decoder"], rounding="nearest",
    train=TrainSettings(max_steps=6, learning_rate=3e-3, freeze=["audio_tower"]),
)  # fmt: skip


@pytest.mark.parametrize("rounding", ["nearest", "calibrated"])
def test_what_was_trained_on_rounded_weights_is_what_ships(given, shared, data, tmp_path, rounding):
    settings = ROUNDED.model_copy(update={"rounding": rounding})
    untrained = quantize(given, data, shared, settings.model_copy(update={"train": None}), tmp_path / "untrained")
    info = quantize(given, data, shared, settings, tmp_path / "trained")
    final_sqnr_db = info["change"]["final_sqnr_db"]
    assert final_sqnr_db is None or final_sqnr_db > 60  # of logits: only float32's last bits, if any
    assert info["change"]["final_loss"] < untrained["change"]["final_loss"]
    assert not (tmp_path / "trained" / "adapter").exists()
    assert read_lineage(tmp_path / "trained").quantization["trained"] == "on rounded weights"


def test_selection_clips_are_translated_by_rounded_weights(given, shared, data, split, tmp_path):
    train = ROUNDED.train.model_copy(update={"selection_checks": 2})
    settings = ROUNDED.model_copy(update={"train": train})
    scores = quantize(given, data, shared, settings, tmp_path, Guide(select=split))["selection"]["scores"]
    best = max(scores, key=lambda record: record["score"])
    shipped = load_model(tmp_path, "float32", CPU)
    check = KeepBest(shipped, shipped, load_processor(tmp_path), shared, split, 1, tmp_path / "check")
    check._look(0)
    assert check.scores[0]["scores"] == pytest.approx(best["scores"])


def test_rounded_training_goes_on_with_the_scales_it_began_with(given, shared, data, tmp_path):
    train = ROUNDED.train.model_copy(update={"max_steps": 4, "save_steps": 2})
    settings = ROUNDED.model_copy(update={"rounding": "calibrated", "train": train})
    quantize(given, data, shared, settings, tmp_path / "at_once")
    torch.manual_seed(1)  # a second process is in another state

    class Killed(Exception):
        pass

    def killed(*args: object, **kwargs: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trimlingual.stages.quantize.keep_rounded_", killed)
        with pytest.raises(Killed):
            quantize(given, data, shared, settings, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / SCRATCH / "training" / "checkpoint-4")
    quantize(given, data, shared, settings, tmp_path / "resumed")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("at_once", "resumed"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"scheme": "nf4", "train": {"method": "full"}}, "use scheme int4, or method lora"),
        ({"scheme": "int4", "train": {"method": "full", "fsdp": True}}, "every process needs the whole weights"),
    ],
)
def test_training_that_rounds_needs_steps_and_whole_weights(settings, problem):
    with pytest.raises(ValueError, match=problem):
        QuantizeSettings.model_validate(settings)


def test_an_adapter_survives_4_bits_on_the_original_base_only(model_dir, processor, tmp_path):
    """A small adapter: added to weights that stand on the 4-bit grid, rounding undoes it."""
    from trimlingual.training.lora import add_lora

    name, settings = "model.language_model.layers.2.mlp.up_proj", NF4
    kept = {}
    for base in ("original", "dequantized"):
        four = load_model(model_dir, "float32", CPU, bitsandbytes_config(settings))
        before = dequantized(four.get_submodule(name))
        adapted = add_lora(four, LoraSettings(r=4, alpha=8), 0)
        layer = four.get_submodule(name)
        with torch.no_grad():
            layer.lora_B["default"].weight.normal_(std=0.005, generator=torch.Generator().manual_seed(0))
        delta = layer.get_delta_weight("default")
        target = load_model(model_dir, "float32", CPU)
        merge_(target, adapted, base)
        save_model(target, processor, tmp_path / base, "float32")
        again = load_model(tmp_path / base, "float32", CPU, bitsandbytes_config(settings))
        moved = dequantized(again.get_submodule(name)) - before
        kept[base] = ((moved * delta).sum() / delta.square().sum()).item()  # share of the adapter in what moved
    assert kept["original"] == pytest.approx(1, abs=0.25)
    assert abs(kept["dequantized"]) < 0.25


@EVERY_FAMILY
@pytest.mark.parametrize("parts", [["decoder"], ["audio_tower", "projector"], ["decoder", "lm_head"]])
def test_exactly_the_chosen_parts_are_4bit(model_dir, parts):
    settings = QuantizeSettings(scheme="nf4", parts=parts)
    model = load_model(model_dir, "float32", CPU, bitsandbytes_config(settings))
    check_quantized(model, settings)
    four = {name for name, module in model.named_modules() if is_4bit(module)}
    assert any(name.startswith("model.language_model") for name in four) == ("decoder" in parts)
    assert any(name.startswith("model.audio_tower") for name in four) == ("audio_tower" in parts)
    assert ("lm_head" in four) == ("lm_head" in parts)


@pytest.mark.parametrize(("saved", "asked"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_4_bits_load_in_another_dtype_than_they_were_saved_in(
    model_dir, processor, split, task, tmp_path, saved, asked
):
    """transformers leaves some weights as they were saved and casts their biases, so that nothing could be computed."""
    save_model(load_model(model_dir, saved, CPU, bitsandbytes_config(NF4)), processor, tmp_path)
    model = load_model(tmp_path, asked, CPU)
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    assert kinds == {getattr(torch, asked)}
    assert translate_clips(model, processor, task, split.clips[:1], DecodeSettings(max_new_tokens=2))


def test_a_module_that_should_not_be_4bit_is_an_error(model_dir):
    model = load_model(model_dir, "float32", CPU, bitsandbytes_config(NF4))
    with pytest.raises(QuantizationError, match=r"module\(s\) are 4-bit that should not be \(model.audio_tower"):
        check_quantized(model, QuantizeSettings(scheme="nf4", parts=["decoder"]))
    with pytest.raises(QuantizationError, match=r"1 module\(s\) are not 4-bit that should be \(lm_head\)"):
        check_quantized(model, QuantizeSettings(scheme="nf4", parts=["decoder", "audio_tower", "projector", "lm_head"]))


def test_merge_adds_the_adapter_to_the_dequantised_weights(model_dir, processor, tmp_path):
    from trimlingual.training.lora import add_lora

    settings = NF4
    base = load_model(model_dir, "float32", CPU, bitsandbytes_config(settings))
    before = dequantized(base.model.language_model.layers[2].mlp.up_proj)
    adapted = add_lora(base, LoraSettings(r=4, alpha=8), 0)
    layer = base.model.language_model.layers[2].mlp.up_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    target = load_model(model_dir, "float32", CPU)
    original_embedding = copy.deepcopy(target.model.language_model.embed_tokens.weight)
    merge_(target, adapted)
    expected = before + (8 / 4**0.5) * (b @ a)  # rank-stabilised: alpha / sqrt(r)
    torch.testing.assert_close(target.model.language_model.layers[2].mlp.up_proj.weight, expected)
    assert torch.equal(target.model.language_model.embed_tokens.weight, original_embedding)
    untouched = target.model.language_model.layers[1].mlp.up_proj.weight
    assert torch.equal(untouched, dequantized(base.model.language_model.layers[1].mlp.up_proj.get_base_layer()))


@EVERY_FAMILY
def test_4bit_floor(model_dir, processor, tmp_path):
    """nf4 of normal weights keeps at least 19 dB; the published error of NF4 on N(0, 1) blocks is about 20.7 dB."""
    model = load_model(model_dir, "float32", CPU)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(len(name)))
    save_model(model, processor, tmp_path, "float32")
    four = load_model(tmp_path, "float32", CPU, bitsandbytes_config(NF4))
    plain, rounded = (dict(m.named_modules())["model.language_model.layers.0.mlp.gate_proj"] for m in (model, four))
    assert sqnr_db(plain.weight, dequantized(rounded)) > 19


def test_sqnr_by_hand():
    assert sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(20.0)
    assert sqnr_db(torch.ones(2), torch.ones(2)) == float("inf")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["nf4", "int4"])
def test_two_processes_quantise_like_one(manifests, tmp_path, scheme, start):
    """Both train, one merges and saves while the other waits; batches of 2 in two processes are one of 4."""
    records = {}
    for processes, batch in ((1, 4), (2, 2)):
        folder = tmp_path / str(processes)
        overrides = [
            *manifests, "quantize.start=base", f"quantize.scheme={scheme}", "quantize.group_size=64",
            f"quantize.train.batch_size={batch}", "quantize.train.max_steps=3", "quantize.train.logging_steps=1",
            "quantize.train.data={gold: 1}", "quantize.train.learning_rate=1e-3", "model.device=cpu",
        ]  # fmt: skip
        words = ["quantize", "mini", "--run-dir", str(folder), "--model", str(resolve_base("builtin:mini"))]
        start([*words, *as_words(*overrides)], processes).succeed()
        records[processes] = read_artifact(folder / "quantized").info
        assert load_model(folder / "quantized", "float32", CPU) is not None
    one, two = (records[processes] for processes in (1, 2))
    assert two.keys() == one.keys()
    assert two["steps"] == one["steps"] == 3
    assert [e["loss"] for e in two["losses"]] == pytest.approx([e["loss"] for e in one["losses"]], rel=1e-2)
    for name in ("trained_loss", "merged_loss", "final_loss"):
        assert two["change"][name] == pytest.approx(one["change"][name], rel=1e-2)
