"""The workloads in numbers, and each tool's settings: deltaw's own, the rivals' defaults and their best."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltaw.hardware import compute_dtype, look

Setting = dict[str, Any]

BASE = "smollm2-135m"
# In what everybody computes: the faster of the two on this processor.
PRECISION = str(compute_dtype(torch.device("cpu"), look())).removeprefix("torch.")
BF16 = PRECISION == "bfloat16"


@dataclass(frozen=True)
class Workload:
    """How the rows of one workload are used; `held_out` of them are never trained."""

    name: str
    examples_per_step: int
    rows: int
    held_out: int


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("short", examples_per_step=16, rows=8000, held_out=200),
        Workload("docstrings", examples_per_step=8, rows=2400, held_out=60),
        Workload("dense", examples_per_step=4, rows=1200, held_out=8),
        Workload("shared", examples_per_step=8, rows=1200, held_out=24),
    )
}

# A further way of running deltaw is one more line here. Prefixes are shared where rows have a long one: everywhere else
# too it would be faster (chat templates begin alike), but the comparison is then one of another kind.
DELTAW: dict[str, Setting] = {
    "plain": {"micro_tokens": 2048, "dtype": PRECISION},
    "sharing": {"micro_tokens": 2048, "dtype": PRECISION, "share": True},
}

# What a user gets who sets nothing: 8 rows per step, recomputed activations, bf16 autocast. TRL, given a model by name,
# loads it in float32; Unsloth would also load it in 4 bits, which is another base, so it is told not to.
DEFAULT_EXAMPLES = 8
DEFAULTS: dict[str, Setting] = {
    "trl": {
        **{"batch": 8, "base": "float32", "adapters": "float32", "autocast": True, "checkpointing": True},
        **{"group": "none", "padding_free": False},
    },
    "unsloth": {"batch": 8, "autocast": True, "checkpointing": True, "group": "none", "compile": False},
}
TRL: Setting = {**DEFAULTS["trl"], "base": PRECISION, "autocast": False, "checkpointing": False}
UNSLOTH: Setting = {**DEFAULTS["unsloth"], "checkpointing": False}
if not BF16:
    UNSLOTH |= {"base": PRECISION, "autocast": False}
# TRL as the gates compare with it: the same precision policy as deltaw's.
COMPARABLE: Setting = {**TRL, "adapters": "float32"}

BATCHES = {"short": (2, 4, 8, 16), "docstrings": (1, 2, 4, 8), "dense": (1, 2), "shared": (1, 2, 4, 8)}
# Until a sweep was made: the fastest settings of earlier measurements on two cores.
GUESSED_BATCH = {"short": 8, "docstrings": 2, "dense": 1, "shared": 1}


def label(setting: Setting) -> str:
    """A setting in a few words, for keys and tables."""
    shown = [f"{name}={value}" for name, value in sorted(setting.items()) if value not in (False, "none")]
    return " ".join(shown).lower()


def parse(text: str, start: Setting) -> Setting:
    """`start` with what "batch=8,compile=true" says."""
    pairs = (entry.partition("=") for entry in text.split(",") if entry)
    return {**start, **{name: _value(value) for name, _, value in pairs}}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def same_steps(setting: Setting) -> Setting:
    """The setting with every row in its own optimiser step."""
    return {**setting, "group": "step"} if setting.get("group") == "pool" else setting


def sweep(workload: str) -> Iterator[tuple[str, Setting]]:
    """(tool, setting) of everything that is tried on a workload."""
    batches = BATCHES[workload]
    ragged = workload in ("short", "docstrings")
    if not BF16:
        yield from _sweep_fp32(batches, ragged)
        return
    for batch in batches:
        for adapters in ("bfloat16", "float32"):
            yield "trl", {**TRL, "batch": batch, "adapters": adapters}
        for compiled in (False, True):
            yield "unsloth", {**UNSLOTH, "batch": batch, "compile": compiled}
    middle = batches[len(batches) // 2]
    yield "trl", {**TRL, "batch": middle, "autocast": True}
    if workload == "dense":  # of rows of other lengths, TRL had compiled no step within four minutes
        yield "trl", {**TRL, "batch": middle, "adapters": "bfloat16", "compile": True}
    yield "unsloth", {**UNSLOTH, "batch": middle, "autocast": False}
    if batches[-1] > 1 and workload != "dense":
        yield "trl", {**TRL, "batch": batches[-1], "adapters": "bfloat16", "padding_free": True}
    for batch in batches[-2:] if ragged else ():
        for group in ("step", "pool"):
            yield "trl", {**TRL, "batch": batch, "adapters": "bfloat16", "group": group}
            yield "unsloth", {**UNSLOTH, "batch": batch, "group": group, "compile": True}


def _sweep_fp32(batches: Sequence[int], ragged: bool) -> Iterator[tuple[str, Setting]]:
    """Where products take nearly all of the time, few settings matter: padding, and whether layers are compiled."""
    for batch in batches:
        yield "trl", {**TRL, "batch": batch}
        yield "unsloth", {**UNSLOTH, "batch": batch, "compile": True}
    yield "unsloth", {**UNSLOTH, "batch": batches[len(batches) // 2]}
    if ragged:
        for batch in batches[-2:]:
            yield "trl", {**TRL, "batch": batch, "group": "pool"}
            yield "unsloth", {**UNSLOTH, "batch": batch, "group": "pool", "compile": True}


def swept(rows: list[dict[str, Any]], workload: str) -> list[dict[str, Any]]:
    """What was swept of a workload as it is now; a run that failed has no number of examples."""
    now = WORKLOADS[workload].examples_per_step
    return [row for row in rows if row["workload"] == workload and row.get("examples_per_step", now) == now]


def ours(workload: str) -> Setting:
    """deltaw's setting on a workload."""
    return DELTAW["sharing" if workload == "shared" else "plain"]


def best(tool: str, workload: str, stored: Path) -> Setting:
    """The fastest setting of a rival in the stored sweep that passed its parity check; a guess without a sweep."""
    if tool == "deltaw":
        return ours(workload)
    rows = json.loads(stored.read_text("utf-8")) if stored.is_file() else []
    mine = [row for row in swept(rows, workload) if row["tool"] == tool and row["parity"]]
    if mine:
        fastest: Setting = max(mine, key=lambda row: row["tokens_per_second"])["setting"]
        return fastest
    guess = TRL | {"adapters": PRECISION} if tool == "trl" else UNSLOTH | {"compile": True}
    return {**guess, "batch": GUESSED_BATCH[workload]}
