"""What several GPUs of one host bring at Qwen2-Audio-7B's true size (random weights): the layer search, DDP and FSDP.

    python benchmarks/several_gpus.py --processes 1 2                   # a host with two 80 GB GPUs, a few minutes
    python benchmarks/several_gpus.py --processes 1 --parts shares      # one GPU: what each of 2, 4 or 8 would have to do
    python benchmarks/several_gpus.py --size small                      # the same path on a CPU (no FSDP there), no speeds to quote

For each number of processes it starts itself under torchrun, one process a GPU. Search: the first round, every candidate, shared out.
Shares: on one GPU, that round as one of 1, 2, 4 and 8 processes does it, with the blocks of clips that go with its share of the
candidates and with those of a process that has all; what the others do, and waiting for them, is not in it.
Training: batches of 4 a GPU with the recipe's optimizer, so two GPUs take twice the clips a step (DDP); with more than one, also FSDP
with float32 weights and Adam states; PyTorch's allocator is held to 80 GB on each GPU. Prints as it goes; the last line is one JSON
document. recipe_on_gpus.py runs the whole recipe, fsdp_memory.py measures what FSDP holds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from commit import commit
from published_search import clock
from search import case_7b, make_search, some_rounds
from train_speed import Bench, limit_memory
from true_size import build

from trimlingual.recipe import RankSettings, load_recipe
from trimlingual.run.artifacts import machine, write_json
from trimlingual.run.processes import gather, is_main_process, num_processes, wait_for_everyone
from trimlingual.search.search import second_best
from trimlingual.search.sharing import GPU_BLOCK_ROWS, gpu_block_rows, longest_first, share_of

STEPS = 12
SHARED_BY = (1, 2, 4, 8)  # processes
PARTS = ("search", "full", "fsdp")
FSDP = {"fsdp": True, "optimizer": "adamw_torch_fused", "mixed_precision": "bf16", "checkpoint_from_tokens": 0}
RESULTS = Path(__file__).parent / "results"


def work(args: argparse.Namespace) -> None:
    """One process of several: all parts, each with its own model; the main process prints the results as one line of JSON."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        if "search" in args.parts:
            bench.part("search", lambda: searched(bench))
        if "shares" in args.parts and num_processes() == 1:
            bench.part("shares", lambda: shares(bench))
        finetune = load_recipe("qwen2-audio-en-de").finetune
        assert finetune is not None
        settings = bench.settings(finetune, **({} if gpu else {"optimizer": "adamw_torch"}))
        limit_memory(80e9)
        if "full" in args.parts:
            bench.part("full", lambda: trained(bench, settings))
        if "fsdp" in args.parts and gpu and num_processes() > 1:
            bench.part("full_fsdp", lambda: trained(bench, settings.model_copy(update=FSDP)))
        wait_for_everyone()
    if is_main_process():
        print(json.dumps({"results": bench.record["results"]}), flush=True)


def searched(bench: Bench) -> dict[str, Any]:
    """The first round of the layer search."""
    with tempfile.TemporaryDirectory() as folder:
        case = case_7b(Path(folder), bench.args.clips, bench.args.size)
        some_rounds(case, "chrfpp", [1], Path(folder))  # warm-up
        (found,) = some_rounds(case, "chrfpp", [1], Path(folder))["rounds"]
    return found


def shares(bench: Bench) -> dict[str, Any]:
    """Seconds of the first round for one process of several, every time the second of two goes."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        case = case_7b(Path(folder), bench.args.clips, bench.args.size)
        search = make_search(case, Path(folder) / "journal.jsonl", RankSettings(metric="chrfpp"))
        scorer = search.scorer
        parent, candidates = scorer.parent_tally().tokens, scorer.candidates(scorer.lineage)
        for processes in SHARED_BY:
            count = len(share_of(candidates, 0, processes, longest_first))
            its_own = gpu_block_rows(len(candidates), processes)
            seconds = {}
            for name, rows in (("seconds", its_own), ("seconds_with_blocks_of_one", GPU_BLOCK_ROWS)):
                scorer._gpu_block_rows = lambda rows=rows: rows  # type: ignore[method-assign]
                for _ in range(2):
                    search.known = {}
                    started = clock(case.device)
                    scorer.begin_round({}, parent)
                    mine = share_of(search._ordered(1, candidates), 0, processes, longest_first)
                    search.share_out(1, mine, scorer.blocks, second_best)
                    seconds[name] = clock(case.device) - started
            found[str(processes)] = {"num_candidates": count, "rows": its_own, **seconds}
            print(f"one of {processes}: {found[str(processes)]}", flush=True)
    for name in ("seconds", "seconds_with_blocks_of_one"):
        for share in found.values():
            share[name.replace("seconds", "ratio")] = round(share[name] / found["1"][name], 3)
    return found


def trained(bench: Bench, settings: Any) -> dict[str, Any]:
    """Some steps of full fine-tuning; the peak is the highest of the GPUs, clips a second count all of them."""
    model = build(bench.args.size, bench.processor, bench.device, torch.bfloat16)
    result = bench.ours(model, settings, STEPS)
    peaks = gather(result.get("peak_allocated_bytes"))
    names = ("step_s", "training_loss", "settings")
    return {name: result[name] for name in names} | {
        "peak_allocated_bytes": max(peaks) if peaks[0] else None,
        "clips_per_s": round(result["clips_per_s"] * num_processes(), 3),
    }


def launch(args: argparse.Namespace) -> dict[str, Any]:
    """This script once for each number of processes; what the main one says last is the result."""
    flags = f"--size {args.size} --clips {args.clips} --processes {' '.join(map(str, args.processes))}"
    flags += f" --parts {' '.join(args.parts)}"
    record: dict[str, Any] = {
        "command": f"python benchmarks/several_gpus.py {flags}",
        "commit": commit(args.commit),
        "machine": machine(),
        "results": {},
    }
    for processes in args.processes:
        words = [
            "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
            __file__, "--work", "--size", args.size, "--clips", str(args.clips), "--parts", *args.parts,
        ]  # fmt: skip
        last = ""
        with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                print(f"{processes}: {line}", end="", flush=True)
                last = line if line.startswith('{"results"') else last
        error = {"error": f"exit status {child.returncode}"}
        record["results"][str(processes)] = json.loads(last)["results"] if last else error
        write_json(args.out or RESULTS / f"several_gpus_{args.size}.json", record)
    print(json.dumps(record))
    return record


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["7b", "small"], default="7b")
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, "shares"), default=PARTS)
    parser.add_argument("--commit", default="", help="default: git's")
    parser.add_argument("--out", type=Path, help="JSON file, written after every number of processes")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.work:
        return launch(args)
    args.out, args.blocks, args.workers = None, 1, 4  # what Bench reads
    work(args)
    return None


if __name__ == "__main__":
    main()
