"""The sections of a recipe, one a stage, named as the stage's verb; data.py has `data`, search.py `rank`, training.py those that train.

Strict: unknown keys and wrong types are errors. No torch here, so that the command line answers at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from trimlingual.recipe import languages
from trimlingual.recipe.section import NO_RESULT, WIDTHS, AudioPadding, Dtype, GgufType, Runtime, Section
from trimlingual.recipe.training import MixSettings, TrainSettings

# What `quantize.bits` can name.
ROW_PARTS = ("embeddings", "lm_head")
LAYER_PART = re.compile(r"decoder\.(0|[1-9]\d*)\.(attention|mlp)")


class ModelSettings(Section):
    """The base model and how its weights are held."""

    base: str = Field(
        description="`builtin:mini`, a folder, a Hub id, or random:qwen2-audio-7b (a rehearsal)",
        json_schema_extra=NO_RESULT,
    )
    revision: str | None = Field(
        default=None, json_schema_extra=NO_RESULT, description="commit, branch or tag of a Hub model; null: the newest"
    )
    dtype: Dtype = Field(default="bfloat16", description="weights in memory, while computing")
    storage_dtype: Dtype = Field(default="bfloat16", description="weights on disk")
    audio_padding: AudioPadding | None = Field(
        default=None,
        description="what a clip shorter than the window is filled up with: mask (the model does not hear it) or window "
        "(silence that it hears, as llama.cpp does it; slower); null: as the model's folder says, mask for a published one",
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, ...", json_schema_extra=NO_RESULT)

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:\d+)?", value):
            meant = " (a GPU is cuda, or cuda:0 for the first)" if "gpu" in value.lower() else ""
            raise ValueError(f"device is auto, cpu, cuda, cuda:1, mps or xpu{meant}")
        return value


class TaskSettings(Section):
    """What is asked of the model."""

    target_languages: Annotated[list[str], Field(min_length=1)] = Field(
        description="codes, with or without a region: de, zh, pt-BR"
    )
    system_prompt: str = Field(
        default="You are a professional translator.", description="the conversation's first message"
    )
    prompt: str = Field(
        default="Translate the English speech into {language}:",
        description="`{language}` becomes the language's English name",
    )
    language_names: dict[str, str] = Field(
        default_factory=dict, description="English names by code, before those of languages.py"
    )

    @model_validator(mode="after")
    def _known(self) -> TaskSettings:
        if len(set(self.target_languages)) != len(self.target_languages):
            raise ValueError(f"target_languages names a language twice: {self.target_languages}")
        if "{language}" not in self.prompt:
            raise ValueError("prompt must contain {language}, which is replaced by the target language's English name")
        for code in self.target_languages:
            self.language_name(code)
        return self

    def language_name(self, code: str) -> str:
        """English name of a language code; ValueError if the model has no prompt for it."""
        name = self.language_names.get(code) or languages.language_name(code)
        if not name:
            known = ", ".join(sorted({*languages.LANGUAGES, *self.language_names}))
            raise ValueError(
                f"no prompt is known for target language {code!r}; known, with or without a region: {known}; "
                f"name it: task.language_names={{{code}: its English name}}"
            )
        return name

    def prompt_for(self, code: str) -> str:
        """The prompt that asks for a language. Only `{language}` is replaced: other braces are the user's text."""
        return self.prompt.replace("{language}", self.language_name(code))


class VocabSettings(Section):
    """Vocabulary trimming: tokens kept are those counted on the given text, the prompts', every byte and special token."""

    when: Literal["before", "after"] = Field(
        default="before", description="before: the base model is trimmed first; after: the finished model is"
    )
    references: bool = Field(default=True, description="count the training references in the target languages")
    texts: list[str] = Field(
        default_factory=list,
        description="further text to count: UTF-8 files, one sentence a line",
        json_schema_extra=NO_RESULT,
    )
    held_out: list[str] = Field(
        default_factory=list, description="text files that the coverage is reported on", json_schema_extra=NO_RESULT
    )
    min_count: Annotated[int, Field(ge=1)] = Field(default=1, description="a token counted less often is not kept")
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="rows in all: the most frequent tokens, filled up with others of the scripts that were counted",
    )
    pad_to_multiple: Annotated[int, Field(ge=1)] = Field(
        default=64, description="rows are brought to a multiple of this with further real tokens"
    )

    @model_validator(mode="after")
    def _something(self) -> VocabSettings:
        if not (self.references or self.texts):
            raise ValueError("references is false and texts is empty: nothing to count tokens on")
        if self.max_tokens is not None and self.max_tokens % self.pad_to_multiple:
            raise ValueError(
                f"max_tokens {self.max_tokens} must be a multiple of pad_to_multiple {self.pad_to_multiple}"
            )
        return self


class DecodeSettings(Section):
    """Greedy decoding, bounded by the audio's length so that a runaway cannot cost more than a few sentences."""

    batch_size: Annotated[int, Field(ge=1)] = Field(
        default=128, description="at most; fewer where memory asks for it", json_schema_extra=NO_RESULT
    )
    max_new_tokens: Annotated[int, Field(ge=1)] = Field(
        default=256, description="of an answer, whatever its clip's length"
    )
    tokens_per_second: Annotated[float, Field(gt=0)] = Field(
        default=12.0, description="an answer has at most this many tokens per second of audio, and min_new_tokens more"
    )
    min_new_tokens: Annotated[int, Field(ge=1)] = Field(
        default=24, description="that every clip may have, see tokens_per_second"
    )


class DistillSettings(Section):
    """Filters of the teacher's translations (sequence-level knowledge distillation, Kim & Rush 2016)."""

    drop_duplicates: bool = Field(
        default=True,
        description="a translation that is the reference, word for word, teaches nothing new and is dropped",
    )
    max_repeats: Annotated[int, Field(ge=2)] = Field(
        default=4,
        description="a translation in which an n-gram (n <= 4) stands more often in a row is a repetition loop",
    )
    out_of_domain: bool = Field(
        default=False,
        description="the teacher translates data.out_of_domain too, into every target language; no references are needed there",
    )


class QuantizeSettings(Section):
    """QLoRA: an adapter trained on the model in nf4 and merged, the whole rounded to int4. Or trained as it ships (`method: full`)."""

    start: Literal["recovered", "pruned", "teacher", "base"] = Field(
        default="recovered", description="the model that is quantised"
    )
    parts: list[Literal["decoder", "audio_tower", "projector", "lm_head"]] = Field(
        default=["decoder", "audio_tower", "projector"], description="what becomes 4-bit", min_length=1
    )
    scheme: Literal["nf4", "fp4", "int4"] = Field(
        default="int4",
        description="format that ships; an adapter for int4 is trained on nf4; plain transformers unpacks int4 when it runs",
        json_schema_extra={"neutral": "nf4"},
    )
    double_quantization: bool = Field(default=True, description="the scales of nf4 and fp4 are quantised too")
    group_size: Literal[32, 64, 128] = Field(default=128, description="weights that share a scale, for int4")
    eight_bit: list[Literal["embeddings", "lm_head"]] = Field(
        default_factory=list, description="stored in 8 bits beside int4"
    )
    bits: dict[str, int] = Field(
        default_factory=dict,
        description="for int4: 2, 3, 4 or 8 bits by part: decoder.N.attention, decoder.N.mlp (layer N of the base model), embeddings, "
        "lm_head; what is not named has 4, or what eight_bit says",
    )
    compute_dtype: Dtype = Field(default="bfloat16", description="of products with 4-bit weights")
    # What the adapter is added to before the model is quantised again. `dequantized` is what it was trained on, but these weights
    # stand on the 4-bit grid: rounding takes most of them back to where they were, and the adapter is lost (docs/method.md).
    merge_base: Literal["original", "dequantized"] = Field(
        default="original", description="what the adapter is added to before it is quantised again"
    )
    rounding: Literal["nearest", "calibrated"] = Field(
        default="calibrated",
        description="int4: by what a weight's error does to the layer's output (GPTQ), or each weight to its nearest step",
        json_schema_extra={"neutral": "nearest"},
    )
    calibration_examples: Annotated[int, Field(ge=1)] = Field(
        default=256, description="of training, for rounding: calibrated"
    )
    train: TrainSettings | None = Field(
        default=TrainSettings(method="lora", epochs=1.0),
        description="lora: QLoRA; full, for int4: all weights train, rounded at every step; null: the weights are rounded as they are",
    )

    @property
    def data(self) -> MixSettings:
        """What is trained on or, without training, calibrated and measured on."""
        return self.train.data if self.train else MixSettings()

    @model_validator(mode="before")
    @classmethod
    def _rounding_of_bitsandbytes(cls, given: Any) -> Any:
        """nf4 and fp4 round by themselves, so that `scheme` alone chooses them."""
        if isinstance(given, Mapping) and given.get("scheme") in ("nf4", "fp4"):
            return {"rounding": "nearest", **given}
        return given

    @model_validator(mode="after")
    def _formats(self) -> QuantizeSettings:
        if self.eight_bit and self.scheme != "int4":
            raise ValueError(
                f"eight_bit needs scheme int4, not {self.scheme}: bitsandbytes holds one number format a model"
            )
        if self.rounding == "calibrated" and self.scheme != "int4":
            raise ValueError(f"rounding: calibrated needs scheme int4, not {self.scheme}, which rounds by itself")
        if "lm_head" in self.eight_bit and "lm_head" in self.parts:
            raise ValueError("lm_head is in parts (4 bits) and in eight_bit; name it in one of them")
        return self

    @model_validator(mode="after")
    def _bits(self) -> QuantizeSettings:
        if self.bits and self.scheme != "int4":
            raise ValueError(f"bits needs scheme int4, not {self.scheme}: bitsandbytes holds one number format a model")
        for part, number in self.bits.items():
            if part not in ROW_PARTS and not LAYER_PART.fullmatch(part):
                raise ValueError(
                    f"bits names {part!r}; a part is decoder.N.attention or decoder.N.mlp, N being a layer's number in the base model, "
                    "embeddings or lm_head"
                )
            if number not in WIDTHS:
                raise ValueError(f"bits gives {part} {number} bits; allowed are {', '.join(map(str, WIDTHS))}")
            if part in self.eight_bit:
                raise ValueError(f"{part} is in bits ({number}) and in eight_bit; name it in one of them")
            if part not in ROW_PARTS and "decoder" not in self.parts:
                raise ValueError(f"bits names {part}, but parts leaves the decoder as it is; add decoder to parts")
        return self

    def bits_of(self, part: str) -> int | None:
        """Bits of a weight of `audio_tower`, `projector` or a part as `bits` names them; None where it is not packed."""
        if part in self.bits:
            return self.bits[part]
        if part in self.eight_bit:
            return 8
        return 4 if part.partition(".")[0] in self.parts else None

    def as_stored(self) -> dict[str, object]:
        """What decides the bytes and the rounding of a model before it is trained."""
        return self.model_dump(include={"parts", "scheme", "group_size", "eight_bit", "bits"})

    def with_bits(self, bits: Mapping[str, int]) -> QuantizeSettings:
        """The same with other bits for these parts."""
        eight_bit = [part for part in self.eight_bit if part not in bits]
        return self.model_copy(update={"bits": {**self.bits, **bits}, "eight_bit": eight_bit})

    def at_positions(self, layers: Sequence[int]) -> QuantizeSettings:
        """The same with `bits` by the positions of layers in a model that has these of its base model's; of others nothing is left."""
        position_of = {f"decoder.{layer}": f"decoder.{position}" for position, layer in enumerate(layers)}
        bits = {}
        for part, number in self.bits.items():
            layer, _, block = part.rpartition(".")
            if part in ROW_PARTS:
                bits[part] = number
            elif layer in position_of:
                bits[f"{position_of[layer]}.{block}"] = number
        return self.model_copy(update={"bits": bits})

    @model_validator(mode="after")
    def _method(self) -> QuantizeSettings:
        if self.train and self.train.method == "full":
            if self.scheme != "int4":
                raise ValueError(
                    f"train.method: full rounds the weights at every step, which scheme {self.scheme} cannot; use scheme int4, or "
                    "method lora"
                )
            if self.train.fsdp or self.train.deepspeed:
                raise ValueError(
                    "train.method: full does not go with fsdp or deepspeed: every process needs the whole weights"
                )
        return self


class EvaluateSettings(Section):
    """What is measured on the test split, for every model of the run."""

    models: list[Literal["base", "teacher", "pruned", "recovered", "quantized", "trimmed"]] = Field(
        default=["base", "teacher", "pruned", "recovered", "quantized", "trimmed"],
        description="those of the run that are scored",
        json_schema_extra=NO_RESULT,  # which others are evaluated does not change one's scores
    )
    bootstrap_samples: Annotated[int, Field(ge=100)] = Field(
        default=1000, description="resamples of the confidence intervals"
    )
    comet: list[str] = Field(default_factory=list, description="COMET models, e.g. [Unbabel/wmt20-comet-da]")


class GgufSettings(Section):
    """GGUF files for llama.cpp. It has the model hear padding: `model.audio_padding: window`, or text alone."""

    types: Annotated[list[GgufType], Field(min_length=1)] = Field(
        default=["q8_0"],
        description="types of the decoder's weights, one file each; q4_0 has table and head in q8_0, q4_k_m needs llama-quantize",
    )
    llama_quantize: str | None = Field(
        default=None,
        description="llama.cpp's program llama-quantize, which makes q4_k_m; null: the one on the PATH",
        json_schema_extra=NO_RESULT,
    )
    llama_server: str | None = Field(
        default=None,
        description="llama.cpp's program llama-server, which proves the files; null: the one on the PATH, else xllamacpp's",
        json_schema_extra=NO_RESULT,
    )
    text_only: bool = Field(
        default=False, description="no audio tower: the decoder translates text, or states made elsewhere"
    )


class VllmSettings(Section):
    """The folder for vLLM."""

    python: str | None = Field(
        default=None,
        description="interpreter that has vLLM, which proves the folder; null: this one, if it has",
        json_schema_extra=NO_RESULT,
    )


class ExportSettings(Section):
    """What ships. Every runtime has a stage and a folder of its own: another one makes nothing stale."""

    runtimes: Annotated[list[Runtime], Field(min_length=1)] = Field(
        default=["transformers"],
        alias="for",
        description="runtimes that the finished model is written for",
        json_schema_extra=NO_RESULT,
    )
    vllm: VllmSettings = Field(default=VllmSettings(), description="of the folder for vLLM")
    gguf: GgufSettings = Field(default=GgufSettings(), description="of the files for llama.cpp")

    @model_validator(mode="after")
    def _once(self) -> ExportSettings:
        if len(set(self.runtimes)) != len(self.runtimes):
            raise ValueError(f"for names a runtime twice: {self.runtimes}")
        return self
