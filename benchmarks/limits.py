"""A command in a memory cgroup of its own.

Pages of files count against whoever touches them first, so the files that a run maps are dropped from the system's
cache before each run: none is used for free that another process read.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from cgroups import new_cgroup

_LIMITS, _SWAPPING = ("memory.max", "memory.limit_in_bytes"), ("memory.swap.max", "memory.swappiness")


def finishes_under(limit_bytes: int, command: Sequence[str], files: Iterable[Path], timeout: float) -> bool:
    """Whether a command ends well under a limit and in time.

    Raises OSError where no memory cgroup can be made, RuntimeError when the command fails by itself.
    """
    forget([*files, *Path(sysconfig.get_path("platlib")).rglob("*.so*")])
    with new_cgroup("memory", {_LIMITS: str(limit_bytes), _SWAPPING: "0"}) as group:
        if group is None:
            raise OSError("no memory cgroup can be made here")
        joined = ["sh", "-c", f'echo $$ > "{group}/cgroup.procs" && exec "$@"', "sh", *command]
        try:
            done = subprocess.run(joined, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return False
        if done.returncode in (-9, 137):
            return False
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return True


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
