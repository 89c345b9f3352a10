"""Training on the weights that ship: every product is with the weights rounded to their 4-bit steps (quantisation-aware training).

Rounding has no useful gradient, so the gradient goes to the weight behind it as if nothing had been rounded (the straight-through
estimator, Bengio et al. 2013, section 2; "fake quantisation" in Jacob et al. 2018, section 3). A weight moves unseen until it is
nearer to another step. When training ends, the rounded weights are the model, and packing changes nothing.

The scales stay what they were at the start. Shapes: O outputs, I inputs, G groups of inputs that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimlingual.quantization.int4 import modules_to_pack, round_to_integers
from trimlingual.recipe import QuantizeSettings

STEPS = "steps_of_4_bits"  # attribute of a linear module that is trained so: its scales (O, G)


def on_steps(weight: Tensor, scales: Tensor) -> Tensor:
    """The weights (O, I), each on the nearest of the 16 steps of its group's scale (O, G); in `weight`'s dtype."""
    groups = weight.float().unflatten(1, (scales.shape[1], -1))
    scale = scales.float()[..., None]
    return ((groups / scale).round().clamp(-8, 7) * scale).flatten(1).to(weight.dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, weight: Tensor, scales: Tensor) -> Tensor:
        return on_steps(weight, scales)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _forward(module: nn.Linear, inputs: Tensor) -> Tensor:
    weight: Any = _StraightThrough.apply(module.weight, getattr(module, STEPS))
    return nn.functional.linear(inputs, weight, module.bias)


@torch.no_grad()
def nearest_scales(model: Any, settings: QuantizeSettings, dtype: torch.dtype) -> dict[str, Tensor]:
    """Scales (O, G), in `dtype`, of the modules that become 4-bit, by name: those with the least squared error."""
    return {
        name: round_to_integers(model.get_submodule(name).weight.to(dtype), 4, settings.group_size)[0]
        for name, bits in modules_to_pack(model, settings).items()
        if bits == 4
    }


def round_in_forward_(model: Any, scales: Mapping[str, Tensor]) -> None:
    """From now on these modules compute with rounded weights, and their gradients go to the weights behind these."""
    for name, scale in scales.items():
        module: Any = model.get_submodule(name)
        setattr(module, STEPS, scale.to(module.weight.device))
        module.forward = partial(_forward, module)


@torch.no_grad()
def keep_rounded_(model: Any) -> None:
    """Write the rounded weights, and compute with them as with any other."""
    for module in _rounded_modules(model):
        module.weight.copy_(on_steps(module.weight, getattr(module, STEPS)))
        delattr(module, STEPS)
        del module.forward  # the class's own again


@contextmanager
def as_it_ships(model: Any) -> Iterator[None]:
    """The rounded weights in place, for what reads them without calling the modules; afterwards those behind them again."""
    behind: list[Callable[[], None]] = []
    try:
        for module in _rounded_modules(model):
            weight, forward = module.weight.data, module.forward
            behind.append(partial(_put_back, module, weight, forward))
            module.weight.data = on_steps(weight, getattr(module, STEPS))
            del module.forward
        yield
    finally:
        for undo in behind:
            undo()


def _put_back(module: Any, weight: Tensor, forward: Callable[..., Tensor]) -> None:
    module.weight.data, module.forward = weight, forward


def _rounded_modules(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, STEPS)]
