"""An update beside the weight that it changes: size, amplification, intruder dimensions, each with a control.

Legend: O outputs, I inputs, K directions of ΔW; W [O, I] is dense.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.analysis.spectrum import Spectrum, held

# Of the strongest directions of W + ΔW, those that resemble none of W's by more than this cosine are intruders.
INTRUDER_COSINE, INTRUDERS_AMONG = 0.5, 10


@dataclass(frozen=True)
class Beside:
    """One layer's ΔW beside its W.

    `relative_norm` is ‖ΔW‖_F/‖W‖_F. `amplification` is ‖ΔW‖_F/‖UᵀWV‖_F with U and V the directions of ΔW: how much it
    enlarges what W does with them (arXiv 2106.09685 table 7); `random` is the same with random directions, `own` with
    W's own strongest ones. `rounding` is the largest singular value of the noise that storing such weights in W's dtype
    adds: directions of ΔW below it are weaker than that. `intruders` counts, among the ten strongest directions of W +
    ΔW, those that W does not have (arXiv 2410.21228, whose meaning is contested).
    """

    relative_norm: float
    amplification: float
    random: float
    own: float
    rounding: float
    intruders: int


def beside(found: Spectrum, W_OI: Tensor, stored: torch.dtype | None = None, seed: int = 0) -> Beside:
    """The numbers of one layer in fp64. An update of zero amplifies nothing: 0 everywhere but `rounding`.

    `stored` is the dtype that W is kept in (default: W's own).
    """
    rounding = rounding_edge(W_OI, stored or W_OI.dtype)
    W = W_OI.detach().cpu().flatten(1).double()
    kept = held(found) if float(found.sigma_K[0]) else None
    if kept is None:
        return Beside(0.0, 0.0, 0.0, 0.0, rounding, 0)
    size = float(kept.sigma_K.square().sum().sqrt())
    directions = _directions(W)
    strongest = _sizes(W, directions)[: len(kept.sigma_K)]
    generator = torch.Generator().manual_seed(seed)
    U, V = (_random(len(side), len(kept.sigma_K), generator) for side in (kept.U_OK, kept.V_IK))
    changed = W + kept.U_OK * kept.sigma_K @ kept.V_IK.mT
    return Beside(
        relative_norm=_over(size, W),
        amplification=_over(size, kept.U_OK.mT @ W @ kept.V_IK),
        random=_over(size, U.mT @ W @ V),
        own=_over(size, strongest),
        rounding=rounding,
        intruders=_intruders(directions, _directions(changed)),
    )


def _over(size: float, part: Tensor) -> float:
    """A size as a multiple of a norm; infinite where W does nothing."""
    norm = float(part.norm())
    return size / norm if norm else math.inf


def rounding_edge(W_OI: Tensor, stored: torch.dtype) -> float:
    """(√O + √I)·ε, the edge of the singular values of independent errors (Geman 1980) as large as rounding makes them.

    ε² is the mean over the entries of u²/12, where u is how far apart numbers of the dtype `stored` lie there.
    """
    W = W_OI.detach().cpu().flatten(1).double()
    steps = torch.ldexp(torch.full_like(W, torch.finfo(stored).eps), torch.frexp(W).exponent - 1)
    deviation = (steps.square() * (W != 0)).mean().div(12).sqrt()
    return float(deviation) * (W.shape[0] ** 0.5 + W.shape[1] ** 0.5)


def _directions(W: Tensor) -> Tensor:
    """The singular vectors of W's smaller side, strongest first, in columns."""
    small = W if W.shape[0] <= W.shape[1] else W.mT
    return torch.linalg.eigh(small @ small.mT).eigenvectors.flip(1)


def _sizes(W: Tensor, directions: Tensor) -> Tensor:
    """The singular values that belong to these vectors."""
    small = W if W.shape[0] <= W.shape[1] else W.mT
    return (directions.mT @ small).norm(dim=1)


def _random(length: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(length, count, generator=generator, dtype=torch.float64)).Q


def _intruders(before: Tensor, after: Tensor) -> int:
    """How many of the strongest directions afterwards have no likeness among all directions before."""
    closest = (before.mT @ after[:, :INTRUDERS_AMONG]).abs().amax(0)
    return int((closest < INTRUDER_COSINE).sum())
