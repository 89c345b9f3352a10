"""What a model folder holds, told from its JSON files alone: no weights and no library are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimlingual.models.errors import ModelError
from trimlingual.run.extras import install_line, library_names, missing
from trimlingual.run.fingerprint import read_object

# Stages that need the weights themselves, which 4-bit words of bitsandbytes are not.
CHANGES_WEIGHTS = ("teacher", "recovered", "pruned", "quantized")
# The known families (`model_type` of config.json). One of the files beside a family's name holds the tokenizer.
FAMILIES = {
    "qwen2_audio": ("tokenizer.json", "vocab.json"),
    "voxtral": ("tekken.json",),
    "audioflamingo3": ("tokenizer.json", "vocab.json"),
}
# The extra with the library that reads this tokenizer, where that is no dependency of the package.
NEEDED = {"tekken.json": "voxtral"}
EXTRACTOR_FILES = ("preprocessor_config.json", "processor_config.json")


def folder_problems(folder: Path, stage: str) -> list[str]:
    """Why `stage` cannot use the model in `folder`; empty if nothing speaks against it."""
    found = model_problems(folder, weights=stage != "data")
    if not _is_model(folder):
        return found
    if stage in CHANGES_WEIGHTS and is_bitsandbytes(folder):
        found.append(
            f"{folder} is in 4 bits (bitsandbytes) and cannot be trained, pruned or quantised again; "
            "give the model that it was made from"
        )
    found += processor_problems(folder)
    rows, largest = (_config(folder).get("text_config") or {}).get("vocab_size"), _largest_id(folder / "tokenizer.json")
    if rows is not None and largest is not None and largest >= rows:
        found.append(
            f"the tokenizer in {folder} has token ids up to {largest}, but the model has {rows} rows; they belong to different models"
        )
    return found


def check_folder(folder: Path, stage: str) -> None:
    """ModelError, with every reason, where `stage` cannot use the model in `folder`."""
    refuse(folder_problems(folder, stage))


def refuse(problems: Sequence[str]) -> None:
    """ModelError if there are any problems."""
    if problems:
        raise ModelError("; ".join(problems))


def model_problems(folder: Path, weights: bool = True) -> list[str]:
    """Why no model can be loaded from `folder`; without `weights` only what its configuration tells."""
    if (folder / "adapter_config.json").is_file():
        base = read_object(folder / "adapter_config.json").get("base_model_name_or_path", "its base model")
        return [
            f"{folder} holds a LoRA adapter, not a model; merge it onto {base} first (peft: merge_and_unload) and save the result"
        ]
    if not (folder / "config.json").is_file():
        return [f"{folder} holds no config.json: not a Hugging Face model folder"]
    if not _is_model(folder):
        return [f"{folder} holds a {_config(folder).get('model_type')!r} model; supported: {', '.join(FAMILIES)}"]
    if not weights or (folder / "random.json").is_file():
        return []
    if not list(folder.glob("*.safetensors")):
        return [f"{folder} holds no *.safetensors weights (other formats are not loaded: they can run code)"]
    shards = sorted(set(read_object(folder / "model.safetensors.index.json").get("weight_map", {}).values()))
    lacking = [name for name in shards if not (folder / name).is_file()]
    if lacking:
        return [
            f"{folder} lacks {len(lacking)} of {len(shards)} weight files: {', '.join(lacking[:3])}; download it again"
        ]
    return []


def processor_problems(folder: Path) -> list[str]:
    """Which of the processor's files `folder` lacks, and which library that reads them is not installed."""
    tokenizer_files = FAMILIES[_config(folder)["model_type"]]
    missing = [
        f"{folder} has no {names[0]}; copy the processor's files from the base model's folder"
        for names in (EXTRACTOR_FILES, tokenizer_files)
        if not any((folder / name).is_file() for name in names)
    ]
    return missing + [problem for name in tokenizer_files if (problem := library_problem(name))]


def library_problem(tokenizer_file: str) -> str | None:
    """What to install where the library that reads this tokenizer file is not there."""
    extra = NEEDED.get(tokenizer_file)
    if extra is None or not missing(extra):
        return None
    return (
        f"{tokenizer_file} is read by the library {library_names(missing(extra))}, which is not installed: "
        f"{install_line(extra)}. On Python 3.12 and older it wants numpy < 2.4"
    )


def is_bitsandbytes(folder: Path) -> bool:
    """Whether the weights are 4-bit words of bitsandbytes."""
    return (_config(folder).get("quantization_config") or {}).get("quant_method") == "bitsandbytes"


def _config(folder: Path) -> dict[str, Any]:
    return read_object(folder / "config.json")


def _is_model(folder: Path) -> bool:
    return _config(folder).get("model_type") in FAMILIES


def _largest_id(path: Path) -> int | None:
    tokenizer = read_object(path)
    ids = [token["id"] for token in tokenizer.get("added_tokens", [])]
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    if isinstance(vocabulary, dict):
        ids += vocabulary.values()
    return max(ids, default=None)
