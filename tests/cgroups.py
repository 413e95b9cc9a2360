"""Memory and processor limits of a child, by cgroups of its own, where this user may make them."""

from __future__ import annotations

import contextlib
import os

from deltaw import hardware


def own_cgroup(controller):
    """Where this process can be put back; StopIteration where the controller is not mounted."""
    return next(folder for folder in hardware._cgroup_folders(controller) if (folder / "cgroup.procs").exists())


def _hand_down(folder, controller):
    """In version 2 a group's children have a controller only when it says so, and it may while no process is in it."""
    handed_down = folder / "cgroup.subtree_control"
    if handed_down.exists() and controller not in handed_down.read_text().split():
        handed_down.write_text(f"+{controller}")


@contextlib.contextmanager
def new_cgroup(controller, *levels):
    """The innermost of new cgroups below our own, one in the other, each with its {(name in either version): value}.

    None where this user, or this container, may not make one.
    """
    made = []
    try:
        try:
            for values in levels:
                parent = made[-1] if made else own_cgroup(controller)
                _hand_down(parent, controller)
                made.append(parent / f"deltaw_test_{os.getpid()}")
                made[-1].mkdir()
                for names, value in values.items():
                    next(made[-1] / name for name in names if (made[-1] / name).exists()).write_text(value)
            innermost = made[-1]
        except (OSError, StopIteration):
            innermost = None
        yield innermost
    finally:
        for folder in reversed(made):
            if folder.exists():
                folder.rmdir()
