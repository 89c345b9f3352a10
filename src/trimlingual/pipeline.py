"""THE MAIN PATH: the stages of a compression run, in order.

    data -> teacher -> rank -> pruned -> distilled -> recovered -> quantized -> evaluations -> exported (for each runtime) -> report

and, if the recipe trims the vocabulary, `trimmed` before the teacher or after all other models.
Every stage is a Step (steps.py): where it writes, the settings and inputs that decide its output, and the work. A step whose
artefact is there with the same fingerprint is skipped; one that was killed goes on. Fingerprints chain (a step's inputs are the
fingerprints of the steps before it), so what a changed recipe invalidates is known before anything runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimlingual.preflight import Findings, check
from trimlingual.recipe import Recipe
from trimlingual.run.artifacts import (
    Artifact,
    ArtifactError,
    as_json,
    find_artifact,
    machine,
    produce,
    settle,
    write_json,
)
from trimlingual.run.fingerprint import HashCache, hash_file
from trimlingual.run.handed_on import TEACHER_TOKENS, discard
from trimlingual.run.ownership import ARTIFACT_FILE, WORK_FILE, read_record
from trimlingual.run.processes import gather, is_main_process
from trimlingual.run.progress import say
from trimlingual.step_inputs import SourceRef, plan_ref
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

# Libraries whose versions can change results a little; a finished stage is not stale for them, but it is said.
MATTERS = (
    "torch", "transformers", "peft", "accelerate", "bitsandbytes", "flashoptim", "compressed-tensors", "sacrebleu", "numpy",
)  # fmt: skip
OPTIONAL_ROLES = ("baseline", "evaluation")  # an evaluation without a comparison and an export without scores are whole


def compress(recipe: Recipe, run_dir: Path, force: bool = False, others: Sequence[Path] = ()) -> dict[str, Any]:
    """Run the whole recipe in `run_dir`, skipping what is done. Returns the report (the content of report.json).

    Raises ArtifactError, naming the stages, when the recipe has changed since `run_dir` was made; with `force` these are made again.
    So it does, with `force` too, when something of the user's stands where a stage would write. `others` are folders of searches
    whose scores are taken where they hold for this one too.
    """
    steps = plan(recipe, run_dir, others=others)
    not_done = [step for step in steps if step.status() != "done"]
    check(recipe, run_dir, not_done, blocked(steps, recipe, run_dir)).refuse()
    refuse_stale(steps, run_dir, force)
    for note in version_notes(steps):
        say(note)
    write_recipe(recipe, run_dir)
    for number, step in enumerate(steps, 1):
        if gather(step.status())[0] == "done":  # of several processes the main one decides
            say(f"[{number}/{len(steps)}] {step.name}: already done")
            continue
        say(f"[{number}/{len(steps)}] {step.name}")
        artifact = step.run(force=force or step.derived)
        say(f"[{number}/{len(steps)}] {step.name}: {artifact.seconds:.1f} s")
    if is_main_process():
        discard(run_dir / TEACHER_TOKENS)
    return json.loads((run_dir / "report" / "report.json").read_text(encoding="utf-8"))


def refuse_stale(steps: Sequence[Step], run_dir: Path, force: bool) -> None:
    """ArtifactError where something of other settings would be made again, unless `force`."""
    for step in steps:
        settle(step.folder)
    stale = [step for step in steps if step.status() == "stale"]
    if not force and not all(step.derived for step in stale):
        lines = [f"  {step.name}: {'; '.join(step.changes()[:4])}" for step in stale]
        raise ArtifactError(
            f"the recipe, its data or its plan changed since {run_dir} was made; it invalidates {len(stale)} stage(s):\n"
            + "\n".join(lines)
            + "\nUse --force to make these again, or another --run-dir to keep both."
        )


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
    step = replace(step, inputs=inputs, folder=out or step.folder)
    makers = {other.folder: other for other in steps.values()}
    read = [maker for ref in inputs.values() if ref.path and (maker := makers.get(ref.path)) and maker.name == "data"]
    not_done = [each for each in (*read, step) if each.status() != "done"]
    check(recipe, run_dir, not_done, [problem for problem in (step.problem(force), step.damage()) if problem]).refuse()
    for role, ref in list(inputs.items()):
        maker = makers.get(ref.path) if ref.path else None
        if maker is None or maker.status() == "done":
            continue
        if role in OPTIONAL_ROLES:
            say(f"{maker.name!r} is {maker.status()}: {name!r} goes without it")
            del inputs[role]
        elif maker.name == "data":
            Findings(blocked([maker], recipe, run_dir)).refuse()
            write_recipe(recipe, run_dir)
            maker.run(force=force)
        else:
            raise ArtifactError(
                f"stage {name!r} needs the {role} in {ref.folder}, which is {maker.status()}; run {maker.name!r} first"
            )
    artifact = replace(step, inputs=inputs).run(force=force)
    if is_main_process() and all(steps[n].status() == "done" for n in ("recovered", "quantized") if n in steps):
        discard(run_dir / TEACHER_TOKENS)
    return artifact


def write_report(run_dir: Path, out: Path | None = None) -> dict[str, Any]:
    """The report of what a run has so far, in its own folder or in `out`. Returns the content of report.json."""
    from trimlingual import report

    folder = out or run_dir / "report"
    existing = find_artifact(folder)
    if existing and existing.stage != "report":
        raise ArtifactError(f"{folder} holds what stage {existing.stage!r} made, not a report; choose another folder")
    found = {str(path.relative_to(run_dir)): find_artifact(path) for path in stage_folders(run_dir)}
    inputs = {role: artifact.fingerprint for role, artifact in found.items() if artifact and artifact.stage != "report"}
    name = report.collect(run_dir)["recipe"]["name"]

    def work(partial: Path) -> dict[str, Any]:
        report.write_report(run_dir, partial)
        return {}

    produce(folder, "report", {"recipe": name}, inputs, work, force=True)
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def write_comparison(run_dirs: Sequence[Path], out: Path) -> dict[str, Any]:
    """The same page for several runs, in `out`. Returns their reports, merged. ValueError where there is nothing to compare."""
    from trimlingual import report

    named = _names(run_dirs)
    inputs = {
        f"{name}/{path.relative_to(folder)}": artifact.fingerprint
        for name, folder in named.items()
        for path in stage_folders(folder)
        if (artifact := find_artifact(path)) and artifact.stage != "report"
    }
    report.merge(
        {name: report.collect(folder) for name, folder in named.items()}
    )  # says what is missing before anything is made
    existing = find_artifact(out)
    if existing and existing.stage != "comparison":
        raise ArtifactError(f"{out} holds what stage {existing.stage!r} made, not a comparison; choose another folder")
    merged: dict[str, Any] = {}

    def work(partial: Path) -> dict[str, Any]:
        merged.update(report.write_comparison(named, partial))
        return {}

    produce(out, "comparison", {"runs": list(named)}, inputs, work, force=True)
    return merged


def _names(run_dirs: Sequence[Path]) -> dict[str, Path]:
    """Each run by its folder's name; by as much of its path as tells it from the others where names are equal."""
    folders = [folder.resolve() for folder in run_dirs]
    if len(set(folders)) < 2 or len(set(folders)) < len(folders):
        raise ValueError(f"compare needs at least two different run folders, not {', '.join(map(str, run_dirs))}")
    for length in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, run_dirs))


def plan(recipe: Recipe, run_dir: Path, remembered: HashCache | None = None, others: Sequence[Path] = ()) -> list[Step]:
    """The steps of a run, in order. Nothing is run; contents are read (or only looked up in `remembered`) once they are asked for."""
    remembered = remembered or HashCache()
    steps: dict[str, Step] = {}

    def add(step: Step) -> Step:
        steps[step.name] = step
        return step

    base = base_ref(recipe, remembered)
    data = add(data_step(recipe, base, run_dir / "data", remembered))
    models: dict[str, Ref] = {"base": base}
    start = base  # what everything below is made from
    if recipe.vocab and recipe.vocab.when == "before":
        start = models["trimmed"] = add(vocab_step(recipe, base, data.ref, run_dir / "trimmed", remembered)).ref
    teacher, student, distilled, planned = start, start, None, None
    if recipe.finetune:
        step = finetune_step("teacher", recipe, recipe.finetune, start, data.ref, None, None, run_dir / "teacher")
        teacher = student = models["teacher"] = add(step).ref
    judge = list(models)[-1]  # without fine-tuning the model is its own teacher
    if recipe.rank:
        ranked = add(rank_step(recipe, teacher, data.ref, run_dir / "rank", others))
        found = plan_ref(ranked.ref)
        planned = found if recipe.rank.budget else None
        student = models["pruned"] = add(prune_step(recipe, teacher, found, run_dir / "pruned")).ref
    if recipe.distill:
        distilled = add(distill_step(recipe, teacher, data.ref, run_dir / "distilled")).ref
    if recipe.recover:
        step = finetune_step(
            "recovered", recipe, recipe.recover, student, data.ref, distilled, teacher, run_dir / "recovered"
        )
        student = models["recovered"] = add(step).ref
    if recipe.quantize:
        source = start if recipe.quantize.start == "base" else models[recipe.quantize.start]
        student = models["quantized"] = add(
            quantize_step(recipe, source, data.ref, distilled, teacher, planned, run_dir / "quantized")
        ).ref
    if recipe.vocab and recipe.vocab.when == "after":
        student = models["trimmed"] = add(vocab_step(recipe, student, data.ref, run_dir / "trimmed", remembered)).ref
    evaluated: dict[str, Ref] = {}
    for name in models:  # in the order they are made: what comes after the teacher is compared with it
        if name in recipe.evaluate.models:
            baseline = evaluated.get(judge)
            step = evaluate_step(name, recipe, models[name], data.ref, baseline, run_dir / "evaluations" / name)
            evaluated[name] = add(step).ref
    last = list(models)[-1]
    for runtime in recipe.export.runtimes if recipe.export else ():
        add(export_step(recipe, runtime, student, evaluated.get(last), data.ref, run_dir))
    add(report_step(recipe, run_dir, [step.ref for step in steps.values()]))
    return list(steps.values())


def blocked(steps: Sequence[Step], recipe: Recipe, run_dir: Path) -> list[str]:
    """All places where a run would write but something of the user's stands, or read what was changed; empty if it may run."""
    problems = [problem for step in steps for problem in (step.problem(), step.damage())]
    path = run_dir / "recipe.json"
    if path.exists() and not _is_own_recipe(path, recipe):
        problems.append(
            f"{path} was not written by this tool, which needs that name; move it away or choose another --run-dir"
        )
    return [problem for problem in dict.fromkeys(problems) if problem]


def _is_own_recipe(path: Path, recipe: Recipe) -> bool:
    """Whether recipe.json is as this tool writes it, beside something that it made; or is what it would write."""
    try:
        text = path.read_text(encoding="utf-8")
        as_written = text == as_json(json.loads(text))
    except (OSError, ValueError):
        return False
    return text == as_json(recipe.model_dump()) or (as_written and any(stage_folders(path.parent)))


def stage_folders(run_dir: Path) -> Iterator[Path]:
    """Folders of a run in which this tool has finished or begun something."""
    for path in sorted([*run_dir.glob("*/"), *run_dir.glob("evaluations/*/")]):
        if any(read_record(path / mark) for mark in (ARTIFACT_FILE, WORK_FILE)):
            yield path


def version_notes(steps: Sequence[Step]) -> list[str]:
    """One line if finished stages were made with other versions of the libraries that matter to results than there are now."""
    now = machine()["versions"]
    found: dict[str, list[str]] = {}
    for step in steps:
        existing = find_artifact(step.folder) if not step.problem() else None
        made = existing.machine.get("versions", {}) if existing else {}
        changed = [
            f"{name} {made[name]} -> {now.get(name, 'none')}"
            for name in MATTERS
            if made.get(name, now.get(name)) != now.get(name)
        ]
        if changed:
            found.setdefault(", ".join(changed), []).append(step.name)
    said = "; ".join(f"{', '.join(names)} ({changed})" for changed, names in found.items())
    notes = [f"made with other versions than are installed now, and kept: {said}"] if said else []
    sources = (ref for step in steps for ref in step.inputs.values() if isinstance(ref, SourceRef))
    if moved := [ref.moved for ref in sources if ref.moved]:
        notes.append(f"this machine has other commits than the data were made from, which are kept: {', '.join(moved)}")
    return notes


def reading_notes(remembered: HashCache) -> list[str]:
    """What a dry run would have had to read or download to know every stage's status."""
    notes = []
    if remembered.absent:
        notes.append(f"not on this machine, so not compared: {', '.join(dict.fromkeys(remembered.absent))}")
    if remembered.unread:
        size = sum(remembered.unread.values()) / 1e9
        notes.append(f"not read by a dry run, so not compared: {len(remembered.unread)} files, {size:.2f} GB")
    return notes


def write_recipe(recipe: Recipe, run_dir: Path) -> None:
    """Keep the recipe, with its overrides, beside what it made."""
    if is_main_process():
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(run_dir / "recipe.json", recipe.model_dump())
