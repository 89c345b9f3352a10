"""The Triton kernels against PyTorch: in float16 by Triton's interpreter, and with `pytest -m gpu` compiled, in bfloat16 too."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb

from trimlingual.decoding import attention
from trimlingual.decoding.attention import attend_one, join
from trimlingual.models import kernels
from trimlingual.models.kernels import add_norm, gated, rms_norm, rotate

pytest.importorskip("triton")

HEADS = [(32, 32, 128), (8, 2, 64), (6, 3, 24)]  # queries', keys and values', size


def parts(*tensors):
    """The tensors as rows of one, as a joined product gives them."""
    sizes = [tensor[0].numel() for tensor in tensors]
    joined = torch.cat([tensor.flatten(1) for tensor in tensors], 1)
    return [part.unflatten(1, tensor.shape[1:]) for part, tensor in zip(joined.split(sizes, 1), tensors)]


@pytest.fixture(
    params=[
        ("cpu", torch.float16),
        pytest.param(("cuda", torch.float16), marks=pytest.mark.gpu),
        pytest.param(("cuda", torch.bfloat16), marks=pytest.mark.gpu),
    ],
    ids=["interpreted", "float16", "bfloat16"],
)
def shape(request, monkeypatch):
    """Device and dtype."""
    device, dtype = request.param
    if (device == "cuda") != torch.cuda.is_available():
        pytest.skip("needs a GPU, or that there is none (conftest.py)")
    for module in (kernels, attention):
        monkeypatch.setattr(module, "usable", lambda tensor: True)
    torch.manual_seed(0)
    return {"device": device, "dtype": dtype}


@pytest.mark.parametrize(("heads", "kv_heads", "size"), HEADS)
def test_rotary_gives_the_same_bits(shape, heads, kv_heads, size):
    device, dtype = shape["device"], shape["dtype"]
    query, key = torch.randn(9, heads, size, **shape), torch.randn(9, kv_heads, size, **shape)
    value, angle = torch.randn(9, kv_heads, size, **shape), torch.randn(9, size // 2, device=device)
    rope = tuple(torch.cat([f(angle), f(angle)], -1).to(dtype) for f in (torch.cos, torch.sin))
    expected = apply_rotary_pos_emb(query, key, *rope)
    keys, values = torch.zeros(40, kv_heads, size, **shape), torch.zeros(40, kv_heads, size, **shape)
    slot = torch.randperm(40, device=device)[:9]
    got = rotate(query.clone(), key.clone(), value, rope, (keys, values, slot))
    assert torch.equal(got[0], expected[0])
    assert torch.equal(keys[slot], expected[1])
    assert torch.equal(values[slot], value)
    assert keys.count_nonzero() == expected[1].count_nonzero()
    got = rotate(query.clone(), key.clone(), value, rope, None)
    assert torch.equal(got[1], expected[1])
    keys.zero_()
    values.zero_()
    got = rotate(*parts(query, key, value), rope, (keys, values, slot))
    assert torch.equal(got[0], expected[0])
    assert torch.equal(keys[slot], expected[1])
    assert torch.equal(values[slot], value)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), HEADS)
def test_attention_of_one_token_a_row(shape, monkeypatch, heads, kv_heads, size):
    device = shape["device"]
    used = torch.tensor([1, 31, 32, 33, 130, 2], dtype=torch.int32, device=device)
    start = torch.tensor([0, 5, 50, 100, 140, 290, 300], dtype=torch.int32, device=device)
    keys, values = torch.randn(300, kv_heads, size, **shape), torch.randn(300, kv_heads, size, **shape)
    query = torch.randn(6, heads, size, **shape)
    for enough in (1, 10**6):
        monkeypatch.setattr(attention, "ENOUGH_PROGRAMS", enough)
        got, sums = attend_one(query, keys, values, start, used)
        for row, (first, count) in enumerate(zip(start.tolist(), used.tolist())):
            stretch = (t[first : first + count].float().repeat_interleave(heads // kv_heads, 1) for t in (keys, values))
            key, value = stretch
            scores = torch.einsum("he,nhe->hn", query[row].float(), key) * size**-0.5
            mixed = torch.einsum("hn,nhe->he", scores.softmax(-1), value)
            torch.testing.assert_close(got[row].float(), mixed, rtol=1.6e-2, atol=2e-3)
            torch.testing.assert_close(sums[:, row], scores.logsumexp(-1), rtol=1e-4, atol=1e-4)
        as_part, _ = attend_one(parts(query, keys[:6])[0], keys, values, start, used)
        assert torch.equal(as_part, got)


@pytest.mark.parametrize(("heads", "size"), [(8, 128), (6, 24)])
def test_joined_attention(shape, heads, size):
    """Of two halves of the keys, for rows in another order, one of which has only its own."""
    device = shape["device"]
    place = torch.tensor([2, -1, 0, 1], dtype=torch.int32, device=device)
    query = torch.randn(4, heads, size, device=device)
    keys, values = torch.randn(2, 5, heads, size, device=device)

    def attention(query, keys, values):
        scores = torch.einsum("nhe,she->nhs", query, keys)
        mixed = torch.einsum("nhs,she->nhe", scores.softmax(-1), values)
        return mixed.contiguous(), scores.logsumexp(-1).T.contiguous()

    own, own_sums = attention(query, keys[:3], values[:3])
    order = torch.tensor([2, 3, 0, 1], device=device)
    shared, shared_sums = attention(query[order], keys[3:], values[3:])
    whole, _ = attention(query, keys, values)
    whole[1] = own[1]
    dtype = shape["dtype"]
    got = join(own.to(dtype), own_sums, shared.to(dtype), shared_sums, place)
    torch.testing.assert_close(got.float(), whole, rtol=1.6e-2, atol=1e-2)


@pytest.mark.parametrize("width", [96, 4096])
def test_norm_after_a_sum_and_gated_product(shape, width):
    norm = Qwen2RMSNorm(width).to(**shape)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    hidden, more = (torch.randn(5, width, **shape) for _ in range(2))
    with torch.no_grad():
        got, normed = add_norm(hidden, more.clone(), norm)
        assert torch.equal(got, hidden + more)
        # A sum of squares in another order may turn a rounding, here and there; one rounding less would turn every fourth.
        for found, expected in ((normed, norm(hidden + more)), (rms_norm(norm, hidden), norm(hidden))):
            torch.testing.assert_close(found, expected, rtol=1.6e-2, atol=1e-5)
            assert (found != expected).float().mean() < 0.01
    act = torch.nn.SiLU()
    product = gated(act, hidden.clone(), more)
    torch.testing.assert_close(product, act(hidden) * more, rtol=1.6e-2, atol=1e-5)
    assert torch.equal(gated(act, *parts(hidden, more)), product)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_without_a_kernel_is_transformers_own_to_the_bit(dtype):
    torch.manual_seed(0)
    norm = Qwen2RMSNorm(192).to(dtype)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    hidden = torch.randn(50, 192).to(dtype)
    with torch.no_grad():
        assert torch.equal(rms_norm(norm, hidden), norm(hidden))
        assert torch.equal(add_norm(hidden, hidden.flip(0), norm)[1], norm(hidden + hidden.flip(0)))
