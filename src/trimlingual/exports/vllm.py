"""A folder for vLLM: 16-bit weights, or a decoder in int4 as compressed-tensors packs it, with everything else in 16 bits.

The files are those for transformers. What vLLM refuses is refused here, before anything runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from trimlingual.evaluation.cost import disk_bytes
from trimlingual.exports.proof import compare, recorded_translations, run_script
from trimlingual.exports.target import ExportError, Finished, Outcome
from trimlingual.exports.transformers import copy_model, weight_format
from trimlingual.recipe import ROW_PARTS, Dtype, Recipe

POSITIONS = 1500  # of the audio tower: vLLM's processor makes spectra of 30 s, and its model takes no others
# Of the decoder's layers: 4 was run, 8 needs a GPU. On others vLLM 0.32 computes with humming-kernels alone, which was never run here.
BITS = (4, 8)
DIFFERING = 0.2  # share of translations that may differ from the recorded ones, made with other kernels in 16 bits
DECODER_IN_INT4 = "set quantize.scheme: int4, quantize.parts: [decoder] and quantize.eight_bit: []"


def problems(recipe: Recipe, config: Any, quantization: Mapping[str, Any] | None) -> Iterator[str]:
    """What vLLM does not load: another window than 30 s, and of 4-bit models all but an int4 decoder alone."""
    if config is not None and (positions := config.audio_config.max_source_positions) != POSITIONS:
        yield f"export.for vllm: the model's window is {positions / 50:g} s, and vLLM takes windows of 30 s alone"
    if quantization is None:
        return
    if quantization["scheme"] != "int4":
        yield f"export.for vllm: vLLM does not read {quantization['scheme']} (bitsandbytes) for this model; {DECODER_IN_INT4}"
        return
    if other := sorted({*quantization["parts"]} - {"decoder"}):
        yield f"export.for vllm: vLLM holds all but the decoder in 16 bits, and {', '.join(other)} would be in 4; {DECODER_IN_INT4}"
    if eight := quantization.get("eight_bit"):
        yield f"export.for vllm: vLLM does not read 8-bit {' and '.join(eight)} as they are stored here; {DECODER_IN_INT4}"
    bits = quantization.get("bits") or {}
    if other := [part for part, number in bits.items() if part in ROW_PARTS or number not in BITS]:
        yield (
            "export.for vllm: the decoder's layers can have 4 or 8 bits there, all else 16, and quantize.bits has other parts or "
            f"widths: {', '.join(other)}; leave them out of it"
        )


def write(finished: Finished, out_dir: Path) -> list[Outcome]:
    """The folder; ExportError for what vLLM would not load."""
    config = AutoConfig.from_pretrained(finished.model.path)
    if found := list(problems(finished.recipe, config, finished.model.lineage.quantization)):
        raise ExportError("; ".join(found))
    copy_model(finished, out_dir)
    proof = None if (unproven := _why_not_proven(finished)) else _prove(finished, out_dir)
    return [Outcome("vllm", weight_format(finished), disk_bytes(out_dir), proof, unproven)]


def dtype_of(finished: Finished) -> Dtype:
    """What vLLM is to compute in: its kernels for int4 know 16 bits alone."""
    dtype = finished.recipe.model.dtype
    return "bfloat16" if finished.model.lineage.quantization and dtype == "float32" else dtype


def _why_not_proven(finished: Finished) -> str:
    if finished.is_random:
        return "the base model is random"
    return "" if _python(finished) else "it is not installed; name an interpreter that has it under export.vllm.python"


def _python(finished: Finished) -> str | None:
    assert finished.recipe.export is not None
    return finished.recipe.export.vllm.python or (sys.executable if find_spec("vllm") else None)


def _prove(finished: Finished, folder: Path) -> dict[str, Any]:
    """vLLM, in a process of its own, is asked for recorded translations; ExportError where it fails or says too much else."""
    recipe, python = finished.recipe, _python(finished)
    assert python is not None
    dtype = dtype_of(finished)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": dtype})})
    recorded = recorded_translations(recipe, finished.evaluation_dir, finished.clips)
    asked = [(clip, language) for clip, language, _ in recorded]
    answer = run_script("vllm_script.py", "vLLM", folder, recipe, asked, python)
    found = compare(recorded, answer.pop("said"), DIFFERING, "vLLM")
    return {"runtime": "vLLM", "dtype": dtype, "loads_whole": True, **found, **answer}
