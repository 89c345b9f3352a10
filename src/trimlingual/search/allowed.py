"""Which layers may go, by the recipe and the model's layers alone: known before anything runs, and asked again by the stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from trimlingual.recipe import TOWERS, RankSettings, Tower


class Candidate(NamedTuple):
    """A layer that may go, by its index in the base model."""

    tower: Tower
    layer: int


def may_go(settings: RankSettings, layers: Mapping[str, Sequence[int]]) -> list[Candidate]:
    """The layers of a model (`Lineage.layers`) that may go. A tower's last layer never does."""
    found: list[Candidate] = []
    for tower in TOWERS:
        if settings.towers in (tower, "both") and len(layers[tower]) > 1:
            start, end = settings.protect_first, len(layers[tower]) - settings.protect_last
            kept = set(settings.protected) if tower == "decoder" else set()
            found += [Candidate(tower, layer) for layer in layers[tower][start:end] if layer not in kept]
    return found


def middle_block(settings: RankSettings, layers: Mapping[str, Sequence[int]]) -> list[Candidate]:
    """What `strategy: middle` removes from the one tower that it works on (the paper's ablation: layers 12-19 of 32)."""
    (tower,) = [tower for tower in TOWERS if settings.towers == tower]
    start = (len(layers[tower]) - settings.num_layers_to_remove) // 2
    return [Candidate(tower, layer) for layer in layers[tower][start : start + settings.num_layers_to_remove]]


def ranking_problems(settings: RankSettings, layers: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """Why the recipe's layers cannot go from a model with these."""
    allowed, num = may_go(settings, layers), settings.num_layers_to_remove
    towers = [tower for tower in TOWERS if settings.towers in (tower, "both")]
    most = sum(min(sum(tower == one.tower for one in allowed), len(layers[tower]) - 1) for tower in towers)
    if unknown := [layer for layer in settings.protected if layer not in layers["decoder"]]:
        yield f"rank.protected names layers {unknown}; the decoder has {_listed(layers['decoder'])}"
    if num > most and not settings.budget:  # there it is the most that may go
        there = " and ".join(f"{len(layers[tower])} {tower}" for tower in towers)
        yield (
            f"rank.num_layers_to_remove is {num}, but of {there} layers at most {most} can go (rank.protect_first, protect_last and "
            "protected are kept, and one layer of each tower)"
        )
    elif settings.strategy == "middle" and (blocked := sorted({*middle_block(settings, layers)} - {*allowed})):
        block = _listed([layer for _, layer in middle_block(settings, layers)])
        yield (
            f"rank.strategy middle removes the block {block}, and of it {[layer for _, layer in blocked]} are protected; remove fewer, "
            "or protect less"
        )


def _listed(layers: Sequence[int]) -> str:
    """`0 to 31`, or every number where some are gone."""
    whole = list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))
