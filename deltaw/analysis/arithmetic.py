"""Sums of adapters, on ΔW itself: concatenated factors are exact, and one SVD brings the sum to the rank wanted.

Adding A's and B's apart, as is often done, gives (ΣB)(ΣA), with all the cross terms that nobody asked for. TIES and
DARE change single entries, so they form one layer's ΔW at a time.

Legend: O outputs, I inputs, R the sum of all ranks.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.adapter import Adapter
from deltaw.adapter.math import seed_of
from deltaw.adapter.value import Factors
from deltaw.analysis.spectrum import Spectrum, matrices, spectrum_of
from deltaw.analysis.truncate import factors_of, rebuilt
from deltaw.errors import AdapterError, bullet_list

METHODS = ("sum", "ties", "dare")
OVERSAMPLED, POWER_ITERATIONS = 16, 6


class Combined(NamedTuple):
    """The adapter that a sum became, and the share of the sum's energy ‖ΔW‖² that its rank could not hold."""

    adapter: Adapter
    discarded: float


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    rank: int | None = None,
    method: str = "sum",
    density: float = 0.5,
    seed: int = 0,
) -> Combined:
    """Σ wᵢ·ΔWᵢ as one adapter of this rank, by default the sum of their ranks, which loses nothing of a plain sum.

    "ties" keeps of each update its largest entries (`density` of them), lets the heavier sign win and takes the mean of
    those that agree with it, times Σ|wᵢ| (arXiv 2306.01708, where that is λ); "dare" drops entries at random and
    enlarges the rest (arXiv 2311.03099). Layers that an adapter lacks count as zero. Raises AdapterError, with every
    fault listed, when adapters do not fit together, or are DoRA.
    """
    _require_alike(adapters)
    joined = _joined(adapters)
    found, energies, ranks = {}, {}, {}
    for name in joined.factors:
        own = [(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True) if name in adapter.factors]
        wanted = rank or _group_rank(adapters, name)
        if method == "sum":
            found[name] = _summed(own, name)
            energies[name] = float(found[name].sigma_K.square().sum())
        else:
            dense = _merged(own, name, method, density, seed, sum(map(abs, weights)))
            found[name] = _dense_spectrum(dense, wanted)
            energies[name] = float(dense.square().sum())
        ranks[name] = min(wanted, found[name].sigma_K.shape[-1])
    factors = {name: factors_of(joined, name, found[name], ranks[name]) for name in found}
    kept = sum(float(found[name].sigma_K[..., : ranks[name]].square().sum()) for name in found)
    total = sum(energies.values())
    return Combined(rebuilt(joined, factors, ranks), max(0.0, 1 - kept / total) if total else 0.0)


def _require_alike(adapters: Sequence[Adapter]) -> None:
    faults = []
    for number, adapter in enumerate(adapters, 1):
        if adapter.spec.dora:
            faults.append(f"adapter {number} is DoRA, which is no sum with W; merge it into its base instead")
        if adapter.transposed != adapters[0].transposed:
            faults.append(f"adapter {number} is for a base that stores its weights the other way round")
        for name in adapter.factors:
            first = next(other for other in adapters if name in other.factors)
            if _shape(adapter, name) != _shape(first, name):
                faults.append(f"{name} has another shape in adapter {number}")
    if faults:
        raise AdapterError("These adapters cannot be combined:\n" + bullet_list(faults))


def _shape(adapter: Adapter, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B without their rank."""
    A, B = tuple(adapter.factors[name].A.shape), tuple(adapter.factors[name].B.shape)
    at = int(adapter.is_stack(name))
    return A[:at] + A[at + 1 :], B[: at + 1] + B[at + 2 :]


def _group_rank(adapters: Sequence[Adapter], name: str) -> int:
    """The sum of the ranks that the layer has, or those that share its rank in PEFT's format have."""
    key = next(adapter.pattern_name(name) for adapter in adapters if name in adapter.factors)
    return sum(
        max((_rank(adapter, other) for other in adapter.factors if adapter.pattern_name(other) == key), default=0)
        for adapter in adapters
    )


def _rank(adapter: Adapter, name: str) -> int:
    return adapter.factors[name].A.shape[1 if adapter.is_stack(name) else 0]


Own = Sequence[tuple[Adapter, float]]


def _summed(own: Own, name: str) -> Spectrum:
    """The spectrum of [w₁s₁B₁ w₂s₂B₂ …]·[A₁; A₂; …]."""
    As, Bs = [], []
    for adapter, weight in own:
        A, B = matrices(adapter, name)
        As.append(A)
        Bs.append(weight * adapter.scale_of(name) * B)
    return spectrum_of(torch.cat(As, -2), torch.cat(Bs, -1), 1.0)


def _merged(own: Own, name: str, method: str, density: float, seed: int, total: float) -> Tensor:
    """The dense sum of entries that were trimmed; `total` is the weight of all adapters, also of those without it."""
    parts = []
    for number, (adapter, weight) in enumerate(own):
        A, B = matrices(adapter, name)
        dense = weight * adapter.scale_of(name) * (B @ A)
        generator = torch.Generator().manual_seed(seed_of(seed, f"{number}:{name}"))
        cut = largest_entries(dense, density) if method == "ties" else _at_random(dense, density, generator)
        parts.append(cut)
    if method == "ties":
        return _agreed(torch.stack(parts), [abs(weight) for _, weight in own], total)
    return torch.stack(parts).sum(0)


def largest_entries(dense: Tensor, density: float) -> Tensor:
    """A matrix's largest entries, so large a share of them; the others zero."""
    size = dense.abs().flatten()
    count = max(1, round(density * len(size)))
    return dense * (dense.abs() >= size.kthvalue(len(size) - count + 1).values)


def _at_random(dense: Tensor, density: float, generator: torch.Generator) -> Tensor:
    kept = torch.rand(dense.shape, generator=generator) < density
    return dense * kept / density


def _agreed(parts: Tensor, weights: Sequence[float], total: float) -> Tensor:
    """Per entry, of the parts that have the heavier side's sign the weighted mean, times all the weight there is."""
    agreeing = (parts.sign() == parts.sum(0).sign()) & (parts != 0)
    weight = sum(agreed.double() * weight for agreed, weight in zip(agreeing, weights, strict=True))
    return total * (parts * agreeing).sum(0) / weight.masked_fill(weight == 0, 1)


def _dense_spectrum(dense: Tensor, rank: int) -> Spectrum:
    """The leading singular values of a dense matrix by random projections (Halko et al. 2011), or exactly if small."""
    size = min(dense.shape[-2:])
    if rank + OVERSAMPLED >= size // 2:
        U, sigma, V = torch.linalg.svd(dense, full_matrices=False)
        return Spectrum(U, sigma, V.mT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Spectrum(*torch.svd_lowrank(dense, q=rank + OVERSAMPLED, niter=POWER_ITERATIONS))


def _joined(adapters: Sequence[Adapter]) -> Adapter:
    """The first adapter, selecting what all of them select; of its origin what they agree on."""
    first = adapters[0]
    held = {name: factors for adapter in reversed(adapters) for name, factors in adapter.factors.items()}
    names = dict.fromkeys(name for adapter in adapters for name in adapter.factors)
    made = first.with_factors({name: _finest(held[name], name, adapters) for name in names})
    # A stack takes no dropout, and nothing is trained here.
    made.spec = first.spec.with_(dropout=min(adapter.spec.dropout for adapter in adapters))
    made.modules = tuple(sorted({module for adapter in adapters for module in adapter.modules}))
    made.parameter_names = tuple(_in_one_order([adapter.parameter_names for adapter in adapters]))
    made.embeddings = tuple(dict.fromkeys(name for adapter in adapters for name in adapter.embeddings))
    made.origin = {
        key: value
        for key, value in first.origin.items()
        if all(adapter.origin.get(key) == value for adapter in adapters)
    }
    if all("config" in adapter.origin for adapter in adapters):  # the sum is measured on tokens that were made alike
        configs = [adapter.settings for adapter in adapters]
        common = {key: value for key, value in configs[0].items() if all(c.get(key, ...) == value for c in configs)}
        made.origin["config"] = json.dumps(common)
    return made


def _finest(factors: Factors, name: str, adapters: Sequence[Adapter]) -> Factors:
    """The factors in the finest dtype that the layer has in any adapter: a sum does not depend on the order."""
    dtypes = [adapter.factors[name].A.dtype for adapter in adapters if name in adapter.factors]
    dtype = functools.reduce(torch.promote_types, dtypes)
    return Factors(**{part: tensor.to(dtype) for part, tensor in factors.tensors()})


def _in_one_order(held: Sequence[Sequence[str]]) -> list[str]:
    """The names of all, in an order that agrees with each one's own: the file's keys nest as the model holds them.

    Where none of them tells, down projections come last, as in deltaw/adapter/keys.py.
    """
    rest, order = [list(names) for names in held], []
    while heads := [names[0] for names in rest if names]:
        free = [name for name in heads if not any(name in names[1:] for names in rest)]
        chosen = min(free or heads, key=lambda name: "down" in name.rpartition(".")[2])
        order.append(chosen)
        rest = [[name for name in names if name != chosen] for names in rest]
    return order
