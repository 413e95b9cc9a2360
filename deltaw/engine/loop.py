"""The training loop: a function of a base, adapters and their data. It prints nothing and decides nothing.

Adapters take turns on the frozen base within a step, each with its own data, rate and slice of the flat buffer, and one
optimiser call ends the step. What happens is told to an Observer; what is kept, shown or saved is its business.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from deltaw.adapter import Injection
from deltaw.adapter.math import seed_of
from deltaw.adapter.weight import READER
from deltaw.base.load import Base
from deltaw.data.loader import Loader, Step
from deltaw.data.pack import Batch
from deltaw.engine.objective import accumulate, head_factors
from deltaw.engine.optim import FlatFactors, rate_factor
from deltaw.errors import AdapterError, NotFiniteError, bullet_list


@dataclass
class Track:
    """One adapter's way through its data. `position` counts documents over all epochs; `stop` ends the last epoch.

    `steps` is how many it takes, where they are not those of the run, `last_step` the last that it took. `fault` says
    why it could not go on.
    """

    loader: Loader
    position: int = 0
    stop: int | None = None
    tokens: int = 0
    trained_tokens: int = 0
    steps: int | None = None
    last_step: int = 0
    fault: str | None = None

    @property
    def ended(self) -> bool:
        """Whether the last epoch is over, or nothing more can be learned."""
        return self.fault is not None or (self.stop is not None and self.position >= self.stop)

    def next(self) -> Step:
        """What its next step trains on: nothing where it has ended."""
        return self.loader.step(self.position, self.position if self.ended else self.stop)


@dataclass(frozen=True)
class Length:
    """How long a run is: steps, or seconds of training (then `steps` is None)."""

    steps: int | None
    seconds: float | None = None

    def done(self, step: int, seconds: float, step_seconds: float) -> float:
        """Which share of the run lies behind the middle of step `step` (from 1), `step_seconds` after it began."""
        if self.seconds is not None:
            return (seconds + step_seconds / 2) / self.seconds
        assert self.steps is not None
        return (step - 0.5) / self.steps

    def over(self, step: int, seconds: float) -> bool:
        """Whether no step follows step `step`."""
        return step >= self.steps if self.steps is not None else seconds >= (self.seconds or math.inf)


@dataclass
class StepRecord:
    """What one step did, one entry per adapter where they differ.

    `seconds` lie between the end of the step before and the end of this one; evaluations in between are not counted.
    """

    step: int
    losses: list[float]
    tokens: list[int]
    computed_tokens: list[int]
    trained_tokens: list[int]
    grad_norms: list[float]
    rates: list[float]
    seconds: float


@dataclass
class Progress:
    """Where a run is: what a checkpoint has to remember besides tensors. `seconds` is the sum over its steps.

    An observer that does something else than training adds its duration to `away_seconds`, so that no step pays for it.
    While `abandonable`, a signal handler may raise Abandoned.
    """

    step: int = 0
    seconds: float = 0.0
    away_seconds: float = 0.0
    abandonable: bool = False
    tracks: list[Track] = field(default_factory=list)


class Abandoned(BaseException):
    """Raised by a signal handler while `Progress.abandonable`: what is under way leaves no trace."""


class Clock:
    """What the clock decides about a step; here, what it says now. A run that is repeated hears what was decided."""

    def done(self, _step: int, now: float) -> float:
        """Which share of the run lies behind this step."""
        return now

    def seconds(self, _step: int, measured: float) -> float:
        """How long this step took."""
        return measured


Observer = Callable[[StepRecord, Progress], bool]


def fit(
    base: Base,
    injection: Injection,
    flat: FlatFactors,
    progress: Progress,
    length: Length,
    observe: Observer,
    interrupted: Callable[[], bool] = lambda: False,
    clock: Clock | None = None,
) -> bool:
    """Trains until the length is reached, the data ends, or `observe` returns False; whether it was not interrupted.

    `progress` is advanced in place, always to the end of a whole step: an interrupted step is abandoned. Raises
    NotFiniteError with the rows of the batch, before anything was updated, when a loss or gradient is not finite; of
    several adapters, that one ends with its `fault` and the others go on, unless all have one. Raises AdapterError when
    a factor received no gradient in the first two steps or a frozen weight changed in them.
    """
    clock = clock or Clock()
    frozen = _versions(base)
    since = time.monotonic()
    try:
        while not length.over(progress.step, progress.seconds) and not all(t.ended for t in progress.tracks):
            injection.train(True)
            steps = [track.next() for track in progress.tracks]
            progress.abandonable = True
            results = forward_backward(base, injection, progress, steps, interrupted)
            progress.abandonable = False
            if results is None:
                return False
            number = progress.step + 1
            elapsed = time.monotonic() - since
            lengths = [length if track.steps is None else Length(track.steps) for track in progress.tracks]
            done = [clock.done(number, each.done(number, progress.seconds, elapsed)) for each in lengths]
            record = _update(flat, progress, done, steps, results)
            if number == 2:
                _require_unchanged(base, frozen)
            now = time.monotonic()
            record.seconds, since = clock.seconds(number, now - since), now
            progress.seconds += record.seconds
            progress.away_seconds = 0.0
            injection.train(False)
            if not observe(record, progress):
                return True
            since += progress.away_seconds
        return True
    except Abandoned:
        return False
    finally:
        progress.abandonable = False
        flat.grad.zero_()
        injection.active = 0
        injection.train(False)


@dataclass
class StepResult:
    """What the forward passes of one adapter's step gave."""

    loss: float
    tokens: int
    computed_tokens: int
    trained_tokens: int
    batches: list[Batch]


def forward_backward(
    base: Base, injection: Injection, progress: Progress, steps: Sequence[Step], interrupted: Callable[[], bool]
) -> list[StepResult] | None:
    """Gradients of every adapter's step in the flat buffer; None when interrupted on the way.

    Dropout's random numbers depend on the seed and the step alone, so nothing of them has to be kept for a resumed run,
    and adapters that train together draw what each would draw alone.
    """
    results = []
    for index, (track, step) in enumerate(zip(progress.tracks, steps, strict=True)):
        injection.active = index
        if injection.adapters[index].spec.dropout:
            torch.manual_seed(seed_of(track.loader.seed, f"dropout of step {progress.step + 1}"))
        batches = track.loader.batches(step)
        weight = sum(batch.weight for batch in batches)
        total = accumulate(base, batches, weight, head_factors(base, injection), interrupted)
        if total is None:
            return None
        tokens = sum(batch.tokens for batch in batches)
        trained = sum(batch.trained_tokens for batch in batches)
        computed = sum(batch.computed_tokens for batch in batches)
        results.append(StepResult(total / max(weight, 1e-9), tokens, computed, trained, batches))
    return results


def _update(
    flat: FlatFactors, progress: Progress, done: Sequence[float], steps: Sequence[Step], results: Sequence[StepResult]
) -> StepRecord:
    """Checks the gradients and takes the optimiser step; an adapter whose data has ended keeps its numbers."""
    number = progress.step + 1
    norms = flat.clip()
    faults = [_fault(number, *each) for each in zip(results, norms, progress.tracks, strict=True)]
    if any(faults) and all(fault or track.fault for fault, track in zip(faults, progress.tracks, strict=True)):
        raise NotFiniteError(next(filter(None, faults)))
    for index, fault in enumerate(faults):
        if fault is not None:
            progress.tracks[index].fault = fault
            flat.forget_gradient(index)
    if number <= 2:
        asked = [_reaches_all(result) and not fault for result, fault in zip(results, faults, strict=True)]
        _require_gradients(flat, "B" if number == 1 else "A", asked)
    factors = [rate_factor(d, each.schedule, each.warmup) for d, each in zip(done, flat.settings, strict=True)]
    factors = [0.0 if t.ended else factor for t, factor in zip(progress.tracks, factors, strict=True)]
    flat.step(factors)
    progress.step = number
    for track, step, result in zip(progress.tracks, steps, results, strict=True):
        if track.fault is not None:
            continue
        track.position, track.last_step = step.next_position, number if result.tokens else track.last_step
        track.tokens += result.tokens
        track.trained_tokens += result.trained_tokens
    return StepRecord(
        step=number,
        losses=[result.loss for result in results],
        tokens=[result.tokens for result in results],
        computed_tokens=[result.computed_tokens for result in results],
        trained_tokens=[result.trained_tokens for result in results],
        grad_norms=norms,
        rates=[settings.rate * factor for settings, factor in zip(flat.settings, factors, strict=True)],
        seconds=0.0,
    )


def _reaches_all(result: StepResult) -> bool:
    """Whether a step has a label that attention has to do with: a document's first token sees itself alone."""
    return any(bool((batch.positions_T[batch.labelled_N] > 0).any()) for batch in result.batches)


def _require_gradients(flat: FlatFactors, part: str, asked: Sequence[bool]) -> None:
    """Every B must receive a gradient in the first step and every A in the second, unless the other factor is zero.

    A stack of experts may see no token in one step, and a looked-up embedding no row, so they are not asked; neither is
    an adapter whose step had no label behind a document's first token.
    """
    other = "A" if part == "B" else "B"
    dead = []
    for index, adapter in enumerate(flat.injection.adapters):
        excused = {*adapter.parameter_names, *adapter.embeddings, *flat.all_zero(flat.master, index, other)}
        dead += sorted(flat.all_zero(flat.grad, index, part) - excused) if asked[index] else []
    if dead:
        raise AdapterError(
            f"The factors {part} of these adapted layers received no gradient, so they would never be trained:\n"
            + bullet_list(dead)
            + "\nThe model does not use them in its forward; leave them out with --exclude."
        )


def _versions(base: Base) -> dict[str, int]:
    """How often each frozen weight was written to: torch counts every in-place operation."""
    layers = {name: module for name, module in base.model.named_modules() if READER in module.__dict__}
    stored = {name: sum(t._version for t in module.__dict__[READER].tensors) for name, module in layers.items()}
    return stored | {name: parameter._version for name, parameter in base.model.named_parameters()}


def _require_unchanged(base: Base, before: dict[str, int]) -> None:
    changed = [name for name, version in _versions(base).items() if before.get(name) != version]
    if changed:
        raise AdapterError("These frozen weights were changed by training, which must not be:\n" + bullet_list(changed))


def _fault(step: int, result: StepResult, norm: float, track: Track) -> str | None:
    """What to say of a loss or gradient that is not finite."""
    if math.isfinite(result.loss) and math.isfinite(norm):
        return None
    documents = [document for batch in result.batches for document in batch.documents]
    places = sorted({track.loader.store.place(document) for document in documents})
    rows = [f"{file}, row {row}" if file else f"row {row}" for file, row in places]
    return (
        f"Step {step}: the loss is {result.loss} and the gradient norm {norm}. Nothing was updated. "
        f"The batch held {'; '.join(rows[:20])}{' …' if len(rows) > 20 else ''}. "
        "A lower --lr usually helps; else look at these rows."
    )
