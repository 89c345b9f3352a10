"""Attention over shared beginnings against attention over whole rows, with a plain attention in the place of the GPU's kernel."""

from __future__ import annotations

import pytest
import torch

from trimlingual.decoding import attention, shared_prompts
from trimlingual.decoding.shared_prompts import Prefixes, SharedPrefixes
from trimlingual.decoding.slots import Slots

from .plain_attention import plain_attention

HEADS, SIZE, LAYERS = 4, 8, 5


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_equals_attention_over_whole_rows(monkeypatch, kv_heads):
    """Three candidates of three clips, their entries out of order, one entry without a row, one prefix fewer than there is room for."""
    for module in (attention, shared_prompts):
        monkeypatch.setattr(module, "flash_attention", plain_attention)
    torch.manual_seed(0)
    lengths, clips, candidates = [6, 3, 9], 3, [1, 3, 4]  # tokens of the prompts; the layers that the candidates lack
    rows = clips * len(candidates)
    capacity = [length + 5 for length in lengths] * len(candidates)
    start = torch.tensor([0, *capacity, *lengths]).cumsum(0)[:-1]
    nobody = int(start[-1]) + lengths[-1]
    start = torch.tensor([*start.tolist(), nobody], dtype=torch.int32)
    keys, values = ([torch.randn(nobody + 1, kv_heads, SIZE) for _ in range(LAYERS)] for _ in range(2))
    slots = Slots(keys, values, start, max(capacity), True)
    whole = [(k.clone(), v.clone()) for k, v in zip(keys, values)]  # with each prompt in its row's own slots as well
    for row in range(rows):
        for layer in range(candidates[row // clips]):
            for tensor in whole[layer]:
                begin, length = int(start[row]), lengths[row % clips]
                tensor[begin : begin + length] = tensor[int(start[rows + row % clips]) :][:length]

    shared = SharedPrefixes(LAYERS, rows + 1, clips + 1, torch.device("cpu"))
    entries = torch.randperm(rows).tolist()
    below = [gone for gone in candidates for _ in range(clips)]
    shared.load(Prefixes(lengths, [*range(clips)] * len(candidates), below), entries, slots)
    order = torch.tensor([*torch.randperm(rows).tolist(), rows])
    shared.move(order)
    entries = [[*entries, None][i] for i in order.tolist()]
    entry_start = torch.tensor([nobody if row is None else int(start[row]) for row in entries], dtype=torch.int32)
    used = torch.tensor([1 if r is None else lengths[r % clips] + 1 + r % 4 for r in entries], dtype=torch.int32)
    query = torch.randn(rows + 1, HEADS, SIZE)
    for size in (rows + 1, 5):
        shared.plan(entry_start[:size])
        shared.begin(used[:size])
        for layer in range(LAYERS):
            got = shared.attend(layer, query[:size].clone(), keys[layer], values[layer], slots)
            offsets = torch.arange(size + 1)
            expected, _ = plain_attention(
                query[:size], *whole[layer], offsets, entry_start[:size], 1, 99, causal=False, used=used[:size]
            )
            torch.testing.assert_close(got, expected)
            sharing = sum(row is not None and candidates[row // clips] > layer for row in entries[:size])
            assert int((shared.place[layer, :size] >= 0).sum()) == sharing
