"""The commit that a benchmark writes into its result."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit(given: str = "") -> str:
    """The short hash of what is checked out here, unless it is `given`; empty without Git."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return given or subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
