"""Token-level knowledge distillation (Hinton et al. 2015): the teacher's distribution at every answer token, as a training target.

The teacher reads every training example once, before the student trains: its most likely tokens and their probabilities are kept, which
is a few hundred bytes for a token, so that teacher and student never share a GPU's memory. What is left of the teacher's probability
counts as one further outcome, so the loss (`loss.divergence`) is the exact one over these outcomes.

Shapes: N answer tokens, K tokens kept of each distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimlingual.decoding.translate_clips import split_on_oom
from trimlingual.models.inputs import Collator, Example
from trimlingual.models.loading import free_memory
from trimlingual.recipe import TokenDistillation
from trimlingual.run.artifacts import put_in_place
from trimlingual.run.processes import is_main_process, wait_for_everyone
from trimlingual.run.progress import progress
from trimlingual.training.ahead import prepared_ahead
from trimlingual.training.loss import answer_forward

BATCH = 128  # examples the teacher reads at once; fewer where the GPU's memory is not enough


TeacherTokens = tuple[Tensor, Tensor]
"""Of one example: the teacher's most likely tokens at each answer position, (N, K), and their log probabilities (N, K), float16."""


def teacher_tokens(
    load_teacher: Callable[[], Any],
    collator: Collator,
    examples: Sequence[Example],
    settings: TokenDistillation,
    store: Path,
    num_workers: int = 0,
) -> dict[Example, TeacherTokens]:
    """The teacher's distribution at every answer token of every example.

    The main process loads the teacher and writes `store` (safetensors), whole or not at all; every process reads it, and so does a
    restart, which needs no teacher any more. `num_workers` processes load the audio and prepare the batches.
    """
    if is_main_process() and not store.is_file():
        read = read_examples(load_teacher(), collator, examples, settings.top_k, settings.temperature, num_workers)
        _write(store, read)
        free_memory()
    wait_for_everyone()
    return dict(zip(examples, _read(store, len(examples))))


def _batch(collator: Collator, examples: Sequence[Example], chosen: Sequence[int]) -> dict[str, Any]:
    batch = collator([examples[i] for i in chosen])
    batch.pop("ids")
    return batch


@torch.inference_mode()
def read_examples(
    teacher: Any,
    collator: Collator,
    examples: Sequence[Example],
    top_k: int,
    temperature: float,
    num_workers: int = 0,
) -> list[TeacherTokens]:
    """The teacher's distributions for every example, in order."""
    forward, device = answer_forward(teacher), next(teacher.parameters()).device
    prepare = partial(_batch, collator, examples)

    def read(whole: dict[str, Any], chosen: Sequence[int]) -> list[TeacherTokens]:
        # where memory is not enough for the whole batch, its parts are prepared again
        batch = whole if len(whole["labels"]) == len(chosen) else prepare(chosen)
        counts = (batch["labels"][:, 1:] >= 0).sum(1).tolist()
        logits = forward(**{name: tensor.to(device) for name, tensor in batch.items()})["logits"]
        log_probs, ids = (logits / temperature).log_softmax(-1).topk(min(top_k, logits.shape[-1]), dim=-1)
        rows = zip(ids.int().cpu().split(counts), log_probs.half().cpu().split(counts))
        return [(id_rows.clone(), probability_rows.clone()) for id_rows, probability_rows in rows]

    order = sorted(range(len(examples)), key=lambda i: (examples[i].clip, i))  # a clip's examples together
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    found: list[TeacherTokens | None] = [None] * len(examples)
    with (
        progress("the teacher reads the training examples", len(examples)) as advance,
        closing(prepared_ahead(prepare, batches, num_workers)) as prepared,
    ):
        for chosen, batch in zip(batches, prepared):
            rows = split_on_oom(partial(read, batch), chosen)
            for i, tokens in zip(chosen, rows):
                found[i] = tokens
            advance(len(chosen))
    return [tokens for tokens in found if tokens is not None]


def _write(store: Path, tokens: Sequence[TeacherTokens]) -> None:
    store.parent.mkdir(parents=True, exist_ok=True)
    partial = store.with_name(store.name + ".tmp")
    lengths = torch.tensor([len(ids) for ids, _ in tokens])
    ids, log_probs = (torch.cat(list(part)) for part in zip(*tokens))
    save_file({"lengths": lengths, "ids": ids, "log_probs": log_probs}, partial)
    put_in_place(partial, store)


def _read(store: Path, count: int) -> list[TeacherTokens]:
    with safe_open(store, framework="pt") as file:
        lengths, ids, log_probs = (file.get_tensor(name) for name in ("lengths", "ids", "log_probs"))
    if len(lengths) != count:
        raise ValueError(f"{store} holds {len(lengths)} examples, not {count}; delete it and run the stage again")
    return list(zip(ids.split(lengths.tolist()), log_probs.split(lengths.tolist())))
