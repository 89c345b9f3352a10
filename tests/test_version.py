"""Which code made a result, and that importing needs nothing but Python."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import trimlingual
from trimlingual.run.version import version

PACKAGE = Path(trimlingual.__file__).resolve().parent


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A source tree of our form."""
    package = tmp_path / "src" / "trimlingual"
    package.mkdir(parents=True)
    shutil.copy(PACKAGE / "run" / "version.py", package)
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    return package


def test_a_checkout_names_its_commit(checkout):
    root = checkout.parents[1]
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    commit = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert version(checkout).startswith(f"1.2.3+{commit[:7]}")
    version.cache_clear()
    (checkout / "version.py").write_text("changed")
    assert version(checkout).endswith(".dirty")
    version.cache_clear()
    git(root, "tag", "v1.2.3")
    assert version(checkout) == "1.2.3+v1.2.3.dirty"


def test_source_without_history_is_told_by_its_files(checkout):
    before = version(checkout)
    assert before.startswith("1.2.3+files.")
    version.cache_clear()
    (checkout / "more.py").write_text("1")
    assert version(checkout) != before


def test_an_installed_package_in_somebody_elses_repository_is_the_release(tmp_path, monkeypatch):
    """Its virtual environment may stand in a repository of the user's, whose commits say nothing about this package."""
    git(tmp_path, "init", "-q")
    installed = tmp_path / ".venv" / "lib" / "site-packages" / "trimlingual"
    installed.mkdir(parents=True)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.2.3")
    assert version(installed) == "1.2.3"


def test_the_recorded_version_is_never_unknown():
    assert "unknown" not in trimlingual.__version__
    assert trimlingual.__version__[0].isdigit()


def test_help_does_not_ask_git(monkeypatch, tmp_path):
    """Nor does it import torch."""
    code = (
        "import sys, subprocess; subprocess.run = None; sys.argv = ['trimlingual', '--help'];"
        "from trimlingual.cli import app\n"
        "try: app()\nexcept SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_no_module_needs_posix_at_import():
    """As on Windows: modules that are not there, signals and functions of os that are not either. Scripts run by themselves."""
    code = """
import importlib, os, pkgutil, signal, sys
import torch, transformers, peft, accelerate, bitsandbytes, datasets, psutil, filelock, soundfile, scipy.signal, typer, rich.progress
import jinja2, sacrebleu, yaml, pydantic, numpy, triton  # these may need what they like
for name in ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog"):
    sys.modules[name] = None
for module, names in ((signal, ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGXFSZ", "SIGCHLD")),
                      (os, ("getuid", "geteuid", "getpgid", "killpg", "fork", "uname", "setsid", "sched_getaffinity"))):
    for name in names:
        delattr(module, name)
import trimlingual
for found in pkgutil.walk_packages(trimlingual.__path__, "trimlingual."):
    if not found.name.endswith(("__main__", "_script")):
        importlib.import_module(found.name)
from trimlingual.evaluation import cost
cost._STATUS = cost.Path("nowhere")
assert cost._high_water_mark() > 1_000_000
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
