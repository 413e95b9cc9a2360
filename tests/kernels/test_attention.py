"""Per-document attention against dense attention with an explicit mask over the whole row: outputs and gradients."""

from itertools import accumulate, pairwise

import pytest
import torch

from deltaw.kernels import Span, compiled, document_attention, spans_of
from deltaw.kernels.attention import (
    _agrees_in_one_call,
    attention_in_one_call,
    fused_attention,
    one_call_works,
)
from deltaw.kernels.tiles import products

pytestmark = pytest.mark.usefixtures("either_way")

LENGTHS = (1, 2, 7, 127, 128, 129, 256, 257, 384, 385, 513)
FEWER = (1, 7, 128, 257, 385)
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


def ours_of(q, k, v, bounds, scale, **options):
    return document_attention(q, k, v, spans_of(bounds), scale, **options)


def results(attention, row, bounds, upstream, **options):
    out = attention(*row, bounds, 0.7, **options)
    return [out, *torch.autograd.grad(out, row, upstream)]


def largest_difference(lengths, dtype=torch.float32, heads=(H, K, K), **options):
    """Of output and gradients, relative to the largest value of each where that is above 1."""
    row, bounds = random_row(lengths, dtype, heads)
    upstream = torch.randn(bounds[-1], heads[0], D).to(dtype)
    ours = results(ours_of, row, bounds, upstream, **options)
    exact = [tensor.detach().float().requires_grad_() for tensor in row]
    dense = results(dense_attention, exact, bounds, upstream.float(), **options)
    pairs = [(a.detach().float(), b.detach()) for a, b in zip(ours, dense, strict=True)]
    return float(torch.stack([(a - b).abs().max() / b.abs().max().clamp_min(1) for a, b in pairs]).max())


@pytest.mark.parametrize("length", LENGTHS)
def test_a_single_document_gets_dense_attention(length):
    for options in ({}, {"window": 6}, {"softcap": 1.5}, {"window": 100, "softcap": 1.5}):
        assert largest_difference([length], **options) < 1e-5, options


@pytest.mark.parametrize(
    ("heads", "lengths"),
    [((4, 2, 2), LENGTHS), ((4, 4, 4), FEWER), ((4, 1, 1), FEWER)],
    ids=["grouped", "own keys", "one key head"],
)
@pytest.mark.parametrize("options", [{}, {"window": 6}, {"softcap": 1.5}, {"window": 128}], ids=str)
def test_documents_of_every_length_side_by_side_get_dense_attention_each(heads, lengths, options):
    lengths = LENGTHS if options.get("window") == 128 else lengths  # where tiles of all kinds meet
    assert largest_difference(lengths, heads=heads, **options) < 1e-5


@pytest.mark.parametrize("lengths", [(32, 32), (256,) * 4, (48,) * 3, (16, 16, 9)], ids=str)
def test_neighbours_of_equal_length_are_kept_apart(lengths):
    """Their rows are one slice of the flat row."""
    for options in ({}, {"window": 6}, {"softcap": 1.5}):
        assert largest_difference(lengths, **options) < 1e-5, options


@pytest.mark.parametrize("options", [{}, {"window": 6}, {"softcap": 1.5}], ids=str)
def test_bf16_stays_within_one_percent_of_exact_attention(options):
    """bf16 keeps 8 bits: one unit in the last place is 0.4 to 0.8 % of a value."""
    assert largest_difference((7, 129, 128), torch.bfloat16, **options) < 0.01


def test_a_window_as_long_as_the_document_changes_nothing():
    (q, k, v), bounds = random_row([5, 140])
    full = ours_of(q, k, v, bounds, 1.0)
    assert torch.equal(ours_of(q, k, v, bounds, 1.0, window=140), full)
    assert not torch.allclose(ours_of(q, k, v, bounds, 1.0, window=139), full)


def test_gradients_are_exact_for_small_documents():
    row, bounds = random_row([1, 3, 2])
    row = [tensor.detach().double().requires_grad_() for tensor in row]
    for options in ({}, {"window": 2}, {"softcap": 2.0}):
        dense = results(dense_attention, row, bounds, torch.ones(6, H, D).double(), **options)
        ours = results(ours_of, row, bounds, torch.ones(6, H, D).double(), **options)
        for a, b in zip(ours, dense, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


# -- documents that continue rows in common ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"window": 6}, {"softcap": 1.5}, {"window": 150}], ids=str)
@pytest.mark.parametrize(("shared", "own"), [(5, (3, 1, 30)), (40, (130, 7, 7, 300)), (300, (60, 64, 61))])
@pytest.mark.parametrize("attention", [document_attention, fused_attention], ids=["cpu", "other devices"])
def test_documents_that_continue_the_same_rows_are_attended_to_as_if_each_had_its_own(attention, shared, own, options):
    """Values of every row and, the rows in common gathering what all say of them, every gradient."""
    (q, k, v), bounds = random_row([shared, *own])
    spans = (Span(0, shared), *(Span(a, b, 0, shared) for a, b in pairwise(bounds[1:])))
    upstream = torch.randn(bounds[-1], H, D)
    out = attention(q, k, v, spans, 0.7, **{"window": None, "softcap": None, **options})
    grads = torch.autograd.grad(out, (q, k, v), upstream)

    rows = [torch.arange(shared)] + [
        torch.cat([torch.arange(shared), torch.arange(s.start, s.stop)]) for s in spans[1:]
    ]
    whole = [dense_attention(q[r], k[r], v[r], (0, len(r)), 0.7, **options) for r in rows]
    plain = torch.cat([whole[0], *(w[shared:] for w in whole[1:])])
    torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-5)
    for a, b in zip(grads, torch.autograd.grad(plain, (q, k, v), upstream), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"window": 6}, {"softcap": 1.5}, {"window": 150, "softcap": 2.0}], ids=str)
def test_what_other_devices_run_is_the_same_attention(options):
    """Documents of one length in one call, whose order stays."""
    (q, k, v), bounds = random_row([300, 20, 7, 20, 300])
    upstream = torch.randn(bounds[-1], H, D)
    dense = dense_attention(q, k, v, bounds, 0.7, **options)
    fused = fused_attention(q, k, v, spans_of(bounds), 0.7, **{"window": None, "softcap": None, **options})
    torch.testing.assert_close(fused, dense, atol=1e-5, rtol=1e-5)
    wanted = torch.autograd.grad(dense, (q, k, v), upstream)
    for a, b in zip(torch.autograd.grad(fused, (q, k, v), upstream), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_what_other_devices_run_is_the_same_attention_in_bf16():
    """Where heads are grouped by torch's kernel."""
    (q, k, v), bounds = random_row([40, 64, 40])
    exact = dense_attention(q, k, v, bounds, 0.7)
    rounded = fused_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), spans_of(bounds), 0.7, None, None)
    torch.testing.assert_close(rounded.float(), exact, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize(("keys", "window"), [(H, None), (K, None), (K, 5)], ids=str)
def test_the_kernel_for_many_lengths_is_called_as_torch_has_it_and_left_where_it_does_not_run(keys, window):
    """Forward and backward on tensors without numbers, of which torch knows the shapes; a processor has no such kernel."""
    shapes = ((27, H, 16), (27, keys, 16), (27, keys, 16))
    q, k, v = (torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
    out = attention_in_one_call(q, k, v, (5, 19, 3), 0.25, window)
    grads = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert out.shape == q.shape and [grad.shape for grad in grads] == [x.shape for x in (q, k, v)]
    assert not one_call_works(q, k, window)
    assert not _agrees_in_one_call(H, 16, keys, window is not None, torch.bfloat16, torch.device("cpu"))


PASSES = [
    *(spans_of([0, *accumulate(x)]) for x in ((60, 5, 33, 64), (256, 31, 190, 100, 70), (1000, 700, 20), (300,) * 9)),
    (Span(0, 40), Span(40, 46, 0, 40), Span(46, 57, 0, 40), Span(57, 80), Span(80, 90, 57, 80), Span(90, 400, 57, 80)),
]


@pytest.mark.parametrize("windows", [(None,), (None, 100), (100,)], ids=str)
@pytest.mark.parametrize("spans", PASSES, ids=lambda spans: str(len(spans)))
def test_products_are_counted_as_they_are_made(spans, windows, monkeypatch):
    made = set()
    for name in ("bmm", "baddbmm"):
        real = getattr(torch, name)

        def product(*x, name=name, real=real, **more):
            made.add((name, x[-2].shape, x[-1].shape, *(y.is_contiguous() for y in x[-2:])))
            return real(*x, **more)

        monkeypatch.setattr(torch, name, product)
    (q, k, v), _ = random_row([spans[-1].stop])
    for window in windows:
        torch.autograd.grad(document_attention(q, k, v, spans, 0.7, window=window).sum(), (q, k, v))
    # The compiled passes scale as they read, so three products of a tile are the same again.
    assert len(made) == products(spans, windows) // (2 if compiled.in_use() else 1)
