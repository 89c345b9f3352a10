"""The GPU's way of decoding, run on the CPU: static steps, packed entries, flash attention over slots, shared prefixes.

CUDA graphs are replaced by the work they would replay, and the flash kernel by plain attention; `pytest -m gpu` runs the real ones.
"""

from __future__ import annotations

import pytest
import torch

from trimlingual.decoding import attention, cuda_graphs, decoder, shared_prompts
from trimlingual.decoding.decoder import PackedDecoder
from trimlingual.decoding.loop import Stepper
from trimlingual.decoding.translate_clips import greedy
from trimlingual.search.from_parent import trace, translate_without

from .plain_attention import plain_attention
from .test_from_parent import random_case


class Event:
    def record(self):
        pass

    def synchronize(self):
        pass


@pytest.fixture
def static(monkeypatch):
    """Stepper for a decoder, as on a GPU in 16 bits (`flash`) or in float32."""
    for module in (attention, decoder, shared_prompts):
        monkeypatch.setattr(module, "flash_attention", plain_attention)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(cuda_graphs.Graphs, "_captured", lambda self, works: list(works))
    monkeypatch.setattr(cuda_graphs, "SMALLEST_STEP", 2)

    class Static(Stepper):
        def extend(self, slots, active, rows, watch=None):
            if any(rows.alive):
                self._extend_static(slots, active, rows, watch)

    def make(model, eos, flash):
        decoder = PackedDecoder(model)
        decoder.flash = flash
        return Static(decoder, eos)

    return make


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("number", [0, 3, 5, 8, pytest.param(13, marks=pytest.mark.slow)])
def test_every_candidate_equals_decoding_anew(make_model, processor, split, task, static, number, flash):
    model, eos, layers, prompts, limits = random_case(make_model, processor, split, task, number, torch.float64)
    plain, stepper = Stepper(PackedDecoder(model), eos), static(model, eos, flash)
    parent = greedy(plain, prompts, limits, 99)
    assert greedy(stepper, prompts, limits, 5) == parent
    traced = trace(stepper.decoder, prompts, parent, limits, layers, layers)
    together = translate_without(stepper, traced, layers)
    some = translate_without(stepper, traced, [*layers][1:])
    assert together[1:] == some
    for position in layers:
        anew = greedy(plain, prompts, limits, 99, [layer for layer in layers if layer != position])
        assert together[position] == anew, f"layer {position}"
        assert translate_without(stepper, traced, [position]) == [anew], f"layer {position} alone"
    assert greedy(stepper, prompts, limits, 4) == parent
