"""Fine-tuning, full or LoRA: a model trained on translations of clips, saved with its lineage."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trimlingual.models.folders import check_folder
from trimlingual.models.inputs import TrainingData
from trimlingual.models.loading import free_memory, load_model, load_processor, pick_device
from trimlingual.models.saving import save_model
from trimlingual.recipe import SharedSettings, TrainSettings
from trimlingual.run.artifacts import SCRATCH, append_jsonl, read_journal
from trimlingual.run.lineage import ModelFolder
from trimlingual.run.processes import gather, is_main_process, wait_for_everyone
from trimlingual.run.progress import say
from trimlingual.training.lora import save_adapter
from trimlingual.training.selection import UNGUIDED, Guide
from trimlingual.training.sharding import load_to_share
from trimlingual.training.trainer import read_teacher, train_

SWEEP_FILE = "sweep.jsonl"  # the rates that were tried, with their scores

Train = Callable[[TrainSettings, Path], tuple[Any, dict[str, Any]]]
"""Trains in a folder for checkpoints; returns the model and what the artefact remembers."""


def sweep(train: Train, settings: TrainSettings, scratch: Path) -> tuple[Any, dict[str, Any]]:
    """One training with each rate of `settings.sweep`; what `train` returns of the one that the selection clips like best.

    One model stands in memory at a time, and the checkpoints of one rate beside those of the best so far: in the end the best training
    is taken up again after its last step. A rate that was tried before a restart is not tried again.
    """
    journal = scratch / SWEEP_FILE
    tried: list[dict[str, Any]] = gather(read_journal(journal) if is_main_process() else [])[0]
    for rate in settings.sweep[len(tried) :]:
        say(f"  learning rate {rate:g}, {len(tried) + 1} of {len(settings.sweep)}")
        _, info = train(_at_rate(settings, rate), _folder(scratch, rate))
        scores = info["selection"]["scores"]
        tried.append({"learning_rate": rate, "score": max(record["score"] for record in scores), "scores": scores})
        free_memory()
        if is_main_process():
            append_jsonl(journal, tried[-1])
            for other in tried:
                if other["learning_rate"] != _best(tried)["learning_rate"]:
                    shutil.rmtree(_folder(scratch, other["learning_rate"]), ignore_errors=True)
        wait_for_everyone()
    best = _best(tried)
    say(f"  learning rate {best['learning_rate']:g} is kept: {best['score']:.2f} on the selection clips")
    model, info = train(_at_rate(settings, best["learning_rate"]), _folder(scratch, best["learning_rate"]))
    return model, info | {"learning_rate": best["learning_rate"], "sweep": tried}


def _best(tried: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return max(tried, key=lambda record: record["score"])


def _at_rate(settings: TrainSettings, rate: float) -> TrainSettings:
    return settings.model_copy(update={"learning_rate": rate, "sweep": []})


def _folder(scratch: Path, rate: float) -> Path:
    return scratch / f"rate-{rate:g}"


def finetune(
    folder: ModelFolder,
    data: TrainingData,
    shared: SharedSettings,
    settings: TrainSettings,
    out_dir: Path,
    guide: Guide = UNGUIDED,
) -> dict[str, Any]:
    """Train the model in `folder` and save it to `out_dir`, with its lineage; goes on from a checkpoint found there.

    Returns what the artefact remembers: steps, examples, the loss curve. With `method: lora` the adapter is saved beside
    (`adapter/`) and merged into the saved weights.
    """
    check_folder(folder.path, "teacher")  # a student's folder must be the same
    processor = load_processor(folder.path, shared.model.audio_padding)
    teacher = read_teacher(processor, data, shared, settings, guide, out_dir / SCRATCH)

    def train(chosen: TrainSettings, work_dir: Path) -> tuple[Any, dict[str, Any]]:
        load = load_to_share if chosen.fsdp else load_model
        model = load(folder.path, shared.model.dtype, pick_device(shared.model.device))
        return model, train_(model, processor, data, shared, chosen, work_dir, guide, teacher)

    model, info = sweep(train, settings, out_dir / SCRATCH) if settings.sweep else train(settings, out_dir / SCRATCH)
    if settings.method == "lora":
        adapted, model = info.pop("adapted"), None
        if is_main_process():
            save_adapter(adapted, out_dir / "adapter", folder.public_name)
        model = adapted.merge_and_unload()
    weights = info.pop("weights", None)
    if is_main_process():
        save_model(model, processor, out_dir, shared.model.storage_dtype, weights)
        lineage = folder.lineage.unpacked().with_seen("train", {clip.audio_sha256 for clip in data.clips})
        if guide.select and settings.selection_checks:
            lineage = lineage.with_seen("select", guide.select.audio_hashes)
        lineage.save(out_dir)
    return info
