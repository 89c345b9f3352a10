"""What counts as whole is on the disk itself before it gets the name by which it does."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from trimlingual.run import artifacts
from trimlingual.run.artifacts import ARTIFACT_FILE, produce, put_in_place


@pytest.fixture
def done_to_the_disk(monkeypatch):
    """What is flushed and what gets a name, in order."""
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor):
        done.append(("flushed", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def noted_replace(source, target):
        done.append(("named", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return done


def test_what_is_marked_as_whole_is_on_the_disk_before(tmp_path, done_to_the_disk):
    """A power cut leaves no mark of what it took."""

    def work(folder):
        (folder / "result.txt").write_text("done")
        return {}

    produce(tmp_path / "a", "stage", {}, {}, work)
    assert done_to_the_disk.index(("flushed", "result.txt")) < done_to_the_disk.index(("named", ARTIFACT_FILE))


def test_what_gets_its_name_is_on_the_disk_before(tmp_path, done_to_the_disk):
    (tmp_path / "file.new").write_text("whole")
    put_in_place(tmp_path / "file.new", tmp_path / "file")
    (tmp_path / "folder.new" / "below").mkdir(parents=True)
    (tmp_path / "folder.new" / "below" / "weights").write_text("whole")
    put_in_place(tmp_path / "folder.new", tmp_path / "folder")
    assert done_to_the_disk == [
        ("flushed", "file.new"), ("named", "file"), ("flushed", "weights"), ("named", "folder"),
    ]  # fmt: skip
    assert (tmp_path / "folder" / "below" / "weights").read_text() == (tmp_path / "file").read_text() == "whole"


# Where a lost content does no harm, and the function that takes care of it.
NAMES_UNFLUSHED = {
    "run/artifacts.py": {"put_in_place", "settle", "_finish"},  # files flushed before
    "run/fingerprint.py": {"write"},  # a cache: what is damaged is read again
    "training/checkpoints.py": {"_remember"},  # a hint
    "data/hub.py": {"_write_once"},  # compared byte by byte before it is used
}


def test_names_are_given_in_one_place():
    package = Path(artifacts.__file__).parents[1]
    found: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef) and any(renames(node) for node in ast.walk(function)):
                found.setdefault(path.relative_to(package).as_posix(), set()).add(function.name)
    assert found == NAMES_UNFLUSHED


def renames(node: ast.AST) -> bool:
    """os.replace, os.rename, shutil.move, Path.rename and Path.replace, which has one argument where that of texts has two."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    of_os = isinstance(node.func.value, ast.Name) and node.func.value.id in ("os", "shutil")
    if of_os:
        return node.func.attr in ("replace", "rename", "renames", "move")
    return node.func.attr in ("replace", "rename") and len(node.args) == 1 and not node.keywords
