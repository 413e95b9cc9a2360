"""Verbs that train, plan and prove runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deltaw.cli.group import main
from deltaw.cli.options import (
    given_of,
    json_option,
    machine_of,
    machine_options,
    numbers,
    quiet_option,
    say,
    settings_options,
)
from deltaw.config import LENGTHS, Settings, make_settings, read_recipe
from deltaw.errors import EXIT_INTERRUPTED, Interrupted, UsageError, command

MEASURE = "measure"  # of --rank


@main.command()
@settings_options(*LENGTHS, "out", "rank", "lr", "seed", "device", "dtype", "threads", "memory", "quant", "stream")
@quiet_option
@json_option
def demo(as_json: bool, quiet: bool, **options: Any) -> None:
    """Train SmolLM2-135M on real reviews and tweets, and see what changed. Without a length, 120 steps."""
    from deltaw.demonstration import demo as run_demo
    from deltaw.terminal import TerminalWatcher, make_console, show_json

    watcher = TerminalWatcher(make_console(stderr=True), quiet)
    summary = run_demo(watcher, **given_of(options))
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
    for verb in (f"chat {summary['run']}", f"merge {summary['run']} --out merged", "train --data your-chats.jsonl"):
        console.print(f"  {command(verb)}", highlight=False, markup=False, soft_wrap=True)


@main.command()
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@settings_options()
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
    given = given_of(options)
    if resume is not None:
        if given or recipe:
            raise UsageError(
                f"--resume goes on with the settings of the run; leave out {', '.join(sorted(given)) or recipe}."
            )
        _finish_training(resume, None, None, quiet, as_json)
        return
    settings, measured = _settings_of(given, recipe)
    if measured:
        _train_measured(settings, quiet, as_json)
        return
    from deltaw.engine.run import create_run

    # The folder stands before anything heavy is imported.
    _finish_training(None, settings, create_run(settings), quiet, as_json)


def _settings_of(given: dict[str, Any], recipe: Path | None) -> tuple[Settings, bool]:
    """The settings, and whether the rank is to be measured: then they ask for the one that is trained first."""
    written = read_recipe(recipe) if recipe else {}
    measured = given.get("rank", written.get("rank")) == MEASURE
    if measured:
        given, written = ({name: one[name] for name in one if name != "rank"} for one in (given, written))
    return make_settings(given, written), measured


def _train_measured(settings: Settings, quiet: bool, as_json: bool) -> None:
    """`train --rank measure`."""
    from deltaw.tables import compress_page, rank_page
    from deltaw.terminal import TerminalWatcher, make_console, show_json
    from deltaw.training import train_measured

    found = train_measured(settings, TerminalWatcher(make_console(stderr=True), quiet))
    if as_json:
        show_json(found)
        return
    if found["measured"] is not None:
        rank_page(make_console(), found["measured"])
    if found["measured"] is None:
        click.echo(f"Nothing could be measured; the adapter stays as it is, in {found['run']}.")
    elif found["compressed"] is None:
        click.echo(f"No smaller rank is sure to keep the gain; the adapter stays as it is, in {found['run']}.")
    else:
        compress_page(make_console(), found["compressed"])


@main.command()
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@settings_options()
@click.option("--on", metavar="MACHINE", help="Plan for another machine, by its data sheet, such as rtx4090-24gb.")
@json_option
def plan(recipe: Path | None, on: str | None, as_json: bool, **options: Any) -> None:
    """What `train` with the same arguments will take: memory by part, time, and how it is fitted. Reads no weight."""
    from deltaw import planning
    from deltaw.terminal import TerminalWatcher, make_console, plan_page, show_json

    settings, _ = _settings_of(given_of(options), recipe)
    found = planning.plan(settings, TerminalWatcher(make_console(stderr=True)), on=on).as_dict()
    if as_json:
        show_json(found)
    else:
        plan_page(make_console(), found)


def _finish_training(resume: Path | None, settings: Settings | None, run: Any, quiet: bool, as_json: bool) -> None:
    try:
        from deltaw.terminal import TerminalWatcher, make_console, pairs, show_json
        from deltaw.training import train as train_adapter

        run = train_adapter(settings, run, TerminalWatcher(make_console(stderr=True), quiet), resume=resume)
    except KeyboardInterrupt:  # while the base is opened, say: training itself tells how to go on
        again = command(f"train --resume {resume or run.folder}")
        raise Interrupted(EXIT_INTERRUPTED, f"Stopped. Go on with: {again}") from None
    summary = run.read_summary()
    if as_json:
        show_json({**summary, "run": str(run.folder)})
        return
    best = summary.get("best_eval_loss")
    pairs(make_console(), {
        "status": summary["status"],
        **({} if best is None else {"best validation loss": _best(summary)}),
        **_as_planned(summary),
        "adapter": str(run.adapter),
        "report": str(run.report),
        "next": command(f"chat {run.folder}"),
    })  # fmt: skip


def _best(summary: dict[str, Any]) -> str:
    """The best loss on what was held out, beside that of the base alone."""
    best, base = summary["best_eval_loss"], summary.get("base_eval_loss")
    beside = "" if base is None else f"; the base alone {base:.4f}" + ("" if best < base else ", which is no worse")
    return f"{best:.4f} (step {summary['best_step']}){beside}"


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


@main.command()
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@settings_options(without=("rank", "lr", "minutes", "adapter", "patience", "track"))
@click.option("--rank", "ranks", metavar="N,N", default="", help="Ranks to train, such as 2,4,8,16,32.")
@click.option("--lr", "rates", metavar="X,X", default="", help="Learning rates to train, such as 5e-4,1e-3,2e-3.")
@click.option("--seeds", type=click.IntRange(1), metavar="N", help="Seeds of each.  [default: 1]")
@click.option("--resume", type=click.Path(path_type=Path), metavar="FOLDER", help="Go on with an interrupted sweep.")
@quiet_option
@json_option
def sweep(
    recipe: Path | None, ranks: str, rates: str, seeds: int | None, resume: Path | None, quiet: bool, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Train several ranks, rates and seeds over one base in one run, and compare them. RECIPE as for `train`."""
    from deltaw import sweeps
    from deltaw.tables import sweep_page
    from deltaw.terminal import TerminalWatcher, make_console, show_json

    watcher, given = TerminalWatcher(make_console(stderr=True), quiet), given_of(options)
    if resume is not None:
        if given or recipe or ranks or rates or seeds is not None:
            raise UsageError("--resume goes on with the settings of the sweep; leave out the others.")
        found = sweeps.resume_sweep(resume, watcher)
    else:
        settings = make_settings(given, read_recipe(recipe) if recipe else None)
        found = sweeps.sweep(
            settings, None, numbers(ranks, int, "--rank"), numbers(rates, float, "--lr"), seeds or 1, watcher
        )
    if as_json:
        show_json(found)
    else:
        sweep_page(make_console(), found)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--steps", type=click.IntRange(2), default=3, show_default=True, metavar="N", help="Steps to repeat.")
@json_option
def verify(run: Path, steps: int, as_json: bool) -> None:
    """Show that a run resumes bit for bit on this machine, and that its files are what was saved. Exits 1 if not."""
    from deltaw import api
    from deltaw.terminal import make_console, pairs, show_json

    checks = api.verify(run, steps, say)
    if as_json:
        show_json(checks)
    else:
        pairs(make_console(), {f"{'ok  ' if c['ok'] else 'FAIL'} {c['what']}": c["detail"] for c in checks})
    if not all(check["ok"] for check in checks):
        click.get_current_context().exit(1)


@main.command()
@settings_options("model")
@click.option("--rank", type=click.IntRange(1), default=16, show_default=True, metavar="N", help="Rank of the adapter.")
@click.option(
    "--seconds", type=click.FloatRange(0), default=10, show_default=True, metavar="X", help="Time for each workload."
)
@machine_options
@json_option
def bench(model: str | None, rank: int, seconds: float, as_json: bool, **options: Any) -> None:
    """How fast a base trains on this machine, what share of its multiply rate that is, and where the time goes."""
    from deltaw import api
    from deltaw.tables import bench_tables
    from deltaw.terminal import make_console, show_json

    name = model or Settings().model
    found = api.bench(name, rank, seconds, say=say, **machine_of(options))
    if as_json:
        show_json(found)
    else:
        bench_tables(make_console(), found)


@main.command()
@json_option
def doctor(as_json: bool) -> None:
    """The machine as deltaw sees it, and what that means for training."""
    from deltaw.doctor import doctor as examine
    from deltaw.terminal import make_console, pairs, show_json

    facts = examine()
    if as_json:
        show_json(facts)
        return
    console = make_console()
    pairs(console, facts["machine"])
    for sentence in facts["advice"]:
        console.print(f"→ {sentence}", highlight=False, markup=False)
