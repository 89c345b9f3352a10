"""The benchmark of the true shapes runs whole on small ones: what fails here would fail on a GPU that costs money."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_formats(tmp_path, monkeypatch):
    pytest.importorskip("compressed_tensors")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spec = importlib.util.spec_from_file_location("formats", BENCHMARKS / "formats.py")
    formats = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(formats)
    result = formats.main(["--size", "tiny", "--out", str(tmp_path / "results" / "formats_tiny.json")])
    assert result["errors"] == {}
    assert json.loads((tmp_path / "results" / "formats_tiny.json").read_text(encoding="utf-8")) == result
    sizes = list(result["sizes"].values())
    assert len(sizes) == 5
    assert sizes == sorted(sizes, reverse=True)
    assert all(reload["equal"] for reload in result["reloads"].values())
    layers = set(result["parameters"])
    assert {name.replace("5 layers", "24 layers").replace("6 layers", "32 layers") for name in layers} >= {
        "nf4, 32 layers", "nf4, 24 layers", "int4, 24 layers, 8-bit embeddings and head",
    }  # fmt: skip
