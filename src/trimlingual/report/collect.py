"""Reads a run folder into one plain dictionary, report.json, and picks the examples to listen to.

Only JSON is read here, and nothing is computed that was not measured: the tables and the page show what stands in
report.json.
"""

from __future__ import annotations

import base64
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimlingual.recipe import EXPORT_STAGES
from trimlingual.run.jsonl import JsonlError, read_jsonl

MODELS = ("base", "trimmed", "teacher", "pruned", "recovered", "quantized")  # in the order in which a run makes them
STAGES = (
    "data",
    "trimmed",
    "teacher",
    "rank",
    "pruned",
    "distilled",
    "recovered",
    "quantized",
    *EXPORT_STAGES.values(),
)
QUALITY = ("bleu", "chrf", "chrfpp")
MAX_EXAMPLES = 6
MAX_AUDIO_BYTES = (
    4_000_000  # a clip beyond this (two minutes of 16 kHz WAV) is shown without its sound, to keep the page small
)
AUDIO_TYPES = {
    ".wav": "audio/wav", ".ogg": "audio/ogg", ".opus": "audio/ogg", ".flac": "audio/flac", ".mp3": "audio/mpeg",
    ".m4a": "audio/mp4", ".webm": "audio/webm",
}  # fmt: skip


class ReportError(ValueError):
    """A run folder that cannot be reported on; the message says what is missing."""


@dataclass(frozen=True)
class Translation:
    """What one model made of a clip; `text` is None where it was not asked."""

    model: str
    text: str | None
    truncated: bool


@dataclass(frozen=True)
class Example:
    """A test clip in one target language: what was said, what should be said, what each model said."""

    id: str
    source: str
    duration_s: float | None
    audio: str | None
    audio_note: str
    languages: dict[str, str]
    translations: dict[str, list[Translation]]


def collect(run_dir: Path) -> dict[str, Any]:
    """The content of report.json. Raises ReportError if the run holds no recipe or no evaluation, or if one is damaged.

    Stages that were not run are left out; so are models that were not evaluated.
    """
    run_dir = Path(run_dir)
    recipe = _read_json(run_dir / "recipe.json", "it is not the folder of a run")
    results = _results(run_dir, trimmed_last=(recipe.get("vocab") or {}).get("when") == "after")
    splits = {result["split"]["hash"]: name for name, result in results.items()}
    if len(splits) > 1:
        raise ReportError(
            f"the models of {run_dir} were evaluated on different test splits ({', '.join(splits.values())}): "
            "their scores cannot be compared; evaluate them again on one"
        )
    models = [_model(result) for result in results.values()]
    machines = [result.get("machine") or {} for result in results.values()]
    return {
        "recipe": recipe,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rehearsal": str(recipe.get("model", {}).get("base", "")).startswith("random:"),
        "split": next(iter(results.values()))["split"],
        "machine": machines[-1],
        "models": models,
        "stages": _stages(run_dir),
        "plan": _plan(run_dir),
        "notes": _notes(models, machines),
    }


def examples(run_dir: Path, report: dict[str, Any]) -> list[Example]:
    """Up to six clips spread evenly over the test split in its own order: chosen by place, not by quality."""
    run_dir = Path(run_dir)
    manifest = run_dir / "data" / "test.jsonl"
    if not manifest.is_file():
        return []
    clips = _read_jsonl(manifest)
    step = max(1, len(clips) / MAX_EXAMPLES)
    chosen = [clips[int(i * step)] for i in range(min(MAX_EXAMPLES, len(clips)))]
    names = [model["name"] for model in report["models"]]
    ids = {clip["id"] for clip in chosen}
    said = {
        (name, language): _translations(run_dir / "evaluations" / name / f"translations.{language}.jsonl", ids)
        for name in names
        for language in languages(report)
    }
    return [_example(clip, manifest.parent, names, said, languages(report)) for clip in chosen]


def languages(report: dict[str, Any]) -> list[str]:
    """Target languages of the recipe that were evaluated, in the recipe's order."""
    evaluated = {language for model in report["models"] for language in model["languages"]}
    asked = report["recipe"].get("task", {}).get("target_languages", [])
    return [language for language in asked if language in evaluated] + sorted(evaluated - set(asked))


def _results(run_dir: Path, trimmed_last: bool) -> dict[str, dict[str, Any]]:
    folder = run_dir / "evaluations"
    results = {}
    for name in sorted(MODELS, key=lambda name: trimmed_last and name == "trimmed"):
        if (folder / name).is_dir():
            hint = f"the evaluation of {name} is not finished; run `trimlingual evaluate` again or delete that folder"
            results[name] = _read_json(folder / name / "result.json", hint)
    if not results:
        raise ReportError(
            f"{folder} holds no evaluation of {', '.join(MODELS)}: there is nothing to report; "
            "run `trimlingual evaluate` first"
        )
    for name, result in results.items():
        missing = [key for key in ("name", "params", "disk_bytes", "split", "languages", "speed") if key not in result]
        if missing:
            raise ReportError(f"{folder / name / 'result.json'} lacks {', '.join(missing)}; evaluate {name} again")
    return results


def _model(result: dict[str, Any]) -> dict[str, Any]:
    """One entry of report.json's `models`."""
    speed = result["speed"]
    return {
        "name": result["name"],
        "params": result["params"],
        "disk_bytes": result["disk_bytes"],
        "num_decoder_layers": result.get("num_decoder_layers"),
        "removed_layers": result.get("removed_layers", []),
        "quantization": result.get("quantization"),
        "seconds_per_clip": speed.get("seconds_per_clip"),
        "tokens_per_second": speed.get("tokens_per_second"),
        "real_time_factor": speed.get("real_time_factor"),
        "batch_size": speed.get("batch_size"),
        "peak_memory_bytes": result.get("peak_memory_bytes"),
        "languages": {code: _language(scores) for code, scores in result["languages"].items()},
    }


def _language(scores: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {metric: (scores.get(metric) or {}).get("value") for metric in QUALITY}
    found["comet"] = scores.get("comet") or {}
    found["main_metric"] = scores.get("main_metric", "chrfpp")
    found["retained"] = scores.get("retained")
    found["signatures"] = {metric: scores[metric]["signature"] for metric in QUALITY if scores.get(metric)}
    found["wrong_language"], found["strict"] = scores.get("wrong_language"), scores.get("strict")
    found["num_clips"] = scores.get("num_clips")
    found["num_truncated"] = scores.get("num_truncated", 0)
    return found


def _stages(run_dir: Path) -> list[dict[str, Any]]:
    stages = []
    for stage in STAGES:
        path = run_dir / stage / "artifact.json"
        if path.is_file():
            artifact = _read_json(path, f"delete {path.parent} and run the stage again")
            stages.append(
                {
                    "stage": stage,
                    "seconds": artifact.get("seconds", 0.0),
                    "info": artifact.get("info", {}),
                    "fingerprint": artifact.get("fingerprint"),
                }
            )
    return stages


def _plan(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / "rank" / "plan.json"
    return _read_json(path, "rank again") if path.is_file() else None


def _notes(models: list[dict[str, Any]], machines: list[dict[str, Any]]) -> list[str]:
    """What a reader must know before comparing numbers."""
    notes = []
    hardware = {json.dumps([machine.get("cpu"), machine.get("gpu")], sort_keys=True) for machine in machines}
    if len(hardware) > 1:
        notes.append("The models were not all measured on the same machine: their times cannot be compared.")
    if len({model["batch_size"] for model in models}) > 1:
        notes.append("The models were not all measured at the same batch size: their times cannot be compared.")
    for model in models:
        for code, scores in model["languages"].items():
            if scores["num_truncated"]:
                notes.append(
                    f"{model['name']}, {code}: {scores['num_truncated']} of {scores['num_clips']} translations were "
                    "cut off at the bound on new tokens."
                )
    return notes


def _example(
    clip: dict[str, Any],
    folder: Path,
    names: list[str],
    said: dict[tuple[str, str], dict[str, dict[str, Any]]],
    codes: list[str],
) -> Example:
    audio, note = _audio(clip.get("audio"), folder)
    translations = {}
    for code in codes:
        records = [(name, said[name, code].get(clip["id"], {})) for name in names]
        translations[code] = [
            Translation(name, record.get("hypothesis"), bool(record.get("truncated"))) for name, record in records
        ]
    return Example(
        id=str(clip["id"]),
        source=clip.get("source") or "",
        duration_s=clip.get("duration_s"),
        audio=audio,
        audio_note=note,
        languages={code: clip.get("references", {}).get(code) or "" for code in codes},
        translations=translations,
    )


def _audio(name: str | None, folder: Path) -> tuple[str | None, str]:
    """The clip as a data URI, or None and why not."""
    if not name:
        return None, "no audio file is named for this clip"
    path = folder / name  # an absolute name stays absolute
    media_type = AUDIO_TYPES.get(path.suffix.lower())
    if media_type is None:
        return None, f"browsers cannot be relied on to play {path.suffix or 'this kind of'} audio"
    if not path.is_file():
        return None, "the audio file is not on this machine"
    if path.stat().st_size > MAX_AUDIO_BYTES:
        return None, f"the audio file is larger than {MAX_AUDIO_BYTES / 1e6:.0f} MB"
    return f"data:{media_type};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}", ""


def _translations(path: Path, ids: set[str]) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    return {record["id"]: record for record in _read_jsonl(path) if record["id"] in ids}


def _read_json(path: Path, hint: str) -> dict[str, Any]:
    if not path.is_file():
        raise ReportError(f"{path} is missing: {hint}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{path} is not JSON ({error}): {hint}") from error
    if not isinstance(value, dict):
        raise ReportError(f"{path} must hold a JSON object, not {type(value).__name__}: {hint}")
    return value


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    try:
        return read_jsonl(path)
    except JsonlError as error:
        raise ReportError(str(error)) from error
