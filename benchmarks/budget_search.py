"""What the search under a budget costs: layers and bits of Qwen2-Audio-7B's shapes down to 3.3 GB.

    python benchmarks/budget_search.py                       # random weights at the true shapes, one 80 GB GPU
    python benchmarks/budget_search.py --size small --clips 4 --layers 2   # any machine

The actions of a whole search are drawn by lot first, since scores of random weights mean nothing: per round the state of the model
and the candidates. Then whole rounds of it are run, the first, one in the middle and the last, as `rank` runs them: the parent's
translations, every candidate's loss of the first translations, and the shortlist's own. The seconds of a candidate of each kind are
interpolated over the number of missing layers, which gives every round's. As in search.py all answers have lengths drawn around 4
tokens per second of audio, and every draft is wrong at once. Prints one JSON document and writes it to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

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
    return search


def set_budget(search: BudgetSearch, **values: Any) -> None:
    settings = search.scorer.settings
    assert settings.budget is not None
    search.scorer.settings = settings.model_copy(update={"budget": settings.budget.model_copy(update=values)})


class Round(NamedTuple):
    """A round of a whole search: the model's state, its candidates, and those of them that are translated."""

    state: State
    candidates: list[Action]
    shortlist: list[Action]


def drawn(search: BudgetSearch) -> list[Round]:
    """A whole search whose losses are drawn by lot."""
    budget = search.scorer.settings.budget
    assert budget is not None
    rng, state, rounds = np.random.default_rng(0), (), []
    loss_per_byte: dict[Action, float] = defaultdict(lambda: float(rng.lognormal()))
    while (missing := search.smaller.num_bytes(state) - budget.num_bytes) > 0:
        saves = search._possible(state, missing)
        ordered = sorted(saves, key=lambda action: loss_per_byte[action])
        short = ordered[: math.ceil(budget.shortlist * len(saves))]
        rounds.append(Round(state, list(saves), short))
        records = [
            {**a._asdict(), "saved_bytes": saves[a], "lost": loss_per_byte[a] * min(saves[a], missing)} for a in short
        ]
        state = (*state, *(Action(r["part"], r["bits"]) for r in search._choose(records, missing)))
    return rounds


def measured(search: BudgetSearch, case: Case, number: int, drawn: Round) -> dict[str, Any]:
    """A whole round, as `BudgetSearch.run` has it. One candidate of each kind that is not on the shortlist is translated too."""
    scorer, state = search.scorer, drawn.state
    removed = removed_by(state)
    for action in state:
        if action.bits != GONE:
            scorer.rounded.round_(*action)
    search.losses, search.translated = {}, {}
    one_of_each = {kind_of(action): action for action in (*drawn.candidates, *drawn.shortlist)}.values()
    short = list(dict.fromkeys([*drawn.shortlist, *one_of_each]))
    started = clock(case.device)
    search._parent(state)
    parent_s = clock(case.device) - started
    search._make(f"round {number}, losses", state, [None, *drawn.candidates], search.losses, search._with_losses)
    scorer.prepare()
    search._make(f"round {number}, translations", state, short, search.translated, search._with_translations)
    seconds = clock(case.device) - started
    row: dict[str, Any] = {
        "round": number,
        "layers_gone": sum(map(len, removed.values())),
        "seconds": seconds,
        "parent_s": parent_s,
    }
    row["shared_s"] = seconds - parent_s
    for name, known in (("loss", search.losses), ("translation", search.translated)):
        by_kind = defaultdict(list)
        for record in known.values():
            if record["part"]:
                by_kind[kind_of(Action(record["part"], record["bits"]))].append(record["seconds"])
        row[f"num_with_{name}"] = {kind: len(found) for kind, found in by_kind.items()}
        row[f"seconds_per_{name}"] = {kind: mean(found) for kind, found in by_kind.items()}
        row["shared_s"] -= sum(map(sum, by_kind.values()))
    print(json.dumps(row), flush=True)
    return row


def whole(rounds: Sequence[Round], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The cost of these rounds, each between the measured ones by its number of missing layers."""

    def between(gone: int, values: Sequence[tuple[int, float]]) -> float:
        at = sorted({number for number, _ in values})
        return float(np.interp(gone, at, [mean(s for number, s in values if number == one) for one in at]))

    total, counts = 0.0, {"loss": Counter[str](), "translation": Counter[str]()}
    for each in rounds:
        gone = sum(map(len, removed_by(each.state).values()))
        for name in ("parent_s", "shared_s"):
            total += between(gone, [(row["layers_gone"], row[name]) for row in rows])
        for name, actions in (("loss", each.candidates), ("translation", each.shortlist)):
            for kind, count in Counter(map(kind_of, actions)).items():
                seconds = [(row["layers_gone"], row[f"seconds_per_{name}"]) for row in rows]
                total += count * between(gone, [(number, s[kind]) for number, s in seconds if kind in s])
                counts[name][kind] += count
    return {
        "num_rounds": len(rounds), **{f"num_with_{name}": dict(found) for name, found in counts.items()},
        "seconds": total, "minutes": total / 60,
    }  # fmt: skip


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    started = time.perf_counter()
    case = case_7b(folder, args.clips, args.size)
    settings = RankSettings.model_validate(
        {
            "num_layers_to_remove": args.layers, "metric": "chrfpp",
            "budget": {
                "size": "1 GB", "bits": BITS, "actions_per_round": args.actions_per_round, "shortlist": args.shortlist,
            },
        }
    )  # fmt: skip
    search = make_search(case, folder, settings, args.size)
    start, least = search.smaller.num_bytes(), search.smaller.smallest()
    set_budget(search, size=args.budget or f"{(0.4 * start + 0.6 * least) / 1e3:.1f} kB")
    rounds = drawn(search)
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/budget_search.py", *args.given]), "commit": commit(args.commit),
        "machine": machine(), "size": args.size, "dtype": str(case.model.dtype), "clips": len(case.split.clips),
        "budget": search.scorer.settings.model_dump()["budget"], "bytes": {"before": start, "least": least},
        "seconds_to_start": clock(case.device) - started, "rounds": [],
    }  # fmt: skip
    print(f"{len(rounds)} rounds; {result['seconds_to_start']:.0f} s to start", flush=True)
    torch.manual_seed(0)
    search.begin()
    with peak_memory(case.device) as memory:
        for number in sorted({1, (1 + len(rounds)) // 2, len(rounds)}):
            result["rounds"].append(measured(search, case, number, rounds[number - 1]))
            result["whole_search"] = whole(rounds, result["rounds"])
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
    parser.add_argument("--shortlist", type=float, default=0.25, help="share of the candidates that are translated")
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
