"""The command line: parse, call one function. No logic."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from trimlingual import cli_look, cli_use
from trimlingual.cli_use import COMPRESS, alone, out
from trimlingual.recipe import EXPORT_STAGES, Recipe, load_recipe
from trimlingual.run import interruptions, processes
from trimlingual.run.processes import is_main_process, num_processes, process_index
from trimlingual.run.progress import outlive_listeners, say, write_any_text

if TYPE_CHECKING:
    from trimlingual.preflight import Findings
    from trimlingual.run.fingerprint import HashCache
    from trimlingual.steps import Step

app = typer.Typer(
    name="trimlingual",
    help="Cut speech-translation models, keep the translation.",
    epilog="Example: trimlingual compress mini",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArg = Annotated[
    str, typer.Argument(help="Name of a shipped recipe (see `trimlingual recipes`) or path of a YAML file.")
]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Folder of the run. Default: runs/<recipe name>.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override: section.key=value. Can be repeated.")]
Force = Annotated[bool, typer.Option("--force", help="Make stages again whose recipe or data has changed.")]
ModelOption = Annotated[
    Path | None, typer.Option("--model", help="Start from this model folder instead of the run's own.")
]
Tune = Annotated[
    bool,
    typer.Option(
        "--tune",
        help="Try several learning rates and keep what the selection clips like best (compress: the teacher). In recipes: sweep.",
    ),
]
OutOption = Annotated[Path | None, typer.Option("--out", help="Write here instead of the run's own folder.")]


def _show_version(asked: bool) -> None:
    if asked:
        from trimlingual import __version__

        out.print(f"trimlingual {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Cut speech-translation models, keep the translation."""


@app.command(
    rich_help_panel=COMPRESS,
    epilog="Example: trimlingual compress qwen2-audio-en-de --run-dir runs/de --set rank.num_layers_to_remove=10",
)
def compress(
    recipe: RecipeArg = "mini",
    run_dir: RunDir = None,
    overrides: Overrides = None,
    force: Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the stages and estimates; run nothing.")] = False,
    tune: Tune = False,
) -> None:
    """Run a whole recipe: fine-tune, rank, prune, distill, recover, quantize, evaluate, export, report."""
    started = time.perf_counter()
    settings, folder = _load(recipe, run_dir, _tuned(recipe, overrides, tune))
    if dry_run:
        if alone("--dry-run"):
            _show_plan(settings, folder)
        return
    from trimlingual.pipeline import compress as run
    from trimlingual.report import result_table

    report = run(settings, folder, force=force)
    out.print(result_table(report))
    say(f"report: {folder / 'report' / 'report.html'}")
    exports = [str(folder / name.replace(" ", "-")) for name in _export_stages(settings)]
    last = {
        "report": str(folder / "report" / "report.json"),
        "export": exports[0] if exports else None,
        "exports": exports,
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(last))


@app.command(
    rich_help_panel=COMPRESS, epilog="Example: trimlingual pareto my.yaml --budget 3.9GB --budget 3.3GB --budget 2.7GB"
)
def pareto(
    recipe: RecipeArg,
    sizes: Annotated[list[str], typer.Option("--budget", help="Size of all that ships, in kB, MB or GB. Repeat it: at least two.")],
    run_dir: RunDir = None, overrides: Overrides = None, force: Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the stages and estimates; run nothing.")] = False,
) -> None:  # fmt: skip
    """Run a recipe for several sizes over shared work, and report the frontier of quality against size."""
    started = time.perf_counter()
    settings, folder = _load(recipe, run_dir, overrides)
    if dry_run:
        if alone("--dry-run"):
            _show_frontier(settings, sizes, folder)
        return
    from trimlingual.budgets import FRONTIER
    from trimlingual.budgets import pareto as run
    from trimlingual.report import frontier_table

    out.print(frontier_table(run(settings, sizes, folder, force=force)))
    say(f"frontier: {folder / FRONTIER / 'frontier.html'}")
    seconds = round(time.perf_counter() - started, 1)
    print(json.dumps({"frontier": str(folder / FRONTIER / "frontier.json"), "seconds": seconds}))


@app.command(
    rich_help_panel=COMPRESS, epilog="Example: trimlingual finetune my.yaml --run-dir runs/my --set finetune.epochs=5"
)
def finetune(
    recipe: RecipeArg, run_dir: RunDir = None, overrides: Overrides = None, force: Force = False,
    model: ModelOption = None, out_dir: OutOption = None,
    stage: Annotated[
        Literal["teacher", "recovered"], typer.Option(help="teacher (section finetune) or recovered (section recover).")
    ] = "teacher",
    tune: Tune = False,
) -> None:  # fmt: skip
    """Train the teacher, or recover a pruned student."""
    section = "recover" if stage == "recovered" else "finetune"
    _stage(recipe, run_dir, _tuned(recipe, overrides, tune, section), force, stage, out_dir, model=model)


@app.command(
    rich_help_panel=COMPRESS,
    epilog="Example: trimlingual rank my.yaml --model runs/my/teacher --set rank.strategy=block-influence",
)
def rank(
    recipe: RecipeArg, run_dir: RunDir = None, overrides: Overrides = None, force: Force = False,
    model: ModelOption = None, out_dir: OutOption = None,
) -> None:  # fmt: skip
    """Find the layers that matter least; writes plan.json."""
    _stage(recipe, run_dir, overrides, force, "rank", out_dir, model=model)


@app.command(
    rich_help_panel=COMPRESS,
    epilog="Example: trimlingual prune my.yaml --model runs/my/teacher --plan plan.json --out pruned",
)
def prune(
    recipe: RecipeArg, run_dir: RunDir = None, overrides: Overrides = None, force: Force = False,
    model: ModelOption = None, out_dir: OutOption = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="Apply this plan.json (yours or a search's).")] = None,
) -> None:  # fmt: skip
    """Apply a plan and prove the result."""
    _stage(recipe, run_dir, overrides, force, "pruned", out_dir, model=model, plan=plan)


@app.command(rich_help_panel=COMPRESS, epilog="Example: trimlingual distill my.yaml --run-dir runs/my")
def distill(
    recipe: RecipeArg, run_dir: RunDir = None, overrides: Overrides = None, force: Force = False,
    model: ModelOption = None, out_dir: OutOption = None,
) -> None:  # fmt: skip
    """Translate the training audio with the teacher, as training data for the student."""
    _stage(recipe, run_dir, overrides, force, "distilled", out_dir, teacher=model)


@app.command(
    rich_help_panel=COMPRESS, epilog="Example: trimlingual quantize my.yaml --model runs/my/recovered --out small"
)
def quantize(
    recipe: RecipeArg, run_dir: RunDir = None, overrides: Overrides = None, force: Force = False,
    model: ModelOption = None, out_dir: OutOption = None,
) -> None:  # fmt: skip
    """QLoRA: train an adapter on the 4-bit model, merge it, quantise again."""
    _stage(recipe, run_dir, overrides, force, "quantized", out_dir, model=model)


@app.command(
    "trim-vocab",
    rich_help_panel=COMPRESS,
    epilog="Example: trimlingual trim-vocab my.yaml --model runs/my/quantized --text de.txt --out small",
)
def trim_vocab(
    recipe: RecipeArg, run_dir: RunDir = None, overrides: Overrides = None, force: Force = False,
    model: ModelOption = None, out_dir: OutOption = None,
    text: Annotated[list[Path] | None, typer.Option("--text", help="Count tokens on this file too (one sentence a line).")] = None,
) -> None:  # fmt: skip
    """Keep only the tokens that the target languages and the prompts need."""
    files = [f"vocab.texts={json.dumps([str(path) for path in text])}"] if text else []
    _stage(recipe, run_dir, [*(overrides or ()), *files], force, "trimmed", out_dir, model=model)


@app.command(
    rich_help_panel=COMPRESS, epilog="Example: trimlingual evaluate my.yaml --model runs/my/pruned --out pruned-scores"
)
def evaluate(
    recipe: RecipeArg, run_dir: RunDir = None, overrides: Overrides = None, force: Force = False,
    model: ModelOption = None, out_dir: OutOption = None,
    name: Annotated[str, typer.Option(help="Which model of the run: base, teacher, pruned, recovered, quantized, trimmed.")] = "base",
) -> None:  # fmt: skip
    """Translate the test split, score it and measure the model."""
    _stage(recipe, run_dir, overrides, force, f"evaluate {name}", out_dir, model=model)


@app.command(
    rich_help_panel=COMPRESS, epilog="Example: trimlingual export my.yaml --model runs/my/quantized --out to-ship"
)
def export(
    recipe: RecipeArg, run_dir: RunDir = None, overrides: Overrides = None, force: Force = False,
    model: ModelOption = None, out_dir: OutOption = None,
    runtimes: Annotated[
        list[str] | None, typer.Option("--for", help="Runtime: transformers, vllm or gguf. Can be repeated. Default: the recipe's.")
    ] = None,
) -> None:  # fmt: skip
    """Write the folder that ships, with its model card, for each runtime; --out is then a folder of such folders."""
    overrides = [*(overrides or ()), *([f"export.for={json.dumps(runtimes)}"] if runtimes else [])]
    names = _export_stages(_load(recipe, run_dir, overrides)[0])
    for name in names:
        folder = out_dir / name.replace(" ", "-") if out_dir and len(names) > 1 else out_dir
        _stage(recipe, run_dir, overrides, force, name, folder, model=model)


app.registered_commands += [*cli_use.app.registered_commands, *cli_look.app.registered_commands]


def _load(recipe: str, run_dir: Path | None, overrides: list[str] | None) -> tuple[Recipe, Path]:
    settings = load_recipe(recipe, overrides or ())
    return settings, run_dir or Path("runs") / settings.name


TUNED = "[1.0e-5, 3.0e-5, 1.0e-4, 3.0e-4]"  # learning rates of --tune
LOOKS = 4  # at the selection clips in a training that --tune starts


def _tuned(recipe: str, overrides: list[str] | None, tune: bool, section: str = "finetune") -> list[str]:
    """The overrides that --tune stands for in a section that trains, before the user's own. ValueError where the section is null."""
    if not tune:
        return overrides or []
    if getattr(load_recipe(recipe, overrides or ()), section) is None:
        raise ValueError(f"--tune tries learning rates of the section {section}, but {section} is null: nothing trains")
    return [f"{section}.sweep={TUNED}", f"{section}.selection_checks={LOOKS}", *(overrides or [])]


def _export_stages(recipe: Recipe) -> list[str]:
    return [EXPORT_STAGES[runtime] for runtime in recipe.export.runtimes] if recipe.export else []


def _stage(
    recipe: str, run_dir: Path | None, overrides: list[str] | None, force: bool, name: str, out_dir: Path | None,
    **replaced: Path | None,
) -> None:  # fmt: skip
    """Bring one stage up to date; `replaced` are inputs by their role that are given instead of the run's own."""
    settings, folder = _load(recipe, run_dir, overrides)
    from trimlingual.pipeline import run_stage

    artifact = run_stage(settings, folder, name, force=force, replaced=replaced, out=out_dir)
    say(f"{artifact.stage}: {artifact.path} ({artifact.seconds:.1f} s)")
    print(
        json.dumps(
            {"stage": artifact.stage, "path": str(artifact.path), "info": _brief(artifact.info)}, ensure_ascii=False
        )
    )


def _brief(info: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in info.items() if not isinstance(value, list) or len(value) <= 64}


def _show_plan(recipe: Recipe, run_dir: Path) -> None:
    from trimlingual.pipeline import blocked, plan
    from trimlingual.preflight import check
    from trimlingual.run.fingerprint import HashCache

    remembered = HashCache(reading=False)
    steps = plan(recipe, run_dir, remembered)
    not_done = [step for step in steps if step.status() != "done"]
    found = check(recipe, run_dir, not_done, blocked(steps, recipe, run_dir))
    _show_steps(f"{recipe.name} in {run_dir}", {step.name: step for step in steps}, found, remembered)


def _show_frontier(recipe: Recipe, sizes: list[str], run_dir: Path) -> None:
    from trimlingual.budgets import budgets_of, findings, steps_of
    from trimlingual.run.fingerprint import HashCache

    remembered = HashCache(reading=False)
    budgets = budgets_of(recipe, sizes, run_dir, remembered)
    title = f"{recipe.name}, {len(budgets)} budgets in {run_dir}"
    _show_steps(title, steps_of(budgets), findings(budgets, run_dir), remembered)


def _show_steps(title: str, steps: Mapping[str, Step], found: Findings, remembered: HashCache) -> None:
    from trimlingual.estimate import Estimate, disk_peak, gb
    from trimlingual.pipeline import reading_notes, version_notes

    table = Table("stage", "folder", "status", "disk (estimate)", "memory (estimate)", title=title)
    for name, step in steps.items():
        guess, status = found.estimates.get(name, Estimate()), step.status()
        changes = f" ({'; '.join(step.changes()[:2])})" if status == "stale" else ""
        table.add_row(name, str(step.folder), status + changes, guess.disk_text, guess.memory_text)
    out.print(table)
    if peak := disk_peak(found.estimates, [name for name, step in steps.items() if step.status() != "done"]):
        say(f"disk: the run folder grows by {gb(peak)} at most (an estimate)")
    for note in (*found.notes, *version_notes(list(steps.values())), *reading_notes(remembered)):
        say(f"note: {note}")
    for problem in found.problems:
        say(f"problem: {problem}")
    if found.problems:
        raise ValueError(f"this run would not start: {len(found.problems)} problem(s)")


def main() -> None:
    """Entry point: errors of the input end with their message and exit code 1. TRIMLINGUAL_DEBUG=1 shows where they arose.

    A run that was stopped by SIGTERM ends with 143, by SIGINT (Ctrl-C) with 130, by SIGHUP (the terminal was closed) with 129.
    """
    interruptions.install()
    write_any_text()
    outlive_listeners()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' progress bars are for terminals
    # What libraries say to their own developers about each other is nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="(transformers|peft|accelerate)")
    if not is_main_process():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, results are told once
    try:
        app()
    except interruptions.Interrupted as stop:
        say(f"stopped: {stop}; the same command goes on from here")
        processes.end(stop.exit_code)
    except Exception as error:
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    """Say what went wrong, in one line if the user can do something about it. Of several processes one speaks."""
    try:
        if interruptions.asked():  # another process was quicker to go, or a library took the end for a failure
            raise interruptions.Interrupted
        processes.let_main_process_fail_first()
    except interruptions.Interrupted as stop:
        processes.end(stop.exit_code)
    who = "" if is_main_process() else f" in process {process_index()} of {num_processes()}"
    if (
        os.environ.get("TRIMLINGUAL_DEBUG")
        or not isinstance(error, (ValueError, OSError, RuntimeError))
        or not str(error)
    ):
        traceback.print_exception(error)
    else:
        Console(stderr=True).print(f"error{who}: {error}", markup=False, highlight=False, soft_wrap=True)
    processes.end(1)
