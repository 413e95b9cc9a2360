"""The plan of a run: of all ways to fit it into memory, the fastest; exact ones first. Or what would make it fit.

Micro-batch, recomputed blocks and streaming change no result beyond rounding. Quantised storage does, so it is chosen
only where it was asked for, or nothing exact fits and it was not refused.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from deltaw import hardware
from deltaw.base.quant import BYTES
from deltaw.base.stream import CACHED_SHARE
from deltaw.errors import DoesNotFitError, bullet_list
from deltaw.plan.demand import Choice, Demand
from deltaw.plan.memory import Memory, idle_pages, memory, merging
from deltaw.plan.speed import Clock

# How far times lie below and above what is predicted: the extremes of a grid (benchmarks/plan_accuracy.py), on machines
# whose rate swings as much.
TIME_SPREAD = (0.35, 0.6)
UNCALIBRATED_SPREAD = (0.6, 0.6)
LEAST_MICRO = 64
STARTS_DIFFER = 1.01  # one process holds a few MB more than the next: what a refusal names must fit when it is tried
RECOMPUTED_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Room:
    """How much memory a run may take, who says so, what the process holds without base and run, and its file pages.

    `most_bytes` is what the machine has free: more is not offered.
    """

    limit_bytes: int
    source: str
    fixed_bytes: int
    file_bytes: int = 0
    most_bytes: float = math.inf


@dataclass(frozen=True)
class Plan:
    """What a run will cost. Intervals are (low, high)."""

    choice: Choice
    memory: Memory
    room: Room
    step_seconds: float
    run_seconds: float | None
    steps: int | None
    tokens_per_second: float
    way: str
    machine: str
    calibrated: bool
    merging: Mapping[str, int] = field(default_factory=dict)
    largest_alone_bytes: int | None = None  # the peak of the largest of several adapters, were it alone
    unfitted: Plan | None = None  # as the settings have it, where something else was chosen to fit

    @property
    def needed_bytes(self) -> int:
        """The upper end of the peak's interval, which has to fit."""
        return self.memory.needed_bytes

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        low, high = TIME_SPREAD if self.calibrated else UNCALIBRATED_SPREAD
        peak, run, rate = self.memory.peak_bytes, self.run_seconds, self.tokens_per_second
        interval = self.memory.interval
        sizes = {phase: sum(parts.values()) for phase, parts in self.memory.phases.items()}
        return {
            "choice": self.choice._asdict(),
            "peak_bytes": peak,
            "peak_bytes_interval": interval(peak),
            "peak_phase": self.memory.peak_phase,
            "peak_is": self.memory.measure,
            "phases": {phase: dict(parts) for phase, parts in self.memory.phases.items()},
            "phases_interval": {phase: interval(size) for phase, size in sizes.items()},
            "merging": dict(self.merging),
            "merging_interval": interval(sum(self.merging.values())),
            **({} if self.largest_alone_bytes is None else {"largest_alone_bytes": self.largest_alone_bytes}),
            **({} if self.unfitted is None else {"unfitted": self.unfitted.briefly()}),
            "limit_bytes": self.room.limit_bytes,
            "limit_source": self.room.source,
            "step_seconds": self.step_seconds,
            "step_seconds_interval": [self.step_seconds * (1 - low), self.step_seconds * (1 + high)],
            "run_seconds": run,
            "run_seconds_interval": None if run is None else [run * (1 - low), run * (1 + high)],
            "steps": self.steps,
            "tokens_per_second": rate,
            "tokens_per_second_interval": [rate / (1 + high), rate / (1 - low)],
            "way": self.way,
            "machine": self.machine,
            "calibrated": self.calibrated,
        }

    def briefly(self) -> dict[str, Any]:
        """What is chosen, and what that takes."""
        return {
            "choice": self.choice._asdict(), "peak_bytes": self.memory.peak_bytes, "step_seconds": self.step_seconds
        }  # fmt: skip


def make_plan(demand: Demand, room: Room, clock: Clock) -> Plan:
    """The fastest choice that fits. Raises DoesNotFitError with three ways out."""
    plans = (_plan(demand, choice, room, clock) for choice in _choices(demand))
    # As the settings have it where that fits: no timing, however noisy, shall change such a run.
    chosen = usual = next(plans)
    if usual.needed_bytes > room.limit_bytes:
        fitting = [plan for plan in plans if plan.needed_bytes <= room.limit_bytes]
        if not fitting:
            raise _refusal(demand, room, clock.way)
        chosen = min(fitting, key=lambda plan: (plan.choice.quant != demand.settings.quant, plan.step_seconds))
    alone = None
    if demand.active_share is not None:
        one = replace(demand, rank_share=demand.active_share)
        alone = _held(one, chosen.choice, room, clock.way).peak_bytes
    return replace(
        chosen,
        run_seconds=_run_seconds(demand, chosen, clock),
        merging=merging(demand, room.fixed_bytes),
        largest_alone_bytes=alone,
        unfitted=None if chosen is usual else usual,
    )


def require_room(demand: Demand, room: Room, way: str) -> None:
    """Raises DoesNotFitError, with three ways out, when no choice fits. Nothing is timed for it."""
    if _least(demand, room, way) > room.limit_bytes:
        raise _refusal(demand, room, way)


def _refusal(demand: Demand, room: Room, way: str) -> DoesNotFitError:
    needs = {choice: _held(demand, choice, room, way).needed_bytes for choice in _choices(demand)}
    least = min(needs, key=needs.__getitem__)
    return DoesNotFitError(
        f"This run needs at least {_megabytes(STARTS_DIFFER * needs[least])} ({_described(least)}), and may take "
        f"{_megabytes(room.limit_bytes)} ({room.source}). What would fit:\n" + bullet_list(_ways_out(demand, room, way))
    )


def _held(demand: Demand, choice: Choice, room: Room, way: str) -> Memory:
    return memory(demand, choice, way, room.fixed_bytes, room.file_bytes)


def _plan(demand: Demand, choice: Choice, room: Room, clock: Clock) -> Plan:
    steps = demand.steps(choice.micro_tokens, share=clock.share)
    held = _held(demand, choice, room, clock.way)
    short, cached = _short_bytes(demand, choice, held, room), _stays_cached(demand, choice, held, room)
    seconds = sum(clock.step(choice, step, short, cached=cached) for step in steps) / len(steps)
    tokens = sum(one.tokens for step in steps for one in step) / len(steps)
    machine = "this machine" if clock.device is None else clock.device.name
    calibrated, count = clock.device is None, demand.step_count
    return Plan(choice, held, room, seconds, None, count, tokens / seconds, clock.way, machine, calibrated)


def _run_seconds(demand: Demand, plan: Plan, clock: Clock) -> float | None:
    """The run with its evaluations and one of the base alone; None where no steps are counted.

    For the plan that is chosen alone, since it reads what is evaluated.
    """
    if plan.steps is None:
        return None
    return plan.steps * plan.step_seconds + (demand.evaluations + 1) * clock.evaluation(plan.choice)


def _short_bytes(demand: Demand, choice: Choice, held: Memory, room: Room) -> int:
    """What a streamed run lacks for pages that it uses all the time: of two blocks or of the head, and of libraries.

    The peak is taken in the middle between what is predicted and the upper end of its interval.
    """
    if not choice.stream:
        return 0
    wanted = _wanted_pages(demand, choice, room)
    return max(0, min(wanted, (held.peak_bytes + held.needed_bytes) // 2 + wanted - room.limit_bytes))


def _wanted_pages(demand: Demand, choice: Choice, room: Room) -> int:
    """What a streamed run uses of files all the time, beside the block that is counted as held."""
    block = demand.block_bytes(choice)
    head = math.prod(demand.outline.head_shape) * demand.dtype.itemsize if demand.as_stored else 0  # else it is cast
    return max(2 * block, head) - block + idle_pages(room.file_bytes)


def _stays_cached(demand: Demand, choice: Choice, held: Memory, room: Room) -> bool:
    """Whether the system keeps the blocks of a streamed base once it has read them: they fit beside the run."""
    size = demand.outline.layers * demand.block_bytes(choice)
    beside = held.needed_bytes + _wanted_pages(demand, choice, room)
    return size <= CACHED_SHARE * room.limit_bytes and beside + size <= room.limit_bytes


# -- choices ----------------------------------------------------------------------------------------------------------


def _choices(demand: Demand) -> Iterator[Choice]:
    settings, layers = demand.settings, demand.outline.layers
    micro = int(settings.micro_tokens)
    micros = [micro]
    while settings.by_rule("micro_tokens") and micros[-1] // 2 >= LEAST_MICRO:
        micros.append(micros[-1] // 2)
    recomputed = [int(settings.recompute)]
    if settings.by_rule("recompute"):
        recomputed = sorted({round(share * layers) for share in RECOMPUTED_SHARES})
    quants = [settings.quant]
    if settings.by_rule("quant") and demand.device.type in ("cpu", "cuda") and has_bitsandbytes():
        quants += [kind for kind in BYTES if kind != settings.quant]
    for quant in quants:
        streams = [bool(settings.stream)]
        if settings.by_rule("stream") and demand.may_stream(quant):
            streams = [False, True]
        for stream in streams:
            for blocks in recomputed:
                for size in micros:
                    yield Choice(size, blocks, stream, quant)


def has_bitsandbytes() -> bool:
    """Whether bases can be quantised here."""
    return importlib.util.find_spec("bitsandbytes") is not None


# -- ways out ---------------------------------------------------------------------------------------------------------


def _ways_out(demand: Demand, room: Room, way: str) -> list[str]:
    """Three changes, each of which was tried on the same formulas: cheap ones that fit, then more memory."""
    found, more = [], []
    for text, changed in _changes(demand):
        least = _least(changed, room, way)
        if STARTS_DIFFER * least <= room.limit_bytes:
            found.append(text)
        more.append((least, text))
    rest = [_with_memory(STARTS_DIFFER * _least(demand, room, way), room, "")]
    rest += [_with_memory(STARTS_DIFFER * least, room, text) for least, text in sorted(more)]
    return (found + rest)[:3]


def _with_memory(needed: float, room: Room, text: str) -> str:
    if needed <= room.most_bytes:
        return f"--memory {_megabytes(needed)} {text}".rstrip()
    return f"{_megabytes(needed)} of memory, which is more than is free ({room.source}){', and ' if text else ''}{text}"


def _least(demand: Demand, room: Room, way: str) -> int:
    return min(_held(demand, choice, room, way).needed_bytes for choice in _choices(demand))


def _changes(demand: Demand) -> Iterator[tuple[str, Demand]]:
    longest = int(demand.data["train"].store.lengths.max())
    length = 1 << (longest - 1).bit_length() - 1
    while length >= LEAST_MICRO:
        yield f"--max-length {length}", replace(demand, longest_tokens=length)
        length //= 2
    settings = demand.settings
    if settings.quant == "none" and not (settings.by_rule("quant") and has_bitsandbytes()):  # it was not tried
        how = "" if has_bitsandbytes() else " (pip install bitsandbytes)"
        yield f"--quant nf4{how}", _with_setting(demand, "quant", "nf4")
    on_cpu = demand.device.type == "cpu" and settings.by_rule("dtype")
    if on_cpu and demand.dtype == torch.float32 and not hardware.emulates_bf16(hardware.look()):
        yield "--dtype bfloat16", _with_setting(demand, "dtype", "bfloat16")
    rank, starts_anew = int(settings.rank), settings.adapter is None and demand.active_share is None
    if starts_anew and rank > 1:
        yield f"--rank {max(1, rank // 4)}", replace(demand, rank_share=max(1, rank // 4) / rank)
        yield f"--rank 1 --max-length {LEAST_MICRO}", replace(demand, rank_share=1 / rank, longest_tokens=LEAST_MICRO)


def _with_setting(demand: Demand, name: str, value: str) -> Demand:
    changed = copy.copy(demand.settings)
    changed.sources = dict(changed.sources)
    changed.put(name, value, "given")
    return replace(demand, settings=changed)


def _megabytes(number: float) -> str:
    """As a size that `--memory` takes, rounded up."""
    if number >= 10e9:
        return f"{math.ceil(number / 1e8) / 10:g}GB"
    return f"{math.ceil(number / 1e6)}MB"


def _described(choice: Choice) -> str:
    parts = [f"{choice.micro_tokens} tokens a pass"]
    if choice.recompute:
        parts.append(f"{choice.recompute} blocks computed twice")
    if choice.stream:
        parts.append("base streamed")
    if choice.quant != "none":
        parts.append(f"base in {choice.quant}")
    return ", ".join(parts)
