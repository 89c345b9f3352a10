"""The report of a run, or of several beside each other: JSON for programs, Markdown for a repository, a page to read and listen to.

The page is one file that loads nothing: style, charts and sound are inside it (sounds.py has the limit, beyond which sound lies beside
it). Everything in it that came from data is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from rich.table import Table

from trimlingual.recipe.languages import language_name
from trimlingual.report.collect import ReportError, collect, languages, merge
from trimlingual.report.figures import (
    STACK_LABEL_X,
    STACK_ROW,
    STACK_WIDTH,
    close_trades,
    removal_curve,
    stacks,
    trades,
    training_curves,
)
from trimlingual.report.frontier import budget_facts, budget_rows, merge_budgets
from trimlingual.report.heat_map import heat_maps
from trimlingual.report.listening import listen
from trimlingual.report.sounds import Sounds
from trimlingual.report.tables import (
    COST_HEADER,
    OUTCOME_HEADER,
    REHEARSAL,
    as_markdown,
    as_table,
    baseline,
    cost_rows,
    kept_text,
    markdown_cell,
    megabytes_text,
    number_text,
    outcome_row,
    outcome_text,
    outcomes,
    parameters_text,
    result_rows,
    result_table,
    result_table_markdown,
    seconds_text,
    shown_metric,
)
from trimlingual.run.artifacts import write_json, write_text

__all__ = [
    "ReportError", "collect", "frontier_table", "merge", "merge_budgets", "result_table", "result_table_markdown", "write_comparison",
    "write_frontier", "write_report",
]  # fmt: skip


def frontier_table(report: dict[str, Any]) -> Table:
    """The budgets of `write_frontier`'s report, for the terminal."""
    title = (
        f"{report['recipe']['name']}, on {report['split']['num_clips']} clips of the {report['split']['name']} split"
    )
    return as_table(*budget_rows(report), title, report["rehearsal"])


def write_report(run_dir: Path, out_dir: Path) -> dict[str, Any]:
    """Write report.json, report.md and report.html about the run in `run_dir`; return what report.json holds.

    Raises ReportError if the run holds no evaluation, or models evaluated on different splits.
    """
    report = collect(Path(run_dir))
    out_dir.mkdir(parents=True, exist_ok=True)
    context = _context({Path(run_dir).resolve().name: (Path(run_dir), report)}, report, out_dir)
    write_text(out_dir / "report.html", _templates().get_template("report.html.j2").render(context))
    write_text(out_dir / "report.md", _templates().get_template("report.md.j2").render(context))
    write_json(out_dir / "report.json", report)
    return report


def write_comparison(run_dirs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Write comparison.json and comparison.html about several runs, by name; return their merged report.

    Raises ReportError as `write_report` does, and for runs that were evaluated on different test splits.
    """
    reports = {name: collect(folder) for name, folder in run_dirs.items()}
    merged = merge(reports)
    _write_page(run_dirs, reports, merged, out_dir / "comparison.html")
    write_json(out_dir / "comparison.json", {"runs": reports})
    return merged


def _write_page(
    run_dirs: Mapping[str, Path], reports: Mapping[str, dict[str, Any]], merged: dict[str, Any], page: Path
) -> dict[str, Any]:
    """The page about several runs, by name; returns what its template is given."""
    page.parent.mkdir(parents=True, exist_ok=True)
    context = _context({name: (run_dirs[name], report) for name, report in reports.items()}, merged, page.parent)
    write_text(page, _templates().get_template("report.html.j2").render(context))
    return context


def write_frontier(run_dirs: Mapping[str, Path], out_dir: Path) -> None:
    """Write frontier.json, frontier.md and frontier.html about the runs of several budgets, by budget.

    Raises ReportError as `write_comparison` does, and for a run whose last model was not evaluated.
    """
    reports = {name: collect(folder) for name, folder in run_dirs.items()}
    merged = merge_budgets(reports)
    context = _write_page(run_dirs, reports, merged, out_dir / "frontier.html")
    write_text(out_dir / "frontier.md", _templates().get_template("frontier.md.j2").render(context))
    shared = [model for model in merged["models"] if not model.get("budget")]
    facts = {"recipe": reports[next(iter(reports))]["recipe"]["name"], "split": merged["split"], "models": shared}
    write_json(out_dir / "frontier.json", {**facts, "budgets": budget_facts(merged, reports), "notes": merged["notes"]})


def headline(report: dict[str, Any]) -> list[dict[str, str]]:
    """The last model of the run in four or five figures, each with what it is to be compared with."""
    models = {model["name"]: model for model in report["models"]}
    last = report["models"][-1]
    before = models.get("teacher", report["models"][0])
    other = before["name"] if before is not last else ""
    figures = [
        _figure(
            "on disk",
            f"{megabytes_text(last['disk_bytes'])} MB",
            before["disk_bytes"],
            last["disk_bytes"],
            "smaller",
            other,
        ),
        {"label": "parameters", "value": parameters_text(last["params"]), "note": _layers_note(last, before)},
    ]
    for code in languages(report):
        scores, metric = last["languages"].get(code, {}), shown_metric(report, code)
        kept = scores.get("retained")
        note = (
            f"keeps {kept_text(kept)} % of {baseline(report, code)}"
            if kept
            else f"BLEU {number_text(scores.get('bleu'), 1)}"
        )
        label = f"{language_name(code) or code}, {'chrF' if metric == 'chrf' else 'chrF++'}"
        figures.append({"label": label, "value": number_text(scores.get(metric), 1), "note": note})
    seconds = last["seconds_per_clip"]
    if seconds is not None:
        figures.append(_figure("a clip", seconds_text(seconds), before["seconds_per_clip"], seconds, "faster", other))
    return figures


def _figure(label: str, value: str, before: float | None, after: float, better: str, other: str) -> dict[str, str]:
    """A figure with `2.4 × smaller than teacher`, or what else is true."""
    note = ""
    if other and before and after:
        times = before / after
        worse, same = {"smaller": ("larger", "as large as"), "faster": ("slower", "as fast as")}[better]
        word, times = (better, times) if times >= 1 else (worse, 1 / times)
        note = f"{times:.1f} × {word} than {other}" if times >= 1.05 else f"{same} {other}"
    return {"label": label, "value": value, "note": note}


def _layers_note(last: dict[str, Any], before: dict[str, Any]) -> str:
    layers, whole = last["num_decoder_layers"], before["num_decoder_layers"]
    if layers is None:
        return ""
    return f"{layers} decoder layers" if layers == whole else f"{layers} of {whole} decoder layers"


def _context(runs: Mapping[str, tuple[Path, dict[str, Any]]], report: dict[str, Any], out_dir: Path) -> dict[str, Any]:
    """All that the templates use. `report` is the only run's, or all runs' merged."""
    header, rows = result_rows(report)
    of_budgets = any(model.get("budget") for model in report["models"])
    sounds = Sounds(out_dir)
    clips = listen(runs, sounds)
    shown = [_run(f"run-{number}", name, each) for number, (name, (_, each)) in enumerate(runs.items(), 1)]
    script = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return {
        "report": report,
        "runs": shown,
        "rehearsal_text": REHEARSAL,
        "header": header,
        "rows": rows,
        "cost_header": COST_HEADER,
        "cost_rows": cost_rows(report),
        "table_markdown": result_table_markdown(report),
        "trades": [
            *(close_trades(report) if of_budgets else []),
            *trades(report, [] if len(runs) == 1 or of_budgets else list(runs)),
        ],
        "frontier": budget_rows(report) if of_budgets else None,
        "has_plan": any(run["report"]["plan"] for run in shown),
        "has_training": any(run["training"] for run in shown),
        "has_parts": any(run["bars"] for run in shown),
        "exported": any(run["outcomes"] for run in shown),
        "stack_width": STACK_WIDTH,
        "stack_label_x": STACK_LABEL_X,
        "stack_row": STACK_ROW,
        "clips": clips,
        "sounds_note": sounds.note,
        "outcome_header": OUTCOME_HEADER,
        "language_name": language_name,
        "script": Markup(script),  # ours, and nothing of it is data
        "script_hash": f"sha256-{digest}",
    }


def _run(key: str, name: str, report: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of one run; `key` is for its elements' ids."""
    parts, bars = stacks(report["parts"])
    folder = shlex.quote(name)
    return {
        "name": name,
        "report": report,
        "headline": headline(report),
        "heat_maps": heat_maps(report, key),
        "removal_curve": removal_curve(report, key),
        "training": training_curves(report, key),
        "parts": parts,
        "bars": bars,
        "byte_rows": [[bar.label, *bar.cells] for bar in bars],
        "outcomes": [(outcome_row(outcome), outcome_text(outcome)) for outcome in outcomes(report)],
        "signatures": _signatures(report),
        "stages": [{**stage, "facts": _facts(stage["info"])} for stage in report["stages"]],
        "total_seconds": sum(stage["seconds"] for stage in report["stages"]),
        "origins": sorted({origin for stage in report["stages"] for origin in stage["origins"].values()}),
        "recipe_json": json.dumps(report["recipe"], indent=2, ensure_ascii=False),
        "commands": [f"trimlingual compress recipe.json --run-dir {folder}", f"trimlingual report {folder}"],
    }


def _signatures(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Every (language, metric, signature) that stands behind a number, once."""
    found = {
        (code, metric, signature)
        for model in report["models"]
        for code, scores in model["languages"].items()
        for metric, signature in scores["signatures"].items()
    }
    found |= {
        (code, "comet", name)
        for model in report["models"]
        for code, scores in model["languages"].items()
        for name in scores["comet"]
    }
    return sorted(found)


def _facts(info: dict[str, Any]) -> str:
    """The short facts of a stage in one line; the rest is in report.json."""
    facts = []
    for key, value in info.items():
        if key.endswith("_bytes") and value is not None:
            name = "size" if key == "num_bytes" else key.removesuffix("_bytes").replace("_", " ")
            facts.append(f"{name} {megabytes_text(value)} MB")
        elif isinstance(value, float):
            facts.append(f"{key.replace('_', ' ')} {value:.4g}")
        elif isinstance(value, (bool, int)) or (isinstance(value, str) and len(value) <= 40):
            facts.append(f"{key.replace('_', ' ')} {value}")
    return ", ".join(facts[:8])


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name is not None and name.endswith((".html.j2", ".svg.j2")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(cell=markdown_cell, seconds=seconds_text, markdown=as_markdown)
    return environment
