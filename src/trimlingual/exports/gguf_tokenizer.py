"""A byte-level BPE as GGUF has it: tokens by id, special ones marked, and its merges in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimlingual.exports.target import ExportError
from trimlingual.models.family import family_of_processor
from trimlingual.models.gguf_form import GgufForm
from trimlingual.run.progress import say
from trimlingual.vocabulary.files import TOKENIZER, tokenizer_file
from trimlingual.vocabulary.tekken import read_tekken, special_names


@dataclass(frozen=True)
class Tokens:
    """A tokenizer. Special tokens are control tokens, which llama.cpp does not print, or the user's own (`user_defined`)."""

    names: Mapping[int, str]
    control: frozenset[int]
    user_defined: frozenset[int]
    merges: Sequence[str]  # "left right"
    end: int
    pad: int

    def add_to(self, writer: Any, form: GgufForm, num_rows: int) -> None:
        """The header's part on tokens. Rows of the model that no token has are marked as unused."""
        import gguf

        kinds = [
            gguf.TokenType.UNUSED
            if number not in self.names
            else gguf.TokenType.CONTROL
            if number in self.control
            else gguf.TokenType.USER_DEFINED
            if number in self.user_defined
            else gguf.TokenType.NORMAL
            for number in range(num_rows)
        ]
        names = [self.names.get(number, f"[PAD{number}]") for number in range(num_rows)]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(form.pre_tokenizer)
        writer.add_token_list(names)
        writer.add_token_types(kinds)
        writer.add_token_merges(list(self.merges))
        writer.add_eos_token_id(self.end)
        writer.add_pad_token_id(self.pad)
        writer.add_add_bos_token(form.starts_with is not None)
        if form.starts_with is not None:
            writer.add_bos_token_id(names.index(form.starts_with))
        writer.add_chat_template(form.chat_template)
        say(f"  {len(self.names)} tokens in {num_rows} rows")


def tokens_of(processor: Any, folder: Path, form: GgufForm) -> Tokens:
    """The tokenizer in `folder`, which `processor` was loaded from. ExportError where llama.cpp would split texts in another way."""
    file = tokenizer_file(processor, folder)
    content = file.read(processor, folder)
    if file is TOKENIZER:
        parts = content["pre_tokenizer"].get("pretokenizers", ())
        patterns = [part["pattern"].get("Regex") for part in parts if "pattern" in part]
        names = {number: token for token, number in processor.tokenizer.get_vocab().items()}
        added = processor.tokenizer.added_tokens_decoder
        control = frozenset(number for number, token in added.items() if token.special)
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    else:
        patterns = [content["config"]["pattern"]]
        vocab = read_tekken(content).vocab
        added = special_names(processor.tokenizer)
        names = {number: token for token, number in vocab.items()} | added
        control = frozenset(added)
        merges = _all_merges(vocab)
    if patterns != [form.split]:
        raise ExportError(
            f"the tokenizer splits texts by {patterns}, which llama.cpp does not know as {form.pre_tokenizer!r}"
        )
    end = family_of_processor(processor).end_token(processor)
    return Tokens(names, control, frozenset(added) - control, merges, end, processor.tokenizer.pad_token_id)


def _all_merges(vocab: Mapping[str, int]) -> list[str]:
    """Every pair of tokens that makes a token, by the made one's id: how a tekken.json merges (vocabulary/tekken.py)."""
    return [
        f"{token[:cut]} {token[cut:]}"
        for token in sorted(vocab, key=vocab.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
