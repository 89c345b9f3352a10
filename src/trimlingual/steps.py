"""The steps of a run: for each stage where it writes, what decides its output, and the work.

Imports of the heavy modules stay inside the work, so that --dry-run and --help answer at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trimlingual.data.splits import load_splits, prepare_data
from trimlingual.exports.shipped import Shipped, clip_lengths, read_shipped
from trimlingual.recipe import EXPORT_STAGES, MixSettings, Recipe, Runtime, TrainSettings
from trimlingual.run.artifacts import Artifact, find_artifact, produce, trespass, unfinished_changes
from trimlingual.run.fingerprint import FORMAT, UNREAD, HashCache, decisive, differences, fingerprint, flatten
from trimlingual.run.handed_on import TEACHER_TOKENS
from trimlingual.run.lineage import ModelFolder, public_name, read_lineage
from trimlingual.run.ownership import WORK_FILE, describe_work, partial_of, read_record, why_not_as_made
from trimlingual.run.processes import is_main_process, num_processes
from trimlingual.run.progress import LOG_FILE, log_to, say
from trimlingual.step_inputs import Ref, SourceRef, base_ref, files_ref, model_ref, processor_ref, source_ref

if TYPE_CHECKING:
    from trimlingual.models.inputs import TrainingData
    from trimlingual.training.selection import Guide

__all__ = [
    "Ref", "Status", "Step", "base_ref", "data_step", "distill_step", "evaluate_step", "export_step", "finetune_step", "folder_of",
    "model_ref", "prune_step", "quantize_step", "rank_step", "report_step", "vocab_step",
]  # fmt: skip

# unknown: an input would have to be read first (--dry-run does not); blocked: what stands there is the user's
Status = Literal["done", "unfinished", "missing", "stale", "unknown", "blocked"]


@dataclass(frozen=True)
class Step:
    """One stage of a run, not yet done. `work(inputs, partial_folder) -> info` does it."""

    name: str
    folder: Path
    settings: dict[str, Any]
    inputs: Mapping[str, Ref]
    work: Callable[[Mapping[str, Ref], Path], dict[str, Any]]
    everyone: bool = False  # every process of a distributed run takes part, not only the main one
    derived: bool = False  # costs nothing, so it is made again without being asked for
    made_for: Shipped | None = None  # of a model: what it is asked and how, so that `translate` needs no recipe

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
        return Ref(self.folder, lambda: self.fingerprint)

    def problem(self, force: bool = False) -> str:
        """Why it may not be made here (something there is the user's), or nothing."""
        return trespass(self.folder, self.name, self.settings, _Fingerprints(self.inputs), force)

    def status(self) -> Status:
        """Whether there is something to do. Content is read only where something stands that it could be compared with."""
        if self.problem():
            return "blocked"
        if existing := find_artifact(self.folder):
            if self.fingerprint == UNREAD:
                return "stale" if self.changes() else "unknown"
            return "done" if existing.fingerprint == self.fingerprint else "stale"
        if read_record(partial_of(self.folder) / WORK_FILE) is None:
            return "missing"
        if self.changes():
            return "stale"
        return "unknown" if self.fingerprint == UNREAD else "unfinished"

    def damage(self) -> str:
        """Why it may not be made from what it reads, or nothing. Plans may be edited, and a report shows what there is."""
        for role, ref in self.inputs.items():
            if self.derived or role == "plan" or not ref.path or self.status() == "done":
                continue
            if changed := why_not_as_made(ref.path):
                return (
                    f"{changed}, and {self.name!r} would be made from it as if it were not: put the files back, or move the folder "
                    "away, so that it is made again"
                )
        return ""

    def changes(self) -> list[str]:
        """What makes it stale; for unfinished work of other settings, also what that holds."""
        if existing := find_artifact(self.folder):
            if existing.fingerprint == self.fingerprint:
                return []
            found = differences(existing.record(), self.settings, self.input_fingerprints, self.name)
            return found if self.fingerprint == UNREAD else found or ["other settings"]
        found = unfinished_changes(self.folder, self.name, self.settings, self.input_fingerprints)
        return [f"unfinished: {describe_work(partial_of(self.folder))}", *found] if found else []

    def run(self, force: bool = False) -> Artifact:
        """Bring the artefact up to date."""

        def work(partial: Path) -> dict[str, Any]:
            with log_to(partial / LOG_FILE):
                if num_processes() > 1 and not self.everyone:
                    say(f"  {self.name}: the main process works; the other {num_processes() - 1} wait")
                info = self.work(self.inputs, partial)
                if self.made_for and is_main_process():
                    replace(self.made_for, clip_s=self._clip_s()).save(partial)
                return info

        return produce(
            self.folder,
            self.name,
            self.settings,
            self.input_fingerprints,
            work,
            force=force,
            everyone=self.everyone,
            origins={role: ref.origin for role, ref in self.inputs.items() if ref.origin},
        )

    def _clip_s(self) -> tuple[float, float] | None:
        """Lengths of the clips that the model was trained on: these, or those of the model that it was made of."""
        if "data" in self.inputs:
            return clip_lengths([clip.duration_s for clip in load_splits(self.inputs["data"].folder).train.clips])
        model = self.inputs["model"]
        shipped = read_shipped(model.path) if model.path else None
        return shipped.clip_s if shipped else None


class _Fingerprints(Mapping[str, str]):
    """Fingerprint by role, found when it is asked for."""

    def __init__(self, inputs: Mapping[str, Ref]) -> None:
        self._inputs = inputs

    def __getitem__(self, role: str) -> str:
        return self._inputs[role].fingerprint

    def __iter__(self) -> Iterator[str]:
        return iter(self._inputs)

    def __len__(self) -> int:
        return len(self._inputs)


def data_step(recipe: Recipe, base: Ref, out: Path, remembered: HashCache | None = None) -> Step:
    """Read the sources, split them, prove the splits disjoint."""
    remembered = remembered or HashCache()
    sources = {"train": recipe.data.train, "out_of_domain": recipe.data.out_of_domain}
    sources |= {name: s for name in ("select", "test") if not isinstance(s := getattr(recipe.data, name), int)}
    read = {f"{name} source": source_ref(source, name, remembered, out) for name, source in sources.items() if source}
    settings = {"data": recipe.data, "target_languages": recipe.task.target_languages}

    def work(inputs: Mapping[str, Ref], folder: Path) -> dict[str, Any]:
        from trimlingual.models.family import family_of_processor
        from trimlingual.models.loading import load_processor

        processor = load_processor(inputs["processor"].folder)
        window_s = family_of_processor(processor).window_s(processor)
        at_commits = {ref.role: ref.read for ref in inputs.values() if isinstance(ref, SourceRef)}
        return prepare_data(recipe.data.model_copy(update=at_commits), recipe.task, folder, window_s=window_s)

    return Step("data", out, settings, {"processor": processor_ref(base, remembered), **read}, work)


def vocab_step(recipe: Recipe, model: Ref, data: Ref, out: Path, remembered: HashCache | None = None) -> Step:
    """Vocabulary trimming, of the base model or of a finished one."""
    settings = recipe.vocab
    assert settings is not None

    def work(inputs: Mapping[str, Ref], folder: Path) -> dict[str, Any]:
        from trimlingual.vocabulary.rewrite import counted_texts, trim_vocab

        splits = load_splits(inputs["data"].folder) if "data" in inputs else None
        given = folder_of(inputs["model"], recipe)
        for split in (splits.train, splits.out_of_domain) if splits else ():
            given = replace(given, lineage=given.lineage.with_seen("train", split.audio_hashes if split else ()))
        texts, held_out = counted_texts(splits, recipe.task.target_languages, settings)
        return trim_vocab(given, texts, held_out, recipe.task, settings, folder)

    inputs = _inputs(
        model=model,
        data=data if settings.references else None,
        texts=files_ref(settings.texts, remembered),
        held_out=files_ref(settings.held_out, remembered),
    )
    return Step("trimmed", out, {"vocab": settings, "task": recipe.task}, inputs, work, made_for=_made_for(recipe))


def finetune_step(
    name: str,
    recipe: Recipe,
    train: TrainSettings,
    model: Ref,
    data: Ref,
    distilled: Ref | None,
    teacher: Ref | None,
    out: Path,
) -> Step:
    """Stage 1 (the teacher) and stage 4 (the recovered student)."""
    distilled = distilled if train.data.taught else None
    teacher = teacher if train.token_distillation else None

    def work(inputs: Mapping[str, Ref], folder: Path) -> dict[str, Any]:
        from trimlingual.stages.finetune import finetune

        given = folder_of(inputs["model"], recipe)
        given = replace(given, lineage=given.lineage.after("finetune"))
        examples = _training_data(recipe, train.data, inputs)
        return finetune(given, examples, recipe.shared, train, folder, _guide(train, inputs, out.parent))

    inputs = _inputs(model=model, data=data, distilled=distilled, teacher=teacher, deepspeed=_deepspeed(train))
    settings = _train_settings(recipe, train, train=train)
    return Step(name, out, settings, inputs, work, everyone=True, made_for=_made_for(recipe))


def rank_step(recipe: Recipe, model: Ref, data: Ref, out: Path, others: Sequence[Path] = ()) -> Step:
    """Stage 2: which layers can go. Of the folders `others`, finished searches for another size of the same model lend their scores."""
    settings = recipe.rank
    assert settings is not None

    def work(inputs: Mapping[str, Ref], folder: Path) -> dict[str, Any]:
        from trimlingual.stages.rank import rank

        between = settings.finetune_each_round
        training = _training_data(recipe, between.data, inputs) if between else None
        select = load_splits(inputs["data"].folder).select
        model = folder_of(inputs["model"], recipe)
        lent = [other for other in others if _differs_in_size(other, step_settings, inputs)]
        return rank(model, select, recipe.shared, settings, training, folder, recipe.quantize, lent)

    step_settings = _settings(recipe, rank=settings, decode=recipe.decode)
    if settings.budget and recipe.quantize:
        step_settings["stored"] = recipe.quantize.as_stored()
    inputs = _inputs(model=model, data=data, deepspeed=_deepspeed(settings.finetune_each_round))
    return Step("rank", out, step_settings, inputs, work, everyone=True)


def _differs_in_size(folder: Path, settings: Mapping[str, Any], inputs: Mapping[str, Ref]) -> bool:
    """Whether a finished search under a budget stands there which was made as this one, but for the size."""
    found, read = find_artifact(folder), {role: ref.fingerprint for role, ref in inputs.items()}
    if not found or (found.stage, found.format, found.inputs) != ("rank", FORMAT, read):
        return False
    theirs, ours = (flatten(each) for each in (found.decisive, decisive(settings)))
    size = "rank.budget.size"
    return size in theirs and size in ours and {**theirs, size: ours[size]} == ours


def prune_step(recipe: Recipe, model: Ref, plan: Ref, out: Path) -> Step:
    """Stage 2, applied."""

    def work(inputs: Mapping[str, Ref], folder: Path) -> dict[str, Any]:
        from trimlingual.stages.prune import prune

        return prune(folder_of(inputs["model"], recipe), inputs["plan"].folder, recipe.model, folder)

    inputs = {"model": model, "plan": plan}
    return Step("pruned", out, {"model": recipe.model}, inputs, work, made_for=_made_for(recipe))


def distill_step(recipe: Recipe, teacher: Ref, data: Ref, out: Path) -> Step:
    """Stage 3: the teacher translates the training audio, and the out-of-domain audio where that is asked for."""
    settings = recipe.distill
    assert settings is not None

    def work(inputs: Mapping[str, Ref], folder: Path) -> dict[str, Any]:
        from trimlingual.stages.distill import distill

        splits = load_splits(inputs["data"].folder)
        clips = [*splits.train.clips]
        if settings.out_of_domain and splits.out_of_domain:
            # Without references a clip is translated into every target language.
            clips += [replace(clip, references={}) for clip in splits.out_of_domain.clips]
        return distill(inputs["teacher"].folder, clips, recipe.shared, settings, folder)

    step_settings = _settings(recipe, distill=settings, decode=recipe.decode)
    return Step("distilled", out, step_settings, {"teacher": teacher, "data": data}, work, everyone=True)


def quantize_step(
    recipe: Recipe, model: Ref, data: Ref, distilled: Ref | None, teacher: Ref | None, plan: Ref | None, out: Path
) -> Step:
    """Stage 5: QLoRA, merge, 4-bit. `plan` is that of a search under a budget, whose bits are taken."""
    settings = recipe.quantize
    assert settings is not None
    train = settings.train
    distilled = distilled if settings.data.taught else None
    teacher = teacher if train and train.token_distillation else None

    def work(inputs: Mapping[str, Ref], folder: Path) -> dict[str, Any]:
        from trimlingual.search.plan import read_plan
        from trimlingual.stages.quantize import quantize

        given, examples = folder_of(inputs["model"], recipe), _training_data(recipe, settings.data, inputs)
        planned = read_plan(inputs["plan"].folder) if "plan" in inputs else None
        bits = {fewer.part: fewer.bits for fewer in planned.bits} if planned else {}
        return quantize(
            given, examples, recipe.shared, settings.with_bits(bits), folder, _guide(train, inputs, out.parent)
        )

    return Step(
        "quantized",
        out,
        _train_settings(recipe, train, quantize=settings),
        _inputs(model=model, data=data, distilled=distilled, teacher=teacher, plan=plan, deepspeed=_deepspeed(train)),
        work,
        everyone=True,
        made_for=_made_for(recipe),
    )


def evaluate_step(name: str, recipe: Recipe, model: Ref, data: Ref, baseline: Ref | None, out: Path) -> Step:
    """Stage 6: translate the test split, score, measure."""

    def work(inputs: Mapping[str, Ref], folder: Path) -> dict[str, Any]:
        from trimlingual.stages.evaluate import evaluate

        test = load_splits(inputs["data"].folder).test
        given = folder_of(inputs["model"], recipe)
        compared = inputs["baseline"].folder if "baseline" in inputs else None
        return evaluate(name, given, test, recipe.shared, recipe.evaluate, compared, folder)

    settings = _settings(recipe, evaluate=recipe.evaluate, decode=recipe.decode)
    return Step(
        f"evaluate {name}", out, settings, _inputs(model=model, data=data, baseline=baseline), work, everyone=True
    )


def export_step(recipe: Recipe, runtime: Runtime, model: Ref, evaluation: Ref | None, data: Ref, run_dir: Path) -> Step:
    """What ships for a runtime. The clips of `data` are those of the evaluation, whose fingerprint covers them."""
    name = EXPORT_STAGES[runtime]

    def work(inputs: Mapping[str, Ref], folder: Path) -> dict[str, Any]:
        from trimlingual.exports.target import Finished
        from trimlingual.stages.export import export

        model = inputs["model"]
        scores = inputs["evaluation"].folder if "evaluation" in inputs else None
        scored = find_artifact(scores) if scores else None
        if scores and scored and scored.inputs.get("model") != model.fingerprint:
            say(f"the scores in evaluations/{scores.name} are another model's: the card goes without them")
            scores = None
        clips = load_splits(data.folder).test.clips if scores else []
        return export(Finished(folder_of(model, recipe), recipe, scores, clips), runtime, folder)

    base = recipe.model.model_copy(
        update={"base": public_name(recipe.model.base)}
    )  # artifact.json stands in what ships
    # How the model is decoded stands in what ships; an evaluation covers it.
    decode = None if evaluation else recipe.decode
    settings = _settings(recipe, decode=decode) | {"model": base, "name": recipe.name}
    if runtime == "gguf" and recipe.export:
        settings["gguf"] = recipe.export.gguf
    folder = run_dir / name.replace(" ", "-")
    return Step(name, folder, settings, _inputs(model=model, evaluation=evaluation), work)


def report_step(recipe: Recipe, run_dir: Path, inputs: Sequence[Ref]) -> Step:
    """report.json, report.md, report.html of everything in the run folder."""

    def work(inputs: Mapping[str, Ref], folder: Path) -> dict[str, Any]:
        from trimlingual.report import write_report

        write_report(run_dir, folder)
        return {}

    roles = {str(ref.folder.relative_to(run_dir)): ref for ref in inputs}
    return Step("report", run_dir / "report", {"recipe": recipe.name}, roles, work, derived=True)


def folder_of(model: Ref, recipe: Recipe) -> ModelFolder:
    """A model with its lineage; the base model's starts under the recipe's name for it."""
    return ModelFolder(model.folder, read_lineage(model.folder, recipe.model.base))


def _made_for(recipe: Recipe) -> Shipped:
    return Shipped(recipe.task, recipe.decode, recipe.model.dtype)


def _settings(recipe: Recipe, **sections: Any) -> dict[str, Any]:
    """The part of the recipe that decides a model stage's output."""
    given = {name: section for name, section in sections.items() if section is not None}
    return {"model": recipe.model, "task": recipe.task, "seed": recipe.seed, **given}


def _deepspeed(train: TrainSettings | None) -> Ref | None:
    """DeepSpeed's own settings stand in a file of the user's."""
    return files_ref([train.deepspeed] if train and train.deepspeed else [])


def _inputs(**refs: Ref | None) -> dict[str, Ref]:
    return {role: ref for role, ref in refs.items() if ref is not None}


def _train_settings(recipe: Recipe, trained: TrainSettings | None, /, **sections: Any) -> dict[str, Any]:
    """As `_settings`; where the selection clips are translated on the way, how that is done decides too."""
    decoding = {"decode": recipe.decode} if trained and trained.selection_checks else {}
    return _settings(recipe, **sections, **decoding)


def _guide(train: TrainSettings | None, inputs: Mapping[str, Ref], run_dir: Path) -> Guide:
    from trimlingual.training.selection import Guide

    select = load_splits(inputs["data"].folder).select if train and train.selection_checks else None
    return Guide(select, inputs["teacher"].folder if "teacher" in inputs else None, run_dir / TEACHER_TOKENS)


def _training_data(recipe: Recipe, mixture: MixSettings, inputs: Mapping[str, Ref]) -> TrainingData:
    from trimlingual.models.inputs import TrainingData
    from trimlingual.stages.distill import mix, read_distilled

    pairs = read_distilled(inputs["distilled"].folder) if "distilled" in inputs else []
    return TrainingData(*mix(load_splits(inputs["data"].folder), pairs, mixture, recipe.task.target_languages))
