"""Audio Flamingo 3 (its weights are for non-commercial use only): Qwen2-Audio's encoder over chunks of 30 s, a projection of two
layers, a Qwen2 decoder, ChatML prompts.

A recording of up to ten minutes is several chunks, whose states stand one after the other in one prompt. Only the last chunk can have
padding, and the encoder masks it.

Shapes: N clips, M mel frames, A tower width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import AudioFlamingo3Config, AudioFlamingo3Processor, AutoProcessor, WhisperFeatureExtractor

from trimlingual.models.chunks import encode_chunks, side_by_side
from trimlingual.models.family import Shapes
from trimlingual.models.qwen2_audio import Qwen2Audio
from trimlingual.models.tree import audio_tower

PLACEHOLDER = "<sound>"
# The published conversation format, in our own words: ChatML, audio before text.
CHAT_TEMPLATE = """\
{%- if messages[0].role != "system" -%}
  {{- "<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n" -}}
{%- endif -%}
{%- for message in messages -%}
  {{- "<|im_start|>" ~ message.role ~ "\\n" -}}
  {%- if message.content is string -%}
    {{- message.content -}}
  {%- else -%}
    {%- if message.content | selectattr("type", "equalto", "audio") | list -%}
      {{- "<sound>" -}}
    {%- endif -%}
    {{- message.content | selectattr("type", "equalto", "text") | map(attribute="text") | join -}}
  {%- endif -%}
  {{- "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""


class AudioFlamingo3(Qwen2Audio):
    """nvidia/audio-flamingo-3-hf: non-commercial use only."""

    model_class = "AudioFlamingo3ForConditionalGeneration"
    processor_class = "AudioFlamingo3Processor"
    config_class = AudioFlamingo3Config
    encoder_type = "audioflamingo3_encoder"
    audio_token_setting = "audio_token_id"
    licenses: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "nvidia/audio-flamingo-3-hf": {"license": "other", "license_name": "non-commercial-see-base-model"}
    }
    gguf = None
    # As published, and a model of its form that a CPU runs in seconds.
    shapes: ClassVar[Shapes] = {
        "audio-flamingo-3": {
            "text": {
                "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                "num_key_value_heads": 4, "vocab_size": 151672, "rope_theta": 1e6,
            },
            "audio": {},
            "mels": 128,
            "window_s": 30,
        },
        "audio-flamingo-3-tiny": {
            "text": {
                "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4,
                "num_key_value_heads": 2, "vocab_size": 2304, "max_position_embeddings": 1024,
            },
            "audio": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
            "mels": 128,
            "window_s": 4,
        },
    }  # fmt: skip

    def window_s(self, processor: Any) -> float:
        """Ten minutes in the published model; its processor cuts what is beyond."""
        return processor.max_audio_len

    def features(
        self, processor: Any, audio: Sequence[np.ndarray], whole_window: bool, device: torch.device | str
    ) -> tuple[Tensor, Tensor]:
        """Log-mel spectra and their mask: of clips of one chunk as Qwen2-Audio's, else of whole chunks, each normalised alone."""
        size = processor.feature_extractor.n_samples
        if max(map(len, audio)) <= size:
            return super().features(processor, audio, whole_window, device)
        chunks = [[samples[start : start + size] for start in range(0, len(samples), size)] for samples in audio]
        spectra, masks = super().features(processor, [chunk for clip in chunks for chunk in clip], True, device)
        counts = [len(clip) for clip in chunks]
        features = side_by_side([torch.cat([*clip], dim=1) for clip in spectra.split(counts)])
        mask = torch.nn.utils.rnn.pad_sequence([clip.flatten() for clip in masks.split(counts)], batch_first=True)
        return features, mask

    def audio_states(self, model: Any, features: Tensor, mask: Tensor) -> Tensor:
        """Audio tower output with padding masked, a clip's chunks one after the other: all but the last are full."""
        tower = audio_tower(model)
        frames = tower.config.max_source_positions * tower.conv2.stride[0]
        if features.shape[-1] <= frames:
            return super().audio_states(model, features, mask)
        return encode_chunks(
            features, mask, frames, lambda *chunk: super(AudioFlamingo3, self).audio_states(model, *chunk)
        )

    def random_processor(self, shape: Mapping[str, Any], folder: Path) -> Any:
        """The built-in model's tokenizer with the placeholder, and the shape's chunk and mel bands."""
        tokenizer = AutoProcessor.from_pretrained(Path(__file__).parents[1] / "mini" / "model").tokenizer
        tokenizer.add_tokens([PLACEHOLDER], special_tokens=True)
        extractor = WhisperFeatureExtractor(
            feature_size=shape["mels"], chunk_length=shape["window_s"], return_attention_mask=True
        )
        processor = AudioFlamingo3Processor(extractor, tokenizer, CHAT_TEMPLATE, PLACEHOLDER)
        processor.save_pretrained(folder)
        return processor


FAMILY = AudioFlamingo3()
