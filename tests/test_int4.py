"""The compressed-tensors layout: what is rounded how, and that plain transformers loads it bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError

from trimlingual.evaluation.cost import count_parameters, disk_bytes
from trimlingual.models.loading import load_model
from trimlingual.quantization.int4 import PackingError, modules_to_pack, round_to_integers, save_packed
from trimlingual.recipe import QuantizeSettings
from trimlingual.stages.quantize import sqnr_db

CPU = torch.device("cpu")
BOTH = ["embeddings", "lm_head"]
IDS = torch.arange(20, 120).reshape(4, 25)

PLAIN = """
import sys, torch
from transformers import Qwen2AudioForConditionalGeneration
for folder in sys.argv[1:]:
    model = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype="auto", device_map={"": "cpu"}).eval()
    with torch.no_grad():
        torch.save(model(input_ids=torch.arange(20, 120).reshape(4, 25)).logits, folder + "/logits.pt")
assert "trimlingual" not in sys.modules
"""


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def settings(**changes):
    return QuantizeSettings(**{"scheme": "int4", "group_size": 64, **changes})


def test_8bit_floor_for_normal_weights():
    weight = torch.randn((256, 1024), generator=torch.Generator().manual_seed(0))
    scale, rounded = round_to_integers(weight, 8, 1024)
    assert scale.shape == (256, 1)
    assert sqnr_db(weight, rounded) > 42


def test_rounding_by_hand():
    weight = torch.zeros((2, 32))
    weight[0] = torch.arange(32) % 16 - 8.0  # the integers themselves, so the scale is 1
    scale, rounded = round_to_integers(weight, 4, 32)
    assert scale.flatten().tolist() == [1.0, 1.0]  # 1 for a row of zeros too
    assert torch.equal(rounded, weight)
    scale, rounded = round_to_integers(-weight, 4, 32)  # 8 is out of reach for a positive scale
    assert scale[0].item() == -1.0
    assert torch.equal(rounded, -weight)


def test_plain_transformers_loads_it_bit_for_bit(model_dir, processor, tmp_path):
    in_memory = {}
    for name, parts, eight_bit in (("one", ["decoder"], []), ("all", ["decoder", "audio_tower", "projector"], BOTH)):
        folder = tmp_path / name
        model = load_model(model_dir, "float32", CPU)
        before, size = logits(model), disk_bytes(model_dir)
        asked = settings(parts=parts, eight_bit=eight_bit)
        counts = save_packed(model, processor, folder, asked, "bfloat16")
        wanted = list(modules_to_pack(model, asked).values())
        expected = {"num_4bit_modules": wanted.count(4)} | ({"num_8bit_modules": 2} if eight_bit else {})
        assert counts == expected
        assert disk_bytes(folder) < size / 2
        in_memory[folder] = logits(model)
        # wide random weights lose more than learned ones; see test_quality.py
        assert sqnr_db(before, in_memory[folder].float()) > 4
        assert torch.equal(in_memory[folder], logits(load_model(folder, "bfloat16", CPU)))
    subprocess.run([sys.executable, "-c", PLAIN, *map(str, in_memory)], check=True)
    for folder, expected in in_memory.items():
        assert torch.equal(expected, torch.load(folder / "logits.pt"))


def test_a_loaded_model_is_a_plain_one(model_dir, processor, tmp_path):
    """It can be trained, pruned and saved again like any other."""
    source = load_model(model_dir, "float32", CPU)
    save_packed(source, processor, tmp_path / "packed", settings(eight_bit=BOTH), "bfloat16")
    for dtype in ("float32", "bfloat16"):
        model = load_model(tmp_path / "packed", dtype, CPU)
        assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype}"}
        assert all(p.requires_grad for name, p in model.named_parameters() if "embed_positions" not in name)
        assert count_parameters(model) == count_parameters(source)
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert torch.equal(logits(model), logits(load_model(tmp_path / "plain", "bfloat16", CPU)))


def test_group_size_must_fit(model_dir, processor, tmp_path):
    model = load_model(model_dir, "float32", CPU)
    with pytest.raises(PackingError, match=r"group_size is 128, but model.* has 64 input weights"):
        save_packed(model, processor, tmp_path, settings(group_size=128), "bfloat16")


def test_what_does_not_go_together():
    with pytest.raises(ValidationError, match="eight_bit needs scheme int4, not nf4"):
        QuantizeSettings(scheme="nf4", eight_bit=BOTH)
    with pytest.raises(ValidationError, match="calibrated needs scheme int4, not fp4"):
        QuantizeSettings(scheme="fp4", rounding="calibrated")
    assert QuantizeSettings(scheme="nf4").rounding == "nearest"
    with pytest.raises(ValidationError, match="lm_head is in parts"):
        settings(parts=["decoder", "lm_head"], eight_bit=BOTH)
