"""A small model of Voxtral's form: a Whisper encoder over 30 s of unmasked sound, four frames stacked, a Llama decoder.

What the built-in model is to Qwen2-Audio, this one is to Voxtral. It is not shipped: each clip costs the encoder 30 s.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import VoxtralConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from tools.mini.blueprint import Blueprint
from tools.mini.tokens import INSTRUCTIONS, SYSTEM_PROMPT, VOCABULARY, train_bpe
from trimlingual.models.voxtral import processor_of

NUM_SPECIAL = 64


class Voxtral(Blueprint):
    """The encoder and the decoder have the built-in model's sizes, but heads wider than the decoder has room for, as published."""

    window_s = 30
    masks_padding = False

    def processor(self, texts: Sequence[str], folder: Path) -> Any:
        """The BPE as a list of tokens by rank, which is the order in which they were merged."""
        prompts = [f"{SYSTEM_PROMPT} {text}" for text in INSTRUCTIONS.values()]
        bpe = train_bpe(texts, prompts, VOCABULARY - NUM_SPECIAL)
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        rank_of = {token: rank for token, rank in bpe.get_vocab().items() if rank >= 256}  # the rest are the bytes
        tokens = [bytes([byte]) for byte in range(256)]
        tokens += [
            bytes(byte_of[character] for character in token) for token in sorted(rank_of, key=rank_of.__getitem__)
        ]
        vocabulary = [
            {
                "rank": rank,
                "token_bytes": base64.b64encode(token).decode("ascii"),
                "token_str": token.decode("utf-8", "replace"),
            }
            for rank, token in enumerate(tokens)
        ]
        return processor_of(vocabulary, NUM_SPECIAL, PRETOKENIZE_REGEX, folder)

    def config(self, processor: Any) -> VoxtralConfig:
        """8.5 million parameters."""
        tokenizer = processor.tokenizer
        text = {
            "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 12,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        }  # fmt: skip
        audio = {
            "model_type": "voxtral_encoder", "num_mel_bins": 128, "hidden_size": 192, "num_hidden_layers": 4,
            "num_attention_heads": 6, "intermediate_size": 768, "max_source_positions": self.window_s * 50,
        }  # fmt: skip
        return VoxtralConfig(
            audio_config=audio,
            text_config=text,
            audio_token_id=self.family.audio_token(processor),
            tie_word_embeddings=False,
        )

    def encode(self, model: Any, mel: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """The tower's output, and four of its frames to a state."""
        states = model.model.audio_tower(mel).last_hidden_state
        return states, states.reshape(len(states), -1, self.family.state_width(model.config))


BLUEPRINT = Voxtral()
