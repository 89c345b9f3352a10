"""The sections of a recipe, one a stage, named as the stage's verb.

Strict: unknown keys and wrong types are errors. No torch here, so that the command line answers at once.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from trimlingual.recipe import languages

Dtype = Literal["float32", "bfloat16", "float16"]
Metric = Literal["chrfpp", "chrf", "bleu", "loss"]
Tower = Literal["decoder", "encoder"]
TOWERS: tuple[Tower, ...] = ("decoder", "encoder")
References = Literal["all", "any"]

FLASH_ADAMW = "flash_adamw"  # an optimizer that transformers has no name for (optimizer.py)


# Marks for json_schema_extra of a field; fingerprint.py reads them.
# A setting that cannot change a result (near-ties in 16 bits aside), or what is known by its content instead: no stage is made again
# for it. A default that changes needs `{"neutral": <the default the setting was born with>}`; a new setting needs nothing.
NO_RESULT: dict[str, JsonValue] = {"result": False}


class Section(BaseModel):
    """Strict base: no unknown keys, no silent conversion of `"3e-4"` or `no` (YAML 1.1 traps), immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSettings(Section):
    """The base model and how its weights are held."""

    base: str = Field(
        description="`builtin:mini`, a folder, a Hub id, or random:qwen2-audio-7b (a rehearsal)",
        json_schema_extra=NO_RESULT,
    )
    revision: str | None = Field(default=None, json_schema_extra=NO_RESULT)
    dtype: Dtype = Field(default="bfloat16", description="weights in memory, while computing")
    storage_dtype: Dtype = Field(default="bfloat16", description="weights on disk")
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

    target_languages: Annotated[list[str], Field(min_length=1)]
    system_prompt: str = "You are a professional translator."
    prompt: str = "Translate the English speech into {language}:"
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


class ManifestSource(Section):
    """A JSONL manifest: audio, reference (or references by language), optional source and id."""

    kind: Literal["manifest"] = "manifest"
    path: str


class FolderSource(Section):
    """A folder with audio files and a metadata.csv (file_name plus the named columns), as Hugging Face's audiofolder."""

    kind: Literal["folder"]
    path: str
    references: dict[str, str] = Field(description="language -> column")
    source: str | None = None
    id: str | None = None


class HubSource(Section):
    """A Hub (or local) data set loaded by `datasets`."""

    kind: Literal["hub"]
    path: str
    name: str | None = None
    revision: str | None = None
    splits: Annotated[list[str], Field(min_length=1)]
    audio: str = "audio"
    references: dict[str, str] = Field(description="language -> column")
    source: str | None = None
    id: str | None = None


class Covost2Source(Section):
    """CoVoST 2: its TSV beside an unpacked Common Voice folder (whose `clips/` holds the audio)."""

    kind: Literal["covost2"]
    tsv: str
    common_voice: str
    target_language: str
    split: Literal["train", "dev", "test"] | None = None
    max_clips: Annotated[int, Field(ge=1)] | None = None


class BuiltinSource(Section):
    """A split of the speech that ships with the package."""

    kind: Literal["builtin"]
    split: Literal["train", "select", "test", "everyday"]


Source = Annotated[
    ManifestSource | FolderSource | HubSource | Covost2Source | BuiltinSource, Field(discriminator="kind")
]
Held = Source | Annotated[int, Field(ge=1)]


class DataSettings(Section):
    """Where the clips come from. `select` or `test` as a number: that many clips are held out of `train`."""

    train: Source
    select: Held
    test: Held
    out_of_domain: Source | None = None
    references: References = Field(
        default="all",
        description="all: each clip has a reference in every target language; any: it is used in the languages it has",
    )
    split_seed: int = 0
    hold_out: Literal["by_id", "train_test_split"] = Field(
        default="by_id",
        description="how numbers are drawn. by_id: a shuffle of the ids, whatever the order of the rows; train_test_split: "
        "numpy's permutation of the rows, which is that function of `datasets`, and how the paper drew its 100 test clips",
    )
    too_long: Literal["error", "drop"] = "error"
    unusable: Literal["error", "drop"] = Field(
        default="error", description="clips that are silent, shorter than 0.1 s, or stereo whose channels cancel"
    )
    equal_sources: Literal["warn", "drop"] = Field(
        default="warn",
        description="training clips whose source text is one of select or test, case and punctuation aside; drop: not trained on",
    )


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


class LoraSettings(Section):
    """LoRA as published: r 64, alpha 128, rank-stabilised, every linear layer."""

    r: Annotated[int, Field(ge=1)] = 64
    alpha: Annotated[float, Field(gt=0)] = 128.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rslora: bool = True
    target_modules: str | list[str] = "all-linear"


class MixSettings(Section):
    """How often each part of the training data is repeated in one epoch; 0 leaves it out."""

    gold: Annotated[int, Field(ge=0)] = 1
    distilled: Annotated[int, Field(ge=0)] = 0
    out_of_domain: Annotated[int, Field(ge=0)] = 0
    distilled_out_of_domain: Annotated[int, Field(ge=0)] = Field(
        default=0, description="the teacher's translations of the out-of-domain audio; distill.out_of_domain makes them"
    )

    @model_validator(mode="after")
    def _something(self) -> MixSettings:
        if not (self.gold or self.out_of_domain or self.taught):
            raise ValueError(f"{', '.join(type(self).model_fields)} are all 0: nothing to train on")
        return self

    @property
    def splits(self) -> list[str]:
        """The splits whose clips are trained on."""
        uses = {
            "train": self.gold or self.distilled,
            "out_of_domain": self.out_of_domain or self.distilled_out_of_domain,
        }
        return [split for split, used in uses.items() if used]

    @property
    def taught(self) -> bool:
        """Whether anything that the teacher translated is learned from."""
        return bool(self.distilled or self.distilled_out_of_domain)


class TokenDistillation(Section):
    """Token-level distillation: the student learns the teacher's distribution at every answer token (Hinton et al. 2015)."""

    weight: Annotated[float, Field(gt=0, le=1)] = Field(default=0.5, description="the rest is on the text itself")
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_k: Annotated[int, Field(ge=1)] = Field(
        default=64, description="most likely tokens of the teacher that are kept"
    )


class TrainSettings(Section):
    """Settings of one training run, handed to the Hugging Face Trainer."""

    method: Literal["full", "lora"] = "full"
    data: MixSettings = MixSettings()
    epochs: Annotated[float, Field(gt=0)] = 3
    max_steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 4
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    length_grouped: bool = Field(default=True, description="clips of similar length share a step: less padding")
    optimizer: str = Field(
        default="adamw_torch", description=f"as transformers.TrainingArguments.optim, or {FLASH_ADAMW} (FlashOptim)"
    )
    optimizer_args: str | None = Field(default=None, description="as transformers.TrainingArguments.optim_args")
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = Field(default=False, json_schema_extra=NO_RESULT)
    checkpoint_from_tokens: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="with gradient_checkpointing: batches of fewer tokens (clips x longest sequence, audio states included) "
        "keep their activations instead of computing them again, which is faster and takes more memory",
        json_schema_extra=NO_RESULT,
    )
    token_distillation: TokenDistillation | None = None
    selection_checks: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="times that the selection clips are translated while training, to keep the best weights; 0: the last are kept",
    )
    freeze: list[Literal["audio_tower", "projector", "embeddings", "lm_head"]] = Field(default_factory=list)
    lora: LoraSettings = LoraSettings()
    save_minutes: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="between checkpoints; null: by what writing one takes, so that it takes about a twentieth of the time",
        json_schema_extra=NO_RESULT,
    )
    save_steps: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="a checkpoint after every so many steps too", json_schema_extra=NO_RESULT
    )
    logging_steps: Annotated[int, Field(ge=1)] = Field(default=10, json_schema_extra=NO_RESULT)
    report_to: list[str] = Field(
        default_factory=list, description="trackers, e.g. [tensorboard, wandb]", json_schema_extra=NO_RESULT
    )
    fsdp: bool = Field(
        default=False,
        description="each process holds its share of weights, gradients and optimizer states (FSDP2); full fine-tuning only",
    )
    deepspeed: str | None = Field(default=None, description="path of a DeepSpeed JSON", json_schema_extra=NO_RESULT)
    num_workers: Annotated[int, Field(ge=0)] = Field(default=0, json_schema_extra=NO_RESULT)

    @model_validator(mode="after")
    def _goes_together(self) -> TrainSettings:
        others = [name for name in ("optimizer_args", "fsdp", "deepspeed") if getattr(self, name)]
        if self.optimizer == FLASH_ADAMW and others:
            raise ValueError(
                f"optimizer {FLASH_ADAMW} does not go with {', '.join(others)}; set optimizer: adamw_bnb_8bit or adamw_torch_fused"
            )
        if self.fsdp and ("8bit" in self.optimizer or "paged" in self.optimizer):
            raise ValueError(f"fsdp does not go with optimizer {self.optimizer}; set optimizer: adamw_torch_fused")
        if self.fsdp and self.selection_checks:
            raise ValueError("fsdp does not go with selection_checks: no process holds the whole weights; set it to 0")
        if self.fsdp and self.method == "lora":
            raise ValueError(
                "fsdp does not go with method lora, whose frozen weights need no more than one GPU; leave it out"
            )
        return self

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_not_false(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads a bare no as a boolean

    @field_validator("epochs", mode="before")
    @classmethod
    def _whole_epochs(cls, value: Any) -> Any:
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53
        return float(value) if whole else value


class DecodeSettings(Section):
    """Greedy decoding, bounded by the audio's length so that a runaway cannot cost more than a few sentences."""

    batch_size: Annotated[int, Field(ge=1)] = Field(
        default=128, description="at most; fewer where memory asks for it", json_schema_extra=NO_RESULT
    )
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    # Bound on new tokens of a clip: min_new_tokens + tokens_per_second x its seconds, at most max_new_tokens.
    tokens_per_second: Annotated[float, Field(gt=0)] = 12.0
    min_new_tokens: Annotated[int, Field(ge=1)] = 24


class RankSettings(Section):
    """Layer importance. `greedy` is the published search by real translation score."""

    strategy: Literal["greedy", "middle", "block-influence"] = "greedy"
    num_layers_to_remove: Annotated[int, Field(ge=1)] = Field(default=8, description="the maximum, with min_retained")
    min_retained: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="stop before the selection score falls below this share of the unpruned model's, e.g. 0.97",
    )
    # How a round of the greedy search finds its best candidate. Only `exact` is sure to; the others trade certainty for time.
    selection: Literal["exact", "successive-halving", "bootstrap-racing"] = "exact"
    early_stopping: bool = Field(
        default=True,
        description="exact: give a candidate up once it cannot be among the two best of its round any more",
    )
    first_clips: Annotated[int, Field(ge=1)] = Field(
        default=10, description="clips after which halving and racing decide for the first time"
    )
    metric: Metric | dict[str, Metric] = Field(default="chrfpp", description="one metric, or one a target language")
    towers: Literal["decoder", "encoder", "both"] = "decoder"
    protect_first: Annotated[int, Field(ge=0)] = 1
    protect_last: Annotated[int, Field(ge=0)] = 1
    protected: list[int] = Field(
        default_factory=list, description="further decoder layers never removed (original index)"
    )
    finetune_each_round: TrainSettings | None = None

    @model_validator(mode="after")
    def _fits(self) -> RankSettings:
        if self.finetune_each_round and self.strategy != "greedy":
            raise ValueError(f"finetune_each_round needs strategy greedy, not {self.strategy}")
        if self.finetune_each_round and self.finetune_each_round.fsdp:
            raise ValueError("finetune_each_round does not go with fsdp: the search goes on with whole weights")
        if self.strategy != "greedy":
            for name in ("min_retained", "selection"):
                if getattr(self, name) not in (None, "exact"):
                    raise ValueError(f"{name} needs strategy greedy, not {self.strategy}")
        named = {self.metric} if isinstance(self.metric, str) else set(self.metric.values())
        if "loss" in named and (self.min_retained or self.selection == "bootstrap-racing"):
            raise ValueError(
                "min_retained and bootstrap-racing need a translation metric (chrfpp, chrf, bleu), not loss"
            )
        return self

    def metric_for(self, language: str) -> Metric:
        """The metric by which `language` is scored."""
        if isinstance(self.metric, str):
            return self.metric
        if language not in self.metric:
            raise ValueError(f"rank.metric names no metric for {language!r}; it has {sorted(self.metric)}")
        return self.metric[language]


class DistillSettings(Section):
    """Filters of the teacher's translations (sequence-level knowledge distillation, Kim & Rush 2016)."""

    drop_duplicates: bool = True
    max_repeats: Annotated[int, Field(ge=2)] = Field(
        default=4,
        description="a translation in which an n-gram (n <= 4) stands more often in a row is a repetition loop",
    )
    out_of_domain: bool = Field(
        default=False,
        description="the teacher translates data.out_of_domain too, into every target language; no references are needed there",
    )


class QuantizeSettings(Section):
    """QLoRA: 4-bit base, adapter trained on it, adapter merged, quantised again."""

    start: Literal["recovered", "pruned", "teacher", "base"] = "recovered"
    parts: list[Literal["decoder", "audio_tower", "projector", "lm_head"]] = Field(
        default=["decoder", "audio_tower", "projector"], description="what becomes 4-bit", min_length=1
    )
    scheme: Literal["nf4", "fp4", "int4"] = Field(
        default="nf4", description="format that ships; int4 is trained as nf4 and unpacked by transformers when it runs"
    )
    double_quantization: bool = True
    group_size: Literal[32, 64, 128] = Field(default=128, description="weights that share a scale, for int4")
    eight_bit: list[Literal["embeddings", "lm_head"]] = Field(
        default_factory=list, description="stored in 8 bits beside int4"
    )
    compute_dtype: Dtype = "bfloat16"
    # What the adapter is added to before the model is quantised again. `dequantized` is what it was trained on, but these weights
    # stand on the 4-bit grid: rounding takes most of them back to where they were, and the adapter is lost (docs/method.md).
    merge_base: Literal["original", "dequantized"] = "original"
    rounding: Literal["nearest", "calibrated"] = Field(
        default="nearest",
        description="int4: each weight to its nearest step, or by what its error does to the layer's output (GPTQ)",
    )
    calibration_examples: Annotated[int, Field(ge=1)] = Field(
        default=256, description="of training, for rounding: calibrated"
    )
    train: TrainSettings | None = Field(
        default=TrainSettings(method="lora", epochs=1.0), description="null: the weights are rounded as they are"
    )

    @property
    def data(self) -> MixSettings:
        """What is trained on or, without training, calibrated and measured on."""
        return self.train.data if self.train else MixSettings()

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
    def _lora(self) -> QuantizeSettings:
        if self.train and self.train.method != "lora":
            raise ValueError(f"train.method is {self.train.method!r} but 4-bit weights cannot be trained; use lora")
        return self


class EvaluateSettings(Section):
    """What is measured on the test split, for every model of the run."""

    models: list[Literal["base", "teacher", "pruned", "recovered", "quantized", "trimmed"]] = Field(
        default=["base", "teacher", "pruned", "recovered", "quantized", "trimmed"],
        json_schema_extra=NO_RESULT,  # which others are evaluated does not change one's scores
    )
    bootstrap_samples: Annotated[int, Field(ge=100)] = 1000
    comet: list[str] = Field(default_factory=list, description="COMET models, e.g. [Unbabel/wmt20-comet-da]")
