"""Verbs that use, measure and change adapters."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import click

from deltaw.cli.group import main
from deltaw.cli.options import (
    answer_options,
    answering_of,
    counting,
    json_option,
    machine_of,
    machine_options,
    model_option,
    numbers,
    reading_of,
    reading_options,
    say,
    settings_options,
    unquantised_options,
)
from deltaw.errors import UsageError


@main.command("eval")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--data", multiple=True, required=True, metavar="FILE", help="Data file or glob; may be repeated.")
@reading_options
@click.option("--base", "with_base", is_flag=True, help="Also measure the base without the adapter.")
@click.option(
    "--forgetting",
    is_flag=True,
    help="Also loss on neutral text, and KL to the base there and on prompts, by strength.",
)
@click.option(
    "--neutral",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Other neutral text than Python's help.",
)
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Other prompts than deltaw's, a paragraph each.",
)
@model_option
@machine_options
@json_option
def evaluate(
    adapter: Path,
    data: tuple[str, ...],
    with_base: bool,
    forgetting: bool,
    neutral: Path | None,
    prompts: Path | None,
    model: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Loss, perplexity, exact match, and accuracy where answers are labels. ADAPTER is a run or adapter folder."""
    from deltaw import api
    from deltaw.terminal import TerminalWatcher, make_console, pairs, show_json

    watcher = TerminalWatcher(make_console(stderr=True))
    reading = reading_of(options)
    opened = api.open_adapter(adapter, model, say, **machine_of(options))
    result = opened.evaluate(data, watcher.measured, **reading)
    if with_base:
        opened.strength = 0.0
        result["base"] = opened.evaluate(data, watcher.measured, **reading)
        opened.strength = 1.0
    if forgetting or neutral or prompts:
        result["forgetting"] = opened.forgetting(neutral, data=data, prompts=prompts, **reading)
        if (page := api.keep_forgetting(adapter, result["forgetting"])) is not None:
            say(f"The curve is in {page}.")
    if as_json:
        show_json(result)
        return
    shown, base = _measured(result), _measured(result.get("base", {}))
    beside = {name: f"{value}; the base alone {base[name]}" if base else value for name, value in shown.items()}
    pairs(make_console(), {**beside, "rows": _rows(result), "tokens": f"{result['tokens']:,}"})
    if "forgetting" in result:
        from deltaw.tables import forgetting_table

        forgetting_table(make_console(), result["forgetting"])


def _measured(result: dict[str, Any]) -> dict[str, str]:
    """The figures of an evaluation, those that it has, as they are shown."""
    from deltaw.terminal import percent

    plain = {"loss": ".4f", "perplexity": ".3f"}
    shown = {name: format(result[name], digits) for name, digits in plain.items() if name in result}
    for name, key, low, high in (
        ("exact match", "exact_match", "exact_match_low", "exact_match_high"),
        ("accuracy", "accuracy", "low", "high"),
    ):
        if key in result:
            shown[name] = f"{percent(result[key])} ({percent(result[low])} – {percent(result[high])})"
    return shown


def _rows(result: dict[str, Any]) -> str:
    """How many were measured, and what `deltaw data check` would say more of."""
    cut = f", {result['rows_cut']:,} of them cut at max-length" if result["rows_cut"] else ""
    lost = f"; {result['rows_lost']:,} more cannot be used" if result["rows_lost"] else ""
    return f"{result['rows']:,}{cut}{lost}"


@main.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--prompt", metavar="TEXT", help="One prompt.")
@click.option(
    "--data",
    multiple=True,
    metavar="FILE",
    help="Answer every row of a data file, but for the last answer that it has.",
)
@settings_options("columns")
@answer_options
@model_option
@machine_options
@json_option
def generate(
    adapter: Path, prompt: str | None, data: tuple[str, ...], columns: tuple[str, ...], model: str | None,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Answer a prompt, or every row of a file. ADAPTER is a run or adapter folder.

    The rows' answers are printed as lines of JSON; with --json, as one list.
    """
    if (prompt is None) == (not data):
        raise UsageError("Give either --prompt TEXT or --data FILE.")
    from deltaw import api
    from deltaw.terminal import json_line, show_json

    how = answering_of(options)
    opened = api.open_adapter(adapter, model, say, **machine_of(options))
    answers = api.answers(opened, prompt, data, columns=columns, **how)
    if as_json:
        show_json(list(answers) if data else next(answers))
        return
    for answer in answers:
        click.echo(json_line(answer) if data else answer["answer"])
        if not data and "cut_at" in answer:
            say(f"The answer was cut at {answer['cut_at']} tokens; --max-new-tokens allows more.")


@main.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FOLDER", help="Folder to make.")
@model_option
@unquantised_options
@json_option
def merge(adapter: Path, out: Path, model: str | None, as_json: bool, **options: Any) -> None:
    """Fold an adapter into its base, read the result back, check its weights and compare the logits."""
    from deltaw import api
    from deltaw.terminal import make_console, pairs, show_json

    record = api.merge(adapter, out, model, say, **machine_of(options))
    if as_json:
        show_json(record)
        return
    about = f"the adapter changes them by up to {record['max_logit_change_by_adapter']:.2e}"
    same = f"{record['positions_with_same_next_token']} of {record['positions']} positions"
    pairs(make_console(), {
        "merged model": f"{record['folder']} (files in {record['dtype_of_files']})",
        "weights with the adapter": f"{record['merged_weights']}, each W + ΔW rounded once",
        "largest logit difference": f"{record['max_logit_difference']:.2e} in {record['computed_in']} ({about})",
        "same next token": same,
    })  # fmt: skip
    if not record["same_next_tokens"]:
        say("Some next tokens differ: where two are about equally likely, rounding decides. --json has all figures.")


@main.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--against", type=click.Path(path_type=Path), metavar="OTHER", help="Compare with another adapter.")
@click.option("--base", "with_base", is_flag=True, help="Also compare each update with the weight that it changes.")
@click.option("--layers", "by_layer", is_flag=True, help="One line for each layer, with ranks of its spectrum.")
@click.option("--page", type=click.Path(path_type=Path), metavar="FILE", help="Also write a page with all figures.")
@model_option
@machine_options
@json_option
def inspect(
    adapter: Path, against: Path | None, with_base: bool, by_layer: bool, page: Path | None, model: str | None,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """What an adapter adapts: layers, ranks, effective scale, sizes, origin. Opens no base, unless --base is given."""
    from deltaw import adapters
    from deltaw.tables import beside_table, compare_page, spectra_table
    from deltaw.terminal import TerminalWatcher, inspect_page, make_console, show_json

    facts = adapters.inspect(adapter)
    beyond = bool(against or with_base or by_layer or page)
    if by_layer or page or (as_json and beyond):
        facts["spectra"] = adapters.layer_spectra(adapter)
    if with_base:
        from deltaw.api import beside_base

        watcher = TerminalWatcher(make_console(stderr=True))
        facts["beside"] = beside_base(adapter, model, say, counting(watcher, "layers"), **machine_of(options))
    if against is not None:
        facts["against"] = adapters.compare(adapter, against)
    if page is not None:
        from deltaw.report.adapter_page import lead_to, write_adapter_page

        write_adapter_page(page, adapter.resolve().name, facts, None if against is None else against.resolve().name)
        report = lead_to(page, adapter)
        say(f"The page is {page}." if report is None else f"The page is {page}; {report} leads to it.")
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
    if facts["variant"] == "DoRA" and (by_layer or with_base or against is not None):
        from deltaw.report.adapter_page import LOW_RANK_ALONE

        console.print(LOW_RANK_ALONE)


@main.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--data", multiple=True, metavar="FILE", help="Held-out data.  [default: what the run held out]")
@click.option("--all", "everything", is_flag=True, help="Measure every document, however long it takes.")
@click.option("--seconds", type=click.FloatRange(0), metavar="X", help="Time for it.  [default: 15 % of the training]")
@click.option("--ranks", default="", metavar="N,N", help="Ranks to cut to.  [default: 1, 2, 4 …]")
@click.option("--orders", is_flag=True, help="Compare ways to choose directions at equal numbers of parameters.")
@reading_options
@model_option
@machine_options
@json_option
def rank(
    adapter: Path, data: tuple[str, ...], everything: bool, seconds: float | None, ranks: str, orders: bool,
    model: str | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """What rank the task needed: held-out loss against rank, from one trained adapter, with intervals."""
    from deltaw.ranks import rank as measure_rank
    from deltaw.tables import rank_page
    from deltaw.terminal import TerminalWatcher, make_console, show_json

    progress = counting(TerminalWatcher(make_console(stderr=True)), "cuts")
    chosen = numbers(ranks, int, "--ranks")
    found = measure_rank(
        adapter, data, model, everything=everything, seconds=seconds, orders=orders, ranks=chosen, say=say,
        progress=progress, **reading_of(options), **machine_of(options),
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
@reading_options
@model_option
@machine_options
@json_option
def compress(adapter: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Make an adapter of lower rank, each layer the best of its rank; without --data no base is opened."""
    from deltaw.compression import compress as make_other
    from deltaw.tables import compress_page
    from deltaw.terminal import TerminalWatcher, make_console, show_json

    watcher = TerminalWatcher(make_console(stderr=True))
    chosen = {name: options.pop(name) for name in ("rank", "budget", "keep", "data", "heal", "train_data", "model")}
    record = make_other(
        adapter, out, **chosen, say=say, progress=counting(watcher, "cuts"), watcher=watcher, **reading_of(options),
        **machine_of(options),
    )  # fmt: skip
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
@click.option("--rank", type=click.IntRange(1), metavar="N", help="Rank of the result.  [default: the sum of all]")
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

    record = add(adapters, out, numbers(weights, float, "--weights"), rank, method, density, seed)
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
@click.argument("adapter", type=click.Path(path_type=Path))
@answer_options
@model_option
@machine_options
def chat(adapter: Path, model: str | None, **options: Any) -> None:
    """Talk to base and adapter side by side. ADAPTER is a run or adapter folder."""
    from deltaw import api
    from deltaw.terminal import chat_loop, make_console

    how = answering_of(options)
    opened = api.open_adapter(adapter, model, say, **machine_of(options))
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a byte that is no text shall not end the conversation
    chat_loop(make_console(), opened, sys.stdin, **how)
