"""Verbs that look at training data."""

from __future__ import annotations

from typing import Any

import click

from deltaw.cli.group import main
from deltaw.cli.options import given_of, json_option, quiet_option, settings_options
from deltaw.config import make_settings
from deltaw.errors import DataError


@main.group()
def data() -> None:
    """See and check training data as a model reads it."""


_data_options = settings_options("model", "columns", "train_on", "max_length", "allow", "date", "revision")


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
    """One page on a whole data set. Exits 1 on any error that is not allowed, 0 on warnings."""
    from deltaw.datasets import check_data as check
    from deltaw.terminal import TerminalWatcher, check_page, make_console, show_json

    watcher = TerminalWatcher(make_console(stderr=True), quiet)
    page = check(make_settings({**given_of(options), "data": files}), watcher.reading)
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
    shown = islice(show(make_settings({**given_of(options), "data": files}), row), rows or (None if paged else 3))
    if (first := next(shown, None)) is None:
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
