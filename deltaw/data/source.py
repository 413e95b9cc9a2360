"""Files → conversations, row by row, without guessing types: what a row holds is what the file says.

Reads JSON lines (`messages`, `prompt`/`completion`, or `text`), the same gzipped, and plain text files. A row that
cannot be used becomes a Fault that names file and row; it never ends the reading and is never dropped silently.
"""

from __future__ import annotations

import glob
import gzip
import json
import zlib
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
        return next((m.get("content") for m in reversed(self.messages) if m["role"] == "assistant"), None)


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
        matches = sorted(glob.glob(expanded, recursive=True))  # noqa: PTH207 - patterns may be absolute
        files = [expanded] if Path(expanded).is_file() else [match for match in matches if Path(match).is_file()]
        missing += [] if files else [pattern]
        found += [Path(file).resolve() for file in files]
    if missing:
        raise DataError("No such data file: " + ", ".join(missing) + ". Give a .jsonl, .jsonl.gz or .txt file.")
    return found


def read_rows(files: list[Path]) -> Iterator[Row | Fault]:
    """Every row of the files in order, usable or not. Raises DataError for a file that cannot be opened at all."""
    for file in files:
        name = file.name.lower()
        if name.endswith(TEXT_ENDINGS):
            yield _read_text(file)
        elif name.endswith((".jsonl", ".jsonl.gz", ".ndjson", ".json", ".json.gz")):
            yield from _read_json_lines(file)
        else:
            raise DataError(f"{file}: unknown kind of file. Give .jsonl, .jsonl.gz or .txt.")


def _read_text(file: Path) -> Row | Fault:
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        return Fault(file.name, 1, f"not valid UTF-8 ({error})")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    return Row(file.name, 1, text=text) if text.strip() else Fault(file.name, 1, "the file is empty")


def _read_json_lines(file: Path) -> Iterator[Row | Fault]:
    opener = gzip.open if file.name.lower().endswith(".gz") else open
    number = 0
    try:
        with opener(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip(b"\xef\xbb\xbf \t\r\n"):
                    yield _parse(file.name, number, line)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read behind row {number}: {error}") from error


def _parse(file: str, number: int, line: bytes) -> Row | Fault:
    try:
        value = json.loads(line.decode("utf-8-sig"))
        if b"\\u" in line:  # JSON may spell half of a surrogate pair, which no tokenizer takes
            json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        return Fault(file, number, f"not valid JSON ({error})")
    if not isinstance(value, dict):
        return Fault(file, number, f"a row must be an object, not {type(value).__name__}")
    row = _to_row(file, number, value)
    return row if isinstance(row, Row) else Fault(file, number, row)


def _to_row(file: str, number: int, value: dict[str, Any]) -> Row | str:
    if "messages" in value:
        fault = _message_fault(value["messages"]) or _tools_fault(value.get("tools"))
        # A key without a value says nothing, and many templates would print it as "None".
        filled = [{k: v for k, v in m.items() if v is not None} for m in value["messages"]] if fault is None else []
        return fault or Row(file, number, tuple(filled), tools=tuple(value.get("tools") or ()))
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
        calls = message["role"] == "assistant" and bool(message.get("tool_calls"))
        if not isinstance(message.get("content"), str) and not (calls and message.get("content") is None):
            return f"message {position} ({message['role']}) has no text as its content"
        if message["role"] == "assistant" and not calls and not message["content"].strip():
            return f"message {position} (assistant) is empty"
    if not any(message["role"] == "assistant" for message in messages):
        return "no message has the role assistant, so nothing would be trained"
    return None


def _tools_fault(tools: Any) -> str | None:
    if tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        return None
    return "tools must be a list of objects"
