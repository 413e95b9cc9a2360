"""The bar chart of tokens per second for the README: an SVG that reads on a light and on a dark page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

BARS = (
    ("deltaw", "tools", "deltaw", "#2f6fde"),
    ("unsloth", "tools", "Unsloth, {}", "#e08a2e"),
    ("trl", "tools", "PEFT + TRL, {}", "#8a8f98"),
    ("trl", "defaults", "PEFT + TRL, defaults", "#c3c7cd"),
)
TEXT, LINE = "#6b7280", "#9ca3af"
NAMES = {
    "short": "short chats",
    "docstrings": "docstrings",
    "dense": "rows of 1,024 tokens",
    "shared": "shared system prompt",
}


def _rates(cells: dict[str, Any], tool: str, kind: str) -> list[float]:
    return [cell[kind].get(tool, {}).get("tokens_per_second", 0.0) for cell in cells.values()]


def draw(found: dict[str, Any], file: Path) -> None:
    """Writes the chart; a bar that was not measured is left out."""
    cells = found["workloads"]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "speed", "font.size": 12}):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        shown = [bar for bar in BARS if any(_rates(cells, *bar[:2]))]
        for number, (tool, kind, words, colour) in enumerate(shown):
            rates = _rates(cells, tool, kind)
            places = [place + (number - (len(shown) - 1) / 2) * 0.2 for place in range(len(cells))]
            bars = axes.bar(places, rates, width=0.18, color=colour, label=words.format(found["rivals_at"]))
            axes.bar_label(bars, [f"{rate:.0f}" if rate else "" for rate in rates], color=TEXT, padding=2, fontsize=10)
        axes.set_xticks(range(len(cells)), [NAMES[name] for name in cells])
        axes.set_ylabel("tokens per second", color=TEXT)
        axes.set_title(f"LoRA on SmolLM2-135M, {found['machine']['cores']} CPU cores", color=TEXT, loc="left")
        axes.spines[["left", "right", "top"]].set_visible(False)
        axes.spines["bottom"].set_color(LINE)
        axes.tick_params(length=0, labelcolor=TEXT)
        figure.legend(loc="outside lower center", ncols=len(shown), frameon=False, labelcolor=TEXT)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", encoding="utf-8") as out:
            FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
