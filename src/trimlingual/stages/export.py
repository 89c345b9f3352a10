"""The shipped folder: plain `from_pretrained` loads it, in a process that has never heard of this package."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from trimlingual.data.sources import Clip
from trimlingual.evaluation.results import read_result
from trimlingual.exports.proof import prove_export
from trimlingual.exports.shipped import Shipped
from trimlingual.models.family import Family, family_of_folder
from trimlingual.models.folders import check_folder
from trimlingual.models.loading import is_on_hub
from trimlingual.models.saving import finish_saved
from trimlingual.recipe import Recipe
from trimlingual.report.tables import proof_text
from trimlingual.run.artifacts import ARTIFACT_FILE, write_text
from trimlingual.run.lineage import Lineage, ModelFolder
from trimlingual.run.progress import LOG_FILE, say
from trimlingual.run.version import version

LEFT_BEHIND = (ARTIFACT_FILE, LOG_FILE, "adapter", "scratch", "work.json")


def export(
    folder: ModelFolder, recipe: Recipe, evaluation_dir: Path | None, clips: Sequence[Clip], out_dir: Path
) -> dict[str, Any]:
    """Copy the finished model to `out_dir` with a model card, and prove that plain transformers gives what was scored.

    Scores and recorded translations come from `evaluation_dir` if there is one, their audio from `clips`. Raises ModelError or
    ExportError for what must not ship.
    """
    lineage = folder.lineage
    check_folder(folder.path, "exported")
    shutil.copytree(folder.path, out_dir, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
    lineage.to_ship().save(out_dir)
    Shipped(recipe.task, recipe.decode, recipe.model.dtype).save(out_dir)
    result = read_result(evaluation_dir) if evaluation_dir else None
    proof: dict[str, Any] | None = None
    finish_saved(out_dir, recipe.decode.max_new_tokens)
    if lineage.base.startswith("random:"):
        say("  the base model is random: not proven by translating")
    else:
        exact = recipe.model.dtype == "float32" and lineage.quantization is None
        proof = prove_export(out_dir, recipe, evaluation_dir, clips, exact)
        say(f"  proof: {proof_text(proof)}")
    write_text(out_dir / "README.md", model_card(recipe, lineage, family_of_folder(out_dir), result, proof))
    return {
        "proof": proof,
        "files": sorted(path.name for path in out_dir.iterdir() if path.is_file() and path.name != "work.json"),
    }


def model_card(
    recipe: Recipe, lineage: Lineage, family: Family, result: dict[str, Any] | None, proof: dict[str, Any] | None = None
) -> str:
    """The Hub model card: metadata block, how to use it, what was done, what was measured."""
    environment = Environment(
        loader=PackageLoader("trimlingual", "report"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("model_card.md.j2").render(
        recipe=recipe,
        lineage=lineage,
        family=family,
        result=result,
        proof=proof_text(proof) if proof else None,
        removed=lineage.removed("decoder"),
        version=version(),
        prompt=recipe.task.prompt_for(recipe.task.target_languages[0]),
        base=lineage.to_ship().base.removeprefix("builtin:"),
        on_hub=is_on_hub(lineage.base),
    )
