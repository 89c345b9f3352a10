"""A PrunePlan says which layers to remove, and why. It is a file that can be read, edited, compared and applied without a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trimlingual.recipe import LAYER_PART, ROW_PARTS, TOWERS, Tower
from trimlingual.run.jsonl import parse_json
from trimlingual.run.lineage import Lineage
from trimlingual.run.records import brief

PLAN_FILE = "plan.json"
FINETUNED = "model"  # folder beside the plan, when the search fine-tuned after every removal


class PlanError(ValueError):
    """A plan that cannot be read or does not fit the model."""


class Removal(BaseModel):
    """A layer to remove. `layer` counts in the base model, before any pruning."""

    model_config = ConfigDict(extra="forbid", strict=True)
    tower: Tower = "decoder"
    layer: int = Field(ge=0)
    round: int | None = None
    score: float | None = None
    runner_up: dict[str, Any] | None = Field(
        default=None,
        description="the second best candidate: layer, score difference with its 95 % paired bootstrap interval, p-value",
    )


class FewerBits(BaseModel):
    """A part, named as in `quantize.bits`, and its number of bits."""

    model_config = ConfigDict(extra="forbid", strict=True)
    part: str = Field(pattern=rf"^({'|'.join(ROW_PARTS)}|{LAYER_PART.pattern})$")
    bits: Literal[2, 3, 4, 8]
    round: int | None = None
    score: float | None = None
    saved_bytes: int | None = None


class PrunePlan(BaseModel):
    """What to remove, what to store in how many bits, and why. By hand, `{"removals": [{"layer": 13}, {"layer": 3}]}` is enough."""

    model_config = ConfigDict(extra="forbid", strict=True)
    removals: list[Removal]
    bits: list[FewerBits] = Field(
        default_factory=list, description="of a search under a budget; `quantize` stores them"
    )
    num_bytes: int | None = Field(default=None, description="of all that ships after a search under a budget, at most")
    strategy: str = "by hand"
    layers: dict[str, list[int]] | None = Field(
        default=None, description="layer map of the model that the plan was made for"
    )
    base: str | None = None
    metric: dict[str, str] = Field(default_factory=dict)
    signatures: dict[str, str] = Field(default_factory=dict)
    baseline_score: float | None = None
    baseline_scores: dict[str, float] = Field(default_factory=dict)
    candidates: list[dict[str, Any]] = Field(default_factory=list)
    selection_mode: str | None = None
    curve: list[dict[str, Any]] = Field(
        default_factory=list, description="score and share of the unpruned model's, by number of layers removed"
    )
    selection: dict[str, Any] = Field(default_factory=dict)
    decode: dict[str, Any] = Field(default_factory=dict)
    finetuned: bool = False
    seconds: float | None = None
    machine: dict[str, Any] = Field(default_factory=dict)

    def layers_of(self, tower: Tower) -> list[int]:
        """Original layers of one tower to remove."""
        return [removal.layer for removal in self.removals if removal.tower == tower]


def read_plan(path: Path) -> PrunePlan:
    """Read `plan.json` (or the folder that holds it). PlanError says what is wrong with it."""
    path = path / PLAN_FILE if path.is_dir() else path
    try:
        plan = PrunePlan.model_validate(parse_json(path.read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise PlanError(f"plan {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise PlanError(
            f'{path} is not a prune plan: {brief(error)}. By hand, {{"removals": [{{"layer": 13}}, {{"layer": 3}}]}} is enough'
        ) from error
    if not plan.removals and not plan.bits and plan.num_bytes is None:
        raise PlanError(f"{path} is not a prune plan: it removes no layer and gives no part other bits")
    named = [(removal.tower, removal.layer) for removal in plan.removals]
    twice = sorted({f"{tower} {layer}" for tower, layer in named if named.count((tower, layer)) > 1})
    if twice:
        raise PlanError(f"{path} removes a layer twice: {', '.join(twice)}")
    return plan


def check_plan(plan: PrunePlan, lineage: Lineage) -> dict[Tower, list[int]]:
    """Per tower, the indices in the current model of the layers to remove. PlanError if the plan was made for another model."""
    if plan.layers is not None and plan.layers != lineage.layers:
        raise PlanError(
            f"the plan was made for a model with layers {_short(plan.layers)}, but this one has {_short(lineage.layers)}; "
            "rank this model, or apply the plan to the model it was made for"
        )
    indices: dict[Tower, list[int]] = {}
    for tower in TOWERS:
        removed, present = plan.layers_of(tower), lineage.layers[tower]
        missing = [layer for layer in removed if layer not in present]
        if missing:
            raise PlanError(
                f"the plan removes {tower} layers {missing}, which this model does not have; it has {present}"
            )
        if len(removed) >= len(present):
            raise PlanError(f"the plan removes all {len(present)} {tower} layers")
        indices[tower] = [present.index(layer) for layer in removed]
    staying = set(lineage.layers["decoder"]) - set(plan.layers_of("decoder"))
    named = [fewer.part for fewer in plan.bits if LAYER_PART.fullmatch(fewer.part)]
    if gone := [part for part in named if int(part.split(".")[1]) not in staying]:
        raise PlanError(
            f"the plan gives bits to {', '.join(gone)}, but after its removals the decoder has layers {sorted(staying)}; take these "
            "entries out of `bits`, or the removals"
        )
    return indices


def _short(layers: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{tower} {len(numbers)}: {list(numbers)}" for tower, numbers in layers.items())
