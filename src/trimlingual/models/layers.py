"""Remove transformer layers, for good or for a while. Pure structure: no weights are changed or copied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from trimlingual.models.tree import layer_list, set_layer_list
from trimlingual.recipe import Tower


def drop_layers_(model: Any, positions: Mapping[Tower, Sequence[int]]) -> None:
    """Remove the layers at the given positions (indices in the current model) of each tower, in place.

    Configuration (`num_hidden_layers`, `layer_types`, `encoder_layers`) and the attention modules' cache indices follow.
    Raises ValueError for a position that does not exist or a tower that would be left empty.
    """
    for tower, gone in positions.items():
        if gone:
            set_layer_list(model, tower, _kept(layer_list(model, tower), tower, gone))


@contextmanager
def without_layers(model: Any, positions: Mapping[Tower, Sequence[int]]) -> Iterator[Any]:
    """The model without these layers, inside the `with`; everything is put back after it, also on an error. No copy is made."""
    before = {tower: layer_list(model, tower) for tower in positions}
    try:
        drop_layers_(model, positions)
        yield model
    finally:
        for tower, layers in before.items():
            set_layer_list(model, tower, layers)


def _kept(layers: nn.ModuleList, tower: str, gone: Sequence[int]) -> nn.ModuleList:
    wrong = [position for position in gone if not 0 <= position < len(layers)]
    if wrong:
        raise ValueError(
            f"{tower} positions {wrong} do not exist: this model has {len(layers)} {tower} layers (0-based)"
        )
    if len(set(gone)) == len(layers):
        raise ValueError(f"all {len(layers)} {tower} layers would be removed; keep at least one")
    return nn.ModuleList([layer for position, layer in enumerate(layers) if position not in set(gone)])
