"""The steps of a run: for each stage where it writes, what decides its output, and the work.

Imports of the heavy modules stay inside the work, so that --dry-run and --help answer at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trimlingual.artifacts import (
    Artifact,
    differences,
    find_artifact,
    fingerprint,
    hash_file,
    produce,
)
from trimlingual.audio import DataError
from trimlingual.data import load_splits, prepare_data
from trimlingual.lineage import Lineage, read_lineage
from trimlingual.progress import LOG_FILE, log_to
from trimlingual.recipe import Recipe, Source, TrainSettings
from trimlingual.sources import Clip, source_fingerprint

if TYPE_CHECKING:
    from trimlingual.prompts import Example

Status = Literal["done", "unfinished", "missing", "stale"]


@dataclass(frozen=True)
class Ref:
    """Something a step reads: where it stands, and the fingerprint that stands for its content.

    A base model on the Hub has no `path`: asking for its `folder` downloads it, which planning and --dry-run never do.
    """

    path: Path | None
    fingerprint: str
    hub: tuple[str, str | None] | None = None  # (id, revision)

    @property
    def folder(self) -> Path:
        """The folder, downloaded first if need be."""
        if self.path is not None:
            return self.path
        from trimlingual.models import resolve_base

        assert self.hub is not None
        return resolve_base(*self.hub)


@dataclass(frozen=True)
class Step:
    """One stage of a run, not yet done. `work(inputs, partial_folder) -> info` does it."""

    name: str
    folder: Path
    settings: dict[str, Any]
    inputs: Mapping[str, Ref]
    work: Callable[[Mapping[str, Ref], Path], dict[str, Any]]
    everyone: bool = False  # every process of a distributed run takes part, not only the main one

    @cached_property
    def fingerprint(self) -> str:
        """Decides whether the artefact in `folder` is this step's."""
        return fingerprint(self.name, self.settings, self.input_fingerprints)

    @property
    def input_fingerprints(self) -> dict[str, str]:
        """Fingerprint by role."""
        return {role: ref.fingerprint for role, ref in self.inputs.items()}

    @property
    def ref(self) -> Ref:
        """This step's output as another's input."""
        return Ref(self.folder, self.fingerprint)

    def status(self) -> Status:
        """Whether there is something to do."""
        existing = find_artifact(self.folder)
        if existing:
            return "done" if existing.fingerprint == self.fingerprint else "stale"
        return "unfinished" if self.folder.with_name(self.folder.name + ".partial").is_dir() else "missing"

    def changes(self) -> list[str]:
        """What makes it stale."""
        existing = find_artifact(self.folder)
        return differences(existing, self.settings, self.input_fingerprints) if existing else []

    def run(self, force: bool = False) -> Artifact:
        """Bring the artefact up to date."""

        def work(partial: Path) -> dict[str, Any]:
            with log_to(partial / LOG_FILE):
                return self.work(self.inputs, partial)

        return produce(
            self.folder, self.name, self.settings, self.input_fingerprints, work, force=force, everyone=self.everyone
        )


def base_ref(recipe: Recipe) -> Ref:
    """The base model. One on the Hub is known by its id and revision until it is needed."""
    from trimlingual.models import is_on_hub, resolve_base

    base, revision = recipe.model.base, recipe.model.revision
    if is_on_hub(base):
        return Ref(None, fingerprint("hub", {"base": base, "revision": revision}, {}), (base, revision))
    return model_ref(resolve_base(base))


def model_ref(folder: Path) -> Ref:
    """A model folder as an input: the artefact's fingerprint, or a hash of configuration and weights for one made elsewhere.

    Of weight files above 64 MiB only size, first and last MiB are read.
    """
    artifact = find_artifact(folder)
    if artifact:
        return Ref(folder, artifact.fingerprint)
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        if size <= 64 << 20:
            digest.update(hash_file(path).encode())
        else:
            with path.open("rb") as file:
                digest.update(file.read(1 << 20))
                file.seek(-(1 << 20), 2)
                digest.update(file.read())
    return Ref(folder, digest.hexdigest()[:16])


def data_step(recipe: Recipe, base: Ref, out: Path) -> Step:
    """Read the sources, split them, prove the splits disjoint."""
    sources = {"train": recipe.data.train, "out_of_domain": recipe.data.out_of_domain}
    sources |= {name: s for name in ("select", "test") if not isinstance(s := getattr(recipe.data, name), int)}
    settings = {
        **recipe.data.model_dump(),
        "target_languages": recipe.task.target_languages,
        "content": {name: _content(source) for name, source in sources.items() if source},
    }

    def work(inputs: Mapping[str, Ref], folder: Path) -> dict[str, Any]:
        from trimlingual.models import load_processor, window_s

        return prepare_data(recipe.data, recipe.task, folder, window_s=window_s(load_processor(inputs["base"].folder)))

    return Step("data", out, settings, {"base": base}, work)


def _content(source: Source) -> dict[str, Any]:
    """What stands for a source's content; one that is not there yet is planned with, and an error once it is read."""
    try:
        return source_fingerprint(source)
    except DataError:
        return {"missing": True}


def vocab_step(recipe: Recipe, model: Ref, data: Ref, out: Path) -> Step:
    """Vocabulary trimming, of the base model or of a finished one."""
    settings = recipe.vocab
    assert settings is not None
    files = {path: Path(path) for path in [*settings.texts, *settings.held_out]}
    content = {name: hash_file(path) if path.is_file() else "missing" for name, path in files.items()}

    def work(inputs: Mapping[str, Ref], folder: Path) -> dict[str, Any]:
        from trimlingual.vocab import counted_texts, trim_vocab

        splits = load_splits(inputs["data"].folder) if "data" in inputs else None
        lineage = lineage_of(inputs["model"], recipe)
        for split in (splits.train, splits.out_of_domain) if splits else ():
            lineage = lineage.with_seen("train", split.audio_hashes if split else ())
        texts, held_out = counted_texts(splits, recipe.task.target_languages, settings)
        return trim_vocab(inputs["model"].folder, lineage, texts, held_out, recipe.task, settings, folder)

    wanted = {"vocab": settings.model_dump(), "task": recipe.task.model_dump(), "content": content}
    return Step("trimmed", out, wanted, _inputs(model=model, data=data if settings.references else None), work)


def finetune_step(
    name: str, recipe: Recipe, train: TrainSettings, model: Ref, data: Ref, distilled: Ref | None, out: Path
) -> Step:
    """Stage 1 (the teacher) and stage 4 (the recovered student)."""
    distilled = distilled if train.data.distilled else None

    def work(inputs: Mapping[str, Ref], folder: Path) -> dict[str, Any]:
        from trimlingual.finetune import finetune

        clips, examples = _training_data(recipe, train, inputs)
        lineage = lineage_of(inputs["model"], recipe).after("finetune")
        return finetune(
            inputs["model"].folder, lineage, clips, examples, recipe.task, recipe.model, train, recipe.seed, folder
        )

    inputs = _inputs(model=model, data=data, distilled=distilled)
    return Step(name, out, _settings(recipe, train=train), inputs, work, everyone=True)


def rank_step(recipe: Recipe, model: Ref, data: Ref, out: Path) -> Step:
    """Stage 2: which layers can go."""
    settings = recipe.rank
    assert settings is not None

    def work(inputs: Mapping[str, Ref], folder: Path) -> dict[str, Any]:
        from trimlingual.rank import TrainingData, rank

        training = None
        if settings.finetune_each_round:
            training = TrainingData(*_training_data(recipe, settings.finetune_each_round, inputs))
        lineage = lineage_of(inputs["model"], recipe)
        select = load_splits(inputs["data"].folder).select
        return rank(
            inputs["model"].folder,
            lineage,
            select,
            recipe.task,
            recipe.model,
            recipe.decode,
            settings,
            training,
            recipe.seed,
            folder,
        )

    wanted = _settings(recipe, rank=settings, decode=recipe.decode)
    return Step("rank", out, wanted, {"model": model, "data": data}, work, everyone=True)


def prune_step(recipe: Recipe, model: Ref, plan: Ref, out: Path) -> Step:
    """Stage 2, applied."""

    def work(inputs: Mapping[str, Ref], folder: Path) -> dict[str, Any]:
        from trimlingual.prune import prune

        model = inputs["model"]
        return prune(model.folder, lineage_of(model, recipe), inputs["plan"].folder, recipe.model, folder)

    return Step("pruned", out, {"model": recipe.model.model_dump()}, {"model": model, "plan": plan}, work)


def distill_step(recipe: Recipe, teacher: Ref, data: Ref, out: Path) -> Step:
    """Stage 3: the teacher translates the training audio."""
    settings = recipe.distill
    assert settings is not None

    def work(inputs: Mapping[str, Ref], folder: Path) -> dict[str, Any]:
        from trimlingual.distill import distill

        clips = load_splits(inputs["data"].folder).train.clips
        return distill(inputs["teacher"].folder, clips, recipe.task, recipe.model, recipe.decode, settings, folder)

    wanted = _settings(recipe, distill=settings, decode=recipe.decode)
    return Step("distilled", out, wanted, {"teacher": teacher, "data": data}, work, everyone=True)


def quantize_step(recipe: Recipe, model: Ref, data: Ref, distilled: Ref | None, out: Path) -> Step:
    """Stage 5: QLoRA, merge, 4-bit."""
    settings = recipe.quantize
    assert settings is not None
    distilled = distilled if settings.train.data.distilled else None

    def work(inputs: Mapping[str, Ref], folder: Path) -> dict[str, Any]:
        from trimlingual.quantize import quantize

        clips, examples = _training_data(recipe, settings.train, inputs)
        lineage = lineage_of(inputs["model"], recipe)
        return quantize(
            inputs["model"].folder, lineage, clips, examples, recipe.task, recipe.model, settings, recipe.seed, folder
        )

    return Step(
        "quantized",
        out,
        _settings(recipe, quantize=settings),
        _inputs(model=model, data=data, distilled=distilled),
        work,
        everyone=True,
    )


def evaluate_step(name: str, recipe: Recipe, model: Ref, data: Ref, baseline: Ref | None, out: Path) -> Step:
    """Stage 6: translate the test split, score, measure."""

    def work(inputs: Mapping[str, Ref], folder: Path) -> dict[str, Any]:
        from trimlingual.evaluate import evaluate

        test = load_splits(inputs["data"].folder).test
        model = inputs["model"]
        compared = inputs["baseline"].folder if "baseline" in inputs else None
        return evaluate(
            name, model.folder, lineage_of(model, recipe), test, recipe.task, recipe.model, recipe.decode, recipe.evaluate,
            compared, folder,
        )  # fmt: skip

    settings = _settings(recipe, evaluate=recipe.evaluate, decode=recipe.decode)
    settings["evaluate"].pop("models")  # which others are evaluated does not change this one
    return Step(
        f"evaluate {name}", out, settings, _inputs(model=model, data=data, baseline=baseline), work, everyone=True
    )


def export_step(recipe: Recipe, model: Ref, evaluation: Ref | None, out: Path) -> Step:
    """What ships."""

    def work(inputs: Mapping[str, Ref], folder: Path) -> dict[str, Any]:
        from trimlingual.export import export

        model = inputs["model"]
        scores = inputs["evaluation"].folder if "evaluation" in inputs else None
        return export(model.folder, lineage_of(model, recipe), recipe, scores, folder)

    settings = _settings(recipe) | {"name": recipe.name}
    return Step("exported", out, settings, _inputs(model=model, evaluation=evaluation), work)


def report_step(recipe: Recipe, run_dir: Path, inputs: Sequence[Ref]) -> Step:
    """report.json, report.md, report.html of everything in the run folder."""

    def work(inputs: Mapping[str, Ref], folder: Path) -> dict[str, Any]:
        from trimlingual.report import write_report

        write_report(run_dir, folder)
        return {}

    roles = {str(ref.folder.relative_to(run_dir)): ref for ref in inputs}
    return Step("report", run_dir / "report", {"recipe": recipe.name}, roles, work)


def lineage_of(model: Ref, recipe: Recipe) -> Lineage:
    """Where a model comes from; the base model's lineage starts under the recipe's name for it."""
    return read_lineage(model.folder, recipe.model.base)


def _settings(recipe: Recipe, **sections: Any) -> dict[str, Any]:
    """The part of the recipe that decides a model stage's output."""
    model = recipe.model.model_dump(exclude={"base", "revision"})  # the base model is an input
    common = {"model": model, "task": recipe.task.model_dump(), "seed": recipe.seed}
    return common | {name: section.model_dump() for name, section in sections.items()}


def _inputs(**refs: Ref | None) -> dict[str, Ref]:
    return {role: ref for role, ref in refs.items() if ref is not None}


def _training_data(recipe: Recipe, train: TrainSettings, inputs: Mapping[str, Ref]) -> tuple[list[Clip], list[Example]]:
    from trimlingual.distill import mix, read_distilled

    pairs = read_distilled(inputs["distilled"].folder) if "distilled" in inputs else []
    return mix(load_splits(inputs["data"].folder), pairs, train.data, recipe.task.target_languages)
