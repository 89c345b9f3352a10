from __future__ import annotations

import json

import pytest
import torch

from trimlingual.data.audio import load_audio
from trimlingual.decoding.translate_clips import max_new_tokens
from trimlingual.evaluation.quality import corpus_score
from trimlingual.models.inputs import Example, TrainingData
from trimlingual.models.layers import drop_layers_
from trimlingual.models.loading import load_model
from trimlingual.recipe import RankSettings, TrainSettings
from trimlingual.run.artifacts import append_jsonl
from trimlingual.run.lineage import Lineage, read_lineage
from trimlingual.search.allowed import may_go
from trimlingual.search.one_shot import at_random
from trimlingual.search.plan import PlanError, check_plan, read_plan
from trimlingual.stages.prune import prune
from trimlingual.stages.rank import JOURNAL_FILE, rank

from .plain_inputs import plain_inputs


@pytest.fixture
def search(given, split, shared):
    def run(out_dir, settings, training=None):
        out_dir.mkdir(exist_ok=True)
        rank(given, split, shared, settings, training, out_dir)
        return read_plan(out_dir)

    return run


METRICS = {"de": "chrfpp", "zh": "chrf"}


def plain_search(model_dir, processor, split, task, decode_settings, rounds):
    """The published procedure, plainly: a fresh model without the layers, generate, one clip at a time."""
    removed, record = [], {}
    for number in range(1, rounds + 1):
        scores = {}
        for layer in [i for i in range(1, 5) if i not in removed]:
            model = load_model(model_dir, "float32", torch.device("cpu"))
            drop_layers_(model, {"decoder": [*removed, layer]})
            by_language = []
            for language, metric in METRICS.items():
                hypotheses = []
                for clip in split.clips:
                    inputs = plain_inputs(processor, task, load_audio(clip.audio), language)
                    limit = max_new_tokens(clip.duration_s, decode_settings)
                    ids = model.generate(**inputs, max_new_tokens=limit, do_sample=False)[
                        0, inputs["input_ids"].shape[1] :
                    ]
                    hypotheses.append(processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
                references = [c.references[language] for c in split.clips]
                by_language.append(corpus_score(metric, hypotheses, references, language).value)
            scores[layer] = record[number, layer] = sum(by_language) / 2
        removed.append(max(scores, key=lambda layer: (scores[layer], -layer)))
    return removed, record


def test_same_removals_and_scores_as_the_plain_procedure(
    search, model_dir, processor, split, task, decode_settings, tmp_path
):
    plan = search(tmp_path, RankSettings(num_layers_to_remove=2, metric=METRICS))
    removed, record = plain_search(model_dir, processor, split, task, decode_settings, 2)
    assert plan.layers_of("decoder") == removed
    assert {(c["round"], c["layer"]): c["score"] for c in plan.candidates} == pytest.approx(record)
    assert len(set(record.values())) > 3, "the scores must differ for this test to mean anything"
    assert plan.signatures["de"].startswith("nrefs:1")
    assert plan.selection["hash"] == split.hash


def test_goes_on_from_the_last_candidate(search, tmp_path):
    settings = RankSettings(num_layers_to_remove=2, metric=METRICS)
    whole = search(tmp_path / "whole", settings)
    lines = (tmp_path / "whole" / JOURNAL_FILE).read_text().splitlines(keepends=True)
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    kept = [json.loads(line) for line in lines[:3]]
    kept[2]["seconds"] = 12345.0  # what is on disk is not scored again
    marked = kept[2]["layer"]
    for record in kept:
        append_jsonl(stopped / JOURNAL_FILE, record)
    with (stopped / JOURNAL_FILE).open("a") as file:
        file.write(lines[3][:20])
    resumed = search(stopped, settings)
    assert resumed.removals == whole.removals
    strip = [{k: v for k, v in c.items() if k != "seconds"} for c in whole.candidates]
    assert [{k: v for k, v in c.items() if k != "seconds"} for c in resumed.candidates] == strip
    assert [c["layer"] for c in resumed.candidates if c["seconds"] == 12345.0] == [marked]


def test_loss_as_metric_and_protected_layers(search, tmp_path):
    plan = search(tmp_path, RankSettings(num_layers_to_remove=1, metric="loss", protected=[2, 3]))
    assert {c["layer"] for c in plan.candidates} == {1, 4}
    assert all(c["score"] < 0 for c in plan.candidates)


def test_encoder_and_both_towers(search, tmp_path):
    plan = search(
        tmp_path / "both", RankSettings(num_layers_to_remove=1, metric=METRICS, towers="both", protect_first=0)
    )
    assert {c["tower"] for c in plan.candidates} == {"decoder", "encoder"}
    plan = search(
        tmp_path / "encoder", RankSettings(num_layers_to_remove=1, metric=METRICS, towers="encoder", protect_first=0)
    )
    assert plan.layers_of("encoder") == [0]


def test_middle(search, tmp_path):
    assert search(tmp_path, RankSettings(strategy="middle", num_layers_to_remove=2)).layers_of("decoder") == [2, 3]


def test_random_layers_follow_the_seed(search, tmp_path):
    settings = RankSettings(strategy="random", num_layers_to_remove=3, towers="both", protect_first=0, protect_last=0)
    lineage = Lineage("x", {"decoder": list(range(6)), "encoder": [0, 1]}, {"decoder": 6, "encoder": 2})
    plans = [at_random(settings, lineage, seed).removals for seed in range(40)]
    assert plans[0] == at_random(settings, lineage, 0).removals
    assert {(each.tower, each.layer) for plan in plans for each in plan} == {*may_go(settings, lineage.layers)}
    assert all(len({*map(str, plan)}) == 3 and sum(each.tower == "encoder" for each in plan) <= 1 for plan in plans)
    assert len(search(tmp_path, RankSettings(strategy="random", num_layers_to_remove=2)).layers_of("decoder")) == 2


def test_block_influence_finds_the_layer_that_does_nothing(
    make_model, processor, search, model_dir, lineage, tmp_path, monkeypatch
):
    """A layer whose output projections are zero passes its input through: influence 0, so it goes first."""
    from trimlingual.stages import rank as module

    def load(folder, dtype, device, keep_packed):
        model = load_model(folder, dtype, device)
        idle = model.model.language_model.layers[3]
        with torch.no_grad():
            idle.self_attn.o_proj.weight.zero_()
            idle.mlp.down_proj.weight.zero_()
        return model

    monkeypatch.setattr(module, "load_model", load)
    plan = search(tmp_path, RankSettings(strategy="block-influence", num_layers_to_remove=2))
    assert plan.removals[0].layer == 3
    assert plan.removals[0].score == pytest.approx(0, abs=1e-6)
    assert plan.removals[1].score > 1e-4


def test_too_many_layers(search, tmp_path):
    with pytest.raises(ValueError, match=r"num_layers_to_remove is 5, but of 6 decoder layers at most 4 can go"):
        search(tmp_path, RankSettings(num_layers_to_remove=5))


def test_finetuning_after_every_removal(search, split, given, model_settings, tmp_path, monkeypatch):
    """Killed in the second round's training, the search goes on from the first round's model and ends the same."""
    from trimlingual.stages import rank as module

    examples = [Example(i, c.id, "de", c.references["de"]) for i, c in enumerate(split.clips)]
    training = TrainingData(split.clips, examples)
    settings = RankSettings(
        num_layers_to_remove=2, metric=METRICS, finetune_each_round=TrainSettings(max_steps=2, learning_rate=1e-3)
    )
    whole = search(tmp_path / "whole", settings, training)
    train_, calls = module.train_, []

    def dies(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train_(*args)

    monkeypatch.setattr(module, "train_", dies)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "stopped", settings, training)
    scratch = tmp_path / "stopped" / "scratch"
    assert {path.name for path in scratch.iterdir() if path.is_dir()} == {"round-1"}  # no checkpoints of its training
    resumed = search(tmp_path / "stopped", settings, training)
    assert len(calls) == 3, "round 1 must not be trained again"
    assert not [path for path in scratch.iterdir() if path.is_dir()]
    assert resumed.removals == whole.removals
    pruned = tmp_path / "pruned"
    prune(given, tmp_path / "stopped", model_settings, pruned)
    assert read_lineage(pruned).removed("decoder") == sorted(whole.layers_of("decoder"))
    assert read_lineage(pruned).seen["train"]
    a, b = (load_model(p, "float32", torch.device("cpu")).state_dict() for p in (tmp_path / "whole" / "model", pruned))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a prune plan"),
        ('{"removals": []}', "not a prune plan"),
        ('{"removals": [{"layer": "three"}]}', "valid integer"),
        ('{"removals": [{"layer": 1}, {"layer": 1}]}', "removes a layer twice: decoder 1"),
        ('{"layers_to_remove": [1]}', "not a prune plan"),
        ('{"removals": [5, 3]}', "not a prune plan: removals.0: .*By hand, {"),
        ("[5, 3]", "not a prune plan: the whole: "),
    ],
)
def test_bad_plans(tmp_path, text, message):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=message) as caught:
        read_plan(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(PlanError, match="cannot be read"):
        read_plan(tmp_path / "missing.json")


def test_a_plan_of_a_windows_editor_is_read(tmp_path):
    (tmp_path / "plan.json").write_text('{"removals": [{"layer": 1}]}', encoding="utf-8-sig")
    assert read_plan(tmp_path).layers_of("decoder") == [1]


def test_plan_for_another_model(lineage, tmp_path):
    path = tmp_path / "plan.json"
    for layer in (1, 17):  # one that the plan removes, and one that there is not
        path.write_text(json.dumps({"removals": [{"layer": 1}], "bits": [{"part": f"decoder.{layer}.mlp", "bits": 2}]}))
        with pytest.raises(PlanError, match=rf"gives bits to decoder\.{layer}\.mlp, but after its removals"):
            check_plan(read_plan(path), lineage)
    path.write_text('{"removals": [{"layer": 17}]}')
    with pytest.raises(PlanError, match=r"removes decoder layers \[17\], which this model does not have"):
        check_plan(read_plan(path), lineage)
    path.write_text(
        json.dumps({"removals": [{"layer": 1}], "layers": {"decoder": list(range(32)), "encoder": list(range(32))}})
    )
    with pytest.raises(PlanError, match="made for a model with layers decoder 32"):
        check_plan(read_plan(path), lineage)
