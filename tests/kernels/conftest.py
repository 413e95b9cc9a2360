"""The ways to take what lies between the products."""

from __future__ import annotations

import pytest
import torch
from libraries import FLAGS, library_for

from deltaw.kernels import compiled


@pytest.fixture(autouse=True)
def _two_threads():
    """So that threads share the work wherever a kernel lets them."""
    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(usual)


@pytest.fixture(params=FLAGS)
def library(request, monkeypatch):
    """The compiled passes, compiled in each way and in use."""
    monkeypatch.setattr(compiled, "_state", compiled._State(library_for(request.param)))


@pytest.fixture(params=["torch", "compiled"])
def either_way(request, monkeypatch):
    """A test by torch, and by the compiled library where it takes such tensors."""
    library = None if request.param == "torch" else library_for("compiled")
    monkeypatch.setattr(compiled, "_state", compiled._State(library))
