"""A folder for vLLM: 16-bit weights, or a decoder in int4 as compressed-tensors packs it, with everything else in 16 bits.

The files are those for transformers. What vLLM refuses is refused here, before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from trimlingual.evaluation.cost import disk_bytes
from trimlingual.exports.target import ExportError, Finished, Outcome
from trimlingual.exports.transformers import copy_model, weight_format
from trimlingual.recipe import Recipe

POSITIONS = 1500  # of the audio tower: vLLM's processor makes spectra of 30 s, and its model takes no others
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


def write(finished: Finished, out_dir: Path) -> list[Outcome]:
    """The folder; ExportError for what vLLM would not load."""
    config = AutoConfig.from_pretrained(finished.model.path)
    if found := list(problems(finished.recipe, config, finished.model.lineage.quantization)):
        raise ExportError("; ".join(found))
    copy_model(finished, out_dir)
    return [Outcome("vllm", weight_format(finished), disk_bytes(out_dir), unproven="no vLLM has run it")]
