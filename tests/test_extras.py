"""What is said where an extra is missing, and that the words in one place are those of pyproject.toml."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import shutil
import tomllib
from pathlib import Path

import pytest
import torch

import trimlingual
from trimlingual.models.errors import ModelError
from trimlingual.models.folders import check_folder, model_problems
from trimlingual.models.loading import load_model
from trimlingual.run import extras

ROOT = Path(trimlingual.__file__).parent
PROJECT = ROOT.parents[1] / "pyproject.toml"


def test_the_extras_are_the_declared_ones():
    declared = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(extras.EXTRAS) == set(declared) - {"dev"}
    assert set(extras.GIVES) == set(extras.EXTRAS)
    for extra, modules in extras.EXTRAS.items():
        assert len(modules) == len(declared[extra])


def test_the_modules_are_what_the_packages_bring():
    brought = importlib.metadata.packages_distributions()
    for modules in extras.EXTRAS.values():
        for module in modules:
            if not extras.find_spec(module):
                continue
            assert any(name.replace("-", "_").lower().startswith(module) for name in brought[module]), module


def test_a_missing_extra_names_its_install_line(monkeypatch):
    extras.need("serve", "serving")  # of the development environment
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(extras.MissingExtra) as error:
        extras.need("serve", "serving")
    assert str(error.value) == (
        "serving needs starlette, uvicorn, python-multipart, not installed here: pip install 'trimlingual[serve]'"
    )


def test_a_packed_model_names_the_extra_that_reads_it(tmp_path, monkeypatch):
    folder = shutil.copytree(ROOT / "mini" / "model", tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (folder / "config.json").write_text(json.dumps(config))
    assert not model_problems(folder)
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    for load in (lambda: load_model(folder, "float32", torch.device("cpu")), lambda: check_folder(folder, "translate")):
        with pytest.raises(
            ModelError, match=r"packed by compressed-tensors, which is not installed: pip install 'trimlingual\[int4\]'"
        ):
            load()


def test_no_other_file_writes_the_line():
    for path in ROOT.rglob("*.py"):
        if path.name == "extras.py":
            continue
        texts = [
            node.value
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant)
        ]
        assert not [text for text in texts if isinstance(text, str) and "pip install 'trimlingual[" in text], path
