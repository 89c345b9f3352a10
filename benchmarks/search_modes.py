"""What the cheap and the racing modes of the layer search cost and find, against the exact search, on the built-in model.

    python benchmarks/search_modes.py

The teacher, the distilled data and the test split are the same for all; every mode's plan is applied, the student recovered as in the
recipe, and scored. One run each: differences in score of a point or two are within the intervals. Writes
benchmarks/results/selection_modes_mini.json, prints a table, then the JSON document.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from commit import commit

from trimlingual.pipeline import run_stage
from trimlingual.recipe import Recipe, load_recipe
from trimlingual.run.artifacts import machine, write_json
from trimlingual.search.plan import read_plan

RESULT = Path(__file__).parent / "results" / "selection_modes_mini.json"
MODES = {
    "exact": [],
    "exact, nothing given up": ["rank.early_stopping=false"],
    "successive halving": ["rank.selection=successive-halving"],
    "bootstrap racing": ["rank.selection=bootstrap-racing"],
    "teacher-forced loss": ["rank.metric=loss"],
    "block influence": ["rank.strategy=block-influence"],
    "middle": ["rank.strategy=middle"],
}


def recipe_for(overrides: list[str], given: list[str]) -> Recipe:
    return load_recipe("mini", [*given, *overrides])


def one_mode(overrides: list[str], given: list[str], run_dir: Path, folder: Path) -> dict[str, Any]:
    recipe = recipe_for(overrides, given)

    def stage(name: str, out: str, **replaced: Path) -> Path:
        return run_stage(recipe, run_dir, name, replaced=dict(replaced), out=folder / out).path

    started = time.perf_counter()
    ranked = stage("rank", "rank", model=run_dir / "teacher")
    seconds = time.perf_counter() - started
    plan = read_plan(ranked)
    pruned = stage("pruned", "pruned", model=run_dir / "teacher", plan=ranked)
    recovered = stage("recovered", "recovered", model=pruned)
    result: dict[str, Any] = {"seconds": seconds, "removed": [removal.layer for removal in plan.removals]}
    result["num_translated_clips"] = sum(
        c["num_clips"] for c in plan.candidates if c.get("num_clips") and c["score"] is not None
    )
    for name, model in (("pruned", pruned), ("recovered", recovered)):
        scores = stage(f"evaluate {name}", f"{name}-scores", model=model)
        languages = json.loads((scores / "result.json").read_text(encoding="utf-8"))["languages"]
        result[name] = {
            language: {m: s[m]["value"] for m in ("bleu", "chrf", "chrfpp")} for language, s in languages.items()
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], dest="given")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    flags = "".join(f" --set {value}" for value in args.given)
    result: dict[str, Any] = {
        "command": f"python benchmarks/search_modes.py{flags}",
        "commit": commit(),
        "machine": machine(),
        "modes": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        shared = recipe_for([], args.given)
        for name in ("teacher", "distilled", "evaluate base", "evaluate teacher"):
            run_stage(shared, run_dir, name)
        for number, (mode, overrides) in enumerate(MODES.items()):
            result["modes"][mode] = one_mode(overrides, args.given, run_dir, Path(folder) / str(number))
            print(mode, json.dumps(result["modes"][mode]), flush=True)
            write_json(args.out, result)
    exact = set(result["modes"]["exact"]["removed"])
    print(
        "\n| mode | seconds | layers removed | as exact | pruned de chrF++ / zh chrF | recovered |\n|---|---|---|---|---|---|"
    )
    for mode, row in result["modes"].items():
        row["num_agreeing"] = len(exact & set(row["removed"]))
        pruned, recovered = (
            f"{row[m]['de']['chrfpp']:.2f} / {row[m]['zh']['chrf']:.2f}" for m in ("pruned", "recovered")
        )
        agreeing = f"{row['num_agreeing']} of {len(exact)}"
        print(f"| {mode} | {row['seconds']:.1f} | {row['removed']} | {agreeing} | {pruned} | {recovered} |")
    write_json(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
