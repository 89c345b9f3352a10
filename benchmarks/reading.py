"""What 4-bit training is spared where the stage before it had the teacher read the same examples, on the built-in model.

    python benchmarks/reading.py [--clips 360] [--epochs 0.75] [--blocks 2]

The built-in model teaches itself in both languages; all weights train while they are rounded, the audio tower is frozen. The stage
is made in turn as it is alone ("asked": the teacher reads) and after another one ("found"); each block has one of both. Losses must be
equal. Prints one JSON document and writes it to benchmarks/results/reading_mini.json (another name with --name).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commit import commit

from trimlingual.data.sources import read_source
from trimlingual.models.inputs import Example, TrainingData
from trimlingual.models.loading import load_processor, resolve_base
from trimlingual.recipe import (
    BuiltinSource,
    DecodeSettings,
    ModelSettings,
    QuantizeSettings,
    SharedSettings,
    TaskSettings,
    TokenDistillation,
    TrainSettings,
)
from trimlingual.run.artifacts import machine, write_json
from trimlingual.run.handed_on import TEACHER_TOKENS
from trimlingual.run.lineage import ModelFolder, read_lineage
from trimlingual.stages.quantize import quantize
from trimlingual.training.selection import Guide
from trimlingual.training.trainer import read_teacher

RESULTS = Path(__file__).parent / "results"
LANGUAGES = ["de", "zh"]


def measure(folder: Path, num_clips: int, epochs: float, blocks: int) -> dict[str, Any]:
    """Seconds of the stage with and without another's reading."""
    base = resolve_base("builtin:mini")
    shared = SharedSettings(
        TaskSettings(target_languages=LANGUAGES), ModelSettings(base="builtin:mini"), DecodeSettings()
    )
    clips = read_source(BuiltinSource(kind="builtin", split="train"), LANGUAGES, folder)[:num_clips]
    examples = [Example(i, clip.id, code, clip.references[code]) for i, clip in enumerate(clips) for code in LANGUAGES]
    data = TrainingData(clips, examples)
    train = TrainSettings(
        epochs=epochs, batch_size=16, learning_rate=1.5e-4, freeze=["audio_tower"], token_distillation=TokenDistillation()
    )  # fmt: skip
    settings = QuantizeSettings(group_size=64, compute_dtype="float32", train=train)
    asked = Guide(teacher_dir=base)
    found = Guide(teacher_dir=base, reading=folder / TEACHER_TOKENS)
    started = time.perf_counter()
    tokens = read_teacher(load_processor(base), data, shared, train, found, folder / "first")
    reading_s = time.perf_counter() - started
    seconds: dict[str, list[float]] = {"asked": [], "found": []}
    losses = []
    for block in range(blocks):
        for name, guide in (("asked", asked), ("found", found)):
            started = time.perf_counter()
            out = folder / f"{name}-{block}"
            info = quantize(ModelFolder(base, read_lineage(base, "builtin:mini")), data, shared, settings, out, guide)
            seconds[name].append(round(time.perf_counter() - started, 2))
            losses.append(info["losses"])
    num_tokens = sum(len(ids) for ids, _ in tokens.values())
    num_bytes = sum(path.stat().st_size for path in (folder / TEACHER_TOKENS).glob("*.safetensors"))
    return {
        "num_clips": len(clips),
        "num_examples": len(examples),
        "reading_s": round(reading_s, 2),
        "stage_s": seconds,
        "ratio": round(statistics.median(seconds["asked"]) / statistics.median(seconds["found"]), 2),
        "equal_losses": all(each == losses[0] for each in losses),
        "bytes_per_token": round(num_bytes / num_tokens, 1),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=360)
    parser.add_argument("--epochs", type=float, default=0.75, help="how much of the examples is trained on")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--name", default="reading_mini")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder), args.clips, args.epochs, args.blocks)
    command = f"python benchmarks/reading.py --clips {args.clips} --epochs {args.epochs} --blocks {args.blocks}"
    result = {"command": command, "commit": commit(), "machine": machine(), **measured}
    write_json(args.out or RESULTS / f"{args.name}.json", result)
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    sys.exit(not main()["equal_losses"])
