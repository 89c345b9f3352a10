"""Disk and memory a run will want, by arithmetic, for `compress --dry-run` and the check before a run. Estimates: marked so wherever
they are shown."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trimlingual.models.folders import EXTRACTOR_FILES
from trimlingual.recipe import (
    EXPORT_STAGES,
    FLASH_ADAMW,
    LAYER_PART,
    GgufSettings,
    QuantizeSettings,
    Recipe,
    TrainSettings,
)
from trimlingual.run.fingerprint import read_object

# A float16 scale for each block of 32 weights. llama-quantize packs about three quarters of the weights of a q4_k_m file in 144 bytes
# for 256, and the others in 210.
GGUF_BYTES = {"f16": 2, "q8_0": 34 / 32, "q4_0": 18 / 32, "q4_k_m": (3 * 144 + 210) / 4 / 256}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# nf4 with double quantisation: 4 bits a weight, plus an 8-bit scale a block of 64, plus a float32 scale a block of 256 scales
# (Dettmers et al. 2023, section 3). Without double quantisation the scale is a float32.
NF4_BYTES = {True: 0.5 + 1 / 64 + 4 / (64 * 256), False: 0.5 + 4 / 64}
SCALE_BYTES = 2  # of int4's groups and of 8-bit rows
ADAM_STATES = 2
CHECKPOINTS = 2  # so that one is whole while the other is written
# What FSDP's main process takes in host memory beyond the weights: 5.0 GB at 8.4 and at 2.1 billion parameters (fsdp_memory_7b.json).
FSDP_MAIN_BYTES = 5e9


@dataclass(frozen=True)
class Estimate:
    """Bytes that a stage wants. Memory counts weights, gradients and optimiser states, not activations."""

    disk: float = 0  # what stays
    memory: float = 0  # 0: not estimated
    # On disk beside it until it ends: two checkpoints, what a frozen tower makes of the clips, models on the way to the last one.
    while_running: float = 0
    host: float = 0  # in the memory of the machine, once per process: what a frozen tower makes of the clips
    host_main: float = 0  # there too, in the main process alone: the model that FSDP divides
    divided: bool = False  # memory is that of all GPUs together

    @property
    def disk_text(self) -> str:
        """`~16.79 GB + ~102.84 GB while it runs`."""
        extra = [f"{gb(self.while_running)} while it runs"] * bool(self.while_running)
        return " + ".join([gb(self.disk)] * bool(self.disk) + extra)

    @property
    def memory_text(self) -> str:
        """`~134.35 GB over all GPUs + ~2.05 GB of host memory + ~38.59 GB of host memory in the main process`."""
        device = gb(self.memory) + " over all GPUs" * self.divided
        host = [f"{gb(self.host)} of host memory"] * bool(self.host)
        main = [f"{gb(self.host_main)} of host memory in the main process"] * bool(self.host_main)
        return " + ".join([device] * bool(self.memory) + host + main)


def disk_peak(estimates: Mapping[str, Estimate], stages: Sequence[str]) -> float:
    """The most that the run folder grows by while `stages` are made in this order."""
    peak = standing = 0.0
    for one in (estimates.get(stage, Estimate()) for stage in stages):
        peak = max(peak, standing + one.disk + one.while_running)
        standing += one.disk
    return peak


def estimate(recipe: Recipe, speech_s: Mapping[str, float] | None = None) -> dict[str, Estimate]:
    """What each stage wants, by its name; stages that want little are left out. Needs the base model's configuration.

    `speech_s` is the seconds that are encoded (`encoded_s`) of the splits `train` and `out_of_domain`, where they are known: a frozen
    audio tower encodes them once, and the states stand on disk and in memory until the training ends.
    """
    model = _on_meta(recipe)
    sizes = part_sizes(model)
    trimmed = _trimmed(sizes, recipe)
    if recipe.vocab and recipe.vocab.when == "before":
        sizes = trimmed
    full = sum(sizes.values())
    layers = sizes["decoder"] + sizes["decoder_other"]
    budget = recipe.rank.budget if recipe.rank else None  # how many layers go is not known then: as if none
    removed = recipe.rank.num_layers_to_remove if recipe.rank and recipe.rank.towers == "decoder" and not budget else 0
    gone = min(1.0, removed / num_decoder_layers(recipe))  # that more cannot go is said elsewhere
    pruned = full - round(layers * gone)
    weight_bytes, stored_bytes = BYTES[recipe.model.dtype], BYTES[recipe.model.storage_dtype]
    at_start = gone if recipe.quantize and recipe.quantize.start not in ("base", "teacher") else 0
    adapters = _adapters(recipe, model, {"recovered": gone, "quantized": at_start})
    rows = {
        "distilled": Estimate(memory=full * weight_bytes),
        "pruned": Estimate(pruned * stored_bytes, 2 * pruned * weight_bytes),
    }
    if recipe.vocab:
        rows["trimmed"] = Estimate(sum(trimmed.values()) * stored_bytes)
    if recipe.rank:
        each_round = recipe.rank.finetune_each_round
        adapter = adapters.get("rank", 0)
        trained = _training(sizes, 0, weight_bytes, stored_bytes, each_round, adapter) if each_round else Estimate()
        # A round's model stands beside that of the round before, and the last one stays.
        beside = trained.disk + trained.while_running
        rows["rank"] = Estimate(trained.disk, max(full * weight_bytes, trained.memory), beside)
    if recipe.finetune:
        rows["teacher"] = _training(sizes, 0, weight_bytes, stored_bytes, recipe.finetune, adapters["teacher"])
    if recipe.recover:
        rows["recovered"] = _training(sizes, gone, weight_bytes, stored_bytes, recipe.recover, adapters["recovered"])
    shipped: float = pruned * stored_bytes
    left: float = (pruned - full + sum(trimmed.values())) * stored_bytes
    if recipe.quantize:
        adapter = adapters.get("quantized", 0)
        rows["quantized"] = _quantization(recipe, sizes, at_start, weight_bytes, stored_bytes, adapter)
        if budget:
            rows["quantized"] = replace(rows["quantized"], disk=min(rows["quantized"].disk, budget.num_bytes))
        shipped, left = rows["quantized"].disk, _quantized_bytes(trimmed, recipe.quantize, stored_bytes, at_start)
    if recipe.vocab and recipe.vocab.when == "after":
        rows["trimmed"], shipped = Estimate(left), left
    rows |= dict.fromkeys(EXPORT_STAGES.values(), Estimate(shipped))
    if recipe.export:
        kept = pruned - full + sum(trimmed.values())
        rows[EXPORT_STAGES["gguf"]] = _gguf(trimmed, kept, recipe.export.gguf)
    for stage in {*adapters} & {"teacher", "recovered", "quantized"}:  # which keep it beside the model
        rows[stage] = replace(rows[stage], disk=rows[stage].disk + adapters[stage])
    for stage, splits in frozen_towers(recipe, model).items():
        states = state_bytes(recipe, sum((speech_s or {}).get(split, 0.0) for split in splits))
        rows[stage] = replace(rows[stage], while_running=rows[stage].while_running + states, host=states)
    return rows


def _gguf(sizes: dict[str, int], kept: int, settings: GgufSettings) -> Estimate:
    """A file of all but tower and projector for each type, and these in f16; of `kept` weights in all.

    q4_k_m is made of an f16 file, which stays only where it is asked for.
    """
    audio, tables = sizes["audio_tower"] + sizes["projector"], sizes["embeddings"] + sizes["lm_head"]
    decoder = kept - audio - tables
    texts = {
        kind: decoder * each + tables * GGUF_BYTES["q8_0" if kind == "q4_0" else kind]
        for kind, each in GGUF_BYTES.items()
    }
    heard = 0 if settings.text_only else audio * GGUF_BYTES["f16"]
    half = texts["f16"] * ("q4_k_m" in settings.types and "f16" not in settings.types)
    return Estimate(sum(texts[kind] for kind in settings.types) + heard, while_running=half)


def encoded_s(recipe: Recipe) -> Callable[[float], float]:
    """Seconds that the audio tower encodes of a clip of so many seconds, which may be filled up to whole windows."""
    from trimlingual.models.family import family_named

    config = config_of(recipe)
    family, fills_up = family_named(config.model_type), _hears_padding(recipe)
    return lambda duration_s: family.encoded_s(config, duration_s, fills_up)


def _hears_padding(recipe: Recipe) -> bool:
    """Whether clips are filled up with silence that is heard: the recipe says so, or else the base model's folder, if it is here."""
    from trimlingual.models.loading import is_on_hub, resolve_base

    if recipe.model.audio_padding or is_on_hub(recipe.model.base):
        return recipe.model.audio_padding == "window"
    folder = resolve_base(recipe.model.base)
    saved = [read_object(folder / name) for name in EXTRACTOR_FILES]
    return any(each.get("feature_extractor", each).get("audio_padding") == "window" for each in saved)


def state_bytes(recipe: Recipe, speech_s: float) -> float:
    """Bytes of the audio tower's states of so many encoded seconds."""
    from trimlingual.models.family import family_named

    config = config_of(recipe)
    family = family_named(config.model_type)
    return family.states_per_s * speech_s * family.state_width(config) * BYTES[recipe.model.dtype]


def frozen_towers(recipe: Recipe, model: Any = None) -> dict[str, list[str]]:
    """The stages that train with a frozen audio tower, and the splits whose clips they train on."""
    tower = _tower_modules(model or _on_meta(recipe))
    return {
        stage: train.data.splits
        for stage, (_, train) in training_sections(recipe).items()
        if not _is_trained(tower, train)
    }


def training_sections(recipe: Recipe) -> dict[str, tuple[str, TrainSettings]]:
    """The stages that train, with the place of their settings in the recipe and these."""
    each_round = recipe.rank.finetune_each_round if recipe.rank else None
    quantized = recipe.quantize.train if recipe.quantize else None
    sections = {
        "teacher": ("finetune", recipe.finetune), "recovered": ("recover", recipe.recover),
        "rank": ("rank.finetune_each_round", each_round), "quantized": ("quantize.train", quantized),
    }  # fmt: skip
    return {stage: (path, train) for stage, (path, train) in sections.items() if train}


def _tower_modules(model: Any) -> dict[str, Any]:
    from trimlingual.models.tree import part_of

    return {name: module for name, module in model.named_modules() if part_of(name) == "audio_tower"}


def _is_trained(modules: Mapping[str, Any], train: TrainSettings) -> bool:
    """Whether any of these modules of the audio tower is trained."""
    if train.method == "lora":
        return any(_is_adapted(name, module, train) for name, module in modules.items())
    return "audio_tower" not in train.freeze


def _training(
    sizes: dict[str, int], gone: float, weight_bytes: int, stored_bytes: int, train: TrainSettings, adapter: float
) -> Estimate:
    """A training section's stage, of a model that `gone` of the decoder's layers have left; without the bytes of the `adapter`."""
    num = sum(sizes.values()) - round((sizes["decoder"] + sizes["decoder_other"]) * gone)
    table = sizes["embeddings"]
    if train.fsdp and train.mixed_precision != "no":
        weight_bytes = BYTES["float32"]  # mixed precision computes in fewer bits, the weights stay whole
    checkpoint = _checkpoint_bytes(num, table, weight_bytes, train)
    if train.method == "lora":
        checkpoint = adapter * (1 + ADAM_STATES)
    memory = _training_bytes(num, table, weight_bytes, train)
    main = num * weight_bytes + FSDP_MAIN_BYTES if train.fsdp else 0
    return Estimate(num * stored_bytes, memory, CHECKPOINTS * checkpoint, host_main=main, divided=train.fsdp)


def _quantization(
    recipe: Recipe, sizes: dict[str, int], gone: float, weight_bytes: int, stored_bytes: int, adapter: float
) -> Estimate:
    """As `_training`."""
    settings = recipe.quantize
    assert settings is not None
    trained = settings.model_copy(
        update={"scheme": "nf4", "eight_bit": [], "bits": {}}
    )  # what the adapter is trained on
    memory = weight_bytes * (sum(sizes.values()) - (sizes["decoder"] + sizes["decoder_other"]) * gone)
    if settings.train and settings.train.method == "full":
        full = _training(sizes, gone, weight_bytes, stored_bytes, settings.train, adapter)
        return replace(full, disk=_quantized_bytes(sizes, settings, stored_bytes, gone) + _more_bits(recipe, gone))
    if settings.train:
        memory = _quantized_bytes(sizes, trained, weight_bytes, gone) + adapter * (2 + ADAM_STATES)
    beside = CHECKPOINTS * adapter * (1 + ADAM_STATES)
    if settings.scheme != "int4":  # the merged model is written to be read in 4 bits
        beside += stored_bytes * (sum(sizes.values()) - (sizes["decoder"] + sizes["decoder_other"]) * gone)
    if settings.start == "base" and recipe.model.base.startswith("random:"):  # so are weights that are drawn
        beside += BYTES["bfloat16"] * sum(sizes.values())
    return Estimate(_quantized_bytes(sizes, settings, stored_bytes, gone) + _more_bits(recipe, gone), memory, beside)


def _on_meta(recipe: Recipe) -> Any:
    """The base model without weights, from its configuration alone."""
    from trimlingual.models.family import meta_model

    return meta_model(config_of(recipe))


def part_sizes(model: Any) -> dict[str, int]:
    """Parameters of the base model.

    Weights of the linear layers by part (`decoder`, `audio_tower`, `projector`, `lm_head`), which can be 4-bit; `embeddings`;
    `decoder_other`: biases and norms of the decoder's layers; `other`: the rest.
    """
    from torch import nn

    from trimlingual.models.tree import PARTS, layer_list, part_of, text_decoder

    sizes = dict.fromkeys(PARTS, 0)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            sizes[part_of(name) or "decoder"] += module.weight.numel()
    layers = sum(p.numel() for p in layer_list(model, "decoder").parameters())
    sizes |= {"decoder_other": layers - sizes["decoder"], "embeddings": text_decoder(model).embed_tokens.weight.numel()}
    return sizes | {"other": sum(p.numel() for p in model.parameters()) - sum(sizes.values())}


def num_decoder_layers(recipe: Recipe) -> int:
    """Layers of the base model's decoder."""
    return config_of(recipe).text_config.num_hidden_layers


def config_of(recipe: Recipe) -> Any:
    """The base model's configuration; of one on the Hub only that file is fetched."""
    from transformers import AutoConfig

    from trimlingual.models.loading import is_on_hub, resolve_base

    base = recipe.model.base
    if is_on_hub(base):
        try:
            return AutoConfig.from_pretrained(base, revision=recipe.model.revision, local_files_only=True)
        except OSError:
            return AutoConfig.from_pretrained(base, revision=recipe.model.revision)
    return AutoConfig.from_pretrained(resolve_base(base))


def _checkpoint_bytes(num: int, table: int, weight_bytes: int, train: TrainSettings) -> float:
    """Weights and two Adam states; FlashOptim stores the byte more of each weight as two."""
    if train.optimizer == FLASH_ADAMW:
        return num * (weight_bytes + 2 + ADAM_STATES * (1 + 2 / 32))
    return _training_bytes(num, table, weight_bytes, train) - num * weight_bytes  # no gradients


def _training_bytes(num: int, table: int, weight_bytes: int, train: TrainSettings) -> float:
    """Weights, and for what is trained a gradient and two Adam states, in the weights' dtype or a byte each.

    With bitsandbytes' 8-bit states transformers keeps those of the token embedding, `table` weights, in float32. FlashOptim has a
    scale of 2 bytes for 32 values of each state, and a byte more of each weight.
    """
    if train.method == "lora":
        return num * weight_bytes * 1.1
    if train.optimizer == FLASH_ADAMW:
        return num * (2 * weight_bytes + 1 + ADAM_STATES * (1 + 2 / 32))
    state = 1 if "8bit" in train.optimizer else weight_bytes
    float32_bytes = BYTES["float32"] - state if "8bit" in train.optimizer else 0
    return num * (2 * weight_bytes + ADAM_STATES * state) + table * ADAM_STATES * float32_bytes


def _trimmed(sizes: dict[str, int], recipe: Recipe) -> dict[str, int]:
    """Sizes with the vocabulary's rows that the recipe leaves; as they are where only counting will tell how many."""
    if not recipe.vocab or recipe.vocab.max_tokens is None:
        return sizes
    share = min(1.0, recipe.vocab.max_tokens / config_of(recipe).text_config.vocab_size)
    return sizes | {part: round(sizes[part] * share) for part in ("embeddings", "lm_head")}


def _quantized_bytes(sizes: dict[str, int], settings: QuantizeSettings, stored_bytes: int, gone: float) -> float:
    """Bytes of the weights; `gone` is the share of decoder layers that were removed."""
    left = {part: 1 - gone if part.startswith("decoder") else 1 for part in sizes}
    return sum(number * left[part] * _bytes_each(settings, part, stored_bytes) for part, number in sizes.items())


def _bytes_each(settings: QuantizeSettings, part: str, stored_bytes: int) -> float:
    """Bytes of a weight of a part as `part_sizes` names them."""
    num_bits = settings.bits_of(part)
    if num_bits is None:
        return stored_bytes
    if settings.scheme != "int4":
        return NF4_BYTES[settings.double_quantization]
    return 1.0 if num_bits == 8 else num_bits / 8 + SCALE_BYTES / settings.group_size


def _more_bits(recipe: Recipe, gone: float) -> float:
    """Bytes that the decoder's layers take more with `quantize.bits` than in 4 bits."""
    from trimlingual.models.tree import fine_part_of

    settings = recipe.quantize
    if settings is None or not settings.bits:
        return 0.0
    more = {part: settings.bits[part] - 4 for part in settings.bits if LAYER_PART.fullmatch(part)}
    matrices = [(name, each) for name, each in _on_meta(recipe).named_parameters() if each.ndim == 2]
    return sum(each.numel() * more.get(fine_part_of(name) or "", 0) / 8 for name, each in matrices) * (1 - gone)


def _adapters(recipe: Recipe, model: Any, gone: Mapping[str, float]) -> dict[str, float]:
    """Bytes of the LoRA adapter of each stage that trains, 0 of one that trains all weights; `gone` is as in `_training`.

    Its weights are float32: two matrices of rank r for each module that it adapts.
    """
    from trimlingual.models.tree import part_of

    found = {}
    for stage, (_, train) in training_sections(recipe).items():
        num = 0.0
        for name, module in model.named_modules() if train.method == "lora" else ():
            if _is_adapted(name, module, train):
                left = 1 - gone.get(stage, 0) if part_of(name) == "decoder" else 1
                num += train.lora.r * sum(module.weight.shape) * left
        found[stage] = num * BYTES["float32"]
    return found


def _is_adapted(name: str, module: Any, train: TrainSettings) -> bool:
    """Whether LoRA adapts a module of this name, as PEFT decides it."""
    from torch import nn

    from trimlingual.models.tree import fine_part_of, part_of

    if not isinstance(module, (nn.Linear, nn.Embedding)) or {part_of(name), fine_part_of(name)} & {*train.freeze}:
        return False
    targets = train.lora.target_modules
    if targets == "all-linear":
        return isinstance(module, nn.Linear) and part_of(name) != "lm_head"
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(f".{name}".endswith(f".{ending}") for ending in targets)


def gb(num_bytes: Any) -> str:
    """Decimal megabytes or gigabytes, as text."""
    return f"~{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"~{num_bytes / 1e6:.1f} MB"
