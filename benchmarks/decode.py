"""Decoding at the true shapes of Qwen2-Audio-7B with random weights: bfloat16, nf4 and packed int4, ours against `generate`.

    python benchmarks/decode.py                                   # one GPU of 80 GB, no network
    python benchmarks/decode.py --formats bf16,int4 --layers 24 --batches 1,32 --engines ours
    python benchmarks/decode.py --size tiny                       # the same path on a CPU in seconds
    python benchmarks/decode.py --size lab --formats bf16,int4 --engines ours    # the shapes of benchmarks/lab

The int4 folder (linear layers in groups of 128, embeddings and head in 8 bits) is written with random words and loaded as any other.
Each row is one format, number of layers, engine and batch: seconds of encoding, of prefill, and of the decode steps alone, each
measured again once libraries, kernels and graphs are set up. Engines: `ours`; `generate` of transformers; `compiled`, which is
`generate` with a static cache and torch.compile. On packed int4 these two compute a joined product anew for each of its parts.
`memory` rows (--limit) have the peak of the allocator while loading and after it, for one clip; for int4 the allocator is held to the
limit. The JSON document (--out) is written again after every row, and nothing new is begun after --budget seconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shlex
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from commit import commit
from random_int4 import write_random_int4
from torch import Tensor
from torch._dynamo.utils import counters
from true_size import quantize_

from trimlingual.data.audio import SAMPLE_RATE
from trimlingual.decoding.decoder import PackedDecoder
from trimlingual.decoding.loop import Stepper
from trimlingual.decoding.rows import Rows
from trimlingual.decoding.translate_clips import embed_prompt, encode_audio
from trimlingual.evaluation.cost import Stopwatch
from trimlingual.models.inputs import Prompter
from trimlingual.models.layers import drop_layers_
from trimlingual.models.loading import load_model, load_processor, resolve_base
from trimlingual.models.qwen2_audio import FAMILY
from trimlingual.models.random_weights import draw_config
from trimlingual.recipe import QuantizeSettings, TaskSettings
from trimlingual.run.artifacts import machine, write_json

PREFILLS = 6  # timed; the first one sets things up
RESULTS = Path(__file__).parent / "results"
LAB = {  # Whisper-base's encoder and SmolLM2-135M's decoder
    "audio": {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048},
    "text": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49216, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    },
    "mels": 80,
    "window_s": 10,
}  # fmt: skip
# Seconds a clip, weights a scale, and tokens an answer has.
SHAPES = {
    "7b": {"base": "qwen2-audio-7b", "seconds": 10, "group": 128, "tokens": 128, "layers": "32,24,16"},
    "lab": {"model": LAB, "seconds": 4, "group": 64, "tokens": 32, "layers": "30,22,20"},
    "tiny": {"base": "qwen2-audio-tiny", "seconds": 2, "group": 64, "tokens": 8, "layers": "6,4"},
}


class Run:
    """What has been measured so far, on disk after every row."""

    def __init__(self, path: Path, budget_s: float, head: dict[str, Any]):
        self.path, self.budget_s, self.started = path, budget_s, time.perf_counter()
        self.result: dict[str, Any] = {**head, "models": [], "rows": [], "memory": [], "errors": []}

    def add(self, kind: str, row: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        """One row; its error is recorded and the rest goes on."""
        if time.perf_counter() - self.started > self.budget_s:
            return
        try:
            row = row | measure()
            self.result[kind].append(row)
        except Exception as error:
            traceback.print_exc()
            row = row | {"error": f"{type(error).__name__}: {error}"}
            self.result["errors"].append(row)
        free()
        print(json.dumps(row), flush=True)
        self.result["seconds"] = round(time.perf_counter() - self.started, 1)
        self.path.parent.mkdir(exist_ok=True, parents=True)
        write_json(self.path, self.result)


class Bench:
    """Models of every format, and what is timed with them."""

    def __init__(self, shape: dict[str, Any], device: torch.device, folder: Path):
        self.shape, self.device, self.folder = shape, device, folder
        if "model" in shape:
            self.processor = FAMILY.random_processor(shape["model"], folder / "processor")
        else:
            self.processor = load_processor(resolve_base("random:" + shape["base"]))
        self.prompter = Prompter(self.processor, TaskSettings(target_languages=["de"]))

    def config(self, num_layers: int) -> Any:
        shape = self.shape.get("model") or FAMILY.shapes[self.shape["base"]]
        rows = self.shape["rows"] or shape["text"]["vocab_size"]
        return FAMILY.random_config(shape, self.processor, num_hidden_layers=num_layers, vocab_size=rows)

    def model(self, form: str, num_layers: int) -> Any:
        """A model on the device."""
        if form == "int4":
            return load_model(self.int4_folder(num_layers), "bfloat16", self.device, keep_packed=True)
        model = draw_config(self.config(num_layers), len(self.processor.tokenizer), torch.bfloat16, self.device).eval()
        if form == "nf4":
            quantize_(model)
        return model

    def int4_folder(self, num_layers: int) -> Path:
        """The random int4 folder, written once."""
        folder = self.folder / f"int4-{num_layers}"
        if not folder.is_dir():
            settings = QuantizeSettings(
                scheme="int4", group_size=self.shape["group"], eight_bit=["embeddings", "lm_head"]
            )
            write_random_int4(self.config(num_layers), self.processor, folder, settings, self.device)
        return folder

    @torch.inference_mode()
    def prompts(self, model: Any, batch: int) -> tuple[list[Tensor], float]:
        """The decoder's inputs for `batch` clips of noise, and the seconds that the audio tower took."""
        rng = np.random.default_rng(0)
        clips = [
            0.1 * rng.standard_normal(self.shape["seconds"] * SAMPLE_RATE).astype(np.float32) for _ in range(batch)
        ]
        encode_audio(model, self.processor, clips)
        with Stopwatch(self.device) as watch:
            states = encode_audio(model, self.processor, clips)
        return [embed_prompt(model, self.prompter, clip, "de") for clip in states], watch.seconds

    @torch.inference_mode()
    def ours(self, model: Any, batch: int) -> dict[str, Any]:
        """Our decoder: the median of all prefills but the first, and the second run of steps."""
        decoder, num_tokens = PackedDecoder(model), self.shape["tokens"]
        stepper, layers = Stepper(decoder, ()), range(len(decoder.layers))
        prompts, encode_s = self.prompts(model, batch)
        prefills: list[float] = []
        steps_s = 0.0
        for repeat in range(PREFILLS):
            slots = stepper.slots([len(prompt) + num_tokens for prompt in prompts])
            with Stopwatch(self.device) as watch:
                token = decoder.next_tokens(decoder.prefill(prompts, layers, slots))
            prefills.append(watch.seconds)
            if repeat not in (0, PREFILLS - 1):
                continue
            position = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
            rows = Rows(token, position, [[] for _ in prompts], [num_tokens] * batch, [True] * batch)
            with Stopwatch(self.device) as watch:
                stepper.extend(slots, layers, rows)
            steps_s = watch.seconds
        return _row(batch, len(prompts[0]), num_tokens, encode_s, statistics.median(prefills[1:]), steps_s)

    @torch.inference_mode()
    def generate(self, model: Any, batch: int, **how: Any) -> dict[str, Any]:
        """`generate` of transformers: prefill is the time of one token, the steps are what more tokens take."""
        prompts, encode_s = self.prompts(model, batch)
        inputs = torch.stack(prompts)
        mask = torch.ones(inputs.shape[:2], dtype=torch.long, device=self.device)
        num_tokens = self.shape["tokens"]

        def seconds(count: int) -> float:
            with Stopwatch(self.device) as watch:
                model.generate(
                    inputs_embeds=inputs, attention_mask=mask, do_sample=False,
                    max_new_tokens=count, min_new_tokens=count, **how,
                )  # fmt: skip
            return watch.seconds

        prefill_s = statistics.median([seconds(1) for _ in range(PREFILLS)][1:])
        whole_s = [seconds(num_tokens) for _ in range(2)][1]
        return _row(batch, inputs.shape[1], num_tokens, encode_s, prefill_s, whole_s - prefill_s)

    def compiled(self, model: Any, batch: int) -> dict[str, Any]:
        """`generate` with a static cache, for which transformers compiles the model on a GPU; each row compiles for its own shapes.

        Without the reset PyTorch would go over to dynamic shapes, and after eight compilations give up without a word.
        """
        torch.compiler.reset()
        counters.clear()
        row = self.generate(model, batch, cache_implementation="static")
        return row | {"compiled_graphs": counters["stats"]["unique_graphs"]}

    def memory(self, form: str, num_layers: int, limits: tuple[float, float]) -> dict[str, Any]:
        """Peaks of PyTorch's allocator while loading, and for one clip after it; int4 held to limits in bytes (loading, after)."""
        if self.device.type != "cuda":
            return {"skipped": "needs a GPU"}
        if form == "int4":
            self.int4_folder(num_layers)
        else:
            limits = (math.inf, math.inf)
        free()
        total = torch.cuda.get_device_properties(self.device).total_memory
        try:
            torch.cuda.set_per_process_memory_fraction(min(1.0, limits[0] / total), self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            with Stopwatch(self.device) as watch:
                model = self.model(form, num_layers)
            row: dict[str, Any] = {"load_s": round(watch.seconds, 2)}
            row["loading_peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
            free()
            row["loaded_bytes"] = torch.cuda.memory_allocated(self.device)
            torch.cuda.set_per_process_memory_fraction(min(1.0, limits[1] / total), self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.ours(model, 1)
            row["running_peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
            row["running_peak_reserved_bytes"] = torch.cuda.max_memory_reserved(self.device)
            return row | ({"limit_bytes": list(limits)} if form == "int4" else {})
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)


def _row(
    batch: int, prompt_tokens: int, num_tokens: int, encode_s: float, prefill_s: float, steps_s: float
) -> dict[str, Any]:
    """Prefill gives the first token of each row, each step another."""
    return {
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "encode_s": round(encode_s, 5),
        "prefill_s": round(prefill_s, 5),
        "steps": num_tokens - 1,
        "ms_per_step": round(1000 * steps_s / (num_tokens - 1), 4),
        "tokens_per_second": round(batch * (num_tokens - 1) / steps_s, 1),
    }


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(bench: Bench, run: Run, args: argparse.Namespace) -> None:
    """Every combination that was asked for. A model is made once, with the most layers, and loses the last ones."""
    depths = sorted(map(int, args.layers.split(",")), reverse=True)
    for form in args.formats.split(","):
        if args.limit:
            for depth in depths:
                measured = partial(bench.memory, form, depth, args.limit)
                run.add("memory", {"format": form, "layers": depth}, measured)
        made: dict[str, Any] = {}

        def make(form: str = form, made: dict[str, Any] = made) -> dict[str, Any]:
            if form == "int4":
                bench.int4_folder(depths[0])
            with Stopwatch(bench.device) as watch:
                made["model"] = bench.model(form, depths[0])
            kinds = Counter(module.kernel for module in made["model"].modules() if hasattr(module, "kernel"))
            return {"seconds": round(watch.seconds, 2), "kernels": dict(kinds)}

        run.add("models", {"format": form, "layers": depths[0]}, make)
        for depth in depths if made else []:
            present = made["model"].config.text_config.num_hidden_layers
            drop_layers_(made["model"], {"decoder": range(depth, present)})
            for engine, batch in product(args.engines.split(","), map(int, args.batches.split(","))):
                timed = partial(getattr(bench, engine), made["model"], batch)
                run.add("rows", {"format": form, "layers": depth, "engine": engine}, timed)
                del timed
        made.clear()
        free()


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="7b")
    parser.add_argument("--formats", default="bf16,nf4,int4")
    parser.add_argument("--layers", help="default: 32,24,16")
    parser.add_argument("--batches", default="1,8,32,64")
    parser.add_argument("--engines", default="ours,generate,compiled")
    parser.add_argument("--tokens", type=int, help="of an answer (default: 128)")
    parser.add_argument("--rows", type=int, help="of the vocabulary (default: all)")
    parser.add_argument(
        "--limit", help="GB that the allocator may take while loading and after it, as 6.0,5.0: measures memory"
    )
    parser.add_argument("--budget", type=float, default=420, help="seconds after which nothing new is begun")
    parser.add_argument("--commit", default="", help="default: git's")
    parser.add_argument("--out", type=Path, help="JSON file, written again after every row")
    args = parser.parse_args(arguments)
    shape = SHAPES[args.size] | ({"tokens": args.tokens} if args.tokens else {}) | {"rows": args.rows}
    args.layers = args.layers or shape["layers"]
    args.limit = tuple(float(number) * 1e9 for number in args.limit.split(",")) if args.limit else None
    head = {
        "command": "python benchmarks/decode.py " + shlex.join(sys.argv[1:] if arguments is None else arguments),
        "commit": commit(args.commit),
        "machine": machine(),
        "size": args.size,
    }
    run = Run(args.out or RESULTS / f"decode_{args.size}.json", args.budget, head)
    with tempfile.TemporaryDirectory() as folder:
        measure(Bench(shape, torch.device("cuda:0" if torch.cuda.is_available() else "cpu"), Path(folder)), run, args)
    print(json.dumps(run.result))
    return run.result


if __name__ == "__main__":
    main()
