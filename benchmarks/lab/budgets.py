"""Four ways to the same size, at four sizes: experiments of experiments.py, the plan by a proxy, and the comparison.

* `mixed-N`: our search under a budget of N MB.
* `uniform-N`: layers go by the layer search, what is left has 4 bits. At 120 MB embeddings and head have 8 bits (that is `system-b`),
  at the smaller sizes 4: with 8 more than half of the layers would have to go.
* `proxy-N`: the same actions as `mixed-N`, chosen as the 2026 compression track chose its 3-bit sublayers: every action is scored once,
  alone, by the loss of the teacher's translations (no translation is made), and the losses are taken to add up.
* `loss-N`: our search by the loss of what the model says as it is stored before the search, but all is scored anew in each round.
  (Before commit dd5e96f, and in the result `lab_third/lab_loss-93_0.json`, by the loss of the references.)

All have the base as their teacher, the same short recovery, and the same short training in their bits. `compare` reads the runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch

from trimlingual.data.splits import Split, load_splits
from trimlingual.evaluation.cost import bytes_beside_weights
from trimlingual.evaluation.quality import SentenceStatistics, paired_bootstrap_difference, sentence_statistics
from trimlingual.models.loading import load_model, load_processor, pick_device
from trimlingual.pipeline import plan
from trimlingual.recipe import QuantizeSettings, Recipe, languages
from trimlingual.run.artifacts import write_json
from trimlingual.run.jsonl import read_jsonl
from trimlingual.run.lineage import ModelFolder, read_lineage
from trimlingual.search.actions import GONE, Action, Smaller, bits_after, layer_of
from trimlingual.search.budget_scorer import BudgetScorer
from trimlingual.search.from_parent import losses
from trimlingual.search.plan import PLAN_FILE, FewerBits, PrunePlan, Removal, read_plan
from trimlingual.search.rounded import RoundedModel
from trimlingual.steps import folder_of

SHORT_IN_BITS = [
    "finetune=null", "data.select={kind: manifest, path: LAB/select-100.jsonl}",
    "data.out_of_domain={kind: manifest, path: LAB/general-5000.jsonl}", "evaluate.models=[base, quantized]",
    "recover.max_steps=300", "recover.batch_size=64", "recover.selection_checks=1", "quantize.train.max_steps=200",
    "quantize.train.batch_size=64", "quantize.train.selection_checks=1",
]  # fmt: skip
PARTS = "bits: {attention: [3, 2], mlp: [3, 2], lm_head: [4, 2], embeddings: [4, 2]}"
FOUR_BIT_ROWS = ["quantize.eight_bit=[]", "quantize.bits={embeddings: 4, lm_head: 4}"]
MOST_LAYERS = 16
# The size asked for, which is what the uniform model takes as the search counts it; the layers that it lacks; its embeddings and
# head. The names are from a run that counted the lists of training clips too, 4.9 MB.
SIZES: dict[int, tuple[str, int, list[str]]] = {
    93: ("88.0 MB", 8, FOUR_BIT_ROWS),
    120: ("114.7 MB", 8, []),
    83: ("78.5 MB", 13, FOUR_BIT_ROWS),
    104: ("99.3 MB", 2, FOUR_BIT_ROWS),
}
KINDS = ("mixed", "proxy", "loss", "uniform")
AT_ONCE = 1000  # actions per round of a plan whose actions are all scored once


def searched(number: int, num_actions: int = 8) -> list[str]:
    """A search of system.yaml under the budget of this name in `SIZES`."""
    size = SIZES[number][0]
    budget = f"budget={{size: {size}, actions_per_round: {num_actions}, {PARTS}}}"
    return [f"rank.{budget}", f"rank.num_layers_to_remove={MOST_LAYERS}"]


def experiments() -> dict[str, list[str]]:
    """What each experiment changes in system.yaml, in order of what it tells."""
    found = {}
    for number, (_, num_layers, rows) in SIZES.items():
        found[f"mixed-{number}"] = [*SHORT_IN_BITS, *searched(number)]
        found[f"uniform-{number}"] = [*SHORT_IN_BITS, f"rank.num_layers_to_remove={num_layers}", *rows]
        found[f"proxy-{number}"] = [*SHORT_IN_BITS, *searched(number, AT_ONCE)]
        found[f"loss-{number}"] = [*SHORT_IN_BITS, *searched(number), "rank.metric=loss"]
    return found


def rank_by_proxy(recipe: Recipe, run: Path) -> None:
    """Make the stage `rank` of a `proxy-N`: its plan, without a search."""
    (step,) = [step for step in plan(recipe, run) if step.name == "rank"]

    def work(inputs: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        select = load_splits(inputs["data"].folder).select
        assert recipe.quantize
        made = by_proxy(folder_of(inputs["model"], recipe), select, recipe, recipe.quantize)
        write_json(folder / PLAN_FILE, made.model_dump())
        return {"num_bytes": made.num_bytes, "num_candidates": len(made.candidates)}

    replace(step, work=work).run()


@torch.inference_mode()
def by_proxy(given: ModelFolder, select: Split, recipe: Recipe, stored: QuantizeSettings) -> PrunePlan:
    """The actions with the least loss per byte, each scored alone, until the budget holds."""
    settings, shared, layers = recipe.rank, recipe.shared, given.lineage.layers
    assert settings is not None
    assert settings.budget is not None
    device = pick_device(shared.model.device)
    model = load_model(given.path, shared.model.dtype, device)
    processor = load_processor(given.path, shared.model.audio_padding)
    present = read_lineage(given.path).layers
    scorer = BudgetScorer(model, processor, select, shared, settings, given.lineage, present)
    spoken = scorer.parent_tally().tokens  # the teacher's translations
    beside = bytes_beside_weights(given.path)
    smaller = Smaller(model, layers, settings, stored, shared.model.storage_dtype, beside)
    rounded = RoundedModel(model, layers, stored, shared.model.storage_dtype)
    clips = sorted(spoken)
    answers = [row for clip in clips for row in spoken[clip]]
    everything = range(len(model.model.language_model.layers))

    def loss(without: int | None = None) -> float:
        prompts = scorer._prompts(clips)
        active = [layer for layer in everything if layer != without]
        return sum(losses(scorer._stepper.decoder, prompts, answers, active)) / sum(map(len, answers))

    whole, costs = loss(), dict[Action, float]()
    state: list[Action] = []
    while (size := smaller.num_bytes(state)) > settings.budget.num_bytes:
        missing = size - settings.budget.num_bytes
        possible = smaller.possible(state)
        for action in possible:
            if action in costs:
                continue
            if action.bits == GONE:
                costs[action] = loss(layers["decoder"].index(layer_of(action)[1])) - whole
            else:
                with rounded.tried(*action):
                    costs[action] = loss() - whole
        saves = {a: min(missing, size - smaller.num_bytes([*state, a])) for a in possible}
        so_far = {action.part: costs[action] for action in state}  # a part's last bits

        def per_byte(action: Action, saves: Any = saves, so_far: Any = so_far) -> tuple[float, int]:
            known = [cost for part, cost in so_far.items() if (part + ".").startswith(action.part + ".")]
            return max(0.0, costs[action] - sum(known)) / saves[action], -saves[action]

        state.append(min((a for a in possible if saves[a] > 0), key=per_byte))
    return _planned(state, costs, whole, smaller, layers)


def _planned(
    state: Sequence[Action],
    costs: Mapping[Action, float],
    whole: float,
    smaller: Smaller,
    layers: Mapping[str, Sequence[int]],
) -> PrunePlan:
    final = bits_after(state)
    removals, bits = [], []
    for number, action in enumerate(state, 1):
        score = -whole - costs[action]
        if action.bits == GONE:
            tower, layer = layer_of(action)
            removals.append(Removal(tower=tower, layer=layer, round=number, score=score))
        elif final.get(action.part) == action.bits:
            bits.append(FewerBits.model_validate({**action._asdict(), "round": number, "score": score}))
    return PrunePlan(
        removals=removals,
        bits=bits,
        num_bytes=smaller.num_bytes(state),
        strategy="loss of the teacher's translations, each action alone",
        layers={tower: [*numbers] for tower, numbers in layers.items()},
        baseline_score=-whole,
        candidates=[{**action._asdict(), "score": -whole - cost} for action, cost in costs.items()],
    )


def plan_of(run: Path) -> dict[str, Any] | None:
    """What a run's plan does, in order; None where it has no bits."""
    if not (run / "rank" / PLAN_FILE).is_file():
        return None
    made = read_plan(run / "rank")
    if made.num_bytes is None:
        return None
    gone = [(r.round or 0, f"{r.tower}.{r.layer} gone") for r in made.removals]
    fewer = [(b.round or 0, f"{b.part} {b.bits} bits") for b in made.bits]
    return {
        "num_bytes": made.num_bytes,
        "actions": [{"round": number, "what": what} for number, what in sorted(gone + fewer, key=lambda pair: pair[0])],
        "curve": made.curve,
        "seconds": made.seconds,
        "num_candidates": len(made.candidates),
    }


def compare(lab: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Scores of one less those of another of its size or kind, by language, with paired 95 % intervals, of the runs there are."""
    found = []
    every = list(product(SIZES, KINDS))
    for seed, (one, other) in product(seeds, combinations(every, 2)):
        names = [f"{kind}-{number}" for number, kind in (one, other)]
        pair = [lab / "runs" / f"{name}-{seed}" / "evaluations" / "quantized" for name in names]
        related = one[0] == other[0] or one[1] == other[1]
        if not related or not all((run / "result.json").is_file() for run in pair):
            continue
        row: dict[str, Any] = {"one": names[0], "less": names[1], "seed": seed}
        row["disk_bytes"] = [json.loads((run / "result.json").read_text())["disk_bytes"] for run in pair]
        scores, others = map(_statistics, pair)
        for code in scores:
            interval, p = paired_bootstrap_difference(scores[code], others[code])
            row[code] = {**asdict(interval), "p": round(p, 4)}
        found.append(row)
    return found


def _statistics(evaluation: Path) -> dict[str, SentenceStatistics]:
    """By language."""
    found = {}
    for path in sorted(evaluation.glob("translations.*.jsonl")):
        code, rows = path.name.split(".")[1], read_jsonl(path)
        metric = languages.language(code).main_metric
        found[code] = sentence_statistics(metric, [r["hypothesis"] for r in rows], [r["reference"] for r in rows], code)
    return found
