"""The files that a byte-level BPE stands in: tokenizer.json, and the tekken.json of Mistral's models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimlingual.vocabulary.bpe import Bpe, VocabError, read_bpe, trimmed_tokenizer
from trimlingual.vocabulary.tekken import read_tekken, tekken_ids, trimmed_tekken


@dataclass(frozen=True)
class TokenizerFile:
    """What trimming asks of a file: what is in it, its BPE, the same with the tokens of some ids alone, and a loaded one's ids."""

    name: str
    read: Callable[[Any, Path], Mapping[str, Any]]  # processor, folder
    bpe: Callable[[Mapping[str, Any]], Bpe]
    trimmed: Callable[[Mapping[str, Any], Sequence[int]], Mapping[str, Any]]
    ids: Callable[[Any], dict[str, int]]  # of a tokenizer that was loaded from it, by the names of `bpe`


TOKENIZER = TokenizerFile(
    "tokenizer.json",
    lambda processor, folder: json.loads(processor.tokenizer.backend_tokenizer.to_str()),
    read_bpe,
    trimmed_tokenizer,
    lambda tokenizer: tokenizer.get_vocab(),
)
TEKKEN = TokenizerFile(
    "tekken.json",
    lambda processor, folder: json.loads((folder / "tekken.json").read_text(encoding="utf-8")),
    read_tekken,
    trimmed_tekken,
    tekken_ids,
)


def tokenizer_file(processor: Any, folder: Path) -> TokenizerFile:
    """The file that a processor's tokenizer stands in; VocabError for one of another kind."""
    if hasattr(processor.tokenizer, "backend_tokenizer"):
        return TOKENIZER
    if (folder / TEKKEN.name).is_file():
        return TEKKEN
    raise VocabError(
        f"the tokenizer in {folder} is neither a tokenizer.json nor a tekken.json ({type(processor.tokenizer).__name__}), and no other "
        "kind can be trimmed: leave out the section vocab"
    )
