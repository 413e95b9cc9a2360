"""What decides which tokens a row gives, by name: so that tokens can be found again without opening a tokenizer."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from deltaw.data.chat import Encoder

# Raised when the same rows would give other examples or findings, so that no entry of an older version is used.
ENCODING_VERSION = 5
MASKS = ("assistant", "last", "completion", "all")


def encoding_digest(
    tokenizer_digest: str, max_length: int, train_on: str, allow: Iterable[str], day: datetime.date | None
) -> str:
    """sha256 over tokenizer with template, mask, length, and the day where the template prints it."""
    parts = [ENCODING_VERSION, tokenizer_digest, max_length, train_on, sorted(allow), None if day is None else str(day)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class Encoding(Protocol):
    """An Encoder, or one that opens its tokenizer when it is needed."""

    @property
    def digest(self) -> str:
        """The name of what decides which tokens a row gives."""

    @property
    def allow(self) -> frozenset[str]:
        """Findings that shall not stop a run."""

    def ready(self) -> Encoder:
        """The encoder itself."""


@dataclass
class LazyEncoder:
    """An encoder whose digest is known from files, and whose tokenizer `open` opens when rows must be encoded."""

    open: Callable[[], Encoder]
    digest: str
    allow: frozenset[str] = frozenset()

    def ready(self) -> Encoder:
        """The encoder, opened."""
        return self.open()
