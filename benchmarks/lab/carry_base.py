"""The trained base in pieces small enough to carry from one rented machine to the next, so that it is trained once.

    python benchmarks/lab/carry_base.py pack --lab runs/lab --pieces DIR        # once `base` is trained: 90 MB in files under 15 MB
    python benchmarks/lab/carry_base.py unpack --lab runs/lab --pieces DIR      # runs/lab/base again, from the untrained one

A piece holds what training changed in a weight, as 4-bit integers with one scale for every 64 of a row. Adding it to the untrained
weight gives the trained one but for the rounding, so `pack` also rewrites `runs/lab/base` with what `unpack` gives: every experiment on
every machine starts from the same bytes. Vectors are kept whole, and so is the projector, which is trained from random numbers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 64
PIECE_BYTES = 15_000_000
ROWS = 8_192  # rows of a weight in one entry, so that the embedding table fits into pieces
MODEL = "model.safetensors"


def quantize(change: Tensor) -> dict[str, Tensor]:
    """`change` (rows, width) as two 4-bit integers per byte (rows, width / 2) and scales (rows, width / 64) in float16."""
    groups = change.float().unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(-1, keepdim=True) / 7).half()
    steps = (groups / scale.float().clamp(min=1e-12)).round().clamp(-7, 7).flatten(1).to(torch.int16) + 8
    return {"steps": (steps[:, ::2] * 16 + steps[:, 1::2]).to(torch.uint8), "scale": scale.squeeze(-1)}


def dequantize(steps: Tensor, scale: Tensor) -> Tensor:
    """The change, float32, of what `quantize` gave."""
    integers = torch.stack([steps // 16, steps % 16], -1).flatten(1).float() - 8
    return (integers.unflatten(1, (-1, GROUP)) * scale.float()[..., None]).flatten(1)


def changes(untrained: dict[str, Tensor], trained: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Entries of the pieces: `NAME|ROW|steps` and `NAME|ROW|scale`, or `NAME` for a weight that is kept whole."""
    for name, weight in trained.items():
        if torch.equal(untrained[name].to(weight.dtype), weight):
            continue
        if weight.dim() != 2 or weight.shape[1] % GROUP or "projector" in name:
            yield name, weight
            continue
        for row in range(0, len(weight), ROWS):
            change = weight[row : row + ROWS].float() - untrained[name][row : row + ROWS].float()
            for part, tensor in quantize(change).items():
                yield f"{name}|{row}|{part}", tensor


def pack(lab: Path, pieces: Path) -> None:
    pieces.mkdir(parents=True, exist_ok=True)
    piece: dict[str, Tensor] = {}
    number = size = 0
    for name, tensor in changes(load_file(lab / "untrained" / MODEL), load_file(lab / "base" / MODEL)):
        if piece and size + tensor.nbytes > PIECE_BYTES:
            save_file(piece, pieces / f"base-{number}.safetensors")
            piece, number, size = {}, number + 1, 0
        piece[name] = tensor.contiguous()
        size += tensor.nbytes
    save_file(piece, pieces / f"base-{number}.safetensors")
    for path in (lab / "base").glob("*.json*"):
        shutil.copy(path, pieces)


def unpack(lab: Path, pieces: Path) -> str:
    """Write `lab`/base and return the SHA-256 of its weights, stored in bfloat16."""
    weights = load_file(lab / "untrained" / MODEL)
    entries: dict[str, Tensor] = {}
    for path in pieces.glob("base-*.safetensors"):
        entries |= load_file(path)
    for entry, tensor in entries.items():
        name, _, place = entry.partition("|")
        if not place:
            weights[name] = tensor
        elif place.endswith("|steps"):
            row = int(place.removesuffix("|steps"))
            weights[name][row : row + len(tensor)] += dequantize(tensor, entries[f"{name}|{row}|scale"])
    base = lab / "base"
    shutil.copytree(lab / "untrained", base, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MODEL))
    for path in pieces.glob("*.json*"):
        shutil.copy(path, base)
    stored = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    save_file(stored, base / MODEL, {"format": "pt"})
    return hashlib.sha256((base / MODEL).read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("pack", "unpack"))
    parser.add_argument("--lab", type=Path, required=True)
    parser.add_argument("--pieces", type=Path, required=True, help="folder of the pieces")
    args = parser.parse_args()
    if args.verb == "pack":
        pack(args.lab, args.pieces)
    print(json.dumps({"base": unpack(args.lab, args.pieces)}))


if __name__ == "__main__":
    main()
