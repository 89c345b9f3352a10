"""The report of a run: report.json for programs, report.md for a repository, report.html to read and listen to.

The page is one file that loads nothing: style, charts and sound are inside it. Everything in it that came from data is
escaped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2

from trimlingual.recipe import EXPORT_STAGES
from trimlingual.recipe.languages import language_name
from trimlingual.report.charts import heat_maps, panels
from trimlingual.report.collect import ReportError, collect, examples, languages
from trimlingual.report.tables import (
    COST_HEADER,
    NOTHING,
    OUTCOME_HEADER,
    REHEARSAL,
    baseline,
    cost_rows,
    kept_text,
    markdown_cell,
    megabytes_text,
    number_text,
    outcome_row,
    outcome_text,
    parameters_text,
    result_rows,
    result_table,
    result_table_markdown,
    seconds_text,
    shown_metric,
)
from trimlingual.run.artifacts import write_json, write_text

__all__ = ["ReportError", "collect", "result_table", "result_table_markdown", "write_report"]


def write_report(run_dir: Path, out_dir: Path) -> dict[str, Any]:
    """Write report.json, report.md and report.html about the run in `run_dir`; return what report.json holds.

    Raises ReportError if the run holds no evaluation, or models evaluated on different splits.
    """
    report = collect(Path(run_dir))
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    templates = _templates()
    context = _context(Path(run_dir), report)
    write_text(out_dir / "report.html", templates.get_template("report.html.j2").render(context))
    write_text(out_dir / "report.md", templates.get_template("report.md.j2").render(context))
    write_json(out_dir / "report.json", report)
    return report


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


def _context(run_dir: Path, report: dict[str, Any]) -> dict[str, Any]:
    """All that the templates use."""
    header, rows = result_rows(report)
    return {
        "report": report,
        "recipe_json": json.dumps(report["recipe"], indent=2, ensure_ascii=False),
        "rehearsal_text": REHEARSAL,
        "headline": headline(report),
        "header": header,
        "rows": rows,
        "cost_header": COST_HEADER,
        "cost_rows": cost_rows(report),
        "table_markdown": result_table_markdown(report),
        "panels": panels(report),
        "heat_maps": heat_maps(report),
        "examples": examples(run_dir, report),
        "signatures": _signatures(report),
        "outcome_header": OUTCOME_HEADER,
        "outcomes": [(outcome_row(outcome), outcome_text(outcome)) for outcome in _outcomes(report)],
        "stages": [{**stage, "facts": _facts(stage["info"])} for stage in report["stages"]],
        "total_seconds": sum(stage["seconds"] for stage in report["stages"]),
        "language_name": language_name,
    }


def _outcomes(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What ships. An export of an earlier version says only what was proven."""
    infos = [stage["info"] for stage in report["stages"] if stage["stage"] in EXPORT_STAGES.values()]
    earlier = {"runtime": "transformers", "format": NOTHING, "disk_bytes": None}
    return [
        outcome
        for info in infos
        for outcome in info.get("outcomes", [earlier | {"proof": info["proof"]}] if info.get("proof") else [])
    ]


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
        if isinstance(value, float):
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
    environment.filters.update(cell=markdown_cell, seconds=seconds_text)
    return environment
