"""The recipe's `rank` section: the layer search, and the search under a budget."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from trimlingual.recipe.section import WIDTHS, Metric, Section
from trimlingual.recipe.training import TrainSettings

SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(kB|MB|GB)")
SIZE_UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9}


class BudgetSettings(Section):
    """The search for the best model of a size: it leaves out layers and takes bits from parts, by score lost per byte saved."""

    size: str = Field(description="of everything that ships, e.g. 3.3 GB (10^9 bytes) or 120 MB")
    bits: dict[Literal["attention", "mlp", "embeddings", "lm_head"], list[int]] = Field(
        default={"attention": [3, 2], "mlp": [3, 2], "lm_head": [4]},
        description="numbers of bits that a part may go to: 2, 3, 4 or 8; plain transformers loads no embeddings below 8",
    )
    actions_per_round: Annotated[int, Field(ge=1)] = Field(
        default=1,
        description="done before everything is scored again, each in a layer of its own; more is faster and surer to miss the best",
    )
    spend_rest: bool = Field(
        default=False,
        description="bytes left under the size go to parts in more bits, back up or to more of `bits`, most gained per byte first",
    )
    shortlist: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.25,
        description="share of a round's candidates that are translated: those for which the loss of what the model said before the "
        "search rises least per byte; none with metric loss",
    )

    @property
    def num_bytes(self) -> int:
        """`size` in bytes."""
        found = SIZE.fullmatch(self.size)
        assert found
        return round(float(found[1]) * SIZE_UNITS[found[2]])

    @field_validator("size")
    @classmethod
    def _in_one_spelling(cls, size: str) -> str:
        found = SIZE.fullmatch(size.strip())
        spelled = f"{float(found[1]):.12g} {found[2]}" if found else ""
        if not SIZE.fullmatch(spelled):  # also a number that is only written with an exponent
            raise ValueError(f"size is {size!r}; it must be a number with kB, MB or GB, such as 3.3 GB")
        return spelled

    @model_validator(mode="after")
    def _known(self) -> BudgetSettings:
        for part, widths in self.bits.items():
            if wrong := [number for number in widths if number not in WIDTHS]:
                raise ValueError(f"bits gives {part} {wrong[0]} bits; allowed are {', '.join(map(str, WIDTHS))}")
        return self


class RankSettings(Section):
    """Layer importance. `greedy` is the published search by real translation score."""

    strategy: Literal["greedy", "middle", "block-influence", "random"] = Field(
        default="greedy",
        description="greedy: the published search; middle: the middle block; block-influence: layers that change their input least; "
        "random: drawn by the recipe's seed, a baseline",
    )
    num_layers_to_remove: Annotated[int, Field(ge=1)] = Field(default=8, description="the maximum, with min_retained")
    min_retained: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="stop before the selection score falls below this share of the unpruned model's, e.g. 0.97",
    )
    selection: Literal["exact", "successive-halving", "bootstrap-racing"] = Field(
        default="exact",
        description="how a round finds its best candidate; only exact is sure to, the others trade certainty for time",
    )
    early_stopping: bool = Field(
        default=True,
        description="exact, without a budget: give a candidate up once it cannot be among the two best of its round any more",
    )
    first_clips: Annotated[int, Field(ge=1)] = Field(
        default=10, description="clips after which halving and racing decide for the first time"
    )
    metric: Metric | dict[str, Metric] = Field(default="chrfpp", description="one metric, or one a target language")
    towers: Literal["decoder", "encoder", "both"] = Field(default="decoder", description="where layers may go")
    protect_first: Annotated[int, Field(ge=0)] = Field(
        default=1, description="layers at the beginning of a tower that stay"
    )
    protect_last: Annotated[int, Field(ge=0)] = Field(default=1, description="layers at the end of a tower that stay")
    protected: list[int] = Field(
        default_factory=list, description="further decoder layers never removed (original index)"
    )
    finetune_each_round: TrainSettings | None = Field(
        default=None, description="training after every removal; null: none"
    )
    budget: BudgetSettings | None = Field(
        default=None, description="search for a size instead of a number of layers, which then is the most that may go"
    )

    @model_validator(mode="after")
    def _within_budget(self) -> RankSettings:
        named = {self.metric} if isinstance(self.metric, str) else set(self.metric.values())
        if self.budget:
            others = {
                "strategy": self.strategy != "greedy",
                "selection": self.selection != "exact",
                "metric": "loss" in named and len(named) > 1,
            }
            others |= {name: bool(getattr(self, name)) for name in ("min_retained", "finetune_each_round")}
            if wrong := [name for name, is_wrong in others.items() if is_wrong]:
                raise ValueError(
                    f"budget does not go with rank.{wrong[0]}: it needs strategy greedy, selection exact, translation metrics or loss "
                    "for all languages, no min_retained and no finetune_each_round"
                )
        return self

    @model_validator(mode="after")
    def _fits(self) -> RankSettings:
        if self.finetune_each_round and self.strategy != "greedy":
            raise ValueError(f"finetune_each_round needs strategy greedy, not {self.strategy}")
        if self.finetune_each_round and (self.finetune_each_round.fsdp or self.finetune_each_round.deepspeed):
            raise ValueError(
                "finetune_each_round does not go with fsdp or deepspeed: the search goes on with whole weights"
            )
        if self.strategy == "middle" and self.towers == "both":
            raise ValueError("strategy middle works on one tower; set towers to decoder or encoder")
        if self.strategy != "greedy":
            for name in ("min_retained", "selection"):
                if getattr(self, name) not in (None, "exact"):
                    raise ValueError(f"{name} needs strategy greedy, not {self.strategy}")
        named = {self.metric} if isinstance(self.metric, str) else set(self.metric.values())
        if "loss" in named and (self.min_retained or self.selection == "bootstrap-racing"):
            raise ValueError(
                "min_retained and bootstrap-racing need a translation metric (chrfpp, chrf, bleu), not loss"
            )
        return self

    def metric_for(self, language: str) -> Metric:
        """The metric by which `language` is scored."""
        if isinstance(self.metric, str):
            return self.metric
        if language not in self.metric:
            raise ValueError(f"rank.metric names no metric for {language!r}; it has {sorted(self.metric)}")
        return self.metric[language]
