"""What each stage takes at the true size: the stages of a run themselves, on random weights and a few clips; no network, minutes.

    python benchmarks/full_size.py                                    # one GPU of 80 GB, 50 GB of disk in --work
    python benchmarks/full_size.py --base random:qwen2-audio-tiny     # the same path on a CPU
    python benchmarks/full_size.py --parts pruned quantized-24 --work FOLDER   # some parts; earlier ones must stand in FOLDER

The recipe is qwen2-audio-en-de, shortened: few clips, few steps, one round of the search over a few candidates. Memory does not
depend on the number of steps. For each part: the peak of PyTorch's allocator (handed out, and reserved from the GPU), the process's
peak in host memory, seconds, and what stays on disk. Quantisation runs with the allocator limited to --limit-gb, which is what a
smaller GPU would allow.

Full fine-tuning writes no checkpoint here (about 50 GB each at 7B, twice), and folders are deleted once no later part reads them, so
that a small disk will do. The JSON says so, and is written again after every part.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from commit import commit
from true_size import write_manifests

from trimlingual.evaluation.cost import MeasureError, disk_bytes, peak_memory
from trimlingual.models.loading import load_processor, resolve_base
from trimlingual.pipeline import plan
from trimlingual.recipe import load_recipe
from trimlingual.run.artifacts import machine, write_json
from trimlingual.steps import Step, model_ref
from trimlingual.training import trainer

RESULTS = Path(__file__).parent / "results"
RECIPE = "qwen2-audio-en-de"
CLIPS = {"train": 16, "select": 8, "test": 8}
STEPS = 4
CANDIDATES = 3  # in the one round of the search
NEW_TOKENS = 40  # a random model seldom ends an answer by itself
NOTE = (
    "full fine-tuning without checkpoints (two of about 50 GB stand beside it in a run); "
    "folders deleted once no later part reads them"
)


class Bench:
    """The parts, in the order in which they hand folders on; names of folders under `work` are names of parts."""

    def __init__(self, base: str, work: Path, limit_gb: float, batch: int):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.base, self.work, self.limit_gb = base, work, limit_gb
        folder = resolve_base(base)
        text = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]
        self.layers, self.width = text["num_hidden_layers"], text["hidden_size"]
        self.few = self.layers - self.layers // 4
        manifests = write_manifests(self.work / "clips", load_processor(folder), CLIPS)
        self.overrides = self._overrides(manifests, batch)
        self.parts: dict[str, Callable[[], Step]] = {
            "data": lambda: self.step("data", "data"),
            "teacher": lambda: self.step("teacher", "teacher"),
            "rank": lambda: self.step("rank", "rank", {"model": "teacher"}, self._one_round()),
            "distilled": lambda: self.step("distilled", "distilled", {"teacher": "teacher"}),
            "evaluate-teacher": lambda: self.step("evaluate teacher", "evaluate-teacher", {"model": "teacher"}),
            f"quantized-{self.layers}": lambda: self.quantized(self.layers, "teacher", []),
            "middle": lambda: self.step("rank", "middle", {"model": "teacher"}, ["rank.strategy=middle"]),
            "pruned": lambda: self.step("pruned", "pruned", {"model": "teacher", "plan": "middle"}),
            "recovered": lambda: self.step("recovered", "recovered", {"model": "pruned", "distilled": "distilled"}),
            f"int4-{self.few}": lambda: self.quantized(self.few, "pruned", self._int4(), "int4"),
            f"trained-{self.few}": lambda: self.quantized(self.few, "pruned", self._trained(), "trained"),
            f"quantized-{self.few}": lambda: self.quantized(self.few, "pruned", []),
            "evaluate-quantized": lambda: self.step(
                "evaluate quantized", "evaluate-quantized", {"model": f"quantized-{self.few}"}
            ),
            "trimmed": lambda: self.step("trimmed", "trimmed", {"model": f"quantized-{self.few}"}),
            "exported": lambda: self.step("exported", "exported", {"model": "trimmed"}),
        }
        self.deleted_after = {
            f"quantized-{self.layers}": [f"quantized-{self.layers}"],
            "pruned": ["teacher"],
            "recovered": ["recovered"],
            f"int4-{self.few}": [f"int4-{self.few}"],
            f"trained-{self.few}": [f"trained-{self.few}"],
            f"quantized-{self.few}": ["pruned"],
        }

    def _overrides(self, manifests: dict[str, Path], batch: int) -> list[str]:
        given = [f"model.base={self.base}", "data.out_of_domain=null", "vocab={when: after}"]
        given += [f"data.{split}={{kind: manifest, path: '{path}'}}" for split, path in manifests.items()]
        given += ["recover.data={gold: 1}", "quantize.train.data={gold: 1}", "quantize.start=pruned"]
        for section in ("finetune", "recover", "quantize.train"):
            given += [f"{section}.max_steps={STEPS}", f"{section}.num_workers=0", f"{section}.logging_steps=1"]
        given += [f"quantize.train.batch_size={batch}", "quantize.train.checkpoint_from_tokens=0"]
        given += [f"decode.max_new_tokens={NEW_TOKENS}", f"rank.num_layers_to_remove={self.layers // 4}"]
        given += ["evaluate.bootstrap_samples=100", "data.too_long=drop"]
        if self.device.type == "cpu":
            given += [f"{section}.optimizer=adamw_torch" for section in ("finetune", "recover", "quantize.train")]
        elif not find_spec("flashoptim"):
            given += [f"{section}.optimizer=adamw_bnb_8bit" for section in ("finetune", "recover")]
        return given

    def _one_round(self) -> list[str]:
        middle = self.layers // 2
        protected = [layer for layer in range(self.layers) if not middle - 1 <= layer < middle - 1 + CANDIDATES]
        return ["rank.num_layers_to_remove=1", f"rank.protected={protected}"]

    def _int4(self) -> list[str]:
        group = 128 if self.width % 128 == 0 else 64
        eight_bit = "quantize.eight_bit=[embeddings, lm_head]"  # whose rows cannot be taken out afterwards
        return ["vocab=null", "quantize.scheme=int4", f"quantize.group_size={group}", eight_bit]

    def _trained(self) -> list[str]:
        """int4 whose rounded weights are trained, all of them."""
        optimizer = "adamw_torch" if self.device.type == "cpu" else "flash_adamw"
        train = f"{{method: full, batch_size: 4, optimizer: {optimizer}, data: {{gold: 1}}, max_steps: {STEPS}, num_workers: 0, "
        return [*self._int4(), f"quantize.train={train} gradient_checkpointing: true, checkpoint_from_tokens: 1600}}"]

    def step(self, name: str, folder: str, inputs: dict[str, str] | None = None, overrides: Sequence[str] = ()) -> Step:
        """The run's step `name`, reading the folders of other parts and writing to `folder`."""
        recipe = load_recipe(RECIPE, [*self.overrides, *overrides])
        step = {step.name: step for step in plan(recipe, self.work)}[name]
        refs = {role: ref for role, ref in step.inputs.items() if role not in ("baseline", "evaluation")}
        refs |= {role: model_ref(self.work / part) for role, part in (inputs or {}).items() if role in refs}
        return replace(step, inputs=refs, folder=self.work / folder)

    def quantized(self, layers: int, model: str, overrides: Sequence[str], name: str = "quantized") -> Step:
        return self.step("quantized", f"{name}-{layers}", {"model": model}, overrides)

    def run(self, name: str) -> dict[str, Any]:
        """One part: its measures."""
        step = self.parts[name]()
        cuda = self.device.type == "cuda"
        limited = cuda and name.startswith(("quantized", "int4"))
        free()
        before = torch.cuda.memory_allocated() if cuda else None
        with self._limit(limited), no_checkpoints(name), peak_memory("cpu") as host, peak_memory(self.device) as gpu:
            started = time.perf_counter()
            artifact = step.run()
            seconds = time.perf_counter() - started
        result = {
            "seconds": round(seconds, 1),
            "peak_allocated_bytes": gpu.num_bytes if cuda else None,
            "peak_reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
            "before_bytes": before,
            "limit_bytes": round(self.limit_gb * 1e9) if limited else None,
            "host_peak_bytes": host.num_bytes,
            "disk_bytes": shipped(step.folder),
            "info": {k: artifact.info[k] for k in ("steps", "change", "removed", "rows") if k in artifact.info},
        }
        for folder in self.deleted_after.get(name, ()):
            shutil.rmtree(self.work / folder)
        return result

    @contextmanager
    def _limit(self, limited: bool) -> Iterator[None]:
        """The allocator refuses what is beyond the limit, as a smaller GPU would."""
        if not limited:
            yield
            return
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, self.limit_gb * 1e9 / total))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def no_checkpoints(part: str) -> Iterator[None]:
    """Full fine-tuning ends without the checkpoint after its last step."""
    if not part.startswith(("teacher", "recovered", "trained")):
        yield
        return
    usual = trainer.training_arguments

    def without(*args: Any) -> Any:
        arguments = usual(*args)
        arguments.save_strategy = "no"
        return arguments

    trainer.training_arguments = without
    try:
        yield
    finally:
        trainer.training_arguments = usual


def shipped(folder: Path) -> int | None:
    """Bytes of a model folder; None for another one."""
    try:
        return disk_bytes(folder) if list(folder.glob("*.safetensors")) else None
    except MeasureError:
        return None


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def show(name: str, part: dict[str, Any]) -> None:
    gpu = part["peak_allocated_bytes"]
    memory = "" if gpu is None else f"{gpu / 1e9:7.2f} GB GPU ({part['peak_reserved_bytes'] / 1e9:.2f} reserved)"
    disk = "" if part["disk_bytes"] is None else f"{part['disk_bytes'] / 1e9:7.3f} GB disk"
    print(
        f"{name:20} {part['seconds']:7.1f} s {memory} {part['host_peak_bytes'] / 1e9:6.2f} GB host {disk}", flush=True
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="random:qwen2-audio-7b")
    parser.add_argument("--parts", nargs="+", help="default: all; what they read must stand in --work")
    parser.add_argument("--limit-gb", type=float, default=24.0, help="of the allocator while quantising, decimal")
    parser.add_argument("--batch", type=int, default=8, help="of QLoRA")
    parser.add_argument("--work", type=Path, help="folder for the run; default: a temporary one (TMPDIR)")
    parser.add_argument("--commit", default="", help="default: git's")
    parser.add_argument(
        "--out", type=Path, help="JSON file, written again after every part; parts it has already stay in it"
    )
    args = parser.parse_args(arguments)
    size = args.base.rpartition("-")[2]
    out = args.out or RESULTS / f"full_size_{size}.json"
    earlier = json.loads(out.read_text(encoding="utf-8")) if args.parts and out.is_file() else {}
    result: dict[str, Any] = {
        "command": "python benchmarks/full_size.py" + ("" if args.base.endswith("7b") else f" --base {args.base}"),
        "commit": commit(args.commit),
        "machine": machine(),
        "base": args.base,
        "note": NOTE,
        "setup": {"clips": CLIPS, "steps": STEPS, "qlora_batch": args.batch, "new_tokens": NEW_TOKENS},
        "parts": earlier.get("parts", {}),
        "errors": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        bench = Bench(args.base, work.resolve(), args.limit_gb, args.batch)
        for name in args.parts or bench.parts:
            if name not in bench.parts:
                parser.error(f"--parts {name} is not known; parts: {', '.join(bench.parts)}")
            try:
                result["parts"][name] = bench.run(name)
                show(name, result["parts"][name])
            except Exception as error:
                traceback.print_exc()
                result["errors"][name] = f"{type(error).__name__}: {error}"
            out.parent.mkdir(parents=True, exist_ok=True)
            write_json(out, result)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
