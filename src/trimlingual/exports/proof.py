"""The proof of an export: a fresh process with plain transformers loads the folder whole and gives the recorded translations."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimlingual.data.audio import load_audio
from trimlingual.data.sources import Clip
from trimlingual.models.qwen2_audio import pick_device
from trimlingual.recipe import Recipe
from trimlingual.run.progress import say
from trimlingual.stages.evaluate import read_translations

NUM_CLIPS = 8  # compared, in every target language
ENOUGH = 0.95  # share of equal translations expected in 16 and in 4 bits, where near-ties fall either way; less is said
REFUSED = 0.8  # with fewer it is another model than the one that was scored


class ExportError(ValueError):
    """A folder that must not ship; the message says why."""


def prove_export(
    folder: Path, recipe: Recipe, evaluation_dir: Path | None, clips: Sequence[Clip], exact: bool
) -> dict[str, Any]:
    """Load `folder` in a fresh process; translate clips of the evaluation, if there is one, and compare with what is recorded.

    Answers that reached the bound on new tokens are not compared: plain `generate()` has another bound. Raises ExportError when a
    tensor is missing or too many, or when fewer translations are equal than all (`exact`) or 80 % (one may always differ).
    """
    recorded = _recorded(recipe, evaluation_dir, clips)
    with tempfile.TemporaryDirectory() as temporary:
        items = []
        for index, (clip, language, _) in enumerate(recorded):
            samples = Path(temporary) / f"{index}.npy"
            np.save(samples, load_audio(clip.audio))
            items.append({"samples": str(samples), "prompt": recipe.task.prompt_for(language)})
        request = {
            "folder": str(folder),
            "dtype": recipe.model.dtype,
            "device": str(pick_device(recipe.model.device)),
            "system_prompt": recipe.task.system_prompt,
            "items": items,
        }
        answer = _ask(request)
    wrong = {kind: names for kind, names in answer["keys"].items() if names}
    if wrong:
        shown = "; ".join(
            f"{len(names)} {kind.replace('_', ' ')}: {', '.join(names[:3])}" for kind, names in wrong.items()
        )
        raise ExportError(f"the weights in {folder} do not fit its config.json: {shown}")
    different = [
        {"id": clip.id, "language": language, "recorded": before, "exported": now}
        for (clip, language, before), now in zip(recorded, answer["said"])
        if before != now
    ]
    allowed = 0 if exact else max(1, int((1 - REFUSED) * len(recorded)))
    if len(different) > allowed:
        first = different[0]
        raise ExportError(
            f"{len(different)} of {len(recorded)} translations of the exported folder are not the recorded ones (allowed: {allowed}); "
            f"the first, {first['id']}: {first['exported']!r} instead of {first['recorded']!r}"
        )
    if len(different) > max(1, (1 - ENOUGH) * len(recorded)):
        say(
            f"  note: {len(different)} of {len(recorded)} translations differ from the recorded ones; at most 5 % were expected"
        )
    return {"runtime": "transformers", "loads_whole": True, "compared": len(recorded), "equal": len(recorded) - len(different),
            "different": different}  # fmt: skip


def _recorded(recipe: Recipe, evaluation_dir: Path | None, clips: Sequence[Clip]) -> list[tuple[Clip, str, str]]:
    """(clip, language, translation) of clips spread evenly over the evaluation."""
    if evaluation_dir is None:
        return []
    by_id, chosen = {clip.id: clip for clip in clips}, []
    for language in recipe.task.target_languages:
        rows = [
            row
            for row in read_translations(evaluation_dir, language)
            if not row.get("truncated") and row["id"] in by_id
        ]
        step = max(1, len(rows) // NUM_CLIPS)
        chosen += [(by_id[row["id"]], language, row["hypothesis"].strip()) for row in rows[::step][:NUM_CLIPS]]
    return chosen


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    script = Path(__file__).with_name("proof_script.py")
    # -P: the script's own folder is not on the path, so that this package's modules cannot be imported by chance
    done = subprocess.run(
        [sys.executable, "-P", str(script)], input=json.dumps(request), capture_output=True, text=True, encoding="utf-8"
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ExportError(f"plain transformers cannot load or run what was exported: {lines[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
