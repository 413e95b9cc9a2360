"""The halves of a decoder layer as four autograd functions that keep only what backward cannot form again.

    x ─ norm ─ q, k, v ─ attention ─ o ─(+ x)─ norm ─ gate, up ─ act(gate)·up ─ down ─(+)─
       └ normed_projections ┘        └ projected_sum ┘└ normed_projections ┘└── gated_sum ──┘

`normed_projections` hands x on to the sum, so that backward adds x's two gradients where it forms one of them.

Kept for each token: the input of each half, q, k, v and the attention's output, gate and up, and the A·x of adapted
layers. Norms, rotated heads, probabilities and products of gates are formed again. Nothing is computed for an input
that needs no gradient, so nothing below the lowest adapter costs a backward.

Legend: T tokens, H hidden width, I inputs and O outputs of a layer, A_RI, B_OR.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deltaw.kernels.attention import document_attention
from deltaw.kernels.linear import Branch, Branches, factor_gradients, input_gradient, projections
from deltaw.kernels.pointwise import Norm, gated, gated_backward, rms_norm, rms_norm_backward, rotate
from deltaw.kernels.tiles import Span, attend, attend_backward

Gradients = tuple[Tensor | None, ...]
Scales = Sequence[float | None]


def normed_projections(
    x_TH: Tensor, norm: Norm | None, layers: Sequence[nn.Module], branches: Branches
) -> tuple[list[Tensor], Tensor]:
    """(W·norm(x) + s·B·A·norm(x) of layers that share an input, [T, O] each; x, for the sum that is to come)."""
    *ys, passed_TH = _NormedProjections.apply(x_TH, norm, layers, _scales(branches), *_factors(branches))
    return ys, passed_TH if x_TH.requires_grad else x_TH


def normed(x_TH: Tensor, norm: Norm | None) -> Tensor:
    """norm(x), or x where there is none."""
    if norm is None:
        return x_TH
    out: Tensor = _Normed.apply(x_TH, norm)
    return out


def projected_sum(x_TH: Tensor, o_TI: Tensor, layer: nn.Module, branch: Branch | None, norm: Norm | None) -> Tensor:
    """x + norm(W·o + s·B·A·o); without `norm`, which stands behind the layer in some architectures, the plain sum."""
    out: Tensor = _ProjectedSum.apply(x_TH, o_TI, norm, layer, _scales([branch]), *_factors([branch]))
    return out


def gated_sum(
    x_TH: Tensor,
    g_TI: Tensor,
    u_TI: Tensor,
    activation: str,
    layer: nn.Module,
    branch: Branch | None,
    norm: Norm | None,
) -> Tensor:
    """x + norm(down(act(g)·u)): `projected_sum` of a product that is not kept."""
    out: Tensor = _GatedSum.apply(x_TH, g_TI, u_TI, activation, norm, layer, _scales([branch]), *_factors([branch]))
    return out


@dataclass(frozen=True)
class Heads:
    """How one attention layer reads its q, k and v."""

    width: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None


def rotary_attention(
    q_TX: Tensor, k_TY: Tensor, v_TY: Tensor, heads: Heads, angles: tuple[Tensor, Tensor], spans: tuple[Span, ...]
) -> Tensor:
    """Attention outputs [T, heads·width] of projected q, k and v, which are normed (if at all) and rotated here."""
    if q_TX.device.type == "cpu":
        out: Tensor = _RotaryAttention.apply(q_TX, k_TY, v_TY, heads, angles, spans)
        return out
    q, k = _Prepare.apply(q_TX, heads.q_norm, heads, angles), _Prepare.apply(k_TY, heads.k_norm, heads, angles)
    v = v_TY.unflatten(1, (-1, heads.width))
    return document_attention(q, k, v, spans, heads.scale, heads.window, heads.softcap).flatten(1)


# -- autograd ---------------------------------------------------------------------------------------------------------


def _factors(branches: Branches) -> list[Tensor]:
    return [factor for branch in branches if branch is not None for factor in (branch.A_RI, branch.B_OR)]


def _scales(branches: Branches) -> Scales:
    return [None if branch is None else branch.scale for branch in branches]


def _branches(scales: Scales, factors: Sequence[Tensor]) -> list[Branch | None]:
    """What `_scales` and `_factors` took apart."""
    pairs = iter(zip(factors[::2], factors[1::2], strict=True))
    return [None if scale is None else Branch(*next(pairs), scale) for scale in scales]


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, norm: Norm) -> Tensor:
        ctx.save_for_backward(x_TH)
        ctx.norm = norm
        return rms_norm(x_TH, norm)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Gradients:
        (x_TH,) = ctx.saved_tensors
        return rms_norm_backward(upstream[0], x_TH, ctx.norm), None


class _NormedProjections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, norm: Norm | None, layers: Sequence[nn.Module], scales: Scales, *factors: Tensor
    ) -> tuple[Tensor, ...]:  # fmt: skip
        n_TH = x_TH if norm is None else rms_norm(x_TH, norm)
        ys, xA_TS = projections(n_TH, layers, _branches(scales, factors))
        ctx.save_for_backward(x_TH, xA_TS, *factors)
        ctx.rest = (norm, layers, scales)
        return (*ys, x_TH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Gradients:
        *ds, passed_TH = upstream
        x_TH, xA_TS, *factors = ctx.saved_tensors
        norm, layers, scales = ctx.rest
        branches, grads = _branches(scales, factors), []
        dn_TH, dxA_TS = input_gradient(ds, layers, branches, ctx.needs_input_grad[0])
        if dxA_TS is not None:
            n_TH = x_TH if norm is None else rms_norm(x_TH, norm)
            grads = factor_gradients(ds, n_TH, xA_TS, dxA_TS, branches)
        if dn_TH is None:
            dx_TH = None
        elif norm is None:
            dx_TH = dn_TH.add_(passed_TH)
        else:
            dx_TH = rms_norm_backward(dn_TH, x_TH, norm, passed_TH)
        return (dx_TH, None, None, None, *grads)


class _ProjectedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, o_TI: Tensor, norm: Norm | None, layer: nn.Module, scales: Scales, *factors: Tensor
    ) -> Tensor:  # fmt: skip
        y_TH, xA_TS, out_TH = _sum(x_TH, o_TI, norm, layer, _branches(scales, factors))
        ctx.save_for_backward(o_TI, xA_TS, y_TH, *factors)
        ctx.rest = (norm, layer, scales)
        return out_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Gradients:
        o_TI, xA_TS, y_TH, *factors = ctx.saved_tensors
        norm, layer, scales = ctx.rest
        dy_TH = upstream[0] if norm is None else rms_norm_backward(upstream[0], y_TH, norm)
        branches, grads = _branches(scales, factors), []
        do_TI, dxA_TS = input_gradient([dy_TH], [layer], branches, ctx.needs_input_grad[1])
        if dxA_TS is not None:
            grads = factor_gradients([dy_TH], o_TI, xA_TS, dxA_TS, branches)
        return (upstream[0], do_TI, None, None, None, *grads)


class _GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, g_TI: Tensor, u_TI: Tensor, activation: str,
        norm: Norm | None, layer: nn.Module, scales: Scales, *factors: Tensor,
    ) -> Tensor:  # fmt: skip
        y_TH, xA_TS, out_TH = _sum(x_TH, gated(g_TI, u_TI, activation), norm, layer, _branches(scales, factors))
        ctx.save_for_backward(g_TI, u_TI, xA_TS, y_TH, *factors)
        ctx.rest = (activation, norm, layer, scales)
        return out_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Gradients:
        g_TI, u_TI, xA_TS, y_TH, *factors = ctx.saved_tensors
        activation, norm, layer, scales = ctx.rest
        dy_TH = upstream[0] if norm is None else rms_norm_backward(upstream[0], y_TH, norm)
        branches, grads = _branches(scales, factors), []
        da_TI, dxA_TS = input_gradient([dy_TH], [layer], branches, any(ctx.needs_input_grad[1:3]))
        if da_TI is None:
            dg_TI, du_TI, a_TI = None, None, gated(g_TI, u_TI, activation)
        else:
            dg_TI, du_TI, a_TI = gated_backward(da_TI, g_TI, u_TI, activation)
        if dxA_TS is not None:
            grads = factor_gradients([dy_TH], a_TI, xA_TS, dxA_TS, branches)
        return (upstream[0], dg_TI, du_TI, None, None, None, None, *grads)


def _sum(
    x_TH: Tensor, o_TI: Tensor, norm: Norm | None, layer: nn.Module, branches: Branches
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(W·o + s·B·A·o where a norm needs it in backward, A·o, the sum)."""
    (y_TH,), xA_TS = projections(o_TI, [layer], branches)
    if norm is None:
        return None, xA_TS, y_TH.add_(x_TH)
    return y_TH, xA_TS, rms_norm(y_TH, norm).add_(x_TH)


class _RotaryAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_TX: Tensor, k_TY: Tensor, v_TY: Tensor,
        heads: Heads, angles: tuple[Tensor, Tensor], spans: tuple[Span, ...],
    ) -> Tensor:  # fmt: skip
        q_THD, k_TKD = _prepared(q_TX, heads.q_norm, heads, angles), _prepared(k_TY, heads.k_norm, heads, angles)
        # What a norm needs in backward, or, where there is none, what attention needs.
        kept = (q_THD if heads.q_norm is None else q_TX, k_TKD if heads.k_norm is None else k_TY)
        ctx.save_for_backward(*kept, v_TY, *angles)
        ctx.rest = (heads, spans)
        v_TKD = v_TY.unflatten(1, (-1, heads.width))
        return attend(q_THD, k_TKD, v_TKD, spans, heads.scale, heads.window, heads.softcap).flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Gradients:
        q, k, v_TY, *angles = ctx.saved_tensors
        heads, spans = ctx.rest
        q_THD = q if heads.q_norm is None else _prepared(q, heads.q_norm, heads, angles)
        k_TKD = k if heads.k_norm is None else _prepared(k, heads.k_norm, heads, angles)
        d_THD, v_TKD = (x.unflatten(1, (-1, heads.width)) for x in (upstream[0], v_TY))
        given = (spans, heads.scale, heads.window, heads.softcap)
        dq, dk, dv = attend_backward(d_THD, q_THD, k_TKD, v_TKD, *given)
        dq_TX = _prepared_backward(dq, q, heads.q_norm, angles)
        return dq_TX, _prepared_backward(dk, k, heads.k_norm, angles), dv.flatten(1), None, None, None


class _Prepare(torch.autograd.Function):
    """Norm and rotation alone, where attention is a function of torch."""

    @staticmethod
    def forward(ctx: Any, x_TX: Tensor, norm: Norm | None, heads: Heads, angles: tuple[Tensor, Tensor]) -> Tensor:
        ctx.save_for_backward(None if norm is None else x_TX, *angles)
        ctx.norm = norm
        return _prepared(x_TX, norm, heads, angles)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Gradients:
        x_TX, *angles = ctx.saved_tensors
        return _prepared_backward(upstream[0], x_TX, ctx.norm, angles), None, None, None


def _prepared(x_TX: Tensor, norm: Norm | None, heads: Heads, angles: Sequence[Tensor]) -> Tensor:
    """Heads [T, N, D], normed where the architecture does (over each head, or over all of them) and rotated."""
    if norm is not None:
        rows = x_TX.unflatten(1, (-1, norm.width))
        x_TX = rms_norm(rows, norm).flatten(1)
    return rotate(x_TX.unflatten(1, (-1, heads.width)), *angles)


def _prepared_backward(d_TND: Tensor, x_TX: Tensor, norm: Norm | None, angles: Sequence[Tensor]) -> Tensor:
    """The gradient of what `_prepared` was given; `x_TX` is read only where there is a norm."""
    cos_TE, sin_TE = angles
    d_TX = rotate(d_TND, cos_TE, -sin_TE).flatten(1)
    if norm is None:
        return d_TX
    rows = (-1, norm.width)
    return rms_norm_backward(d_TX.unflatten(1, rows), x_TX.unflatten(1, rows), norm).flatten(1)
