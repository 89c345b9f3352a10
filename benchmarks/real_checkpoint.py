"""A first run with the published checkpoint: what is expected beside what is found, in one JSON file to send back.

    python benchmarks/real_checkpoint.py --model Qwen/Qwen2-Audio-7B-Instruct --data ymoslem/acl-6060 --out real-checkpoint

`--model` is a Hub id or a folder. `--data` is a Hub id, a folder with metadata.csv or a JSONL manifest: the clips of ACL 60/60, dev
then eval. The parts, in order (`--parts` chooses): files, tokens, zero-shot, finetune, search, recover, qlora, export. Each part is
written to OUT/result.json when it ends. A finished one is skipped when the command is given again, and a training goes on from its
checkpoint. Any other model of the qwen2_audio type goes through too: what differs is said, nothing fails for it.

For the published checkpoint OUT needs 120 GB free: a full fine-tuning holds two checkpoints with optimizer states for a moment (said by
the check of the disk on a machine with 65 GB, where files, tokens and zero-shot ran and finetune was refused). --tidy deletes each
trained model once the next one is made from it, which leaves 28 GB less at the end (calculated).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from published_checkpoint import check_files, check_tokens, read_json

from trimlingual.data.sources import Clip, Source, read_source
from trimlingual.evaluation.cost import disk_bytes, peak_memory
from trimlingual.models.loading import pick_device
from trimlingual.pipeline import run_stage
from trimlingual.recipe import FolderSource, HubSource, ManifestSource, Recipe, list_recipes, parse_recipe
from trimlingual.run.artifacts import find_artifact, machine, write_json
from trimlingual.run.jsonl import write_jsonl

PARTS = ("files", "tokens", "zero-shot", "finetune", "search", "recover", "qlora", "export")
RESULT = "result.json"
NUM_TEST, NUM_SELECT = 100, 100
# Published for the base model without training, on the whole evaluation set.
ZERO_SHOT_BLEU = {"de": 23.9, "zh": 40.5}
# The first layer that the published searches removed, from teachers trained for three epochs.
FIRST_REMOVED = {"de": 13, "zh": 3}
# What was measured at the true size, with random weights on one H100 (docs/recipes.md).
TRAINING = {
    "finetune": "0.41 s a step and 62.6 GB on an H100",
    "recover": "less than full fine-tuning's 0.41 s a step and 62.6 GB on an H100: one layer fewer",
    "qlora": "0.55 s a step of 4 clips and 30.7 GB on an H100; the recipe has steps of 8 clips",
}


class Kit:
    """The parts, and what they found, on disk after each."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.out = options, options.out
        self.device = pick_device("auto")
        self.language = options.languages[0]
        self.lines: list[dict[str, Any]] = []
        self.out.mkdir(parents=True, exist_ok=True)
        asked = {
            "model": named(options.model), "data": named(options.data), "languages": options.languages, "steps": options.steps,
            "clips": options.clips, "max_new_tokens": options.max_new_tokens,
        }  # fmt: skip
        self.path = self.out / RESULT
        if self.path.is_file():
            self.result = json.loads(self.path.read_text(encoding="utf-8"))
            if self.result["asked"] != asked:
                raise SystemExit(
                    f"error: {self.path} is of {self.result['asked']}, not of {asked}; choose another --out"
                )
        else:
            if any(self.out.iterdir()):
                raise SystemExit(f"error: {self.out} is not empty and holds no {RESULT}; choose another --out")
            self.result = {"kit": 1, "asked": asked, "parts": {}}
            write_json(self.path, self.result)

    def run(self, parts: Sequence[str]) -> None:
        """Every chosen part that is not finished."""
        work: dict[str, Callable[[], None]] = {
            "files": partial(check_files, self), "tokens": partial(check_tokens, self), "zero-shot": self.zero_shot,
            "finetune": self.finetune, "search": self.search, "recover": self.recover, "qlora": self.qlora, "export": self.export,
        }  # fmt: skip
        for name in PARTS:
            if name not in parts:
                continue
            if self.result["parts"].get(name, {}).get("finished"):
                print(f"== {name}: finished before", flush=True)
                continue
            print(f"== {name}", flush=True)
            self.lines, started = [], time.perf_counter()
            part: dict[str, Any] = {"finished": True}
            try:
                with peak_memory(self.device) as memory:
                    work[name]()
                part["peak_memory_bytes"] = memory.num_bytes
            except Exception as error:
                traceback.print_exc()
                part = {"finished": False, "error": self.without_paths(f"{type(error).__name__}: {error}")}
            part |= {"seconds": round(time.perf_counter() - started, 1), "lines": self.lines, "machine": machine()}
            self.result["parts"][name] = part
            write_json(self.path, self.result)

    def summary(self) -> None:
        """What differs, and what failed."""
        parts = self.result["parts"]
        different = [
            f"{name}: {line['what']}"
            for name, part in parts.items()
            for line in part["lines"]
            if line["equal"] is False
        ]
        failed = [f"{name}: {part['error']}" for name, part in parts.items() if not part["finished"]]
        missing = [name for name in PARTS if name not in parts]
        self.result |= {"different": different, "failed": failed, "not_run": missing}
        write_json(self.path, self.result)
        print(
            f"{len(different)} line(s) differ from what is expected, {len(failed)} part(s) failed, {len(missing)} not run"
        )
        for line in [*different, *failed]:
            print(f"  {line}")
        print(f"please send {self.path} back, in an issue of the repository")

    def line(self, what: str, expected: Any, found: Any, equal: bool | None) -> None:
        """Record one thing; `equal` None where `expected` only says what to think of `found`."""
        self.lines.append({"what": what, "expected": expected, "found": found, "equal": equal})
        mark = {True: "as expected", False: "DIFFERENT", None: ""}[equal]
        print(f"  {what}: {found} (expected: {expected}) {mark}", flush=True)

    def same(self, what: str, expected: Any, found: Any) -> None:
        """Something that must be exactly so."""
        self.line(what, expected, found, found == expected)

    def without_paths(self, text: str) -> str:
        """No folder of this machine in what is sent back."""
        for folder in (self.out.resolve(), Path(self.options.model), Path(self.options.data), Path.cwd(), Path.home()):
            if folder.is_absolute() and folder != Path("/"):
                text = text.replace(str(folder), f"<{folder.name}>")
        return text

    def zero_shot(self) -> None:
        """The base model on the paper's test clips."""
        for language in self.options.languages:
            recipe, run = self.recipe(language)
            run_stage(recipe, run, "evaluate base")
            self.data_lines(language, run)
            self.scores(
                language, run / "evaluations" / "base", f"{ZERO_SHOT_BLEU.get(language, 'none')} published, whole set"
            )

    def data_lines(self, language: str, run: Path) -> None:
        info = find_artifact(run / "data")
        assert info is not None
        for split, expected in (("test", NUM_TEST), ("select", NUM_SELECT), ("train", 884 - NUM_TEST - NUM_SELECT)):
            found = info.info["splits"][split]["num_clips"]
            self.line(f"{language}: clips, {split}", f"{expected}, less those over 30 s", found, None)
        self.line(f"{language}: clips left out as too long", "recorded", info.info.get("num_too_long_dropped"), None)

    def scores(self, language: str, folder: Path, bleu: str) -> None:
        result = read_json(folder / "result.json")
        found = result["languages"][language]
        self.line(f"{language}: BLEU", bleu, round(found["bleu"]["value"], 2), None)
        for metric in ("chrf", "chrfpp"):
            self.line(f"{language}: {metric}", "recorded", round(found[metric]["value"], 2), None)
        self.line(f"{language}: signature of BLEU", "recorded", found["bleu"]["signature"], None)
        self.line(f"{language}: answers cut off", "0, or nearly", found["num_truncated"], None)
        self.line(
            f"{language}: seconds a clip",
            "0.024 on an H100, in batches of 32",
            result["speed"].get("seconds_per_clip"),
            None,
        )

    def finetune(self) -> None:
        self.training("finetune", "teacher")

    def search(self) -> None:
        """One round: every layer but the first and the last is tried, the best one goes."""
        recipe, run = self.recipe(self.language)
        run_stage(recipe, run, "rank")
        plan = read_json(run / "rank" / "plan.json")
        layers = len(plan["layers"]["decoder"])
        tried = [record for record in plan["candidates"] if record["round"] == 1]
        self.same("candidates of the first round", layers - 2, len(tried))
        removed = plan["removals"][0]
        note = f"{FIRST_REMOVED.get(self.language)} published, from a teacher of three epochs"
        self.line("layer that goes first", note, removed["layer"], None)
        self.line("score before and after", "little lost", [plan["baseline_score"], removed["score"]], None)
        self.line("seconds of the search", "20 to 26 on an H100, calculated", plan["seconds"], None)
        self.line("scores of all candidates", "recorded", {r["layer"]: r["score"] for r in tried}, None)
        run_stage(recipe, run, "pruned")
        self.drop("teacher")

    def recover(self) -> None:
        self.training("recover", "recovered")
        self.drop("pruned")

    def qlora(self) -> None:
        self.training("qlora", "quantized")
        self.drop("recovered")

    def training(self, name: str, stage: str) -> None:
        """So many steps of one training, and what they took."""
        recipe, run = self.recipe(self.language)
        with peak_memory(self.device) as memory:
            artifact = run_stage(recipe, run, stage)
        info = artifact.info.get("training", artifact.info)
        losses = [entry["loss"] for entry in info.get("losses", [])]
        self.same(f"{name}: steps", self.options.steps, info.get("steps"))
        finite = bool(losses) and all(math.isfinite(loss) for loss in losses)
        self.line(f"{name}: every loss is a number", True, finite, finite)
        self.line(f"{name}: losses", "falling", losses, None)
        self.line(f"{name}: examples", "recorded", info.get("num_examples"), None)
        self.line(f"{name}: seconds, loading and saving included", TRAINING[name], artifact.seconds, None)
        self.line(f"{name}: peak GB", TRAINING[name], round(memory.num_bytes / 1e9, 2), None)
        rest = {key: value for key, value in artifact.info.items() if not isinstance(value, (list, dict))}
        self.line(f"{name}: what the stage recorded", "recorded", rest, None)

    def drop(self, *stages: str) -> None:
        """With --tidy: models that no later part reads. Only what this kit made in its own folder."""
        _, run = self.recipe(self.language)
        for stage in stages if self.options.tidy else ():
            if find_artifact(run / stage):
                shutil.rmtree(run / stage)

    def export(self) -> None:
        """The quantised model, scored; the folder that ships, and its proof."""
        recipe, run = self.recipe(self.language)
        run_stage(recipe, run, "evaluate quantized")
        self.scores(self.language, run / "evaluations" / "quantized", "recorded; a hundred steps of training are few")
        artifact = run_stage(recipe, run, "exported")
        self.line(
            "GB of the folder that ships", "6.14 with 31 layers, calculated", disk_bytes(run / "exported") / 1e9, None
        )
        generation = read_json(run / "exported" / "generation_config.json")
        greedy = {key: generation.get(key) for key in ("temperature", "top_k", "top_p", "repetition_penalty")}
        plain = not generation.get("do_sample") and greedy["repetition_penalty"] in (None, 1.0)
        self.line("the folder's generation is greedy", True, plain, plain)
        self.line(
            "what the export recorded, its proof included",
            "at least 0.95 of the recorded translations",
            artifact.info,
            None,
        )

    def recipe(self, language: str) -> tuple[Recipe, Path]:
        """The paper's system B, shortened: one round of search, so many steps, no distilled and no out-of-domain data."""
        name = f"qwen2-audio-en-{language}"
        shipped = list_recipes()
        raw = yaml.safe_load((shipped.get(name) or shipped["qwen2-audio-en-de"]).read_text(encoding="utf-8"))
        raw |= {
            "name": f"real-checkpoint-{language}",
            "description": "A first run with the published checkpoint",
            "distill": None,
        }
        raw["model"]["base"] = self.options.model
        raw["task"]["target_languages"] = [language]
        manifests = self.manifests()
        raw["data"] = {split: {"kind": "manifest", "path": str(path)} for split, path in manifests.items()}
        raw["data"]["too_long"] = "drop"
        raw["rank"]["num_layers_to_remove"] = 1
        raw["quantize"]["start"] = "recovered"
        raw["evaluate"] = {"models": ["base", "quantized"]}
        for train in (raw["finetune"], raw["recover"], raw["quantize"]["train"]):
            train |= {"max_steps": self.options.steps, "logging_steps": max(1, self.options.steps // 10)}
            train["data"] = {"gold": 1}
            if self.device.type == "cpu":
                train |= {
                    "optimizer": "adamw_torch",
                    "mixed_precision": "no",
                    "num_workers": 0,
                    "gradient_checkpointing": False,
                }
        if self.device.type == "cpu":
            raw["model"]["dtype"] = raw["quantize"]["compute_dtype"] = "float32"
        if self.options.max_new_tokens:
            raw["decode"] = {"max_new_tokens": self.options.max_new_tokens}
        return parse_recipe(raw), self.out / language

    def manifests(self) -> dict[str, Path]:
        """The clips by split, as the paper drew its test clips; the next of the same order choose layers."""
        folder = self.out / "clips"
        paths = {split: folder / f"{split}.jsonl" for split in ("train", "select", "test")}
        if not all(path.is_file() for path in paths.values()):
            folder.mkdir(parents=True, exist_ok=True)
            clips = read_source(source(self.options.data, self.options.languages), self.options.languages, folder)
            for split, chosen in paper_split(clips[: self.options.clips]).items():
                records = [
                    {"audio": str(c.audio), "references": c.references, "source": c.source, "id": c.id} for c in chosen
                ]
                write_jsonl(paths[split], records)
        return paths


def paper_split(clips: Sequence[Clip]) -> dict[str, list[Clip]]:
    """Test clips as `train_test_split(test_size=100, seed=0)` of `datasets` draws them; fewer from a smaller set."""
    order = np.random.default_rng(0).permutation(len(clips))
    tested = min(NUM_TEST, len(clips) // 4)
    chosen = min(NUM_SELECT, len(clips) // 4)
    parts = {"test": order[:tested], "select": order[tested : tested + chosen], "train": order[tested + chosen :]}
    return {split: [clips[int(i)] for i in indices] for split, indices in parts.items()}


def source(data: str, languages: Sequence[str]) -> Source:
    """ACL 60/60 as a manifest, a folder with metadata.csv, or a data set of the Hub."""
    references = {language: f"text_{language}" for language in languages}
    if data.endswith(".jsonl"):
        return ManifestSource(path=data)
    if (Path(data) / "metadata.csv").is_file():
        return FolderSource(kind="folder", path=data, references=references, source="text_en")
    return HubSource(kind="hub", path=data, splits=["dev", "eval"], references=references, source="text_en")


def named(given: str) -> str:
    """A Hub id as it is; of a folder or file only its name."""
    path = Path(given)
    return path.name if path.exists() or path.is_absolute() or path.suffix == ".jsonl" else given


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2-Audio-7B-Instruct")
    parser.add_argument("--data", default="ymoslem/acl-6060")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--languages", nargs="+", default=["de", "zh"], help="trained and searched with: the first")
    parser.add_argument("--steps", type=int, default=100, help="of each training")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--clips", type=int, help="only the first so many of the data, for a trial")
    parser.add_argument("--max-new-tokens", type=int, help="shorter answers, for a trial")
    parser.add_argument(
        "--tidy", action="store_true", help="delete each trained model once the next one is made from it"
    )
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    kit = Kit(options)
    kit.run(options.parts)
    kit.summary()
    return kit.result


if __name__ == "__main__":
    main()
