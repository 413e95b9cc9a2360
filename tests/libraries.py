"""The library of compiled passes for the tests, compiled in several ways."""

from __future__ import annotations

import functools
import os
import shutil
import sys

import pytest

from deltaw.base.builtin import cache_folder
from deltaw.kernels.library import NoLibraryError, open_library

# What other processors run: products without AMX, bf16 rounded without an instruction for it, and the vectors that GCC
# makes of its own ones.
FLAGS = {
    "compiled": (),
    "compiled without AMX": ("-mno-amx-bf16",),
    "compiled without bf16": ("-mno-avx512bf16", "-mno-amx-bf16"),
    "compiled without AVX-512": ("-march=haswell",),
}


@functools.cache
def library_for(way: str):
    """The library as one of FLAGS; only without a compiler is there nothing to test."""
    if sys.platform != "linux" or shutil.which(os.environ.get("CXX") or "g++") is None:
        pytest.skip("there is no g++")
    if way != "compiled" and os.uname().machine != "x86_64":
        pytest.skip("flags of x86")
    try:
        return open_library(cache_folder() / "compiled", FLAGS[way])
    except NoLibraryError as error:
        pytest.fail(f"no library: {error}")
