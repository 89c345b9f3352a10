"""A tekken.json with fewer tokens: on adversarial vocabularies, and on the real one of mistral-common."""

from __future__ import annotations

import base64
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.mini.sentences import everyday
from trimlingual.vocabulary.bpe import choose
from trimlingual.vocabulary.tekken import read_tekken, tekken_ids, trimmed_tekken

mistral_common = pytest.importorskip("mistral_common")
tiktoken = pytest.importorskip("tiktoken")

WHOLE = r"(?s:.+)"  # a text is one word
letters = st.lists(st.text("ab", min_size=1, max_size=14), min_size=1, max_size=4)


def tekken(words: list[str]) -> dict:
    """Bytes and then these words by rank, behind two special tokens."""
    tokens = [bytes([byte]) for byte in range(256)] + [word.encode() for word in dict.fromkeys(words) if len(word) > 1]
    encoded = [base64.b64encode(token).decode() for token in tokens]
    vocab = [{"rank": i, "token_bytes": text, "token_str": None} for i, text in enumerate(encoded)]
    sizes = {"num_vocab_tokens": len(vocab), "default_vocab_size": len(vocab) + 2, "default_num_special_tokens": 2}
    return {"config": {"pattern": WHOLE, **sizes}, "vocab": vocab}


def encoding(made: dict):
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in made["vocab"]}
    return tiktoken.Encoding("test", pat_str=made["config"]["pattern"], mergeable_ranks=ranks, special_tokens={})


@settings(max_examples=400, deadline=None)
@given(st.lists(st.text("ab", min_size=2, max_size=7), max_size=12), letters, letters)
def test_what_is_kept_is_tokenised_as_before(words, counted, others):
    """Ranks in any order, so that many tokens cannot be reached by merging and others along several trees."""
    full = tekken(words)
    before = encoding(full)
    kept = choose(read_tekken(full), Counter(i + 2 for text in counted for i in before.encode(text)), [])
    assert kept.ids[:2] == [0, 1]
    after = encoding(trimmed_tekken(full, kept.ids))
    for text in [*counted, *others]:
        old, new = ([i + 2 for i in one.encode(text)] for one in (before, after))
        assert after.decode([i - 2 for i in new]) == text
        if all(i in kept.new_id for i in old):
            assert new == [kept.new_id[i] for i in old]
    assert all(i in kept.new_id for text in counted for i in (j + 2 for j in before.encode(text)))


def test_the_real_vocabulary(tmp_path):
    """Of 131,072 rows a few thousand say what the built-in sentences say."""
    from transformers.tokenization_mistral_common import MistralCommonBackend

    from trimlingual.models.voxtral import VOCABULARY, processor_of

    shipped = json.loads((Path(mistral_common.__file__).parent / "data" / VOCABULARY).read_text(encoding="utf-8"))
    full = processor_of(shipped["vocab"][:130072], 1000, shipped["config"]["pattern"], tmp_path / "full").tokenizer
    texts = [sentence.de for sentence in everyday(600, seed=3)]
    read = json.loads((tmp_path / "full" / "tekken.json").read_text(encoding="utf-8"))
    bpe = read_tekken(read)
    assert bpe.ids == tekken_ids(full)
    counts = Counter(i for text in texts[:500] for i in full(text, add_special_tokens=False)["input_ids"])
    kept = choose(bpe, counts, [], multiple=64)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "tekken.json").write_text(json.dumps(trimmed_tekken(read, kept.ids)), encoding="utf-8")
    cut = MistralCommonBackend.from_pretrained(tmp_path / "cut")
    assert 1500 < len(cut) < 4000
    unchanged = 0
    for text in texts:
        old, new = (one(text, add_special_tokens=False)["input_ids"] for one in (full, cut))
        assert cut.decode(new) == text
        if all(i in kept.new_id for i in old):
            unchanged += 1
            assert new == [kept.new_id[i] for i in old]
    assert unchanged >= 500
