"""Parity: does deltaw compute the same as the others? Without this, a speed is not worth reading.

- gradients of the first step, from factors of which none is zero, against PEFT in fp32: deltaw in fp32, then in bf16
  where that is what is timed.
  A bf16 model is itself some way off; TRL's own distance in bf16 is the yardstick printed beside, and the limit where
  it is wider than ours.
- curves of all steps, the gradient norm of every step, and the loss on held-out rows afterwards, against TRL with the
  same precision policy. Unsloth's distance from TRL, with micro-batches of another size, is the yardstick.
- the saved adapter, opened by PEFT, gives the logits that deltaw computes with it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rivals.measure import Bench, Row
from rivals.settings import BF16, COMPARABLE, DELTAW, PRECISION, UNSLOTH, Setting, ours
from safetensors.numpy import load_file

STEPS = 50
# Of the first step: in fp32 nothing but the order of sums may differ; in bf16, what the protocol allows.
EXACT = {"loss": 1e-5, "median 1-cosine": 1e-5, "worst 1-cosine": 1e-5, "median norm": 1e-4, "worst norm": 1e-4}
NEAR = {"loss": 1e-3, "median 1-cosine": 1e-3, "worst 1-cosine": 1e-3, "median norm": 0.01, "worst norm": 0.01}
NOISE = 0.06  # nats by which a bf16 model's loss of one token is off here, so that of n labels by that over √n
SLACK = 1.5  # as far as a yardstick, half as far again: two roundings of the same numbers differ by chance
CURVE, SINGLE, HELD_OUT, LOGITS = 0.005, 0.02, 0.003, 1e-4
NO_CLIP = 1e9
BATCH = {"short": 8, "docstrings": 1, "dense": 1, "shared": 1}  # of TRL
OTHER_BATCH = {"short": 4, "docstrings": 2, "dense": 2, "shared": 2}  # of the yardstick
FLOAT32 = {**DELTAW["plain"], "dtype": "float32"}


@dataclass(frozen=True)
class Gate:
    """One comparison: a distance that must not be above its limit, or not above that of another tool, the yardstick."""

    name: str
    distance: float
    limit: float
    yardstick: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the distance is small enough; NaN never is."""
        return self.distance <= max(self.limit, SLACK * (self.yardstick or 0.0))

    def line(self) -> str:
        """The gate in one line."""
        beside = "" if self.yardstick is None else f", the yardstick {self.yardstick:.2e}"
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name}: {self.distance:.2e} (limit {self.limit:.1e}{beside})"


def verify(bench: Bench, first_steps: Sequence[str], curves: Sequence[str], steps: int = STEPS) -> list[Gate]:
    """The gates of the first step and those of many steps, each on its workloads."""
    gates: list[Gate] = []
    for workload in first_steps:
        gates += gradient_gates(bench, workload)
    for workload in curves:
        gates += curve_gates(bench, workload, steps)
    return gates


def as_dicts(gates: list[Gate]) -> list[dict[str, Any]]:
    """For JSON."""
    return [{**asdict(gate), "passed": gate.passed} for gate in gates]


# -- the first step ---------------------------------------------------------------------------------------------------


def gradient_gates(bench: Bench, workload: str) -> list[Gate]:
    """Loss and gradients of the first step."""
    reference = _first_step(bench, "reference", workload, {}, "fp32")
    timed = ours(workload)  # with common beginnings computed once where the rounds have that too
    exact = _distances(reference, _first_step(bench, "deltaw", workload, {**timed, "dtype": "float32"}, "fp32"))
    gates = [Gate(f"{workload}, step 1 in fp32, {name}", exact[name], limit) for name, limit in EXACT.items()]
    return gates + (_bf16_gates(bench, workload, reference) if BF16 else [])


def _bf16_gates(bench: Bench, workload: str, reference: dict[str, Any]) -> list[Gate]:
    comparable, timed = {**COMPARABLE, "batch": BATCH[workload]}, ours(workload)
    trl = _distances(reference, _first_step(bench, "trl", workload, comparable, "bf16"))
    usual = _distances(reference, _first_step(bench, "deltaw", workload, timed, "bf16"))
    noise = 3 * NOISE / math.sqrt(reference["labels"]) / reference["loss"]
    near = {**NEAR, "loss": max(NEAR["loss"], noise), "median norm": max(NEAR["median norm"], noise)}
    return [Gate(f"{workload}, step 1 in bf16, {name}", usual[name], limit, trl[name]) for name, limit in near.items()]


def _first_step(bench: Bench, tool: str, workload: str, setting: Setting, precision: str) -> dict[str, Any]:
    """Loss and gradients of a tool in the first step; both are stored, so that they are computed once."""
    key = f"gate/{workload}/step 1/{tool} {precision}"
    folder = bench.folder("gates") / f"{bench.code} {key.replace('/', ' ')}"
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        bench.rows.pop(key, None)
    given: dict[str, Any] = {"steps": 1, "clip": NO_CLIP, "gradients": str(folder)}
    given["start"] = str(bench.envs / "data" / "filled")
    if tool == "reference":
        given["task"] = "gradients"
    row = _sound(bench.once(key, bench.job(tool, workload, setting, **given)))
    loss = row["loss"] if tool == "reference" else row["losses"][0]
    return {"loss": loss, "labels": row["labelled_tokens"], "gradients": load_file(file)}


def _distances(reference: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    """How far a first step is from the reference, per tensor where there are many."""
    ours, theirs = found["gradients"], reference["gradients"]
    assert ours.keys() == theirs.keys(), "the two have other tensors"
    flat = [(ours[name].ravel().astype(np.float64), theirs[name].ravel().astype(np.float64)) for name in theirs]
    norms = [(np.linalg.norm(a), np.linalg.norm(b)) for a, b in flat]
    cosines = [1 - float(a @ b / (p * q)) for (a, b), (p, q) in zip(flat, norms, strict=True)]
    ratios = [abs(float(p / q) - 1) for p, q in norms]
    return {
        "loss": abs(found["loss"] / reference["loss"] - 1),
        "median 1-cosine": statistics.median(cosines),
        "worst 1-cosine": worst(cosines),
        "median norm": statistics.median(ratios),
        "worst norm": worst(ratios),
    }


def worst(distances: Sequence[float]) -> float:
    """The largest, and NaN where one is, which `max` loses."""
    return float(np.max(distances))


# -- many steps -------------------------------------------------------------------------------------------------------


def curve_gates(bench: Bench, workload: str, steps: int) -> list[Gate]:
    """Curves, gradient norms, the held-out loss, and the saved adapter in PEFT."""
    settings = {
        "deltaw": DELTAW["plain"],
        "trl": {**COMPARABLE, "batch": BATCH[workload]},
        "unsloth": {**UNSLOTH, "batch": OTHER_BATCH[workload]},
    }
    runs = {tool: _trained(bench, tool, workload, setting, steps) for tool, setting in settings.items()}
    losses = {tool: evaluate(bench, workload, f"{steps} steps", tool, run["out"]) for tool, run in runs.items()}
    dead = sum(not 0 < norm < math.inf for norm in runs["deltaw"]["grad_norms"])
    name = f"{workload}, {steps} steps"
    return [
        Gate(f"{name}, mean of the loss curve", *_mean(runs)),
        Gate(f"{name}, a single step's loss, mean distance", *_single(runs)),
        Gate(f"{name}, steps without a gradient", dead, 0.0),
        Gate(f"{name}, held-out loss", *_held_out(losses)),
        Gate(f"{name}, logits of the saved adapter in PEFT", _logits(bench, workload, runs["deltaw"]["out"]), LOGITS),
    ]


def _mean(runs: dict[str, Row]) -> tuple[float, float, float]:
    """How far the mean of deltaw's curve is from TRL's, the limit, and how far Unsloth's is."""
    means = {tool: statistics.fmean(run["losses"]) for tool, run in runs.items()}
    return abs(means["deltaw"] / means["trl"] - 1), CURVE, abs(means["unsloth"] / means["trl"] - 1)


def _held_out(losses: dict[str, float]) -> tuple[float, float, float]:
    """How far deltaw's held-out loss is from TRL's, the limit, and how far Unsloth's is."""
    return abs(losses["deltaw"] / losses["trl"] - 1), HELD_OUT, abs(losses["unsloth"] / losses["trl"] - 1)


def _single(runs: dict[str, Row]) -> tuple[float, float, float]:
    """deltaw's mean distance from TRL step by step, its limit, and Unsloth's distance."""
    trl = runs["trl"]["losses"]
    distances = [
        statistics.fmean(abs(a - b) for a, b in zip(runs[tool]["losses"], trl, strict=True)) / statistics.fmean(trl)
        for tool in ("deltaw", "unsloth")
    ]
    return distances[0], SINGLE, distances[1]


def _trained(bench: Bench, tool: str, workload: str, setting: Setting, steps: int) -> Row:
    """A run of so many steps from the start adapter, with its adapter folder under `out`."""
    key = f"gate/{workload}/{steps} steps/{tool}"
    folder = bench.folder("gates") / f"{bench.code} {key.replace('/', ' ')}"
    if not (folder / "adapter_model.safetensors").is_file():
        bench.rows.pop(key, None)
    row = bench.once(key, bench.job(tool, workload, setting, steps=steps, out=str(folder)))
    return {**_sound(row), "out": str(folder)}


def evaluate(bench: Bench, workload: str, what: str, tool: str, adapter: str) -> float:
    """The loss of a saved adapter on the held-out rows, computed by PEFT whatever tool it is from."""
    held_out = str(bench.envs / "data" / workload / "held_out")
    job = bench.job("reference", workload, {"dtype": PRECISION}, task="evaluate", data=held_out, start=adapter)
    return float(_sound(bench.once(f"held out/{workload}/{what}/{tool}", job))["loss"])


def _logits(bench: Bench, workload: str, adapter: str) -> float:
    """The largest difference between deltaw's and PEFT's logits, as a share of the largest logit; both in fp32."""
    held_out = str(bench.envs / "data" / workload / "held_out")
    found = []
    for tool, setting in (("deltaw", FLOAT32), ("reference", {})):
        out = bench.folder("gates") / f"{bench.code} {workload} logits {tool}.npz"
        job = bench.job(tool, workload, setting, task="logits", data=held_out, start=adapter, out=str(out))
        key = f"gate/{workload}/logits/{Path(adapter).name}/{tool}"
        if not out.is_file():
            bench.rows.pop(key, None)
        _sound(bench.once(key, job))
        found.append(np.load(out))
    pairs = [(found[0][name], found[1][name]) for name in found[1]]
    return worst([np.abs(a - b).max() for a, b in pairs]) / worst([np.abs(b).max() for _, b in pairs])


def _sound(row: Row) -> Row:
    """The row, unless its run failed: a gate cannot do without it."""
    if "error" in row:
        raise SystemExit(f"{row['key']} failed: {row['error']}")
    return row
