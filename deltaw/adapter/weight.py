"""The seam to weight storage: everything that needs a frozen weight W asks here, when it needs it, and lets it go.

Storage that is mapped, streamed or quantised differs behind these functions only; forward, backward, merge and every
initialisation from data stay the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def dense_weight(module: nn.Module, parameter: str = "weight") -> Tensor:
    """W as an ordinary floating-point tensor, detached, in the layout in which the module stores it."""
    weight: Tensor = getattr(module, parameter)
    assert weight.is_floating_point(), f"no reader for weights stored as {weight.dtype}"
    return weight.detach()


def weight_shape(module: nn.Module, parameter: str = "weight") -> torch.Size:
    """The shape of W as `dense_weight` would return it, without making it."""
    return getattr(module, parameter).shape
