"""Translate audio files with any model folder this package can load."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trimlingual.audio import DataError, describe_audio
from trimlingual.decode import translate_clips
from trimlingual.models import load_model, load_processor, pick_device, window_s
from trimlingual.recipe import Recipe
from trimlingual.sources import Clip


def translate_files(
    model_dir: Path, audio: Sequence[Path], languages: Sequence[str], recipe: Recipe, device: str = "auto"
) -> Iterator[dict[str, Any]]:
    """Yield one record a file and language: audio, language, text, truncated, and a warning where the audio looks wrong.

    What holds no speech (silent, too short, channels that cancel) is not given to the model: its text is empty.

    Raises DataError for files that cannot be read or are longer than the model's window, before anything is translated.
    """
    task = recipe.task.model_copy(update={"target_languages": list(languages)})
    for language in languages:
        task.language_name(language)
    processor = load_processor(model_dir)
    window = window_s(processor)
    heard = {str(path): describe_audio(path) for path in audio}
    clips = [Clip(name, Path(name), {}, None, found.duration_s, "") for name, found in heard.items()]
    too_long = [clip for clip in clips if clip.duration_s > window]
    if too_long:
        raise DataError(
            f"{len(too_long)} file(s) are longer than the model's window of {window:.0f} s: "
            f"{', '.join(f'{clip.id} ({clip.duration_s:.1f} s)' for clip in too_long[:5])}; split them first"
        )
    model = load_model(model_dir, recipe.model.dtype, pick_device(device))
    usable = [clip for clip in clips if not heard[clip.id].unusable]
    said = {(t.id, t.language): t for t in translate_clips(model, processor, task, usable, recipe.decode)}
    for clip in clips:
        warning = heard[clip.id].unusable or heard[clip.id].suspicious
        for language in languages:
            translation = said.get((clip.id, language))
            yield {
                "audio": clip.id,
                "language": language,
                "text": translation.hypothesis if translation else "",
                "truncated": bool(translation and translation.truncated),
                **({"warning": warning} if warning else {}),
            }
