"""FSDP: every process holds its share of weights, gradients and optimizer states, and no GPU ever the whole model.

The main process reads the model into host memory, the others know its shapes only. The weights then go from there to everyone's GPU one
at a time, and each process keeps its share of each (accelerate's `cpu_ram_efficient_loading`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig

from trimlingual.models.family import family_named
from trimlingual.models.loading import load_model
from trimlingual.models.random_weights import is_random
from trimlingual.models.saving import DTYPES
from trimlingual.models.tree import audio_tower, layer_list
from trimlingual.recipe import Dtype
from trimlingual.run.processes import broadcast, gather, is_main_process

SHARED_ON = {"cuda"}  # types of device; accelerate has no FSDP on others
IN_USE = "ACCELERATE_USE_FSDP"  # accelerate's mark in the environment


def load_to_share(folder: Path, dtype: Dtype, device: torch.device) -> Any:
    """A model for FSDP to divide: on the CPU in the main process, without weights (PyTorch's meta device) in the others.

    Weights that are drawn are drawn on `device`, so that they are the same as elsewhere. Raises ModelError as `load_model` does.
    """
    if is_main_process():
        model = load_model(folder, dtype, device if is_random(folder) else torch.device("cpu")).cpu()
    else:
        config = AutoConfig.from_pretrained(folder)
        with init_empty_weights(include_buffers=False):
            model = family_named(config.model_type).build(config).eval()
    # Loading changes what building says of them, so the main process's word counts.
    training = gather([parameter.requires_grad for parameter in model.parameters()])[0]
    for parameter, trains in zip(model.parameters(), training, strict=True):
        parameter.data = parameter.data.to(DTYPES[dtype])
        parameter.requires_grad = trains
    return model


@contextmanager
def whole_tower(model: Any, device: torch.device) -> Iterator[None]:
    """The audio tower of a model that `load_to_share` returned, on every process's `device` for as long as this lasts."""
    tower = audio_tower(model)
    away = next(tower.parameters()).device
    if is_main_process():
        tower.to(device)
    else:
        tower.to_empty(device=device)
    for parameter in tower.parameters():
        broadcast(parameter.data)
    yield
    tower.to(away)


def sharding(model: Any) -> dict[str, Any]:
    """The Trainer's `fsdp_config`: layer by layer (transformers would divide the tower's attention again); each process writes its
    share of a checkpoint."""
    layers = {type(layer).__name__ for tower in ("decoder", "encoder") for layer in layer_list(model, tower)}
    return {
        "transformer_layer_cls_to_wrap": sorted(layers),
        "state_dict_type": "SHARDED_STATE_DICT",
        "cpu_ram_efficient_loading": True,
    }


@contextmanager
def only_here() -> Iterator[None]:
    """What accelerate writes into the environment of a process that trains under FSDP goes no further than this: later trainings
    would come under FSDP too."""
    before = os.environ.get(IN_USE)
    try:
        yield
    finally:
        os.environ.pop(IN_USE, None)
        if before is not None:
            os.environ[IN_USE] = before
