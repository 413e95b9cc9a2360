"""Fold an adapter into the weights of a model, and take it out again. Explicit, never hidden in a forward pass.

The sum W + ΔW is formed in fp32 and rounded once to the dtype of the weight. What rounding loses is measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from deltaw.adapter.inject import choose_for
from deltaw.adapter.layer import Target
from deltaw.adapter.value import Adapter


@dataclass
class Merged:
    """What a merge did: how much of ΔW rounding lost, and what is needed to undo it.

    `rounding_loss` is ‖round(W+ΔW) − (W+ΔW)‖ / ‖ΔW‖ over all targets; a light update in bf16 can lose a large share.
    """

    model: nn.Module
    adapter: Adapter
    targets: list[Target]
    rounding_loss: float
    untied: list[str]
    _originals: dict[str, Tensor] | None = field(repr=False, default=None)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes the adapter out again: bit for bit when originals were kept, else by subtraction.

        Subtraction is right to within one rounding of |W| + |ΔW| in the dtype of the weight; DoRA cannot be subtracted.
        """
        for target in self.targets:
            weight = getattr(target.holder, target.parameter)
            if self._originals is not None:
                weight.copy_(self._originals[target.name])
            else:
                factors = self.adapter.factors[target.name]
                assert factors.magnitude is None, "DoRA is unmerged from originals only"
                weight.copy_(weight.float() - target.delta(factors.A, factors.B).to(weight.device))


@torch.no_grad()
def merge_(model: nn.Module, adapter: Adapter, *, keep_originals: bool = True) -> Merged:
    """Adds the adapter's ΔW to the model's weights in place and returns what was done.

    `keep_originals` holds a copy of the touched weights so that `unmerge` is exact; DoRA always keeps them. A weight
    that is tied to another layer (an output head that is also the embedding) is untied first, and named in `untied`.
    Raises AdapterError, with the model untouched, when the adapter does not fit.
    """
    targets = choose_for(model, adapter)
    keep = keep_originals or adapter.spec.dora
    untied = [target.name for target in targets if _untie(model, target)]
    originals: dict[str, Tensor] = {}
    lost = total = 0.0
    for target in targets:
        weight = getattr(target.holder, target.parameter)
        if keep:
            originals[target.name] = weight.detach().clone()
        factors = adapter.factors[target.name]
        before, wanted = weight.float(), merged_weight(target, adapter)
        weight.copy_(wanted)
        lost += float((weight.float() - wanted).square().sum())
        total += float((wanted - before).square().sum())
        del before, wanted, factors
    return Merged(model, adapter, targets, (lost / total) ** 0.5 if total else 0.0, untied, originals if keep else None)


def merged_weight(target: Target, adapter: Adapter) -> Tensor:
    """The fp32 weight that does the work of the layer and its adapter."""
    factors, device = adapter.factors[target.name], getattr(target.holder, target.parameter).device
    magnitude = None if factors.magnitude is None else factors.magnitude.to(device)
    return target.merged_weight(factors.A.to(device), factors.B.to(device), magnitude)


def _untie(model: nn.Module, target: Target) -> bool:
    """Gives the target a weight of its own when another module holds the same one; returns whether it did."""
    weight = getattr(target.holder, target.parameter)
    sharing = [
        module
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if parameter is weight and module is not target.holder
    ]
    if not sharing:
        return False
    setattr(target.holder, target.parameter, nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # type: ignore[union-attr]
    return True
