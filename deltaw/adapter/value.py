"""Adapter: a spec plus {name: factors}. Training makes one, files hold one, serving holds many; models only view it.

Names are module names for layers that compute with their weight in `forward` ("model.layers.0.mlp.up_proj"), and
parameter names for weights that other code reads ("model.layers.0.mlp.experts.down_proj", "attn.in_proj_weight").
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from deltaw.adapter import math
from deltaw.adapter.layer import Target
from deltaw.adapter.spec import LoraSpec


@dataclass
class Factors:
    """A and B of one layer, and DoRA's magnitude vector where the variant has one; shapes as in `Target`."""

    A: Tensor
    B: Tensor
    magnitude: Tensor | None = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that exist, with their names: "A", "B", "magnitude"."""
        yield from (("A", self.A), ("B", self.B))
        if self.magnitude is not None:
            yield "magnitude", self.magnitude

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(tensor.numel() for _, tensor in self.tensors())


@dataclass
class Adapter:
    """One adapter as a value, independent of any live model.

    `modules` are the suffixes that select exactly the adapted modules in the model it was made for (PEFT's
    target_modules); `parameter_names` (in the order in which the model holds them) and `embeddings` name the factors of
    those kinds, `transposed` says that the base stores [in, out].
    `origin` remembers where it comes from: base name and digest, template, data, config, version.
    `base_copies` are frozen weights found in a PEFT file; `inject` checks that the base still holds the same.
    """

    spec: LoraSpec
    factors: dict[str, Factors]
    modules: tuple[str, ...] = ()
    parameter_names: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    transposed: bool = False
    origin: dict[str, str] = field(default_factory=dict)
    base_copies: dict[str, Tensor] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(factors.parameters for factors in self.factors.values())

    def pattern_name(self, name: str) -> str:
        """The name that patterns and targets know this one by: nn.MultiheadAttention is selected whole."""
        if name in self.parameter_names and self.factors[name].A.ndim == 2:
            return name.removesuffix(".in_proj_weight").removesuffix(".out_proj.weight")
        return name

    def rank_of(self, name: str) -> int:
        """The rank r that the spec gives this layer."""
        return self.spec.rank_of(self.pattern_name(name))

    def scale_of(self, name: str) -> float:
        """The factor s of this layer's ΔW = s·B·A."""
        return self.spec.scale_of(self.pattern_name(name))

    def is_stack(self, name: str) -> bool:
        """Whether these factors are those of stacked experts, [E, R, I] and [E, O, R]."""
        return name in self.parameter_names and self.factors[name].A.ndim == 3

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that it was trained with, as plain values; none of an adapter that is not deltaw's."""
        known: dict[str, Any] = json.loads(self.origin.get("config", "{}"))
        return known

    def with_factors(self, factors: dict[str, Factors]) -> Adapter:
        """The same adapter with other numbers."""
        return replace(self, factors=factors, origin=dict(self.origin))

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """(name, "A" | "B" | "magnitude", tensor) for every tensor, in the adapter's order."""
        for name, factors in self.factors.items():
            for part, tensor in factors.tensors():
                yield name, part, tensor


def new_adapter(targets: Iterable[Target], spec: LoraSpec, seed: int = 0) -> Adapter:
    """A fresh adapter for these targets, in fp32: B zero, so that the model starts unchanged.

    A is uniform in ±1/√fan_in; an embedding has A zero and B normal instead, as PEFT has it, because a row of A is
    looked up and not multiplied. DoRA's magnitude starts as the norm of each output row of W.
    """
    targets = list(targets)
    factors = {target.name: _new_factors(target, seed) for target in targets}
    parameter_names = tuple(target.name for target in targets if target.is_parameter)
    return Adapter(
        spec=spec,
        factors=factors,
        modules=targets[0].selection if targets else (),
        parameter_names=parameter_names,
        embeddings=tuple(target.name for target in targets if target.kind == "embedding"),
        transposed=any(target.kind == "transposed" for target in targets),
    )


def _new_factors(target: Target, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(math.seed_of(seed, target.name))
    if target.kind == "embedding":
        A = torch.zeros(target.A_shape)
        B = torch.empty(target.B_shape).normal_(generator=generator)
    else:
        A = math.init_A(target.A_shape, target.fan_in, generator)
        B = torch.zeros(target.B_shape)
    return Factors(A, B, target.row_norm().cpu() if target.dora else None)
