"""Which actions of a search under a budget should be translated: how many, and what is lost if all are.

    python benchmarks/shortlist.py RUN      # RUN holds the teacher of `trimlingual compress mini`; 10 minutes on one core

Every action of the first round is done alone on the teacher as it ships (int4 and 8 bits). All clips of the selection and the test
split are translated, and the loss of their references is computed. Then a search's first round is played many times. It sees some
clips, drawn by lot, and takes the best actions by translation score per byte, each in a layer of its own, from a shortlist by loss per
byte. What they lost is read off the other clips, where it adds up over the actions. A shortlist of all is a search by score alone.

Prints a line per shortlist, then one JSON document, and writes it to benchmarks/results (or --out).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from commit import commit

from trimlingual.data.sources import read_source
from trimlingual.data.splits import Split
from trimlingual.evaluation.cost import bytes_beside_weights
from trimlingual.evaluation.quality import scores_from_sums
from trimlingual.models.loading import load_model, load_processor, pick_device
from trimlingual.recipe import BuiltinSource, Recipe, load_recipe
from trimlingual.run.artifacts import machine, write_json
from trimlingual.run.lineage import read_lineage
from trimlingual.run.progress import progress
from trimlingual.search.actions import Action, Smaller
from trimlingual.search.budget_scorer import BudgetScorer
from trimlingual.search.rounded import RoundedModel
from trimlingual.search.scorer import Tally

RESULTS = Path(__file__).parent / "results"
BUDGET = "rank.budget={size: 1 MB, bits: {attention: [3], mlp: [3], embeddings: [4], lm_head: [4]}}"
SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)
CLIPS = (40, 64, 100)
ACTIONS = (1, 4, 8)  # per round


class Lost:
    """What each action loses on any clips: points of score, and nats per token, mean of the languages."""

    def __init__(self, metrics: dict[str, str], tallies: Sequence[Tally], nats: Sequence[dict[str, np.ndarray]]):
        """Of the model without any action first, then of every action; `nats` (N clips, 2): nats and tokens per language."""
        self.metrics = metrics
        self.counts = {code: np.stack([t.statistics(code).counts for t in tallies]).astype(float) for code in metrics}
        self.nats = {code: np.stack([each[code] for each in nats]) for code in metrics}

    def score(self, clips: np.ndarray) -> np.ndarray:
        """Points (actions,)."""
        scores = [scores_from_sums(m, self.counts[code][:, clips].sum(1)) for code, m in self.metrics.items()]
        mean = np.mean(scores, 0)
        return mean[0] - mean[1:]

    def loss(self, clips: np.ndarray) -> np.ndarray:
        """Nats per token (actions,)."""
        sums = [each[:, clips].sum(1) for each in self.nats.values()]
        mean = np.mean([nats / tokens for nats, tokens in (s.T for s in sums)], 0)
        return mean[1:] - mean[0]


def measure(recipe: Recipe, teacher: Path, num_clips: int | None) -> tuple[list[Action], list[int], Lost]:
    """The actions of the first round, the bytes that each saves, and what they lose."""
    assert recipe.rank
    assert recipe.quantize
    languages = recipe.task.target_languages
    clips = [
        c for s in ("select", "test") for c in read_source(BuiltinSource(kind="builtin", split=s), languages, teacher)
    ]
    split = Split("both", tuple(clips[:num_clips]))
    model = load_model(teacher, recipe.model.dtype, pick_device("cpu"))
    lineage, dtype = read_lineage(teacher), recipe.model.storage_dtype
    scorer = BudgetScorer(model, load_processor(teacher), split, recipe.shared, recipe.rank, lineage, lineage.layers)
    smaller = Smaller(model, lineage.layers, recipe.rank, recipe.quantize, dtype, bytes_beside_weights(teacher))
    scorer.rounded = RoundedModel(model, lineage.layers, recipe.quantize, dtype)

    def nats(action: Action | None) -> dict[str, np.ndarray]:
        found = scorer.reference_losses(action)
        return {code: np.array([by_clip[clip] for clip in sorted(by_clip)]) for code, by_clip in found.items()}

    parent, actions = scorer.parent_tally(), smaller.possible([])
    scorer.begin_round({}, parent.tokens)
    losses = [nats(action) for action in (None, *actions)]
    scorer.prepare()
    tallies = [parent]
    with progress("actions", len(actions)) as advance:
        for action in actions:
            tallies += scorer.tallies([action])
            advance(1)
    saved = [smaller.num_bytes() - smaller.num_bytes([action]) for action in actions]
    return actions, saved, Lost(dict(scorer.metrics), tallies, losses)


def played(
    actions: Sequence[Action], saved: Sequence[int], lost: Lost, num_clips: int, at_once: int, draws: int
) -> dict[float, dict[str, float]]:
    """By share on the shortlist what the actions of a round lost and saved, on average, and points per MB with their standard error."""
    rng, found = np.random.default_rng(0), dict[float, list[tuple[float, float]]]()
    in_all = lost.counts[next(iter(lost.counts))].shape[1]
    for _ in range(draws):
        clips = rng.permutation(in_all)
        seen, others = clips[:num_clips], clips[num_clips:]
        score, loss, truth = lost.score(seen), lost.loss(seen), lost.score(others)

        for share in SHARES:
            short = _first(loss, range(len(actions)), saved)[: max(at_once, math.ceil(share * len(actions)))]
            taken: dict[str, int] = {}
            for i in _first(score, short, saved):
                taken.setdefault(actions[i].layer or actions[i].part, i)
            chosen = [*taken.values()][:at_once]
            found.setdefault(share, []).append((sum(truth[i] for i in chosen), sum(saved[i] for i in chosen) / 1e6))
    result = {}
    for share, values in found.items():
        points, megabytes = np.array(values).T
        per_mb = points.sum() / megabytes.sum()
        error = (points - per_mb * megabytes).std() / megabytes.mean() / math.sqrt(draws)
        result[share] = {"lost": points.mean(), "mb": megabytes.mean(), "lost_per_mb": per_mb, "error": error}
    return result


def _first(lost: np.ndarray, among: Sequence[int], saved: Sequence[int]) -> list[int]:
    """Actions in order of what is lost per byte; of those that lose nothing the one that saves most."""
    return sorted(among, key=lambda i: (max(0.0, lost[i]) / saved[i], -saved[i]))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--clips", type=int, help="of selection and test split together; default all")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS / "shortlist_mini.json")
    args = parser.parse_args(arguments)
    recipe = load_recipe("mini", ["model.device=cpu", BUDGET])
    actions, saved, lost = measure(recipe, args.run / "teacher", args.clips)
    in_all = lost.counts[next(iter(lost.counts))].shape[1]
    everywhere = np.arange(in_all)
    result: dict[str, Any] = {
        "command": "python benchmarks/shortlist.py RUN", "commit": commit(), "machine": machine(), "clips": in_all,
        "draws": args.draws,
        "actions": [
            {"part": a.part, "bits": a.bits, "saved_bytes": s, "lost": float(points), "loss": float(nats)}
            for a, s, points, nats in zip(actions, saved, lost.score(everywhere), lost.loss(everywhere))
        ],
        "rounds": [],
    }  # fmt: skip
    for num_clips in (n for n in CLIPS if n < in_all):
        for at_once in ACTIONS:
            for share, row in played(actions, saved, lost, num_clips, at_once, args.draws).items():
                row = {"selection_clips": num_clips, "actions_per_round": at_once, "shortlist": share, **row}
                result["rounds"].append(row)
                print(json.dumps(row), flush=True)
    write_json(args.out, result)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
