"""Rows that begin alike are computed once up to there, and give what they would give alone."""

from __future__ import annotations

import pytest
import torch

from trimlingual.decoding.decoder import PackedDecoder
from trimlingual.decoding.ragged import Packed, common_beginnings

CPU = torch.device("cpu")


def prompts_of(width):
    """Beginnings in common with the row before: none, all of a shorter one, some, an equal prompt, none, some of two rows back."""
    torch.manual_seed(0)
    long = torch.randn(12, width).double()
    other = torch.randn(9, width).double()
    last = torch.cat([long[:5], torch.randn(3, width).double()])
    return [long[:7], long, torch.cat([long[:4], other]), torch.cat([long[:4], other]), other, long, last]


def test_common_beginnings():
    assert common_beginnings(prompts_of(8)) == [0, 7, 4, 12, 0, 0, 5]
    assert common_beginnings(prompts_of(8)[:1]) == [0]


@pytest.mark.parametrize("active", [[0, 1, 2], [0, 2]])
def test_same_states_as_alone(make_model, active):
    decoder = PackedDecoder(make_model(layers=3).double())
    prompts = prompts_of(decoder.decoder.config.hidden_size)
    more = [[3, 4], [], [5], [5, 6, 7], [8], [], [9, 9]]
    packed, hidden = decoder.packed(prompts, more)
    assert len(hidden) == sum(len(p) + len(m) for p, m in zip(prompts, more)) - 28
    slots = decoder.slots(len(prompts), 200, 20)
    tail = [len(m) + 1 for m in more]
    found = decoder.ends(hidden, packed, active, tail, slots).split(tail)
    for row, (prompt, tokens) in enumerate(zip(prompts, more)):
        alone = torch.cat([prompt, decoder.embed(torch.tensor(tokens, dtype=torch.long))])
        one, own = Packed.of([len(alone)], CPU), decoder.slots(1, 20, 20)
        *_, (_, expected, _, _) = decoder.forward(alone, one, active, own)
        torch.testing.assert_close(found[row], expected[-tail[row] :])
        stretch = slice(row * slots.width, row * slots.width + len(alone))
        for layer in active:
            torch.testing.assert_close(slots.keys[layer][stretch], own.keys[layer][: len(alone)])
            torch.testing.assert_close(slots.values[layer][stretch], own.values[layer][: len(alone)])


def test_moving_rows_keeps_what_is_filled(make_model):
    decoder = PackedDecoder(make_model(layers=2))
    slots = decoder.slots(4, 20, 5)
    for tensor in (*slots.keys, *slots.values):
        tensor.normal_()
    kept = slots.kept(torch.tensor([0, 2, 3]), 3, [1])
    expected = slots.keys[1].unflatten(0, (4, 5))[[0, 2, 3]]
    got = kept.keys[1].unflatten(0, (3, 5))
    assert torch.equal(got[:, :3], expected[:, :3])
    assert not got[:, 3:].any()
    assert kept.num_rows == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_process_with_a_share_of_the_gpu_takes_no_more(make_model):
    decoder = PackedDecoder(make_model(layers=3).cuda())
    total = torch.cuda.mem_get_info()[1]
    free = decoder.free_bytes()
    torch.cuda.set_per_process_memory_fraction(0.1)
    try:
        assert decoder.free_bytes() <= 0.1 * total < free
        assert decoder.free_bytes() > 0.09 * total
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
