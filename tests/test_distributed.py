"""Several processes that work together: on the CPU (gloo), and on two GPUs (NCCL; `pytest -m gpu`).

Where the launcher is not what is tested, the processes are started without it (processes.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from trimlingual import cli
from trimlingual.evaluation.results import read_result, read_translations
from trimlingual.models.loading import resolve_base
from trimlingual.pipeline import compress, run_stage
from trimlingual.recipe import load_recipe
from trimlingual.run.artifacts import read_artifact
from trimlingual.run.handed_on import TEACHER_TOKENS
from trimlingual.search.plan import read_plan

from .processes import free_port
from .test_pipeline import SMALL, as_words


def torchrun(processes: int, words: list[str]) -> subprocess.Popen:
    """The true launcher; a process without it for one."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "trimlingual", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def until(launcher: subprocess.Popen, there: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not there():
        assert launcher.poll() is None, launcher.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill(launcher: subprocess.Popen) -> None:
    """`kill -9` of the launcher and of its processes, which are no process group of its own."""
    processes = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # ended with one before it
            process.kill()
    launcher.communicate()
    psutil.wait_procs(processes)


def succeed(launcher: subprocess.Popen) -> None:
    said = launcher.communicate(timeout=300)[1]
    assert launcher.returncode == 0, said[-3000:]


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
CPU = "model.device=cpu"


def test_two_processes_train_one_model(manifests, tmp_path, start):
    """Two processes with batch 2 are one process with batch 4, but for the order of additions."""
    losses = {}
    for processes, batch in ((1, 4), (2, 2)):
        folder = tmp_path / str(processes)
        overrides = [
            *SMALL,
            *manifests,
            f"finetune.batch_size={batch}",
            "finetune.logging_steps=1",
            "finetune.max_steps=2",
            CPU,
        ]
        start(["finetune", "mini", "--run-dir", str(folder), *as_words(*overrides)], processes).succeed()
        info = read_artifact(folder / "teacher").info
        assert info["steps"] == 2
        losses[processes] = [entry["loss"] for entry in info["losses"]]
    assert losses[1] == pytest.approx(losses[2], rel=1e-3)


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize(("precision", "loss", "weight"), [("no", 1e-2, 0.01), ("bf16", 5e-2, 0.3)])
def test_shares_of_the_weights_train_one_model_also_when_killed(manifests, tmp_path, precision, loss, weight):
    """FSDP with batch 2 on two GPUs, killed and started again, is one GPU with batch 4, weights included."""
    losses, weights = {}, {}
    for processes, batch in ((1, 4), (2, 2)):
        folder = tmp_path / str(processes)
        overrides = [
            *SMALL, *manifests, "finetune.max_steps=40", "finetune.logging_steps=1", "finetune.freeze=[]",
            f"finetune.batch_size={batch}", f"finetune.fsdp={str(processes > 1).lower()}", f"finetune.mixed_precision={precision}",
        ]  # fmt: skip
        words = ["finetune", "mini", "--run-dir", str(folder), *as_words(*overrides)]
        if processes > 1:
            killed = torchrun(processes, words)
            until(killed, lambda folder=folder: list(folder.rglob("complete.json")))
            kill(killed)
            assert not (folder / "teacher").exists(), "too late to be killed in the middle"
        succeed(torchrun(processes, words))
        losses[processes] = [entry["loss"] for entry in read_artifact(folder / "teacher").info["losses"]]
        weights[processes] = load_file(folder / "teacher" / "model.safetensors")
    assert losses[1] == pytest.approx(losses[2], rel=loss)
    base = load_file(resolve_base("builtin:mini") / "model.safetensors")
    assert weights[1].keys() == weights[2].keys() == base.keys()
    moved = sum((weights[1][name] - base[name]).float().square().sum() for name in base)
    apart = sum((weights[1][name] - weights[2][name]).float().square().sum() for name in base)
    assert apart < weight * moved


@pytest.mark.gpu
@two_gpus
def test_two_gpus_search_like_one(manifests, tmp_path):
    for processes in (1, 2):
        succeed(torchrun(processes, search(manifests, tmp_path / str(processes))))
    one, two = (read_plan(tmp_path / str(processes) / "rank") for processes in (1, 2))
    assert two.removals == one.removals
    assert two.curve == one.curve


def search(manifests: list[str], folder: Path, *overrides: str) -> list[str]:
    shorter = ["rank.num_layers_to_remove=2", "rank.protected=[2,4,6,8]", "decode.batch_size=4"]
    words = ["rank", "mini", "--run-dir", str(folder), "--model", str(resolve_base("builtin:mini"))]
    return [*words, *as_words(*manifests, *shorter, *overrides)]


def journal(folder: Path) -> list[dict]:
    path = folder / "rank.partial" / "candidates.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def test_two_processes_search_like_one_also_when_killed(manifests, tmp_path, start):
    """Same plan; after `kill -9` of everything in the middle, the records that were written are not made again."""
    start(search(manifests, tmp_path / "one", CPU)).succeed()
    words = search(manifests, tmp_path / "two", CPU)
    killed = start(words, 2)
    killed.until(lambda: len(journal(tmp_path / "two")) >= 3)
    killed.kill()
    before = journal(tmp_path / "two")
    assert 3 <= len(before) < 11, f"{len(before)} of 12 records: too late to be killed in the middle"
    start(words, 2).succeed()
    one, two = read_plan(tmp_path / "one" / "rank"), read_plan(tmp_path / "two" / "rank")
    assert two.removals == one.removals
    assert two.curve == one.curve
    both = {(c["round"], c["layer"]): c["score"] for c in one.candidates}
    for candidate in two.candidates:
        expected = both[candidate["round"], candidate["layer"]]
        assert candidate["score"] is None or expected is None or candidate["score"] == pytest.approx(expected, abs=1e-9)
    after = (tmp_path / "two" / "rank" / "candidates.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in after][: len(before)] == before
    assert len({(r["round"], r["layer"]) for r in map(json.loads, after)}) == len(after)


@pytest.mark.parametrize("metric", [[], pytest.param(["rank.metric=loss"], marks=pytest.mark.slow)])
def test_two_processes_search_under_a_budget_like_one(manifests, tmp_path, start, metric):
    """Every process knows the translations that losses are of; one makes them."""
    stored = ["quantize.scheme=int4", "quantize.group_size=64", "quantize.eight_bit=[embeddings, lm_head]"]
    budget = ["rank.budget={size: 5 MB, bits: {mlp: [3]}, actions_per_round: 4}", "decode.max_new_tokens=8"]
    for processes, name in ((1, "one"), (2, "two")):
        start(search(manifests, tmp_path / name, CPU, *stored, *budget, *metric), processes).succeed()
    one, two = read_plan(tmp_path / "one" / "rank"), read_plan(tmp_path / "two" / "rank")
    assert one.bits
    assert (two.removals, [b.part for b in two.bits]) == (one.removals, [b.part for b in one.bits])
    assert [c["loss"] for c in two.candidates] == [pytest.approx(c["loss"], rel=1e-6) for c in one.candidates]


WHOLE = [
    "task.target_languages=[de]", "model.dtype=float32", "decode.batch_size=2", "evaluate.models=[teacher, pruned, quantized]",
    "finetune.learning_rate=1e-4", "recover.learning_rate=1e-4", "quantize.train.learning_rate=1e-4",
    "rank.num_layers_to_remove=2", "rank.protected=[2,4,6,8]",
    *(f"{section}.{setting}" for section in ("finetune", "recover", "quantize.train")
      for setting in ("max_steps=2", "logging_steps=1")),
]  # fmt: skip
TRAINED = {"teacher": "finetune", "recovered": "recover", "quantized": "quantize.train"}


@pytest.fixture
def few_clips(manifests, tmp_path) -> list[str]:
    """The manifests with 8, 3 and 4 clips."""
    overrides = []
    for manifest, count in zip(manifests, (8, 3, 4), strict=True):
        split, path = manifest.partition("=")[0], Path(manifest.split("'")[1])
        lines = path.read_text(encoding="utf-8").split("\n")[:count]
        (tmp_path / path.name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        overrides.append(f"{split}={{kind: manifest, path: '{tmp_path / path.name}'}}")
    return overrides


@pytest.mark.slow
def test_fsdp_ends_with_the_training_that_asked_for_it(few_clips, tmp_path, start):
    """The teacher is trained under FSDP (on CPUs); the trainings after it in the same processes, one with LoRA, are not."""
    batches = [f"{section}.batch_size=2" for section in TRAINED.values()]
    words = as_words(*WHOLE, *few_clips, CPU, *batches, "finetune.fsdp=true", "model.storage_dtype=float32")
    start(["compress", "mini", "--run-dir", str(tmp_path), *words], 2, "tests.fsdp_on_cpu").succeed()
    for stage in TRAINED:
        assert read_artifact(tmp_path / stage).info["steps"] == 2


@pytest.mark.slow
def test_two_processes_compress_like_one(few_clips, tmp_path, start):
    """The whole recipe: same plan, distilled data and translations; losses of the same global batch up to the order of additions."""
    one, two = tmp_path / "one", tmp_path / "two"
    batches = {size: [f"{section}.batch_size={size}" for section in TRAINED.values()] for size in (4, 2)}
    compress(load_recipe("mini", [*WHOLE, *few_clips, CPU, *batches[4]]), one)
    done = start(["compress", "mini", "--run-dir", str(two), *as_words(*WHOLE, *few_clips, CPU, *batches[2])], 2)
    done.succeed()
    assert done.stdout().count('"report"') == 1
    for stage in ("data", "pruned", "exported", "report"):
        assert done.stderr().count(f"  {stage}: the main process works; the other 1 wait") == 1
    assert read_plan(two / "rank").removals == read_plan(one / "rank").removals
    for name in ("distilled.jsonl", "translations.jsonl"):
        assert (two / "distilled" / name).read_bytes() == (one / "distilled" / name).read_bytes()
    for model in load_recipe("mini", WHOLE).evaluate.models:
        folders = [folder / "evaluations" / model for folder in (one, two)]
        assert read_translations(folders[0], "de") == read_translations(folders[1], "de"), model
        assert [read_result(folder)["speed"]["num_processes"] for folder in folders] == [1, 2]
    for stage in TRAINED:
        _losses_are_equal(one / stage, two / stage)
    asked = [f"{section}.token_distillation={{weight: 0.5}}" for section in ("recover", "quantize.train")]
    taught = [*few_clips, CPU, *asked]
    for stage, verb in (
        ("recovered", ["finetune", "mini", "--stage", "recovered"]),
        ("quantized", ["quantize", "mini"]),
    ):
        run_stage(load_recipe("mini", [*WHOLE, *taught, *batches[4]]), one, stage, force=True)
        words = as_words(*WHOLE, *taught, *batches[2])
        done = start([*verb, "--run-dir", str(two), "--force", *words], 2)
        done.succeed()
        assert ("training examples were read before" in done.stderr()) == (stage == "quantized")
        _losses_are_equal(one / stage, two / stage)
        assert (two / TEACHER_TOKENS).exists() == (stage == "recovered")


def _losses_are_equal(*folders: Path) -> None:
    losses = [[entry["loss"] for entry in read_artifact(folder).info["losses"]] for folder in folders]
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-3), folders


def test_a_process_dies_and_one_goes_on_for_two(manifests, tmp_path, start):
    """`kill -9` of the second process ends the run; a single one takes over what both have translated."""

    def words(name: str) -> list[str]:
        return [
            "evaluate",
            "mini",
            "--run-dir",
            str(tmp_path / name),
            *as_words(*manifests, "decode.batch_size=1", CPU),
        ]

    launcher = torchrun(2, words("two"))
    partial = tmp_path / "two" / "evaluations" / "base.partial" / "scratch" / "translated"
    try:
        until(launcher, lambda: all((partial / f"{i}.jsonl").is_file() for i in (0, 1)))
        second = next(p for p in psutil.Process(launcher.pid).children() if p.environ().get("RANK") == "1")
        second.kill()
        launcher.communicate(timeout=60)
        assert launcher.returncode != 0
    finally:
        if launcher.poll() is None:
            kill(launcher)
    before = sum(len((partial / f"{i}.jsonl").read_text(encoding="utf-8").splitlines()) for i in (0, 1))
    assert 2 <= before < 8, "too late to be killed in the middle"
    for name in ("two", "one"):
        start(words(name)).succeed()
    one, two = (tmp_path / name / "evaluations" / "base" for name in ("one", "two"))
    for language in ("de", "zh"):
        assert read_translations(two, language) == read_translations(one, language)
    assert read_result(two)["speed"]["num_processes"] == 2
    assert not (two / "scratch").exists()


def test_accelerate_launch_is_torchrun(manifests, tmp_path):
    """It starts the processes, which share the clips out; the result is printed once. With `--cpu` it would start one process."""
    launcher = [
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_machines=1",
        "--num_processes=2",
        f"--main_process_port={free_port()}",
        "--mixed_precision=no",
    ]
    words = [*launcher, "--dynamo_backend=no", "-m", "trimlingual", "evaluate", "mini", "--run-dir", str(tmp_path)]
    words += as_words(*manifests, "task.target_languages=[de]", "decode.batch_size=1", CPU)
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["stage"] == "evaluate base"
    assert "process 1 of 2" in done.stderr
    assert read_result(tmp_path / "evaluations" / "base")["speed"]["num_processes"] == 2


def test_what_is_wrong_for_all_is_said_once(manifests, tmp_path, start):
    """A wrong recipe is every process's error; a missing file only the main one's, while the others wait for it."""
    listing = tmp_path / "test.jsonl"
    listing.write_text('{"audio": "gone.wav", "references": {"de": "x", "zh": "x"}}\n', encoding="utf-8")
    gone = [*manifests, f"data.test={{kind: manifest, path: '{listing}'}}", CPU]
    for overrides, what in ((["decode.batch_size=0"], "decode.batch_size"), (gone, "gone.wav")):
        failing = start(["evaluate", "mini", "--run-dir", str(tmp_path / "run"), *as_words(*overrides)], 2)
        assert failing.wait() == 1
        assert not failing.stdout()
        assert failing.stderr().count(what) == 1


def test_one_process_that_fails_alone_says_so(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("trimlingual.run.processes.GRACE_S", 0.0)

    class Ended(BaseException):
        pass

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended, match="1"):
        cli._fail(ValueError("no such disk"))
    assert capsys.readouterr().err == "error in process 1 of 2: no such disk\n"


@pytest.mark.parametrize(
    ("words", "once"), [(("compress", "mini", "--dry-run"), "mini in runs/mini"), (("recipes",), "builtin:mini")]
)
def test_what_takes_one_process_is_done_by_one(words, once, tmp_path, monkeypatch, start):
    monkeypatch.chdir(tmp_path)
    done = start(words, 2)
    done.succeed()
    assert done.stdout().count(once) == 1
