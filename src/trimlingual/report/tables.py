"""The result table, once as rows of text and from there as a terminal table or Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from trimlingual.recipe import EXPORT_STAGES
from trimlingual.report.collect import languages

METRIC_NAMES = {"bleu": "BLEU", "chrf": "chrF", "chrfpp": "chrF++"}
NOTHING = "–"
COST_HEADER = ["model", "s/clip", "tokens/s", "real-time factor", "peak memory (MB)", "batch size"]
REHEARSAL = "Rehearsal: the base model has random weights, so no score here says anything about quality."


def result_rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and one row a model, from the base to what ships: size, then quality by language, then time.

    What ships was scored on the clips of its proof only (OUTCOME_HEADER), so that its quality is a dash here.
    """
    codes = languages(report)
    header = ["model", "layers", "parameters", "disk (MB)"]
    for code in codes:
        header += [f"{code} BLEU", f"{code} {METRIC_NAMES[shown_metric(report, code)]}"]
        header += [f"{code} COMET"] if _has_comet(report, code) else []
        header += (
            [f"{code} wrong language, %", f"{code} strict {METRIC_NAMES[shown_metric(report, code)]}"]
            if _has_wrong(report, code)
            else []
        )
        header += [f"{code} kept, % of {baseline(report, code)}"]
    rows = []
    for run in dict.fromkeys(model.get("run") for model in report["models"]):
        rows += [_row(report, model, codes) for model in report["models"] if model.get("run") == run]
        shipped = [
            outcome for outcome in outcomes(report) if outcome["run"] == run and outcome["disk_bytes"] is not None
        ]
        rows += [_shipped_row(outcome, rows[-1], len(header)) for outcome in shipped]
    return [*header, "s/clip"], rows


def _shipped_row(outcome: Mapping[str, Any], last: list[str], num_columns: int) -> list[str]:
    """The row of what was exported of the model in the row `last`; without its seconds a row has `num_columns`."""
    runtime = "" if outcome["runtime"] == "transformers" else f" {_runtime(outcome)}"
    name = f"exported{runtime} {outcome['format']}"
    size, seconds = outcome["disk_bytes"], (outcome["proof"] or {}).get("seconds_per_clip")
    unscored = [NOTHING] * (num_columns - 4)
    whose = f"{outcome['run']}: " if outcome["run"] else ""
    return [whose + name, *last[1:3], megabytes_text(size), *unscored, number_text(seconds, 3)]


def outcomes(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What ships, with its run where there are several. An export of an earlier version says only what was proven."""
    stages = [stage for stage in report["stages"] if stage["stage"] in EXPORT_STAGES.values()]
    earlier = {"runtime": "transformers", "format": NOTHING, "disk_bytes": None}
    return [
        {**outcome, "run": stage.get("run")}
        for stage in stages
        for info in (stage["info"],)
        for outcome in info.get("outcomes", [earlier | {"proof": info["proof"]}] if info.get("proof") else [])
    ]


def cost_rows(report: dict[str, Any]) -> list[list[str]]:
    """Time and memory, one row a model, under COST_HEADER."""
    return [
        [
            model["name"],
            number_text(model["seconds_per_clip"], 3),
            number_text(model["tokens_per_second"], 1),
            number_text(model["real_time_factor"], 4),
            megabytes_text(model["peak_memory_bytes"]),
            NOTHING if model["batch_size"] is None else str(model["batch_size"]),
        ]
        for model in report["models"]
    ]


def result_table(report: dict[str, Any]) -> Table:
    """For the terminal."""
    header, rows = result_rows(report)
    split = report["split"]
    title = (
        f"{report['recipe'].get('name', 'run')}: {split.get('name', 'test')} split, {split.get('num_clips', '?')} clips"
    )
    return as_table(header, rows, title, report["rehearsal"])


def as_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str, rehearsal: bool) -> Table:
    """Rows of text for the terminal."""
    table = Table(title=Text(title), caption=Text(REHEARSAL, style="bold red") if rehearsal else None)
    for index, name in enumerate(header):
        table.add_column(Text(name), justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def result_table_markdown(report: dict[str, Any]) -> str:
    """For a README or a model card."""
    return as_markdown(result_rows(report))


def as_markdown(table: tuple[Sequence[str], Sequence[Sequence[str]]]) -> str:
    """A header and rows of text as a Markdown table."""
    header, rows = table
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(markdown_cell(cell) for cell in line) + " |" for line in lines) + "\n"


def markdown_cell(text: str) -> str:
    """Text that cannot break out of a table cell, nor be read as HTML."""
    escaped = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return escaped.replace("|", "\\|")


def shown_metric(report: dict[str, Any], code: str) -> str:
    """The character metric shown beside BLEU: the language's main metric, or chrF++ where that is BLEU or a loss."""
    for model in report["models"]:
        main = model["languages"].get(code, {}).get("main_metric")
        if main in ("chrf", "chrfpp"):
            return main
    return "chrfpp"


def baseline(report: dict[str, Any], code: str) -> str:
    """The model whose score the others are a share of."""
    for model in report["models"]:
        kept = model["languages"].get(code, {}).get("retained")
        if kept:
            return kept["baseline"]
    return "teacher"


def kept_text(retained: dict[str, Any] | None) -> str:
    """`98.1 [96.4, 99.9]`: percent of the baseline's score with its confidence interval."""
    if not retained or retained.get("ratio") is None:
        return NOTHING
    value = f"{100 * retained['ratio']:.1f}"
    if retained.get("low") is None or retained.get("high") is None:
        return value
    return f"{value} [{100 * retained['low']:.1f}, {100 * retained['high']:.1f}]"


def parameters_text(count: float | None) -> str:
    """`7.5 M`, `8.40 B`."""
    if count is None:
        return NOTHING
    for unit, size, digits in (("B", 1e9, 2), ("M", 1e6, 1), ("k", 1e3, 1)):
        if count >= size:
            return f"{count / size:.{digits}f} {unit}"
    return f"{count:.0f}"


def megabytes_text(num_bytes: float | None) -> str:
    """Decimal megabytes; a decimal below 100."""
    if num_bytes is None:
        return NOTHING
    megabytes = num_bytes / 1e6
    return f"{megabytes:,.1f}" if megabytes < 100 else f"{megabytes:,.0f}"


def seconds_text(seconds: float | None) -> str:
    """`0.042 s`, `3.1 s`, `4 min 05 s`, `2 h 10 min`."""
    if seconds is None:
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.3f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def number_text(value: float | None, digits: int = 2) -> str:
    """A number, or a dash where it was not measured."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def _row(report: dict[str, Any], model: dict[str, Any], codes: list[str]) -> list[str]:
    layers = model["num_decoder_layers"]
    row = [
        model["name"],
        NOTHING if layers is None else str(layers),
        parameters_text(model["params"]),
        megabytes_text(model["disk_bytes"]),
    ]
    for code in codes:
        scores = model["languages"].get(code, {})
        row += [number_text(scores.get("bleu")), number_text(scores.get(shown_metric(report, code)))]
        if _has_comet(report, code):
            row.append(", ".join(number_text(value, 4) for value in scores.get("comet", {}).values()) or NOTHING)
        if _has_wrong(report, code):
            share = (scores.get("wrong_language") or {}).get("share")
            row += [
                number_text(None if share is None else 100 * share, 1),
                number_text((scores.get("strict") or {}).get("value")),
            ]
        row.append(kept_text(scores.get("retained")))
    return [*row, number_text(model["seconds_per_clip"], 3)]


def _has_wrong(report: dict[str, Any], code: str) -> bool:
    return any(
        (model["languages"].get(code, {}).get("wrong_language") or {}).get("count") for model in report["models"]
    )


def _has_comet(report: dict[str, Any], code: str) -> bool:
    return any(model["languages"].get(code, {}).get("comet") for model in report["models"])


RUNTIME_NAMES = {"gguf": "llama.cpp", "vllm": "vLLM"}  # of the runtimes that are not called as their target
OUTCOME_HEADER = ["runtime", "format", "MB", "equal translations", "score of these", "seconds per clip", "memory in MB"]


def outcome_row(outcome: Mapping[str, Any]) -> list[str]:
    """A line of the table of what ships; what was not measured is a dash."""
    proof = outcome["proof"] or {}
    equal = f"{proof['equal']} of {proof['compared']}" if proof.get("compared") else NOTHING
    size, peak = megabytes_text(outcome["disk_bytes"]), megabytes_text(proof.get("peak_bytes"))
    scores = ", ".join(f"{code} {number_text(value, 1)}" for code, value in proof.get("scores", {}).items()) or NOTHING
    return [
        _runtime(outcome),
        outcome["format"],
        size,
        equal,
        scores,
        number_text(proof.get("seconds_per_clip"), 3),
        peak,
    ]


def outcome_text(outcome: Mapping[str, Any]) -> str:
    """What its runtime made of something that ships, in one sentence."""
    if outcome["proof"]:
        return proof_text(outcome["proof"])
    return f"not checked with {_runtime(outcome)}: {outcome['unproven']}"


def _runtime(outcome: Mapping[str, Any]) -> str:
    return RUNTIME_NAMES.get(outcome["runtime"], outcome["runtime"])


def proof_text(proof: Mapping[str, Any]) -> str:
    """What an export's proof has shown, in one sentence. Exports of earlier versions do not say with what it was shown."""
    with_what = " with ".join(f"{name} {version}" for name, version in proof.get("versions", {}).items())
    if (runtime := proof.get("runtime", "transformers")) != "transformers":
        loads, gives = f"{runtime} ({with_what}) loads what was written", "gives"
    else:
        loads = f"plain {with_what or 'transformers'} loads the folder whole"
        gives = f"generate() in {proof['dtype']} gives" if "dtype" in proof else "generate() gives"
    if not proof["compared"]:
        return f"{loads}; nothing was recorded that its translations could be compared with"
    return f"{loads}, and {gives} {proof['equal']} of {proof['compared']} recorded translations unchanged"
