"""A floor under every lossy step, in dB of the logits, on the built-in model: one that learned, unlike random ones.

What each step does to BLEU and chrF is measured by benchmarks/quantization.py.
"""

from __future__ import annotations

import pytest
import torch

from trimlingual.data.audio import load_audio
from trimlingual.data.sources import read_source
from trimlingual.models.inputs import Collator, Example, Prompter
from trimlingual.models.loading import load_model, load_processor, resolve_base
from trimlingual.quantization.int4 import round_to_integers, save_packed
from trimlingual.quantization.merge import merge_
from trimlingual.quantization.nf4 import bitsandbytes_config
from trimlingual.recipe import BuiltinSource, LoraSettings, QuantizeSettings, TaskSettings
from trimlingual.stages.quantize import sqnr_db
from trimlingual.training.lora import add_lora
from trimlingual.training.loss import answer_logits

CPU = torch.device("cpu")
NF4 = QuantizeSettings(scheme="nf4", compute_dtype="float32")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """(folder, processor, function from a model to its loss and logits on everyday sentences, what it was trained on)."""
    folder = resolve_base("builtin:mini")
    processor = load_processor(folder)
    task = TaskSettings(target_languages=["de", "zh"])
    source = BuiltinSource(kind="builtin", split="everyday")
    clips = read_source(source, task.target_languages, tmp_path_factory.mktemp("clips"))[:8]
    examples = [Example(i, c.id, code, c.references[code]) for i, c in enumerate(clips) for code in ("de", "zh")]
    collator = Collator(Prompter(processor, task), lambda index: load_audio(clips[index].audio))
    return folder, processor, lambda model: answer_logits(model, collator, examples, 8)


@pytest.fixture(scope="module")
def base(bench):
    return bench[2](load_model(bench[0], "float32", CPU))


@pytest.mark.parametrize(
    ("changes", "floor"),
    [
        ({"scheme": "nf4"}, 17.5),
        ({"scheme": "nf4", "parts": ["decoder"]}, 18),
        ({"scheme": "nf4", "parts": ["decoder", "audio_tower", "projector", "lm_head"]}, 16.5),
        ({"scheme": "int4", "group_size": 32}, 18.5),
        ({"scheme": "int4", "group_size": 64}, 18),
        ({"scheme": "int4", "group_size": 64, "eight_bit": ["embeddings", "lm_head"]}, 18),
    ],
)
def test_number_formats(bench, base, changes, floor, tmp_path):
    folder, processor, measure = bench
    settings = QuantizeSettings(**{"compute_dtype": "float32", **changes})
    if settings.scheme == "int4":
        model = load_model(folder, "float32", CPU)
        save_packed(model, processor, tmp_path, settings, "float32")
    else:
        model = load_model(folder, "float32", CPU, bitsandbytes_config(settings))
    loss, logits = measure(model)
    assert sqnr_db(base[1], logits) > floor
    assert abs(loss - base[0]) < 0.02  # nats a token


@pytest.mark.parametrize(("name", "floor"), [("model.language_model.embed_tokens", 46), ("lm_head", 45)])
def test_8_bits(bench, base, name, floor):
    folder, _, measure = bench
    model = load_model(folder, "float32", CPU)
    weight = model.get_submodule(name).weight
    weight.data = round_to_integers(weight.data, 8, weight.shape[1])[1]
    assert sqnr_db(base[1], measure(model)[1]) > floor


def test_merge_onto_the_dequantised_base(bench):
    """Exact in float32; the floor leaves room for CPUs that run 4-bit layers in bfloat16."""
    folder, _, measure = bench
    adapted = add_lora(load_model(folder, "float32", CPU, bitsandbytes_config(NF4)), LoraSettings(r=4, alpha=8), 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.002 * torch.randn(parameter.shape, generator=generator))
    trained = measure(adapted)
    merged = load_model(folder, "float32", CPU)
    merge_(merged, adapted)
    assert sqnr_db(trained[1], measure(merged)[1]) > 35
