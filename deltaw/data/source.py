"""Files → conversations, row by row, without guessing types: what a row holds is what the file says.

Reads JSON lines (`messages`, `prompt`/`completion`, or `text`), the same gzipped, and plain text files. A row that
cannot be used becomes a Fault that names file and row; it never ends the reading and is never dropped silently.
"""

from __future__ import annotations

import glob
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaw.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
TEXT_ENDINGS = (".txt", ".md")


@dataclass(frozen=True)
class Row:
    """One usable row: `messages` for a chat, or `text`; `file` and `number` (from 1) say where it stood."""

    file: str
    number: int
    messages: tuple[dict[str, Any], ...] = ()
    text: str | None = None
    tools: tuple[Any, ...] = field(default=())

    @property
    def answer(self) -> str | None:
        """The text of the last assistant turn, where there is one."""
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "assistant"), None)


@dataclass(frozen=True)
class Fault:
    """One row that cannot be used, with the reason."""

    file: str
    number: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.number}: {self.reason}"


def find_files(patterns: list[str]) -> list[Path]:
    """The files that names and globs stand for, in order; DataError names every one that stands for nothing."""
    found: list[Path] = []
    missing = []
    for pattern in patterns:
        expanded = str(Path(pattern).expanduser())
        files = [expanded] if Path(expanded).is_file() else sorted(glob.glob(expanded))  # noqa: PTH207 - patterns may be absolute
        missing += [] if files else [pattern]
        found += [Path(file).resolve() for file in files]
    if missing:
        raise DataError("No such data file: " + ", ".join(missing) + ". Give a .jsonl, .jsonl.gz or .txt file.")
    return found


def read_rows(files: list[Path]) -> Iterator[Row | Fault]:
    """Every row of the files in order, usable or not. Raises DataError for a file that cannot be opened at all."""
    for file in files:
        if file.suffix in TEXT_ENDINGS:
            yield Row(file.name, 1, text=file.read_text("utf-8-sig"))
        elif file.name.endswith((".jsonl", ".jsonl.gz", ".ndjson", ".json", ".json.gz")):
            yield from _read_json_lines(file)
        else:
            raise DataError(f"{file}: unknown kind of file. Give .jsonl, .jsonl.gz or .txt.")


def _read_json_lines(file: Path) -> Iterator[Row | Fault]:
    opener = gzip.open if file.suffix == ".gz" else open
    number = 0
    try:
        with opener(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip(b"\xef\xbb\xbf \t\r\n"):
                    yield _parse(file.name, number, line)
    except (OSError, EOFError) as error:
        raise DataError(f"{file} cannot be read behind row {number}: {error}") from error


def _parse(file: str, number: int, line: bytes) -> Row | Fault:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        return Fault(file, number, f"not valid JSON ({error})")
    if not isinstance(value, dict):
        return Fault(file, number, f"a row must be an object, not {type(value).__name__}")
    row = _to_row(file, number, value)
    return row if isinstance(row, Row) else Fault(file, number, row)


def _to_row(file: str, number: int, value: dict[str, Any]) -> Row | str:
    if "messages" in value:
        fault = _message_fault(value["messages"])
        return fault or Row(file, number, tuple(value["messages"]), tools=tuple(value.get("tools") or ()))
    if "prompt" in value and "completion" in value:
        if not (isinstance(value["prompt"], str) and isinstance(value["completion"], str)):
            return "prompt and completion must be strings"
        messages = ({"role": "user", "content": value["prompt"]}, {"role": "assistant", "content": value["completion"]})
        return _message_fault(list(messages)) or Row(file, number, messages)
    if "text" in value:
        if not isinstance(value["text"], str) or not value["text"].strip():
            return "text must be a string that is not empty"
        return Row(file, number, text=value["text"])
    return f"it has none of messages, prompt and completion, text; its keys are {sorted(value)[:8]}"


def _message_fault(messages: Any) -> str | None:
    """Why these messages cannot be trained on, or None."""
    if not isinstance(messages, list) or not messages:
        return "messages must be a list that is not empty"
    for position, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            return f"message {position} has the role {role!r}; known are {', '.join(ROLES)}"
        if not isinstance(message.get("content"), str):
            return f"message {position} ({message['role']}) has no text as its content"
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers:
        return "no message has the role assistant, so nothing would be trained"
    if not all(answer.strip() for answer in answers):
        return "an assistant message is empty"
    return None
