"""Reads a run folder into one plain dictionary, report.json; merges those of several runs.

Only JSON and the headers of weights are read here, and nothing is computed that was not measured: the tables and the page show what
stands in report.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimlingual.recipe import EXPORT_STAGES
from trimlingual.report.weights import bytes_by_part
from trimlingual.run import jsonl
from trimlingual.run.jsonl import JsonlError

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


class ReportError(ValueError):
    """A run folder that cannot be reported on; the message says what is missing."""


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
        "parts": _parts(run_dir, models),
        "notes": notes_on(models, machines),
    }


def merge(reports: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The reports of several runs as one, for tables and charts: models are called `run: model` and know their run.

    Raises ReportError if the runs were not evaluated on the same test split.
    """
    hashes = {name: report["split"]["hash"] for name, report in reports.items()}
    if len(set(hashes.values())) > 1:
        told = ", ".join(f"{name} on {split}" for name, split in hashes.items())
        raise ReportError(f"the runs were evaluated on different test splits ({told}): their scores cannot be compared")
    first = next(iter(reports.values()))
    codes = dict.fromkeys(code for report in reports.values() for code in languages(report))
    models = [
        {**model, "name": f"{name}: {model['name']}", "model": model["name"], "run": name}
        for name, report in reports.items()
        for model in report["models"]
    ]
    stages = [{**stage, "run": name} for name, report in reports.items() for stage in report["stages"]]
    machines = [report["machine"] for report in reports.values()]
    return {
        **first,
        "recipe": {**first["recipe"], "name": " · ".join(reports), "task": {"target_languages": list(codes)}},
        "rehearsal": any(report["rehearsal"] for report in reports.values()),
        "models": models,
        "stages": stages,
        "notes": notes_on(models, machines),
    }


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
    found["intervals"] = {m: [scores[m]["low"], scores[m]["high"]] for m in QUALITY if "low" in (scores.get(m) or {})}
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
                    "created": artifact.get("created", ""),
                    "inputs": artifact.get("inputs", {}),
                    "origins": artifact.get("origins", {}),
                    "versions": artifact.get("machine", {}).get("versions", {}),
                }
            )
    return stages


def _plan(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / "rank" / "plan.json"
    return _read_json(path, "rank again") if path.is_file() else None


def _parts(run_dir: Path, models: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Bytes by part of the models that stand in the run folder (the base does not)."""
    found = {}
    for model in models:
        folder = run_dir / model["name"]
        try:
            parts = bytes_by_part(folder, model["disk_bytes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ReportError(f"the weights in {folder} are damaged ({error}); make {model['name']} again") from error
        if parts:
            found[model["name"]] = parts
    return found


def notes_on(models: list[dict[str, Any]], machines: list[dict[str, Any]]) -> list[str]:
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


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a file of the run; ReportError if one is damaged."""
    try:
        return jsonl.read_jsonl(path)
    except JsonlError as error:
        raise ReportError(str(error)) from error
