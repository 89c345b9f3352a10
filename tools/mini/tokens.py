"""What every small model is asked, and the byte-level BPE that its tokenizer is made of."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

SYSTEM_PROMPT = "You are a professional translator."
INSTRUCTIONS = {"de": "Translate the English speech into German:", "zh": "Translate the English speech into Chinese:"}
LANGUAGES = tuple(INSTRUCTIONS)
VOCABULARY = 2048  # a multiple of 32, special tokens included, so that lm_head can be quantised too


def train_bpe(texts: Sequence[str], prompts: Sequence[str], num_tokens: int) -> Tokenizer:
    """A byte-level BPE of `num_tokens` tokens, the bytes first, learned on the translations.

    The prompts are counted as if they stood before every twentieth sentence, so that each of their words becomes one
    token: they are read with every clip, and the base model spends as much on a prompt token as on an audio token.
    """
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*texts, *list(prompts) * max(20, len(texts) // 40)], trainer)
    return bpe
