"""What a person sees: the live bar and lines of a run, and tables. Talk goes to stderr, results to stdout.

rich draws; where stderr is no terminal, or NO_COLOR is set, plain lines are written now and then instead of a bar, and
no escape code at all. Nothing is computed here.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

from deltaw.engine.watcher import Watcher
from deltaw.errors import DeltawError

if TYPE_CHECKING:
    from deltaw.engine.loop import Length
    from deltaw.engine.loop import Progress as RunProgress
    from deltaw.engine.train import Trainer

PLAIN_LINE_SECONDS = 15.0
PLAIN_WIDTH = 120
UNBOUNDED = 1_000_000
SHOW_CURSOR = b"\x1b[?25h"


class _Console(Console):
    """rich's console, except that a broken pipe stays an error, which the command line knows how to end with."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError

    def print(self, *objects: Any, **options: Any) -> None:
        """A whole table keeps its columns also where the terminal is narrower and has to break its lines."""
        if len(objects) == 1 and isinstance(objects[0], WholeTable):
            objects[0].width = self.measure(objects[0], options=self.options.update(width=UNBOUNDED)).maximum
            options["crop"] = False
        super().print(*objects, **options)


class WholeTable(Table):
    """A table of numbers, none of which may be cut."""


def plain_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table without lines, its first column to the left and the others to the right."""
    table = WholeTable(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def make_console(stderr: bool = False) -> Console:
    """The console for results (stdout) or for talk (stderr), plain unless it is a terminal that may have colour."""
    stream = sys.stderr if stderr else sys.stdout
    if stream.isatty() and not os.environ.get("NO_COLOR"):
        return _Console(file=stream, emoji=False)
    return _Console(file=stream, emoji=False, force_terminal=False, no_color=True, width=PLAIN_WIDTH)


def human_bytes(number: float) -> str:
    """1.2 GB with GB = 10⁹; 512 MB."""
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
        return Text(task.fields.get("status", ""), no_wrap=True, overflow="ellipsis")


class TerminalWatcher(Watcher):
    """Draws a run: a bar with step, loss, real tokens per second, time left, peak memory; one line per evaluation."""

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
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def planned(self, plan: dict[str, Any]) -> None:
        for line in plan_lines(plan):
            self.say(line)

    def reading(self, rows: int) -> None:
        if self.live and time.monotonic() - self.measured_at > 0.2:
            self.measured_at = time.monotonic()
            self.console.print(f"  {rows:,} rows read", end="\r", highlight=False)

    def start(self, trainer: Trainer) -> None:
        for line in _opening(trainer):
            self.say(line)
        self.follow()

    def follow(self) -> None:
        if self.live:
            columns = (TextColumn("training"), BarColumn(bar_width=24), _Status(Column(no_wrap=True)))
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("training", total=1.0)
            self.bar.start()

    def step(self, line: dict[str, Any], progress: RunProgress, length: Length) -> None:
        self.loss = line["loss"] if self.loss is None else 0.9 * self.loss + 0.1 * line["loss"]
        self.rates = [*self.rates[-19:], (line["tokens"], line["seconds"])]
        done, left = _done_and_left(progress, length, self.rates)
        text = (
            f"step {line['step']}{f'/{length.steps}' if length.steps else ''}  loss {self.loss:.3f}  "
            f"{_tokens_per_second(self.rates):,.0f} tokens/s  {human_seconds(left)} left  "
            f"{human_bytes(line['peak_bytes'])}"
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=done, status=text)
        elif time.monotonic() - self.last_plain_line > PLAIN_LINE_SECONDS:
            self.last_plain_line = time.monotonic()
            self.say(text)

    def evaluation(self, line: dict[str, Any], best: bool) -> None:
        self.say(f"step {line['step']}: validation loss {line['eval_loss']:.4f}{' (best)' if best else ''}")

    def measured(self, done: int, total: int, what: str = "rows") -> None:
        """Progress of a measurement."""
        if self.live and (time.monotonic() - self.measured_at > 0.2 or done == total):
            self.measured_at = time.monotonic()
            self.console.print(f"  {done}/{total} {what}", end="\n" if done == total else "\r", highlight=False)

    def stopping(self) -> None:
        text = b"\nStopping; the state will be saved. Once more, and it ends at once without that.\n"
        with contextlib.suppress(OSError):  # the state is saved also where nobody reads this any more, as behind `tee`
            os.write(2, (SHOW_CURSOR if self.live else b"") + text)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _opening(trainer: Trainer) -> Iterator[str]:
    """What is about to happen, in a few lines."""
    ready, settings = trainer.ready, trainer.settings
    base, adapter = ready.base, ready.adapter
    share = adapter.parameters / base.parameters
    length = (
        f"{trainer.length.steps} step{'s' if trainer.length.steps > 1 else ''}"
        if trainer.length.steps
        else f"{settings.minutes:g} minutes"
    )
    yield f"base      {base.name}, {base.parameters / 1e6:.1f}M parameters, computing in {base.dtype} on {base.device}"
    size = f"{adapter.parameters / 1e6:.2f}M parameters ({share:.2%} of the base)"
    yield f"adapter   rank {settings.rank}, alpha {settings.alpha:g}, {len(ready.targets)} layers, {size}"
    for number, line in enumerate(ready.data_lines):
        yield f"{'' if number else 'data':<10}{line}"
    step = f"about {settings.batch_tokens:,} tokens, rate {settings.lr:g}"
    yield f"run       {length} of {step}, into {trainer.run.folder}"
    rules = [
        f"{name}: {settings.sources[key].removeprefix('rule: ')}"
        for name, key in (("rank", "rank"), ("rate", "lr"), ("tokens of a step", "batch_tokens"))
        if settings.by_rule(key)
    ]
    if rules:
        yield f"by rule   {'; '.join(rules)}"


def _tokens_per_second(rates: list[tuple[int, float]]) -> float:
    return sum(tokens for tokens, _ in rates) / max(1e-9, sum(seconds for _, seconds in rates))


def _done_and_left(progress: RunProgress, length: Length, rates: list[tuple[int, float]]) -> tuple[float, float]:
    """(share done, seconds left)."""
    if length.steps is None:
        assert length.seconds is not None
        return progress.seconds / length.seconds, length.seconds - progress.seconds
    per_step = sum(seconds for _, seconds in rates) / len(rates)
    return progress.step / length.steps, (length.steps - progress.step) * per_step


# -- results -----------------------------------------------------------------------------------------------------------


def show_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(_finite(value), indent=2, default=str, allow_nan=False) + "\n")


def json_line(value: Any) -> str:
    """One line of JSON for stdout, in letters that it has."""
    return json.dumps(value, ensure_ascii=codecs.lookup(sys.stdout.encoding or "ascii").name != "utf-8")


def _finite(value: Any) -> Any:
    """The value with null where a number is not finite, for which JSON has no word."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def percent(value: float) -> str:
    """53.1 %."""
    return f"{100 * value:.1f} %"


def results_table(console: Console, results: list[dict[str, Any]]) -> None:
    """Accuracy with its interval, loss and rows, one line per model."""
    rows = [
        (
            row["label"],
            percent(row["accuracy"]) if "accuracy" in row else "",
            f"{percent(row['low'])} – {percent(row['high'])}" if "low" in row else "",
            f"{row['loss']:.3f}" if "loss" in row else "",
            f"{row['rows']:,}",
        )
        for row in results
    ]
    console.print(plain_table(("", "accuracy", "95 % interval", "loss", "rows"), rows))


def samples_table(console: Console, samples: list[dict[str, Any]]) -> None:
    """Answers before and after, beside the reference, a line each."""
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


def inspect_page(console: Console, facts: dict[str, Any]) -> None:
    """Where an adapter comes from, and one line per kind of adapted layer."""
    size = f"{facts['parameters'] / 1e6:.2f}M parameters, {human_bytes(facts['bytes'])}"
    origin = {name: value for name, value in facts["origin"].items() if name not in ("config", "template_examples")}
    most = max(layer["rank"] for layer in facts["layers"])
    served = {} if facts["one_scale"] else {"elsewhere": served_elsewhere(facts["folder"], facts["variant"], most)}
    pairs(console, {"adapter": f"{facts['folder']} ({facts['variant']}, {size})", **served, **origin})
    inspect_table(console, facts["layers"])


def served_elsewhere(folder: str, variant: str, rank: int) -> str:
    """What to do where a server knows one r and one alpha for all layers, and this adapter says more than that."""
    if variant.startswith("DoRA"):
        return f"few servers know DoRA; all know the model that deltaw merge {folder} --out FOLDER writes"
    return (
        "PEFT reads it; some servers take one rank and alpha for all layers, and would scale some wrongly. "
        f"The same for them: deltaw compress {folder} --rank {rank} --out FOLDER"
    )


def inspect_table(console: Console, layers: list[dict[str, Any]]) -> None:
    """One line per kind of adapted layer."""
    headings = ("layer", "count", "rank", "scale", "A", "B", "parameters", "mean ‖s·B·A‖")
    rows = [
        (
            *(row["name"], str(row["count"]), str(row["rank"]), f"{row['scale']:g}"),
            *("×".join(map(str, row[part])) for part in ("A", "B")),
            *(f"{row['parameters']:,}", f"{row['update_norm']:.4g}"),
        )
        for row in layers
    ]
    console.print(plain_table(headings, rows))


def plan_lines(plan: dict[str, Any]) -> Iterator[str]:
    """What a run will cost, in a line or two."""
    low, high = plan["peak_bytes_interval"]
    spread = f"{human_bytes(plan['peak_bytes'])} ({human_bytes(low)} to {human_bytes(high)})"
    yield f"plan      {spread} at its peak, of {human_bytes(plan['limit_bytes'])}; {_planned_time(plan)}"
    if fitted := _fitted(plan):
        yield f"{'':<10}to fit: {fitted}"


def _planned_time(plan: dict[str, Any]) -> str:
    step, rate = plan["step_seconds"], plan["tokens_per_second"]
    count = "step" if plan["steps"] == 1 else "steps"
    about = f"{_seconds_of_step(step)} a step"
    if plan["run_seconds"] is None:
        return f"about {about}, {rate:,.0f} tokens/s"
    low, high = map(human_seconds, plan["run_seconds_interval"])
    run = f"about {human_seconds(plan['run_seconds'])} ({low} to {high}) for {plan['steps']:,} {count}"
    return f"{run}, {about}, {rate:,.0f} tokens/s"


def _fitted(plan: dict[str, Any]) -> str:
    """What is done to fit, and what is spared by it and lost; "" where nothing is."""
    usual, chosen = plan.get("unfitted"), list(_chosen(plan["choice"]))
    if usual is None:
        return ", ".join(chosen)
    if usual["choice"]["micro_tokens"] != plan["choice"]["micro_tokens"]:
        chosen.insert(0, f"{plan['choice']['micro_tokens']:,} tokens a pass")
    return f"{', '.join(chosen)}; as it stands {_briefly(usual)}"


def _briefly(usual: dict[str, Any]) -> str:
    return f"{human_bytes(usual['peak_bytes'])} and {_seconds_of_step(usual['step_seconds'])} a step"


def _seconds_of_step(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else human_seconds(seconds)


def _chosen(choice: dict[str, Any]) -> Iterator[str]:
    if choice["recompute"]:
        yield f"{choice['recompute']} blocks computed twice"
    if choice["stream"]:
        yield "base read block by block"
    if choice["quant"] != "none":
        yield f"base in {choice['quant']}, which changes results a little"


PLAN_BAR = 48
PART_STYLES = dict(
    zip(
        ("fixed", "base", "factors", "optimiser", "activations", "loss", "workspace"),
        (
            *(("░", "bright_black"), ("█", "blue"), ("▓", "magenta"), ("▞", "red"), ("▒", "green"), ("▚", "yellow")),
            ("·", "cyan"),
        ),
        strict=True,
    )
)


def plan_page(console: Console, plan: dict[str, Any]) -> None:
    """A bar for each phase, made of its parts, against the limit; then the numbers."""
    whole = max(plan["limit_bytes"] if plan["limit_bytes"] < 4 * plan["peak_bytes"] else 0, plan["peak_bytes"])
    for phase, parts in plan["phases"].items():
        line, filled, total = Text(f"{phase:<12}"), 0, 0
        for part, size in parts.items():
            total += size
            cells = round(PLAN_BAR * total / whole) - filled
            mark, style = PART_STYLES[part]
            line.append(mark * cells, style=style)
            filled += cells
        line.append(" " * (PLAN_BAR - filled) + f"  {human_bytes(total)}")
        console.print(line)
    console.print(f"{'merging':<{12 + PLAN_BAR}}  {human_bytes(sum(plan['merging'].values()))}", highlight=False)
    marks = Text(" " * 12)
    for part, (mark, style) in PART_STYLES.items():
        marks.append(f"{mark} ", style=style).append(f"{part}  ")
    console.print(marks)
    peak, choice = plan["phases"][plan["peak_phase"]], plan["choice"]
    low, high = plan["peak_bytes_interval"]
    quick, slow = map(_seconds_of_step, plan["step_seconds_interval"])
    least, most = plan["tokens_per_second_interval"]
    pairs(console, {
        "peak": f"{human_bytes(plan['peak_bytes'])} ({human_bytes(low)} to {human_bytes(high)}), in "
        f"{plan['peak_phase']}; the {plan['peak_is']}",
        "of it": ", ".join(f"{part} {human_bytes(size)}" for part, size in peak.items() if size),
        "limit": f"{human_bytes(plan['limit_bytes'])} ({plan['limit_source']})",
        "time": _planned_time(plan) + ("" if plan["calibrated"] else ", by data sheet: not calibrated"),
        "a step": f"{quick} to {slow}, {least:,.0f} to {most:,.0f} tokens/s",
        "how": ", ".join([f"{choice['micro_tokens']} tokens a pass", *_chosen(choice)]) + f", by {plan['way']}",
        **({"as it stands": _briefly(plan["unfitted"])} if "unfitted" in plan else {}),
    })  # fmt: skip


# -- data --------------------------------------------------------------------------------------------------------------

SEVERITY_STYLES = {"error": "bold red", "error of the set": "bold red", "warning": "yellow"}
BAR_WIDTH = 40


def check_page(console: Console, page: dict[str, Any]) -> None:
    """The page of `deltaw data check`."""
    for file, counts in page["formats"].items():
        _print(console, f"{file}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
    left_out = f"{page['lost']:,} left out"
    skipped = f", {page['skipped']:,} not meant to be trained" if page["skipped"] else ""
    _print(console, f"{page['rows']:,} rows: {page['used']:,} used, {left_out}{skipped}")
    for finding in page["findings"]:
        _finding(console, finding)
    if page["statistics"]:
        console.print()
        _statistics(console, page["statistics"])
    console.print()
    verdict = "No errors." if page["ok"] else "Errors were found."
    console.print(f"{verdict} Kinds of errors: {page['errors']}, of warnings: {page['warnings']}.", style="bold")


def _finding(console: Console, finding: dict[str, Any]) -> None:
    console.print()
    allowed = ", allowed" if finding["allowed"] else ""
    head = Text(f"{finding['severity'].upper()}{allowed} ", style=SEVERITY_STYLES[finding["severity"]])
    where = "" if finding["set"] == "train" else f" ({finding['set']} data)"
    head.append(f"{finding['title']}{where}: {finding['count']:,}  [{finding['code']}]", style="default")
    console.print(head, soft_wrap=True)
    for example in finding["examples"][:3]:
        _print(console, f"  {example}")
    if finding["count"] > 3:
        _print(console, f"  … and {finding['count'] - 3:,} more; --json lists all rows")
    _print(console, f"  → {finding['advice']}")


def _statistics(console: Console, numbers: dict[str, Any]) -> None:
    length, counts = numbers["length"], numbers["histogram"]["counts"]
    tokens = f"{numbers['tokens']:,} an epoch, {numbers['trained_tokens']:,} of them trained"
    pairs(console, {
        "documents": f"{numbers['documents']:,}",
        "tokens": f"{tokens} ({percent(numbers['trained_share'])})",
        "length": f"median {length['median']:.0f}, mean {length['mean']:.0f}, "
        f"90 % {length['p90']:.0f}, 99 % {length['p99']:.0f}, longest {length['max']:,}",
        "longest": ", ".join(f"{row['file']} row {row['row']} ({row['tokens']:,})" for row in numbers["longest"][:3]),
    })  # fmt: skip
    edges = numbers["histogram"]["edges"]
    for first, last, count in zip(edges, [edge - 1 for edge in edges[1:]], counts, strict=False):
        bar = "█" * max(1, round(BAR_WIDTH * count / max(counts))) if count else ""
        _print(console, f"  {first:>6,} – {last:<6,} {bar} {count:,}")


def shown_row(console: Console, row: dict[str, Any], ids: bool) -> str:
    """One row of `deltaw data show` as text, with colour where the console has it.

    Trained text stands in ⟦ ⟧ (with its weight where that is not 1), so that it shows without colour too.
    """
    head = f"{row['file']}, row {row['row']}" + (f" ({row['format']})" if "format" in row else "")
    text = Text(f"── {head} ", style="bold")
    text.append("─" * max(4, 70 - len(head)) + "\n")
    if "error" in row:
        text.append(f"left out: {row['error']}  [{row['code']}]\n", style="red")
    if "skipped" in row:
        text.append(f"not trained: {row['skipped']}\n", style="yellow")
    for number, document in enumerate(row.get("documents", []), 1):
        if number > 1:
            text.append(f"· piece {number}\n", style="dim")
        _document(text, document, ids)
        tokens = sum(len(stretch.tokens) for stretch in document)
        trained = sum(len(stretch.tokens) for stretch in document if stretch.weight)
        text.append(f"\n{tokens:,} tokens, {trained:,} trained\n", style="dim")
    for note in row.get("notes", []):
        text.append(f"note: {note['what']}  [{note['code']}]\n", style="yellow")
    text.plain = visible(text.plain)
    with console.capture() as captured:
        console.print(text, soft_wrap=True)
    return captured.get()


def _document(text: Text, document: list[Any], ids: bool) -> None:
    weight = 0.0
    for stretch in [*document, None]:
        now = 0.0 if stretch is None else stretch.weight
        if now != weight:
            text.append("⟧" if weight else "", style="bold green")
            text.append(("" if now == 1 else f"{now:g}·") + "⟦" if now else "", style="bold green")
            weight = now
        if stretch is not None:
            shown = stretch.text + (f"{{{' '.join(map(str, stretch.tokens))}}}" if ids else "")
            text.append(shown, style=("bold green" if now else "dim") + (" italic" if stretch.control else ""))


CHAT_HELP = (
    "Commands: /base, /adapter or /both choose who answers; /scale 0.5 turns the adapter down; "
    "/new forgets; /quit ends."
)


# Of C0 and C1, what moves cursors and starts escape sequences; each has a picture.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_PICTURES |= dict.fromkeys(range(0x7F, 0xA0), 0x2421)


def visible(text: str) -> str:
    """The text with its control characters as pictures: data and models shall not control the terminal."""
    return text.translate(_PICTURES)


def chat_loop(console: Console, model: Any, lines: TextIO, system: str | None = None, **sampling: Any) -> None:
    """Reads prompts from `lines` and streams the answers of base and adapter; each keeps its own conversation.

    Every conversation begins with the `system` message; `sampling` as for `Model.generate`.
    """
    _print(console, CHAT_HELP)
    speakers, strength = ["base", "adapter"], 1.0
    beginning = [] if system is None else [{"role": "system", "content": system}]
    histories: dict[str, list[dict[str, str]]] = {"base": beginning[:], "adapter": beginning[:]}
    while True:
        console.print("> ", end="")
        line = lines.readline()
        text = line.strip()
        if not line:
            console.print()  # the shell's prompt belongs on a line of its own
        if not line or text in ("/quit", "/exit"):
            return
        if text in ("/base", "/adapter", "/both"):
            speakers = ["base", "adapter"] if text == "/both" else [text[1:]]
        elif text == "/new":
            histories = {"base": beginning[:], "adapter": beginning[:]}
        elif text.split()[:1] == ["/scale"]:
            strength = _scale(console, text, strength)
        elif text.startswith("/"):
            _print(console, CHAT_HELP)
        elif text:
            for speaker in speakers:
                model.strength = 0.0 if speaker == "base" else strength
                _answer(console, model, speaker, histories[speaker], text, sampling)


def _print(console: Console, text: str, end: str = "\n") -> None:
    """Text as it stands: nothing in it is markup, no line is broken, and nothing in it controls the terminal."""
    console.print(visible(text), end=end, highlight=False, markup=False, soft_wrap=True)


def _scale(console: Console, text: str, strength: float) -> float:
    """The strength that was asked for, or the old one when it cannot be understood."""
    try:
        wanted = float(text.split()[1])
    except (IndexError, ValueError):
        wanted = math.nan
    if not math.isfinite(wanted):
        _print(console, "Say it like: /scale 0.5")
        return strength
    _print(console, f"The adapter acts at {wanted:g} of its strength.")
    return wanted


def _answer(
    console: Console, model: Any, speaker: str, history: list[dict[str, str]], text: str, sampling: dict[str, Any]
) -> None:
    console.print(f"{speaker}: ", end="", style="bold" if speaker == "adapter" else "dim")
    asked = [*history, {"role": "user", "content": text}]
    cut: list[int] = []
    try:
        answer = model.generate(
            asked, on_text=lambda piece: _print(console, piece, end=""), on_cut=cut.append, **sampling
        )
    except DeltawError as error:  # a conversation grown too long, say: /new helps, and chatting goes on
        _print(console, str(error))
        return
    except KeyboardInterrupt:  # ends the answer, not the conversation
        _print(console, " …")
        return
    history[:] = [*asked, {"role": "assistant", "content": answer}]
    _print(console, f" … (cut at {cut[0]} tokens; --max-new-tokens allows more)" if cut else "")
