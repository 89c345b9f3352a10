"""Loss on the answer tokens, for training and as a measure.

Shapes: B batch, T tokens, F audio states of a clip, A tower width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimlingual.models.family import family_of
from trimlingual.models.inputs import IGNORED, Collator, Example
from trimlingual.models.tree import audio_token_id, embed, lm_head, text_decoder, unwrap
from trimlingual.recipe import TokenDistillation

SMALLEST_REST = 1e-6  # probability of what is not among the teacher's tokens, at least: its logarithm is taken


def answer_forward(model: Any, distillation: TokenDistillation | None = None) -> Any:
    """A `forward` for training that computes only what is needed: logits at answer positions, loss summed over answer tokens.

    It takes log-mels (`input_features`, `feature_attention_mask`) or, when the tower is frozen, its stored output
    (`audio_states` (B, F_max, A), `audio_lengths` (B,)). The loss is the sum over answer tokens divided by `num_items_in_batch`,
    so that gradient accumulation weighs every token alike. With `distillation` part of the weight is on the divergence from the
    teacher's distributions, which the batch then holds (`teacher_ids`, `teacher_log_probs`, both (answer tokens, K)). Set as the
    instance's `forward` so that DDP, FSDP and PEFT, which call the module, still see it.
    """

    def forward(
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        audio_states: Tensor | None = None,
        audio_lengths: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        teacher_ids: Tensor | None = None,
        teacher_log_probs: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """So many parameters because the Trainer gives a batch by the names of its tensors."""
        family = family_of(model)
        if audio_states is None:
            assert input_features is not None
            assert feature_attention_mask is not None
            audio_states = family.audio_states(model, input_features, feature_attention_mask)
            audio_lengths = family.num_states(feature_attention_mask.sum(-1))
        assert audio_lengths is not None
        decoder = text_decoder(model)
        embeds = embed(model, input_ids)
        # Under FSDP the weights are not kept in the dtype of the embeddings.
        projected = family.project(model, audio_states.to(embeds.dtype))
        valid = torch.arange(projected.shape[1], device=projected.device)[None, :] < audio_lengths[:, None]
        is_audio = (input_ids == audio_token_id(unwrap(model).config))[..., None]
        embeds = embeds.masked_scatter(is_audio, projected[valid].to(embeds.dtype))
        hidden = decoder(inputs_embeds=embeds, attention_mask=attention_mask, use_cache=False).last_hidden_state
        targets = labels[:, 1:]
        answer = targets != IGNORED
        logits = lm_head(model)(hidden[:, :-1][answer]).float()
        total = nn.functional.cross_entropy(logits, targets[answer], reduction="sum")
        if distillation:
            assert teacher_ids is not None
            assert teacher_log_probs is not None
            soft = divergence(logits, teacher_ids, teacher_log_probs, distillation.temperature)
            total = (1 - distillation.weight) * total + distillation.weight * soft
        count = answer.sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / count, "logits": logits}

    return forward


def divergence(logits: Tensor, ids: Tensor, log_probs: Tensor, temperature: float) -> Tensor:
    """Sum over N of KL(teacher || student), in nats, times the square of the temperature (Hinton et al. 2015, section 2).

    `logits` (N, V) are the student's; `ids` and `log_probs` (N, K) the teacher's most likely tokens, at the same temperature. What is
    left of the teacher's probability counts as one further outcome.
    """
    theirs = log_probs.float()
    ours = (logits / temperature).log_softmax(-1).gather(1, ids.long())
    rest_theirs, rest_ours = _rest(theirs), _rest(ours)
    kept = (theirs.exp() * (theirs - ours)).sum(-1)
    return (kept + rest_theirs.exp() * (rest_theirs - rest_ours)).sum() * temperature**2


def _rest(log_probs: Tensor) -> Tensor:
    """Log of the probability (N,) that is not in `log_probs` (N, K)."""
    return torch.log1p(-log_probs.exp().sum(-1).clamp(max=1 - SMALLEST_REST))


@torch.inference_mode()
def answer_logits(model: Any, collator: Collator, examples: Sequence[Example], batch_size: int) -> tuple[float, Tensor]:
    """Teacher-forced mean loss (nats a token) and the logits (tokens, V; float32, CPU) at all answer positions."""
    forward = answer_forward(model)
    device = next(unwrap(model).parameters()).device
    total, logits = 0.0, []
    for start in range(0, len(examples), batch_size):
        batch = collator(examples[start : start + batch_size])
        batch.pop("ids")
        output = forward(**{name: tensor.to(device) for name, tensor in batch.items()}, num_items_in_batch=1)
        total += output["loss"].item()
        logits.append(output["logits"].cpu())
    every = torch.cat(logits)
    return total / len(every), every
