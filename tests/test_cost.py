"""Sizes, times and memory, each against something known."""

import time

import bitsandbytes as bnb
import numpy as np
import pytest
import torch

from trimlingual.evaluation import cost
from trimlingual.evaluation.cost import (
    MeasureError,
    Stopwatch,
    bytes_beside_weights,
    count_parameters,
    disk_bytes,
    peak_memory,
    speed,
)
from trimlingual.run.lineage import Lineage


def test_tied_parameters_count_once():
    model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(7, 3), "head": torch.nn.Linear(3, 7, bias=False)})
    assert count_parameters(model) == 42
    model["head"].weight = model["embedding"].weight
    assert count_parameters(model) == 21


def test_four_bit_weights_count_as_what_they_stand_for():
    layer = bnb.nn.Linear4bit(64, 96, bias=True, quant_type="nf4")
    before = count_parameters(layer)
    layer.to("cpu")  # moving quantises
    assert layer.weight.numel() == 64 * 96 // 2
    assert count_parameters(layer) == before == 64 * 96 + 96


def test_disk_bytes_counts_what_is_shipped(tmp_path):
    for name, size in {
        "model.safetensors": 1000, "config.json": 10, "tokenizer.json": 100, "sub/vocab.bin": 1, "artifact.json": 7,
        "README.md": 7, ".gitattributes": 7, ".cache/huggingface/model.safetensors": 7,
    }.items():  # fmt: skip
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    assert disk_bytes(tmp_path / "model") == 1111
    # A Hub snapshot is a folder of links to blobs.
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "model" / "model.safetensors")
    assert disk_bytes(tmp_path / "snapshot") == 1000


def test_a_run_s_lists_of_clips_are_not_shipped(tmp_path):
    layers = {"decoder": [0, 2], "encoder": [0]}
    lineage = Lineage(base="somebody/model", layers=layers, num_base_layers={"decoder": 3, "encoder": 1})
    lineage = lineage.with_seen("train", [f"{i:064x}" for i in range(500)])
    for folder, stored in ((tmp_path / "run", lineage), (tmp_path / "export", lineage.to_ship())):
        folder.mkdir()
        stored.save(folder)
        (folder / "model.safetensors").write_bytes(b"x" * 1000)
    assert (tmp_path / "run" / "lineage.json").stat().st_size > 30_000
    assert disk_bytes(tmp_path / "run") == disk_bytes(tmp_path / "export") < 2000
    assert bytes_beside_weights(tmp_path / "run") == (tmp_path / "export" / "lineage.json").stat().st_size


def test_disk_bytes_of_nothing_is_an_error(tmp_path):
    (tmp_path / "artifact.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(MeasureError, match="no file to ship"):
            disk_bytes(folder)


def test_stopwatch_adds_up_its_blocks():
    watch = Stopwatch()
    assert watch.seconds == 0
    with watch:
        time.sleep(0.02)
        assert watch.seconds > 0
    first = watch.seconds
    assert first >= 0.02
    time.sleep(0.02)
    assert watch.seconds == first
    with pytest.raises(KeyError), watch:
        raise KeyError
    assert watch.seconds > first


def test_peak_memory_sees_what_was_freed():
    with peak_memory("cpu") as quiet:
        pass
    with peak_memory("cpu") as peak:
        block = np.ones(200_000_000 // 8)
        del block
    assert peak.num_bytes > 100_000_000
    if peak.method == "VmHWM of the block":
        assert peak.num_bytes - quiet.num_bytes == pytest.approx(200_000_000, rel=0.1)
        with peak_memory("cpu") as after:
            pass
        assert after.num_bytes < peak.num_bytes - 150_000_000


def test_a_block_within_a_block_takes_nothing_from_it():
    """Its reset must not make the outer one forget what came before."""
    with peak_memory("cpu") as outer:
        np.ones(25_000_000)  # 200 MB, freed at once
        with peak_memory("cpu") as inner:
            pass
    if inner.method == "VmHWM of the block":
        assert outer.num_bytes - inner.num_bytes > 150_000_000


def test_peak_memory_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(cost, "_CLEAR_REFS", tmp_path / "none" / "clear_refs")
    monkeypatch.setattr(cost, "_STATUS", tmp_path / "none" / "status")
    with peak_memory("cpu") as peak:
        pass
    assert peak.method == "peak of the whole process"
    assert peak.num_bytes > 10_000_000


@pytest.mark.gpu
def test_cuda_peak_and_time():
    with peak_memory("cuda") as peak, Stopwatch("cuda") as watch:
        block = torch.ones(50_000_000, device="cuda")
        del block
    assert peak.num_bytes >= 200_000_000
    assert watch.seconds > 0


def test_speed():
    assert speed(num_clips=4, num_tokens=100, audio_s=20.0, wall_s=5.0) == {
        "seconds_per_clip": 1.25,
        "tokens_per_second": 20.0,
        "real_time_factor": 0.25,
    }
    with pytest.raises(MeasureError, match="0 clips"):
        speed(0, 0, 1.0, 1.0)
