"""Fold an adapter into the weights of a model, and take it out again. Explicit, never hidden in a forward pass.

The sum W + ΔW is formed in fp32 and rounded once to the dtype of the weight. What rounding loses is measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.adapter.inject import choose_for, refuse_injected
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
    _tied: dict[str, nn.Parameter] = field(repr=False, default_factory=dict)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes the adapter out again: bit for bit when originals were kept, else by subtraction; untied weights are
        tied again.

        Subtraction is right to within two roundings of |W| + |ΔW| in the dtype of the weight.
        """
        for target in self.targets:
            weight = getattr(target.holder, target.parameter)
            if target.name in self._tied:
                setattr(target.holder, target.parameter, self._tied[target.name])
            elif self._originals is not None:
                weight.copy_(self._originals[target.name])
            else:
                weight.copy_(weight.float() - self._delta(target))
        if self._tied:
            _say_tied(self.model, True)

    def _delta(self, target: Target) -> Tensor:
        factors = self.adapter.factors[target.name]
        assert factors.magnitude is None, "DoRA is unmerged from originals only"
        device = getattr(target.holder, target.parameter).device
        return target.delta(factors.A.to(device).float(), factors.B.to(device).float())


@torch.no_grad()
def merge_(model: nn.Module, adapter: Adapter, *, keep_originals: bool = True) -> Merged:
    """Adds the adapter's ΔW to the model's weights in place and returns what was done.

    `keep_originals` holds a copy of the touched weights so that `unmerge` is exact; DoRA always keeps them. A weight
    that is tied to another layer (an output head that is also the embedding) is untied first, and named in `untied`.
    Raises AdapterError, with the model untouched, when the adapter does not fit or adapters are at work in the model.
    """
    refuse_injected(model)
    targets = choose_for(model, adapter)
    keep = keep_originals or adapter.spec.dora
    originals: dict[str, Tensor] = {}
    tied: dict[str, nn.Parameter] = {}
    lost = total = 0.0
    for target in targets:
        if _is_tied(model, target):
            tied[target.name] = _untie(target)
        weight = getattr(target.holder, target.parameter)
        if keep:
            originals[target.name] = weight.detach().clone()
        before, wanted = weight.float(), merged_weight(target, adapter)
        weight.copy_(wanted)
        lost += float((weight.float() - wanted).square().sum())
        total += float((wanted - before).square().sum())
    if tied:
        _say_tied(model, False)
    loss = (lost / total) ** 0.5 if total else 0.0
    return Merged(model, adapter, targets, loss, list(tied), originals if keep else None, tied)


def merged_weight(target: Target, adapter: Adapter) -> Tensor:
    """The fp32 weight that does the work of the layer and its adapter."""
    factors, device = adapter.factors[target.name], getattr(target.holder, target.parameter).device
    magnitude = None if factors.magnitude is None else factors.magnitude.to(device)
    return target.merged_weight(factors.A.to(device), factors.B.to(device), magnitude)


def _is_tied(model: nn.Module, target: Target) -> bool:
    """Whether another module holds the same weight; while two targets share one, only the first must be untied."""
    weight = getattr(target.holder, target.parameter)
    others = (module for module in model.modules() if module is not target.holder)
    return any(parameter is weight for module in others for parameter in module.parameters(recurse=False))


def _untie(target: Target) -> nn.Parameter:
    """Gives the target a weight of its own and returns the one that it shared."""
    shared: nn.Parameter = getattr(target.holder, target.parameter)
    setattr(target.holder, target.parameter, nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad))
    return shared


def _say_tied(model: nn.Module, tied: bool) -> None:
    """Keeps the config of a transformers model true, so that saving it writes both weights, or one."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = tied
