"""Several budgets over shared work: a run for each, and the frontier of their models.

    RUN/data, teacher, distilled, evaluations/teacher ...   what does not depend on the size, made once
    RUN/budgets/4.5MB/      a run of that size as `compress` makes it, in which the shared stages are links
    RUN/frontier/           table and charts

The smallest budget comes first: one that cannot be reached is refused before the others are searched, and its search goes through the
states of the larger ones, which take its scores as long as their choices are the same (search/budget.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimlingual.pipeline import blocked, compress, plan, refuse_stale, stage_folders
from trimlingual.preflight import Findings, check
from trimlingual.recipe import Recipe
from trimlingual.recipe.search import BudgetSettings
from trimlingual.resources import disk_problems
from trimlingual.run.artifacts import ArtifactError, find_artifact, produce, trespass
from trimlingual.run.fingerprint import HashCache
from trimlingual.run.processes import is_main_process, wait_for_everyone
from trimlingual.run.progress import say
from trimlingual.steps import Step

FRONTIER = "frontier"


@dataclass(frozen=True)
class Budget:
    """A size, the recipe for it and the folder of its run. `steps` are its own, `shared` those that the size does not change."""

    name: str
    recipe: Recipe
    folder: Path
    shared: list[Step]
    steps: list[Step]


def pareto(recipe: Recipe, sizes: Sequence[str], run_dir: Path, force: bool = False) -> dict[str, Any]:
    """Run the recipe for each size in `run_dir`, skipping what is done. Returns the merged report of their last models.

    Raises ArtifactError as `compress` does, for all budgets before anything runs, and ValueError for sizes that are no frontier.
    """
    budgets = budgets_of(recipe, sizes, run_dir)
    findings(budgets, run_dir).refuse()
    for budget in budgets:
        refuse_stale([*budget.shared, *budget.steps], budget.folder, force)
    for number, budget in enumerate(budgets, 1):
        say(f"budget {number} of {len(budgets)}: {budget.name}, in {budget.folder}")
        _link(budget, run_dir)
        searches = [folder / "rank" for folder in sorted((run_dir / "budgets").iterdir()) if folder != budget.folder]
        compress(budget.recipe, budget.folder, force=force, others=searches)
    return write_frontier(budgets, run_dir / FRONTIER)


def budgets_of(
    recipe: Recipe, sizes: Sequence[str], run_dir: Path, remembered: HashCache | None = None
) -> list[Budget]:
    """The budgets, the smallest first. ValueError for a size that cannot be read or stands there twice, and for fewer than two."""
    remembered = remembered or HashCache()
    if "quantized" not in recipe.evaluate.models:
        raise ValueError("a frontier is of evaluated models: add quantized to evaluate.models")
    sized: dict[int, Recipe] = {}
    for size in sizes:
        of_size = recipe.with_budget(size)
        num_bytes = _settings(of_size).num_bytes
        if num_bytes in sized:
            raise ValueError(f"--budget {size} is given twice")
        sized[num_bytes] = of_size
    if len(sized) < 2:
        raise ValueError(
            "a frontier needs at least two sizes: --budget 4.5MB --budget 4MB; for one, set rank.budget and compress"
        )
    return [_budget(of_size, run_dir, remembered) for _, of_size in sorted(sized.items(), key=lambda each: each[0])]


def _settings(recipe: Recipe) -> BudgetSettings:
    assert recipe.rank is not None
    assert recipe.rank.budget is not None
    return recipe.rank.budget


def _budget(of_size: Recipe, run_dir: Path, remembered: HashCache) -> Budget:
    name = _settings(of_size).size.replace(" ", "")
    folder = run_dir / "budgets" / name
    shared: list[Step] = []
    own: list[Step] = []
    for step in plan(of_size, folder, remembered):
        read = {ref.path for ref in step.inputs.values()}
        if step.name == "rank" or any(other.folder in read for other in own):
            own.append(step)
        else:
            shared.append(step)
    return Budget(name, of_size, folder, [replace(s, folder=_shared(s, folder, run_dir)) for s in shared], own)


def _shared(step: Step, folder: Path, run_dir: Path) -> Path:
    return run_dir / step.folder.relative_to(folder)


def _link(budget: Budget, run_dir: Path) -> None:
    """Let the budget's run find the shared stages, made or not yet, where `compress` looks for them."""
    for step in budget.shared if is_main_process() else ():
        place = budget.folder / step.folder.relative_to(run_dir)
        if not os.path.lexists(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(os.path.relpath(step.folder, place.parent), target_is_directory=True)
    wait_for_everyone()


def findings(budgets: Sequence[Budget], run_dir: Path) -> Findings:
    """What can be known not to work, of all budgets; estimates are by stage, of a budget's own as `BUDGET: STAGE`."""
    found = Findings()
    if problem := trespass(run_dir / FRONTIER, FRONTIER, {}, {}, force=True):
        found.problems.append(problem)
    for number, budget in enumerate(budgets):
        steps = [*([] if number else budget.shared), *budget.steps]
        # Where the links are to be, too, nothing of the user's may stand.
        places = [replace(s, folder=budget.folder / s.folder.relative_to(run_dir)) for s in budget.shared]
        problems = blocked([*places, *steps], budget.recipe, budget.folder)
        not_done = [step for step in steps if step.status() != "done"]
        checked = check(budget.recipe, run_dir, not_done, problems)
        own = {step.name for step in budget.steps}
        found.problems += [problem for problem in checked.problems if problem not in found.problems]
        found.notes += [note for note in checked.notes if note not in found.notes]
        found.estimates |= {f"{budget.name}: {k}" if k in own else k: guess for k, guess in checked.estimates.items()}
    if not found.problems:
        names = [name for name, step in steps_of(budgets).items() if step.status() != "done"]
        found.problems += disk_problems(run_dir, names, found.estimates)
    return found


def steps_of(budgets: Sequence[Budget]) -> dict[str, Step]:
    """All stages in the order in which they run; a budget's own as `BUDGET: STAGE`."""
    steps = {step.name: step for step in budgets[0].shared}
    return steps | {f"{budget.name}: {step.name}": step for budget in budgets for step in budget.steps}


def write_frontier(budgets: Sequence[Budget], out: Path) -> dict[str, Any]:
    """The frontier of runs that are done, in `out`. Returns their merged report."""
    from trimlingual import report

    existing = find_artifact(out)
    if existing and existing.stage != FRONTIER:
        raise ArtifactError(f"{out} holds what stage {existing.stage!r} made, not a frontier; move it away")
    folders = {budget.name: budget.folder for budget in reversed(budgets)}
    inputs = {
        f"{name}/{path.relative_to(folder)}": artifact.fingerprint
        for name, folder in folders.items()
        for path in stage_folders(folder)
        if (artifact := find_artifact(path)) and artifact.stage != "report"
    }

    def work(partial: Path) -> dict[str, Any]:
        report.write_frontier(folders, partial)
        return {}

    produce(out, FRONTIER, {"budgets": list(folders)}, inputs, work, force=True)
    return report.merge_budgets({name: report.collect(folder) for name, folder in folders.items()})
