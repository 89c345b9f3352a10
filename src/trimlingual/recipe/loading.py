"""The recipe: one typed, frozen description of a whole compression run.

One section a stage, named as the stage's verb. Everything is validated at the edge: unknown keys, wrong types and impossible values
are all reported at once, by path, with what is allowed. This module imports neither torch nor transformers, so that the command line
answers at once.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from trimlingual.recipe.data import DataSettings
from trimlingual.recipe.search import RankSettings
from trimlingual.recipe.section import Section
from trimlingual.recipe.sections import (
    ROW_PARTS,
    DecodeSettings,
    DistillSettings,
    EvaluateSettings,
    ExportSettings,
    ModelSettings,
    QuantizeSettings,
    TaskSettings,
    VocabSettings,
)
from trimlingual.recipe.training import MixSettings, TrainSettings

SOURCE_KINDS = ("manifest", "folder", "hub", "covost2", "builtin")


# ValueError: not UTF-8, a date that does not exist, a number of 5,000 digits. RecursionError: brackets in brackets in brackets.
YAML_PROBLEMS = (yaml.YAMLError, ValueError, RecursionError)


class RecipeError(ValueError):
    """A recipe that cannot be run; the message lists every problem by path."""


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice in a mapping is an error: of two sections the first would be lost without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, key in enumerate(keys):
            if key.value in [other.value for other in keys[:number]]:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} stands there twice; remove one", problem_mark=key.start_mark
                )
        return node


@dataclass(frozen=True)
class SharedSettings:
    """What every stage that runs a model needs to know of a recipe, beside its own section."""

    task: TaskSettings
    model: ModelSettings
    decode: DecodeSettings
    seed: int = 0


class Recipe(Section):
    """A whole run. A stage whose section is null is left out."""

    name: str = Field(description="of the run; its folder is runs/NAME by default")
    description: str = Field(default="", description="one line, for `trimlingual recipes`")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=0, description="of training and of adapters' first weights"
    )
    model: ModelSettings = Field(description="the base model")
    task: TaskSettings = Field(description="languages and prompt")
    data: DataSettings = Field(description="the clips")
    decode: DecodeSettings = Field(default=DecodeSettings(), description="how everything is translated")
    vocab: VocabSettings | None = Field(default=None, description="tokens that stay; null: all")
    finetune: TrainSettings | None = Field(
        default=TrainSettings(), description="the teacher; null: the base is its own teacher"
    )
    rank: RankSettings | None = Field(default=RankSettings(), description="which layers go; null: none")
    distill: DistillSettings | None = Field(
        default=DistillSettings(), description="the teacher's translations as training data; null: none"
    )
    recover: TrainSettings | None = Field(
        default=TrainSettings(epochs=4.0, data=MixSettings(gold=1, distilled=1)),
        description="training of the pruned student; null: none",
    )
    quantize: QuantizeSettings | None = Field(
        default=QuantizeSettings(), description="QLoRA and 4 bits; null: no 4-bit model"
    )
    evaluate: EvaluateSettings = Field(default=EvaluateSettings(), description="what is measured")
    export: ExportSettings | None = Field(default=ExportSettings(), description="what ships; null: nothing")

    @property
    def shared(self) -> SharedSettings:
        """The settings that the stages share."""
        return SharedSettings(self.task, self.model, self.decode, self.seed)

    def foreseen(self) -> Recipe:
        """The same with the fewest bits that a search under a budget may choose, which it does in a later stage."""
        budget = self.rank.budget if self.rank else None
        if not budget or not self.quantize:
            return self
        named = {
            part if part in ROW_PARTS else f"decoder.0.{part}": min(few) for part, few in budget.bits.items() if few
        }
        return self.model_copy(update={"quantize": self.quantize.with_bits(named)})

    def with_budget(self, size: str) -> Recipe:
        """The same for another size, in `rank.budget`. RecipeError where this recipe cannot have a budget."""
        if not self.rank:
            raise RecipeError("a budget needs a rank section, but rank is null: nothing would be searched")
        raw = self.model_dump()
        raw["rank"]["budget"] = {**(raw["rank"]["budget"] or {}), "size": size}
        return parse_recipe(raw, f"{self.name} with a budget of {size}")

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        problems = []
        users = {
            "finetune": self.finetune,
            "recover": self.recover,
            "quantize.train": self.quantize and self.quantize.train,
        }
        each_round = self.rank.finetune_each_round if self.rank else None
        for path, train in {"quantize.train": users["quantize.train"], "rank.finetune_each_round": each_round}.items():
            if train and train.sweep:
                problems.append(f"{path}.sweep must be empty: only finetune and recover try several rates")
        if each_round:
            problems += _each_round_problems(each_round, self.data)
        for path, train in users.items():
            if not train:
                continue
            if train.data.out_of_domain and self.data.out_of_domain is None:
                problems.append(
                    f"{path}.data.out_of_domain is {train.data.out_of_domain} but data.out_of_domain is not set"
                )
            if train.data.distilled and self.distill is None:
                problems.append(f"{path}.data.distilled is {train.data.distilled} but the distill section is null")
            if train.data.distilled_out_of_domain and not (self.distill and self.distill.out_of_domain):
                problems.append(
                    f"{path}.data.distilled_out_of_domain is {train.data.distilled_out_of_domain} but "
                    "distill.out_of_domain is not true: nothing translates the out-of-domain audio"
                )
            if train.token_distillation and path == "finetune":
                problems.append("finetune.token_distillation must be null: the teacher is what is learned from")
            if train.data.taught and path == "finetune":
                problems.append("finetune.data.distilled must be 0: the teacher is what translates, so it comes first")
        if self.recover and not self.rank:
            problems.append(
                "recover is set but rank is null: nothing is pruned, so nothing is to be recovered; set recover: null"
            )
        if self.distill and self.distill.out_of_domain and self.data.out_of_domain is None:
            problems.append("distill.out_of_domain is true but data.out_of_domain is not set")
        problems += [*self._quantize_problems(), *self._budget_problems()]
        if self.rank:
            for language in self.task.target_languages:
                try:
                    self.rank.metric_for(language)
                except ValueError as error:
                    problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _quantize_problems(self) -> list[str]:
        problems = []
        if self.quantize:
            have = {"base": True, "teacher": self.finetune, "pruned": self.rank, "recovered": self.recover}
            if not have[self.quantize.start]:
                problems.append(
                    f"quantize.start is {self.quantize.start!r} but no stage of this recipe makes that model"
                )
            if self.vocab and self.vocab.when == "after" and "lm_head" in self.quantize.parts:
                problems.append(
                    "vocab.when is after but quantize.parts has lm_head: rows of a 4-bit head cannot be taken out; use before"
                )
            if self.vocab and self.vocab.when == "after" and self.quantize.eight_bit:
                problems.append(
                    "vocab.when is after but quantize.eight_bit is set: rows in 8 bits cannot be taken out; use before"
                )
            if (
                self.vocab
                and self.vocab.when == "after"
                and (rows := [p for p in ROW_PARTS if p in self.quantize.bits])
            ):
                problems.append(
                    f"vocab.when is after but quantize.bits has {' and '.join(rows)}: packed rows cannot be taken out; use before"
                )
        return problems

    def _budget_problems(self) -> list[str]:
        if not (self.rank and self.rank.budget):
            return []
        problems = []
        if not self.quantize or self.quantize.scheme != "int4":
            problems.append("rank.budget needs quantize.scheme int4: bitsandbytes holds one number of bits a model")
        elif self.quantize.start not in ("pruned", "recovered"):
            problems.append(f"rank.budget needs quantize.start pruned or recovered, not {self.quantize.start}")
        if self.vocab and self.vocab.when == "after":
            problems.append(
                "rank.budget needs vocab.when before: the search counts the bytes of the rows that are there"
            )
        return problems


def _each_round_problems(train: TrainSettings, data: DataSettings) -> list[str]:
    """What a training between two rounds of the search cannot have: it comes before the teacher translates anything."""
    path = "rank.finetune_each_round"
    problems = []
    if train.data.taught:
        problems.append(f"{path}.data.distilled must be 0: layers are ranked before the teacher translates")
    if train.data.out_of_domain and data.out_of_domain is None:
        problems.append(f"{path}.data.out_of_domain is {train.data.out_of_domain} but data.out_of_domain is not set")
    if train.token_distillation:
        problems.append(f"{path}.token_distillation must be null: what is ranked is the teacher itself")
    if train.selection_checks:
        problems.append(f"{path}.selection_checks must be 0: the search itself looks at the selection clips")
    return problems


def recipes_dir() -> Path:
    """Folder of the recipes that ship with the package (the repository's `recipes/` in a source checkout)."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parents[1] / "recipes"


def list_recipes() -> dict[str, Path]:
    """Shipped recipes by name."""
    return {path.stem: path for path in sorted(recipes_dir().glob("*.yaml"))}


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a shipped recipe by name or a YAML file by path, with `section.key=value` overrides.

    Raises RecipeError with every problem at once.
    """
    path = Path(name_or_path)
    if path.is_dir():
        raise RecipeError(f"recipe {str(name_or_path)!r} is a folder; give the YAML file")
    if not path.is_file():
        shipped = list_recipes()
        if str(name_or_path) not in shipped:
            raise RecipeError(
                f"recipe {str(name_or_path)!r} is neither a file nor a shipped recipe; shipped: {', '.join(shipped)}"
            )
        path = shipped[str(name_or_path)]
    try:
        raw = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except YAML_PROBLEMS as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} must hold a mapping of sections, not {type(raw).__name__}")
    for override in overrides:
        _override(raw, override)
    return parse_recipe(raw, origin=f"{path} with overrides" if overrides else str(path))


def parse_recipe(raw: dict[str, Any], origin: str = "recipe") -> Recipe:
    """Validate a mapping; RecipeError lists every problem by path."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        found = [
            (_where(problem), _explain(problem)) for problem in error.errors(include_url=False) if _counts(problem)
        ]
        lines = [f"{where}: {what}" for where, what in dict.fromkeys(found)]
        if len(lines) == 1:
            raise RecipeError(f"{origin}: {lines[0]}") from error
        raise RecipeError("\n  ".join([f"{origin} has {len(lines)} problem(s):", *lines])) from error


def _where(problem: Any) -> str:
    """Path of a key, without pydantic's names for the alternatives that it tried."""
    path = [str(part) for part in problem["loc"] if part != "constrained-int" and "[" not in str(part)]
    path = [part for depth, part in enumerate(path) if depth < 2 or part not in SOURCE_KINDS]
    return ".".join(path) or "(whole recipe)"


def _counts(problem: Any) -> bool:
    """Whether a problem is of the alternative that was meant: a mapping is meant as a source, a number as clips to hold out."""
    given, alternatives = problem["input"], " ".join(str(part) for part in problem["loc"])
    if "constrained-int" in alternatives:
        return isinstance(given, int) and not isinstance(given, bool)
    return not (
        "tagged-union" in alternatives and problem["type"] == "model_attributes_type" and isinstance(given, int)
    )


def _explain(problem: Any) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "model_attributes_type" and problem["loc"][0] == "data":
        numbers = " or a number of clips to hold out of train" if "tagged-union" in str(problem["loc"]) else ""
        return f"must be a source, {{kind: ..., ...}}{numbers}; got {problem['input']!r}"
    if problem["type"] == "union_tag_not_found":
        return f"a source needs kind, one of {', '.join(SOURCE_KINDS)}; got {{{', '.join(map(str, problem['input']))}}}"
    if problem["type"] == "union_tag_invalid":
        return f"kind is {problem['ctx']['tag']!r}; it is one of {', '.join(SOURCE_KINDS)}"
    if problem["type"] == "extra_forbidden":
        return "unknown key"
    if problem["type"] == "missing":
        return "missing"
    given = problem["input"]
    if isinstance(given, (str, int, float, bool)):
        hint = ""
        if isinstance(given, str) and "e" in given.lower() and _is_number(given):
            hint = " (YAML reads 3e-4 as text: write 3.0e-4)"
        return f"{message}; got {given!r}{hint}"
    return message


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _override(raw: dict[str, Any], override: str) -> None:
    """Apply `a.b.c=value` in place; the value is read as YAML, with 3e-4 read as a number."""
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise RecipeError(f"--set {override!r} must look like section.key=value, e.g. rank.num_layers_to_remove=4")
    try:
        value = yaml.load(text, _Loader)
    except YAML_PROBLEMS as error:
        what = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise RecipeError(
            f"--set {override!r}: the value is not YAML ({what}); text with a colon, a brace or a # goes in quotes of its own: "
            f"--set {shlex.quote(path + '=' + json.dumps(text, ensure_ascii=False))}"
        ) from error
    if isinstance(value, str) and _is_number(value):
        value = float(value)
    node = raw
    for key in keys[:-1]:
        child = node.get(key)
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            raise RecipeError(f"--set {override!r}: {key} holds a value, not a section")
        node = child
    node[keys[-1]] = value
