"""Training speed and memory at Qwen2-Audio-7B's true size (random weights): the published notebook's set-up against ours, in one run.

    python benchmarks/train_speed.py --out benchmarks/results/train_speed.json          # one 80 GB GPU, a few minutes
    python benchmarks/train_speed.py --size small                                       # the same path on a CPU, no speeds to quote

Published (Moslem 2025, notebook `QwenAudio-FineTuning`): transformers' Trainer and the model's own forward, so windows of 30 s and
logits of the whole sequence; batches of 4 in random order; audio prepared in the training process; QLoRA after
`prepare_model_for_kbit_training` (float32 norms and embeddings, gradient checkpointing), bfloat16 autocast. Its full fine-tuning
holds float32 weights and Adam states, 134 GB before activations; to fit the GPU at all it gets bfloat16 weights, bitsandbytes' 8-bit
Adam, which transformers knows by name, and gradient checkpointing here. Ours: the shipped recipes through `finetune.make_trainer`, the
same clips, batches of 4 as well.

Every set-up trains one epoch of the same clips after a few steps of warm-up. The output is written after every part; a part that
fails is recorded with its error and costs no other part anything. Prints a table, then one JSON document.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from commit import commit
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, WhisperFeatureExtractor
from true_size import build, make_data, quantize_

from trimlingual.data.audio import load_audio
from trimlingual.models.inputs import Collator, Example, Prompter, TrainingData
from trimlingual.models.loading import load_processor, resolve_base
from trimlingual.recipe import (
    DecodeSettings,
    LoraSettings,
    ModelSettings,
    SharedSettings,
    TaskSettings,
    TrainSettings,
    load_recipe,
)
from trimlingual.run.artifacts import machine, write_json
from trimlingual.training.lora import add_lora
from trimlingual.training.loss import answer_forward
from trimlingual.training.trainer import checkpoint_layers_, make_trainer

TASK = TaskSettings(target_languages=["de"])
SHARED = SharedSettings(TASK, ModelSettings(base="benchmark"), DecodeSettings())
BATCH = 4  # the notebook's
WARM_UP = 3  # steps
DECODER_LINEAR = r".*language_model.*_proj"


class WarmUpFirst(Sampler[int]):
    """The first steps of an order twice, so that what is timed after them is the whole epoch."""

    def __init__(self, inner: Any, num_examples: int):
        self.inner, self.num_examples = inner, min(num_examples, len(inner))

    def __len__(self) -> int:
        return len(self.inner) + self.num_examples

    def __iter__(self) -> Iterator[int]:
        order = list(self.inner)
        return iter(order[: self.num_examples] + order)


class Clock(TrainerCallback):
    """Wall-clock time at the end of the warm-up and of every block of steps, the GPU's queue emptied."""

    def __init__(self, marks: list[int], device: torch.device):
        self.marks, self.device, self.times = marks, device, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.marks:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())


class Bench:
    """The data, the machine and the results so far."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args = args
        self.folder = folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.processor = load_processor(resolve_base("builtin:mini"))
        self.processor.feature_extractor = WhisperFeatureExtractor(feature_size=128)
        self.clips, self.examples = make_data(folder, args.clips, self.processor)
        seconds = [clip.duration_s for clip in self.clips]
        self.record: dict[str, Any] = {
            "command": f"python benchmarks/train_speed.py --size {args.size} --clips {args.clips} --blocks {args.blocks} "
            f"--workers {args.workers} --parts {' '.join(args.parts)}",
            "commit": args.commit,
            "machine": machine(),
            "settings": {
                "size": args.size, "num_clips": len(seconds), "mean_s": round(sum(seconds) / len(seconds), 2),
                "durations": "log-normal, median 7.5 s, cut to 3-20 s", "batch_size": BATCH, "warm_up_steps": WARM_UP,
                "blocks": args.blocks, "published": "see the head of benchmarks/train_speed.py",
            },
            "results": {},
            "speedup": {},
        }  # fmt: skip

    def save(self) -> None:
        if self.args.out:
            write_json(Path(self.args.out), self.record)

    def part(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Run one part; record what it returns, or its error."""
        started = time.perf_counter()
        try:
            result = run()
        except Exception as error:  # recorded; the other parts go on
            result = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        result["part_s"] = round(time.perf_counter() - started, 1)
        self.record["results"][name] = result
        self.save()
        print(f"{name}: {json.dumps(result)}", flush=True)

    def settings(self, train: TrainSettings, **changes: Any) -> TrainSettings:
        """A recipe's settings for one timed epoch."""
        steps = WARM_UP + len(self.examples) // BATCH
        return train.model_copy(
            update={
                "max_steps": steps,
                "batch_size": BATCH,
                "num_workers": self.args.workers,
                "save_minutes": 1e6,
                **changes,
            }  # no checkpoint but the last: others would count as training
        )

    def ours(self, model: Any, settings: TrainSettings, num_steps: int | None = None) -> dict[str, Any]:
        """One epoch (or `num_steps`) as the package trains; the model is as it was afterwards, but for its weights."""
        shutil.rmtree(self.folder / "work", ignore_errors=True)  # audio states of another model
        started = time.perf_counter()
        trained, trainer = make_trainer(
            model, self.processor, TrainingData(self.clips, self.examples), SHARED, settings, self.folder / "work"
        )
        set_up_s = round(
            time.perf_counter() - started, 2
        )  # with a frozen tower every clip is encoded here, once for all epochs
        try:
            return {"set_up_s": set_up_s} | self.timed(trainer, settings.model_dump(exclude_defaults=True), num_steps)
        finally:
            self.restore(model, trained)

    def published(self, model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """One epoch with transformers' Trainer and the model's own forward; `model` may be a PEFT model."""
        collate = Collator(Prompter(self.processor, TASK), lambda i: load_audio(self.clips[i].audio), whole_window=True)

        def collator(examples: list[Example]) -> dict[str, Any]:
            return {name: value for name, value in collate(examples).items() if name != "ids"}

        arguments |= {
            "per_device_train_batch_size": BATCH, "learning_rate": 1e-5, "lr_scheduler_type": "cosine", "logging_steps": 1,
            "max_steps": WARM_UP + len(self.examples) // BATCH,
        }  # fmt: skip
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(self.folder / "work"), remove_unused_columns=False, label_names=["labels"],
                report_to="none", use_cpu=self.device.type == "cpu", disable_tqdm=True, **arguments,
            ),
            train_dataset=self.examples,
            data_collator=collator,
        )  # fmt: skip
        return self.timed(trainer, arguments)

    def timed(self, trainer: Any, settings: dict[str, Any], num_steps: int | None = None) -> dict[str, Any]:
        """Train; clips a second over the epoch and over each of its blocks, peak memory, and how busy the GPU is in a step."""
        batch_size = trainer.args.per_device_train_batch_size
        epoch = num_steps or len(self.examples) // batch_size
        marks = sorted({WARM_UP + round(epoch * i / self.args.blocks) for i in range(self.args.blocks + 1)})
        clock = Clock(marks, self.device)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        trainer.args.save_strategy = "no"
        trainer.args.max_steps = WARM_UP + epoch
        sampler = trainer._get_train_sampler
        trainer._get_train_sampler = lambda dataset=None: WarmUpFirst(sampler(dataset), WARM_UP * batch_size)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        losses = trainer.train().training_loss
        blocks = [
            batch_size * (end - start) / (to - since)
            for start, end, since, to in zip(marks, marks[1:], clock.times, clock.times[1:])
        ]
        assert len(clock.times) == len(marks), (clock.times, marks)
        seconds = clock.times[-1] - clock.times[0]
        result: dict[str, Any] = {
            "clips_per_s": round(batch_size * epoch / seconds, 3),
            "step_s": round(seconds / epoch, 4),
            "blocks_clips_per_s": [round(block, 3) for block in blocks],
            "training_loss": round(losses, 4),
            "settings": settings,
        }
        if self.device.type == "cuda":
            result["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
            result["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
            if num_steps is None:
                result["gpu_busy_s"] = self.gpu_busy_s(trainer)
        return result

    def gpu_busy_s(self, trainer: Any) -> dict[str, float] | str:
        """Seconds in which kernels ran in one forward and backward of a batch of clips of middle length."""
        from torch.profiler import ProfilerActivity, profile

        by_length = sorted(self.examples, key=lambda e: self.clips[e.clip].duration_s)
        middle = len(by_length) // 2
        try:
            batch = trainer.data_collator(by_length[middle : middle + BATCH])
            started = time.perf_counter()
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                trainer.training_step(trainer.model_wrapped, batch)
                torch.cuda.synchronize()
            wall = time.perf_counter() - started
            busy = sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6
        except Exception as error:  # a diagnosis, not a result
            return f"{type(error).__name__}: {error}"
        return {"busy_s": round(busy, 4), "wall_s_with_profiler": round(wall, 4)}

    def restore(self, model: Any, trained: Any) -> None:
        """Take adapter, gradients, training forward and checkpointing off the model."""
        for name in ("forward", "_original_forward", "peft_config"):
            vars(model).pop(name, None)
        if trained is not model:
            trained.unload()
        model.zero_grad(set_to_none=True)
        checkpoint_layers_(model, False)

    def ratio(self, name: str, ours: str, published: str) -> None:
        """Clips a second of ours over the published: of the epoch, and of the blocks (median, min, max)."""
        results = self.record["results"]
        if "clips_per_s" not in results.get(ours, {}) or "clips_per_s" not in results.get(published, {}):
            return
        of_blocks = [
            a / b for a, b in zip(results[ours]["blocks_clips_per_s"], results[published]["blocks_clips_per_s"])
        ]
        self.record["speedup"][name] = {
            "epoch": round(results[ours]["clips_per_s"] / results[published]["clips_per_s"], 3),
            "median": round(median(of_blocks), 3),
            "min": round(min(of_blocks), 3),
            "max": round(max(of_blocks), 3),
        }
        print(f"speedup {name}: {self.record['speedup'][name]}", flush=True)


def limit_memory(num_bytes: float | None) -> None:
    """Bound PyTorch's allocator to so many bytes (CUDA's own context, about half a gigabyte, comes on top)."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, num_bytes / total) if num_bytes else 1.0)


def equal_loss(bench: Bench) -> dict[str, Any]:
    """float32, a small model, the same batch: the published loss (30 s windows, all logits) and ours."""
    model = build("small", bench.processor, torch.device("cpu"), torch.float32)
    prompter = Prompter(bench.processor, TASK)
    losses = []
    with torch.no_grad():
        for whole_window in (True, False):
            collator = Collator(prompter, lambda i: load_audio(bench.clips[i].audio), whole_window=whole_window)
            batch = collator(bench.examples[:BATCH])
            batch.pop("ids")
            losses.append((model(**batch).loss if whole_window else answer_forward(model)(**batch)["loss"]).item())
    return {"published_loss": losses[0], "our_loss": losses[1], "difference": abs(losses[0] - losses[1])}


def run_qlora(bench: Bench) -> None:
    """The paper's system A."""
    quantization = load_recipe("qwen2-audio-en-de-qlora").quantize
    assert quantization is not None
    settings = bench.settings(quantization.train)
    model = build(bench.args.size, bench.processor, bench.device, torch.bfloat16)
    quantize_(model)
    frozen = {"freeze": ["audio_tower"], "lora": LoraSettings(target_modules=DECODER_LINEAR)}
    always = {"checkpoint_from_tokens": 0}
    bench.ours(model, settings, 12)  # a fresh machine is slow for its first half-minute
    bench.part("qlora_ours", lambda: bench.ours(model, settings))
    bench.part("qlora_ours_frozen_tower", lambda: bench.ours(model, settings.model_copy(update=frozen)))
    for batch_size in (4, 8):
        changes = {**always, "batch_size": batch_size}
        limit_memory(24e9)
        bench.part(
            f"qlora_24gb_batch_{batch_size}", lambda c=changes: bench.ours(model, settings.model_copy(update=c), 6)
        )
        limit_memory(None)
    bench.part("qlora_published", lambda: bench.published(*kbit_prepared(model, quantization.train.lora)))
    bench.ratio("qlora", "qlora_ours", "qlora_published")
    bench.ratio("qlora_frozen_tower", "qlora_ours_frozen_tower", "qlora_published")


def kbit_prepared(model: Any, lora: LoraSettings) -> tuple[Any, dict[str, Any]]:
    """The notebook's PEFT model and what it sets of the Trainer's arguments."""
    from peft import prepare_model_for_kbit_training

    return add_lora(prepare_model_for_kbit_training(model), lora, 0), {"bf16": True}


def run_full(bench: Bench) -> None:
    """Full fine-tuning, within 80 GB."""
    finetune = load_recipe("qwen2-audio-en-de").finetune
    assert finetune is not None
    on_cpu = {"optimizer": "adamw_torch"} if bench.device.type == "cpu" else {}
    settings = bench.settings(finetune, **on_cpu)
    model = build(bench.args.size, bench.processor, bench.device, torch.bfloat16)
    limit_memory(80e9)
    frozen = {"freeze": ["audio_tower"]}
    bench.part("full_ours", lambda: bench.ours(model, settings))
    published = {
        "optim": "adamw_bnb_8bit", "weight_decay": finetune.weight_decay, "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }  # fmt: skip
    bench.part("full_published", lambda: bench.published(model, published))
    bench.restore(model, model)
    bench.part("full_ours_frozen_tower", lambda: bench.ours(model, settings.model_copy(update=frozen)))
    limit_memory(None)
    bench.ratio("full", "full_ours", "full_published")
    bench.ratio("full_frozen_tower", "full_ours_frozen_tower", "full_published")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["7b", "small"], default="7b")
    parser.add_argument("--clips", type=int, default=132, help="a multiple of the batch size, 4")
    parser.add_argument("--blocks", type=int, default=3, help="parts of the epoch timed apart")
    parser.add_argument("--workers", type=int, default=4, help="loading processes of ours, as in the recipes")
    parser.add_argument("--parts", nargs="+", choices=["qlora", "full"], default=["qlora", "full"])
    parser.add_argument("--commit", default="", help="default: git's")
    parser.add_argument("--out", default=None, help="JSON file, written after every part")
    args = parser.parse_args(argv)
    args.commit = commit(args.commit)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        bench.part("equal_loss_float32", lambda: equal_loss(bench))
        for name, run in (("qlora", run_qlora), ("full", run_full)):
            if name in args.parts:
                try:
                    run(bench)
                except Exception as error:  # building the model, say: the other part goes on
                    bench.record["results"][name] = {"error": f"{type(error).__name__}: {error}"}
                gc.collect()
    bench.record["seconds"] = round(time.perf_counter() - started, 1)
    bench.save()
    for name, result in bench.record["results"].items():
        peak = result.get("peak_allocated_bytes", 0) / 1e9
        print(f"{name:35} {result.get('clips_per_s', result.get('error', ''))!s:>10} clips/s  peak {peak:5.1f} GB")
    print(json.dumps(bench.record))
    return bench.record


if __name__ == "__main__":
    main()
