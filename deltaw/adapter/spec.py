"""What is wanted of an adapter: rank, alpha, targets, variant, patterns. No tensors, no model.

A name matches a pattern when it equals it or ends with "." + pattern: plain suffixes, compared literally. No regular
expression is ever taken from a file or a user, so a pattern can neither hang nor surprise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from deltaw.adapter import math
from deltaw.errors import AdapterError, bullet_list

ALL_LINEAR = "all-linear"
MAX_RANK = 1024


def matches(name: str, pattern: str) -> bool:
    """Whether `name` equals `pattern` or ends with it at a dot: "a.b.q_proj" matches "q_proj", not "proj"."""
    return name == pattern or name.endswith("." + pattern)


def first_match(name: str, patterns: Iterable[str]) -> str | None:
    """The first pattern that matches, in the order given (the order is PEFT's rule too), or None."""
    return next((pattern for pattern in patterns if matches(name, pattern)), None)


def _order(patterns: Iterable[str]) -> dict[str, int]:
    return {pattern: number for number, pattern in enumerate(patterns)}


def _first_of(name: str, order: Mapping[str, int]) -> str | None:
    """`first_match` in patterns of known order; its time does not grow with them, and files may bring thousands."""
    parts = name.split(".")
    suffixes = (".".join(parts[start:]) for start in range(len(parts)))
    return min((suffix for suffix in suffixes if suffix in order), key=order.__getitem__, default=None)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class LoraSpec:
    """Settings of one adapter; the defaults are those of docs/guides/rank-and-rate.md.

    `targets` is ("all-linear",) or a list of plain suffixes of module names, or of parameter names such as
    "mlp.experts.down_proj"; `exclude` takes names out again; `layers` keeps only blocks with these numbers.
    `rank_pattern` and `alpha_pattern` override rank and alpha for the names that match their keys.
    Raises AdapterError, with every fault listed, when a value has no meaning.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = (ALL_LINEAR,)
    exclude: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranks = [("rank", self.rank), *((f"rank of {key!r}", rank) for key, rank in self.rank_pattern.items())]
        alphas = [("alpha", self.alpha), *((f"alpha of {key!r}", alpha) for key, alpha in self.alpha_pattern.items())]
        faults = [
            f"{name} must be a whole number between 1 and {MAX_RANK}, not {rank!r}"
            for name, rank in ranks
            if not (type(rank) is int and 1 <= rank <= MAX_RANK)
        ]
        faults += [
            f"{name} must be a positive number, not {alpha!r}"
            for name, alpha in alphas
            if not (_is_number(alpha) and 0 < alpha < 1e9)
        ]
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            faults.append(f"dropout must be in [0, 1), not {self.dropout!r}")
        if not self.targets:
            faults.append('targets is empty; give "all-linear" or a list of module names')
        if faults:
            raise AdapterError("These adapter settings cannot be used:\n" + bullet_list(faults))

    @cached_property
    def _rank_order(self) -> dict[str, int]:
        return _order(self.rank_pattern)

    @cached_property
    def _alpha_order(self) -> dict[str, int]:
        return _order(self.alpha_pattern)

    def rank_of(self, name: str) -> int:
        """The rank for the module or parameter of this name."""
        key = _first_of(name, self._rank_order)
        return self.rank if key is None else self.rank_pattern[key]

    def alpha_of(self, name: str) -> float:
        """Alpha for the module or parameter of this name."""
        key = _first_of(name, self._alpha_order)
        return self.alpha if key is None else self.alpha_pattern[key]

    @property
    def one_scale(self) -> bool:
        """Whether a reader that knows r and alpha alone, and nothing layer by layer, computes the same."""
        return not (self.rslora or self.dora or self.rank_pattern or self.alpha_pattern)

    def scale_of(self, name: str) -> float:
        """The factor s of ΔW = s·B·A for this name: alpha/r, or alpha/√r with rsLoRA."""
        return math.scale(self.alpha_of(name), self.rank_of(name), rslora=self.rslora)

    def with_(self, **changes: Any) -> LoraSpec:
        """A copy with these fields changed."""
        return replace(self, **changes)
