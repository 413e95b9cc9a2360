"""The command itself: its help, and how errors, signals and broken pipes end it. Verbs add themselves to `main`."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

import click

from deltaw import __version__
from deltaw.errors import (
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    DeltawError,
    DiskError,
    Interrupted,
    UsageError,
    does_not_fit,
)

EXIT_CODES = (
    "Exit codes: 0 done, 1 bad data or input (or what a check found), 2 usage, 3 does not fit, 4 not finite, 5 disk, "
    "130 and 143 stopped by a signal, 141 nobody read the output."
)
EXIT_BROKEN_PIPE = 141
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
AS_JSON = "deltaw.as_json"  # in the context's notes: whether the verb was asked for JSON
_JSON_GIVEN = "deltaw.json_given"
# Libraries whose warnings speak to programmers. PYTHONWARNINGS and -W bring them back.
_LIBRARIES = r"(torch|transformers|tokenizers|huggingface_hub|safetensors|matplotlib)(\.|$)"


class _Group(click.Group):
    """Turns our errors into one message and the documented exit code, for every verb."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_JSON_GIVEN] = "--json" in args  # of a line that does not parse, a verb's own options know nothing
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        _open_missing()
        if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal or a pipe that is not UTF-8 gets a "?"
            sys.stdout.reconfigure(errors="replace")
        if not sys.warnoptions:
            warnings.filterwarnings("ignore", module=_LIBRARIES)
        try:
            if sys.platform == "win32":  # it lacks what locks, signals and limits are made of
                raise UsageError("deltaw runs on Linux and macOS; on Windows, install it in WSL.")
            with _terminable():
                result = super().invoke(ctx)
                sys.stdout.flush()
            return result
        except (DeltawError, Interrupted) as error:
            _tell(ctx, error)
            ctx.exit(error.exit_code)
        except (MemoryError, RuntimeError) as error:
            known = does_not_fit(error)
            if known is None:
                raise
            _tell(ctx, known)
            ctx.exit(known.exit_code)
        except click.UsageError as error:  # click itself tells of it, on stderr
            if ctx.meta[_JSON_GIVEN]:
                _echo(json.dumps({"ok": False, "error": error.format_message()}, indent=2))
            raise
        except KeyboardInterrupt:
            _echo("Stopped.", err=True)
            ctx.exit(EXIT_INTERRUPTED)
        except BrokenPipeError:  # whoever read our output has enough, as in `deltaw inspect RUN | head`
            _forget(sys.stdout, sys.stderr)
            ctx.exit(EXIT_BROKEN_PIPE)
        except OSError as error:  # of what is said or shown, where nothing else has told of it by DiskError
            if error.errno not in UNWRITABLE:
                raise
            what = error.filename or "A file, or what is said here,"
            _tell(ctx, DiskError(f"{what} could not be read or written: {error.strerror}."))
            _forget(sys.stdout, sys.stderr)
            ctx.exit(DiskError.exit_code)

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(self.commands)


def _open_missing() -> None:
    """Standard streams that the caller has closed lead nowhere, instead of into the next file that is opened."""
    if sys.stdin is not None and sys.stdout is not None and sys.stderr is not None:
        return
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115 - open to the end


def _tell(ctx: click.Context, error: BaseException) -> None:
    """On stderr; and, where JSON was asked for and it is no stop, on stdout too. The exit code says it in any case."""
    stop = isinstance(error, Interrupted)
    if ctx.meta.get(AS_JSON) and not stop:
        _echo(json.dumps({"ok": False, "error": str(error)}, indent=2))
    _echo(str(error) if stop else f"Error: {error}", err=True)


def _echo(text: str, *, err: bool = False) -> None:
    """On stdout or stderr, where somebody reads it."""
    try:
        click.echo(text, err=err)
    except OSError:  # a pipe that nobody reads any more, or a file on a full disk
        _forget(sys.stderr if err else sys.stdout)


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


def _forget(*streams: TextIO) -> None:
    """Leaves nothing to flush into a broken pipe when Python exits, which it would complain about."""
    for stream in streams:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@click.group(
    cls=_Group, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="deltaw")
def main() -> None:
    """Adapt a large pre-trained model to a task on the machine you have.

    Start with `deltaw demo`, or `deltaw train --data chats.jsonl`.
    """
