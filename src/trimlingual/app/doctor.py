"""What this machine can do: its parts and versions, what computes on 4 bits, which recipes fit and how, and what is worth installing.

Nothing is loaded or downloaded. Recipes are judged by `estimate.py` and `resources.py`, as before a run, at the shapes of the published
models; their memory is before activations.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from trimlingual.estimate import Estimate, config_of, disk_peak, estimate, gb
from trimlingual.exports.llama_cpp import server_program
from trimlingual.models.family import family_named
from trimlingual.models.folders import FAMILIES
from trimlingual.models.loading import is_on_hub, pick_device
from trimlingual.models.packed_layers import linear_of, no_slower_packed
from trimlingual.recipe import EXPORT_STAGES, Recipe, list_recipes, load_recipe
from trimlingual.resources import device_problems, disk_problems, memory_notes, quantization_problems, training_problems
from trimlingual.run.artifacts import machine
from trimlingual.run.extras import EXTRAS, FOR_GPUS, GIVES, install_line, missing

PROBE = 256  # N and K of the layer that is packed to see what computes on it
LESS_MEMORY = {
    "method": "lora",
    "optimizer": "adamw_torch_fused",
    "checkpoint_from_tokens": 0,
}  # docs/recipes.md, "What to set"


def examine(folder: Path = Path("runs")) -> dict[str, Any]:
    """All facts, ready for JSON; `folder` is where runs would be written."""
    device = pick_device("auto")
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    memory = psutil.virtual_memory()
    return {
        **machine(),
        "memory": {"bytes": memory.total, "free_bytes": memory.available},
        "gpus": [_gpu(number) for number in range(torch.cuda.device_count())],
        "disk": {"folder": str(place), "free_bytes": shutil.disk_usage(place).free},
        "four_bits": {"nf4": _nf4(device), "packed int4": _packed(device)},
        "programs": {"ffmpeg": shutil.which("ffmpeg"), "llama-server": server_program(None)},
        "recipes": [_judged(name, folder) for name in list_recipes()],
        "extras": {extra: not missing(extra) for extra in EXTRAS},
        "install": list(_worth_installing(device)),
    }


def _gpu(number: int) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(number)
    free, total = torch.cuda.mem_get_info(number)
    capability = f"{found.major}.{found.minor}"
    return {"name": found.name, "bytes": total, "free_bytes": free, "compute_capability": capability}


def _nf4(device: torch.device) -> str:
    """Whether bitsandbytes packs and unpacks on the device, tried."""
    try:
        from bitsandbytes import functional

        weights = torch.linspace(-1, 1, PROBE * PROBE, device=device).view(PROBE, PROBE)
        error = (functional.dequantize_4bit(*functional.quantize_4bit(weights, quant_type="nf4")) - weights).abs().max()
    except Exception as problem:  # of the library itself, which may not load on this machine
        return f"no: {(str(problem).splitlines() or [type(problem).__name__])[0]}"
    return "bitsandbytes" if float(error) < 0.2 else f"no: bitsandbytes is off by {float(error):.2g}"


def _packed(device: torch.device) -> str:
    """What computes on packed 4-bit weights, in bfloat16."""
    if not no_slower_packed(device, torch.bfloat16):
        return "unpacked when a model is loaded: this CPU has neither AVX2 nor AVX-512"
    words = torch.zeros((PROBE, PROBE // 8), dtype=torch.int32, device=device)
    layer = linear_of(words, torch.ones((PROBE, PROBE // 128), dtype=torch.bfloat16, device=device), None, 4)
    return str(layer.kernel)


def _worth_installing(device: torch.device) -> Iterator[dict[str, str]]:
    for extra, gives in GIVES.items():
        if missing(extra) and (device.type == "cuda" or extra not in FOR_GPUS):
            yield {"for": gives, "command": install_line(extra)}
    if not shutil.which("ffmpeg"):
        yield {"for": "videos and M4A as recordings", "command": "ffmpeg, by the system's packages"}


def _judged(name: str, folder: Path) -> dict[str, Any]:
    """Whether a shipped recipe fits this machine, and with which settings."""
    shape = _shape_of(load_recipe(name).model.base)
    base = [f"model.base=random:{shape}"] if shape else []
    result: dict[str, Any] = {"recipe": name, "fits": False}
    try:
        for settings in ([], _with_less_memory(load_recipe(name))):
            recipe = load_recipe(name, [*base, *settings])
            wanted = _wanted(recipe)
            names = list(wanted)
            notes = list(memory_notes(recipe, names, wanted))
            prune_on_cpu = bool(notes) and _prunes_on_cpu(recipe, notes, wanted)
            problems = [*_problems(recipe, names, folder, wanted), *(() if prune_on_cpu else notes)]
            most = max((one.memory for one in wanted.values()), default=0.0)
            result |= {"fits": not problems, "set": settings, "prune_on_cpu": prune_on_cpu, "problems": problems}
            result |= {"memory_bytes": round(most), "disk_bytes": round(disk_peak(wanted, names))}
            if not problems:
                return result
    except (OSError, ValueError) as error:
        result["problems"] = [str(error)]
    return result


def _prunes_on_cpu(recipe: Recipe, notes: Sequence[str], wanted: dict[str, Estimate]) -> bool:
    """Whether pruning alone is too much for the GPU, and not for the machine."""
    on_cpu = recipe.model_copy(update={"model": recipe.model.model_copy(update={"device": "cpu"})})
    elsewhere = pick_device(recipe.model.device).type != "cpu" and not list(memory_notes(on_cpu, ["pruned"], wanted))
    return elsewhere and all(note.startswith("stage pruned ") for note in notes)


def _shape_of(base: str) -> str | None:
    """The shape of a published model, which its name on the Hub contains: `Owner/Some-Model-7B-Instruct` is `some-model-7b`."""
    if not is_on_hub(base):
        return None
    shapes = [shape for family in map(family_named, FAMILIES) for shape in family.shapes if shape in base.lower()]
    return max(shapes, key=len, default=None)


def _with_less_memory(recipe: Recipe) -> list[str]:
    there = {"finetune": recipe.finetune, "recover": recipe.recover}
    there["quantize.train"] = recipe.quantize.train if recipe.quantize else None
    asked = [(path, train, *setting) for path, train in there.items() if train for setting in LESS_MEMORY.items()]
    return [f"{path}.{key}={value}" for path, train, key, value in asked if getattr(train, key) != value]


def _wanted(recipe: Recipe) -> dict[str, Estimate]:
    """Estimates of the stages that the recipe has, in their order."""
    exports = [EXPORT_STAGES[runtime] for runtime in recipe.export.runtimes] if recipe.export else []
    asked = {
        "teacher": recipe.finetune, "rank": recipe.rank, "pruned": recipe.rank, "distilled": recipe.distill,
        "recovered": recipe.recover, "quantized": recipe.quantize, "trimmed": recipe.vocab, **dict.fromkeys(exports, True),
    }  # fmt: skip
    estimates = estimate(recipe)
    return {stage: estimates[stage] for stage, there in asked.items() if there and stage in estimates}


def _problems(recipe: Recipe, names: Sequence[str], folder: Path, wanted: dict[str, Estimate]) -> Iterator[str]:
    yield from device_problems(recipe)
    yield from training_problems(recipe, names, config_of(recipe))
    yield from quantization_problems(recipe, names, config_of(recipe))
    yield from disk_problems(folder, names, wanted)


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """The facts for people, a line each."""
    yield f"system      {facts['system']}, {facts['cpu']}, {facts['cores']} cores, {_free(facts['memory'])} of memory"
    for gpu in facts["gpus"] or [None]:
        yield (
            f"GPU         {gpu['name']}, {_free(gpu)}, compute {gpu['compute_capability']}"
            if gpu
            else "GPU         none; recipes are judged by room, not by the time that they take on a CPU"
        )
    yield f"disk        {gb(facts['disk']['free_bytes'])[1:]} free at {facts['disk']['folder']}"
    yield "versions    " + ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    yield "4 bits      " + "; ".join(f"{name}: {what}" for name, what in facts["four_bits"].items())
    yield "programs    " + ", ".join(f"{name}: {path or 'not found'}" for name, path in facts["programs"].items())
    for judged in facts["recipes"]:
        yield f"recipe      {judged['recipe']}: {_verdict(judged)}"
        yield from (f"              {problem}" for problem in judged["problems"])
    for each in facts["install"]:
        yield f"to install  {each['command']}: {each['for']}"


def _verdict(judged: dict[str, Any]) -> str:
    if "set" not in judged:
        return "cannot be judged"
    how = f"with --set {' --set '.join(judged['set'])}" if judged["set"] else "as it is"
    apart = ", `trimlingual prune` with --set model.device=cpu" * judged["prune_on_cpu"]
    wants = f" ({gb(judged['memory_bytes'])} of memory, {gb(judged['disk_bytes'])} of disk)"
    return (f"fits {how}{apart}" if judged["fits"] else f"does not fit, tried {how}") + wants


def _free(memory: dict[str, int]) -> str:
    return f"{gb(memory['bytes'])[1:]} ({gb(memory['free_bytes'])[1:]} free)"
