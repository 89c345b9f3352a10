"""The sections that train: `finetune`, `recover`, `quantize.train` and `rank.finetune_each_round`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from trimlingual.recipe.section import NO_RESULT, Section

FLASH_ADAMW = "flash_adamw"  # an optimizer that transformers has no name for (optimizer.py)


class LoraSettings(Section):
    """LoRA as published: r 64, alpha 128, rank-stabilised, every linear layer."""

    r: Annotated[int, Field(ge=1)] = Field(default=64, description="rank")
    alpha: Annotated[float, Field(gt=0)] = Field(
        default=128.0, description="the adapter's scale is alpha / sqrt(r), or alpha / r without rslora"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="of the adapter's input")
    rslora: bool = Field(default=True, description="rank-stabilised (Kalajdzievski 2023)")
    target_modules: str | list[str] = Field(default="all-linear", description="as PEFT's LoraConfig.target_modules")

    @field_validator("target_modules")
    @classmethod
    def _is_pattern(cls, value: str | list[str]) -> str | list[str]:
        try:
            re.compile(value if isinstance(value, str) else "")
        except re.error as error:
            raise ValueError(f"one text is a regular expression, and this is none ({error})") from error
        return value


class MixSettings(Section):
    """How often each part of the training data is repeated in one epoch; 0 leaves it out."""

    gold: Annotated[int, Field(ge=0)] = Field(default=1, description="the references")
    distilled: Annotated[int, Field(ge=0)] = Field(
        default=0, description="the teacher's translations of the training audio"
    )
    out_of_domain: Annotated[int, Field(ge=0)] = Field(default=0, description="the references of data.out_of_domain")
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
    temperature: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="both distributions are flattened by it"
    )
    top_k: Annotated[int, Field(ge=1)] = Field(
        default=64, description="most likely tokens of the teacher that are kept"
    )


class TrainSettings(Section):
    """Settings of one training run, handed to the Hugging Face Trainer."""

    method: Literal["full", "lora"] = Field(default="full", description="all weights, or a LoRA adapter")
    data: MixSettings = Field(
        default=MixSettings(), description="how often each part of the data is repeated in an epoch"
    )
    epochs: Annotated[float, Field(gt=0)] = Field(default=3, description="over the mixed data")
    max_steps: Annotated[int, Field(ge=1)] | None = Field(default=None, description="instead of epochs")
    batch_size: Annotated[int, Field(ge=1)] = Field(
        default=4, description="clips per process and step, before accumulation"
    )
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = Field(default=1, description="batches per step")
    learning_rate: Annotated[float, Field(gt=0)] = Field(default=1e-5, description="at its highest")
    sweep: list[Annotated[float, Field(gt=0)]] = Field(
        default_factory=list,
        description="learning rates to try instead, a whole training with each; the selection clips choose (finetune and recover)",
    )
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        default="cosine", description="how the rate falls"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(default=0, description="over which the rate rises from 0")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.0, description="of AdamW")
    max_grad_norm: Annotated[float, Field(gt=0, allow_inf_nan=True)] = Field(
        default=1.0, description="longer gradients are scaled down to this norm; .inf: none are"
    )
    length_grouped: bool = Field(default=True, description="clips of similar length share a step: less padding")
    optimizer: str = Field(
        default="adamw_torch", description=f"as transformers.TrainingArguments.optim, or {FLASH_ADAMW} (FlashOptim)"
    )
    optimizer_args: str | None = Field(default=None, description="as transformers.TrainingArguments.optim_args")
    mixed_precision: Literal["no", "bf16", "fp16"] = Field(
        default="no", description="bf16: products in bfloat16 where weights are float32"
    )
    gradient_checkpointing: bool = Field(
        default=False,
        json_schema_extra=NO_RESULT,
        description="compute activations again in the backward pass, which takes less memory and more time",
    )
    checkpoint_from_tokens: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="with gradient_checkpointing: batches of fewer tokens (clips x longest sequence, audio states included) "
        "keep their activations instead of computing them again, which is faster and takes more memory",
        json_schema_extra=NO_RESULT,
    )
    token_distillation: TokenDistillation | None = Field(
        default=None, description="learn the teacher's distributions too; null: only the texts"
    )
    selection_checks: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="times that the selection clips are translated while training, to keep the best weights; 0: the last are kept",
    )
    freeze: list[Literal["audio_tower", "projector", "embeddings", "lm_head"]] = Field(
        default_factory=list, description="parts that do not train"
    )
    lora: LoraSettings = Field(default=LoraSettings(), description="the adapter, for method lora")
    save_minutes: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="between checkpoints; null: by what writing one takes, so that it takes about a twentieth of the time",
        json_schema_extra=NO_RESULT,
    )
    save_steps: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="a checkpoint after every so many steps too", json_schema_extra=NO_RESULT
    )
    logging_steps: Annotated[int, Field(ge=1)] = Field(
        default=10, json_schema_extra=NO_RESULT, description="between entries of the loss curve"
    )
    report_to: list[str] = Field(
        default_factory=list, description="trackers, e.g. [tensorboard, wandb]", json_schema_extra=NO_RESULT
    )
    fsdp: bool = Field(
        default=False,
        description="each process holds its share of weights, gradients and optimizer states (FSDP2); full fine-tuning only",
    )
    deepspeed: str | None = Field(default=None, description="path of a DeepSpeed JSON", json_schema_extra=NO_RESULT)
    num_workers: Annotated[int, Field(ge=0)] = Field(
        default=0, json_schema_extra=NO_RESULT, description="processes that load audio and compute spectra"
    )

    @model_validator(mode="after")
    def _goes_together(self) -> TrainSettings:
        if self.optimizer_args and not all("=" in part for part in self.optimizer_args.split(",")):
            raise ValueError(f"optimizer_args is {self.optimizer_args!r}; it must look like name=value, name=value")
        others = [name for name in ("optimizer_args", "fsdp", "deepspeed") if getattr(self, name)]
        if self.optimizer == FLASH_ADAMW and others:
            raise ValueError(
                f"optimizer {FLASH_ADAMW} does not go with {', '.join(others)}; set optimizer: adamw_bnb_8bit or adamw_torch_fused"
            )
        if self.warmup_steps and self.lr_scheduler == "constant":
            raise ValueError("warmup_steps does nothing with lr_scheduler constant; set constant_with_warmup")
        if self.sweep and not self.selection_checks:
            raise ValueError("sweep needs selection_checks of at least 1: the selection clips choose among the rates")
        if len(set(self.sweep)) != len(self.sweep):
            raise ValueError(f"sweep names a rate twice: {self.sweep}")
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
