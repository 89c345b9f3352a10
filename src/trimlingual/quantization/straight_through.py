"""Training on the weights that ship: every product is with the weights rounded to their steps (quantisation-aware training).

Rounding has no useful gradient, so the gradient goes to the weight behind it as if nothing had been rounded (the straight-through
estimator, Bengio et al. 2013, section 2; "fake quantisation" in Jacob et al. 2018, section 3). A weight moves unseen until it is
nearer to another step. When training ends, the rounded weights are the model, and packing changes nothing.

The scales stay what they were at the start. Weights of 8 bits are rounded when training has ended: their steps are as fine as what
training moves them by. Shapes: O outputs, I inputs, G groups of inputs that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimlingual.quantization.int4 import modules_to_pack, on_steps, round_to_integers
from trimlingual.recipe import QuantizeSettings

STEPS = "steps_of_its_weights"  # attribute of a module that is trained so


class Steps(NamedTuple):
    """What a module's weights are rounded to."""

    scales: Tensor  # (O, G)
    num_bits: int


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, weight: Tensor, scales: Tensor, num_bits: int) -> Tensor:
        return on_steps(weight, scales, num_bits)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


def _linear(module: nn.Linear, inputs: Tensor) -> Tensor:
    weight: Any = _StraightThrough.apply(module.weight, *getattr(module, STEPS))
    return nn.functional.linear(inputs, weight, module.bias)


def _embedding(module: nn.Embedding, tokens: Tensor) -> Tensor:
    """Only the rows that are looked up are rounded."""
    scales, num_bits = getattr(module, STEPS)
    rows: Any = _StraightThrough.apply(nn.functional.embedding(tokens, module.weight), scales[tokens], num_bits)
    return rows


@torch.no_grad()
def scales_of(
    model: Any, settings: QuantizeSettings, dtype: torch.dtype, known: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Scales (O, G), in `dtype`, of the modules that get fewer than 8 bits, by name: the `known`, else with the least squared error."""
    return {
        name: known[name]
        if name in known
        else round_to_integers(model.get_submodule(name).weight.to(dtype), bits, settings.group_size)[0]
        for name, bits in modules_to_pack(model, settings).items()
        if bits < 8
    }


def round_in_forward_(model: Any, scales: Mapping[str, Tensor], bits_of: Mapping[str, int]) -> None:
    """From now on the modules with `scales` compute with weights rounded to `bits_of`; gradients go to the weights behind these."""
    for name, scale in scales.items():
        module: Any = model.get_submodule(name)
        setattr(module, STEPS, Steps(scale.to(module.weight.device), bits_of[name]))
        module.forward = partial(_embedding if isinstance(module, nn.Embedding) else _linear, module)


@torch.no_grad()
def keep_rounded_(model: Any) -> None:
    """Write the rounded weights, and compute with them as with any other."""
    for module in _rounded_modules(model):
        module.weight.copy_(on_steps(module.weight, *getattr(module, STEPS)))
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
            module.weight.data = on_steps(weight, *getattr(module, STEPS))
            del module.forward
        yield
    finally:
        for undo in behind:
            undo()


def _put_back(module: Any, weight: Tensor, forward: Callable[..., Tensor]) -> None:
    module.weight.data, module.forward = weight, forward


def _rounded_modules(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, STEPS)]
