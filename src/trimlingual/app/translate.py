"""Translate audio files with any model folder this package can load."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from trimlingual.data.audio import DataError, describe_audio
from trimlingual.data.sources import Clip
from trimlingual.decoding.translate_clips import translate_clips
from trimlingual.exports.shipped import SHIPPED_FILE, Shipped, read_shipped
from trimlingual.models.family import family_of_processor
from trimlingual.models.folders import check_folder
from trimlingual.models.loading import load_model, load_processor, pick_device, resolve_base
from trimlingual.recipe import Recipe, load_recipe
from trimlingual.run.progress import say

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".au")


def translate_files(
    model_name: str | Path,
    audio: Sequence[Path],
    languages: Sequence[str],
    recipe: Recipe | None = None,
    device: str = "auto",
) -> Iterator[dict[str, Any]]:
    """Yield one record a file and language: audio, language, text, truncated, and a warning where the audio looks wrong.

    What holds no speech (silent, too short, channels that cancel) is not given to the model: its text is empty.

    `model_name` is a folder, a Hub id or `builtin:mini`; `audio` holds files, or folders whose audio files are all translated. Prompt,
    decoding settings and dtype are those of `recipe`; by default those that stand in the model's folder, else the published ones.

    Raises ModelError for what is no usable model, and before anything is translated DataError
    for files that cannot be read or are longer than the model's window.
    """
    model_dir = resolve_base(str(model_name))
    check_folder(model_dir, "translate")
    settings = _settings(model_dir, recipe, pick_device(device))
    if other := [code for code in languages if code not in settings.task.target_languages]:
        say(f"note: this model was made for {', '.join(settings.task.target_languages)}, not for {', '.join(other)}")
    task = settings.task.model_copy(update={"target_languages": list(languages)})
    for language in languages:
        task.language_name(language)
    audio = _files(audio)
    processor = load_processor(model_dir)
    window = family_of_processor(processor).window_s(processor)
    heard = {str(path): describe_audio(path) for path in audio}
    clips = [Clip(name, Path(name), {}, None, found.duration_s, "") for name, found in heard.items()]
    too_long = [clip for clip in clips if clip.duration_s > window]
    if too_long:
        raise DataError(
            f"{len(too_long)} file(s) are longer than the model's window of {window:.0f} s: "
            f"{', '.join(f'{clip.id} ({clip.duration_s:.1f} s)' for clip in too_long[:5])}; split them first"
        )
    model = load_model(model_dir, settings.dtype, pick_device(device))
    usable = [clip for clip in clips if not heard[clip.id].unusable]
    said = {(t.id, t.language): t for t in translate_clips(model, processor, task, usable, settings.decode)}
    for clip in clips:
        unusable, suspicious = heard[clip.id].unusable, heard[clip.id].suspicious
        warning = (
            f"not translated: the recording {unusable}" if unusable else suspicious and f"the recording {suspicious}"
        )
        for language in languages:
            translation = said.get((clip.id, language))
            yield {
                "audio": clip.id,
                "language": language,
                "text": translation.hypothesis if translation else "",
                "truncated": bool(translation and translation.truncated),
                **({"warning": warning} if warning else {}),
            }


def _settings(folder: Path, recipe: Recipe | None, device: torch.device) -> Shipped:
    if recipe is None and (shipped := read_shipped(folder)):
        return shipped
    if recipe is not None:
        return Shipped(recipe.task, recipe.decode, recipe.model.dtype)
    mini = load_recipe("mini")  # the published prompt
    if folder != resolve_base(mini.model.base):
        say(
            f"note: {folder} has no {SHIPPED_FILE}, which says how a model is asked: it is asked {mini.task.prompt!r}; "
            "--recipe gives another prompt and other decoding settings"
        )
    return Shipped(mini.task, mini.decode, "float32" if device.type == "cpu" else "bfloat16")


def _files(paths: Sequence[Path]) -> list[Path]:
    """The files, and of a folder those in it with an audio file's name; DataError where it has none."""
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(each for each in path.iterdir() if each.is_file() and each.suffix.lower() in SUFFIXES)
        if not inside:
            raise DataError(f"{path} is a folder without audio files ({', '.join(SUFFIXES)})")
        found += inside
    return found
