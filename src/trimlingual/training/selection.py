"""Training that knows when it gets worse: the selection clips are translated as it goes on, and the best weights are kept.

A small in-domain set is soon learned by heart, and a rate that suits one base ruins another. The loss on the training clips tells
neither; the translation score of other clips does. The weights that training starts from are scored too, so what comes out is never
worse on these clips than what went in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from trimlingual.data.splits import Split
from trimlingual.decoding.translate_clips import translate_clips
from trimlingual.evaluation.quality import Interval, corpus_score, paired_bootstrap_difference, sentence_statistics
from trimlingual.models.loading import free_memory
from trimlingual.quantization.straight_through import as_it_ships
from trimlingual.recipe import SharedSettings, languages
from trimlingual.run.artifacts import append_jsonl, put_in_place, read_journal
from trimlingual.run.processes import gather, is_main_process, num_processes, process_index, wait_for_everyone
from trimlingual.run.progress import say

SCORES_FILE = "selection.jsonl"
BEST_FILE = "best.safetensors"


@dataclass(frozen=True)
class Guide:
    """What training looks at beside its examples: clips to choose the best weights by, and the teacher whose tokens it learns.

    `reading` is where stages that learn from the same teacher leave to each other what it read.
    """

    select: Split | None = None
    teacher_dir: Path | None = None
    reading: Path | None = None


UNGUIDED = Guide()


class KeepBest(TrainerCallback):
    """Scores the selection clips before the first step and `times` times after, evenly, and keeps the best of the trained weights.

    Every score is on disk at once, and so are the weights of the best: a restart repeats none. All processes share the clips.
    """

    def __init__(
        self,
        model: Any,
        trained: Any,
        processor: Any,
        shared: SharedSettings,
        select: Split,
        times: int,
        work_dir: Path,
    ):
        self.model, self.trained, self.processor = model, trained, processor
        self.task, self.decode = shared.task, shared.decode
        self.clips, self.times, self.work_dir = select.clips, times, work_dir
        known = read_journal(work_dir / SCORES_FILE) if is_main_process() else []
        self.scores: list[dict[str, Any]] = gather(known)[0]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = {state.max_steps * number // self.times for number in range(1, self.times + 1)}
        if state.global_step == 0:
            self._look(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self._look(state.global_step)

    @property
    def best(self) -> dict[str, Any]:
        """The record of the best score; of equal ones the first."""
        return max(self.scores, key=lambda record: record["score"])

    def finish(self) -> dict[str, Any]:
        """Put the best weights back in place, and say which they are. Returns what the artefact remembers.

        `gain`: what they have over those before training, points by language with a paired 95 % interval over the clips.
        """
        best, last = self.best, self.scores[-1]
        gains = self._gains()
        if best["step"] != last["step"]:
            wait_for_everyone()
            stored = load_file(self.work_dir / BEST_FILE)
            with torch.no_grad():
                for name, parameter in self._trained_weights().items():
                    parameter.copy_(stored[name])
        if best["step"] == 0:
            say(
                f"WARNING: training made the model worse on the selection clips ({last['score']:.2f} after it, {best['score']:.2f} "
                "before), so the weights it started from are kept: lower learning_rate, train for fewer epochs, or add data"
            )
        else:
            say(f"  the weights after step {best['step']} are kept: {best['score']:.2f} on the selection clips")
            if gains and all(gain.low <= 0 for gain in gains.values()):
                found = ", ".join(f"{code} {g.value:+.2f} [{g.low:+.2f}, {g.high:+.2f}]" for code, g in gains.items())
                say(
                    f"WARNING: {len(self.clips)} selection clips cannot tell that training made the model better ({found} points): "
                    "put more of them into data.select to know"
                )
        kept = ({key: value for key, value in record.items() if key != "said"} for record in self.scores)
        return {
            "scores": list(kept),
            "best_step": best["step"],
            "gain": {code: asdict(gain) for code, gain in gains.items()},
        }

    def _gains(self) -> dict[str, Interval]:
        """By language, the best weights' score less that before training, on resampled clips; nothing if these are the best."""
        before, after = self.scores[0].get("said"), self.best.get("said")
        if not before or not after or self.best is self.scores[0]:
            return {}
        found = {}
        for language in self.task.target_languages:
            metric = languages.language(language).main_metric
            ours, theirs = (
                sentence_statistics(metric, *self._pairs(said, language), language) for said in (after, before)
            )
            found[language], _ = paired_bootstrap_difference(ours, theirs)
        return found

    def _look(self, step: int) -> None:
        if any(record["step"] == step for record in self.scores):
            return
        said = self._translations()
        by_language = self._score(said)
        record: dict[str, Any] = {"step": step, "score": mean(by_language.values()), "scores": by_language}
        better = not self.scores or record["score"] > self.best["score"]
        if better:
            record["said"] = said
        self.scores.append(record)
        say(f"  step {step}: {record['score']:.2f} on the selection clips")
        if is_main_process():
            if better:
                weights = {name: weight.detach().cpu().contiguous() for name, weight in self._trained_weights().items()}
                partial = self.work_dir / (BEST_FILE + ".tmp")
                self.work_dir.mkdir(parents=True, exist_ok=True)
                save_file(weights, partial)
                put_in_place(partial, self.work_dir / BEST_FILE)
            append_jsonl(self.work_dir / SCORES_FILE, record)
        wait_for_everyone()

    def _trained_weights(self) -> dict[str, Tensor]:
        """What training changes: of tied weights one, of a LoRA model the adapter."""
        return {name: weight for name, weight in self.trained.named_parameters() if weight.requires_grad}

    def _translations(self) -> dict[str, dict[str, str]]:
        """By language and clip."""
        self.trained.eval()
        for module in self.trained.modules():
            # bitsandbytes' 4-bit layer in eval mode on a CPU lays its weight out anew, for good, and has no gradient after that.
            module.training = hasattr(module, "support_avx512bf16_for_cpu")
        mine = self.clips[process_index() :: num_processes()]
        with as_it_ships(self.model):
            said = translate_clips(self.model, self.processor, self.task, mine, self.decode, label="selection clips")
        self.trained.train()
        free_memory()  # decoding leaves its memory and CUDA graphs, and training needs the room now
        found: dict[str, dict[str, str]] = {language: {} for language in self.task.target_languages}
        for translation in (t for part in gather(said) for t in part):
            found[translation.language][translation.id] = translation.hypothesis
        return found

    def _score(self, said: dict[str, dict[str, str]]) -> dict[str, float]:
        """Main metric by language, 0..100."""
        return {
            language: corpus_score(
                languages.language(language).main_metric, *self._pairs(said, language), language
            ).value
            for language in self.task.target_languages
        }

    def _pairs(self, said: dict[str, dict[str, str]], language: str) -> tuple[Sequence[str], Sequence[str]]:
        chosen = [clip for clip in self.clips if language in clip.references]
        return [said[language][clip.id] for clip in chosen], [clip.references[language] for clip in chosen]
