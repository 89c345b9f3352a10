from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trimlingual.data.rows import MINI_DATA
from trimlingual.data.sources import Clip
from trimlingual.data.splits import Split
from trimlingual.decoding.translate_clips import Translation
from trimlingual.evaluation.answers import is_wrong_language, strict, wrong_languages
from trimlingual.evaluation.quality import MetricError, corpus_score
from trimlingual.recipe import EvaluateSettings, RecipeError, languages, parse_recipe
from trimlingual.recipe.languages import LANGUAGES, alike, count_scripts, language, language_name, primary
from trimlingual.stages.evaluate import _write_and_score

from .test_recipe import MINIMAL


@pytest.fixture(scope="module")
def texts():
    """Every sentence of the built-in speech, by language."""
    rows = [json.loads(line) for path in sorted(MINI_DATA.glob("*.jsonl")) for line in path.read_bytes().splitlines()]
    found = {code: {row["references"][code] for row in rows} for code in ("de", "zh")} | {
        "en": {row["source"] for row in rows}
    }
    return {code: sorted(each) for code, each in found.items()}


def test_the_table_is_whole():
    for code, entry in LANGUAGES.items():
        assert primary(code) == code
        assert entry.name
        assert entry.scripts
        assert entry.main_metric in ("chrf", "chrfpp")
        assert (entry.bleu_tokenizer == "13a") == (entry.spaced and code != "ko"), code
    assert len({entry.name for entry in LANGUAGES.values()}) == len(LANGUAGES)
    assert not set(languages.ALIASES) & set(LANGUAGES)
    assert set(languages.ALIASES.values()) <= set(LANGUAGES)


def test_a_tokenizer_that_is_missing_is_named_and_all_others_are_there():
    for code, entry in LANGUAGES.items():
        if entry.needs and importlib.util.find_spec("MeCab") is None:
            with pytest.raises(MetricError, match=re.escape(f"pip install '{entry.needs}'")):
                corpus_score("bleu", ["a b c d e"], ["a b c d e"], code)
        elif not entry.needs:
            assert corpus_score("bleu", ["a b c d e"], ["a b c d e"], code).value == pytest.approx(100)


@pytest.mark.parametrize("code", ["zh-TW", "zh_HK", "cmn_hans_cn", "ZH", "zh-Hant-TW"])
def test_regions_follow_their_language(code):
    assert language(code) is LANGUAGES["zh"]
    assert language(code).main_metric == "chrf"
    assert "zh" in corpus_score("bleu", ["我们训练模型。"], ["我们训练模型。"], code).signature


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("pt-BR", "Brazilian Portuguese"),
        ("zh-Hant-TW", "Traditional Chinese"),
        ("zh-CN", "Chinese"),
        ("fr-CA", "French"),
        ("nb", "Norwegian"),
        ("tlh", None),
    ],
)
def test_names_with_a_region(code, name):
    assert language_name(code) == name


def test_a_region_can_be_asked_for_and_named_in_the_recipe():
    task = {"target_languages": ["zh-TW", "pt-BR", "tlh"], "language_names": {"tlh": "Klingon", "zh-TW": "Taiwanese"}}
    recipe = parse_recipe({**MINIMAL, "task": task, "rank": None, "recover": None, "quantize": {"start": "teacher"}})
    assert recipe.task.prompt_for("zh-TW") == "Translate the English speech into Taiwanese:"
    assert recipe.task.prompt_for("pt-BR") == "Translate the English speech into Brazilian Portuguese:"
    assert recipe.task.prompt_for("tlh") == "Translate the English speech into Klingon:"


def test_braces_in_the_prompt_are_text():
    prompt = 'Return {"text": ...} in {language}, {language}! {}'
    recipe = parse_recipe({**MINIMAL, "task": {"target_languages": ["de"], "prompt": prompt}})
    assert recipe.task.prompt_for("de") == 'Return {"text": ...} in German, German! {}'
    with pytest.raises(RecipeError, match=r"must contain {language}"):
        parse_recipe({**MINIMAL, "task": {"target_languages": ["de"], "prompt": "Into {{lang}}:"}})


def test_scripts_are_counted_by_words_or_letters():
    assert count_scripts("Wir haben's gemessen: 3 mm.") == {"LATIN": 4}
    assert count_scripts("我们用 BERT 模型。") == {"HAN": 5, "LATIN": 1}
    assert count_scripts("モデルを学習します") == {"KATAKANA": 3, "HIRAGANA": 4, "HAN": 2}
    assert count_scripts("") == {}


def test_no_built_in_reference_is_held_to_be_in_another_language(texts):
    for code, each in texts.items():
        assert len(each) >= 500
        assert not any(wrong_languages(each, code)), code


def test_answers_in_another_language_are_found(texts):
    """The rates that docs/method.md gives."""
    share = {
        (spoken, asked): sum(wrong_languages(texts[spoken], asked)) / len(texts[spoken])
        for spoken in texts
        for asked in texts
        if spoken != asked
    }
    assert all(share[spoken, asked] == 1 for spoken, asked in share if "zh" in (spoken, asked)), share
    assert share["en", "de"] >= 0.97
    assert share["de", "en"] >= 0.99


@pytest.mark.parametrize(
    ("text", "asked", "wrong"),
    [
        ("", "de", False),
        ("OK.", "zh", False),
        ("Deep Learning und Machine Learning.", "de", False),
        ("我们使用 BERT, GPT 和 T5 模型。", "zh", False),
        ("我们使用 BERT, GPT 和 T5 模型。", "zh-TW", False),
        ("我们使用 BERT 模型。", "de-AT", True),
        ("昨日、新しい方法を試しました。", "zh", True),
        ("我们昨天尝试了一种新的方法，结果非常好。", "ja", True),
        ("Вчера мы попробовали новый метод.", "de", True),
        ("Вчера мы попробовали новый метод.", "sr", True),
        ("Sí, ayer probamos un método nuevo y funcionó.", "de", True),
        ("Anything at all goes here.", "tlh", False),
    ],
)
def test_single_answers(text, asked, wrong):
    assert is_wrong_language(text, asked) is wrong


def test_alike_languages_are_not_told_apart():
    assert alike("zh-TW", "zh")
    assert alike("nb", "no")
    assert alike("id", "ms")
    assert not alike("de", "nl")


def test_a_strict_score_counts_wrong_answers_as_nothing():
    assert strict(["gut", "good"], [False, True]) == ["gut", ""]


def test_the_table_needs_nothing_heavy():
    code = "import sys, trimlingual.recipe; print(sorted({'torch', 'numpy', 'py3langid'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_evaluation_counts_answers_in_the_wrong_language(tmp_path):
    said = ["Das Modell ist sehr klein und schnell.", "The model is very small and quick to run."]
    clips = [Clip(str(i), Path("x"), {"de": said[0]}, None, 1.0, "0") for i in range(2)]
    rows = [Translation(str(i), "de", text, 9, False) for i, text in enumerate(said)]
    scores = _write_and_score("de", rows, Split("test", tuple(clips)), EvaluateSettings(), None, tmp_path)
    assert scores["wrong_language"] == {"count": 1, "share": 0.5}
    assert scores["strict"]["metric"] == "chrfpp"
    assert scores["strict"]["signature"] == scores["chrfpp"]["signature"]
    assert scores["strict"]["value"] < scores["chrfpp"]["value"]
