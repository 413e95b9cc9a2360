"""report.html: one run on one page, in one file.

Not an analysis: it shows what the run folder holds and computes no more than sums, medians and ratios. The idea that
keeps it short: Python prepares plain values (`headline`, `tables`, `plots`), the template only places them, and what is
missing is an empty value whose section the template leaves out.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np

from deltaw.disk import write_bytes
from deltaw.report import headline, plots, tables
from deltaw.report.contents import ReportContents, mapping, read_contents
from deltaw.report.curves import column, tokens_per_second, window_steps
from deltaw.report.quantities import human_bytes, plain, significant
from deltaw.report.templates import template

FILE_NAME = "report.html"


def write_report(run_folder: Path, contents: ReportContents | None = None) -> Path:
    """The path of a new `report.html` in `run_folder`, made from `contents` or else from what lies in the folder."""
    page = render_page(contents or read_contents(run_folder))
    path = run_folder / FILE_NAME
    write_bytes(path, page.encode("utf-8", "replace"))  # half a surrogate pair is no reason to lose the report
    return path


def render_page(contents: ReportContents) -> str:
    """The whole page as text; the same contents give the same text."""
    return template("page.html.jinja").render(**view(contents))


def view(contents: ReportContents) -> dict[str, Any]:
    """Every value that the template places, by name."""
    return {
        "run_name": contents.run_name,
        "verb": str(contents.summary.get("verb") or "run"),
        "status": headline.status_of(contents),
        "sentence": headline.sentence(contents),
        "message": str(contents.summary.get("message") or ""),
        "notes": contents.notes,
        "cards": headline.cards(contents),
        "plots": figures(contents),
        "evaluations": tables.evaluations(contents),
        "dot_plot": tables.dot_plot(contents),
        "results": tables.results(contents),
        "forgetting_plot": plots.forgetting_plot(contents.forgetting) if contents.forgetting else None,
        "forgetting": tables.forgetting(contents),
        "samples": tables.samples(contents),
        "inspected": contents.inspected,
        "target_groups": tables.target_groups(contents),
        "target_list": tables.target_list(contents),
        "chosen_settings": tables.settings(contents, defaults=False),
        "default_settings": tables.settings(contents, defaults=True),
        "plan": tables.plan(contents),
        "data": tables.data(contents),
        "origin": tables.origin(contents),
        "machine": tables.machine(contents),
        "version": str(mapping(contents.summary.get("origin")).get("deltaw_version") or ""),
        "commands": commands(contents),
    }


def commands(contents: ReportContents) -> list[tuple[str, str]]:
    """What one can do with the run next, as (purpose, command line)."""
    run, summary = shlex.quote(contents.run_name), contents.summary
    verb, ended = str(summary.get("verb")), headline.status_of(contents) in ("done", "stopped early")
    goes_on = verb.endswith("measure") or (verb != "sweep" and not ended)  # a rank may still have to be measured
    held_out = "" if "eval" in mapping(summary.get("data")) or not summary else " --data FILE"
    return [
        *([("Continue from the last checkpoint", f"deltaw train --resume {run}")] if goes_on else []),
        ("Talk to the adapted model", f"deltaw chat {run}"),
        ("Evaluate it on other data", f"deltaw eval {run} --data FILE"),
        ("Measure the rank that it needed", f"deltaw rank {run}{held_out}"),
        ("See its spectra", f"deltaw inspect {run} --page {run}/inspect.html"),
        ("See what it forgot", f"deltaw eval {run} --data FILE --forgetting"),
    ]


def figures(contents: ReportContents) -> list[plots.Plot]:
    """The plots for which there are numbers, loss first."""
    drawn = [_loss_figure(contents), _speed_figure(contents), _memory_figure(contents)]
    drawn += [_norm_figure(contents), _rate_figure(contents)]
    return [figure for figure in drawn if figure]


def _loss_figure(contents: ReportContents) -> plots.Plot | None:
    train = column(contents.steps, "loss", weight="trained_tokens")
    held_out = column(contents.evaluations, "eval_loss")
    if not len(train) and not len(held_out):
        return None
    caption = "Mean over trained tokens, in nats."
    if len(train):
        caption += f" Smoothed: mean over {window_steps(len(train))} steps, centred, weighted by trained tokens."
    return plots.loss_plot(train, held_out, headline.best_evaluation(contents), caption)


def _speed_figure(contents: ReportContents) -> plots.Plot | None:
    speed = tokens_per_second(contents.steps)
    if not len(speed):
        return None
    median, window = significant(float(np.median(speed.values))), window_steps(len(speed))
    caption = f"Median {median}. Smoothed: tokens of {window} steps over their seconds."
    return plots.trace_plot("Tokens per second", caption, speed, plain, noisy=True)


def _memory_figure(contents: ReportContents) -> plots.Plot | None:
    peaks = column(contents.steps, "peak_bytes")
    return (
        plots.trace_plot("Peak memory", "Of the process, at each step.", peaks, human_bytes, noisy=False)
        if len(peaks)
        else None
    )


def _norm_figure(contents: ReportContents) -> plots.Plot | None:
    norms = column(contents.steps, "grad_norm")
    if not len(norms):
        return None
    caption = f"Before clipping. Smoothed: mean over {window_steps(len(norms))} steps, centred."
    return plots.trace_plot("Gradient norm", caption, norms, plain, noisy=True)


def _rate_figure(contents: ReportContents) -> plots.Plot | None:
    rates = column(contents.steps, "lr")
    return plots.trace_plot("Learning rate", "", rates, plain, noisy=False) if len(rates) else None
