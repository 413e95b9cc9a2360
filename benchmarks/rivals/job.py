"""What a runner is asked (a job file), the rows it trains on, and what it answers (one JSON line).

Every tool's runner uses this file and nothing else of the project, so it imports the standard library and numpy only.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = (5**0.5 - 1) / 2
POOL_STEPS = 50  # how far rows may move when a rival groups by length: transformers' own number


@dataclass(frozen=True)
class Job:
    """One run of one tool. `steps` None: until `seconds` have passed after the first `warm_steps`.

    `data` is the stem of a token store, `start` the adapter folder to begin from. `out` (the trained adapter) and
    `gradients` (those of step 1) are folders to write, or None. `started` is when the process was launched.
    """

    tool: str
    workload: str
    data: str
    base: str
    start: str
    setting: dict[str, Any]
    examples_per_step: int
    rate: float = 5e-4
    clip: float = 1.0
    steps: int | None = None
    seconds: float = 30.0
    warm_steps: int = 3
    out: str | None = None
    gradients: str | None = None
    task: str = "train"
    started: float = 0.0


def read_job() -> Job:
    """The job that the command line names."""
    return Job(**json.loads(Path(sys.argv[1]).read_text("utf-8")))


class Rows:
    """The documents of a token store as every tool reads them: ids, and labels that are -100 for context."""

    def __init__(self, stem: str) -> None:
        self.tokens = np.fromfile(f"{stem}.tokens", np.int32)
        self.weights = np.fromfile(f"{stem}.weights", np.float32)
        self.offsets = np.fromfile(f"{stem}.offsets", np.int64)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def ids_and_labels(self, row: int) -> tuple[list[int], list[int]]:
        """Token ids and labels of a row; the first token is never a label, since nothing predicts it."""
        part = slice(self.offsets[row], self.offsets[row + 1])
        ids = self.tokens[part]
        labels = np.where(self.weights[part] > 0, ids, -100)
        labels[0] = -100
        return ids.tolist(), labels.tolist()

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each row."""
        return np.diff(self.offsets)

    def labelled(self, row: int) -> int:
        """Number of tokens of a row that carry loss."""
        return sum(label != -100 for label in self.ids_and_labels(row)[1])


def arranged(lengths: np.ndarray, examples: int, batch: int, group: str) -> list[int]:
    """The order of the rows: as they are ("none"), or with rows of like length in one micro-batch.

    "step" moves rows within an optimiser step only, so that nothing but padding changes. "pool" sorts rows over 50
    steps, as transformers does, and spreads the micro-batches, so that the few steps of a run see long and short alike.
    """
    order = list(range(len(lengths)))
    if group == "none":
        return order
    pool = examples * (POOL_STEPS if group == "pool" else 1)
    result: list[int] = []
    for start in range(0, len(order), pool):
        rows = sorted(order[start : start + pool], key=lambda row: -int(lengths[row]))
        batches = [rows[i : i + batch] for i in range(0, len(rows), batch)]
        if group == "pool":
            batches = spread(batches)
        result += [row for rows in batches for row in rows]
    return result


def spread(batches: list[list[int]]) -> list[list[int]]:
    """Sorted micro-batches so that any few in a row are evenly spaced in length: golden-ratio steps through them."""
    turns = sorted(range(len(batches)), key=lambda turn: turn * GOLDEN % 1)
    place = {turn: i for i, turn in enumerate(turns)}
    return [batches[place[turn]] for turn in range(len(batches))]


@dataclass
class Recorder:
    """Times the steps of one run, ends it, and makes the answer."""

    job: Job
    import_bytes: int
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    labelled: list[int] = field(default_factory=list)
    since: float = 0.0

    def begin(self) -> None:
        """The first step starts now."""
        self.since = time.perf_counter()

    def step(self, loss: float, norm: float, tokens: int, labelled: int) -> bool:
        """Notes a step that has just ended; whether another one shall follow."""
        now = time.perf_counter()
        self.seconds.append(now - self.since)
        self.since = now
        self.losses.append(loss)
        self.norms.append(norm)
        self.tokens.append(tokens)
        self.labelled.append(labelled)
        if self.job.steps is not None:
            return len(self.seconds) < self.job.steps
        steady = self.seconds[self.job.warm_steps :]
        return not steady or sum(steady) < self.job.seconds

    def answer(self) -> dict[str, Any]:
        """Everything that was measured; rates are over the steps after the warm ones."""
        warm = min(self.job.warm_steps, len(self.seconds) - 1)
        steady = sum(self.seconds[warm:])
        return {
            "tool": self.job.tool,
            "workload": self.job.workload,
            "setting": self.job.setting,
            "versions": versions(),
            "steps": len(self.seconds),
            "warm_steps": warm,
            "examples_per_step": self.job.examples_per_step,
            "tokens_per_second": sum(self.tokens[warm:]) / steady,
            "labelled_per_second": sum(self.labelled[warm:]) / steady,
            "steady_seconds": steady,
            "tokens": sum(self.tokens),
            "labelled_tokens": sum(self.labelled),
            "import_bytes": self.import_bytes,
            "peak_bytes": peak_bytes(),
            "process_seconds": time.time() - self.job.started,
            "losses": [round(loss, 6) for loss in self.losses],
            "grad_norms": [round(norm, 6) for norm in self.norms],
            "step_seconds": [round(seconds, 4) for seconds in self.seconds],
        }


def versions() -> dict[str, str]:
    """The versions of what computes here."""
    names = ("torch", "transformers", "peft", "trl", "accelerate", "unsloth", "unsloth_zoo")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_bytes() -> int:
    """VmHWM: the most memory that this process has held."""
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def say(answer: dict[str, Any]) -> None:
    """The answer as the last line of stdout."""
    print(json.dumps(answer), flush=True)
