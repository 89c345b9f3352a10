"""The model in few bits: trained by QLoRA, merged and quantised again, or trained on the rounded weights themselves.

QLoRA takes the least memory. Its adapter was trained on the 4-bit weights, so only these (dequantised) and the adapter together are
the model that was trained (Dettmers et al. 2023, QLoRA). But they stand on the 4-bit grid, and an adapter moves most of them by less
than half a step: rounded again they are back where they were, and what was learned is gone. Merged onto the original weights, which
lie anywhere between the steps, it survives on average. So that is the default (`merge_base`); benchmarks/quantization.py measures
both, and merging inside 4-bit.

`train.method: full` with `scheme: int4` needs no such compromise and takes the memory of full fine-tuning: the weights are rounded at
every step (straight_through.py), so what was trained is what ships.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimlingual.data.audio import load_audio
from trimlingual.data.spread import spread
from trimlingual.models.folders import check_folder
from trimlingual.models.inputs import Collator, Example, Prompter, TrainingData
from trimlingual.models.loading import free_memory, load_model, load_processor, pick_device
from trimlingual.models.random_weights import draw, is_random
from trimlingual.models.saving import DTYPES, round_weights_, save_model
from trimlingual.quantization.int4 import modules_to_pack, save_packed
from trimlingual.quantization.merge import merge_
from trimlingual.quantization.nf4 import bitsandbytes_config, check_quantized
from trimlingual.quantization.rounding import round_calibrated_
from trimlingual.quantization.straight_through import keep_rounded_, round_in_forward_, scales_of
from trimlingual.recipe import ROW_PARTS, ModelSettings, QuantizeSettings, SharedSettings
from trimlingual.run.artifacts import SCRATCH, put_in_place
from trimlingual.run.lineage import Lineage, ModelFolder
from trimlingual.run.processes import is_main_process, wait_for_everyone
from trimlingual.run.progress import say
from trimlingual.training.checkpoints import last_complete_checkpoint
from trimlingual.training.lora import save_adapter
from trimlingual.training.loss import answer_forward, answer_logits
from trimlingual.training.selection import UNGUIDED, Guide
from trimlingual.training.trainer import read_teacher, train_

SCALES_FILE = "scales.safetensors"  # of a training on rounded weights
PROBE_BATCH = 8
NUM_PROBE_EXAMPLES = 32  # training examples on which the change by merging and quantising is measured


def quantize(
    folder: ModelFolder,
    data: TrainingData,
    shared: SharedSettings,
    settings: QuantizeSettings,
    out_dir: Path,
    guide: Guide = UNGUIDED,
) -> dict[str, Any]:
    """Make the 4-bit model of the one in `folder`: train it on `data`, save it to `out_dir`.

    With QLoRA the adapter is merged, and the merged weights are quantised again. Without `settings.train` the weights are rounded as
    they are, and the examples only calibrate and measure. int4.py stores `scheme: int4`, with the bits that `settings.bits` gives.

    One model at a time stands on the GPU: the 4-bit one that is trained, the merged one, which is made in host memory and comes to be
    measured, the one that ships. Every process trains; the main one alone does the rest and returns all of the record.

    `out_dir/adapter` keeps the adapter. The change in loss and logits from the trained model over the merged to the final one is
    measured on training examples and returned. Raises QuantizationError when other modules are 4-bit than should be.
    """
    check_folder(folder.path, "quantized")
    summary, settings = config_summary(settings), _at_positions(settings, folder.lineage)
    device, scratch = pick_device(shared.model.device), out_dir / SCRATCH
    stored = _stored(folder.path, scratch / "base", device)
    processor = load_processor(stored, shared.model.audio_padding)
    collator = _collator(processor, data, shared)
    measure = partial(answer_logits, collator=collator, examples=_some(data.examples), batch_size=PROBE_BATCH)
    info: dict[str, Any] = {}
    trained = adapted = scales = None
    if settings.train and settings.train.method == "full":
        merged, scales, info = _train_rounded(stored, processor, data, shared, settings, scratch, guide)
    elif settings.train:
        info = _train_adapter(stored, processor, data, shared, settings, scratch, guide)
        adapted = info.pop("adapted")
    if not is_main_process():
        return info
    free_memory()  # of the optimizer
    if scales is None:
        trained = measure(adapted) if adapted else None
        merged = _merged(stored, adapted, settings, shared.model, out_dir / "adapter", folder.public_name)
        adapted = None
        free_memory()
    round_weights_(merged, shared.model.storage_dtype)
    if settings.scheme != "int4":
        shutil.rmtree(scratch / "merged", ignore_errors=True)  # of a run that was killed
        save_model(merged, processor, scratch / "merged", shared.model.storage_dtype)
    plain = measure(merged.to(device))
    if settings.scheme == "int4":
        scales = scales or _calibrated(merged, settings, collator, data.examples, shared.model)
        info |= save_packed(merged, processor, out_dir, settings, shared.model.storage_dtype, scales)
    del merged
    free_memory()
    if settings.scheme == "int4":
        final = measure(load_model(out_dir, shared.model.dtype, device))
    else:
        four = load_model(scratch / "merged", shared.model.dtype, device, bitsandbytes_config(settings))
        check_quantized(four, settings)
        final = measure(four)
        save_model(four, processor, out_dir)
    _lineage(folder.lineage, data, settings, guide, summary).save(out_dir)
    return info | {"change": _change(trained or plain, plain, final), "quantization": summary}


def _at_positions(settings: QuantizeSettings, lineage: Lineage) -> QuantizeSettings:
    """`settings` with bits by positions; says which parts they name in vain."""
    there = lineage.layers["decoder"]
    if gone := [part for part in settings.bits if part not in ROW_PARTS and int(part.split(".")[1]) not in there]:
        say(f"note: quantize.bits names parts of layers that were removed: {', '.join(gone)}")
    return settings.at_positions(there)


def _merged(
    stored: Path, adapted: Any, settings: QuantizeSettings, model_settings: ModelSettings, out: Path, base: str
) -> Any:
    """The model in `stored`, in host memory, with the adapter if there is one, which is saved to `out` as one of `base`."""
    model = load_model(stored, model_settings.dtype, torch.device("cpu"))
    if adapted:
        save_adapter(adapted, out, base)
        merge_(model, adapted, settings.merge_base)
    return model


def _collator(processor: Any, data: TrainingData, shared: SharedSettings) -> Collator:
    return Collator(Prompter(processor, shared.task), lambda index: load_audio(data.clips[index].audio))


def _some(examples: Sequence[Example], num: int = NUM_PROBE_EXAMPLES) -> list[Example]:
    """`num` of the examples, spread evenly over those of each language.

    A clip's languages take turns in the list. Taken from it by an even step, all examples would be of one language.
    """
    return spread(sorted(examples, key=lambda example: example.language), num)


def _lineage(
    lineage: Lineage, data: TrainingData, settings: QuantizeSettings, guide: Guide, summary: dict[str, Any]
) -> Lineage:
    after = lineage.after("quantize").with_seen("train", {clip.audio_sha256 for clip in data.clips})
    if guide.select and settings.train and settings.train.selection_checks:
        after = after.with_seen("select", guide.select.audio_hashes)
    return replace(after, quantization=summary)


def _train_adapter(
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


def _train_rounded(
    stored: Path,
    processor: Any,
    data: TrainingData,
    shared: SharedSettings,
    settings: QuantizeSettings,
    scratch: Path,
    guide: Guide,
) -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    """The model with its weights on their steps, their scales by name, and the info of `train_`.

    The scales of the first start are kept, so that a restart goes on with them.
    """
    train, work_dir = settings.train, scratch / "training"
    assert train is not None
    teacher = read_teacher(processor, data, shared, train, guide, work_dir)
    model = load_model(stored, shared.model.dtype, pick_device(shared.model.device))
    kept = work_dir / SCALES_FILE
    goes_on = last_complete_checkpoint(work_dir) and kept.is_file()
    if is_main_process() and not goes_on:
        collator = _collator(processor, data, shared)
        calibrated = _calibrated(model, settings, collator, data.examples, shared.model, keep_unrounded=True)
        scales = scales_of(model, settings, DTYPES[shared.model.storage_dtype], calibrated)
        work_dir.mkdir(parents=True, exist_ok=True)
        made = kept.with_name(kept.name + ".tmp")
        save_file({name: scale.cpu().contiguous() for name, scale in scales.items()}, made)
        put_in_place(made, kept)
    wait_for_everyone()
    scales = load_file(kept)
    round_in_forward_(model, scales, modules_to_pack(model, settings))
    info = train_(model, processor, data, shared, train, work_dir, guide, teacher)
    keep_rounded_(model)
    return model, scales, info


def _calibrated(
    model: Any,
    settings: QuantizeSettings,
    collator: Collator,
    examples: Sequence[Example],
    model_settings: ModelSettings,
    keep_unrounded: bool = False,
) -> dict[str, Tensor]:
    """Round the towers' layers in place by what examples make of them, if the recipe asks for it; their scales by name."""
    if settings.rounding != "calibrated":
        return {}
    forward, device = answer_forward(model), next(model.parameters()).device

    def run(example: Example) -> None:
        batch = collator([example])
        batch.pop("ids")
        forward(**{name: tensor.to(device) for name, tensor in batch.items()})

    passes = [partial(run, example) for example in _some(examples, settings.calibration_examples)]
    return round_calibrated_(model, settings, passes, DTYPES[model_settings.storage_dtype], keep_unrounded)


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
) -> dict[str, float | None]:
    """Losses, and how far the logits (tokens, V) are from those of the trained model: dB of signal to error, None for no error."""
    return {
        "trained_loss": trained[0],
        "merged_loss": merged[0],
        "final_loss": final[0],
        **{
            f"{name}_sqnr_db": value if math.isfinite(value := sqnr_db(trained[1], after[1])) else None
            for name, after in (("merged", merged), ("final", final))
        },
        "final_max_logit_difference": (trained[1] - final[1]).abs().max().item(),
        "num_tokens": len(trained[1]),
    }


def config_summary(settings: QuantizeSettings) -> dict[str, Any]:
    """What is 4-bit and how, for lineage, card and report."""
    if settings.scheme == "int4":
        trained: dict[str, str] = {}
        if settings.train:
            by_adapter = settings.train.method == "lora"
            trained = {"merge_base": settings.merge_base} if by_adapter else {"trained": "on rounded weights"}
        return {
            "method": "compressed-tensors",
            "scheme": "int4",
            "group_size": settings.group_size,
            "parts": sorted(settings.parts),
            "eight_bit": sorted(settings.eight_bit),
            **({"bits": dict(sorted(settings.bits.items()))} if settings.bits else {}),
            "rounding": settings.rounding,
            **trained,
        }
    return {
        "method": "bitsandbytes",
        "scheme": settings.scheme,
        "double_quantization": settings.double_quantization,
        "parts": sorted(settings.parts),
        "compute_dtype": settings.compute_dtype,
        **({"merge_base": settings.merge_base} if settings.train else {}),
    }


def sqnr_db(signal: Tensor, noisy: Tensor) -> float:
    """Signal to quantisation noise in dB: 20 log10(|signal| / |signal - noisy|) (Euclidean norms, as torchao's SQNR)."""
    noise = (signal - noisy).norm()
    return float("inf") if noise == 0 else (20 * torch.log10(signal.norm() / noise)).item()
