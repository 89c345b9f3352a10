"""What an export is made of, and what is known of it afterwards.

A target is one file of this folder, named as the runtime it is for. It has `problems(recipe, config, quantization)`, which yields what
speaks against it before anything runs (the base model's configuration, None where it is not at hand; what is quantised and how, as a
lineage has it), and `write(finished, out_dir)`, which returns an Outcome for each file or folder that can be used by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from trimlingual.data.sources import Clip
from trimlingual.models.family import family_of_processor
from trimlingual.models.loading import load_processor
from trimlingual.recipe import Recipe, Runtime
from trimlingual.run.lineage import ModelFolder

CONTEXT = 4096  # more than a clip of 30 s (750 states at most) and its translation ever take


class ExportError(ValueError):
    """A model that must not or cannot ship for a runtime; the message says why."""


@dataclass(frozen=True)
class Finished:
    """The model that ships. Recorded translations come from `evaluation_dir` if there is one, their audio from `clips`."""

    model: ModelFolder
    recipe: Recipe
    evaluation_dir: Path | None = None
    clips: Sequence[Clip] = ()

    def check_padding(self) -> None:
        """ExportError where the recipe asks for another padding of audio than the model's folder says it was made with."""
        asked = self.recipe.model.audio_padding
        processor = load_processor(self.model.path)
        hears = family_of_processor(processor).hears_padding(processor)
        if asked and hears != (asked == "window"):
            raise ExportError(
                f"model.audio_padding is {asked}, but {self.model.path} was made with {'window' if hears else 'mask'}; "
                "train it with this setting (finetune, recover), or export another model (--model)"
            )

    @property
    def context(self) -> int:
        """Tokens of a clip, its prompt and its answer that a runtime is to have room for."""
        most = AutoConfig.from_pretrained(self.model.path).text_config.max_position_embeddings
        return min(most, CONTEXT)

    @property
    def is_random(self) -> bool:
        """A rehearsal: what it translates proves nothing."""
        return self.model.lineage.base.startswith("random:")


@dataclass(frozen=True)
class Outcome:
    """One thing that ships. `proof` is what its runtime made of it; without one, `unproven` says why."""

    runtime: Runtime
    format: str  # of the decoder's weights: bfloat16, nf4, int4, ...
    disk_bytes: int
    proof: dict[str, Any] | None = None
    unproven: str = ""


def target(runtime: Runtime) -> Any:
    """The module that writes for a runtime."""
    return import_module(f"trimlingual.exports.{runtime}")
