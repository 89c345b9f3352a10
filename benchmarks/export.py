"""Whether what ships gives what was scored: every test clip, translated by plain transformers in a process of its own, in every format.

    python benchmarks/export.py [--model runs/mini/recovered] [--clips 120] [--also OTHER/bin/python]

Takes a model of a run of the mini recipe (without --model the built-in one), makes the 4-bit folders of it with
the stage itself, evaluates each (our decoder, in batches), exports it, and has `generate()` translate all clips one at a time from the
exported folder. Only translations that are the same to the letter count as equal. Answers that reached the bound on new tokens are left
out, for plain `generate()` has another bound. --also repeats it with another environment's transformers, which needs nothing of ours.
Prints a line a format, then one JSON document, and writes it to benchmarks/results/export_mini.json (elsewhere with --out).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimlingual.data.sources import Clip, read_source
from trimlingual.data.splits import Split
from trimlingual.evaluation.cost import disk_bytes
from trimlingual.evaluation.results import read_translations
from trimlingual.exports.proof import NEAR_TIE, translate_plainly
from trimlingual.exports.target import Finished
from trimlingual.models.inputs import Example, TrainingData
from trimlingual.models.loading import resolve_base
from trimlingual.recipe import BuiltinSource, QuantizeSettings, Recipe, load_recipe
from trimlingual.run.artifacts import machine
from trimlingual.run.lineage import ModelFolder, read_lineage
from trimlingual.stages.evaluate import evaluate
from trimlingual.stages.export import export
from trimlingual.stages.quantize import quantize

RESULTS = Path(__file__).parent / "results"
NF4 = {"scheme": "nf4"}
INT4 = {"group_size": 32, "rounding": "nearest"}  # widths of 192 and 512
EIGHT = {"eight_bit": ["embeddings", "lm_head"]}
# Format: what the weights are computed in, and how they are stored.
FORMATS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "nf4 in float32": ("float32", NF4),
    "nf4 in bfloat16": ("bfloat16", NF4),
    "int4 in bfloat16": ("bfloat16", INT4),
    "int4, 8-bit embeddings and head, in float32": ("float32", INT4 | EIGHT),
    "int4, 8-bit embeddings and head, in bfloat16": ("bfloat16", INT4 | EIGHT),
}


class Bench:
    """Makes, scores, exports and translates one format after the other."""

    def __init__(self, source: Path, num_clips: int, interpreters: Sequence[str], folder: Path):
        self.source, self.interpreters, self.folder = source, interpreters, folder
        self.train = self.clips("train")[:16]  # measured by the quantisation, not trained on
        self.test = Split("test", tuple(self.clips("test")[:num_clips]))

    def clips(self, split: Any) -> list[Clip]:
        return read_source(BuiltinSource(kind="builtin", split=split), ["de", "zh"], self.folder)

    def row(self, dtype: str, stored: dict[str, Any] | None) -> dict[str, Any]:
        """The figures of one format."""
        recipe = load_recipe("mini", [f"model.dtype={dtype}"])
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        path = self.source if stored is None else self.quantized(recipe, stored, folder / "quantized")
        model, scores = ModelFolder(path, read_lineage(path, recipe.model.base)), folder / "scores"
        scores.mkdir()
        evaluate("exported", model, self.test, recipe.shared, recipe.evaluate, None, scores)
        started = time.perf_counter()
        made = export(Finished(model, recipe, scores, self.test.clips), "transformers", folder / "exported")
        proof = made["outcomes"][0]["proof"]
        seconds = round(time.perf_counter() - started, 1)
        clips = {clip.id: clip for clip in self.test.clips}
        rows = [(code, row) for code in recipe.task.target_languages for row in read_translations(scores, code)]
        compared = [(code, row) for code, row in rows if not row["truncated"]]
        asked = [(clips[row["id"]], code) for code, row in compared]
        recorded = [row["hypothesis"].strip() for _, row in compared]
        plain = []
        for python in self.interpreters:
            answer = translate_plainly(folder / "exported", recipe, asked, python, recorded)
            equal = [said == before for said, before in zip(answer["said"], recorded, strict=True)]
            by_language = {
                code: f"{sum(same for same, (_, of) in zip(equal, asked) if of == code)} of {sum(of == code for _, of in asked)}"
                for code in recipe.task.target_languages
            }
            ties = sum(not same and margin <= NEAR_TIE for same, margin in zip(equal, answer["margins"]))
            plain.append(
                {"versions": answer["versions"], **by_language, "share_equal": round(sum(equal) / len(equal), 4),
                 "parted_at_a_near_tie": ties, "parted_otherwise": equal.count(False) - ties}
            )  # fmt: skip
        return {
            "dtype": dtype, "disk_bytes": disk_bytes(folder / "exported"), "not_compared_truncated": len(rows) - len(compared),
            "proof": {"compared": proof["compared"], "equal": proof["equal"]}, "export_seconds_with_proof": seconds, "plain": plain,
        }  # fmt: skip

    def quantized(self, recipe: Recipe, stored: dict[str, Any], out: Path) -> Path:
        """The 4-bit folder: rounded, nothing trained."""
        out.mkdir()
        settings = QuantizeSettings(train=None, compute_dtype=recipe.model.dtype, **stored)
        examples = [Example(i, clip.id, "de", clip.references["de"]) for i, clip in enumerate(self.train)]
        source = ModelFolder(self.source, read_lineage(self.source, recipe.model.base))
        quantize(source, TrainingData(self.train, examples), recipe.shared, settings, out)
        return out


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:mini", help="or a folder of a run of the mini recipe")
    parser.add_argument("--clips", type=int, default=120)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--also", help="an interpreter with another version of transformers")
    parser.add_argument("--out", type=Path, default=RESULTS / "export_mini.json")
    args = parser.parse_args(arguments)
    interpreters = [sys.executable, *([args.also] if args.also else [])]
    name = "/".join(Path(args.model).parts[-2:]) if Path(args.model).is_dir() else args.model
    result: dict[str, Any] = {
        "command": f"benchmarks/export.py --model {name} --clips {args.clips}{' --also PYTHON' if args.also else ''}",
        "machine": machine(),
        "formats": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(resolve_base(args.model), args.clips, interpreters, Path(folder))
        for name in args.formats:
            row = result["formats"][name] = bench.row(*FORMATS[name])
            print(f"{name:46} {json.dumps(row)}", flush=True)
    print(json.dumps(result))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
