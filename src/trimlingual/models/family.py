"""The one interface through which the rest of the package sees a model family.

A family is one file of this folder, named as the `model_type` in the config.json of its models. The file has a subclass of `Family`
and its only instance, `FAMILY`. Which family a folder belongs to is told by its `model_type` alone: no code of a folder is ever run.

Shapes: N clips, M mel frames, F audio states of a clip, A width of the audio states, T tokens, D decoder width, H heads, K key-value
heads, E head size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from torch import Tensor

from trimlingual.models.errors import ModelError
from trimlingual.models.folders import FAMILIES
from trimlingual.models.gguf_form import GgufForm
from trimlingual.models.kernels import add_norm, gated, rms_norm
from trimlingual.models.packed_layers import together
from trimlingual.models.tree import projector, text_decoder, unwrap

Shapes = Mapping[str, Mapping[str, Any]]
POSITIONS_PER_S = 50  # of a Whisper encoder: 100 mel frames per second, a convolution of stride 2


class Family(ABC):
    """What differs between model families. The tree of modules is the same for all of them (tree.py)."""

    model_class: ClassVar[str]  # in transformers
    processor_class: ClassVar[str]  # in transformers
    chat_reads_audio: ClassVar[
        bool
    ]  # whether the processor's chat template takes the clip itself, as base64 of a WAV file
    packages: ClassVar[tuple[str, ...]] = ()  # that its processor in transformers needs beside transformers
    states_per_s: ClassVar[float]  # F per second of audio
    shapes: ClassVar[Shapes]  # of `random:` bases, by name
    gguf: ClassVar[GgufForm | None] = None  # None: not written
    # A text that spells a special token ("<|im_end|>") is text, and not that token: what the tokenizer must be told for it.
    spelled_out: ClassVar[Mapping[str, bool]] = {"split_special_tokens": True}
    licenses: ClassVar[
        Mapping[str, Mapping[str, str]]
    ] = {}  # of published weights by Hub id, as a card's metadata has it

    @abstractmethod
    def window_s(self, processor: Any) -> float:
        """Longest clip in seconds that the model takes; what is beyond would be cut, or is more than it was made for."""

    @abstractmethod
    def features(
        self, processor: Any, audio: Sequence[np.ndarray], whole_window: bool, device: torch.device | str
    ) -> tuple[Tensor, Tensor]:
        """Log-mel spectra (N, mels, M) and their mask (N, M), on the CPU, for clips that fit the window.

        They are cut to what the longest clip needs; with `whole_window` they are what the model's own forward takes.
        """

    @abstractmethod
    def audio_states(self, model: Any, features: Tensor, mask: Tensor) -> Tensor:
        """What the audio tower makes of `features`: (N, F_max, A), padded on the right. All that is frozen with the tower."""

    @abstractmethod
    def num_states(self, num_frames: Tensor) -> Tensor:
        """F of each clip for its number of mel frames, the sum of its mask."""

    @abstractmethod
    def state_width(self, config: Any) -> int:
        """A, from a configuration."""

    @abstractmethod
    def prompt(self, processor: Any, system: str, text: str) -> tuple[list[int], list[int]]:
        """Token ids before and after the audio; `system` says who is asked, `text` what for."""

    @abstractmethod
    def audio_token(self, processor: Any) -> int:
        """Id of the placeholder that stands for one audio state."""

    @abstractmethod
    def end_token(self, processor: Any) -> int:
        """Id of the token that a model learns to end its answer with."""

    @abstractmethod
    def conversation(self, system: str, text: str) -> list[dict[str, Any]]:
        """The chat in which plain transformers is asked about one clip; its last message holds a piece of type `audio`."""

    @abstractmethod
    def random_config(self, shape: Mapping[str, Any], processor: Any, **text: Any) -> Any:
        """Configuration of a random model of one of `shapes`; `text` overrides sizes of its decoder."""

    @abstractmethod
    def random_processor(self, shape: Mapping[str, Any], folder: Path) -> Any:
        """A processor for a random model of one of `shapes`, made of what is installed, and saved to `folder`."""

    def hears_padding(self, processor: Any) -> bool:
        """Whether a clip is filled up to the window with silence that the model hears, instead of padding that is masked."""
        return getattr(processor.feature_extractor, "audio_padding", "mask") == "window"

    def fill_up(self, processor: Any, samples: np.ndarray) -> np.ndarray:
        """Samples (S,) as the model is to hear them: with silence up to whole windows where it hears padding."""
        if not self.hears_padding(processor):
            return samples
        return np.pad(samples, (0, -len(samples) % processor.feature_extractor.n_samples))

    def encoded_s(self, config: Any, duration_s: float, fills_up: bool) -> float:
        """Seconds of sound that the encoder makes states of: the clip's or, where it is filled up with heard silence, whole windows."""
        if not fills_up:
            return duration_s
        window = config.audio_config.max_source_positions / POSITIONS_PER_S
        return math.ceil(duration_s / window) * window

    def project(self, model: Any, states: Tensor) -> Tensor:
        """Audio states (..., A) to decoder width (..., D)."""
        return projector(model)(states)

    def rope(self, model: Any, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rotary cosines and sines (T, E) of positions (T,)."""
        probe = position.new_empty(0, dtype=dtype)
        cosine, sine = text_decoder(model).rotary_emb(probe, position[None])
        return cosine[0], sine[0]

    def decoder_layer(
        self,
        layer: Any,
        hidden: Tensor,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        query_tokens: Tensor | None = None,
    ) -> Tensor:
        """One decoder layer over T tokens, (T, D) to (T, D), with rotary embedding and attention left to the caller.

        `attend` gets queries (T, H, E), keys and values (T, K, E), which it may overwrite, and returns (T, H, E). With `query_tokens`
        (M,) only these tokens' outputs are computed: queries and result have M rows. This is the layer of Qwen2 and of Llama: norm,
        attention, norm, gated MLP, each pair added to its input.
        """
        attention = layer.self_attn
        normed = rms_norm(layer.input_layernorm, hidden)
        if query_tokens is None:
            products = together(normed, attention.q_proj, attention.k_proj, attention.v_proj)
        else:
            products = together(normed, attention.k_proj, attention.v_proj)
            normed, hidden = normed[query_tokens], hidden[query_tokens]
            products.insert(0, attention.q_proj(normed))
        mixed = attend(*(product.view(len(product), -1, attention.head_dim) for product in products))
        hidden, normed = add_norm(hidden, attention.o_proj(mixed.flatten(1)), layer.post_attention_layernorm)
        mlp = layer.mlp
        return hidden + mlp.down_proj(gated(mlp.act_fn, *together(normed, mlp.gate_proj, mlp.up_proj)))

    def end_tokens(self, model: Any, processor: Any) -> tuple[int, ...]:
        """Tokens that end an answer, from the generation config: a model may have several."""
        ends = unwrap(model).generation_config.eos_token_id
        if ends is None:
            ends = processor.tokenizer.eos_token_id
        return tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)

    def build(self, config: Any) -> Any:
        """A model of this configuration, on PyTorch's default device and in its default dtype."""
        return self.transformers_class(config)

    @property
    def model_type(self) -> str:
        """As in config.json, and as the family's file is named."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def transformers_class(self) -> Any:
        """The class of the models."""
        return getattr(transformers, self.model_class)


def family_named(model_type: str) -> Family:
    """The family of models whose config.json has this `model_type`; ModelError for one that is not known."""
    if model_type not in FAMILIES:
        raise ModelError(f"models of type {model_type!r} are not supported; supported: {', '.join(FAMILIES)}")
    family: Family = import_module(f"trimlingual.models.{model_type}").FAMILY
    return family


def family_of(model: Any) -> Family:
    """The family of a model, wrapped or not."""
    from trimlingual.models.tree import unwrap

    return family_named(unwrap(model).config.model_type)


def family_of_folder(folder: Path) -> Family:
    """The family of a model folder."""
    return family_named(transformers.AutoConfig.from_pretrained(folder).model_type)


def family_of_processor(processor: Any) -> Family:
    """The family that a processor belongs to; ModelError for a processor of none."""
    name = type(processor).__name__
    for family in map(family_named, FAMILIES):
        if family.processor_class == name:
            return family
    raise ModelError(f"a {name} is no processor of a supported model; supported: {', '.join(FAMILIES)}")


def meta_model(config: Any) -> Any:
    """The model of a configuration without weights (PyTorch's meta device): names and shapes only."""
    with torch.device("meta"):
        return family_named(config.model_type).build(config)
