"""Which tokens may go, and that the rest are as before: on adversarial merge lists and on a real BPE."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from tools.mini.sentences import everyday
from trimlingual.vocabulary.bpe import (
    Kept,
    VocabError,
    choose,
    is_word,
    of_scripts,
    read_bpe,
    script,
    trimmed_tokenizer,
)

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def bare(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def trim(tokenizer: Tokenizer, texts: list[str], **options) -> tuple[Tokenizer, Kept]:
    full = json.loads(tokenizer.to_str())
    counts = Counter(id for text in texts for id in tokenizer.encode(text, add_special_tokens=False).ids)
    kept = choose(read_bpe(full), counts, [], **options)
    return Tokenizer.from_str(json.dumps(trimmed_tokenizer(full, kept.ids))), kept


def check(full: Tokenizer, trimmed: Tokenizer, kept: Kept, text: str) -> bool:
    """The property: same tokens if all are kept, the same text in any case. Whether all were kept."""
    before, after = (t.encode(text, add_special_tokens=False).ids for t in (full, trimmed))
    assert trimmed.decode(after, skip_special_tokens=False) == full.decode(before, skip_special_tokens=False)
    if unchanged := all(id in kept.new_id for id in before):
        assert after == [kept.new_id[id] for id in before]
    return unchanged


@st.composite
def merge_lists(draw) -> list[tuple[str, str]]:
    """Merges in any order that build a few words over two letters, each along several trees."""
    merges: set[tuple[str, str]] = set()

    def build(word: str) -> None:
        if len(word) > 1:
            at = draw(st.integers(1, len(word) - 1))
            merges.add((word[:at], word[at:]))
            build(word[:at])
            build(word[at:])

    for word in draw(st.lists(st.text("ab", min_size=2, max_size=7), min_size=1, max_size=3)):
        for _ in range(draw(st.integers(1, 3))):
            build(word)
    return draw(st.permutations(sorted(merges)))


def tokenizer_of(merges: list[tuple[str, str]]) -> Tokenizer:
    vocab = {token: id for id, token in enumerate(dict.fromkeys([*BYTES, *map("".join, merges)]))}
    return bare(vocab, merges)


letters = st.lists(st.text("ab", min_size=1, max_size=14), min_size=1, max_size=4)


@settings(max_examples=400, deadline=None)
@given(merge_lists(), letters, letters)
def test_texts_of_kept_tokens_keep_their_tokens(merges, counted, others):
    full = tokenizer_of(merges)
    trimmed, kept = trim(full, counted)
    assert all(check(full, trimmed, kept, text) for text in counted)
    for text in others:
        check(full, trimmed, kept, text)


@settings(max_examples=100, deadline=None)
@given(merge_lists(), letters, st.integers(256, 270), st.sampled_from([1, 2, 8]))
def test_any_budget_is_closed_and_exact(merges, texts, budget, multiple):
    full = tokenizer_of(merges)
    budget -= budget % multiple
    trimmed, kept = trim(full, texts, max_tokens=budget, multiple=multiple)
    assert len(kept.ids) <= budget
    assert len(kept.ids) % multiple == 0 or len(kept.ids) == full.get_vocab_size() or kept.num_filled < multiple
    bpe, names = read_bpe(json.loads(full.to_str())), trimmed.get_vocab().keys()
    for token in names:
        assert bpe.merge_tree(token) <= names
    for text in texts:
        check(full, trimmed, kept, text)


def test_closing_is_needed_and_follows_the_tokens_own_merges():
    """`abcd` is made over `bc`, not over `ab` and `cd`, although merges for both ways stand in the list."""
    full = tokenizer_of([("b", "c"), ("a", "b"), ("c", "d"), ("ab", "cd"), ("a", "bc"), ("abc", "d")])
    bpe = read_bpe(json.loads(full.to_str()))
    assert bpe.merge_tree("abcd") == {*"abcd", "bc", "abc", "abcd"}
    trimmed, kept = trim(full, ["abcd"])
    assert check(full, trimmed, kept, "abcd")
    assert (kept.num_used, kept.num_on_the_way, kept.num_filled) == (1, 2, 0)
    assert set(trimmed.get_vocab()) - set(BYTES) == {"bc", "abc", "abcd"}
    bad = [*(full.token_to_id(byte) for byte in BYTES), full.token_to_id("abcd")]  # not closed
    unclosed = Tokenizer.from_str(json.dumps(trimmed_tokenizer(json.loads(full.to_str()), bad)))
    assert unclosed.encode("abcd").tokens == [*"abcd"]


# ---- a BPE of Qwen2's kind, learned on the built-in sentences


@pytest.fixture(scope="module")
def sentences() -> dict[str, list[str]]:
    drawn = everyday(2500, seed=5)
    return {lang: [getattr(sentence, lang) for sentence in drawn] for lang in ("en", "de", "zh")}


@pytest.fixture(scope="module")
def real(sentences) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=6000, min_frequency=1, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([text for texts in sentences.values() for text in texts], trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|AUDIO|>", "\n\n"])
    return tokenizer


@pytest.fixture(scope="module")
def german(real, sentences) -> tuple[Tokenizer, Kept]:
    return trim(real, sentences["de"][:1500], multiple=64)


def test_german_alone(real, german, sentences):
    trimmed, kept = german
    assert len(kept.ids) % 64 == 0
    assert len(kept.ids) < 0.6 * real.get_vocab_size()
    assert all(check(real, trimmed, kept, text) for text in sentences["de"][:1500])
    share = [check(real, trimmed, kept, text) for text in sentences["de"][1500:]]
    assert 0.5 < sum(share) / len(share) < 1
    assert not any([check(real, trimmed, kept, text) for text in sentences["zh"][:200]])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_text_survives(real, german, sentences, data):
    trimmed, kept = german
    words = [word for text in sentences["de"][:300] for word in text.split(" ")]
    pieces = st.one_of(st.sampled_from(words), st.text(max_size=6), st.sampled_from(["<|AUDIO|>", "\n\n", " ", "  "]))
    check(real, trimmed, kept, "".join(data.draw(st.lists(pieces, max_size=12))))


def test_merges_stay_exactly_when_their_parts_do(real, german):
    trimmed, kept = german
    old, new = (json.loads(t.to_str())["model"] for t in (real, trimmed))
    expected = [pair for pair in old["merges"] if {*pair, "".join(pair)} <= new["vocab"].keys()]
    assert new["merges"] == expected
    assert set(BYTES) <= new["vocab"].keys()
    assert list(new["vocab"].values()) == list(range(len(new["vocab"])))
    assert [token["content"] for token in json.loads(trimmed.to_str())["added_tokens"]] == [
        "<|endoftext|>",
        "<|AUDIO|>",
        "\n\n",
    ]
    order = [id for id in kept.ids if real.id_to_token(id) in new["vocab"]]
    assert order == sorted(order)


def test_rare_tokens_go_and_the_budget_takes_the_frequent_ones(real, sentences):
    texts = sentences["de"][:500]
    counts = Counter(id for text in texts for id in real.encode(text).ids)
    _, all_of_them = trim(real, texts)
    _, frequent = trim(real, texts, min_count=5)
    assert {id for id in counts if counts[id] >= 5} <= set(frequent.ids) < set(all_of_them.ids)
    trimmed, budget = trim(real, texts, max_tokens=512, multiple=64)
    assert len(budget.ids) == 512
    assert {id for id, _ in counts.most_common(50)} <= set(budget.ids)
    for text in texts:
        check(real, trimmed, budget, text)
    with pytest.raises(VocabError, match=r"alone are 259 tokens: vocab.max_tokens 64 is too few"):
        trim(real, texts, max_tokens=64)


def test_filled_up_with_real_tokens_until_the_vocabulary_ends(real):
    _, kept = trim(real, ["das"], multiple=1000)
    assert (len(kept.ids), len(set(kept.ids))) == (1000, 1000)
    small = tokenizer_of([("a", "b")])
    _, everything = trim(small, ["ab"], multiple=64)
    assert len(everything.ids) == 257


def scripts(real, ids) -> Counter:
    return Counter(script(real.id_to_token(id)) for id in ids)


def test_a_budget_is_filled_with_the_scripts_that_were_counted(real, sentences):
    """Half of the vocabulary is German and English. Few German sentences, and Latin tokens make up the rest, no Chinese one."""
    texts, unseen = sentences["de"][:20], sentences["de"][1500:]
    _, small = trim(real, texts)
    trimmed, kept = trim(real, texts, max_tokens=2048, multiple=64)
    assert len(kept.ids) == len(set(kept.ids)) == 2048
    assert set(small.ids) < set(kept.ids)
    added = scripts(real, set(kept.ids) - set(small.ids))
    assert set(added) <= {"LATIN", "common"}
    assert added["LATIN"] > 10 * added["common"]
    assert not any([check(real, trimmed, kept, text) for text in sentences["zh"][:100]])
    by_order = sorted({*small.ids, *sorted(json.loads(real.to_str())["model"]["vocab"].values())[:2048]})
    plain = Kept(by_order, 0, 0, 0)
    share = [check(real, trimmed, kept, text) for text in unseen]
    without = [set(real.encode(text, add_special_tokens=False).ids) <= set(plain.ids) for text in unseen]
    assert sum(share) > sum(without)


def test_scripts_are_added_in_the_proportion_in_which_they_were_counted(real, sentences):
    both = [*sentences["zh"][:60], *sentences["de"][:5]]
    counts = Counter(id for text in both for id in real.encode(text, add_special_tokens=False).ids)
    seen, order = scripts(real, counts), of_scripts(read_bpe(json.loads(real.to_str())), counts)
    first = scripts(real, order[:600])
    for name in ("CJK", "LATIN"):
        assert first[name] / 600 == pytest.approx(seen[name] / seen.total(), abs=0.03)
    han = [id for id in order if script(real.id_to_token(id)) == "CJK"]
    words = [is_word(real.id_to_token(id)) for id in han]
    assert han == [*sorted(han[: sum(words)]), *sorted(han[sum(words) :])]
    assert words == sorted(words, reverse=True)


def test_a_budget_beyond_the_scripts_is_filled_all_the_same(real, sentences):
    num_han = scripts(real, range(real.get_vocab_size()))["CJK"]
    _, kept = trim(real, sentences["zh"][:50], max_tokens=5120, multiple=64)
    assert len(kept.ids) == 5120
    assert scripts(real, kept.ids)["CJK"] == num_han
    _, everything = trim(real, sentences["zh"][:50], max_tokens=64_000, multiple=64)
    assert len(everything.ids) == real.get_vocab_size()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Ġgrößer", "LATIN"), ("grÃ¶ÃŁer", "LATIN"), ("çļĦ", "CJK"), ("Ġ(", "common"), ("123", "common"), ("çļ", None)],
)
def test_script_of_a_token(text, expected):
    if text == "Ġgrößer":  # as a word, to be spelled in bytes
        text = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(" größer")[0][0]
    assert script(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Haus", True),
        ("größer", True),
        ("狗", True),
        ("नमस्ते", True),
        ("getElement", False),
        ("(self", False),
        ("DER", False),
        (" ", False),
    ],
)
def test_words_and_names_from_code(text, expected):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert is_word(byte_level.pre_tokenize_str(text)[0][0]) is expected


def test_post_processor_is_renumbered(real):
    full = json.loads(real.to_str())
    end = real.token_to_id("<|endoftext|>")
    full["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [end], "tokens": ["<|endoftext|>"]}},
    }
    trimmed, kept = trim(Tokenizer.from_str(json.dumps(full)), ["das Haus"])
    assert trimmed.encode("das Haus").ids[-1] == kept.new_id[end]


def test_other_kinds_of_tokenizer_are_refused():
    words = json.loads(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str())
    with pytest.raises(VocabError, match="not a byte-level BPE"):
        read_bpe(words)
    characters = json.loads(Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).to_str())
    with pytest.raises(VocabError, match="not a byte-level BPE"):
        read_bpe(characters)
    full = json.loads(tokenizer_of([("a", "b")]).to_str())
    with pytest.raises(VocabError, match="dropout"):
        read_bpe({**full, "model": {**full["model"], "dropout": 0.1}})


def test_merge_tree_against_the_library(real):
    """What a token is made of, by trimming to it alone: every token still forms."""
    bpe = read_bpe(json.loads(real.to_str()))
    for token in [*bpe.vocab][256::151]:
        tree = bpe.merge_tree(token)
        assert tree <= bpe.vocab.keys()
        assert any((left, right) in bpe.ranks for left, right in pairwise(token)) or len(token) == 1
        kept = sorted(bpe.byte_ids() | {bpe.vocab[part] for part in tree})
        alone = Tokenizer.from_str(
            json.dumps(trimmed_tokenizer(json.loads(real.to_str()), [*kept, *bpe.added.values()]))
        )
        alone.pre_tokenizer = None
        alone.normalizer = None
        assert alone.encode(token).tokens == [token]
