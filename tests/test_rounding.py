"""Calibrated rounding: less error in the output than rounding to nearest, and nothing lost where there is nothing to gain."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from trimlingual.models.inputs import Example, TrainingData
from trimlingual.models.loading import load_model, pick_device
from trimlingual.pipeline import run_stage
from trimlingual.quantization.int4 import best_scale, round_to_integers
from trimlingual.quantization.rounding import Moments, of_equal_inputs, round_columns, walk_layers
from trimlingual.recipe import QuantizeSettings, load_recipe
from trimlingual.stages.quantize import quantize


def _scale(groups: torch.Tensor, num_bits: int = 4) -> torch.Tensor:
    return best_scale(groups, num_bits, torch.bfloat16)


def _correlated(rows: int, width: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, width // 4) @ torch.randn(width // 4, width) + 0.1 * torch.randn(rows, width)


@pytest.mark.parametrize(("num_bits", "group_size"), [(2, 32), (3, 64), (4, 32), (4, 128), (4, 256)])
def test_output_error_is_smaller_than_nearest(num_bits: int, group_size: int) -> None:
    inputs, weight = _correlated(2000, 256), torch.randn(64, 256).bfloat16()
    moments = Moments(256, inputs.device)
    moments.add(inputs[:500])
    moments.add(inputs[500:1000])
    scale_of = partial(_scale, num_bits=num_bits)
    scales, rounded, _ = round_columns(weight, moments.mean(), num_bits, group_size, scale_of)
    assert scales.shape == (64, 256 // group_size)
    integers = rounded.reshape(64, -1, group_size) / scales[..., None]
    torch.testing.assert_close(integers, integers.round(), atol=1e-4, rtol=0)
    assert integers.round().abs().max() <= 2 ** (num_bits - 1)
    nearest = round_to_integers(weight, num_bits, group_size)[1].float()
    errors = [(inputs[1000:] @ (weight.float() - w).t()).square().sum() for w in (rounded, nearest)]
    assert errors[0] < 0.5 * errors[1], errors


def test_unrelated_inputs_give_nearest() -> None:
    weight = torch.randn(16, 64).bfloat16()
    rounded = round_columns(weight, torch.eye(64), 4, 32, _scale)[1]
    torch.testing.assert_close(rounded, round_to_integers(weight, 4, 32)[1].float(), atol=1e-2, rtol=1e-2)


def test_inputs_that_are_never_used_do_no_harm() -> None:
    inputs = _correlated(500, 64)
    inputs[:, 5] = 0
    moments = Moments(64, inputs.device)
    moments.add(inputs)
    rounded = round_columns(torch.randn(8, 64), moments.mean(), 4, 32, _scale)[1]
    assert rounded.isfinite().all()
    assert rounded[:, 5].abs().max() == 0


def test_modules_of_equal_inputs_are_rounded_as_one_and_come_out_the_same() -> None:
    inputs = torch.randn(200, 64)
    moments = {name: Moments(64, torch.device("cpu")) for name in ("q", "k", "v", "down")}
    for name, found in moments.items():
        found.add(inputs if name != "down" else inputs.flip(0) * 2)
    groups = of_equal_inputs(moments, {"q": 4, "k": 4, "v": 3, "down": 4})
    assert [names for names, _ in groups] == [["q", "k"], ["v"], ["down"]]
    weights = [torch.randn(8, 64), torch.randn(4, 64)]
    together = round_columns(torch.cat(weights), groups[0][1], 4, 32, _scale)
    alone = [round_columns(weight, groups[0][1], 4, 32, _scale) for weight in weights]
    for part, parts in zip(together, zip(*alone), strict=True):
        torch.testing.assert_close(part, torch.cat(parts))


def test_moments_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="calibration"):
        round_columns(torch.randn(8, 64), torch.full((64, 64), float("nan")), 4, 32, _scale)


def test_layers_see_what_the_changed_ones_below_give() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Linear(4, 4, bias=False)
            torch.nn.init.eye_(self.up.weight)

        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.up(hidden_states),)

    layers = torch.nn.ModuleList([Layer(), Layer()])

    def run() -> None:
        hidden = torch.ones(1, 3, 4)
        for layer in layers:
            hidden = layer(hidden_states=hidden)[0]

    seen = []

    def visit(position: int, moments: dict[str, Moments]) -> None:
        seen.append(moments["up"].mean()[0, 0].item())
        layers[position].up.weight.data *= 2

    walk_layers(layers, [run, run], visit)
    assert seen == [1.0, 4.0]


def test_stage_without_training_ships_what_was_measured(given, model_dir, split, shared, tmp_path: Path) -> None:
    examples = [Example(i, clip.id, "de", clip.references["de"]) for i, clip in enumerate(split.clips)]
    settings = QuantizeSettings(
        start="base", scheme="int4", group_size=32, rounding="calibrated", calibration_examples=4, train=None
    )
    info = quantize(given, TrainingData(split.clips, examples), shared, settings, tmp_path)
    assert info["change"]["trained_loss"] == info["change"]["merged_loss"]
    assert (
        info["change"]["merged_sqnr_db"] is None
    )  # nothing was merged: no error, which has no dB that JSON could hold
    assert info["change"]["final_sqnr_db"] > 5
    assert info["quantization"]["rounding"] == "calibrated"
    assert "merge_base" not in info["quantization"]
    assert not (tmp_path / "adapter").exists()
    model, original = (load_model(folder, "float32", pick_device("cpu")) for folder in (tmp_path, model_dir))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            assert not torch.equal(module.weight, original.get_submodule(name).weight), name


@pytest.mark.slow
def test_calibrated_model_is_nearer_to_the_original_than_nearest(tmp_path: Path) -> None:
    """On the built-in model and speech that it knows, through the pipeline."""
    settings = [
        "data.train={kind: builtin, split: everyday}", "finetune=null", "rank=null", "distill=null", "recover=null",
        "quantize.train=null", "quantize.start=base", "quantize.scheme=int4", "quantize.group_size=64",
        "quantize.parts=[decoder]", "quantize.calibration_examples=80",
    ]  # fmt: skip
    sqnr_db = {}
    for rounding in ("nearest", "calibrated"):
        recipe = load_recipe("mini", [*settings, f"quantize.rounding={rounding}"])
        artifact = run_stage(recipe, tmp_path / rounding, "quantized")
        sqnr_db[rounding] = artifact.info["change"]["final_sqnr_db"]
    assert sqnr_db["calibrated"] > sqnr_db["nearest"] + 0.1  # seen: 19.97 and 19.73
