"""The library of compiled passes: passes.cpp and attention.cpp, made once for this very processor by g++, kept in a
cache, and opened.

It is compiled for OpenMP and linked with none: it finds torch's in the process and shares its threads, where a second
set of threads would wait for the first.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltaw import hardware
from deltaw.disk import make_once, new_file, sha256_file, write_text
from deltaw.errors import DiskError

SOURCES = tuple(Path(__file__).with_name(name) for name in ("passes.cpp", "attention.cpp"))
HEADER = Path(__file__).with_name("vectors.hpp")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-w")
X86_FLAGS = ("-mprefer-vector-width=512",)
COMPILE_SECONDS = 120
COMPILING_BYTES = 400_000_000  # g++ takes 140 MB
KINDS = {torch.bfloat16: "bf16", torch.float32: "fp32"}
# The arguments of each function: pointers, floats and longs.
ARGUMENTS = {
    "rms_norm": "pppfll",
    "rms_norm_backward": "pppppfll",
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
# Of attention.cpp, for bf16 only where the processor multiplies it; these return 1 where memory lacks.
ATTENTION = {"attend": "pppppflllll", "attend_backward": "pppppppppfllllll"}
_C_TYPES = {"p": ctypes.c_void_p, "f": ctypes.c_float, "l": ctypes.c_long}


class NoLibraryError(Exception):
    """Why there is no library; `lasting` if that stays so while this process lives."""

    def __init__(self, reason: str, *, lasting: bool = True) -> None:
        super().__init__(reason)
        self.lasting = lasting


@dataclass(frozen=True)
class Library:
    """Its functions by dtype and name, and the digest of all that decided their bits."""

    functions: dict[torch.dtype, dict[str, Any]]
    digest: str


def open_library(folder: Path, more_flags: Sequence[str] = ()) -> Library:
    """The library in `folder`, made there if need be, by what `CXX` names or by g++. Raises NoLibraryError."""
    if sys.platform != "linux":
        raise NoLibraryError("it is made on Linux alone")
    reason = ""
    for compiler in _compilers():
        try:
            return _opened([*compiler, *_flags(), *more_flags], folder)
        except FileNotFoundError:
            reason = reason or f"there is no {compiler[0]}"
        except subprocess.CalledProcessError as error:
            reason = reason or f"{compiler[0]} says: {_first_error(error.stderr)}"
        except (OSError, DiskError, subprocess.TimeoutExpired, AttributeError) as error:
            reason = reason or str(error)
    raise NoLibraryError(reason)


def _compilers() -> Iterator[list[str]]:
    """What a user chose, which may be none that knows GCC's OpenMP, and g++."""
    if chosen := shlex.split(os.environ.get("CXX", "")):
        yield chosen
    yield ["g++"]


def _flags() -> tuple[str, ...]:
    return (*FLAGS, *X86_FLAGS) if platform.machine() == "x86_64" else FLAGS


def _opened(command: Sequence[str], folder: Path) -> Library:
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(command[0])
    digest = _digest(command)
    path = folder / f"passes-{digest}.so"
    if not _is_whole(path) and (free := hardware.look().available_bytes) < COMPILING_BYTES:
        reason = f"{free / 1e6:.0f} MB are free, which is too little for a compiler"
        raise NoLibraryError(reason, lasting=False)
    make_once(path, lambda: _is_whole(path), lambda: _compile(command, path))
    for part in (folder.parent, folder, path):
        _require_ours(part)
    library = ctypes.CDLL(str(path))
    return Library({dtype: _bound(library, kind) for dtype, kind in KINDS.items()}, digest)


def _digest(command: Sequence[str]) -> str:
    """Of the source, the command, the compiler and the processor: machines may share a cache."""
    sources = [path.read_text("utf-8") for path in (HEADER, *SOURCES)]
    parts = [*sources, *command, _run([command[0], "--version"]), *hardware.processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(command: Sequence[str], path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, new_file(path) as library:
        parts = [str(Path(folder, source.stem + ".o")) for source in SOURCES]
        for source, part in zip(SOURCES, parts, strict=True):
            _run([*command, "-c", str(source), "-o", part])
        _run([command[0], "-shared", *parts, "-o", str(library)])
    write_text(path.with_suffix(".sha256"), sha256_file(path))


def _run(command: Sequence[str]) -> str:
    """What it prints. A compiler's messages may be in any language and encoding."""
    options: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace", "check": True}
    return str(subprocess.run(command, timeout=COMPILE_SECONDS, **options).stdout)


def _first_error(said: str) -> str:
    lines = said.strip().splitlines() or ["nothing"]
    return next((line for line in lines if "error" in line), lines[0])


def _is_whole(path: Path) -> bool:
    """Whether the library is what was made: a damaged one would end the process as it is opened."""
    try:
        return path.with_suffix(".sha256").read_text("utf-8") == sha256_file(path)
    except (OSError, UnicodeDecodeError, DiskError):
        return False


def _require_ours(path: Path) -> None:
    """Raises NoLibraryError where others may write, since what lies there is run."""
    found = path.stat()
    open_to_all = found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX
    if found.st_uid not in (0, os.getuid()) or open_to_all:
        raise NoLibraryError(f"{path} is not ours alone to write in")


def _bound(library: ctypes.CDLL, kind: str) -> dict[str, Any]:
    functions = {}
    there = {name: letters for name, letters in ATTENTION.items() if hasattr(library, f"{name}_{kind}")}
    for name, letters in (ARGUMENTS | there).items():
        function = getattr(library, f"{name}_{kind}")
        function.argtypes = [_C_TYPES[letter] for letter in letters]
        function.restype = ctypes.c_int if name in ATTENTION else None
        functions[name] = function
    return functions
