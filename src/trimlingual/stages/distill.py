"""Sequence-level knowledge distillation (Kim & Rush 2016): the teacher's translations as training data, filtered and mixed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trimlingual.data.sources import Clip
from trimlingual.data.splits import DataSplits
from trimlingual.decoding.translate_clips import Translation, translate_split
from trimlingual.evaluation.answers import has_repetition_loop, is_wrong_language
from trimlingual.models.inputs import Example
from trimlingual.models.loading import load_model, load_processor, pick_device
from trimlingual.models.random_weights import RANDOM
from trimlingual.recipe import DistillSettings, MixSettings, SharedSettings
from trimlingual.run.artifacts import SCRATCH
from trimlingual.run.jsonl import write_jsonl
from trimlingual.run.lineage import read_lineage
from trimlingual.run.processes import is_main_process
from trimlingual.run.records import read_records

DISTILLED_FILE = "distilled.jsonl"
TRANSLATIONS_FILE = "translations.jsonl"  # everything the teacher said, kept or not
DAMAGED = "run the distill stage again with --force"
REASONS = ("empty", "runaway", "repetition", "language", "duplicate")


class DistillError(ValueError):
    """Distilled data that cannot be read."""


def distill(
    teacher_dir: Path,
    clips: Sequence[Clip],
    shared: SharedSettings,
    settings: DistillSettings,
    out_dir: Path,
) -> dict[str, Any]:
    """Translate the clips with the teacher, keep what is fit to learn from, and write `distilled.jsonl`.

    Goes on from the batches that are on disk. Returns how many were kept and dropped, by language and reason. In a rehearsal, whose
    teacher says nothing fit to learn from, references stand in for what is dropped, so that later stages see as much data. The
    processes of a distributed run share the clips out; the main one filters and writes, the others return {}.
    """
    rehearsal = read_lineage(teacher_dir).base.startswith(RANDOM)
    model = load_model(teacher_dir, shared.model.dtype, pick_device(shared.model.device), keep_packed=True)
    translations = translate_split(
        model,
        load_processor(teacher_dir, shared.model.audio_padding),
        shared.task,
        clips,
        shared.decode,
        out_dir / SCRATCH / "translated",
        label="teacher translates",
    ).translations
    if not is_main_process():
        return {}
    write_jsonl(out_dir / TRANSLATIONS_FILE, map(asdict, translations))
    references = {clip.id: clip.references for clip in clips}
    counts = {
        language: Counter({reason: 0 for reason in ("kept", *REASONS)}) for language in shared.task.target_languages
    }
    records = []
    for translation in translations:
        gold = references[translation.id].get(translation.language, "")
        reason = reject(translation, gold, settings)
        counts[translation.language][reason or "kept"] += 1
        text = gold if rehearsal and reason else translation.hypothesis
        if reason is None or (rehearsal and gold):
            records.append({"id": translation.id, "language": translation.language, "text": text})
    if not records:
        why = [f"{code}: {count} {reason}" for code, of in counts.items() for reason, count in of.items() if count]
        raise ValueError(f"no teacher translation is fit to learn from ({', '.join(why)}); look at {TRANSLATIONS_FILE}")
    write_jsonl(out_dir / DISTILLED_FILE, records)
    return {
        "counts": {language: dict(counter) for language, counter in counts.items()},
        "decode": shared.decode.model_dump(),
    }


def reject(translation: Translation, gold: str, settings: DistillSettings) -> str | None:
    """Why a translation is not fit to learn from (one of REASONS), or None."""
    text = translation.hypothesis
    if not text:
        return "empty"
    if translation.truncated:
        return "runaway"
    if has_repetition_loop(text, translation.language, settings.max_repeats):
        return "repetition"
    if is_wrong_language(text, translation.language):
        return "language"
    if settings.drop_duplicates and text == gold:
        return "duplicate"
    return None


def read_distilled(folder: Path) -> list[dict[str, str]]:
    """Records (id, language, text) of a distilled data set."""
    return read_records(folder / DISTILLED_FILE, dict[str, str], DistillError, DAMAGED, ("id", "language", "text"))


def mix(
    splits: DataSplits, distilled: Sequence[dict[str, str]], mixture: MixSettings, languages: Sequence[str]
) -> tuple[list[Clip], list[Example]]:
    """Clips and examples of one epoch: gold, distilled and out-of-domain, each repeated as the mixture says.

    Out-of-domain clips lend whatever target languages they have a reference for. Clips of a split that is not used are left out.
    """
    clips: list[Clip] = []
    examples: list[Example] = []
    for split, times, pairs in (
        (splits.train, (mixture.gold, mixture.distilled), distilled),
        (splits.out_of_domain, (mixture.out_of_domain, mixture.distilled_out_of_domain), distilled),
    ):
        if split is None or not any(times):
            continue
        index = {clip.id: len(clips) + i for i, clip in enumerate(split.clips)}
        gold = [
            Example(index[clip.id], clip.id, language, clip.references[language])
            for clip in split.clips
            for language in languages
            if language in clip.references
        ]
        taught = [Example(index[r["id"]], r["id"], r["language"], r["text"]) for r in pairs if r["id"] in index]
        examples += gold * times[0] + taught * times[1]
        clips += split.clips
    return clips, examples
