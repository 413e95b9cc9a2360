"""How one layer is adapted: the low-rank branch beside a frozen layer of any kind. It never changes the layer.

There are two mechanisms, and every kind of layer uses one of them:
  activation  the layer runs as it is, then s·B·(A·x) is added to its output (Linear, Conv1D, convolutions, embeddings);
  parameter   the layer runs while `W + s·B·A` shadows W as a plain attribute (attention projections that are read, not
              called; stacked experts), and the shadow is gone when the layer returns. PyTorch looks an attribute up in
              the instance before it asks for a parameter of that name, so the parameter itself stays untouched.
Both hang on the layer as hooks, so the class, the parameter names and the state dict of the model stay what they were.

Legend: x_TI inputs, A_RI, B_OR; T tokens, I inputs, O outputs, R rank, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltaw.adapter import math
from deltaw.adapter.product import finer_dora, finer_product
from deltaw.adapter.weight import dense_weight, weight_shape
from deltaw.errors import AdapterError

CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}


@dataclass(frozen=True)
class Target:
    """One weight that will be adapted, of one `kind`: linear, transposed, conv or embedding, whose layer is called;
    parameter, parameter_transposed (stacked experts) or parameter_attention, whose weight is read by other code.

    `owner` is the module whose call uses the weight, `holder` the module that holds it as `parameter`; they differ only
    for projections that their parent reads (the output projection of nn.MultiheadAttention).
    """

    name: str
    kind: str
    owner: nn.Module = field(repr=False, compare=False)
    holder: nn.Module = field(repr=False, compare=False)
    parameter: str
    shape: tuple[int, ...]
    rank: int
    alpha: float
    scale: float
    dora: bool = False
    selection: tuple[str, ...] = ()

    @property
    def is_parameter(self) -> bool:
        """Whether the weight is read by code that deltaw cannot see, so that it must be shadowed."""
        return self.kind.startswith("parameter")

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as [in, out]."""
        return self.kind in ("transposed", "embedding", "parameter_transposed")

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in) of the matrix that ΔW is, a convolution's kernel counted to its inputs."""
        if self.kind == "conv":
            return self.shape[0], int(torch.Size(self.shape[1:]).numel())
        out, inner = self.shape[-2:]
        return (inner, out) if self.transposed else (out, inner)

    @property
    def fan_in(self) -> int:
        """How many inputs one output sums over."""
        return self.matrix_shape[1]

    @property
    def A_shape(self) -> tuple[int, ...]:
        """Shape of A: [R, I], [E, R, I] for experts, [R, I, *kernel] for convolutions, [R, V] for embeddings."""
        if self.kind == "conv":
            return (self.rank, *self.shape[1:])
        return (*self.shape[:-2], self.rank, self.fan_in)

    @property
    def B_shape(self) -> tuple[int, ...]:
        """Shape of B: [O, R], [E, O, R] for experts, [O, R, 1, …] for convolutions, [D, R] for embeddings."""
        if self.kind == "conv":
            return (self.shape[0], self.rank, *(1 for _ in self.shape[2:]))
        return (*self.shape[:-2], self.matrix_shape[0], self.rank)

    @property
    def parameters(self) -> int:
        """How many numbers are trained for this target."""
        extra = self.matrix_shape[0] if self.dora else 0
        return int(torch.Size(self.A_shape).numel() + torch.Size(self.B_shape).numel()) + extra

    @property
    def weight_dtype(self) -> torch.dtype:
        """What W is held in."""
        return dense_weight(self.holder, self.parameter).dtype

    def weight_matrix(self) -> Tensor:
        """W as [out, in], fp32, for one matrix (not for experts)."""
        weight = dense_weight(self.holder, self.parameter).float()
        return weight.T if self.transposed else weight.flatten(1)

    def row_norm(self) -> Tensor:
        """‖W‖ of each output row, [O] in fp32: the start of DoRA's magnitude."""
        return self.weight_matrix().norm(dim=1)

    def delta(self, A: Tensor, B: Tensor) -> Tensor:
        """ΔW = s·B·A in the layout of the weight; what DoRA's magnitude does is in `merged_weight` only."""
        if self.kind == "conv":
            A, B = A.flatten(1), B.flatten(1)
        return math.delta(A, B, self.scale, transposed=self.transposed).reshape(self.shape)

    def merged_weight(self, A: Tensor, B: Tensor, magnitude: Tensor | None) -> Tensor:
        """The weight that computes what layer and adapter compute together, in fp32 and in the layout of the weight."""
        weight = dense_weight(self.holder, self.parameter).float()
        if magnitude is None:
            return weight + self.delta(A.float(), B.float())
        A, B = A.float().flatten(1), B.float().flatten(1)
        merged = math.dora_weight(self.weight_matrix(), A, B, self.scale, magnitude.float())
        return (merged.T if self.transposed else merged).reshape(self.shape)


class AdaptedLayer:
    """The live branch of one target: factors in the dtype of the computation, and the formula that uses them.

    A plain object, not a module: the model's parameters and state dict do not know it. `A`, `B` and `magnitude` are
    leaf tensors that ask for gradients; an engine may point them at slices of a flat buffer. Dropout acts while
    `training` is set, whatever mode the frozen model is in.
    """

    def __init__(self, target: Target, A: Tensor, B: Tensor, magnitude: Tensor | None, dropout: float) -> None:
        self.target, self.scale, self.dropout = target, target.scale, dropout
        self.A, self.B, self.magnitude = A, B, magnitude
        self.training = False
        branches = {"linear": self._linear_branch, "transposed": self._linear_branch, "conv": self._conv_branch}
        self.branch = {**branches, "embedding": self._embedding_branch}.get(target.kind, self._linear_branch)

    def tensors(self) -> list[tuple[str, Tensor]]:
        """The trained tensors with their names."""
        named = [("A", self.A), ("B", self.B)]
        return named if self.magnitude is None else [*named, ("magnitude", self.magnitude)]

    def add_to(self, x: Tensor, out: Tensor, strength: float) -> Tensor:
        """The layer's output with the adapter's part added, `strength` times; activation kinds only."""
        if self.dropout and self.training and x.is_floating_point():
            x = F.dropout(x, self.dropout)
        if self.magnitude is None:
            return self.branch(x, out, self.B, self.scale * strength)
        adapted = self._dora(x, out, self.magnitude)
        return adapted if strength == 1 else out + strength * (adapted - out)

    def shadow_weight(self, strength: float) -> Tensor:
        """W + strength·ΔW in the dtype of W, rounded once, differentiable in the factors; parameter kinds only."""
        weight = dense_weight(self.target.holder, self.target.parameter)
        left, right = self.B.to(weight.dtype), self.A.to(weight.dtype)
        if self.target.transposed:
            left, right = right.transpose(-1, -2), left.transpose(-1, -2)
        add_product = torch.baddbmm if weight.ndim == 3 else torch.addmm
        return add_product(weight, left, right, alpha=self.scale * strength)

    # -- one formula per kind: `out + s·B·(A·x)`; B is an argument because DoRA scales its rows -------------------

    def _linear_branch(self, x: Tensor, out: Tensor, B: Tensor, s: float) -> Tensor:
        if x.is_nested:  # what nn.TransformerEncoder makes of padded rows
            return out + s * F.linear(F.linear(x, self.A), B)
        x_TI, out_TO = x.reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1])
        if self.A.dtype.itemsize > out.dtype.itemsize:
            return finer_product(x_TI, out_TO, self.A, B.to(self.A.dtype), s).view_as(out)
        return torch.addmm(out_TO, F.linear(x_TI, self.A.to(x.dtype)), B.to(out.dtype).T, alpha=s).view_as(out)

    def _conv_branch(self, x: Tensor, out: Tensor, B: Tensor, s: float) -> Tensor:
        layer: Any = self.target.owner
        convolve = next(f for kind, f in CONVOLUTIONS.items() if isinstance(layer, kind))
        return out + s * convolve(convolve(x, self.A.to(x.dtype), None, layer.stride, layer.padding), B.to(x.dtype))

    def _embedding_branch(self, ids: Tensor, out: Tensor, B: Tensor, s: float) -> Tensor:
        """Some embeddings multiply the rows that they look up by `embed_scale` (Gemma): then the branch does too."""
        layer: Any = self.target.owner
        rows = F.embedding(ids, self.A.T, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)
        return out + (s * getattr(layer, "embed_scale", 1.0) * (rows @ B.to(rows.dtype).T)).to(out.dtype)

    def _dora(self, x: Tensor, out: Tensor, magnitude: Tensor) -> Tensor:
        """g·(W·x + s·B·A·x) + bias with g = m/‖W + s·B·A‖, the norm held constant (arXiv 2402.09353 §4.3).

        Computed as out + (g−1)·W·x + s·(g·B)·A·x: g−1 is small, so rounding it to bf16 costs little where rounding g
        would not, and the start, g = 1, is the base itself. We differ from PEFT with dropout only: it falls on the
        low-rank branch, never on the frozen one.
        """
        with torch.no_grad():
            norm_O = math.row_norm(self.target.weight_matrix(), self.A.flatten(1), self.B.flatten(1), self.scale)
        gain_O = math.dora_gain(magnitude, norm_O)
        bias: Tensor | None = getattr(self.target.owner, "bias", None)
        if self.branch == self._linear_branch and self.A.dtype.itemsize > out.dtype.itemsize and not x.is_nested:
            x_TI, out_TO = x.reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1])
            gained = gain_O[:, None] * self.B
            return finer_dora(x_TI, out_TO, self.A, gained, self.scale, gain_O.to(self.A.dtype), bias).view_as(out)
        channel = (-1, *(1 for _ in self.target.shape[2:])) if self.target.kind == "conv" else (-1,)
        frozen = out if bias is None else out - bias.view(channel)
        moved = torch.addcmul(out, frozen, (gain_O - 1).to(out.dtype).view(channel))
        return self.branch(x, moved, gain_O.view(-1, *(1 for _ in self.B.shape[1:])) * self.B, self.scale)


Live = Callable[[], tuple[list[AdaptedLayer], float]]


def attach(owner: nn.Module, live: Live) -> list[RemovableHandle]:
    """Hooks on `owner` that apply the layers `live()` names at each call; returns the handles that take them off.

    A hook that does nothing still matters: PyTorch's fused transformer layer reads weights without calling the layers
    that hold them, and it steps aside where hooks are present.
    """

    def before(_module: nn.Module, _args: tuple[Any, ...]) -> None:
        layers, strength = live()
        for layer in layers:
            if layer.target.is_parameter:
                layer.target.holder.__dict__[layer.target.parameter] = layer.shadow_weight(strength)

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        layers, strength = live()
        for layer in layers:
            if layer.target.is_parameter:
                layer.target.holder.__dict__.pop(layer.target.parameter, None)
            elif isinstance(out, Tensor):
                out = layer.add_to(args[0] if args else next(iter(kwargs.values())), out, strength)
            elif out is not None:  # None: the layer itself raised an error
                kind = type(module).__name__
                raise AdapterError(
                    f"{layer.target.name}: {kind} returns {type(out).__name__}, not a tensor; exclude it"
                )
        return out

    return [
        owner.register_forward_pre_hook(before),
        owner.register_forward_hook(after, with_kwargs=True, always_call=True),
    ]


def keep_rows_padded(encoder: nn.TransformerEncoder) -> list[RemovableHandle]:
    """Hooks that keep PyTorch's encoder from packing padded rows for a fused path that hooked layers do not take."""
    usual = encoder.use_nested_tensor

    def before(_module: nn.Module, _args: tuple[Any, ...]) -> None:
        encoder.use_nested_tensor = False

    def after(_module: nn.Module, _args: tuple[Any, ...], _out: Any) -> None:
        encoder.use_nested_tensor = usual

    return [encoder.register_forward_pre_hook(before), encoder.register_forward_hook(after, always_call=True)]


def shape_of(holder: nn.Module, parameter: str) -> tuple[int, ...]:
    """The shape of a weight as a plain tuple."""
    return tuple(weight_shape(holder, parameter))
