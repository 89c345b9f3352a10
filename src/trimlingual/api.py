"""What `import trimlingual` offers to programs (docs/api.md). Imported when a name is first used, as is everything heavy below it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimlingual.recipe import Recipe, load_recipe

__all__ = ["compress", "evaluate", "load_recipe", "pareto", "translate"]


def compress(recipe: Recipe | str, run_dir: Path | str | None = None, *, force: bool = False) -> dict[str, Any]:
    """Run a whole recipe in `run_dir` (default: runs/NAME), skipping what is done; returns the content of report.json.

    `recipe` is a Recipe, the name of a shipped one or the path of a YAML file. With `force` stages whose recipe or data has changed
    are made again; without, that is an ArtifactError, which names them. Raises RecipeError, DataError, ModelError or PreflightError
    for what cannot work, before anything runs.
    """
    from trimlingual.pipeline import compress as run

    recipe = _recipe(recipe)
    return run(recipe, _folder(recipe, run_dir), force=force)


def pareto(
    recipe: Recipe | str, sizes: Sequence[str], run_dir: Path | str | None = None, *, force: bool = False
) -> dict[str, Any]:
    """Run a recipe for several sizes (such as "3.3 GB", of all that ships) over shared work in `run_dir` (default: runs/NAME).

    Returns the content of RUN/frontier/frontier.json. Raises as `compress` does, and ValueError for sizes that are no frontier.
    """
    from trimlingual.budgets import FRONTIER
    from trimlingual.budgets import pareto as run

    recipe = _recipe(recipe)
    folder = _folder(recipe, run_dir)
    run(recipe, sizes, folder, force=force)
    return json.loads((folder / FRONTIER / "frontier.json").read_text(encoding="utf-8"))


def evaluate(
    recipe: Recipe | str,
    model: Path | str,
    out: Path | str,
    run_dir: Path | str | None = None,
    *,
    force: bool = False,
) -> dict[str, Any]:
    """Translate the recipe's test clips with the model folder `model` and score them; returns the content of OUT/result.json.

    The clips are those of the run in `run_dir` (default: runs/NAME), which are prepared if they are not there. Raises LeakError when
    the model was trained on a test clip or chosen by it.
    """
    from trimlingual.evaluation.results import read_result
    from trimlingual.pipeline import run_stage

    recipe, folder = _recipe(recipe), Path(out)
    given = {"model": Path(model)}
    run_stage(recipe, _folder(recipe, run_dir), "evaluate base", replaced=given, out=folder, force=force)
    return read_result(folder)


def translate(
    model: Path | str,
    audio: Path | str | Sequence[Path | str],
    to: str | Sequence[str],
    recipe: Recipe | str | None = None,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Translate recordings of any length, or folders of them, into the languages `to`; one record per recording and language.

    A record has `audio`, `language`, `text`, `segments` with times, `duration_s`, `truncated` and, where the sound looks wrong,
    `warning`. One that cannot be read has `error`. `model` is a folder, a Hub id or `builtin:mini`. Prompt and decoding settings are
    those of `recipe`; by default those in the model's folder. Raises ModelError for what is no usable model.
    """
    from trimlingual.app.translate import translate_files

    files = [Path(each) for each in ([audio] if isinstance(audio, (str, Path)) else audio)]
    languages = [to] if isinstance(to, str) else list(to)
    return list(translate_files(model, files, languages, _recipe(recipe) if recipe else None, device))


def _recipe(given: Recipe | str) -> Recipe:
    return given if isinstance(given, Recipe) else load_recipe(given)


def _folder(recipe: Recipe, run_dir: Path | str | None) -> Path:
    return Path(run_dir) if run_dir else Path("runs") / recipe.name
