"""Computing on packed integers: the same weights as unpacked ones, whichever kernel computes, and nothing unpacked in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams

from trimlingual.data.splits import Split
from trimlingual.decoding.translate_clips import translate_clips
from trimlingual.evaluation.cost import count_parameters
from trimlingual.models.inputs import Example, TrainingData
from trimlingual.models.loading import load_model
from trimlingual.models.packed_layers import (
    EightBitLinear,
    PackedEmbedding,
    PackedLinear,
    TorchLinear,
    integers_of,
    linear_of,
    no_slower_packed,
)
from trimlingual.models.packed_weights import alone, is_packed
from trimlingual.models.tree import PATTERNS
from trimlingual.quantization.int4 import save_packed
from trimlingual.recipe import DecodeSettings, EvaluateSettings, QuantizeSettings, RankSettings, TrainSettings
from trimlingual.run.lineage import ModelFolder, read_lineage
from trimlingual.search.plan import read_plan
from trimlingual.stages.evaluate import evaluate
from trimlingual.stages.finetune import finetune
from trimlingual.stages.prune import prune
from trimlingual.stages.rank import rank

CPU = torch.device("cpu")
IDS = torch.arange(20, 120).reshape(4, 25)


def drawn(rows: int, width: int, group: int, dtype: torch.dtype, bias: bool = True, num_bits: int = 4):
    torch.manual_seed(rows + width)
    words = torch.randint(-(2**31), 2**31, (rows, width * num_bits // 32), dtype=torch.int32)
    scale = 0.05 * torch.randn(rows, width // group)  # of either sign
    return words, scale.to(dtype), torch.randn(rows).to(dtype) if bias else None


@pytest.fixture(scope="module")
def folder(model_dir, processor, tmp_path_factory):
    """A small model in 4 and 8 bits, every part of it."""
    folder = tmp_path_factory.mktemp("packed") / "int4"
    asked = QuantizeSettings(scheme="int4", group_size=32, eight_bit=["embeddings", "lm_head"])
    save_packed(load_model(model_dir, "float32", CPU), processor, folder, asked, "float32")
    return folder


def packed(folder, monkeypatch):
    """The model as it is loaded in float32, but packed."""
    monkeypatch.setattr("trimlingual.models.loading.no_slower_packed", lambda device, dtype: True)
    model = load_model(folder, "float32", CPU, keep_packed=True)
    monkeypatch.undo()
    return model


def test_weights_by_hand():
    words = torch.tensor([[0x76543210, -0x01234568], [0x08080808, 0x00000000]], dtype=torch.int64).to(torch.int32)
    layer = PackedLinear(words, torch.tensor([[2.0], [-1.0]]), None, 4)
    ones = torch.eye(16)
    expected = [[2.0 * (i - 8) for i in range(16)], [0.0, 8.0] * 4 + [8.0] * 8]
    assert layer(ones).T.tolist() == expected
    assert layer.unpacked().tolist() == expected


vectorised = pytest.mark.skipif(not no_slower_packed(CPU, torch.bfloat16), reason="a CPU without AVX2")


@vectorised
@pytest.mark.parametrize(("rows", "width", "group"), [(64, 64, 32), (192, 320, 64), (128, 1024, 128)])
@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_pytorchs_layout_is_read_back(rows, width, group, num_bits):
    """Whatever layout the kernel has on this machine: the same integers, so the same products but for rounding."""
    words, scale, bias = drawn(rows, width, group, torch.bfloat16, num_bits=num_bits)
    assert TorchLinear.fits(words, scale, num_bits)
    plain, kernel = PackedLinear(words, scale, bias, num_bits), TorchLinear(words, scale, bias, num_bits)
    assert torch.equal(plain.integers().int() - 2 ** (num_bits - 1), kernel.integers().int() - 8)
    assert torch.equal(plain.unpacked(), kernel.unpacked())
    half = slice(0, 64)
    assert torch.equal(plain.unpacked(half), kernel.unpacked(half))
    for num_tokens in (1, 7, 128, 129, 200):  # with the kernel, and unpacked
        tokens = torch.randn(2, num_tokens, width).bfloat16()
        difference = (kernel(tokens) - plain(tokens)).float().norm() / plain(tokens).float().norm()
        assert difference < 0.01
    assert kernel.num_weights == rows * width + rows


@vectorised
@pytest.mark.parametrize(("kind", "num_bits"), [(PackedLinear, 3), (PackedLinear, 8), (TorchLinear, 2)])
def test_many_rows_are_unpacked_in_parts(kind, num_bits, monkeypatch):
    words, scale, bias = drawn(192, 64, 32, torch.bfloat16, num_bits=num_bits)
    layer, tokens = kind(words, scale, bias, num_bits), torch.randn(300, 64).bfloat16()
    whole = layer(tokens)
    monkeypatch.setattr("trimlingual.models.packed_layers.HEAD_ROWS", 128)
    sizes = []
    monkeypatch.setattr(
        kind, "unpacked", lambda self, rows, unpacked=kind.unpacked: sizes.append(rows) or unpacked(self, rows)
    )
    torch.testing.assert_close(layer(tokens), whole, rtol=0.02, atol=0.02)  # the bias is added before or after rounding
    assert sizes == [slice(0, 128), slice(128, 256)]


def test_pytorchs_kernel_is_left_where_it_does_not_fit():
    assert not TorchLinear.fits(*drawn(64, 64, 32, torch.float32)[:2], 4)
    assert not TorchLinear.fits(*drawn(72, 64, 32, torch.bfloat16)[:2], 4)
    assert not TorchLinear.fits(*drawn(64, 64, 32, torch.bfloat16)[:2], 8)


@pytest.mark.parametrize(
    ("weights", "form"),
    [
        (QuantizationArgs(num_bits=8, strategy="channel", symmetric=True), "naive-quantized"),  # beside biases
        (QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True), "float-quantized"),
    ],
)
def test_a_folder_of_another_kind_says_packed_what_it_says_unpacked(model_dir, tmp_path, weights, form):
    """Packed by the library itself, in forms that we do not write."""
    model, scheme = load_model(model_dir, "float32", CPU), {"targets": [PATTERNS["decoder"]], "weights": weights}
    config = QuantizationConfig(config_groups={"all": QuantizationScheme(**scheme, format=form)}, format=form)
    apply_quantization_config(model, config)
    for module in filter(is_packed, model.modules()):
        module.weight_scale.data = calculate_qparams(module.weight.amin(1, True), module.weight.amax(1, True), weights)[
            0
        ]
    pack = ModelCompressor(quantization_config=config)
    with alone():
        pack.compress_model(model)
    model.save_pretrained(tmp_path)
    pack.update_config(str(tmp_path))
    plain, packed = (load_model(tmp_path, "bfloat16", CPU, keep_packed=kept) for kept in (False, True))
    states = torch.randn(1, 9, plain.config.text_config.hidden_size).bfloat16()
    said, expected = (each.model.language_model(inputs_embeds=states).last_hidden_state for each in (packed, plain))
    assert (said - expected).norm() < 0.02 * expected.norm()


def test_groups_that_pytorchs_kernel_does_not_know_are_unpacked():
    words, scale, bias = drawn(64, 192, 192, torch.bfloat16)
    assert linear_of(words, scale, bias, 4)(torch.randn(2, 192).bfloat16()).shape == (2, 64)


@pytest.mark.parametrize("num_bits", range(1, 9))
def test_words_of_every_width_are_read_as_the_library_writes_them(num_bits):
    """A folder that was made elsewhere may have widths that no recipe asks for."""
    half = 2 ** (num_bits - 1)
    integers = torch.randint(-half, half, (3, 320), dtype=torch.int8)
    assert torch.equal(integers_of(pack_to_int32(integers, num_bits), num_bits).int() - half, integers.int())


def test_eight_bits_by_hand():
    integers = torch.tensor([[1, -127], [0, 100]], dtype=torch.int8)
    scale = torch.tensor([[0.5], [-2.0]])
    assert EightBitLinear(integers, scale)(torch.tensor([[[1.0, 1.0]]])).tolist() == [[[-63.0, -200.0]]]


def test_float32_agrees_with_unpacked_weights(folder, processor, split, task, monkeypatch):
    plain, model = load_model(folder, "float32", CPU, keep_packed=True), packed(folder, monkeypatch)
    kinds = {type(module) for module in model.modules()}
    assert {PackedLinear, EightBitLinear, PackedEmbedding} <= kinds
    # No kernel computes on packed weights in float32, so a CPU is given plain ones.
    assert not kinds & {type(module) for module in plain.modules()} & {PackedLinear, EightBitLinear}
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    settings = DecodeSettings(batch_size=3)
    said = [translate_clips(each, processor, task, split.clips, settings) for each in (plain, model)]
    assert said[0] == said[1]


def test_layers_with_the_same_inputs_are_one_product(folder, processor, split, task, monkeypatch):
    """Queries, keys and values, and the MLP's first two: four products a decoder layer. Whoever asks one of them alone is answered."""
    joined = packed(folder, monkeypatch)
    monkeypatch.setattr("trimlingual.models.packed_weights.JOINED", ())
    apart = packed(folder, monkeypatch)
    assert count_parameters(joined) == count_parameters(apart)
    first, other = (model.model.language_model.layers[0] for model in (joined, apart))
    inputs = torch.randn(5, first.self_attn.q_proj.whole.in_features)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        torch.testing.assert_close(*(layer.get_submodule(name)(inputs) for layer in (first, other)))
    calls = []
    for module in first.modules():
        if isinstance(module, PackedLinear):
            module.register_forward_hook(lambda module, inputs, output: calls.append(module.out_features))
    said = [translate_clips(each, processor, task, split.clips, DecodeSettings()) for each in (joined, apart)]
    assert said[0] == said[1]
    assert len({*calls}) <= 4 == sum(isinstance(module, PackedLinear) for module in first.modules())
    assert len(calls) % 4 == 0


@vectorised
def test_bfloat16_stays_packed(folder, model_dir):
    model, plain = load_model(folder, "bfloat16", CPU, keep_packed=True), load_model(folder, "bfloat16", CPU)
    assert count_parameters(model) == count_parameters(plain) == count_parameters(load_model(model_dir, "float32", CPU))
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert linear == []
    num_bytes = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert num_bytes < 0.5 * sum(tensor.nbytes for tensor in [*plain.parameters(), *plain.buffers()])
    exact = load_model(folder, "float32", CPU)
    with torch.no_grad():
        ours, theirs, right = (each(input_ids=IDS).logits.float() for each in (model, plain, exact))
    assert (ours - right).norm() < 1.3 * (theirs - right).norm() < 0.1 * right.norm()
    assert not any(parameter.requires_grad for parameter in model.parameters())


@vectorised
@pytest.mark.parametrize("asked", [{"metric": "chrf"}, {"metric": "loss"}, {"strategy": "block-influence"}])
def test_layers_are_searched_on_packed_weights(folder, lineage, split, shared, tmp_path, monkeypatch, asked):
    """In every way of scoring. Nothing is unpacked."""
    shared = replace(shared, model=shared.model.model_copy(update={"dtype": "bfloat16"}))
    monkeypatch.setattr("trimlingual.models.loading.unpack_", None)
    rank(ModelFolder(folder, lineage), split, shared, RankSettings(num_layers_to_remove=1, **asked), None, tmp_path)
    assert len(read_plan(tmp_path).layers_of("decoder")) == 1


def test_what_is_made_of_a_packed_base_is_not_called_packed(folder, lineage, split, shared, tmp_path):
    """Its weights are whole: lineage, card and what a runtime is said to take follow from that."""
    base = ModelFolder(folder, replace(lineage, quantization={"scheme": "int4"}))
    (tmp_path / "plan.json").write_text('{"removals": [{"layer": 2}]}', encoding="utf-8")
    prune(base, tmp_path / "plan.json", shared.model, tmp_path / "pruned")
    data = TrainingData(split.clips, [Example(0, split.clips[0].id, "de", split.clips[0].references["de"])])
    finetune(base, data, shared, TrainSettings(max_steps=1), tmp_path / "trained")
    for made in (tmp_path / "pruned", tmp_path / "trained"):
        assert read_lineage(made).quantization is None
        assert "quantization_config" not in (made / "config.json").read_text(encoding="utf-8")


@vectorised
def test_packed_weights_are_evaluated(folder, lineage, split, shared, tmp_path, monkeypatch):
    shared = replace(shared, model=shared.model.model_copy(update={"dtype": "bfloat16"}))
    monkeypatch.setattr("trimlingual.models.loading.unpack_", None)
    test = Split("test", split.clips)
    evaluate("int4", ModelFolder(folder, lineage), test, shared, EvaluateSettings(), None, tmp_path)
    assert (tmp_path / "result.json").is_file()
