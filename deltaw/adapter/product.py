"""out + s·B·(A·x) where the factors are finer than the activations: bf16 layers with fp32 factors.

Plain autograd would cast x and out to fp32 and keep the casts until backward, which is what PEFT's default does. Here
both are cast a block of rows at a time, in forward and in backward, so the numbers are those of the full cast and the
memory is not.

Legend: x_TI inputs, out_TO outputs, A_RI, B_OR, gain_O and bias_O of DoRA; T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS, GPU_ROWS = 256, 8192


def finer_product(x_TI: Tensor, out_TO: Tensor, A_RI: Tensor, B_OR: Tensor, s: float) -> Tensor:
    """out + s·B·(A·x), [T, O] in the dtype of `out`, computed in the dtype of the factors and rounded once."""
    with torch.autocast(x_TI.device.type, enabled=False):
        product: Tensor = _FinerProduct.apply(x_TI, out_TO, A_RI, B_OR, s, None, None)
    return product


def finer_dora(
    x_TI: Tensor, out_TO: Tensor, A_RI: Tensor, B_OR: Tensor, s: float, gain_O: Tensor, bias_O: Tensor | None
) -> Tensor:
    """out + (gain − 1)·(out − bias) + s·B·(A·x), computed and rounded in the same way; B already has the gain."""
    with torch.autocast(x_TI.device.type, enabled=False):
        product: Tensor = _FinerProduct.apply(x_TI, out_TO, A_RI, B_OR, s, gain_O, bias_O)
    return product


class _FinerProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        out_TO: Tensor,
        A_RI: Tensor,
        B_OR: Tensor,
        s: float,
        gain_O: Tensor | None,
        bias_O: Tensor | None,
    ) -> Tensor:
        xA_TR = A_RI.new_empty(len(x_TI), len(A_RI))
        sum_TO = torch.empty_like(out_TO)
        for rows in _blocks(x_TI):
            xA_TR[rows] = x_TI[rows].to(A_RI.dtype) @ A_RI.T
            out_bO = out_TO[rows].to(B_OR.dtype)
            if gain_O is not None:
                out_bO = torch.addcmul(out_bO, _frozen(out_bO, bias_O), gain_O - 1)
            sum_TO[rows] = torch.addmm(out_bO, xA_TR[rows], B_OR.T, alpha=s)
        kept = () if gain_O is None else (out_TO, gain_O, *([] if bias_O is None else [bias_O]))
        ctx.save_for_backward(x_TI, xA_TR, A_RI, B_OR, *kept)
        ctx.s = s
        return sum_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        d_TO = upstream[0]
        x_TI, xA_TR, A_RI, B_OR, *kept = ctx.saved_tensors
        out_TO, gain_O, bias_O = (*kept, None, None, None)[:3]
        dx_TI, dA_RI, dB_OR = torch.empty_like(x_TI), torch.zeros_like(A_RI), torch.zeros_like(B_OR)
        dout_TO = d_TO if gain_O is None else torch.empty_like(d_TO)
        dgain_O = None if gain_O is None else torch.zeros_like(gain_O)
        for rows in _blocks(x_TI):
            d_bO = d_TO[rows].to(B_OR.dtype)
            dxA_bR = ctx.s * (d_bO @ B_OR)
            dx_TI[rows] = dxA_bR @ A_RI
            dA_RI.addmm_(dxA_bR.T, x_TI[rows].to(A_RI.dtype))
            dB_OR.addmm_(d_bO.T, xA_TR[rows], alpha=ctx.s)
            if gain_O is not None and dgain_O is not None:
                dout_TO[rows] = d_bO * gain_O
                dgain_O += (d_bO * _frozen(out_TO[rows].to(B_OR.dtype), bias_O)).sum(0)
        return dx_TI, dout_TO, dA_RI, dB_OR, None, dgain_O, None


def _frozen(out_bO: Tensor, bias_O: Tensor | None) -> Tensor:
    """W·x alone: what DoRA's gain multiplies."""
    return out_bO if bias_O is None else out_bO - bias_O


def _blocks(x_TI: Tensor) -> list[slice]:
    size = ROWS if x_TI.device.type == "cpu" else GPU_ROWS  # there few rows would be all launches
    return [slice(start, start + size) for start in range(0, len(x_TI), size)]
