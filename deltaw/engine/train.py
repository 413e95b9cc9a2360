"""One training run from settings to a saved adapter: prepare, resolve, fit, keep. `train` is the list of steps.

It owns no loop (deltaw/engine/loop.py) and draws nothing: what a person should see is told to a Watcher.
"""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from deltaw import __version__, hardware
from deltaw.adapter import Injection, inject, write_adapter
from deltaw.base.load import WAYS, Base
from deltaw.base.proof import prepare_passes
from deltaw.config import AUTO, EVALUATIONS_PER_RUN, Settings, steps_between
from deltaw.data.loader import Loader, loader_of
from deltaw.data.prepare import DataSet
from deltaw.disk import disk_errors
from deltaw.engine.checkpoint import newest_checkpoint, save_checkpoint
from deltaw.engine.clock import WrittenClock
from deltaw.engine.evaluate import held_out_loss
from deltaw.engine.log import MetricsLog, open_trackers, read_metrics
from deltaw.engine.loop import Abandoned, Length, Progress, StepRecord, Track, fit
from deltaw.engine.optim import FlatFactors, OptimSettings, all_finite
from deltaw.engine.prepare import Prepared, Sketch, prepare_run, sketch_run
from deltaw.engine.probe import probe
from deltaw.engine.run import Run
from deltaw.engine.watcher import Watcher
from deltaw.errors import (
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    DiskError,
    Interrupted,
    NotFiniteError,
    UsageError,
    bullet_list,
    command,
)

SPIKE, SPIKE_WINDOW = 4.0, 20
WAY = "way of computing"  # of which a checkpoint remembers the words, of other things a digest
COMPILED_ADVICE = (
    "the compiled passes need g++ and a cache folder for us to write in, and DELTAW_COMPILED=0 leaves them out"
)
# Settings that change when something is written, and no number that is.
FREE_TO_CHANGE = (
    *("checkpoint_steps", "checkpoint_seconds", "keep_checkpoints", "patience", "allow_lost"),
    *("memory", "recompute", "stream"),
)


class Stoppable(Protocol):
    """A loop that a signal may ask to stop: what it is told by, and what it is to look at."""

    progress: Progress
    watcher: Watcher
    signal: int | None

    def checkpoint(self) -> None:
        """Saves its state."""


class Trainer:
    """A run in progress: everything that `train` prepares, and what it keeps while the loop runs."""

    def __init__(self, run: Run, settings: Settings, ready: Prepared, watcher: Watcher) -> None:
        self.run, self.settings, self.ready, self.watcher = run, settings, ready, watcher
        # fp32 factors also on a bf16 base: with a bf16 copy of them, gradients are 1.15 times as far from the exact
        # ones as PEFT's (tests/oracle); with fp32 they are as near.
        self.injection: Injection = inject(ready.base.model, ready.adapter, trainable=True, dtype=torch.float32)
        tell_way(ready.base, run.read_plan(), watcher)
        self.flat = FlatFactors(self.injection, [optim_settings(settings)])
        ready.adapter = self.injection.adapters[0]
        share = settings.share_prefixes and ready.base.shares_prefixes
        self.loader = loader_of(ready.data["train"], settings, share=share)
        self.length, stop = length_of(settings, self.loader)
        resolve_intervals(settings, self.length)
        self.progress = Progress(tracks=[Track(self.loader, stop=stop)])
        self.best_loss, self.best_step, self.bad_evaluations = math.inf, 0, 0
        self.best: Tensor | None = None
        self.base_loss: float | None = None  # of what is held out, without the adapter; measured at the end
        self.metrics: MetricsLog | None = None
        self.stopped_early = False
        self.owed = False  # an evaluation of the step that was taken last
        self.losses: list[float] = []
        self.saved_at = time.monotonic()
        self.signal: int | None = None
        hardware.give_memory_back()  # what proving and quantising took
        self.opened_bytes = peak_bytes()

    # -- resume -------------------------------------------------------------------------------------------------------

    def resume(self) -> bool:
        """Goes back to the newest good checkpoint; False when there is none. Says what was skipped."""
        found, skipped = newest_checkpoint(self.run.checkpoints)
        for reason in skipped:
            self.watcher.say(f"Skipped a checkpoint: {reason}.")
        if found is None:
            return False
        tensors, state = found
        self.require_same(state)
        self.take(tensors, state)
        self.stopped_early = self._out_of_patience() and not self._is_last()
        return True

    def take(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Stands where a checkpoint was written. Raises UsageError when its factors are not of this layout."""
        if tensors["master"].shape != self.flat.master.shape:
            raise UsageError(
                f"The checkpoints hold {len(tensors['master']):,} trained numbers and these settings ask for "
                f"{len(self.flat.master):,}: the adapter's settings in {self.run.config} changed since the run began. "
                "Put them back, or start a new run."
            )
        self.flat.load_state(tensors)
        self.progress.step, self.progress.seconds = state["step"], state["seconds"]
        track = self.progress.tracks[0]
        track.position, track.tokens, track.trained_tokens = state["position"], state["tokens"], state["trained_tokens"]
        self.best_step, self.bad_evaluations = state["best_step"], state["bad_evaluations"]
        self.owed = state["owed"]
        if self.best_step:
            self.best_loss, self.best = state["best_loss"], tensors.get("best", tensors["master"])  # ours alone

    def require_same(self, state: dict[str, Any]) -> None:
        """Raises UsageError with every difference that would make the result depend on when the run was stopped."""
        digests = self._digests()
        known = state["digests"]
        words = {WAY: f" from {known.get(WAY)!r} to {digests[WAY]!r}; {COMPILED_ADVICE}"}
        changed = [f"the {n} changed{words.get(n, '')}" for n, digest in digests.items() if known.get(n) != digest]
        now = json.loads(json.dumps(self.settings.without_places()))
        for name in sorted(now.keys() | state["config"].keys()):
            before, after = state["config"].get(name), now.get(name)
            if before == after:
                continue
            difference = f"{name} was {before!r} and is {after!r}"
            if name in FREE_TO_CHANGE:
                self.watcher.say(f"Going on although {difference}.")
            else:
                changed.append(difference)
        if changed:
            begin = f" (--adapter {self.run.last} begins where this one is)" if self.run.last.is_dir() else ""
            raise UsageError(
                f"This run cannot go on exactly:\n{bullet_list(changed)}\nPut that back, or start a new run{begin}."
            )

    def _digests(self) -> dict[str, str]:
        data = {("data" if name == "train" else f"{name} data"): s.identity for name, s in self.ready.data.items()}
        return {"base": self.ready.base.digest, **data, WAY: self.ready.base.computing}

    def state(self) -> dict[str, Any]:
        """What a checkpoint remembers besides tensors."""
        track = self.progress.tracks[0]
        return {
            "step": self.progress.step,
            "seconds": self.progress.seconds,
            "position": track.position,
            "tokens": track.tokens,
            "trained_tokens": track.trained_tokens,
            "best_loss": self.best_loss if self.best_step else None,
            "best_step": self.best_step,
            "bad_evaluations": self.bad_evaluations,
            "owed": self.owed,
            "config": self.settings.without_places(),
            "digests": self._digests(),
        }

    def checkpoint(self) -> None:
        """Saves the present state, the best factors with it: the adapter in the run folder may be newer than this.

        Raises NotFiniteError, and keeps the older checkpoints, when a factor is not finite.
        """
        state = self.state()
        self._require_finite("its factors are", self.flat.master)
        tensors = {name: tensor.detach().cpu() for name, tensor in self.flat.state().items()}
        if self.best is not None and self.best_step != self.progress.step:
            tensors["best"] = self.best
        save_checkpoint(self.run.checkpoints, self.progress.step, tensors, state, self.settings.keep_checkpoints)
        self.saved_at = time.monotonic()

    def _require_finite(self, what: str, values: Tensor) -> None:
        if not all_finite(values):
            raise NotFiniteError(
                f"After step {self.progress.step}, {what} not finite. The last good checkpoint, if any, is in "
                f"{self.run.checkpoints}. Start again with a lower --lr than {self.settings.lr}."
            )

    # -- what happens after each step ---------------------------------------------------------------------------------

    def observe(self, record: StepRecord, progress: Progress) -> bool:
        """Logs the step, evaluates and saves where it is due; False ends the run early."""
        line = metrics_line(record)
        assert self.metrics is not None
        self.owed = self._due(self.settings.eval_steps, record) or self._is_last()
        self.metrics.write(line)
        self.watcher.step(line, progress, self.length)
        self._notice(record)
        late = time.monotonic() - self.saved_at >= self.settings.checkpoint_seconds
        return self.settle(late or self._due(self.settings.checkpoint_steps, record))

    def settle(self, checkpoint: bool) -> bool:
        """What a finished step still owes: an evaluation, a checkpoint. False ends the run early."""
        last, go_on = self._is_last(), True
        if self.owed:
            go_on = self.evaluate()
        if checkpoint or last or not go_on:
            self.checkpoint()
        self.stopped_early = not go_on and not last
        return go_on

    def _notice(self, record: StepRecord) -> None:
        """Says what is unusual about a step; nothing is left out of the log for it."""
        loss, usual = record.losses[0], statistics.median(self.losses) if self.losses else math.inf
        if len(self.losses) == SPIKE_WINDOW and loss > SPIKE * usual:
            self.watcher.say(f"Step {record.step}: the loss jumped to {loss:.3g}; lately it was about {usual:.3g}.")
        if record.grad_norms[0] == 0:
            self.watcher.say(f"Step {record.step}: the gradient is zero, so nothing was learned from it.")
        self.losses = [*self.losses, loss][-SPIKE_WINDOW:]

    def _is_last(self) -> bool:
        return self.length.over(self.progress.step, self.progress.seconds) or all(
            track.ended for track in self.progress.tracks
        )

    def _out_of_patience(self) -> bool:
        return 0 < self.settings.patience <= self.bad_evaluations

    def _due(self, every: int | str, record: StepRecord) -> bool:
        if every != AUTO:
            return record.step % int(every) == 0
        if self.length.seconds is not None:
            interval = self.length.seconds / EVALUATIONS_PER_RUN
            return self.progress.seconds // interval > (self.progress.seconds - record.seconds) // interval
        raise AssertionError("intervals in steps are resolved before the first step")

    def evaluate(self) -> bool:
        """Measures the held-out loss and keeps the best adapter; False when patience has run out."""
        if self.ready.held_out is None:
            self.owed = False
            return True
        loss, tokens, seconds = self._held_out_loss(self.ready.held_out)
        self.progress.away_seconds += seconds
        self._require_finite("the validation loss is", torch.tensor(loss))
        line = {"step": self.progress.step, "eval_loss": loss, "eval_tokens": tokens, "eval_seconds": seconds}
        assert self.metrics is not None
        self.metrics.write(line)
        better = loss < self.best_loss
        if better:
            self.best_loss, self.best_step, self.bad_evaluations = loss, self.progress.step, 0
            if self.best is None:
                self.best = torch.empty_like(self.flat.master, device="cpu")
            self._write(self.best.copy_(self.flat.master), self.run.adapter)
        else:
            self.bad_evaluations += 1
        self.owed = False  # also where what follows finds that nobody reads it
        self.watcher.evaluation(line, better)
        return not self._out_of_patience()

    def _held_out_loss(self, data: DataSet) -> tuple[float, int, float]:
        with abandonable(self):
            return held_out_loss(self.ready.base, data.store, int(self.settings.micro_tokens), self.settings.eval_rows)

    def measure_base(self) -> None:
        """Measures the held-out loss of the base alone, which says what training was good for."""
        if self.ready.held_out is None:
            return
        self.injection.active = None
        try:
            self.base_loss, _, _ = self._held_out_loss(self.ready.held_out)
        finally:
            self.injection.active = 0

    def _write(self, values: Tensor, folder: Path) -> None:
        """Writes the factors in `values` as an adapter folder."""
        adapter = self.flat.adapter(0, values)
        adapter.origin = origin_of(self.ready, self.settings)
        write_adapter(adapter, folder)

    def finish(self) -> None:
        """Saves the last adapter, and as the run's adapter the best one, or the last where nothing was held out."""
        last = self.flat.master.detach().cpu()
        self._write(last, self.run.last)
        self._write(last if self.best is None else self.best, self.run.adapter)


def tell_way(base: Base, plan: Mapping[str, Any], watcher: Watcher) -> None:
    """Says so where the base is computed without the kernels or their compiled part, or a plan counted on more."""
    if base.way == "modules":
        watcher.say(f"By the model's own modules, which is slower: {base.slow_reason}.")
    compiles = base.device.type == "cpu" and sys.platform == "linux" and os.environ.get("DELTAW_COMPILED") != "0"
    if compiles and (reason := prepare_passes()):
        watcher.say(f"Without deltaw's compiled passes, which take about a third off a step: {reason}.")
    counted_on = plan.get("way", base.way)
    if WAYS.index(base.way) > WAYS.index(counted_on):
        watcher.say(f"The plan counted on {counted_on}: this may take more memory and time than it says.")


def origin_of(ready: Prepared, settings: Settings) -> dict[str, str]:
    """Where an adapter of this run comes from: base, data, settings, template."""
    config = {name: value for name, value in settings.without_places().items() if name not in FREE_TO_CHANGE}
    return {
        **ready.base.origin,
        "data_digest": ready.data["train"].report.digest,
        "deltaw_version": __version__,
        "task_type": "CAUSAL_LM",
        "config": json.dumps(config),
        "template_examples": ready.template_examples,
    }


def metrics_line(record: StepRecord, index: int = 0) -> dict[str, Any]:
    """What metrics.jsonl holds of a step of one adapter; of the seconds, its share where several take turns."""
    return {
        "step": record.step,
        "loss": record.losses[index],
        "tokens": record.tokens[index],
        "computed_tokens": record.computed_tokens[index],
        "trained_tokens": record.trained_tokens[index],
        "seconds": record.seconds / max(1, sum(tokens > 0 for tokens in record.tokens)),
        "lr": record.rates[index],
        "grad_norm": record.grad_norms[index],
        "peak_bytes": peak_bytes(),
    }


def peak_bytes() -> int:
    """The most memory this run has held: on a GPU what torch reserved there, else the process's high-water mark."""
    on_gpu = torch.cuda.max_memory_reserved() if torch.cuda.is_initialized() else 0
    return on_gpu or hardware.peak_rss_bytes()


def peak_of(run: Run) -> int:
    """The most memory that a run has held, in this process or in those before it, which its log tells of."""
    return max(peak_bytes(), *(line.get("peak_bytes", 0) for line in read_metrics(run.metrics)), 0)


def optim_settings(settings: Settings) -> OptimSettings:
    """How the settings want an adapter optimised."""
    return OptimSettings(
        rate=float(settings.lr),
        schedule=settings.schedule,
        warmup=settings.warmup,
        lora_plus=settings.lora_plus,
        clip=settings.clip,
        weight_decay=settings.weight_decay,
    )


def length_of(settings: Settings, loader: Loader) -> tuple[Length, int | None]:
    """The run's length, and the position at which its last epoch ends."""
    if settings.minutes is not None:
        return Length(None, settings.minutes * 60), None
    if settings.steps is not None:
        return Length(settings.steps), None
    stop = loader.stop_after(settings.whole_epochs)
    assert stop is not None
    return Length(loader.steps_until(stop)), stop


def resolve_intervals(settings: Settings, length: Length) -> None:
    """Evaluations and checkpoints in steps, where the length of the run is known in steps."""
    if length.steps is not None:
        every = steps_between(length.steps)
        for name in ("eval_steps", "checkpoint_steps"):
            if getattr(settings, name) == AUTO:
                settings.put(name, every, f"rule: at most {EVALUATIONS_PER_RUN} times in a run")


# -- running -----------------------------------------------------------------------------------------------------------


def train(
    run: Run,
    settings: Settings,
    watcher: Watcher,
    *,
    resume: bool = False,
    plan: Callable[[Sketch], None] | None = None,
    before: Callable[[Trainer], None] | None = None,
) -> Trainer:
    """Trains a run to its end and leaves its adapters in the folder; the adapter stays injected in the base.

    `plan` is called before the base is opened, and may change how the settings fit it into memory; `before` between
    preparing and the first step (the demo measures the base there). Raises Interrupted after saving when a signal asked
    to stop, and the errors of deltaw.errors otherwise.
    """
    trackers = open_trackers(settings.track, run.folder)
    with run.locked():
        run.tidy()
        sketch = sketch_run(run, settings, watcher)
        if plan is not None:
            plan(sketch)
        trainer = Trainer(run, settings, prepare_run(sketch, settings, watcher), watcher)
        if resume and not trainer.resume():
            watcher.say("No checkpoint yet: starting from step 0.")
        run.write_settings(settings)
        if trainer.progress.step == 0:
            probe(trainer)
        if before is not None:
            before(trainer)
        with disk_errors("write", run.folder):
            for told in (run.forgetting, run.inspected):  # of factors that will be others
                told.unlink(missing_ok=True)
        trainer.metrics = MetricsLog(run.metrics, trainer.progress.step, trackers)
        watcher.start(trainer)
        try:
            whole = trainer.stopped_early or _fit(trainer)
            if whole:
                trainer.finish()
                with signals(trainer), suppress(Abandoned):  # a signal ends this alone
                    trainer.measure_base()
        finally:
            watcher.stop()
            trainer.metrics.close()
        if not whole:
            raise stopped(trainer, f"train --resume {run.folder}")
        run.tidy()
        return trainer


def _fit(trainer: Trainer) -> bool:
    """Runs the loop; False when a signal ended it. The state is saved then, and where its lines cannot be written."""
    with signals(trainer):
        with saved_unheard(trainer):
            whole = _settled(trainer) and _loop(trainer)
        if trainer.signal is not None and not whole:
            trainer.checkpoint()
    return whole or trainer.signal is None


def _settled(trainer: Trainer) -> bool:
    """Does what the last step before a stop still owed; False when that ends the run, or a signal did."""
    try:
        return trainer.settle(checkpoint=True) if trainer.owed else True
    except Abandoned:
        return False


def _loop(trainer: Trainer) -> bool:
    clock = WrittenClock(trainer.run.clock) if trainer.length.seconds is not None else None
    return fit(
        trainer.ready.base, trainer.injection, trainer.flat, trainer.progress, trainer.length, trainer.observe,
        interrupted=lambda: trainer.signal is not None, clock=clock,
    )  # fmt: skip


@contextmanager
def saved_unheard(trainer: Stoppable) -> Iterator[None]:
    """Saves the state where nobody reads what is told any more, or it cannot be written. Raises DiskError then."""
    try:
        yield
    except OSError as error:
        trainer.checkpoint()
        if isinstance(error, BrokenPipeError):
            raise
        raise DiskError(f"What is told of the run could not be written: {error.strerror or error}.") from error


@contextmanager
def abandonable(trainer: Stoppable) -> Iterator[None]:
    """What is inside may be given up by a signal, and is not begun after one."""
    trainer.progress.abandonable = True
    try:
        if trainer.signal is not None:
            raise Abandoned
        yield
    finally:
        trainer.progress.abandonable = False


def stopped(trainer: Stoppable, verb: str) -> Interrupted:
    """What a loop that a signal ended raises: its exit code, and the command that goes on, by its verb."""
    code = EXIT_TERMINATED if trainer.signal == signal.SIGTERM else EXIT_INTERRUPTED
    return Interrupted(code, f"Stopped after step {trainer.progress.step}. Go on with: {command(verb)}")


@contextmanager
def signals(trainer: Stoppable) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks the loop to stop and save; the next of either ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, _frame: Any) -> None:
        trainer.signal = number
        for other in previous:
            signal.signal(other, signal.SIG_DFL)
        trainer.watcher.stopping()
        if trainer.progress.abandonable:  # a step under way may take long; nothing of it is kept
            trainer.progress.abandonable = False
            raise Abandoned

    previous: dict[int, Any] = dict.fromkeys((signal.SIGINT, signal.SIGTERM))
    for number in previous:
        previous[number] = signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
