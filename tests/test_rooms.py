"""What the folders promise: imports run from higher rooms to lower ones, and never in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import trimlingual

PACKAGE = Path(trimlingual.__file__).parent
# From the top down. A room imports from itself and from rooms below it.
ROOMS = [
    "__main__", "__init__", "cli", "cli_look", "cli_use", "api", "budgets", "pipeline", "preflight", "steps", "app", "stages",
    "step_inputs", "resources", "estimate", "exports", "vocabulary", "search", "training", "decoding", "quantization", "evaluation",
    "models", "data", "report", "recipe", "run",
]  # fmt: skip


def imports() -> dict[str, set[str]]:
    """Module -> the package's modules that it imports, wherever in the file; without `trimlingual.`."""
    modules = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    found = {}
    for module, path in modules.items():
        nodes = [
            node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)
        ]
        named = {f"{node.module}.{name.name}" for node in nodes for name in node.names if node.module}
        ours = {name.removeprefix("trimlingual.") for name in named if name.startswith("trimlingual.")}
        found[module] = {name if name in modules else name.rpartition(".")[0] for name in ours} - {""}
    return found


def test_imports_run_downwards():
    wrong = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if ROOMS.index(module.split(".")[0]) > ROOMS.index(other.split(".")[0])
    ]
    assert not wrong


def test_no_circle_is_left():
    TopologicalSorter(imports()).prepare()  # CycleError names it


def test_the_docs_name_every_file():
    text = (PACKAGE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = {path.name for path in PACKAGE.rglob("*.py")} - {"__init__.py", "__main__.py"}
    assert not [name for name in sorted(files) if f"`{name}`" not in text]
