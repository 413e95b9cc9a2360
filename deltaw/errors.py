"""Every exception that deltaw raises for its users, and the exit code that each one means.

    DeltawError (ValueError)         exit code
    ├── DataError                    1   a file of chats, or one of its rows, cannot be used
    ├── BaseError                    1   the base model cannot be opened, or is refused
    ├── AdapterError                 1   an adapter folder cannot be read, written or applied
    ├── UsageError                   2   an argument, or a combination of arguments, makes no sense
    ├── DoesNotFitError              3   the run needs more memory than there is
    ├── NotFiniteError               4   a loss, gradient or weight became NaN or infinite
    └── DiskError                    5   a file could not be written completely

Exit code 0 means done; 130 and 143 mean that the run was stopped by Ctrl-C or SIGTERM.
A message says what is wrong, where, the value, and what to do next. To add an exception: derive it from
DeltawError, give it an exit code and a line in this drawing. Broken invariants of our own use `assert`.
"""

from __future__ import annotations

import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143


class DeltawError(ValueError):
    """Base of all errors that a user can cause or repair; `exit_code` is what the command line returns."""

    exit_code = 1


class DataError(DeltawError):
    """A data file, or a row in it, cannot be used."""


class BaseError(DeltawError):
    """A base model cannot be found, opened or trusted."""


class AdapterError(DeltawError):
    """An adapter cannot be built, read, written, applied or merged."""


class UsageError(DeltawError):
    """Settings contradict each other or have no meaning, or a run cannot go on exactly."""

    exit_code = 2


class DoesNotFitError(DeltawError):
    """A run needs more memory than it may use."""

    exit_code = 3


class NotFiniteError(DeltawError):
    """A number that must be finite is NaN or infinite."""

    exit_code = 4


class DiskError(DeltawError):
    """A file could not be written completely."""

    exit_code = 5


def command(rest: str) -> str:
    """The command line to go on with, as this user calls deltaw: by its name, or, where no shell finds that, as now."""
    called = Path(sys.argv[0])
    as_module = called.parts[-2:] == ("deltaw", "__main__.py")
    if shutil.which("deltaw") is not None or not (as_module or called.name == "deltaw"):
        return f"deltaw {rest}"
    return f"{Path(sys.executable).name} -m deltaw {rest}" if as_module else f"{called} {rest}"


class Interrupted(BaseException):
    """A signal ended the run after its state was saved; not an error, so `except Exception` lets it pass."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def signals_kept() -> Iterator[None]:
    """What a signal's handler raises inside comes out as itself, for reading by safetensors.

    The handler of Ctrl-C raises wherever Python is. Where that is a line which torch calls from C, torch drops the
    exception and raises a ValueError of its own, and a run that was stopped would pass for one with damaged files.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    raised: list[BaseException] = []

    def noting(handler: Callable[[int, Any], Any]) -> Callable[[int, Any], None]:
        def note(number: int, frame: Any) -> None:
            try:
                handler(number, frame)
            except BaseException as error:
                raised.append(error)
                raise

        return note

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # Not what the system does by itself, which raises nothing.
    ours = {number: (handler, noting(handler)) for number, handler in handlers.items() if callable(handler)}
    try:
        for number, (_, noted) in ours.items():
            signal.signal(number, noted)
        yield
    except Exception as error:
        if not raised or error is raised[0]:
            raise
        raise raised[0] from error
    finally:
        for number, (handler, noted) in ours.items():
            if signal.getsignal(number) is noted:  # and not what a handler has put in its place
                signal.signal(number, handler)
    if raised:
        raise raised[0]


_NO_MEMORY = ("can't allocate memory", "out of memory", "Cannot allocate memory")


def does_not_fit(error: BaseException) -> DoesNotFitError | None:
    """The error for the user when this one says that memory ran out, in Python, in torch or on a GPU; else None."""
    if not (isinstance(error, MemoryError) or any(text in str(error) for text in _NO_MEMORY)):
        return None
    if isinstance(error, DeltawError):
        return None
    return DoesNotFitError(
        f"The memory does not suffice ({str(error).splitlines()[0] if str(error) else 'MemoryError'}). "
        "--stream and --quant nf4 need less where the verb has them, in training also a smaller --micro-tokens, a "
        "shorter --max-length and --recompute; and so does a smaller base."
    )


def bullet_list(faults: list[str], limit: int = 20) -> str:
    """The faults one per line, at most `limit` of them, with a count of those left out."""
    shown = [f"  - {fault}" for fault in faults[:limit]]
    if len(faults) > limit:
        shown.append(f"  … and {len(faults) - limit} more")
    return "\n".join(shown)
