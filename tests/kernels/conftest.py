"""The two ways to take what lies between the products."""

from __future__ import annotations

import pytest

from deltaw.base.builtin import cache_folder
from deltaw.kernels import compiled


@pytest.fixture
def library():
    """passes.cpp, compiled and in use."""
    reason = compiled.prepare(cache_folder() / "compiled")
    if reason is not None:
        pytest.skip(f"nothing is compiled here: {reason}")


@pytest.fixture(params=["torch", "compiled"])
def either_way(request):
    """A test by torch, and by the compiled library where it takes such tensors."""
    if request.param == "torch":
        with compiled.left_out():
            yield
    else:
        request.getfixturevalue("library")
        yield
