"""The whole recipe of system B on 1, 2, 4 and 8 GPUs of one host: seconds by stage, and whether all come to the same.

    python benchmarks/recipe_on_gpus.py --work FOLDER --processes 1 2 4 8              # again and again, until it says that all is done
    python benchmarks/recipe_on_gpus.py --base random:qwen2-audio-tiny --work FOLDER   # the same path on a CPU

Random weights of the true shapes, few clips of noise, few steps; each step takes the same eight clips whatever the number of GPUs.
The search runs on the base model, whose weights are the same everywhere: the teacher's differ in their last bits, on which a random
model's scores and translations hang. So the recipe itself removes the middle block, and its trainings take the references alone. With
several GPUs the teacher is also trained under FSDP, with float32 weights, as one GPU cannot.

Every number of GPUs has runs of its own under --work, made by the command line under torchrun: what is stopped after --minutes loses
nothing, and the same command goes on. Of a run that is done only its results are kept. At 7B a run needs 130 GB of disk, and FSDP
220 GB (a RAM disk will do; without either give --no-fsdp). The output is written after each run; the last line is one JSON document.

What must be the same as with one GPU: the plan, and the losses within `LOSS_TOLERANCE`, since additions are in another order. Distilled
clips and translations may differ where two words are as likely, in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import psutil
import torch
from commit import commit
from true_size import write_manifests

from trimlingual.evaluation.results import read_translations
from trimlingual.models.loading import load_processor, resolve_base
from trimlingual.run.artifacts import machine, write_json
from trimlingual.search.plan import read_plan

RESULTS = Path(__file__).parent / "results"
RECIPE = "qwen2-audio-en-de"
CLIPS = {"train": 96, "select": 48, "test": 48}
STEP = 8  # clips of all GPUs together
STEPS = 12
LOSS_TOLERANCE = 0.02  # relative, in bfloat16
TRAINED = ("finetune", "recover", "quantize.train")
FSDP = ("fsdp=true", "optimizer=adamw_torch_fused", "mixed_precision=bf16", "checkpoint_from_tokens=0")
PATIENCE_S = 120  # for a run that was asked to stop


def overrides(base: str, manifests: dict[str, Path], processes: int) -> list[str]:
    """The recipe's shortening: the same steps for any number of processes."""
    gpu = torch.cuda.is_available()
    given = [f"data.{split}={{kind: manifest, path: '{path}'}}" for split, path in manifests.items()]
    given += [f"model.base={base}", "data.out_of_domain=null", "data.too_long=drop", "decode.max_new_tokens=40"]
    given += [
        "evaluate.models=[teacher, quantized]",
        "evaluate.bootstrap_samples=100",
    ]
    for section in TRAINED:
        given += [
            f"{section}.batch_size={STEP // processes}",
            f"{section}.max_steps={STEPS}",
            f"{section}.logging_steps=1",
            f"{section}.data={{gold: 1}}",
        ]
        given += [] if gpu else [f"{section}.optimizer=adamw_torch", f"{section}.num_workers=0"]
    layers = load_layers(base)
    return given if gpu else [*given, "model.device=cpu", f"rank.num_layers_to_remove={layers // 4}"]


def load_layers(base: str) -> int:
    """Decoder layers of a base model."""
    config = json.loads((resolve_base(base) / "config.json").read_text(encoding="utf-8"))
    return config["text_config"]["num_hidden_layers"]


def run(words: list[str], processes: int, until: float) -> bool:
    """`trimlingual` in so many processes; whether it came to its end before `until`. Stopped, it has saved what it had."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m", "trimlingual"]
    with subprocess.Popen([sys.executable, *launcher, *words], stdout=subprocess.DEVNULL) as child:
        try:
            code = child.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                child.kill()
            return False
    if code:
        raise SystemExit(f"trimlingual {words[0]} ended with {code} in {processes} processes")
    return True


def stages(folder: Path) -> dict[str, Any]:
    """Seconds of every stage of a run; of those that train also losses, clips per second (all GPUs) and memory (the fullest GPU)."""
    found = {}
    for path in sorted(folder.rglob("artifact.json")):
        artifact = json.loads(path.read_text(encoding="utf-8"))
        info, stage = artifact["info"], {"seconds": artifact["seconds"]}
        if "losses" in info:
            stage |= {
                "losses": [entry["loss"] for entry in info["losses"]],
                "clips_per_s": round(STEP / info["seconds_per_step"], 3),
                "peak_memory_bytes": info["peak_memory_bytes"],
            }
        found[artifact["stage"]] = stage
    return found


def said(folder: Path) -> dict[str, list[str]]:
    """The translations of every model that a run evaluated."""
    return {
        each.name: [line["hypothesis"] for line in read_translations(each, "de")]
        for each in sorted((folder / "evaluations").iterdir())
    }


def outcome(name: str, folder: Path) -> dict[str, Any]:
    """What a run came to: its stages, and what is compared with the run of one GPU."""
    result: dict[str, Any] = {"stages": stages(folder)}
    if name == "search":
        result["removed"] = [removal.layer for removal in read_plan(folder / "rank").removals]
    if name == "recipe":
        result["distilled"] = (folder / "distilled" / "distilled.jsonl").read_text(encoding="utf-8").splitlines()
        result["said"] = said(folder)
    return result


def share_equal(one: list[str], other: list[str]) -> float:
    """Share of the lines that are the same."""
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def compared(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A run against that of one GPU: times, clips per second, and what must be the same."""
    result: dict[str, Any] = {"time_ratio": {}, "clips_per_s_ratio": {}, "largest_loss_difference": {}}
    for name, stage in other["stages"].items():
        before = one["stages"][name]
        if before["seconds"]:
            result["time_ratio"][name] = round(stage["seconds"] / before["seconds"], 3)
        if "losses" in stage:
            result["clips_per_s_ratio"][name] = round(stage["clips_per_s"] / before["clips_per_s"], 3)
            differences = [abs(a - b) / abs(a) for a, b in zip(before["losses"], stage["losses"], strict=True)]
            result["largest_loss_difference"][name] = max(differences)
    if losses := result["largest_loss_difference"]:
        result["losses_equal"] = max(losses.values()) <= LOSS_TOLERANCE
    if "removed" in other:
        result["same_plan"] = one["removed"] == other["removed"]
    if "said" in other:
        result["share_of_equal_translations"] = {"distilled": share_equal(one["distilled"], other["distilled"])}
        for name, lines in other["said"].items():
            result["share_of_equal_translations"][name] = share_equal(one["said"][name], lines)
    return {name: value for name, value in result.items() if value != {}}


def commands(args: argparse.Namespace, processes: int) -> dict[str, tuple[list[str], list[str]]]:
    """The runs of so many processes by name: the words of the command, and settings of its own."""
    base = ["--model", str(resolve_base(args.base))]
    found = {"search": (["rank", RECIPE, *base], []), "recipe": (["compress", RECIPE], ["rank.strategy=middle"])}
    if args.fsdp and processes > 1 and torch.cuda.is_available():
        found["fsdp"] = (["finetune", RECIPE], [f"finetune.{setting}" for setting in FSDP])
    return found


def measured(args: argparse.Namespace, processes: int, name: str, settings: list[str]) -> dict[str, Any] | None:
    """What a run came to, now or in an earlier command; None if it has to go on in another command."""
    folder, done = args.work / f"{processes}-{name}", args.work / f"{processes}-{name}.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    words, its_own = commands(args, processes)[name]
    given = [word for setting in settings + its_own for word in ("--set", setting)]
    if not run([*words, "--run-dir", str(folder), *given], processes, args.until):
        return None
    result = outcome(name, folder)
    write_json(done, result)
    shutil.rmtree(folder)
    return result


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="random:qwen2-audio-7b")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the runs; what is finished there is not run again"
    )
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="after which the run under way is stopped, to go on later"
    )
    parser.add_argument(
        "--no-fsdp", dest="fsdp", action="store_false", help="leave FSDP out, whose checkpoints are large"
    )
    parser.add_argument("--commit", default="", help="default: git's")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    if any(STEP % processes for processes in args.processes):
        parser.error(f"--processes: each must divide the {STEP} clips of a step")
    args.until = time.monotonic() + 60 * args.minutes
    args.work = args.work.resolve()
    manifests = write_manifests(args.work / "clips", load_processor(resolve_base(args.base)), CLIPS)
    flags = f"--base {args.base} --processes {' '.join(map(str, args.processes))}{'' if args.fsdp else ' --no-fsdp'}"
    mounts = [part for part in psutil.disk_partitions(all=True) if args.work.is_relative_to(part.mountpoint)]
    disk = max(mounts, key=lambda part: len(part.mountpoint))
    record: dict[str, Any] = {
        "command": f"python benchmarks/recipe_on_gpus.py {flags}",
        "commit": commit(args.commit),
        "machine": machine(),
        "setup": {"clips": CLIPS, "clips_per_step": STEP, "steps": STEPS, "loss_tolerance": LOSS_TOLERANCE, "disk": disk.fstype},
        "results": {},
        "complete": False,
    }  # fmt: skip
    to_do = [(processes, name) for processes in args.processes for name in commands(args, processes)]
    runs: dict[tuple[int, str], dict[str, Any]] = {}
    for processes, name in to_do:
        found = measured(args, processes, name, overrides(args.base, manifests, processes))
        if found is None:
            print(f"{name} in {processes} processes: not done yet; the same command goes on", flush=True)
            break
        runs[processes, name] = found
        record["results"] = {str(number): {} for number, _ in runs}
        for (number, each), result in runs.items():
            kept = {key: result[key] for key in ("stages", "removed") if key in result}
            alone = runs.get((1, each)) if number > 1 else None
            record["results"][str(number)][each] = kept | (compared(alone, result) if alone else {})
        record["complete"] = len(runs) == len(to_do)
        write_json(args.out or RESULTS / f"recipe_on_gpus_{args.base.rpartition('-')[2]}.json", record)
    print(json.dumps(record))
    return record


if __name__ == "__main__":
    main()
