"""Calibrated rounding to integers: GPTQ (Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization", algorithm 1).

Rounding to the nearest step makes each weight as right as it can be. What matters is the layer's output: the error of a weight can be
made good by the weights that are not rounded yet, as far as their inputs go together. GPTQ rounds one input column after another and
moves the error on, by the inverse of the inputs' second moments. The moments come from a forward pass over calibration examples, layer
by layer, each layer seeing what the rounded layers below it give.

Shapes: N tokens, I inputs, O outputs, G groups of inputs that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimlingual.models.tree import layer_list
from trimlingual.quantization.int4 import best_scale, modules_to_pack
from trimlingual.recipe import TOWERS, QuantizeSettings
from trimlingual.run.progress import progress

BLOCK = 128  # columns whose errors are moved on to the columns behind them at once
DAMPING = 0.01  # of the mean diagonal, added to it: directions that no input has must not be divided by nothing
TRIES = 5  # damping is multiplied by ten where the moments still cannot be inverted

ScaleOf = Callable[[Tensor], Tensor]
"""The scale (O, 1) of a group's weights (O, group_size), float32."""


@torch.no_grad()
def round_calibrated_(
    model: Any,
    settings: QuantizeSettings,
    passes: Sequence[Callable[[], Any]],
    dtype: torch.dtype,
    keep_unrounded: bool = False,
) -> dict[str, Tensor]:
    """Round the layers of both towers that get fewer than 8 bits, in place. Returns their scales (O, G) by name, in `dtype`.

    `passes` run the whole model on one calibration example each, without padding. Modules outside the towers' layers stay as they are.
    With `keep_unrounded` the weights in place are in the end those that rounding to the nearest step makes the calibrated ones, for
    a training that rounds at every step.
    """
    bits_of = modules_to_pack(model, settings)
    names = {id(module): name for name, module in model.named_modules()}
    scales: dict[str, Tensor] = {}
    unrounded: dict[str, Tensor] = {}
    for tower in reversed(TOWERS):  # the decoder last: it is to see what the rounded encoder gives
        layers = layer_list(model, tower)
        if not any(names[id(module)] in bits_of for module in layers.modules()):
            continue
        with progress(f"calibrated rounding of the {tower}, layer", len(layers)) as advance:

            def visit(position: int, moments: dict[str, Moments], layers: Any = layers, advance: Any = advance) -> None:
                modules = {inner: layers[position].get_submodule(inner) for inner in moments}
                few = {inner: bits for inner, m in modules.items() if (bits := bits_of.get(names[id(m)], 8)) < 8}
                for together, found in of_equal_inputs({inner: moments[inner] for inner in few}, few):
                    chosen, num_bits = [modules[inner] for inner in together], few[together[0]]
                    scale_of = partial(best_scale, num_bits=num_bits, dtype=dtype)
                    weight = torch.cat([module.weight for module in chosen])
                    done = round_columns(weight, found, num_bits, settings.group_size, scale_of)
                    parts = zip(*(part.split([len(m.weight) for m in chosen]) for part in done))
                    for module, part in zip(chosen, map(Rounded._make, parts)):
                        module.weight.copy_(part.weight.to(dtype))
                        scales[names[id(module)]] = part.scales.to(dtype)
                        if keep_unrounded:
                            unrounded[names[id(module)]] = part.unrounded.to("cpu", module.weight.dtype)
                advance(1)

            walk_layers(list(layers), passes, visit)
    for name, weight in unrounded.items():
        model.get_submodule(name).weight.copy_(weight)
    return scales


class Moments:
    """Second moments of a linear layer's inputs, X'X / N, as they come; float32 (I, I)."""

    def __init__(self, width: int, device: torch.device):
        self.sum = torch.zeros((width, width), device=device)
        self.count = 0

    def add(self, inputs: Tensor) -> None:
        """Take in inputs (..., I)."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self.sum.addmm_(rows.t(), rows)
        self.count += len(rows)

    def mean(self) -> Tensor:
        """X'X / N (I, I)."""
        return self.sum / max(1, self.count)


def of_equal_inputs(moments: Mapping[str, Moments], bits_of: Mapping[str, int]) -> list[tuple[list[str], Tensor]]:
    """Modules of equal bits that have the same inputs, as query, key and value have, with their moments: they are rounded as one.

    A weight's rows are rounded independently, so nothing but the time changes.
    """
    groups: list[tuple[list[str], Tensor]] = []
    for name, found in moments.items():
        mean = found.mean()
        for names, known in groups:
            if bits_of[names[0]] == bits_of[name] and torch.equal(known, mean):
                names.append(name)
                break
        else:
            groups.append(([name], mean))
    return groups


class Rounded(NamedTuple):
    """A weight after calibrated rounding; all float32."""

    scales: Tensor  # (O, G)
    weight: Tensor  # (O, I), on the steps
    unrounded: Tensor  # (O, I), what stood there when its turn came: changed by the errors before, not rounded yet


@torch.no_grad()
def round_columns(weight: Tensor, moments: Tensor, num_bits: int, group_size: int, scale_of: ScaleOf) -> Rounded:
    """Round a weight (O, I) by its inputs' second moments (I, I).

    `scale_of` gives a group's scale when its turn comes, from the weights as the errors before them have changed them. `group_size`
    divides I and BLOCK is a multiple of it, or it of BLOCK.
    """
    current, width = weight.float().clone(), weight.shape[1]
    silent = moments.diagonal() == 0  # inputs that were never anything but zero
    current[:, silent] = 0
    upper = _inverse_factor(moments, silent)
    rounded, scales = torch.empty_like(current), []
    limit = 2 ** (num_bits - 1)
    scale = torch.ones_like(current[:, :1])
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        errors = torch.zeros_like(current[:, start:end])
        for column in range(start, end):
            if column % group_size == 0:
                scale = scale_of(current[:, column : column + group_size])
                scales.append(scale)
            value = current[:, column : column + 1]
            stood = (value / scale).round().clamp(-limit, limit - 1) * scale
            rounded[:, column : column + 1] = stood
            error = (value - stood) / upper[column, column]
            # a group can be longer than a block: its scale is found on weights that lack the errors of its later blocks only
            current[:, column + 1 : end] -= error * upper[column, column + 1 : end]
            errors[:, column - start] = error[:, 0]
        current[:, end:] -= errors @ upper[start:end, end:]
    return Rounded(torch.cat(scales, dim=1), rounded, current)


def _inverse_factor(moments: Tensor, silent: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped moments' inverse (I, I)."""
    moments = moments.clone()
    moments[silent, silent] = 1
    damping = DAMPING * moments.diagonal().mean()
    identity = torch.eye(len(moments), device=moments.device)
    for _ in range(TRIES):
        lower, failed = torch.linalg.cholesky_ex(moments + damping * identity)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping *= 10
    raise ValueError("the calibration inputs are not finite: their second moments cannot be inverted")


def _adding_to(moments: Moments) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        moments.add(args[0])

    return hook


class _Enough(Exception):
    """Ends a forward pass whose rest is not needed."""


@torch.no_grad()
def walk_layers(
    layers: Sequence[nn.Module], passes: Sequence[Callable[[], Any]], visit: Callable[[int, dict[str, Moments]], None]
) -> None:
    """Go through a stack of layers from the bottom: `visit(position, moments by name of the linear modules inside)` for each.

    `passes` run the whole model on an example each; only the lowest layer's inputs are taken from them. `visit` may change the
    layer's weights: the next layer gets what the changed one gives.
    """
    inputs = [_inputs_of(layers[0], run) for run in passes]
    for position, layer in enumerate(layers):
        linear = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        moments = {name: Moments(m.weight.shape[1], m.weight.device) for name, m in linear.items()}
        hooks = [module.register_forward_pre_hook(_adding_to(moments[name])) for name, module in linear.items()]
        try:
            for args, kwargs in inputs:
                layer(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        visit(position, moments)
        inputs = [((_hidden(layer(*args, **kwargs)), *args[1:]), kwargs) for args, kwargs in inputs]


def _inputs_of(layer: nn.Module, run: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a forward pass calls the layer with; the pass ends there."""
    caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args, kwargs))
        raise _Enough

    handle: Any = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run()
    except _Enough:
        pass
    finally:
        handle.remove()
    args, kwargs = caught[0]
    if not args:  # some layers are called with hidden_states=...
        kwargs = dict(kwargs)
        args = (kwargs.pop("hidden_states"),)
    return args, kwargs


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
