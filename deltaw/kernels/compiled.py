"""passes.cpp, compiled once for this processor and called from here: what lies between the products, in one pass each.

Where there is g++ (or what `CXX` names), `prepare` makes the library in a few seconds, keeps it in a folder of caches,
and takes it into use. Nothing depends on it: without, the kernels compute the same by torch, in more passes over
memory. So whoever calls a function of this module has asked `takes` first. `DELTAW_COMPILED=0` leaves it out.

It shares the threads of torch: compiled for OpenMP and linked with none, it finds torch's in the process, and a second
set of threads would wait for the first.

Legend: x_TND heads of a flat row; n documents of a tile, L rows of each; N rows of logits, V vocabulary.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw import hardware
from deltaw.disk import make_once, new_file, sha256_file, write_text
from deltaw.errors import DiskError

SOURCE = Path(__file__).with_name("passes.cpp")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-w")
X86_FLAGS = ("-mprefer-vector-width=512",)
COMPILE_SECONDS = 120
COMPILING_BYTES = 400_000_000  # g++ takes 140 MB
KINDS = {torch.bfloat16: "bf16", torch.float32: "fp32"}
# The arguments of each function of passes.cpp: pointers, floats and longs.
ARGUMENTS = {
    "rms_norm": "pppfll",
    "rms_norm_backward": "ppppfll",
    "rotate": "ppppllll",
    "gated": "pppl",
    "gated_backward": "ppppppl",
    "take": "ppplllll",
    "put": "ppplllll",
    "add": "pppllll",
    "softmax": "pppfllll",
    "softmax_backward": "ppppfllll",
    "losses_and_slopes": "pppppll",
}
_C_TYPES = {"p": ctypes.c_void_p, "f": ctypes.c_float, "l": ctypes.c_long}
_Functions = dict[torch.dtype, dict[str, Any]]
_functions: _Functions = {}  # empty while torch does the work


# -- making it --------------------------------------------------------------------------------------------------------


def prepare(folder: Path) -> str | None:
    """Takes the library in `folder` into use, made there if need be; None, or why torch goes on doing the work."""
    if _functions:
        return None
    found = _loaded(folder)
    if isinstance(found, str):
        return found
    _functions.update(found)
    return None


def in_use() -> bool:
    """Whether the library takes part in what this process computes on its processor."""
    return bool(_functions)


@contextmanager
def left_out() -> Iterator[None]:
    """While inside, torch does the work."""
    kept = dict(_functions)
    _functions.clear()
    try:
        yield
    finally:
        _functions.update(kept)


@functools.cache
def _loaded(folder: Path) -> _Functions | str:
    """The functions for each dtype; or why there are none."""
    if os.environ.get("DELTAW_COMPILED") == "0":
        return "DELTAW_COMPILED is 0"
    if sys.platform != "linux":
        return "it is made on Linux alone"
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        return f"there is no {os.environ.get('CXX') or 'g++'}"
    try:
        path = folder / f"passes-{_digest(compiler)}.so"
        if not _is_whole(path) and (free := hardware.look().available_bytes) < COMPILING_BYTES:
            return f"{free / 1e6:.0f} MB are free, which is too little for a compiler"
        make_once(path, lambda: _is_whole(path), lambda: _compile(compiler, path))
        library = ctypes.CDLL(str(path))
        return {dtype: _bound(library, kind) for dtype, kind in KINDS.items()}
    except subprocess.CalledProcessError as error:
        return f"{compiler} says: {(error.stderr.strip() or 'nothing').splitlines()[0]}"
    except (OSError, DiskError, subprocess.TimeoutExpired, AttributeError) as error:
        return str(error)


def _digest(compiler: str) -> str:
    """Of all that decides what is compiled: a cache may be shared between machines."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=COMPILE_SECONDS).stdout
    parts = [SOURCE.read_bytes(), version, " ".join([*_flags(), *hardware.processor()]).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _flags() -> tuple[str, ...]:
    return (*FLAGS, *X86_FLAGS) if platform.machine() == "x86_64" else FLAGS


def _compile(compiler: str, path: Path) -> None:
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "timeout": COMPILE_SECONDS}
    with tempfile.TemporaryDirectory() as folder, new_file(path) as library:
        part = Path(folder, "passes.o")
        subprocess.run([compiler, *_flags(), "-c", str(SOURCE), "-o", str(part)], **options)
        subprocess.run([compiler, "-shared", str(part), "-o", str(library)], **options)
    write_text(path.with_suffix(".sha256"), sha256_file(path))


def _is_whole(path: Path) -> bool:
    """Whether the library is what was made: a damaged one would end the process as it is opened."""
    try:
        return path.with_suffix(".sha256").read_text("utf-8") == sha256_file(path)
    except (OSError, UnicodeDecodeError, DiskError):
        return False


def _bound(library: ctypes.CDLL, kind: str) -> dict[str, Any]:
    functions = {}
    for name, letters in ARGUMENTS.items():
        function = getattr(library, f"{name}_{kind}")
        function.argtypes, function.restype = [_C_TYPES[letter] for letter in letters], None
        functions[name] = function
    return functions


# -- calling it -------------------------------------------------------------------------------------------------------


def takes(x: Tensor) -> bool:
    """Whether the functions below are there for such a tensor."""
    return x.dtype in _functions and x.device.type == "cpu"


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """`pointwise.rms_norm`."""
    x, out, width = x.contiguous(), _like(x), x.shape[-1]
    _call("rms_norm", x.dtype, out, x, gain.contiguous(), eps, x.numel() // width, width)
    return out


def rms_norm_backward(d: Tensor, x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """`pointwise.rms_norm_backward`."""
    d, x, out, width = d.contiguous(), x.contiguous(), _like(x), x.shape[-1]
    _call("rms_norm_backward", x.dtype, out, d, x, gain.contiguous(), eps, x.numel() // width, width)
    return out


def rotate(x_TND: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """`pointwise.rotate`."""
    x_TND, out = x_TND.contiguous(), _like(x_TND)
    cos_TE, sin_TE = (angles.float().contiguous() for angles in (cos_TE, sin_TE))
    _call("rotate", x_TND.dtype, out, x_TND, cos_TE, sin_TE, *x_TND.shape, cos_TE.shape[-1])
    return out


def gated(g: Tensor, u: Tensor) -> Tensor:
    """`pointwise.gated` by silu."""
    g, u, out = g.contiguous(), u.contiguous(), _like(g)
    _call("gated", g.dtype, out, g, u, g.numel())
    return out


def gated_backward(d: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`pointwise.gated_backward` by silu."""
    d, g, u = d.contiguous(), g.contiguous(), u.contiguous()
    dg, du, value = _like(g), _like(g), _like(g)
    _call("gated_backward", g.dtype, dg, du, value, d, g, u, g.numel())
    return dg, du, value


def take(x_TND: Tensor, rows: Tensor, count: int, heads: int) -> Tensor:
    """`tiles._take` of the rows with these numbers."""
    _, N, D = x_TND.shape
    length = len(rows) // count
    out = x_TND.new_empty(count * heads, N // heads * length, D)
    _call("take", x_TND.dtype, out, x_TND.contiguous(), rows, count, length, heads, N // heads, D)
    return out


def put(out_TND: Tensor, x: Tensor, rows: Tensor, count: int, heads: int) -> None:
    """`tiles._put`."""
    _, N, D = out_TND.shape
    assert out_TND.is_contiguous()
    _call("put", x.dtype, out_TND, x.contiguous(), rows, count, len(rows) // count, heads, N // heads, D)


def add(out_TND: Tensor, x: Tensor, rows: Tensor, count: int) -> None:
    """`tiles._add`, into fp32."""
    _, N, D = out_TND.shape
    assert out_TND.is_contiguous() and out_TND.dtype == torch.float32
    _call("add", x.dtype, out_TND, x.contiguous(), rows, count, len(rows) // count, N, D)


def softmax_(scores: Tensor, low_nL: Tensor, high_nL: Tensor, scale: float) -> Tensor:
    """softmax of scale·scores [n·K, G·L, M] in their own place; each query sees its keys from low to below high."""
    count, length = low_nL.shape
    heads = scores.shape[0] * scores.shape[1] // (count * length)
    _call("softmax", scores.dtype, scores, low_nL, high_nL, scale, count, heads, length, scores.shape[2])
    return scores


def softmax_backward_(d: Tensor, shares: Tensor, low_nL: Tensor, high_nL: Tensor, scale: float) -> Tensor:
    """The slopes of the scores before they were scaled, in the place of those of the shares."""
    count, length = low_nL.shape
    heads = d.shape[0] * d.shape[1] // (count * length)
    _call("softmax_backward", d.dtype, d, shares, low_nL, high_nL, scale, count, heads, length, d.shape[2])
    return d


def losses_and_slopes(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor]:
    """`loss._losses_and_slopes`."""
    logits_NV, slopes_NV, losses_N = logits_NV.contiguous(), _like(logits_NV), torch.empty(len(logits_NV))
    given = (logits_NV, targets_N.contiguous(), weights_N.float().contiguous())
    _call("losses_and_slopes", logits_NV.dtype, losses_N, slopes_NV, *given, *logits_NV.shape)
    return losses_N, slopes_NV


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype)


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | float) -> None:
    given = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    _functions[dtype][name](*given)
