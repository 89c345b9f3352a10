"""The plots of docs/results.md from the laboratory's result files, in the style of a run's report.

    python benchmarks/lab/plots.py [--results benchmarks/results] [--out docs/images]

`lab-sizes-LANGUAGE.svg`: quality kept against the bytes that ship (third round). `lab-layers-LANGUAGE.svg`: quality kept against the
number of layers removed, before and after recovery (second and third round). An interval is that over the clips of one seed, or what
several seeds span.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean

import jinja2
from tables import RESULTS, Row, read

from trimlingual import report
from trimlingual.recipe.languages import language_name
from trimlingual.report.plots import Plot, Point, Series, plot

IMAGES = Path(__file__).parents[2] / "docs" / "images"
NAMES = {"de": "chrF++ kept, %", "zh": "chrF kept, %"}
WAYS = {
    "U": ("uniform", "layers removed, the rest in 4 bits"),
    "M": ("mixed", "our search"),
    "P": ("proxy", "the proxy"),
}
LONG = {  # trained for longer than those
    "A": ("system-a", "System A: 4 bits, no layer gone"),
    "T": ("third", "a third of the layers gone, 4 bits"),
    "L": ("long-mixed-120", "our search, recovered as long as these"),
}
REMOVED = {
    "second": {"remove-4": 4, "select-200": 8, "remove-12": 12},
    "third": {"stop-at-90": 2, "select-200": 8, "remove-15": 15},
}
COLOURS = ("#0072b2", "#c2500a", "#00806a", "#a8578c")
STYLE = """text { fill: #5b6270; font: 12px system-ui, sans-serif; } .axis { fill: #1d2026; } .grid { stroke: #dcdad3; }
.line { fill: none; stroke-width: 2; } .interval { fill: none; stroke-width: 1.5; } .mark { fill: #fff; font-size: 11px; }
""" + "".join(
    f".series-{number} .line, .series-{number} .interval {{ stroke: {c}; }} .series-{number} circle {{ fill: {c}; }}\n"
    for number, c in enumerate(COLOURS, 1)
)


def chosen(rows: Mapping[str, Sequence[Row]], name: str, model: str, language: str) -> list[Row]:
    """The rows of an experiment's model over all voices, one for each seed."""
    asked = {"model": model, "language": language, "voice": "all"}
    return [row for row in rows.get(name, []) if all(row[key] == value for key, value in asked.items())]


def point(rows: Sequence[Row], x: float, what: str, mark: str) -> Point:
    """The mean of the seeds, with its interval."""
    low, high = ("low", "high") if len(rows) == 1 else ("kept", "kept")
    value = 100 * mean(row["kept"] for row in rows)
    ends = 100 * min(row[low] for row in rows), 100 * max(row[high] for row in rows)
    return Point(x, value, f"{what}: {value:.1f} % ({ends[0]:.1f} to {ends[1]:.1f})", mark, *ends)


def sizes(rows: Mapping[str, Sequence[Row]], language: str) -> Plot:
    """Each way to a size, and what was recovered for longer, by megabytes that ship."""
    series = []
    for number, (mark, (way, what)) in enumerate(WAYS.items(), 1):
        found = [chosen(rows, name, "quantized", language) for name in rows if name.startswith(f"{way}-")]
        points = [point(each, mean(row["disk_bytes"] for row in each) / 1e6, what, mark) for each in found if each]
        series.append(Series(what, sorted(points, key=lambda p: p.x), number))
    for mark, (name, what) in LONG.items():
        if every := chosen(rows, name, "quantized", language):
            series.append(Series(what, [point(every, every[0]["disk_bytes"] / 1e6, what, mark)], 4))
    title = f"{language_name(language)}: quality against size"
    return plot(f"sizes-{language}", title, "MB that ship", NAMES[language], series)


def layers(rounds: Mapping[str, Mapping[str, Sequence[Row]]], language: str) -> Plot:
    """The pruned and the recovered model by the number of layers removed, of each round."""
    series = []
    models = {"recovered": "after recovery", "pruned": "before recovery"}
    for number, (which, (model, when)) in enumerate(product(REMOVED, models.items()), 1):
        what = f"{when}, {which} round"
        found = {removed: chosen(rounds[which], name, model, language) for name, removed in REMOVED[which].items()}
        points = [
            point(each, removed, f"{removed} layers, {what}", str(removed)) for removed, each in found.items() if each
        ]
        series.append(Series(what, [Point(0, 100, "all layers: 100 %", "0"), *points], number))
    title = f"{language_name(language)}: quality against layers removed"
    return plot(f"layers-{language}", title, "layers removed of 30", NAMES[language], series, ["y"])


def draw(chart: Plot, path: Path) -> None:
    """Write the chart as an image that stands alone."""
    loader = jinja2.FileSystemLoader(Path(report.__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    drawn = str(environment.get_template("plots.svg.j2").module.plot(chart)).strip()  # type: ignore[attr-defined]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{chart.width}" height="{chart.height}" '
    opening, rest = drawn.replace("<svg ", head, 1).split("</desc>", 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'{opening}</desc>\n<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>{rest}\n',
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=IMAGES)
    args = parser.parse_args()
    second, third = read(args.results), read(args.results / "lab_third")
    for language in NAMES:
        draw(sizes(third, language), args.out / f"lab-sizes-{language}.svg")
        draw(layers({"second": second, "third": third}, language), args.out / f"lab-layers-{language}.svg")


if __name__ == "__main__":
    main()
