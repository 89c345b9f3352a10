"""What each lossy step costs a model that learned: number formats, and three ways to merge a QLoRA adapter, on the built-in model.

    python benchmarks/quantization.py [--teacher-steps 112] [--steps 45] [--clips 120]

The built-in model is fine-tuned as in the mini recipe first: that is the model that a run quantises. For every variant: signal to noise
of the logits in dB and loss at the answer tokens of the test split, BLEU, chrF++ (de) and chrF (zh) of its translations, bytes on
disk. Formats are compared with the fine-tuned model, merges with the adapter on the 4-bit model that trained it. Prints a table, then
one JSON document, and writes it to benchmarks/results/quantization_mini.json (another name with --name).
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
from pathlib import Path
from typing import Any

import torch
from commit import commit

from trimlingual.data.audio import load_audio
from trimlingual.data.sources import Clip, read_source
from trimlingual.decoding.translate_clips import translate_clips
from trimlingual.evaluation.cost import disk_bytes
from trimlingual.evaluation.quality import corpus_score
from trimlingual.models.inputs import Collator, Example, Prompter, TrainingData
from trimlingual.models.loading import load_model, load_processor, resolve_base
from trimlingual.models.saving import save_model
from trimlingual.quantization.int4 import round_to_integers, save_packed
from trimlingual.quantization.merge import merge_
from trimlingual.quantization.nf4 import bitsandbytes_config
from trimlingual.recipe import (
    BuiltinSource,
    DecodeSettings,
    LoraSettings,
    ModelSettings,
    QuantizeSettings,
    SharedSettings,
    TaskSettings,
    TrainSettings,
    load_recipe,
)
from trimlingual.run.artifacts import SCRATCH, machine
from trimlingual.run.lineage import ModelFolder, read_lineage
from trimlingual.stages.finetune import finetune
from trimlingual.stages.quantize import quantize, sqnr_db
from trimlingual.training.loss import answer_logits
from trimlingual.training.trainer import train_

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
LANGUAGES = {"de": "chrfpp", "zh": "chrf"}
BATCH = 16
NF4 = QuantizeSettings(scheme="nf4", compute_dtype="float32")


class Bench:
    """Measures models on the test split; `rows` holds what was measured."""

    def __init__(self, folder: Path, num_clips: int):
        self.task = TaskSettings(target_languages=list(LANGUAGES))
        self.shared = SharedSettings(self.task, ModelSettings(base="builtin:mini"), DecodeSettings(batch_size=32))
        self.folder = folder
        self.base = folder / "teacher"
        self.processor = load_processor(resolve_base("builtin:mini"))
        self.test = self.clips("test")[:num_clips]
        self.rows: dict[str, dict[str, Any]] = {}

    def clips(self, split: Any) -> list[Clip]:
        return read_source(BuiltinSource(kind="builtin", split=split), self.task.target_languages, self.folder)

    def examples(self, clips: Sequence[Clip]) -> list[Example]:
        return [Example(i, clip.id, code, clip.references[code]) for i, clip in enumerate(clips) for code in LANGUAGES]

    def load(self, folder: Path, settings: QuantizeSettings | None = None) -> Any:
        return load_model(folder, "float32", CPU, bitsandbytes_config(settings) if settings else None)

    def measure(self, name: str, model: Any, against: str | None, size: int | None = None) -> None:
        """Add a row; logits are compared with those of the row `against`."""
        started = time.perf_counter()
        collator = Collator(Prompter(self.processor, self.task), lambda index: load_audio(self.test[index].audio))
        loss, logits = answer_logits(model, collator, self.examples(self.test), BATCH)
        row: dict[str, Any] = {"loss": round(loss, 4)}
        if against:
            row["against"] = against
            row["sqnr_db"] = round(sqnr_db(self.rows[against]["logits"], logits), 2)
        said = translate_clips(model, self.processor, self.task, self.test, self.shared.decode)
        for code, metric in LANGUAGES.items():
            hypotheses = [row.hypothesis for row in said if row.language == code]
            references = [clip.references[code] for clip in self.test]
            for score in ("bleu", metric):
                row[f"{code}_{score}"] = round(corpus_score(score, hypotheses, references, code).value, 2)
        row["disk_bytes"] = size
        self.rows[name] = {**row, "logits": logits, "said": said}
        print(f"{name:46} {json.dumps(row)}  ({time.perf_counter() - started:.0f} s)", flush=True)

    def results(self) -> dict[str, dict[str, Any]]:
        """The rows without logits and translations."""
        return {n: {k: v for k, v in row.items() if k not in ("logits", "said")} for n, row in self.rows.items()}

    def saved(self, name: str, settings: QuantizeSettings, source: Path, against: str) -> None:
        """Quantise the model in `source`, save it, measure what the folder loads as."""
        out = self.folder / name.replace(" ", "-").replace(",", "")
        if settings.scheme == "int4":
            save_packed(self.load(source), self.processor, out, settings, "bfloat16")
        else:
            save_model(self.load(source, settings), self.processor, out)
        self.measure(name, self.load(out), against, disk_bytes(out))


def teach(bench: Bench, steps: int) -> None:
    """Fine-tune the built-in model with the mini recipe's settings; for `steps` steps (the recipe: 112)."""
    recipe = load_recipe("mini", [f"finetune.max_steps={steps}"])
    train, start = bench.clips("train"), resolve_base(recipe.model.base)
    folder = ModelFolder(start, read_lineage(start, recipe.model.base))
    finetune(folder, TrainingData(train, bench.examples(train)), recipe.shared, recipe.finetune, bench.base)
    shutil.rmtree(bench.base / SCRATCH)  # checkpoints


def formats(bench: Bench) -> None:
    """Each number format on the fine-tuned model."""
    bench.measure("base", bench.load(bench.base), None, disk_bytes(bench.base))
    kept = NF4.model_copy(update={"parts": ["decoder"]})
    bench.saved("nf4 decoder", kept, bench.base, "base")
    bench.saved("nf4", NF4, bench.base, "base")
    bench.saved("nf4 and lm_head", NF4.model_copy(update={"parts": [*NF4.parts, "lm_head"]}), bench.base, "base")
    for group in (32, 64):
        bench.saved(f"int4, groups of {group}", QuantizeSettings(scheme="int4", group_size=group), bench.base, "base")
    both = QuantizeSettings(scheme="int4", group_size=64, eight_bit=["embeddings", "lm_head"])
    bench.saved("int4, groups of 64, 8-bit embeddings and head", both, bench.base, "base")
    for name, module in (
        ("embeddings in 8 bits", "model.language_model.embed_tokens"),
        ("lm_head in 8 bits", "lm_head"),
    ):
        model = bench.load(bench.base)
        weight = model.get_submodule(module).weight
        weight.data = round_to_integers(weight.data.bfloat16(), 8, weight.shape[1])[1].float()
        bench.measure(name, model, "base")


def merges(bench: Bench, steps: int, rate: float) -> dict[str, Any]:
    """Train an adapter on the nf4 model, then merge it in three ways."""
    train = bench.clips("train")
    settings = TrainSettings(
        method="lora", max_steps=steps, batch_size=BATCH, learning_rate=rate, save_minutes=1e6,
        lora=LoraSettings(r=16, alpha=32, target_modules=".*language_model.*_proj"),
    )  # fmt: skip
    four = bench.load(bench.base, NF4)
    info = train_(
        four,
        bench.processor,
        TrainingData(train, bench.examples(train)),
        bench.shared,
        settings,
        bench.folder / "training",
    )
    adapted = info.pop("adapted")
    bench.measure("adapter on the nf4 model", adapted, None)
    for name, target in (("dequantised base", None), ("original base", "original")):
        merged = bench.load(bench.base)
        if target is None:
            merge_(merged, adapted)
        else:
            add_(merged, adapted)
        out = bench.folder / name.replace(" ", "-")
        save_model(merged, bench.processor, out, "bfloat16")
        bench.measure(f"merged, {name}", merged, "adapter on the nf4 model")
        bench.saved(f"merged, {name}, nf4", NF4, out, "adapter on the nf4 model")
        packed = QuantizeSettings(scheme="int4", group_size=64, eight_bit=["embeddings", "lm_head"])
        bench.saved(f"merged, {name}, int4 and 8 bits", packed, out, "adapter on the nf4 model")
    inside = adapted.merge_and_unload()  # PEFT adds the adapter to each dequantised weight and rounds it to nf4 at once
    out = bench.folder / "inside"
    save_model(inside, bench.processor, out)
    bench.measure("merged, inside 4-bit, nf4", bench.load(out), "adapter on the nf4 model", disk_bytes(out))
    return {"steps": steps, "learning_rate": rate, "training_loss": info["training_loss"]}


def on_its_steps(bench: Bench, steps: int, rate: float) -> None:
    """int4 and 8 bits by the stage itself: to the nearest step or calibrated, each untrained and trained while it is rounded."""
    train = bench.clips("train")
    whole = TrainSettings(
        max_steps=steps, batch_size=BATCH, learning_rate=rate, save_minutes=1e6, freeze=["audio_tower"]
    )
    given = ModelFolder(bench.base, read_lineage(bench.base, "builtin:mini"))
    for rounding in ("nearest", "calibrated"):
        for trained in (None, whole):
            settings = QuantizeSettings(
                scheme="int4", group_size=64, eight_bit=["embeddings", "lm_head"], rounding=rounding, train=trained,
                compute_dtype="float32",
            )  # fmt: skip
            name = f"int4 and 8 bits, {rounding}, {'trained on its steps' if trained else 'untrained'}"
            out = bench.folder / name.replace(" ", "-").replace(",", "")
            quantize(given, TrainingData(train, bench.examples(train)), bench.shared, settings, out)
            shutil.rmtree(out / SCRATCH, ignore_errors=True)
            bench.measure(name, bench.load(out), "base", disk_bytes(out))


@torch.no_grad()
def add_(target: Any, adapted: Any) -> None:
    """Add the adapter to the weights of the plain model `target`, which are not the ones it was trained on."""
    from peft.tuners.lora import LoraLayer

    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            target.get_submodule(name).weight += module.get_delta_weight(adapted.active_adapter).float()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher-steps", type=int, default=112)
    parser.add_argument("--steps", type=int, default=45, help="of both trainings; 45 are an epoch")
    parser.add_argument(
        "--rate", type=float, default=2e-4, help="learning rate of both trainings; the mini recipe's for QLoRA"
    )
    parser.add_argument("--clips", type=int, default=120)
    parser.add_argument("--name", default="quantization_mini")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.clips)
        teach(bench, args.teacher_steps)
        formats(bench)
        on_its_steps(bench, args.steps, args.rate)
        training = merges(bench, args.steps, args.rate)
    given = arguments if arguments is not None else sys.argv[1:]
    result = {
        "command": shlex.join(["python", "benchmarks/quantization.py", *given]),
        "commit": commit(),
        "machine": machine(),
        "seconds": round(time.perf_counter() - started, 1),
        "num_clips": len(bench.test),
        "training": training,
        "results": bench.results(),
    }
    args.out.mkdir(exist_ok=True)
    (args.out / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
