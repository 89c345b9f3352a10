"""A folder for transformers: plain `from_pretrained` loads it, in a process that has never heard of this package."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trimlingual.evaluation.cost import disk_bytes
from trimlingual.exports.proof import prove_export
from trimlingual.exports.shipped import Shipped, read_shipped
from trimlingual.exports.target import ExportError, Finished, Outcome
from trimlingual.models.saving import finish_saved
from trimlingual.recipe import Recipe
from trimlingual.run.artifacts import ARTIFACT_FILE
from trimlingual.run.progress import LOG_FILE

LEFT_BEHIND = (ARTIFACT_FILE, LOG_FILE, "adapter", "scratch", "work.json")


def problems(recipe: Recipe, config: Any, quantization: Mapping[str, Any] | None) -> Iterator[str]:
    """An embedding table of fewer than 8 bits, which transformers cannot load: it would draw a `weight` that such a table has not."""
    bits = ((quantization or {}).get("bits") or {}).get("embeddings", 8)
    if bits < 8:
        yield (
            f"export.for transformers: it loads no embedding table of {bits} bits; set quantize.bits embeddings: 8, or export: null, "
            "since translate, evaluate and serve take the quantised folder as it is"
        )


def write(finished: Finished, out_dir: Path) -> list[Outcome]:
    """The model's folder, with greedy generation and without what is nobody else's. ExportError if it is not what was scored."""
    if found := list(problems(finished.recipe, None, finished.model.lineage.quantization)):
        raise ExportError("; ".join(found))
    copy_model(finished, out_dir)
    size, stored = disk_bytes(out_dir), weight_format(finished)
    if finished.is_random:
        return [Outcome("transformers", stored, size, unproven="the base model is random")]
    exact = finished.recipe.model.dtype == "float32" and finished.model.lineage.quantization is None
    proof = prove_export(out_dir, finished.recipe, finished.evaluation_dir, finished.clips, exact)
    return [Outcome("transformers", stored, size, proof)]


def copy_model(finished: Finished, out_dir: Path) -> None:
    """Model and processor, what the model is asked and how it is decoded, and a lineage without lists of clips."""
    recipe = finished.recipe
    finished.check_padding()
    shutil.copytree(finished.model.path, out_dir, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
    finished.model.lineage.to_ship().save(out_dir)
    made = read_shipped(finished.model.path)
    Shipped(recipe.task, recipe.decode, recipe.model.dtype, made.clip_s if made else None).save(out_dir)
    finish_saved(out_dir, recipe.decode.max_new_tokens)


def weight_format(finished: Finished) -> str:
    """What the decoder's weights are stored as."""
    quantization = finished.model.lineage.quantization
    return quantization["scheme"] if quantization else finished.recipe.model.storage_dtype
