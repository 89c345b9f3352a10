"""Layer importance: which layers can go.

`greedy` is the published iterative search (Moslem 2025, section 4): every round translates the selection set without each remaining
layer in turn and removes the layer whose removal hurts the translation score least. `middle` and `block-influence` are the cheap
strategies it is compared with. The result is a PrunePlan, which is data: it can be read, edited and applied without searching.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimlingual.data.audio import load_audio
from trimlingual.data.sources import Clip
from trimlingual.data.splits import Split
from trimlingual.models.inputs import Collator, Example
from trimlingual.models.loading import load_model, load_processor, pick_device
from trimlingual.models.qwen2_audio import layer_list
from trimlingual.models.saving import round_weights_, save_model
from trimlingual.recipe import DecodeSettings, ModelSettings, RankSettings, TaskSettings, Tower
from trimlingual.run.artifacts import SCRATCH, machine, write_json
from trimlingual.run.lineage import Lineage, read_lineage
from trimlingual.run.processes import is_main_process, wait_for_everyone
from trimlingual.search.plan import FINETUNED, PLAN_FILE, PrunePlan, Removal
from trimlingual.search.scorer import Candidate, Scorer
from trimlingual.search.search import JOURNAL_FILE, Search
from trimlingual.training.loss import answer_forward
from trimlingual.training.optimizer import TrainingError
from trimlingual.training.trainer import train_


@dataclass(frozen=True)
class TrainingData:
    """Clips and examples for fine-tuning between rounds."""

    clips: Sequence[Clip]
    examples: Sequence[Example]


def rank(
    model_dir: Path,
    lineage: Lineage,
    select: Split,
    task: TaskSettings,
    model_settings: ModelSettings,
    decode: DecodeSettings,
    settings: RankSettings,
    training: TrainingData | None,
    seed: int,
    out_dir: Path,
) -> dict[str, Any]:
    """Find the layers to remove from the model in `model_dir` and write `plan.json` to `out_dir`.

    Every candidate's score is appended to `candidates.jsonl` at once; a killed search goes on from there. All processes of a
    distributed run take part. Raises ValueError when more layers are asked for than may go.
    """
    started = time.perf_counter()
    wait_for_everyone()
    source = _latest_round(out_dir) or model_dir
    device = pick_device(model_settings.device)
    model, processor = load_model(source, model_settings.dtype, device), load_processor(model_dir)
    search = Scorer(model, processor, select, task, decode, settings, lineage, read_lineage(source).layers)
    allowed = search.candidates(lineage)
    if settings.num_layers_to_remove > len(allowed):
        raise ValueError(
            f"rank.num_layers_to_remove is {settings.num_layers_to_remove} but only {len(allowed)} of the "
            f"{len(lineage.layers['decoder'])} decoder layers may go; choose at most {len(allowed)} (the first "
            f"{settings.protect_first} and the last {settings.protect_last} are kept, see rank.protect_first / protect_last)"
        )
    if settings.strategy == "greedy":
        plan = _greedy_search(search, training, model_settings, seed, out_dir)
    else:
        choose = _middle if settings.strategy == "middle" else _block_influence
        plan = choose(search, allowed)
    plan = plan.model_copy(
        update={
            "strategy": settings.strategy,
            "layers": lineage.layers,
            "base": lineage.base,
            "metric": {language: settings.metric_for(language) for language in task.target_languages},
            "signatures": search.signatures if settings.strategy == "greedy" else {},
            "selection": {
                "hash": select.hash,
                "num_clips": len(select.clips),
                "hours": round(select.hours, 4),
                "audio_sha256": sorted(clip.audio_sha256 for clip in select.clips),
            },
            "decode": decode.model_dump(),
            "seconds": round(time.perf_counter() - started, 3),
            "machine": machine(),
        }
    )
    if is_main_process():
        write_json(out_dir / PLAN_FILE, plan.model_dump())
    return {
        "removed": [f"{removal.tower}.{removal.layer}" for removal in plan.removals],
        "num_candidates": len(plan.candidates),
        "selection_hash": select.hash,
    }


def _greedy_search(
    scorer: Scorer, training: TrainingData | None, model_settings: ModelSettings, seed: int, out_dir: Path
) -> PrunePlan:
    def train_on(lineage: Lineage, removal: Removal) -> None:
        assert training is not None
        _finetune_round(scorer, training, model_settings, lineage, removal, seed, out_dir)

    training_too = scorer.settings.finetune_each_round is not None
    plan = Search(scorer, out_dir / JOURNAL_FILE, train_on if training_too else None).run()
    if training_too and is_main_process() and not (out_dir / FINETUNED).is_dir():
        (out_dir / SCRATCH / f"round-{len(plan.removals)}").rename(out_dir / FINETUNED)
    return plan


def _finetune_round(
    search: Scorer,
    training: TrainingData,
    model_settings: ModelSettings,
    lineage: Lineage,
    removal: Removal,
    seed: int,
    out_dir: Path,
) -> None:
    """Drop the layer for good and fine-tune; the model of each finished round is kept, so that a killed search goes on from it."""
    settings, number = search.settings.finetune_each_round, removal.round
    assert settings is not None
    folder = out_dir / SCRATCH / f"round-{number}"
    if folder.is_dir() or (out_dir / FINETUNED).is_dir():  # the model that was loaded is this round's or a later one's
        return
    search.drop_(removal.tower, removal.layer)
    info = train_(
        search.model, search.processor, training.clips, training.examples, search.task, settings, seed,
        out_dir / SCRATCH / f"training-{number}",
    )  # fmt: skip
    if "weights" in info:  # by accelerate's configuration, not the recipe
        raise TrainingError(
            "rank.finetune_each_round does not go with FSDP or DeepSpeed: the search goes on with whole weights"
        )
    if is_main_process():
        partial = folder.with_name(folder.name + ".partial")
        save_model(search.model, search.processor, partial, model_settings.storage_dtype)
        lineage.with_seen("train", {clip.audio_sha256 for clip in training.clips}).save(partial)
        partial.rename(folder)
    else:
        round_weights_(search.model, model_settings.storage_dtype)
    wait_for_everyone()


def _latest_round(out_dir: Path) -> Path | None:
    """Model of the last finished round of a killed search with fine-tuning between rounds."""
    if (out_dir / FINETUNED).is_dir():
        return out_dir / FINETUNED
    done = [p for p in (out_dir / SCRATCH).glob("round-*") if not p.name.endswith(".partial")]
    return max(done, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def _middle(search: Scorer, allowed: Sequence[Candidate]) -> PrunePlan:
    """The block around the middle (the paper's ablation: layers 12-19 of 32)."""
    if search.settings.towers == "both":
        raise ValueError("rank.strategy middle works on one tower; set rank.towers to decoder or encoder")
    tower = allowed[0][0]
    layers = search.lineage.layers[tower]
    start = (len(layers) - search.settings.num_layers_to_remove) // 2
    chosen = layers[start : start + search.settings.num_layers_to_remove]
    blocked = sorted(set(chosen) - {layer for _, layer in allowed})
    if blocked:
        raise ValueError(f"the middle block {chosen} holds protected layers {blocked}; remove fewer or protect less")
    return PrunePlan(removals=[Removal(tower=tower, layer=layer) for layer in chosen])


@torch.inference_mode()
def _block_influence(search: Scorer, allowed: Sequence[Candidate]) -> PrunePlan:
    """Lowest Block Influence first: 1 - E[cos(layer input, layer output)] (Men et al. 2024, ShortGPT, eq. 1).

    Measured on the selection set with its references, teacher-forced, over all positions that are not padding.
    """
    sums: dict[tuple[Tower, int], list[float]] = {}
    hooks = []
    valid: list[torch.Tensor] = []  # attention mask of the batch in flight; the tower sees other lengths and no mask

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
        position = search.lineage.layers[tower].index(layer)
        hooks.append(layer_list(search.model, tower)[position].register_forward_hook(watch((tower, layer))))
    collator = Collator(search.prompter, lambda i: load_audio(search.select.clips[i].audio))
    forward, device = answer_forward(search.model), next(search.model.parameters()).device
    examples = [example for language in search.task.target_languages for example in _examples(search, language)]
    try:
        for start in range(0, len(examples), search.decode.batch_size):
            batch = collator(examples[start : start + search.decode.batch_size])
            batch.pop("ids")
            valid[:] = [batch["attention_mask"].to(device)]
            forward(**{name: tensor.to(device) for name, tensor in batch.items()})
    finally:
        for handle in hooks:
            handle.remove()
    influence = {key: total / count for key, (total, count) in sums.items()}
    chosen = sorted(allowed, key=lambda key: (influence[key], key))[: search.settings.num_layers_to_remove]
    return PrunePlan(
        removals=[Removal(tower=tower, layer=layer, score=influence[tower, layer]) for tower, layer in chosen],
        candidates=[{"round": 1, "tower": t, "layer": i, "score": influence[t, i]} for t, i in allowed],
    )


def _examples(search: Scorer, language: str) -> list[Example]:
    """The selection set with its references."""
    clips = enumerate(search.select.clips)
    return [Example(i, c.id, language, c.references[language]) for i, c in clips if language in c.references]
