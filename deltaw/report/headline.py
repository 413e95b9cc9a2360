"""The top of the page: what the run did, in one sentence and a few figures.

Not a judge: it says what was measured, and where two intervals overlap it says that too. The idea that keeps it short:
one `Change` (before, after, of what) is found once, from the best evidence that the folder holds, and both the
sentence and the first card are made from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltaw.report.contents import Line, ReportContents, mapping, mappings
from deltaw.report.curves import column, smoothed, tokens_per_second
from deltaw.report.quantities import (
    DASH,
    by_name,
    human_bytes,
    human_count,
    human_seconds,
    is_number,
    percent,
    significant,
    whole,
)


@dataclass(frozen=True)
class Change:
    """A measured quantity before and after training; `basis` says on what it was measured, `doubt` what weakens it.

    `steps` are those of both measurements, where neither was made before the first step or after the last; `alone`
    says that the first was of the base without the adapter.
    """

    quantity: str
    before: float
    after: float
    basis: str
    doubt: str = ""
    steps: tuple[int, int] | None = None
    alone: bool = False

    def show(self, value: float) -> str:
        """`value` as this quantity is written: a percentage for accuracy, else three digits."""
        return percent(value) if self.quantity == "accuracy" else significant(value)

    @property
    def verb(self) -> str:
        """How the quantity moved, in one word that fits `… from X to Y`."""
        return "went" if self.before == self.after else "rose" if self.after > self.before else "fell"

    @property
    def improved(self) -> bool:
        """Whether it moved in the direction that is wanted."""
        return self.after > self.before if self.quantity == "accuracy" else self.after < self.before


@dataclass(frozen=True)
class Card:
    """One key figure: a label, the value in large type, a note below it; for a change also where it came from."""

    label: str
    value: str
    note: str = ""
    before: str = ""
    improved: bool = False


def result_labelled(contents: ReportContents, label: str) -> Line:
    """The first result whose label begins with `label`, or an empty one."""
    results = mappings(contents.summary.get("results"))
    return next((row for row in results if str(row.get("label", "")).startswith(label)), {})


def best_evaluation(contents: ReportContents) -> tuple[int, float] | None:
    """Step and loss of the best evaluation, as the run recorded it or else as its metric lines show it."""
    step, loss = contents.summary.get("best_step"), contents.summary.get("best_eval_loss")
    if is_number(step) and is_number(loss):
        return int(step), loss
    losses = [(line["eval_loss"], line["step"]) for line in contents.evaluations if is_number(line["eval_loss"])]
    return (min(losses)[1], min(losses)[0]) if losses else None


def num_steps(contents: ReportContents) -> int:
    """Steps taken: as summed up, or the last one in the metric lines."""
    steps = contents.summary.get("steps")
    return int(steps) if is_number(steps) else contents.steps[-1]["step"] if contents.steps else 0


def total(contents: ReportContents, in_summary: str, in_lines: str) -> float | None:
    """A total from the summary, or summed over the metric lines of a run that left none."""
    summed = contents.summary.get(in_summary)
    if is_number(summed):
        return summed
    values = column(contents.steps, in_lines).values
    return float(values.sum()) if len(values) else None


def measured_change(contents: ReportContents) -> Change | None:
    """What training changed, by the best evidence: results on held-out rows, then evaluations, then training loss."""
    return _change_in_results(contents) or _change_in_evaluations(contents) or _change_in_training(contents)


def _change_in_results(contents: ReportContents) -> Change | None:
    before, after = result_labelled(contents, "base model"), result_labelled(contents, "adapter")
    for quantity in ("accuracy", "loss"):
        if is_number(before.get(quantity)) and is_number(after.get(quantity)):
            basis = f"{whole(after['rows'])} rows" if is_number(after.get("rows")) else ""
            doubt = _doubt(before, after) if quantity == "accuracy" else ""
            return Change(quantity, before[quantity], after[quantity], basis, doubt)
    return None


def _doubt(before: Line, after: Line) -> str:
    """A warning if the two intervals overlap."""
    ends = [row.get(end) for row in (before, after) for end in ("low", "high")]
    if not all(is_number(end) for end in ends):
        return ""
    overlap = before["low"] <= after["high"] and after["low"] <= before["high"]
    return "the intervals overlap, so it may be chance" if overlap else ""


def _change_in_evaluations(contents: ReportContents) -> Change | None:
    losses, best = column(contents.evaluations, "eval_loss"), best_evaluation(contents)
    base = contents.summary.get("base_eval_loss")
    if is_number(base) and best is not None:
        basis = f"from the base alone to step {best[0]}"
        return Change("held-out loss", base, best[1], basis, steps=(0, best[0]), alone=True)
    if len(losses) < 2 or best is None:
        return None
    first = int(losses.steps[0])
    return Change(
        "held-out loss", float(losses.values[0]), best[1], f"steps {first} to {best[0]}", steps=(first, best[0])
    )


def _change_in_training(contents: ReportContents) -> Change | None:
    losses = column(contents.steps, "loss", weight="trained_tokens")
    if len(losses) < 10:
        return None
    values = smoothed(losses).values
    return Change("training loss", float(values[0]), float(values[-1]), "smoothed")


def status_of(contents: ReportContents) -> str:
    """The run's status; a folder without one belongs to a run that is going on or was killed."""
    return str(contents.summary.get("status") or "unfinished")


def sentence(contents: ReportContents) -> str:
    """The result of the run in one or two sentences."""
    steps, seconds = num_steps(contents), total(contents, "train_seconds", "seconds")
    length = f"{steps:,} step{'' if steps == 1 else 's'}"
    effort = length if seconds is None else f"{length} ({human_seconds(seconds)})"
    change = measured_change(contents)
    if change is None:
        told = f"{effort} of training, with no measurement to compare." if steps else "No step has been recorded yet."
    elif change.steps is not None:
        told = _told_of_steps(change, effort)
    else:
        basis = f" on {change.basis}" if change.basis.endswith("rows") else ""
        doubt = f"; {change.doubt}" if change.doubt else ""
        course = f"from {change.show(change.before)} to {change.show(change.after)} in {effort}"
        told = f"{change.quantity.capitalize()}{basis} {change.verb} {course}{doubt}."
    ends = {"unfinished": "This run left no summary: it is going on, or was ended from outside. "}
    return ends.get(status_of(contents), "") + told


def _told_of_steps(change: Change, effort: str) -> str:
    """How a quantity moved between two evaluations, of which the second is the best; `effort` went on behind it."""
    first, best = (f"{step:,}" for step in change.steps or (0, 0))
    if first == best:
        told = f"was never better than {change.show(change.after)}, where it was first measured, at step {first}"
        return f"{change.quantity.capitalize()} {told}; {effort} in all."
    start = "without the adapter" if change.alone else f"at step {first}"
    course = f"from {change.show(change.before)} {start} to {change.show(change.after)} at step {best}, its best"
    return f"{change.quantity.capitalize()} {change.verb} {course}; {effort} in all."


def cards(contents: ReportContents) -> list[Card]:
    """The key figures, those that are known, the change first."""
    makers = (_change_card, _time_card, _speed_card, _tokens_card, _memory_card, _adapter_card, _share_card)
    return [card for card in (make(contents) for make in makers) if card and DASH not in card.value]


def _change_card(contents: ReportContents) -> Card | None:
    change = measured_change(contents)
    if change is None:
        return None
    gain = change.after - change.before
    difference = f"{100 * gain:+.1f} points" if change.quantity == "accuracy" else f"{gain:+.3f}"
    note = ", ".join(filter(None, [difference.replace("-", "\N{MINUS SIGN}"), change.basis, change.doubt]))
    return Card(
        change.quantity.capitalize(), change.show(change.after), note, change.show(change.before), change.improved
    )


def _time_card(contents: ReportContents) -> Card:
    best = best_evaluation(contents)
    note = f"{num_steps(contents):,} steps" + (f", best at {best[0]:,}" if best else "")
    return Card("Training time", human_seconds(total(contents, "train_seconds", "seconds")), note)


def _speed_card(contents: ReportContents) -> Card | None:
    speeds = tokens_per_second(contents.steps).values
    if not len(speeds):
        return None
    gemm = contents.summary.get("gemm_gflops")
    note = "median" + (f"; matrix product {by_name('gemm_gflops', gemm)}" if is_number(gemm) else " over the steps")
    return Card("Tokens per second", significant(float(np.median(speeds))), note)


def _tokens_card(contents: ReportContents) -> Card | None:
    trained, read = total(contents, "trained_tokens", "trained_tokens"), total(contents, "tokens", "tokens")
    note = f"{percent(trained / read)} of {human_count(read)} read" if trained and read else ""
    return Card("Trained tokens", human_count(trained), note)


def _memory_card(contents: ReportContents) -> Card | None:
    logged, summed = column(contents.steps, "peak_bytes").values, contents.summary.get("peak_bytes")
    peaks = [*logged.tolist(), *([summed] if is_number(summed) else [])]  # of every process that the run has had
    peak = max(peaks, default=None)
    where = [str(contents.summary[key]) for key in ("device", "dtype") if contents.summary.get(key)]
    planned = contents.summary.get("plan")
    if planned:
        where.append(f"planned {human_bytes(planned['peak_bytes'])}")
    return Card("Peak memory", human_bytes(peak), ", ".join(where))


def _adapter_card(contents: ReportContents) -> Card:
    sizes = mapping(contents.summary.get("sizes"))
    adapter, base = sizes.get("adapter_bytes"), sizes.get("base_bytes")
    note = f"base model {human_bytes(base)}" if is_number(base) else ""
    return Card("Adapter", human_bytes(adapter), note)


def _share_card(contents: ReportContents) -> Card | None:
    sizes: Mapping[str, Any] = mapping(contents.summary.get("sizes"))
    trained, base = sizes.get("trained_parameters"), sizes.get("base_parameters")
    if not is_number(trained) or not is_number(base) or base <= 0:
        return None
    return Card(
        "Parameters trained", percent(trained / base), f"{human_count(trained)} beside {human_count(base)} frozen"
    )
