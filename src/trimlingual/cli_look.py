"""The command line of what looks at runs, recipes and the machine: parse, call one function. No logic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from trimlingual.cli_use import LOOK, out
from trimlingual.recipe import Recipe, list_recipes, load_recipe
from trimlingual.run.progress import say

app = typer.Typer()


@app.command(rich_help_panel=LOOK, epilog="Example: trimlingual report runs/mini")
def report(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out_dir: Annotated[Path | None, typer.Option("--out", help="Default: <run>/report.")] = None,
) -> None:
    """Write report.json, report.md and report.html from what a run has so far, and show the table."""
    from trimlingual.pipeline import write_report
    from trimlingual.report import result_table

    folder = out_dir or run_dir / "report"
    out.print(result_table(write_report(run_dir, folder)))
    say(f"report: {folder / 'report.html'}")


@app.command(
    rich_help_panel=LOOK, epilog="Example: trimlingual compare runs/small runs/smaller --out small-and-smaller"
)
def compare(
    run_dirs: Annotated[list[Path], typer.Argument(help="Folders of runs that were evaluated on one test split.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder of the page.")] = Path("comparison"),
) -> None:
    """Write the report's page for several runs beside each other, and show the table."""
    from trimlingual.pipeline import write_comparison
    from trimlingual.report import result_table

    out.print(result_table(write_comparison(run_dirs, out_dir)))
    say(f"comparison: {out_dir / 'comparison.html'}")


@app.command(rich_help_panel=LOOK, epilog="Example: trimlingual doctor --json")
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="The same facts as one JSON object.")] = False,
) -> None:
    """Say what this machine can do, which recipes fit it, and what to install for more."""
    from trimlingual.app.doctor import examine, lines

    facts = examine()
    print(json.dumps(facts, ensure_ascii=False) if as_json else "\n".join(lines(facts)))


@app.command(rich_help_panel=LOOK, epilog="Example: trimlingual recipes")
def recipes(
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of a recipe instead, for editors.")
    ] = False,
) -> None:
    """List the shipped recipes."""
    if schema:
        print(json.dumps(Recipe.model_json_schema(), indent=2, ensure_ascii=False))
        return
    table = Table("recipe", "what it does", "base model")
    for name in list_recipes():
        settings = load_recipe(name)
        table.add_row(name, settings.description, settings.model.base)
    out.print(table)
