"""Training, full or LoRA: the Hugging Face Trainer set up for speech translation.

Because it is the Trainer, `accelerate launch`, torchrun, FSDP, DeepSpeed, mixed precision, resuming and trackers come with it. What is
ours: the loss on answer tokens only, weighted by tokens under gradient accumulation; clips of similar length in a step, and the audio
window cut to the longest; stored audio states when the tower is frozen; checkpoints that are either whole or not used; and a stop, with
the batch's ids, when the loss is not finite.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import DistributedDataParallelKwargs
from accelerate.utils import fsdp2_prepare_model
from torch.utils.data import Dataset, Sampler, get_worker_info
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.modeling_layers import GradientCheckpointingLayer

from trimlingual.data.audio import load_audio
from trimlingual.data.sources import Clip
from trimlingual.evaluation.cost import peak_memory
from trimlingual.models.inputs import Collator, Example, Prompter, TrainingData
from trimlingual.models.loading import load_model, pick_device
from trimlingual.models.tree import attention_for_unlike_lengths, audio_tower, freeze_
from trimlingual.recipe import FLASH_ADAMW, SharedSettings, TrainSettings
from trimlingual.run import interruptions
from trimlingual.run.handed_on import give, take
from trimlingual.run.processes import gather, is_main_process, launched, num_processes, wait_for_everyone
from trimlingual.run.progress import say
from trimlingual.training.batches import LengthGroupedSampler, divided
from trimlingual.training.checkpoints import Checkpoints, last_complete_checkpoint, step_size_of
from trimlingual.training.lora import add_lora, fuse_lora_
from trimlingual.training.loss import answer_forward
from trimlingual.training.optimizer import TrainingError, flash_adamw
from trimlingual.training.selection import UNGUIDED, Guide, KeepBest
from trimlingual.training.sharding import SHARED_ON, only_here, sharding, whole_tower
from trimlingual.training.stored_audio import stored_states
from trimlingual.training.token_distillation import FOLDER, TeacherTokens, all_it_depends_on, digest_of, teacher_tokens

NEVER = 10**9  # steps


def _load_clip(clips: Sequence[Clip], index: int) -> np.ndarray:
    return load_audio(clips[index].audio)  # a function with a name: workers that are not forked get it pickled


class _Examples(Dataset):
    def __init__(self, examples: Sequence[Example]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        if get_worker_info():
            interruptions.ignored_here()
        return self.examples[index]


class TranslationTrainer(Trainer):
    """The Hugging Face Trainer with what is ours at the places it leaves for that."""

    lengths: Sequence[float] | None = None  # of the examples, in seconds, when clips of similar length share a step
    checkpoint_from_tokens = 0
    checkpoints: Checkpoints

    @cached_property
    def _num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 a parameter and token, as transformers estimates it, which walks through all modules again at every step."""
        return 6 * self._num_parameters * inputs["input_ids"].numel()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        args = self.args
        step_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return LengthGroupedSampler(self.lengths, step_size, args.seed)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Gradients are DDP's buckets themselves, not copied to them, which would hold them twice."""
        built = super()._build_accelerator_args(**kwargs)
        for handler in built["kwargs_handlers"]:
            if isinstance(handler, DistributedDataParallelKwargs):
                handler.gradient_as_bucket_view = True
        return built

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Of FSDP's shares: accelerate would look for them by the addresses of the weights, and most processes have no weights."""
        if self.args.fsdp:
            fsdp2_prepare_model(self.accelerator, self.model)
        return super().create_optimizer(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing where the checkpoint was the last step's: transformers would do one more before it sees."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with attention_for_unlike_lengths():  # around the backward pass too: checkpointed layers run again in it
            return super().training_step(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        ids = inputs.pop("ids")
        if self.checkpoint_from_tokens:
            checkpoint_layers_(model, inputs["input_ids"].numel() >= self.checkpoint_from_tokens)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; the batch holds {', '.join(ids)}. "
                "Listen to these clips and read their references; if they are sound, lower learning_rate."
            )
        return (loss, outputs) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Checkpoints keep the names in memory: resuming loads them by these, and skips unknown names without an error."""
        if hasattr(self.model, "peft_config"):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = output_dir or self.args.output_dir
            self.model.save_pretrained(folder, state_dict=state_dict, save_original_format=False)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A checkpoint that does not fit is an error: transformers only warns, and would train on from the wrong weights."""
        if load_result.missing_keys or load_result.unexpected_keys:
            raise TrainingError(
                f"the checkpoint does not fit the model ({len(load_result.missing_keys)} weights missing, "
                f"{len(load_result.unexpected_keys)} unknown); delete the .partial folder and start this stage again"
            )


def read_teacher(
    processor: Any,
    data: TrainingData,
    shared: SharedSettings,
    settings: TrainSettings,
    guide: Guide,
    work_dir: Path,
) -> dict[Example, TeacherTokens] | None:
    """What the recipe's token-level distillation learns from; the teacher has left the GPU again when this returns.

    Another stage of the run may have had the teacher read the same (`guide.reading`): then it is not asked again.
    """
    asked, examples = settings.token_distillation, data.examples
    if not asked:
        return None
    assert guide.teacher_dir is not None
    device = pick_device(shared.model.device)
    load_teacher = partial(load_model, guide.teacher_dir, shared.model.dtype, device)
    mels_on = "cpu" if settings.num_workers else device
    collator = Collator(Prompter(processor, shared.task), partial(_load_clip, data.clips), mels_on=mels_on)
    read = partial(teacher_tokens, load_teacher, collator, examples, asked, work_dir, settings.num_workers)
    if not guide.reading:
        return read()
    folder, digest = work_dir / FOLDER, ""
    if is_main_process():
        audio = [clip.audio_sha256 for clip in data.clips]
        known = all_it_depends_on(collator, examples, audio, guide.teacher_dir)
        digest = digest_of(examples, asked, shared.model.dtype, device.type, known)
        take(guide.reading, digest, folder)
    digest = gather(digest)[0]
    tokens = read(digest=digest)
    wait_for_everyone()  # who may still be reading the files
    if is_main_process():
        give(folder, digest, guide.reading)
    return tokens


@only_here()
def train_(
    model: Any,
    processor: Any,
    data: TrainingData,
    shared: SharedSettings,
    settings: TrainSettings,
    work_dir: Path,
    guide: Guide = UNGUIDED,
    teacher: Mapping[Example, TeacherTokens] | None = None,
) -> dict[str, Any]:
    """Train `model` in place; checkpoints in `work_dir`. With `method: lora` the info holds the PEFT model under `adapted`.

    `peak_memory_bytes` is that of the process that took most, `seconds_per_step` the median of what this start did (None: one step).

    Where each process held its share of the weights (FSDP, DeepSpeed), `model` is of no use any more, and the info holds the whole
    weights under `weights`, in the main process. Raises TrainingError when the loss is not finite.
    """
    trained, trainer = make_trainer(model, processor, data, shared, settings, work_dir, teacher)
    best = None
    if settings.selection_checks and guide.select:
        best = KeepBest(model, trained, processor, shared, guide.select, settings.selection_checks, work_dir)
        trainer.callback_handler.callbacks.insert(0, best)  # before Checkpoints: what is saved has been looked at
    try:
        with peak_memory(trainer.args.device) as peak, trainer.checkpoints.told():
            trainer.train(resume_from_checkpoint=trainer.checkpoints.resumed)
    except BaseException as error:
        # The traceback would keep the data loader, whose workers ignore signals: the process could not end without them.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        del model.forward  # the class's own again
    selection = best.finish() if best else None
    trained.eval()
    steps = trainer.state.global_step
    kept = ("step", "loss", "learning_rate")
    losses = [{key: entry[key] for key in kept} for entry in trainer.state.log_history if "loss" in entry]
    info: dict[str, Any] = {
        "num_examples": len(data.examples),
        "num_clips": len(data.clips),
        "steps": steps,
        "training_loss": round(
            trainer._total_loss_scalar / steps, 5
        ),  # the Trainer's own forgets what came before a restart
        "losses": losses,
        "num_trainable": sum(p.numel() for p in trained.parameters() if p.requires_grad),
        "peak_memory_bytes": max(gather(peak.num_bytes)),
        "seconds_per_step": trainer.checkpoints.seconds_per_step,
    }
    if selection:
        info["selection"] = selection
    if trained is not model:
        info["adapted"] = trained
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        info["weights"] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return info


def make_trainer(
    model: Any,
    processor: Any,
    data: TrainingData,
    shared: SharedSettings,
    settings: TrainSettings,
    work_dir: Path,
    teacher: Mapping[Example, TeacherTokens] | None = None,
) -> tuple[Any, TranslationTrainer]:
    """What is trained (`model`, or the PEFT model around it) and a Trainer ready to start.

    From here on `model.forward` is the training loss's; whoever trains deletes it afterwards. Raises ValueError without examples,
    TrainingError where the optimizer cannot run.
    """
    if not data.examples:
        raise ValueError("there is nothing to train on: the mix of gold, distilled and out-of-domain data is empty")
    device = pick_device(shared.model.device) if settings.fsdp else next(model.parameters()).device
    if settings.fsdp and not (launched() and device.type in SHARED_ON):
        raise TrainingError(
            "fsdp needs several processes with a GPU each: start with accelerate launch or torchrun, or set fsdp: false"
        )
    resumed = last_complete_checkpoint(work_dir)
    if resumed:
        settings = _with_steps_of(resumed, settings)
    set_seed(shared.seed)
    prompter = Prompter(processor, shared.task)
    freeze_(model, settings.freeze)
    trained = add_lora(model, settings.lora, shared.seed, settings.freeze) if settings.method == "lora" else model
    if trained is not model:
        fuse_lora_(trained)
    optimizer = flash_adamw(trained, settings) if settings.optimizer == FLASH_ADAMW else None
    states = None
    if not any(parameter.requires_grad for parameter in audio_tower(model).parameters()):
        with whole_tower(model, device) if settings.fsdp else nullcontext():
            states = stored_states(model, processor, data.clips, work_dir, settings.num_workers)
    trained.accepts_loss_kwargs = model.accepts_loss_kwargs = (
        True  # answer_forward divides by num_items_in_batch itself
    )
    model.forward = answer_forward(model, settings.token_distillation if teacher else None)
    trainer = TranslationTrainer(
        model=trained,
        args=training_arguments(settings, shared.seed, work_dir, model, device),
        train_dataset=_Examples(data.examples),
        data_collator=Collator(prompter, partial(_load_clip, data.clips), states, teacher=teacher),
        optimizer_cls_and_kwargs=optimizer,
    )
    if trainer.is_fsdp_enabled and (trained is not model or optimizer):  # by accelerate's configuration, not the recipe
        raise TrainingError(f"FSDP goes with method: full, and not with optimizer: {FLASH_ADAMW}")
    if settings.length_grouped:
        trainer.lengths = [data.clips[example.clip].duration_s for example in data.examples]
    if settings.gradient_checkpointing:
        trainer.checkpoint_from_tokens = settings.checkpoint_from_tokens
    trainer.remove_callback(PrinterCallback)  # it prints to standard output, which is for results
    trainer.checkpoints = Checkpoints(trainer, work_dir, settings.save_minutes, resumed)
    trainer.add_callback(trainer.checkpoints)
    return trained, trainer


def _with_steps_of(checkpoint: str, settings: TrainSettings) -> TrainSettings:
    """The settings with a batch size and an accumulation that give the checkpoint's steps, whatever the number of processes now."""
    step_size, processes = step_size_of(checkpoint), num_processes()
    now = settings.batch_size * settings.gradient_accumulation_steps * processes
    if step_size in (None, now):
        return settings
    batches = divided(step_size, processes, settings.batch_size)
    if batches is None:
        raise TrainingError(
            f"training began with steps of {step_size} examples, which {processes} processes cannot share equally; start as many "
            f"processes as divide {step_size}, or delete the .partial folder to begin anew with {now} examples per step"
        )
    batch_size, accumulation = batches
    say(f"  steps of {step_size} examples, as before: {processes} x {batch_size}, accumulated {accumulation} times")
    return settings.model_copy(update={"batch_size": batch_size, "gradient_accumulation_steps": accumulation})


def checkpoint_layers_(model: Any, on: bool) -> None:
    """Switch gradient checkpointing on or off in every layer, for the next forward; it must have been set up on the model before."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = on


def training_arguments(
    settings: TrainSettings, seed: int, work_dir: Path, model: Any, device: torch.device
) -> TrainingArguments:
    """The recipe's section as TrainingArguments, to train `model` on `device`."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = (
        "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    )  # renamed in 5.2x
    checkpointing: dict[str, Any] = {}
    if settings.gradient_checkpointing:
        checkpointing = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(
        output_dir=str(work_dir),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch" if settings.optimizer == FLASH_ADAMW else settings.optimizer,
        optim_args=settings.optimizer_args,
        bf16=settings.mixed_precision == "bf16",
        fp16=settings.mixed_precision == "fp16",
        **checkpointing,
        use_cpu=device.type == "cpu",
        save_strategy="steps",
        save_steps=settings.save_steps or NEVER,  # and whenever Checkpoints says so, and after the last step
        save_total_limit=2,  # two, so that one is whole while the other is being written
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        report_to=settings.report_to or "none",
        fsdp=settings.fsdp or None,
        fsdp_config=sharding(model) if settings.fsdp else None,
        deepspeed=settings.deepspeed,
        dataloader_num_workers=settings.num_workers,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,  # Checkpoints tells how it goes
        seed=seed,
        data_seed=seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one GPU: not DataParallel over all that are there
    return arguments
