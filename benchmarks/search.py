"""The layer search against the published procedure, side by side in one run, and what each lever brings.

    python benchmarks/search.py --model 7b      # Qwen2-Audio-7B's shapes, random weights, one 80 GB GPU
    python benchmarks/search.py --model mini    # the built-in model, any machine

Published (Moslem 2025): for every candidate a deep copy of the model, and for every clip processor, audio tower and `generate`. It is
run on some clips for candidates of several rounds; seconds a clip are fitted as a line over its tokens, which gives the seconds of a
candidate (on the mini model all clips are run). Ours is the search itself, whole, as `rank` runs it.

Random weights never end a translation, so there both decode the same number of tokens a clip, drawn around 4 a second of audio. They
also make every draft wrong at once and every score nearly 0: early stopping brings nothing here, and drafts cost until the search
notices, after its first round; what they bring is measured on the mini model. The levers are cumulative. Prints tables, then one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from commit import commit
from published_search import Case, clock, generate_embedded, prompts_of, published_candidate
from search_levers import Levers
from transformers import WhisperFeatureExtractor
from true_size import build, make_data

from trimlingual.data.sources import Clip, read_source
from trimlingual.data.splits import Split
from trimlingual.decoding.decoder import PackedDecoder
from trimlingual.decoding.loop import Stepper
from trimlingual.decoding.translate_clips import encode_clips, greedy
from trimlingual.evaluation.cost import peak_memory
from trimlingual.models.family import family_of
from trimlingual.models.loading import load_model, load_processor, resolve_base
from trimlingual.recipe import ModelSettings, RankSettings, SharedSettings, load_recipe
from trimlingual.run.artifacts import machine, write_json
from trimlingual.run.lineage import Lineage
from trimlingual.search.from_parent import trace, translate_without
from trimlingual.search.scorer import Scorer
from trimlingual.search.search import Search, second_best

RESULTS = Path(__file__).parent / "results"


class FixedLengths(Scorer):
    """The search's scorer with a given number of tokens a clip."""

    num_tokens: Sequence[int] = ()

    def _limits(self, block: Sequence[int]) -> list[int]:
        return [self.num_tokens[clip] for clip in block for _ in self.translated]


def case_7b(folder: Path, num_clips: int, size: str) -> Case:
    processor = load_processor(resolve_base("builtin:mini"))
    processor.feature_extractor = WhisperFeatureExtractor(feature_size=128)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(size, processor, device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    clips, _ = make_data(folder, num_clips, processor)
    rng = np.random.default_rng(1)
    num_tokens = [max(8, round(clip.duration_s * 4 * rng.lognormal(0, 0.25))) for clip in clips]
    recipe = load_recipe("qwen2-audio-en-de")
    return Case(model, processor, Split("select", tuple(clips)), recipe.task, recipe.decode, num_tokens)


def case_mini(folder: Path, model_dir: Path, device: str, dtype: Any) -> Case:
    recipe = load_recipe("mini")
    model = load_model(model_dir, dtype, torch.device(device))
    clips: Sequence[Clip] = read_source(recipe.data.select, recipe.task.target_languages, folder)
    return Case(model, load_processor(model_dir), Split("select", tuple(clips)), recipe.task, recipe.decode, None)


def make_search(case: Case, journal: Path, settings: RankSettings) -> Search:
    count = len(case.model.model.language_model.layers)
    layers = {"decoder": list(range(count)), "encoder": list(range(len(case.model.model.audio_tower.layers)))}
    lineage = Lineage("benchmark", layers, {tower: len(indices) for tower, indices in layers.items()})
    scorer_class = FixedLengths if case.num_tokens else Scorer
    shared = SharedSettings(case.task, ModelSettings(base="benchmark"), case.decode)
    scorer = scorer_class(case.model, case.processor, case.split, shared, settings, lineage, layers)
    if isinstance(scorer, FixedLengths):
        assert case.num_tokens is not None
        scorer.num_tokens, scorer.eos, scorer._stepper.eos = case.num_tokens, (), ()
    return Search(scorer, journal)


def ours(case: Case, num_remove: int, metric: Any, early_stopping: bool) -> dict[str, Any]:
    """The whole search; seconds a candidate by round, each round's share of what its candidates have in common included."""
    settings = RankSettings(num_layers_to_remove=num_remove, metric=metric, early_stopping=early_stopping)
    with tempfile.TemporaryDirectory() as folder:
        search = make_search(case, Path(folder) / "journal.jsonl", settings)
        started = clock(case.device)
        plan = search.run()
        seconds = clock(case.device) - started
    rounds = []
    scored = sum(r["seconds"] for r in plan.candidates)
    for number in range(1, num_remove + 1):
        of_round = [r for r in plan.candidates if r["round"] == number]
        share = (
            mean(r["seconds"] for r in of_round) * seconds / scored
        )  # with its part of what candidates have in common
        given_up = sum(r["score"] is None for r in of_round)
        rounds.append({"round": number, "num_candidates": len(of_round), "num_given_up": given_up, "seconds": share})
    return {"seconds": seconds, "rounds": rounds, "removed": [r.layer for r in plan.removals]}


def some_rounds(case: Case, metric: Any, rounds: Sequence[int], folder: Path) -> dict[str, Any]:
    """Whole rounds of the search: the parent's pass and every candidate. The parent's translations come from the round before."""
    settings = RankSettings(metric=metric)
    search = make_search(case, folder / "journal.jsonl", settings)
    scorer, done = search.scorer, []
    search.known = {}
    for number in rounds:
        gone = removals(case, number)[:-1]
        scorer.begin_round({"decoder": gone}, None)
        parent = scorer.parent_tally().tokens
        started = clock(case.device)
        scorer.begin_round({"decoder": gone}, parent)
        candidates = scorer.candidates(scorer.lineage.without({"decoder": gone}))
        ordered = search._ordered(number, candidates)
        shared = clock(case.device) - started
        records = search.share_out(number, ordered, scorer.blocks, second_best)
        seconds = (clock(case.device) - started) / len(candidates)
        given_up = sum(r["score"] is None for r in records)
        done.append(
            {
                "round": number,
                "num_candidates": len(candidates),
                "num_given_up": given_up,
                "seconds": seconds,
                "shared_s": shared,
            }
        )
        print(
            f"ours, round {number}: {seconds:.3f} s a candidate ({len(candidates)} of them, {shared:.1f} s for what they share)",
            flush=True,
        )
    return {"rounds": done}


def removals(case: Case, number: int) -> list[int]:
    """Layers that a candidate of round `number` lacks."""
    return [int(i) for i in np.linspace(1, len(case.model.model.language_model.layers) - 2, number).round()]


def published(case: Case, rounds: Sequence[int], num_clips: int) -> list[dict[str, Any]]:
    """Seconds of a candidate in these rounds (1 is the first), and its translations."""
    order = sorted(range(len(case.split.clips)), key=lambda clip: case.split.clips[clip].duration_s)
    clips = [order[i] for i in np.linspace(0, len(order) - 1, min(num_clips, len(order))).round().astype(int)]
    published_candidate(case, [1], clips)  # warm-up: a fresh machine is slow for its first half-minute
    candidates = []
    for number in rounds:
        copied, done = published_candidate(case, removals(case, number), clips)
        if len(clips) == len(order):
            seconds = copied + sum(row["seconds"] for row in done)
        else:
            slope, base = np.polyfit([len(row["tokens"]) for row in done], [row["seconds"] for row in done], 1)
            languages = len(case.task.target_languages)
            lengths = [case.limit(c) for c in order] if case.num_tokens else [len(r["tokens"]) for r in done]
            seconds = copied + (base + slope * mean(lengths)) * len(order) * languages
        each = [[len(row["tokens"]), round(row["seconds"], 4)] for row in done]
        candidates.append(
            {"round": number, "copy_s": copied, "seconds": seconds, "tokens_and_seconds": each, "rows": done}
        )
        print(f"published, round {number}: {seconds:.1f} s a candidate (copy {copied:.2f} s)", flush=True)
    return candidates


def against_generate(case: Case, tokens: int = 40) -> list[dict[str, Any]]:
    """Hugging Face `generate` and our decoder at the same batch, the same number of tokens."""
    order = sorted(range(len(case.split.clips)), key=lambda clip: case.split.clips[clip].duration_s)
    middle = len(order) // 2
    with torch.inference_mode():
        states = encode_clips(case.model, case.processor, case.split.clips, 32)
        stepper = Stepper(PackedDecoder(case.model), ())
        table = []
        for batch in (1, 8, 32):
            chosen = order[max(0, middle - batch // 2) :][:batch]
            prompts = prompts_of(case, states, chosen)[:batch]
            seconds: dict[str, float] = {}
            for name, work in (
                ("generate", lambda p=prompts: generate_embedded(case, p, tokens)),
                ("ours", lambda p=prompts: greedy(stepper, p, [tokens] * len(p), len(p))),
            ):
                work()
                times = []
                for _ in range(3):
                    started = clock(case.device)
                    work()
                    times.append(clock(case.device) - started)
                seconds[name] = median(times)
            table.append(
                {"batch": batch, "tokens": tokens, **seconds, "speedup": seconds["generate"] / seconds["ours"]}
            )
            print(f"batch {batch}: generate {seconds['generate']:.3f} s, ours {seconds['ours']:.3f} s", flush=True)
    return table


def differences(case: Case, theirs: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many translations of the published procedure ours does not reproduce, for the same removals."""
    stepper = Stepper(PackedDecoder(case.model), family_of(case.model).end_tokens(case.model, case.processor))
    count = len(stepper.decoder.layers)
    states = encode_clips(case.model, case.processor, case.split.clips, 32)
    languages = case.task.target_languages
    differ = total = 0
    for candidate in theirs:
        *before, last = removals(case, candidate["round"])
        active = [i for i in range(count) if i not in before]
        clips = sorted({row["clip"] for row in candidate["rows"]})
        prompts = prompts_of(case, states, clips)
        limits = [case.limit(clip) for clip in clips for _ in languages]
        parent = greedy(stepper, prompts, limits, case.decode.batch_size, active)
        (mine,) = translate_without(stepper, trace(stepper.decoder, prompts, parent, limits, active, [last]), [last])
        assert mine is not None
        found = {(row["clip"], row["language"]): row["tokens"] for row in candidate["rows"]}
        expected = [found[clip, language] for clip in clips for language in languages]
        differ += sum(a != b for a, b in zip(mine, expected))
        total += len(expected)
    return {"translations": total, "differ": differ}


def speedup(result: dict[str, Any], layers: int, remove: int) -> dict[str, Any]:
    """Published over ours: every pair of measured rounds, and the whole search with the rounds between by interpolation."""
    theirs: dict[int, list[float]] = {}
    for candidate in result["published"]:
        theirs.setdefault(candidate["round"], []).append(candidate["seconds"])
    mine = {r["round"]: r["seconds"] for r in result["ours"]["rounds"]}
    ratios = [float(seconds / mine[number]) for number, some in theirs.items() for seconds in some]
    counts = np.array([layers - 2 - n for n in range(remove)])
    whole = []
    for values in ({number: median(some) for number, some in theirs.items()}, mine):
        each = np.interp(np.arange(1, remove + 1), list(values), list(values.values()))
        whole.append(float((each * counts).sum()))
    names = ("published_seconds", "ours_seconds")
    return {
        "median": median(ratios), "min": min(ratios), "max": max(ratios), "num_candidates": int(counts.sum()),
        **dict(zip(names, whole)), "whole_search": whole[0] / whole[1],
    }  # fmt: skip


def parsed() -> argparse.Namespace:
    """The arguments, with the command as it was given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("7b", "small", "mini"), default="mini")
    parser.add_argument(
        "--model-dir", type=Path, help="mini: another model than the built-in one, e.g. a run's teacher"
    )
    parser.add_argument("--clips", type=int, default=100, help="7b: clips of the selection set")
    parser.add_argument("--remove", type=int, help="layers to remove; default 8 of 32, 3 of 12")
    parser.add_argument("--published-clips", type=int, help="clips the published procedure is run on; mini: all")
    parser.add_argument("--device", default="cpu", help="mini")
    parser.add_argument("--dtype", default="float32", help="mini")
    parser.add_argument("--parts", default="published,ours,levers,decode,differences")
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    unnamed = ("out", "commit", "model_dir")
    given = {k: v for k, v in vars(args).items() if v != parser.get_default(k) and k not in unnamed}
    flags = "".join(f" --{name.replace('_', '-')} {value}" for name, value in given.items())
    args.command = f"python benchmarks/search.py{flags}"
    return args


class Record:
    """What was measured, written after every part."""

    def __init__(self, args: argparse.Namespace, case: Case):
        self.case, self.path = case, args.out or RESULTS / f"search_{args.model}.json"
        seconds = [clip.duration_s for clip in case.split.clips]
        self.result: dict[str, Any] = {
            "command": args.command, "commit": commit(args.commit), "machine": machine(), "model": args.model,
            "dtype": str(case.model.dtype), "device": case.device.type, "clips": {"count": len(seconds), "seconds": _spread(seconds)},
        }  # fmt: skip
        if case.num_tokens:
            self.result["clips"]["tokens"] = _spread(case.num_tokens)

    def part(self, name: str, work: Callable[[], Any]) -> None:
        """Do a part and write what there is."""
        with peak_memory(self.case.device) as memory:
            self.result[name] = work()
        if name == "ours":
            self.result["peak_bytes"] = memory.num_bytes
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, _without_rows(self.result))


def main() -> None:
    args = parsed()
    mini, parts = args.model == "mini", args.parts.split(",")
    remove = args.remove or (3 if mini else 8)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if mini:
            case = case_mini(folder, args.model_dir or resolve_base("builtin:mini"), args.device, args.dtype)
        else:
            case = case_7b(folder, args.clips, args.model)
        layers = len(case.model.model.language_model.layers)
        record = Record(args, case)
        metric = load_recipe("mini").rank.metric if mini else "chrfpp"  # type: ignore[union-attr]
        theirs: list[dict[str, Any]] = []
        rounds = sorted({1, (1 + remove) // 2, remove})
        num_clips = args.published_clips or (len(case.split.clips) if mini else 6)
        if "published" in parts:  # before ours and after it: a shared machine is not as fast at all times
            theirs += published(case, rounds, num_clips)
        if "ours" in parts and mini:
            record.part("ours", lambda: ours(case, remove, metric, True))
            record.part("ours_without_early_stopping", lambda: ours(case, remove, metric, False))
        elif "ours" in parts:
            record.part("ours", lambda: some_rounds(case, metric, rounds, folder))
        if "published" in parts and not mini:
            theirs += published(case, rounds, num_clips)
        if theirs:
            record.part("published", lambda: theirs)
            record.part("speedup_vs_published", lambda: speedup(record.result, layers, remove))
            print("speedup_vs_published", record.result["speedup_vs_published"], flush=True)
        if "levers" in parts:
            depths = [int(i) for i in np.linspace(1, layers - 2, 19 if not mini else 4).round()]
            record.part("levers", Levers(case, depths).run)
        if "decode" in parts and case.device.type == "cuda":
            record.part("decode", lambda: against_generate(case))
        if "differences" in parts and mini and theirs:
            record.part("differences", lambda: differences(case, theirs))
    write_json(record.path, _without_rows(record.result))
    print(json.dumps(_without_rows(record.result)))


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": mean(values), "min": min(values), "max": max(values)}


def _without_rows(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_rows(v) for k, v in value.items() if k != "rows"}
    return [_without_rows(v) for v in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
