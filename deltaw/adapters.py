"""What adapters' files alone give: layers, sizes, origins, spectra, two side by side, and sums. No base is opened.

Nothing here imports transformers, which takes seconds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltaw.adapter import Adapter, read_adapter, write_adapter
from deltaw.adapter.files import WEIGHTS
from deltaw.analysis.arithmetic import METHODS
from deltaw.analysis.arithmetic import combine as combined
from deltaw.analysis.compare import compare as compared
from deltaw.analysis.compare import inner_product
from deltaw.analysis.spectrum import ranks_of, spectra
from deltaw.disk import require_new
from deltaw.engine.run import adapter_folder
from deltaw.errors import UsageError


def inspect(path: str | Path) -> dict[str, Any]:
    """What an adapter adapts: per kind of layer its count, shapes, rank and effective scale; sizes; origin. No base."""
    folder = adapter_folder(path)
    adapter = read_adapter(folder)
    return {
        "folder": str(folder),
        "rank": adapter.spec.rank,
        "alpha": adapter.spec.alpha,
        "variant": "DoRA" if adapter.spec.dora else "rsLoRA" if adapter.spec.rslora else "LoRA",
        "one_scale": adapter.spec.one_scale,
        "parameters": adapter.parameters,
        "bytes": (folder / WEIGHTS).stat().st_size,
        "layers": _layer_kinds(adapter),
        "origin": adapter.origin,
    }


def _layer_kinds(adapter: Adapter) -> list[dict[str, Any]]:
    """Layers of the same last name, rank, scale and shapes as one line each."""
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, factors in adapter.factors.items():
        rank, scale = adapter.rank_of(name), adapter.scale_of(name)
        groups[name.rsplit(".", 1)[-1], rank, scale, tuple(factors.A.shape), tuple(factors.B.shape)].append(name)
    return [
        {
            "name": kind,
            "count": len(names),
            "rank": rank,
            "scale": scale,
            "A": list(A_shape),
            "B": list(B_shape),
            "parameters": sum(adapter.factors[name].parameters for name in names),
            "update_norm": sum(_update_norm(adapter, name) for name in names) / len(names),
        }
        for (kind, rank, scale, A_shape, B_shape), names in groups.items()
    ]


def _update_norm(adapter: Adapter, name: str) -> float:
    """‖s·B·A‖_F, of no dense ΔW."""
    return math.sqrt(max(0.0, inner_product(adapter, adapter, name)))


def compare(first: str | Path, second: str | Path) -> dict[str, Any]:
    """Two adapters or runs side by side (deltaw/analysis/compare.py): per layer and over all. No base is opened."""
    return compared(*(read_adapter(adapter_folder(path)) for path in (first, second)))


def layer_spectra(path: str | Path) -> list[dict[str, Any]]:
    """Per layer: singular values of ΔW, ‖ΔW‖, and effective, stable and participation rank and energy@90. No base."""
    adapter = read_adapter(adapter_folder(path))
    rows = []
    for name, found in spectra(adapter).items():
        sigma = found.sigma_K.flatten().sort(descending=True).values
        ranks = ranks_of(sigma)
        rows.append(
            {"name": name, "norm": float(sigma.square().sum().sqrt()), **ranks.__dict__, "sigma": sigma.tolist()}
        )
    return rows


def combine(
    paths: Sequence[str | Path],
    out: str | Path,
    weights: Sequence[float] = (),
    rank: int | None = None,
    method: str = "sum",
    density: float = 0.5,
    seed: int = 0,
) -> dict[str, Any]:
    """Writes Σ wᵢ·ΔWᵢ of several adapters or runs to `out`; returns its ranks and the share of energy left out.

    Weights are 1/n each where none are given. `method` is "sum", "ties" or "dare" (deltaw/analysis/arithmetic.py), on
    ΔW itself and never on A and B apart. Raises UsageError and AdapterError, and writes nothing then.
    """
    if len(paths) < 2 and not weights:
        raise UsageError("Give two adapters or more, or one and --weights to scale it.")
    if weights and len(weights) != len(paths):
        raise UsageError(f"There are {len(paths)} adapters and {len(weights)} weights.")
    if not all(map(math.isfinite, weights)):
        raise UsageError(f"Weights are finite numbers, not {', '.join(map(str, weights))}.")
    if method not in METHODS or not 0 < density <= 1:
        raise UsageError(f"A method is one of {', '.join(METHODS)}, and a density above 0 and at most 1.")
    require_new(Path(out))
    adapters = [read_adapter(adapter_folder(path)) for path in paths]
    shares = list(weights) or [1 / len(paths)] * len(paths)
    made, discarded = combined(adapters, shares, rank, method, density, seed)
    write_adapter(made, Path(out))
    ranks = [made.rank_of(name) for name in made.factors]
    return {
        "folder": str(out),
        "method": method,
        "weights": shares,
        "ranks": {"least": min(ranks), "most": max(ranks)},
        "parameters": made.parameters,
        "discarded_energy": discarded,
    }
