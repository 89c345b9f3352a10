"""The tree of modules that transformers 5 gives every family here: where the parts and the layers of a model are.

In memory a model holds `model.audio_tower`, `model.multi_modal_projector`, `model.language_model` and `lm_head`; on disk the published
names remain and `save_pretrained` maps between them. A family with another tree would bring one of its own.

Shapes: B batch, T tokens, D decoder width, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trimlingual.recipe import Tower

# Names of the parts as modules in memory; used by quantisation, freezing and reports.
PARTS = {
    "audio_tower": "model.audio_tower",
    "projector": "model.multi_modal_projector",
    "decoder": "model.language_model",
    "lm_head": "lm_head",
}
# The same for compressed-tensors' configurations, as patterns that fit the published names as well, which vLLM uses.
PATTERNS = {
    "audio_tower": r"re:.*audio_tower.*",
    "projector": r"re:.*multi_modal_projector.*",
    "decoder": r"re:.*language_model.*layers.*",
    "lm_head": r"re:.*lm_head$",
    "embeddings": r"re:.*embed_tokens$",
}
EMBEDDINGS = PARTS["decoder"] + ".embed_tokens"
BLOCKS = {"attention": "self_attn", "mlp": "mlp"}  # of a decoder layer, as modules
IN_A_BLOCK = re.compile(re.escape(PARTS["decoder"]) + rf"\.layers\.(\d+)\.({'|'.join(BLOCKS.values())})\.")
# How the names of the stored tensors with one row a token end: the embedding, the output head (absent when tied).
ROWS_BY_TOKEN = ("embed_tokens.weight", "lm_head.weight")


def text_decoder(model: Any) -> Any:
    """The decoder without its head: embeddings (B, T, D) in, hidden states (B, T, D) out."""
    return unwrap(model).model.language_model


def audio_tower(model: Any) -> Any:
    """The audio encoder."""
    return unwrap(model).model.audio_tower


def projector(model: Any) -> nn.Module:
    """What brings audio states to the decoder's width."""
    return unwrap(model).model.multi_modal_projector


def lm_head(model: Any) -> nn.Module:
    """The output projection, D -> V."""
    return unwrap(model).lm_head


def layer_list(model: Any, tower: Tower) -> nn.ModuleList:
    """The layers of the decoder or of the audio encoder."""
    inner = unwrap(model).model
    return inner.language_model.layers if tower == "decoder" else inner.audio_tower.layers


def set_layer_list(model: Any, tower: Tower, layers: nn.ModuleList) -> None:
    """Put `layers` in place and make the config and the cache indices agree with them."""
    inner = unwrap(model).model
    config = unwrap(model).config
    if tower == "encoder":
        inner.audio_tower.layers = layers
        for audio_config in {id(c): c for c in (config.audio_config, inner.audio_tower.config)}.values():
            audio_config.encoder_layers = len(layers)
        return
    decoder = inner.language_model
    decoder.layers = layers
    kinds = [getattr(layer, "attention_type", "full_attention") for layer in layers]
    for text_config in {id(c): c for c in (config.text_config, decoder.config)}.values():
        text_config.num_hidden_layers = len(layers)
        if getattr(text_config, "layer_types", None) is not None:
            text_config.layer_types = kinds
    layer: Any
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index


def unwrap(model: Any) -> Any:
    """The transformers model inside a PEFT (or DDP) wrapper."""
    while hasattr(model, "module") or hasattr(model, "get_base_model"):
        model = model.module if hasattr(model, "module") else model.get_base_model()
    return model


def attention_for_unlike_lengths() -> AbstractContextManager[None]:
    """PyTorch's attention without cuDNN's kernels, for which PyTorch builds a plan at every new shape."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def embed(model: Any, input_ids: Tensor) -> Tensor:
    """Token embeddings (..., D)."""
    return text_decoder(model).embed_tokens(input_ids)


def audio_token_id(config: Any) -> Any:
    """Id of the placeholder that stands for one audio state, from a configuration; None where it says none."""
    return config.audio_token_id


def freeze_(model: Any, parts: Sequence[str]) -> None:
    """Stop the named parts from training: audio_tower, projector, embeddings, lm_head."""
    modules = {
        "audio_tower": audio_tower(model),
        "projector": projector(model),
        "embeddings": text_decoder(model).embed_tokens,
        "lm_head": lm_head(model),
    }
    for part in parts:
        modules[part].requires_grad_(False)


def part_of(module_name: str) -> str | None:
    """The part (audio_tower, projector, decoder, lm_head) a module name in memory belongs to."""
    for part, prefix in PARTS.items():
        if module_name == prefix or module_name.startswith(prefix + "."):
            return part
    return None


def fine_part_of(module_name: str) -> str | None:
    """As `part_of`, but parts of the decoder as `quantize.bits` names them: decoder.N.attention, decoder.N.mlp, embeddings."""
    if module_name == EMBEDDINGS:
        return "embeddings"
    if found := IN_A_BLOCK.match(module_name):
        block = next(block for block, name in BLOCKS.items() if name == found[2])
        return f"decoder.{found[1]}.{block}"
    return part_of(module_name)


def pattern_of(fine_part: str) -> str:
    """A pattern as in PATTERNS for the modules of `fine_part_of`."""
    if fine_part in PATTERNS:
        return PATTERNS[fine_part]
    _, layer, block = fine_part.split(".")
    return rf"re:.*language_model.*layers\.{layer}\.{BLOCKS[block]}\..*"
