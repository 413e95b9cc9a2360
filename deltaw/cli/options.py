"""Options that verbs share, made from the one list of settings, and what they do with what was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from deltaw.cli.group import AS_JSON
from deltaw.config import AUTO, Reading, make_settings, settings_fields
from deltaw.errors import UsageError

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def settings_options(*names: str, without: tuple[str, ...] = (), default: str | None = None) -> Decorator:
    """One option for each of these settings, or for all but some, in the order of deltaw/config.py.

    `default` is what help says of each, where a verb has a default of its own.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for field in reversed([field for field in settings_fields() if not names or field.name in names]):
            if field.name not in without:
                function = _option(field, default)(function)
        return function

    return decorate


def _option(field: Any, default: str | None) -> Decorator:
    name = "--" + field.name.replace("_", "-")
    shown = default or (field.default if field.default not in (None, (), False) else None)
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


def given_of(options: dict[str, Any]) -> dict[str, Any]:
    """The options that the user gave."""
    return {name: value for name, value in options.items() if value not in (None, ())}


def _remember_json(ctx: click.Context, _option: click.Parameter, asked: bool) -> bool:
    """Errors are told in the group, which sees no options of verbs."""
    ctx.meta[AS_JSON] = asked
    return asked


json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    callback=_remember_json,
    help="Print one JSON document to stdout; of an error: ok, false, and error, its text.",
)
quiet_option = click.option("--quiet", is_flag=True, help="No talk on stderr, only errors.")
model_option = click.option("--model", metavar="TEXT", help="The base, where the adapter does not say where it lies.")


_ANSWERING = (
    click.option("--system", metavar="TEXT", help="System message before the prompt."),
    click.option(
        "--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, metavar="N", help="Longest answer."
    ),
    click.option(
        "--temperature", type=click.FloatRange(0), default=0.0, show_default=True, metavar="X", help="0 is greedy."
    ),
    click.option("--seed", default=0, show_default=True, metavar="N", help="Seed of sampling."),
)


def answer_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """How prompts are answered."""
    for option in reversed(_ANSWERING):
        function = option(function)
    return function


def answering_of(options: dict[str, Any]) -> dict[str, Any]:
    """system, max_new_tokens, temperature and seed; takes them out of the options."""
    return {name: options.pop(name) for name in ("system", "max_new_tokens", "temperature", "seed")}


MACHINE = ("device", "dtype", "threads", "revision", "stream")
unquantised_options = settings_options(*MACHINE)


def machine_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Where and how a base is opened."""
    (field,) = (field for field in settings_fields() if field.name == "quant")
    kinds = [kind for kind in field.metadata["choices"] if kind != AUTO]
    quant = click.option(
        "--quant", type=click.Choice(kinds), help="Store the base's layers in 4 or 8 bits.  [default: none]"
    )
    return unquantised_options(quant(function))


def machine_of(options: dict[str, Any]) -> dict[str, Any]:
    """device, dtype, revision, threads, stream and quant as `load` takes them."""
    return {name: getattr(make_settings({name: value}), name) for name, value in given_of(options).items()}


def reading_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """How data files are read where an adapter is measured."""
    as_trained = settings_options("max_length", "train_on", "date", default="as the adapter was trained")
    return settings_options("columns", "allow", "allow_lost")(as_trained(function))


def reading_of(options: dict[str, Any]) -> dict[str, Any]:
    """What was given of how data files are read; takes it out of the options."""
    return given_of({name: options.pop(name) for name in Reading._fields})


def say(text: str) -> None:
    """Talk of a verb that draws nothing."""
    click.echo(text, err=True)


def counting(watcher: Any, what: str) -> Callable[[int, int], None]:
    """The watcher's progress of something else than rows."""
    return lambda done, total: watcher.measured(done, total, what)


def numbers(text: str, kind: Callable[[str], Any], flag: str) -> list[Any]:
    """The numbers in a text with commas. UsageError when it holds something else."""
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"{flag} takes numbers with commas between them, not {text!r}.") from None
