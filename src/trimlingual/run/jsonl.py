"""JSONL files: one JSON value a line, UTF-8.

A line ends at a newline and at nothing else. Texts hold other line separators (U+2028, U+0085) as they are, so `splitlines` must never
be used on them. Journals that grow line by line are in artifacts.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trimlingual.run.artifacts import write_text


class JsonlError(ValueError):
    """A JSONL file that is missing or damaged; the message names the file and the line."""


def parse_json(text: str) -> Any:
    """`json.loads`, with a ValueError also for what is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line) of the lines that are not blank."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file in order; JsonlError if it is missing, not UTF-8, or a line is not a JSON object."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise JsonlError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise JsonlError(f"{path} is not UTF-8 ({error})") from error
    records = []
    for number, line in numbered_lines(text):
        try:
            record = parse_json(line)
        except ValueError as error:
            raise JsonlError(f"{path}, line {number} is not JSON ({error})") from error
        if not isinstance(record, dict):
            raise JsonlError(f"{path}, line {number} holds a {type(record).__name__}, not a JSON object")
        records.append(record)
    return records


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one object a line, so that a reader sees the old file or the new one, never half."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
