"""What the flash kernel computes, row by row in PyTorch, for tests of the GPU's path on a CPU."""

from __future__ import annotations

import torch


def plain_attention(query, key, value, offsets_q, offsets_k, max_q, max_k, *, causal, used=None):
    """As `trimlingual.decoding.attention.flash_attention`; what belongs to no row is NaN. So many parameters because it has them."""
    group = query.shape[1] // key.shape[1]
    mixed, sums = torch.full_like(query, torch.nan), query.new_full((query.shape[1], len(query)), torch.nan)
    for row in range(len(offsets_q) - 1):
        start, end, first = int(offsets_q[row]), int(offsets_q[row + 1]), int(offsets_k[row])
        count = int(offsets_k[row + 1]) - first if used is None else int(used[row])
        assert end - start <= max_q
        assert count <= max_k
        keys, values = (t[first : first + count].repeat_interleave(group, 1) for t in (key, value))
        scores = torch.einsum("qhe,khe->hqk", query[start:end], keys) / query.shape[-1] ** 0.5
        if causal:  # aligned at the end
            scores = scores + torch.full_like(scores[0], -torch.inf).triu(1 + count - (end - start))
        mixed[start:end] = torch.einsum("hqk,khe->qhe", scores.softmax(-1), values)
        sums[:, start:end] = scores.logsumexp(-1)
    return mixed, sums
