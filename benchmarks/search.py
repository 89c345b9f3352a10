"""The layer search against the published procedure, side by side in one run, and what each lever brings.

    python benchmarks/search.py --model 7b      # Qwen2-Audio-7B's shapes, random weights, one 80 GB GPU
    python benchmarks/search.py --model mini    # the built-in model, any machine

Published (Moslem 2025): for every candidate a deep copy of the model, and for every clip processor, audio tower and `generate`. It is
run on some clips for candidates of several rounds; seconds a clip are fitted as a line over its tokens, which gives the seconds of a
candidate (on the mini model all clips are run). Ours is the search itself, whole, as `rank` runs it.

Random weights never end a translation, so there both decode the same number of tokens a clip, drawn around 4 a second of audio
(METHOD: 40 for 10 s). They also make every draft wrong at once and every score nearly 0: drafts and early stopping cost here and bring
nothing, and what they bring is measured on the mini model. The levers are cumulative. Prints tables, then one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from published_search import Case, clock, generate_embedded, prompts_of, published_candidate
from transformers import WhisperFeatureExtractor
from true_size import build, make_data

from trimlingual.artifacts import machine, write_json
from trimlingual.candidates import Scorer
from trimlingual.data import Split
from trimlingual.decode import encode_clips, greedy
from trimlingual.drafts import trace, translate_without
from trimlingual.lineage import Lineage
from trimlingual.models import eos_token_ids, load_model, load_processor, resolve_base
from trimlingual.packed import PackedDecoder
from trimlingual.recipe import RankSettings, load_recipe
from trimlingual.search import Search
from trimlingual.sources import Clip, read_source
from trimlingual.stepping import Stepper

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
    kind = FixedLengths if case.num_tokens else Scorer
    arguments = (case.model, case.processor, case.split, case.task, case.decode, settings, lineage, layers)
    scorer = kind(*arguments)
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
        records = list(search.known.values())
    rounds = {n: [r for r in plan.candidates if r["round"] == n] for n in range(1, num_remove + 1)}
    scored = sum(r["seconds"] for r in plan.candidates)
    return {
        "seconds": seconds,
        "num_candidates": len(plan.candidates),
        "num_given_up": sum(r["score"] is None for r in plan.candidates),
        "seconds_a_candidate_by_round": [mean(r["seconds"] for r in rs) * seconds / scored for rs in rounds.values()],
        "removed": [r.layer for r in plan.removals],
        "records": records,
    }


def published(case: Case, num_remove: int, rounds: Sequence[int], num_clips: int) -> dict[str, Any]:
    """Seconds of a candidate in these rounds (1 is the first), and the translations."""
    order = sorted(range(len(case.split.clips)), key=lambda clip: case.split.clips[clip].duration_s)
    clips = [order[i] for i in np.linspace(0, len(order) - 1, min(num_clips, len(order))).round().astype(int)]
    count = len(case.model.model.language_model.layers)
    published_candidate(case, [1], clips[:1])  # warm-up
    candidates = []
    for number in rounds:
        removed = [int(i) for i in np.linspace(1, count - 2, number).round()]
        copied, done = published_candidate(case, removed, clips)
        if len(clips) == len(order):
            seconds = copied + sum(row["seconds"] for row in done)
        else:
            slope, base = np.polyfit([len(row["tokens"]) for row in done], [row["seconds"] for row in done], 1)
            seconds = copied + sum(base + slope * case.limit(clip) for clip in order)
        candidates.append({"round": number, "removed": removed, "copy_s": copied, "seconds": seconds, "rows": done})
        print(f"published, round {number}: {seconds:.1f} s a candidate (copy {copied:.2f} s)", flush=True)
    every = np.interp(range(1, num_remove + 1), [c["round"] for c in candidates], [c["seconds"] for c in candidates])
    return {"candidates": candidates, "seconds_a_candidate_by_round": every.tolist(), "num_clips": len(clips)}


def levers(case: Case, positions: Sequence[int]) -> list[dict[str, Any]]:
    """Seconds a candidate, adding one lever after the other; means over removals at the given depths."""
    order = sorted(range(len(case.split.clips)), key=lambda clip: -case.split.clips[clip].duration_s)
    count = len(case.model.model.language_model.layers)
    with torch.inference_mode():
        states = encode_clips(case.model, case.processor, case.split.clips, 32)
        prompts = prompts_of(case, states, order)
    limits = [case.limit(clip) for clip in order for _ in case.task.target_languages]
    eos = () if case.num_tokens else eos_token_ids(case.model, case.processor)
    table: list[dict[str, Any]] = []

    def add(name: str, work: Callable[[], Any], per: int = 1, warm: bool = True) -> None:
        if warm:
            work()
        started = clock(case.device)
        work()
        table.append({"lever": name, "seconds": (clock(case.device) - started) / per})
        print(f"{table[-1]['seconds']:9.2f} s  {name}", flush=True)

    some = list(range(0, len(prompts), max(1, len(prompts) // 12)))

    def one_at_a_time() -> None:
        for i in some:
            generate_embedded(case, [prompts[i]], limits[i])

    started = clock(case.device)
    one_at_a_time()
    seconds = clock(case.device) - started
    tokens = sum(limits[i] for i in some) if case.num_tokens else len(some)
    total = sum(limits) if case.num_tokens else len(prompts)
    table.append({"lever": "clips encoded once, no copy of the model", "seconds": seconds / tokens * total})
    print(f"{table[-1]['seconds']:9.2f} s  {table[-1]['lever']}", flush=True)
    halves = [range(i, min(i + 50, len(prompts))) for i in range(0, len(prompts), 50)]
    add(
        "all clips in batches of 50 (generate)",
        lambda: [generate_embedded(case, [prompts[i] for i in half], max(limits[i] for i in half)) for half in halves],
        warm=False,
    )
    stepper, gpu = Stepper(PackedDecoder(case.model), eos), case.device.type == "cuda"
    few = positions[::3] if gpu else positions

    def decode_all() -> None:
        for position in few:
            greedy(stepper, prompts, limits, 128, [i for i in range(count) if i != position])

    name = "our decoder: no padding, slots" + (", CUDA graphs" if gpu else ", ended rows leave")
    add(name, decode_all, len(few), warm=gpu)
    parent = greedy(stepper, prompts, limits, 128)

    def shared(blocks: Sequence[Sequence[int]], drafts: bool, gone: Sequence[int], group: int) -> Callable[[], None]:
        def work() -> None:
            for block in blocks:
                kept = [parent[i] if drafts else parent[i][:1] for i in block]
                own = [prompts[i] for i in block]
                key = (tuple(block), drafts)
                if key not in traces:
                    traces[key] = trace(stepper.decoder, own, kept, [limits[i] for i in block], range(count), positions)
                for start in range(0, len(gone), group):
                    translate_without(stepper, traces[key], gone[start : start + group])

        return work

    traces: dict[Any, Any] = {}
    whole = [range(i, min(i + 128, len(prompts))) for i in range(0, len(prompts), 128)]
    add("prefill below the missing layer shared", shared(whole, False, few, 1), len(few), warm=gpu)
    traces.clear()
    add("the parent's translation as a draft", shared(whole, True, few, 1), len(few), warm=gpu)
    traces.clear()
    if gpu:
        quarters = [list(block) for block in np.array_split(np.arange(len(prompts)), max(1, len(prompts) // 25))]
        quarters = [[int(i) for i in block] for block in quarters]
        work = shared(quarters, True, positions, len(positions))
        work()
        add("several candidates in one batch", work, len(positions), warm=False)
    return table


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


def differences(case: Case, theirs: dict[str, Any]) -> dict[str, int]:
    """How many translations of the published procedure ours does not reproduce, for the same removals."""
    stepper = Stepper(PackedDecoder(case.model), eos_token_ids(case.model, case.processor))
    count = len(stepper.decoder.layers)
    states = encode_clips(case.model, case.processor, case.split.clips, 32)
    languages = case.task.target_languages
    differ = total = 0
    for candidate in theirs["candidates"]:
        *before, last = candidate["removed"]
        active = [i for i in range(count) if i not in before]
        clips = sorted({row["clip"] for row in candidate["rows"]})
        prompts = prompts_of(case, states, clips)
        limits = [case.limit(clip) for clip in clips for _ in languages]
        parent = greedy(stepper, prompts, limits, case.decode.batch_size, active)
        (mine,) = translate_without(stepper, trace(stepper.decoder, prompts, parent, limits, active, [last]), [last])
        assert mine is not None
        found = {(row["clip"], row["language"]): row["tokens"] for row in candidate["rows"]}
        wanted = [found[clip, language] for clip in clips for language in languages]
        differ += sum(a != b for a, b in zip(mine, wanted))
        total += len(wanted)
    return {"translations": total, "differ": differ}


def main() -> None:
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
    mini = args.model == "mini"
    remove = args.remove or (3 if mini else 8)
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = args.commit or subprocess.run(git, capture_output=True, text=True).stdout.strip()
    given = {
        k: v for k, v in vars(args).items() if v != parser.get_default(k) and k not in ("out", "commit", "model_dir")
    }
    flags = "".join(f" --{name.replace('_', '-')} {value}" for name, value in given.items())
    result: dict[str, Any] = {"command": f"python benchmarks/search.py{flags}", "commit": commit}
    out = args.out or RESULTS / f"search_{args.model}.json"
    parts = args.parts.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if mini:
            case = case_mini(folder, args.model_dir or resolve_base("builtin:mini"), args.device, args.dtype)
        else:
            case = case_7b(folder, args.clips, args.model)
        layers = len(case.model.model.language_model.layers)
        lengths = [clip.duration_s for clip in case.split.clips]
        result |= {
            "machine": machine(),
            "model": args.model,
            "dtype": str(case.model.dtype),
            "device": case.device.type,
        }
        result["clips"] = {
            "count": len(lengths),
            "seconds": {"mean": mean(lengths), "min": min(lengths), "max": max(lengths)},
        }
        if case.num_tokens:
            tokens = case.num_tokens
            result["clips"]["tokens"] = {"mean": mean(tokens), "min": min(tokens), "max": max(tokens)}
        metric = load_recipe("mini").rank.metric if mini else "chrfpp"  # type: ignore[union-attr]
        theirs: dict[str, Any] = {}

        def part(name: str, work: Callable[[], Any]) -> None:
            if name.split("_")[0] in parts:
                result[name] = work()
                kept = {k: v for k, v in result.items()}
                out.parent.mkdir(parents=True, exist_ok=True)
                write_json(out, _without_rows(kept))

        if "published" in parts:
            theirs = published(
                case, remove, sorted({1, (1 + remove) // 2, remove}), args.published_clips or (10**6 if mini else 10)
            )
            part("published", lambda: theirs)
        part("ours", lambda: ours(case, remove, metric, True))
        if mini:
            part("ours_without_early_stopping", lambda: ours(case, remove, metric, False))
        if "published" in parts and "ours" in parts:
            pairs = list(zip(theirs["seconds_a_candidate_by_round"], result["ours"]["seconds_a_candidate_by_round"]))
            counts = [layers - 2 - n for n in range(remove)]
            ratios = [a / b for a, b in pairs]
            whole = sum(n * a for n, (a, _) in zip(counts, pairs)) / result["ours"]["seconds"]
            result["speedup_vs_published"] = {
                "median": median(ratios),
                "min": min(ratios),
                "max": max(ratios),
                "whole_search": whole,
            }
            print("speedup_vs_published", result["speedup_vs_published"], flush=True)
        depths = [int(i) for i in np.linspace(1, layers - 2, 10 if not mini else 4).round()]
        part("levers", lambda: levers(case, depths))
        if case.device.type == "cuda":
            part("decode", lambda: against_generate(case))
        if mini and theirs:
            part("differences", lambda: differences(case, theirs))
    write_json(out, _without_rows(result))
    print(json.dumps(_without_rows(result)))


def _without_rows(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_rows(v) for k, v in value.items() if k not in ("rows", "records")}
    return [_without_rows(v) for v in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
