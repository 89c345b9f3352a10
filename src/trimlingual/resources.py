"""What a run needs of the machine: a device, libraries, disk and memory. Part of the check before anything runs (preflight.py)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trimlingual.estimate import Estimate, disk_peak, gb, training_sections
from trimlingual.recipe import FLASH_ADAMW, LAYER_PART, ROW_PARTS, QuantizeSettings, Recipe, TrainSettings
from trimlingual.run.extras import install_line, missing
from trimlingual.run.processes import launched

# Libraries of the trackers that transformers can report to, where they differ from the tracker's name.
TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"), "azure_ml": ("azureml",), "dagshub": ("dagshub",),
    "clearml": ("clearml",), "codecarbon": ("codecarbon",), "comet_ml": ("comet_ml",), "dvclive": ("dvclive",), "flyte": ("flytekit",),
    "mlflow": ("mlflow",), "neptune": ("neptune",), "swanlab": ("swanlab",), "trackio": ("trackio",), "wandb": ("wandb",),
}  # fmt: skip


def device_problems(recipe: Recipe) -> Iterator[str]:
    """Whether the device is there."""
    device, _, index = recipe.model.device.partition(":")
    if device in ("auto", "cpu"):
        return
    import torch

    count_of = {
        "cuda": torch.cuda.device_count,
        "mps": lambda: int(torch.backends.mps.is_available()),
        "xpu": torch.xpu.device_count,
    }
    count = count_of[device]()
    if int(index or 0) >= count:
        yield f"model.device is {recipe.model.device}, but PyTorch {torch.__version__} finds {count} {device} device(s) on this machine"


def training_problems(recipe: Recipe, names: Sequence[str], config: Any) -> Iterator[str]:
    """What the training sections need: libraries, a GPU for each process, modules of these names in the model of `config`."""
    for stage, (path, train) in training_sections(recipe).items():
        if stage in names:
            yield from (f"{path}.{problem}" for problem in _training(recipe, train))
            if train.method == "lora" and train.lora.target_modules != "all-linear" and config is not None:
                yield from (f"{path}.{problem}" for problem in _adapter_problems(train, config))


def _training(recipe: Recipe, train: TrainSettings) -> Iterator[str]:
    if train.optimizer == FLASH_ADAMW:
        if missing("flash"):
            yield f"optimizer: flash_adamw needs FlashOptim: {install_line('flash')}; or set adamw_bnb_8bit"
        elif _device_kind(recipe) != "cuda":
            yield "optimizer: flash_adamw needs a CUDA GPU, and none is used; set adamw_torch"
    else:
        yield from _optimizer_problems(train)
    if train.fsdp and not (launched() and _device_kind(recipe) == "cuda"):
        yield "fsdp: it needs several processes with a GPU each: start with accelerate launch or torchrun, or set fsdp: false"
    if train.deepspeed:
        if find_spec("deepspeed") is None:
            yield "deepspeed: it is not installed; pip install deepspeed"
        if not Path(train.deepspeed).is_file():
            yield f"deepspeed: {train.deepspeed} does not exist"
    for tracker in train.report_to:
        libraries = TRACKERS.get(tracker)
        if libraries is None and tracker not in ("all", "none"):
            yield f"report_to: {tracker!r} is unknown; it is one of {', '.join(TRACKERS)}"
        elif libraries and not any(find_spec(name) for name in libraries):
            yield f"report_to: {tracker} is not installed; pip install {libraries[0]}"


def _optimizer_problems(train: TrainSettings) -> Iterator[str]:
    """Whether transformers knows the optimizer, and what it needs is installed."""
    from transformers import Trainer, TrainingArguments
    from transformers.training_args import OptimizerNames

    if train.optimizer not in (known := [name.value for name in OptimizerNames]):
        yield f"optimizer: {train.optimizer!r} is unknown; it is {FLASH_ADAMW} or one of {', '.join(known)}"
        return
    # TrainingArguments themselves would take hold of the device and of the other processes.
    arguments = {each.name: each.default for each in fields(TrainingArguments)}
    arguments |= {"optim": train.optimizer, "optim_args": train.optimizer_args, "learning_rate": train.learning_rate}
    try:
        Trainer.get_optimizer_cls_and_kwargs(SimpleNamespace(**arguments))
    except (ImportError, ValueError) as error:
        yield f"optimizer: {train.optimizer} cannot be used: {error}"


def _adapter_problems(train: TrainSettings, config: Any) -> Iterator[str]:
    """Whether there is a module to adapt."""
    from trimlingual.models.family import meta_model
    from trimlingual.training.lora import add_lora

    try:
        add_lora(meta_model(config), train.lora, 0, train.freeze)
    except ValueError as error:
        yield str(error)


def quantization_problems(recipe: Recipe, names: Sequence[str], config: Any) -> Iterator[str]:
    """The library of the 4-bit format, and widths that its groups divide."""
    settings = recipe.quantize
    if settings is None or "quantized" not in names:
        return
    by_bitsandbytes = settings.scheme != "int4" or (settings.train is not None and settings.train.method == "lora")
    if by_bitsandbytes and find_spec("bitsandbytes") is None:
        yield "quantize: bitsandbytes is not installed; pip install bitsandbytes"
    if config is not None:
        on_cpu = by_bitsandbytes and _device_kind(recipe) == "cpu"
        yield from _group_problems(settings, _linear_shapes(config), on_cpu)


def bits_problems(settings: QuantizeSettings, num_layers: int) -> Iterator[str]:
    """Layers that `bits` names and a base model with `num_layers` in its decoder does not have."""
    named = [part for part in settings.bits if LAYER_PART.fullmatch(part)]
    if wrong := [part for part in named if int(part.split(".")[1]) >= num_layers]:
        yield f"quantize.bits names {', '.join(wrong)}; the layers of the base model's decoder are 0 to {num_layers - 1}"


def _linear_shapes(config: Any) -> dict[str, set[tuple[int, int]]]:
    """Inputs and outputs of the linear layers of each part, and of the embedding table, whose inputs are its width."""
    from torch import nn

    from trimlingual.models.family import meta_model
    from trimlingual.models.tree import PARTS, part_of, text_decoder

    model = meta_model(config)
    shapes: dict[str, set[tuple[int, int]]] = {part: set() for part in PARTS}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (part := part_of(name)):
            shapes[part].add((module.in_features, module.out_features))
    rows, width = text_decoder(model).embed_tokens.weight.shape
    return shapes | {"embeddings": {(width, rows)}}


def _group_problems(settings: QuantizeSettings, shapes: dict[str, set[tuple[int, int]]], on_cpu: bool) -> Iterator[str]:
    """`on_cpu`: bitsandbytes computes on a CPU, which takes inputs in groups of 64 and outputs in groups of 32."""
    by_group = [part for part in ROW_PARTS if settings.bits.get(part, 8) < 8]  # not named in parts, or there as well
    for part in dict.fromkeys([*settings.parts, *by_group]):
        widths = sorted({inputs for inputs, _ in shapes[part]})
        if settings.scheme == "int4" and (odd := [width for width in widths if width % settings.group_size]):
            fits = [size for size in (128, 64, 32) if not any(width % size for width in widths)]
            key = "parts" if part in settings.parts else "bits"
            advice = f"choose {' or '.join(map(str, fits))}" if fits else f"leave {part} out of quantize.{key}"
            yield f"quantize.group_size {settings.group_size} does not divide widths {odd} of the {part}; {advice}"
        if (
            on_cpu
            and part in settings.parts
            and (uneven := [shape for shape in sorted(shapes[part]) if shape[0] % 64 or shape[1] % 32])
        ):
            yield (
                f"bitsandbytes on a CPU needs inputs divisible by 64 and outputs by 32, and the {part} has layers of {uneven} (inputs, "
                "outputs); leave it out of quantize.parts, or use a GPU"
            )


def disk_problems(run_dir: Path, stages: Sequence[str], estimates: dict[str, Estimate]) -> Iterator[str]:
    """Free space of the run's file system against the peak."""
    folder = next(parent for parent in (run_dir.absolute(), *run_dir.absolute().parents) if parent.is_dir())
    size, free = disk_peak(estimates, stages), shutil.disk_usage(folder).free
    if size > free:
        yield (
            f"disk: {folder} has {gb(free)} free, but the run wants {gb(size)} there at its peak (checkpoints counted); "
            "free some, choose another --run-dir, or train by LoRA"
        )


def memory_notes(recipe: Recipe, names: Sequence[str], estimates: dict[str, Estimate]) -> Iterator[str]:
    """Stages that want more than the device has, before activations."""
    device = _device_kind(recipe)
    wanted = {
        name: one for name, one in estimates.items() if name in names and one.memory + one.host + one.host_main > 1e9
    }
    if not wanted:
        return  # less than any machine has
    import psutil
    import torch

    size = machine = psutil.virtual_memory().total
    if device == "cuda" and torch.cuda.is_available():  # that there is none is said elsewhere
        size = torch.cuda.get_device_properties(torch.device(recipe.model.device.replace("auto", "cuda"))).total_memory
    for name, one in wanted.items():
        host = one.host * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + one.host_main
        on_device = one.memory + host * (device == "cpu")
        if on_device > size and not one.divided:
            yield f"stage {name} wants {gb(on_device)} of memory before activations (an estimate); the device has {gb(size)}"
        elif host > machine:
            reasons = ["what the frozen audio tower makes of the clips"] * bool(one.host)
            reasons += ["the model that FSDP's main process reads whole"] * bool(one.host_main)
            yield (
                f"stage {name} wants {gb(host)} of host memory for {' and '.join(reasons)} (an estimate); the machine has {gb(machine)}"
            )


def _device_kind(recipe: Recipe) -> str:
    if recipe.model.device != "auto":
        return recipe.model.device.partition(":")[0]
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
