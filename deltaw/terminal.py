"""What a person sees: the live bar and lines of a run, and tables. Talk goes to stderr, results to stdout.

rich draws; where stderr is no terminal, plain lines are written now and then instead of a bar. Nothing is computed here.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from deltaw.engine.loop import Length
from deltaw.engine.loop import Progress as RunProgress
from deltaw.engine.train import Trainer, Watcher

PLAIN_LINE_SECONDS = 15.0


def human_bytes(number: float) -> str:
    """1.23 GB with GB = 10⁹."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.{0 if number >= 100 * size else 1}f} {unit}"
    return f"{number:.0f} B"


def human_seconds(seconds: float) -> str:
    """4:05 or 1:02:03."""
    minutes, second = divmod(max(0, int(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class _Status(ProgressColumn):
    """The text behind the bar."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("status", ""))


class TerminalWatcher(Watcher):
    """Draws a run: one bar with step, loss, real tokens per second, time left and peak memory; one line per evaluation."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self.live = console.is_terminal and not quiet
        self.bar: Progress | None = None
        self.task: Any = None
        self.loss: float | None = None
        self.rates: list[tuple[int, float]] = []
        self.last_plain_line = 0.0
        self.measured_at = 0.0

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, highlight=False, markup=False)

    def start(self, trainer: Trainer) -> None:
        ready, settings = trainer.ready, trainer.settings
        share = ready.adapter.parameters / ready.base.parameters
        length = f"{trainer.length.steps} steps" if trainer.length.steps else f"{settings.minutes:g} minutes"
        data = ready.summaries["train"]
        for line in (
            f"base      {ready.base.name}, {ready.base.parameters / 1e6:.1f}M parameters, computing in {ready.base.dtype} on {ready.base.device}",
            f"adapter   rank {settings.rank}, alpha {settings.alpha:g}, {len(ready.targets)} layers, {ready.adapter.parameters / 1e6:.2f}M parameters ({share:.2%} of the base)",
            f"data      {data.used:,} documents, {data.tokens:,} tokens, {data.trained_tokens:,} of them trained",
            f"run       {length} of about {settings.batch_tokens:,} tokens, rate {settings.lr:g}, into {trainer.run.folder}",
        ):
            self.say(line)
        if self.live:
            self.bar = Progress(TextColumn("training"), BarColumn(bar_width=24), _Status(), console=self.console)
            self.task = self.bar.add_task("training", total=1.0)
            self.bar.start()

    def step(self, line: dict[str, Any], progress: RunProgress, length: Length) -> None:
        self.loss = line["loss"] if self.loss is None else 0.9 * self.loss + 0.1 * line["loss"]
        self.rates = [*self.rates[-19:], (line["tokens"], line["seconds"])]
        done, left = _done_and_left(progress, length, self.rates)
        text = (
            f"step {line['step']}{f'/{length.steps}' if length.steps else ''}  loss {self.loss:.3f}  "
            f"{_tokens_per_second(self.rates):,.0f} tokens/s  {human_seconds(left)} left  {human_bytes(line['peak_bytes'])}"
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=done, status=text)
        elif time.monotonic() - self.last_plain_line > PLAIN_LINE_SECONDS:
            self.last_plain_line = time.monotonic()
            self.say(text)

    def evaluation(self, line: dict[str, Any], best: bool) -> None:
        self.say(f"step {line['step']}: validation loss {line['eval_loss']:.4f}{' (best)' if best else ''}")

    def measured(self, done: int, total: int) -> None:
        """Progress of a measurement over rows."""
        if self.live and (time.monotonic() - self.measured_at > 0.2 or done == total):
            self.measured_at = time.monotonic()
            self.console.print(f"  {done}/{total} rows", end="\n" if done == total else "\r", highlight=False)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _tokens_per_second(rates: list[tuple[int, float]]) -> float:
    return sum(tokens for tokens, _ in rates) / max(1e-9, sum(seconds for _, seconds in rates))


def _done_and_left(progress: RunProgress, length: Length, rates: list[tuple[int, float]]) -> tuple[float, float]:
    """(share done, seconds left)."""
    if length.steps is None:
        assert length.seconds is not None
        return progress.seconds / length.seconds, length.seconds - progress.seconds
    per_step = sum(seconds for _, seconds in rates) / len(rates)
    return progress.step / length.steps, (length.steps - progress.step) * per_step


# -- results ------------------------------------------------------------------------------------------------------------


def show_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def percent(value: float) -> str:
    """53.1 %."""
    return f"{100 * value:.1f} %"


def results_table(console: Console, results: list[dict[str, Any]]) -> None:
    """Accuracy with its interval, loss and rows, one line per model."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", "accuracy", "95 % interval", "loss", "rows"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in results:
        interval = f"{percent(row['low'])} – {percent(row['high'])}" if "low" in row else ""
        accuracy = percent(row["accuracy"]) if "accuracy" in row else ""
        table.add_row(
            row["label"], accuracy, interval, f"{row['loss']:.3f}" if "loss" in row else "", f"{row['rows']:,}"
        )
    console.print(table)


def samples_table(console: Console, samples: list[dict[str, Any]]) -> None:
    """Answers before and after, beside the reference."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading, width in (("text", 44), ("people say", 10), ("before", 22), ("after", 10)):
        table.add_column(heading, max_width=width, no_wrap=True, overflow="ellipsis")
    for sample in samples:
        text = sample["prompt"].split("\n\n")[0]
        cells = (text, sample["reference"], sample["before"], sample["after"])
        table.add_row(*(Text(str(cell).replace("\n", " ")) for cell in cells))
    console.print(table)


def pairs(console: Console, values: dict[str, Any]) -> None:
    """name and value, one per line."""
    width = max(map(len, values), default=0)
    for name, value in values.items():
        console.print(f"{name:<{width}}  {value}", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def working(console: Console, text: str) -> Iterator[None]:
    """A spinner while something takes a moment."""
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        yield


def inspect_table(console: Console, layers: list[dict[str, Any]]) -> None:
    """One line per kind of adapted layer."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("layer", "count", "rank", "scale", "A", "B", "parameters", "mean ‖ΔW‖"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for row in layers:
        shapes = ("×".join(map(str, row[part])) for part in ("A", "B"))
        norm = f"{row['update_norm']:.4g}"
        table.add_row(
            row["name"],
            str(row["count"]),
            str(row["rank"]),
            f"{row['scale']:g}",
            *shapes,
            f"{row['parameters']:,}",
            norm,
        )
    console.print(table)


CHAT_HELP = "Commands: /base, /adapter or /both choose who answers; /scale 0.5 turns the adapter down; /new forgets; /quit ends."


def chat_loop(console: Console, model: Any, lines: TextIO) -> None:
    """Reads prompts from `lines` and streams the answers of base and adapter; each keeps its own conversation."""
    console.print(CHAT_HELP, highlight=False, markup=False)
    speakers, strength = ["base", "adapter"], 1.0
    histories: dict[str, list[dict[str, str]]] = {"base": [], "adapter": []}
    while True:
        console.print("> ", end="")
        line = lines.readline()
        text = line.strip()
        if not line or text in ("/quit", "/exit"):
            return
        if text in ("/base", "/adapter", "/both"):
            speakers = ["base", "adapter"] if text == "/both" else [text[1:]]
        elif text == "/new":
            histories = {"base": [], "adapter": []}
        elif text.startswith("/scale"):
            strength = _scale(console, text, strength)
        elif text.startswith("/"):
            console.print(CHAT_HELP, highlight=False, markup=False)
        elif text:
            for speaker in speakers:
                model.strength = 0.0 if speaker == "base" else strength
                _answer(console, model, speaker, histories[speaker], text)


def _scale(console: Console, text: str, strength: float) -> float:
    try:
        return float(text.split()[1])
    except (IndexError, ValueError):
        console.print("Say it like: /scale 0.5", highlight=False)
        return strength


def _answer(console: Console, model: Any, speaker: str, history: list[dict[str, str]], text: str) -> None:
    console.print(f"{speaker}: ", end="", style="bold" if speaker == "adapter" else "dim")
    history.append({"role": "user", "content": text})
    answer = model.generate(history, on_text=lambda piece: console.print(piece, end="", markup=False, highlight=False))
    history.append({"role": "assistant", "content": answer})
    console.print()
