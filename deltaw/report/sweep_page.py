"""sweep.html: the cells of a sweep on one page. Loss against rank, loss against parameters with its Pareto front."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from deltaw.analysis.curve import FEWEST
from deltaw.disk import write_bytes
from deltaw.report.plots import ACCENT, ACCENT_2, HALF, MUTED, Plot, both
from deltaw.report.quantities import human_bytes, human_count, human_seconds, significant
from deltaw.report.templates import template

FILE_NAME = "sweep.html"
# Lines of different rates: solid, dashed, dotted, dash-dotted, and again.
DASHES = ("-", "--", ":", "-.")
LABEL_POINTS = 11.0  # from the middle of one name at the end of a line to that of the next
HEADINGS = ("cell", "rank", "rate", "seed", "parameters", "held-out loss", "behind the best", "none smaller as good")


def write_sweep_page(folder: Path, result: dict[str, Any]) -> Path:
    """The path of a new sweep.html in `folder`, made of what `deltaw.sweeps.sweep` returns."""
    cells = sorted((cell for cell in result["cells"] if cell["loss"] is not None), key=lambda cell: cell["loss"])
    page = template("sweep.html.jinja").render(
        name=folder.resolve().name,
        sentence=_sentence(cells, result),
        plots=[_by_rank(cells), _by_parameters(cells)] if cells else [],
        headings=HEADINGS,
        rows=[cell_row(cell) for cell in cells],
    )
    path = folder / FILE_NAME
    write_bytes(path, page.encode("utf-8", "replace"))
    return path


def _sentence(cells: list[dict[str, Any]], result: dict[str, Any]) -> str:
    spent = f"{len(result['cells'])} adapters over one base in {human_seconds(result['seconds'])}"
    spent += f", up to {result['steps']} steps each; peak memory {peak_of(result)}."
    spent = " ".join([spent, *cautions(result)])
    if not cells:
        return spent
    groups = sorted(result["groups"], key=lambda group: group["loss"])
    best = groups[0]
    alike = [group for group in groups if group["behind_low"] <= 0]
    if result["documents"] < FEWEST:
        alike = groups
    smallest = min(alike, key=lambda group: group["parameters"])
    seeds = f", mean of {best['seeds']} seeds" if best["seeds"] > 1 else ""
    base = f"; the base alone {result['base_loss']:.4f}" if result.get("base_loss") is not None else ""
    text = f"{spent} Best: rank {best['rank']} at {best['lr']:g}, loss {best['loss']:.4f}{seeds}{base}."
    if smallest["parameters"] < best["parameters"]:
        text += f" Rank {smallest['rank']} at {smallest['lr']:g} is smaller and not surely worse."
    return f"{text} Intervals are over documents, and know nothing of what another seed would give."


def peak_of(result: dict[str, Any]) -> str:
    """The peak, beside what was planned for all together and for the largest alone."""
    peak, planned = human_bytes(result["peak_bytes"]), result.get("planned")
    if not planned:
        return peak
    together, alone = (human_bytes(planned[name]) for name in ("peak_bytes", "largest_alone_bytes"))
    return f"{peak} (planned {together}; the largest alone {alone})"


def cautions(result: dict[str, Any]) -> list[str]:
    """Sentences on what is not compared, or not to be trusted."""
    said, diverged = [], [cell["name"] for cell in result["cells"] if cell["fault"]]
    if diverged:
        said.append(f"Diverged, and left out: {', '.join(diverged)}.")
    compared = {(group["rank"], group["lr"]) for group in result["groups"]}
    asked = dict.fromkeys((cell["rank"], cell["lr"]) for cell in result["cells"])
    if compared and (missing := [f"rank {rank} at {rate:g}" for rank, rate in asked if (rank, rate) not in compared]):
        said.append(f"Not compared, as a seed diverged: {', '.join(missing)}.")
    if not result["documents"]:
        said.append("Nothing was held out, so no loss is compared; give --eval-data.")
    elif result["documents"] < FEWEST:
        said.append(f"Only {result['documents']} held-out documents: too few for intervals to mean anything.")
    return said


def cell_row(cell: dict[str, Any]) -> tuple[str, ...]:
    """A cell that was measured under `HEADINGS`."""
    behind = f"{cell['behind']:+.4f} ({cell['behind_low']:+.4f} to {cell['behind_high']:+.4f})"
    return (
        cell["name"], str(cell["rank"]), f"{cell['lr']:g}", str(cell["seed"]), f"{cell['parameters']:,}",
        f"{cell['loss']:.4f}", behind, "yes" if cell["pareto"] else "",
    )  # fmt: skip


def _by_rank(cells: list[dict[str, Any]]) -> Plot:
    """Loss against rank, a line for each rate, with the interval of the distance to the best cell."""
    best = min(cell["loss"] for cell in cells)
    ranks = sorted({cell["rank"] for cell in cells})

    def paint(axes: Axes) -> None:
        ends = []
        for number, rate in enumerate(sorted({cell["lr"] for cell in cells})):
            mine = sorted((cell for cell in cells if cell["lr"] == rate), key=lambda cell: cell["rank"])
            means = [_mean([cell["loss"] for cell in mine if cell["rank"] == rank]) for rank in ranks]
            known = [(rank, mean) for rank, mean in zip(ranks, means, strict=True) if mean is not None]
            axes.plot(*zip(*known, strict=True), DASHES[number % len(DASHES)], color=ACCENT, linewidth=2)
            ends.append((*known[-1], f"{rate:g}"))
        for cell in cells:
            span = [best + cell["behind_low"], best + cell["behind_high"]]
            axes.plot([cell["rank"]] * 2, span, color=ACCENT_2, linewidth=1.2, alpha=0.6)
            axes.plot([cell["rank"]], [cell["loss"]], "o", color=ACCENT_2, markersize=5)
        _logarithmic(axes, ranks, [str(rank) for rank in ranks])
        axes.margins(x=0.12)
        _label_ends(axes, ends)

    label = "Held-out loss against rank, a line for each learning rate"
    caption = "Lines are learning rates; bars are 95 % intervals of the distance to the best cell, paired by document."
    return Plot(
        "Loss against rank",
        caption,
        [("points", "a cell")],
        *both("by-rank", label, HALF, paint, _telling_apart(cells), steps=False),
    )


def _telling_apart(cells: list[dict[str, Any]]) -> Callable[[float], str]:
    """How losses are written on an axis: with as many digits as tell these cells apart."""
    losses = [cell["loss"] for cell in cells]
    spread = max(losses) - min(losses)
    needed = 1 + math.ceil(math.log10(max(losses) / spread)) if spread > 0 else 0
    return partial(significant, digits=min(max(3, needed), 6))


def _label_ends(axes: Axes, ends: list[tuple[float, float, str]]) -> None:
    """Names lines at their ends (x, y, text), each name far enough above the one below it."""
    axes.autoscale_view()
    free = 0.0
    for x, y, text in sorted(ends, key=lambda end: end[1]):
        height = float(axes.transData.transform((x, y))[1]) * 72 / axes.figure.dpi  # in points
        up, free = max(0.0, free - height), max(free, height) + LABEL_POINTS
        axes.annotate(text, (x, y), xytext=(4, up), textcoords="offset points", color=MUTED, va="center")


def _by_parameters(cells: list[dict[str, Any]]) -> Plot:
    """Loss against trained numbers; the cells that none is both smaller and better than are joined."""
    front = sorted((cell for cell in cells if cell["pareto"]), key=lambda cell: cell["parameters"])
    sizes = sorted({cell["parameters"] for cell in cells})

    def paint(axes: Axes) -> None:
        axes.plot([c["parameters"] for c in cells], [c["loss"] for c in cells], "o", color=ACCENT_2, markersize=5)
        axes.plot([c["parameters"] for c in front], [c["loss"] for c in front], color=ACCENT, linewidth=2)
        _logarithmic(axes, sizes, [human_count(size) for size in sizes])
        axes.margins(x=0.08)

    label = "Held-out loss against trained parameters, with the Pareto front"
    caption = "The line joins the cells that no other is both smaller and better than."
    return Plot(
        "Loss against parameters",
        caption,
        [("points", "a cell")],
        *both("by-parameters", label, HALF, paint, _telling_apart(cells), steps=False),
    )


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _logarithmic(axes: Axes, places: list[int], labels: list[str]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(places, labels=labels)
