"""Which actions of a search under a budget should be translated: how many, and what is lost if all are.

    python benchmarks/shortlist.py RUN      # RUN holds the teacher of `trimlingual compress mini`; 10 minutes on one core
    python benchmarks/shortlist.py          # the built-in model, before it is fine-tuned

Every action of the first round is done alone on the model as it ships (int4 and 8 bits). All clips of the selection and the test
split are translated. Two losses are computed: of the references, and of what the model itself said before any action. Then a search's
first round is played many times. It sees some clips, drawn by lot, and takes the best actions by translation score per byte, each in a
layer of its own, from a shortlist by loss per byte. What they lost is read off the other clips, where it adds up over the actions. A
shortlist of all is a search by score alone; a shortlist of 0 takes the best by the loss alone.

How well a measure on the clips that are seen orders the actions is told by its correlations with the points lost on the others: of
what each action loses (Pearson), and of the ranks of what it loses per byte (Spearman). What the one loss's choice loses more than the
other's has a 95 % interval over clips drawn anew with repetition, each sample split into seen and others ten times.

Prints a line per shortlist, then one JSON document, and writes it to benchmarks/results (or --out).
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from commit import commit

from trimlingual.data.sources import read_source
from trimlingual.data.splits import Split
from trimlingual.evaluation.cost import bytes_beside_weights
from trimlingual.evaluation.quality import scores_from_sums
from trimlingual.models.loading import load_model, load_processor, pick_device, resolve_base
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
SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)
CLIPS = (40, 64, 100)
ACTIONS = (1, 4, 8)  # per round
RESAMPLES, SPLITS = 100, 10  # for an interval
REFERENCES, OWN = "references", "own translations"  # what a loss is of


class Lost:
    """What each action loses on any clips: points of score, and nats per token, mean of the languages."""

    def __init__(
        self, metrics: dict[str, str], tallies: Sequence[Tally], nats: dict[str, Sequence[dict[str, np.ndarray]]]
    ):
        """Of the model without any action first, then of every action; `nats` (N clips, 2): by answer nats and tokens per language."""
        self.metrics = metrics
        self.counts = {code: np.stack([t.statistics(code).counts for t in tallies]).astype(float) for code in metrics}
        self.nats = {of: {c: np.stack([each[c] for each in found]) for c in metrics} for of, found in nats.items()}
        self.num_clips = self.counts[next(iter(metrics))].shape[1]

    def score(self, clips: np.ndarray) -> np.ndarray:
        """Points (actions,)."""
        scores = [scores_from_sums(m, self.counts[code][:, clips].sum(1)) for code, m in self.metrics.items()]
        mean = np.mean(scores, 0)
        return mean[0] - mean[1:]

    def loss(self, of: str, clips: np.ndarray) -> np.ndarray:
        """Nats per token (actions,)."""
        mean = self._loss(of, clips)
        return mean[1:] - mean[0]

    def loss_before(self, of: str) -> float:
        """Nats per token of the model without any action, on all clips."""
        return float(self._loss(of, np.arange(self.num_clips))[0])

    def _loss(self, of: str, clips: np.ndarray) -> np.ndarray:
        sums = [each[:, clips].sum(1) for each in self.nats[of].values()]
        return np.mean([nats / tokens for nats, tokens in (s.T for s in sums)], 0)


def measure(recipe: Recipe, folder: Path, num_clips: int | None) -> tuple[list[Action], list[int], Lost]:
    """The actions of the first round, the bytes that each saves, and what they lose."""
    assert recipe.rank
    assert recipe.quantize
    languages = recipe.task.target_languages
    clips = [
        c for s in ("select", "test") for c in read_source(BuiltinSource(kind="builtin", split=s), languages, folder)
    ]
    split = Split("both", tuple(clips[:num_clips]))
    model = load_model(folder, recipe.model.dtype, pick_device("cpu"))
    lineage, dtype = read_lineage(folder, recipe.model.base), recipe.model.storage_dtype
    scorer = BudgetScorer(model, load_processor(folder), split, recipe.shared, recipe.rank, lineage, lineage.layers)
    smaller = Smaller(model, lineage.layers, recipe.rank, recipe.quantize, dtype, bytes_beside_weights(folder))
    scorer.rounded = RoundedModel(model, lineage.layers, recipe.quantize, dtype)

    def nats(action: Action | None) -> dict[str, np.ndarray]:
        found = scorer.answer_losses(action)
        return {code: np.array([by_clip[clip] for clip in sorted(by_clip)]) for code, by_clip in found.items()}

    parent, actions = scorer.parent_tally(), smaller.possible([])
    references = {
        clip: [scorer.prompter.answer_ids(scorer.reference(clip, code)) for code in scorer.languages(clip)]
        for clip in parent.tokens
    }
    losses = {}
    for of, scorer.answers in ((REFERENCES, references), (OWN, parent.tokens)):
        scorer.begin_round({}, parent.tokens)  # forgets the pass over other answers
        losses[of] = [nats(action) for action in (None, *actions)]
    scorer.prepare()
    tallies = [parent]
    with progress("actions", len(actions)) as advance:
        for action in actions:
            tallies += scorer.tallies([action])
            advance(1)
    saved = [smaller.num_bytes() - smaller.num_bytes([action]) for action in actions]
    return actions, saved, Lost(dict(scorer.metrics), tallies, losses)


def drawn(
    lost: Lost, num_clips: int, draws: int, sample: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The clips that a search sees, and the others: the same draws each time. Of a sample, each as often as it is there."""
    rng, every = np.random.default_rng(0), np.arange(lost.num_clips) if sample is None else sample
    for _ in range(draws):
        seen = np.isin(every, rng.permutation(lost.num_clips)[:num_clips])
        yield every[seen], every[~seen]


def played(
    actions: Sequence[Action],
    saved: Sequence[int],
    lost: Lost,
    of: str,
    num_clips: int,
    at_once: int,
    draws: int,
    sample: np.ndarray | None = None,
) -> dict[float, dict[str, float]]:
    """By share on the shortlist what the actions of a round lost and saved, on average, and points per MB with their standard error."""
    found = dict[float, list[tuple[float, float]]]()
    for seen, others in drawn(lost, num_clips, draws, sample):
        score, loss, truth = lost.score(seen), lost.loss(of, seen), lost.score(others)
        by_loss = _first(loss, range(len(actions)), saved)
        for share in SHARES:
            short = by_loss[: max(at_once, math.ceil(share * len(actions)))]
            taken: dict[str, int] = {}
            for i in _first(score, short, saved) if share else by_loss:
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


def own_less_references(
    actions: Sequence[Action], saved: Sequence[int], lost: Lost, num_clips: int, at_once: int
) -> dict[float, list[float]]:
    """By share on the shortlist the 95 % interval of the points per MB that the loss of the own translations loses more."""
    found: dict[float, list[float]] = defaultdict(list)
    for seed in range(RESAMPLES):
        sample = np.random.default_rng(seed).integers(0, lost.num_clips, lost.num_clips)
        of = {of: played(actions, saved, lost, of, num_clips, at_once, SPLITS, sample) for of in lost.nats}
        for share in SHARES:
            found[share].append(of[OWN][share]["lost_per_mb"] - of[REFERENCES][share]["lost_per_mb"])
    return {share: np.percentile(values, [2.5, 97.5]).tolist() for share, values in found.items()}


def correlations(saved: Sequence[int], lost: Lost, num_clips: int, draws: int) -> dict[str, dict[str, float]]:
    """By measure on the clips that are seen: its mean correlations with the points lost on the others."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for seen, others in drawn(lost, num_clips, draws):
        truth = lost.score(others)
        measures = {"score": lost.score(seen), **{of: lost.loss(of, seen) for of in lost.nats}}
        for name, measure in measures.items():
            ranks = [(each / np.array(saved)).argsort().argsort() for each in (measure, truth)]
            found[name].append((np.corrcoef(measure, truth)[0, 1], np.corrcoef(ranks)[0, 1]))
    return {name: dict(zip(("lost", "rank_per_byte"), np.mean(pairs, 0).tolist())) for name, pairs in found.items()}


def _first(lost: np.ndarray, among: Sequence[int], saved: Sequence[int]) -> list[int]:
    """Actions in order of what is lost per byte; of those that lose nothing the one that saves most."""
    return sorted(among, key=lambda i: (max(0.0, lost[i]) / saved[i], -saved[i], i))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="default: the model before any training")
    parser.add_argument("--clips", type=int, help="of selection and test split together; default all")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    recipe = load_recipe("mini", ["model.device=cpu", BUDGET])
    folder = args.run / "teacher" if args.run else resolve_base(recipe.model.base)
    actions, saved, lost = measure(recipe, folder, args.clips)
    everywhere = np.arange(lost.num_clips)
    losses = {of: lost.loss(of, everywhere) for of in lost.nats}
    result: dict[str, Any] = {
        "command": "python benchmarks/shortlist.py" + (" RUN" if args.run else ""), "commit": commit(), "machine": machine(),
        "clips": lost.num_clips, "draws": args.draws, "loss_before": {of: lost.loss_before(of) for of in lost.nats},
        "actions": [
            {
                "part": action.part, "bits": action.bits, "saved_bytes": saved[i], "lost": float(points),
                "loss": {of: float(nats[i]) for of, nats in losses.items()},
            }
            for i, (action, points) in enumerate(zip(actions, lost.score(everywhere)))
        ],
        "correlations": [], "rounds": [], "own_less_references": [],
    }  # fmt: skip
    for num_clips in (n for n in CLIPS if n < lost.num_clips):
        found = correlations(saved, lost, num_clips, args.draws)
        result["correlations"].append({"selection_clips": num_clips, "with_points_lost_elsewhere": found})
        print(json.dumps(result["correlations"][-1]), flush=True)
        for at_once, of in product(ACTIONS, lost.nats):
            for share, row in played(actions, saved, lost, of, num_clips, at_once, args.draws).items():
                names = {"selection_clips": num_clips, "actions_per_round": at_once, "loss_of": of, "shortlist": share}
                result["rounds"].append(names | row)
                print(json.dumps(result["rounds"][-1]), flush=True)
        for at_once in ACTIONS:
            for share, interval in own_less_references(actions, saved, lost, num_clips, at_once).items():
                names = {"selection_clips": num_clips, "actions_per_round": at_once, "shortlist": share}
                result["own_less_references"].append(names | {"interval": interval})
                print(json.dumps(result["own_less_references"][-1]), flush=True)
    write_json(args.out or RESULTS / f"shortlist_mini{'' if args.run else '_base'}.json", result)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
