"""Metric lines as curves: pick a column, smooth it, thin it for drawing.

Not a plot: no colours, no matplotlib. The idea that keeps it short: a smoothed loss is a sum over a sum, like the loss
of a step, so that steps with few trained tokens weigh little and the window's end needs no special case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaw.report.contents import Line
from deltaw.report.quantities import is_number

MAX_POINTS = 600


@dataclass(frozen=True)
class Curve:
    """Values over steps, with the weight that each carries in a mean; three arrays of one length."""

    steps: NDArray[np.float64]
    values: NDArray[np.float64]
    weights: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.steps)


def column(lines: list[Line], name: str, weight: str | None = None) -> Curve:
    """The finite values of one column, ("loss", weight="trained_tokens"); lines without it are left out."""
    return derived(lines, lambda line: line.get(name), weight)


def derived(lines: list[Line], value: Callable[[Mapping[str, Any]], Any], weight: str | None = None) -> Curve:
    """Like `column`, for a value computed from a line."""
    rows = [(line["step"], value(line), line.get(weight) if weight else 1) for line in lines]
    # A line from before the weight was recorded still counts, as one unit.
    kept = [(step, number, part if is_number(part) else 1) for step, number, part in rows if is_number(number)]
    table = np.array(kept, dtype=np.float64).reshape(-1, 3)
    return Curve(table[:, 0], table[:, 1], table[:, 2])


def tokens_per_second(steps: list[Line]) -> Curve:
    """Tokens of each step over its seconds, weighted by seconds: smoothed, all tokens of a window over all its time."""

    def speed(line: Mapping[str, Any]) -> float | None:
        tokens, seconds = line.get("tokens"), line.get("seconds")
        return tokens / seconds if is_number(tokens) and is_number(seconds) and seconds > 0 else None

    return derived(steps, speed, weight="seconds")


def window_steps(num_steps: int) -> int:
    """How many steps a smoothed value spans: a twentieth of the run, at least 5, and odd, so that it has a centre."""
    return max(5, num_steps // 20) | 1


def smoothed(curve: Curve) -> Curve:
    """The weighted mean over a centred window, cut off at both ends of the run."""
    reach = window_steps(len(curve)) // 2
    index = np.arange(len(curve))
    first, last = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(curve))

    def window_sum(values: NDArray[np.float64]) -> NDArray[np.float64]:
        total = np.concatenate([[0.0], np.cumsum(values)])
        return total[last] - total[first]

    # A window without a trained token has no mean; the weight of 1e-9 keeps it finite and changes nothing elsewhere.
    weights = curve.weights + 1e-9
    return Curve(curve.steps, window_sum(curve.values * weights) / window_sum(weights), curve.weights)


def thinned(curve: Curve, max_points: int = MAX_POINTS) -> Curve:
    """At most `max_points` of the points: the lowest and highest of each bucket, so that no spike disappears."""
    if len(curve) <= max_points:
        return curve
    # The first and the last point stay, so that the curve keeps its ends.
    buckets = np.array_split(np.arange(1, len(curve) - 1), (max_points - 2) // 2)
    extremes = [b[int(pick(curve.values[b]))] for b in buckets for pick in (np.argmin, np.argmax)]
    kept = np.unique([0, *extremes, len(curve) - 1])
    return Curve(curve.steps[kept], curve.values[kept], curve.weights[kept])
