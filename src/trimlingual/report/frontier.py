"""The frontier of several budgets: what each size keeps, as one report for the page's tables and charts, and as a table of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from trimlingual.recipe import ROW_PARTS
from trimlingual.report.collect import ReportError, languages, merge, notes_on
from trimlingual.report.tables import (
    METRIC_NAMES,
    NOTHING,
    baseline,
    kept_text,
    number_text,
    shown_metric,
)

SHARED_MODELS = ("base", "trimmed", "teacher")  # what no budget changes
LAST_MODEL = "quantized"  # what a budget is for


def merge_budgets(reports: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The reports of one recipe's runs, by budget, as one: the models that they share, and of each its last, called as the budget.

    ReportError if a run did not evaluate its last model, or another test split than the others.
    """
    merged = merge(reports)
    for name, report in reports.items():
        if LAST_MODEL not in [model["name"] for model in report["models"]]:
            raise ReportError(f"the run of {name} has no evaluation of {LAST_MODEL}; add it to evaluate.models")
    first = next(iter(reports.values()))
    models = [model for model in first["models"] if model["name"] in SHARED_MODELS]
    for name, report in reports.items():
        last = next(model for model in report["models"] if model["name"] == LAST_MODEL)
        models.append(
            {**last, "name": name, "model": LAST_MODEL, "budget": name, "removals": report["plan"]["removals"]}
        )
    recipe = {**merged["recipe"], "name": f"{first['recipe']['name']}: {len(reports)} budgets"}
    notes = notes_on(models, [report["machine"] for report in reports.values()])
    # What is exported stands with each run.
    return {**merged, "recipe": recipe, "models": models, "stages": [], "notes": notes}


def budget_facts(report: dict[str, Any], reports: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What frontier.json says of each budget."""
    facts = []
    for model in report["models"]:
        if name := model.get("budget"):
            plan, quantization = reports[name]["plan"], model["quantization"] or {}
            facts.append(
                {
                    "budget": name,
                    "disk_bytes": model["disk_bytes"],
                    "params": model["params"],
                    "languages": model["languages"],
                    "removals": [{key: gone[key] for key in ("tower", "layer")} for gone in model["removals"]],
                    "bits": quantization.get("bits") or {},
                    "seconds_per_clip": model["seconds_per_clip"],
                    "search": {
                        "seconds": plan["seconds"],
                        "num_candidates": len(plan["candidates"]),
                        "num_shared": sum(bool(each.get("shared")) for each in plan["candidates"]),
                    },
                }
            )
    return facts


def budget_rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and one row a budget, the largest first: bytes, score and share kept by language, layers that went, bits."""
    codes = languages(report)
    header = ["budget", "disk (MB)"]
    for code in codes:
        name = METRIC_NAMES[shown_metric(report, code)]
        header += [f"{code} {name} [95 %]", f"{code} kept, % of {baseline(report, code)}"]
    found = sorted((m for m in report["models"] if m.get("budget")), key=lambda m: -m["disk_bytes"])
    return [*header, "layers removed", "bits"], [_row(report, model, codes) for model in found]


def _row(report: dict[str, Any], model: dict[str, Any], codes: list[str]) -> list[str]:
    row = [model["budget"], f"{model['disk_bytes'] / 1e6:,.2f}"]
    for code in codes:
        scores, metric = model["languages"].get(code, {}), shown_metric(report, code)
        interval = (scores.get("intervals") or {}).get(metric)
        ends = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
        row += [number_text(scores.get(metric)) + ends, kept_text(scores.get("retained"))]
    return [*row, layers_text(model["removals"]), bits_text((model["quantization"] or {}).get("bits") or {})]


def layers_text(removals: Sequence[Mapping[str, Any]]) -> str:
    """`2, 5, encoder 1`: as layers of the base model, in the order in which they went."""
    return ", ".join(f"{'encoder ' * (gone['tower'] == 'encoder')}{gone['layer']}" for gone in removals) or NOTHING


def bits_text(bits: Mapping[str, int]) -> str:
    """`mlp 3 (5 layers), 2 (1 layer); lm_head 4`."""
    kinds: dict[str, Counter[int]] = {}
    for part, number in bits.items():
        kinds.setdefault(part.rpartition(".")[2], Counter())[number] += 1

    def told(kind: str, number: int, count: int) -> str:
        return f"{number}" if kind in ROW_PARTS else f"{number} ({count} layer{'s' * (count > 1)})"

    texts = [
        f"{kind} " + ", ".join(told(kind, number, counts[number]) for number in sorted(counts, reverse=True))
        for kind, counts in sorted(kinds.items())
    ]
    return "; ".join(texts) or NOTHING
