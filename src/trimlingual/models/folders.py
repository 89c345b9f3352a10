"""What a model folder holds, told from its JSON files alone: no weights and no library are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Stages that need the weights themselves, which 4-bit words of bitsandbytes are not.
CHANGES_WEIGHTS = ("teacher", "recovered", "pruned", "quantized")
PROCESSOR_FILES = (("preprocessor_config.json", "processor_config.json"), ("tokenizer.json", "vocab.json"))


class ModelError(ValueError):
    """A model that cannot be used here; the message says what to do."""


def folder_problems(folder: Path, stage: str) -> list[str]:
    """Why `stage` cannot use the model in `folder`; empty if nothing speaks against it."""
    if (folder / "adapter_config.json").is_file():
        base = _read(folder / "adapter_config.json").get("base_model_name_or_path", "its base model")
        return [
            f"{folder} holds a LoRA adapter, not a model; merge it onto {base} first (peft: merge_and_unload) and save the result"
        ]
    if not (folder / "config.json").is_file():
        return [f"{folder} holds no config.json: not a Hugging Face model folder"]
    config = _read(folder / "config.json")
    if config.get("model_type") != "qwen2_audio":
        return [f"{folder} holds a {config.get('model_type')!r} model; supported: qwen2_audio"]
    found = []
    if stage != "data" and not list(folder.glob("*.safetensors")) and not (folder / "random.json").is_file():
        found.append(f"{folder} holds no *.safetensors weights (other formats are not loaded: they can run code)")
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method == "bitsandbytes" and stage in CHANGES_WEIGHTS:
        found.append(
            f"{folder} is in 4 bits (bitsandbytes), and {stage!r} needs whole weights; give the model that it was made from"
        )
    for names in PROCESSOR_FILES:
        if not any((folder / name).is_file() for name in names):
            found.append(f"{folder} has no {names[0]}; copy the processor's files from the base model's folder")
    index = folder / "model.safetensors.index.json"
    if stage != "data" and index.is_file():
        shards = sorted(set(_read(index).get("weight_map", {}).values()))
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            found.append(
                f"{folder} lacks {len(missing)} of {len(shards)} weight files: {', '.join(missing[:3])}; download it again"
            )
    rows, largest = (config.get("text_config") or {}).get("vocab_size"), _largest_id(folder / "tokenizer.json")
    if rows is not None and largest is not None and largest >= rows:
        found.append(
            f"the tokenizer in {folder} has token ids up to {largest}, but the model has {rows} rows; they belong to different models"
        )
    return found


def _largest_id(path: Path) -> int | None:
    tokenizer = _read(path)
    ids = [token["id"] for token in tokenizer.get("added_tokens", [])]
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    if isinstance(vocabulary, dict):
        ids += vocabulary.values()
    return max(ids, default=None)


def _read(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}
