"""deltaw on one job: the engine's own loop, with the steps that the job fixes. A script: python deltaw_run.py JOB.json

The only thing that is not deltaw's is the Loader's step: it takes the next rows in order, a fixed number per step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from job import Job, Recorder, Rows, peak_bytes, read_job, say

from deltaw.adapter import inject, read_adapter, write_adapter
from deltaw.base.load import Base, load
from deltaw.data.loader import Loader, Step
from deltaw.data.pack import batch_of
from deltaw.data.store import TokenStore
from deltaw.engine.loop import Length, Progress, StepRecord, Track, fit
from deltaw.engine.optim import FlatFactors, OptimSettings


class FixedLoader(Loader):
    """The rows in order, so many per optimiser step; micro-batches are cut as ever."""

    def __init__(self, store: TokenStore, examples: int, micro_tokens: int, share: bool) -> None:
        super().__init__(store, batch_tokens=1, micro_tokens=micro_tokens, seed=0, share=share)
        self.examples = examples

    def step(self, position: int, stop: int | None = None) -> Step:
        """The step that begins at `position`; after the last row comes the first."""
        assert stop is None
        documents = [(position + i) % len(self.store) for i in range(self.examples)]
        return Step(self.micro_batches(documents), position + self.examples)


class WatchedFactors(FlatFactors):
    """Keeps the gradients of the first step, before they are clipped."""

    first: torch.Tensor | None = None

    def clip(self) -> list[float]:
        if self.first is None:
            self.first = self.grad.detach().clone()
        return super().clip()


def main() -> None:
    import_bytes = peak_bytes()
    job = read_job()
    say({"train": train, "logits": logits}[job.task](job, import_bytes))


def train(job: Job, import_bytes: int) -> dict[str, Any]:
    """Trains, saves what is asked for, and answers."""
    base = load(job.base, device="cpu", dtype=job.setting["dtype"])
    injection = inject(base.model, read_adapter(job.start), trainable=True, dtype=torch.float32)
    optim = OptimSettings(rate=job.rate, schedule="constant", warmup=0.0, clip=job.clip, weight_decay=0.0)
    flat = (WatchedFactors if job.gradients else FlatFactors)(injection, [optim])
    store, share = TokenStore(Path(job.data)), job.setting.get("share", False)
    loader = FixedLoader(store, job.examples_per_step, job.setting["micro_tokens"], share)
    recorder = Recorder(job, import_bytes)

    def observe(record: StepRecord, _progress: Progress) -> bool:
        return recorder.step(record.losses[0], record.grad_norms[0], record.tokens[0], record.trained_tokens[0])

    recorder.begin()
    fit(base, injection, flat, Progress(tracks=[Track(loader)]), Length(None, float("inf")), observe)
    if job.out:
        write_adapter(flat.adapter(), job.out)
    if isinstance(flat, WatchedFactors) and job.gradients:
        write_adapter(flat.adapter(0, flat.first), job.gradients)
    return {**recorder.answer(), "dtype": str(base.dtype).removeprefix("torch."), "computing": base.computing}


@torch.no_grad()
def logits(job: Job, _import_bytes: int) -> dict[str, Any]:
    """Writes the fp32 logits of the first rows to `out`, with the adapter `start` at work."""
    base = load(job.base, device="cpu", dtype="float32")
    inject(base.model, read_adapter(job.start))
    store, rows = TokenStore(Path(job.data)), Rows(job.data)
    np.savez(str(job.out), *[_logits(base, store, row) for row in range(min(job.examples_per_step, len(rows)))])
    return {"tool": job.tool, "task": job.task}


def _logits(base: Base, store: TokenStore, row: int) -> np.ndarray:
    batch = batch_of(store, [row])
    return base.logits(base.hidden_states(batch.tokens_T, batch.positions_T, batch.bounds)).float().numpy()


if __name__ == "__main__":
    main()
