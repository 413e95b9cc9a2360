"""Writes docs/reference from the code: the command line, the settings, the errors. `make docs`; a test compares.

Usage: python dev/reference.py FOLDER
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

import deltaw
from deltaw import errors
from deltaw.cli import main as command
from deltaw.cli.group import EXIT_BROKEN_PIPE
from deltaw.config import settings_fields
from deltaw.data.findings import CATALOGUE
from deltaw.plan.devices import DEVICES

HEADER = "<!-- Written by `make docs` from the code; change the code instead. -->\n\n"

ENVIRONMENT = {
    "DELTAW_CACHE": "where converted bases, quantised blocks, tokens, paces, probes and the compiled passes lie, all "
    "of which can be made anew; else `deltaw` in `XDG_CACHE_HOME`, or in the system's folder of caches. The passes are "
    "run from there, so let nobody else write to it",
    "DELTAW_COMPILED": "0: torch does the work of the compiled passes, as it does where there is no g++ and elsewhere "
    "than on Linux; a run resumes only by the same",
    "CXX": "the g++ that makes them, if it is not the one on the path; a program without options",
    "NO_COLOR": "no colours in the terminal",
}


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
        "A setting is a flag (`--batch-tokens`), a recipe key (`batch_tokens`) and a keyword of `deltaw.train`. "
        "Variables of the environment stand at the end.",
        "",
    ]
    by_group: dict[str, list[Any]] = {}
    for field in settings_fields():
        by_group.setdefault(field.metadata["group"], []).append(field)
    for group, fields in by_group.items():
        lines += ["", f"## {group.capitalize()}", "", "| setting | default | meaning |", "|---|---|---|"]
        lines += map(_setting_row, fields)
    lines += ["", "## Environment", "", "Of the machine, not of a run.", "", "| variable | meaning |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in ENVIRONMENT.items()]
    return "\n".join(lines) + "\n"


def _setting_row(field: Any) -> str:
    default = field.default if field.default not in (None, ()) else "–"
    shown = ", ".join(default) if isinstance(default, tuple) else default
    return f"| `{field.name}` | {shown} | {field.metadata['help']} |"


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
    """The front door: every name that `deltaw` hands on, with how it is called and what it gives."""
    names = sorted(set(deltaw.__all__) - {"__version__"})
    lines = [HEADER + "# Python\n", "| name | what it is |", "|---|---|"]
    for name in names:
        lines.append(f"| `deltaw.{name}` | {_documented(getattr(deltaw, name)).splitlines()[0]} |")
    for name in names:
        value = getattr(deltaw, name)
        if isinstance(value, type) and issubclass(value, Exception):
            continue  # the page of errors has them
        lines += ["", f"## {name}", "", f"`{_call(f'deltaw.{name}', value)}`", "", _documented(value)]
        if isinstance(value, type):
            lines += ["", *_members(value)]
    return "\n".join(lines) + "\n"


_PLAIN = (str, int, float, tuple, type(None))  # of a default, that shows as it is written


def _documented(value: Any) -> str:
    return inspect.getdoc(value) or ""


def _call(name: str, value: Any) -> str:
    """How something is called: names and defaults; types stand in the code."""
    parts, starred = [], False
    for parameter in inspect.signature(value).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
        starred |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        plain = parameter.default is parameter.empty or isinstance(parameter.default, _PLAIN)
        parts.append(str(parameter.replace(annotation=parameter.empty)) if plain else f"{parameter.name}=…")
    return f"{name}({', '.join(parts)})"


def _members(kind: type) -> Iterator[str]:
    """What an object of this class does, a line each."""
    for name, value in vars(kind).items():
        if name.startswith("_") or not (inspect.isfunction(value) or isinstance(value, property)):
            continue
        shown = name if isinstance(value, property) else _call(name, value)
        yield f"- `{shown}`: {_documented(value).splitlines()[0]}"


def machines_page() -> str:
    """The machines that `deltaw plan --on` knows."""
    lines = [
        HEADER + "# Machines of `deltaw plan --on`\n",
        "By their data sheets; deltaw has measured none of them. A GB is 10⁹ bytes: 24 GiB are 26 GB.\n",
        "| name | memory | TFLOP/s | computes in | source |",
        "|---|---|---|---|---|",
    ]
    for name, device in DEVICES.items():
        dtype = str(device.dtype).removeprefix("torch.")
        lines.append(
            f"| `{name}` | {device.memory_bytes / 1e9:.0f} GB | {device.tflops:g} | {dtype} | {device.source} |"
        )
    return "\n".join(lines) + "\n"


PAGES = {
    "cli.md": cli_page,
    "settings.md": settings_page,
    "errors.md": errors_page,
    "python.md": python_page,
    "findings.md": findings_page,
    "machines.md": machines_page,
}

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in PAGES.items():
        (folder / name).write_text(page())
