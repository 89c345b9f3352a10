"""Which 4-bit format keeps more of the built-in model: nf4 by QLoRA, or int4 in each way that the recipe offers.

    python benchmarks/int4_or_nf4.py [--seeds 0] [--only "by QLoRA" ...] [--run-dir runs/int4-or-nf4]

Each seed is one run of the mini recipe, whose teacher, pruned and recovered model all ways share. QLoRA trains one adapter for
both formats, because it always trains on nf4: int4 gets the adapter of the run's nf4 model, merged onto the recovered model as the
stage does it. Each 4-bit model's translations of the test clips are scored in the language's main metric and compared with nf4's:
the share of its score by language, and the mean over the languages of the difference in points. Both have 95 % intervals from the
same resampled clips (paired bootstrap). int4 is as good where the interval of the difference includes 0 or is above it. What stands
in the run's folder is not made again. Prints one JSON document and writes it to benchmarks/results/int4_or_nf4_mini.json (or --out)
after every model.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from commit import commit
from peft import PeftModel

from trimlingual.evaluation.quality import (
    SentenceStatistics,
    paired_bootstrap_difference,
    paired_bootstrap_ratio,
    sentence_statistics,
)
from trimlingual.evaluation.results import read_result, read_translations
from trimlingual.models.loading import load_model, load_processor
from trimlingual.models.saving import save_model
from trimlingual.run.artifacts import machine, write_json
from trimlingual.run.lineage import read_lineage

RESULTS = Path(__file__).parent / "results"
REFERENCE = "nf4 by QLoRA"
NEAREST, CALIBRATED = "quantize.rounding=nearest", "quantize.rounding=calibrated"
UNTRAINED, TRAINED = "quantize.train=null", "quantize.train.method=full"
# For each way of int4 the model that it begins with, and settings.
WAYS = {
    "int4 by QLoRA, nearest": ("merged", [UNTRAINED, NEAREST]),
    "int4 by QLoRA, calibrated": ("merged", [UNTRAINED, CALIBRATED]),
    "int4 by QLoRA, nearest, embeddings and head in 8 bits": (
        "merged", [UNTRAINED, NEAREST, "quantize.eight_bit=[embeddings, lm_head]"],
    ),
    "int4 without training, nearest": ("recovered", [UNTRAINED, NEAREST]),
    "int4 without training, calibrated": ("recovered", [UNTRAINED, CALIBRATED]),
    "int4 trained as it ships, nearest": ("recovered", [TRAINED, NEAREST]),
    "int4 trained as it ships, calibrated": ("recovered", [TRAINED, CALIBRATED]),
}  # fmt: skip


class Run:
    """A run of the mini recipe, and what is made beside its own models."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        if not (folder / "report" / "report.json").is_file():
            self.do("compress", "--set", "quantize.scheme=nf4")

    def do(self, verb: str, *words: str) -> None:
        """A command of trimlingual on this run."""
        command = [sys.executable, "-m", "trimlingual", verb, "mini", "--run-dir", str(self.folder)]
        subprocess.run([*command, "--set", f"seed={self.seed}", *words], check=True)

    def merged(self) -> None:
        """The recovered model with the adapter of the nf4 model."""
        given, out = self.folder / "recovered", self.folder / "merged"
        adapted = PeftModel.from_pretrained(
            load_model(given, "float32", torch.device("cpu")), self.folder / "quantized" / "adapter"
        )
        save_model(adapted.merge_and_unload(), load_processor(given), out, "bfloat16")
        read_lineage(given, "builtin:mini").save(out)

    def scores(self, way: str) -> Path:
        """Folder with the evaluation of the model that this way makes."""
        out = self.folder / "ways" / way.replace(",", "").replace(" ", "-")
        start, overrides = WAYS[way]
        if start == "merged" and not (self.folder / start).is_dir():
            self.merged()
        # 64 weights a scale: the built-in model's widths are multiples of it.
        settings = ["quantize.scheme=int4", "quantize.group_size=64", *overrides]
        words = [word for setting in settings for word in ("--set", setting)]
        self.do("quantize", "--model", str(self.folder / start), "--out", str(out / "model"), *words)
        self.do("evaluate", "--model", str(out / "model"), "--out", str(out / "scores"))
        return out / "scores"


def statistics(folder: Path) -> dict[str, SentenceStatistics]:
    """The counts of an evaluation's translations in each language's main metric."""
    counts = {}
    for code, scores in read_result(folder)["languages"].items():
        rows = read_translations(folder, code)
        hypotheses, references = ([row[key] for row in rows] for key in ("hypothesis", "reference"))
        counts[code] = sentence_statistics(scores["main_metric"], hypotheses, references, code)
    return counts


def compared(ours: dict[str, SentenceStatistics], reference: dict[str, SentenceStatistics]) -> dict[str, Any]:
    """The share of nf4's score by language, and the mean difference in points, each with its interval's ends."""
    shares = {code: paired_bootstrap_ratio(ours[code], reference[code]) for code in ours}
    difference, p_value = paired_bootstrap_difference(list(ours.values()), list(reference.values()))
    return {
        "share_of_nf4": {code: [round(x, 4) for x in (s.value, s.low, s.high)] for code, s in shares.items()},
        "mean_difference": [round(x, 3) for x in (difference.value, difference.low, difference.high)],
        "p_value": round(p_value, 4),
        "includes_0_or_better": difference.high >= 0,
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", default=[""], help="ways of int4 whose name has one of these")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/int4-or-nf4"))
    parser.add_argument("--out", type=Path, default=RESULTS / "int4_or_nf4_mini.json")
    args = parser.parse_args(arguments)
    result: dict[str, Any] = {
        "command": "python benchmarks/int4_or_nf4.py " + shlex.join(sys.argv[1:] if arguments is None else arguments),
        "commit": commit(),
        "machine": machine(),
        "rows": [],
    }
    for seed in args.seeds:
        run = Run(args.run_dir / str(seed), seed)
        own = run.folder / "evaluations"
        teacher, nf4 = statistics(own / "teacher"), statistics(own / "quantized")
        for way in (REFERENCE, *(way for way in WAYS if any(word in way for word in args.only))):
            folder = own / "quantized" if way == REFERENCE else run.scores(way)
            counts = statistics(folder)
            row = {
                "way": way,
                "seed": seed,
                "disk_bytes": read_result(folder)["disk_bytes"],
                "score": {code: round(counts[code].score(), 2) for code in counts},
                "kept_of_teacher": {code: round(counts[code].score() / teacher[code].score(), 4) for code in counts},
            } | ({} if way == REFERENCE else compared(counts, nf4))
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.out, result)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
