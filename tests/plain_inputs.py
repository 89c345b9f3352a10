"""What plain transformers is given for one clip: the processor's own chat, audio included."""

from __future__ import annotations

from typing import Any

import numpy as np

from trimlingual.exports.proof_script import model_inputs
from trimlingual.models.family import family_of_processor
from trimlingual.recipe import TaskSettings


def plain_inputs(processor: Any, task: TaskSettings, samples: np.ndarray, language: str) -> Any:
    """The arguments of the model's own forward and of `generate`, for samples (S,) at 16 kHz."""
    family = family_of_processor(processor)
    conversation = family.conversation(task.system_prompt, task.prompt_for(language))
    return model_inputs(processor, conversation, samples, family.chat_reads_audio)
