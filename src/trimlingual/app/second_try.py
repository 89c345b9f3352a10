"""A second, constrained try for an answer that cannot be right: in the wrong language, or one that turns in a circle.

It is decoded again by the plain model, one token after the other, greedily among the tokens that are allowed. No sequence of four
tokens comes twice, and no token has a letter of a script that the language is not written in. Where the script does not tell the
languages apart, the answer must not begin as the first one did either. What is no better than the first answer is not taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from trimlingual.decoding.translate_clips import Translation, embed_prompt, encode_audio, max_new_tokens, to_translation
from trimlingual.evaluation.answers import has_repetition_loop, is_wrong_language
from trimlingual.models.family import family_of
from trimlingual.models.inputs import Prompter
from trimlingual.models.tree import embed, lm_head, text_decoder
from trimlingual.recipe import DecodeSettings
from trimlingual.recipe.languages import LANGUAGES, LATIN, count_scripts, language, primary, script_of

NGRAM = 4  # tokens; a sequence of so many comes once
MAX_REPEATS = 4  # as in the filters of distillation
BEGINNINGS = 3  # other first tokens that are tried where the script does not tell the languages apart


def fault(translation: Translation) -> str | None:
    """Why the answer cannot be right (`runaway` or `wrong language`), or None."""
    if translation.truncated or has_repetition_loop(translation.hypothesis, translation.language, MAX_REPEATS):
        return "runaway"
    return "wrong language" if is_wrong_language(translation.hypothesis, translation.language) else None


class SecondTry:
    """Decodes faulty answers again."""

    def __init__(self, model: Any, prompter: Prompter, settings: DecodeSettings):
        self.model, self.prompter, self.settings = model, prompter, settings
        self.ends = family_of(model).end_tokens(model, prompter.processor)
        self._foreign = lru_cache(self._tokens_of_other_scripts)

    def __call__(self, first: Translation, samples: np.ndarray, duration_s: float) -> tuple[Translation, str | None]:
        """A better answer than `first`, if there is one, and the fault that is left, if any."""
        states = encode_audio(self.model, self.prompter.processor, [samples])[0]
        prompt = embed_prompt(self.model, self.prompter, states, first.language)
        limit = max_new_tokens(duration_s, self.settings)
        own_script = LATIN not in language(first.language).scripts
        banned = self._foreign(first.language)
        firsts: list[int] = [] if own_script or fault(first) == "runaway" else self._beginning(first)
        for _ in range(BEGINNINGS if firsts else 1):
            ids = self._decode(prompt, limit, [*banned], firsts)
            found = to_translation(self.prompter, first.id, first.language, ids, self.ends)
            if found.hypothesis and fault(found) is None and _may_be_in(first.language, found.hypothesis):
                return found, None
            firsts.append(ids[0])
        return first, fault(first)

    def _beginning(self, first: Translation) -> list[int]:
        return self.prompter.answer_ids(first.hypothesis)[:1]

    @torch.inference_mode()
    def _decode(self, prompt: Tensor, limit: int, banned: Sequence[int], firsts: Sequence[int]) -> list[int]:
        """The greedy answer without the tokens `banned` anywhere and `firsts` at its beginning."""
        decoder, head, cache = text_decoder(self.model), lm_head(self.model), DynamicCache()
        inputs, ids = prompt[None], list[int]()
        for step in range(limit):
            hidden = decoder(inputs_embeds=inputs, past_key_values=cache, use_cache=True).last_hidden_state
            logits = head(hidden[:, -1])[0].float()
            logits[[*banned, *(firsts if step == 0 else []), *_completing(ids, NGRAM)]] = -torch.inf
            ids.append(int(logits.argmax()))
            if ids[-1] in self.ends:
                break
            inputs = embed(self.model, torch.tensor([[ids[-1]]], device=prompt.device))
        return ids

    def _tokens_of_other_scripts(self, code: str) -> list[int]:
        """Tokens with a letter of a script that the language is not written in; none where that is not known."""
        if primary(code) not in LANGUAGES:
            return []
        own, tokenizer = set(language(code).scripts), self.prompter.processor.tokenizer
        special = set(tokenizer.all_special_ids)
        rows = text_decoder(self.model).embed_tokens.num_embeddings
        texts = ((i, tokenizer.decode([i])) for i in range(min(len(tokenizer), rows)) if i not in special)
        return [i for i, text in texts if any(script not in own for script in map(script_of, text) if script)]


def _may_be_in(code: str, text: str) -> bool:
    """False for letters that are all of other scripts, even where they are too few to be called another language: a token may hold a
    part of a letter, which no ban sees."""
    counts = count_scripts(text)
    return not counts or primary(code) not in LANGUAGES or any(counts[script] for script in language(code).scripts)


def _completing(ids: Sequence[int], n: int) -> list[int]:
    """Tokens that would make the last `n` of `ids` and them stand there a second time."""
    tail = tuple(ids[len(ids) - n + 1 :])
    if len(tail) < n - 1:
        return []
    return [ids[i + n - 1] for i in range(len(ids) - n + 1) if tuple(ids[i : i + n - 1]) == tail]
