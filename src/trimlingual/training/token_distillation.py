"""Token-level knowledge distillation (Hinton et al. 2015): the teacher's distribution at every answer token, as a training target.

The teacher reads every training example once, before the student trains: its most likely tokens and their probabilities are kept, which
is a few hundred bytes for a token, so that teacher and student never share a GPU's memory. What is left of the teacher's probability
counts as one further outcome, so the loss (`loss.divergence`) is the exact one over these outcomes.

Shapes: N answer tokens, K tokens kept of each distribution.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimlingual.decoding.translate_clips import split_on_oom
from trimlingual.models.inputs import Collator, Example
from trimlingual.models.loading import free_memory
from trimlingual.recipe import TokenDistillation
from trimlingual.run.fingerprint import HashCache, hash_model
from trimlingual.training.ahead import prepared_ahead
from trimlingual.training.loss import answer_forward
from trimlingual.training.parts import Batches, Row, rows_in_parts

FOLDER = "teacher-tokens"
BATCH = 128  # examples the teacher reads at once; fewer where the GPU's memory is not enough


TeacherTokens = tuple[Tensor, Tensor]
"""Of one example: the teacher's most likely tokens at each answer position, (N, K), and their log probabilities (N, K), float16."""


def teacher_tokens(
    load_teacher: Callable[[], Any],
    collator: Collator,
    examples: Sequence[Example],
    settings: TokenDistillation,
    work_dir: Path,
    num_workers: int = 0,
    digest: str | None = None,
) -> dict[Example, TeacherTokens]:
    """The teacher's distribution at every answer token of every example.

    The processes share the examples; each loads the teacher if anything is left for it to read, and none after a restart that finds
    all in `work_dir`. `num_workers` processes load the audio and prepare the batches. What `digest` does not cover, which is made by
    `digest_of`, is for the caller to see to: `work_dir` belongs to one stage with one fingerprint.
    """
    digest = digest or digest_of(examples, settings)
    examples = [*dict.fromkeys(examples)]  # a mixture may repeat them
    order = sorted(range(len(examples)), key=lambda i: (examples[i].clip, i))  # a clip's examples together
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    make = partial(_read, load_teacher, collator, examples, settings, num_workers)
    title, made = "the teacher reads the training examples", "training examples were read"
    rows = rows_in_parts(work_dir / FOLDER, digest, batches, make, title, made)
    free_memory()
    return {example: (ids, log_probs) for example, (ids, log_probs) in zip(examples, rows, strict=True)}


def digest_of(examples: Sequence[Example], settings: TokenDistillation, *more: Any) -> str:
    """Tells readings apart by what was asked, and by `more` of what the answers depend on."""
    asked = (settings.top_k, settings.temperature, [*dict.fromkeys(examples)], *more)
    return hashlib.sha256(repr(asked).encode()).hexdigest()


def all_it_depends_on(
    collator: Collator, examples: Sequence[Example], audio: Sequence[str], teacher_dir: Path
) -> list[Any]:
    """What the teacher hears and reads, and what it is: the hashes of the clips, the extractor, all tokens; the model's files.

    The files are read, once for as long as they stay as they are.
    """
    prompter = collator.prompter
    extractor = prompter.processor.feature_extractor
    prompts = {example.language: prompter.parts(example.language) for example in examples}
    answers = {example.text: prompter.answer_ids(example.text) for example in examples}
    heard = sorted(extractor.to_dict().items(), key=str)
    return [[*audio], heard, prompts, answers, hash_model(teacher_dir, HashCache())]


def _batch(collator: Collator, examples: Sequence[Example], chosen: Sequence[int]) -> dict[str, Any]:
    batch = collator([examples[i] for i in chosen])
    batch.pop("ids")
    return batch


@torch.inference_mode()
def _read(
    load_teacher: Callable[[], Any],
    collator: Collator,
    examples: Sequence[Example],
    settings: TokenDistillation,
    num_workers: int,
    batches: Batches,
) -> Generator[list[Row], None, None]:
    """The teacher's distributions for the examples of each batch."""
    teacher = load_teacher()
    forward, device = answer_forward(teacher), next(teacher.parameters()).device
    prepare = partial(_batch, collator, examples)

    def read(whole: dict[str, Any], chosen: Sequence[int]) -> list[Row]:
        # where memory is not enough for the whole batch, its parts are prepared again
        batch = whole if len(whole["labels"]) == len(chosen) else prepare(chosen)
        counts = (batch["labels"][:, 1:] >= 0).sum(1).tolist()
        logits = forward(**{name: tensor.to(device) for name, tensor in batch.items()})["logits"]
        log_probs, ids = (logits / settings.temperature).log_softmax(-1).topk(min(settings.top_k, logits.shape[-1]))
        rows = zip(ids.int().cpu().split(counts), log_probs.half().cpu().split(counts))
        return [(id_rows.clone(), probability_rows.clone()) for id_rows, probability_rows in rows]

    with closing(prepared_ahead(prepare, batches, num_workers)) as prepared:
        for chosen, batch in zip(batches, prepared):
            yield split_on_oom(partial(read, batch), chosen)
