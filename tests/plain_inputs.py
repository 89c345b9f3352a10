"""What plain transformers is given for one clip: the processor's own chat, audio included."""

from __future__ import annotations

from typing import Any

import numpy as np

from trimlingual.exports.proof_script import model_inputs
from trimlingual.models.family import family_of, family_of_processor
from trimlingual.recipe import TaskSettings


def plain_inputs(processor: Any, task: TaskSettings, samples: np.ndarray, language: str) -> Any:
    """The arguments of the model's own forward and of `generate`, for samples (S,) at 16 kHz."""
    family = family_of_processor(processor)
    conversation = family.conversation(task.system_prompt, task.prompt_for(language))
    return model_inputs(processor, conversation, samples, family.chat_reads_audio)


def own_inputs(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of the collator, whole windows, as the model's own forward takes it: without a mask a family has chunks in a row."""
    if family_of(model).model_type != "voxtral":
        return batch
    rest = {name: tensor for name, tensor in batch.items() if name != "feature_attention_mask"}
    chunks = batch["input_features"].unflatten(-1, (-1, 3000)).transpose(1, 2)
    heard = batch["feature_attention_mask"].unflatten(-1, (-1, 3000))[..., 0].bool()
    return rest | {"input_features": chunks[heard]}
