"""Writes the tables of all recipe keys into docs/recipes.md, from the sections themselves.

python -m tools.recipe_tables
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimlingual.recipe import Recipe

DOCUMENT = Path(__file__).parents[1] / "docs" / "recipes.md"
BEGIN, END = "<!-- all keys: written by tools/recipe_tables.py -->", "<!-- end of all keys -->"
LEGEND = "° No stage is made again when only this key changes: it changes no result, or what it names is known by its content."
# Where each section stands in a recipe, in the order of the tables.
PLACES = {
    "Recipe": "The recipe", "ModelSettings": "`model`", "TaskSettings": "`task`", "DataSettings": "`data`",
    "ManifestSource": "a source with `kind: manifest`", "FolderSource": "a source with `kind: folder`",
    "HubSource": "a source with `kind: hub`", "Covost2Source": "a source with `kind: covost2`",
    "BuiltinSource": "a source with `kind: builtin`", "DecodeSettings": "`decode`", "VocabSettings": "`vocab`",
    "TrainSettings": "`finetune`, `recover`, `quantize.train`, `rank.finetune_each_round`", "MixSettings": "`data` of a training",
    "LoraSettings": "`lora` of a training", "TokenDistillation": "`token_distillation` of a training", "RankSettings": "`rank`",
    "BudgetSettings": "`budget` of `rank`",
    "DistillSettings": "`distill`", "QuantizeSettings": "`quantize`", "EvaluateSettings": "`evaluate`",
    "ExportSettings": "`export`", "VllmSettings": "`vllm` of `export`", "GgufSettings": "`gguf` of `export`",
}  # fmt: skip


def tables() -> str:
    """Markdown: a heading and a table for each section."""
    schema = Recipe.model_json_schema()
    sections = {"Recipe": schema, **schema["$defs"]}
    assert set(sections) == set(PLACES), f"PLACES must name every section: {set(sections) ^ set(PLACES)}"
    return "\n\n".join(_table(place, sections[name]) for name, place in PLACES.items())


def document(text: str) -> str:
    """The document with the tables between the two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{LEGEND}\n\n{tables()}\n\n{END}{after}"


def _table(place: str, section: dict[str, Any]) -> str:
    lines = [
        f"### {place}",
        "",
        section["description"].split("\n")[0],
        "",
        "| key | value | default | what |",
        "|---|---|---|---|",
    ]
    for name, field in section["properties"].items():
        mark = " °" if field.get("result") is False else ""
        required = name in section.get("required", ())
        default = "required" if required else _default(field)
        cells = (f"`{name}`{mark}", _kind(field), default, field.get("description", ""))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _kind(field: dict[str, Any]) -> str:
    """What may stand there, in words."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return "a training section" if name == "TrainSettings" else f"section {PLACES[name]}"
    if "oneOf" in field:
        return "a source"
    if "anyOf" in field:
        return " or ".join(_kind(each) for each in field["anyOf"])
    if "enum" in field or "const" in field:
        return " / ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    kind = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true / false", "null": "null"}
    if field["type"] == "array":
        return f"list of {_kind(field['items'])}"
    if field["type"] == "object":
        return f"mapping to {_kind(field['additionalProperties'])}"
    bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    return " ".join([kind[field["type"]], *(f"{word} {field[key]:g}" for key, word in bounds.items() if key in field)])


def _default(field: dict[str, Any]) -> str:
    value = field.get("default", [] if field.get("type") == "array" else {})
    is_section = isinstance(value, dict) and value
    return "its defaults" if is_section else f"`{json.dumps(value, ensure_ascii=False)}`"


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
