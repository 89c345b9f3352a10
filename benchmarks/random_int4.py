"""A folder with a model of true shapes whose weights are random packed words: in seconds, with nothing quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trimlingual.models.family import meta_model
from trimlingual.models.tree import PARTS, part_of
from trimlingual.quantization.int4 import packing_config
from trimlingual.recipe import QuantizeSettings
from trimlingual.run.artifacts import write_json

STEP = 0.004  # scale of a group: integers from -8 to 7 make weights about as large as random ones


@torch.no_grad()
def write_random_int4(
    config: Any, processor: Any, folder: Path, settings: QuantizeSettings, device: torch.device
) -> None:
    """Write a model of `config`, packed as `settings` ask, with tensors drawn on `device`."""
    config.dtype = "bfloat16"
    tensors: dict[str, Tensor] = {}
    model = meta_model(config)
    eight = [PARTS["decoder"] + ".embed_tokens"] * ("embeddings" in settings.eight_bit)
    eight += ["lm_head"] * ("lm_head" in settings.eight_bit)
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        weight = own.get("weight")
        if name in eight:
            del own["weight"]
            tensors[f"{name}.weight"] = torch.randint(-127, 128, weight.shape, dtype=torch.int8, device=device).cpu()
            tensors[f"{name}.weight_scale"] = _scale(len(weight), 1, device) / 16
        elif isinstance(module, nn.Linear) and part_of(name) in settings.parts:
            del own["weight"]
            rows, width = weight.shape
            words = torch.randint(-(2**31), 2**31, (rows, width // 8), dtype=torch.int32, device=device)
            tensors[f"{name}.weight_packed"] = words.cpu()
            tensors[f"{name}.weight_scale"] = _scale(rows, width // settings.group_size, device)
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


def _scale(rows: int, groups: int, device: torch.device) -> Tensor:
    return (STEP * (0.5 + torch.rand((rows, groups), device=device))).to(torch.bfloat16).cpu()
