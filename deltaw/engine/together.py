"""Several adapters over one frozen base in one loop: each with its own factors, rate, data order and folder.

They take turns on the base within a step (deltaw/engine/loop.py), so each does exactly what it would do alone, and the
base is in memory once. Settings may differ in rank, rate and seed; everything else is shared.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw import hardware
from deltaw.adapter import choose, inject, new_adapter, write_adapter
from deltaw.config import Settings
from deltaw.data.loader import loader_of
from deltaw.engine.checkpoint import newest_checkpoint, save_checkpoint
from deltaw.engine.evaluate import held_out_loss
from deltaw.engine.log import MetricsLog
from deltaw.engine.loop import Abandoned, Length, Progress, StepRecord, Track, fit
from deltaw.engine.optim import FlatFactors, all_finite
from deltaw.engine.prepare import Prepared, spec_from
from deltaw.engine.run import Run
from deltaw.engine.train import (
    COMPILED_ADVICE,
    WAY,
    abandonable,
    length_of,
    metrics_line,
    optim_settings,
    origin_of,
    resolve_intervals,
    saved_unheard,
    signals,
    stopped,
    tell_way,
)
from deltaw.engine.watcher import Watcher
from deltaw.errors import NotFiniteError, UsageError


class Cell:
    """One adapter of a sweep: its settings and folder, and the best of it so far."""

    def __init__(self, run: Run, settings: Settings) -> None:
        self.run, self.settings = run, settings
        self.best_loss, self.best_step = math.inf, 0
        self.best: Tensor | None = None
        self.metrics: MetricsLog | None = None


class Together:
    """The adapters of some cells, trained over one base. `folder` holds their common checkpoints."""

    def __init__(self, folder: Path, cells: Sequence[Cell], ready: Prepared, watcher: Watcher) -> None:
        self.folder, self.cells, self.ready, self.watcher = folder, list(cells), ready, watcher
        base = ready.base
        specs = [spec_from(cell.settings, int(cell.settings.rank)) for cell in cells]
        adapters = [
            new_adapter(choose(base.model, spec), spec, cell.settings.seed)
            for spec, cell in zip(specs, cells, strict=True)
        ]
        self.injection = inject(base.model, *adapters, trainable=True, dtype=torch.float32)
        del adapters
        tell_way(base, Run(folder).read_plan(), watcher)
        ready.adapter = self.injection.adapters[0]  # the first one's numbers, which nobody needs any more
        self.flat = FlatFactors(self.injection, [optim_settings(cell.settings) for cell in cells])
        share = cells[0].settings.share_prefixes and base.shares_prefixes
        tracks = []
        for cell in cells:
            loader = loader_of(ready.data["train"], cell.settings, share=share)
            length, stop = length_of(cell.settings, loader)
            if length.steps is None:
                raise UsageError("A sweep needs a length in --steps or --epochs: in --minutes, all would share it.")
            resolve_intervals(cell.settings, length)
            tracks.append(Track(loader, stop=stop, steps=length.steps))
        self.length = Length(max(track.steps or 0 for track in tracks))  # epochs of other orders have other steps
        self.progress = Progress(tracks=tracks)
        self.owed: list[int] = []  # cells whose evaluation after the step that was taken last is still to come
        self.signal: int | None = None
        self.saved_at = time.monotonic()
        hardware.give_memory_back()

    @property
    def checkpoints(self) -> Path:
        """The last good checkpoints of all cells together."""
        return self.folder / "checkpoints"

    # -- state --------------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Goes on where the newest good checkpoint was written, if there is one. UsageError when it is of others."""
        found, skipped = newest_checkpoint(self.checkpoints)
        for reason in skipped:
            self.watcher.say(f"Skipped a checkpoint: {reason}.")
        if found is None:
            return
        tensors, state = found
        if state["cells"] != self._identities():
            raise UsageError(
                f"The checkpoints in {self.checkpoints} are of other cells, data or base, or were computed in another "
                f"way ({COMPILED_ADVICE}); start anew."
            )
        self.flat.load_state(tensors)
        self.progress.step, self.progress.seconds, self.owed = state["step"], state["seconds"], state.get("owed", [])
        for track, known in zip(self.progress.tracks, state["tracks"], strict=True):
            track.position, track.tokens, track.trained_tokens, track.last_step, track.fault = known
        for index, (cell, known) in enumerate(zip(self.cells, state["best"], strict=True)):
            cell.best_step, loss = known
            cell.best_loss, cell.best = (loss, tensors[f"best{index}"]) if cell.best_step else (math.inf, None)

    def _identities(self) -> list[dict[str, Any]]:
        """What must be the same for a sweep to go on exactly: each cell's origin, and how it is computed."""
        found = []
        for cell in self.cells:
            origin = {**origin_of(self.ready, cell.settings), WAY: self.ready.base.computing}
            del origin["deltaw_version"]
            origin["data_digest"] = self.ready.data["train"].identity
            if self.ready.held_out is not None:
                origin["held out"] = self.ready.held_out.report.digest
            found.append(origin)
        return found

    def checkpoint(self) -> None:
        """Saves all cells in one file."""
        if not all_finite(self.flat.master):
            raise NotFiniteError(f"After step {self.progress.step}, factors are not finite; lower the rates.")
        tensors = {name: tensor.detach().cpu() for name, tensor in self.flat.state().items()}
        tensors |= {f"best{index}": cell.best for index, cell in enumerate(self.cells) if cell.best is not None}
        state = {
            "step": self.progress.step,
            "seconds": self.progress.seconds,
            "tracks": [
                [track.position, track.tokens, track.trained_tokens, track.last_step, track.fault]
                for track in self.progress.tracks
            ],
            "best": [[cell.best_step, cell.best_loss if cell.best_step else None] for cell in self.cells],
            "owed": self.owed,
            "cells": self._identities(),
        }
        save_checkpoint(self.checkpoints, self.progress.step, tensors, state, self.cells[0].settings.keep_checkpoints)
        self.saved_at = time.monotonic()

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Trains to the end and leaves each cell's adapters in its folder; Interrupted, resumable, by a signal."""
        with ExitStack() as opened:
            for cell in self.cells:
                cell.metrics = MetricsLog(cell.run.metrics, self.progress.step, [])
                opened.callback(cell.metrics.close)
            self.watcher.follow()
            opened.callback(self.watcher.stop)
            with signals(self):
                with saved_unheard(self):
                    whole = self._settled() and fit(
                        self.ready.base, self.injection, self.flat, self.progress, self.length, self.observe,
                        interrupted=lambda: self.signal is not None,
                    )  # fmt: skip
                if not whole:
                    self.checkpoint()
        if not whole:
            raise stopped(self, f"sweep --resume {self.folder}")
        for index, cell in enumerate(self.cells):
            last = self._slice(index).clone()
            self._write(index, last, cell.run.last)
            self._write(index, last if cell.best is None else cell.best, cell.run.adapter)

    def _settled(self) -> bool:
        """Does what the last step before a stop still owed; False when a signal ends that."""
        try:
            self.settle(checkpoint=bool(self.owed))
        except Abandoned:
            return False
        return True

    def observe(self, record: StepRecord, progress: Progress) -> bool:
        """Logs a step of every cell that took one, evaluates and saves where it is due."""
        asked = [index for index, tokens in enumerate(record.tokens) if tokens]
        stepped = [index for index in asked if progress.tracks[index].fault is None]
        settings, over = self.cells[0].settings, self.length.over(progress.step, progress.seconds)
        last = over or all(track.ended for track in progress.tracks)
        self.owed = [index for index in stepped if over or self._due(index, record.step)]
        for index in stepped:
            metrics = self.cells[index].metrics
            assert metrics is not None
            metrics.write(metrics_line(record, index))
        for index in set(asked) - set(stepped):  # from here on nobody may be listening, and the step is complete
            self._say_why(index)
        if stepped:
            summed = {**metrics_line(record, stepped[0]), "tokens": sum(record.tokens), "seconds": record.seconds}
            self.watcher.step(summed, progress, self.length)
        late = time.monotonic() - self.saved_at >= settings.checkpoint_seconds
        self.settle(last or late or record.step % int(settings.checkpoint_steps) == 0)
        return True

    def settle(self, checkpoint: bool) -> None:
        """What a finished step still owes: evaluations, a checkpoint."""
        while self.owed:
            self.evaluate(self.owed[0])
            del self.owed[0]
        self.injection.active = 0
        if checkpoint:
            self.checkpoint()

    def _say_why(self, index: int) -> None:
        """Says which cell could not go on."""
        fault = self.progress.tracks[index].fault
        self.watcher.say(f"{self.cells[index].run.folder.name} ends here, the others go on. {fault}")

    def _due(self, index: int, step: int) -> bool:
        return self.progress.tracks[index].ended or step % int(self.cells[index].settings.eval_steps) == 0

    def evaluate(self, index: int) -> None:
        """The held-out loss of a cell, which keeps its best."""
        if self.ready.held_out is None:
            return
        cell = self.cells[index]
        self.injection.active = index
        with abandonable(self):
            loss, tokens, seconds = held_out_loss(
                self.ready.base, self.ready.held_out.store, int(cell.settings.micro_tokens), cell.settings.eval_rows
            )
        self.progress.away_seconds += seconds
        if not math.isfinite(loss):
            self.progress.tracks[index].fault = f"After step {self.progress.step}, the validation loss is {loss}."
            self._say_why(index)
            return
        assert cell.metrics is not None
        cell.metrics.write({"step": self.progress.step, "eval_loss": loss, "eval_tokens": tokens})
        if loss < cell.best_loss:
            cell.best_loss, cell.best_step = loss, self.progress.step
            cell.best = self._slice(index).clone()

    def _slice(self, index: int) -> Tensor:
        start, _, stop = self.flat.adapter_slices[index]
        return self.flat.master[start:stop].detach().cpu()

    def _write(self, index: int, numbers: Tensor, folder: Path) -> None:
        start, _, stop = self.flat.adapter_slices[index]
        values = torch.zeros(stop)
        values[start:stop] = numbers
        adapter = self.flat.adapter(index, values)
        adapter.origin = origin_of(self.ready, self.cells[index].settings)
        write_adapter(adapter, folder)
