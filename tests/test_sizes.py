"""Functions and files that fit on a screen or two; what does not says why."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [path for folder in ("src", "tools", "benchmarks", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
MOST_LINES, MOST_PARAMETERS, MOST_LINES_OF_A_FILE = 60, 8, 450


def test_functions_are_short_or_say_why_not():
    """By "So long because ..." or "So many parameters because ..." in the docstring. The parameters of a test are its fixtures."""
    wrong = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            where, reason = f"{path.relative_to(ROOT)}: {node.name}", ast.get_docstring(node) or ""
            given = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            num_parameters = len([argument for argument in given if argument.arg not in ("self", "cls")])
            num_lines = node.end_lineno - node.lineno + 1
            if num_lines > MOST_LINES and "So long because" not in reason:
                wrong.append(f"{where} has {num_lines} lines")
            exempt = node.name.startswith("test_") or "So many parameters because" in reason
            if num_parameters > MOST_PARAMETERS and not exempt:
                wrong.append(f"{where} has {num_parameters} parameters")
    assert not wrong


def test_files_are_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES_OF_A_FILE} == {}
