"""Scores equal sacreBLEU's; statistics can be summed; bad input is refused; COMET stays in its own process."""

import json
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from trimlingual.evaluation import quality
from trimlingual.evaluation.quality import (
    METRICS,
    MetricError,
    comet,
    corpus_score,
    paired_bootstrap_difference,
    paired_bootstrap_ratio,
    scores_from_sums,
    sentence_statistics,
)

# Few words and letters, so that n-grams match by chance; Chinese, punctuation, an apostrophe and nothing at all among
# them.
WORDS = ["der", "die", "das", "Haus", "haus,", "(hi)", "¿", "a", "翻译", "模型", "，", "0.5", "don't", "."]
sentences = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
corpora = st.lists(st.tuples(sentences, sentences), min_size=1, max_size=8)


def sacrebleu_scorer(metric: str, language: str):
    if metric == "bleu":
        return BLEU(tokenize="zh" if language == "zh" else "13a")
    return CHRF(word_order=2 if metric == "chrfpp" else 0)


def random_corpus(num_sentences: int, seed: int, noise: float) -> tuple[list[str], list[str]]:
    """References, and hypotheses with a share `noise` of the words changed."""
    random = np.random.default_rng(seed)
    references = [[str(w) for w in random.choice(WORDS, size=random.integers(4, 15))] for _ in range(num_sentences)]
    hypotheses = [[str(random.choice(WORDS)) if random.random() < noise else w for w in r] for r in references]
    return [" ".join(h) for h in hypotheses], [" ".join(r) for r in references]


@pytest.mark.parametrize("language", ["de", "zh"])
@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=150, deadline=None)
@given(corpus=corpora)
def test_score_of_summed_statistics_is_sacrebleus(metric, language, corpus):
    hypotheses, references = ([pair[side] for pair in corpus] for side in (0, 1))
    scorer = sacrebleu_scorer(metric, language)
    expected = scorer.corpus_score(hypotheses, [references]).score
    statistics = sentence_statistics(metric, hypotheses, references, language)
    assert statistics.score() == pytest.approx(expected, abs=1e-9)
    assert statistics.signature == str(scorer.get_signature())
    assert corpus_score(metric, hypotheses, references, language).value == expected


@pytest.mark.parametrize("metric", METRICS)
def test_rows_and_weights_score_the_chosen_sentences(metric):
    hypotheses, references = random_corpus(30, seed=1, noise=0.5)
    statistics = sentence_statistics(metric, hypotheses, references, "de")
    rows = np.array([3, 3, 7, 29, 0])
    chosen = [hypotheses[i] for i in rows], [references[i] for i in rows]
    expected = corpus_score(metric, *chosen, "de").value
    assert statistics.score(rows) == pytest.approx(expected, abs=1e-9)
    weights = np.bincount(rows, minlength=30)
    assert statistics.scores(weights[None])[0] == pytest.approx(expected, abs=1e-9)
    assert scores_from_sums(metric, (weights @ statistics.counts)[None])[0] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_perfect_and_empty_translations(metric):
    references = ["Das Haus am See ist heute wieder leer.", "Ein zweiter Satz mit genug Wörtern."]
    assert sentence_statistics(metric, references, references, "de").score() == pytest.approx(100)
    assert sentence_statistics(metric, ["", ""], references, "de").score() == 0
    assert sentence_statistics(metric, ["", ""], ["", ""], "de").score() == 0


def test_chinese_bleu_uses_the_zh_tokenizer_and_says_so():
    hypotheses, references = ["我们压缩了模型。"], ["我们压缩模型。"]
    chinese = corpus_score("bleu", hypotheses, references, "zh")
    assert "tok:zh" in chinese.signature
    assert chinese.value > 10
    assert corpus_score("bleu", hypotheses, references, "zh-CN") == chinese
    assert "tok:13a" in corpus_score("bleu", hypotheses, references, "de").signature
    assert "tok:char" in corpus_score("bleu", ["สวัสดี"], ["สวัสดี"], "th").signature


def test_a_tokenizer_that_is_not_installed_is_named(monkeypatch):
    # As sacreBLEU behaves without its [ja] extra, whether or not the machine has it.
    def missing(tokenize):
        raise RuntimeError("no mecab")

    monkeypatch.setattr(quality, "BLEU", missing)
    with pytest.raises(MetricError, match=r"ja-mecab tokenizer.*pip install 'sacrebleu\[ja\]'"):
        corpus_score("bleu", ["家"], ["家"], "ja")


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        (["a", "b"], ["a"], "2 hypotheses, 1 references"),
        ([], [], "0 sentences"),
        (["a", None], ["a", "b"], r"hypotheses\[1\] is None"),
        (["a"], [None], r"references\[0\] is None"),
        ("a", ["a"], "hypotheses must be a list of texts"),
    ],
)
def test_what_cannot_be_scored_is_refused(hypotheses, references, message):
    for function in (corpus_score, sentence_statistics):
        with pytest.raises(MetricError, match=message):
            function("chrf", hypotheses, references, "de")


def test_unknown_metric_and_empty_selection():
    with pytest.raises(MetricError, match="'ter' is unknown; choose one of bleu, chrf, chrfpp"):
        corpus_score("ter", ["a"], ["a"], "de")
    statistics = sentence_statistics("chrf", ["a"], ["a"], "de")
    with pytest.raises(MetricError, match="no sentences"):
        statistics.score([])
    with pytest.raises(MetricError, match="shape"):
        statistics.scores(np.ones((2, 2)))


@pytest.mark.parametrize("metric", METRICS)
def test_paired_difference_has_sacrebleus_p_value(metric, monkeypatch):
    monkeypatch.setenv("SACREBLEU_SEED", "12345")
    baseline, references = random_corpus(60, seed=2, noise=0.3)
    candidate, _ = random_corpus(60, seed=2, noise=0.35)
    scorer = sacrebleu_scorer(metric, "de")
    _, table = PairedTest([("base", baseline), ("new", candidate)], {"m": scorer}, [references], "bs", 500)()
    (theirs,) = [results[1] for name, results in table.items() if name != "System"]
    pair = [sentence_statistics(metric, texts, references, "de") for texts in (candidate, baseline)]
    interval, p_value = paired_bootstrap_difference(*pair, num_samples=500)
    assert p_value == pytest.approx(theirs.p_value, abs=1e-12)
    assert interval.low <= interval.value <= interval.high


def test_resamples_do_not_depend_on_the_chunk_size(monkeypatch):
    baseline, references = random_corpus(40, seed=3, noise=0.3)
    candidate, _ = random_corpus(40, seed=3, noise=0.4)
    pair = [sentence_statistics("chrfpp", texts, references, "de") for texts in (candidate, baseline)]
    whole = paired_bootstrap_ratio(*pair)
    monkeypatch.setattr(quality, "_CHUNK_CELLS", 40 * 7)
    assert paired_bootstrap_ratio(*pair) == whole


def test_ratio_interval_is_the_textbook_loop():
    baseline, references = random_corpus(25, seed=4, noise=0.2)
    candidate, _ = random_corpus(25, seed=4, noise=0.4)
    pair = [sentence_statistics("chrf", texts, references, "de") for texts in (candidate, baseline)]
    random = np.random.default_rng(9)
    ratios = []
    for rows in random.choice(25, size=(200, 25), replace=True):
        corpora_ = [corpus_score("chrf", [t[i] for i in rows], [references[i] for i in rows], "de").value
                    for t in (candidate, baseline)]  # fmt: skip
        ratios.append(corpora_[0] / corpora_[1])
    found = paired_bootstrap_ratio(*pair, num_samples=200, seed=9)
    assert found.value == pytest.approx(pair[0].score() / pair[1].score())
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(ratios, [2.5, 97.5])), abs=1e-9)
    assert (found.num_samples, found.confidence) == (200, 0.95)


def test_a_system_keeps_all_of_itself():
    hypotheses, references = random_corpus(20, seed=5, noise=0.3)
    same = sentence_statistics("chrfpp", hypotheses, references, "de")
    interval = paired_bootstrap_ratio(same, same)
    assert (interval.value, interval.low, interval.high) == (1, 1, 1)
    difference, p_value = paired_bootstrap_difference(same, same)
    assert (difference.low, difference.high) == (0, 0)
    assert p_value == 1  # sacreBLEU says 1 / (samples + 1)


def test_p_value_of_ties():
    """Other sentences, equal scores: nothing speaks for a difference. One sentence better among many: hardly anything."""
    _, references = random_corpus(40, seed=6, noise=0.3)
    ours, theirs = list(references), list(references)
    ours[3], theirs[5], references[5] = "etwas anderes", "etwas anderes", references[3]
    ours[5] = references[5]
    theirs[3] = references[3]
    tie = [sentence_statistics("chrf", texts, references, "de") for texts in (ours, theirs)]
    assert tie[0].counts.tolist() != tie[1].counts.tolist()
    difference, p_value = paired_bootstrap_difference(*tie)
    assert (difference.value, p_value) == (pytest.approx(0, abs=1e-9), 1)
    assert difference.low < 0 < difference.high
    better = sentence_statistics("chrf", references, references, "de")
    assert 0.05 < paired_bootstrap_difference(better, tie[0])[1] < 0.5


def test_a_ratio_to_nothing_is_refused_and_empty_resamples_are_left_out():
    references = ["ein Haus", "ein Baum", "ein See"]
    good = sentence_statistics("chrf", references, references, "de")
    nothing = sentence_statistics("chrf", ["", "", ""], references, "de")
    with pytest.raises(MetricError, match="baseline's chrf is 0"):
        paired_bootstrap_ratio(good, nothing)
    one = sentence_statistics("chrf", ["", "ein Baum", ""], references, "de")
    interval = paired_bootstrap_ratio(one, one)
    assert 0 < interval.num_samples < 1000
    assert interval.low == interval.high == 1


def test_only_the_same_sentences_can_be_paired():
    hypotheses, references = random_corpus(10, seed=6, noise=0.3)
    statistics = sentence_statistics("chrf", hypotheses, references, "de")
    turned = sentence_statistics("chrf", hypotheses[::-1], references[::-1], "de")
    with pytest.raises(MetricError, match="different references, or in another order"):
        paired_bootstrap_ratio(statistics, turned)
    with pytest.raises(MetricError, match="one metric"):
        paired_bootstrap_ratio(statistics, sentence_statistics("chrfpp", hypotheses, references, "de"))
    with pytest.raises(MetricError, match="num_samples is 0"):
        paired_bootstrap_ratio(statistics, statistics, num_samples=0)


# unbabel-comet cannot be installed beside our libraries, so these test our side of the process boundary: a stand-in
# that checks the arguments and files it is given and writes what comet-score of unbabel-comet 2.2 writes (read in its
# source, cli/score.py).
FAKE_COMET = """#!{python}
import json, os, sys
arguments = sys.argv[1:]
value = lambda name: arguments[arguments.index(name) + 1]
if value("--model") == "broken":
    sys.exit("Traceback\\nKeyError: Model 'broken' not supported by COMET.")
assert "PYTHONPATH" not in os.environ
assert "--quiet" in arguments and "--only_system" in arguments and value("--gpus") in ("0", "1")
texts = [[line.strip() for line in open(value(name), encoding="utf-8")] for name in ("-s", "-t", "-r")]
assert texts == {texts!r}, texts
if value("--model") == "short":
    texts = [column[:1] for column in texts]
rows = [dict(src=s, mt=t, ref=r, COMET=0.25 + i) for i, (s, t, r) in enumerate(zip(*texts))]
print(value("-t") + "\\tscore: {{:.4f}}".format(sum(r["COMET"] for r in rows) / len(rows)))
json.dump({{value("-t"): rows}}, open(value("--to_json"), "w"))
"""
COMET_TEXTS = {
    "sources": ["a house", "a line"],
    "references": ["ein Haus", "eine Zeile"],
    "hypotheses": ["", "eine\nZeile\u2028 mehr"],
}


@pytest.fixture
def comet_python(tmp_path, monkeypatch) -> Path:
    """The python of a make-believe environment with a comet-score in it."""
    monkeypatch.delenv(quality.COMET_PYTHON_VARIABLE, raising=False)
    monkeypatch.setenv("PYTHONPATH", "src")
    script = tmp_path / "env" / "bin" / "comet-score"
    script.parent.mkdir(parents=True)
    seen = [["a house", "a line"], ["", "eine Zeile mehr"], ["ein Haus", "eine Zeile"]]
    script.write_text(FAKE_COMET.format(python=sys.executable, texts=seen), encoding="utf-8")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script.with_name("python")


def test_comet_runs_in_the_environment_it_is_given(comet_python, monkeypatch):
    assert comet("Unbabel/wmt22-comet-da", **COMET_TEXTS, python=comet_python) == pytest.approx(0.75)
    monkeypatch.setenv(quality.COMET_PYTHON_VARIABLE, str(comet_python))
    assert comet("Unbabel/wmt22-comet-da", **COMET_TEXTS) == pytest.approx(0.75)


def test_comet_is_found_on_path(comet_python, monkeypatch):
    monkeypatch.setenv("PATH", str(comet_python.parent) + os.pathsep + os.environ["PATH"])
    assert comet("Unbabel/wmt22-comet-da", **COMET_TEXTS) == pytest.approx(0.75)


def test_comet_failures_are_told(comet_python):
    with pytest.raises(MetricError, match=r"ended with code 1 for model 'broken'.*not supported by COMET"):
        comet("broken", **COMET_TEXTS, python=comet_python)
    with pytest.raises(MetricError, match="1 segments of 2"):
        comet("short", **COMET_TEXTS, python=comet_python)
    with pytest.raises(MetricError, match="no comet-score beside it"):
        comet("m", **COMET_TEXTS, python=comet_python.parent.parent / "python")
    with pytest.raises(MetricError, match="1 sources, 2 references"):
        comet("m", ["a"], COMET_TEXTS["references"], COMET_TEXTS["hypotheses"], python=comet_python)


def test_comet_that_is_not_there_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.delenv(quality.COMET_PYTHON_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MetricError, match=r"^[^\n]*comet-env/bin/pip install unbabel-comet[^\n]*$") as caught:
        comet("m", **COMET_TEXTS)
    assert quality.COMET_PYTHON_VARIABLE in str(caught.value)


def test_comet_json_of_another_form(tmp_path):
    path = tmp_path / "scores.json"
    for content in ("{}", "[1]", json.dumps({"h": [{"score": 1}]}), "no"):
        path.write_text(content)
        with pytest.raises(MetricError, match="another form"):
            quality._read_comet_scores(path, 1)
