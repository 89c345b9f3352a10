"""Strategies without a search: all layers that go are chosen at once. The layer search is compared with them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

from trimlingual.data.audio import load_audio
from trimlingual.models.inputs import Collator, Example
from trimlingual.models.tree import layer_list
from trimlingual.recipe import RankSettings, Tower
from trimlingual.run.lineage import Lineage
from trimlingual.search.allowed import may_go, middle_block
from trimlingual.search.plan import PrunePlan, Removal
from trimlingual.search.scorer import Scorer
from trimlingual.training.loss import answer_forward


def middle(settings: RankSettings, lineage: Lineage) -> PrunePlan:
    """The block around the middle. What is wrong with it was said before (`ranking_problems`)."""
    block = middle_block(settings, lineage.layers)
    return PrunePlan(removals=[Removal(tower=tower, layer=layer) for tower, layer in block])


def at_random(settings: RankSettings, lineage: Lineage, seed: int) -> PrunePlan:
    """Layers drawn from those that may go: what any choice has to be better than. A tower keeps its last layer."""
    left: dict[str, list[int]] = dict(lineage.layers)
    removals: list[Removal] = []
    drawn = random.Random(seed).sample(allowed := may_go(settings, left), len(allowed))
    for tower, layer in drawn:
        if len(removals) < settings.num_layers_to_remove and len(left[tower]) > 1:
            left[tower] = [other for other in left[tower] if other != layer]
            removals.append(Removal(tower=tower, layer=layer))
    return PrunePlan(removals=removals)


@torch.inference_mode()
def block_influence(scorer: Scorer) -> PrunePlan:
    """The layers of lowest Block Influence: 1 - E[cos(layer input, layer output)] (Men et al. 2024, ShortGPT, eq. 1).

    It is measured on the selection set with its references, teacher-forced, over all tokens that are not padding.
    """
    allowed = scorer.candidates(scorer.lineage)
    sums: dict[tuple[Tower, int], list[float]] = {}
    hooks = []
    # The attention mask of the current batch. It is for the decoder alone: the audio tower has other lengths, and no mask.
    valid: list[torch.Tensor] = []

    def watch(key: tuple[Tower, int]) -> Callable[..., None]:
        def hook(_module: Any, inputs: Any, output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            cosine = torch.nn.functional.cosine_similarity(inputs[0].float(), after.float(), dim=-1)
            if key[0] == "decoder":
                cosine = cosine[valid[0].bool()]
            total = sums.setdefault(key, [0.0, 0])
            total[0] += (1 - cosine).sum().item()
            total[1] += cosine.numel()

        return hook

    for tower, layer in allowed:
        index = scorer.lineage.layers[tower].index(layer)
        hooks.append(layer_list(scorer.model, tower)[index].register_forward_hook(watch((tower, layer))))
    collator = Collator(scorer.prompter, lambda i: load_audio(scorer.select.clips[i].audio))
    forward, device = answer_forward(scorer.model), next(scorer.model.parameters()).device
    examples = [example for language in scorer.task.target_languages for example in _examples(scorer, language)]
    try:
        for start in range(0, len(examples), scorer.decode.batch_size):
            batch = collator(examples[start : start + scorer.decode.batch_size])
            batch.pop("ids")
            valid[:] = [batch["attention_mask"].to(device)]
            forward(**{name: tensor.to(device) for name, tensor in batch.items()})
    finally:
        for handle in hooks:
            handle.remove()
    influence = {key: total / count for key, (total, count) in sums.items()}
    chosen = sorted(allowed, key=lambda key: (influence[key], key))[: scorer.settings.num_layers_to_remove]
    return PrunePlan(
        removals=[Removal(tower=tower, layer=layer, score=influence[tower, layer]) for tower, layer in chosen],
        candidates=[{"round": 1, "tower": t, "layer": i, "score": influence[t, i]} for t, i in allowed],
    )


def _examples(scorer: Scorer, language: str) -> list[Example]:
    """The selection set with its references."""
    clips = enumerate(scorer.select.clips)
    return [Example(i, c.id, language, c.references[language]) for i, c in clips if language in c.references]
