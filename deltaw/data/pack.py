"""Examples → one mapped file of tokens with offsets → flat ragged batches. No padding exists.

Legend: T tokens of one batch, laid end to end; `bounds` holds each document's first token and, last, T.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deltaw.data.chat import Example
from deltaw.disk import disk_errors


@dataclass(frozen=True)
class Batch:
    """A flat row of documents. `targets_T` is the next token, `weights_T` its weight (0 at each document's end)."""

    tokens_T: Tensor
    positions_T: Tensor
    targets_T: Tensor
    weights_T: Tensor
    bounds: tuple[int, ...]
    documents: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Number of tokens, context included."""
        return len(self.tokens_T)

    @property
    def trained_tokens(self) -> int:
        """Number of tokens that carry loss."""
        return int((self.weights_T > 0).sum())

    @property
    def weight(self) -> float:
        """Sum of the weights: what the loss of a step is divided by."""
        return float(self.weights_T.sum(dtype=torch.float64))

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        names = ("tokens_T", "positions_T", "targets_T", "weights_T")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def flat_batch(examples: Sequence[Example], documents: Sequence[int] = ()) -> Batch:
    """The examples end to end, each predicting its own next tokens only."""
    tokens = np.concatenate([example.tokens for example in examples]).astype(np.int64)
    shifted = [np.append(example.weights[1:], np.float32(0)) for example in examples]
    bounds = np.cumsum([0, *(len(example.tokens) for example in examples)])
    positions = np.concatenate([np.arange(len(example.tokens)) for example in examples])
    return Batch(
        tokens_T=torch.from_numpy(tokens),
        positions_T=torch.from_numpy(positions),
        targets_T=torch.from_numpy(np.append(tokens[1:], 0)),
        weights_T=torch.from_numpy(np.concatenate(shifted).astype(np.float32)),
        bounds=tuple(int(bound) for bound in bounds),
        documents=tuple(documents),
    )


class TokenStore:
    """All examples of one split in mapped files: `.tokens` int32, `.weights` float32, `.offsets` and `.rows` int64.

    Reading touches only the pages of the documents asked for, so a store may be larger than memory.
    """

    def __init__(self, stem: Path) -> None:
        self.stem = stem
        self.offsets = np.fromfile(_file(stem, "offsets"), np.int64)
        self.rows = np.fromfile(_file(stem, "rows"), np.int64)
        empty = self.offsets[-1] == 0
        self._tokens = np.zeros(0, np.int32) if empty else np.memmap(_file(stem, "tokens"), np.int32, "r")
        self._weights = np.zeros(0, np.float32) if empty else np.memmap(_file(stem, "weights"), np.float32, "r")

    @classmethod
    def write(cls, stem: Path, examples: Iterable[Example]) -> TokenStore:
        """Writes the examples one by one, whatever their number, and opens the result. Raises DiskError."""
        offsets, rows = [0], []
        with disk_errors("write", stem):
            stem.parent.mkdir(parents=True, exist_ok=True)
            with _file(stem, "tokens").open("wb") as tokens, _file(stem, "weights").open("wb") as weights:
                for example in examples:
                    tokens.write(example.tokens.astype(np.int32).tobytes())
                    weights.write(example.weights.astype(np.float32).tobytes())
                    offsets.append(offsets[-1] + len(example.tokens))
                    rows.append(example.row)
            np.asarray(offsets, np.int64).tofile(_file(stem, "offsets"))
            np.asarray(rows, np.int64).tofile(_file(stem, "rows"))
        return cls(stem)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, document: int) -> Example:
        part = slice(self.offsets[document], self.offsets[document + 1])
        return Example(np.asarray(self._tokens[part]), np.asarray(self._weights[part]), int(self.rows[document]))

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each document."""
        return np.diff(self.offsets)

    @property
    def tokens(self) -> int:
        """Number of tokens in all documents."""
        return int(self.offsets[-1])

    @property
    def trained_tokens(self) -> int:
        """Number of tokens that carry loss; a document's first token never does, nothing predicts it."""
        trained = int(np.count_nonzero(self._weights))
        return trained - int(np.count_nonzero(self._weights[self.offsets[:-1]])) if len(self) else 0

    def batch(self, documents: Sequence[int]) -> Batch:
        """These documents as one flat batch."""
        return flat_batch([self[document] for document in documents], documents)


def _file(stem: Path, kind: str) -> Path:
    return stem.with_name(f"{stem.name}.{kind}")
