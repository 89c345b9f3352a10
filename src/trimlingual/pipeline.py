"""THE MAIN PATH: the stages of a compression run, in order.

    data -> teacher -> rank -> pruned -> distilled -> recovered -> quantized -> evaluations -> exported -> report

and, if the recipe trims the vocabulary, `trimmed` before the teacher or after all other models.
Every stage is a Step (steps.py): where it writes, the settings and inputs that decide its output, and the work. A step whose
artefact is there with the same fingerprint is skipped; one that was killed goes on. Fingerprints chain (a step's inputs are the
fingerprints of the steps before it), so what a changed recipe invalidates is known before anything runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimlingual.artifacts import Artifact, ArtifactError, hash_file, write_json
from trimlingual.processes import is_main_process
from trimlingual.progress import say
from trimlingual.recipe import Recipe
from trimlingual.steps import (
    Ref,
    Step,
    base_ref,
    data_step,
    distill_step,
    evaluate_step,
    export_step,
    finetune_step,
    model_ref,
    prune_step,
    quantize_step,
    rank_step,
    report_step,
    vocab_step,
)

OPTIONAL_ROLES = ("baseline", "evaluation")  # an evaluation without a comparison and an export without scores are whole


def compress(recipe: Recipe, run_dir: Path, force: bool = False) -> dict[str, Any]:
    """Run the whole recipe in `run_dir`, skipping what is done. Returns the report (the content of report.json).

    Raises ArtifactError, naming the stages, when the recipe has changed since `run_dir` was made; with `force` these are made again.
    """
    steps = plan(recipe, run_dir)
    stale = [step for step in steps if step.status() == "stale"]
    if stale and not force:
        lines = [f"  {step.name}: {'; '.join(step.changes()[:4])}" for step in stale]
        raise ArtifactError(
            f"the recipe or its data changed since {run_dir} was made; it invalidates {len(stale)} finished stage(s):\n"
            + "\n".join(lines)
            + "\nUse --force to make these again, or another --run-dir to keep both."
        )
    write_recipe(recipe, run_dir)
    for number, step in enumerate(steps, 1):
        if step.status() == "done":
            say(f"[{number}/{len(steps)}] {step.name}: already done")
            continue
        say(f"[{number}/{len(steps)}] {step.name}")
        artifact = step.run(force=force)
        say(f"[{number}/{len(steps)}] {step.name}: {artifact.seconds:.1f} s")
    return json.loads((run_dir / "report" / "report.json").read_text(encoding="utf-8"))


def run_stage(
    recipe: Recipe,
    run_dir: Path,
    name: str,
    *,
    force: bool = False,
    replaced: Mapping[str, Path | None] | None = None,
    out: Path | None = None,
) -> Artifact:
    """Bring one stage of a run up to date; what it reads must be there, but for the data, which is prepared.

    `replaced` gives another folder (or plan file) for an input role; `out` another folder to write to. ArtifactError names the stage
    to run first when an input is missing.
    """
    steps = {step.name: step for step in plan(recipe, run_dir)}
    if name not in steps:
        raise ValueError(
            f"recipe {recipe.name!r} has no stage {name!r}; it has: {', '.join(steps)} (a null section leaves its stage out)"
        )
    step = steps[name]
    inputs = dict(step.inputs)
    for role, folder in (replaced or {}).items():
        if folder is not None:
            if not folder.exists():
                raise ArtifactError(f"{folder} does not exist (given as the {role} of stage {name!r})")
            inputs[role] = model_ref(folder) if folder.is_dir() else Ref(folder, hash_file(folder)[:16])
    makers = {other.folder: other for other in steps.values()}
    for role, ref in list(inputs.items()):
        maker = makers.get(ref.path) if ref.path else None
        if maker is None or maker.status() == "done":
            continue
        if role in OPTIONAL_ROLES:
            say(f"{maker.name!r} is {maker.status()}: {name!r} goes without it")
            del inputs[role]
        elif maker.name == "data":
            write_recipe(recipe, run_dir)
            maker.run(force=force)
        else:
            raise ArtifactError(
                f"stage {name!r} needs the {role} in {ref.folder}, which is {maker.status()}; run {maker.name!r} first"
            )
    step = replace(step, inputs=inputs, folder=out or step.folder)
    return step.run(force=force)


def plan(recipe: Recipe, run_dir: Path) -> list[Step]:
    """The steps of a run, in order. Nothing is run; only the base model's and the data's identities are read."""
    steps: dict[str, Step] = {}

    def add(step: Step) -> Step:
        steps[step.name] = step
        return step

    base = base_ref(recipe)
    data = add(data_step(recipe, base, run_dir / "data"))
    models: dict[str, Ref] = {"base": base}
    start = base  # what everything below is made from
    if recipe.vocab and recipe.vocab.when == "before":
        start = models["trimmed"] = add(vocab_step(recipe, base, data.ref, run_dir / "trimmed")).ref
    teacher, student, distilled = start, start, None
    if recipe.finetune:
        step = finetune_step("teacher", recipe, recipe.finetune, start, data.ref, None, run_dir / "teacher")
        teacher = student = models["teacher"] = add(step).ref
    if recipe.rank:
        ranked = add(rank_step(recipe, teacher, data.ref, run_dir / "rank"))
        student = models["pruned"] = add(prune_step(recipe, teacher, ranked.ref, run_dir / "pruned")).ref
    if recipe.distill:
        distilled = add(distill_step(recipe, teacher, data.ref, run_dir / "distilled")).ref
    if recipe.recover:
        step = finetune_step("recovered", recipe, recipe.recover, student, data.ref, distilled, run_dir / "recovered")
        student = models["recovered"] = add(step).ref
    if recipe.quantize:
        source = start if recipe.quantize.start == "base" else models[recipe.quantize.start]
        student = models["quantized"] = add(
            quantize_step(recipe, source, data.ref, distilled, run_dir / "quantized")
        ).ref
    if recipe.vocab and recipe.vocab.when == "after":
        student = models["trimmed"] = add(vocab_step(recipe, student, data.ref, run_dir / "trimmed")).ref
    evaluated: dict[str, Ref] = {}
    for name in models:  # in the order they are made: what comes after the teacher is compared with it
        if name in recipe.evaluate.models:
            baseline = evaluated.get("teacher")
            step = evaluate_step(name, recipe, models[name], data.ref, baseline, run_dir / "evaluations" / name)
            evaluated[name] = add(step).ref
    last = list(models)[-1]
    add(export_step(recipe, student, evaluated.get(last), run_dir / "exported"))
    add(report_step(recipe, run_dir, [step.ref for step in steps.values()]))
    return list(steps.values())


def write_recipe(recipe: Recipe, run_dir: Path) -> None:
    """Keep the recipe, with its overrides, beside what it made."""
    if is_main_process():
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(run_dir / "recipe.json", recipe.model_dump())
