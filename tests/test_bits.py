"""`quantize.bits`: 2, 3, 4 and 8 bits by part of the model, from the recipe to what is stored and computed on."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from trimlingual.data.splits import Split
from trimlingual.decoding.translate_clips import translate_clips
from trimlingual.estimate import estimate
from trimlingual.evaluation.cost import count_parameters
from trimlingual.models.family import meta_model
from trimlingual.models.inputs import Example, TrainingData
from trimlingual.models.loading import load_model, resolve_base
from trimlingual.models.packed_layers import PackedEmbedding, PackedLinear, integers_of, no_slower_packed
from trimlingual.models.tree import EMBEDDINGS, fine_part_of, text_decoder
from trimlingual.pipeline import plan
from trimlingual.preflight import check
from trimlingual.quantization.int4 import (
    PackingError,
    best_scale,
    bytes_by_module,
    modules_to_pack,
    round_to_integers,
    save_packed,
)
from trimlingual.recipe import (
    DecodeSettings,
    EvaluateSettings,
    QuantizeSettings,
    RecipeError,
    TrainSettings,
    load_recipe,
)
from trimlingual.run.lineage import ModelFolder, read_lineage
from trimlingual.stages.evaluate import evaluate
from trimlingual.stages.quantize import quantize, sqnr_db
from trimlingual.vocabulary.rewrite import VocabError, find_rows

from .conftest import EVERY_FAMILY
from .test_int4 import CPU, PLAIN, logits

INT4 = "quantize.scheme=int4"
MIXED = {"decoder.0.attention": 8, "decoder.0.mlp": 2, "decoder.1.mlp": 3, "embeddings": 2, "lm_head": 4}
LAYER = "model.language_model.layers"


def settings(**changes):
    return QuantizeSettings(**{"scheme": "int4", "group_size": 32, "bits": MIXED, **changes})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["quantize.scheme=nf4", "quantize.bits={decoder.3.mlp: 3}"], "bits needs scheme int4, not nf4"),
        ([INT4, "quantize.bits={decoder.3.ffn: 3}"], "bits names 'decoder.3.ffn'; a part is decoder.N.attention or decoder.N.mlp"),
        ([INT4, "quantize.bits={decoder.-1.mlp: 3}"], "bits names 'decoder.-1.mlp'; a part is"),
        ([INT4, "quantize.bits={decoder.03.mlp: 3}"], "bits names 'decoder.03.mlp'; a part is"),
        ([INT4, "quantize.bits={audio_tower: 8}"], "bits names 'audio_tower'; a part is"),
        ([INT4, "quantize.bits={embeddings: 5}"], "bits gives embeddings 5 bits; allowed are 2, 3, 4, 8"),
        ([INT4, "quantize.bits={decoder.3.mlp: true}"], "quantize.bits.decoder.3.mlp"),
        ([INT4, "quantize.bits={lm_head: 8}", "quantize.eight_bit=[lm_head]"], "lm_head is in bits (8) and in eight_bit"),
        ([INT4, "quantize.bits={decoder.3.mlp: 3}", "quantize.parts=[audio_tower]"], "but parts leaves the decoder as it is"),
        ([INT4, "quantize.bits={embeddings: 4}", "vocab={when: after}"], "quantize.bits has embeddings: packed rows cannot"),
    ],
)  # fmt: skip
def test_what_a_recipe_cannot_ask_for(overrides, said):
    with pytest.raises(RecipeError) as caught:
        load_recipe("mini", overrides)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["quantize.bits={decoder.12.mlp: 3, decoder.11.mlp: 3}"],
         "quantize.bits names decoder.12.mlp; the layers of the base model's decoder are 0 to 11"),
        (["quantize.group_size=128", "quantize.parts=[projector]", "quantize.bits={embeddings: 2}"],
         "does not divide widths [192] of the embeddings; choose 64 or 32"),
        (["quantize.bits={embeddings: 2}", "export.for=[transformers]"],
         "it loads no embedding table of 2 bits; set quantize.bits embeddings: 8"),
        (["quantize.bits={decoder.1.mlp: 2}", "export={for: [gguf], gguf: {text_only: true}}"],
         "no type of fewer than 4 bits is written, and quantize.bits has decoder.1.mlp"),
    ],
)  # fmt: skip
def test_what_is_refused_before_anything_runs(tmp_path, overrides, said):
    wanted = [INT4, "quantize.group_size=64", "export=null", *overrides]
    recipe = load_recipe("mini", wanted)
    found = check(recipe, tmp_path / "run", plan(recipe, tmp_path / "run")).problems
    assert any(said in problem for problem in found), found


def test_layers_are_those_of_the_base_model():
    """What is not named has 4 bits, and of a layer that is gone nothing is packed."""
    asked = settings(bits={"decoder.5.mlp": 2, "decoder.6.mlp": 3, "decoder.7.attention": 8, "embeddings": 4})
    there = asked.at_positions([0, 1, 5, 7])
    assert there.bits == {"decoder.2.mlp": 2, "decoder.3.attention": 8, "embeddings": 4}
    assert [there.bits_of(part) for part in ("decoder.2.mlp", "decoder.2.attention", "lm_head", "embeddings")] == [
        2,
        4,
        None,
        4,
    ]


# Measured on 512 x 4096 such weights: 9.59, 15.76, 21.73, 45.65 dB in groups of 32; 9.09, 15.07, 20.88, 44.68 of 64; 8.79, 14.61,
# 20.27, 43.89 of 128.
FLOORS = {
    32: {2: 9.5, 3: 15.6, 4: 21.5, 8: 45.2},
    64: {2: 9.0, 3: 14.9, 4: 20.7, 8: 44.3},
    128: {2: 8.7, 3: 14.5, 4: 20.1, 8: 43.5},
}


@pytest.mark.parametrize(("group_size", "num_bits"), [(g, b) for g, floors in FLOORS.items() for b in floors])
def test_floor_for_normal_weights(group_size, num_bits):
    weight = torch.randn((256, 1024), generator=torch.Generator().manual_seed(0))
    scale, rounded = round_to_integers(weight, num_bits, group_size)
    assert sqnr_db(weight, rounded) > FLOORS[group_size][num_bits]
    integers = (rounded.reshape(256, -1, group_size) / scale[..., None]).round()
    assert integers.min() == -(2 ** (num_bits - 1))
    assert integers.max() == 2 ** (num_bits - 1) - 1


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_words_are_read_as_compressed_tensors_writes_them(num_bits):
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    limit = 2 ** (num_bits - 1)
    integers = torch.randint(-limit, limit, (24, 96), dtype=torch.int8)
    words = pack_to_int32(integers, num_bits)
    assert words.shape == (24, 96 * num_bits // 32)
    assert torch.equal(integers_of(words, num_bits).int() - limit, integers.int())
    scale = torch.randn(24, 3)
    weight = (integers.view(24, 3, 32) * scale[..., None]).view(24, 96)
    tokens = torch.randn(2, 5, 96)
    layer = PackedLinear(words, scale, torch.ones(24), num_bits)
    torch.testing.assert_close(layer(tokens), tokens @ weight.T + 1)
    table = PackedEmbedding(words, scale, num_bits)
    ids = torch.tensor([[3, 0], [23, 3]])
    assert torch.equal(table(ids), weight[ids])
    assert layer.num_weights - 24 == table.num_weights == 24 * 96


@pytest.fixture(scope="module")
def saved(model_dir, processor, tmp_path_factory):
    """A model in all widths, packed from bfloat16, and the weights that it was packed from."""
    folder = tmp_path_factory.mktemp("bits") / "mixed"
    model = load_model(model_dir, "bfloat16", CPU)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    counts = save_packed(model, processor, folder, settings(), "bfloat16")
    wanted = list(modules_to_pack(load_model(model_dir, "bfloat16", CPU), settings()).values())
    assert counts == {f"num_{bits}bit_modules": wanted.count(bits) for bits in (2, 3, 4, 8)}
    return folder, model, before


def test_every_part_has_its_bits(saved):
    _, model, _ = saved
    wanted = {"self_attn.q_proj": (8, 4, 4), "mlp.up_proj": (2, 3, 4)}
    for module, bits in wanted.items():
        for position, number in enumerate(bits):
            weight = model.get_submodule(f"{LAYER}.{position}.{module}").weight.float()
            steps = [len(group.unique()) for group in weight.reshape(-1, 32)]
            assert 2 ** (number - 1) < max(steps) <= 2**number or number == 8
    tables = {EMBEDDINGS: 4, "lm_head": 16}
    for name, most in tables.items():
        assert max(len(group.unique()) for group in model.get_submodule(name).weight.reshape(-1, 32)) == most


def test_the_estimate_of_a_plan_is_near_its_bytes():
    bits = {f"decoder.{layer}.mlp": 3 for layer in range(24)} | {
        "decoder.0.attention": 8,
        "embeddings": 2,
        "lm_head": 4,
    }
    plan_of_bits = "{" + ", ".join(f"{part}: {number}" for part, number in bits.items()) + "}"
    base = "random:qwen2-audio-7b"
    wanted = [
        f"model.base={base}",
        "rank=null",
        "recover=null",
        "quantize.start=teacher",
        INT4,
        f"quantize.bits={plan_of_bits}",
    ]
    recipe = load_recipe("qwen2-audio-en-de", wanted)
    exact = bytes_by_module(meta_model(AutoConfig.from_pretrained(resolve_base(base))), recipe.quantize, "bfloat16")
    assert estimate(recipe)["exported"].disk == pytest.approx(sum(exact.values()), rel=0.002)


@EVERY_FAMILY
@pytest.mark.parametrize("changes", [{}, {"bits": {}, "eight_bit": ["embeddings", "lm_head"]}, {"group_size": 64}])
def test_bytes_are_known_without_making_anything(model_dir, processor, tmp_path, changes):
    asked = settings(**changes)
    known = bytes_by_module(meta_model(AutoConfig.from_pretrained(model_dir)), asked, "bfloat16")
    save_packed(load_model(model_dir, "float32", CPU), processor, tmp_path, asked, "bfloat16")
    stored = {key: tensor.nbytes for key, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert sum(known.values()) == sum(stored.values())
    blocks = {name: size for name, size in known.items() if (fine_part_of(name) or "").startswith("decoder.1.")}
    in_a_block = re.compile(r"language_model.*layers\.1\.(self_attn|mlp)\.")
    assert sum(blocks.values()) == sum(size for key, size in stored.items() if in_a_block.search(key))


def test_what_is_loaded_is_what_was_in_memory(saved):
    folder, model, _ = saved
    loaded = load_model(folder, "bfloat16", CPU)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, loaded.get_parameter(name)), name


def test_what_is_stored_is_what_was_rounded(saved):
    """The library divides in bfloat16 when it packs, which puts some 8-bit integers one step off."""
    folder, _, before = saved
    tensors = load_file(folder / "model.safetensors")
    name = "layers.0.self_attn.q_proj"
    (words,) = [tensor for key, tensor in tensors.items() if key.endswith(f"language_model.model.{name}.weight_packed")]
    (scale,) = [tensor for key, tensor in tensors.items() if key.endswith(f"language_model.model.{name}.weight_scale")]
    groups = before[f"model.language_model.{name}.weight"].float().reshape(-1, 32)
    best = best_scale(groups, 8, torch.bfloat16)
    assert torch.equal(best.flatten(), scale.float().flatten())
    nearest = (groups / best).round().clamp(-128, 127)
    assert torch.equal(integers_of(words, 8).int().reshape(-1, 32) - 128, nearest.int())


def test_rows_of_a_packed_table_cannot_be_taken_out(saved):
    with pytest.raises(VocabError, match=r"(embed_tokens|lm_head)\.weight_packed in .* is quantised"):
        find_rows(saved[0], tied=False)


def test_float32_agrees_with_unpacked_weights(saved, processor, split, task, monkeypatch):
    folder, _, _ = saved
    plain = load_model(folder, "float32", CPU)
    monkeypatch.setattr("trimlingual.models.loading.no_slower_packed", lambda device, dtype: True)
    model = load_model(folder, "float32", CPU, keep_packed=True)
    kinds = [type(module) for module in model.modules()]
    assert PackedEmbedding in kinds
    assert torch.nn.Linear not in kinds
    # transformers rounds unpacked weights to the scales' bfloat16: what is packed is more exact
    assert sqnr_db(logits(plain), logits(model)) > 35
    assert count_parameters(model) == count_parameters(plain)
    assert translate_clips(model, processor, task, split.clips, DecodeSettings(batch_size=3, max_new_tokens=5))


@pytest.mark.skipif(not no_slower_packed(CPU, torch.bfloat16), reason="a CPU without AVX2")
def test_bfloat16_stays_packed_and_is_evaluated(saved, lineage, split, shared, tmp_path, monkeypatch):
    folder, plain, _ = saved
    model = load_model(folder, "bfloat16", CPU, keep_packed=True)
    exact = load_model(folder, "float32", CPU)
    ours, theirs, right = (logits(each).float() for each in (model, plain, exact))
    assert (ours - right).norm() < 1.3 * (theirs - right).norm() < 0.1 * right.norm()
    assert text_decoder(model).embed_tokens.num_embeddings == text_decoder(plain).embed_tokens.num_embeddings
    num_bytes = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert num_bytes < 0.45 * sum(tensor.nbytes for tensor in [*plain.parameters(), *plain.buffers()])
    monkeypatch.setattr("trimlingual.models.loading.unpack_", None)
    shared_16 = shared.model.model_copy(update={"dtype": "bfloat16"})
    evaluate(
        "mixed", ModelFolder(folder, lineage), Split("test", split.clips), replace(shared, model=shared_16),
        EvaluateSettings(), None, tmp_path,
    )  # fmt: skip
    assert (tmp_path / "result.json").is_file()


def test_plain_transformers_loads_all_but_a_packed_table(model_dir, processor, saved, tmp_path):
    model = load_model(model_dir, "float32", CPU)
    save_packed(model, processor, tmp_path / "rows", settings(bits=MIXED | {"embeddings": 8}), "bfloat16")
    subprocess.run([sys.executable, "-c", PLAIN, tmp_path / "rows"], check=True)
    assert torch.equal(logits(model), torch.load(tmp_path / "rows" / "logits.pt"))
    failed = subprocess.run([sys.executable, "-c", PLAIN, saved[0]], capture_output=True, text=True)
    assert (
        "has no attribute 'weight'" in failed.stderr
    )  # if it loads one day, exports/transformers.py need not refuse it


@EVERY_FAMILY
def test_every_family_is_packed_so(model_dir, processor, tmp_path):
    model = load_model(model_dir, "float32", CPU)
    save_packed(model, processor, tmp_path, settings(), "bfloat16")
    assert torch.equal(logits(model), logits(load_model(tmp_path, "bfloat16", CPU)))


def test_a_layer_that_the_model_does_not_have(model_dir, processor, tmp_path):
    with pytest.raises(PackingError, match=r"quantize.bits names decoder.40.mlp, which this model does not have"):
        save_packed(
            load_model(model_dir, "float32", CPU), processor, tmp_path, settings(bits={"decoder.40.mlp": 3}), "bfloat16"
        )


def test_the_stage_goes_by_the_base_models_layers(given, split, shared, tmp_path, capsys):
    count = len(given.lineage.layers["decoder"])
    kept = [*range(count - 1), count + 3]
    lineage = replace(given.lineage, layers={**given.lineage.layers, "decoder": kept})
    examples = [Example(i, clip.id, "de", clip.references["de"]) for i, clip in enumerate(split.clips)]
    bits = {f"decoder.{count + 3}.mlp": 2, f"decoder.{count}.mlp": 8}
    asked = settings(start="base", bits=bits, train=None)
    info = quantize(ModelFolder(given.path, lineage), TrainingData(split.clips, examples), shared, asked, tmp_path)
    assert (info["num_2bit_modules"], info.get("num_8bit_modules")) == (3, None)
    assert read_lineage(tmp_path).quantization["bits"] == bits
    weight = load_model(tmp_path, "float32", CPU).get_submodule(f"{LAYER}.{count - 1}.mlp.up_proj").weight
    assert max(len(group.unique()) for group in weight.reshape(-1, 32)) == 4
    said = f"note: quantize.bits names parts of layers that were removed: decoder.{count}.mlp\n"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("rounding", ["nearest", "calibrated"])
def test_training_on_rounded_weights(given, split, shared, tmp_path, rounding):
    """At 2 and 3 bits, the embedding table too: what was trained is what is stored, and it learns."""
    examples = [Example(i, clip.id, "de", clip.references["de"]) for i, clip in enumerate(split.clips)]
    train = TrainSettings(method="full", max_steps=12, batch_size=4, learning_rate=3e-3, lr_scheduler="constant")
    asked = settings(start="base", rounding=rounding, calibration_examples=4, train=train)
    info = quantize(given, TrainingData(split.clips, examples), shared, asked, tmp_path / "trained")
    before = quantize(
        given, TrainingData(split.clips, examples), shared, asked.model_copy(update={"train": None}), tmp_path / "not"
    )
    assert info["change"]["final_loss"] < before["change"]["final_loss"] - 0.5
    assert (
        info["change"]["final_sqnr_db"] > 25
    )  # of the trained weights nothing is lost but 8-bit rounding and bfloat16
    assert info["quantization"]["bits"] == MIXED
    assert read_lineage(tmp_path / "trained").quantization["bits"] == MIXED
