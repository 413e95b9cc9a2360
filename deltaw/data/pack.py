"""Examples → flat ragged batches. No padding exists, and what documents have in common at their start can stand once.

Documents that begin alike (a system prompt, a question with several answers) then continue the rows of that beginning:
`before` names them. Each prediction is made once for all documents that share it, with the sum of their weights, so
loss and gradients are those of the documents one by one.

Legend: T tokens of one batch, laid end to end; `bounds` holds each document's first token and, last, T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deltaw.data.example import Example
from deltaw.data.store import TokenStore

# A shorter beginning saves less than the longer rows of its attention cost.
LEAST_SHARED = 16


@dataclass(frozen=True)
class Batch:
    """A flat row of documents. `targets_T` is the next token, `weights_T` its weight (0 at each document's end).

    `labelled_N` names the rows whose weight is not 0. `tokens` counts what the documents deliver, context included,
    `trained_tokens` what of it carries loss; `computed_tokens` is the length of the row. Where documents begin alike,
    `bounds` also holds what they have in common, `before` the rows that each continues, and `owners` which document
    each is of (what is in common: the first of them); `before` is empty where nothing is.
    """

    tokens_T: Tensor
    positions_T: Tensor
    targets_T: Tensor
    weights_T: Tensor
    labelled_N: Tensor
    bounds: tuple[int, ...]
    owners: tuple[int, ...]
    documents: tuple[int, ...]
    tokens: int
    trained_tokens: int
    before: tuple[tuple[int, int], ...] = ()

    @property
    def computed_tokens(self) -> int:
        """Number of tokens that pass through the model."""
        return len(self.tokens_T)

    @property
    def weight(self) -> float:
        """Sum of the weights: what the loss of a step is divided by."""
        return float(self.weights_T.cpu().sum(dtype=torch.float64))  # not every device has fp64

    def owners_of(self, places_N: Tensor) -> Tensor:
        """Which of the documents each row is of, [N], in the order in which they were given."""
        bounds, owners = (torch.tensor(numbers, device=places_N.device) for numbers in (self.bounds[1:], self.owners))
        return owners[torch.bucketize(places_N, bounds, right=True)]

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        names = ("tokens_T", "positions_T", "targets_T", "weights_T", "labelled_N")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def flat_batch(examples: Sequence[Example], documents: Sequence[int] = ()) -> Batch:
    """The examples end to end, each predicting its own next tokens only."""
    return _batch([_piece(example) for example in examples], examples, documents, range(len(examples)), ())


def shared_batch(examples: Sequence[Example], documents: Sequence[int] = (), *, scored: bool = False) -> Batch:
    """The examples with every beginning that several have in common standing once, before those that continue it.

    Where they are to be `scored`, nothing that carries loss is shared, so that each loss is of one document.
    """
    groups = common_beginnings([context(example) if scored else example.tokens for example in examples])
    if all(not shared for _, shared in groups):
        return flat_batch(examples, documents)
    pieces: list[_Piece] = []
    before: list[tuple[int, int]] = []
    owners: list[int] = []
    rows = 0
    for members, shared in groups:
        whole = [_piece(examples[member]) for member in members]
        if shared:
            first = whole[0]
            common = first.part(0, shared, np.sum([piece.weights[:shared] for piece in whole], axis=0))
            pieces.append(common)
            before.append((0, 0))
            owners.append(members[0])
        start, rows = rows, rows + shared
        for member, piece in zip(members, whole, strict=True):
            own = piece.part(shared, len(piece.tokens), piece.weights[shared:])
            pieces.append(own)
            before.append((start, start + shared) if shared else (0, 0))
            owners.append(member)
            rows += len(own.tokens)
    return _batch(pieces, examples, documents, owners, before)


def context(example: Example) -> np.ndarray:
    """The tokens before the first that carries loss."""
    trained = np.flatnonzero(example.weights)
    return example.tokens[: int(trained[0]) if len(trained) else 0]


def common_beginnings(documents: Sequence[np.ndarray]) -> list[tuple[list[int], int]]:
    """Groups of documents, each with how many first tokens stand once for it; (members, 0) shares nothing.

    Sorted, documents that begin alike are neighbours. Neighbours are joined from the longest common beginning down, and
    a join stands while it saves at least the tokens that its two sides save by themselves. The last token in common
    stays with each document: it predicts what follows there.
    """
    order = sorted(range(len(documents)), key=lambda number: documents[number].astype(">i4").tobytes())
    alike = [_alike(documents[a], documents[b]) for a, b in pairwise(order)]
    sides = {place: _Joined([number], 0, [([number], 0)]) for place, number in enumerate(order)}
    first = list(range(len(order)))  # of the joined places around a place, as far as it is at an end of them
    last = list(range(len(order)))
    for place in sorted(range(len(alike)), key=lambda place: -alike[place]):
        if alike[place] <= LEAST_SHARED:
            break
        start, stop = first[place], last[place + 1]
        left, right = sides[start], sides.pop(place + 1)
        members, saved = [*left.members, *right.members], left.saved + right.saved
        together = (len(members) - 1) * (alike[place] - 1)
        groups = [(members, alike[place] - 1)] if together >= saved else [*left.groups, *right.groups]
        sides[start] = _Joined(members, max(together, saved), groups)
        first[stop], last[start] = start, stop
    return [(sorted(members), shared) for side in sides.values() for members, shared in side.groups]


class _Joined(NamedTuple):
    """Neighbours by their beginnings: how many tokens sharing saves among them, and in which groups."""

    members: list[int]
    saved: int
    groups: list[tuple[list[int], int]]


def _alike(one: np.ndarray, other: np.ndarray) -> int:
    """How many first tokens two documents have in common."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length


class _Piece(NamedTuple):
    """Part of a document: its tokens, the next tokens, their weights, and where the part begins."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    first: int

    def part(self, start: int, stop: int, weights: np.ndarray) -> _Piece:
        """Some rows of it, with these weights."""
        return _Piece(self.tokens[start:stop], self.targets[start:stop], weights, self.first + start)


def _piece(example: Example) -> _Piece:
    targets = np.append(example.tokens[1:], np.int32(0))
    return _Piece(example.tokens, targets, np.append(example.weights[1:], np.float32(0)), 0)


def _batch(
    pieces: Sequence[_Piece],
    examples: Sequence[Example],
    documents: Sequence[int],
    owners: Sequence[int],
    before: Sequence[tuple[int, int]],
) -> Batch:
    positions = [np.arange(piece.first, piece.first + len(piece.tokens)) for piece in pieces]
    bounds = np.cumsum([0, *(len(piece.tokens) for piece in pieces)])
    weights = np.concatenate([piece.weights for piece in pieces]).astype(np.float32)
    return Batch(
        tokens_T=torch.from_numpy(np.concatenate([piece.tokens for piece in pieces]).astype(np.int64)),
        positions_T=torch.from_numpy(np.concatenate(positions)),
        targets_T=torch.from_numpy(np.concatenate([piece.targets for piece in pieces]).astype(np.int64)),
        weights_T=torch.from_numpy(weights),
        labelled_N=torch.from_numpy(np.flatnonzero(weights)),  # here, since a GPU would be waited for
        bounds=tuple(int(bound) for bound in bounds),
        owners=tuple(owners),
        documents=tuple(documents),
        tokens=sum(len(example.tokens) for example in examples),
        trained_tokens=sum(int((example.weights[1:] > 0).sum()) for example in examples),
        before=tuple(before),
    )


def batch_of(store: TokenStore, documents: Sequence[int]) -> Batch:
    """These documents of a store as one flat batch."""
    return flat_batch([store[document] for document in documents], documents)


def scored_batch(store: TokenStore, documents: Sequence[int], *, share: bool) -> Batch:
    """These documents of a store to be scored, with `share` what they have in common before their losses once."""
    if not share:
        return batch_of(store, documents)
    return shared_batch([store[document] for document in documents], documents, scored=True)
