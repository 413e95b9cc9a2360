"""The loss over labelled tokens against torch's cross-entropy over all logits at once, with gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deltaw.kernels import labelled_loss, token_losses
from deltaw.kernels.loss import CHUNK_BYTES, PIECE_BYTES, chunk_rows

pytestmark = pytest.mark.usefixtures("either_way")

N, WIDTH, VOCABULARY = 50, 12, 31


@pytest.fixture
def case():
    """Hidden states, an adapted head with its two factors, targets, and weights of which some are 0."""
    h = torch.randn(N, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH)
    A, B = torch.randn(3, WIDTH, requires_grad=True), torch.randn(VOCABULARY, 3, requires_grad=True)

    def head(x):
        return F.linear(x, weight) + F.linear(F.linear(x, A), B)

    return h, head, torch.randint(VOCABULARY, (N,)), torch.rand(N).round(decimals=1), (A, B)


def reference(case):
    h, head, targets, weights, factors = case
    loss = (F.cross_entropy(head(h), targets, reduction="none") * weights).sum()
    return [loss, *torch.autograd.grad(loss, [h, *factors])]


def ours(case, chunk=None):
    h, head, targets, weights, factors = case
    loss = labelled_loss(h, head, targets, weights, VOCABULARY, factors, chunk)
    return [loss, *torch.autograd.grad(loss, [h, *factors])]


@pytest.mark.parametrize("chunk", [None, 1, 7, 49, 50, 1000])
def test_loss_and_gradients_are_those_of_cross_entropy_however_it_is_cut(case, chunk):
    for a, b in zip(ours(case, chunk), reference(case), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


def test_weights_of_one_give_torchs_summed_cross_entropy(case):
    h, head, targets, _, _ = case
    expected = F.cross_entropy(head(h), targets, reduction="sum")
    torch.testing.assert_close(labelled_loss(h, head, targets, torch.ones(N), VOCABULARY, case[4]), expected)


def test_a_weight_of_zero_takes_a_token_out_of_loss_and_gradients(case):
    h, head, targets, weights, factors = case
    kept = weights > 0
    assert 0 < int(kept.sum()) < N
    fewer = (h[kept].detach().requires_grad_(), head, targets[kept], weights[kept], factors)
    whole, part = ours(case), ours(fewer)
    torch.testing.assert_close(whole[0], part[0])
    torch.testing.assert_close(whole[1][kept], part[1])
    assert not whole[1][~kept].any()


def test_the_loss_without_gradients_is_the_same_number(case):
    with torch.no_grad():
        h, head, targets, weights, factors = case
        quiet = labelled_loss(h, head, targets, weights, VOCABULARY, factors)
    torch.testing.assert_close(quiet, ours(case)[0].detach())
    assert not quiet.requires_grad


def test_gradients_pass_through_an_optimiser_step_scale_in_bf16():
    """The scale 1/(tokens of the step) must act in fp32: rounded to bf16 first, 1/1003 would be off by 0.2 %."""
    h = torch.randn(N, WIDTH).bfloat16().requires_grad_()
    weight, targets = torch.randn(VOCABULARY, WIDTH).bfloat16(), torch.randint(VOCABULARY, (N,))
    loss = labelled_loss(h, lambda x: F.linear(x, weight), targets, torch.ones(N), VOCABULARY)
    whole = torch.autograd.grad(loss, h, retain_graph=True)[0]
    scaled = torch.autograd.grad(loss / 1003, h)[0]
    assert torch.equal(scaled, (whole.float() / 1003).bfloat16())


def test_no_labels_give_zero_and_zero_gradients(case):
    h, head, targets, weights, factors = case
    none = (h[:0].detach().requires_grad_(), head, targets[:0], weights[:0], factors)
    loss, grad_h, *grads = ours(none)
    assert not loss.detach() and grad_h.shape == (0, WIDTH) and not any(grad.any() for grad in grads)
    losses, hits, columns = token_losses(none[0], head, targets[:0], VOCABULARY, [1, 2])
    assert losses.shape == hits.shape == (0,) and columns.shape == (0, 2) and hits.dtype == torch.bool


@pytest.mark.parametrize("chunk", [None, 1, 9])
def test_token_losses_are_cross_entropy_hits_are_argmax_and_columns_are_logits(case, chunk):
    h, head, targets, _, _ = case
    losses, hits, columns = token_losses(h, head, targets, VOCABULARY, [4, 0, 30], chunk)
    logits = head(h).detach()
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"))
    assert torch.equal(hits, logits.argmax(-1) == targets) and hits.any() and not hits.all()
    torch.testing.assert_close(columns, logits[:, [4, 0, 30]])


def test_logits_never_exist_for_more_than_one_chunk():
    rows = chunk_rows(50_000)
    assert rows * 4 * 50_000 <= CHUNK_BYTES < 2 * rows * 4 * 50_000
    assert chunk_rows(10**9) == 16 and chunk_rows(50_000, torch.bfloat16) == 2 * rows
    seen, head = [], nn.Linear(4, 9, bias=False)

    def watched(x):
        seen.append(len(x))
        return head(x)

    labelled_loss(torch.randn(70, 4), watched, torch.zeros(70, dtype=torch.long), torch.ones(70), 500_000)
    assert seen == [16, 16, 16, 16, 6]


def test_rows_of_a_wide_vocabulary_are_taken_in_pieces_and_in_bf16_the_target_keeps_its_precision():
    """p(target) near 1: rounded to bf16 first, p − 1 would be a third off; by one sum in fp32, an eighth (AVX2)."""
    h, weight = torch.zeros(37, 4), torch.zeros(200_000, 4)
    weight[7], h[:, 0] = torch.tensor([1.0, 0, 0, 0]), 18.0
    h, weight = h.bfloat16().requires_grad_(), weight.bfloat16()
    targets = torch.full((37,), 7)
    loss = labelled_loss(h, lambda x: F.linear(x, weight), targets, torch.ones(37), 200_000)
    expected = F.cross_entropy(F.linear(h.detach().double(), weight.double()), targets, reduction="sum")
    torch.testing.assert_close(loss.detach().double(), expected, rtol=0.01, atol=0)
    (grad,) = torch.autograd.grad(loss, h)
    p = torch.softmax(F.linear(h[:1].detach().double(), weight.double()), -1)[0, 7]
    assert 0 < float(1 - p) < 4e-3
    torch.testing.assert_close(grad[:, 0].double(), (p - 1).expand(37), rtol=0.01, atol=0)


def test_token_losses_of_a_wide_vocabulary_are_the_same_in_pieces():
    torch.manual_seed(0)
    h, weight, targets = torch.randn(37, 4), torch.randn(200_000, 4), torch.randint(200_000, (37,))
    assert PIECE_BYTES // (4 * 200_000) < CHUNK_BYTES // (4 * 200_000) < 37, "several chunks of several pieces"
    logits = F.linear(h, weight)
    targets[::3] = logits[::3].argmax(-1)
    losses, hits, columns = token_losses(h, lambda x: F.linear(x, weight), targets, 200_000, [7, 0])
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"))
    assert torch.equal(hits, logits.argmax(-1) == targets) and hits[::3].all() and not hits.all()
    torch.testing.assert_close(columns, logits[:, [7, 0]])


@pytest.mark.parametrize("spread", [1, 3, 6])
def test_losses_and_slopes_over_a_wide_vocabulary_are_exact_to_rounding(spread):
    """torch's own softmax in fp32 is not: over 49,152 tokens its shares sum to 1 + 1e-5 with some processors."""
    vocabulary, count = 49_152, 64
    logits = (spread * torch.randn(count, vocabulary)).requires_grad_()
    targets = torch.randint(vocabulary, (count,))
    exact = logits.detach().double().requires_grad_()
    wanted = F.cross_entropy(exact, targets, reduction="none")
    (slopes,) = torch.autograd.grad(wanted.sum(), exact)
    wanted = wanted.detach()
    measured, _, _ = token_losses(logits.detach(), lambda x: x, targets, vocabulary)
    trained = labelled_loss(logits, lambda x: x, targets, torch.ones(count), vocabulary)
    (ours,) = torch.autograd.grad(trained, logits)
    assert abs(float(measured.double().mean() - wanted.mean())) < 5e-7
    assert abs(float(trained.detach()) / count - float(wanted.mean())) < 2e-6
    assert float((ours.double() - slopes).norm() / slopes.norm()) < 1e-6
