"""The built-in model: of Qwen2-Audio's form, about a thousand times smaller than the published one.

Every stage of the pipeline meets the same module names, chat template and file layout as with the real one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioProcessor,
    Qwen2Config,
    Qwen2Tokenizer,
    WhisperFeatureExtractor,
)

from tools.mini.blueprint import Blueprint
from tools.mini.tokens import INSTRUCTIONS, SYSTEM_PROMPT, VOCABULARY, train_bpe

END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", END_OF_TURN, "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")

# The conversation format Qwen2-Audio was trained with (ChatML, and "Audio N:" before each clip), in our own words.
CHAT_TEMPLATE = """\
{%- set seen = namespace(clips=0) -%}
{%- if messages[0].role != "system" -%}
  {{- "<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n" -}}
{%- endif -%}
{%- for message in messages -%}
  {{- "<|im_start|>" ~ message.role ~ "\\n" -}}
  {%- if message.content is string -%}
    {{- message.content -}}
  {%- else -%}
    {%- for part in message.content -%}
      {%- if part.type == "audio" or "audio" in part or "audio_url" in part -%}
        {%- set seen.clips = seen.clips + 1 -%}
        {{- "Audio " ~ seen.clips ~ ": <|audio_bos|><|AUDIO|><|audio_eos|>\\n" -}}
      {%- elif "text" in part -%}
        {{- part.text -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""


class Qwen2Audio(Blueprint):
    """`builtin:mini`."""

    window_s = 30
    masks_padding = True

    def processor(self, texts: Sequence[str], folder: Path | None = None) -> Qwen2AudioProcessor:
        """A byte-level BPE of Qwen2's kind inside a Qwen2-Audio processor."""
        prompts = [f"system\n{SYSTEM_PROMPT}\nuser\nAudio 1: \n{text}\nassistant\n" for text in INSTRUCTIONS.values()]
        tokenizer = _qwen2_tokenizer(train_bpe(texts, prompts, VOCABULARY - len(SPECIAL_TOKENS)))
        extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=self.window_s)
        return Qwen2AudioProcessor(extractor, tokenizer, chat_template=CHAT_TEMPLATE)

    def config(self, processor: Any) -> Qwen2AudioConfig:
        """7.5 million parameters."""
        tokenizer = processor.tokenizer
        text = Qwen2Config(
            vocab_size=VOCABULARY, hidden_size=192, intermediate_size=512, num_hidden_layers=12, num_attention_heads=6,
            num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=False, use_sliding_window=False,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        audio = Qwen2AudioEncoderConfig(
            num_mel_bins=80, d_model=192, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=768,
            max_source_positions=self.window_s * 50,
        )  # fmt: skip
        return Qwen2AudioConfig(
            audio_config=audio, text_config=text, audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
            tie_word_embeddings=False,
        )  # fmt: skip

    def encode(self, model: Any, mel: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """States before the pooling and after it. Further than four frames beyond a clip the two convolutions do not look."""
        tower, gelu = model.model.audio_tower, nn.functional.gelu
        states = gelu(tower.conv2(gelu(tower.conv1(mel)))).permute(0, 2, 1)
        states = states + tower.embed_positions.weight[: states.shape[1]]
        valid = torch.arange(states.shape[1], device=mel.device) < ((frames - 1) // 2 + 1)[:, None]
        for layer in tower.layers:
            states = layer(states, valid[:, None, None, :])
        pooled = tower.avg_pooler(states.permute(0, 2, 1)).permute(0, 2, 1)
        return states, tower.layer_norm(pooled)


def _qwen2_tokenizer(bpe: Tokenizer) -> Qwen2Tokenizer:
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=merges,
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        eos_token=END_OF_TURN,
        padding_side="left",
        model_max_length=1024,
    )
    # <|endoftext|> and <|im_end|> are there by now as pad and eos; this adds the rest and marks all as special.
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS[1:])})
    return tokenizer


BLUEPRINT = Qwen2Audio()
