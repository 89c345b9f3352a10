"""Every clip of the test split, to listen to and to compare: what was said, what should be said, what the models said.

A model's words that differ from those of the model it is compared with are marked, and every translation has its own score, so that
the worst can be looked at first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Any

from sacrebleu.metrics.chrf import CHRF

from trimlingual.recipe.languages import language as language_of
from trimlingual.report.collect import ReportError, languages, read_jsonl
from trimlingual.report.sounds import Sounds


@dataclass(frozen=True)
class Translation:
    """What one model made of a clip, in pieces of text that differ from the compared one's or not.

    `pieces` is None where the model was not asked; `score` is the sentence's chrF or chrF++ against the reference.
    """

    label: str
    pieces: list[tuple[str, bool]] | None
    truncated: bool
    score: float | None


@dataclass(frozen=True)
class Line:
    """A clip in one target language: `first` (the teacher, where there is one), the students, then the other models."""

    language: str
    reference: str
    first: Translation
    students: list[Translation]
    others: list[Translation]

    @property
    def differs(self) -> bool:
        """Whether a student says anything else than the first model."""
        return any(differs for student in self.students for _, differs in student.pieces or ())


@dataclass(frozen=True)
class Clip:
    """A test clip. `sound` is what a player plays, None where `sound_note` says why there is none."""

    id: str
    source: str
    duration_s: float | None
    sound: str | None
    sound_note: str
    lines: list[Line]


def listen(runs: Mapping[str, tuple[Path, dict[str, Any]]], sounds: Sounds) -> list[Clip]:
    """All clips of the test split that the runs (by name: folder and report) share; empty where none has kept its manifest.

    The first model is the first run's teacher, or its first model; each run's last model is a student. Of a single run the models
    between are shown too. Raises ReportError for a manifest or translations that are damaged.
    """
    manifest = next((path for folder, _ in runs.values() if (path := folder / "data" / "test.jsonl").is_file()), None)
    if manifest is None:
        return []
    columns = _columns(runs)
    codes = languages(next(iter(runs.values()))[1])
    said = {
        (label, code): _by_id(run_dir / "evaluations" / name / f"translations.{code}.jsonl")
        for label, (run_dir, name) in columns.items()
        for code in codes
    }
    num_students = min(len(runs), len(columns) - 1)
    clips = []
    for row in read_jsonl(manifest):
        sound, note = sounds.add(row.get("audio"), manifest.parent)
        lines = [_line(row, code, list(columns), num_students, said) for code in codes]
        clips.append(Clip(str(row["id"]), row.get("source") or "", row.get("duration_s"), sound, note, lines))
    return clips


def _columns(runs: Mapping[str, tuple[Path, dict[str, Any]]]) -> dict[str, tuple[Path, str]]:
    """Label -> run folder and model: the first model, the students, then the others."""
    one = len(runs) == 1
    found: dict[str, tuple[Path, str]] = {}
    for run, (folder, report) in runs.items():
        names = [model["name"] for model in report["models"]]
        first = "teacher" if "teacher" in names else names[0]
        wanted = [first, names[-1], *names] if one else [*([first] if not found else []), names[-1]]
        for name in dict.fromkeys(wanted):
            found[name if one else f"{run}: {name}"] = (folder, name)
    return found


def _line(
    row: dict[str, Any],
    code: str,
    labels: Sequence[str],
    num_students: int,
    said: Mapping[tuple[str, str], Mapping[str, dict[str, Any]]],
) -> Line:
    reference = row.get("references", {}).get(code) or ""
    records = {label: said[label, code].get(row["id"], {}) for label in labels}
    first, *rest = [
        _translation(label, record, records[labels[0]].get("hypothesis"), reference, code)
        for label, record in records.items()
    ]
    if num_students == 1 and rest[0].pieces is not None:  # what the one student says otherwise is marked in both
        student = records[labels[1]].get("hypothesis")
        first = _translation(labels[0], records[labels[0]], student, reference, code)
    return Line(code, reference, first, rest[:num_students], rest[num_students:])


def _translation(label: str, record: dict[str, Any], other: str | None, reference: str, code: str) -> Translation:
    text = record.get("hypothesis")
    score = None if text is None or not reference else sentence_score(text, reference, code)
    pieces = None if text is None else marked(text, text if other is None else other, code)
    return Translation(label, pieces, bool(record.get("truncated")), score)


def marked(text: str, other: str, code: str) -> list[tuple[str, bool]]:
    """`text` in pieces, each with whether `other` lacks it: by words, or by characters where words have no spaces."""
    units, others = (_units(each, code) for each in (text, other))
    gap = " " if language_of(code).spaced else ""
    pieces: list[tuple[str, bool]] = []
    for kind, _, _, start, end in SequenceMatcher(None, others, units, autojunk=False).get_opcodes():
        if end > start:
            if pieces and gap:
                pieces.append((gap, False))
            pieces.append((gap.join(units[start:end]), kind != "equal"))
    return pieces


def sentence_score(text: str, reference: str, code: str) -> float:
    """chrF++ of one translation, chrF where words have no spaces: 0 to 100. For sorting, not for comparing systems."""
    return float(_chrf(2 if language_of(code).spaced else 0).sentence_score(text, [reference]).score)


@cache
def _chrf(word_order: int) -> CHRF:
    return CHRF(word_order=word_order)


def _units(text: str, code: str) -> list[str]:
    return text.split() if language_of(code).spaced else list(text)


def _by_id(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    try:
        return {record["id"]: record for record in read_jsonl(path)}
    except (KeyError, TypeError) as error:
        raise ReportError(f"{path} has a line without an id: evaluate again with --force") from error
