"""A folder for vLLM, and what is refused because vLLM would not load it. vLLM itself has not run it in these tests."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from trimlingual.exports.target import ExportError, Finished
from trimlingual.exports.vllm import problems
from trimlingual.models.loading import load_model, load_processor
from trimlingual.pipeline import plan
from trimlingual.preflight import check
from trimlingual.quantization.int4 import save_packed
from trimlingual.recipe import QuantizeSettings, load_recipe
from trimlingual.run.lineage import ModelFolder, read_lineage
from trimlingual.stages.export import export
from trimlingual.stages.quantize import config_summary

from .test_gguf import folder  # noqa: F401

RECIPE = load_recipe("mini", ["export.for=[vllm]", "model.device=cpu"])
INT4 = ["quantize.scheme=int4", "quantize.group_size=64", "quantize.parts=[decoder]"]


def exported(model_dir, out, settings=None):
    lineage = replace(read_lineage(model_dir, "x"), quantization=settings and config_summary(settings))
    return export(Finished(ModelFolder(model_dir, lineage), RECIPE), "vllm", out)["outcomes"]


def test_16_bits(folder, tmp_path):  # noqa: F811
    [outcome] = exported(folder, tmp_path)
    assert (outcome["runtime"], outcome["format"], outcome["proof"]) == ("vllm", "bfloat16", None)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "not checked with vLLM" in card
    assert '"input_audio"' in card
    assert "fill every clip up to 30 s" in card  # this folder's model hears padding


def test_a_runtime_that_fails_is_an_error(folder, tmp_path):  # noqa: F811
    """This interpreter has no vLLM, whatever the recipe says."""
    assert find_spec("vllm") is None
    recipe = load_recipe("mini", ["export.for=[vllm]", f"export.vllm.python={sys.executable}"])
    with pytest.raises(ExportError, match="vLLM cannot load or run what was exported: ModuleNotFoundError"):
        export(Finished(ModelFolder(folder, read_lineage(folder, "x")), recipe), "vllm", tmp_path)


def test_an_int4_decoder(folder, tmp_path):  # noqa: F811
    settings = QuantizeSettings(scheme="int4", group_size=64, parts=["decoder"])
    model = load_model(folder, "bfloat16", torch.device("cpu"))
    save_packed(model, load_processor(folder), tmp_path / "packed", settings, "bfloat16")
    [outcome] = exported(tmp_path / "packed", tmp_path / "out", settings)
    assert outcome["format"] == "int4"
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert (config["format"], config["quant_method"]) == ("pack-quantized", "compressed-tensors")
    with pytest.raises(ExportError, match="audio_tower would be in 4"):
        exported(
            tmp_path / "packed",
            tmp_path / "refused",
            QuantizeSettings(scheme="int4", group_size=64, parts=["decoder", "audio_tower"]),
        )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["quantize=null"], []),
        (INT4, []),
        (["quantize.scheme=nf4"], ["does not read nf4 (bitsandbytes)"]),
        ([*INT4, "quantize.parts=[decoder, audio_tower]"], ["audio_tower would be in 4"]),
        ([*INT4, "quantize.eight_bit=[lm_head]"], ["does not read 8-bit lm_head"]),
        ([*INT4, "quantize.bits={decoder.3.mlp: 8}"], []),
        (
            [*INT4, "quantize.bits={decoder.3.mlp: 3, lm_head: 4}"],
            ["other parts or widths: decoder.3.mlp, lm_head; leave"],
        ),
    ],
)
def test_what_vllm_does_not_load_is_said_before_anything_runs(overrides, said, tmp_path):
    recipe = load_recipe("mini", ["export.for=[vllm]", *overrides])
    found = check(recipe, tmp_path, plan(recipe, tmp_path)).problems
    about = [problem for problem in found if problem.startswith("export.for vllm")]
    assert len(about) == len(said)
    assert all(part in problem for part, problem in zip(said, about))


def test_another_window_is_refused(make_model):
    [problem] = problems(RECIPE, make_model().config, None)
    assert problem == "export.for vllm: the model's window is 2 s, and vLLM takes windows of 30 s alone"
