"""passes.cpp for the tests, compiled in several ways."""

from __future__ import annotations

import functools
import os
import shutil
import sys

import pytest

from deltaw.base.builtin import cache_folder
from deltaw.kernels.library import NoLibraryError, open_library

# What other processors run: the vectors that GCC makes of its own ones, and bf16 rounded without an instruction for it.
FLAGS = {"compiled": (), "compiled without AVX-512": ("-march=haswell",), "compiled without bf16": ("-mno-avx512bf16",)}


@functools.cache
def library_for(way: str):
    """passes.cpp as one of FLAGS; only without a compiler is there nothing to test."""
    if sys.platform != "linux" or shutil.which(os.environ.get("CXX") or "g++") is None:
        pytest.skip("there is no g++")
    if way != "compiled" and os.uname().machine != "x86_64":
        pytest.skip("flags of x86")
    try:
        return open_library(cache_folder() / "compiled", FLAGS[way])
    except NoLibraryError as error:
        pytest.fail(f"passes.cpp: {error}")
