"""The seam to weight storage: everything that needs a frozen weight W asks here, when it needs it, and lets it go.

Storage that is mapped, streamed or quantised differs behind these functions only; forward, backward, merge and every
initialisation from data stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

# In a module's __dict__: what to call before a weight of it is read, and what gives W where `weight` does not.
ON_READ, READER = "_deltaw_on_read", "_deltaw_reader"


def dense_weight(module: nn.Module, parameter: str = "weight") -> Tensor:
    """W as an ordinary floating-point tensor, detached, in the layout in which the module stores it."""
    on_read, reader = module.__dict__.get(ON_READ), module.__dict__.get(READER)
    if on_read is not None:
        on_read()
    weight: Tensor = getattr(module, parameter) if reader is None else reader()
    assert weight.is_floating_point(), f"no reader for weights stored as {weight.dtype}"
    return weight.detach()


def weight_shape(module: nn.Module, parameter: str = "weight") -> torch.Size:
    """The shape of W as `dense_weight` would return it, without making it."""
    return getattr(module, parameter).shape


def stored_tensors(module: nn.Module) -> Iterator[Tensor]:
    """What is read when weights of a module and its parts are: the parameters, or what they are stored as."""
    for part in module.modules():
        reader = part.__dict__.get(READER)
        if reader is None:
            yield from part.parameters(recurse=False)
        else:
            yield from reader.tensors
