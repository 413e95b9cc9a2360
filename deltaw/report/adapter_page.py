"""inspect.html: the update of one adapter on one page, layer by layer, each number beside what chance would give.

Numbers are those of `deltaw inspect --json` and of the terminal. Heat maps are tables, so that each cell can be read;
its colour begins at the null, so that what is no more than chance stays blank.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes

from deltaw.disk import write_text
from deltaw.engine.run import run_of
from deltaw.report.page import write_report
from deltaw.report.plots import ACCENT, FG, HALF, MUTED, Plot, both
from deltaw.report.quantities import DASH, is_number, percent, significant
from deltaw.report.tables import Table, suffix, table
from deltaw.report.templates import template

Layer = dict[str, Any]
Show = Callable[[Any], str]


@dataclass(frozen=True)
class HeatMap:
    """A table of numbers with a strength from 0 to 1 beside each, for its colour; None where there is none."""

    heading: str
    caption: str
    columns: list[str]
    rows: list[tuple[str, list[tuple[str, float] | None]]]


def write_adapter_page(path: Path, name: str, facts: dict[str, Any], against: str | None = None) -> Path:
    """Writes the page of what `deltaw inspect --json` gives; `against` is the name of the other adapter."""
    layers, beside = facts["spectra"], facts.get("beside", [])
    page = template("adapter.html.jinja").render(
        name=name,
        sentence=_sentence(facts, layers),
        update=_update_maps(layers, beside),
        spectra=_spectra(layers, beside),
        beside=_beside_maps(beside),
        controls=_controls(beside),
        against=against,
        shared=_shared(facts["against"]) if against else "",
        compared=_compared_maps(facts["against"]) if against else [],
        numbers=_numbers(layers),
    )  # fmt: skip
    write_text(path, page)
    return path


def lead_to(page: Path, path: str | Path) -> Path | None:
    """Has the report of the run of an adapter lead to this page, where that lies beside it; None of other pages."""
    run = run_of(Path(path))
    if run is None or page.resolve() != run.inspected.resolve():
        return None
    return write_report(run.folder)


def _sentence(facts: dict[str, Any], layers: Sequence[Layer]) -> str:
    effective = [layer["effective"] for layer in layers]
    ranks = sorted({kind["rank"] for kind in facts.get("layers", [facts])})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    text = f"{len(layers)} layers of {rank}, {facts['parameters']:,} numbers. "
    text += f"Effective rank {min(effective):.1f} to {max(effective):.1f}. "
    if facts.get("variant") == "DoRA":
        text += f"{LOW_RANK_ALONE} "
    return text + "A spectrum says how an update is made, and not what rank a task needs, which deltaw rank measures."


LOW_RANK_ALONE = "Of a DoRA adapter these are figures of the low-rank part alone; its magnitudes change W as well."
_NUMBER = re.compile(r"(^|\.)(\d+)(\.|$)")  # of a block, in the name of a layer


# -- heat maps ---------------------------------------------------------------------------------------------------------


def heat_map(
    heading: str,
    caption: str,
    layers: Sequence[Layer],
    value: Callable[[Layer], float],
    show: Show,
    null: float = 0.0,
    weight: Callable[[float], float] = float,
) -> HeatMap:
    """Blocks by modules; layers of no block stand in a last row. Colour runs from `null` to the largest `weight`."""
    places = _places([layer["name"] for layer in layers])
    columns = list(dict.fromkeys(column for _, column in places))
    cells = {place: value(layer) for place, layer in zip(places, layers, strict=True)}
    blocks = sorted({block for block, _ in cells}, key=lambda block: (block is None, block or 0))
    top = max((weight(number) for number in cells.values() if is_number(number)), default=0.0)

    def cell(number: float | None) -> tuple[str, float] | None:
        return None if number is None else (show(number), _strength(weight(number), null, top))

    rows = [(DASH if b is None else str(b), [cell(cells.get((b, column))) for column in columns]) for b in blocks]
    return HeatMap(heading, caption, columns, rows)


def _places(names: Sequence[str]) -> list[tuple[int | None, str]]:
    """(block, column) of each layer: short columns, but for those that would stand for several layers of a block."""
    places = [(_block(name), suffix(name)) for name in names]
    shared = {column for (_, column), count in Counter(places).items() if count > 1}
    whole = [_NUMBER.sub(r"\1*\3", name, count=1) for name in names]
    return [(block, long if short in shared else short) for (block, short), long in zip(places, whole, strict=True)]


def _block(name: str) -> int | None:
    found = _NUMBER.search(name)
    return int(found[2]) if found else None


def _strength(number: float, null: float, top: float) -> float:
    if not is_number(number) or top <= null:
        return 0.0
    return round(min(1.0, max(0.0, (number - null) / (top - null))), 2)


def _update_maps(layers: Sequence[Layer], beside: Sequence[Layer]) -> list[HeatMap]:
    maps = [heat_map("Size, ‖ΔW‖", "Frobenius norm of each update.", layers, lambda x: x["norm"], significant)]
    if beside:
        about = "Of the weight that each update changes."
        maps = [heat_map("Size beside W, ‖ΔW‖/‖W‖", about, beside, lambda x: x["relative_norm"], percent)]
    about = "exp of the entropy of σ/Σσ (Roy & Vetterli 2007); blank at 1, one direction."
    return [*maps, heat_map("Effective rank", about, layers, lambda x: x["effective"], lambda x: f"{x:.1f}", 1.0)]


def _beside_maps(beside: Sequence[Layer]) -> list[HeatMap]:
    if not beside:
        return []
    amplified = "‖ΔW‖/‖UᵀWV‖ as a multiple of what random directions give: blank at 1 and below (LoRA, table 7)."
    intruders = "Of the ten strongest directions of W + ΔW, those that W does not have. What they mean is contested."
    times = [{**layer, "times": _ratio(layer["amplification"], layer["random"])} for layer in beside]
    return [
        heat_map("Amplification", amplified, times, lambda x: x["times"], significant, 1.0),
        heat_map("Intruder dimensions", intruders, beside, lambda x: x["intruders"], lambda x: f"{x:.0f}"),
    ]


def _ratio(first: float, second: float) -> float:
    return first / second if second else math.nan


def _compared_maps(found: dict[str, Any]) -> list[HeatMap]:
    layers = found["layers"]
    maps = [_overlap_map(found["overlap"][side], side) for side in ("output", "input")]
    about = "Of two updates; blank at 0, where unrelated ones lie, and as dark at −1 as at 1."
    maps.append(heat_map("Cosine", about, layers, lambda x: x["cosine"], lambda x: f"{x:+.2f}", weight=abs))
    about = f"Unrelated updates disagree in {percent(found['sign_conflict_null'])}: blank there and below."
    conflict = heat_map(
        "Sign conflict", about, layers, lambda x: x["sign_conflict"], percent, found["sign_conflict_null"]
    )
    about = "‖(UᵀU − 1)Σ(VᵀV − 1)‖₁/‖Σ‖₁ of both side by side: 0 where a sum keeps both whole."
    return [*maps, conflict, heat_map("Interference", about, layers, lambda x: x["interference"], significant)]


def _overlap_map(found: dict[str, Any], side: str) -> HeatMap:
    """φ(i, j) and its null in one cell; colour counts from the null."""
    rows: list[tuple[str, list[tuple[str, float] | None]]] = []
    for i, phis, nulls in zip(found["first"], found["phi"], found["null"], strict=True):
        cells: list[tuple[str, float] | None] = []
        for phi, null in zip(phis, nulls, strict=True):
            cells.append((f"{phi:.2f} ({null:.2f})", _strength(phi, null, 1.0)))
        rows.append((str(i), cells))
    about = "φ(i, j) of the first i and j directions, mean over layers; in brackets that of random ones (LoRA, fig. 3)."
    return HeatMap(f"Shared directions, {side} side", about, [str(j) for j in found["second"]], rows)


# -- words and numbers -------------------------------------------------------------------------------------------------


def _shared(found: dict[str, Any]) -> str:
    counts = {side: [layer[side]["shared_directions"] for layer in found["layers"]] for side in ("output", "input")}
    said = [f"{median(_known(counts[side])):g} on the {side} side" for side in counts if _known(counts[side])]
    conflict, null = percent(found["sign_conflict"]), percent(found["sign_conflict_null"])
    return (
        f"Cosine {found['cosine']:+.3f} (unrelated: about 0), sign conflict {conflict} (unrelated: {null}). Directions "
        f"shared beyond the 99 % quantile of chance, median over layers: {' and '.join(said) or DASH}. "
        + " ".join(compared_notes(found))
    ).strip()


def compared_notes(found: dict[str, Any]) -> list[str]:
    """What has to be known to read a comparison."""
    notes = []
    if found["same_seed"]:
        notes.append("Both have one seed: if both were new, A began alike, and the input side agrees by that alone.")
    if found["of_first_expert"]:
        notes.append("Of stacked experts φ, shared, angles and interference are those of the first.")
    return notes


def _known(values: Sequence[float]) -> list[float]:
    return [value for value in values if is_number(value)]


def _controls(beside: Sequence[Layer]) -> Table | None:
    """LoRA's table 7 by kind of module: medians over blocks, with both controls."""
    if not beside:
        return None
    groups: dict[str, list[Layer]] = {}
    for layer in beside:
        groups.setdefault(suffix(layer["name"]), []).append(layer)
    keys = ("amplification", "random", "own")
    rows = [
        [
            *(name, percent(median(x["relative_norm"] for x in members))),
            *(significant(median(x[key] for x in members)) for key in keys),
            *(significant(median(x["rounding"] for x in members)), f"{sum(x['intruders'] for x in members)}"),
        ]
        for name, members in groups.items()
    ]
    columns = [("module", "code"), ("‖ΔW‖/‖W‖", "number"), ("amplification", "number"), ("random", "number")]
    return table([*columns, ("W's own", "number"), ("rounding", "number"), ("intruders", "number")], rows)


def _numbers(layers: Sequence[Layer]) -> Table:
    columns = [("layer", "code"), ("‖ΔW‖", "number"), ("σ₁", "number"), ("σ last", "number"), ("effective", "number")]
    rows = [
        [
            *(x["name"], f"{x['norm']:.4g}", f"{x['sigma'][0]:.4g}", f"{x['sigma'][-1]:.2g}"),
            *(f"{x[key]:.1f}" for key in ("effective", "stable", "participation")),
            str(x["energy_90"]),
        ]
        for x in layers
    ]
    return table([*columns, ("stable", "number"), ("participation", "number"), ("energy@90", "number")], rows)


# -- spectra -----------------------------------------------------------------------------------------------------------


def _spectra(layers: Sequence[Layer], beside: Sequence[Layer]) -> list[Plot]:
    """A plot for each kind of module: σ of every block, their median, and two nulls."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer["norm"]:
            groups.setdefault(suffix(layer["name"]), []).append(layer)
    rounding = {layer["name"]: layer["rounding"] for layer in beside}
    return [_spectrum(name, members, rounding) for name, members in groups.items()]


def _spectrum(name: str, members: Sequence[Layer], rounding: dict[str, float]) -> Plot:
    longest = max(len(layer["sigma"]) for layer in members)
    middle = [median(layer["sigma"][k] for layer in members if len(layer["sigma"]) > k) for k in range(longest)]
    flat = median(layer["norm"] / len(layer["sigma"]) ** 0.5 for layer in members)
    known = [rounding[layer["name"]] for layer in members if layer["name"] in rounding]  # stacks are left out
    floor = median(known) if known else None

    def paint(axes: Axes) -> None:
        places = range(1, longest + 1)
        for layer in members:
            axes.plot(places[: len(layer["sigma"])], layer["sigma"], color=ACCENT, linewidth=0.8, alpha=0.25)
        axes.plot(places, middle, color=ACCENT, linewidth=2.4, marker="o", markersize=0 if longest > 1 else 5)
        axes.axhline(flat, color=MUTED, linewidth=1.2, linestyle="--")
        if floor is not None:
            axes.axhline(floor, color=FG, linewidth=1.2, linestyle=":")
        axes.set_yscale("log")
        axes.minorticks_off()

    label = f"Singular values of {name}: median from {middle[0]:.3g} to {middle[-1]:.3g}; evenly spread {flat:.3g}"
    key = f"spectrum-{re.sub(r'[^a-z0-9]+', '-', name.lower())}"
    drawn = both(key, label, HALF, paint, significant, steps=False)
    return Plot(name, "", [("raw", "each block"), ("smooth", "median")], *drawn)
