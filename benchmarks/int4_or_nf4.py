"""Which 4-bit format keeps more of the built-in model: nf4 by QLoRA, or int4 in each way that the recipe offers.

    python benchmarks/int4_or_nf4.py [--seeds 0] [--only "int4 by QLoRA"] [--run-dir runs/int4-or-nf4]

Each seed is one run of the mini recipe, whose teacher, pruned and recovered model all ways share. Each 4-bit model's translations
of the test clips are scored in the language's main metric and compared with nf4's: the share of its score by language, and the mean
over the languages of the difference in points. Both have 95 % intervals from the same resampled clips (paired bootstrap). int4 is as
good where the interval of the difference includes 0 or is above it. Prints one JSON document and writes it to
benchmarks/results/int4_or_nf4_mini.json (or --out) after every model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commit import commit

from trimlingual.evaluation.quality import (
    SentenceStatistics,
    paired_bootstrap_difference,
    paired_bootstrap_ratio,
    sentence_statistics,
)
from trimlingual.evaluation.results import read_result, read_translations
from trimlingual.run.artifacts import machine, write_json

RESULTS = Path(__file__).parent / "results"
REFERENCE = "nf4 by QLoRA"
INT4 = ["quantize.scheme=int4", "quantize.group_size=64"]  # 64, because the built-in model's widths are multiples of it
CALIBRATED = "quantize.rounding=calibrated"
WAYS = {
    REFERENCE: [],
    "int4 by QLoRA, nearest": INT4,
    "int4 by QLoRA, calibrated": [*INT4, CALIBRATED],
    "int4 by QLoRA, nearest, embeddings and head in 8 bits": [*INT4, "quantize.eight_bit=[embeddings, lm_head]"],
    "int4 trained as it ships, nearest": [*INT4, "quantize.train.method=full"],
    "int4 trained as it ships, calibrated": [*INT4, "quantize.train.method=full", CALIBRATED],
    "int4 without training, nearest": [*INT4, "quantize.train=null"],
    "int4 without training, calibrated": [*INT4, "quantize.train=null", CALIBRATED],
}


def quantized(run: Path, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """The result of the 4-bit model that the recipe makes; earlier stages are made where they are not there."""
    words = [f"seed={seed}", *overrides]
    command = [sys.executable, "-m", "trimlingual", "compress", "mini", "--run-dir", str(run), "--force"]
    subprocess.run([*command, *(word for each in words for word in ("--set", each))], check=True)
    return read_result(run / "evaluations" / "quantized")


def statistics(run: Path, model: str, languages: Sequence[str]) -> dict[str, SentenceStatistics]:
    """The counts of a model's translations in each language's main metric."""
    folder = run / "evaluations" / model
    metrics = {code: read_result(folder)["languages"][code]["main_metric"] for code in languages}
    rows = {code: read_translations(folder, code) for code in languages}
    return {
        code: sentence_statistics(
            metrics[code], *([row[key] for row in rows[code]] for key in ("hypothesis", "reference")), code
        )
        for code in languages
    }


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
    parser.add_argument("--only", default="", help="ways whose name has this, beside nf4")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/int4-or-nf4"))
    parser.add_argument("--out", type=Path, default=RESULTS / "int4_or_nf4_mini.json")
    args = parser.parse_args(arguments)
    result: dict[str, Any] = {
        "command": "python benchmarks/int4_or_nf4.py " + " ".join(sys.argv[1:] if arguments is None else arguments),
        "commit": commit(),
        "machine": machine(),
        "rows": [],
    }
    for seed in args.seeds:
        run = args.run_dir / str(seed)
        reference: dict[str, SentenceStatistics] = {}
        for way, overrides in WAYS.items():
            if way != REFERENCE and args.only not in way:
                continue
            found = quantized(run, seed, overrides)
            counts = statistics(run, "quantized", list(found["languages"]))
            reference = reference or counts
            row = {
                "way": way,
                "seed": seed,
                "disk_bytes": found["disk_bytes"],
                "score": {code: round(counts[code].score(), 2) for code in counts},
                "kept_of_teacher": {code: round(of["retained"]["ratio"], 4) for code, of in found["languages"].items()},
            } | compared(counts, reference)
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.out, result)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
