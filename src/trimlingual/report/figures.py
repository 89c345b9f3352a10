"""What the page's charts show: quality against size, score against layers removed, training, and bytes by part."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from trimlingual.recipe.languages import language_name
from trimlingual.report.collect import languages
from trimlingual.report.plots import Plot, Point, Series, plot
from trimlingual.report.tables import METRIC_NAMES, baseline, kept_text, megabytes_text, number_text, shown_metric
from trimlingual.report.weights import ALL_PARTS

NUM_COLOURS = 5
OTHERS, OF_BUDGETS = 0, 2  # the colours of published systems, and of the models of several budgets
STACK_WIDTH, STACK_LABEL_X, STACK_ROW = 420, 96, 30


@dataclass(frozen=True)
class Entry:
    """A line of a chart's key: the mark in the dot, and what it stands for."""

    mark: str
    name: str
    text: str
    series: int


@dataclass(frozen=True)
class Trade:
    """Quality against size in one language, with its key."""

    chart: Plot
    key: list[Entry]
    note: str


@dataclass(frozen=True)
class Piece:
    """A part of a stacked bar."""

    number: int
    x: float
    width: float
    tip: str


@dataclass(frozen=True)
class Stack:
    """One model's bytes as a stacked bar, and the same as cells of a table (MB by part, then together)."""

    label: str
    y: int
    pieces: list[Piece]
    cells: list[str]


def trades(report: dict[str, Any], runs: Sequence[str] = ()) -> list[Trade]:
    """A chart for each language: bytes on disk, and the share of the teacher's score that is kept (or the score)."""
    return [_trade(report, code, runs) for code in languages(report)]


def close_trades(report: dict[str, Any]) -> list[Trade]:
    """The same charts of the models of several budgets alone, which lie near each other there."""
    return [_trade(report, code, (), close=True) for code in languages(report)]


def _trade(report: dict[str, Any], code: str, runs: Sequence[str], close: bool = False) -> Trade:
    metric = shown_metric(report, code)
    whole = _baselines(report, code, metric)
    unit, size = (1e9, "GB") if max(model["disk_bytes"] for model in report["models"]) >= 1e9 else (1e6, "MB")
    points: dict[int, list[Point]] = {}
    key: list[Entry] = []
    for model in report["models"]:
        scores = model["languages"].get(code, {})
        value, kept, base = scores.get(metric), scores.get("retained") or {}, whole.get(model.get("run"))
        if value is None or (close and not model.get("budget")):
            continue
        series = OF_BUDGETS if model.get("budget") else 1 + (runs.index(model["run"]) if runs else 0) % NUM_COLOURS
        if whole and not base:
            continue  # of a run without a teacher, beside runs that have one
        share = 100 * (kept["ratio"] if kept.get("ratio") is not None else value / base) if base else value
        low, high = (100 * kept[end] if kept.get(end) is not None else None for end in ("low", "high"))
        text = f"{megabytes_text(model['disk_bytes'])} MB, {METRIC_NAMES[metric]} {number_text(value, 1)}"
        text += f", {kept_text(kept) if kept else f'{share:.1f}'} % of {baseline(report, code)}" if base else ""
        mark = str(len(key) + 1)
        key.append(Entry(mark, model["name"], text, series))
        points.setdefault(series, []).append(
            Point(model["disk_bytes"] / unit, share, f"{model['name']}: {text}", mark, low, high)
        )
    best = _frontier(points.get(OF_BUDGETS, [])) if any(model.get("budget") for model in report["models"]) else []
    drawn = [Series("frontier", best, OF_BUDGETS)] if best else []
    for series, found in points.items():
        if others := [point for point in found if point not in best]:
            drawn.append(Series(f"colour {series}", others, series, joined=False))
    known = _others(report, code) if whole and not close else []
    if known:
        dots = [Point(size_bytes / unit, percent, f"{e.name}: {e.text}", e.mark) for e, size_bytes, percent in known]
        drawn.append(Series("published", dots, OTHERS, joined=False, hollow=True))
        key += [entry for entry, _, _ in known]
    title = language_name(code) or code
    quality = f"{METRIC_NAMES[metric]} kept, %" if whole else METRIC_NAMES[metric]
    name, what = ("frontier", "the budgets") if close else ("trade", "quality against size")
    chart = plot(f"{name}-{code}", f"{title}: {what}", f"{size} on disk", quality, drawn, [] if close else ["x"])
    return Trade(chart, key, published()["note"] if known else "")


def _frontier(points: Sequence[Point]) -> list[Point]:
    """The points above all smaller ones, from the smallest on."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -point.y)):
        if not best or point.y > best[-1].y:
            best.append(point)
    return best


def _baselines(report: dict[str, Any], code: str, metric: str) -> dict[str | None, float]:
    """By run: the score that the run's shares are of."""
    name = baseline(report, code)
    return {
        model.get("run"): model["languages"][code][metric]
        for model in report["models"]
        if model.get("model", model["name"]) == name and model["languages"].get(code, {}).get(metric)
    }


@cache
def published() -> dict[str, Any]:
    """Published systems, and for which base model and data they can be compared."""
    return json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))


def _others(report: dict[str, Any], code: str) -> list[tuple[Entry, int, float]]:
    """Published systems for the language, with bytes and percent kept, where base model and data are theirs."""
    known, recipe = published(), report["recipe"]
    train = recipe.get("data", {}).get("train") or {}
    if recipe["model"]["base"] != known["base"] or train.get("path") != known["data"]:
        return []
    found: list[tuple[Entry, int, float]] = []
    for system in known["systems"]:
        if kept := system["kept"].get(code):
            text = f"{megabytes_text(system['disk_bytes'])} MB, {kept['text']}; {system['source']}"
            mark = "ABCDEFGH"[len(found)]
            found.append((Entry(mark, system["name"], text, OTHERS), system["disk_bytes"], kept["percent"]))
    return found


def removal_curve(report: dict[str, Any], name: str) -> Plot | None:
    """The selection score by number of layers removed, or by bytes where the search was under a budget; None without a search."""
    curve = [p for p in (report["plan"] or {}).get("curve") or [] if p.get("score") is not None]
    if len(curve) < 2:
        return None
    if "num_bytes" in curve[0]:
        sizes = [
            Point(p["num_bytes"] / 1e6, p["score"], f"{megabytes_text(p['num_bytes'])} MB: {p['score']:.4g}")
            for p in curve
        ]
        return plot(f"removed-{name}", "Score against size", "megabytes", "score", [Series("score", sizes)])
    points = [Point(p["num_removed"], p["score"], f"{p['num_removed']} removed: {p['score']:.4g}") for p in curve]
    return plot(f"removed-{name}", "Score against layers removed", "layers removed", "score", [Series("score", points)])


def training_curves(report: dict[str, Any], name: str) -> list[tuple[str, list[Plot], str]]:
    """For each stage that trained: its name, its charts (loss, learning rate, selection score), and what was not recorded."""
    found: list[tuple[str, list[Plot], str]] = []
    for stage in report["stages"]:
        info = stage["info"]
        if "losses" not in info:
            continue
        charts: list[Plot] = []
        missing: list[str] = []
        for key, label in (("loss", "loss"), ("learning_rate", "learning rate")):
            points = [
                Point(entry["step"], entry[key], f"step {entry['step']}: {entry[key]:.4g}")
                for entry in info["losses"]
                if entry.get(key) is not None
            ]
            if points:
                title = f"{stage['stage']}: {label}"
                series = [Series(label, points)]
                charts.append(plot(f"{name}-{stage['stage']}-{key}", title, "step", label, series, ["x", "y"]))
            else:
                missing.append(label)
        looks = [
            Point(entry["step"], entry["score"], f"step {entry['step']}: {entry['score']:.2f}")
            for entry in (info.get("selection") or {}).get("scores", [])
        ]
        if looks:
            title, series = f"{stage['stage']}: score on the selection clips", [Series("score", looks, 2)]
            charts.append(plot(f"{name}-{stage['stage']}-selection", title, "step", "score", series, ["x"]))
        found.append((stage["stage"], charts, f"not recorded: {', '.join(missing)}" if missing else ""))
    return found


def stacks(parts: Mapping[str, Mapping[str, int]]) -> tuple[list[tuple[int, str]], list[Stack]]:
    """The parts that occur (number, name), and a bar for each model."""
    used = [(number, part) for number, part in enumerate(ALL_PARTS) if any(part in each for each in parts.values())]
    most = max((sum(each.values()) for each in parts.values()), default=1)
    bars = []
    for index, (model, each) in enumerate(parts.items()):
        at, pieces = float(STACK_LABEL_X), []
        for number, part in used:
            width = (STACK_WIDTH - STACK_LABEL_X - 4) * each.get(part, 0) / most
            tip = f"{part}: {megabytes_text(each.get(part, 0))} MB"
            pieces.append(Piece(number, round(at, 2), round(width, 2), tip))
            at += width
        cells = [megabytes_text(each.get(part)) for _, part in used] + [megabytes_text(sum(each.values()))]
        bars.append(Stack(model, 6 + index * STACK_ROW, pieces, cells))
    return used, bars
