"""Where a model's bytes are, by the names of its weights. Only the headers of the safetensors files are read."""

from __future__ import annotations

import json
from pathlib import Path

PARTS = {
    "audio_tower": "audio tower",
    "projector": "projector",
    "embed_tokens": "embedding",
    "lm_head": "output head",
    "layers": "decoder layers",
}  # a fragment of the weights' names: the part; the first that fits counts
OTHER, REST = "other weights", "tokenizer and configuration"
ALL_PARTS = (*PARTS.values(), OTHER, REST)
_LENGTH_BYTES = 8  # a safetensors file begins with its header's length, little-endian


def bytes_by_part(folder: Path, disk_bytes: int) -> dict[str, int]:
    """Bytes of each part that has any, in the order of ALL_PARTS; empty where there are no safetensors files.

    `disk_bytes` is what the whole folder ships; what the weights leave of it are the other files. Raises OSError or ValueError for a
    file that is not as safetensors writes it.
    """
    found = dict.fromkeys(ALL_PARTS, 0)
    for path in sorted(folder.glob("*.safetensors")):
        for name, num_bytes in _tensor_bytes(path).items():
            found[next((part for fragment, part in PARTS.items() if fragment in name), OTHER)] += num_bytes
    if not any(found.values()):
        return {}
    found[REST] = max(0, disk_bytes - sum(found.values()))
    return {part: num_bytes for part, num_bytes in found.items() if num_bytes}


def _tensor_bytes(path: Path) -> dict[str, int]:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(_LENGTH_BYTES), "little")))
    offsets = {name: tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__"}
    return {name: end - start for name, (start, end) in offsets.items()}
