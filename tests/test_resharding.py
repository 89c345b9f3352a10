"""A training that was killed goes on in another number of processes, with the same steps: under DDP, and under FSDP on CPUs."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from trimlingual.models.inputs import Example
from trimlingual.models.loading import resolve_base
from trimlingual.pipeline import run_stage
from trimlingual.recipe import TrainSettings, load_recipe
from trimlingual.run.artifacts import read_artifact
from trimlingual.training.batches import divided
from trimlingual.training.optimizer import TrainingError
from trimlingual.training.trainer import train_

from .test_distributed import torchrun, until
from .test_pipeline import SMALL, as_words

TRAINING = [
    *SMALL, "model.device=cpu", "finetune.max_steps=8", "finetune.save_steps=3", "finetune.logging_steps=1", "finetune.num_workers=0",
    "model.storage_dtype=float32",
]  # fmt: skip
FSDP = "tests.fsdp_on_cpu"


def words(folder: Path, manifests: list[str], batch_size: int, *overrides: str) -> list[str]:
    settings = as_words(*TRAINING, *manifests, f"finetune.batch_size={batch_size}", *overrides)
    return ["finetune", "mini", "--run-dir", str(folder), *settings]


def result(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses = [entry["loss"] for entry in read_artifact(folder / "teacher").info["losses"]]
    return losses, load_file(folder / "teacher" / "model.safetensors")


def whole_checkpoints(folder: Path) -> list[Path]:
    return list(folder.rglob("complete.json"))


def same(one: tuple, other: tuple, loss: float = 1e-4, weight: float = 1e-3) -> None:
    """Losses, and weights by what training moved them."""
    assert one[0] == pytest.approx(other[0], rel=loss)
    base = load_file(resolve_base("builtin:mini") / "model.safetensors")
    moved = sum((one[1][name] - base[name]).float().square().sum() for name in base)
    between = sum((one[1][name] - other[1][name]).float().square().sum() for name in base)
    assert moved > 0
    assert between < weight * moved


@pytest.fixture(scope="module")
def straight(manifests, tmp_path_factory):
    """Eight steps of six examples in one process, without a stop."""
    folder = tmp_path_factory.mktemp("straight")
    run_stage(load_recipe("mini", [*TRAINING, *manifests, "finetune.batch_size=6"]), folder, "teacher")
    return result(folder)


@pytest.mark.parametrize(
    ("before", "after", "batch_size", "settings", "said"),
    [
        pytest.param(2, 1, 3, (), "1 x 3, accumulated 2 times", marks=pytest.mark.slow),
        pytest.param(1, 2, 6, (), "2 x 3, accumulated 1 times", marks=pytest.mark.slow),
        (2, 3, 3, ("finetune.fsdp=true",), "3 x 2, accumulated 1 times"),
    ],
)
def test_other_processes_go_on_as_if_nothing_had_happened(
    straight, manifests, tmp_path, start, before, after, batch_size, settings, said
):
    command = words(tmp_path, manifests, batch_size, *settings)
    killed = start(command, before, FSDP)
    killed.until(lambda: whole_checkpoints(tmp_path))
    killed.kill()
    assert not (tmp_path / "teacher").exists(), "too late to be killed in the middle"
    again = start(command, after, FSDP)
    again.succeed()
    assert f"steps of 6 examples, as before: {said}" in again.stderr()
    assert "training goes on at step" in again.stderr()
    same(straight, result(tmp_path))


@pytest.mark.slow
def test_shares_in_mixed_precision_train_as_one_process(manifests, tmp_path, start):
    """FSDP makes bfloat16 weights float32 where they train, in every process the same ones."""
    changes = ("finetune.freeze=[]", "finetune.mixed_precision=bf16")
    for processes, batch_size, more in ((1, 6, ()), (2, 3, ("finetune.fsdp=true", "model.dtype=bfloat16"))):
        start(words(tmp_path / str(processes), manifests, batch_size, *changes, *more), processes, FSDP).succeed()
    same(result(tmp_path / "1"), result(tmp_path / "2"), loss=5e-2, weight=0.3)


@pytest.mark.slow
def test_one_process_that_is_killed_ends_them_all(manifests, tmp_path):
    """The launcher ends the rest, and the checkpoint stays."""
    launcher = torchrun(2, words(tmp_path, manifests, 3))
    until(launcher, lambda: whole_checkpoints(tmp_path))
    workers = psutil.Process(launcher.pid).children()
    assert len(workers) == 2
    workers[1].kill()
    assert launcher.wait(60) != 0
    assert not psutil.wait_procs(workers, timeout=60)[1]
    assert whole_checkpoints(tmp_path)
    assert not (tmp_path / "teacher").exists()


@pytest.fixture
def examples(split):
    return [Example(i, clip.id, "de", clip.references["de"]) for i, clip in enumerate(split.clips)]


def test_a_step_that_cannot_be_shared_is_refused(make_model, processor, shared, data, tmp_path, monkeypatch):
    train_(make_model(layers=2), processor, data, shared, TrainSettings(max_steps=1, batch_size=6), tmp_path)
    monkeypatch.setattr("trimlingual.training.trainer.num_processes", lambda: 4)
    with pytest.raises(
        TrainingError, match="steps of 6 examples, which 4 processes cannot share equally; start as many"
    ):
        train_(make_model(layers=2), processor, data, shared, TrainSettings(max_steps=2, batch_size=6), tmp_path)


@pytest.mark.parametrize("step_size", [1, 6, 8, 30])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_a_step_is_shared_equally_or_not_at_all(step_size, processes, batch_size):
    found = divided(step_size, processes, batch_size)
    if found is None:
        assert step_size % processes
    else:
        assert found[0] <= batch_size
        assert found[0] * found[1] * processes == step_size
