"""Examples in one mapped file of tokens with offsets, which may be larger than memory."""

from __future__ import annotations

import hashlib
import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path

import numpy as np

from deltaw.data.example import Example
from deltaw.disk import disk_errors
from deltaw.errors import DiskError

_COUNTED = 65_536


class TokenStore:
    """Examples in mapped files: `.tokens` int32, `.weights` float32, `.offsets` and `.rows` int64,
    and the names of their `.files`.

    Reading touches only the pages of the documents asked for, so a store may be larger than memory. `chosen` makes it a
    view of these documents alone, in this order. DiskError when files are missing, or not as long as they were.
    """

    def __init__(self, stem: Path, chosen: np.ndarray | None = None) -> None:
        self.stem, self.chosen = stem, chosen
        cut_short = f"The token files {stem}.* were cut short. Remove {stem.parent}; they are made anew."
        try:
            with disk_errors("open", stem):
                self._open()
        except (ValueError, IndexError) as error:  # of numpy and json, where a file ends amid a number
            raise DiskError(cut_short) from error
        lengths = {"tokens": len(self._tokens), "weights": len(self._weights), "rows": len(self._rows)}
        whole = {"tokens": self.offsets[-1], "weights": self.offsets[-1], "rows": len(self.offsets) - 1}
        if lengths != whole:
            raise DiskError(cut_short)

    def _open(self) -> None:
        self.offsets = np.fromfile(_file(self.stem, "offsets"), np.int64)
        self._rows = np.fromfile(_file(self.stem, "rows"), np.int64)
        self._files = json.loads(_file(self.stem, "files").read_text("utf-8"))
        empty = self.offsets[-1] == 0
        self._tokens = np.zeros(0, np.int32) if empty else np.memmap(_file(self.stem, "tokens"), np.int32, "r")
        self._weights = np.zeros(0, np.float32) if empty else np.memmap(_file(self.stem, "weights"), np.float32, "r")

    @classmethod
    def write(cls, stem: Path, examples: Iterable[Example]) -> TokenStore:
        """Writes the examples one by one, whatever their number, and opens the result. Raises DiskError."""
        offsets, rows = array("q", [0]), array("q")
        files: list[tuple[int, str]] = []  # (first document, name)
        with disk_errors("write", stem):
            stem.parent.mkdir(parents=True, exist_ok=True)
            with _file(stem, "tokens").open("wb") as tokens, _file(stem, "weights").open("wb") as weights:
                for example in examples:
                    if not files or files[-1][1] != example.file:
                        files.append((len(rows), example.file))
                    tokens.write(example.tokens.astype(np.int32).tobytes())
                    weights.write(example.weights.astype(np.float32).tobytes())
                    offsets.append(offsets[-1] + len(example.tokens))
                    rows.append(example.row)
            np.asarray(offsets, np.int64).tofile(_file(stem, "offsets"))
            np.asarray(rows, np.int64).tofile(_file(stem, "rows"))
            _file(stem, "files").write_text(json.dumps(files), "utf-8")
        return cls(stem)

    def __len__(self) -> int:
        return len(self._rows) if self.chosen is None else len(self.chosen)

    def __getitem__(self, document: int) -> Example:
        stored = document if self.chosen is None else self.chosen[document]
        part = slice(self.offsets[stored], self.offsets[stored + 1])
        return Example(np.asarray(self._tokens[part]), np.asarray(self._weights[part]), int(self._rows[stored]))

    def digest(self) -> str:
        """sha256 over all documents of the files, of which this may be a view."""
        whole, found = TokenStore(self.stem), hashlib.sha256()
        for number in range(len(whole)):
            found.update(whole[number].as_bytes())
        return found.hexdigest()

    def view(self, chosen: np.ndarray) -> TokenStore:
        """These documents of the whole store alone."""
        assert self.chosen is None, "a view of a view"
        return TokenStore(self.stem, chosen)

    @property
    def rows(self) -> np.ndarray:
        """The row number of each document."""
        return self._rows if self.chosen is None else self._rows[self.chosen]

    def place(self, document: int) -> tuple[str, int]:
        """(file, row) of a document."""
        stored = document if self.chosen is None else int(self.chosen[document])
        number = bisect_right(self._files, stored, key=lambda entry: entry[0]) - 1
        return self._files[number][1], int(self._rows[stored])

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each document."""
        lengths = np.diff(self.offsets)
        return lengths if self.chosen is None else lengths[self.chosen]

    @property
    def tokens(self) -> int:
        """Number of tokens in all documents."""
        return int(self.lengths.sum())

    @cached_property
    def trained(self) -> np.ndarray:
        """Number of tokens of each document that carry loss; its first never does, nothing predicts it."""
        return self._sums(lambda weights: weights != 0).astype(np.int64)

    @cached_property
    def weight(self) -> np.ndarray:
        """The sum of the weights of these tokens, document by document: what a mean over them is divided by."""
        return self._sums(lambda weights: weights.astype(np.float64))

    def _sums(self, value: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """The sum of a value of the weights over each document's tokens but its first."""
        stored = len(self._rows)
        sums = np.zeros(stored)
        for first in range(0, stored, _COUNTED):  # a piece at a time: the weights may be larger than memory
            last = min(stored, first + _COUNTED)
            start, stop = self.offsets[first], self.offsets[last]
            summed = np.append(0, np.cumsum(value(self._weights[start:stop])))
            places = self.offsets[first : last + 1] - start
            sums[first:last] = summed[places[1:]] - summed[np.minimum(places[:-1] + 1, places[1:])]
        return sums if self.chosen is None else sums[self.chosen]

    @property
    def trained_tokens(self) -> int:
        """Number of tokens that carry loss in all documents."""
        return int(self.trained.sum())


def _file(stem: Path, kind: str) -> Path:
    return stem.with_name(f"{stem.name}.{kind}")
