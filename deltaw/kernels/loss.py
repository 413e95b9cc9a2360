"""Cross-entropy over labelled tokens only, a chunk at a time, with the gradient formed in the forward pass.

Logits exist for one chunk of labelled tokens and are gone before the next, so memory does not grow with the vocabulary
times the tokens. Their softmax is taken in fp32, on CPU a few rows at a time, so that these stay in the processor's
cache. Losses are returned as sums, never as means: whoever calls divides once, by the tokens of the step.

Legend: h_NH hidden states of the N labelled positions; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deltaw.kernels import compiled

# Below 32 MB, up to which the C library keeps freed memory for the next chunk; above, every chunk is mapped and zeroed
# page by page, which takes longer than the softmax.
CHUNK_BYTES = 28_000_000
# A GPU reads the whole head for every chunk, which takes longer than its product where that is small.
GPU_CHUNK_BYTES = 512_000_000
PIECE_BYTES = 4_000_000
Head = Callable[[Tensor], Tensor]


def chunk_rows(vocabulary: int, dtype: torch.dtype = torch.float32, kind: str = "cpu") -> int:
    """How many rows of logits fit in `CHUNK_BYTES`, or in `GPU_CHUNK_BYTES` on a device of kind "cuda"; at least 16."""
    most = GPU_CHUNK_BYTES if kind == "cuda" else CHUNK_BYTES
    return max(16, most // (dtype.itemsize * vocabulary))


def labelled_loss(
    h_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    weights_N: Tensor,
    vocabulary: int,
    factors: Sequence[Tensor] = (),
    chunk: int | None = None,
) -> Tensor:
    """Σ weight·(−log p(target)) as one fp32 number, with exact gradients for `h_NH` and for `factors`.

    `head` maps hidden states to logits; `factors` are the trained tensors inside it, if its layer is adapted.
    `chunk` is how many rows are taken at a time, by default as many as `chunk_rows` says.
    """
    rows = chunk or chunk_rows(vocabulary, h_NH.dtype, h_NH.device.type)
    if not torch.is_grad_enabled():
        losses_N, _, _ = token_losses(h_NH, head, targets_N, vocabulary, chunk=chunk)
        return (losses_N * weights_N).sum()
    return _LabelledLoss.apply(h_NH, head, targets_N, weights_N, rows, *factors)


def log_probabilities(logits_NV: Tensor) -> Tensor:
    """log p of every token, [N, V]. Not by torch's log_softmax: in fp32, its sum over a vocabulary is 1e-5 off."""
    below = logits_NV - logits_NV.amax(-1, keepdim=True).detach()  # whose gradient cancels
    return below - below.logsumexp(-1, keepdim=True)


@torch.no_grad()
def token_losses(
    h_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    vocabulary: int,
    columns: Sequence[int] = (),
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(−log p(target), whether the target is the most likely token, logits of `columns`): [N], [N], [N, columns]."""
    losses, hits, chosen = [], [], []
    rows = chunk or chunk_rows(vocabulary, h_NH.dtype, h_NH.device.type)
    for h, targets in zip(h_NH.split(rows), targets_N.split(rows), strict=True):
        logits_NV = head(h)
        for part in _pieces(logits_NV, torch.float32):
            logits, target = logits_NV[part].float(), targets[part]
            hits.append(logits.argmax(-1) == target)
            chosen.append(logits[:, list(columns)])
            losses.append(-log_probabilities(logits).gather(1, target[:, None])[:, 0])
    if not losses:
        nothing = h_NH.new_zeros(0, dtype=torch.float32)
        return nothing, nothing.bool(), nothing.view(0, len(columns))
    return torch.cat(losses), torch.cat(hits), torch.cat(chosen)


class _LabelledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_NH: Tensor, head: Head, targets_N: Tensor, weights_N: Tensor, rows: int, *factors: Tensor
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=h_NH.device)
        grad_h = torch.empty_like(h_NH)
        grad_factors = [torch.zeros_like(factor, dtype=torch.float32) for factor in factors]
        for start in range(0, len(h_NH), rows):
            part = slice(start, start + rows)
            with torch.enable_grad():
                h = h_NH[part].detach().requires_grad_()
                logits_NV = head(h)
            losses_N, d_logits_NV = _losses_and_slopes(logits_NV.detach(), targets_N[part], weights_N[part])
            grad_h[part], *grads = torch.autograd.grad(logits_NV, [h, *factors], d_logits_NV)
            total += (losses_N * weights_N[part]).sum()
            for sum_so_far, grad in zip(grad_factors, grads, strict=True):
                sum_so_far += grad
        ctx.save_for_backward(grad_h, *(g.to(f.dtype) for g, f in zip(grad_factors, factors, strict=True)))
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = grad_outputs
        # Multiplied in fp32: in bf16, 1/(tokens of the step) alone would already be wrong by up to 0.4 %.
        grad_h, *grad_factors = [(grad.float() * upstream).to(grad.dtype) for grad in ctx.saved_tensors]
        return (grad_h, None, None, None, None, *grad_factors)


def _losses_and_slopes(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor]:
    """(−log p(target) [N] in fp32, ∂(Σ weight·loss)/∂logits [N, V] in the dtype of the logits).

    ∂ = weight·(p − 1[target]). The loss is (the largest logit − that of the target) − log(the largest p). p is the
    softmax over its own sum: where one token has nearly all, a sum in fp32 loses the rest that falls into its lane.
    """
    if compiled.takes(logits_NV):
        return compiled.losses_and_slopes(logits_NV, targets_N, weights_N)
    N, V = logits_NV.shape
    finer = torch.promote_types(logits_NV.dtype, torch.float32)
    losses_N, slopes_NV = logits_NV.new_empty(N, dtype=finer), torch.empty_like(logits_NV)
    pieces = _pieces(logits_NV, finer)
    buffer = logits_NV.new_empty(min(pieces[0].stop, N), V, dtype=finer)
    for part in pieces:
        logits, targets_n1 = logits_NV[part], targets_N[part, None]
        p = torch.softmax(logits, -1, dtype=finer, out=buffer[: len(logits)])
        below_largest = logits.amax(-1).to(finer) - logits.gather(1, targets_n1)[:, 0].to(finer)
        sums_n1 = p.sum(-1, keepdim=True)
        losses_N[part] = below_largest - (p.amax(-1) / sums_n1[:, 0]).log()
        p.scatter_add_(1, targets_n1, -sums_n1)
        slopes_NV[part] = p.mul_(weights_N[part, None] / sums_n1)
    return losses_N, slopes_NV


def _pieces(logits_NV: Tensor, finer: torch.dtype) -> list[slice]:
    """The rows that are taken at a time: on CPU as many as `PIECE_BYTES` of the finer dtype hold, at least two."""
    N, V = logits_NV.shape
    rows = max(2, PIECE_BYTES // (finer.itemsize * V)) if logits_NV.device.type == "cpu" else max(1, N)
    return [slice(start, start + rows) for start in range(0, N, rows)]
