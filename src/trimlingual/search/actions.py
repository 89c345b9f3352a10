"""What the search under a budget can do to a model, and the bytes of what is left.

An action leaves out a layer or stores a part in fewer bits. Layers are `decoder.N` and `encoder.N`, parts are named as in
`quantize.bits`; N counts in the base model. Actions are done in order; a later one on a part counts, and none on a layer that is gone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from trimlingual.models.tree import EMBEDDINGS, PARTS, fine_part_of
from trimlingual.quantization.int4 import bytes_by_module
from trimlingual.recipe import ROW_PARTS, TOWERS, WIDTHS, Dtype, QuantizeSettings, RankSettings, Tower
from trimlingual.search.allowed import may_go

GONE = 0  # bits of a layer that is left out
LAYERS = {"decoder": PARTS["decoder"] + ".layers.", "encoder": PARTS["audio_tower"] + ".layers."}
HEADER_BYTES = 256  # of a tensor in a safetensors file: its name, shape and place, generously


class Action(NamedTuple):
    """A layer that is left out (0 bits), or a part and its new number of bits."""

    part: str
    bits: int

    @property
    def layer(self) -> str | None:
        """The layer that it changes; None of embeddings and head."""
        return None if self.part in ROW_PARTS else ".".join(self.part.split(".")[:2])


def layer_of(action: Action) -> tuple[Tower, int]:
    """The tower and the layer of the base model that an action is in; not for embeddings and head."""
    tower, layer = action.part.split(".")[:2]
    return ("decoder" if tower == "decoder" else "encoder"), int(layer)


def removed_by(actions: Sequence[Action]) -> dict[Tower, list[int]]:
    """The layers that actions leave out, per tower."""
    found: dict[Tower, list[int]] = {tower: [] for tower in TOWERS}
    for action in actions:
        if action.bits == GONE:
            tower, layer = layer_of(action)
            found[tower].append(layer)
    return found


def bits_after(actions: Sequence[Action]) -> dict[str, int]:
    """Bits of the parts that actions change, of layers that are still there."""
    gone = {part for part, bits in actions if bits == GONE}
    return {a.part: a.bits for a in actions if a.bits != GONE and a.layer not in gone}


class Smaller:
    """A model's bytes after any actions, and the actions that are left.

    `model` may be on the meta device. `layers` are its layers as layers of the base model. `settings` say what it is stored as before
    any action, `other_bytes` what ships beside the weights.
    """

    def __init__(
        self,
        model: Any,
        layers: Mapping[str, Sequence[int]],
        rank: RankSettings,
        settings: QuantizeSettings,
        storage_dtype: Dtype,
        other_bytes: int = 0,
    ):
        self.layers, self.rank, self.settings = layers, rank, settings
        self._fixed = other_bytes
        self._of_layer: dict[str, int] = defaultdict(int)  # norms, and all of an encoder's layer
        self._of_part: dict[str, dict[int | None, int]] = defaultdict(dict)  # None: as `settings` have it
        found = bytes_by_module(model, settings.at_positions(layers["decoder"]), storage_dtype)
        for name, size in found.items():
            self._add(name, size + HEADER_BYTES * 4, None)
        for bits in WIDTHS:
            for part, size in self._parts(model, bits, storage_dtype).items():
                self._of_part[part][bits] = size

    def _add(self, name: str, size: int, bits: int | None) -> None:
        part, layer = self._named(name)
        if part:
            self._of_part[part][bits] = self._of_part[part].get(bits, 0) + size
        elif layer:
            self._of_layer[layer] += size
        else:
            self._fixed += size

    def _parts(self, model: Any, bits: int, storage_dtype: Dtype) -> dict[str, int]:
        """Bytes of every part at one number of bits."""
        every = {part: bits for part in self._of_part}
        wide = self.settings.model_copy(update={"bits": every, "eight_bit": []})
        sizes: dict[str, int] = defaultdict(int)
        for name, size in bytes_by_module(model, wide.at_positions(self.layers["decoder"]), storage_dtype).items():
            if part := self._named(name)[0]:
                sizes[part] += size + HEADER_BYTES * 4
        return sizes

    def _named(self, module: str) -> tuple[str | None, str | None]:
        """The part that a module belongs to, and the layer, both by the base model's numbers."""
        part = fine_part_of(module)
        if part in ROW_PARTS and (module == EMBEDDINGS or module == "lm_head"):
            return part, None
        for tower, prefix in LAYERS.items():
            if module.startswith(prefix):
                position = int(module.removeprefix(prefix).partition(".")[0])
                layer = f"{tower}.{self.layers[tower][position]}"
                in_a_block = part and part.startswith("decoder.")
                return (f"{layer}.{part.rpartition('.')[2]}" if part and in_a_block else None), layer
        return None, None

    def num_bytes(self, actions: Sequence[Action] = ()) -> int:
        """Bytes of everything that ships, after these actions."""
        gone = {part for part, bits in actions if bits == GONE}
        bits = bits_after(actions)
        parts = {part: sizes for part, sizes in self._of_part.items() if Action(part, 1).layer not in gone}
        return (
            self._fixed
            + sum(size for layer, size in self._of_layer.items() if layer not in gone)
            + sum(sizes[bits.get(part)] for part, sizes in parts.items())
        )

    def bits_of(self, part: str, actions: Sequence[Action]) -> int:
        """Bits of a part after these actions; 16 where it is not packed."""
        return bits_after(actions).get(part) or self.settings.bits_of(part) or 16

    def possible(self, actions: Sequence[Action]) -> list[Action]:
        """What may be done next: any layer that may go, and each part's next smaller number of bits."""
        return [*self._removals(actions), *self._fewer_bits(actions)]

    def _removals(self, actions: Sequence[Action]) -> Iterator[Action]:
        gone = removed_by(actions)
        if sum(map(len, gone.values())) >= self.rank.num_layers_to_remove:
            return
        left: dict[str, list[int]] = {
            tower: [i for i in self.layers[tower] if i not in gone[tower]] for tower in TOWERS
        }
        for tower, layer in may_go(self.rank, left):
            yield Action(f"{tower}.{layer}", GONE)

    def _fewer_bits(self, actions: Sequence[Action]) -> Iterator[Action]:
        for part, now, allowed in self._bits_of_parts(actions):
            if fewer := [bits for bits in allowed if bits < now]:
                yield Action(part, max(fewer))

    def more_bits(self, actions: Sequence[Action]) -> list[Action]:
        """Each part's next larger number of bits, of those that the recipe allows and the one that it had before any action."""
        found = []
        for part, now, allowed in self._bits_of_parts(actions):
            before = self.settings.bits_of(part) or 0
            if more := [bits for bits in (*allowed, before) if bits > now]:
                found.append(Action(part, min(more)))
        return found

    def _bits_of_parts(self, actions: Sequence[Action]) -> Iterator[tuple[str, int, list[int]]]:
        """Of each part that is still there, its bits and the numbers of bits that the recipe allows."""
        assert self.rank.budget is not None
        allowed: dict[str, list[int]] = dict(self.rank.budget.bits.items())
        gone = {part for part, bits in actions if bits == GONE}
        for part in self._of_part:
            if Action(part, 1).layer not in gone:
                yield part, self.bits_of(part, actions), allowed.get(part.rpartition(".")[2], [])

    def problem(self) -> str:
        """Why no actions reach the budget, or nothing."""
        budget, least = self.rank.budget, self.smallest()
        assert budget is not None
        if least <= budget.num_bytes:
            return ""
        return (
            f"rank.budget.size is {budget.size}, but {least / 1e6:,.2f} MB is the least that this recipe can reach; let more layers go "
            "(rank.num_layers_to_remove), allow fewer bits (rank.budget.bits), or trim the vocabulary"
        )

    def smallest(self, after: Sequence[Action] = ()) -> int:
        """The fewest bytes that more actions can reach after these, whatever they cost."""
        actions = [*after]
        while removals := list(self._removals(actions)):
            actions.append(max(removals, key=lambda action: -self.num_bytes([*actions, action])))
        while fewer := list(self._fewer_bits(actions)):
            actions += fewer
        return self.num_bytes(actions)
