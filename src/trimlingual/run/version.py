"""Which code this is: the release and, in a source checkout, the commit."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import subprocess
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_PATIENCE_S = 5.0  # for git; on a slow disk the release alone has to do


@cache
def version(package: Path = _PACKAGE) -> str:
    """`0.1.0` where the package is installed; `0.1.0+a1b2c3d.dirty` where it runs from a source checkout.

    Source files without history are told apart by a hash of them.
    """
    root = package.parents[1]
    from_source = package.parent.name == "src" and (root / "pyproject.toml").is_file()
    release = _declared(root / "pyproject.toml") if from_source else _installed()
    commit = _described(root) if from_source and (root / ".git").exists() else None
    if commit:
        return f"{release}+{re.sub(r'[^A-Za-z0-9]+', '.', commit)}"
    return f"{release}+{_digest(package)}" if from_source or release == "0" else release


def _installed() -> str:
    try:
        return importlib.metadata.version("trimlingual")
    except importlib.metadata.PackageNotFoundError:  # a copy of the package alone
        return "0"


def _digest(package: Path) -> str:
    """Stands for the code where nothing else does."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    return f"files.{digest.hexdigest()[:8]}"


def _declared(pyproject: Path) -> str:
    found = re.search(r'^version = "([^"]+)"', pyproject.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else _installed()


def _described(root: Path) -> str | None:
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--tags"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, or a history that is somebody else's
        return None
    return done.stdout.strip() or None
