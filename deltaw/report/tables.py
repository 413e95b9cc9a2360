"""The tables of the page: results, what was adapted, settings, data, origin, evaluations; and the samples.

Not markup: cells are plain text, and the template escapes them. The idea that keeps it short: every table is a `Table`
of columns and rows, so the template draws all of them with one macro; a column that nothing fills is not shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from deltaw.report.contents import Line, ReportContents, mapping, mappings
from deltaw.report.quantities import (
    DASH,
    SPACE,
    by_name,
    human_bytes,
    human_count,
    human_seconds,
    is_number,
    percent,
    plain,
    significant,
    title,
    whole,
)

# Settings that name places, of which the folders above would say whose they are; what of an origin is no name.
PLACES, LONG = ("model", "data", "eval_data", "adapter", "out"), ("config", "template_examples")
# Keys of `machine` that would say whose machine it was: a report is made to be passed on.
PRIVATE = ("host", "node", "user", "path", "address", "serial")


@dataclass(frozen=True)
class Table:
    """Columns as (heading, kind) and rows of text; the kind is "text", "code", "tag" or "number"."""

    columns: list[tuple[str, str]]
    rows: list[list[str]]

    def __bool__(self) -> bool:
        return bool(self.rows)


def table(columns: list[tuple[str, str]], rows: list[list[str]]) -> Table:
    """A Table without the columns in which every cell is empty or a dash."""
    kept = [i for i in range(len(columns)) if any(row[i] not in ("", DASH) for row in rows)]
    return Table([columns[i] for i in kept], [[row[i] for i in kept] for row in rows])


def results(contents: ReportContents) -> Table:
    """Accuracy with its interval, loss and perplexity of each way to do the task."""
    columns = [("", "text"), ("accuracy", "number"), ("interval", "number"), ("loss", "number")]
    columns += [("perplexity", "number"), ("rows", "number")]
    return table(columns, [_result_row(row) for row in mappings(contents.summary.get("results"))])


def _result_row(row: Line) -> list[str]:
    low, high = row.get("low"), row.get("high")
    interval = f"{100 * low:.1f} to {percent(high)}" if is_number(low) and is_number(high) else DASH
    measures = [significant(row.get("loss")), significant(row.get("perplexity")), whole(row.get("rows"))]
    return [str(row.get("label", "")), percent(row.get("accuracy")), interval, *measures]


@dataclass(frozen=True)
class Dot:
    """One row of the dot plot; positions are percentages of its axis."""

    label: str
    text: str
    centre: float
    left: float
    width: float
    is_adapter: bool


@dataclass(frozen=True)
class DotPlot:
    """Accuracies with their intervals on one axis; `ticks` are (position in percent, text)."""

    dots: list[Dot]
    ticks: list[tuple[float, str]]


def dot_plot(contents: ReportContents) -> DotPlot | None:
    """The results' accuracies, on an axis from the ten below the lowest end to the ten above the highest."""
    rows = [row for row in mappings(contents.summary.get("results")) if is_number(row.get("accuracy"))]
    if not rows:
        return None
    ends = [_interval(row) for row in rows]
    # The 1e-9 keeps 0.7 · 10 = 7.000000000000001 from reaching for the next ten.
    first = math.floor(min(low for low, _ in ends) * 10 + 1e-9)
    last = max(math.ceil(max(high for _, high in ends) * 10 - 1e-9), first + 1)

    def place(value: float) -> float:
        return round(100 * (10 * value - first) / (last - first), 2)

    stride = 1 if last - first <= 5 else 2
    ticks = [(place(ten / 10), f"{10 * ten}{SPACE}%") for ten in range(first, last + 1, stride)]
    dots = [
        _dot(row, place(low), place(high), place(row["accuracy"])) for row, (low, high) in zip(rows, ends, strict=True)
    ]
    return DotPlot(dots, ticks)


def _interval(row: Line) -> tuple[float, float]:
    """The ends of a result's interval; the value itself where one is not known."""
    centre = row["accuracy"]
    low, high = row.get("low"), row.get("high")
    return (low if is_number(low) else centre), (high if is_number(high) else centre)


def _dot(row: Line, low: float, high: float, centre: float) -> Dot:
    label = str(row.get("label", ""))
    return Dot(label, percent(row["accuracy"]), centre, low, round(high - low, 2), label.startswith("adapter"))


def forgetting(contents: ReportContents) -> Table:
    """One row per strength of the adapter: loss on the data and on neutral text, its change, and KL to the base."""
    columns = [("strength", "number"), ("loss on the data", "number"), ("on neutral text", "number")]
    rows = [
        [
            *(plain(line["strength"]), significant(line.get("data_loss"), 4), significant(line["loss"], 4)),
            f"{line['change']:+.4f} ({_signed(line.get('change_low'))} to {_signed(line.get('change_high'))})",
            *(significant(line["kl"]), significant(line.get("prompt_kl"))),
        ]
        for line in contents.forgetting
    ]
    distances = [("KL to the base", "number"), ("KL on prompts", "number")]
    return table([*columns, ("change", "number"), *distances], rows)


def _signed(value: Any) -> str:
    return f"{value:+.4f}" if is_number(value) else DASH


def suffix(name: str) -> str:
    """What stands behind the layer's number: model.layers.0.self_attn.q_proj → self_attn.q_proj.

    A second number becomes a star (experts.*.w1); a name without a number stays whole.
    """
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    starred = ["*" if part.isdigit() else part for part in parts]
    return ".".join(starred[first + 1 :] or starred)


def _spread(values: list[Any]) -> str:
    """The one value, or lowest to highest."""
    known = sorted({value for value in values if is_number(value)})
    if not known:
        return DASH
    return " to ".join(dict.fromkeys(map(plain, (known[0], known[-1]))))


def _shape(target: Line) -> str:
    shape = target.get("shape")
    return " × ".join(map(str, shape)) if isinstance(shape, list) else DASH


def target_groups(contents: ReportContents) -> Table:
    """The adapted modules, those of one name in all layers together, with a total if there is more than one group."""
    targets = mappings(contents.summary.get("targets"))
    groups: dict[str, list[Line]] = {}
    for target in targets:
        groups.setdefault(suffix(str(target.get("name", ""))), []).append(target)
    rows = [_group_row(name, members) for name, members in groups.items()]
    if len(groups) > 1:
        everything = _group_row("together", targets)
        rows.append([*everything[:1], "", *everything[2:3], "", *everything[4:]])
    columns = [("module", "code"), ("kind", "text"), ("count", "number"), ("shape", "number"), ("rank", "number")]
    return table([*columns, ("alpha", "number"), ("parameters", "number")], rows)


def _group_row(name: str, members: list[Line]) -> list[str]:
    shapes = sorted({_shape(member) for member in members})
    kinds = sorted({str(member.get("kind", "")) for member in members})
    parameters = sum(member["parameters"] for member in members if is_number(member.get("parameters")))
    ranks, alphas = [m.get("rank") for m in members], [m.get("alpha") for m in members]
    shape = shapes[0] if len(shapes) == 1 else f"{len(shapes)} shapes"
    return [name, ", ".join(kinds), whole(len(members)), shape, _spread(ranks), _spread(alphas), whole(parameters)]


def target_list(contents: ReportContents) -> Table:
    """Every adapted module by its full name."""
    columns = [("module", "code"), ("shape", "number"), ("rank", "number"), ("alpha", "number")]
    targets = mappings(contents.summary.get("targets"))
    rows = [
        [str(t.get("name", "")), _shape(t), *(by_name(key, t.get(key)) for key in ("rank", "alpha", "parameters"))]
        for t in targets
    ]
    return table([*columns, ("parameters", "number")], rows)


def settings(contents: ReportContents, defaults: bool) -> Table:
    """The settings left at their default, or those that something chose, each with what chose it."""
    rows = [
        [name, _setting_text(name, setting.get("value")), str(setting.get("source", ""))]
        for name, setting in contents.settings.items()
        if (setting.get("source") == "default") == defaults
    ]
    return table([("setting", "code"), ("value", "code"), ("from", "tag")], rows)


def _setting_text(name: str, value: Any) -> str:
    """A value as the config file has it: text bare, everything else as JSON; of a path only its last name."""
    if name in PLACES:
        value = [_last_name(each) for each in value] if isinstance(value, list) else _last_name(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _last_name(value: Any) -> Any:
    """The last name of an absolute path, with the options of a data source behind it; anything else as it is."""
    path, options, rest = value.partition("::") if isinstance(value, str) else ("", "", "")
    return f"{PurePath(path).name}{options}{rest}" if path.startswith("/") else value


def data(contents: ReportContents) -> Table:
    """One row per quantity and one column per split."""
    splits = {str(name): mapping(split) for name, split in mapping(contents.summary.get("data")).items()}
    keys = list(dict.fromkeys(str(key) for split in splits.values() for key in split))
    rows = [[title(key), *(by_name(key, split.get(key)) for split in splits.values())] for key in keys]
    return table([("", "text"), *((title(name), "number") for name in splits)], rows)


def origin(contents: ReportContents) -> Table:
    """Where the base, template, data and configuration came from: names and digests."""
    return _pairs({key: value for key, value in mapping(contents.summary.get("origin")).items() if key not in LONG})


def plan(contents: ReportContents) -> Table:
    """What the run was said to cost before it began, and what it cost."""
    said, summary = mapping(contents.summary.get("plan")), contents.summary
    if not said:
        return Table([], [])
    peak, steps = said.get("peak_bytes_interval") or [None, None], summary.get("steps")
    between = [said.get("step_seconds"), *(said.get("step_seconds_interval") or [None, None])]
    times = [human_seconds(value * steps if is_number(value) and is_number(steps) else None) for value in between]
    parts = mapping(mapping(said.get("phases")).get(str(said.get("peak_phase"))))
    took = ": ".join(filter(None, (summary.get("computing") or summary.get("way"), summary.get("slow_reason"))))
    choice = [f"{title(str(name))}: {value}" for name, value in mapping(said.get("choice")).items()]
    rows = [
        ["Peak memory", *(human_bytes(said.get("peak_bytes")), f"{human_bytes(peak[0])} to {human_bytes(peak[1])}"),
         human_bytes(summary.get("peak_bytes"))],
        ["Time of the steps", times[0], f"{times[1]} to {times[2]}", human_seconds(summary.get("train_seconds"))],
        ["At the peak", ", ".join(f"{part} {human_bytes(size)}" for part, size in parts.items() if size), "", ""],
        ["How it was fitted", ", ".join(choice), "", ""],
        ["Computed by", said.get("way") or "", "", took],
    ]  # fmt: skip
    return table([("", "text"), ("planned", "text"), ("interval", "number"), ("took", "number")], rows)


def machine(contents: ReportContents) -> Table:
    """What the run ran on, without anything that names the machine or its owner."""
    known = dict(mapping(contents.summary.get("machine")))
    known |= {key: contents.summary[key] for key in ("device", "dtype", "gemm_gflops") if key in contents.summary}
    return _pairs({key: value for key, value in known.items() if not any(word in key.lower() for word in PRIVATE)})


def _pairs(values: Mapping[str, Any]) -> Table:
    """Two columns, names and values."""
    shown = [[title(str(key)), by_name(str(key), value)] for key, value in values.items() if value is not None]
    return table([("", "text"), ("", "code")], shown)


def evaluations(contents: ReportContents) -> Table:
    """Every evaluation on held-out data, in numbers."""
    columns = [("step", "number"), ("held-out loss", "number"), ("perplexity", "number"), ("tokens", "number")]
    return table([*columns, ("time", "number")], [_evaluation_row(line) for line in contents.evaluations])


def _evaluation_row(line: Line) -> list[str]:
    loss = line["eval_loss"]
    # exp overflows beyond 709; a loss of 50 has no perplexity worth printing anyway.
    perplexity = math.exp(loss) if is_number(loss) and loss < 50 else None
    loss_text = f"{loss:.4f}" if is_number(loss) else DASH
    tokens, seconds = human_count(line.get("eval_tokens")), human_seconds(line.get("eval_seconds"))
    return [whole(line["step"]), loss_text, significant(perplexity), tokens, seconds]


@dataclass(frozen=True)
class Answer:
    """One text of a sample and whether it equals the reference, capitals and outer blanks apart."""

    heading: str
    text: str
    equals_reference: bool


@dataclass(frozen=True)
class Sample:
    """A prompt with its answers: reference, before, after; those that are known."""

    prompt: str
    answers: list[Answer]


def samples(contents: ReportContents) -> list[Sample]:
    """The samples, in the order of the summary."""
    return [_sample(row) for row in mappings(contents.summary.get("samples"))]


def _sample(row: Line) -> Sample:
    reference = row.get("reference")

    def equals(key: str) -> bool:
        known = reference is not None and key != "reference"
        return known and str(row[key]).strip().casefold() == str(reference).strip().casefold()

    keys = [key for key in ("reference", "before", "after") if row.get(key) is not None]
    return Sample(str(row.get("prompt", "")), [Answer(key, str(row[key]).strip(), equals(key)) for key in keys])
