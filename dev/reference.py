"""Writes docs/reference from the code: the command line, the settings, the errors. `make docs`; a test compares.

Usage: python dev/reference.py FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

import deltaw
from deltaw import errors
from deltaw.cli import main as command
from deltaw.cli.group import EXIT_BROKEN_PIPE
from deltaw.config import settings_fields
from deltaw.data.findings import CATALOGUE

HEADER = "<!-- Written by `make docs` from the code; change the code instead. -->\n\n"


def cli_page() -> str:
    """The help of every verb."""
    parts = [HEADER + "# Command line\n", _help(command, "deltaw")]
    parts += [f"\n## deltaw {name}\n\n{_help(verb, f'deltaw {name}')}" for name, verb in _verbs(command)]
    return "\n".join(parts)


def _verbs(group: click.Group) -> Iterator[tuple[str, click.Command]]:
    """Every verb, those of groups under the group's name."""
    for name, verb in group.commands.items():
        yield name, verb
        if isinstance(verb, click.Group):
            yield from ((f"{name} {inner}", command) for inner, command in _verbs(verb))


def _help(verb: click.Command, name: str) -> str:
    context = click.Context(
        verb, info_name=name, terminal_width=110, max_content_width=110, help_option_names=["-h", "--help"]
    )
    return "```text\n" + verb.get_help(context).rstrip() + "\n```\n"


def settings_page() -> str:
    """Every setting of a run with its default."""
    lines = [
        HEADER + "# Settings\n",
        "A setting is a flag (`--batch-tokens`), a recipe key (`batch_tokens`) and a keyword of `deltaw.train`.",
        "",
    ]
    group = None
    for field in settings_fields():
        if field.metadata["group"] != group:
            group = field.metadata["group"]
            lines += ["", f"## {group.capitalize()}", "", "| setting | default | meaning |", "|---|---|---|"]
        default = field.default if field.default not in (None, ()) else "–"
        shown = ", ".join(default) if isinstance(default, tuple) else default
        lines.append(f"| `{field.name}` | {shown} | {field.metadata['help']} |")
    return "\n".join(lines) + "\n"


def findings_page() -> str:
    """Everything that `deltaw data check` can find."""
    lines = [
        HEADER + "# Findings of `deltaw data check`\n",
        "| name | severity | what was found | what to do |",
        "|---|---|---|---|",
    ]
    lines += [f"| `{code}` | {kind.severity} | {kind.title} | {kind.advice} |" for code, kind in CATALOGUE.items()]
    return "\n".join(lines) + "\n"


def errors_page() -> str:
    """Every exception with its exit code."""
    lines = [HEADER + "# Errors and exit codes\n", "| error | exit code | meaning |", "|---|---|---|"]
    for value in vars(errors).values():
        if isinstance(value, type) and issubclass(value, errors.DeltawError):
            lines.append(f"| `{value.__name__}` | {value.exit_code} | {(value.__doc__ or '').splitlines()[0]} |")
    lines += [
        f"| (Ctrl-C) | {errors.EXIT_INTERRUPTED} | The run was saved; go on with `deltaw train --resume RUN`. |",
        f"| (SIGTERM) | {errors.EXIT_TERMINATED} | The same. |",
        "| (none) | 1 | `data check` and `verify` ended, and found what has to be mended. |",
        f"| (none) | {EXIT_BROKEN_PIPE} | Nobody read the output to its end, as in `deltaw … \\| head`. |",
    ]
    return "\n".join(lines) + "\n"


def python_page() -> str:
    """The front door: every name that `deltaw` hands on, with its first line."""
    lines = [HEADER + "# Python\n", "| name | what it is |", "|---|---|"]
    for name in sorted(set(deltaw.__all__) - {"__version__"}):
        lines.append(f"| `deltaw.{name}` | {(getattr(deltaw, name).__doc__ or '').strip().splitlines()[0]} |")
    return "\n".join(lines) + "\n"


PAGES = {
    "cli.md": cli_page,
    "settings.md": settings_page,
    "errors.md": errors_page,
    "python.md": python_page,
    "findings.md": findings_page,
}

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in PAGES.items():
        (folder / name).write_text(page())
