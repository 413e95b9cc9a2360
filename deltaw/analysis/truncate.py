"""An adapter of lower rank, each layer the best of its rank (Eckart & Young 1936); and ranks chosen for all layers.

The result is plain LoRA: scales, rsLoRA and patterns are folded into the factors, alpha equals the rank, so s = 1 for
every reader where ranks are equal, and where they are not for those that know patterns, as PEFT does. DoRA stays DoRA,
with its magnitudes, because what it does to norms has no low rank. A higher rank is exact too: new rows of A are drawn,
new columns of B are zero, and training can go on from there. All this is computed in fp64 and rounded once, to the
dtype that the factors had: in bf16 that is up to 2⁻⁹ of each number.

Legend: O outputs, I inputs, K the rank that is kept, E experts of a stack (a leading dimension).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.adapter import Adapter, Factors
from deltaw.adapter.math import init_A, seed_of
from deltaw.adapter.spec import MAX_RANK
from deltaw.analysis.spectrum import ROUNDING, Spectrum, spectra
from deltaw.errors import AdapterError

Spectra = Mapping[str, Spectrum]


def truncate(adapter: Adapter, ranks: Mapping[str, int], known: Spectra | None = None) -> Adapter:
    """The adapter with these ranks, by the name of each layer, in its own dtype. `known` saves computing its spectra.

    Projections of one attention module share a rank in PEFT's format, so they must be given the same.
    """
    known = known or spectra(adapter)
    factors = {name: factors_of(adapter, name, known[name], ranks[name]) for name in adapter.factors}
    return rebuilt(adapter, factors, ranks)


def rebuilt(adapter: Adapter, factors: dict[str, Factors], ranks: Mapping[str, int]) -> Adapter:
    """The adapter with factors whose product is ΔW itself, and a spec that says so: alpha = rank, layer by layer."""
    by_key = {adapter.pattern_name(name): ranks[name] for name in factors}
    split = [name for name in factors if by_key[adapter.pattern_name(name)] != ranks[name]]
    assert not split, f"attention projections of unequal ranks: {split}"
    usual = Counter(by_key.values()).most_common(1)[0][0]
    others = _patterns(by_key, usual)
    spec = adapter.spec.with_(
        rank=usual,
        alpha=float(usual),
        rslora=False,
        rank_pattern=others,
        alpha_pattern={key: float(rank) for key, rank in others.items()},
    )
    made = adapter.with_factors(factors)
    made.spec = spec
    return made


def _patterns(ranks: Mapping[str, int], usual: int) -> dict[str, int]:
    """The ranks that must be written beside the usual one, by full names.

    A pattern also matches longer names that end with it, and the first match wins: "decoder.layers.0.fc" stands before
    "layers.0.fc", and stands there even with the usual rank.
    """
    others = {key for key, rank in ranks.items() if rank != usual}
    named = [key for key in ranks if any(end in others for end in _ends(key))]
    return {key: ranks[key] for key in sorted(named, key=lambda key: -key.count("."))}


def _ends(name: str) -> Iterator[str]:
    """The name and every shorter one that it ends with at a dot."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def split(found: Spectrum, rank: int) -> tuple[Tensor, Tensor]:
    """(A [K, I], B [O, K]) of the best approximation, each with the roots of σ, so that neither is larger."""
    root_K = found.sigma_K[..., :rank].sqrt()
    A_KI = root_K[..., :, None] * found.V_IK[..., :rank].mT
    return A_KI, found.U_OK[..., :rank] * root_K[..., None, :]


def factors_of(adapter: Adapter, name: str, found: Spectrum, rank: int) -> Factors:
    """The factors of this rank whose product is `found`, in the shapes and dtype that the layer has in `adapter`.

    Where `found` holds nothing, A is drawn and B zero: with both of them zero no gradient would reach either.
    """
    given = adapter.factors[name]
    A, B = split(found, rank)
    more = rank - A.shape[-2]
    A, B = F.pad(A, (0, 0, 0, more)), F.pad(B, (0, more))
    empty_K = F.pad(found.sigma_K[..., :rank] <= ROUNDING * found.sigma_K[..., :1], (0, more), value=True)
    # Not the seed of a new adapter: A moves little in training, so its rows would be nearly those that are there.
    generator = torch.Generator().manual_seed(seed_of(rank, f"grown:{name}"))
    drawn = init_A(tuple(A.shape), A.shape[-1], generator).double()
    A, B = torch.where(empty_K[..., :, None], drawn, A), B.masked_fill(empty_K[..., None, :], 0)
    if not adapter.is_stack(name):
        A, B = A.reshape(rank, *given.A.shape[1:]), B.reshape(len(B), rank, *given.B.shape[2:])
    return Factors(A.to(given.A.dtype).contiguous(), B.to(given.B.dtype).contiguous(), given.magnitude)


# -- choosing ranks ---------------------------------------------------------------------------------------------------


def uniform_ranks(adapter: Adapter, rank: int) -> dict[str, int]:
    """The same rank for every layer. Raises AdapterError when no file can hold it."""
    if not 1 <= rank <= MAX_RANK:
        raise AdapterError(f"A rank lies between 1 and {MAX_RANK}, not {rank}.")
    return dict.fromkeys(adapter.factors, rank)


def ranks_within(adapter: Adapter, known: Spectra, numbers: int) -> dict[str, int]:
    """Ranks whose factors have at most so many numbers: everywhere 1, then what adds most energy (σ²) per number.

    One global criterion, so layers with large updates keep more. Raises AdapterError when rank 1 is already more.
    """
    groups: dict[str, list[str]] = {}
    for name in adapter.factors:
        groups.setdefault(adapter.pattern_name(name), []).append(name)
    costs = {key: sum(component_numbers(adapter, name) for name in names) for key, names in groups.items()}
    spare = numbers - sum(costs.values()) - magnitudes(adapter)
    if spare < 0:
        raise AdapterError(
            f"Rank 1 in every layer already takes {numbers - spare:,} numbers, and {numbers:,} are allowed."
        )
    offers = sorted(
        (-gain / costs[key], index, key)
        for key, names in groups.items()
        for index, gain in enumerate(_energies([known[name] for name in names]))
        if index and gain
    )
    chosen = dict.fromkeys(groups, 1)
    for _, index, key in offers:
        if chosen[key] == index and costs[key] <= spare:
            chosen[key], spare = index + 1, spare - costs[key]
    return {name: chosen[adapter.pattern_name(name)] for name in adapter.factors}


def _energies(group: list[Spectrum]) -> list[float]:
    """σ² of the first, second, … component of layers that share a rank."""
    count = max(found.sigma_K.shape[-1] for found in group)
    total = torch.zeros(count, dtype=torch.float64)
    for found in group:
        energy_K = found.sigma_K.square().flatten(0, -2).sum(0) if found.sigma_K.ndim > 1 else found.sigma_K.square()
        total[: len(energy_K)] += energy_K
    return total.tolist()


def component_numbers(adapter: Adapter, name: str) -> int:
    """How many numbers one more rank takes in this layer."""
    factors = adapter.factors[name]
    rank = factors.A.shape[1] if adapter.is_stack(name) else factors.A.shape[0]
    return (factors.A.numel() + factors.B.numel()) // rank


def magnitudes(adapter: Adapter) -> int:
    """How many numbers DoRA adds whatever the rank."""
    return sum(0 if each.magnitude is None else each.magnitude.numel() for each in adapter.factors.values())


def discarded_energy(known: Spectra, ranks: Mapping[str, int]) -> float:
    """Σ of the σ² that are left out, as a share of all: how much of ‖ΔW‖² is lost."""
    total = sum(float(found.sigma_K.square().sum()) for found in known.values())
    lost = sum(float(found.sigma_K[..., ranks[name] :].square().sum()) for name, found in known.items())
    return lost / total if total else 0.0
