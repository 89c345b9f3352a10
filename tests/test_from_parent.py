"""Shared prefill and verified drafts change no translation: every candidate equals decoding anew without the layer.

In float64, so that the algorithm is what is tested: in float32 a near-tie (one in some thousand answers of a random model) falls
either way already between two batch sizes of plain decoding.
"""

from __future__ import annotations

import pytest
import torch

from trimlingual.decoding.decoder import PackedDecoder
from trimlingual.decoding.loop import Stepper
from trimlingual.decoding.translate_clips import embed_prompt, encode_clips, greedy
from trimlingual.models.family import family_of
from trimlingual.models.inputs import Prompter
from trimlingual.search.from_parent import Trace, trace, translate_without

SHAPES = [
    {"layers": layers, "heads": heads, "kv_heads": kv, "width": width, "tied": tied}
    for layers, heads, kv, width, tied in [
        (2, 2, 1, 48, False), (2, 4, 4, 64, True), (3, 4, 2, 64, False), (3, 2, 2, 40, True), (4, 4, 1, 64, False),
        (4, 6, 3, 96, False), (5, 4, 2, 72, True), (5, 3, 1, 48, False), (6, 4, 4, 64, False), (6, 2, 1, 64, True),
        (7, 4, 2, 80, False), (7, 5, 5, 60, False), (8, 4, 2, 64, True), (8, 2, 2, 56, False), (9, 4, 2, 64, False),
        (9, 6, 2, 72, True), (10, 4, 4, 48, False), (10, 4, 1, 64, False), (11, 4, 2, 64, False), (12, 4, 2, 64, True),
    ]
]  # fmt: skip


def random_case(make_model, processor, split, task, number, dtype):
    """A random model of shape `number`: the model, end tokens, positions of its layers, prompts and bounds of unlike length."""
    model = make_model(**SHAPES[number], seed=number).to(dtype)
    eos = family_of(model).end_tokens(model, processor)
    with torch.no_grad():  # some answers end early, some run into their bound
        model.lm_head.weight[eos[0]] *= 2.5
    prompter = Prompter(processor, task)
    states = encode_clips(model, processor, split.clips, 4)
    prompts = [embed_prompt(model, prompter, s, lang) for s in states for lang in task.target_languages]
    return model, eos, range(SHAPES[number]["layers"]), prompts, [6 + 3 * (i % 5) for i in range(len(prompts))]


@pytest.mark.parametrize(
    "number", [n if n < 16 else pytest.param(n, marks=pytest.mark.slow) for n in range(len(SHAPES))]
)
def test_every_candidate_equals_decoding_anew(make_model, processor, split, task, number):
    model, eos, layers, prompts, limits = random_case(make_model, processor, split, task, number, torch.float64)
    stepper = Stepper(PackedDecoder(model), eos)
    parent = greedy(stepper, prompts, limits, 5)
    traced = trace(stepper.decoder, prompts, parent, limits, layers, layers)
    changed = 0
    together = translate_without(stepper, traced, layers)
    for position in layers:
        anew = greedy(stepper, prompts, limits, 5, [layer for layer in layers if layer != position])
        assert translate_without(stepper, traced, [position]) == [anew], f"layer {position}"
        assert together[position] == anew, f"layer {position}, decoded together with the others"
        changed += sum(a != b for a, b in zip(anew, parent))
    assert changed, "no candidate changed anything: the test would not see a wrong continuation"


def test_a_layer_that_does_nothing_changes_nothing(make_model, processor, split, task):
    """All drafts are verified whole, and nothing is decoded."""
    model = make_model(layers=4)
    idle = model.model.language_model.layers[2]
    with torch.no_grad():
        idle.self_attn.o_proj.weight.zero_()
        idle.mlp.down_proj.weight.zero_()
    prompter, eos = Prompter(processor, task), family_of(model).end_tokens(model, processor)
    prompts = [embed_prompt(model, prompter, s, "de") for s in encode_clips(model, processor, split.clips, 4)]
    limits = [10] * len(prompts)
    stepper = Stepper(PackedDecoder(model), eos)
    parent = greedy(stepper, prompts, limits, 4)
    assert translate_without(stepper, trace(stepper.decoder, prompts, parent, limits, range(4), [2]), [2]) == [parent]


def test_memory_of_a_trace_is_foreseen(make_model, processor, split, task):
    model = make_model(layers=3)
    prompter, eos = Prompter(processor, task), family_of(model).end_tokens(model, processor)
    prompts = [embed_prompt(model, prompter, s, "de") for s in encode_clips(model, processor, split.clips, 4)]
    limits = [8] * len(prompts)
    stepper = Stepper(PackedDecoder(model), eos)
    parent = greedy(stepper, prompts, limits, 1)
    held = 0
    for chunk in trace(stepper.decoder, prompts, parent, limits, range(3), [1, 2]).chunks:
        for tensors in (chunk.hidden, chunk.keys, chunk.values):
            held += sum(t.numel() * t.element_size() for t in tensors.values())
    assert held == Trace.num_bytes(stepper.decoder, 3, 2, prompts, parent)


def test_a_hopeless_candidate_is_given_up_and_the_others_are_not(make_model, processor, split, task, monkeypatch):
    monkeypatch.setattr("trimlingual.decoding.loop.FIRST_WATCH", 2)
    model = make_model(layers=5, seed=2).double()
    prompter, eos = Prompter(processor, task), family_of(model).end_tokens(model, processor)
    prompts = [embed_prompt(model, prompter, s, "de") for s in encode_clips(model, processor, split.clips, 4)]
    limits = [12] * len(prompts)
    stepper = Stepper(PackedDecoder(model), eos)
    parent = greedy(stepper, prompts, limits, 4)
    traced = trace(stepper.decoder, prompts, parent, limits, range(5), range(5))
    whole = translate_without(stepper, traced, [1, 2, 3])
    looks = []

    def hopeless(number, tokens):
        looks.append(number)
        assert all(ours[: len(so_far)] == so_far for so_far, ours in zip(tokens, whole[number]))
        return number == 1

    assert translate_without(stepper, traced, [1, 2, 3], hopeless) == [whole[0], None, whole[2]]
    assert looks.count(1) == 1
    assert looks.count(0) > 1
