"""Qwen2-Audio: a Whisper encoder with masked padding and a pool of 2, one linear projection, a Qwen2 decoder, ChatML prompts.

Shapes: N clips, M mel frames, F audio states of a clip, A tower width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoProcessor, Qwen2AudioConfig, WhisperFeatureExtractor
from transformers.masking_utils import create_bidirectional_mask

from trimlingual.models.family import Family, Shapes
from trimlingual.models.gguf_form import GgufForm
from trimlingual.models.tree import attention_for_unlike_lengths, audio_tower

# Mel frames beyond a clip's last that its last audio state depends on: convolutions of width 3 and stride 1, then 2, see frame 2p + 2
# from position p, and the last valid position is at most half the last frame. The spectra of both are those of silence, or nearly.
CONTEXT_FRAMES = 2
FRAMES_MULTIPLE = 64  # 0.64 s, 16 audio states: few different shapes, and aligned ones, at little padding
# The published template, for llama.cpp's way of handing it a message: as one string, with a marker where the clip is.
GGUF_CHAT_TEMPLATE = """\
{%- set seen = namespace(clips=0) -%}
{%- if messages[0].role != "system" -%}
  {{- "<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n" -}}
{%- endif -%}
{%- for message in messages -%}
  {{- "<|im_start|>" ~ message.role ~ "\\n" -}}
  {%- for piece in message.content.split("<__media") -%}
    {%- if loop.first -%}
      {{- piece -}}
    {%- else -%}
      {%- set seen.clips = seen.clips + 1 -%}
      {%- set marker = piece.split("__>")[0] -%}
      {{- "Audio " ~ seen.clips ~ ": <__media" ~ marker ~ "__>\\n" ~ piece[marker | length + 3:] -}}
    {%- endif -%}
  {%- endfor -%}
  {{- "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}"""


class Qwen2Audio(Family):
    """Qwen/Qwen2-Audio-7B-Instruct and models of its form, the built-in one among them."""

    model_class = "Qwen2AudioForConditionalGeneration"
    processor_class = "Qwen2AudioProcessor"
    config_class: ClassVar[Any] = Qwen2AudioConfig
    encoder_type = "qwen2_audio_encoder"  # the encoder's model_type
    audio_token_setting = "audio_token_index"  # what the configuration calls the placeholder's id
    chat_reads_audio = False
    licenses: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "Qwen/Qwen2-Audio-7B-Instruct": {"license": "apache-2.0"}, "Qwen/Qwen2-Audio-7B": {"license": "apache-2.0"},
    }  # fmt: skip
    gguf: ClassVar[GgufForm | None] = GgufForm(
        "qwen2",
        "qwen2a",
        "qwen2",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        GGUF_CHAT_TEMPLATE,
    )
    states_per_s = 25  # 100 mel frames a second, a convolution of stride 2, a pool of 2
    # As published (its config.json), and a model of its form that a CPU runs in seconds.
    shapes: ClassVar[Shapes] = {
        "qwen2-audio-7b": {
            "text": {
                "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 32, "vocab_size": 156032, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
            },
            "audio": {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120},
            "mels": 128,
            "window_s": 30,
        },
        "qwen2-audio-tiny": {
            "text": {
                "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4,
                "num_key_value_heads": 4, "vocab_size": 2304, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
            },
            "audio": {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 128},
            "mels": 128,
            "window_s": 8,
        },
    }  # fmt: skip

    def window_s(self, processor: Any) -> float:
        """The encoder's window (30 s in the published model); what is beyond would be cut silently."""
        extractor = processor.feature_extractor
        return extractor.n_samples / extractor.sampling_rate

    def features(
        self, processor: Any, audio: Sequence[np.ndarray], whole_window: bool, device: torch.device | str
    ) -> tuple[Tensor, Tensor]:
        """Log-mel spectra and their mask, as the processor makes them over its window but cut to what is needed.

        M is the longest clip's frames and the two that the encoder's convolutions see beyond it, rounded up to a multiple of
        FRAMES_MULTIPLE; what is left out is padding that the encoder masks. Values are those of the whole window: silence is the
        least value there is, so the maximum that a clip is normalised by is found within the clip. `whole_window`: M is the window's
        length, which transformers' own forward insists on.
        """
        extractor = processor.feature_extractor
        num_frames = -(-max(map(len, audio)) // extractor.hop_length) + CONTEXT_FRAMES
        num_frames = -(-num_frames // FRAMES_MULTIPLE) * FRAMES_MULTIPLE
        num_samples = min(num_frames * extractor.hop_length, extractor.n_samples)
        features = extractor(
            list(audio),
            sampling_rate=extractor.sampling_rate,
            padding="max_length",
            max_length=extractor.n_samples if whole_window else num_samples,
            return_attention_mask=True,
            return_tensors="pt",
            device=str(device),
        )
        # A copy: NumPy aligns memory by 16 bytes, PyTorch by 64, and what a kernel gives may depend on it in its last bits.
        return features["input_features"].clone(), features["attention_mask"]

    def audio_states(self, model: Any, features: Tensor, mask: Tensor) -> Tensor:
        """Audio tower output, with padding masked as in training.

        M may be less than the model's window, which the tower's own forward refuses: so its modules are called one by one here.
        Valid states are those of the whole window if M holds two frames beyond the longest clip, or is the window.
        """
        tower = audio_tower(model)
        weight = tower.conv1.weight
        hidden = nn.functional.gelu(tower.conv1(features.to(weight.device, weight.dtype)))
        hidden = nn.functional.gelu(tower.conv2(hidden)).permute(0, 2, 1)
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        lengths = (mask.to(hidden.device).sum(-1) - 1) // 2 + 1
        valid = positions[None, :] < lengths[:, None]
        mask = create_bidirectional_mask(config=tower.config, inputs_embeds=hidden, attention_mask=valid.long())
        hidden = nn.functional.dropout(
            hidden + tower.embed_positions(positions), p=tower.dropout, training=tower.training
        )
        with attention_for_unlike_lengths():
            for layer in tower.layers:
                hidden = layer(hidden, mask)
        return tower.layer_norm(tower.avg_pooler(hidden.permute(0, 2, 1)).permute(0, 2, 1))

    def num_states(self, num_frames: Tensor) -> Tensor:
        """Convolution of stride 2, then average pool of 2."""
        return ((num_frames - 1) // 2 + 1 - 2) // 2 + 1

    def state_width(self, config: Any) -> int:
        """The tower's width."""
        return config.audio_config.d_model

    def chat(self, processor: Any, system: str, text: str) -> str:
        """The prompt as text, with one audio placeholder, ending where the answer begins."""
        conversation = self.conversation(system, text)
        return processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)

    def prompt(self, processor: Any, system: str, text: str) -> tuple[list[int], list[int]]:
        """Token ids of the chat before and after the audio."""
        ids = processor.tokenizer(self.chat(processor, system, text), add_special_tokens=False)["input_ids"]
        placeholder = self.audio_token(processor)
        if ids.count(placeholder) != 1:
            raise ValueError(
                f"the chat template yields {ids.count(placeholder)} audio placeholders for one clip; "
                f"expected 1: is it a {self.processor_class}?"
            )
        index = ids.index(placeholder)
        return ids[:index], ids[index + 1 :]

    def audio_token(self, processor: Any) -> int:
        """`<|AUDIO|>`."""
        return processor.tokenizer.convert_tokens_to_ids(processor.audio_token)

    def end_token(self, processor: Any) -> int:
        """`<|im_end|>`; the published generation config has `<|endoftext|>` as well."""
        return processor.tokenizer.convert_tokens_to_ids("<|im_end|>")

    def conversation(self, system: str, text: str) -> list[dict[str, Any]]:
        """A system and a user message; the template makes text, and the processor is given the audio beside it."""
        content = [{"type": "audio", "audio_url": "clip"}, {"type": "text", "text": text}]
        return [{"role": "system", "content": system}, {"role": "user", "content": content}]

    def random_config(self, shape: Mapping[str, Any], processor: Any, **text: Any) -> Any:
        """Embedding and output head are two tensors, as in the published model. What `shape` does not name is the library's default."""
        tokenizer = processor.tokenizer
        audio = {"num_mel_bins": shape["mels"], "max_source_positions": 50 * shape["window_s"], **shape["audio"]}
        decoder = {
            **shape["text"], **text, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }  # fmt: skip
        return self.config_class(
            audio_config={"model_type": self.encoder_type, **audio},
            text_config={"model_type": "qwen2", "tie_word_embeddings": False, **decoder},
            tie_word_embeddings=False,
            dtype="bfloat16",
            architectures=[self.model_class],
            **{self.audio_token_setting: self.audio_token(processor)},
        )

    def random_processor(self, shape: Mapping[str, Any], folder: Path) -> Any:
        """The built-in model's, with the shape's window and mel bands."""
        processor = AutoProcessor.from_pretrained(Path(__file__).parents[1] / "mini" / "model")
        processor.feature_extractor = WhisperFeatureExtractor(
            feature_size=shape["mels"], chunk_length=shape["window_s"]
        )
        processor.save_pretrained(folder)
        return processor


FAMILY = Qwen2Audio()
