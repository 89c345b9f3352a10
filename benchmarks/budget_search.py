"""What the search under a budget costs: layers and bits of Qwen2-Audio-7B's shapes down to 3.3 GB.

    python benchmarks/budget_search.py                       # random weights at the true shapes, one 80 GB GPU
    python benchmarks/budget_search.py --size small --clips 4 --layers 2   # any machine

The actions of a whole search are drawn by lot first, since scores of random weights mean nothing: per round the state of the model
and the candidates. Then whole rounds of it are run, the first, one in the middle and the last, as `rank` runs them: the parent's
translations, and every candidate's. The seconds of a candidate of each kind are interpolated over the number of missing layers, which
gives every round's. No candidate is given up (`early_stopping: false`), and as in search.py all answers have lengths drawn around 4
tokens per second of audio, and every draft is wrong at once. Prints one JSON document and writes it to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from commit import commit
from published_search import Case, clock
from search import FixedLengths, case_7b

from trimlingual.evaluation.cost import peak_memory
from trimlingual.recipe import ModelSettings, QuantizeSettings, RankSettings, SharedSettings
from trimlingual.run.artifacts import machine, write_json
from trimlingual.run.lineage import Lineage
from trimlingual.search.actions import GONE, Action, Smaller, removed_by
from trimlingual.search.budget import BudgetSearch
from trimlingual.search.budget_scorer import BudgetScorer
from trimlingual.search.rounded import RoundedModel

RESULTS = Path(__file__).parent / "results"
BITS = {"attention": [3, 2], "mlp": [3, 2], "lm_head": [4], "embeddings": [4, 2]}
BESIDE = {"7b": 12_000_000, "small": 0}  # bytes of tokenizer and configuration: of the published checkpoint, about
State = tuple[Action, ...]


class FixedBudget(FixedLengths, BudgetScorer):
    """The scorer of the search under a budget, with a given number of tokens per clip."""


def kind_of(action: Action) -> str:
    return "layer" if action.bits == GONE else action.part.rpartition(".")[2]


def make_search(case: Case, folder: Path, settings: RankSettings, size: str) -> BudgetSearch:
    towers = {"decoder": case.model.model.language_model.layers, "encoder": case.model.model.audio_tower.layers}
    layers = {tower: list(range(len(found))) for tower, found in towers.items()}
    lineage = Lineage("benchmark", layers, {tower: len(indices) for tower, indices in layers.items()})
    shared = SharedSettings(case.task, ModelSettings(base="benchmark"), case.decode)
    scorer = FixedBudget(case.model, case.processor, case.split, shared, settings, lineage, layers)
    assert case.num_tokens is not None
    scorer.num_tokens, scorer.eos, scorer._stepper.eos = case.num_tokens, (), ()
    stored = QuantizeSettings(
        scheme="int4", group_size=128 if size == "7b" else 32, eight_bit=["embeddings", "lm_head"], train=None
    )
    smaller = Smaller(case.model, layers, settings, stored, "bfloat16", BESIDE[size])
    scorer.rounded = RoundedModel(case.model, layers, stored, "bfloat16")
    search = BudgetSearch(scorer, smaller, folder / "journal.jsonl")
    search.known = {}
    return search


def set_budget(search: BudgetSearch, **values: Any) -> None:
    settings = search.scorer.settings
    assert settings.budget is not None
    search.scorer.settings = settings.model_copy(update={"budget": settings.budget.model_copy(update=values)})


def drawn(search: BudgetSearch) -> list[tuple[State, list[Action]]]:
    """A whole search whose losses are drawn by lot: the state and the candidates of every round. Leaves the records."""
    budget = search.scorer.settings.budget
    assert budget is not None
    rng, state, rounds = np.random.default_rng(0), (), []
    loss_per_byte: dict[Action, float] = defaultdict(lambda: float(rng.lognormal()))
    search.records = []
    while (missing := search.smaller.num_bytes(state) - budget.num_bytes) > 0:
        saves = search._candidates(state, missing)
        rounds.append((state, list(saves)))
        records = [
            {
                **action._asdict(),
                "saved_bytes": saved,
                "score": 0.0,
                "lost": loss_per_byte[action] * min(saved, missing),
            }
            for action, saved in saves.items()
        ]
        chosen = search._choose(records, missing)
        search.records += [{**record, "round": len(rounds)} for record in records]
        state = (*state, *(Action(record["part"], record["bits"]) for record in chosen))
    return rounds


def measured(
    search: BudgetSearch, case: Case, number: int, state: State, records: list[dict[str, Any]]
) -> dict[str, Any]:
    """A whole round, as `BudgetSearch.run` has it."""
    scorer, removed = search.scorer, removed_by(state)
    for action in state:
        if action.bits != GONE:
            scorer.rounded.round_(*action)
    budget = scorer.settings.budget
    assert budget is not None
    search.known, search.records = {}, records
    started = clock(case.device)
    scorer.begin_round(removed, None)
    tally = scorer.parent_tally()
    scorer.begin_round(removed, tally.tokens)
    parent_s = clock(case.device) - started
    score = tally.scores()
    parent = {"score": mean(score.values())}
    found = search._round(number, state, parent, search.smaller.num_bytes(state) - budget.num_bytes)
    seconds = clock(case.device) - started
    kinds = Counter(kind_of(Action(r["part"], r["bits"])) for r in found)
    each = {kind: mean(r["seconds"] for r in found if kind_of(Action(r["part"], r["bits"])) == kind) for kind in kinds}
    row = {
        "round": number, "layers_gone": sum(map(len, removed.values())), "num_candidates": len(found), "kinds": dict(kinds),
        "seconds": seconds, "parent_s": parent_s, "shared_s": seconds - parent_s - sum(r["seconds"] for r in found),
        "seconds_per_candidate": each,
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


def whole(rounds: Sequence[tuple[State, list[Action]]], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The cost of these rounds, each between the measured ones by its number of missing layers."""

    def between(gone: int, values: Sequence[tuple[int, float]]) -> float:
        at = sorted({number for number, _ in values})
        return float(np.interp(gone, at, [mean(s for number, s in values if number == one) for one in at]))

    total, candidates = 0.0, Counter[str]()
    for state, actions in rounds:
        gone = sum(map(len, removed_by(state).values()))
        for name in ("parent_s", "shared_s"):
            total += between(gone, [(row["layers_gone"], row[name]) for row in rows])
        for kind, count in Counter(map(kind_of, actions)).items():
            known = [
                (row["layers_gone"], row["seconds_per_candidate"][kind])
                for row in rows
                if kind in row["seconds_per_candidate"]
            ]
            total += count * between(gone, known)
            candidates[kind] += count
    return {"num_rounds": len(rounds), "num_candidates": dict(candidates), "seconds": total, "minutes": total / 60}


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    started = time.perf_counter()
    case = case_7b(folder, args.clips, args.size)
    settings = RankSettings.model_validate(
        {
            "num_layers_to_remove": args.layers, "metric": "chrfpp", "early_stopping": False,
            "budget": {"size": "1 GB", "bits": BITS, "actions_per_round": args.actions_per_round},
        }
    )  # fmt: skip
    search = make_search(case, folder, settings, args.size)
    start, least = search.smaller.num_bytes(), search.smaller.smallest()
    set_budget(search, size=args.budget or f"{(0.4 * start + 0.6 * least) / 1e3:.1f} kB")
    everything = drawn(search)
    set_budget(search, scored_again=args.scored_again)
    rounds, records = drawn(search), search.records
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/budget_search.py", *args.given]), "commit": commit(args.commit),
        "machine": machine(), "size": args.size, "dtype": str(case.model.dtype), "clips": len(case.split.clips),
        "budget": search.scorer.settings.model_dump()["budget"], "bytes": {"before": start, "least": least},
        "seconds_to_start": clock(case.device) - started, "rounds": [],
    }  # fmt: skip
    print(f"{len(rounds)} rounds; {result['seconds_to_start']:.0f} s to start", flush=True)
    torch.manual_seed(0)
    with peak_memory(case.device) as memory:
        for number in sorted({1, (1 + len(rounds)) // 2, len(rounds)}):
            state = rounds[number - 1][0]
            before = [record for record in records if record["round"] < number]
            result["rounds"].append(measured(search, case, number, state, before))
            result["whole_search"] = whole(rounds, result["rounds"])
            result["whole_search_all_scored_again"] = whole(everything, result["rounds"])
            write_json(args.out, result)
    result["peak_bytes"] = memory.num_bytes
    write_json(args.out, result)
    return result


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("7b", "small"), default="7b")
    parser.add_argument("--budget", help="default 3.3 GB; small: two fifths above the least")
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--layers", type=int, default=8, help="that may go at most")
    parser.add_argument("--actions-per-round", type=int, default=8)
    parser.add_argument("--scored-again", type=int, default=24)
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    given = {k: v for k, v in vars(args).items() if v != parser.get_default(k) and k not in ("out", "commit")}
    args.given = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    args.out = args.out or RESULTS / f"budget_search_{args.size}.json"
    if args.size == "7b":
        args.budget = args.budget or "3.3 GB"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        result = run(args, Path(folder))
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
