"""The recipe: one typed, frozen description of a whole compression run.

One section a stage, named as the stage's verb. Everything is validated at the edge: unknown keys, wrong types and impossible values
are all reported at once, by path, with what is allowed. This module imports neither torch nor transformers, so that the command line
answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Dtype = Literal["float32", "bfloat16", "float16"]
Metric = Literal["chrfpp", "chrf", "bleu", "loss"]
Tower = Literal["decoder", "encoder"]

# Names used in the prompt. Qwen2-Audio's published prompt spells the language out in English ("into German:").
LANGUAGE_NAMES = {
    "ar": "Arabic", "cs": "Czech", "de": "German", "en": "English", "es": "Spanish", "fa": "Persian", "fr": "French",
    "it": "Italian", "ja": "Japanese", "ko": "Korean", "nl": "Dutch", "pl": "Polish", "pt": "Portuguese", "ru": "Russian",
    "tr": "Turkish", "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip


class RecipeError(ValueError):
    """A recipe that cannot be run; the message lists every problem by path."""


class _Section(BaseModel):
    """Strict base: no unknown keys, no silent conversion of `"3e-4"` or `no` (YAML 1.1 traps), immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSettings(_Section):
    """The base model and how its weights are held."""

    base: str = Field(description="`builtin:mini`, a folder, a Hub id, or random:qwen2-audio-7b (a rehearsal)")
    revision: str | None = None
    dtype: Dtype = Field(default="bfloat16", description="weights in memory, while computing")
    storage_dtype: Dtype = Field(default="bfloat16", description="weights on disk")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, ...")


class TaskSettings(_Section):
    """What is asked of the model."""

    target_languages: Annotated[list[str], Field(min_length=1)]
    system_prompt: str = "You are a professional translator."
    prompt: str = "Translate the English speech into {language}:"
    language_names: dict[str, str] = Field(default_factory=dict, description="added to the built-in names")

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
        names = {**LANGUAGE_NAMES, **self.language_names}
        if code not in names:
            raise ValueError(
                f"no prompt is known for target language {code!r}; known: {', '.join(sorted(names))}; "
                "add it under task.language_names"
            )
        return names[code]


class ManifestSource(_Section):
    """A JSONL manifest: audio, reference (or references by language), optional source and id."""

    kind: Literal["manifest"] = "manifest"
    path: str


class FolderSource(_Section):
    """A folder with audio files and a metadata.csv (file_name plus the named columns), as Hugging Face's audiofolder."""

    kind: Literal["folder"]
    path: str
    references: dict[str, str] = Field(description="language -> column")
    source: str | None = None
    id: str | None = None


class HubSource(_Section):
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


class Covost2Source(_Section):
    """CoVoST 2: its TSV beside an unpacked Common Voice folder (whose `clips/` holds the audio)."""

    kind: Literal["covost2"]
    tsv: str
    common_voice: str
    target_language: str
    split: Literal["train", "dev", "test"] | None = None
    max_clips: Annotated[int, Field(ge=1)] | None = None


class BuiltinSource(_Section):
    """A split of the speech that ships with the package."""

    kind: Literal["builtin"]
    split: Literal["train", "select", "test", "everyday"]


Source = Annotated[
    ManifestSource | FolderSource | HubSource | Covost2Source | BuiltinSource, Field(discriminator="kind")
]
Held = Source | Annotated[int, Field(ge=1)]


class DataSettings(_Section):
    """Where the clips come from. `select` or `test` as a number: that many clips are held out of `train`."""

    train: Source
    select: Held
    test: Held
    out_of_domain: Source | None = None
    split_seed: int = 0
    too_long: Literal["error", "drop"] = "error"


class VocabSettings(_Section):
    """Vocabulary trimming: tokens kept are those counted on the given text, the prompts', every byte and special token."""

    when: Literal["before", "after"] = Field(
        default="before", description="before: the base model is trimmed first; after: the finished model is"
    )
    references: bool = Field(default=True, description="count the training references in the target languages")
    texts: list[str] = Field(
        default_factory=list, description="further text to count: UTF-8 files, one sentence a line"
    )
    held_out: list[str] = Field(default_factory=list, description="text files that the coverage is reported on")
    min_count: Annotated[int, Field(ge=1)] = Field(default=1, description="a token counted less often is not kept")
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="keep the most frequent ones, so many in all"
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


class LoraSettings(_Section):
    """LoRA as published: r 64, alpha 128, rank-stabilised, every linear layer."""

    r: Annotated[int, Field(ge=1)] = 64
    alpha: Annotated[float, Field(gt=0)] = 128.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rslora: bool = True
    target_modules: str | list[str] = "all-linear"


class MixSettings(_Section):
    """How often each part of the training data is repeated in one epoch; 0 leaves it out."""

    gold: Annotated[int, Field(ge=0)] = 1
    distilled: Annotated[int, Field(ge=0)] = 0
    out_of_domain: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _something(self) -> MixSettings:
        if not (self.gold or self.distilled or self.out_of_domain):
            raise ValueError("gold, distilled and out_of_domain are all 0: nothing to train on")
        return self


class TrainSettings(_Section):
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
    optimizer: str = Field(default="adamw_torch", description="as transformers.TrainingArguments.optim")
    optimizer_args: str | None = Field(default=None, description="as transformers.TrainingArguments.optim_args")
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    checkpoint_from_tokens: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="with gradient_checkpointing: batches of fewer tokens (clips x longest sequence, audio states included) "
        "keep their activations instead of computing them again, which is faster and takes more memory",
    )
    freeze: list[Literal["audio_tower", "projector", "embeddings", "lm_head"]] = Field(default_factory=list)
    lora: LoraSettings = LoraSettings()
    save_steps: Annotated[int, Field(ge=1)] = 200
    logging_steps: Annotated[int, Field(ge=1)] = 10
    report_to: list[str] = Field(default_factory=list, description="trackers, e.g. [tensorboard, wandb]")
    fsdp: str | None = Field(
        default=None, description="as transformers.TrainingArguments.fsdp, e.g. 'full_shard auto_wrap'"
    )
    deepspeed: str | None = Field(default=None, description="path of a DeepSpeed JSON")
    num_workers: Annotated[int, Field(ge=0)] = 0

    @field_validator("epochs", mode="before")
    @classmethod
    def _whole_epochs(cls, value: Any) -> Any:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


class DecodeSettings(_Section):
    """Greedy decoding, bounded by the audio's length so that a runaway cannot cost more than a few sentences."""

    batch_size: Annotated[int, Field(ge=1)] = Field(default=128, description="at most; fewer where memory asks for it")
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    # Bound on new tokens of a clip: min_new_tokens + tokens_per_second x its seconds, at most max_new_tokens.
    tokens_per_second: Annotated[float, Field(gt=0)] = 12.0
    min_new_tokens: Annotated[int, Field(ge=1)] = 24


class RankSettings(_Section):
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


class DistillSettings(_Section):
    """Filters of the teacher's translations (sequence-level knowledge distillation, Kim & Rush 2016)."""

    drop_duplicates: bool = True
    max_repeats: Annotated[int, Field(ge=2)] = Field(
        default=4,
        description="a translation in which an n-gram (n <= 4) stands more often in a row is a repetition loop",
    )


class QuantizeSettings(_Section):
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
    train: TrainSettings = TrainSettings(method="lora", epochs=1.0)

    @model_validator(mode="after")
    def _formats(self) -> QuantizeSettings:
        if self.eight_bit and self.scheme != "int4":
            raise ValueError(
                f"eight_bit needs scheme int4, not {self.scheme}: bitsandbytes holds one number format a model"
            )
        if "lm_head" in self.eight_bit and "lm_head" in self.parts:
            raise ValueError("lm_head is in parts (4 bits) and in eight_bit; name it in one of them")
        return self

    @model_validator(mode="after")
    def _lora(self) -> QuantizeSettings:
        if self.train.method != "lora":
            raise ValueError(f"train.method is {self.train.method!r} but 4-bit weights cannot be trained; use lora")
        return self


class EvaluateSettings(_Section):
    """What is measured on the test split, for every model of the run."""

    models: list[Literal["base", "teacher", "pruned", "recovered", "quantized", "trimmed"]] = [
        "base",
        "teacher",
        "pruned",
        "recovered",
        "quantized",
        "trimmed",
    ]
    bootstrap_samples: Annotated[int, Field(ge=100)] = 1000
    comet: list[str] = Field(default_factory=list, description="COMET models, e.g. [Unbabel/wmt20-comet-da]")


class Recipe(_Section):
    """A whole run. A stage whose section is null is left out."""

    name: str
    description: str = ""
    seed: int = 0
    model: ModelSettings
    task: TaskSettings
    data: DataSettings
    decode: DecodeSettings = DecodeSettings()
    vocab: VocabSettings | None = None
    finetune: TrainSettings | None = TrainSettings()
    rank: RankSettings | None = RankSettings()
    distill: DistillSettings | None = DistillSettings()
    recover: TrainSettings | None = TrainSettings(epochs=4.0, data=MixSettings(gold=1, distilled=1))
    quantize: QuantizeSettings | None = QuantizeSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        problems = []
        users = {
            "finetune": self.finetune,
            "recover": self.recover,
            "quantize.train": self.quantize and self.quantize.train,
        }
        for path, train in users.items():
            if not train:
                continue
            if train.data.out_of_domain and self.data.out_of_domain is None:
                problems.append(
                    f"{path}.data.out_of_domain is {train.data.out_of_domain} but data.out_of_domain is not set"
                )
            if train.data.distilled and self.distill is None:
                problems.append(f"{path}.data.distilled is {train.data.distilled} but the distill section is null")
            if train.data.distilled and path == "finetune":
                problems.append("finetune.data.distilled must be 0: the teacher is what translates, so it comes first")
        if self.recover and not self.rank:
            problems.append(
                "recover is set but rank is null: nothing is pruned, so nothing is to be recovered; set recover: null"
            )
        if self.distill and not self.finetune:
            problems.append("distill is set but finetune is null: there is no teacher")
        if self.quantize:
            have = {"base": True, "teacher": self.finetune, "pruned": self.rank, "recovered": self.recover}
            if not have[self.quantize.start]:
                problems.append(
                    f"quantize.start is {self.quantize.start!r} but no stage of this recipe makes that model"
                )
            if self.vocab and self.vocab.when == "after" and "lm_head" in self.quantize.parts:
                problems.append(
                    "vocab.when is after but quantize.parts has lm_head: rows of a 4-bit head cannot be taken out; use before"
                )
        if self.rank:
            for language in self.task.target_languages:
                try:
                    self.rank.metric_for(language)
                except ValueError as error:
                    problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))
        return self


def recipes_dir() -> Path:
    """Folder of the recipes that ship with the package (the repository's `recipes/` in a source checkout)."""
    here = Path(__file__).resolve().parent
    installed = here / "recipes"
    return installed if installed.is_dir() else here.parents[1] / "recipes"


def list_recipes() -> dict[str, Path]:
    """Shipped recipes by name."""
    return {path.stem: path for path in sorted(recipes_dir().glob("*.yaml"))}


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a shipped recipe by name or a YAML file by path, with `section.key=value` overrides.

    Raises RecipeError with every problem at once.
    """
    path = Path(name_or_path)
    if not path.is_file():
        shipped = list_recipes()
        if str(name_or_path) not in shipped:
            raise RecipeError(
                f"recipe {str(name_or_path)!r} is neither a file nor a shipped recipe; shipped: {', '.join(shipped)}"
            )
        path = shipped[str(name_or_path)]
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} must hold a mapping of sections, not {type(raw).__name__}")
    for override in overrides:
        _override(raw, override)
    return parse_recipe(raw, origin=str(path))


def parse_recipe(raw: dict[str, Any], origin: str = "recipe") -> Recipe:
    """Validate a mapping; RecipeError lists every problem by path."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        lines = [f"{origin} has {error.error_count()} problem(s):"]
        for problem in error.errors(include_url=False):
            where = ".".join(str(part) for part in problem["loc"]) or "(whole recipe)"
            lines.append(f"  {where}: {_explain(problem)}")
        raise RecipeError("\n".join(lines)) from error


def _explain(problem: Any) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return "unknown key"
    if problem["type"] == "missing":
        return "missing"
    given = problem["input"]
    if isinstance(given, (str, int, float, bool)):
        hint = ""
        if isinstance(given, str) and _is_number(given):
            hint = " (YAML reads 3e-4 as text: write 3.0e-4)"
        return f"{message}; got {given!r}{hint}"
    return message


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _override(raw: dict[str, Any], override: str) -> None:
    """Apply `a.b.c=value` in place; the value is read as YAML, with 3e-4 read as a number."""
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise RecipeError(f"--set {override!r} must look like section.key=value, e.g. rank.num_layers_to_remove=4")
    value = yaml.safe_load(text)
    if isinstance(value, str) and _is_number(value):
        value = float(value)
    node = raw
    for key in keys[:-1]:
        child = node.get(key)
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            raise RecipeError(f"--set {override!r}: {key} holds a value, not a section")
        node = child
    node[keys[-1]] = value
