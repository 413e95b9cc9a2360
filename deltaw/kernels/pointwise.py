"""What lies between the products of a decoder layer: norms, rotary angles, gates. Each with its backward by hand,
in torch, and through deltaw/kernels/compiled.py where that takes the tensor.

All compute in fp32 at least and round once. Nothing is kept that can be formed again from the input.

Legend: x_TH rows of H numbers; x_TND heads; cos_TE and sin_TE of half the rotated width E; T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.adapter.weight import dense_weight, weight_shape
from deltaw.kernels import compiled


class Norm(NamedTuple):
    """x/√(mean x² + eps) · (offset + weight): the layer that holds the weight, and its constants."""

    layer: nn.Module
    eps: float
    offset: float

    @property
    def width(self) -> int:
        """Over how many numbers it is taken."""
        return int(weight_shape(self.layer).numel())

    def gain(self, dtype: torch.dtype) -> Tensor:
        """What the normalised numbers are multiplied by."""
        gain = dense_weight(self.layer).to(dtype)
        return gain if self.offset == 0 else gain + self.offset


def finer(x: Tensor) -> Tensor:
    """x in fp32, or as it is where it is finer."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x_TH: Tensor, norm: Norm) -> Tensor:
    """RMSNorm (arXiv 1910.07467) over the last axis, rounded once."""
    if compiled.takes(x_TH):
        return compiled.rms_norm(x_TH, norm.gain(torch.float32), norm.eps)
    x = finer(x_TH)
    return (x * _rate(x, norm)).mul_(norm.gain(x.dtype)).to(x_TH.dtype)


def rms_norm_backward(d_TH: Tensor, x_TH: Tensor, norm: Norm, more_TH: Tensor | None = None) -> Tensor:
    """dx = r·(d·g − x̂·mean(d·g·x̂)) with r = 1/rms and x̂ = r·x; plus what else x is to get, rounded once."""
    if compiled.takes(x_TH):
        return compiled.rms_norm_backward(d_TH, x_TH, norm.gain(torch.float32), norm.eps, more_TH)
    x = finer(x_TH)
    rate = _rate(x, norm)
    unit = x.mul_(rate) if x is not x_TH else x * rate
    d = finer(d_TH) * norm.gain(x.dtype)
    along = (d * unit).mean(-1, keepdim=True)
    dx = d.addcmul_(unit, along, value=-1).mul_(rate)
    return (dx if more_TH is None else dx.add_(more_TH)).to(x_TH.dtype)


def _rate(x: Tensor, norm: Norm) -> Tensor:
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return squares.div_(x.shape[-1]).add_(norm.eps).rsqrt_()


def rotate(x_TND: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864): the first 2·E numbers of each head turned in pairs (i, i + E).

    With −sin it is its own transpose, which is what backward needs.
    """
    if compiled.takes(x_TND):
        return compiled.rotate(x_TND, cos_TE, sin_TE)
    E = cos_TE.shape[-1]
    cos, sin = cos_TE[:, None], sin_TE[:, None]
    x = finer(x_TND)
    first, second = x[..., :E], x[..., E : 2 * E]
    out = x.clone() if x.shape[-1] > 2 * E else torch.empty_like(x)
    torch.mul(first, cos, out=out[..., :E]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., E : 2 * E]).addcmul_(first, sin)
    return out.to(x_TND.dtype)


def gated(g: Tensor, u: Tensor, activation: str) -> Tensor:
    """activation(g)·u (arXiv 2002.05202): "silu", "gelu" or "gelu_tanh"."""
    if activation == "silu" and compiled.takes(g):
        return compiled.gated(g, u)
    return _active(g, activation).mul_(u)


def gated_backward(d: Tensor, g: Tensor, u: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """(dg, du) of `gated`, and its value once more, which shares the activation with du."""
    if activation == "silu" and compiled.takes(g):
        return compiled.gated_backward(d, g, u)
    active = _active(g, activation)
    value = active * u
    du = active.mul_(d)
    if activation == "silu":
        return torch.ops.aten.silu_backward(d * u, g), du, value
    kind = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(d * u, g, approximate=kind), du, value


def _active(g: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(g)
    return F.gelu(g, approximate="tanh" if activation == "gelu_tanh" else "none")
