"""Disk and memory a run will want, by arithmetic, for `compress --dry-run`. Estimates: marked so wherever they are shown."""

from __future__ import annotations

from typing import Any

from trimlingual.recipe import QuantizeSettings, Recipe, TrainSettings

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# nf4 with double quantisation: 4 bits a weight, plus an 8-bit scale a block of 64, plus a float32 scale a block of 256 scales
# (Dettmers et al. 2023, section 3). Without double quantisation the scale is a float32.
NF4_BYTES = {True: 0.5 + 1 / 64 + 4 / (64 * 256), False: 0.5 + 4 / 64}
ADAM_STATES = 2


def estimate(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """(disk, memory) as text by stage name. Memory counts weights, gradients and optimiser states, not activations."""
    sizes = part_sizes(recipe)
    full = sum(sizes.values())
    layers = sizes["decoder_layers"]
    count = _num_decoder_layers(recipe)
    removed = recipe.rank.num_layers_to_remove if recipe.rank and recipe.rank.towers == "decoder" else 0
    pruned = full - layers * removed // count
    held, stored = BYTES[recipe.model.dtype], BYTES[recipe.model.storage_dtype]
    rows = {"data": ("", ""), "rank": ("", gb(full * held)), "distilled": ("", gb(full * held))}
    if recipe.finetune:
        rows["teacher"] = (gb(full * stored), gb(_training_bytes(full, held, recipe.finetune)))
    rows["pruned"] = (gb(pruned * stored), gb(2 * pruned * held))
    if recipe.recover:
        rows["recovered"] = (gb(pruned * stored), gb(_training_bytes(pruned, held, recipe.recover)))
    if recipe.quantize:
        size = full if recipe.quantize.start in ("base", "teacher") else pruned
        gone = 0 if size == full else removed
        disk = _quantized_bytes(sizes, recipe.quantize, stored, gone / count)
        rows["quantized"] = rows["exported"] = (
            gb(disk),
            gb(disk + _adapter_bytes(sizes, recipe.quantize, gone / count)),
        )
    else:
        rows["exported"] = (gb(pruned * stored), "")
    return rows


def part_sizes(recipe: Recipe) -> dict[str, int]:
    """Parameters of the base model by part, from its configuration alone (on the meta device)."""
    import torch
    from transformers import Qwen2AudioForConditionalGeneration

    from trimlingual.models import layer_list

    with torch.device("meta"):
        model = Qwen2AudioForConditionalGeneration(_config(recipe))
    layers = sum(p.numel() for p in layer_list(model, "decoder").parameters())
    tower = sum(p.numel() for p in model.model.audio_tower.parameters())
    total = sum(p.numel() for p in model.parameters())
    return {"decoder_layers": layers, "audio_tower": tower, "rest": total - layers - tower}


def _num_decoder_layers(recipe: Recipe) -> int:
    return _config(recipe).text_config.num_hidden_layers


def _config(recipe: Recipe) -> Any:
    """The base model's configuration; of one on the Hub only that file is fetched."""
    from transformers import AutoConfig

    from trimlingual.models import is_on_hub, resolve_base

    base = recipe.model.base
    if is_on_hub(base):
        return AutoConfig.from_pretrained(base, revision=recipe.model.revision)
    return AutoConfig.from_pretrained(resolve_base(base))


def _training_bytes(num: int, held: int, train: TrainSettings) -> float:
    """Weights, and for what is trained a gradient and two Adam states, in the weights' dtype or a byte each."""
    if train.method == "lora":
        return num * held * 1.1
    return num * (2 * held + ADAM_STATES * (1 if "8bit" in train.optimizer else held))


def _quantized_bytes(sizes: dict[str, int], settings: QuantizeSettings, stored: int, gone: float) -> float:
    bits = NF4_BYTES[settings.double_quantization]
    tower = bits if "audio_tower" in settings.parts else stored
    decoder = bits if "decoder" in settings.parts else stored
    return sizes["decoder_layers"] * (1 - gone) * decoder + sizes["audio_tower"] * tower + sizes["rest"] * stored


def _adapter_bytes(sizes: dict[str, int], settings: QuantizeSettings, gone: float) -> float:
    """Adapter in float32 with gradient and two Adam states; about 2.5 % of the weights at r = 64 (the paper: 2.41 %)."""
    adapted = 0.025 * settings.train.lora.r / 64 * (sizes["decoder_layers"] * (1 - gone) + sizes["audio_tower"])
    return adapted * 4 * (2 + ADAM_STATES)


def gb(num_bytes: Any) -> str:
    """Decimal megabytes or gigabytes, as text."""
    return f"~{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"~{num_bytes / 1e6:.1f} MB"
