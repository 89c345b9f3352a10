"""Byte-level BPE with fewer tokens: which tokens may go, and the tokenizer without them. Pure functions on tokenizer.json.

Why a text whose tokens are all kept keeps its tokenisation. BPE applies, within a word, the merge of lowest rank (the leftmost of
equals) until none applies. What a merge makes lies inside one final token, and no merge crosses the border of a final token, so
inside a token the merges are those of the token's own string, in the same order, whatever stands around it. `merge_tree` lists
what they make. If all of it is kept, and the merges between kept tokens, then at every step the merge the full tokenizer takes is
there, and it is still the lowest in rank, because merges only went: by induction every step is the same. All bytes are kept, so any
other text is still spelled without loss, in more tokens.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from tokenizers import decoders, pre_tokenizers


class VocabError(ValueError):
    """A vocabulary that cannot be trimmed as asked; the message says what to do."""


@dataclass(frozen=True)
class Bpe:
    """A byte-level BPE: `vocab` and `added` map tokens to ids, `ranks` a pair of tokens to the place of its merge."""

    vocab: dict[str, int]
    ranks: dict[tuple[str, str], int]
    added: dict[str, int]

    @cached_property
    def ids(self) -> dict[str, int]:
        """Every token's id, added ones included."""
        return self.vocab | self.added

    def rank(self, left: str, right: str) -> int | None:
        """Place of the merge of two tokens; None if they do not merge."""
        return self.ranks.get((left, right))

    @property
    def in_order(self) -> list[int]:
        """All ids as the library numbers tokens when it loads them: those of the BPE, then added ones."""
        inside = set(self.vocab.values())
        return sorted(self.ids.values(), key=lambda old: (old not in inside, old))

    def byte_ids(self) -> set[int]:
        """Ids of the 256 single bytes."""
        return {self.vocab[byte] for byte in pre_tokenizers.ByteLevel.alphabet() if byte in self.vocab}

    def merge_tree(self, token: str) -> set[str]:
        """`token` and all that its own merges make on the way to it, bytes included.

        Of a token that merging does not lead to (an added one, or one that `ignore_merges` alone yields) only itself.
        """
        symbols = list(token)
        tree = {token, *symbols}
        while len(symbols) > 1:
            ranks = [(self.rank(*pair), index) for index, pair in enumerate(pairwise(symbols))]
            known = [(rank, index) for rank, index in ranks if rank is not None]
            if not known:
                return {token}
            _, index = min(known)
            symbols[index : index + 2] = [symbols[index] + symbols[index + 1]]
            tree.add(symbols[index])
        return tree


@dataclass(frozen=True)
class Kept:
    """Which tokens stay: `ids[new]` is the old id. `num_used` were counted, `num_on_the_way` close the merges, `num_filled` fill up."""

    ids: list[int]
    num_used: int
    num_on_the_way: int
    num_filled: int

    @cached_property
    def new_id(self) -> dict[int, int]:
        """Old id to new."""
        return {old: new for new, old in enumerate(self.ids)}

    def numbers(self) -> dict[str, int]:
        """For the record."""
        return {"counted": self.num_used, "on_the_way": self.num_on_the_way, "filled": self.num_filled}


def read_bpe(tokenizer: Mapping[str, Any]) -> Bpe:
    """The BPE of a tokenizer.json; VocabError for a tokenizer of another kind."""
    model = tokenizer["model"]
    if model.get("type") != "BPE" or '"ByteLevel"' not in repr(tokenizer["pre_tokenizer"]).replace("'", '"'):
        raise VocabError(
            f"the tokenizer is not a byte-level BPE (model {model.get('type')!r}): its vocabulary cannot be trimmed without loss; "
            "set vocab: null"
        )
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise VocabError("a BPE with dropout, subword prefixes or word suffixes cannot be trimmed; set vocab: null")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return Bpe(
        vocab=dict(model["vocab"]),
        ranks={(left, right): rank for rank, (left, right) in enumerate(pairs)},
        added={token["content"]: token["id"] for token in tokenizer["added_tokens"]},
    )


def choose(
    bpe: Bpe,
    counts: Mapping[int, int],
    required: Iterable[int],
    *,
    min_count: int = 1,
    max_tokens: int | None = None,
    multiple: int = 1,
) -> Kept:
    """The tokens to keep: bytes, added tokens, `required`, and those counted `min_count` times, closed under their merges.

    With `max_tokens` so many in all: the most frequent ones that fit, then tokens of the scripts that were counted (`of_scripts`).
    Without, the number is brought to the next `multiple`. Either way the rest are real tokens, counted ones first, then by merge order;
    it stays below only when the vocabulary ends. Raises VocabError when what must stay is more than `max_tokens`.
    """
    token_of = {old: token for token, old in bpe.ids.items()}
    kept: set[int] = set()

    def closure(old: int) -> set[int]:
        return {old, *(bpe.vocab[part] for part in bpe.merge_tree(token_of[old]) if part in bpe.vocab)} - kept

    def fill(candidates: Iterable[int], target: int) -> None:
        for old in candidates:
            if len(kept) == target:
                break
            if old not in kept and len(kept) + len(added := closure(old)) <= target:
                kept.update(added)

    for old in {*bpe.byte_ids(), *bpe.added.values(), *required}:
        kept |= closure(old)
    if max_tokens is not None and len(kept) > max_tokens:
        raise VocabError(
            f"bytes, special tokens and prompts alone are {len(kept)} tokens: vocab.max_tokens {max_tokens} is too few"
        )
    by_count = sorted((old for old in counts if old in token_of), key=lambda old: (-counts[old], old))
    used = [old for old in by_count if counts[old] >= min_count]
    fill(used, max_tokens or len(token_of))
    num_closed = len(kept)
    target = max_tokens or -(-num_closed // multiple) * multiple
    fill(by_count, target)
    fill(of_scripts(bpe, by_count), target)
    fill(sorted(bpe.vocab.values()), target)
    num_used = sum(old in kept for old in used)
    return Kept(
        ids=[old for old in bpe.in_order if old in kept],
        num_used=num_used,
        num_on_the_way=num_closed - len({*used} & kept | {*bpe.byte_ids(), *bpe.added.values(), *required}),
        num_filled=len(kept) - num_closed,
    )


def of_scripts(bpe: Bpe, counted: Iterable[int]) -> list[int]:
    """Ids of all tokens of the scripts that `counted` ones are of, in an order to add them in.

    Within a script words and their parts come first, names from program code after them. Both by merge order, that is by how common
    they were when the vocabulary was learned. From script to script in the proportion in which they were counted (different tokens):
    for Chinese text with a few Latin names mostly Han is added.
    """
    token_of = {old: token for token, old in bpe.vocab.items()}
    script_of = {old: script(token) for old, token in token_of.items()}
    shares = Counter(script_of.get(old) for old in counted)
    del shares[None]
    places: list[tuple[float, int]] = []
    number: Counter[str | None] = Counter()
    for old in sorted(script_of, key=lambda old: (not is_word(token_of[old]), old)):
        if share := shares[name := script_of[old]]:
            number[name] += 1
            places.append((number[name] / share, old))
    return [old for _, old in sorted(places)]


_spell = decoders.ByteLevel()


def script(token: str) -> str | None:
    """The script or scripts of a token's letters, "common" without letters, None for a part of a character.

    A script is the first word of its letters' Unicode names: LATIN, CJK, HIRAGANA.
    """
    text = _spell.decode([token])
    if "\ufffd" in text:
        return None
    return " ".join(sorted({unicodedata.name(c, "?").split()[0] for c in text if c.isalpha()})) or "common"


def is_word(token: str) -> bool:
    """Whether a token is a word or a part of one: letters (and marks on them), a space before, no capital but the first."""
    text = _spell.decode([token]).removeprefix(" ")
    return bool(text) and all(unicodedata.category(c)[0] in "LM" for c in text) and text[1:] == text[1:].lower()


def trimmed_tokenizer(tokenizer: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The tokenizer.json with the tokens `kept` alone, numbered in that order; a merge stays exactly when its three parts do."""
    bpe, new_id = read_bpe(tokenizer), {old: new for new, old in enumerate(kept)}
    vocab = {token: new_id[old] for token, old in bpe.vocab.items() if old in new_id}
    merges = [list(pair) for pair in bpe.ranks if vocab.keys() >= {*pair, "".join(pair)}]
    added = [{**token, "id": new_id[token["id"]]} for token in tokenizer["added_tokens"]]
    trimmed = {
        **tokenizer,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "model": {**tokenizer["model"], "vocab": vocab, "merges": merges},
    }
    processor = tokenizer.get("post_processor")
    if processor:
        trimmed["post_processor"] = _renumbered(processor, new_id)
    return trimmed


def _renumbered(processor: Any, new_id: Mapping[int, int]) -> Any:
    """A post-processor with new ids: `ids` lists of templates, and [token, id] pairs of the BERT kind."""
    if isinstance(processor, Mapping):
        return {
            key: [new_id[old] for old in value]
            if key == "ids"
            else [value[0], new_id[value[1]]]
            if key in ("sep", "cls")
            else _renumbered(value, new_id)
            for key, value in processor.items()
        }
    if isinstance(processor, list):
        return [_renumbered(value, new_id) for value in processor]
    return processor
