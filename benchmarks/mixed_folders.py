"""What mixed plans weigh at the true shapes of Qwen2-Audio-7B, by part, from saved folders; no GPU, a minute each and 8 GB of memory.

    python benchmarks/mixed_folders.py [--tokenizer FOLDER] [--temporary FOLDER]

All 156,032 rows of the vocabulary are there. Weights are random words, so they take the bytes of real ones and say nothing; which
layers lack and which have how many bits is set here by hand, because a search over random weights would find nothing. Each folder is
weighed, compared with what the search would have counted (`Smaller`), loaded packed, run for one token, and deleted. `--tokenizer` is
a folder with the published tokenizer; without it the built-in model's, 11 MB smaller, stands in. Writes
benchmarks/results/mixed_folders_7b.json (--out).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from commit import commit
from random_int4 import write_random_int4
from safetensors import safe_open
from true_size import config

from trimlingual.decoding.decoder import PackedDecoder
from trimlingual.evaluation.cost import disk_bytes
from trimlingual.models.family import meta_model
from trimlingual.models.loading import load_model, load_processor, resolve_base
from trimlingual.models.tree import fine_part_of
from trimlingual.recipe import QuantizeSettings, RankSettings
from trimlingual.run.artifacts import machine, write_json
from trimlingual.search.actions import GONE, Action, Smaller, bits_after, layer_of, removed_by

RESULTS = Path(__file__).parent / "results"
ORDER = (13, 3, 20, 9, 29, 1, 19, 27)  # in which the paper's search for German removed layers
CPU = torch.device("cpu")


def actions(num_gone: int, bits: Mapping[str, int], fewer: Sequence[Action], num_layers: int) -> list[Action]:
    """Layers gone, and the bits of all attentions, all MLPs, embeddings and head; some of the first two have `fewer`."""
    gone = [layer for layer in ORDER if layer < num_layers - 1][:num_gone]
    left = [layer for layer in range(num_layers) if layer not in gone]
    found = [Action(f"decoder.{layer}", GONE) for layer in gone]
    found += [Action(part, bits[part]) for part in ("embeddings", "lm_head")]
    for block in ("attention", "mlp"):
        if bits[block] != 4:
            found += [Action(f"decoder.{layer}.{block}", bits[block]) for layer in left]
    return found + [action for action in fewer if layer_of(action)[1] in left]


def plans(num_layers: int) -> dict[str, list[Action]]:
    rows = {"embeddings": 2, "lm_head": 4}
    of_two = [Action(f"decoder.{layer}.mlp", 2) for layer in (10, 11, 12, 14)]
    return {
        "3.3 GB": actions(4, {**rows, "attention": 4, "mlp": 3}, [Action("decoder.10.attention", 3)], num_layers),
        "2.7 GB": actions(8, {**rows, "attention": 3, "mlp": 3}, of_two, num_layers),
    }


def by_part(folder: Path) -> dict[str, int]:
    """Bytes of the folder's tensors by part, of headers, and of the other files."""
    found: dict[str, int] = defaultdict(int)
    total = 0
    for path in folder.glob("*.safetensors"):
        total += path.stat().st_size
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                part = fine_part_of(name.rpartition(".")[0]) or "others"
                tensor = tensors.get_tensor(name)
                found[part.rpartition(".")[2]] += tensor.numel() * tensor.element_size()
    found["headers"] = total - sum(found.values())
    found["other files"] = disk_bytes(folder) - total
    return dict(found)


def measure(size: str, state: Sequence[Action], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    processor = load_processor(args.tokenizer or resolve_base("builtin:mini"))
    shapes = config(args.size, processor)
    num_layers, num_encoder = shapes.text_config.num_hidden_layers, shapes.audio_config.encoder_layers
    layers = {"decoder": list(range(num_layers)), "encoder": list(range(num_encoder))}
    group = 128 if args.size == "7b" else 32
    stored = QuantizeSettings(scheme="int4", group_size=group, eight_bit=["embeddings", "lm_head"], train=None)
    rank = RankSettings.model_validate({"budget": {"size": size, "bits": {}}})
    counted = Smaller(meta_model(shapes), layers, rank, stored, "bfloat16")
    left = [layer for layer in layers["decoder"] if layer not in removed_by(state)["decoder"]]
    shapes.text_config.num_hidden_layers = len(left)
    shapes.text_config.layer_types = shapes.text_config.layer_types[: len(left)]
    settings = stored.with_bits(bits_after(state)).at_positions(left)
    write_random_int4(shapes, processor, folder, settings, CPU)
    parts = by_part(folder)
    result: dict[str, Any] = {
        "layers": len(left), "rows": shapes.text_config.vocab_size, "removed": removed_by(state)["decoder"],
        "bits": bits_after(state), "disk_bytes": disk_bytes(folder), "bytes_by_part": parts,
        "counted_by_the_search": counted.num_bytes(state) + parts["other files"],
    }  # fmt: skip
    return result | one_token(folder)


@torch.inference_mode()
def one_token(folder: Path) -> dict[str, Any]:
    """The model loaded packed, and its next token after four."""
    model = load_model(folder, "bfloat16", CPU, keep_packed=True)
    decoder = PackedDecoder(model)
    prompt = decoder.embed(torch.arange(4))
    hidden = decoder.prefill([prompt], range(len(decoder.layers)), decoder.slots(1, 8, 8))
    logits = decoder.logits(hidden)
    assert logits.isfinite().all()
    packed = [module for module in model.modules() if type(module).__module__.endswith("packed_layers")]
    return {
        "num_logits": logits.shape[-1],
        "packed_modules": Counter(type(module).__name__ for module in packed),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("7b", "small"), default="7b")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--temporary", type=Path, help="where the folders are made")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    out = args.out or RESULTS / f"mixed_folders_{args.size}.json"
    given = [a for a in (arguments if arguments is not None else sys.argv[1:])]
    result: dict[str, Any] = {"command": shlex.join(["python", "benchmarks/mixed_folders.py", *given])}
    result |= {"commit": commit(), "machine": machine(), "folders": {}}
    for size, state in plans(32 if args.size == "7b" else 6).items():
        with tempfile.TemporaryDirectory(dir=args.temporary) as folder:
            result["folders"][size] = measure(size, state, args, Path(folder))
        print(json.dumps({size: {k: v for k, v in result["folders"][size].items() if k != "bits"}}), flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, result)
    return result


if __name__ == "__main__":
    main()
