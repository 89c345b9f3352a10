"""`make test-lowest` installs what pyproject.toml declares as lowest: the two files say the same."""

from __future__ import annotations

import re
import tomllib
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ("ruff", "mypy", "types-PyYAML")  # no test imports them


def _lowest() -> dict[str, str]:
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def _declared() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [entry for entries in project["optional-dependencies"].values() for entry in entries]
    entries = [entry for entry in [*project["dependencies"], *extras] if not entry.startswith(TOOLS)]
    found = [re.match(r"([A-Za-z0-9-]+)>=([0-9.]+)", entry) for entry in entries]
    assert all(found), "every dependency declares the lowest version it works with"
    return {match[1]: match[2] for match in found if match}


def test_lowest_versions_are_the_declared_ones():
    declared, lowest = _declared(), _lowest()
    declared.pop("torch")  # the Makefile's LOWEST_TORCH says which is used
    assert set(lowest) == set(declared)
    for name, bound in declared.items():
        padded = [*bound.split("."), "0", "0"][: len(lowest[name].split("."))]
        assert lowest[name].split(".") == padded, f"{name}: declared >={bound}, tested with {lowest[name]}"


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_a_deprecated_call_of_ours_is_an_error_and_one_among_libraries_is_not(category):
    warnings.warn_explicit("of a library's own", category, "file.py", 1, module="transformers.trainer")
    with pytest.raises(category):
        warnings.warn_explicit("of ours", category, "file.py", 1, module="trimlingual.models.tree")


def test_so_is_one_that_the_library_blames_on_itself():
    library, ours = {"__name__": "library.deep"}, {"__name__": "trimlingual.models.tree"}
    exec("import warnings\ndef old():\n    warnings.warn('gone in v6', FutureWarning)", library)
    exec("def call(old):\n    old()", ours)
    with pytest.raises(FutureWarning, match=r"trimlingual\.models\.tree, line 2: gone in v6"):
        ours["call"](library["old"])
    library["old"]()  # not ours
