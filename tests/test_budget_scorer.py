"""Candidates of bits are exact: what they share with their parent changes no translation, and the weights are those that ship."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trimlingual.data.splits import Split
from trimlingual.decoding.decoder import PackedDecoder
from trimlingual.decoding.loop import Stepper
from trimlingual.decoding.translate_clips import greedy
from trimlingual.recipe import RankSettings
from trimlingual.run.lineage import Lineage
from trimlingual.search.actions import GONE, Action
from trimlingual.search.budget_scorer import BudgetScorer
from trimlingual.search.from_parent import Trace, trace, translate_changed
from trimlingual.search.rounded import RoundedModel
from trimlingual.search.scorer import Scorer

from .test_budget import EVERY, METRICS, STORED, shared
from .test_from_parent import random_case


def traced_case(make_model, processor, split, task, number):
    """A random model's stepper, its layers, prompts, their limits, its answers and its pass over them."""
    model, eos, layers, prompts, limits = random_case(make_model, processor, split, task, number, torch.float64)
    stepper = Stepper(PackedDecoder(model), eos)
    parent = greedy(stepper, prompts, limits, 5)
    return stepper, layers, prompts, limits, parent, trace(stepper.decoder, prompts, parent, limits, layers, layers)


@pytest.mark.parametrize("number", [0, 2, 5, 9])
@torch.no_grad()
def test_a_changed_layer_equals_decoding_anew(make_model, processor, split, task, number):
    stepper, layers, prompts, limits, parent, traced = traced_case(make_model, processor, split, task, number)
    different = 0
    for position in layers:
        weight = stepper.decoder.layers[position].mlp.down_proj.weight
        before = weight.clone()
        weight.add_(torch.randn_like(weight) * weight.std())
        anew = greedy(stepper, prompts, limits, 5)
        assert translate_changed(stepper, traced, position) == anew, f"layer {position}"
        different += sum(a != b for a, b in zip(anew, parent))
        weight.copy_(before)
    assert different
    assert translate_changed(stepper, traced, layers[0]) == parent
    halves = [slice(0, len(prompts) // 2), slice(len(prompts) // 2, None)]
    parts = [trace(stepper.decoder, prompts[h], parent[h], limits[h], layers, layers) for h in halves]
    stepper.decoder.layers[1].mlp.down_proj.weight.neg_()
    anew = greedy(stepper, prompts, limits, 5)
    assert translate_changed(stepper, Trace.together(parts), 1) == anew != parent


@pytest.mark.parametrize("number", [0, 2, 5, 9])
@torch.no_grad()
def test_other_tables_equal_decoding_anew(make_model, processor, split, task, number):
    """A changed head goes on from the last layer, changed embeddings from a new pass over the parent's drafts."""
    stepper, layers, prompts, limits, parent, traced = traced_case(make_model, processor, split, task, number)
    tied = stepper.decoder.head.weight is stepper.decoder.decoder.embed_tokens.weight
    for table in (stepper.decoder.decoder.embed_tokens, *([] if tied else [stepper.decoder.head])):
        before = table.weight.clone()
        table.weight.add_(0.3 * torch.randn_like(before) * before.std())
        anew = greedy(stepper, prompts, limits, 5)
        again = traced
        if table is not stepper.decoder.head or tied:
            again = trace(stepper.decoder, prompts, parent, limits, layers, layers[-1:])
        assert translate_changed(stepper, again, layers[-1]) == anew != parent
        table.weight.copy_(before)


def test_parts_that_are_not_packed_before_the_search_are_rounded_too(make_model):
    model = make_model(layers=3, width=64, seed=5)
    stored = STORED.model_copy(update={"eight_bit": [], "parts": ["audio_tower"]})
    before = {name: weight.clone() for name, weight in model.state_dict().items()}

    def changed():
        return {
            name.removesuffix(".weight")
            for name, weight in model.state_dict().items()
            if not weight.equal(before[name])
        }

    rounded = RoundedModel(model, {"decoder": [0, 2, 5], "encoder": [0, 1]}, stored, "float32")
    at_first = changed()
    assert at_first
    assert all("audio_tower" in name for name in at_first)
    rounded.round_("decoder.2.mlp", 4)
    rounded.round_("lm_head", 8)
    with rounded.tried("embeddings", 2):
        prefix = "model.language_model."
        blocks = {f"{prefix}layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
        assert changed() - at_first == {"lm_head", f"{prefix}embed_tokens", *blocks}
    assert changed() - at_first == {"lm_head", *blocks}


@pytest.mark.parametrize("tied", [False, True])
def test_tables_in_fewer_bits_are_translated_by_drafts(make_model, processor, split, task, tied):
    """The scorer's translations with rounded embeddings or head are those of decoding anew, and it does verify the parent's."""
    model = make_model(layers=4, heads=2, kv_heads=1, width=64, seed=5, tied=tied)
    layers = {"decoder": list(range(4)), "encoder": [0, 1]}
    lineage = Lineage("tiny", layers, {tower: len(numbers) for tower, numbers in layers.items()})
    settings = RankSettings.model_validate({"metric": METRICS, "budget": {"size": "1 MB", "bits": EVERY}})
    scorer = BudgetScorer(model, processor, split, shared(task), settings, lineage, layers)
    scorer.rounded = RoundedModel(model, layers, STORED, "float32")
    scorer.parent.update(scorer.parent_tally().tokens)
    scorer.prepare()
    for action in (Action("embeddings", 2), Action("lm_head", 2)):
        (tally,) = scorer.tallies([action])
        with scorer.rounded.tried(*action):
            anew = {clip: rows for block in scorer.blocks for clip, rows in scorer._translate(None, block).items()}
        assert tally.tokens == anew != scorer.parent, action
    assert scorer._num_drafted == 2 * sum(len(row) for rows in scorer.parent.values() for row in rows)


@pytest.mark.parametrize("tied", [False, True])
def test_a_loss_that_starts_from_the_parent_is_that_of_the_whole_model(make_model, processor, split, task, tied):
    """For every kind of action, of what the model said; float32, whose additions come in another order."""
    model = make_model(layers=4, heads=2, kv_heads=1, width=64, seed=5, tied=tied)
    layers = {"decoder": list(range(4)), "encoder": [0, 1]}
    lineage = Lineage("tiny", layers, {tower: len(numbers) for tower, numbers in layers.items()})
    settings = RankSettings.model_validate(
        {"metric": METRICS, "towers": "both", "budget": {"size": "1 MB", "bits": EVERY}}
    )
    scorer = BudgetScorer(model, processor, split, shared(task), settings, lineage, layers)
    scorer.rounded = RoundedModel(model, layers, STORED, "float32")
    scorer.answers = scorer.parent_tally().tokens
    found = {None: scorer.loss(None)}
    for action in (
        Action("decoder.2.mlp", 2),
        Action("decoder.0.attention", 2),
        Action("embeddings", 2),
        Action("lm_head", 2),
    ):
        found[action] = scorer.loss(action)
        with scorer.rounded.tried(*action):
            assert found[action] == pytest.approx(scorer.loss(None), rel=1e-5)
    for tower in ("decoder", "encoder"):
        action = Action(f"{tower}.1", GONE)
        found[action] = scorer.loss(action)
        scorer.begin_round({tower: [1]}, None)
        assert found[action] == pytest.approx(scorer.loss(None), rel=1e-5)
        scorer.begin_round({}, None)
    assert len({round(loss["de"], 6) for loss in found.values()}) == len(found)


@torch.no_grad()
def test_losses_are_of_each_language_s_answer(make_model, processor, split, task):
    """With the references as answers they are the layer search's; of the model's own translations they are what it gives them."""
    model = make_model(layers=4, heads=2, kv_heads=1, width=64, seed=5)
    layers = {"decoder": list(range(4)), "encoder": [0, 1]}
    lineage = Lineage("tiny", layers, {tower: len(numbers) for tower, numbers in layers.items()})
    first, *others = split.clips
    split = Split("select", (replace(first, references={"zh": first.references["zh"]}), *others))
    settings = RankSettings.model_validate({"metric": "loss", "budget": {"size": "1 MB", "bits": EVERY}})
    scorer = BudgetScorer(model, processor, split, shared(task), settings, lineage, layers)
    plain = Scorer(model, processor, split, shared(task), settings, lineage, layers).parent_tally()
    references = [
        [scorer.prompter.answer_ids(text) for code, text in sorted(clip.references.items())] for clip in split.clips
    ]
    scorer.answers = dict(enumerate(references))
    wanted = {language: -score for language, score in plain.scores().items()}
    assert scorer.loss(None) == pytest.approx(wanted, rel=1e-6)
    scorer.answers = None
    said = scorer.parent_tally()
    assert said.tokens == scorer.answers
    assert [len(said.tokens[clip]) for clip in range(len(split.clips))] == [1, *[2] * len(others)]
    nats = {language: 0.0 for language in METRICS}
    for clip, rows in said.tokens.items():
        for language, row in zip(scorer.languages(clip), rows, strict=True):
            (prompt,) = scorer._prompts([clip], language=language)
            answer = torch.tensor(row)
            read = torch.cat([prompt, model.get_input_embeddings()(answer[:-1])])
            logits = model.lm_head(model.model.language_model(inputs_embeds=read[None]).last_hidden_state)[0]
            nats[language] += torch.nn.functional.cross_entropy(logits[-len(row) :], answer, reduction="sum").item()
            assert logits[-len(row) :].argmax(-1).tolist() == row
    tokens = {language: sum(count for _, count in said.losses[language].values()) for language in METRICS}
    assert {language: -value for language, value in said.scores().items()} == pytest.approx(
        {language: nats[language] / tokens[language] for language in METRICS}, rel=1e-5
    )
