"""How much of an adapter's gain in held-out loss is left at each rank, with intervals; and what rank the task needed.

G(k) = (L₀ − L_k) / (L₀ − L_r): L₀ is the base's loss, L_k the loss at rank k, L_r that of the whole adapter. Losses
come as sums per document; intervals are paired bootstraps over documents (Efron 1979), so what all ranks find hard
alike cancels. A spectrum is not asked: weight energy does not predict quality.

Legend: D documents, K ranks, S resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

DRAWS = 2000
# What half the rank must retain for the rank to be halved, or fail to, for it to be called too small.
HALVE, TOO_SMALL = 0.99, 0.97
OCTAVE = 2.0
FEWEST = 10  # documents, below which resampling them says little of others


class Point(NamedTuple):
    """One rank: mean loss per token, and the retained gain with its 95 % interval."""

    rank: int
    loss: float
    gain: float
    low: float
    high: float


class Needed(NamedTuple):
    """The truncation rank for a share of the gain: between `low` and `high`; undetermined beyond an octave."""

    share: float
    low: int
    high: int

    @property
    def determined(self) -> bool:
        """Whether the interval spans an octave at most."""
        return self.high <= OCTAVE * self.low


@dataclass(frozen=True)
class Curve:
    """Retained gain by rank; `improvement` is L₀ − L_r in nats per token with its 95 % interval."""

    points: tuple[Point, ...]
    base_loss: float
    improvement: tuple[float, float, float]
    documents: int
    tokens: int

    @property
    def improves(self) -> bool:
        """Whether the adapter is surely better than the base on this data; without that no gain can be retained."""
        return self.documents >= FEWEST and self.improvement[1] > 0

    def needed(self, share: float) -> Needed:
        """The truncation rank at this share: from the first rank whose upper bound reaches it to the first lower one.

        From 0, the base itself, to the whole where the adapter is not surely better than the base.
        """
        if not self.improves:
            return Needed(share, 0, self.points[-1].rank)
        low = next(point.rank for point in self.points if point.high >= share)
        high = next(point.rank for point in self.points if point.low >= share)
        return Needed(share, low, high)

    def verdict(self) -> str:
        """Too small, enough, or halve it: one sentence with its evidence."""
        whole = self.points[-1]
        if self.documents < FEWEST:
            return f"Undetermined: {self.documents} held-out documents are too few to tell; give --data with more."
        if not self.improves:
            mean, low, high = self.improvement
            return (
                f"Undetermined: on these {self.documents:,} documents the adapter is not surely better than the base "
                f"({mean:+.4f} nats per token, {low:+.4f} to {high:+.4f}), so there is no gain to retain."
            )
        half = next((point for point in self.points if point.rank == half_of(whole.rank) < whole.rank), None)
        if half is None and whole.rank > 1:
            return f"Undetermined: half of rank {whole.rank} was not measured."
        if half is None:
            return "Rank 1 cannot be halved; train at a higher rank to learn whether more would help."
        found = f"half the rank keeps {half.gain:.1%} of the gain ({half.low:.1%} to {half.high:.1%})"
        if half.low >= HALVE:
            return f"Halve it: {found}, so rank {half.rank} is enough."
        if half.high < TOO_SMALL:
            return f"Too small: {found}; the last directions still matter, so try rank {2 * whole.rank}."
        return f"Enough: {found}; rank {whole.rank} is neither wasteful nor surely short."


def half_of(rank: int) -> int:
    """Half a rank, rounded up."""
    return (rank + 1) // 2


def retained_gain(
    base_D: np.ndarray, losses_KD: np.ndarray, tokens_D: np.ndarray, ranks: Sequence[int], seed: int = 0
) -> Curve:
    """The curve from loss sums [D] of the base and [K, D] of each rank, the last of them the whole adapter's."""
    weights_SD = _resamples(len(tokens_D), seed)
    base, whole, tokens = base_D.sum(), losses_KD[-1].sum(), tokens_D.sum()
    gained_S = weights_SD @ (base_D - losses_KD[-1])
    points = []
    for rank, losses_D in zip(ranks, losses_KD, strict=True):
        with np.errstate(divide="ignore", invalid="ignore"):
            gain_S = (weights_SD @ (base_D - losses_D)) / gained_S
            gain = float((base - losses_D.sum()) / (base - whole)) if base != whole else float("nan")
        low, high = _interval(gain_S)
        points.append(Point(rank, float(losses_D.sum() / tokens), gain, low, high))
    improvement = (float((base - whole) / tokens), *_interval(gained_S / (weights_SD @ tokens_D)))
    return Curve(tuple(points), float(base / tokens), improvement, len(tokens_D), int(tokens))


def mean_interval(sums_D: np.ndarray, tokens_D: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of Σ sums/Σ tokens when documents are drawn anew (Efron 1979)."""
    weights_SD = _resamples(len(tokens_D), seed)
    return _interval((weights_SD @ sums_D) / (weights_SD @ tokens_D))


def _resamples(documents: int, seed: int) -> np.ndarray:
    """How often each document is drawn, [S, D]."""
    shares = np.full(documents, 1 / documents)
    return np.random.default_rng(seed).multinomial(documents, shares, size=DRAWS).astype(np.float64)


def _interval(values_S: np.ndarray) -> tuple[float, float]:
    """The middle 95 %; NaN where no resample gave a number."""
    finite = values_S[np.isfinite(values_S)]
    low, high = np.percentile(finite, [2.5, 97.5]) if len(finite) else (np.nan, np.nan)
    return float(low), float(high)
