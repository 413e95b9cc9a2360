"""deltaw adapts a large pre-trained model to a task on the machine you have: it trains ΔW = s·B·A and nothing else.

The names below are handed on when first used, so that `import deltaw` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Adapter": "deltaw.adapter",
    "Injection": "deltaw.adapter",
    "LoraSpec": "deltaw.adapter",
    "choose": "deltaw.adapter",
    "inject": "deltaw.adapter",
    "new_adapter": "deltaw.adapter",
    "read_adapter": "deltaw.adapter",
    "write_adapter": "deltaw.adapter",
    "base_path": "deltaw.base.locate",
    "Model": "deltaw.api",
    "load": "deltaw.api",
    "open_adapter": "deltaw.api",
    "train": "deltaw.training",
    "Run": "deltaw.engine.run",
    "evaluate": "deltaw.api",
    "merge": "deltaw.api",
    "inspect": "deltaw.adapters",
    "verify": "deltaw.api",
    "bench": "deltaw.api",
    "rank": "deltaw.ranks",
    "compress": "deltaw.compression",
    "combine": "deltaw.adapters",
    "compare": "deltaw.adapters",
    "layer_spectra": "deltaw.adapters",
    "beside_base": "deltaw.api",
    "sweep": "deltaw.sweeps",
    "demo": "deltaw.demonstration",
    "DeltawError": "deltaw.errors",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'deltaw' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
