"""Sizes, memory and time at the true shapes of Qwen2-Audio-7B, with random weights, on one 80 GB GPU; no network, minutes.

    python benchmarks/formats.py               # needs 40 GB of disk in the temporary folder (TMPDIR)
    python benchmarks/formats.py --size tiny   # the same path on a CPU in seconds

Every artefact is saved, weighed, loaded again with plain transformers and compared with the model in memory, then deleted. Prints as it
goes; the last line is one JSON document, which is also in benchmarks/results/formats_7b.json (or --out), written again after
every part, so that a run that dies leaves what it measured. A part that fails leaves its error text there.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from commit import commit
from torch import Tensor
from transformers import Qwen2AudioForConditionalGeneration

from trimlingual.data.audio import SAMPLE_RATE, load_audio
from trimlingual.data.sources import Clip
from trimlingual.decoding.decoder import PackedDecoder
from trimlingual.decoding.loop import Stepper
from trimlingual.decoding.translate_clips import embed_prompt, encode_audio, greedy
from trimlingual.evaluation.cost import Stopwatch, count_parameters, disk_bytes, peak_memory
from trimlingual.models.inputs import Prompter
from trimlingual.models.layers import drop_layers_
from trimlingual.models.loading import load_processor, resolve_base
from trimlingual.models.qwen2_audio import FAMILY
from trimlingual.models.random_weights import draw
from trimlingual.models.saving import save_model
from trimlingual.quantization.int4 import save_packed
from trimlingual.quantization.merge import merge_
from trimlingual.quantization.nf4 import bitsandbytes_config
from trimlingual.recipe import LoraSettings, QuantizeSettings, TaskSettings
from trimlingual.run.artifacts import machine, write_json
from trimlingual.stages.quantize import sqnr_db
from trimlingual.training.lora import add_lora

RESULTS = Path(__file__).parent / "results"
# Seconds a clip, clips in the large batch, tokens an answer may have, rows of a trimmed vocabulary, weights a 4-bit scale.
SHAPES = {
    "7b": {"base": "random:qwen2-audio-7b", "seconds": 10, "clips": 32, "tokens": 40, "rows": 48_000, "group": 128},
    "tiny": {"base": "random:qwen2-audio-tiny", "seconds": 2, "clips": 4, "tokens": 8, "rows": 2_112, "group": 64},
}
# What the artefacts may weigh at most, in bytes, at the true shapes.
LIMITS = {
    "nf4, 32 layers": 6.25e9,
    "nf4, 24 layers": 5.42e9,
    "int4, 24 layers, 8-bit embeddings and head": 4.15e9,
    "int4, 24 layers, 8-bit embeddings and head, 48000 rows": 3.3e9,
}


class Run:
    """What has been measured so far, on disk after every part."""

    def __init__(self, path: Path, size: str, commit: str):
        self.path = path
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.started = time.perf_counter()
        self.result: dict[str, Any] = {
            "command": "python benchmarks/formats.py" + (f" --size {size}" if size != "7b" else ""),
            "commit": commit,
            "machine": machine(),
            "size": size,
            "parameters": {}, "sizes": {}, "within_limits": {}, "memory": {}, "times": {}, "reloads": {}, "errors": {},
        }  # fmt: skip

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Seconds and peak memory of a block, and how much of the GPU was taken before it (other models stand there too)."""
        free()
        before = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else None
        with peak_memory(self.device) as memory, Stopwatch(self.device) as watch:
            yield
        self.result["times"][name] = round(watch.seconds, 3)
        self.result["memory"][name] = {"peak_bytes": memory.num_bytes, "before_bytes": before}
        print(f"{name:64} {watch.seconds:8.2f} s  {memory.num_bytes / 1e9:6.2f} GB", flush=True)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the benchmark; its error is recorded and the rest goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.result["errors"][name] = f"{type(error).__name__}: {error}"
        free()
        self.result["seconds"] = round(time.perf_counter() - self.started, 1)
        self.path.parent.mkdir(exist_ok=True)
        write_json(self.path, self.result)

    def weigh(self, name: str, model: Any, folder: Path) -> None:
        """Record parameters and bytes of a saved model."""
        size = disk_bytes(folder)
        self.result["sizes"][name], self.result["parameters"][name] = size, count_parameters(model)
        if self.result["size"] == "7b" and name in LIMITS:
            self.result["within_limits"][name] = size <= LIMITS[name]
        print(f"{name:64} {size:,} bytes", flush=True)


class Bench:
    """The parts, in the order in which they hand models on."""

    def __init__(self, run: Run, shape: dict[str, Any], folder: Path):
        self.run, self.shape, self.folder = run, shape, folder
        self.base = resolve_base(shape["base"])
        self.processor = load_processor(self.base)
        self.task = TaskSettings(target_languages=["de"])
        self.clips = made_clips(folder, shape["clips"], shape["seconds"])
        self.model: Any = None  # the bfloat16 model
        self.four: Any = None  # the nf4 model

    def all(self) -> None:
        run = self.run
        with run.part("base"):
            self.start()
        with run.part("bf16 speed"):
            self.speed(self.model, f"bf16, {self.layers(self.model)} layers")
        with run.part("merge"):
            self.merge()
        with run.part("nf4"):
            self.nf4()
        with run.part("nf4 pruned"):
            self.nf4_pruned()
        with run.part("nf4 speed"):
            self.speed(self.four, f"nf4, {self.layers(self.four)} layers")
        self.four = None
        with run.part("int4"):
            self.prune()
            self.int4("")
        with run.part("int4 speed"):
            self.speed(self.model, f"int4 unpacked, {self.layers(self.model)} layers")
        with run.part("int4, vocabulary"):
            cut_vocabulary_(self.model, self.shape["rows"])
            self.int4(f", {self.shape['rows']} rows")

    def start(self) -> None:
        """Draw the base model, save it, load it."""
        with self.run.timed("draw random weights"):
            self.model = draw(self.base, torch.bfloat16, self.run.device).eval()
        name = f"bf16, {self.layers(self.model)} layers"
        with self.run.timed(f"save {name}"):
            save_model(self.model, self.processor, self.folder / "base", "bfloat16")
        self.reload(name, self.model, self.folder / "base")

    def merge(self) -> None:
        """QLoRA's adapter, as a run would have it, merged; the model in memory becomes the merged one."""
        settings = QuantizeSettings(scheme="nf4")
        with self.run.timed("quantise to nf4 while loading"):
            four = self.load(self.folder / "base", bitsandbytes_config(settings))
        adapted = add_lora(four, LoraSettings(), 0)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=1e-4)
        with self.run.timed("merge onto the dequantised base"):
            merge_(self.model, adapted)
        del adapted, four
        shutil.rmtree(self.folder / "base")

    def nf4(self) -> None:
        """The merged model in nf4, all layers."""
        save_model(self.model, self.processor, self.folder / "merged", "bfloat16")
        self.four = self.load(self.folder / "merged", bitsandbytes_config(QuantizeSettings(scheme="nf4")))
        shutil.rmtree(self.folder / "merged")
        self.ship(f"nf4, {self.layers(self.four)} layers", self.four)

    def nf4_pruned(self) -> None:
        """The same without a quarter of its layers. Which ones does not matter for bytes or time."""
        drop_layers_(self.four, {"decoder": self.middle(self.four)})
        self.ship(f"nf4, {self.layers(self.four)} layers", self.four)

    def prune(self) -> None:
        with self.run.timed("prune: drop layers"):
            drop_layers_(self.model, {"decoder": self.middle(self.model)})

    def int4(self, suffix: str) -> None:
        """4-bit integers, 8-bit embeddings and head. Packing changes the model in memory to what the folder loads as."""
        settings = QuantizeSettings(scheme="int4", group_size=self.shape["group"], eight_bit=["embeddings", "lm_head"])
        name = f"int4, {self.layers(self.model)} layers, 8-bit embeddings and head{suffix}"
        before = self.logits(self.model)
        folder = self.folder / "int4"
        with self.run.timed(f"quantise and save {name}"):
            save_packed(self.model, self.processor, folder, settings, "bfloat16")
        noise = sqnr_db(before, self.logits(self.model))
        self.reload(name, self.model, folder)
        self.run.result["reloads"][name]["sqnr_db_before_rounding"] = round(noise, 2) if math.isfinite(noise) else None
        shutil.rmtree(folder)

    def ship(self, name: str, model: Any) -> None:
        """Save, weigh, reload, compare, delete."""
        with self.run.timed(f"save {name}"):
            save_model(model, self.processor, self.folder / "shipped")
        self.reload(name, model, self.folder / "shipped")
        shutil.rmtree(self.folder / "shipped")

    def reload(self, name: str, model: Any, folder: Path) -> None:
        """Weigh a folder and compare what plain transformers loads from it with `model`."""
        self.run.weigh(name, model, folder)
        before = self.logits(model)
        with self.run.timed(f"load {name}"):
            loaded = self.load(folder)
        with self.run.timed(f"first forward of {name}"):
            after = self.logits(loaded)
        difference = (before - after).abs().max().item()
        # null: no difference at all
        noise = None if difference == 0 else round(sqnr_db(before, after), 2)
        self.run.result["reloads"][name] = {"equal": difference == 0, "sqnr_db": noise}
        print(f"{'reload of ' + name:64} {'equal' if difference == 0 else f'{noise} dB'}", flush=True)

    def load(self, folder: Path, config: Any = None) -> Any:
        """Plain transformers, without this package."""
        return Qwen2AudioForConditionalGeneration.from_pretrained(
            folder, dtype=torch.bfloat16, device_map={"": self.run.device}, quantization_config=config
        ).eval()

    @torch.inference_mode()
    def logits(self, model: Any) -> Tensor:
        """Logits of the whole model for two clips with their prompt, float32 on the CPU: the last 16 positions."""
        text = FAMILY.chat(self.processor, self.task.system_prompt, self.task.prompt_for("de"))
        audio = [load_audio(clip.audio) for clip in self.clips[:2]]
        inputs = self.processor(
            text=[text] * 2, audio=audio, sampling_rate=SAMPLE_RATE, return_tensors="pt", padding=True
        )
        inputs["input_features"] = inputs["input_features"].to(torch.bfloat16)
        return model(**inputs.to(self.run.device)).logits[:, -16:].float().cpu()

    def speed(self, model: Any, name: str) -> None:
        """Encode and translate one clip, and all of them at once; the second time, when libraries and graphs are set up."""
        decoder = PackedDecoder(model)
        for batch in (1, len(self.clips)):
            audio = [load_audio(clip.audio) for clip in self.clips[:batch]]
            encode_audio(model, self.processor, audio)
            with self.run.timed(f"encode {batch} clip(s), {name}"):
                states = encode_audio(model, self.processor, audio)
            prompter, stepper, tokens = Prompter(self.processor, self.task), Stepper(decoder, ()), self.shape["tokens"]
            prompts = [embed_prompt(model, prompter, clip, "de") for clip in states]
            greedy(stepper, prompts, [tokens] * batch, batch)
            with self.run.timed(f"translate {batch} clip(s), {tokens} tokens, {name}"):
                greedy(stepper, prompts, [tokens] * batch, batch)

    @staticmethod
    def layers(model: Any) -> int:
        return model.config.text_config.num_hidden_layers

    def middle(self, model: Any) -> list[int]:
        count = self.layers(model)
        return list(range(count // 2 - count // 8, count // 2 - count // 8 + count // 4))


def cut_vocabulary_(model: Any, rows: int) -> None:
    """Keep the first `rows` rows of embeddings and head: their number decides bytes and time, not which they are."""
    for module in (model.model.language_model.embed_tokens, model.lm_head):
        module.weight.data = module.weight.data[:rows].clone()
    model.model.language_model.embed_tokens.num_embeddings = model.lm_head.out_features = rows
    for config in (model.config.text_config, model.model.language_model.config):
        config.vocab_size = rows


def made_clips(folder: Path, count: int, seconds: float) -> list[Clip]:
    """Clips of noise."""
    clips = []
    for i in range(count):
        path = folder / f"clip-{i}.wav"
        noise = 0.1 * np.random.default_rng(i).standard_normal(int(seconds * SAMPLE_RATE))
        soundfile.write(path, noise.astype(np.float32), SAMPLE_RATE)
        clips.append(Clip(path.stem, path, {"de": "x"}, None, seconds, str(i)))
    return clips


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="7b")
    parser.add_argument("--commit", default="", help="default: git's")
    parser.add_argument("--out", type=Path, help="JSON file, written again after every part")
    args = parser.parse_args(arguments)
    run = Run(args.out or RESULTS / f"formats_{args.size}.json", args.size, commit(args.commit))
    with tempfile.TemporaryDirectory() as folder:
        Bench(run, SHAPES[args.size], Path(folder)).all()
    print(json.dumps(run.result))
    return run.result


if __name__ == "__main__":
    main()
