"""The exact singular values and vectors of ΔW = s·B·A from the factors alone, and what follows from the values.

B = Q_B·R_B and Aᵀ = Q_A·R_A, so the SVD of the small core s·R_B·R_Aᵀ gives that of ΔW: O((O + I)·R²), and no dense ΔW.
Everything is computed in fp64. The same ΔW has many factors (B·Q, Q⁻¹·A), so nothing is ever read off A or B alone.

Legend: O outputs, I inputs of a layer, R rank; a leading E where experts are stacked. U_OR, S_R, V_IR.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.adapter import Adapter

# Below this share of the largest singular value, one is rounding of fp32 factors and counts as zero.
NEGLIGIBLE = 1e-6


class Spectrum(NamedTuple):
    """ΔW = U·diag(S)·Vᵀ of one layer, values falling. Of stacked experts, each one's, with a leading dimension."""

    U_OR: Tensor
    S_R: Tensor
    V_IR: Tensor


def spectra(adapter: Adapter) -> Iterator[tuple[str, Spectrum]]:
    """(name, spectrum) of every adapted layer. Of DoRA, of the direction's update s·B·A before it is scaled."""
    for name in adapter.factors:
        yield name, spectrum(*matrices(adapter, name))


def matrices(adapter: Adapter, name: str) -> tuple[Tensor, Tensor, float]:
    """(A [R, I], B [O, R], s) of one layer in fp64; [E, …] of stacked experts, a convolution's kernel flattened."""
    factors = adapter.factors[name]
    A, B = factors.A.double(), factors.B.double()
    if not is_stacked(adapter, name):
        A, B = A.flatten(1), B.flatten(1)
    return A, B, adapter.spec.scale_of(adapter.pattern_name(name))


def is_stacked(adapter: Adapter, name: str) -> bool:
    """Whether the layer is a stack of experts."""
    return name in adapter.parameter_names and adapter.factors[name].A.ndim == 3


def spectrum(A_RI: Tensor, B_OR: Tensor, s: float) -> Spectrum:
    """The SVD of s·B·A by its core."""
    QB, RB = torch.linalg.qr(B_OR)
    QA, RA = torch.linalg.qr(A_RI.mT)
    U, S, Vh = torch.linalg.svd(s * RB @ RA.mT, full_matrices=False)
    return Spectrum(QB @ U, S, QA @ Vh.mT)


# -- one number from many ---------------------------------------------------------------------------------------------


def effective_rank(S_R: Tensor) -> float:
    """exp of the entropy of σ/Σσ (Roy & Vetterli, 2007); 0 of nothing."""
    if not (total := float(S_R.sum())):
        return 0.0
    p = S_R / total
    return float(torch.exp(-torch.xlogy(p, p).sum()))


def stable_rank(S_R: Tensor) -> float:
    """Σσ² / σ₁² (Rudelson & Vershynin, 2007); 0 of nothing."""
    return float(S_R.square().sum() / S_R.square().max()) if float(S_R.max()) else 0.0


def participation_ratio(S_R: Tensor) -> float:
    """(Σσ²)² / Σσ⁴: how many values would share the energy if they were equal; 0 of nothing."""
    fourth = float(S_R.pow(4).sum())
    return float(S_R.square().sum()) ** 2 / fourth if fourth else 0.0


def energy_rank(S_R: Tensor, share: float) -> int:
    """How many components hold `share` of Σσ²."""
    energy = S_R.square().cumsum(0)
    return int((energy < share * energy[-1]).sum()) + 1 if float(energy[-1]) else 0


def numerical_rank(S_R: Tensor) -> int:
    """How many values are more than rounding."""
    return int((NEGLIGIBLE * S_R.max() < S_R).sum()) if float(S_R.max()) else 0


def noise_floor(A_RI: Tensor, B_OR: Tensor, s: float, seed: int = 0) -> float:
    """The largest singular value that factors of these norms would have if they were random: Gaussian, row by row.

    What lies below may be noise; training that moved all components alike looks like this.
    """
    random = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(x.shape, generator=random, dtype=x.dtype) for x in (A_RI, B_OR))
    A *= A_RI.norm() / A.norm()
    B *= B_OR.norm() / B.norm()
    return float(spectrum(A, B, s).S_R.max())
