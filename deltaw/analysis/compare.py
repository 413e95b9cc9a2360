"""Two adapters side by side: which directions they share, whether they point the same way, what a sum would destroy.

Each number but the interference has the value that unrelated adapters would give beside it. Everything follows from the
factors; only the sign conflict needs entries of ΔW, of one layer at a time.

Legend: O outputs, I inputs, R ranks, K singular values; 1 and 2 the two adapters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaw.adapter import Adapter
from deltaw.analysis.arithmetic import largest_entries
from deltaw.analysis.spectrum import Spectrum, held, matrices, spectrum
from deltaw.errors import AdapterError

# TIES keeps this share of the entries, the largest ones (arXiv 2306.01708 §4).
KEPT = 0.2
# Two unrelated updates disagree in sign half of the time.
CONFLICT_NULL = 0.5
NULL_QUANTILE = 2.0234  # 99 % of the Tracy–Widom distribution of order 1
SIDES = ("output", "input")


class Overlap(NamedTuple):
    """φ(i, j) [K1, K2] of two sets of directions, and its null, what two random ones of that size would share."""

    phi: Tensor
    null: Tensor


def overlap(first_NK: Tensor, second_NK: Tensor) -> Overlap:
    """φ(i, j) = ‖U₁ᵢᵀ U₂ⱼ‖²_F / min(i, j), in [0, 1], for the first i and first j directions (arXiv 2106.09685 §7.2).

    Two independent random subspaces of N dimensions share max(i, j)/N.
    """
    square_KK = (first_NK.mT @ second_NK).square()
    summed = square_KK.cumsum(0).cumsum(1)
    i = torch.arange(1, summed.shape[0] + 1, dtype=summed.dtype)[:, None]
    j = torch.arange(1, summed.shape[1] + 1, dtype=summed.dtype)[None]
    return Overlap(summed / torch.minimum(i, j), torch.maximum(i, j) / first_NK.shape[0])


def shared_directions(first_NK: Tensor, second_NK: Tensor) -> float:
    """How many principal cosines of two subspaces are larger than the largest of random ones, in 99 of 100 cases, is.

    Of two adapters that differ in their seed alone it is how many directions the task decides. NaN where both together
    fill all N dimensions, so that nothing could be told.
    """
    dimensions, sizes = len(first_NK), (first_NK.shape[1], second_NK.shape[1])
    if sum(sizes) >= dimensions:
        return math.nan
    cosines = torch.linalg.svdvals(first_NK.mT @ second_NK)
    return int((cosines > chance_cosine(dimensions, *sizes)).sum())


def chance_cosine(dimensions: int, first: int, second: int) -> float:
    """What the largest principal cosine of two random subspaces of these sizes stays below in 99 of 100 cases.

    Its square is the largest root of a Jacobi ensemble, whose logit is about Tracy–Widom (Johnstone 2008, Theorem 1);
    for few directions that is a little too high.
    """
    count = dimensions - 1
    low, high = (2 * math.asin(math.sqrt((size - 0.5) / count)) for size in sorted((first, second)))
    middle = 2 * math.log(math.tan((low + high) / 2))
    spread = (16 / count**2 / (math.sin(low + high) ** 2 * math.sin(low) * math.sin(high))) ** (1 / 3)
    return math.sqrt(1 / (1 + math.exp(-(middle + NULL_QUANTILE * spread))))


def principal_angles(first_NK: Tensor, second_NK: Tensor) -> Tensor:
    """The angles between two subspaces in radians, smallest first (Björck & Golub 1973)."""
    return torch.linalg.svdvals(first_NK.mT @ second_NK).clamp(max=1.0).acos()


def inner_product(first: Adapter, second: Adapter, name: str) -> float:
    """⟨ΔW₁, ΔW₂⟩_F = s₁s₂·Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ): no dense ΔW."""
    (A1, B1), (A2, B2) = matrices(first, name), matrices(second, name)
    s1, s2 = (one.scale_of(name) for one in (first, second))
    return float(s1 * s2 * ((B1.mT @ B2) * (A1 @ A2.mT)).sum())


def cosine(first: Adapter, second: Adapter, names: list[str]) -> float:
    """The cosine between two updates over these layers; 0 where one of them is zero."""
    product = sum(inner_product(first, second, name) for name in names)
    squares = [sum(inner_product(one, one, name) for name in names) for one in (first, second)]
    size = math.sqrt(max(0.0, squares[0]) * max(0.0, squares[1]))
    return product / size if size else 0.0


def sign_conflict(first: Adapter, second: Adapter, name: str) -> float:
    """Of the weight that both updates put on the same entries, the share where they pull in opposite directions.

    Over each one's largest entries, as TIES trims them: Σ min(|a|, |b|)·[signs differ] / Σ min(|a|, |b|). Unrelated
    updates give 0.5; NaN where no entry is in both.
    """
    a, b = (largest_entries(_dense(one, name), KEPT) for one in (first, second))
    common = torch.minimum(a.abs(), b.abs())
    total = common.sum()
    return float((common * (a.sign() != b.sign())).sum() / total) if total else math.nan


def _dense(adapter: Adapter, name: str) -> Tensor:
    A, B = matrices(adapter, name)
    return adapter.scale_of(name) * (B.float() @ A.float())


def interference(first: Spectrum, second: Spectrum) -> float:
    """‖(UᵀU − 1)·Σ·(VᵀV − 1)‖₁ of both updates' directions side by side, over ‖Σ‖₁: 0 where a sum keeps both whole.

    Singular task interference (arXiv 2412.00081 eq. 6); its size depends on the ranks, so compare at equal ones. Every
    direction counts, also one whose σ is 0: leave those out (`held`).
    """
    U, V = (torch.cat(pair, -1) for pair in ((first.U_OK, second.U_OK), (first.V_IK, second.V_IK)))
    sigma = torch.cat([first.sigma_K, second.sigma_K], -1)
    crossed = [X.mT @ X - torch.eye(X.shape[-1], dtype=X.dtype) for X in (U, V)]
    total = float(sigma.sum())
    return float((crossed[0] @ torch.diag_embed(sigma) @ crossed[1]).abs().sum()) / total if total else 0.0


def compare(first: Adapter, second: Adapter) -> dict[str, Any]:
    """Both adapters layer by layer, and over all layers. Raises AdapterError when they share no layer.

    A layer has cosine, sign conflict, interference, and for the sides "output" (U) and "input" (V) φ of the first
    directions, of all of them, its null, the smallest principal angle in degrees, and how many directions are shared;
    NaN for what has no directions, where an update is zero. Of stacked experts, those of the first (`of_first_expert`).
    `same_seed`: new adapters of one seed begin with the same A, or its first rows, which shows on the input side
    whatever they learn. `overlap` has φ(i, j) for i and j of 1, 2, 4 …, its mean over the layers, and that of its null.
    """
    names = [name for name in first.factors if name in second.factors and _same_shape(first, second, name)]
    if not names:
        raise AdapterError("These adapters have no layer of the same name and shape, so there is nothing to compare.")
    pairs = {name: [_strongest(one, name) for one in (first, second)] for name in names}
    layers = [_compared(first, second, name, *pairs[name]) for name in names]
    conflicts = [layer["sign_conflict"] for layer in layers if not math.isnan(layer["sign_conflict"])]
    return {
        "same_seed": _seed(first) is not None and _seed(first) == _seed(second),
        "of_first_expert": [name for name in names if first.is_stack(name)],
        "cosine": cosine(first, second, names),
        "sign_conflict": sum(conflicts) / len(conflicts) if conflicts else math.nan,
        "sign_conflict_null": CONFLICT_NULL,
        "overlap": {side: _mean_overlap([_of_side(pair, side) for pair in pairs.values()]) for side in SIDES},
        "layers": layers,
        "only_first": [name for name in first.factors if name not in names],
        "only_second": [name for name in second.factors if name not in names],
    }


def _seed(adapter: Adapter) -> int | None:
    """Of its training, where that is known."""
    seed: int | None = adapter.settings.get("seed")
    return seed


def _same_shape(first: Adapter, second: Adapter, name: str) -> bool:
    (A1, B1), (A2, B2) = matrices(first, name), matrices(second, name)
    return A1.shape[-1] == A2.shape[-1] and B1.shape[:-1] == B2.shape[:-1]


def _strongest(adapter: Adapter, name: str) -> Spectrum:
    """A layer's directions that hold something; of a stack, those of its first expert."""
    found = spectrum(adapter, name)
    return held(Spectrum(*(part[0] for part in found)) if found.sigma_K.ndim > 1 else found)


def _of_side(pair: Sequence[Spectrum], side: str) -> tuple[Tensor, Tensor]:
    first, second = ((found.U_OK if side == "output" else found.V_IK) for found in pair)
    return first, second


def _compared(first: Adapter, second: Adapter, name: str, one: Spectrum, two: Spectrum) -> dict[str, Any]:
    return {
        "name": name,
        "cosine": cosine(first, second, [name]),
        "sign_conflict": sign_conflict(first, second, name),
        "interference": interference(one, two),
        **{side: _side(*_of_side((one, two), side)) for side in SIDES},
    }


_SIDE = ("phi_first", "phi_first_null", "phi_all", "phi_all_null", "smallest_angle_degrees", "shared_directions")


def _side(first_NK: Tensor, second_NK: Tensor) -> dict[str, float]:
    phi, null = overlap(first_NK, second_NK)
    if not phi.numel():
        return dict.fromkeys(_SIDE, math.nan)
    smallest = math.degrees(float(principal_angles(first_NK, second_NK)[0]))
    numbers = (float(phi[0, 0]), float(null[0, 0]), float(phi[-1, -1]), float(null[-1, -1]), smallest)
    return dict(zip(_SIDE, (*numbers, shared_directions(first_NK, second_NK)), strict=True))


def _mean_overlap(pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """φ and its null for numbers of directions 1, 2, 4 …, over the layers that have so many; `first` and `second`."""
    found = [overlap(*pair) for pair in pairs if all(side.numel() for side in pair)]
    sizes = [_powers(max((one.phi.shape[axis] for one in found), default=0)) for axis in (0, 1)]

    def means(which: int) -> list[list[float]]:
        def mean(i: int, j: int) -> float:
            return _mean([float(one[which][i - 1, j - 1]) for one in found if one.phi[i - 1 : i, j - 1 : j].numel()])

        return [[mean(i, j) for j in sizes[1]] for i in sizes[0]]

    return {"first": sizes[0], "second": sizes[1], "phi": means(0), "null": means(1)}


def _powers(highest: int) -> list[int]:
    """1, 2, 4 … and the highest."""
    return sorted({2**power for power in range(highest.bit_length())} | ({highest} if highest else set()))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
