"""JSON files that a run leaves, read with their types checked: a damaged one is an error that names the file, and no crash later."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from trimlingual.run.jsonl import parse_json, read_jsonl


def read_record(path: Path, form: Any, error: type[ValueError], advice: str, needs: Sequence[str] = ()) -> Any:
    """The value of a JSON file as `form` (a dataclass or other type) with the keys `needs`; `error` with `advice` otherwise."""
    try:
        return checked(parse_json(path.read_text(encoding="utf-8")), form, needs)
    except (OSError, ValueError) as problem:
        raise error(f"{path} is missing or damaged ({brief(problem)}); {advice}") from problem


def read_records(path: Path, form: Any, error: type[ValueError], advice: str, needs: Sequence[str] = ()) -> list[Any]:
    """The values of a JSONL file, as `read_record`."""
    try:
        return [checked(record, form, needs) for record in read_jsonl(path)]
    except ValueError as problem:
        raise error(f"{path} is missing or damaged ({brief(problem)}); {advice}") from problem


def checked(value: Any, form: Any, needs: Sequence[str] = ()) -> Any:
    """`value` as `form`; ValueError if it is something else, or a mapping without one of `needs`."""
    value = _adapter(form).validate_python(value)
    missing = [key for key in needs if key not in value]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")
    return value


@cache
def _adapter(form: Any) -> TypeAdapter[Any]:
    return TypeAdapter(form)


def brief(problem: Exception) -> str:
    """One line of what is wrong."""
    if isinstance(problem, ValidationError):
        first = problem.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}"
    return str(problem).split("\n")[0]
