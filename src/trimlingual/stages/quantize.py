"""QLoRA and what follows it: train an adapter on the 4-bit model, merge it, quantise again.

The adapter was trained on the 4-bit weights, so only these (dequantised) and the adapter together are the model that was trained
(Dettmers et al. 2023, QLoRA). But they stand on the 4-bit grid, and an adapter moves most of them by less than half a step: rounded
again they are back where they were, and what was learned is gone. Merged onto the original weights, which lie anywhere between the
steps, it survives on average. So that is the default (`merge_base`); benchmarks/quantization.py measures both, and merging inside
4-bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from trimlingual.data.audio import load_audio
from trimlingual.models.folders import check_folder
from trimlingual.models.inputs import Collator, Example, Prompter, TrainingData
from trimlingual.models.loading import free_memory, load_model, load_processor, pick_device
from trimlingual.models.qwen2_audio import PARTS, part_of
from trimlingual.models.random_weights import draw, is_random
from trimlingual.models.saving import DTYPES, round_weights_, save_model
from trimlingual.quantization.int4 import save_packed
from trimlingual.quantization.rounding import round_calibrated_
from trimlingual.recipe import ModelSettings, QuantizeSettings, SharedSettings
from trimlingual.run.artifacts import SCRATCH
from trimlingual.run.lineage import ModelFolder
from trimlingual.run.processes import is_main_process, wait_for_everyone
from trimlingual.training.loss import answer_forward, answer_logits
from trimlingual.training.selection import UNGUIDED, Guide
from trimlingual.training.trainer import read_teacher, train_

PROBE_BATCH = 8
NUM_PROBE_EXAMPLES = 32  # training examples on which the change by merging and quantising is measured


class QuantizationError(ValueError):
    """A model whose 4-bit modules are not the ones that were asked for."""


def quantize(
    folder: ModelFolder,
    data: TrainingData,
    shared: SharedSettings,
    settings: QuantizeSettings,
    out_dir: Path,
    guide: Guide = UNGUIDED,
) -> dict[str, Any]:
    """Make the 4-bit model of the one in `folder`: QLoRA on `data`, merge, quantise again, save to `out_dir`.

    Without `settings.train` the weights are rounded as they are, and the examples only calibrate and measure.

    bitsandbytes' nf4 and fp4 compute on 4 bits; `scheme: int4` is stored by int4.py, with 8-bit embeddings if asked for.

    One model at a time stands on the GPU: the 4-bit one that is trained, the merged one, which is made in host memory and comes to be
    measured, the one that ships. Every process trains; the main one alone does the rest and returns all of the record.

    `out_dir/adapter` keeps the adapter. The change in loss and logits from the trained model (adapter on the 4-bit base) over the
    merged one to the final one is measured on training examples and returned. Raises QuantizationError when a module is 4-bit that
    should not be, or the other way round.
    """
    check_folder(folder.path, "quantized")
    device, scratch = pick_device(shared.model.device), out_dir / SCRATCH
    stored = _stored(folder.path, scratch / "base", device)
    processor = load_processor(stored)
    step = max(1, len(data.examples) // NUM_PROBE_EXAMPLES)
    probe = list(data.examples)[::step][:NUM_PROBE_EXAMPLES]
    collator = Collator(Prompter(processor, shared.task), lambda index: load_audio(data.clips[index].audio))

    def measure(model: Any) -> tuple[float, Tensor]:
        return answer_logits(model, collator, probe, PROBE_BATCH)

    info, trained, adapted = {}, None, None
    if settings.train:
        info = _train(stored, processor, data, shared, settings, scratch, guide)
        adapted = info.pop("adapted")
    if not is_main_process():
        return info
    free_memory()  # of the optimizer
    merged = load_model(stored, shared.model.dtype, torch.device("cpu"))
    if adapted:
        adapted.save_pretrained(out_dir / "adapter")
        trained = measure(adapted)
        merge_(merged, adapted, settings.merge_base)
        del adapted
        free_memory()
    round_weights_(merged, shared.model.storage_dtype)
    config = bitsandbytes_config(settings)
    if settings.scheme != "int4":
        shutil.rmtree(scratch / "merged", ignore_errors=True)  # of a run that was killed
        save_model(merged, processor, scratch / "merged", shared.model.storage_dtype)
    plain = measure(merged.to(device))
    if settings.scheme == "int4":
        scales = _calibrated(merged, settings, collator, data.examples, shared.model)
        info |= save_packed(merged, processor, out_dir, settings, shared.model.storage_dtype, scales)
    del merged
    free_memory()
    if settings.scheme == "int4":
        final = measure(load_model(out_dir, shared.model.dtype, device))
    else:
        final_model = load_model(scratch / "merged", shared.model.dtype, device, config)
        check_quantized(final_model, settings)
        final = measure(final_model)
        save_model(final_model, processor, out_dir)
    summary = config_summary(settings)
    after = folder.lineage.after("quantize").with_seen("train", {clip.audio_sha256 for clip in data.clips})
    if guide.select and settings.train and settings.train.selection_checks:
        after = after.with_seen("select", guide.select.audio_hashes)
    replace(after, quantization=summary).save(out_dir)
    return info | {"change": _change(trained or plain, plain, final), "quantization": summary}


def _train(
    stored: Path,
    processor: Any,
    data: TrainingData,
    shared: SharedSettings,
    settings: QuantizeSettings,
    scratch: Path,
    guide: Guide,
) -> dict[str, Any]:
    """QLoRA; the info of `train_`, with the PEFT model under `adapted`."""
    train, work_dir = settings.train, scratch / "training"
    assert train is not None
    teacher = read_teacher(processor, data, shared, train, guide, work_dir)
    device = pick_device(shared.model.device)
    base = load_model(stored, shared.model.dtype, device, bitsandbytes_config(settings))
    check_quantized(base, settings)
    return train_(base, processor, data, shared, train, work_dir, guide, teacher)


def _calibrated(
    model: Any,
    settings: QuantizeSettings,
    collator: Collator,
    examples: Sequence[Example],
    model_settings: ModelSettings,
) -> dict[str, Tensor]:
    """Round the 4-bit layers in place by what examples make of them, if the recipe asks for it; their scales by name."""
    if settings.rounding != "calibrated":
        return {}
    forward, device = answer_forward(model), next(model.parameters()).device
    step = max(1, len(examples) // settings.calibration_examples)

    def run(example: Example) -> None:
        batch = collator([example])
        batch.pop("ids")
        forward(**{name: tensor.to(device) for name, tensor in batch.items()})

    passes = [partial(run, example) for example in list(examples)[::step][: settings.calibration_examples]]
    return round_calibrated_(model, settings, passes, DTYPES[model_settings.storage_dtype])


def _stored(model_dir: Path, folder: Path, device: torch.device) -> Path:
    """`model_dir` or, if its weights are drawn, `folder` with them: they are read more than once, by every process."""
    if not is_random(model_dir):
        return model_dir
    if is_main_process():
        shutil.rmtree(folder, ignore_errors=True)
        save_model(draw(model_dir, torch.bfloat16, device), load_processor(model_dir), folder, "bfloat16")
        free_memory()
    wait_for_everyone()
    return folder


def _change(
    trained: tuple[float, Tensor], merged: tuple[float, Tensor], final: tuple[float, Tensor]
) -> dict[str, float]:
    """Losses, and how far the logits (tokens, V) are from those of the trained model."""
    return {
        "trained_loss": trained[0],
        "merged_loss": merged[0],
        "final_loss": final[0],
        "merged_sqnr_db": sqnr_db(trained[1], merged[1]),
        "final_sqnr_db": sqnr_db(trained[1], final[1]),
        "final_max_logit_difference": (trained[1] - final[1]).abs().max().item(),
        "num_tokens": len(trained[1]),
    }


def bitsandbytes_config(settings: QuantizeSettings) -> BitsAndBytesConfig:
    """The 4-bit configuration to train on; an int4 model is trained as nf4, which bitsandbytes computes with.

    Modules are skipped by their names in memory; other spellings match nothing and are ignored.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4" if settings.scheme == "int4" else settings.scheme,
        bnb_4bit_use_double_quant=settings.double_quantization,
        bnb_4bit_compute_dtype=DTYPES[settings.compute_dtype],
        llm_int8_skip_modules=[prefix for part, prefix in PARTS.items() if part not in settings.parts],
    )


def config_summary(settings: QuantizeSettings) -> dict[str, Any]:
    """What is 4-bit and how, for lineage, card and report."""
    if settings.scheme == "int4":
        return {
            "method": "compressed-tensors",
            "scheme": "int4",
            "group_size": settings.group_size,
            "parts": sorted(settings.parts),
            "eight_bit": sorted(settings.eight_bit),
            "rounding": settings.rounding,
            **({"merge_base": settings.merge_base} if settings.train else {}),
        }
    return {
        "method": "bitsandbytes",
        "scheme": settings.scheme,
        "double_quantization": settings.double_quantization,
        "parts": sorted(settings.parts),
        "compute_dtype": settings.compute_dtype,
        "merge_base": settings.merge_base,
    }


def is_4bit(module: nn.Module) -> bool:
    """Whether this is a bitsandbytes 4-bit linear layer."""
    import bitsandbytes

    return isinstance(module, bitsandbytes.nn.Linear4bit)


def check_quantized(model: Any, settings: QuantizeSettings) -> None:
    """QuantizationError unless exactly the linear layers of the chosen parts are 4-bit."""
    wrong, missed = [], []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        wanted = part_of(name) in settings.parts
        if is_4bit(module) and not wanted:
            wrong.append(name)
        if wanted and not is_4bit(module):
            missed.append(name)
    if wrong or missed:
        raise QuantizationError(
            f"quantize.parts is {sorted(settings.parts)}, but after loading "
            + "; ".join(
                f"{len(names)} module(s) {verb} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                for names, verb in ((wrong, "are 4-bit that should not be"), (missed, "are not 4-bit that should be"))
                if names
            )
        )


@torch.no_grad()
def merge_(target: Any, adapted: Any, base: Literal["dequantized", "original"] = "dequantized") -> None:
    """Write `weight + adapter` of the PEFT model into the plain model `target`, in float32 before rounding.

    `target` may stand in host memory: the sums are made one layer at a time where the adapter is.

    The weight is the dequantised 4-bit one, which the adapter was trained on, or the `original` one, which `target` holds. Modules
    that are not adapted become their dequantised selves, or stay as they are.
    """
    from peft.tuners.lora import LoraLayer

    source = dict(adapted.get_base_model().named_modules())
    for name, module in target.named_modules():
        other = source.get(name)
        if not isinstance(module, nn.Linear) or other is None:
            continue
        trained_on = other.get_base_layer() if isinstance(other, LoraLayer) else other
        if base == "dequantized":
            weight = dequantized(trained_on) if is_4bit(trained_on) else trained_on.weight.float()
        else:
            weight = module.weight.to(trained_on.weight.device).float()
        if isinstance(other, LoraLayer):
            weight = weight + other.get_delta_weight(adapted.active_adapter).float()
        module.weight.copy_(weight.to(module.weight.dtype))


def dequantized(module: nn.Module) -> Tensor:
    """The weights a 4-bit layer stands for, float32, (out, in)."""
    import bitsandbytes

    # On CPUs with AVX512-BF16 a first forward in eval mode re-packs the weight into another layout, which dequantize_4bit
    # then reads as garbage; building the state dict is the public call that puts the standard layout back.
    module.state_dict()
    weight: Any = module.weight
    return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()


def sqnr_db(signal: Tensor, noisy: Tensor) -> float:
    """Signal to quantisation noise in dB: 20 log10(|signal| / |signal - noisy|) (Euclidean norms, as torchao's SQNR)."""
    noise = (signal - noisy).norm()
    return float("inf") if noise == 0 else (20 * torch.log10(signal.norm() / noise)).item()
