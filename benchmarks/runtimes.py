"""What ships, run where people run it: every test clip in both languages by vLLM and by llama.cpp, beside our own decoder.

    python benchmarks/runtimes.py --vllm vllm-env/bin/python           # the built-in model
    python benchmarks/runtimes.py --heard runs/mini-window/recovered   # llama.cpp, a model made with audio_padding: window
    python benchmarks/runtimes.py --unheard                            # llama.cpp, the built-in model, which never heard
                                                                       # padding, and what it costs to hear it

The model's folder is exported for the runtime, which then translates one clip at a time. Only translations that are the same to the
letter count as equal; answers that reached our bound on new tokens are left out. Prints a line a format, then one JSON document, and
adds what it measured to benchmarks/results/runtimes_mini.json (or --out).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimlingual.data.sources import Clip, read_source
from trimlingual.decoding.translate_clips import Translation, encode_clips, translate_clips
from trimlingual.evaluation.quality import corpus_score
from trimlingual.exports import gguf, llama_cpp, vllm
from trimlingual.exports.proof import run_script
from trimlingual.exports.target import Finished
from trimlingual.models.loading import load_model, load_processor, pick_device, resolve_base
from trimlingual.models.saving import save_model
from trimlingual.quantization.int4 import save_packed
from trimlingual.recipe import BuiltinSource, Dtype, QuantizeSettings, Recipe, load_recipe
from trimlingual.run.artifacts import machine
from trimlingual.run.lineage import ModelFolder, read_lineage
from trimlingual.stages.quantize import config_summary

RESULTS = Path(__file__).parent / "results"
INT4 = QuantizeSettings(group_size=64, parts=["decoder"], rounding="nearest")
CPU = pick_device("cpu")
Asked = list[tuple[Clip, str]]


class Bench:
    """Exports of one model, translated by their runtime and by our decoder."""

    def __init__(self, folder: Path, num_clips: int, scratch: Path):
        self.folder, self.scratch = folder, scratch
        self.recipe = load_recipe("mini", ["model.device=cpu", "model.audio_padding=null"])
        languages = self.recipe.task.target_languages
        self.clips = read_source(BuiltinSource(kind="builtin", split="test"), languages, scratch)[:num_clips]

    def ours(self, folder: Path, dtype: Dtype) -> list[Translation]:
        """Our decoder's translations of all clips."""
        model = load_model(folder, dtype, CPU)
        return translate_clips(model, load_processor(folder), self.recipe.task, self.clips, self.recipe.decode)

    def finished(self, folder: Path, **changes: Any) -> Finished:
        """The folder, as the export's stage gives it to a target."""
        lineage = replace(read_lineage(folder, "builtin:mini"), **changes)
        return Finished(ModelFolder(folder, lineage), self.recipe)

    def row(
        self, ours: Sequence[Translation], disk_bytes: int, ask: Callable[[Asked], dict[str, Any]]
    ) -> dict[str, Any]:
        """How the runtime's translations, of which `ask` gives `said` and more, compare with ours."""
        by_id = {clip.id: clip for clip in self.clips}
        whole = [each for each in ours if not each.truncated]
        if not whole:
            raise ValueError(f"our decoder ended none of {len(ours)} answers within the bound: nothing can be compared")
        answer = ask([(by_id[each.id], each.language) for each in whole])
        said = answer.pop("said")
        scores: dict[str, Any] = {}
        for language in self.recipe.task.target_languages:
            chosen = [i for i, each in enumerate(whole) if each.language == language]
            references = [by_id[whole[i].id].references[language] for i in chosen]
            scores[language] = {
                name: round(corpus_score("chrf", [texts[i] for i in chosen], references, language).value, 2)
                for name, texts in (("runtime", said), ("ours", [each.hypothesis for each in whole]))
            }
        equal = sum(text == each.hypothesis for text, each in zip(said, whole, strict=True))
        found = {"disk_bytes": disk_bytes, "compared": len(whole), "equal": equal, "left_out": len(ours) - len(whole)}
        return {**found, "chrf": scores, **answer}

    def vllm(self, python: str, dtype: Dtype, packed: bool) -> dict[str, Any]:
        """The folder computed in a dtype, as it is or with a decoder in int4."""
        model_settings = self.recipe.model.model_copy(update={"dtype": dtype})
        self.recipe = self.recipe.model_copy(update={"model": model_settings})
        source, quantization = self.folder, None
        if packed:
            source, quantization = self.scratch / "int4", config_summary(INT4)
            save_packed(load_model(self.folder, "bfloat16", CPU), load_processor(self.folder), source, INT4, "bfloat16")
        out = self.scratch / f"vllm-{dtype}-{packed}"
        [outcome] = vllm.write(self.finished(source, quantization=quantization), out)
        return self.row(
            self.ours(source, dtype), outcome.disk_bytes,
            lambda asked: run_script("vllm_script.py", "vLLM", out, self.recipe, asked, python),
        )  # fmt: skip

    def llama(self, folder: Path, kind: Any, ours: Sequence[Translation]) -> dict[str, Any]:
        """GGUF files of one type."""
        settings = {"for": ["gguf"], "gguf": {"types": [kind]}}
        model = self.recipe.model.model_copy(update={"audio_padding": "window"})
        export = type(self.recipe.export).model_validate(settings)  # type: ignore[union-attr]
        self.recipe: Recipe = self.recipe.model_copy(update={"model": model, "export": export})
        out = self.scratch / f"gguf-{kind}"
        [outcome] = gguf.write(self.finished(folder), out)

        def ask(asked: Asked) -> dict[str, Any]:
            files = (out / f"{self.recipe.name}-{kind}.gguf", out / "mmproj-f16.gguf")
            with llama_cpp.serving(*files, context=1024) as server:
                started = time.perf_counter()
                said = [server.translate(clip, language, self.recipe.task, 64) for clip, language in asked]
                seconds = (time.perf_counter() - started) / len(asked)
                return {
                    "said": said, "versions": server.versions, "seconds_per_clip": seconds,
                    "peak_bytes": server.process.memory_info().rss,
                }  # fmt: skip

        return self.row(ours, outcome.disk_bytes, ask)

    def hearing(self) -> Path:
        """A copy of the model that is said to hear padding."""
        folder = self.scratch / "hearing"
        save_model(load_model(self.folder, "bfloat16", CPU), load_processor(self.folder, "window"), folder, "bfloat16")
        return folder

    def padding(self) -> dict[str, Any]:
        """What it costs to hear padding: our decoder in float32, answers of 16 tokens, median of three."""
        model, found = load_model(self.folder, "float32", CPU), {}
        settings = self.recipe.decode.model_copy(update={"max_new_tokens": 16, "min_new_tokens": 16})
        for padding in ("mask", "window"):
            processor, seconds = load_processor(self.folder, padding), []
            states = encode_clips(model, processor, self.clips, 8)
            for _ in range(3):
                started = time.perf_counter()
                translate_clips(model, processor, self.recipe.task, self.clips, settings)
                seconds.append((time.perf_counter() - started) / len(self.clips))
            found[padding] = {
                "states_per_clip": sum(map(len, states)) / len(states),
                "seconds_per_clip": statistics.median(seconds),
            }
        return found | {"seconds_of_speech": sum(clip.duration_s for clip in self.clips) / len(self.clips)}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", metavar="PYTHON", help="an interpreter that has vLLM")
    parser.add_argument("--heard", type=Path, help="a model folder that was made with model.audio_padding: window")
    parser.add_argument("--unheard", action="store_true")
    parser.add_argument("--only", default="", help="formats whose name has this")
    parser.add_argument("--clips", type=int, default=120)
    parser.add_argument("--out", type=Path, default=RESULTS / "runtimes_mini.json")
    args = parser.parse_args(arguments)
    result: dict[str, Any] = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    builtin = resolve_base("builtin:mini")
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        rows: dict[str, Callable[[], dict[str, Any]]] = {}
        if args.vllm:
            bench = Bench(builtin, args.clips, scratch)
            formats: tuple[tuple[str, Dtype, bool], ...] = (
                ("float32", "float32", False), ("bfloat16", "bfloat16", False), ("int4 decoder", "bfloat16", True),
            )  # fmt: skip
            rows |= {f"vLLM, {name}": lambda dtype=dtype, packed=packed: bench.vllm(args.vllm, dtype, packed)
                     for name, dtype, packed in formats}  # fmt: skip
        if args.heard:
            heard = Bench(args.heard, args.clips, scratch)
            ours = heard.ours(args.heard, "float32")
            kinds = ["f16", "q8_0", "q4_0", *(["q4_k_m"] if llama_cpp.quantize_program(None) else [])]
            rows |= {f"llama.cpp, {kind}": lambda kind=kind: heard.llama(args.heard, kind, ours) for kind in kinds}
        if args.unheard:
            deaf = Bench(builtin, args.clips, scratch)
            rows["llama.cpp, f16, padding never heard"] = lambda: deaf.llama(
                deaf.hearing(), "f16", deaf.ours(builtin, "float32")
            )
            rows["hearing padding"] = deaf.padding
        for name, measure in rows.items():
            if args.only not in name:
                continue
            result[name] = {**measure(), "clips": args.clips, "machine": machine()}
            print(f"{name:40} {json.dumps({k: v for k, v in result[name].items() if k != 'machine'})}", flush=True)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
