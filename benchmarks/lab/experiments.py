"""Runs of the whole pipeline on the laboratory's base, one thing changed at a time, and one row for each model, language and voice.

    python benchmarks/lab/experiments.py --lab runs/lab base                 # train the base (base.yaml), once
    python benchmarks/lab/experiments.py --lab runs/lab system-b a-nf4 ...   # the experiments named below, seed by seed
    python benchmarks/lab/experiments.py --lab runs/lab --table
    python benchmarks/lab/experiments.py --lab runs/lab --compare --seeds 0 1    # ways to a size (budgets.py), of runs there are

Everything resumes: a run goes on where it was stopped. A stage that another run has made with the same fingerprint is taken from there,
and one that another run is making is waited for, so experiments may run side by side (run_all.py). Each experiment's rows are in
`LAB/results/`; `--out` copies them, with the table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import budgets
import torch
from filelock import FileLock

from trimlingual.evaluation.quality import SentenceStatistics, paired_bootstrap_ratio, sentence_statistics
from trimlingual.pipeline import plan, run_stage
from trimlingual.recipe import Recipe, languages, load_recipe
from trimlingual.run.artifacts import find_artifact, machine, write_json
from trimlingual.run.jsonl import read_jsonl
from trimlingual.run.processes import is_main_process

HERE = Path(__file__).parent
LORA = (
    "quantize.train={method: lora, epochs: 1, batch_size: 16, learning_rate: 2.0e-4, data: {gold: 1, distilled: 1}, "
    "mixed_precision: bf16, lora: {r: 32, alpha: 64, target_modules: '.*language_model.*_proj'}, selection_checks: 2, num_workers: 4}"
)
NEAREST = ["quantize.rounding=nearest", "quantize.train=null"]
NF4 = ["quantize.scheme=nf4", "quantize.eight_bit=[]", "quantize.rounding=nearest"]
UNPRUNED = ["rank=null", "recover=null", "quantize.start=teacher"]
NO_BITS = ["quantize=null"]
NO_TOKENS = "recover.token_distillation=null"
TAUGHT = "distill.out_of_domain=true"


def _set_of(split: str, name: str) -> str:
    return f"data.{split}={{kind: manifest, path: LAB/{name}.jsonl}}"


# A comparison of recoveries at equal cost: a quarter of the system's steps, on less general speech, and no 4 bits behind it. The base
# is the teacher of all: whether fine-tuning makes it better on the selection clips is chance here, and so would the comparison be.
RECOVERED_SHORTLY = [
    *NO_BITS,
    "recover.max_steps=300",
    "recover.selection_checks=1",
    _set_of("out_of_domain", "general-20000"),
]
SHORT = [*RECOVERED_SHORTLY, "finetune=null"]


def _only(language: str) -> list[str]:
    """A teacher, a search and a recovery for one language."""
    sets = {"train": "small", "select": "select-200", "test": "test", "out_of_domain": "general-20000"}
    alone = [_set_of(split, f"{name}-{language}") for split, name in sets.items()]
    return [*alone, f"task.target_languages=[{language}]"]


# What each experiment changes in system.yaml, by table of docs/results.md.
SYSTEMS = {
    # the training in 4 bits is its only one, so it has the steps of system B's recovery
    "system-a": [*UNPRUNED, "quantize.train.max_steps=1200", "quantize.train.selection_checks=4"],
    "system-b": [],
    "third": ["rank.num_layers_to_remove=10"],
}
BITS = {  # of the unpruned teacher
    "a-calibrated": [*UNPRUNED, "quantize.train=null"],
    "a-nearest": [*UNPRUNED, *NEAREST],
    "a-nf4": [*UNPRUNED, *NF4, "quantize.train=null"],
    "a-qlora-nf4": [*UNPRUNED, *NF4, LORA],
    "a-qlora-int4": [*UNPRUNED, LORA],
    "a-group-32": [*UNPRUNED, "quantize.group_size=32"],
    "a-vocabulary": [*UNPRUNED, "quantize.train=null", "vocab={when: before, max_tokens: 24576}"],
    "b-calibrated": ["quantize.train=null"],
    "b-qlora-nf4": [*NF4, LORA],
    "b-nearest-trained": ["quantize.rounding=nearest"],
}
LAYERS = {
    "select-100": [*SHORT, _set_of("select", "select-100")],
    "select-200": SHORT,
    "select-400": [*SHORT, _set_of("select", "select-400")],
    "by-bleu": [*SHORT, "rank.metric=bleu"],
    "by-loss": [*SHORT, "rank.metric=loss"],
    "middle": [*SHORT, "rank.strategy=middle"],
    "block-influence": [*SHORT, "rank.strategy=block-influence"],
    "random": [*SHORT, "rank.strategy=random"],
    "both-towers": [*SHORT, "rank.towers=both"],
    "remove-4": [*SHORT, "rank.num_layers_to_remove=4"],
    "remove-10": [*SHORT, "rank.num_layers_to_remove=10"],
    "remove-12": [*SHORT, "rank.num_layers_to_remove=12"],
    "remove-15": [*SHORT, "rank.num_layers_to_remove=15"],
    "stop-at-90": [*SHORT, "rank.num_layers_to_remove=15", "rank.min_retained=0.9"],
    "only-de": [*RECOVERED_SHORTLY, *_only("de")],
    "only-zh": [*RECOVERED_SHORTLY, *_only("zh")],
    "each-round": [
        *SHORT,
        "rank.finetune_each_round={max_steps: 40, batch_size: 128, learning_rate: 1.5e-4, data: {gold: 1, out_of_domain: 1}, "
        "freeze: [audio_tower], optimizer: flash_adamw, num_workers: 4}",
    ],
}
RECOVERY = {
    "gold": [*SHORT, NO_TOKENS, "recover.data={gold: 1, out_of_domain: 1}", "distill=null"],
    "sequence": [*SHORT, NO_TOKENS],
    "tokens": [*SHORT, "recover.data={gold: 1, out_of_domain: 1}", "distill=null"],
    "tokens-only": [*SHORT, "recover.token_distillation={weight: 1.0}"],
    "oversampled": [*SHORT, "recover.data={gold: 10, distilled: 10, out_of_domain: 1}"],
    "taught": [*SHORT, TAUGHT, "recover.data={gold: 1, distilled: 1, out_of_domain: 1, distilled_out_of_domain: 1}"],
    "in-domain": [*SHORT, "recover.data={gold: 1, distilled: 1}"],
    "general-5000": [*SHORT, _set_of("out_of_domain", "general-5000")],
    "long-20000": [*NO_BITS, _set_of("out_of_domain", "general-20000")],
    # system B's smaller plan with as long a recovery, and what the same clips, steps and rate bring the unpruned model
    "long-mixed-120": budgets.searched(120),
    "base-longer": [
        *NO_BITS,
        "rank=null",
        "recover=null",
        "finetune={max_steps: 1200, batch_size: 128, learning_rate: 3.0e-4, data: {gold: 1, out_of_domain: 1}, "
        "freeze: [audio_tower], optimizer: flash_adamw, selection_checks: 4, num_workers: 4}",
    ],
}
BUDGETS = budgets.experiments()
EXPERIMENTS: dict[str, list[str]] = {**SYSTEMS, **BITS, **LAYERS, **RECOVERY, **BUDGETS}
VOICES = {"all": None, "heard": True, "unheard": False}
SAMPLES = 1000
# Of a GPU's memory, per experiment: a search would take all that is free, and trainings beside it would run out.
TRAININGS = ("teacher", "recovered", "quantized")
TRAINING_SHARE, OTHER_SHARE = 0.5, 0.15


def take_share(share: float) -> None:
    """Let this process have no more than this share of a GPU's memory."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(share)


def recipe_of(lab: Path, name: str, overrides: Sequence[str], seed: int) -> Recipe:
    """`name`.yaml of this folder with LAB replaced by the laboratory's folder."""
    text = (HERE / f"{name}.yaml").read_text(encoding="utf-8").replace("LAB/", f"{lab}/")
    path = lab / f"{name}-{os.getpid()}.yaml"  # experiments may run side by side
    path.write_text(text, encoding="utf-8")
    try:
        return load_recipe(path, [*(value.replace("LAB/", f"{lab}/") for value in overrides), f"seed={seed}"])
    finally:
        path.unlink()


def train_base(lab: Path, overrides: Sequence[str]) -> None:
    """`lab`/base: the untrained base after base.yaml's first stage."""
    run = lab / "runs" / "base"
    artifact = run_stage(recipe_of(lab, "base", overrides, 0), run, "teacher")
    if is_main_process() and not (lab / "base").exists():
        shutil.copytree(run / "teacher", lab / "base", ignore=shutil.ignore_patterns("artifact.json", "log.txt"))
    print(
        json.dumps(
            {"steps": artifact.info["steps"], "loss": artifact.info["training_loss"], "seconds": artifact.seconds}
        ),
        flush=True,
    )


@contextmanager
def shared(lab: Path, recipe: Recipe, run: Path, stage: str) -> Iterator[None]:
    """Inside, no other run makes this stage; as hard links it is there already if another run has made it with the same fingerprint."""
    (step,) = [step for step in plan(recipe, run) if step.name == stage]
    (lab / "locks").mkdir(exist_ok=True)  # older versions of filelock do not
    with FileLock(lab / "locks" / f"{step.fingerprint}.lock"):
        others = [] if step.status() != "missing" else [folder for folder in run.parent.iterdir() if folder != run]
        for other in others:
            made = other / step.folder.relative_to(run)
            artifact = find_artifact(made)
            if artifact and artifact.fingerprint == step.fingerprint:
                shutil.copytree(made, step.folder, copy_function=os.link)
                break
        yield


def rows_of(lab: Path, name: str, seed: int, run: Path, recipe: Recipe, seconds: float) -> Iterator[dict[str, Any]]:
    """One row for each model, language and voice; kept: of the better of base and teacher, by the score on all voices."""
    heard = {line["id"]: line["heard"] for line in read_jsonl(lab / "test.jsonl")}
    folders = {model: run / "evaluations" / model for model in recipe.evaluate.models}
    results = {m: json.loads((f / "result.json").read_text("utf-8")) for m, f in folders.items() if f.is_dir()}
    for language in recipe.task.target_languages:
        metric = languages.language(language).main_metric
        said = {model: read_jsonl(folders[model] / f"translations.{language}.jsonl") for model in results}
        yardstick = max(
            (model for model in ("base", "teacher") if model in said),
            key=lambda model: _statistics(said[model], metric, language).score(),
        )
        for voice, asked in VOICES.items():
            chosen = {m: [r for r in rows if asked is None or heard[r["id"]] == asked] for m, rows in said.items()}
            best = _statistics(chosen[yardstick], metric, language)
            for model, result in results.items():
                statistics = _statistics(chosen[model], metric, language)
                kept = paired_bootstrap_ratio(statistics, best, SAMPLES)
                yield {
                    "experiment": name, "seed": seed, "model": model, "language": language, "voice": voice,
                    "num_clips": len(statistics), "metric": metric, "score": round(statistics.score(), 2),
                    "bleu": round(_statistics(chosen[model], "bleu", language).score(), 2),
                    "signature": statistics.signature, "kept_of": yardstick,
                    "kept": round(kept.value, 4), "low": round(kept.low, 4), "high": round(kept.high, 4),
                    "disk_bytes": result["disk_bytes"], "params": result["params"],
                    "layers": result["num_decoder_layers"], "removed": result["removed_layers"],
                    "seconds_per_clip": result["speed"].get("seconds_per_clip"),
                    "peak_memory_bytes": result["peak_memory_bytes"], "run_seconds": round(seconds, 1),
                }  # fmt: skip


def _statistics(rows: Sequence[dict[str, Any]], metric: str, language: str) -> SentenceStatistics:
    return sentence_statistics(metric, [r["hypothesis"] for r in rows], [r["reference"] for r in rows], language)


def run_experiment(lab: Path, name: str, seed: int, overrides: Sequence[str], commit: str, until: str | None) -> None:
    """Run one experiment and write its rows; `until` a stage: that far only, for other experiments to go on from."""
    recipe = recipe_of(lab, "system", [*EXPERIMENTS[name], *overrides], seed)
    run = lab / "runs" / f"{name}-{seed}"
    run.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    names = [step.name for step in plan(recipe, run) if step.name not in ("exported", "report")]
    if until:
        names = [name for name in names if not name.startswith("evaluate")]
        names = names[: names.index(until) + 1]
    for stage in names:
        with shared(lab, recipe, run, stage):
            trains = stage in TRAININGS or bool(recipe.rank and recipe.rank.finetune_each_round)
            take_share(TRAINING_SHARE if trains else OTHER_SHARE)
            if stage == "rank" and name.startswith("proxy-"):
                budgets.rank_by_proxy(recipe, run)
            else:
                run_stage(recipe, run, stage)
    if until:
        return
    seconds = time.perf_counter() - started
    rows = list(rows_of(lab, name, seed, run, recipe, seconds))
    stages = {p.parent.name: json.loads(p.read_text("utf-8"))["seconds"] for p in run.glob("*/artifact.json")}
    (lab / "results").mkdir(exist_ok=True)
    record = {
        "command": " ".join(
            [
                "python benchmarks/lab/experiments.py --lab LAB",
                name,
                f"--seeds {seed}",
                *(f"--set {o}" for o in overrides),
            ]
        ),
        "overrides": [*EXPERIMENTS[name], *overrides],
        "commit": commit,
        "machine": machine(),
        "stage_seconds": stages,
        "rows": rows,
    }
    if made := budgets.plan_of(run):
        record["plan"] = made
    write_json(lab / "results" / f"lab_{name}_{seed}.json", record)
    show(rows)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Scores over all voices, a line for each model and language."""
    for row in rows:
        if row["voice"] == "all":
            kept = f"{row['kept']:.1%} [{row['low']:.1%}, {row['high']:.1%}] of {row['kept_of']}"
            name = f"{row['experiment']} {row['seed']} {row['model']}"
            size = f"{row['disk_bytes'] / 1e6:.0f} MB"
            print(f"{name:40} {row['language']} {row['score']:6.2f} BLEU {row['bleu']:5.2f} {kept}, {size}", flush=True)


def copy_results(lab: Path, out: Path | None) -> None:
    """All results there are, to `out`."""
    if out:
        out.mkdir(parents=True, exist_ok=True)
        for path in (lab / "results").glob("*.json"):
            shutil.copy(path, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"base, {', '.join(EXPERIMENTS)}")
    parser.add_argument("--lab", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="for all of them"
    )
    parser.add_argument(
        "--until", metavar="STAGE", help="make the stages up to this one, for other experiments to go on from"
    )
    parser.add_argument("--commit", default="", help="where there is no Git: the commit that is written down")
    parser.add_argument("--table", action="store_true", help="show the rows there are")
    parser.add_argument("--compare", action="store_true", help="write what a way to a size has over another")
    parser.add_argument("--out", type=Path, help="copy the results there after each experiment")
    args = parser.parse_args()
    lab = args.lab.absolute()
    for seed in args.seeds:
        for name in args.names:
            if name == "base":
                train_base(lab, args.overrides)
            else:
                run_experiment(lab, name, seed, args.overrides, args.commit, args.until)
            copy_results(lab, args.out)
    if args.compare:
        rows = budgets.compare(lab, args.seeds)
        write_json(
            lab / "results" / "lab_budgets.json", {"commit": args.commit, "machine": machine(), "compared": rows}
        )
        copy_results(lab, args.out)
        for row in rows:
            print(json.dumps(row), flush=True)
    if args.table:
        for path in sorted((lab / "results").glob("*.json")):
            show(json.loads(path.read_text("utf-8")).get("rows", []))


if __name__ == "__main__":
    main()
