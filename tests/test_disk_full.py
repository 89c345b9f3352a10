"""What each library raises on a full disk is one line for the user; what only looks like it is left alone."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

from trimlingual.run.disk_full import DiskFullError, explained_disk_full

from .test_pipeline import no_file_over

WEIGHTS = {"weight": torch.zeros(500_000)}


def into_a_file(path):
    with path.open("wb") as file:
        torch.save(WEIGHTS, file)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b"0" * 2_000_000),
        lambda path: save_file(WEIGHTS, path),
        lambda path: torch.save(WEIGHTS, path),
        into_a_file,
        lambda path: torch.distributed.checkpoint.save(WEIGHTS, checkpoint_id=path),
    ],
    ids=["Python", "safetensors", "torch.save", "torch.save to a file", "distributed checkpoint"],
)
def test_every_writer_says_it(write, tmp_path):
    with no_file_over(1_000_000):
        with pytest.raises(BaseException) as raw:  # noqa: PT011, each library has its own
            write(tmp_path / "out")
        told = pytest.raises(DiskFullError, match=f"^no space left while saving to {tmp_path}")
        with told as said, explained_disk_full(tmp_path):
            write(tmp_path / "out")
    assert type(said.value.__cause__) is type(raw.value)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_quota_is_a_full_disk(code, tmp_path):
    with pytest.raises(DiskFullError), explained_disk_full(tmp_path):
        raise OSError(code, "in whatever language")


def test_it_is_said_once(tmp_path):
    told = pytest.raises(DiskFullError, match="saving to inner;")
    with told, explained_disk_full(tmp_path), explained_disk_full(Path("inner")):
        raise OSError(errno.ENOSPC, "")


def test_other_errors_pass(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(RuntimeError, match="PytorchStreamReader"), explained_disk_full(tmp_path):
        torch.load(path)
    for error in (OSError(errno.EIO, "Input/output error"), KeyboardInterrupt(), CheckpointException("", {})):
        with pytest.raises(type(error)) as raised, explained_disk_full(tmp_path):
            raise error
        assert raised.value is error
