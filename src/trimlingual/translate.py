"""Translate audio files with any model folder this package can load."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trimlingual.audio import SAMPLE_RATE, DataError, load_audio
from trimlingual.decode import translate_clips
from trimlingual.models import load_model, load_processor, pick_device, window_s
from trimlingual.recipe import Recipe
from trimlingual.sources import Clip


def translate_files(
    model_dir: Path, audio: Sequence[Path], languages: Sequence[str], recipe: Recipe, device: str = "auto"
) -> Iterator[dict[str, Any]]:
    """Yield one record a file and language: audio, language, text, truncated.

    Raises DataError for files that cannot be read or are longer than the model's window, before anything is translated.
    """
    task = recipe.task.model_copy(update={"target_languages": list(languages)})
    for language in languages:
        task.language_name(language)
    processor = load_processor(model_dir)
    window = window_s(processor)
    clips = [Clip(str(path), path, {}, None, len(load_audio(path)) / SAMPLE_RATE, "") for path in audio]
    too_long = [clip for clip in clips if clip.duration_s > window]
    if too_long:
        raise DataError(
            f"{len(too_long)} file(s) are longer than the model's window of {window:.0f} s: "
            f"{', '.join(f'{clip.id} ({clip.duration_s:.1f} s)' for clip in too_long[:5])}; split them first"
        )
    model = load_model(model_dir, recipe.model.dtype, pick_device(device))
    for translation in translate_clips(model, processor, task, clips, recipe.decode):
        yield {
            "audio": translation.id,
            "language": translation.language,
            "text": translation.hypothesis,
            "truncated": translation.truncated,
        }
