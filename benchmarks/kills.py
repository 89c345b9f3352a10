"""Kill the whole pipeline at random moments, start it again until it is done, and compare with a run that was left alone.

    python benchmarks/kills.py --run-dir runs/kills [--kills 100] [--seconds 20,120] [--instances 7 --threads 2] [--limit-s 1200]
        [--budget 4.9MB --budget 4.6MB]

Every kill takes the whole process group: SIGKILL, or for some (`--term-share`) SIGTERM, which may save and end by itself. A run that is
done is compared (plan, translations, distilled data, losses, every file of weights) and the next one starts, until there were enough
kills; then the last runs are left alone until they are done, so that every kill is followed by a comparison. `--limit-s` stops earlier;
`--resume` goes on in the same --run-dir. Several instances share the kills. `--kills 0 --alone 20` kills nothing: it tells whether the
machine computes the same twice, without which nothing can be said of kills. With `--budget`, twice or more, what is killed is `pareto`
over these sizes, whose runs are compared alike. Writes RUN_DIR/result.json, and with --name
benchmarks/results/NAME.json, and prints it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from commit import commit

from trimlingual.run.handed_on import TEACHER_TOKENS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GRACE_S = 90  # for a run that got SIGTERM to save and end
PLAN = ("removals", "bits", "num_bytes", "baseline_score", "baseline_scores", "curve")
PARTIALS = ("*.partial", "*/*.partial", "budgets/*/*.partial", "budgets/*/*/*.partial")  # stages, evaluations


def outcome(run_dir: Path) -> dict[str, str]:
    """What must not depend on being killed, each thing as a digest."""
    found: dict[str, Any] = {}
    for path in sorted(run_dir.rglob("*")):
        name = str(path.relative_to(run_dir))
        said = path.name.startswith("translations.") and path.parent.parent.name == "evaluations"
        if said or path.suffix == ".safetensors" or path.name == "distilled.jsonl":
            found[name] = path.read_bytes()
        elif path.name == "plan.json":
            plan = json.loads(path.read_text(encoding="utf-8"))
            found |= {f"{name}:{key}": json.dumps(plan.get(key)).encode() for key in PLAN}
        elif path.name == "artifact.json":
            info = json.loads(path.read_text(encoding="utf-8")).get("info", {})
            if "losses" in info:
                found[f"{name}:losses"] = json.dumps([info["losses"], info["training_loss"]]).encode()
    return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


def under_way(run_dir: Path) -> str:
    """The stage that is being made. A folder may get its name while it is looked at."""
    found: dict[str, float] = {}
    for pattern in PARTIALS:
        with contextlib.suppress(FileNotFoundError):
            for path in run_dir.glob(pattern):
                if path.name == TEACHER_TOKENS:  # lies between two stages
                    continue
                found[str(path.relative_to(run_dir)).removesuffix(".partial")] = path.stat().st_mtime
    return max(found, key=lambda name: found[name], default="none")


@dataclass
class Benchmark:
    """All instances, what they share, and what is written down after every kill and every run."""

    args: argparse.Namespace
    folder: Path
    kills: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0  # of earlier pieces

    def __post_init__(self) -> None:
        self.lock, self.began, self.underway = threading.Lock(), time.monotonic(), 0
        self.reference: dict[str, str] | None = None
        self.reference_ready = threading.Event()

    @property
    def left(self) -> float:
        """Seconds until the time is up."""
        return self.args.limit_s - (time.monotonic() - self.began)

    def command(self, run_dir: Path) -> list[str]:
        overrides = [word for value in self.args.overrides for word in ("--set", value)]
        sizes = [word for size in self.args.budgets for word in ("--budget", size)]
        verb = "pareto" if sizes else "compress"
        words = [sys.executable, "-m", "trimlingual", verb, self.args.recipe, "--run-dir", str(run_dir)]
        return words + sizes + overrides

    def start(self, run_dir: Path, output: Path) -> subprocess.Popen:
        path = os.pathsep.join(p for p in (str(ROOT / "src"), os.environ.get("PYTHONPATH")) if p)
        threads = str(self.args.threads)
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        with output.open("ab") as file:
            return subprocess.Popen(
                self.command(run_dir), stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True,
                env=environment,
            )  # fmt: skip

    def save(self) -> None:
        """State to go on from, and the result so far; call with the lock held."""
        state = {"kills": self.kills, "runs": self.runs, "failures": self.failures}
        state["seconds"] = self.seconds + time.monotonic() - self.began
        write(self.folder / "state.json", {"settings": settings(self.args), "reference": self.reference, **state})
        write(self.folder / "result.json", self.result())

    def result(self) -> dict[str, Any]:
        different = [run for run in self.runs if run["different"]]
        stages: dict[str, int] = {}
        for kill in self.kills:
            stages[kill["stage"]] = stages.get(kill["stage"], 0) + 1
        compared = sum(run["kills"] for run in self.runs)
        return {
            "command": shlex.join(["python", "benchmarks/kills.py", *sys.argv[1:]]),
            "commit": commit(self.args.commit),
            "kills": len(self.kills),
            "compared_kills": compared,
            "different": len(different),
            "runs": len(self.runs),
            "failures": self.failures,
            "complete": not self.failures
            and len(self.kills) >= self.args.kills
            and compared == len(self.kills)
            and len(self.runs) >= self.args.alone,
            "sigterm": sum(kill["signal"] == "SIGTERM" for kill in self.kills),
            "sigterm_codes": sorted({kill["code"] for kill in self.kills if kill["signal"] == "SIGTERM"}),
            "sigterm_longest_s": max((k["ended_s"] for k in self.kills if k["signal"] == "SIGTERM"), default=None),
            "kills_by_stage": dict(sorted(stages.items())),
            "compared_things": len(self.reference or {}),
            "seconds": round(self.seconds + time.monotonic() - self.began, 1),
            "settings": settings(self.args),
            "each_run": self.runs,
            "machine": machine(),
        }


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What must stay the same when it goes on."""
    keys = ("recipe", "overrides", "budgets", "seconds", "threads", "term_share", "seed")
    return {key: getattr(args, key) for key in keys}


def machine() -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "src"))
    from trimlingual.run.artifacts import machine as described

    return described()


def write(path: Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def wait(process: subprocess.Popen, seconds: float) -> int | None:
    """Exit code, or None if it still runs after so long."""
    try:
        return process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return None


def kill_group(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def make_reference(benchmark: Benchmark) -> None:
    """The run that is left alone. If the time is up before it is done it starts from nothing next time."""
    if benchmark.reference is None:
        folder = benchmark.folder / "reference"
        shutil.rmtree(folder, ignore_errors=True)
        process = benchmark.start(folder, benchmark.folder / "reference.txt")
        started = time.monotonic()
        code = wait(process, benchmark.left)
        if code is None:
            kill_group(process)
            process.wait()
        with benchmark.lock:
            if code == 0:
                benchmark.reference = outcome(folder)
                print(f"reference: done in {time.monotonic() - started:.0f} s", flush=True)
            elif code is not None:
                benchmark.failures.append({"instance": "reference", "code": code})
                print(f"reference: FAILED, see {benchmark.folder / 'reference.txt'}", flush=True)
            benchmark.save()
    benchmark.reference_ready.set()


def kill_and_restart(benchmark: Benchmark, number: int) -> None:
    """One instance: a run after the other, until there were enough kills and its last run is compared, or the time is up."""
    args, run_dir = benchmark.args, benchmark.folder / f"instance-{number}"
    output = benchmark.folder / f"instance-{number}.txt"
    low, high = args.seconds
    while benchmark.left > 0 and not benchmark.failures:
        with benchmark.lock:
            mine = [kill for kill in benchmark.kills if kill["instance"] == number]
            due = len(benchmark.kills) + benchmark.underway < args.kills
            alone = len(benchmark.runs) + benchmark.underway < args.alone
            pending = sum(not kill["compared"] for kill in mine)
            if not (due or alone or pending):
                return
            benchmark.underway += due or alone
        moments = random.Random(f"{args.seed}-{number}-{len(mine)}")
        moment, gently = moments.uniform(low, high), moments.random() < args.term_share
        process, started = benchmark.start(run_dir, output), time.monotonic()
        code = wait(process, min(moment, benchmark.left) if due else benchmark.left)
        lived, stage = time.monotonic() - started, under_way(run_dir)
        killed = due and code is None and benchmark.left > 0
        if code is None:
            if killed and gently:
                kill_group(process, signal.SIGTERM)
                code = wait(process, GRACE_S)
            kill_group(process)
            code = process.wait()
        with benchmark.lock:
            if killed:
                signal_name = "SIGTERM" if gently else "SIGKILL"
                record = {"instance": number, "signal": signal_name, "after_s": round(lived, 1), "stage": stage}
                record |= {"code": code, "ended_s": round(time.monotonic() - started - lived, 1), "compared": False}
                benchmark.kills.append(record)
                print(
                    f"kill {len(benchmark.kills)}/{args.kills}: {signal_name} after {lived:.0f} s in {stage}",
                    flush=True,
                )
            if code not in (0, -signal.SIGKILL, *((143, -signal.SIGTERM) if killed else ())):
                benchmark.failures.append({"instance": number, "code": code, "stage": stage})
                print(f"instance {number}: FAILED in {stage} with {code}, see {output}", flush=True)
            benchmark.save()
        if code == 0:
            compare(benchmark, number, run_dir)
        with benchmark.lock:
            benchmark.underway -= due or alone


def compare(benchmark: Benchmark, number: int, run_dir: Path) -> None:
    """Compare a run that is done with the reference, and make room for the next."""
    while not benchmark.reference_ready.wait(1):
        pass
    if benchmark.reference is None:
        return
    ours, theirs = outcome(run_dir), benchmark.reference
    different = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    with benchmark.lock:
        mine = [k for k in benchmark.kills if k["instance"] == number and not k["compared"]]
        for kill in mine:
            kill["compared"] = True
        benchmark.runs.append({"instance": number, "kills": len(mine), "different": different})
        equal = f"DIFFERENT: {different[:5]}" if different else "equal"
        print(f"run {len(benchmark.runs)} (instance {number}): {len(mine)} kills, {equal}", flush=True)
        if different:
            shutil.move(run_dir, run_dir.with_name(f"different-{len(benchmark.runs)}"))
        shutil.rmtree(run_dir, ignore_errors=True)
        benchmark.save()


def prepared(args: argparse.Namespace) -> Benchmark:
    """A new benchmark, or an earlier one that goes on."""
    folder = args.run_dir.resolve()
    state = folder / "state.json"
    if not state.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            sys.exit(f"{folder} is not empty and holds no state.json of this benchmark; choose another --run-dir")
        benchmark = Benchmark(args, folder)
        benchmark.save()
        return benchmark
    if not args.resume:
        sys.exit(f"{folder} holds a benchmark already; --resume goes on with it")
    earlier = json.loads(state.read_text(encoding="utf-8"))
    if earlier["settings"] != json.loads(json.dumps(settings(args))):
        sys.exit(f"{folder} was begun with other settings: {earlier['settings']}")
    benchmark = Benchmark(
        args, folder, earlier["kills"], earlier["runs"], seconds=earlier["seconds"]
    )  # failures may be tried again
    benchmark.reference = earlier["reference"]
    return benchmark


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--alone", type=int, default=0, help="runs that are not killed, to be compared alike")
    parser.add_argument("--commit", default="", help="where there is no Git: the commit that is written down")
    parser.add_argument("--seconds", default="20,120", help="between two kills: shortest,longest")
    parser.add_argument("--term-share", type=float, default=0.2, help="of the kills that are SIGTERM")
    parser.add_argument("--instances", type=int, default=1, help="pipelines at once")
    parser.add_argument("--threads", type=int, default=2, help="of each pipeline")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--resume", action="store_true", help="go on in --run-dir")
    parser.add_argument("--recipe", default="mini")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--budget", action="append", default=[], dest="budgets", help="a size of `pareto`; repeat it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="also write benchmarks/results/NAME.json")
    args = parser.parse_args()
    args.seconds = [float(part) for part in args.seconds.split(",")]
    benchmark = prepared(args)
    jobs = [threading.Thread(target=make_reference, args=(benchmark,))]
    jobs += [threading.Thread(target=kill_and_restart, args=(benchmark, i)) for i in range(args.instances)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    with benchmark.lock:
        benchmark.save()
    result = benchmark.result()
    if args.name:
        RESULTS.mkdir(exist_ok=True)
        write(RESULTS / f"{args.name}.json", result)
    print(json.dumps(result, ensure_ascii=False))
    sys.exit(1 if result["different"] or result["failures"] else 0)


if __name__ == "__main__":
    main()
