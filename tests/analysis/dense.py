"""What the analyses are compared with: every ΔW formed densely in fp64."""

from __future__ import annotations

import torch
from cases import CASES, CONVOLUTIONS, Case, Convolutional, drawn, images, made, tokens
from models import small_model
from torch import Tensor, nn

from deltaw.adapter import Adapter, Factors, LoraSpec, choose, choose_for, new_adapter

# fp64 rounding of products of two thin factors, relative to the largest singular value.
EXACT = 1e-10
# Factors rounded once to fp32, of ranks up to some tens.
SINGLE = 1e-6
# Logits of two programs that add the same factors in another order, as in tests/oracle/test_peft.py.
LOGITS = 1e-5

KINDS = {
    **CASES,
    "rank above a side": Case(lambda: small_model("llama"), LoraSpec(rank=40, alpha=8, rslora=True), tokens),
    "convolutions of rank above a side": Case(
        lambda: made(lambda: Convolutional(2)), LoraSpec(rank=9, alpha=3, targets=CONVOLUTIONS), lambda: images(8, 8)
    ),
}
WITHOUT_DORA = {name: case for name, case in KINDS.items() if not case.spec.dora}


def deltas(adapter: Adapter, model: nn.Module) -> dict[str, Tensor]:
    """ΔW of each layer as a matrix of outputs × inputs in fp64, of stacks [E, O, I]; the layout is that of the model."""
    found = {}
    for target in choose_for(model, adapter):
        factors = adapter.factors[target.name]
        delta = target.delta(factors.A.double(), factors.B.double())
        if target.kind == "conv":
            delta = delta.flatten(1)
        found[target.name] = delta.mT if target.transposed else delta
    return found


def far(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖."""
    return float((ours - theirs).norm() / theirs.norm())


def in_dtype(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """The adapter with its factors in this dtype."""
    factors = {name: Factors(f.A.to(dtype), f.B.to(dtype), f.magnitude) for name, f in adapter.factors.items()}
    return adapter.with_factors(factors)


def linear(spec: LoraSpec, seed: int = 0, **shapes: tuple[int, int]) -> Adapter:
    """Random factors in fp64 for linear layers of these names and shapes (outputs, inputs); "_" stands for a dot."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for key, (outputs, inputs) in shapes.items():
        name = key.replace("_", ".")
        sizes = ((spec.rank_of(name), inputs), (outputs, spec.rank_of(name)))
        factors[name] = Factors(*(torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes))
    return Adapter(spec, factors, modules=tuple(factors))


def again(case: Case, model: nn.Module, seed: int, **settings: object) -> Adapter:
    """Another adapter of the case's targets, with other settings and factors."""
    spec = case.spec.with_(**settings)
    return drawn(new_adapter(choose(model, spec), spec, seed), seed)


def uneven(adapter: Adapter) -> dict[str, int]:
    """Another rank for each layer in turn, the same where the format asks for it."""
    keys = list(dict.fromkeys(adapter.pattern_name(name) for name in adapter.factors))
    return {name: 1 + keys.index(adapter.pattern_name(name)) % 3 for name in adapter.factors}
