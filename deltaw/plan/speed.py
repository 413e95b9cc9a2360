"""How long steps take: by the measured pace of this machine, or by the data sheet of another."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from deltaw.base.formed import weight_files
from deltaw.base.load import most_together
from deltaw.plan.demand import Choice, Demand, Pass
from deltaw.plan.devices import CPU_SHARE, GPU_SHARE, Device
from deltaw.plan.pace import Pace, likely_way

SHEET_DENSE_SECONDS = 1e-11  # of a quantised weight on a GPU: its 2.5 bytes, read and written
STREAMED_SHARE = 0.03  # of a step: what the reading thread takes from the computing ones
SHEET_DISK_BYTES_PER_SECOND = 2e9
_PROBED_BYTES, _READ_BYTES = 64 << 20, 1 << 20


@dataclass(frozen=True)
class Clock:
    """Seconds of the parts of a run, from what was measured here or from a data sheet (then `pace` is None)."""

    demand: Demand
    pace: Pace | None
    device: Device | None = None

    @cached_property
    def way(self) -> str:
        """How a batch is computed, as in Base.way."""
        return likely_way(self.demand) if self.pace is None else self.pace.way

    @property
    def share(self) -> bool:
        """Whether what documents have in common is computed once."""
        return self.demand.settings.share_prefixes and self.way == "kernels"

    @cached_property
    def disk_bytes_per_second(self) -> float:
        """How fast the base's files are read when they lie in no cache."""
        return SHEET_DISK_BYTES_PER_SECOND if self.device is not None else read_rate(self.demand.outline.folder)

    def step(self, choice: Choice, passes: Sequence[Pass], short_bytes: int = 0, *, cached: bool = False) -> float:
        """One optimiser step of these passes; `short_bytes` of what a streamed base needs at hand have no room.

        Where the system keeps all of its blocks (`cached`), they are read from the disk in the first step alone.
        """
        most, groups = self.demand.tokens_a_reading(choice, self.way), [list(passes[:1])]
        for one in passes[1:]:
            if len(groups[-1]) == most_together() or sum(each.tokens for each in (*groups[-1], one)) > most:
                groups.append([])
            groups[-1].append(one)
        return sum(self._reading(choice, group, short_bytes, cached) for group in groups) + self._update()

    def evaluation(self, choice: Choice) -> float:
        """One evaluation: forward alone."""
        share = self.way == "kernels" and self.demand.device.type == "cpu"
        passes = self.demand.evaluation(choice.micro_tokens, share=share)
        outline, forming = self.demand.outline, self._forming(choice, len(passes))
        if self.pace is None:
            return 2 * outline.product_parameters * sum(one.tokens for one in passes) / self._rate + forming
        forward = outline.layers * sum(self.pace.forward_seconds(one.tokens) for one in passes)
        return forward + sum(one.labelled for one in passes) * self.pace.label_seconds / 2 + forming

    def _reading(self, choice: Choice, group: Sequence[Pass], short_bytes: int, cached: bool) -> float:
        """The passes that one reading of a streamed base serves; elsewhere one pass."""
        seconds, outline = sum(self._pass(choice, one) for one in group), self.demand.outline
        if not choice.stream:
            return seconds
        blocks, rate = 2 * outline.layers, self.disk_bytes_per_second
        reading = 0.0 if cached else blocks * self.demand.block_bytes(choice) / rate
        # What is short is taken back by the system before each block ends, and products wait until it is read again.
        return max(seconds * (1 + STREAMED_SHARE), reading) + blocks * short_bytes / rate

    def _pass(self, choice: Choice, one: Pass) -> float:
        outline = self.demand.outline
        twice = choice.recompute
        seconds = (outline.layers - twice) * self._block(one, again=False) + twice * self._block(one, again=True)
        return seconds + self._labels(one.labelled) + self._forming(choice, 2 + twice / outline.layers)

    def _forming(self, choice: Choice, times: float) -> float:
        """Of all layers' weights, where they are formed when they are read, so many times."""
        if not self.demand.forms(choice):
            return 0.0
        each = SHEET_DENSE_SECONDS
        if self.pace is not None:
            each = self.pace.cast_seconds if choice.quant == "none" else self.pace.dense_seconds
        return times * self.demand.outline.linear_parameters * each

    @property
    def _rate(self) -> float:
        """Floating-point operations a second that training sustains on the machine of the data sheet."""
        assert self.device is not None
        return self.device.tflops * 1e12 * (GPU_SHARE if self.device.kind == "cuda" else CPU_SHARE)

    def _block(self, one: Pass, *, again: bool) -> float:
        if self.pace is not None:
            return self.pace.block_seconds(one.tokens, recompute=again)
        outline = self.demand.outline
        squares = sum(n * n for n in one.lengths) * outline.heads * outline.head_width
        products = one.tokens * outline.product_parameters / max(1, outline.layers)
        return ((6 if again else 4) * products + (9 if again else 7) * squares) / self._rate

    def _labels(self, labelled: int) -> float:
        if self.pace is not None:
            return labelled * self.pace.label_seconds
        rows, width = self.demand.outline.head_shape
        return 4 * labelled * rows * width / self._rate

    def _update(self) -> float:
        return 0.0 if self.pace is None else self.pace.update_seconds


def read_rate(folder: Path) -> float:
    """Bytes a second of a file of weights that the system does not hold, from the first 64 MB of one."""
    file = max(weight_files(folder), key=lambda path: path.stat().st_size)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        size = min(_PROBED_BYTES, file.stat().st_size)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_DONTNEED)
        since, read = time.perf_counter(), 0
        while read < size and (part := os.read(descriptor, _READ_BYTES)):
            read += len(part)
        return read / max(1e-6, time.perf_counter() - since)
    finally:
        os.close(descriptor)
