"""Examples → flat ragged batches. No padding exists.

Legend: T tokens of one batch, laid end to end; `bounds` holds each document's first token and, last, T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from deltaw.data.example import Example
from deltaw.data.store import TokenStore


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


def batch_of(store: TokenStore, documents: Sequence[int]) -> Batch:
    """These documents of a store as one flat batch."""
    return flat_batch([store[document] for document in documents], documents)
