"""Frozen linear layers that share an input, with low-rank factors beside them: y_j = W_j·x + s_j·B_j·(A_j·x).

Forward and backward are written by hand, as plain functions that deltaw/kernels/block.py puts into autograd. Layers
that share an input share the products with their A's: one product gives every A_j·x, one every dA_j, one their part of
dx. No frozen weight is kept between forward and backward; each is asked for when it is needed.

fp32 factors beside a bf16 layer are rounded to bf16 for the products, and their gradients are fp32 again. On a real
model that adds little to the error that the bf16 layers make themselves (tests/oracle/test_kernels.py).

Legend: x_TI inputs, y_TO outputs, W_OI, A_RI, B_OR; T tokens, I inputs, O outputs, R rank; S sum of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.adapter.weight import dense_weight


class Branch(NamedTuple):
    """The low-rank branch beside one layer."""

    A_RI: Tensor
    B_OR: Tensor
    scale: float


Branches = Sequence[Branch | None]


def projections(x_TI: Tensor, layers: Sequence[nn.Module], branches: Branches) -> tuple[list[Tensor], Tensor | None]:
    """(y of each layer, every A·x of the adapted ones side by side, [T, S]; None where nothing is adapted)."""
    ys = [F.linear(x_TI, dense_weight(layer), getattr(layer, "bias", None)) for layer in layers]
    adapted = [(y, branch) for y, branch in zip(ys, branches, strict=True) if branch is not None]
    if not adapted:
        return ys, None
    xA_TS = x_TI @ _stacked([branch.A_RI for _, branch in adapted], x_TI.dtype).T
    for (y_TO, branch), xA_TR in zip(adapted, xA_TS.split(_ranks(branches), 1), strict=True):
        y_TO.addmm_(xA_TR, _scaled_B(branch, y_TO.dtype).T)
    return ys, xA_TS


def input_gradient(
    ds: Sequence[Tensor], layers: Sequence[nn.Module], branches: Branches, need_dx: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, or None if it is not needed; every gradient of A·x side by side, [T, S], or None where none is adapted)."""
    dx_TI: Tensor | None = None
    for d_TO, layer in zip(ds if need_dx else (), layers, strict=False):
        weight = dense_weight(layer)
        dx_TI = d_TO @ weight if dx_TI is None else dx_TI.addmm_(d_TO, weight)
        del weight  # one that was formed shall lend its memory to the next
    adapted = [(d, branch) for d, branch in zip(ds, branches, strict=True) if branch is not None]
    if not adapted:
        return dx_TI, None
    dxAs = [d_TO @ _scaled_B(branch, d_TO.dtype) for d_TO, branch in adapted]
    dxA_TS = dxAs[0] if len(dxAs) == 1 else torch.cat(dxAs, 1)
    if dx_TI is not None:
        dx_TI.addmm_(dxA_TS, _stacked([branch.A_RI for _, branch in adapted], dxA_TS.dtype))
    return dx_TI, dxA_TS


def factor_gradients(
    ds: Sequence[Tensor], x_TI: Tensor, xA_TS: Tensor, dxA_TS: Tensor, branches: Branches
) -> list[Tensor]:
    """dA and dB of each adapted layer in turn, in the dtype of the factors."""
    adapted = [(d, branch) for d, branch in zip(ds, branches, strict=True) if branch is not None]
    dAs = (dxA_TS.T @ x_TI).split(_ranks(branches))
    grads = []
    for (d_TO, branch), xA_TR, dA_RI in zip(adapted, xA_TS.split(_ranks(branches), 1), dAs, strict=True):
        grads.append(dA_RI.to(branch.A_RI.dtype))
        grads.append((d_TO.T @ xA_TR).to(branch.B_OR.dtype).mul_(branch.scale))
    return grads


def _ranks(branches: Branches) -> list[int]:
    return [len(branch.A_RI) for branch in branches if branch is not None]


def _scaled_B(branch: Branch, dtype: torch.dtype) -> Tensor:
    """s·B in `dtype`: as an `alpha` of the product, s would cost as much as the product itself."""
    B_OR = branch.B_OR.detach()
    return (B_OR if branch.scale == 1 else B_OR * branch.scale).to(dtype)


def _stacked(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The factors below each other, [S, I] in `dtype`."""
    parts = [factor.detach().to(dtype) for factor in factors]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
