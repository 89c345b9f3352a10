"""What 2, 3 and 4 bits cost a model that learned, by how its weights are rounded, on the built-in model.

    python benchmarks/bits.py [--teacher-steps 112] [--steps 45] [--clips 120]

The built-in model is fine-tuned as in the mini recipe first: that is the model that a run quantises. Then the decoder's layers get 4, 3
and 2 bits in groups of 64, rounded to the nearest step or calibrated (GPTQ), and the embedding table alone and the head alone get fewer
and fewer bits. Last, the layers at 3 and 2 bits are trained while they are rounded. Measured as in quantization.py, against the
fine-tuned model. Calibrated rounding is compared with nearest by the difference in score on the same clips, the mean over the
languages, with a 95 % interval (paired bootstrap). Prints a table, then one JSON document, and writes it to
benchmarks/results/bits_mini.json (another name with --name) after every row.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from commit import commit
from quantization import BATCH, LANGUAGES, RESULTS, Bench, teach

from trimlingual.evaluation.cost import disk_bytes
from trimlingual.evaluation.quality import paired_bootstrap_difference, sentence_statistics
from trimlingual.models.inputs import TrainingData
from trimlingual.models.tree import layer_list
from trimlingual.quantization.int4 import round_to_integers
from trimlingual.recipe import QuantizeSettings, TrainSettings
from trimlingual.run.artifacts import SCRATCH, machine
from trimlingual.run.lineage import ModelFolder, read_lineage
from trimlingual.stages.quantize import quantize

GROUP = 64
Rounding = Literal["nearest", "calibrated"]
ROWS = {"embeddings": "model.language_model.embed_tokens", "lm_head": "lm_head"}


def layers(bench: Bench, num_bits: int, rounding: Rounding, train: TrainSettings | None = None) -> None:
    """All layers of the decoder in so many bits, through the stage."""
    clips = bench.clips("train")
    num_layers = len(layer_list(bench.load(bench.base), "decoder"))
    bits = {f"decoder.{layer}.{block}": num_bits for layer in range(num_layers) for block in ("attention", "mlp")}
    settings = QuantizeSettings(
        scheme="int4", group_size=GROUP, parts=["decoder"], bits=bits, rounding=rounding, train=train
    )
    name = _name(num_bits, rounding, train is not None)
    out = bench.folder / name.replace(" ", "-").replace(",", "")
    given = ModelFolder(bench.base, read_lineage(bench.base, "builtin:mini"))
    started = time.perf_counter()
    quantize(given, TrainingData(clips, bench.examples(clips)), bench.shared, settings, out)
    shutil.rmtree(out / SCRATCH, ignore_errors=True)
    seconds = time.perf_counter() - started
    bench.measure(name, bench.load(out), "base", disk_bytes(out))
    bench.rows[name]["seconds_to_make"] = round(seconds, 1)


def _name(num_bits: int, rounding: Rounding, trained: bool) -> str:
    return f"layers in {num_bits} bits, {rounding}" + (", trained" if trained else "")


def rows(bench: Bench, part: str, num_bits: int) -> None:
    """The embedding table or the head in so many bits, all else as it was."""
    model = bench.load(bench.base)
    weight = model.get_submodule(ROWS[part]).weight
    weight.data = round_to_integers(weight.data.bfloat16(), num_bits, GROUP)[1].float()
    bench.measure(f"{part} in {num_bits} bits", model, "base")


def compared(bench: Bench) -> dict[str, Any]:
    """Score of calibrated rounding less that of nearest, for each pair of rows."""
    found = {}
    for num_bits in (4, 3, 2):
        for trained in (False, True):
            pair = [bench.rows.get(_name(num_bits, rounding, trained)) for rounding in ("calibrated", "nearest")]
            if None in pair:
                continue
            interval, p = paired_bootstrap_difference(*(_statistics(bench, row["said"]) for row in pair if row))
            name = f"{num_bits} bits" + (", trained" if trained else "")
            found[name] = {"points": asdict(interval), "p": round(p, 4)}
    return found


def _statistics(bench: Bench, said: Sequence[Any]) -> list[Any]:
    by_clip = {(row.id, row.language): row.hypothesis for row in said}
    return [
        sentence_statistics(
            metric,
            [by_clip[clip.id, code] for clip in bench.test],
            [clip.references[code] for clip in bench.test],
            code,
        )
        for code, metric in LANGUAGES.items()
    ]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher-steps", type=int, default=112)
    parser.add_argument("--steps", type=int, default=45, help="of each training on rounded weights; 45 are an epoch")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate of these")
    parser.add_argument("--clips", type=int, default=120)
    parser.add_argument("--name", default="bits_mini")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    given = arguments if arguments is not None else sys.argv[1:]
    started, result = time.perf_counter(), dict[str, Any]()
    train = TrainSettings(
        max_steps=args.steps, batch_size=BATCH, learning_rate=args.rate, save_minutes=1e6, freeze=["audio_tower"]
    )
    roundings: list[Rounding] = ["nearest", "calibrated"]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.clips)
        teach(bench, args.teacher_steps)
        bench.measure("base", bench.load(bench.base), None, disk_bytes(bench.base))
        work = [(layers, bits, rounding) for bits in (4, 3, 2) for rounding in roundings]
        work += [(rows, "embeddings", 4), (rows, "embeddings", 2), (rows, "lm_head", 4), (rows, "lm_head", 2)]
        work += [(layers, bits, rounding, train) for rounding in roundings for bits in (3, 2)]
        for do, *asked in work:
            do(bench, *asked)
            result = {
                "command": shlex.join(["python", "benchmarks/bits.py", *given]),
                "commit": commit(),
                "machine": machine(),
                "seconds": round(time.perf_counter() - started, 1),
                "num_clips": len(bench.test),
                "results": bench.results(),
                "calibrated_less_nearest": compared(bench),
            }
            args.out.mkdir(exist_ok=True)
            (args.out / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
