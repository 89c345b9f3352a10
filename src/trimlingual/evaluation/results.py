"""What an evaluation leaves in its folder: `result.json`, and the translations of each language as JSONL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimlingual.run.records import read_record, read_records

RESULT_FILE = "result.json"


DAMAGED = "run the evaluation again with --force"


class EvaluationError(ValueError):
    """An evaluation whose files cannot be read."""


def read_result(folder: Path) -> dict[str, Any]:
    """The EvalResult in `folder`."""
    return read_record(folder / RESULT_FILE, dict[str, Any], EvaluationError, DAMAGED, ("name", "split", "languages"))


def read_translations(folder: Path, language: str) -> list[dict[str, Any]]:
    """The recorded translations, in the split's order."""
    return read_records(
        translations_file(folder, language), dict[str, Any], EvaluationError, DAMAGED, ("id", "hypothesis")
    )


def translations_file(folder: Path, language: str) -> Path:
    """Where the translations into a language stand."""
    return folder / f"translations.{language}.jsonl"
