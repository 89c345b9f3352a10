"""The parts of a Qwen2-Audio model, and its layers run one by one: the only place that knows where the family keeps them.

In memory (transformers 5) Qwen2-Audio holds `model.audio_tower`, `model.multi_modal_projector`, `model.language_model`, `lm_head`;
on disk the published names remain and `save_pretrained` maps between them.

Shapes: B batch, N clips, M mel frames, F audio states of a clip, A tower width, T tokens, D decoder width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.masking_utils import create_bidirectional_mask

from trimlingual.models.kernels import add_norm, gated
from trimlingual.recipe import Tower

# Names of the parts as modules in memory; used by quantisation, freezing and reports.
PARTS = {
    "audio_tower": "model.audio_tower",
    "projector": "model.multi_modal_projector",
    "decoder": "model.language_model",
    "lm_head": "lm_head",
}
# How the names of the stored tensors with one row a token end: the embedding, the output head (absent when tied).
ROWS_BY_TOKEN = ("embed_tokens.weight", "lm_head.weight")


def text_decoder(model: Any) -> Any:
    """The decoder without its head: embeddings (B, T, D) in, hidden states (B, T, D) out."""
    return unwrap(model).model.language_model


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
        text_config.layer_types = kinds
    layer: Any
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index


def unwrap(model: Any) -> Any:
    """The transformers model inside a PEFT (or DDP) wrapper."""
    while hasattr(model, "module") or hasattr(model, "get_base_model"):
        model = model.module if hasattr(model, "module") else model.get_base_model()
    return model


def eos_token_ids(model: Any, processor: Any) -> tuple[int, ...]:
    """Tokens that end an answer, from the generation config (Qwen2-Audio has two)."""
    eos = unwrap(model).generation_config.eos_token_id
    if eos is None:
        eos = processor.tokenizer.eos_token_id
    return tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)


def window_s(processor: Any) -> float:
    """Longest clip in seconds that the model takes whole (Qwen2-Audio: 30); what is beyond would be cut silently."""
    extractor = processor.feature_extractor
    return extractor.n_samples / extractor.sampling_rate


def num_audio_states(num_frames: Tensor) -> Tensor:
    """Audio states of a clip for its number of mel frames: convolution of stride 2, then average pool of 2."""
    return ((num_frames - 1) // 2 + 1 - 2) // 2 + 1


def tower_states(model: Any, input_features: Tensor, feature_attention_mask: Tensor) -> Tensor:
    """Audio tower output (N, F_max, A) for log-mels (N, mels, M) and their mask (N, M), with padding masked as in training.

    M may be less than the model's window, which the tower's own forward refuses: so its modules are called one by one here.
    Valid states are those of the whole window if M holds two frames beyond the longest clip, or is the window.
    """
    tower = unwrap(model).model.audio_tower
    weight = tower.conv1.weight
    hidden = nn.functional.gelu(tower.conv1(input_features.to(weight.device, weight.dtype)))
    hidden = nn.functional.gelu(tower.conv2(hidden)).permute(0, 2, 1)
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    lengths = (feature_attention_mask.to(hidden.device).sum(-1) - 1) // 2 + 1
    valid = positions[None, :] < lengths[:, None]
    mask = create_bidirectional_mask(config=tower.config, inputs_embeds=hidden, attention_mask=valid.long())
    hidden = nn.functional.dropout(hidden + tower.embed_positions(positions), p=tower.dropout, training=tower.training)
    with attention_for_unlike_lengths():
        for layer in tower.layers:
            hidden = layer(hidden, mask)
    return tower.layer_norm(tower.avg_pooler(hidden.permute(0, 2, 1)).permute(0, 2, 1))


def attention_for_unlike_lengths() -> AbstractContextManager[None]:
    """PyTorch's attention without cuDNN's kernels, for which PyTorch builds a plan at every new shape."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def project(model: Any, states: Tensor) -> Tensor:
    """Audio states (..., A) to decoder width (..., D)."""
    return unwrap(model).model.multi_modal_projector(states)


def embed(model: Any, input_ids: Tensor) -> Tensor:
    """Token embeddings (..., D)."""
    return text_decoder(model).embed_tokens(input_ids)


def freeze_(model: Any, parts: Sequence[str]) -> None:
    """Stop the named parts from training: audio_tower, projector, embeddings, lm_head."""
    inner = unwrap(model)
    modules = {
        "audio_tower": inner.model.audio_tower,
        "projector": inner.model.multi_modal_projector,
        "embeddings": inner.model.language_model.embed_tokens,
        "lm_head": inner.lm_head,
    }
    for part in parts:
        modules[part].requires_grad_(False)


def part_of(module_name: str, parts: Mapping[str, str] = PARTS) -> str | None:
    """The part (audio_tower, projector, decoder, lm_head) a module name in memory belongs to."""
    for part, prefix in parts.items():
        if module_name == prefix or module_name.startswith(prefix + "."):
            return part
    return None


def decoder_layer(
    layer: Any, hidden: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor], wanted: Tensor | None = None
) -> Tensor:
    """One Qwen2 decoder layer over N tokens, (N, D) to (N, D), with rotary embedding and attention left to the caller.

    `attend` gets queries (N, H, E), keys and values (N, K, E), which it may overwrite, and returns (N, H, E). With `wanted` (M,) only
    these tokens' outputs are computed: queries and result have M rows.
    """
    attention = layer.self_attn
    normed = rms_norm(layer.input_layernorm, hidden)
    key, value = (
        linear(normed).view(len(hidden), -1, attention.head_dim) for linear in (attention.k_proj, attention.v_proj)
    )
    if wanted is not None:
        normed, hidden = normed[wanted], hidden[wanted]
    mixed = attend(attention.q_proj(normed).view(len(hidden), -1, attention.head_dim), key, value)
    hidden, normed = add_norm(hidden, attention.o_proj(mixed.flatten(1)), layer.post_attention_layernorm)
    mlp = layer.mlp
    return hidden + mlp.down_proj(gated(mlp.act_fn, mlp.gate_proj(normed), mlp.up_proj(normed)))


def rms_norm(norm: Any, hidden: Tensor) -> Tensor:
    """A Qwen2RMSNorm (..., D) in one kernel, where transformers' own takes six."""
    return nn.functional.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)
