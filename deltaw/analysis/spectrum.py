"""The singular values of ΔW = s·B·A, exactly and from the factors alone; and what is said of their number.

B = Q_B·R_B and Aᵀ = Q_A·R_A leave a core s·R_B·R_Aᵀ of r × r whose singular values are those of ΔW; it is a few
thousandths of the dense one's work. All in fp64. Of DoRA this is the low-rank part, not what it does to norms.

Legend: O outputs, I inputs, R rank of the factors, K singular values, E experts of a stack (a leading dimension).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.adapter import Adapter
from deltaw.hardware import one_thread

# A σ below this share of the first is rounding in fp64, and its directions are arbitrary.
ROUNDING = 1e-13


class Spectrum(NamedTuple):
    """ΔW = U·diag(sigma)·Vᵀ of one layer in fp64, sigma falling; of a stack, one for each expert."""

    U_OK: Tensor
    sigma_K: Tensor
    V_IK: Tensor


@dataclass(frozen=True)
class Ranks:
    """Four answers to "how many directions"; all 0 for an update that is zero.

    `effective` is exp(entropy of σ/Σσ) (Roy & Vetterli 2007), `stable` Σσ²/σ₁² (Rudelson & Vershynin 2007),
    `participation` (Σσ²)²/Σσ⁴, `energy_90` the least number of σ² that make up 90 % of their sum. None of them tells
    what a task needs: that is measured in loss (deltaw/analysis/curve.py).
    """

    effective: float
    stable: float
    participation: float
    energy_90: int


def matrices(adapter: Adapter, name: str) -> tuple[Tensor, Tensor]:
    """(A [R, I], B [O, R]) of a layer in fp64, convolutions flattened; of a stack [E, R, I] and [E, O, R]."""
    factors = adapter.factors[name]
    if adapter.is_stack(name):
        return factors.A.detach().cpu().double(), factors.B.detach().cpu().double()
    return factors.A.detach().cpu().flatten(1).double(), factors.B.detach().cpu().flatten(1).double()


def spectrum_of(A_RI: Tensor, B_OR: Tensor, s: float) -> Spectrum:
    """The exact SVD of s·B·A by QR and a core."""
    QB_OR, RB_RR = torch.linalg.qr(B_OR)
    QA_IR, RA_RR = torch.linalg.qr(A_RI.mT)
    U_RK, sigma_K, V_KR = torch.linalg.svd(s * (RB_RR @ RA_RR.mT), full_matrices=False)
    return Spectrum(QB_OR @ U_RK, sigma_K, QA_IR @ V_KR.mT)


def spectrum(adapter: Adapter, name: str) -> Spectrum:
    """The singular values and vectors of one layer's ΔW."""
    return spectrum_of(*matrices(adapter, name), adapter.scale_of(name))


def spectra(adapter: Adapter) -> dict[str, Spectrum]:
    """Those of every layer."""
    with one_thread():
        return {name: spectrum(adapter, name) for name in adapter.factors}


def held(found: Spectrum) -> Spectrum:
    """The directions that hold something: a rank above that of ΔW has arbitrary ones, which mean nothing."""
    count = int((found.sigma_K > ROUNDING * found.sigma_K[0]).sum())
    return Spectrum(found.U_OK[:, :count], found.sigma_K[:count], found.V_IK[:, :count])


def ranks_of(sigma_K: Tensor) -> Ranks:
    """The four measures of one layer's singular values [K]; of a stack, of all its experts' together."""
    sigma = sigma_K.double().flatten().sort(descending=True).values
    if sigma[0] == 0:
        return Ranks(0.0, 0.0, 0.0, 0)
    sigma = sigma / sigma[0]  # no measure depends on size, and fourth powers of small numbers would underflow
    square, shares = sigma.square(), sigma[sigma > 0] / sigma.sum()
    return Ranks(
        effective=float((-(shares * shares.log()).sum()).exp()),
        stable=float(square.sum()),
        participation=float(square.sum().square() / square.square().sum()),
        energy_90=energy_rank(sigma, 0.9),
    )


def energy_rank(sigma_K: Tensor, share: float) -> int:
    """The least k whose σ₁² … σ_k² are at least `share` of the sum; 0 where all are zero."""
    square = sigma_K.double().square()
    if not float(square.sum()):
        return 0
    kept = square.cumsum(0) / square.sum()
    return int((kept < share - 1e-12).sum()) + 1
