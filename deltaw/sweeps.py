"""Several ranks, rates and seeds trained over one frozen base in one run, and compared with intervals.

No early racing: curves of different ranks coincide until capacity runs out, so an early loss always votes for the
smallest. Every cell runs to its end and is what a run of its own would give.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltaw.adapter import choose, read_adapter
from deltaw.analysis.curve import mean_interval
from deltaw.api import EVALUATION_TOKENS
from deltaw.config import AUTO, Settings, make_settings
from deltaw.disk import disk_errors, write_text
from deltaw.engine.checkpoint import list_checkpoints
from deltaw.engine.heldout import HeldOut
from deltaw.engine.log import read_metrics
from deltaw.engine.prepare import Sketch, prepare_run, sketch_run, spec_from
from deltaw.engine.run import Run, create_run
from deltaw.engine.together import Cell, Together
from deltaw.engine.train import peak_of
from deltaw.engine.watcher import Watcher
from deltaw.errors import DeltawError, UsageError
from deltaw.planning import carry_out, one_of, plan_sketch
from deltaw.report import write_report
from deltaw.report.sweep_page import FILE_NAME as SWEEP_PAGE
from deltaw.report.sweep_page import write_sweep_page

CELLS_FILE, PLAN, RESULT_FILE, VERB = "sweep.json", "plan.json", "result.json", "sweep"
# Of the settings that rules decide, those that all cells take from the first; and those that make no sense here.
SHARED = ("batch_tokens", "micro_tokens", "max_length", "dtype", "device", "threads")
FITTED = ("recompute", "stream", "quant")
NOT_SWEPT = ("adapter", "patience", "track")


def sweep(
    settings: Settings | None = None,
    out: Path | None = None,
    ranks: Sequence[int | str] = (),
    rates: Sequence[float | str] = (),
    seeds: int = 1,
    watcher: Watcher | None = None,
    **given: Any,
) -> dict[str, Any]:
    """Trains every combination of ranks, learning rates and seeds over one base; returns and writes the comparison.

    Everything else is as for `train`: `settings`, or keywords. Each cell is a run folder of its own below `out`. Data
    orders are shared by cells of one seed, so differences are paired. Raises UsageError when the cells have nothing to
    differ in or `out` exists, and what `train` raises.
    """
    settings = one_of(settings, given)
    ranks, rates = list(dict.fromkeys(ranks)) or [settings.rank], list(dict.fromkeys(rates)) or [settings.lr]
    cells = list(itertools.product(ranks, rates, range(seeds)))
    if len(cells) < 2:
        raise UsageError("A sweep needs several --rank, --lr or --seeds, such as --rank 2,4,8.")
    if unsuited := [name for name in NOT_SWEPT if getattr(settings, name) not in (None, 0, ())]:
        listed = ", ".join(f"--{name}" for name in unsuited)
        raise UsageError(f"A sweep trains new adapters to their ends and knows no {listed}; leave it out.")
    if any(len(values) > 1 and AUTO in values for values in (ranks, rates)):
        raise UsageError("Of several ranks or rates none may be auto: which one a rule chooses is not known before.")
    for rank, rate in itertools.product(ranks, rates):
        make_settings({"rank": rank, "lr": rate})  # raises UsageError
    folder = Path(out or settings.out or time.strftime("runs/sweep-%Y-%m-%d-%H%M%S"))
    if folder.exists():
        raise UsageError(f"{folder} exists already and is never overwritten; choose another --out, or --resume it.")
    names = [f"r{rank}{f'-lr{rate}' if len(rates) > 1 else ''}-s{settings.seed + seed}" for rank, rate, seed in cells]
    with disk_errors("make", folder):
        folder.mkdir(parents=True)
    try:
        made = []
        for name, (rank, rate, seed) in zip(names, cells, strict=True):
            each = dataclasses.replace(settings, sources=dict(settings.sources), out=str(folder / name))
            each.put("rank", rank, "sweep")
            each.put("lr", rate, "sweep")
            each.put("seed", settings.seed + seed, "sweep")
            made.append((create_run(each), each))
        write_text(folder / CELLS_FILE, json.dumps({"cells": names}, indent=2) + "\n")
        return _run(folder, made, watcher or Watcher(), resume=False)
    except DeltawError:
        if not any(Run(folder / name).has_steps() for name in names):
            shutil.rmtree(folder)  # nothing is lost, and the corrected command may use the name
        raise


def resume_sweep(folder: Path, watcher: Watcher | None = None) -> dict[str, Any]:
    """Goes on with an interrupted sweep from its newest good checkpoint; a finished one is read."""
    if (folder / RESULT_FILE).is_file():
        found: dict[str, Any] = json.loads((folder / RESULT_FILE).read_text("utf-8"))
        found["folder"] = str(folder)  # as it is found from here, and where it was moved to
        if not (folder / SWEEP_PAGE).is_file():
            write_sweep_page(folder, found)
        return found
    if not (folder / CELLS_FILE).is_file():
        raise UsageError(f"{folder} is no sweep: it has no {CELLS_FILE}.")
    names = json.loads((folder / CELLS_FILE).read_text("utf-8"))["cells"]
    runs = [Run(folder / name) for name in names]
    return _run(folder, [(run, run.settings()) for run in runs], watcher or Watcher(), resume=True)


def _run(folder: Path, made: list[tuple[Run, Settings]], watcher: Watcher, *, resume: bool) -> dict[str, Any]:
    first_run, first = made[0]
    with first_run.locked():
        for run in (Run(folder), *(run for run, _ in made)):
            run.tidy()
        sketch = sketch_run(first_run, first, watcher)
        planned, begun = (folder / PLAN).is_file(), bool(list_checkpoints(folder / "checkpoints"))
        told = None if planned or begun else _fit(sketch, [settings for _, settings in made], watcher)
        shared = SHARED if begun and not planned else (*SHARED, *FITTED)  # as it began before sweeps were planned
        for name in (*shared, "lr", "rank"):
            for _, settings in made[1:]:
                if name in shared or getattr(settings, name) == AUTO:
                    settings.put(name, getattr(first, name), first.sources.get(name, "default"))
        if told is not None:  # settings first, so that whoever finds a plan finds what it chose
            for run, settings in made:
                run.write_settings(settings)
            write_text(folder / PLAN, json.dumps(told, indent=2) + "\n")
        ready = prepare_run(sketch, first, watcher)
        together = Together(folder, [Cell(run, settings) for run, settings in made], ready, watcher)
        for run, settings in made:
            run.write_settings(settings)
            run.write_summary({"status": "running", "verb": VERB})
        if resume:
            together.resume()
        sizes = sum(adapter.parameters for adapter in together.injection.adapters)
        watcher.say(f"{len(made)} adapters of {sizes / 1e6:.2f}M parameters together over one base, into {folder}")
        together.run()
        together.injection.eject()
        result = {
            "folder": str(folder),
            **_compared(together),
            "seconds": together.progress.seconds,  # of all steps, whatever was stopped between
            "steps": together.progress.step,
            "peak_bytes": max(peak_of(cell.run) for cell in together.cells),
            "planned": _planned(folder),
        }
    for index, cell in enumerate(together.cells):
        cell.run.write_summary(_summary(index, together))
        write_report(cell.run.folder)
    write_text(folder / RESULT_FILE, json.dumps(result, indent=2) + "\n")
    write_sweep_page(folder, result)
    return result


def _fit(sketch: Sketch, cells: Sequence[Settings], watcher: Watcher) -> dict[str, Any]:
    """Plans all cells together, and notes in the first one's settings how they are fitted. Raises DoesNotFitError.

    They share the base and each pass's memory and take turns, so that only factors and times add up.
    """
    first = cells[0]
    specs = [spec_from(first, int(first.rank if settings.rank == AUTO else settings.rank)) for settings in cells]
    sizes = [sum(target.parameters for target in choose(sketch.outline.model, spec)) for spec in specs]
    plan = plan_sketch(sketch, first, adapters=[size / sketch.trained for size in sizes])
    carry_out(plan, first)
    told = plan.as_dict()
    for name in ("step_seconds", "run_seconds", "step_seconds_interval", "run_seconds_interval"):
        value = told[name]
        told[name] = [each * len(cells) for each in value] if isinstance(value, list) else value and value * len(cells)
    if "unfitted" in told:
        told["unfitted"]["step_seconds"] *= len(cells)
    watcher.planned(told)
    return told


def _planned(folder: Path) -> dict[str, int] | None:
    """The planned peaks of all cells together and of the largest one alone; None of a sweep that has no plan."""
    if not (folder / PLAN).is_file():
        return None
    told = json.loads((folder / PLAN).read_text("utf-8"))
    return {name: told[name] for name in ("peak_bytes", "largest_alone_bytes")}


def _summary(index: int, together: Together) -> dict[str, Any]:
    """What a cell's folder says of it; of the time, its share."""
    cell, fault = together.cells[index], together.progress.tracks[index].fault
    return {
        "status": "done" if fault is None else "failed",
        "verb": VERB,
        **({} if fault is None else {"message": fault}),
        "steps": together.progress.tracks[index].last_step,
        "best_step": cell.best_step,
        "best_eval_loss": cell.best_loss if cell.best_step else None,
        "train_seconds": sum(line.get("seconds", 0.0) for line in read_metrics(cell.run.metrics)),
        "peak_bytes": peak_of(cell.run),
        "way": together.ready.base.way,
        "computing": together.ready.base.computing,
        "slow_reason": together.ready.base.plain_reason or together.ready.base.slow_reason,
        "data": {name: part.as_dict() for name, part in together.ready.data.items()},
    }


def _compared(together: Together) -> dict[str, Any]:
    """`cells`: each one's best adapter on all held-out documents, its loss, and how far it is behind the best, paired.

    A cell that diverged has a `fault`, and no loss. `groups`: the same of each rank and rate, losses of documents
    averaged over seeds, so that no lucky seed speaks for its rank. `documents`: how many were measured. `base_loss`:
    that of the base alone. `by_document`: the sums behind all that, for tests of one's own.
    """
    rows = [
        {
            "name": cell.run.folder.name,
            "rank": int(cell.settings.rank),
            "lr": float(cell.settings.lr),
            "seed": cell.settings.seed,
            "parameters": together.injection.adapters[index].parameters,
            "best_step": cell.best_step,
            "fault": together.progress.tracks[index].fault,
            "loss": None,
            "pareto": False,
        }
        for index, cell in enumerate(together.cells)
    ]
    data = together.ready.held_out
    if data is None:
        return {"cells": rows, "groups": [], "documents": 0}
    most = min(EVALUATION_TOKENS, int(together.cells[0].settings.micro_tokens))  # as it was fitted
    held_out = HeldOut(together.ready.base, data.store, most)
    whole = [index for index, row in enumerate(rows) if row["fault"] is None]
    if not whole:
        return {"cells": rows, "groups": [], "documents": held_out.given}
    adapters = [read_adapter(together.cells[index].run.adapter) for index in whole]
    base_D, *rest = held_out.curve_losses([None, *adapters])
    losses_CD, tokens_D = np.stack(rest), held_out.tokens_D
    measured = [rows[index] for index in whole]
    _measure(measured, losses_CD, tokens_D)
    for row in measured:
        row["pareto"] = not any(_dominates(other, row) for other in measured)
    alike = _by_rank_and_rate(rows, measured)
    groups = [
        {**{name: measured[numbers[0]][name] for name in ("rank", "lr", "parameters")}, "seeds": len(numbers)}
        for numbers in alike
    ]
    _measure(groups, np.stack([losses_CD[numbers].mean(0) for numbers in alike]), tokens_D)
    by_name = {row["name"]: losses_D.tolist() for row, losses_D in zip(measured, losses_CD, strict=True)}
    return {
        "cells": rows,
        "groups": groups,
        "documents": held_out.given,
        "base_loss": float(base_D.sum() / tokens_D.sum()),
        "by_document": {"tokens": tokens_D.tolist(), "base": base_D.tolist(), "cells": by_name},
    }


def _by_rank_and_rate(rows: list[dict[str, Any]], measured: list[dict[str, Any]]) -> list[list[int]]:
    """The places of measured cells that differ in their seed alone; without those of which a seed diverged, if any."""
    asked = Counter((row["rank"], row["lr"]) for row in rows)
    alike: dict[Any, list[int]] = {}
    for number, row in enumerate(measured):
        alike.setdefault((row["rank"], row["lr"]), []).append(number)
    return [numbers for key, numbers in alike.items() if len(numbers) == asked[key]] or list(alike.values())


def _measure(rows: list[dict[str, Any]], losses_CD: np.ndarray, tokens_D: np.ndarray) -> None:
    """Loss and distance from the best, with intervals over documents."""
    best = int(np.argmin(losses_CD.sum(1)))
    for row, losses_D in zip(rows, losses_CD, strict=True):
        row["loss"] = float(losses_D.sum() / tokens_D.sum())
        row["loss_low"], row["loss_high"] = mean_interval(losses_D, tokens_D)
        row["behind"] = float((losses_D - losses_CD[best]).sum() / tokens_D.sum())
        row["behind_low"], row["behind_high"] = mean_interval(losses_D - losses_CD[best], tokens_D)


def _dominates(other: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether another cell is as small and as good, and better in one of both."""
    mine, its = (row["parameters"], row["loss"]), (other["parameters"], other["loss"])
    return its[0] <= mine[0] and its[1] <= mine[1] and its != mine
