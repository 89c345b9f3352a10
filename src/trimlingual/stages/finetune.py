"""Fine-tuning, full or LoRA: a model trained on translations of clips, saved with its lineage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimlingual.models.folders import check_folder
from trimlingual.models.inputs import TrainingData
from trimlingual.models.loading import load_model, load_processor, pick_device
from trimlingual.models.saving import save_model
from trimlingual.recipe import SharedSettings, TrainSettings
from trimlingual.run.artifacts import SCRATCH
from trimlingual.run.lineage import ModelFolder
from trimlingual.run.processes import is_main_process
from trimlingual.training.selection import UNGUIDED, Guide
from trimlingual.training.trainer import read_teacher, train_


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
    processor = load_processor(folder.path)
    teacher = read_teacher(processor, data, shared, settings, guide, out_dir / SCRATCH)
    model = load_model(folder.path, shared.model.dtype, pick_device(shared.model.device))
    info = train_(model, processor, data, shared, settings, out_dir / SCRATCH, guide, teacher)
    if settings.method == "lora":
        adapted, model = info.pop("adapted"), None
        if is_main_process():
            adapted.save_pretrained(out_dir / "adapter")
        model = adapted.merge_and_unload()
    weights = info.pop("weights", None)
    if is_main_process():
        save_model(model, processor, out_dir, shared.model.storage_dtype, weights)
        lineage = folder.lineage.with_seen("train", {clip.audio_sha256 for clip in data.clips})
        if guide.select and settings.selection_checks:
            lineage = lineage.with_seen("select", guide.select.audio_hashes)
        lineage.save(out_dir)
    return info
