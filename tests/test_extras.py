"""What is said where an extra is missing, and that the words in one place are those of pyproject.toml."""

from __future__ import annotations

import ast
import importlib.metadata
import tomllib
from pathlib import Path

import pytest

import trimlingual
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
