"""Token-level knowledge distillation (Hinton et al. 2015): the teacher's distribution at every answer token, as a training target.

The teacher reads every training example once, before the student trains: its most likely tokens and their probabilities are kept, which
is a few hundred bytes for a token, so that teacher and student never share a GPU's memory. What is left of the teacher's probability
counts as one further outcome, so the loss is the exact divergence between the two distributions over these outcomes.

Shapes: N answer tokens, V vocabulary, K tokens kept of each distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trimlingual.loss import answer_forward
from trimlingual.progress import progress
from trimlingual.prompts import Collator, Example

BATCH_CLIPS = 32  # examples the teacher reads at once
SMALLEST = 1e-6  # probability of what is not among the K tokens, at least


@dataclass(frozen=True)
class TeacherTokens:
    """Of one example: the teacher's most likely tokens at each answer position (N, K), and their log probabilities (N, K), float16."""

    ids: Tensor
    log_probs: Tensor


@torch.inference_mode()
def read_examples(
    teacher: Any, collator: Collator, examples: Sequence[Example], top_k: int, temperature: float, store: Path
) -> list[TeacherTokens]:
    """The teacher's distributions for every example, in order; kept in `store` (safetensors), and read from there if it is whole."""
    if store.is_file():
        return _read(store, len(examples))
    forward, device = answer_forward(teacher), next(teacher.parameters()).device
    order = sorted(range(len(examples)), key=lambda i: (examples[i].clip, i))  # a clip's examples together
    found: list[TeacherTokens | None] = [None] * len(examples)
    with progress("the teacher reads the training examples", len(examples)) as advance:
        for start in range(0, len(order), BATCH_CLIPS):
            chosen = order[start : start + BATCH_CLIPS]
            batch = collator([examples[i] for i in chosen])
            batch.pop("ids")
            counts = (batch["labels"][:, 1:] >= 0).sum(1).tolist()
            logits = forward(**{name: tensor.to(device) for name, tensor in batch.items()})["logits"]
            log_probs, ids = (logits / temperature).log_softmax(-1).topk(min(top_k, logits.shape[-1]), dim=-1)
            rows = zip(ids.int().cpu().split(counts), log_probs.half().cpu().split(counts))
            for i, (id_rows, probability_rows) in zip(chosen, rows):
                found[i] = TeacherTokens(id_rows.clone(), probability_rows.clone())
            advance(len(chosen))
    whole = [tokens for tokens in found if tokens is not None]
    _write(store, whole)
    return whole


def _write(store: Path, tokens: Sequence[TeacherTokens]) -> None:
    store.parent.mkdir(parents=True, exist_ok=True)
    partial = store.with_name(store.name + ".tmp")
    lengths = torch.tensor([len(one.ids) for one in tokens])
    ids, log_probs = torch.cat([one.ids for one in tokens]), torch.cat([one.log_probs for one in tokens])
    save_file({"lengths": lengths, "ids": ids, "log_probs": log_probs}, partial)
    partial.replace(store)


def _read(store: Path, count: int) -> list[TeacherTokens]:
    with safe_open(store, framework="pt") as file:
        lengths, ids, log_probs = (file.get_tensor(name) for name in ("lengths", "ids", "log_probs"))
    if len(lengths) != count:
        raise ValueError(f"{store} holds {len(lengths)} examples, not {count}; delete it and run the stage again")
    parts = zip(ids.split(lengths.tolist()), log_probs.split(lengths.tolist()))
    return [TeacherTokens(id_rows, rows) for id_rows, rows in parts]


def divergence(logits: Tensor, ids: Tensor, log_probs: Tensor, temperature: float) -> Tensor:
    """Sum over N of KL(teacher || student), in nats, times the square of the temperature (Hinton et al. 2015, section 2).

    `logits` (N, V) are the student's; `ids` and `log_probs` (N, K) the teacher's, at the same temperature.
    """
    theirs = log_probs.float()
    ours = (logits / temperature).log_softmax(-1).gather(1, ids.long())
    rest_theirs, rest_ours = _rest(theirs), _rest(ours)
    kept = (theirs.exp() * (theirs - ours)).sum(-1)
    rest = rest_theirs.exp() * (rest_theirs - rest_ours)
    return (kept + rest).sum() * temperature**2


def _rest(log_probs: Tensor) -> Tensor:
    """Log of the probability (N,) that is not in `log_probs` (N, K)."""
    return torch.log1p(-log_probs.exp().sum(-1).clamp(max=1 - SMALLEST))


def mixed_loss(
    logits: Tensor, targets: Tensor, teacher_ids: Tensor, teacher_log_probs: Tensor, weight: float, temperature: float
) -> Tensor:
    """Sum over N: `weight` times the divergence from the teacher, the rest of the weight on the cross-entropy of `targets` (N,)."""
    hard = nn.functional.cross_entropy(logits, targets, reduction="sum")
    return (1 - weight) * hard + weight * divergence(logits, teacher_ids, teacher_log_probs, temperature)
