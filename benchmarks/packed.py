"""The built-in model in every number format, side by side: seconds per clip, and which translations packed weights change.

    python benchmarks/packed.py [--clips 12] [--rounds 3] [--batches 1,16]      # one thread on a CPU; a GPU if there is one

Every round times every format once, in turn; the fastest round counts. int4 has groups of 64 and embeddings and head in 8 bits.
"packed" computes on the packed integers, "unpacked" on the plain weights that they stand for: the two should say the same, but for
rounding. Prints one JSON document and writes it to benchmarks/results/packed_mini_cpu.json, _cuda on a GPU (or --out).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from commit import commit

from trimlingual.data.sources import read_source
from trimlingual.decoding.translate_clips import translate_clips
from trimlingual.evaluation.cost import Stopwatch
from trimlingual.models.loading import load_model, load_processor, resolve_base
from trimlingual.quantization.int4 import save_packed
from trimlingual.quantization.nf4 import bitsandbytes_config
from trimlingual.recipe import BuiltinSource, QuantizeSettings, load_recipe
from trimlingual.run.artifacts import machine, write_json

RESULTS = Path(__file__).parent / "results"
INT4 = QuantizeSettings(scheme="int4", group_size=64, eight_bit=["embeddings", "lm_head"])
# Compared with the unpacked weights of the same dtype.
PAIRS = {"int4, packed, bfloat16": "int4, unpacked, bfloat16", "int4, packed, float32": "int4, unpacked, float32"}


def models(folder: Path, device: torch.device) -> dict[str, Any]:
    """The built-in model in each format; in float32 a CPU has no packed one."""
    base = resolve_base("builtin:mini")
    cpu = torch.device("cpu")
    save_packed(load_model(base, "float32", cpu), load_processor(base), folder, INT4, "bfloat16")
    made = {
        "float32": load_model(base, "float32", device),
        "bfloat16": load_model(base, "bfloat16", device),
        "nf4, bfloat16": load_model(base, "bfloat16", device, bitsandbytes_config(QuantizeSettings(scheme="nf4"))),
        "int4, unpacked, float32": load_model(folder, "float32", device),
        "int4, unpacked, bfloat16": load_model(folder, "bfloat16", device),
        "int4, packed, bfloat16": load_model(folder, "bfloat16", device, keep_packed=True),
    }
    if device.type == "cuda":
        made["int4, packed, float32"] = load_model(folder, "float32", device, keep_packed=True)
    return made


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--commit", default="", help="default: git's")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    recipe, rows = load_recipe("mini"), []
    with tempfile.TemporaryDirectory() as scratch:
        clips = read_source(BuiltinSource(kind="builtin", split="test"), recipe.task.target_languages, Path(scratch))
        clips = clips[: args.clips]
        made, processor = models(Path(scratch) / "int4", device), load_processor(resolve_base("builtin:mini"))
        for batch in map(int, args.batches.split(",")):
            decode = recipe.decode.model_copy(update={"batch_size": batch})
            seconds: dict[str, float] = {}
            said: dict[str, list[str]] = {}
            for _ in range(args.rounds):
                for name, model in made.items():
                    with Stopwatch(device) as watch:
                        found = translate_clips(model, processor, recipe.task, clips, decode, label=name)
                    said[name] = [translation.hypothesis for translation in found]
                    seconds[name] = min(seconds.get(name, watch.seconds), watch.seconds)
            rows += [
                {"batch": batch, "format": name, "seconds_per_clip": round(seconds[name] / len(clips), 4)}
                for name in made
            ]
            for row in rows:
                if row["batch"] == batch and (other := PAIRS.get(row["format"])):
                    pairs = [*zip(said[row["format"]], said[other])]
                    row |= {"compared": len(pairs), "different": sum(a != b for a, b in pairs)}
    result = {
        "command": "python benchmarks/packed.py " + shlex.join(sys.argv[1:] if arguments is None else arguments),
        "commit": commit(args.commit),
        "machine": machine(),
        "rows": rows,
    }
    out = args.out or RESULTS / f"packed_mini_{device.type}.json"
    out.parent.mkdir(exist_ok=True, parents=True)
    write_json(out, result)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
