"""Base models of the true shapes with random weights, for rehearsals: see memory, time and sizes before anything is paid for.

`random:qwen2-audio-7b` is a folder without weights: configuration, tokenizer and a mark. `load_model` draws the weights on the device,
always the same ones for a seed, a kind of device and a version of torch. The real tokenizer cannot be shipped, so the built-in
model's tokenizer and chat template stand in for it, with a feature extractor as large as the real one's; the model has all its rows,
but those beyond the tokenizer get a zero in lm_head, so that answers are text. Scores mean nothing, and a random model seldom ends an
answer: decoding runs to its bound, which makes times upper ones. Nothing it says is fit to learn from, so distillation passes
references on instead.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from trimlingual.models.family import Family, family_named, meta_model
from trimlingual.models.folders import FAMILIES, library_problem, refuse
from trimlingual.run.artifacts import fingerprint, put_in_place, write_json
from trimlingual.run.fingerprint import user_cache
from trimlingual.run.version import version as own_version

RANDOM = "random:"
MARK = "random.json"  # in a folder whose weights are drawn instead of read
SEED = 0


def random_shapes() -> dict[str, tuple[Family, Mapping[str, Any]]]:
    """All random models by name: their family, and the sizes it makes a configuration and a processor of."""
    families = map(family_named, FAMILIES)
    return {name: (family, shape) for family in families for name, shape in family.shapes.items()}


def random_base(name: str) -> Path:
    """Folder that stands for `random:...`, made in the user's cache if it is not there; ValueError lists the known names."""
    shape = name.removeprefix(RANDOM)
    shapes = random_shapes()
    if shape not in shapes:
        raise ValueError(f"{name!r} is not known; random models: {', '.join(RANDOM + known for known in shapes)}")
    family, settings = shapes[shape]
    cache = user_cache() / "random"
    refuse([problem for file in FAMILIES[family.model_type] if (problem := library_problem(file))])
    made_by = {"trimlingual": own_version(), "transformers": version("transformers"), "settings": settings}
    folder = cache / f"{shape}-{fingerprint('random', made_by, {})}"
    if is_random(folder):
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        made = Path(temporary) / shape
        _write(family, shape, made)
        try:
            put_in_place(made, folder)
        except OSError:
            if not is_random(folder):  # else another process was faster
                raise
    return folder


def _write(family: Family, shape: str, folder: Path) -> None:
    processor = family.random_processor(family.shapes[shape], folder)
    tokenizer = processor.tokenizer
    config = family.random_config(family.shapes[shape], processor)
    config.save_pretrained(folder)
    GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(folder)
    weight_bytes = 2 * sum(parameter.numel() for parameter in meta_model(config).parameters())
    mark = {"shape": shape, "seed": SEED, "num_tokens": len(tokenizer), "weight_bytes": weight_bytes}
    write_json(folder / MARK, mark)


def is_random(folder: Path) -> bool:
    """Whether the folder's weights are to be drawn."""
    return (folder / MARK).is_file()


def random_weight_bytes(folder: Path) -> int:
    """Bytes the weights of such a folder would have on disk, in bfloat16; 0 for any other folder."""
    return json.loads((folder / MARK).read_text(encoding="utf-8"))["weight_bytes"] if is_random(folder) else 0


def draw(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of a random folder, its weights drawn on `device` in bfloat16 and held in `dtype`."""
    mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    model = draw_config(AutoConfig.from_pretrained(folder), mark["num_tokens"], dtype, device, mark["seed"])
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


@torch.no_grad()
def draw_config(config: Any, num_tokens: int, dtype: torch.dtype, device: torch.device, seed: int = SEED) -> Any:
    """A random model of any configuration; rows of lm_head from `num_tokens` on are zero."""
    before = torch.get_default_dtype()
    devices = [device] if device.type == "cuda" else []
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.random.fork_rng(devices=devices), torch.device(device):
            torch.manual_seed(seed)
            model = family_named(config.model_type).build(config)
    finally:
        torch.set_default_dtype(before)
    model.lm_head.weight[num_tokens:] = 0
    for parameter in model.parameters():  # not `model.to`: it would round the rotary frequencies, which stay float32
        parameter.data = parameter.data.to(dtype)
    return model
