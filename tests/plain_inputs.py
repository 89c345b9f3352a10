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
    """A batch of the collator, whole windows, as the model's own forward takes it: of families with chunks these in a row."""
    name = family_of(model).model_type
    if name == "qwen2_audio":
        return batch
    rest = {key: tensor for key, tensor in batch.items() if key not in ("input_features", "feature_attention_mask")}
    frames = 2 * model.config.audio_config.max_source_positions
    chunks = batch["input_features"].unflatten(-1, (-1, frames)).transpose(1, 2)
    masks = batch["feature_attention_mask"].unflatten(-1, (-1, frames))
    heard = masks[..., 0].bool()
    own_mask = {"input_features_mask": masks[heard]} if name == "audioflamingo3" else {}
    return rest | {"input_features": chunks[heard]} | own_mask
