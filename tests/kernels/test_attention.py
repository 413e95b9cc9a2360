"""Per-document attention against dense attention with an explicit mask over the whole row: outputs and gradients."""

from itertools import accumulate

import pytest
import torch

from deltaw.kernels import document_attention

LENGTHS = (1, 2, 7, 127, 128, 129, 256, 257, 400)
H, K, D = 4, 2, 8


def dense_attention(q_THD, k_TKD, v_TKD, bounds, scale, window=None, softcap=None):
    """Softmax over one T·T matrix, every pair that may not see each other masked; keys repeated for their group."""
    q_HTD, k_KTD, v_KTD = (x.transpose(0, 1) for x in (q_THD, k_TKD, v_TKD))
    length = q_HTD.shape[1]
    document = torch.bucketize(torch.arange(length), torch.tensor(bounds[1:]), right=True)
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    visible = (document[:, None] == document[None]) & (distance >= 0)
    if window is not None:
        visible &= distance < window
    k, v = (x.repeat_interleave(len(q_HTD) // len(x), dim=0) for x in (k_KTD, v_KTD))
    scores = torch.einsum("htd,hsd->hts", q_HTD * scale, k).float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    shares = scores.masked_fill(~visible, float("-inf")).softmax(-1).to(v.dtype)
    return torch.einsum("hts,hsd->thd", shares, v)


def random_row(lengths, dtype=torch.float32, heads=(H, K, K)):
    length = sum(lengths)
    row = [torch.randn(length, count, D, dtype=torch.float32).to(dtype).requires_grad_() for count in heads]
    return row, tuple(accumulate(lengths, initial=0))


def results(attention, row, bounds, upstream, **options):
    out = attention(*row, bounds, 0.7, **options)
    return [out, *torch.autograd.grad(out, row, upstream)]


def largest_difference(lengths, dtype=torch.float32, heads=(H, K, K), **options):
    """Of output and gradients, relative to the largest value of each where that is above 1."""
    row, bounds = random_row(lengths, dtype, heads)
    upstream = torch.randn(bounds[-1], heads[0], D).to(dtype)
    ours = results(document_attention, row, bounds, upstream, **options)
    exact = [tensor.detach().float().requires_grad_() for tensor in row]
    dense = results(dense_attention, exact, bounds, upstream.float(), **options)
    pairs = [(a.detach().float(), b.detach()) for a, b in zip(ours, dense, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1)) for a, b in pairs)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_single_document_gets_dense_attention(length):
    for options in ({}, {"window": 6}, {"softcap": 1.5}, {"window": 100, "softcap": 1.5}):
        assert largest_difference([length], **options) < 1e-5, options


@pytest.mark.parametrize("options", [{}, {"window": 6}, {"softcap": 1.5}, {"window": 128}], ids=str)
@pytest.mark.parametrize("heads", [(4, 4, 4), (4, 2, 2), (4, 1, 1)], ids=["own keys", "grouped", "one key head"])
def test_documents_of_every_length_side_by_side_get_dense_attention_each(heads, options):
    assert largest_difference(LENGTHS, heads=heads, **options) < 1e-5


@pytest.mark.parametrize("options", [{}, {"window": 6}, {"softcap": 1.5}], ids=str)
def test_bf16_stays_within_one_percent_of_exact_attention(options):
    """bf16 keeps 8 bits: one unit in the last place is 0.4 to 0.8 % of a value."""
    assert largest_difference((7, 129, 128), torch.bfloat16, **options) < 0.01


def test_a_window_as_long_as_the_document_changes_nothing():
    (q, k, v), bounds = random_row([5, 140])
    full = document_attention(q, k, v, bounds, 1.0)
    assert torch.equal(document_attention(q, k, v, bounds, 1.0, window=140), full)
    assert not torch.allclose(document_attention(q, k, v, bounds, 1.0, window=139), full)


def test_gradients_are_exact_for_small_documents():
    row, bounds = random_row([1, 3, 2])
    row = [tensor.detach().double().requires_grad_() for tensor in row]
    for options in ({}, {"window": 2}, {"softcap": 2.0}):
        dense = results(dense_attention, row, bounds, torch.ones(6, H, D).double(), **options)
        ours = results(document_attention, row, bounds, torch.ones(6, H, D).double(), **options)
        for a, b in zip(ours, dense, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
