"""Layer importance: which layers can go.

`greedy` is the published iterative search (Moslem 2025, section 4): every round translates the selection set without each remaining
layer in turn and removes the layer whose removal hurts the translation score least. `middle` and `block-influence` are the cheap
strategies it is compared with. The result is a PrunePlan, which is data: it can be read, edited and applied without searching.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimlingual.artifacts import SCRATCH, append_jsonl, machine, read_journal, write_json
from trimlingual.audio import load_audio
from trimlingual.data import Split
from trimlingual.decode import embed_prompt, encode_clips, greedy, max_new_tokens, to_translation
from trimlingual.finetune import train_
from trimlingual.layers import drop_layers_, without_layers
from trimlingual.lineage import Lineage, read_lineage
from trimlingual.loss import answer_forward, answer_loss
from trimlingual.metrics import corpus_score
from trimlingual.models import TOWERS, eos_token_ids, layer_list, load_model, load_processor, pick_device, save_model
from trimlingual.progress import progress, say
from trimlingual.prompts import Collator, Example, Prompter
from trimlingual.recipe import DecodeSettings, ModelSettings, RankSettings, TaskSettings, Tower
from trimlingual.sources import Clip

PLAN_FILE = "plan.json"
JOURNAL_FILE = "candidates.jsonl"
FINETUNED = "model"  # folder beside the plan, when the search fine-tuned after every removal


class PlanError(ValueError):
    """A plan that cannot be read or does not fit the model."""


class Removal(BaseModel):
    """One removed layer. `layer` counts in the base model, before any pruning."""

    model_config = ConfigDict(extra="forbid", strict=True)
    tower: Tower = "decoder"
    layer: int = Field(ge=0)
    round: int | None = None
    score: float | None = None


class PrunePlan(BaseModel):
    """What to remove and why. By hand, `{"removals": [{"layer": 13}, {"layer": 3}]}` is enough."""

    model_config = ConfigDict(extra="forbid", strict=True)
    removals: list[Removal] = Field(min_length=1)
    strategy: str = "by hand"
    layers: dict[str, list[int]] | None = Field(
        default=None, description="layer map of the model that the plan was made for"
    )
    base: str | None = None
    metric: dict[str, str] = Field(default_factory=dict)
    signatures: dict[str, str] = Field(default_factory=dict)
    baseline_score: float | None = None
    baseline_scores: dict[str, float] = Field(default_factory=dict)
    candidates: list[dict[str, Any]] = Field(default_factory=list)
    selection: dict[str, Any] = Field(default_factory=dict)
    decode: dict[str, Any] = Field(default_factory=dict)
    finetuned: bool = False
    seconds: float | None = None
    machine: dict[str, Any] = Field(default_factory=dict)

    def layers_of(self, tower: Tower) -> list[int]:
        """Original layers of one tower to remove."""
        return [removal.layer for removal in self.removals if removal.tower == tower]


def read_plan(path: Path) -> PrunePlan:
    """Read `plan.json` (or the folder that holds it). PlanError says what is wrong with it."""
    path = path / PLAN_FILE if path.is_dir() else path
    try:
        plan = PrunePlan.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise PlanError(f"plan {path} cannot be read: {error.strerror}") from error
    except (ValueError, ValidationError) as error:
        raise PlanError(f"{path} is not a prune plan: {error}") from error
    named = [(removal.tower, removal.layer) for removal in plan.removals]
    twice = sorted({f"{tower} {layer}" for tower, layer in named if named.count((tower, layer)) > 1})
    if twice:
        raise PlanError(f"{path} removes a layer twice: {', '.join(twice)}")
    return plan


def check_plan(plan: PrunePlan, lineage: Lineage) -> dict[Tower, list[int]]:
    """Positions in the current model of the layers to remove; PlanError if the plan was made for another model."""
    if plan.layers is not None and plan.layers != lineage.layers:
        raise PlanError(
            f"the plan was made for a model with layers {_short(plan.layers)}, but this one has {_short(lineage.layers)}; "
            "rank this model, or apply the plan to the model it was made for"
        )
    positions: dict[Tower, list[int]] = {}
    for tower in TOWERS:
        wanted, have = plan.layers_of(tower), lineage.layers[tower]
        missing = [layer for layer in wanted if layer not in have]
        if missing:
            raise PlanError(f"the plan removes {tower} layers {missing}, which this model does not have; it has {have}")
        if len(wanted) >= len(have):
            raise PlanError(f"the plan removes all {len(have)} {tower} layers")
        positions[tower] = [have.index(layer) for layer in wanted]
    return positions


def _short(layers: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{tower} {len(indices)}: {list(indices)}" for tower, indices in layers.items())


@dataclass(frozen=True)
class TrainingData:
    """Clips and examples for fine-tuning between rounds."""

    clips: Sequence[Clip]
    examples: Sequence[Example]


@dataclass
class _Search:
    """The model under search and what every candidate shares: clips encoded once, prompts embedded once."""

    model: Any
    processor: Any
    select: Split
    task: TaskSettings
    decode: DecodeSettings
    settings: RankSettings
    lineage: Lineage
    present: dict[
        str, list[int]
    ]  # original layers that stand in `model`: fewer than in `lineage` once rounds were fine-tuned
    signatures: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prompter = Prompter(self.processor, self.task)
        self.eos = eos_token_ids(self.model, self.processor)
        self.reencode = self.settings.towers != "decoder" or self.settings.finetune_each_round is not None
        self._states: list[torch.Tensor] | None = None

    def states(self) -> list[torch.Tensor]:
        """Audio tower output of the selection clips; computed again only if the tower may have changed."""
        if self._states is None or self.reencode:
            self._states = encode_clips(self.model, self.processor, self.select.clips, self.decode.batch_size)
        return self._states

    def scores(self) -> tuple[dict[str, float], int]:
        """Score by language of the model as it is now (higher is better), and the number of runaways."""
        states = self.states()
        scores, runaways = {}, 0
        for language in self.task.target_languages:
            metric = self.settings.metric_for(language)
            if metric == "loss":
                collator = Collator(self.prompter, lambda i: load_audio(self.select.clips[i].audio), states)
                scores[language] = -answer_loss(self.model, collator, self.examples(language), self.decode.batch_size)
                continue
            hypotheses, truncated = self.translate(states, language)
            references = [clip.references[language] for clip in self.select.clips]
            result = corpus_score(metric, hypotheses, references, language)
            scores[language], self.signatures[language] = result.value, result.signature
            runaways += truncated
        return scores, runaways

    def translate(self, states: Sequence[torch.Tensor], language: str) -> tuple[list[str], int]:
        """Translations of the selection set, and how many ran into the bound."""
        clips = self.select.clips
        prompts = [embed_prompt(self.model, self.prompter, tower, language) for tower in states]
        limits = [max_new_tokens(clip.duration_s, self.decode) for clip in clips]
        tokens = greedy(self.model, prompts, limits, self.eos, self.decode.batch_size)
        done = [to_translation(self.prompter, c.id, language, ids, self.eos) for c, ids in zip(clips, tokens)]
        return [t.hypothesis for t in done], sum(t.truncated for t in done)

    def examples(self, language: str) -> list[Example]:
        """The selection set with its references, for teacher-forced measures."""
        return [Example(i, c.id, language, c.references[language]) for i, c in enumerate(self.select.clips)]

    def positions(self, gone: Mapping[Tower, Sequence[int]]) -> dict[Tower, list[int]]:
        """Positions in `model` of the given original layers, as far as they still stand there."""
        return {t: [self.present[t].index(i) for i in layers if i in self.present[t]] for t, layers in gone.items()}

    def candidates(self, lineage: Lineage) -> list[tuple[Tower, int]]:
        """(tower, original layer) that may still go."""
        found: list[tuple[Tower, int]] = []
        for tower in TOWERS:
            if self.settings.towers in (tower, "both"):
                layers = lineage.layers[tower]
                start, end = self.settings.protect_first, len(layers) - self.settings.protect_last
                kept = set(self.settings.protected) if tower == "decoder" else set()
                found += [(tower, layer) for layer in layers[start:end] if layer not in kept]
        return found


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

    Every candidate's score is appended to `candidates.jsonl` at once; a killed search goes on from there. Raises ValueError when
    more layers are asked for than may go.
    """
    started = time.perf_counter()
    source = _latest_round(out_dir) or model_dir
    device = pick_device(model_settings.device)
    model, processor = load_model(source, model_settings.dtype, device), load_processor(model_dir)
    search = _Search(model, processor, select, task, decode, settings, lineage, read_lineage(source).layers)
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
            "signatures": search.signatures,
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
    write_json(out_dir / PLAN_FILE, plan.model_dump())
    return {
        "removed": [f"{removal.tower}.{removal.layer}" for removal in plan.removals],
        "num_candidates": len(plan.candidates),
        "selection_hash": select.hash,
    }


def _greedy_search(
    search: _Search, training: TrainingData | None, model_settings: ModelSettings, seed: int, out_dir: Path
) -> PrunePlan:
    journal = out_dir / JOURNAL_FILE
    known = {(r["round"], r["tower"], r["layer"]): r for r in read_journal(journal)}
    finetune = search.settings.finetune_each_round
    total = _num_candidates(search)
    removals: list[Removal] = []
    scored: list[dict[str, Any]] = []
    say(f"layer search: {total} candidates of {len(search.select.clips)} clips each, {len(known)} already scored")
    with progress("searching layers", total + 1) as advance:
        baseline = _scored(search, known, journal, {"round": 0, "tower": None, "layer": None}, {})
        advance(1)
        lineage = search.lineage
        for number in range(1, search.settings.num_layers_to_remove + 1):
            records = []
            for tower, layer in search.candidates(lineage):
                gone: dict[Tower, list[int]] = {t: [r.layer for r in removals if r.tower == t] for t in TOWERS}
                gone[tower].append(layer)
                key = {"round": number, "tower": tower, "layer": layer}
                records.append(_scored(search, known, journal, key, gone))
                advance(1)
            best = max(records, key=lambda record: record["score"])  # of equal ones the first, so the order is fixed
            removals.append(Removal(tower=best["tower"], layer=best["layer"], round=number, score=best["score"]))
            lineage = lineage.without({best["tower"]: [best["layer"]]})
            say(f"  round {number}: {best['tower']} layer {best['layer']} goes, score {best['score']:.2f}")
            if finetune:
                assert training is not None
                _finetune_round(search, training, model_settings, lineage, removals[-1], number, seed, out_dir)
            scored += records
    if finetune and not (out_dir / FINETUNED).is_dir():
        (out_dir / SCRATCH / f"round-{len(removals)}").rename(out_dir / FINETUNED)
    return PrunePlan(
        removals=removals,
        baseline_score=baseline["score"],
        baseline_scores=baseline["scores"],
        candidates=scored,
        finetuned=bool(finetune),
    )


def _num_candidates(search: _Search) -> int:
    first = len(search.candidates(search.lineage))
    return sum(first - removed for removed in range(search.settings.num_layers_to_remove))


def _scored(
    search: _Search,
    known: dict[Any, dict[str, Any]],
    journal: Path,
    key: dict[str, Any],
    gone: Mapping[Tower, Sequence[int]],
) -> dict[str, Any]:
    """The record of one candidate (the model without the original layers `gone`): from the journal, or scored now."""
    identity = (key["round"], key["tower"], key["layer"])
    if identity not in known:
        started = time.perf_counter()
        with without_layers(search.model, search.positions(gone)):
            scores, runaways = search.scores()
        record = {
            **key,
            "score": sum(scores.values()) / len(scores),
            "scores": scores,
            "num_truncated": runaways,
            "signatures": dict(search.signatures),
            "seconds": round(time.perf_counter() - started, 4),
        }
        append_jsonl(journal, record)
        known[identity] = record
    search.signatures.update(known[identity]["signatures"])
    return known[identity]


def _finetune_round(
    search: _Search,
    training: TrainingData,
    model_settings: ModelSettings,
    lineage: Lineage,
    removal: Removal,
    number: int,
    seed: int,
    out_dir: Path,
) -> None:
    """Drop the layer for good and fine-tune; the model of each finished round is kept, so that a killed search goes on from it."""
    settings = search.settings.finetune_each_round
    assert settings is not None
    folder = out_dir / SCRATCH / f"round-{number}"
    if folder.is_dir() or (out_dir / FINETUNED).is_dir():  # the model that was loaded is this round's or a later one's
        return
    drop_layers_(search.model, search.positions({removal.tower: [removal.layer]}))
    search.present = lineage.layers
    train_(
        search.model, search.processor, training.clips, training.examples, search.task, settings, seed,
        out_dir / SCRATCH / f"training-{number}",
    )  # fmt: skip
    partial = folder.with_name(folder.name + ".partial")
    save_model(search.model, search.processor, partial, model_settings.storage_dtype)
    lineage.with_seen("train", {clip.audio_sha256 for clip in training.clips}).save(partial)
    partial.rename(folder)


def _latest_round(out_dir: Path) -> Path | None:
    """Model of the last finished round of a killed search with fine-tuning between rounds."""
    if (out_dir / FINETUNED).is_dir():
        return out_dir / FINETUNED
    done = [p for p in (out_dir / SCRATCH).glob("round-*") if not p.name.endswith(".partial")]
    return max(done, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def _middle(search: _Search, allowed: Sequence[tuple[Tower, int]]) -> PrunePlan:
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
def _block_influence(search: _Search, allowed: Sequence[tuple[Tower, int]]) -> PrunePlan:
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
    examples = [example for language in search.task.target_languages for example in search.examples(language)]
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
