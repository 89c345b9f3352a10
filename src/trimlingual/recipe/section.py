"""What all sections of a recipe are: strict, frozen, and each field marked where it cannot change a result."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

Dtype = Literal["float32", "bfloat16", "float16"]
Metric = Literal["chrfpp", "chrf", "bleu", "loss"]
Tower = Literal["decoder", "encoder"]
WIDTHS = (2, 3, 4, 8)  # numbers of bits that a weight of an int4 model can have
TOWERS: tuple[Tower, ...] = ("decoder", "encoder")
References = Literal["all", "any"]
AudioPadding = Literal["mask", "window"]
Runtime = Literal["transformers", "vllm", "gguf"]
GgufType = Literal["f16", "q8_0", "q4_0", "q4_k_m"]
# Stage that makes the export for each runtime; its folder in a run has a hyphen for the space.
EXPORT_STAGES: dict[Runtime, str] = {"transformers": "exported", "vllm": "exported vllm", "gguf": "exported gguf"}

# Marks for json_schema_extra of a field; fingerprint.py reads them.
# A setting that cannot change a result (near-ties in 16 bits aside), or what is known by its content instead: no stage is made again
# for it. A default that changes needs `{"neutral": <the default the setting was born with>}`; a new setting needs nothing.
NO_RESULT: dict[str, JsonValue] = {"result": False}


class Section(BaseModel):
    """Strict base: no unknown keys, no infinity, no silent conversion of `"3e-4"` or `no` (YAML 1.1 traps), immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, serialize_by_alias=True, allow_inf_nan=False)
