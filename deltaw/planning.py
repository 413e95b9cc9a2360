"""What a run will take, before its base is opened, and how it is made to fit: joins data, shapes, machine and plan."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deltaw import hardware
from deltaw.config import AUTO, Settings, make_settings, parse_bytes
from deltaw.engine.prepare import Sketch, sketch_run
from deltaw.engine.run import create_run
from deltaw.engine.watcher import Watcher
from deltaw.errors import UsageError
from deltaw.plan.choose import Plan, Room, make_plan, require_room
from deltaw.plan.demand import Demand
from deltaw.plan.devices import DEVICES, Device
from deltaw.plan.pace import likely_way, measure_pace
from deltaw.plan.speed import Clock

HELD_BACK = 0.05  # of the memory that is there, for everything that is not ours
GPU_CONTEXT_BYTES = 600_000_000  # of CUDA and its libraries, beside what torch reserves


def plan(
    settings: Settings | None = None, watcher: Watcher | None = None, *, on: str | None = None, **given: Any
) -> Plan:
    """What a run of these settings (those of `train`) will take: memory by part and phase, time, and how it is fitted.

    `on` names another machine (deltaw/plan/devices.py). No weight is read. Raises DoesNotFitError with three ways out.
    """
    settings = one_of(settings, given)
    with tempfile.TemporaryDirectory() as folder:
        elsewhere = dataclasses.replace(settings, out=str(Path(folder) / "run"))
        there = None if on is None else place_on(on, elsewhere)
        run = create_run(elsewhere)
        return plan_sketch(sketch_run(run, elsewhere, watcher or Watcher(), there), elsewhere, on)


def one_of(settings: Settings | None, given: dict[str, Any]) -> Settings:
    """The settings, or those made from keywords. UsageError where both are there, and one would have no effect."""
    if settings is not None and given:
        raise UsageError(f"Give settings or keywords, not both: {', '.join(given)}.")
    return settings or make_settings(given)


def place_on(machine: str, settings: Settings) -> tuple[torch.device, torch.dtype]:
    """Where and in what another machine computes, noted in the settings. Raises UsageError when it is not known."""
    if machine not in DEVICES:
        raise UsageError(f"No machine {machine!r} is known; choose {', '.join(DEVICES)}.")
    device = DEVICES[machine]
    dtype = str(device.dtype).removeprefix("torch.")
    if settings.dtype not in (AUTO, dtype):
        raise UsageError(f"The data sheet of {machine} is read for {dtype}; leave out --dtype.")
    settings.put("device", device.kind, f"--on {machine}")
    settings.put("dtype", dtype, f"--on {machine}")
    return torch.device(device.kind), device.dtype


def plan_sketch(
    sketch: Sketch, settings: Settings, on: str | None = None, adapters: Sequence[float] | None = None
) -> Plan:
    """The plan of a sketched run, here or on the machine that it was placed on.

    `adapters` are the sizes of several that take turns over one base, as shares of the sketched one. Memory is then of
    all of them, and times are the largest's.
    """
    device = None if on is None else DEVICES[on]
    streams = None if device is None else device.streams
    demand = one = Demand(sketch.outline, settings, sketch.targets, sketch.data, streams=streams)
    if adapters is not None:
        one = dataclasses.replace(demand, rank_share=max(adapters))
        demand = dataclasses.replace(demand, rank_share=sum(adapters), active_share=max(adapters))
    if settings.stream and not demand.may_stream(settings.quant):
        raise UsageError(
            f"--stream: the base {sketch.outline.name} cannot be read block by block on {on or 'this machine'}. That "
            "needs Linux, a CPU, and blocks of linear layers or of weights in the dtype that is computed in."
        )
    room = _room(settings, device)
    if on is None:
        require_room(demand, room, likely_way(demand))  # timing needs time and memory, which a refusal can do without
    clock = Clock(one, None if device else measure_pace(one), device)
    return make_plan(demand, room, clock)


def _room(settings: Settings, device: Device | None) -> Room:
    """What there is on another machine, or here; on a GPU what torch can reserve."""
    machine, fixed_bytes, file_bytes = hardware.look(), hardware.rss_bytes(), hardware.file_rss_bytes()
    if settings.device == "cuda":
        fixed_bytes = file_bytes = 0
    if device is not None:
        total, source = device.memory_bytes - GPU_CONTEXT_BYTES * (device.kind == "cuda"), device.name
    elif settings.device == "cuda" and machine.gpu is not None:
        total, source = hardware.free_gpu_bytes(), machine.gpu.name
    else:  # the pages of files that this process holds count as free already
        total, source = machine.available_bytes + fixed_bytes - file_bytes, machine.memory_limit_source
    limit, most = round(total * (1 - HELD_BACK)), round(total / (1 - HELD_BACK))
    # A limit that was asked for is taken at its word, also as much above what is free as processes differ.
    if settings.memory is not None and parse_bytes(settings.memory) <= most:
        limit, source = parse_bytes(settings.memory), "--memory"
    return Room(limit, source, fixed_bytes, min(fixed_bytes, file_bytes), total)


def carry_out(plan: Plan, settings: Settings) -> None:
    """Notes in the settings what a plan has chosen."""
    for name, value in plan.choice._asdict().items():
        if getattr(settings, name) != value:
            settings.put(name, value, f"plan: the fastest that fits ({plan.room.source})")
