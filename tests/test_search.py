"""The fast search gives the plain procedure's answer, on random models of varied shape and the built-in model; and its other modes."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from trimlingual.data.audio import load_audio
from trimlingual.data.sources import read_source
from trimlingual.data.splits import Split
from trimlingual.decoding.translate_clips import encode_clips, max_new_tokens, translate_clips
from trimlingual.evaluation.quality import corpus_score
from trimlingual.models.family import family_of
from trimlingual.models.folders import FAMILIES
from trimlingual.models.inputs import Collator, Example, Prompter
from trimlingual.models.layers import drop_layers_, without_layers
from trimlingual.models.loading import load_model, load_processor, resolve_base
from trimlingual.models.saving import save_model
from trimlingual.recipe import DecodeSettings, ModelSettings, RankSettings, SharedSettings, TaskSettings, load_recipe
from trimlingual.run.lineage import ModelFolder, read_lineage
from trimlingual.search import scorer
from trimlingual.search.allowed import Candidate
from trimlingual.search.from_parent import NO_DRAFT
from trimlingual.search.plan import read_plan
from trimlingual.search.search import Search
from trimlingual.search.sharing import ROWS_IN_FLIGHT, gpu_block_rows, longest_first, share_of, wave_size
from trimlingual.stages.rank import JOURNAL_FILE, rank
from trimlingual.training.loss import answer_logits

from .plain_inputs import plain_inputs
from .test_from_parent import SHAPES

CPU = torch.device("cpu")
METRICS = {"de": "chrfpp", "zh": "chrf"}
NEAR_TIE = 1e-3  # of a logit; float32 sums in another order may choose either side


def run(model_dir, split, task, decode, settings, out_dir):
    out_dir.mkdir(parents=True, exist_ok=True)
    model_settings = ModelSettings(base="tiny", dtype="float32", storage_dtype="float32", device="cpu")
    folder = ModelFolder(model_dir, read_lineage(model_dir, "tiny"))
    rank(folder, split, SharedSettings(task, model_settings, decode), settings, None, out_dir)
    return read_plan(out_dir)


def records(out_dir):
    lines = (out_dir / JOURNAL_FILE).read_text(encoding="utf-8").splitlines()
    return {(r["round"], r["layer"]): r for r in map(json.loads, lines)}


def plainly(model, processor, clip, language, task, decode):
    """The processor and `generate`, one clip. Token ids, and where the choice was a near-tie."""
    inputs = plain_inputs(processor, task, load_audio(clip.audio), language)
    done = model.generate(
        **inputs, max_new_tokens=max_new_tokens(clip.duration_s, decode), do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    best = torch.cat(done.logits).topk(2).values
    return done.sequences[0, inputs["input_ids"].shape[1] :].tolist(), (best[:, 0] - best[:, 1] < NEAR_TIE).tolist()


def assert_same(out_dir, plan, model_dir, processor, split, task, decode, only=None):
    """Every candidate's translations, scores and every round's choice are the plain procedure's."""
    found, ties, changed, removed = records(out_dir), 0, 0, []
    for removal in plan.removals:
        scores = {}
        for (number, layer), record in found.items():
            if number != removal.round or (only is not None and (number, layer) not in only):
                continue
            model = load_model(model_dir, "float32", CPU)
            drop_layers_(model, {"decoder": [*removed, layer]})
            by_language = []
            for n, (language, metric) in enumerate(METRICS.items()):
                texts = []
                for i, clip in enumerate(split.clips):
                    tokens, near = plainly(model, processor, clip, language, task, decode)
                    ours = record["tokens"][str(i)][n]
                    if ours != tokens:
                        first = next(k for k, (a, b) in enumerate(zip(ours, tokens)) if a != b)
                        assert near[first], f"round {number}, layer {layer}, clip {i}, {language}: token {first}"
                        ties += 1
                    changed += ours != found[0, None]["tokens"][str(i)][n]
                    texts.append(processor.tokenizer.decode(ours, skip_special_tokens=True).strip())
                references = [clip.references[language] for clip in split.clips]
                by_language.append(corpus_score(metric, texts, references, language).value)
            scores[layer] = sum(by_language) / 2
            assert record["score"] == pytest.approx(scores[layer], abs=1e-9)
        if only is None:
            assert removal.layer == max(sorted(scores), key=lambda layer: scores[layer])
        removed.append(removal.layer)
    assert changed, "no candidate changed any translation: the test would not see a wrong one"
    assert ties <= 1


# In CI: from 2 to 9 layers, tied and untied, every way of sharing keys and values; of the other families two of these.
SOON = {family: {0, 2, 5, 7, 9, 12, 15} if family == "qwen2_audio" else {2, 9} for family in FAMILIES}


@pytest.mark.parametrize(
    ("family", "number"),
    [
        pytest.param(family, number, marks=[] if number in SOON[family] else pytest.mark.slow)
        for family in FAMILIES
        for number in range(len(SHAPES))
    ],
    indirect=["family"],
    scope="session",
)
def test_random_models(make_model, processor, split, task, tmp_path, number):
    shape = SHAPES[number]
    model = make_model(**shape, seed=100 + number)
    with torch.no_grad():  # some answers end early, some run into their bound
        model.lm_head.weight[family_of(model).end_tokens(model, processor)[0]] *= 2.5
    folder = tmp_path / "model"
    save_model(model, processor, folder, "float32")
    split = Split("select", (split.clips[0], split.clips[3], split.clips[4]))  # 0.3, 1.8 and 1.3 or 30.8 s
    decode = DecodeSettings(batch_size=3, max_new_tokens=7)
    settings = RankSettings(
        num_layers_to_remove=1 if shape["layers"] == 2 else 2, metric=METRICS, early_stopping=False,
        protect_first=0, protect_last=0, protected=list(range(1, shape["layers"] - 2)),
    )  # fmt: skip
    plan = run(folder, split, task, decode, settings, tmp_path / "rank")
    assert_same(tmp_path / "rank", plan, folder, processor, split, task, decode)


def test_built_in_model(tmp_path):
    recipe, folder = load_recipe("mini"), resolve_base("builtin:mini")
    clips = read_source(recipe.data.select, ["de", "zh"], tmp_path)
    ordered = sorted(clips, key=lambda clip: clip.duration_s)
    split = Split("select", (ordered[0], ordered[len(ordered) // 2], ordered[-1]))
    settings = RankSettings(
        num_layers_to_remove=2, metric=METRICS, early_stopping=False, protected=[2, 3, 4, 6, 7, 8, 9]
    )
    plan = run(folder, split, recipe.task, recipe.decode, settings, tmp_path / "rank")
    assert_same(tmp_path / "rank", plan, folder, load_processor(folder), split, recipe.task, recipe.decode)


@pytest.mark.parametrize("metrics", [METRICS, {"de": "loss", "zh": "loss"}, {"de": "loss", "zh": "chrf"}])
def test_both_towers_encode_a_clip_once_for_all_decoder_candidates(
    make_model, processor, split, task, tmp_path, monkeypatch, metrics
):
    """A clip once for the whole tower, and at most once more for each candidate of the tower and for the one that is left."""
    model = make_model(encoder_layers=3, seed=7)
    folder = tmp_path / "model"
    save_model(model, processor, folder, "float32")
    decode = DecodeSettings(batch_size=4, max_new_tokens=8)
    settings = RankSettings(
        num_layers_to_remove=2, metric=metrics, towers="both", protect_first=0, early_stopping=False
    )
    encoded = []

    def counted(model, processor, clips, batch_size):
        encoded.append((len(model.model.audio_tower.layers), len(clips)))
        return encode_clips(model, processor, clips, batch_size)

    monkeypatch.setattr(scorer, "encode_clips", counted)
    plan = run(folder, split, task, decode, settings, tmp_path / "rank")
    first = [(c["tower"], c["layer"]) for c in plan.candidates if c["round"] == 1]
    assert [first.count((tower, i)) for tower in ("decoder", "encoder") for i in range(4)] == [1, 1, 1, 0, 1, 1, 0, 0]
    gone = plan.removals[0].tower == "encoder"
    second = sum(c["tower"] == "encoder" for c in plan.candidates if c["round"] == 2)
    towers = {layers: sum(num for n, num in encoded if n == layers) // len(split.clips) for layers in (3, 2, 1)}
    assert towers[3] == 1  # by the unpruned model and all decoder candidates of its tower, in one round or both
    most = {2: 2 + 1, 1: second} if gone else {2: 2 + second, 1: 0}
    assert 2 <= towers[2] <= most[2]
    assert towers[1] == most[1]
    if metrics == METRICS:
        for candidate in plan.candidates:
            removed = [(r.tower, r.layer) for r in plan.removals[: candidate["round"] - 1]]
            removed.append((candidate["tower"], candidate["layer"]))
            lacking = {tower: [layer for t, layer in removed if t == tower] for tower in ("decoder", "encoder")}
            with without_layers(model, lacking):
                said = translate_clips(model, processor, task, split.clips, decode)
            for language, metric in METRICS.items():
                texts = [t.hypothesis for t in said if t.language == language]
                references = [clip.references[language] for clip in split.clips]
                score = corpus_score(metric, texts, references, language).value
                assert candidate["scores"][language] == pytest.approx(score, abs=1e-9)


def with_own_references(model, processor, split, task, decode):
    """The selection set with the model's own translations as references: it scores 100, and without a layer far less."""
    done = translate_clips(model, processor, task, split.clips, decode)
    texts = {(t.id, t.language): t.hypothesis or "x" for t in done}
    clips = [replace(c, references={lang: texts[c.id, lang] for lang in task.target_languages}) for c in split.clips]
    return Split("select", tuple(clips))


@pytest.fixture
def easy(model_dir, processor, split, task, decode_settings):
    return with_own_references(load_model(model_dir, "float32", CPU), processor, split, task, decode_settings)


@pytest.fixture
def idle(model_dir, processor, split, task, decode_settings, tmp_path):
    """A model whose layers 2 and 3 do next to nothing, and its selection set."""
    model = load_model(model_dir, "float32", CPU)
    with torch.no_grad():
        for layer in (2, 3):
            model.model.language_model.layers[layer].self_attn.o_proj.weight.mul_(1e-4 * layer)
            model.model.language_model.layers[layer].mlp.down_proj.weight.mul_(1e-4 * layer)
    save_model(model, processor, tmp_path / "idle", "float32")
    return tmp_path / "idle", with_own_references(model, processor, split, task, decode_settings)


def test_early_stopping_changes_no_answer(idle, task, tmp_path):
    folder, split = idle
    decode = DecodeSettings(batch_size=2, max_new_tokens=12)  # a block a clip
    plans = {}
    for stopping in (False, True):
        settings = RankSettings(num_layers_to_remove=2, metric=METRICS, early_stopping=stopping)
        plans[stopping] = run(folder, split, task, decode, settings, tmp_path / str(stopping))
    whole, stopped = plans[False], plans[True]
    assert [r.layer for r in stopped.removals] == [r.layer for r in whole.removals]
    assert [r.runner_up for r in stopped.removals] == [r.runner_up for r in whole.removals]
    given_up = [c for c in stopped.candidates if c["score"] is None]
    assert given_up, "no candidate was given up: the test says nothing"
    scores = {(c["round"], c["layer"]): c["score"] for c in whole.candidates}
    for candidate in given_up:
        better = [s for (n, _), s in scores.items() if n == candidate["round"] and s > scores[n, candidate["layer"]]]
        assert len(better) >= 2, "one of the two best was given up"
    for candidate in stopped.candidates:
        if candidate["score"] is not None:
            assert candidate["score"] == pytest.approx(scores[candidate["round"], candidate["layer"]], abs=1e-9)


def test_min_retained_and_the_curve(model_dir, easy, task, decode_settings, tmp_path):
    settings = RankSettings(num_layers_to_remove=4, metric=METRICS, protect_first=0, protect_last=0)
    whole = run(model_dir, easy, task, decode_settings, settings, tmp_path / "whole")
    assert [entry["num_removed"] for entry in whole.curve] == [0, 1, 2, 3, 4]
    assert whole.curve[0]["retained"] == 1
    assert [r.score for r in whole.removals] == [entry["score"] for entry in whole.curve[1:]]
    least = (whole.curve[2]["retained"] + whole.curve[3]["retained"]) / 2
    plan = run(
        model_dir, easy, task, decode_settings, settings.model_copy(update={"min_retained": least}), tmp_path / "some"
    )
    assert plan.removals == whole.removals[:2]
    assert plan.curve == whole.curve[:4], "the point that was too low is part of the curve"
    nothing = settings.model_copy(update={"min_retained": 1.0})
    with pytest.raises(ValueError, match=r"no layer can go: .* rank.min_retained is 1.0; lower it"):
        run(model_dir, easy, task, decode_settings, nothing, tmp_path / "none")


def test_runner_up(model_dir, easy, task, decode_settings, tmp_path):
    plan = run(model_dir, easy, task, decode_settings, RankSettings(num_layers_to_remove=1, metric=METRICS), tmp_path)
    (removal,), second = plan.removals, plan.removals[0].runner_up
    scores = sorted((c["score"] for c in plan.candidates), reverse=True)
    assert second["difference"] == pytest.approx(scores[0] - scores[1])
    assert second["low"] <= second["difference"] <= second["high"]
    assert next(c["layer"] for c in plan.candidates if c["score"] == scores[1]) == second["layer"] != removal.layer
    assert 0 < second["p_value"] <= 1


@pytest.mark.parametrize("selection", ["successive-halving", "bootstrap-racing"])
def test_racing(idle, task, decode_settings, tmp_path, selection):
    """The layers that do nothing are found, by fewer translations; a killed race goes on."""
    folder, split = idle
    settings = RankSettings(num_layers_to_remove=2, metric=METRICS, selection=selection, first_clips=2)
    plan = run(folder, split, task, decode_settings, settings, tmp_path / "rank")
    assert {removal.layer for removal in plan.removals} == {2, 3}
    assert plan.selection_mode == selection
    seen = [c["num_clips"] for c in plan.candidates]
    assert min(seen) < len(split.clips), "no candidate was dropped early"
    chosen = {(r.round, r.layer) for r in plan.removals}
    assert all(c["num_clips"] == len(split.clips) for c in plan.candidates if (c["round"], c["layer"]) in chosen)
    lines = (tmp_path / "rank" / JOURNAL_FILE).read_text().splitlines(keepends=True)
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (stopped / JOURNAL_FILE).write_text("".join(lines[: len(lines) // 2]))
    assert run(folder, split, task, decode_settings, settings, stopped).removals == plan.removals


def test_shared_loss_is_the_loss(model_dir, processor, split, task, decode_settings, tmp_path):
    plan = run(model_dir, split, task, decode_settings, RankSettings(num_layers_to_remove=1, metric="loss"), tmp_path)
    model = load_model(model_dir, "float32", CPU)
    collator = Collator(Prompter(processor, task), lambda i: load_audio(split.clips[i].audio))
    for candidate in plan.candidates:
        for language in task.target_languages:
            examples = [Example(i, c.id, language, c.references[language]) for i, c in enumerate(split.clips)]
            with without_layers(model, {"decoder": [candidate["layer"]]}):
                loss, _ = answer_logits(model, collator, examples, 4)
            assert -candidate["scores"][language] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "loss", "min_retained": 0.9}, "need a translation metric"),
        ({"metric": "loss", "selection": "bootstrap-racing"}, "need a translation metric"),
        ({"strategy": "middle", "min_retained": 0.9}, "min_retained needs strategy greedy"),
        ({"strategy": "block-influence", "selection": "successive-halving"}, "selection needs strategy greedy"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        RankSettings(**settings)


def test_one_language_is_enough(model_dir, split, tmp_path, decode_settings):
    task = TaskSettings(target_languages=["zh"])
    plan = run(model_dir, split, task, decode_settings, RankSettings(num_layers_to_remove=1, metric="bleu"), tmp_path)
    assert set(plan.signatures) == {"zh"}


def test_out_of_memory_halves_the_group(model_dir, easy, task, decode_settings, tmp_path, monkeypatch, caplog):
    """Candidates that do not fit together are decoded apart, and the answer is the same."""
    settings = RankSettings(num_layers_to_remove=2, metric="chrf", early_stopping=False)
    plan = run(model_dir, easy, task, decode_settings, settings, tmp_path / "fits")
    translate = scorer.translate_without

    def tight(stepper, traced, positions, hopeless=None):
        if len(positions) > 2:
            raise torch.OutOfMemoryError("no more")
        return translate(stepper, traced, positions, hopeless)

    monkeypatch.setattr(scorer, "translate_without", tight)
    monkeypatch.setattr(scorer.Scorer, "group_size", lambda self: 4)
    halved = run(model_dir, easy, task, decode_settings, settings, tmp_path / "tight")
    assert "out of GPU memory with a batch of" in caplog.text
    assert halved.removals == plan.removals
    assert [(c["layer"], c["score"]) for c in halved.candidates] == [(c["layer"], c["score"]) for c in plan.candidates]


def test_drafts_that_are_never_right_are_left_out(model_dir, easy, task, decode_settings, tmp_path, monkeypatch):
    """From the second round on; the answer is the same."""
    settings = RankSettings(num_layers_to_remove=2, metric="chrf", early_stopping=False)
    plan = run(model_dir, easy, task, decode_settings, settings, tmp_path / "kept")
    make, drafted = scorer.trace, []

    def noted(decoder, prompts, drafts, *rest, **more):
        drafted.append(drafts[0] != NO_DRAFT)
        return make(decoder, prompts, drafts, *rest, **more)

    monkeypatch.setattr(scorer, "trace", noted)
    for least, expected in ((0.0, {True}), (1.1, {True, False})):
        monkeypatch.setattr(scorer, "MIN_ACCEPTED", least)
        other = run(model_dir, easy, task, decode_settings, settings, tmp_path / str(least))
        assert set(drafted) == expected
        assert other.removals == plan.removals
        assert [(c["layer"], c["score"]) for c in other.candidates] == [
            (c["layer"], c["score"]) for c in plan.candidates
        ]
        drafted.clear()


def test_a_search_that_goes_on_expects_the_time_that_its_records_took(monkeypatch, capsys, tmp_path):
    layers = [Candidate("decoder", layer) for layer in range(4)]
    model = SimpleNamespace(
        candidates=lambda _: layers, lineage=None, settings=RankSettings(num_layers_to_remove=2), blocks=[], group_size=lambda: 4
    )  # fmt: skip
    search = Search(model, tmp_path / JOURNAL_FILE)
    monkeypatch.setattr(search, "share_out", lambda *_: [{"seconds": 10.0}] * 4)
    search._probe(layers)
    assert "about 70 s at 10.00 s per candidate" in capsys.readouterr().err


@pytest.mark.parametrize("metric", ["chrfpp", "loss"])
def test_the_unpruned_models_pass_goes_on_where_it_was_killed(
    model_dir, split, task, decode_settings, tmp_path, monkeypatch, metric
):
    """Killed in its third part: the first two are not done again, and the record is as if never killed."""
    settings = RankSettings(num_layers_to_remove=1, metric=metric)
    straight = run(model_dir, split, task, decode_settings, settings, tmp_path / "straight")
    monkeypatch.setattr(scorer, "CPU_BATCH", 2)
    name = "_losses" if metric == "loss" else "_translate"
    work, parts = getattr(scorer.Scorer, name), []

    def dies(self, candidate, part, *rest):
        if candidate is None:
            parts.append(tuple(part))
            if parts[2:] == [tuple(part)]:
                raise KeyboardInterrupt
        return work(self, candidate, part, *rest)

    monkeypatch.setattr(scorer.Scorer, name, dies)
    with pytest.raises(KeyboardInterrupt):
        run(model_dir, split, task, decode_settings, settings, tmp_path / "killed")
    killed, before = len(parts), set(parts[:2])
    resumed = run(model_dir, split, task, decode_settings, settings, tmp_path / "killed")
    if metric == "loss":  # in two languages: a part is whole once both are there
        before = {parts[0]}
    assert not before & set(parts[killed:])
    assert resumed.removals == straight.removals
    assert resumed.baseline_scores == pytest.approx(straight.baseline_scores, abs=1e-6)


@pytest.mark.parametrize(("processes", "most"), [(1, 30), (2, 15), (4, 8), (8, 4)])
def test_no_process_scores_more_than_its_share(processes, most):
    """Thirty candidates, eight together: the process that has most of them, wave by wave."""
    size = wave_size(30, 8, processes)
    candidates = [Candidate("decoder", layer) for layer in range(30)]
    waves = [candidates[start : start + size] for start in range(0, 30, size)]
    assert all(len(wave) <= 8 * processes for wave in waves)
    shares = [[share_of(wave, index, processes, longest_first) for index in range(processes)] for wave in waves]
    assert sum(max(map(len, parts)) for parts in shares) == most
    assert sorted(chain.from_iterable(chain.from_iterable(shares))) == candidates


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_shares_run_about_as_many_layers(processes):
    """In whatever order the candidates come: here those with most layers above them first, and by promise."""
    candidates = [Candidate("decoder", layer) for layer in range(1, 31)]
    for wave in (candidates, random.Random(0).sample(candidates, 30)):
        run = [
            sum(31 - layer for _, layer in share_of(wave, index, processes, longest_first))
            for index in range(processes)
        ]
        assert max(run) <= 1.05 * sum(run) / processes


@pytest.mark.parametrize("count", [1, 7, 23, 30, 60])
@pytest.mark.parametrize("processes", [1, 2, 3, 4, 8])
def test_a_share_of_the_candidates_keeps_as_many_rows_in_flight(count, processes):
    """Of fewer candidates more clips at a time: never more rows than a step takes for nothing, and hardly fewer than alone."""
    alone, shared = (wave_size(count, 19, n) // n for n in (1, processes))
    rows = gpu_block_rows(count, processes)
    assert rows * shared <= min(ROWS_IN_FLIGHT, alone * gpu_block_rows(count, 1))
    assert rows * shared > alone * gpu_block_rows(count, 1) - shared
