"""A decoder layer of transformers, read by its parts: which layers, norms and constants the kernels need.

Known are an attention of q, k, v (or all in one) and o, with or without norms of q and k; a gated MLP, or anything else
in its place, which is then called as it is; and RMS norms before, behind or around the two. A layer with any other part
is not read. What the attention function was told is taken from a call that the model itself made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from deltaw.base.formed import FormedLinear
from deltaw.kernels import Heads, Norm
from deltaw.kernels.pointwise import rms_norm

# By the names of the classes that torch and transformers have for them.
ACTIVATIONS = {
    **dict.fromkeys(("SiLU", "SiLUActivation"), "silu"),
    **dict.fromkeys(("GELU", "GELUActivation"), "gelu"),
    **dict.fromkeys(("GELUTanh", "NewGELUActivation"), "gelu_tanh"),
}
TOLD = "_deltaw_told"


class Told(NamedTuple):
    """What the model told the attention function about one of its layers."""

    scale: float
    window: int | None
    softcap: float | None


class Unreadable(Exception):
    """A part is not known; the message says which."""


@dataclass(frozen=True)
class Gate:
    """A gated MLP: gate and up (or both in one layer), activation, down."""

    layers: tuple[nn.Linear, ...]
    activation: str
    down: nn.Linear


@dataclass(frozen=True)
class Block:
    """One decoder layer. A norm that the architecture does not have is None; `mlp` is None where `other` stands."""

    heads: Heads
    qkv: tuple[nn.Linear, ...]
    widths: tuple[int, int, int]
    out: nn.Linear
    mlp: Gate | None
    other: nn.Module | None
    before_attention: Norm | None
    after_attention: Norm | None
    before_mlp: Norm | None
    after_mlp: Norm | None
    angles: str | None

    def layers(self) -> Iterator[nn.Linear]:
        """The linear layers that the kernels take part of themselves, without calling them."""
        yield from self.qkv
        yield self.out
        if self.mlp is not None:
            yield from self.mlp.layers
            yield self.mlp.down


def read_block(layer: nn.Module, angles: str | None) -> Block:
    """The layer by its parts; `angles` is its kind, where rotary angles differ by kind. Raises Unreadable."""
    parts = {name: part for name, part in layer.named_children() if not isinstance(part, nn.Dropout)}
    norms = set(parts) - {"self_attn", "mlp"}
    around = {"input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"}
    if norms == around:
        places = (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        )
    elif norms == {"input_layernorm", "post_attention_layernorm"}:
        places = ("input_layernorm", "", "post_attention_layernorm", "")
    elif norms == {"post_attention_layernorm", "post_feedforward_layernorm"}:
        places = ("", "post_attention_layernorm", "", "post_feedforward_layernorm")
    else:
        raise Unreadable(f"a layer is made of {', '.join(parts)}")
    before_attention, after_attention, before_mlp, after_mlp = (read_norm(parts[p]) if p else None for p in places)
    mlp = _gate(parts["mlp"])
    heads, qkv, widths, out = _attention(parts["self_attn"])
    other = None if mlp is not None else parts["mlp"]
    return Block(
        heads, qkv, widths, out, mlp, other, before_attention, after_attention, before_mlp, after_mlp, angles
    )  # fmt: skip


def _attention(part: Any) -> tuple[Heads, tuple[nn.Linear, ...], tuple[int, int, int], nn.Linear]:
    children = dict(part.named_children())
    norms = {name: children.pop(name) for name in ("q_norm", "k_norm") if name in children}
    if set(children) not in ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"qkv_proj", "o_proj"}):
        raise Unreadable(f"its attention is made of {', '.join(children)}")
    rope = getattr(getattr(part, "config", None), "rope_parameters", None) or {}
    if "llama_4_scaling_beta" in rope:  # beyond what a proof of a few tokens would see
        raise Unreadable("its queries grow with their positions")
    told = part.__dict__.get(TOLD)
    if told is None:
        raise Unreadable("its attention was not called")
    out = _linear(children.pop("o_proj"))
    layers = tuple(_linear(layer) for layer in children.values())
    width, queries = part.head_dim, out.in_features
    keys = (sum(layer.out_features for layer in layers) - queries) // 2
    heads = Heads(width, *told, *(read_norm(norms[name]) if name in norms else None for name in ("q_norm", "k_norm")))
    return heads, layers, (queries, keys, keys), out


def _gate(part: Any) -> Gate | None:
    """A gated MLP; None where something else stands (experts), which is called as it is."""
    children = dict(part.named_children())
    found = next((children.pop(name) for name in ("act_fn", "activation_fn") if name in children), None)
    activation = ACTIVATIONS.get(type(found).__name__)
    if activation is None or set(children) not in (
        {"gate_proj", "up_proj", "down_proj"},
        {"gate_up_proj", "down_proj"},
    ):
        return None
    down = _linear(children.pop("down_proj"))
    return Gate(tuple(_linear(layer) for layer in children.values()), activation, down)


def _linear(layer: nn.Module) -> nn.Linear:
    if type(layer) not in (nn.Linear, FormedLinear):
        raise Unreadable(f"a {type(layer).__name__} stands where a Linear is expected")
    assert isinstance(layer, nn.Linear)
    return layer


def read_norm(part: Any) -> Norm:
    """The constants of an RMSNorm; whether it multiplies by w or by 1 + w is found by asking it."""
    eps = getattr(part, "variance_epsilon", getattr(part, "eps", None))
    if [name for name, _ in part.named_parameters()] != ["weight"] or not isinstance(eps, float):
        raise Unreadable(f"{type(part).__name__} is no RMSNorm that is known")
    x_TH = torch.linspace(-2, 3, 2 * part.weight.numel(), device=part.weight.device).to(part.weight.dtype).view(2, -1)
    with torch.no_grad():
        expected = part(x_TH)
        for offset in (0.0, 1.0):
            norm = Norm(part, eps, offset)
            if torch.allclose(rms_norm(x_TH, norm).float(), expected.float(), rtol=2e-2, atol=1e-4):
                return norm
    raise Unreadable(f"{type(part).__name__} is no RMSNorm that is known")
