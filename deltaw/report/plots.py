"""Curves as inline SVG that follows the page's colours, light or dark.

Not a general plotting layer, and the only module that knows matplotlib; it uses figures as plain objects, never pyplot.
The idea that keeps it short: matplotlib draws with six sentinel colours, and the SVG text is then edited so that each
sentinel becomes a CSS variable of the page. Every plot is drawn twice, wide and narrow, so that its text is as large on
a phone as on a laptop; CSS shows one of the two.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from deltaw.report.curves import Curve, smoothed, thinned
from deltaw.report.quantities import human_count, is_number, plain, significant

# Colours that no other part of an SVG uses, and the variable that takes the place of each.
SENTINELS = {
    "#010f01": "var(--fg)",
    "#010f02": "var(--muted)",
    "#010f03": "var(--line)",
    "#010f04": "var(--accent)",
    "#010f05": "var(--accent-2)",
    "#010f06": "var(--card)",
}
FG, MUTED, LINE, ACCENT, ACCENT_2, CARD = SENTINELS
# Sizes are in the SVG's own units, shown at about 1 px each: a whole row, half a row, a phone.
WIDE, HALF, PHONE = (1000, 360), (480, 230), (340, 230)
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 12.5,
    "font.family": "sans-serif",
    "text.parse_math": False,
}

Format = Callable[[float], str]


@dataclass(frozen=True)
class Plot:
    """One figure of the page: heading, caption, its lines' meaning as (class, text), and the SVG at two widths."""

    heading: str
    caption: str
    key: list[tuple[str, str]]
    wide: str
    narrow: str


def themed(svg: str, name: str, label: str) -> str:
    """Matplotlib's SVG made fit to stand inside a page: themed, named for screen readers, its ids its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box, "matplotlib writes a viewBox"
    # Ids must differ between the SVGs of a page: a clip path inside a hidden SVG would hide what refers to it.
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg).replace("xlink:href", "href")
    # A tenth of a unit is finer than a pixel; six decimals would be half of the page. Tick labels keep theirs.
    svg = re.sub(r'\b(d|x|y|transform)="[^"]*"', lambda found: re.sub(r"(\.\d)\d+", r"\1", found[0]), svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 var(--sans)", svg)
    for sentinel, variable in SENTINELS.items():
        svg = svg.replace(sentinel, variable)
    words = html.escape(label)
    head = (
        f'<svg class="{name.rsplit("-", 1)[-1]}" role="img" aria-label="{words}" {view_box[0]}><title>{words}</title>'
    )
    return re.sub(r"\n\s*", "\n", re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1))


def draw(
    name: str, label: str, size: tuple[int, int], paint: Callable[[Axes], None], show: Format, *, steps: bool = True
) -> str:
    """The SVG of one pair of axes that `paint` fills; `show` writes the numbers beside the vertical axis.

    The horizontal axis counts `steps`, or is as `paint` leaves it.
    """
    # rc_context restores the settings on leaving; the salt makes the ids, and so the page, the same every time.
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": name}):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        _dress(axes, size, show)
        paint(axes)
        if steps:
            _name_steps(axes)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return themed(buffer.getvalue(), name, label)


def _dress(axes: Axes, size: tuple[int, int], show: Format) -> None:
    """Quiet axes: horizontal lines only, no frame, no tick marks."""
    axes.patch.set_alpha(0)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.grid(axis="y", color=LINE, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=MUTED, pad=6)
    # Lower than the numbers at the side, so that "step 0" stands clear of their zero.
    axes.tick_params(axis="x", pad=9)
    axes.xaxis.set_major_locator(MaxNLocator(8 if size[0] > 600 else 4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6 if size[1] > 300 else 4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
    axes.margins(x=0.01)


def _name_steps(axes: Axes) -> None:
    """Step numbers below the axis, the first as "step 0": a name beside the numbers costs no line of its own."""
    first, last = axes.get_xlim()
    ticks = [round(tick) for tick in axes.get_xticks() if first <= tick <= last]
    axes.set_xticks(ticks, labels=["step " * (i == 0) + human_count(tick) for i, tick in enumerate(ticks)])


def both(
    name: str, label: str, width: tuple[int, int], paint: Callable[[Axes], None], show: Format, *, steps: bool = True
) -> list[str]:
    """The SVG at `width` and at a phone's; see `draw`."""
    sizes = (("wide", width), ("narrow", PHONE))
    return [draw(f"{name}-{kind}", label, size, paint, show, steps=steps) for kind, size in sizes]


def _span(curve: Curve, show: Format = significant) -> str:
    """Words for those who cannot see the curve."""
    ends = f"from {show(curve.values[0])} to {show(curve.values[-1])}"
    return f"{ends} over steps {curve.steps[0]:,.0f} to {curve.steps[-1]:,.0f}"


def _line(axes: Axes, curve: Curve, colour: str, width: float, alpha: float = 1.0) -> None:
    """A thinned line; a lone point as a dot, since a line of one point is invisible."""
    points = thinned(curve)
    marker = "o" if len(points) == 1 else ""
    axes.plot(points.steps, points.values, color=colour, linewidth=width, alpha=alpha, marker=marker, markersize=5)


def loss_plot(train: Curve, held_out: Curve, best: tuple[int, float] | None, caption: str) -> Plot:
    """Training loss, raw and smoothed, with the evaluations and the best of them."""
    smooth = smoothed(train)
    low, high, outside = _frame(train, smooth, held_out)

    def paint(axes: Axes) -> None:
        if len(train):
            _line(axes, train, ACCENT, 1.0, alpha=0.4)
            _line(axes, smooth, ACCENT, 2.4)
        if len(held_out):
            # Dots further apart than they are wide, on a phone too.
            dots = thinned(held_out, int(axes.bbox.width / 12))
            axes.plot(held_out.steps, held_out.values, color=ACCENT_2, linewidth=1.2, alpha=0.6)
            axes.plot(dots.steps, dots.values, "o", color=ACCENT_2, markersize=5.5, markeredgecolor=CARD, clip_on=False)
        axes.set_ylim(low, high)
        if best:
            _mark_best(axes, best)

    words = [f"smoothed training loss {_span(smooth)}"] if len(train) else []
    words += [f"held-out loss {_span(held_out)}"] if len(held_out) else []
    words += [f"best {significant(best[1], 4)} at step {best[0]:,}"] if best else []
    key = [("raw", "each step"), ("smooth", "smoothed")] if len(train) else []
    key += [("points", "held out")] if len(held_out) else []
    key += [("best", "best")] if best else []
    return Plot(
        "Loss", caption + _outside(outside), key, *both("loss", "Loss: " + "; ".join(words), WIDE, paint, plain)
    )


def _frame(train: Curve, smooth: Curve, held_out: Curve) -> tuple[float, float, int]:
    """Lower and upper edge of the loss plot and how many steps lie outside.

    Steps with three trained tokens have losses that would press the curve flat; the outermost hundredth on either
    side may leave the frame, the smoothed curve and the evaluations never.
    """
    shown = np.concatenate([np.quantile(train.values, [0.01, 0.99]) if len(train) else [], smooth.values])
    shown = np.concatenate([shown, held_out.values])
    # Room below for the words at the best point.
    margin = 0.08 * (shown.max() - shown.min()) or 0.1 * abs(shown.max()) or 1.0
    low, high = shown.min() - 1.5 * margin, shown.max() + margin
    return low, high, int(((train.values < low) | (train.values > high)).sum())


def _mark_best(axes: Axes, best: tuple[int, float]) -> None:
    """A ring around the best evaluation, and its loss in words that stay inside the frame."""
    step, loss = best
    axes.plot(
        [step], [loss], "o", color=ACCENT_2, markersize=12, clip_on=False, markerfacecolor="none", markeredgewidth=2
    )
    first, last = axes.get_xlim()
    beyond_middle = step > (first + last) / 2
    place = {"xytext": (10 if beyond_middle else -10, -20), "textcoords": "offset points", "va": "center"}
    note = axes.annotate(
        f"best {significant(loss)} at step {step:,}",
        (step, loss),
        ha="right" if beyond_middle else "left",
        color=FG,
        fontweight="bold",
        **place,  # type: ignore[arg-type]
    )
    note.set_gid("note")


def trace_plot(heading: str, caption: str, curve: Curve, show: Format, noisy: bool) -> Plot:
    """One quantity per step, from zero up; if `noisy`, faint with its smoothed course on top."""
    course = smoothed(curve) if noisy else curve
    top = _ceiling(curve, course)

    def paint(axes: Axes) -> None:
        if noisy:
            _line(axes, curve, ACCENT, 1.0, alpha=0.4)
        _line(axes, course, ACCENT, 2.2)
        axes.set_ylim(0, top)

    name = re.sub(r"\W+", "-", heading.lower())
    key = [("raw", "each step"), ("smooth", "smoothed")] if noisy else []
    caption += _outside(int((curve.values > top).sum()))
    return Plot(heading, caption, key, *both(name, f"{heading}: {_span(course, show)}", HALF, paint, show))


def _ceiling(curve: Curve, course: Curve) -> float:
    """The upper edge: above all points, unless a few far ones would press the rest flat; above the course always."""
    highest, usual = float(curve.values.max()), float(np.quantile(curve.values, 0.99))
    top = highest if highest <= 2 * usual else max(usual, float(course.values.max()))
    return 1.1 * top or 1.0


def _outside(num_steps: int) -> str:
    """A sentence for the caption if points lie outside the frame."""
    return f" {num_steps} step{'s lie' if num_steps > 1 else ' lies'} outside the frame." if num_steps else ""


def forgetting_plot(lines: Sequence[Mapping[str, Any]]) -> Plot:
    """Gain against forgetting: loss on the data, or KL where that is not known, over the change on neutral text.

    A point for each strength of the adapter, with the 95 % interval of the change; 0 is the base.
    """
    on_data = all(is_number(line.get("data_loss")) for line in lines)
    values = [line["data_loss"] if on_data else line["kl"] for line in lines]

    def paint(axes: Axes) -> None:
        axes.plot([line["change"] for line in lines], values, color=ACCENT, linewidth=2)
        for line, value in zip(lines, values, strict=True):
            if is_number(line.get("change_low")) and is_number(line.get("change_high")):
                axes.plot(
                    [line["change_low"], line["change_high"]], [value] * 2, color=ACCENT_2, linewidth=1, alpha=0.6
                )
            axes.plot([line["change"]], [value], "o", color=ACCENT_2, markersize=5.5, markeredgecolor=CARD)
            place = {"xytext": (0, 8), "textcoords": "offset points"}
            axes.annotate(plain(line["strength"]), (line["change"], value), ha="center", color=FG, **place)  # type: ignore[arg-type]
        axes.margins(x=0.08, y=0.18)

    first, last = lines[0], lines[-1]
    what = "loss on the data" if on_data else "KL to the base"
    label = f"{what} from {significant(values[0])} to {significant(values[-1])} while loss on neutral text changes by "
    label += f"{significant(last['change'] - first['change'])}, over strengths of the adapter"
    caption = f"{what[0].upper()}{what[1:]} over the change in loss on neutral text"
    count = last.get("documents")
    documents = f" of {count} document{'' if count == 1 else 's'}" if is_number(count) else ""
    caption += (
        f"{documents}; bars are 95 % intervals."
        if is_number(last.get("change_low"))
        else f"{documents}, too few for intervals."
    )
    drawn = both("forgetting", label, WIDE, paint, significant, steps=False)
    return Plot("Gain against forgetting", caption, [("points", "strength")], *drawn)
