"""A model whose parts can be given other numbers of bits, for good or for a while, without a copy of the model.

The weights in memory are what the packed ones stand for. The original weights are kept in the host's memory, because each rounding
starts from them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trimlingual.models.saving import DTYPES
from trimlingual.models.tree import EMBEDDINGS, fine_part_of
from trimlingual.quantization.int4 import has_row_scales, modules_to_pack, round_to_integers
from trimlingual.recipe import ROW_PARTS, Dtype, QuantizeSettings


class RoundedModel:
    """`model`, rounded in place to what `settings` store; parts are named by the base model's layers, of which it has `layers`."""

    @torch.no_grad()
    def __init__(self, model: Any, layers: Mapping[str, Sequence[int]], settings: QuantizeSettings, storage: Dtype):
        self.settings, self.storage = settings, DTYPES[storage]
        self._modules: dict[str, list[str]] = defaultdict(list)
        self._weights: dict[str, Tensor] = {}
        self._originals: dict[str, Tensor] = {}
        packed = modules_to_pack(model, settings.at_positions(layers["decoder"]))
        for name, module in model.named_modules():
            part = fine_part_of(name) or ""
            # Embeddings and head, and blocks of the decoder, which may be in 16 bits before the search.
            searched = (isinstance(module, nn.Linear) or name == EMBEDDINGS) and (
                part in ROW_PARTS or part.count(".") == 2
            )
            if not searched and name not in packed:
                continue
            weight = model.get_submodule(name).weight
            original = weight.to("cpu", self.storage, copy=True)
            if searched:
                part = part if part in ROW_PARTS else _of_base(part, layers["decoder"])
                self._modules[part].append(name)
                self._weights[name], self._originals[name] = weight, original
            if name in packed:
                self._round(weight, original, part, packed[name])

    def _round(self, weight: Tensor, original: Tensor, part: str, bits: int) -> None:
        group = original.shape[1] if has_row_scales(part, bits) else self.settings.group_size
        weight.data.copy_(round_to_integers(original.to(weight.device), bits, group)[1])

    @torch.no_grad()
    def round_(self, part: str, bits: int) -> None:
        """Give a part this number of bits."""
        for name in self._modules[part]:
            self._round(self._weights[name], self._originals[name], part, bits)

    @contextmanager
    def tried(self, part: str, bits: int) -> Iterator[None]:
        """A part has this number of bits inside the `with`, and after it what it had before."""
        before = {name: self._weights[name].detach().clone() for name in self._modules[part]}
        try:
            self.round_(part, bits)
            yield
        finally:
            for name, weight in before.items():
                self._weights[name].data.copy_(weight)


def _of_base(part: str, layers: Sequence[int]) -> str:
    tower, position, block = part.split(".")
    return f"{tower}.{layers[int(position)]}.{block}"
