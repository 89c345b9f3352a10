"""Translate a split with a model, score the translations, measure the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trimlingual.data.sources import Clip
from trimlingual.data.splits import Split
from trimlingual.decoding.translate_clips import Translation, clips_at_once, translate_split
from trimlingual.evaluation.answers import strict, wrong_languages
from trimlingual.evaluation.cost import count_parameters, disk_bytes, peak_memory, speed
from trimlingual.evaluation.quality import (
    SentenceStatistics,
    bootstrap_score,
    comet,
    corpus_score,
    paired_bootstrap_ratio,
    sentence_statistics,
)
from trimlingual.evaluation.results import RESULT_FILE, read_result, read_translations, translations_file
from trimlingual.models.loading import load_model, load_processor, pick_device
from trimlingual.recipe import EvaluateSettings, SharedSettings, languages
from trimlingual.run.artifacts import SCRATCH, machine, write_json
from trimlingual.run.jsonl import write_jsonl
from trimlingual.run.lineage import ModelFolder, check_unseen
from trimlingual.run.processes import is_main_process

METRICS = ("bleu", "chrf", "chrfpp")


def evaluate(
    name: str,
    folder: ModelFolder,
    split: Split,
    shared: SharedSettings,
    settings: EvaluateSettings,
    baseline_dir: Path | None,
    out_dir: Path,
) -> dict[str, Any]:
    """Evaluate the model in `folder` on `split`; writes `translations.<language>.jsonl` and `result.json`.

    `baseline_dir` is an earlier evaluation on the same split: the share of its score that is kept, with a paired bootstrap interval,
    is part of the result. Raises LeakError when the model was trained on the split or chosen by it. The processes of a distributed
    run share the clips out; the main one scores and writes, the others return {}.
    """
    lineage, device = folder.lineage, pick_device(shared.model.device)
    check_unseen(lineage, split.name, [(clip.id, clip.audio_sha256) for clip in split.clips])
    with peak_memory(device):  # whose peak so far is in the record of every batch
        model = load_model(folder.path, shared.model.dtype, device, keep_packed=True)
        said = translate_split(
            model,
            load_processor(folder.path, shared.model.audio_padding),
            shared.task,
            split.clips,
            shared.decode,
            out_dir / SCRATCH / "translated",
            label=f"evaluating {name}",
        )
    if not is_main_process():
        return {}
    baseline = _read_baseline(baseline_dir, split) if baseline_dir else None
    scores = {
        language: _write_and_score(language, said.translations, split, settings, baseline, out_dir)
        for language in shared.task.target_languages
    }
    result = {
        "name": name,
        "params": count_parameters(model),
        "disk_bytes": disk_bytes(folder.path),
        "num_decoder_layers": len(lineage.layers["decoder"]),
        "removed_layers": lineage.removed("decoder"),
        "quantization": lineage.quantization,
        "split": {"name": split.name, "hash": split.hash, "num_clips": len(split.clips)},
        "languages": scores,
        "speed": {
            **_speed(said.translations, split.clips, said.seconds),
            "batch_size": clips_at_once(shared.decode, device),
            "num_processes": said.num_processes,
        },
        "peak_memory_bytes": said.peak_memory_bytes,
        "decode": shared.decode.model_dump(),
        "lineage": {key: value for key, value in asdict(lineage).items() if key != "seen"},
        "machine": machine(),
    }
    write_json(out_dir / RESULT_FILE, result)
    return {language: {m: round(of[m]["value"], 2) for m in METRICS} for language, of in scores.items()}


def _speed(translations: Sequence[Translation], clips: Sequence[Clip], seconds: float) -> dict[str, float]:
    """Seconds per translation, tokens per second, real-time factor, of one process; a clip counts once per target language."""
    duration_s = {clip.id: clip.duration_s for clip in clips}
    audio_s = sum(duration_s[translation.id] for translation in translations)
    return speed(len(translations), sum(t.num_tokens for t in translations), audio_s, seconds)


def _write_and_score(
    language: str,
    translations: Sequence[Translation],
    split: Split,
    settings: EvaluateSettings,
    baseline: dict[str, Any] | None,
    out_dir: Path,
) -> dict[str, Any]:
    """What the result says of one language; its translations are written beside it. ValueError if no clip has a reference in it."""
    rows = [translation for translation in translations if translation.language == language]
    clips = [clip for clip in split.clips if language in clip.references]
    if not clips:
        raise ValueError(
            f"no clip of split {split.name!r} has a reference in {language!r}; take it out of task.target_languages"
        )
    _write_translations(out_dir, language, rows, clips)
    hypotheses = [row.hypothesis for row in rows]
    references = [clip.references[language] for clip in clips]
    scores: dict[str, Any] = {}
    for metric in METRICS:
        score = corpus_score(metric, hypotheses, references, language)
        scores[metric] = {"value": score.value, "signature": score.signature}
    scores["comet"] = {}
    for comet_model in settings.comet:
        sources = [clip.source or "" for clip in clips]
        scores["comet"][comet_model] = comet(comet_model, sources, references, hypotheses)
    main = languages.language(language).main_metric
    ours = sentence_statistics(main, hypotheses, references, language)
    interval = bootstrap_score(ours, settings.bootstrap_samples)
    scores[main] |= {"low": interval.low, "high": interval.high, "confidence": interval.confidence}
    wrong = wrong_languages(hypotheses, language)
    score = corpus_score(main, strict(hypotheses, wrong), references, language)
    scores |= {
        "wrong_language": {"count": sum(wrong), "share": sum(wrong) / len(wrong)},
        "strict": {"metric": main, "value": score.value, "signature": score.signature},
        "num_clips": len(rows),
        "num_truncated": sum(row.truncated for row in rows),
        "main_metric": main,
        "retained": None,
    }
    if baseline:
        theirs = sentence_statistics(main, baseline["hypotheses"][language], references, language)
        scores["retained"] = _retained(ours, theirs, baseline["name"], settings.bootstrap_samples)
    return scores


def _retained(
    ours: SentenceStatistics, theirs: SentenceStatistics, baseline: str, num_samples: int
) -> dict[str, Any] | None:
    """Share of the baseline's score that is kept; None when the baseline scores 0 (an untrained model in a rehearsal)."""
    if theirs.score() == 0:
        return None
    kept = paired_bootstrap_ratio(ours, theirs, num_samples)
    return {
        "baseline": baseline,
        "metric": ours.metric,
        "ratio": kept.value,
        "low": kept.low,
        "high": kept.high,
        "confidence": kept.confidence,
    }


def _read_baseline(folder: Path, split: Split) -> dict[str, Any]:
    result = read_result(folder)
    if result["split"]["hash"] != split.hash:
        raise ValueError(
            f"the baseline {folder} was evaluated on split {result['split']['hash']}, not on {split.hash}; evaluate it again"
        )
    hypotheses = {
        language: [row["hypothesis"] for row in read_translations(folder, language)] for language in result["languages"]
    }
    return {"name": result["name"], "hypotheses": hypotheses}


def _write_translations(out_dir: Path, language: str, rows: Sequence[Translation], clips: Sequence[Clip]) -> None:
    records = (
        {
            "id": clip.id,
            "hypothesis": row.hypothesis,
            "reference": clip.references[language],
            "source": clip.source,
            "duration_s": clip.duration_s,
            "num_tokens": row.num_tokens,
            "truncated": row.truncated,
        }
        for clip, row in zip(clips, rows)
    )
    write_jsonl(translations_file(out_dir, language), records)
