"""Disk and memory a run will want, by arithmetic, for `compress --dry-run`. Estimates: marked so wherever they are shown."""

from __future__ import annotations

from typing import Any

from trimlingual.recipe import FLASH_ADAMW, QuantizeSettings, Recipe, TrainSettings

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# nf4 with double quantisation: 4 bits a weight, plus an 8-bit scale a block of 64, plus a float32 scale a block of 256 scales
# (Dettmers et al. 2023, section 3). Without double quantisation the scale is a float32.
NF4_BYTES = {True: 0.5 + 1 / 64 + 4 / (64 * 256), False: 0.5 + 4 / 64}
SCALE_BYTES = 2  # of int4's groups and of 8-bit rows
ADAM_STATES = 2


def estimate(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """(disk, memory) as text by stage name. Memory counts weights, gradients and optimiser states, not activations."""
    sizes = part_sizes(recipe)
    trimmed = _trimmed(sizes, recipe)
    if recipe.vocab and recipe.vocab.when == "before":
        sizes = trimmed
    full, table = sum(sizes.values()), sizes["embeddings"]
    layers = sizes["decoder"] + sizes["decoder_other"]
    count = _num_decoder_layers(recipe)
    removed = recipe.rank.num_layers_to_remove if recipe.rank and recipe.rank.towers == "decoder" else 0
    pruned = full - layers * removed // count
    held, stored = BYTES[recipe.model.dtype], BYTES[recipe.model.storage_dtype]
    rows = {
        "trimmed": (gb(sum(trimmed.values()) * stored), ""),
        "rank": ("", gb(full * held)),
        "distilled": ("", gb(full * held)),
    }
    if recipe.finetune:
        rows["teacher"] = (gb(full * stored), _training_memory(full, table, held, recipe.finetune))
    rows["pruned"] = (gb(pruned * stored), gb(2 * pruned * held))
    if recipe.recover:
        rows["recovered"] = (gb(pruned * stored), _training_memory(pruned, table, held, recipe.recover))
    if recipe.quantize:
        size = full if recipe.quantize.start in ("base", "teacher") else pruned
        gone = 0 if size == full else removed
        disk = _quantized_bytes(sizes, recipe.quantize, stored, gone / count)
        trained = recipe.quantize.model_copy(
            update={"scheme": "nf4", "eight_bit": []}
        )  # what the adapter is trained on
        memory = _quantized_bytes(sizes, trained, held, gone / count)
        memory += _adapter_bytes(sizes, recipe.quantize, gone / count)
        rows["quantized"] = rows["exported"] = (gb(disk), gb(memory))
        left = _quantized_bytes(trimmed, recipe.quantize, stored, gone / count)
    else:
        rows["exported"] = (gb(pruned * stored), "")
        left = (pruned - full + sum(trimmed.values())) * stored
    if recipe.vocab and recipe.vocab.when == "after":
        rows["trimmed"] = rows["exported"] = (gb(left), "")
    return rows


def part_sizes(recipe: Recipe) -> dict[str, int]:
    """Parameters of the base model, from its configuration alone (on the meta device).

    Weights of the linear layers by part (`decoder`, `audio_tower`, `projector`, `lm_head`), which can be 4-bit; `embeddings`;
    `decoder_other`: biases and norms of the decoder's layers; `other`: the rest.
    """
    import torch
    from torch import nn
    from transformers import Qwen2AudioForConditionalGeneration

    from trimlingual.models import PARTS, layer_list, part_of, text_decoder

    with torch.device("meta"):
        model = Qwen2AudioForConditionalGeneration(_config(recipe))
    sizes = dict.fromkeys(PARTS, 0)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            sizes[part_of(name) or "decoder"] += module.weight.numel()
    layers = sum(p.numel() for p in layer_list(model, "decoder").parameters())
    sizes |= {"decoder_other": layers - sizes["decoder"], "embeddings": text_decoder(model).embed_tokens.weight.numel()}
    return sizes | {"other": sum(p.numel() for p in model.parameters()) - sum(sizes.values())}


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


def _training_memory(num: int, table: int, held: int, train: TrainSettings) -> str:
    """As text. Under FSDP that of all GPUs together, with float32 weights where mixed precision computes in fewer bits."""
    if not train.fsdp:
        return gb(_training_bytes(num, table, held, train))
    held = held if train.mixed_precision == "no" else BYTES["float32"]
    return gb(_training_bytes(num, table, held, train)) + " over all GPUs"


def _training_bytes(num: int, table: int, held: int, train: TrainSettings) -> float:
    """Weights, and for what is trained a gradient and two Adam states, in the weights' dtype or a byte each.

    With bitsandbytes' 8-bit states transformers keeps those of the token embedding, `table` weights, in float32. FlashOptim has a
    scale of 2 bytes for 32 values of each state, and a byte more of each weight.
    """
    if train.method == "lora":
        return num * held * 1.1
    if train.optimizer == FLASH_ADAMW:
        return num * (2 * held + 1 + ADAM_STATES * (1 + 2 / 32))
    state = 1 if "8bit" in train.optimizer else held
    more = BYTES["float32"] - state if "8bit" in train.optimizer else 0
    return num * (2 * held + ADAM_STATES * state) + table * ADAM_STATES * more


def _trimmed(sizes: dict[str, int], recipe: Recipe) -> dict[str, int]:
    """Sizes with the vocabulary's rows that the recipe leaves; as they are where only counting will tell how many."""
    if not recipe.vocab or recipe.vocab.max_tokens is None:
        return sizes
    share = min(1.0, recipe.vocab.max_tokens / _config(recipe).text_config.vocab_size)
    return sizes | {part: round(sizes[part] * share) for part in ("embeddings", "lm_head")}


def _quantized_bytes(sizes: dict[str, int], settings: QuantizeSettings, stored: int, gone: float) -> float:
    """Bytes of the weights; `gone` is the share of decoder layers that were removed."""
    four = NF4_BYTES[settings.double_quantization]
    if settings.scheme == "int4":
        four = 0.5 + SCALE_BYTES / settings.group_size
    left = {part: 1 - gone if part.startswith("decoder") else 1 for part in sizes}
    each = {part: 1 if part in settings.eight_bit else four if part in settings.parts else stored for part in sizes}
    return sum(number * left[part] * each[part] for part, number in sizes.items())


def _adapter_bytes(sizes: dict[str, int], settings: QuantizeSettings, gone: float) -> float:
    """Adapter in float32 with gradient and two Adam states; about 2.5 % of the weights at r = 64 (the paper: 2.41 %)."""
    adapted = 0.025 * settings.train.lora.r / 64 * (sizes["decoder"] * (1 - gone) + sizes["audio_tower"])
    return adapted * 4 * (2 + ADAM_STATES)


def gb(num_bytes: Any) -> str:
    """Decimal megabytes or gigabytes, as text."""
    return f"~{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"~{num_bytes / 1e6:.1f} MB"
