"""The command line: parse, one call of the api, print. Heavy imports stand inside the verbs, so that --help is instant.

Results go to stdout, talk to stderr. Exit codes are drawn in deltaw/errors.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from deltaw import __version__
from deltaw.config import Settings, make_settings, read_recipe, settings_fields
from deltaw.errors import (
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    DataError,
    DeltawError,
    Interrupted,
    UsageError,
    does_not_fit,
)

EXIT_CODES = (
    "Exit codes: 0 done, 1 bad data or input, 2 usage, 3 does not fit, 4 not finite, 5 disk, "
    "130 and 143 stopped by a signal."
)
EXIT_BROKEN_PIPE = 141
# Libraries whose warnings speak to programmers. PYTHONWARNINGS and -W bring them back.
_LIBRARIES = r"(torch|transformers|tokenizers|huggingface_hub|safetensors|matplotlib)(\.|$)"


class _Group(click.Group):
    """Turns our errors into one message and the documented exit code, for every verb."""

    def invoke(self, ctx: click.Context) -> Any:
        if not sys.warnoptions:
            warnings.filterwarnings("ignore", module=_LIBRARIES)
        try:
            with _terminable():
                result = super().invoke(ctx)
                sys.stdout.flush()
            return result
        except (DeltawError, Interrupted) as error:
            click.echo(f"{'' if isinstance(error, Interrupted) else 'Error: '}{error}", err=True)
            ctx.exit(error.exit_code)
        except (MemoryError, RuntimeError) as error:
            known = does_not_fit(error)
            if known is None:
                raise
            click.echo(f"Error: {known}", err=True)
            ctx.exit(known.exit_code)
        except KeyboardInterrupt:
            click.echo("Stopped.", err=True)
            ctx.exit(EXIT_INTERRUPTED)
        except BrokenPipeError:  # whoever read our output has enough, as in `deltaw inspect RUN | head`
            _forget_stdout()
            ctx.exit(EXIT_BROKEN_PIPE)

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(self.commands)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a verb as Ctrl-C does, so that what it has begun is tidied up; training handles both by itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: Any) -> None:
        raise Interrupted(EXIT_TERMINATED, "Stopped.")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _forget_stdout() -> None:
    """Leaves nothing to flush into the broken pipe when Python exits, which it would complain about."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(
    cls=_Group, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="deltaw")
def main() -> None:
    """Adapt a large pre-trained model to a task on the machine you have.

    Start with `deltaw demo`, or `deltaw train --data chats.jsonl`.
    """


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _settings_options(*names: str, without: tuple[str, ...] = ()) -> Decorator:
    """One option for each of these settings, or for all but some, in the order of deltaw/config.py."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for field in reversed([field for field in settings_fields() if not names or field.name in names]):
            if field.name not in without:
                function = _option(field)(function)
        return function

    return decorate


def _option(field: Any) -> Decorator:
    name = "--" + field.name.replace("_", "-")
    shown = field.default if field.default not in (None, (), False) else None
    text = field.metadata["help"] + (
        f"  [default: {', '.join(shown) if isinstance(shown, tuple) else shown}]" if shown is not None else ""
    )
    if field.metadata["kind"] is bool:
        return click.option(f"{name}/--no-{field.name.replace('_', '-')}", field.name, default=None, help=text)
    choices = field.metadata["choices"]
    kind = click.Choice(choices) if choices and not field.metadata["many"] else str
    metavar = (
        None if choices and not field.metadata["many"] else {int: "N", float: "X"}.get(field.metadata["kind"], "TEXT")
    )
    return click.option(
        name, field.name, default=None, multiple=field.metadata["many"], type=kind, metavar=metavar, help=text
    )


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value not in (None, ())}


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document to stdout.")
quiet_option = click.option("--quiet", is_flag=True, help="No talk on stderr, only errors.")
model_option = click.option("--model", metavar="TEXT", help="The base, where the adapter does not say where it lies.")


_machine_options = _settings_options("device", "dtype", "threads", "revision")


def _machine(options: dict[str, Any]) -> dict[str, Any]:
    """device, dtype, revision, threads as `load` takes them."""
    return {name: getattr(make_settings({name: value}), name) for name, value in _given(options).items()}


# -- verbs -------------------------------------------------------------------------------------------------------------


@main.command()
@_settings_options("minutes", "steps", "out", "rank", "lr", "seed", "device", "dtype", "threads")
@quiet_option
@json_option
def demo(as_json: bool, quiet: bool, **options: Any) -> None:
    """Train SmolLM2-135M on real reviews and tweets, and see what changed. Without a length, 120 steps."""
    from deltaw.demonstration import demo as run_demo
    from deltaw.terminal import TerminalWatcher, make_console, show_json

    watcher = TerminalWatcher(make_console(stderr=True), quiet)
    summary = run_demo(watcher, **_given(options))
    if as_json:
        show_json(summary)
    else:
        _show_demo(summary)


def _show_demo(summary: dict[str, Any]) -> None:
    from deltaw.terminal import human_bytes, human_seconds, make_console, pairs, results_table, samples_table

    console, sizes = make_console(), summary["sizes"]
    console.print()
    results_table(console, summary["results"])
    console.print()
    samples_table(console, summary["samples"])
    console.print()
    share = sizes["trained_parameters"] / sizes["base_parameters"]
    adapter_size, base_size = human_bytes(sizes["adapter_bytes"]), human_bytes(sizes["base_bytes"])
    time, memory = human_seconds(summary["train_seconds"]), human_bytes(summary["peak_bytes"])
    pairs(console, {
        "adapter": f"{adapter_size} beside a base of {base_size}; {share:.2%} as many parameters trained",
        "time": f"{time} for {summary['steps']} steps, {summary['tokens']:,} tokens; peak memory {memory}",
        "run": f"{summary['run']} (open report.html in a browser)",
    })  # fmt: skip
    console.print("\nTry next:", highlight=False)
    for command in (
        f"deltaw chat {summary['run']}",
        f"deltaw merge {summary['run']} --out merged",
        "deltaw train --data your-chats.jsonl",
    ):
        console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)


@main.command()
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@_settings_options()
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Go on with an interrupted run; takes no other settings.",
)
@quiet_option
@json_option
def train(recipe: Path | None, resume: Path | None, quiet: bool, as_json: bool, **options: Any) -> None:
    """Train an adapter. RECIPE is a YAML file of settings; flags win over it."""
    given = _given(options)
    if resume is not None:
        if given or recipe:
            raise UsageError(
                f"--resume goes on with the settings of the run; leave out {', '.join(sorted(given)) or recipe}."
            )
        _finish_training(resume, None, None, quiet, as_json)
        return
    if given.get("rank") == MEASURE:
        _train_measured({name: value for name, value in given.items() if name != "rank"}, recipe, quiet, as_json)
        return
    from deltaw.engine.run import create_run

    settings = make_settings(given, read_recipe(recipe) if recipe else None)
    # The folder stands before anything heavy is imported.
    _finish_training(None, settings, create_run(settings), quiet, as_json)


MEASURE = "measure"


def _train_measured(given: dict[str, Any], recipe: Path | None, quiet: bool, as_json: bool) -> None:
    """`train --rank measure`."""
    from deltaw.adapters import train_measured
    from deltaw.tables import compress_page, rank_page
    from deltaw.terminal import TerminalWatcher, make_console, show_json

    settings = make_settings(given, read_recipe(recipe) if recipe else None)
    found = train_measured(settings, TerminalWatcher(make_console(stderr=True), quiet))
    if as_json:
        show_json(found)
        return
    if found["measured"] is not None:
        rank_page(make_console(), found["measured"])
    if found["compressed"] is None:
        click.echo(f"No smaller rank is sure to keep the gain; the adapter stays as it is, in {found['run']}.")
    else:
        compress_page(make_console(), found["compressed"])


@main.command()
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@_settings_options()
@click.option("--on", metavar="MACHINE", help="Plan for another machine, by its data sheet, such as rtx4090-24gb.")
@json_option
def plan(recipe: Path | None, on: str | None, as_json: bool, **options: Any) -> None:
    """What `train` with the same arguments will take: memory by part, time, and how it is fitted. Reads no weight."""
    from deltaw import api
    from deltaw.terminal import TerminalWatcher, make_console, plan_page, show_json

    settings = make_settings(_given(options), read_recipe(recipe) if recipe else None)
    found = api.plan(settings, TerminalWatcher(make_console(stderr=True)), on=on).as_dict()
    if as_json:
        show_json(found)
    else:
        plan_page(make_console(), found)


def _finish_training(resume: Path | None, settings: Settings | None, run: Any, quiet: bool, as_json: bool) -> None:
    from deltaw import api
    from deltaw.terminal import TerminalWatcher, make_console, pairs, show_json

    watcher = TerminalWatcher(make_console(stderr=True), quiet)
    run = api.train(settings, run, watcher, resume=resume)
    summary = run.read_summary()
    if as_json:
        show_json({**summary, "run": str(run.folder)})
        return
    best = summary.get("best_eval_loss")
    pairs(make_console(), {
        "status": summary["status"],
        **({} if best is None else {"best validation loss": f"{best:.4f} (step {summary['best_step']})"}),
        **_as_planned(summary),
        "adapter": str(run.adapter),
        "report": str(run.report),
        "next": f"deltaw chat {run.folder}",
    })  # fmt: skip


def _as_planned(summary: dict[str, Any]) -> dict[str, str]:
    """What a run took beside what it was said to take."""
    from deltaw.terminal import human_bytes, human_seconds

    plan, steps = summary.get("plan"), summary.get("steps")
    if not plan or not steps:
        return {}
    took = human_seconds(summary["train_seconds"])
    said = human_seconds(plan["step_seconds"] * steps)
    peak = f"{human_bytes(summary['peak_bytes'])} (planned {human_bytes(plan['peak_bytes'])})"
    return {"time of the steps": f"{took} (planned {said})", "peak memory": peak}


def _say(text: str) -> None:
    """Talk of a verb that draws nothing."""
    click.echo(text, err=True)


def _counting(watcher: Any, what: str) -> Callable[[int, int], None]:
    """The watcher's progress of something else than rows."""
    return lambda done, total: watcher.measured(done, total, what)


@main.command("eval")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--data", multiple=True, required=True, metavar="FILE", help="Data file or glob; may be repeated.")
@_settings_options("columns", "allow_lost")
@click.option("--forgetting", is_flag=True, help="Also loss and KL to the base on neutral text, by strength.")
@click.option(
    "--neutral", type=click.Path(path_type=Path), metavar="FILE", help="Other neutral text than Python's help."
)
@model_option
@_machine_options
@json_option
def evaluate(
    adapter: Path,
    data: tuple[str, ...],
    forgetting: bool,
    neutral: Path | None,
    model: str | None,
    as_json: bool,
    columns: tuple[str, ...],
    allow_lost: str | None,
    **options: Any,
) -> None:
    """Loss, perplexity, exact match, and accuracy where answers are labels. ADAPTER is a run or adapter folder."""
    from deltaw import api
    from deltaw.terminal import TerminalWatcher, make_console, pairs, percent, show_json

    watcher = TerminalWatcher(make_console(stderr=True))
    reading = make_settings(_given({"columns": columns, "allow_lost": allow_lost}))
    opened = api.open_adapter(adapter, model, _say, **_machine(options))
    result = opened.evaluate(data, watcher.measured, reading.allow_lost, reading.columns)
    if forgetting or neutral:
        result["forgetting"] = opened.forgetting(
            neutral, data=data, allow_lost=reading.allow_lost, columns=reading.columns
        )
    if as_json:
        show_json(result)
        return
    shown = {"loss": f"{result['loss']:.4f}", "perplexity": f"{result['perplexity']:.3f}"}
    for name, key, low, high in (
        ("exact match", "exact_match", "exact_match_low", "exact_match_high"),
        ("accuracy", "accuracy", "low", "high"),
    ):
        if key in result:
            shown[name] = f"{percent(result[key])} ({percent(result[low])} – {percent(result[high])})"
    pairs(make_console(), {**shown, "rows": f"{result['rows']:,}", "tokens": f"{result['tokens']:,}"})
    if "forgetting" in result:
        from deltaw.tables import forgetting_table

        forgetting_table(make_console(), result["forgetting"])


@main.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--prompt", metavar="TEXT", help="One prompt.")
@click.option(
    "--data", multiple=True, metavar="FILE", help="Answer every row of a data file; its own last answer is left out."
)
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, metavar="N", help="Longest answer."
)
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.0, show_default=True, metavar="X", help="0 is greedy."
)
@click.option("--seed", default=0, show_default=True, metavar="N", help="Seed of sampling.")
@model_option
@_machine_options
@json_option
def generate(
    adapter: Path, prompt: str | None, data: tuple[str, ...], max_new_tokens: int, temperature: float, seed: int,
    model: str | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Answer a prompt, or every row of a file. ADAPTER is a run or adapter folder.

    The rows' answers are printed as lines of JSON; with --json, as one list.
    """
    if (prompt is None) == (not data):
        raise UsageError("Give either --prompt TEXT or --data FILE.")
    from deltaw import api
    from deltaw.terminal import show_json

    opened = api.open_adapter(adapter, model, _say, **_machine(options))
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    answers = api.answers(opened, prompt, data, **sampling)
    if as_json:
        show_json(list(answers) if data else next(answers))
        return
    for answer in answers:
        click.echo(api.as_json_line(answer) if data else answer["answer"])


@main.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FOLDER", help="Folder to make.")
@model_option
@_machine_options
@json_option
def merge(adapter: Path, out: Path, model: str | None, as_json: bool, **options: Any) -> None:
    """Fold an adapter into its base, read the result back and compare the logits."""
    from deltaw import api
    from deltaw.terminal import make_console, pairs, show_json

    record = api.merge(adapter, out, model, _say, **_machine(options))
    if as_json:
        show_json(record)
        return
    about = f"largest logit {record['max_logit']:.1f}, computed in {record['computed_in']}"
    same = f"{record['positions_with_same_next_token']} of {record['positions']} positions"
    pairs(make_console(), {
        "merged model": f"{record['folder']} (files in {record['dtype_of_files']})",
        "largest logit difference": f"{record['max_logit_difference']:.2e} ({about})",
        "same next token": same,
    })  # fmt: skip
    if not record["same_next_tokens"]:
        _say("Some next tokens differ: the files' dtype rounds part of the update away. --json has all figures.")


@main.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--against", type=click.Path(path_type=Path), metavar="OTHER", help="Compare with another adapter.")
@click.option("--base", "with_base", is_flag=True, help="Also compare each update with the weight that it changes.")
@click.option("--layers", "by_layer", is_flag=True, help="One line for each layer, with ranks of its spectrum.")
@model_option
@_machine_options
@json_option
def inspect(
    adapter: Path, against: Path | None, with_base: bool, by_layer: bool, model: str | None, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """What an adapter adapts: layers, ranks, effective scale, sizes, origin. Opens no base, unless --base is given."""
    from deltaw import api
    from deltaw.tables import beside_table, compare_page, spectra_table
    from deltaw.terminal import TerminalWatcher, inspect_page, make_console, show_json

    facts = api.inspect(adapter)
    if against or with_base or by_layer:
        from deltaw import adapters

        watcher = TerminalWatcher(make_console(stderr=True))
        if by_layer or as_json:
            facts["spectra"] = adapters.layer_spectra(adapter)
        if with_base:
            facts["beside"] = adapters.beside_base(
                adapter, model, _say, _counting(watcher, "layers"), **_machine(options)
            )
        if against is not None:
            facts["against"] = adapters.compare(adapter, against)
    if as_json:
        show_json(facts)
        return
    console = make_console()
    inspect_page(console, facts)
    if by_layer:
        spectra_table(console, facts["spectra"])
    if with_base:
        beside_table(console, facts["beside"])
    if against is not None:
        compare_page(console, facts["against"], str(against))


@main.command()
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@_settings_options(without=("rank", "lr", "minutes", "adapter", "memory", "patience"))
@click.option("--rank", "ranks", metavar="N,N", default="", help="Ranks to train, such as 2,4,8,16,32.")
@click.option("--lr", "rates", metavar="X,X", default="", help="Learning rates to train, such as 5e-4,1e-3,2e-3.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Seeds of each.")
@click.option("--resume", type=click.Path(path_type=Path), metavar="FOLDER", help="Go on with an interrupted sweep.")
@quiet_option
@json_option
def sweep(
    recipe: Path | None, ranks: str, rates: str, seeds: int, resume: Path | None, quiet: bool, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Train several ranks, rates and seeds over one base in one run, and compare them. RECIPE as for `train`."""
    from deltaw import sweeps
    from deltaw.tables import sweep_page
    from deltaw.terminal import TerminalWatcher, make_console, show_json

    watcher, given = TerminalWatcher(make_console(stderr=True), quiet), _given(options)
    if resume is not None:
        if given or recipe or ranks or rates:
            raise UsageError("--resume goes on with the settings of the sweep; leave out the others.")
        found = sweeps.resume_sweep(resume, watcher)
    else:
        settings = make_settings(given, read_recipe(recipe) if recipe else None)
        found = sweeps.sweep(
            settings, None, _numbers(ranks, int, "--rank"), _numbers(rates, float, "--lr"), seeds, watcher
        )
    if as_json:
        show_json(found)
    else:
        sweep_page(make_console(), found)


def _numbers(text: str, kind: Callable[[str], Any], flag: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"{flag} takes numbers with commas between them, not {text!r}.") from None


@main.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--data", multiple=True, metavar="FILE", help="Held-out data.  [default: what the run held out]")
@click.option("--all", "everything", is_flag=True, help="Measure every document, however long it takes.")
@click.option("--seconds", type=click.FloatRange(0), metavar="X", help="Time for it.  [default: 15 % of the training]")
@click.option("--orders", is_flag=True, help="Compare ways to choose directions at equal numbers of parameters.")
@_settings_options("columns", "allow_lost")
@model_option
@_machine_options
@json_option
def rank(
    adapter: Path, data: tuple[str, ...], everything: bool, seconds: float | None, orders: bool, model: str | None,
    as_json: bool, columns: tuple[str, ...], allow_lost: str | None, **options: Any,
) -> None:  # fmt: skip
    """What rank the task needed: held-out loss against rank, from one trained adapter, with intervals."""
    from deltaw import ranks
    from deltaw.tables import rank_page
    from deltaw.terminal import TerminalWatcher, make_console, show_json

    reading = make_settings(_given({"columns": columns, "allow_lost": allow_lost}))
    found = ranks.rank(
        adapter, data, model, everything=everything, seconds=seconds, orders=orders, columns=reading.columns,
        allow_lost=reading.allow_lost, say=_say, progress=_counting(TerminalWatcher(make_console(stderr=True)), "cuts"),
        **_machine(options),
    )  # fmt: skip
    if as_json:
        show_json(found)
    else:
        rank_page(make_console(), found)


@main.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FOLDER", help="Folder to make.")
@click.option(
    "--rank", type=click.IntRange(1), metavar="N", help="The same rank in every layer; a higher one is exact."
)
@click.option("--budget", metavar="SIZE", help="Largest file, such as 2MB; ranks are chosen layer by layer.")
@click.option("--keep", type=float, metavar="X", help="Share of the held-out gain to keep, such as 0.99; needs --data.")
@click.option("--data", multiple=True, metavar="FILE", help="Held-out data, to measure the loss before and after.")
@click.option("--heal", type=click.IntRange(1), metavar="STEPS", help="Train the result for so many steps.")
@click.option("--train-data", multiple=True, metavar="FILE", help="What to heal with.")
@model_option
@_machine_options
@json_option
def compress(adapter: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Make an adapter of lower rank, each layer the best of its rank; without --data no base is opened."""
    from deltaw import adapters
    from deltaw.tables import compress_page
    from deltaw.terminal import TerminalWatcher, make_console, show_json

    watcher = TerminalWatcher(make_console(stderr=True))
    chosen = {name: options.pop(name) for name in ("rank", "budget", "keep", "data", "heal", "train_data", "model")}
    record = adapters.compress(
        adapter, out, **chosen, say=_say, progress=_counting(watcher, "cuts"), watcher=watcher, **_machine(options)
    )
    if as_json:
        show_json(record)
    else:
        compress_page(make_console(), record)


@main.command()
@click.argument("adapters", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FOLDER", help="Folder to make.")
@click.option(
    "--weights", metavar="X,X", default="", help="A weight for each, such as 0.7,0.3 or 1,-1.  [default: the mean]"
)
@click.option(
    "--rank", type=click.IntRange(1), metavar="N", help="Rank of the result.  [default: one that loses nothing]"
)
@click.option(
    "--method", type=click.Choice(("sum", "ties", "dare")), default="sum", show_default=True, help="How to add."
)
@click.option(
    "--density", type=float, default=0.5, show_default=True, metavar="X", help="Entries that ties, dare keep."
)
@click.option("--seed", default=0, show_default=True, metavar="N", help="Seed of dare.")
@json_option
def combine(
    adapters: tuple[Path, ...], out: Path, weights: str, rank: int | None, method: str, density: float,
    seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Add adapters: exactly, on ΔW itself, whatever their ranks and scales. Opens no base."""
    from deltaw.adapters import combine as add
    from deltaw.terminal import make_console, pairs, show_json

    record = add(adapters, out, _numbers(weights, float, "--weights"), rank, method, density, seed)
    if as_json:
        show_json(record)
        return
    least, most = record["ranks"].values()
    pairs(make_console(), {
        "adapter": str(record["folder"]),
        "rank": str(most) if least == most else f"{least} to {most}, layer by layer",
        "energy left out": f"{record['discarded_energy']:.2%}",
    })  # fmt: skip


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--steps", type=click.IntRange(2), default=3, show_default=True, metavar="N", help="Steps to repeat.")
@json_option
def verify(run: Path, steps: int, as_json: bool) -> None:
    """Show that a run resumes bit for bit on this machine, and that its files are what was saved. Exits 1 if not."""
    from deltaw import api
    from deltaw.terminal import make_console, pairs, show_json

    checks = api.verify(run, steps, _say)
    if as_json:
        show_json(checks)
    else:
        pairs(make_console(), {f"{'ok  ' if c['ok'] else 'FAIL'} {c['what']}": c["detail"] for c in checks})
    if not all(check["ok"] for check in checks):
        click.get_current_context().exit(1)


@main.command()
@_settings_options("model")
@click.option("--rank", type=click.IntRange(1), default=16, show_default=True, metavar="N", help="Rank of the adapter.")
@click.option(
    "--seconds", type=click.FloatRange(0), default=10, show_default=True, metavar="X", help="Time for each workload."
)
@_machine_options
@json_option
def bench(model: str | None, rank: int, seconds: float, as_json: bool, **options: Any) -> None:
    """How fast a base trains on this machine, what share of its multiply rate that is, and where the time goes."""
    from deltaw import api
    from deltaw.terminal import bench_tables, make_console, show_json

    name = model or Settings().model
    found = api.bench(name, rank, seconds, say=_say, **_machine(options))
    if as_json:
        show_json(found)
    else:
        bench_tables(make_console(), found)


@main.command()
@json_option
def doctor(as_json: bool) -> None:
    """The machine as deltaw sees it, and what that means for training."""
    from deltaw import api
    from deltaw.terminal import make_console, pairs, show_json

    facts = api.doctor()
    if as_json:
        show_json(facts)
        return
    console = make_console()
    pairs(console, facts["machine"])
    for sentence in facts["advice"]:
        console.print(f"→ {sentence}", highlight=False, markup=False)


@main.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@model_option
@_machine_options
def chat(adapter: Path, model: str | None, **options: Any) -> None:
    """Talk to base and adapter side by side. ADAPTER is a run or adapter folder."""
    from deltaw import api
    from deltaw.terminal import chat_loop, make_console

    opened = api.open_adapter(adapter, model, _say, **_machine(options))
    chat_loop(make_console(), opened, sys.stdin)


@main.group()
def data() -> None:
    """See and check training data as a model reads it."""


_data_options = _settings_options("model", "columns", "train_on", "max_length", "allow", "date", "revision")


@data.command("check")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--eval",
    "--eval-data",
    "eval_data",
    multiple=True,
    metavar="FILE",
    help="Validation data, to find what is in both.",
)
@_data_options
@quiet_option
@json_option
def check_data(files: tuple[str, ...], as_json: bool, quiet: bool, **options: Any) -> None:
    """One page on a whole data set. Exits 1 on any error that is not allowed, 0 on warnings.

    With --json, stdout is one JSON document whatever the exit code.
    """
    from deltaw.datasets import check_data as check
    from deltaw.terminal import TerminalWatcher, check_page, make_console, show_json

    watcher = TerminalWatcher(make_console(stderr=True), quiet)
    try:
        page = check(make_settings({**_given(options), "data": files}), watcher.reading)
    except DeltawError as error:
        if as_json:
            show_json({"ok": False, "error": str(error)})
        raise
    if as_json:
        show_json(page)
    else:
        check_page(make_console(), page)
    if not page["ok"]:
        click.get_current_context().exit(1)


@data.command("show")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@_data_options
@click.option("--row", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="The row to begin with.")
@click.option("--rows", type=click.IntRange(1), metavar="N", help="How many rows.  [default: all, in a pager; else 3]")
@click.option("--ids", is_flag=True, help="Each token with its id.")
@json_option
def show_data(files: tuple[str, ...], row: int, rows: int | None, ids: bool, as_json: bool, **options: Any) -> None:
    """Conversations as the model sees them, with what is trained marked by colour and by brackets."""
    from itertools import chain, islice

    from deltaw.datasets import show_data as show
    from deltaw.terminal import make_console, show_json, shown_row

    console = make_console()
    paged = console.is_terminal and rows is None
    shown = islice(show(make_settings({**_given(options), "data": files}), row), rows or (None if paged else 3))
    first = next(shown, None)
    if first is None:
        raise DataError(f"There is no row {row} or later.")
    if as_json:
        show_json([_plain_row(each) for each in chain((first,), shown)])
        return
    texts = (shown_row(console, each, ids) for each in chain((first,), shown))
    if paged:
        click.echo_via_pager(texts, color=True)
    else:
        for text in texts:
            click.echo(text, nl=False)


def _plain_row(row: dict[str, Any]) -> dict[str, Any]:
    """A shown row as JSON takes it."""
    if "documents" not in row:
        return row
    return {**row, "documents": [[vars(stretch) for stretch in document] for document in row["documents"]]}


if __name__ == "__main__":
    main()
