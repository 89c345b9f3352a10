"""A tekken.json as a BPE: byte strings by rank, and special tokens before them.

It has no list of merges: two tokens merge where the vocabulary has what they make, and its rank is the merge's. What bpe.py proves
holds for it as well, since a merge stays exactly when what it makes stays. A word that is a token as it stands becomes that token
without a merge.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from trimlingual.vocabulary.bpe import Bpe

CHARACTER = bytes_to_unicode()  # that stands for a byte, as in a tokenizer.json


class RankedBpe(Bpe):
    """A BPE whose ranks are its ids."""

    def rank(self, left: str, right: str) -> int | None:
        """Place of what two tokens make; None if that is no token."""
        return self.vocab.get(left + right)

    @property
    def in_order(self) -> list[int]:
        """Special tokens, then those of the BPE."""
        return sorted(self.ids.values())


def read_tekken(tekken: Mapping[str, Any]) -> Bpe:
    """The BPE of a tekken.json. A special token is named by its id, behind a character that stands for no byte."""
    num_special = tekken["config"]["default_num_special_tokens"]
    num_ranks = tekken["config"]["default_vocab_size"] - num_special
    names = (spelled(base64.b64decode(token["token_bytes"])) for token in tekken["vocab"][:num_ranks])
    vocab = {name: num_special + rank for rank, name in enumerate(names)}
    return RankedBpe(vocab, {}, {_special(index): index for index in range(num_special)})


def trimmed_tekken(tekken: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The tekken.json with the tokens `kept` alone, all special ones among them, ranked in that order."""
    num_special = tekken["config"]["default_num_special_tokens"]
    tokens = [tekken["vocab"][old - num_special] for old in kept if old >= num_special]
    sizes = {"num_vocab_tokens": len(tokens), "default_vocab_size": num_special + len(tokens)}
    vocab = [{**token, "rank": rank} for rank, token in enumerate(tokens)]
    return {**tekken, "config": {**tekken["config"], **sizes}, "vocab": vocab}


def tekken_ids(tokenizer: Any) -> dict[str, int]:
    """Every token's id in a tokenizer that mistral-common loaded, by the names of `read_tekken`."""
    inner = tokenizer.tokenizer.instruct_tokenizer.tokenizer
    special = {_special(index): index for index in range(inner.num_special_tokens)}
    return special | {spelled(inner.id_to_byte_piece(i)): i for i in range(inner.num_special_tokens, inner.n_words)}


def special_names(tokenizer: Any) -> dict[int, str]:
    """What the special tokens of a tokenizer that mistral-common loaded are called, by id."""
    inner = tokenizer.tokenizer.instruct_tokenizer.tokenizer
    return {index: inner.id_to_piece(index) for index in range(inner.num_special_tokens)}


def spelled(token: bytes) -> str:
    """A token's bytes as characters, one each."""
    return "".join(CHARACTER[byte] for byte in token)


def _special(index: int) -> str:
    return f"\0{index}"
