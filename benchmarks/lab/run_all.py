"""The laboratory from text to tables by one command: speech, base, then experiments, several at a time on each GPU.

    python benchmarks/lab/run_all.py --lab runs/lab --minutes 9                      # again and again, until it says that all is done
    python benchmarks/lab/run_all.py --lab runs/lab --gpu 1 --at-once 7 by-loss system-a:0,1,2   # chosen ones, on the second GPU

Without names: every experiment of experiments.py with seed 0, and systems and sizes with the seeds that docs/results.md has. An
experiment that has its result is left out, one that another process of this script runs is left to it, so one process for each GPU
may share a list. One that fails goes on once more after all others: together they can be short of GPU memory. What is stopped after
--minutes goes on where it was. Where NVIDIA's MPS is installed it is started: trainings of this size leave a GPU mostly idle. It stays;
`echo quit | CUDA_MPS_PIPE_DIRECTORY=LAB/mps nvidia-cuda-mps-control` ends it. What each experiment prints is in LAB/logs/.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from experiments import BUDGETS, EXPERIMENTS, SYSTEMS
from filelock import FileLock, Timeout

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
THREE, TWO = (0, 1, 2), (0, 1)
TRIES = 2
STOP_S = 60  # what a stopped training gets to save itself
Job = tuple[str, int]


def jobs(words: Sequence[str]) -> list[Job]:
    """(name, seed) of each word, NAME or NAME:SEED,SEED; of everything without words."""
    if not words:
        seeds = {**dict.fromkeys(SYSTEMS, THREE), **dict.fromkeys(BUDGETS, TWO), "third": (0,)}
        return [(name, seed) for name in EXPERIMENTS for seed in seeds.get(name, (0,))]
    found = []
    for word in words:
        name, _, seeds = word.partition(":")
        if name not in EXPERIMENTS:
            raise SystemExit(f"{name!r} is not an experiment; there are: {', '.join(EXPERIMENTS)}")
        found += [(name, int(seed)) for seed in (seeds or "0").split(",")]
    return found


class Runner:
    """Commands of the laboratory, each with a log of its own, until the time is over."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.lab = args, args.lab.absolute()
        self.started = time.monotonic()
        self.logs = self.lab / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        (self.lab / "locks").mkdir(exist_ok=True)
        self.failed: list[str] = []

    def left(self) -> float:
        return 60 * self.args.minutes - (time.monotonic() - self.started)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:6.0f} s  {text}", flush=True)

    def run(self, name: str, *words: str, mps: bool = False) -> bool:
        """Whether the command came to its end; one that fails or is stopped is said."""
        started = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        # The trainings beside it need the memory that PyTorch would keep after a long batch.
        environment |= {"PYTORCH_CUDA_ALLOC_CONF": "garbage_collection_threshold:0.4"}
        environment |= {"CUDA_VISIBLE_DEVICES": str(self.args.gpu), "OMP_NUM_THREADS": "2"}
        if mps:
            environment |= mps_folders(self.lab)
        with (
            (self.logs / f"{name}.txt").open("a") as log,
            subprocess.Popen([sys.executable, *words], stdout=log, stderr=log, env=environment, cwd=ROOT) as child,
        ):
            try:
                code: int | None = child.wait(max(0.0, self.left()))
            except subprocess.TimeoutExpired:
                child.terminate()
                try:
                    child.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    child.kill()
                code = None
        if code:
            self.failed.append(name)
        end = {0: "done", None: "stopped"}.get(code, f"FAILED ({code}): {self.logs / name}.txt")
        self.say(f"{name}: {end} after {time.monotonic() - started:.0f} s")
        return code == 0

    def prepare(self) -> bool:
        """Speech, the untrained base, and the base: trained, or from the pieces of another machine."""
        lab, args = ["--lab", str(self.lab)], self.args
        with FileLock(self.lab / "locks" / "prepare.lock"):
            engines = [f"--{n}-root={r}" for n, r in (("espeak", args.espeak_root), ("flite", args.flite_root)) if r]
            parts = [f"--{n}={s}" for n, s in (("encoder", args.encoder), ("decoder", args.decoder)) if s]
            base = [str(HERE / "experiments.py"), *lab, "base", *(f"--set={value}" for value in args.base)]
            carried = [str(HERE / "carry_base.py"), "pack", *lab, f"--pieces={args.pieces}"]
            if args.pieces and (args.pieces / "base-0.safetensors").is_file():
                base = [carried[0], "unpack", *carried[2:]]
            # (what is there once it is done, name, command)
            steps = [
                (
                    self.lab / "speech.json",
                    "speech",
                    ["-m", "benchmarks.lab.speech", *lab, f"--scale={args.scale}", *engines],
                ),
                (self.lab / "untrained/config.json", "build_base", [str(HERE / "build_base.py"), *lab, *parts]),
                (self.lab / "base/model.safetensors", "base", base),
            ]
            if args.pieces:
                steps.append((args.pieces / "base-0.safetensors", "pack", carried))
            missing = [(name, command) for there, name, command in steps if not there.is_file()]
            return all(self.run(name, *command) for name, command in missing)

    def experiments(self, wanted: Sequence[Job]) -> None:
        """All of them, `at_once` at a time; each is held by a lock while it runs."""
        start_mps(self.lab)
        threads = [threading.Thread(target=self._some, args=(wanted,)) for _ in range(self.args.at_once)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _some(self, wanted: Sequence[Job]) -> None:
        for name, seed in [*wanted, *wanted]:
            job = f"{name}-{seed}"
            if self.left() <= 0 or self.failed.count(job) == TRIES:
                continue
            try:
                with FileLock(self.lab / "locks" / f"{job}.lock", timeout=0):
                    if not self.result(name, seed).is_file():
                        words = ["--lab", str(self.lab), name, "--seeds", str(seed), "--commit", self.args.commit]
                        words += ["--out", str(self.args.out)] if self.args.out else []
                        self.run(job, str(HERE / "experiments.py"), *words, mps=True)
            except Timeout:  # another slot or another process has it
                continue

    def result(self, name: str, seed: int) -> Path:
        return self.lab / "results" / f"lab_{name}_{seed}.json"


def mps_folders(lab: Path) -> dict[str, str]:
    """Where MPS of these experiments has its pipe and log; nothing where it is not installed."""
    if not shutil.which("nvidia-cuda-mps-control"):
        return {}
    return {"CUDA_MPS_PIPE_DIRECTORY": str(lab / "mps"), "CUDA_MPS_LOG_DIRECTORY": str(lab / "mps-log")}


def start_mps(lab: Path) -> None:
    """Start NVIDIA's MPS for all GPUs of this host, unless it runs."""
    folders = mps_folders(lab)
    for folder in folders.values():
        Path(folder).mkdir(exist_ok=True)
    if folders:
        environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"} | folders
        subprocess.run(["nvidia-cuda-mps-control", "-d"], env=environment, capture_output=True, check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME[:SEED,SEED]", help="experiments; default: all")
    parser.add_argument("--lab", type=Path, required=True, help="folder of the laboratory; text in its text/")
    parser.add_argument("--gpu", type=int, default=0, help="its number")
    parser.add_argument("--at-once", type=int, default=5, help="experiments that share the GPU; 25 to 57 GB each")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so many, to go on later")
    parser.add_argument("--espeak-root", help="as in speech.py")
    parser.add_argument("--flite-root", help="as in speech.py")
    parser.add_argument("--encoder", help="as in build_base.py")
    parser.add_argument("--decoder", help="as in build_base.py")
    parser.add_argument(
        "--pieces", type=Path, help="folder to pack the trained base into; filled: where it comes from (carry_base.py)"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="share of all sets, for a trial")
    parser.add_argument("--base", action="append", default=[], metavar="KEY=VALUE", help="for base.yaml")
    parser.add_argument("--commit", default="", help="where there is no Git: the commit that is written down")
    parser.add_argument("--out", type=Path, help="copy the results there after each experiment")
    args = parser.parse_args()
    wanted = jobs(args.names)
    runner = Runner(args)
    if not runner.prepare():
        raise SystemExit("not prepared: the same command goes on" if runner.left() <= 0 else "the preparation failed")
    runner.experiments(wanted)
    missing = [f"{name}:{seed}" for name, seed in wanted if not runner.result(name, seed).is_file()]
    if missing:
        raise SystemExit(f"{len(missing)} of {len(wanted)} are not done: {' '.join(missing)}")
    runner.say(f"all {len(wanted)} are done")


if __name__ == "__main__":
    main()
