"""Cross-entropy over labelled tokens only, a chunk at a time, with the gradient formed in the forward pass.

Logits exist for one chunk of labelled tokens and are gone before the next, so memory does not grow with the vocabulary
times the tokens. Losses are returned as sums, never as means: whoever calls divides once, by the tokens of the step.

Legend: h_NH hidden states of the N labelled positions; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 64_000_000
Head = Callable[[Tensor], Tensor]


def chunk_rows(vocabulary: int) -> int:
    """How many rows of fp32 logits fit in `CHUNK_BYTES`; at least 16."""
    return max(16, CHUNK_BYTES // (4 * vocabulary))


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
    `chunk` is how many rows are taken at a time, by default as many as `CHUNK_BYTES` of logits hold.
    """
    rows = chunk or chunk_rows(vocabulary)
    if not torch.is_grad_enabled():
        losses_N, _, _ = token_losses(h_NH, head, targets_N, vocabulary, chunk=rows)
        return (losses_N * weights_N).sum()
    return _LabelledLoss.apply(h_NH, head, targets_N, weights_N, rows, *factors)


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
    for rows in torch.arange(len(h_NH), device=h_NH.device).split(chunk or chunk_rows(vocabulary)):
        logits_NV = head(h_NH[rows]).float()
        losses.append(F.cross_entropy(logits_NV, targets_N[rows], reduction="none"))
        hits.append(logits_NV.argmax(-1) == targets_N[rows])
        chosen.append(logits_NV[:, list(columns)])
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
                losses = F.cross_entropy(head(h).float(), targets_N[part], reduction="none")
                loss = (losses * weights_N[part]).sum()
                grad_h[part], *grads = torch.autograd.grad(loss, [h, *factors])
            total += loss.detach()
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
