"""The check before anything runs: whatever can be known not to work is said at once, before hours are spent on what comes first.

Shared by `compress`, by every single verb (for its own stage and inputs) and by `--dry-run`. It reads listings, configurations and
headers; no weights are loaded, no audio is decoded and nothing but a configuration is fetched.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimlingual.data.audio import DataError
from trimlingual.estimate import Estimate, config_of, encoded_s, estimate, frozen_towers, gb, state_bytes
from trimlingual.evaluation.quality import bleu_problem, comet_problem
from trimlingual.recipe import EXPORT_STAGES, Recipe
from trimlingual.recipe.languages import language
from trimlingual.resources import (
    bits_problems,
    device_problems,
    disk_problems,
    memory_notes,
    quantization_problems,
    training_problems,
)
from trimlingual.run.artifacts import ArtifactError
from trimlingual.run.lineage import LineageError, read_lineage
from trimlingual.run.progress import say
from trimlingual.step_inputs import base_ref

if TYPE_CHECKING:
    from trimlingual.steps import Step


class PreflightError(ArtifactError):
    """What was asked for cannot work; the message lists every reason. Nothing was run."""


@dataclass
class Findings:
    """`problems` stop a run; `notes` do not. `estimates` by stage, empty where the base model's configuration is not at hand."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    estimates: dict[str, Estimate] = field(default_factory=dict)

    def refuse(self) -> None:
        """Raise PreflightError if there is a problem, else say the notes."""
        if len(self.problems) == 1:
            raise PreflightError(self.problems[0])
        if self.problems:
            raise PreflightError("\n  ".join(["nothing was run, because", *self.problems]))
        for note in self.notes:
            say(f"note: {note}")


def check(recipe: Recipe, run_dir: Path, steps: Sequence[Step], problems: Sequence[str] = ()) -> Findings:
    """Everything that can be known of `steps`, which are still to be made, in their order; `problems` are known already."""
    found = Findings(list(problems))
    names = [step.name for step in steps]
    if not names:
        return found
    config: Any = None
    try:
        config = config_of(recipe)
        speech_s, unknown = _speech(recipe, run_dir, names)
        found.estimates = estimate(recipe, speech_s)
        found.notes += unknown
    except OSError as error:  # not cached, no network
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        found.notes.append(
            f"not checked, nor estimated: the configuration of {recipe.model.base} cannot be read ({reason})"
        )
    except (ValueError, AttributeError) as error:
        found.problems.append(f"model.base {recipe.model.base}: {error}")
    for problem in chain(
        _languages(recipe, names), _libraries(config), _models(steps), _sources(recipe, names),
        _vocabulary(recipe, steps), _comet(recipe, run_dir, names), device_problems(recipe),
        training_problems(recipe, names, config), quantization_problems(recipe.foreseen(), names, config),
        _exports(recipe, steps, config), _layers(recipe, steps, config), _budget(recipe, steps, config),
        disk_problems(run_dir, names, found.estimates), _places(steps),
    ):  # fmt: skip
        if problem not in found.problems:
            found.problems.append(problem)
    if not any(problem.startswith("model.device") for problem in found.problems):
        found.notes += memory_notes(recipe, names, found.estimates)
    found.notes += _metric_notes(recipe, names)
    found.notes += _ranking_notes(steps)
    return found


def _speech(recipe: Recipe, run_dir: Path, names: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """Seconds by split that a frozen audio tower encodes, and a note for each that cannot be told."""
    from trimlingual.data.sources import speech_seconds
    from trimlingual.data.splits import load_splits

    encoded = {split for stage, splits in frozen_towers(recipe).items() if stage in names for split in splits}
    seconds_of = encoded_s(recipe)
    if encoded and "data" not in names:
        with suppress(DataError):  # the stage says it
            splits = {name: split for name in encoded if (split := getattr(load_splits(run_dir / "data"), name))}
            return {name: sum(seconds_of(clip.duration_s) for clip in splits[name].clips) for name in splits}, []
    seconds, unknown = {}, []
    for name in sorted(encoded):
        source = getattr(recipe.data, name)
        found = speech_seconds(source, recipe.task.target_languages, seconds_of) if source else 0.0
        if found is None:
            least = seconds_of(1.0)
            unit = "hour of speech" if least == 1 else f"clip of up to {least:g} s"
            size = gb(state_bytes(recipe, 3600 if least == 1 else least))
            unknown.append(
                f"not in the estimates: what the frozen audio tower makes of data.{name}, {size} on disk and in host memory per {unit}"
            )
        seconds[name] = found or 0.0
    return seconds, unknown


def _languages(recipe: Recipe, names: Sequence[str]) -> Iterator[str]:
    """BLEU's tokenizers, which every evaluation needs, and a search by BLEU."""
    evaluated = any(name.startswith("evaluate ") for name in names)
    for code in recipe.task.target_languages:
        searched = "rank" in names and recipe.rank and recipe.rank.metric_for(code) == "bleu"
        if (evaluated or searched) and (problem := bleu_problem(code)):
            yield problem


def _metric_notes(recipe: Recipe, names: Sequence[str]) -> Iterator[str]:
    for code in recipe.task.target_languages if recipe.rank and "rank" in names else ():
        if recipe.rank and recipe.rank.metric_for(code) == "chrfpp" and not language(code).spaced:
            yield f"rank.metric is chrfpp for {code!r}, whose words are not spaced: chrf is its main metric"


def _libraries(config: Any) -> Iterator[str]:
    """What must be installed to read the tokenizer of the base model's family."""
    from trimlingual.models.folders import FAMILIES, library_problem

    for file in FAMILIES.get(getattr(config, "model_type", ""), ()):
        if problem := library_problem(file):
            yield problem


def _models(steps: Sequence[Step]) -> Iterator[str]:
    """The model folders that are read and not made in this run."""
    from trimlingual.models.folders import folder_problems

    made = {step.folder for step in steps}
    for step in steps:
        for role in ("model", "teacher", "processor"):
            ref = step.inputs.get(role)
            folder = ref.local if ref else None
            if folder and folder not in made and folder.is_dir():
                yield from folder_problems(folder, step.name)


def _places(steps: Sequence[Step]) -> Iterator[str]:
    """Folders in which nothing can be made."""
    for step in steps:
        above = next(parent for parent in Path(os.path.realpath(step.folder)).parents if os.path.isdir(parent))
        if not os.access(above, os.W_OK | os.X_OK):
            yield f"{above} cannot be written to (its permissions, or a disk for reading only); choose another folder, or change them"


def _ranking_notes(steps: Sequence[Step]) -> Iterator[str]:
    """Layers of a 4-bit model can be ranked, but nothing can be made of it afterwards."""
    from trimlingual.models.folders import is_bitsandbytes

    for step in steps:
        folder = step.inputs["model"].local if step.name == "rank" else None
        if folder and is_bitsandbytes(folder):
            yield (
                f"{folder} is in 4 bits (bitsandbytes): its layers can be ranked, but it cannot be pruned or trained. The plan fits "
                "the model that it was made from: prune --model THAT_MODEL --plan plan.json"
            )


def _sources(recipe: Recipe, names: Sequence[str]) -> Iterator[str]:
    """Listings, columns, references in every language, audio files."""
    from trimlingual.data.sources import listing_problems

    if "data" in names:
        for role in ("train", "select", "test", "out_of_domain"):
            source = getattr(recipe.data, role)
            if source is not None and not isinstance(source, int):
                scored = role in ("select", "test")
                for problem in listing_problems(
                    source, recipe.task.target_languages, wanted=recipe.data.references, scored=scored
                ):
                    yield f"data.{role}: {problem}"


def _vocabulary(recipe: Recipe, steps: Sequence[Step]) -> Iterator[str]:
    """The texts that tokens are counted on, and whether the tokenizer can be trimmed to so many."""
    from trimlingual.models.folders import folder_problems
    from trimlingual.vocabulary.rewrite import read_lines, vocab_problems

    trimming = next((step for step in steps if step.name == "trimmed"), None)
    if recipe.vocab is None or trimming is None:
        return
    for path in [*recipe.vocab.texts, *recipe.vocab.held_out]:
        if not Path(path).is_file():
            yield f"vocab: {path} does not exist"
            continue
        try:
            deque(read_lines(Path(path)), maxlen=0)
        except DataError as error:
            yield f"vocab: {error}"
    folder, is_base = _given_or_base(recipe, trimming, steps)
    if folder and not folder_problems(folder, "trimmed"):
        yield from vocab_problems(folder, recipe.task, recipe.vocab, weights=not is_base)


def _comet(recipe: Recipe, run_dir: Path, names: Sequence[str]) -> Iterator[str]:
    """COMET's environment, and the source texts that it reads."""
    from trimlingual.data.sources import listing_problems
    from trimlingual.data.splits import load_splits

    if not recipe.evaluate.comet or not any(name.startswith("evaluate ") for name in names):
        return
    if problem := comet_problem():
        yield problem
    if "data" not in names:
        try:
            missing = sum(not clip.source for clip in load_splits(run_dir / "data").test.clips)
        except DataError:
            return  # the stage says it
        if missing:
            yield f"evaluate.comet: {missing} test clips have no source text, which COMET reads"
        return
    source = recipe.data.test if not isinstance(recipe.data.test, int) else recipe.data.train
    if not listing_problems(source, recipe.task.target_languages, wanted=recipe.data.references):
        for problem in listing_problems(source, recipe.task.target_languages, True, recipe.data.references):
            yield f"evaluate.comet reads source texts: {problem}"


def _exports(recipe: Recipe, steps: Sequence[Step], config: Any) -> Iterator[str]:
    """What a runtime will not take, of a model that this run makes or of one that stands there."""
    from trimlingual.exports.target import target

    made = {step.folder for step in steps}
    runtimes = {stage: runtime for runtime, stage in EXPORT_STAGES.items()}
    for step in steps:
        if step.name not in runtimes:
            continue
        to_be = recipe.foreseen()
        quantization: dict[str, Any] | None = to_be.quantize.model_dump() if to_be.quantize else None
        folder = step.inputs["model"].local
        if folder and folder not in made and folder.is_dir():
            with suppress(LineageError):  # the stage says it
                quantization = read_lineage(folder).quantization
        for problem in target(runtimes[step.name]).problems(recipe, config, quantization):
            yield problem if to_be is recipe else problem.replace("quantize.bits", "rank.budget.bits")


def _given_or_base(recipe: Recipe, step: Step, steps: Sequence[Step]) -> tuple[Path | None, bool]:
    """The folder of the model that a step reads; of one that is still to be made the base model's, and True. None if not here."""
    folder = step.inputs["model"].local
    if folder and folder.is_dir() and folder not in {each.folder for each in steps}:
        return folder, False
    return base_ref(recipe).local, True


def _budget(recipe: Recipe, steps: Sequence[Step], config: Any) -> Iterator[str]:
    """Whether a budget is out of reach whatever is chosen, by the base model's shapes; not with a trimmed vocabulary."""
    from trimlingual.models.family import meta_model
    from trimlingual.search.actions import Smaller

    ranking = next((step for step in steps if step.name == "rank"), None)
    if (
        not ranking
        or not recipe.rank
        or not recipe.rank.budget
        or not recipe.quantize
        or recipe.vocab
        or config is None
    ):
        return
    folder, is_base = _given_or_base(recipe, ranking, steps)
    if not is_base:
        return  # the stage says it
    counts = {"decoder": config.text_config.num_hidden_layers, "encoder": config.audio_config.num_hidden_layers}
    with suppress(ValueError):  # layers or a group size that do not fit, which other checks say
        layers = read_lineage(folder).layers if folder else {tower: list(range(n)) for tower, n in counts.items()}
        smaller = Smaller(meta_model(config), layers, recipe.rank, recipe.quantize, recipe.model.storage_dtype)
        if problem := smaller.problem():
            yield problem


def _layers(recipe: Recipe, steps: Sequence[Step], config: Any) -> Iterator[str]:
    """Whether the model that a stage reads, a given one or what becomes of the base model, has the layers that its settings name."""
    from trimlingual.search.allowed import ranking_problems

    for step in steps:
        if step.name not in ("rank", "quantized"):
            continue
        folder, _ = _given_or_base(recipe, step, steps)
        with suppress(LineageError):  # `_models` says what is wrong with the folder
            if folder:
                lineage = read_lineage(folder)
                layers: Mapping[str, Sequence[int]] = lineage.layers
                num_layers = lineage.num_base_layers["decoder"]
            elif config is not None:
                num_layers = config.text_config.num_hidden_layers
                layers = {"decoder": range(num_layers), "encoder": range(config.audio_config.num_hidden_layers)}
            else:
                continue
            if step.name == "rank" and recipe.rank:
                yield from ranking_problems(recipe.rank, layers)
            if step.name == "quantized" and recipe.quantize:
                yield from bits_problems(recipe.quantize, num_layers)
