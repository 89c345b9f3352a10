"""The proof of an export: a fresh process with plain transformers loads the folder whole and gives the recorded translations."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binom
from transformers import AutoConfig

from trimlingual.data.audio import load_audio
from trimlingual.data.sources import Clip
from trimlingual.data.spread import spread
from trimlingual.evaluation.quality import corpus_score
from trimlingual.evaluation.results import read_translations
from trimlingual.exports.target import CONTEXT, ExportError
from trimlingual.models.family import family_of_folder
from trimlingual.models.loading import load_processor, pick_device
from trimlingual.recipe import Recipe
from trimlingual.recipe.languages import language

NUM_CLIPS = 8  # compared, in every target language
NEAR_TIE = 0.5  # difference of two logits in 16 bits, where they are rounded to an eighth of one and come out of rounded layers
DIFFERING = 0.05  # share of translations that may differ in 16 and in 4 bits for other reasons than a near-tie
CERTAINTY = 0.99  # with which a refused export is no longer of that share


def prove_export(
    folder: Path, recipe: Recipe, evaluation_dir: Path | None, clips: Sequence[Clip], exact: bool
) -> dict[str, Any]:
    """Load `folder` in a fresh process; translate clips of the evaluation, if there is one, and compare with what is recorded.

    Answers that reached the bound on new tokens are not compared: plain `generate()` has another bound. Raises ExportError when a
    tensor is missing or too many, or when more translations differ than `most_different` allows. In 16 and 4 bits (not `exact`) a
    translation whose first other token was a near-tie does not count: of a model that is unsure, as after a pruning that nothing has
    recovered yet, half of the translations may part so, and it is still the model that was scored.
    """
    recorded = recorded_translations(recipe, evaluation_dir, clips)
    asked = [(clip, code) for clip, code, _ in recorded]
    answer = translate_plainly(folder, recipe, asked, recorded=[text for *_, text in recorded])
    wrong = {kind: names for kind, names in answer["keys"].items() if names}
    if wrong:
        shown = "; ".join(
            f"{len(names)} {kind.replace('_', ' ')}: {', '.join(names[:3])}" for kind, names in wrong.items()
        )
        raise ExportError(f"the weights in {folder} do not fit its config.json: {shown}")
    different = [
        {"id": clip.id, "language": code, "recorded": before, "exported": now, "margin": round(margin, 3)}
        for (clip, code, before), now, margin in zip(recorded, answer["said"], answer["margins"], strict=True)
        if before != now
    ]
    allowed = most_different(len(recorded), exact)
    counted = [each for each in different if exact or abs(each["margin"]) > NEAR_TIE]  # below 0: it was not greedy
    if len(counted) > allowed:
        first = counted[0]
        raise ExportError(
            f"{len(counted)} of {len(recorded)} translations of the exported folder are not the recorded ones (allowed: {allowed}); "
            f"the first, {first['id']}: {first['exported']!r} instead of {first['recorded']!r}"
        )
    for each in different:
        each["margin"] = min(each["margin"], sys.float_info.max)  # JSON has no infinity
    return {"runtime": "transformers", "versions": answer["versions"], "dtype": recipe.model.dtype, "loads_whole": True,
            "compared": len(recorded), "equal": len(recorded) - len(different), "different": different,
            "scores": scores(recorded, answer["said"]), **{key: answer[key] for key in ("seconds_per_clip", "peak_bytes")}}  # fmt: skip


def most_different(compared: int, exact: bool, share: float = DIFFERING) -> int:
    """How many of `compared` translations may differ before an export is refused: none where arithmetic is `exact`.

    Elsewhere the promise is that at most a `share` differs, over many sentences. A few sentences cannot show that: of 8 one that
    differs is 12.5 %. So the bound is the 99th percentile of the binomial distribution with that share: an export that keeps the
    promise is refused less than once in a hundred times. With 5 % it is 2 of 8, 3 of 16, 6 of 40, 20 of 240. What is refused is
    another model than the one that was scored, not a near-tie too many. benchmarks/export.py measures the share itself.
    """
    return 0 if exact else int(binom.ppf(CERTAINTY, compared, share))


def translate_plainly(
    folder: Path,
    recipe: Recipe,
    asked: Sequence[tuple[Clip, str]],
    python: str = sys.executable,
    recorded: Sequence[str] = (),
) -> dict[str, Any]:
    """What plain transformers, in a fresh process of the interpreter `python`, makes of these clips in these languages.

    Returns `said` in the order of `asked`, the `keys` that loading missed or found too many, the `versions` of the libraries, the
    `seconds_per_clip` (None for no clips) and the `peak_bytes` of the GPU's memory or, on a CPU, of the process.
    Where `recorded` translations are given, `margins` say by how much (difference of logits) the model prefers its own answer where the
    two part.
    """
    return run_script("proof_script.py", "plain transformers", folder, recipe, asked, python, recorded)


def run_script(
    script: str,
    runtime: str,
    folder: Path,
    recipe: Recipe,
    asked: Sequence[tuple[Clip, str]],
    python: str,
    recorded: Sequence[str] = (),
) -> dict[str, Any]:
    """The answer of one of this folder's scripts, run by the interpreter `python`; ExportError, naming the runtime, if it fails."""
    family, task, processor = family_of_folder(folder), recipe.task, load_processor(folder)
    with tempfile.TemporaryDirectory() as temporary:
        items = []
        for index, (clip, code) in enumerate(asked):
            samples = Path(temporary) / f"{index}.npy"
            np.save(samples, family.fill_up(processor, load_audio(clip.audio)))
            conversation = family.conversation(task.system_prompt, task.prompt_for(code))
            items.append({"samples": str(samples), "conversation": conversation})
            if recorded:
                items[-1]["recorded"] = recorded[index]
        request = {
            "folder": str(folder),
            "dtype": recipe.model.dtype,
            "device": str(pick_device(recipe.model.device)),
            "model_class": family.model_class,
            "chat_reads_audio": family.chat_reads_audio,
            "max_new_tokens": recipe.decode.max_new_tokens,
            "context": min(CONTEXT, AutoConfig.from_pretrained(folder).text_config.max_position_embeddings),
            "items": items,
        }
        # -P: the script's own folder is not on the path, so that this package's modules cannot be imported by chance
        done = subprocess.run(
            [python, "-P", str(Path(__file__).with_name(script))],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        cause = re.search(
            r"\w+(?:Error|Exception): .+", done.stderr
        )  # the first: of several processes the one that broke
        raise ExportError(f"{runtime} cannot load or run what was exported: {cause[0] if cause else lines[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(recorded: Sequence[tuple[Clip, str, str]], said: Sequence[str], share: float, what: str) -> dict[str, Any]:
    """How a runtime of other roundings translates; ExportError, naming `what`, where more than the `share` promises differs."""
    different = [
        {"id": clip.id, "language": code, "recorded": before, "exported": now}
        for (clip, code, before), now in zip(recorded, said, strict=True)
        if before != now
    ]
    if len(different) > (allowed := most_different(len(recorded), exact=False, share=share)):
        first = different[0]
        raise ExportError(
            f"{len(different)} of {len(recorded)} translations by {what} are not the recorded ones (allowed: {allowed}); "
            f"the first, {first['id']}: {first['exported']!r} instead of {first['recorded']!r}"
        )
    counts = {"compared": len(recorded), "equal": len(recorded) - len(different), "different": different}
    return counts | {"scores": scores(recorded, said)}


def scores(recorded: Sequence[tuple[Clip, str, str]], said: Sequence[str]) -> dict[str, float]:
    """Each language's main metric of what a runtime said to the compared clips that have a reference; too few to rank models by."""
    texts: dict[str, tuple[list[str], list[str]]] = {}
    for (clip, code, _), text in zip(recorded, said, strict=True):
        if reference := clip.references.get(code):
            hypotheses, references = texts.setdefault(code, ([], []))
            hypotheses.append(text)
            references.append(reference)
    return {
        code: corpus_score(language(code).main_metric, hypotheses, references, code).value
        for code, (hypotheses, references) in texts.items()
    }


def recorded_translations(
    recipe: Recipe, evaluation_dir: Path | None, clips: Sequence[Clip]
) -> list[tuple[Clip, str, str]]:
    """(clip, language, translation) of clips spread evenly over the evaluation."""
    if evaluation_dir is None:
        return []
    by_id, chosen = {clip.id: clip for clip in clips}, []
    for code in recipe.task.target_languages:
        rows = [
            row for row in read_translations(evaluation_dir, code) if not row.get("truncated") and row["id"] in by_id
        ]
        chosen += [(by_id[row["id"]], code, row["hypothesis"].strip()) for row in spread(rows, NUM_CLIPS)]
    return chosen
