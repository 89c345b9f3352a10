"""Geometry of the map of layer scores; `heat_map.svg.j2` draws it. Lengths in SVG user units (about a CSS pixel).

Colours carry nothing alone: every cell has its number in its tooltip, and removed layers have a mark.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

# Five stops of cividis (Nuñez, Anderton, Renslow 2018), a colour map made to read the same with a colour vision
# deficiency.
_CIVIDIS = ((0, 34, 78), (67, 78, 108), (125, 124, 120), (188, 174, 108), (254, 232, 56))
_CELL = 20


@dataclass(frozen=True)
class Cell:
    """A layer in a round. `state`: tried, removed (tried and taken), gone (taken before), untried."""

    x: int
    y: int
    state: str
    fill: str
    ink: str
    tip: str


@dataclass(frozen=True)
class HeatMap:
    """Candidate scores of one tower: a row a round, a column an original layer."""

    id: str
    title: str
    description: str
    cells: list[Cell]
    layers: list[tuple[int, int]]
    rounds: list[tuple[int, int]]
    low: str
    high: str
    width: int
    height: int
    cell: int = _CELL


def heat_maps(report: dict[str, Any], run: str = "run") -> list[HeatMap]:
    """One map for each tower in which layers were tried; none where the plan was not searched for."""
    plan = report["plan"] or {}
    tried = [c for c in plan.get("candidates", []) if c.get("layer") is not None]
    layers = [model["num_decoder_layers"] + len(model["removed_layers"]) for model in report["models"]
              if model["num_decoder_layers"] is not None]  # fmt: skip
    maps = []
    for tower in sorted({candidate.get("tower", "decoder") for candidate in tried}):
        candidates = [c for c in tried if c.get("tower", "decoder") == tower]
        removals = [r for r in plan.get("removals", []) if r.get("tower", "decoder") == tower]
        num_layers = 1 + max(c["layer"] for c in candidates)
        if tower == "decoder" and layers:
            num_layers = max(num_layers, *layers)
        maps.append(_heat_map(f"{run}-{tower}", tower, candidates, removals, num_layers))
    return maps


def _heat_map(
    name: str, tower: str, candidates: list[dict[str, Any]], removals: list[dict[str, Any]], num_layers: int
) -> HeatMap:
    scores = {(c["round"], c["layer"]): c.get("score") for c in candidates}
    taken = {r["layer"]: r["round"] for r in removals}
    rounds = sorted({c["round"] for c in candidates})
    known = [score for score in scores.values() if score is not None]
    # One layer whose loss ruins everything would make all others look alike: colours span the middle 90 % of the
    # scores.
    low, high = (float(x) for x in np.percentile(known, [5, 95])) if known else (0.0, 1.0)
    left, top = 52, 24
    cells = []
    for row, turn in enumerate(rounds):
        for layer in range(num_layers):
            state = "tried" if (turn, layer) in scores else "untried"
            if layer in taken and taken[layer] <= turn:
                state = "removed" if taken[layer] == turn else "gone"
            score = scores.get((turn, layer))
            fill, ink = _colour(score, low, high)
            cells.append(
                Cell(left + layer * _CELL, top + row * _CELL, state, fill, ink, _tip(turn, layer, state, score))
            )
    order = ", ".join(str(r["layer"]) for r in sorted(removals, key=lambda r: r["round"]))
    return HeatMap(
        id=f"heat-{name}",
        title=f"Score without each {tower} layer, by round",
        description=f"Removed in this order: {order or 'none'}. {len(scores)} candidates were scored.",
        cells=cells,
        layers=[(layer, left + layer * _CELL + _CELL // 2) for layer in range(num_layers)],
        rounds=[(turn, top + row * _CELL + _CELL // 2) for row, turn in enumerate(rounds)],
        low=f"{low:.3g}",
        high=f"{high:.3g}",
        width=left + num_layers * _CELL + 4,
        height=top + len(rounds) * _CELL + 4,
    )


def _tip(turn: int, layer: int, state: str, score: float | None) -> str:
    if state == "gone":
        return f"round {turn}, layer {layer}: removed in an earlier round"
    if state == "untried":
        return f"round {turn}, layer {layer}: not tried"
    text = "stopped early" if score is None else f"{score:.4g}"
    return f"round {turn}, layer {layer}: {text}" + (", removed" if state == "removed" else "")


def _colour(score: float | None, low: float, high: float) -> tuple[str, str]:
    """Fill, and the ink that can be read on it."""
    if score is None:
        return "none", "currentColor"
    share = min(1.0, max(0.0, (score - low) / (high - low))) if high > low else 1.0
    place = share * (len(_CIVIDIS) - 1)
    index = min(int(place), len(_CIVIDIS) - 2)
    red, green, blue = (round(a + (b - a) * (place - index)) for a, b in zip(_CIVIDIS[index], _CIVIDIS[index + 1]))
    return f"#{red:02x}{green:02x}{blue:02x}", "#ffffff" if share < 0.5 else "#000000"
