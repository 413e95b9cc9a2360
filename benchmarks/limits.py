"""A command in a memory cgroup of its own, and the lowest limit under which it still finishes.

Pages of files count against whoever touches them first, so the files that a run maps are dropped from the system's
cache before each run: none is used for free that another process read.
"""

from __future__ import annotations

import os
import subprocess
import sysconfig
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from deltaw import hardware

_LIMITS = ("memory.max", "memory.limit_in_bytes")
_SWAPPING = {"memory.swap.max": "0", "memory.swappiness": "0"}


class Ran(NamedTuple):
    """A finished command. `killed`: by the limit, or because it took too long."""

    killed: bool
    seconds: float
    output: str


def run_under(limit_bytes: int, command: Sequence[str], files: Iterable[Path], timeout: float) -> Ran:
    """Runs a command under a limit. Raises OSError where no memory cgroup can be made, RuntimeError when it fails."""
    forget([*files, *Path(sysconfig.get_path("platlib")).rglob("*.so*")])
    parent = next(folder for folder in hardware._cgroup_folders("memory") if (folder / "cgroup.procs").exists())
    group = parent / f"deltaw_bench_{os.getpid()}"
    group.mkdir()
    try:
        next(group / name for name in _LIMITS if (group / name).exists()).write_text(str(limit_bytes))
        for name, value in _SWAPPING.items():
            if (group / name).exists():
                (group / name).write_text(value)
        began = time.monotonic()
        joined = ["sh", "-c", f'echo $$ > "{group}/cgroup.procs" && exec "$@"', "sh", *command]
        done = subprocess.Popen(joined, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            output, errors = done.communicate(timeout=timeout)
            killed = done.returncode in (-9, 137)
        except subprocess.TimeoutExpired:
            done.kill()
            output, errors = done.communicate()
            killed = True
        if not killed and done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{errors[-2000:]}")
        return Ran(killed, time.monotonic() - began, output)
    finally:
        for _ in range(100):  # its processes may not have left yet
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.05)


def forget(files: Iterable[Path]) -> None:
    """Has the system drop what it holds of these files, as far as nobody maps it."""
    for file in files:
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except OSError:
            continue
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
