from __future__ import annotations

import random
from itertools import pairwise

import pytest

from trimlingual.training.batches import LengthGroupedSampler


def lengths(count: int) -> list[float]:
    rng = random.Random(0)
    return [rng.uniform(1, 20) for _ in range(count)]


def steps(order: list[int], size: int) -> list[list[int]]:
    return [order[i : i + size] for i in range(0, len(order), size)]


@pytest.mark.parametrize("count", [1, 3, 4, 13, 130, 1001])
def test_every_example_once_an_epoch(count):
    sampler = LengthGroupedSampler(lengths(count), 4, seed=0)
    assert len(sampler) == count
    assert sorted(sampler) == list(range(count))


def test_padding_is_small():
    """Share of a batch's seconds that is padding: about half at random, and below a tenth here."""
    seconds = lengths(800)

    def padding(order):
        padded = sum(4 * max(seconds[i] for i in step) for step in steps(order, 4))
        return 1 - sum(seconds) / padded

    shuffled = list(range(800))
    random.Random(1).shuffle(shuffled)
    assert padding(shuffled) > 0.3
    assert padding(list(LengthGroupedSampler(seconds, 4, seed=0))) < 0.1


def test_order_is_a_function_of_seed_and_epoch():
    seconds = lengths(50)

    def order(seed, epoch):
        sampler = LengthGroupedSampler(seconds, 4, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6
    together = {frozenset(step) for step in steps(order(0, 0), 4)}
    assert together != {frozenset(step) for step in steps(order(0, 1), 4)}


def test_longest_first_incomplete_last_and_no_descent():
    seconds = lengths(401)
    order = list(LengthGroupedSampler(seconds, 4, seed=3))
    assert max(seconds) in [seconds[i] for i in order[:4]]
    longest = [max(seconds[i] for i in step) for step in steps(order, 4)][1:-1]
    rising = sum(a < b for a, b in pairwise(longest))
    assert 0.3 < rising / (len(longest) - 1) < 0.7


def test_steps_hold_the_same_examples_however_they_are_accumulated():
    """The step is what is grouped, so batch 8 and batch 2 accumulated 4 times train alike."""
    assert list(LengthGroupedSampler(lengths(64), 8, 0)) == list(LengthGroupedSampler(lengths(64), 2 * 4, 0))
