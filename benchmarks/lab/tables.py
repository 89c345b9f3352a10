"""Markdown tables of docs/results.md from the laboratory's result files.

    python benchmarks/lab/tables.py [--results benchmarks/results] [--voices]

One line for each experiment and model, both languages beside each other: mean over the seeds, and where there is one seed the paired
95 % interval. `--voices` adds the heard and the unheard voices.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from experiments import BITS, BUDGETS, LAYERS, RECOVERY, SYSTEMS

RESULTS = Path(__file__).parent.parent / "results"
ORDER = ("base", "teacher", "pruned", "recovered", "quantized")
TABLES = {
    "Systems, stage by stage": (list(SYSTEMS), ORDER),
    "Bits": (list(BITS), ("quantized",)),
    "Layers": (list(LAYERS), ("pruned", "recovered")),
    "Recovery": (["select-200", *RECOVERY], ("recovered",)),
    "Ways to a size": (list(BUDGETS), ("quantized",)),
}
Row = dict[str, Any]


def read(folder: Path) -> dict[str, list[Row]]:
    """Rows by experiment, of all seeds."""
    found: dict[str, list[Row]] = defaultdict(list)
    for path in sorted(folder.glob("lab_*.json")):
        for row in json.loads(path.read_text("utf-8")).get("rows", []):
            found[row["experiment"]].append(row)
    return found


def table(rows: dict[str, list[Row]], names: Sequence[str], models: Sequence[str], voice: str) -> Iterable[str]:
    """The lines of one table."""
    yield "| experiment | model | layers | MB | de chrF++ | kept | zh chrF | kept | seeds |"
    yield "|---|---|---:|---:|---:|---|---:|---|---:|"
    for name in names:
        for model in models:
            chosen = [row for row in rows.get(name, []) if row["model"] == model and row["voice"] == voice]
            if not chosen:
                continue
            size = _range(round(row["disk_bytes"] / 1e6) for row in chosen)
            cells = [name, model, _range(row["layers"] for row in chosen), size]
            for language in ("de", "zh"):
                of_one = [row for row in chosen if row["language"] == language]
                cells += [f"{mean(row['score'] for row in of_one):.1f}", _kept(of_one)] if of_one else ["", ""]
            yield f"| {' | '.join(cells)} | {len({row['seed'] for row in chosen})} |"


def compared(folder: Path) -> Iterable[str]:
    """What one way to a size has over another, in points of the score."""
    path = folder / "lab_budgets.json"
    if not path.is_file():
        return
    yield "| what | seed | MB, both | de chrF++ | zh chrF |"
    yield "|---|---:|---|---|---|"
    for row in sorted(json.loads(path.read_text("utf-8"))["compared"], key=lambda row: (row["one"], row["less"])):
        sizes = " and ".join(f"{size / 1e6:.1f}" for size in row["disk_bytes"])
        cells = [
            f"{row[code]['value']:+.1f} [{row[code]['low']:+.1f}, {row[code]['high']:+.1f}]" for code in ("de", "zh")
        ]
        yield f"| {row['one']} less {row['less']} | {row['seed']} | {sizes} | {' | '.join(cells)} |"


def _range(numbers: Iterable[int]) -> str:
    low, high = min(every := sorted(numbers)), max(every)
    return str(low) if low == high else f"{low}-{high}"


def _kept(rows: Sequence[Row]) -> str:
    if len(rows) == 1:
        row = rows[0]
        return f"{row['kept']:.1%} [{row['low']:.1%}, {row['high']:.1%}]"
    kept = [row["kept"] for row in rows]
    return f"{mean(kept):.1%} ({min(kept):.1%} to {max(kept):.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--voices", action="store_true")
    args = parser.parse_args()
    rows = read(args.results)
    for title, (names, models) in TABLES.items():
        for voice in ("all", "heard", "unheard") if args.voices else ("all",):
            lines = list(table(rows, names, models, voice))
            if len(lines) > 2:
                print(f"\n### {title}{'' if voice == 'all' else f', {voice} voices'}\n", *lines, sep="\n")
    if lines := list(compared(args.results)):
        print("\n### Ways and sizes compared\n", *lines, sep="\n")


if __name__ == "__main__":
    main()
