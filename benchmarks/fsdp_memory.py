"""What FSDP holds of a GPU while it loads and while it trains, at Qwen2-Audio-7B's true size, and a checkpoint taken up by fewer GPUs.

    python benchmarks/fsdp_memory.py                     # two 80 GB GPUs of one host, 30 GB of disk, about five minutes
    python benchmarks/fsdp_memory.py --parts resume      # seconds; small model

Parts, each in processes of its own, PyTorch's allocator held to `limit_bytes`:
- whole_first: every GPU loads the whole model before it is divided, as it was done before;
- full: the main process reads into host memory, and every GPU gets its share only;
- like_8 and like_4: fewer decoder layers, so that each of two GPUs holds what each of eight or four would of the whole model, in what
  cards of 24 and 48 GB have. Activations are fewer than the whole model's by those of the missing layers.
- resume: six steps on two GPUs, and the last three once more on one from the checkpoint between, under FSDP and under DDP.

Random weights; batches of 4 clips a GPU. The output is written after every part; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from commit import commit
from train_speed import BATCH, SHARED, limit_memory
from transformers import TrainerCallback, WhisperFeatureExtractor
from true_size import build, make_data

from trimlingual.models.inputs import TrainingData
from trimlingual.models.loading import free_memory, load_model, load_processor, pick_device, resolve_base
from trimlingual.models.saving import save_model
from trimlingual.recipe import TrainSettings
from trimlingual.run.artifacts import machine, write_json
from trimlingual.run.processes import gather, is_main_process, num_processes, wait_for_everyone
from trimlingual.training import trainer as training
from trimlingual.training.sharding import load_to_share, only_here, sharding

RESULTS = Path(__file__).parent / "results"
LAYERS = {"full": 32, "whole_first": 32, "like_8": 1, "like_4": 12, "resume": 6}
LIMIT_BYTES = {"whole_first": 78e9, "full": 76e9, "like_8": 22.5e9, "like_4": 44e9, "resume": 78e9}
RESUMED = ("fsdp", "ddp")
SETTINGS = TrainSettings(
    max_steps=6, batch_size=BATCH, learning_rate=1e-5, optimizer="adamw_torch_fused", mixed_precision="bf16", fsdp=True,
    gradient_checkpointing=True, logging_steps=1, length_grouped=True, num_workers=2,
)  # fmt: skip


class Watch(TrainerCallback):
    """Seconds and the highest memory until training begins; from then on the highest anew."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        torch.cuda.reset_peak_memory_stats()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        self.loading_s = time.perf_counter() - self.started
        self.loading_bytes = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()


def load_processor_of_true_size() -> Any:
    processor = load_processor(resolve_base("builtin:mini"))
    processor.feature_extractor = WhisperFeatureExtractor(feature_size=128)
    return processor


def write_model(folder: Path, layers: int) -> float:
    """Random weights in bfloat16 as safetensors; returns the seconds."""
    started = time.perf_counter()
    processor = load_processor_of_true_size()
    size = "small" if layers == LAYERS["resume"] else "7b"
    model = build(size, processor, pick_device("auto"), torch.bfloat16, layers)
    save_model(model, processor, folder, "bfloat16")
    return round(time.perf_counter() - started, 1)


def trained(part: str, folder: Path, data: TrainingData) -> dict[str, Any]:
    """Six steps under FSDP; memory is the highest of the GPUs."""
    limit_memory(LIMIT_BYTES[part])
    watch = Watch()
    load = load_model if part == "whole_first" else load_to_share
    model = load(folder, "bfloat16", pick_device("auto"))
    if part == "whole_first":
        training.sharding = lambda model: sharding(model) | {"cpu_ram_efficient_loading": False}  # type: ignore[attr-defined]
    _, trainer = training.make_trainer(model, load_processor_of_true_size(), data, SHARED, SETTINGS, folder / part)
    trainer.args.save_strategy = "no"
    trainer.add_callback(watch)
    began = time.perf_counter()
    trainer.train()
    torch.cuda.synchronize()
    return {
        "num_parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "limit_bytes": int(LIMIT_BYTES[part]),
        "loading_s": round(watch.loading_s, 1),
        "peak_loading_bytes": max(gather(watch.loading_bytes)),
        "peak_training_bytes": max(gather(torch.cuda.max_memory_allocated())),
        "host_bytes": gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
        "training_s": round(time.perf_counter() - began - watch.loading_s, 1),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def resumed(folder: Path, data: TrainingData) -> dict[str, Any]:
    """Two processes: six steps, a checkpoint after three. One: from that checkpoint on, with the same steps of eight clips."""
    found = {}
    for name in RESUMED:
        changes = {
            "fsdp": name == "fsdp",
            "mixed_precision": "no",
            "learning_rate": 1e-3,
            "save_steps": 3,
            "save_minutes": 1e6,
        }
        settings = SETTINGS.model_copy(update=changes)
        load = load_to_share if settings.fsdp else load_model
        work = folder / f"{name}-{num_processes()}"
        if num_processes() == 1:
            shutil.copytree(folder / f"{name}-2" / "checkpoint-3", work / "checkpoint-3")
        model = load(folder, "float32", pick_device("auto"))
        info = training.train_(model, load_processor_of_true_size(), data, SHARED, settings, work)
        found[name] = [entry["loss"] for entry in info["losses"]]
        del model, info
        free_memory()
    return found


def work(part: str, folder: Path, out: Path) -> None:
    """One process of several."""
    torch.cuda.set_device(pick_device("auto"))
    with tempfile.TemporaryDirectory() as sounds:
        data = TrainingData(*make_data(Path(sounds), 64, load_processor_of_true_size()))
        wait_for_everyone()
        with only_here():
            result = resumed(folder, data) if part == "resume" else trained(part, folder, data)
        wait_for_everyone()
    if is_main_process():
        write_json(out, result)


def launched(part: str, folder: Path, processes: int, timeout_s: float) -> dict[str, Any]:
    """What the processes of a part found, or how they failed."""
    out = folder / f"{part}-{processes}.json"
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", __file__]
    started = time.perf_counter()
    words += ["--work", part, "--folder", str(folder), "--out", str(out)]
    threads = os.environ | {"OMP_NUM_THREADS": "8"}  # torchrun's is 1, and the main process casts the whole model
    with subprocess.Popen([sys.executable, *words], env=threads) as child:
        try:
            child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            child.terminate()
    result = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {"error": f"exit {child.returncode}"}
    return result | {"seconds": round(time.perf_counter() - started, 1)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    record: dict[str, Any] = {
        "command": f"python benchmarks/fsdp_memory.py --parts {' '.join(args.parts)} --budget {args.budget:g}",
        "commit": commit(args.commit),
        "machine": machine(),
        "settings": {"clips_per_gpu": BATCH, **SETTINGS.model_dump(exclude_defaults=True)},
        "results": {},
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        for part in args.parts:
            left = args.budget - (time.perf_counter() - started)
            if left < 0:
                record["results"][part] = {"error": "no time was left"}
                continue
            folder = Path(temporary) / str(LAYERS[part])
            written_s = write_model(folder, LAYERS[part]) if not folder.is_dir() else 0.0
            free_memory()  # the GPU's, for the processes that come
            result = launched(part, folder, 2, 120) | {"writing_s": written_s}
            if part == "resume" and "error" not in result:
                result["on_one"] = launched(part, folder, 1, 120)
            record["results"][part] = result
            print(f"{part}: {json.dumps(result)}", flush=True)
            write_json(args.out, record)
    print(json.dumps(record))
    return record


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=list(LIMIT_BYTES), default=["full", "like_8", "resume", "like_4", "whole_first"]
    )
    parser.add_argument("--budget", type=float, default=400.0, help="seconds after which no further part starts")
    parser.add_argument(
        "--folder", type=Path, help="where the models are written; default: the system's temporary folder"
    )
    parser.add_argument("--commit", default="", help="default: git's")
    parser.add_argument("--out", type=Path, default=RESULTS / "fsdp_memory_7b.json")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        work(args.work, args.folder, args.out)
    else:
        measure(args)


if __name__ == "__main__":
    main()
