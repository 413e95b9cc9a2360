"""metrics.jsonl: one line per step and one per evaluation, each complete when written; and the trackers, by name."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltaw.disk import disk_errors, write_text
from deltaw.errors import DiskError, UsageError


class MetricsLog:
    """Appends lines to a metrics file and hands them to trackers.

    Opened again after an interruption, it drops what lies behind `last_step`, the step of the checkpoint: those steps
    will be done once more. Without a checkpoint that is step 0, and nothing stays. Raises DiskError.
    """

    def __init__(self, path: Path, last_step: int = 0, trackers: Sequence[Any] = ()) -> None:
        self.path, self.trackers = path, list(trackers)
        if path.exists():
            kept = [line for line in read_metrics(path) if line["step"] <= last_step]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        with disk_errors("open", path):
            # Unbuffered, so that a line is one write and closing has nothing left that could fail.
            self._file = path.open("ab", buffering=0)

    def write(self, line: dict[str, Any]) -> None:
        """Writes one line at once. Raises DiskError when not all of it could be written."""
        text = (json.dumps(line) + "\n").encode()
        with disk_errors("write", self.path):
            written = self._file.write(text)
        if written != len(text):
            raise DiskError(
                f"Could not write {self.path}: the disk is full. Free some space, then go on with --resume."
            )
        for tracker in self.trackers:
            tracker(line)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; one that is torn or damaged is left out. Raises DiskError."""
    lines = []
    with disk_errors("read", path):
        texts = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
    for text in texts:
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


def open_trackers(names: Sequence[str], folder: Path) -> list[Any]:
    """One function per tracker that takes a metrics line. UsageError names a tracker that is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"Not installed: {', '.join(missing)}. Install with: pip install {' '.join(missing)}")
    makers = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _wandb}
    return [makers[name](name, folder) for name in names]


def _tensorboard(_name: str, folder: Path) -> Any:
    writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def log(line: dict[str, Any]) -> None:
        for key, value in line.items():
            if key != "step":
                writer.add_scalar(key, value, line["step"])
        writer.flush()

    return log


def _wandb(name: str, folder: Path) -> Any:
    """wandb, and trackio, which has the same calls."""
    module = importlib.import_module(name)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
        run = module.init(project="deltaw", name=folder.name)
    return lambda line: run.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])
