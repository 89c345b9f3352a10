"""Translation quality: BLEU, chrF, chrF++ with their sacreBLEU signatures, paired bootstrap, and COMET at arm's length.

Every number comes from sacreBLEU (Post 2018). Its corpus metrics are functions of sums of per-sentence counts, so the
counts are taken once (`sentence_statistics`) and any subset or resample of the corpus is scored by summing rows,
thousands at a time. What is public in sacreBLEU is used as such: the metric classes and their signatures. Two pieces
are not public there: extracting the counts (`Metric._extract_corpus_statistics`, which sacreBLEU's own significance
tests use in the same way) and scoring many sums at once (`scores_from_sums`, the formulas of `BLEU.compute_bleu` and
`CHRF._compute_f_score` on arrays). Tests hold both to sacreBLEU's `corpus_score` within 1e-9.

Units: BLEU, chrF and chrF++ run from 0 to 100; COMET is on its model's own scale. Shapes: N sentences, K counts, B
resamples.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from trimlingual.recipe import languages

METRICS = ("bleu", "chrf", "chrfpp")
COMET_PYTHON_VARIABLE = "TRIMLINGUAL_COMET_PYTHON"
_BLEU_ORDER = 4
_CHRF_BETA = 2
_TIE = 1e-9  # scores closer than this are equal: sums in another order differ as much
_CHUNK_CELLS = 1 << 22  # resample weights held at once: 32 MB of float64


class MetricError(ValueError):
    """Texts that cannot be scored, or a metric that is not there; the message says what to do."""


@dataclass(frozen=True)
class Score:
    """A corpus score and the sacreBLEU signature without which it means little."""

    metric: str
    value: float
    signature: str


@dataclass(frozen=True)
class Interval:
    """A value on the whole corpus with a percentile bootstrap interval from `num_samples` resamples."""

    value: float
    low: float
    high: float
    num_samples: int
    confidence: float = 0.95


@dataclass(frozen=True)
class SentenceStatistics:
    """Sufficient statistics of one corpus: row n holds the integer counts of sentence n, shape (N, K).

    Columns: BLEU `[hypothesis length, reference length, matches of 1..4-grams, hypothesis 1..4-grams]`; chrF and chrF++
    triplets `[hypothesis, reference, matches]` for character orders 1..6, then (chrF++) word orders 1 and 2.
    """

    metric: str
    counts: np.ndarray
    signature: str

    def __len__(self) -> int:
        return len(self.counts)

    def score(self, rows: np.ndarray | Sequence[int] | None = None) -> float:
        """Corpus score (0..100) of all sentences, or of those at the given indices (repeats count again)."""
        counts = self.counts if rows is None else self.counts[np.asarray(rows, dtype=np.intp)]
        if len(counts) == 0:
            raise MetricError(f"{self.metric} of no sentences is undefined")
        return float(scores_from_sums(self.metric, counts.sum(axis=0)[None])[0])

    def scores(self, weights: np.ndarray) -> np.ndarray:
        """Corpus scores (B,) for `weights` (B, N): how often each sentence stands in each resample."""
        weights = np.asarray(weights)
        if weights.ndim != 2 or weights.shape[1] != len(self):
            raise MetricError(f"weights must have shape (resamples, {len(self)}), not {weights.shape}")
        # float64 is exact for whole numbers below 2^53, and its matrix product is the fast one.
        return scores_from_sums(self.metric, weights.astype(np.float64) @ self.counts.astype(np.float64))

    @property
    def reference_columns(self) -> np.ndarray:
        """The counts that depend on the references alone: equal for two systems scored on the same sentences."""
        return self.counts[:, 1:2] if self.metric == "bleu" else self.counts[:, 1::3]


def sentence_statistics(
    metric: str, hypotheses: Sequence[str], references: Sequence[str], language: str
) -> SentenceStatistics:
    """Count what `metric` needs for each sentence, against one reference each.

    Raises MetricError for an unknown metric, lists that differ in length, empty lists, and anything that is not text
    (sacreBLEU itself scores 2 hypotheses against 1 reference without a word).
    """
    _check_texts(hypotheses=hypotheses, references=references)
    scorer = _scorer(metric, language)
    scorer.num_refs = 1
    counts = [
        scorer._compute_segment_statistics(
            scorer._preprocess_segment(text), _reference_ngrams(metric, language, reference)
        )
        for text, reference in zip(hypotheses, references)
    ]
    return SentenceStatistics(metric, np.asarray(counts, dtype=np.int64), str(scorer.get_signature()))


@lru_cache(maxsize=1000)  # the layer search scores against the same references thousands of times
def _reference_ngrams(metric: str, language: str, reference: str) -> dict[str, Any]:
    """What sacreBLEU counts in a reference."""
    scorer = _scorer(metric, language)
    return scorer._extract_reference_info([scorer._preprocess_segment(reference)])


def corpus_score(metric: str, hypotheses: Sequence[str], references: Sequence[str], language: str) -> Score:
    """sacreBLEU's own corpus score, 0..100. Raises MetricError as `sentence_statistics` does."""
    _check_texts(hypotheses=hypotheses, references=references)
    scorer = _scorer(metric, language)
    value = scorer.corpus_score(list(hypotheses), [list(references)]).score
    return Score(metric, float(value), str(scorer.get_signature()))


def scores_from_sums(metric: str, sums: np.ndarray) -> np.ndarray:
    """Corpus scores (B,) from summed counts (B, K), laid out as in `SentenceStatistics`."""
    sums = np.asarray(sums, dtype=np.float64)
    _check_metric(metric)
    return _bleu_from_sums(sums) if metric == "bleu" else _chrf_from_sums(sums)


def bootstrap_score(statistics: SentenceStatistics, num_samples: int = 1000, seed: int = 12345) -> Interval:
    """A system's score on resampled sentences (Koehn 2004), 95 % percentile interval. Two systems are compared by paired ones."""
    sampled = np.concatenate([statistics.scores(w) for w in _resamples(len(statistics), num_samples, seed)])
    return _percentile_interval(statistics.score(), sampled)


def paired_bootstrap_ratio(
    candidate: SentenceStatistics, baseline: SentenceStatistics, num_samples: int = 1000, seed: int = 12345
) -> Interval:
    """Candidate's score over baseline's, both on the same resampled sentences (Koehn 2004), 95 % percentile interval.

    A resample in which the baseline scores 0 has no ratio and is left out, so `num_samples` of the result may be
    smaller than asked. Raises MetricError if the two were not scored on the same sentences, or if the baseline scores 0
    on the whole corpus.
    """
    _check_pair(candidate, baseline)
    whole = baseline.score()
    if whole == 0:
        raise MetricError(f"the baseline's {baseline.metric} is 0: a share of it is undefined")
    pairs = [(candidate.scores(w), baseline.scores(w)) for w in _resamples(len(baseline), num_samples, seed)]
    top, bottom = (np.concatenate(side) for side in zip(*pairs))
    ratios = top[bottom > 0] / bottom[bottom > 0]
    return _percentile_interval(candidate.score() / whole, ratios)


def paired_bootstrap_difference(
    candidate: SentenceStatistics | Sequence[SentenceStatistics],
    baseline: SentenceStatistics | Sequence[SentenceStatistics],
    num_samples: int = 1000,
    seed: int = 12345,
) -> tuple[Interval, float]:
    """Candidate's score minus baseline's with a 95 % interval, and the two-sided p-value of sacreBLEU's `--paired-bs`.

    Given several statistics a side (one a target language, over the same clips in the same order), the score is their mean. The
    p-value is that of `sacrebleu.significance._paired_bs_test` (after Moses): how often the absolute difference of
    a resample, less the mean of all, reaches the real one, with one added above and below. Same seed, same resamples,
    same p as sacreBLEU, but for ties: sacreBLEU counts strictly greater differences only, which gives two equal systems
    the smallest p there is. Here a resample that equals the real difference counts, and p is 1 when the scores are
    equal. Raises MetricError if the two were not scored on the same sentences.
    """
    one, other = ([side] if isinstance(side, SentenceStatistics) else list(side) for side in (candidate, baseline))
    for pair in zip(one, other, strict=True):
        _check_pair(*pair)
    if len({len(statistics) for statistics in one}) != 1:
        raise MetricError("the languages were scored on different numbers of clips: they cannot be resampled together")

    def difference(score: Callable[[SentenceStatistics], Any]) -> Any:
        return sum(score(a) - score(b) for a, b in zip(one, other)) / len(one)

    real = difference(lambda statistics: statistics.score())
    resamples = _resamples(len(one[0]), num_samples, seed)
    sampled = np.concatenate([difference(partial(SentenceStatistics.scores, weights=w)) for w in resamples])
    centred = np.abs(sampled) - np.abs(sampled).mean()
    reached = len(sampled) if abs(real) <= _TIE else int(np.sum(centred >= abs(real) - _TIE))
    p_value = (reached + 1) / (len(sampled) + 1)
    return _percentile_interval(real, sampled), p_value


def comet(
    model: str,
    sources: Sequence[str],
    references: Sequence[str],
    hypotheses: Sequence[str],
    *,
    python: Path | None = None,
) -> float:
    """Mean segment score of a COMET model (Rei et al. 2020), e.g. `Unbabel/wmt22-comet-da`, on that model's own scale.

    unbabel-comet pins libraries older than ours, so its `comet-score` command runs in an environment of its own: that
    of `python`, else of the interpreter named by TRIMLINGUAL_COMET_PYTHON, else the one on PATH. Raises MetricError if
    there is none, if it fails, or if it scored another number of segments than it was given.
    """
    _check_texts(sources=sources, references=references, hypotheses=hypotheses)
    command = _comet_command(python)
    with tempfile.TemporaryDirectory(prefix="trimlingual-comet-") as folder:
        paths = {}
        for name, texts in (("sources", sources), ("hypotheses", hypotheses), ("references", references)):
            paths[name] = Path(folder, f"{name}.txt")
            # comet-score reads a segment a line: a line break inside a translation would shift all that follow.
            paths[name].write_text("".join(" ".join(t.split()) + "\n" for t in texts), encoding="utf-8")
        output = Path(folder, "scores.json")
        arguments = ["-s", paths["sources"], "-t", paths["hypotheses"], "-r", paths["references"], "--model", model]
        options = ["--quiet", "--only_system", "--gpus", "1" if _has_cuda() else "0", "--to_json", output]
        # Our own PYTHONPATH must not leak into the other environment.
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        finished = subprocess.run(
            [str(part) for part in (command, *arguments, *options)],
            env=environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        if finished.returncode != 0 or not output.is_file():
            said = (finished.stderr.strip() or finished.stdout.strip() or "nothing").splitlines()[-1]
            raise MetricError(f"{command} ended with code {finished.returncode} for model {model!r}; it said: {said}")
        return _read_comet_scores(output, len(hypotheses))


@lru_cache
def _scorer(metric: str, language: str) -> Any:
    """sacreBLEU's metric object: default settings but for the tokenizer and the word order."""
    _check_metric(metric)
    if metric == "chrf":
        return CHRF(word_order=0)
    if metric == "chrfpp":
        return CHRF(word_order=2)
    # BLEU counts words, so the words must be found as the field finds them.
    tokenizer, needs = languages.language(language).bleu_tokenizer, languages.language(language).needs
    try:
        return BLEU(tokenize=tokenizer)
    except (RuntimeError, ImportError) as error:
        raise MetricError(
            f"BLEU for {language!r} needs the {tokenizer} tokenizer, which is not installed; pip install '{needs or 'sacrebleu'}'"
        ) from error


def bleu_problem(language: str) -> str | None:
    """What stops BLEU from being computed in a language: its tokenizer is not installed."""
    try:
        _scorer("bleu", language)
    except MetricError as error:
        return str(error)
    return None


def comet_problem() -> str | None:
    """What stops COMET: its command is not found."""
    try:
        _comet_command(None)
    except MetricError as error:
        return str(error)
    return None


def _check_metric(metric: str) -> None:
    if metric not in METRICS:
        raise MetricError(f"metric {metric!r} is unknown; choose one of {', '.join(METRICS)}")


def _check_texts(**columns: Sequence[str]) -> None:
    """MetricError unless the columns are equally long, not empty, and all text."""
    for name, texts in columns.items():
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise MetricError(f"{name} must be a list of texts, not {type(texts).__name__}")
    lengths = {name: len(texts) for name, texts in columns.items()}
    if len(set(lengths.values())) > 1:
        counted = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise MetricError(f"every sentence needs one of each, but there are {counted}")
    if 0 in lengths.values():
        raise MetricError("there is nothing to score: 0 sentences")
    for name, texts in columns.items():
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise MetricError(f"{name}[{index}] is {text!r}, not text; an empty translation is ''")


def _check_pair(candidate: SentenceStatistics, baseline: SentenceStatistics) -> None:
    if candidate.metric != baseline.metric or candidate.signature != baseline.signature:
        raise MetricError(
            f"only scores of one metric can be paired, not {candidate.metric} ({candidate.signature}) and "
            f"{baseline.metric} ({baseline.signature})"
        )
    if not np.array_equal(candidate.reference_columns, baseline.reference_columns):
        raise MetricError(
            f"candidate ({len(candidate)} sentences) and baseline ({len(baseline)}) were scored against different "
            "references, or in another order: nothing can be paired"
        )


def _resamples(num_sentences: int, num_samples: int, seed: int) -> Iterator[np.ndarray]:
    """Weights (b, N) of `num_samples` resamples in chunks, drawn as sacreBLEU's paired bootstrap draws them."""
    if num_samples < 1:
        raise MetricError(f"num_samples is {num_samples}; a bootstrap needs at least 1")
    random = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_CELLS // num_sentences)
    for start in range(0, num_samples, chunk):
        size = min(chunk, num_samples - start)
        drawn = random.choice(num_sentences, size=(size, num_sentences), replace=True)
        drawn += np.arange(size)[:, None] * num_sentences
        yield np.bincount(drawn.ravel(), minlength=size * num_sentences).reshape(size, num_sentences)


def _percentile_interval(value: float, sampled: np.ndarray, confidence: float = 0.95) -> Interval:
    if len(sampled) == 0:
        raise MetricError("no resample has a value: the baseline scores 0 on every one of them")
    tail = 50 * (1 - confidence)
    low, high = np.percentile(sampled, [tail, 100 - tail])
    return Interval(float(value), float(low), float(high), len(sampled), confidence)


def _bleu_from_sums(sums: np.ndarray) -> np.ndarray:
    """`sacrebleu.BLEU.compute_bleu` with smoothing `exp` and no effective order, on rows."""
    hypothesis_length, reference_length = sums[:, 0], sums[:, 1]
    correct, total = sums[:, 2 : 2 + _BLEU_ORDER], sums[:, 2 + _BLEU_ORDER :]
    # The k-th order without a match gets 1 / 2^k of a match (NIST smoothing); an order without n-grams makes the score
    # 0.
    smoothed = np.where(correct == 0, 0.5 ** np.cumsum(correct == 0, axis=1), correct)
    scored = correct.any(axis=1) & (total > 0).all(axis=1)
    log_precision = np.log(100.0 * smoothed / np.where(total > 0, total, 1)).mean(axis=1)
    brevity = np.minimum(0.0, 1 - reference_length / np.where(hypothesis_length > 0, hypothesis_length, 1))
    return np.where(scored, np.exp(log_precision + brevity), 0.0)


def _chrf_from_sums(sums: np.ndarray) -> np.ndarray:
    """`sacrebleu.CHRF._compute_f_score` without epsilon smoothing, on rows: F of the mean precision and mean recall."""
    hypothesis, reference, match = sums[:, 0::3], sums[:, 1::3], sums[:, 2::3]
    live = (hypothesis > 0) & (reference > 0)
    orders = np.maximum(live.sum(axis=1), 1)
    precision = np.where(live, match / np.where(live, hypothesis, 1), 0).sum(axis=1) / orders
    recall = np.where(live, match / np.where(live, reference, 1), 0).sum(axis=1) / orders
    factor = _CHRF_BETA**2
    denominator = factor * precision + recall
    return 100 * (1 + factor) * precision * recall / np.where(denominator > 0, denominator, 1)


def _comet_command(python: Path | None) -> Path:
    """The `comet-score` beside `python`, beside $TRIMLINGUAL_COMET_PYTHON, or on PATH."""
    named = python or os.environ.get(COMET_PYTHON_VARIABLE)
    if named:
        command = Path(named).parent / "comet-score"  # not resolved: a virtual environment's python is a link out of it
        if command.is_file():
            return command
        raise MetricError(f"COMET: {named} has no comet-score beside it; {Path(named)} -m pip install unbabel-comet")
    found = shutil.which("comet-score")
    if found:
        return Path(found)
    raise MetricError(
        "COMET is not installed (it needs an environment of its own): python -m venv comet-env && "
        f"comet-env/bin/pip install unbabel-comet; export {COMET_PYTHON_VARIABLE}=$PWD/comet-env/bin/python"
    )


def _read_comet_scores(path: Path, num_segments: int) -> float:
    """Mean of the segment scores in comet-score's JSON, {file: [{"src", "mt", "ref", "COMET"}, ...]}.

    The JSON and not stdout, which has 4 decimals and no count of segments.
    """
    try:
        (segments,) = json.loads(path.read_text(encoding="utf-8")).values()
        scores = [float(segment["COMET"]) for segment in segments]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MetricError(f"comet-score wrote JSON of another form than unbabel-comet 2.2 does ({error})") from error
    if len(scores) != num_segments:
        raise MetricError(f"comet-score scored {len(scores)} segments of {num_segments}")
    return sum(scores) / len(scores)


def _has_cuda() -> bool:
    import torch  # late: scoring text needs no torch

    return torch.cuda.is_available()
