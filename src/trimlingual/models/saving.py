"""What holds of every model folder that is written here: published tensor names, greedy generation, files that others can read.

Nothing is loaded: JSON files and the headers of safetensors files are read and, where needed, edited in place.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimlingual.run.artifacts import write_json

# transformers 5.17 writes a model that was built, not loaded, with one `model.` too many.
DOUBLED, PUBLISHED = "language_model.model.model.", "language_model.model."
# Of a generation config, what says which tokens are what. All else would change what greedy decoding gives.
TOKENS = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")
INDEX = "model.safetensors.index.json"


def finish_saved(folder: Path, max_new_tokens: int | None = None) -> None:
    """Put right what libraries leave in a folder that a model was just saved to.

    Tensors get the published names, `generation_config.json` becomes the greedy one that scores are made with, and files get the
    permissions that the umask asks for (safetensors leaves 0600).
    """
    use_published_names(folder)
    path = folder / "generation_config.json"
    if path.is_file():
        write_json(path, greedy_generation(json.loads(path.read_text(encoding="utf-8")), max_new_tokens))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rows = (config.get("text_config") or {}).get("vocab_size")
    wanted = {key: value for key, value in config.items() if key != "_name_or_path"}  # a path of this machine
    if rows is not None and "vocab_size" in config:
        wanted["vocab_size"] = rows
    if wanted != config:
        write_json(folder / "config.json", wanted)
    make_readable(folder)


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


def tensor_names(path: Path) -> set[str]:
    """Names in the header of a safetensors file."""
    with path.open("rb") as file:
        return set(_header(file)[0]) - {"__metadata__"}


def make_readable(folder: Path) -> None:
    """Give the folder's files the permissions a new file would have."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~mask)


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
