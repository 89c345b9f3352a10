"""Layer importance: which layers can go.

`greedy` is the published iterative search (search/search.py). It is compared with the strategies that do not search, `middle`,
`block-influence` and `random` (search/one_shot.py). The result is a PrunePlan, which is data: it can be read, edited and applied
without searching.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimlingual.data.splits import Split
from trimlingual.evaluation.cost import bytes_beside_weights
from trimlingual.models.inputs import TrainingData
from trimlingual.models.loading import load_model, load_processor, pick_device
from trimlingual.models.saving import round_weights_, save_model
from trimlingual.recipe import QuantizeSettings, RankSettings, SharedSettings
from trimlingual.run.artifacts import SCRATCH, machine, put_in_place, write_json
from trimlingual.run.lineage import Lineage, ModelFolder, read_lineage
from trimlingual.run.processes import is_main_process, wait_for_everyone
from trimlingual.search.actions import Smaller
from trimlingual.search.allowed import ranking_problems
from trimlingual.search.budget import BudgetSearch
from trimlingual.search.budget_scorer import BudgetScorer
from trimlingual.search.one_shot import at_random, block_influence, middle
from trimlingual.search.plan import FINETUNED, PLAN_FILE, PrunePlan, Removal
from trimlingual.search.rounded import RoundedModel
from trimlingual.search.scorer import Scorer
from trimlingual.search.search import JOURNAL_FILE, Search
from trimlingual.training.optimizer import TrainingError
from trimlingual.training.trainer import train_


def rank(
    folder: ModelFolder,
    select: Split,
    shared: SharedSettings,
    settings: RankSettings,
    training: TrainingData | None,
    out_dir: Path,
    stored: QuantizeSettings | None = None,
    others: Sequence[Path] = (),
) -> dict[str, Any]:
    """Find the layers to remove from the model in `folder` and write `plan.json` to `out_dir`.

    With `settings.budget` the plan has bits of parts too, and `stored` says what the model is stored as before it. `others` are folders
    of searches that differ from this one in the budget's size alone: scores that they have are not made again.

    Every candidate's score is appended to `candidates.jsonl` at once; a killed search goes on from there. All processes of a
    distributed run take part. Raises ValueError when the layers asked for cannot go.
    """
    started = time.perf_counter()
    wait_for_everyone()
    source, lineage = _latest_round(out_dir) or folder.path, folder.lineage
    if problems := [*ranking_problems(settings, lineage.layers)]:
        raise ValueError("; ".join(problems))
    runs_only = settings.finetune_each_round is None and settings.budget is None
    model = load_model(source, shared.model.dtype, pick_device(shared.model.device), keep_packed=runs_only)
    processor = load_processor(folder.path, shared.model.audio_padding)
    kind = BudgetScorer if settings.budget else Scorer
    scorer = kind(model, processor, select, shared, settings, lineage, present=read_lineage(source).layers)
    if isinstance(scorer, BudgetScorer):
        assert stored is not None
        plan = _within_budget(scorer, folder, shared, stored, out_dir, others)
    else:
        plan = _planned(scorer, folder, shared, training, out_dir)
    plan = plan.model_copy(
        update={
            "strategy": settings.strategy,
            "layers": lineage.layers,
            "base": lineage.base,
            "metric": {language: settings.metric_for(language) for language in shared.task.target_languages},
            "signatures": scorer.signatures if settings.strategy == "greedy" else {},
            "selection": _described(select),
            "decode": shared.decode.model_dump(),
            "seconds": round(time.perf_counter() - started, 3),
            "machine": machine(),
        }
    )
    if is_main_process():
        write_json(out_dir / PLAN_FILE, plan.model_dump())
    return {
        "removed": [f"{removal.tower}.{removal.layer}" for removal in plan.removals],
        **(_of_a_budget(plan) if settings.budget else {}),
        "num_candidates": len(plan.candidates),
        "selection_hash": select.hash,
    }


def _of_a_budget(plan: PrunePlan) -> dict[str, Any]:
    """What is remembered of a search under a budget; `num_shared` of its candidates other searches had scored."""
    bits = {fewer.part: fewer.bits for fewer in plan.bits}
    num_shared = sum(candidate.get("shared", False) for candidate in plan.candidates)
    return {"bits": bits, "num_bytes": plan.num_bytes, "num_shared": num_shared}


def _planned(
    scorer: Scorer,
    folder: ModelFolder,
    shared: SharedSettings,
    training: TrainingData | None,
    out_dir: Path,
) -> PrunePlan:
    """The plan, by the recipe's strategy."""
    if scorer.settings.strategy == "greedy":
        return _greedy_search(scorer, training, shared, out_dir)
    if scorer.settings.strategy == "middle":
        return middle(scorer.settings, folder.lineage)
    if scorer.settings.strategy == "random":
        return at_random(scorer.settings, folder.lineage, shared.seed)
    return block_influence(scorer)


def _described(select: Split) -> dict[str, Any]:
    """The selection clips, as the plan names them."""
    return {
        "hash": select.hash,
        "num_clips": len(select.clips),
        "hours": round(select.hours, 4),
        "audio_sha256": sorted(clip.audio_sha256 for clip in select.clips),
    }


def _within_budget(
    scorer: BudgetScorer,
    folder: ModelFolder,
    shared: SharedSettings,
    stored: QuantizeSettings,
    out_dir: Path,
    others: Sequence[Path],
) -> PrunePlan:
    layers, dtype = folder.lineage.layers, shared.model.storage_dtype
    smaller = Smaller(scorer.model, layers, scorer.settings, stored, dtype, bytes_beside_weights(folder.path))
    search = BudgetSearch(scorer, smaller, out_dir / JOURNAL_FILE, [other / JOURNAL_FILE for other in others])
    scorer.rounded = RoundedModel(scorer.model, layers, stored, dtype)
    return search.run()


def _greedy_search(scorer: Scorer, training: TrainingData | None, shared: SharedSettings, out_dir: Path) -> PrunePlan:
    def train_on(lineage: Lineage, removal: Removal) -> None:
        assert training is not None
        _finetune_round(scorer, training, shared, lineage, removal, out_dir)

    training_too = scorer.settings.finetune_each_round is not None
    plan = Search(scorer, out_dir / JOURNAL_FILE, train_on if training_too else None).run()
    if training_too and is_main_process() and not (out_dir / FINETUNED).is_dir():
        put_in_place(out_dir / SCRATCH / f"round-{len(plan.removals)}", out_dir / FINETUNED)
    return plan


def _finetune_round(
    scorer: Scorer, training: TrainingData, shared: SharedSettings, lineage: Lineage, removal: Removal, out_dir: Path
) -> None:
    """Drop the layer for good and fine-tune; the model of the last finished round is kept, so that a killed search goes on from it."""
    settings, number = scorer.settings.finetune_each_round, removal.round
    assert settings is not None
    if removal.layer not in scorer.present[removal.tower]:  # the model that was loaded is this round's or a later one's
        return
    folder = out_dir / SCRATCH / f"round-{number}"
    scorer.drop_(removal.tower, removal.layer)
    work_dir = out_dir / SCRATCH / f"training-{number}"
    info = train_(scorer.model, scorer.processor, training, shared, settings, work_dir)
    if "weights" in info:  # by accelerate's configuration, not the recipe
        raise TrainingError(
            "rank.finetune_each_round does not go with FSDP or DeepSpeed: the search goes on with whole weights"
        )
    if is_main_process():
        partial = folder.with_name(folder.name + ".partial")
        save_model(scorer.model, scorer.processor, partial, shared.model.storage_dtype)
        lineage.with_seen("train", {clip.audio_sha256 for clip in training.clips}).save(partial)
        put_in_place(partial, folder)
        for done in [*folder.parent.glob("round-*"), *folder.parent.glob("training-*")]:
            if done != folder:
                shutil.rmtree(done)
    else:
        round_weights_(scorer.model, shared.model.storage_dtype)
    wait_for_everyone()


def _latest_round(out_dir: Path) -> Path | None:
    """Model of the last finished round of a killed search with fine-tuning between rounds."""
    if (out_dir / FINETUNED).is_dir():
        return out_dir / FINETUNED
    done = [p for p in (out_dir / SCRATCH).glob("round-*") if not p.name.endswith(".partial")]
    return max(done, key=lambda p: int(p.name.rpartition("-")[2]), default=None)
