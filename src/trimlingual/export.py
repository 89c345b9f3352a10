"""The shipped folder: plain `from_pretrained` loads it, in a process that has never heard of this package."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from trimlingual import __version__
from trimlingual.artifacts import ARTIFACT_FILE, write_text
from trimlingual.evaluate import read_result
from trimlingual.lineage import Lineage
from trimlingual.models import check_folder
from trimlingual.progress import LOG_FILE
from trimlingual.recipe import Recipe

LEFT_BEHIND = (ARTIFACT_FILE, LOG_FILE, "adapter", "scratch", "work.json")


def export(
    model_dir: Path, lineage: Lineage, recipe: Recipe, evaluation_dir: Path | None, out_dir: Path
) -> dict[str, Any]:
    """Copy the finished model to `out_dir` with a model card; scores come from `evaluation_dir` if there is one."""
    check_folder(model_dir)
    shutil.copytree(model_dir, out_dir, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
    lineage.save(out_dir)
    result = read_result(evaluation_dir) if evaluation_dir else None
    write_text(out_dir / "README.md", model_card(recipe, lineage, result))
    (out_dir / LOG_FILE).unlink(missing_ok=True)
    return {"files": sorted(path.name for path in out_dir.iterdir() if path.is_file() and path.name != "work.json")}


def model_card(recipe: Recipe, lineage: Lineage, result: dict[str, Any] | None) -> str:
    """The Hub model card: metadata block, how to use it, what was done, what was measured."""
    environment = Environment(
        loader=PackageLoader("trimlingual", "report"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("model_card.md.j2").render(
        recipe=recipe,
        lineage=lineage,
        result=result,
        removed=lineage.removed("decoder"),
        version=__version__,
        prompt=recipe.task.prompt_for(recipe.task.target_languages[0]),
        base=lineage.base.removeprefix("builtin:"),
        on_hub=not lineage.base.startswith(("builtin:", "random:", "/", ".", "~")),
    )
