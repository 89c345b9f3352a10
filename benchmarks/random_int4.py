"""A folder with a model of true shapes whose weights are random packed words: in seconds, with nothing quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trimlingual.models.family import meta_model
from trimlingual.models.tree import fine_part_of
from trimlingual.quantization.int4 import has_row_scales, modules_to_pack, packing_config
from trimlingual.recipe import QuantizeSettings
from trimlingual.run.artifacts import write_json

LARGEST = 0.032  # of a group's weights: about as large as random ones


@torch.no_grad()
def write_random_int4(
    config: Any, processor: Any, folder: Path, settings: QuantizeSettings, device: torch.device
) -> None:
    """Write a model of `config`, packed as `settings` ask (bits by its own layers), with tensors drawn on `device`."""
    config.dtype = "bfloat16"
    tensors: dict[str, Tensor] = {}
    model = meta_model(config)
    bits_of = modules_to_pack(model, settings)
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if number := bits_of.get(name):
            rows, width = own.pop("weight").shape
            step = LARGEST / 2 ** (number - 1)
            if has_row_scales(fine_part_of(name) or "", number):
                integers = torch.randint(-127, 128, (rows, width), dtype=torch.int8, device=device)
                tensors[f"{name}.weight"] = integers.cpu()
                tensors[f"{name}.weight_scale"] = _scale(rows, 1, step, device)
            else:
                shape = rows, width * number // 32
                words = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device)
                tensors[f"{name}.weight_packed"] = words.cpu()
                tensors[f"{name}.weight_scale"] = _scale(rows, width // settings.group_size, step, device)
                tensors[f"{name}.weight_shape"] = torch.tensor([rows, width])
        for key, parameter in own.items():
            is_norm = "norm" in name and key == "weight"
            drawn = torch.ones(parameter.shape) if is_norm else 0.02 * torch.randn(parameter.shape, device=device)
            tensors[f"{name}.{key}"] = drawn.to(torch.bfloat16).cpu()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    processor.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    packing = packing_config(settings).model_dump() | {"quantization_status": "compressed"}
    write_json(folder / "config.json", config.to_dict() | {"quantization_config": packing})


def _scale(rows: int, groups: int, step: float, device: torch.device) -> Tensor:
    return (step * (0.5 + torch.rand((rows, groups), device=device))).to(torch.bfloat16).cpu()
