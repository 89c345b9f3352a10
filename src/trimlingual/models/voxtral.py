"""Voxtral (Mini 3B, Small 24B; Apache-2.0): a Whisper encoder without a mask over chunks of 30 s, four of its frames stacked to one
audio state, a projection of two layers, a Llama decoder with grouped key-value heads, prompts by mistral-common.

Nothing masks the silence that a clip is filled up with to whole chunks: it is part of what the model was trained on. A long clip is so
many chunks, one after the other in one prompt.

Shapes: N clips, M mel frames, P chunks of all clips, F audio states of a clip, A four widths of the tower.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import soundfile
import torch
from torch import Tensor
from transformers import VoxtralConfig, VoxtralProcessor, WhisperFeatureExtractor

from trimlingual.models.chunks import encode_chunks, side_by_side
from trimlingual.models.family import Family, Shapes
from trimlingual.models.gguf_form import GgufForm
from trimlingual.models.tree import audio_tower

LONGEST_S = 30 * 60  # what the model's publisher names as the longest recording to transcribe
FRAMES_PER_STATE = 8  # a convolution of stride 2, then four frames stacked
# A tokenizer for random models: mistral-common ships the vocabulary, and the published model has its audio tokens at these ids.
VOCABULARY = "tekken_240911.json"
AUDIO_TOKENS = {24: "[AUDIO]", 25: "[BEGIN_AUDIO]", 32: "[ARGS]", 33: "[CALL_ID]", 34: "[TRANSCRIBE]"}

# The prompt of mistral-common, for llama.cpp's way of handing it a message: as one string, with a marker where the clip is. A system
# message goes to the words after the clip, as in `conversation`. llama.cpp itself puts `<s>` before and `[BEGIN_AUDIO]` at the marker.
GGUF_CHAT_TEMPLATE = """\
{%- set seen = namespace(system="") -%}
{%- for message in messages -%}
  {%- if message.role == "system" -%}
    {%- set seen.system = message.content ~ " " -%}
  {%- elif message.role == "assistant" -%}
    {{- message.content ~ "</s>" -}}
  {%- else -%}
    {{- "[INST]" -}}
    {%- if "__>" in message.content -%}
      {%- set clip = message.content.split("__>")[0] ~ "__>" -%}
      {{- clip ~ seen.system ~ message.content[clip | length:] -}}
    {%- else -%}
      {{- seen.system ~ message.content -}}
    {%- endif -%}
    {{- "[/INST]" -}}
  {%- endif -%}
{%- endfor -%}"""
GGUF_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Voxtral(Family):
    """mistralai/Voxtral-Mini-3B-2507, mistralai/Voxtral-Small-24B-2507."""

    model_class = "VoxtralForConditionalGeneration"
    processor_class = "VoxtralProcessor"
    chat_reads_audio = True
    packages = ("mistral-common",)
    licenses: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "mistralai/Voxtral-Mini-3B-2507": {"license": "apache-2.0"}, "mistralai/Voxtral-Small-24B-2507": {"license": "apache-2.0"},
    }  # fmt: skip
    gguf: ClassVar[GgufForm | None] = GgufForm(
        "llama",
        None,
        "tekken",
        GGUF_SPLIT,
        GGUF_CHAT_TEMPLATE,
        rotates_neighbours=True,
        starts_with="<s>",
        no_audio="llama.cpp averages pairs of this model's audio states before it stacks four, and hears half of what it should",
    )
    states_per_s = 12.5
    spelled_out: ClassVar[Mapping[str, bool]] = {}  # mistral-common never takes text for a special token
    # Mini and Small as published, and a model of their form that a CPU runs in seconds.
    shapes: ClassVar[Shapes] = {
        "voxtral-mini-3b": {
            "text": {
                "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 30, "num_attention_heads": 32,
                "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072, "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5, "rope_theta": 1e8,
            },
            "audio": {},
            "special_tokens": 1000,
        },
        "voxtral-small-24b": {
            "text": {
                "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40, "num_attention_heads": 32,
                "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072, "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5, "rope_theta": 1e8,
            },
            "audio": {},
            "special_tokens": 1000,
        },
        "voxtral-tiny": {
            "text": {
                "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4,
                "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 2304, "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5, "rope_theta": 1e8,
            },
            "audio": {
                "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
            },
            "special_tokens": 64,
        },
    }  # fmt: skip

    def window_s(self, processor: Any) -> float:
        """Half an hour; a chunk has 30 s, but clips may have any number of chunks."""
        return LONGEST_S

    def features(
        self, processor: Any, audio: Sequence[np.ndarray], whole_window: bool, device: torch.device | str
    ) -> tuple[Tensor, Tensor]:
        """Log-mel spectra of each clip filled up with silence to whole chunks; the mask has all frames of a clip's chunks.

        M is a multiple of a chunk's frames, whether or not the whole window is asked for: the model has no shorter one.
        """
        extractor = processor.feature_extractor
        spectra = [
            extractor(
                samples,
                sampling_rate=extractor.sampling_rate,
                padding=True,
                truncation=False,
                pad_to_multiple_of=extractor.n_samples,
                return_tensors="pt",
                device=str(device),
            )["input_features"][0]
            for samples in audio
        ]
        features = side_by_side(spectra)
        lengths = torch.tensor([spectrum.shape[-1] for spectrum in spectra])
        return features, (torch.arange(features.shape[-1])[None, :] < lengths[:, None]).long()

    def audio_states(self, model: Any, features: Tensor, mask: Tensor) -> Tensor:
        """Audio tower output, four frames stacked: each chunk for itself, then a clip's chunks side by side."""
        tower, width = audio_tower(model), self.state_width(model.config)

        def encode(chunks: Tensor, _: Tensor) -> Tensor:
            hidden = tower(chunks).last_hidden_state  # (P, positions, tower width)
            return hidden.reshape(len(hidden), -1, width)

        return encode_chunks(features, mask, tower.config.max_source_positions * tower.conv2.stride[0], encode)

    def num_states(self, num_frames: Tensor) -> Tensor:
        """One for 0.08 s of a clip's chunks."""
        return num_frames // FRAMES_PER_STATE

    def encoded_s(self, config: Any, duration_s: float, fills_up: bool) -> float:
        """Whole chunks, whatever a recipe says."""
        return super().encoded_s(config, duration_s, fills_up=True)

    def state_width(self, config: Any) -> int:
        """Four widths of the tower; the projector reads them as one."""
        return config.audio_config.intermediate_size

    def prompt(self, processor: Any, system: str, text: str) -> tuple[list[int], list[int]]:
        """Token ids of mistral-common's chat before and after the audio."""
        silence = io.BytesIO()
        rate = processor.feature_extractor.sampling_rate
        soundfile.write(silence, np.zeros(rate, np.float32), rate, format="WAV")
        conversation = self.conversation(system, text)
        conversation[-1]["content"][0]["base64"] = base64.b64encode(silence.getvalue()).decode("ascii")
        ids = processor.tokenizer.apply_chat_template(conversation, return_dict=True)["input_ids"]
        placeholder = self.audio_token(processor)
        first, count = ids.index(placeholder), ids.count(placeholder)
        return ids[:first], ids[first + count :]

    def audio_token(self, processor: Any) -> int:
        """`[AUDIO]`."""
        return processor.audio_token_id

    def end_token(self, processor: Any) -> int:
        """`</s>`."""
        return processor.tokenizer.eos_token_id

    def conversation(self, system: str, text: str) -> list[dict[str, Any]]:
        """One user message. Beside audio this chat format has no system message, so `system` stands before the text."""
        words = f"{system} {text}" if system else text
        return [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": words}]}]

    def random_config(self, shape: Mapping[str, Any], processor: Any, **text: Any) -> Any:
        """What `shape` does not name is as published: the tower's shape is the library's default."""
        tokenizer = processor.tokenizer
        decoder = {
            **shape["text"], **text, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }  # fmt: skip
        return VoxtralConfig(
            audio_config={"model_type": "voxtral_encoder", **shape["audio"]},
            text_config={"model_type": "llama", "tie_word_embeddings": False, **decoder},
            audio_token_id=self.audio_token(processor),
            tie_word_embeddings=False,
            dtype="bfloat16",
            architectures=[self.model_class],
        )

    def random_processor(self, shape: Mapping[str, Any], folder: Path) -> Any:
        """The vocabulary of mistral-common's newest tokenizer, cut to the shape's rows, with audio tokens."""
        import mistral_common

        shipped = Path(mistral_common.__file__).parent / "data" / VOCABULARY
        tokenizer = json.loads(shipped.read_text(encoding="utf-8"))
        special = shape["special_tokens"]
        tokens = tokenizer["vocab"][: shape["text"]["vocab_size"] - special]
        return processor_of(tokens, special, tokenizer["config"]["pattern"], folder)


def processor_of(tokens: Sequence[Mapping[str, Any]], num_special: int, pattern: str, folder: Path) -> VoxtralProcessor:
    """A processor with a vocabulary of `tokens`, saved to `folder`.

    A token has `rank`, `token_bytes` in base64 and `token_str`; the first 256 are the bytes. `pattern` splits text before it is merged.
    The special tokens come first, so a token's id is its rank and `num_special`; audio tokens have the published ids.
    """
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    from transformers.tokenization_mistral_common import MistralCommonBackend

    names = {token["rank"]: str(token["token_str"].value) for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS}
    names |= AUDIO_TOKENS
    made = {
        "config": {
            "pattern": pattern,
            "num_vocab_tokens": len(tokens),
            "default_vocab_size": len(tokens) + num_special,
            "default_num_special_tokens": num_special,
            "version": "v11",
        },
        "vocab": list(tokens),
        "special_tokens": [
            {"rank": rank, "token_str": names.get(rank, f"<SPECIAL_{rank}>"), "is_control": True}
            for rank in range(num_special)
        ],
        "audio": {
            "sampling_rate": 16000,
            "frame_rate": FAMILY.states_per_s,
            "audio_encoding_config": {"num_mel_bins": 128, "hop_length": 160, "window_size": 400},
            "chunk_length_s": 30.0,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tekken.json").write_text(json.dumps(made), encoding="utf-8")
    processor = VoxtralProcessor(
        WhisperFeatureExtractor(feature_size=128), MistralCommonBackend.from_pretrained(folder)
    )
    processor.save_pretrained(folder)
    return processor


FAMILY = Voxtral()
