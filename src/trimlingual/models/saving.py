"""Save a model, and what holds of every model folder written here: published tensor names, greedy generation, readable files.

Readable by other users, and by transformers from 4.57 on.

Weights are rounded in memory to what is stored, so that the model that is evaluated is the one on disk. `finish_saved` loads nothing:
it reads JSON files and the headers of safetensors files and, where needed, edits them in place.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimlingual.models.errors import ModelError
from trimlingual.recipe import Dtype
from trimlingual.run.artifacts import write_json

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# transformers 5.17 writes a model that was built, not loaded, with one `model.` too many.
DOUBLED, PUBLISHED = "language_model.model.model.", "language_model.model."
# Of a generation config, what says which tokens are what. All else would change what greedy decoding gives.
TOKENS = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")
HOW_LOADED = ("is_local", "local_files_only", "name_or_path")  # says nothing of the tokenizer
INDEX = "model.safetensors.index.json"


def save_model(
    model: Any,
    processor: Any,
    folder: Path,
    storage_dtype: Dtype | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Save model and processor as safetensors; with `weights`, these instead of the model's.

    With `storage_dtype` the weights are rounded to it in memory too, so that what is evaluated is what is on disk. Raises ModelError,
    before anything is written, where a weight is then infinite or NaN.
    """
    state = weights
    if storage_dtype is not None:
        if weights is None:
            round_weights_(model, storage_dtype)
        target = DTYPES[storage_dtype]
        state = {k: v.to(target) if v.is_floating_point() else v for k, v in (weights or model.state_dict()).items()}
        _require_finite(state, folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, state_dict=state, max_shard_size="4GB")
    if storage_dtype is not None:
        _write_stored_dtype(folder, storage_dtype)
    processor.save_pretrained(folder)
    finish_saved(folder)


def _require_finite(state: Mapping[str, Tensor], folder: Path) -> None:
    """By the least and the largest value of each tensor, which takes no memory beside it."""
    bad = [
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all()
    ]
    if bad:
        raise ModelError(
            f"{len(bad)} of {len(state)} weight tensors for {folder} hold infinity or NaN (first: {bad[0]}), so nothing was saved. "
            "After a training lower learning_rate; with model.storage_dtype float16, whose largest number is 65,504, use bfloat16; "
            "else the model that this stage was given holds them already"
        )


@torch.no_grad()
def round_weights_(model: Any, storage_dtype: Dtype) -> None:
    """Round every floating-point weight to `storage_dtype`, keeping the dtype it is held in."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(DTYPES[storage_dtype]))


def _write_stored_dtype(folder: Path, storage_dtype: Dtype) -> None:
    """The saved config must name the dtype on disk; transformers writes the one in memory."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for section in (config, config["text_config"], config["audio_config"]):
        section["dtype"] = storage_dtype
    write_json(path, config)


def finish_saved(folder: Path, max_new_tokens: int | None = None) -> None:
    """Put right what libraries leave in a folder that a model was just saved to.

    Tensors get the published names, `generation_config.json` becomes the greedy one that scores are made with, configurations can be
    read by transformers 4.57 too, and files get the permissions that the umask asks for (safetensors leaves 0600).
    """
    use_published_names(folder)
    _edit(folder / "generation_config.json", lambda config: greedy_generation(config, max_new_tokens))
    _edit(folder / "config.json", portable_config)
    _edit(folder / "tokenizer_config.json", portable_tokenizer)
    make_readable(folder)


def portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with one number of rows and without a path of this machine. The base of the rotary embedding stands where
    transformers 4 reads it too: elsewhere it would take 10,000, whatever the model was trained with."""
    portable = {key: value for key, value in config.items() if key != "_name_or_path"}
    text = dict(config.get("text_config") or {})
    if "vocab_size" in config and "vocab_size" in text:
        portable["vocab_size"] = text["vocab_size"]
    if base := (text.get("rope_parameters") or {}).get("rope_theta"):
        portable["text_config"] = text | {"rope_theta": base}
    return portable


def portable_tokenizer(config: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer's settings with its special tokens under a name that transformers 4 and 5 read, and without how it was loaded.

    transformers 5 writes them as a list under `extra_special_tokens`, where 4.57 expects a mapping.
    """
    portable = {key: value for key, value in config.items() if key not in HOW_LOADED}
    if isinstance(portable.get("extra_special_tokens"), list):
        portable["additional_special_tokens"] = portable.pop("extra_special_tokens")
    return portable


def greedy_generation(config: Mapping[str, Any], max_new_tokens: int | None = None) -> dict[str, Any]:
    """The generation config that greedy decoding needs: the tokens of `config` and a bound on new ones, no sampling, no penalties."""
    bound = max_new_tokens or config.get("max_new_tokens")
    tokens = {key: config[key] for key in TOKENS if config.get(key) is not None}
    return {"do_sample": False, **tokens, **({"max_new_tokens": bound} if bound else {})}


def use_published_names(folder: Path) -> int:
    """Rename tensors with the doubled prefix, in headers and in the index; returns how many. The weights are not rewritten."""
    renamed = sum(_rename_in_header(path) for path in sorted(folder.glob("*.safetensors")))
    index = folder / INDEX
    if index.is_file():
        listed = json.loads(index.read_text(encoding="utf-8"))
        names = {_published(name): file for name, file in listed["weight_map"].items()}
        if names != listed["weight_map"]:
            write_json(index, listed | {"weight_map": names})
    return renamed


def make_readable(folder: Path) -> None:
    """Give the folder's files the permissions a new file would have."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~mask)


def _edit(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Write a JSON file again if it is there and `change` changes it."""
    if path.is_file() and (changed := change(before := json.loads(path.read_text(encoding="utf-8")))) != before:
        write_json(path, changed)


def _published(name: str) -> str:
    return PUBLISHED + name.removeprefix(DOUBLED) if name.startswith(DOUBLED) else name


def _header(file: Any) -> tuple[dict[str, Any], int]:
    (length,) = struct.unpack("<Q", file.read(8))
    return json.loads(file.read(length)), length


def _rename_in_header(path: Path) -> int:
    """Shorter names leave room in the header, which the format lets be filled with spaces."""
    with path.open("r+b") as file:
        header, length = _header(file)
        doubled = [name for name in header if name.startswith(DOUBLED)]
        if not doubled:
            return 0
        text = json.dumps({_published(name): entry for name, entry in header.items()}, separators=(",", ":"))
        encoded = text.encode("utf-8")
        assert len(encoded) <= length, "shorter names gave a longer header"
        file.seek(8)
        file.write(encoded.ljust(length))
    return len(doubled)
