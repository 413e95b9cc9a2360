"""The order of the data: a pure function of (seed, epoch, position), and the cutting of steps into micro-batches.

A run needs to remember one number, how many documents it has taken. A Feistel network permutes 0..n-1 without a table,
so that any position of any epoch is found at once, for any n.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from deltaw.config import Settings
from deltaw.data.pack import Batch, batch_of, common_beginnings, context, shared_batch
from deltaw.data.store import TokenStore

if TYPE_CHECKING:
    from deltaw.data.prepare import DataSet

_ROUNDS = 4
# Tokens of evaluated documents among which is looked for what they have in common, and which are in memory for that.
ALIKE_AMONG = 1 << 18


def shuffled(index: int, count: int, seed: int, epoch: int) -> int:
    """Where `index` goes in the permutation of 0..count-1 that belongs to (seed, epoch).

    A balanced Feistel network over the next even power of two, walked until it falls below `count` (Black & Rogaway,
    "Ciphers with arbitrary finite domains", 2002, §3); fewer than four walks on average.
    """
    assert 0 <= index < count
    half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    while True:
        index = _feistel(index, half_bits, keys)
        if index < count:
            return index


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = hashlib.sha256(f"deltaw order {seed} {epoch}".encode()).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "big") for i in range(_ROUNDS))


def _feistel(value: int, half_bits: int, keys: Sequence[int]) -> int:
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for key in keys:
        mixed = (right + key) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        left, right = right, left ^ (mixed >> 32 & mask)
    return left << half_bits | right


@dataclass(frozen=True)
class Step:
    """What one optimiser step trains on: documents, cut into micro-batches; `next_position` is where to go on."""

    micro_batches: list[list[int]]
    next_position: int


class _Part(NamedTuple):
    """One source: so many `documents` from `first` on, which fill `drawn` places of an epoch from `place` on."""

    first: int
    documents: int
    place: int
    drawn: int


def _parts(mix: Sequence[tuple[int, float]]) -> list[_Part]:
    parts: list[_Part] = []
    first = place = 0
    for count, weight in mix:
        drawn = max(1, round(count * weight)) if count else 0
        if drawn:
            parts.append(_Part(first, count, place, drawn))
        first, place = first + count, place + drawn
    return parts


class Loader:
    """Cuts a store into optimiser steps of about `batch_tokens` tokens, in the order of (seed, epoch, position).

    `mix` is (documents, weight) for each source, in the order in which the store holds them: a document of a source
    with weight 2 appears twice in an epoch, one with weight 0.5 in every second one. With `share`, what documents of a
    micro-batch have in common at their start is computed once; where attention `copies` its keys for each of them, as
    on a GPU, a micro-batch has no more of them for that.
    """

    def __init__(
        self,
        store: TokenStore,
        batch_tokens: int,
        micro_tokens: int,
        seed: int,
        mix: Sequence[tuple[int, float]] = (),
        *,
        share: bool = False,
        copies: bool = False,
    ) -> None:
        self.share, self.copies = share, copies
        self.store, self.batch_tokens, self.micro_tokens, self.seed = store, batch_tokens, micro_tokens, seed
        self.lengths = store.lengths
        self._parts = _parts(mix or [(len(store), 1.0)])
        self.epoch_documents = sum(part.drawn for part in self._parts)

    def document(self, position: int) -> int:
        """The document at a position counted over all epochs.

        The places of an epoch are shuffled over all sources. A source that fills `drawn` of them goes through its own
        documents in shuffled rounds, each round whole before the next begins, over the ends of epochs.
        """
        epoch, index = divmod(position, self.epoch_documents)
        place = shuffled(index, self.epoch_documents, self.seed, epoch)
        part = self._parts[bisect_right(self._parts, place, key=lambda part: part.place) - 1]
        if part.drawn == part.documents:
            return part.first + place - part.place
        turn, within = divmod(epoch * part.drawn + place - part.place, part.documents)
        return part.first + shuffled(within, part.documents, self.seed + 1 + part.first, turn)

    def step(self, position: int, stop: int | None = None) -> Step:
        """The step that begins at `position`: whole documents until the next would pass `batch_tokens`, at least one.

        `stop` is a position that no step passes (the end of the last epoch).
        """
        documents = self._taken(position, stop)
        return Step(self.micro_batches(documents), position + len(documents))

    def micro_batches(self, documents: Sequence[int]) -> list[list[int]]:
        """The documents of a step in as few groups of at most `micro_tokens` computed tokens as hold them, about alike.

        One document may be longer than a group.
        """
        if not self.share:
            return _evenly(lambda limit: self.cut(documents, limit), self.micro_tokens)
        alike = common_beginnings([self.store[document].tokens for document in documents])
        return _evenly(lambda limit: self.cut_alike(documents, alike, limit), self.micro_tokens)

    def _taken(self, position: int, stop: int | None) -> list[int]:
        documents: list[int] = []
        total = 0
        while stop is None or position + len(documents) < stop:
            document = self.document(position + len(documents))
            total += int(self.lengths[document])
            if documents and total > self.batch_tokens:
                break
            documents.append(document)
        return documents

    def cut_alike(
        self, documents: Sequence[int], alike: Sequence[tuple[list[int], int]], micro_tokens: int
    ) -> list[list[int]]:
        """As `cut`, with documents that begin alike side by side, and what they share counted once for each group."""
        groups: list[list[int]] = []
        total = 0
        for members, beginning in alike:
            fresh, shared = True, 0 if self.copies else beginning
            for document in (documents[member] for member in members):
                own = int(self.lengths[document]) - shared
                if not groups or total + own + (shared if fresh else 0) > micro_tokens:
                    groups.append([])
                    total, fresh = 0, True
                groups[-1].append(document)
                total, fresh = total + own + (shared if fresh else 0), False
        return groups

    def cut(self, documents: Sequence[int], micro_tokens: int) -> list[list[int]]:
        """Consecutive documents grouped so that no group of several has more than `micro_tokens` tokens."""
        groups: list[list[int]] = []
        total = 0
        for document in documents:
            length = int(self.lengths[document])
            if not groups or total + length > micro_tokens:
                groups.append([])
                total = 0
            groups[-1].append(document)
            total += length
        return groups

    def batches(self, step: Step) -> list[Batch]:
        """The step's micro-batches, read from the store."""
        if self.share:
            return [shared_batch([self.store[d] for d in documents], documents) for documents in step.micro_batches]
        return [batch_of(self.store, documents) for documents in step.micro_batches]

    def first_steps(self, count: int, stop: int | None = None) -> Iterator[list[Batch]]:
        """The micro-batches of each of the first `count` steps, or of all until position `stop`."""
        position = 0
        for _ in range(count):
            if stop is not None and position >= stop:
                return
            step = self.step(position, stop)
            yield self.batches(step)
            position = step.next_position

    def stop_after(self, epochs: float | None) -> int | None:
        """The position at which so many epochs end; None where there is no end of them."""
        return None if epochs is None else max(1, round(epochs * self.epoch_documents))

    def steps_until(self, stop: int) -> int:
        """How many steps take the documents up to position `stop`."""
        position = steps = 0
        while position < stop:
            position, steps = position + len(self._taken(position, stop)), steps + 1
        return steps


def heaviest_documents(lengths: np.ndarray, micro_tokens: int, turns: float = 1) -> list[int]:
    """The longest document, and as many of the next longest as one forward pass may hold beside it.

    Where all of them fit into one, and are taken up to `turns` times, it may hold the longest as often as they fit.
    """
    order = lengths.argsort(kind="stable")[::-1]
    order = np.repeat(order, int(min(turns, 1 + micro_tokens // max(1, lengths.sum()))))
    count = max(1, int(np.searchsorted(lengths[order].cumsum(), micro_tokens, side="right")))
    found: list[int] = order[:count].tolist()
    return found


def _evenly(cut: Callable[[int], list[list[int]]], most: int) -> list[list[int]]:
    """The cut at the lowest limit that needs no more groups than `most` does: a short last group would be slow."""
    groups, low, high = cut(most), 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(cut(middle)) <= len(groups) else (middle + 1, high)
    return cut(high)


def evaluated_documents(store: TokenStore, most_rows: int | None = None) -> np.ndarray:
    """Which documents are measured: all, or a fair sample of `most_rows`, the same each time, in their order.

    The first ones would be those of the first file, or of one kind where a file is sorted.
    """
    count = len(store)
    if most_rows is None or most_rows >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).permutation(count)[:most_rows])


def evaluation_batches(
    store: TokenStore, batch_tokens: int, most_rows: int | None = None, *, share: bool = False
) -> list[list[int]]:
    """The evaluated documents, shorter ones first, in batches of at most `batch_tokens` computed tokens.

    With `share`, documents with the same beginning before their losses are together, by the shortest of them.
    """
    documents = evaluated_documents(store, most_rows)
    order = documents[np.argsort(store.lengths[documents], kind="stable")].tolist()
    loader = Loader(store, batch_tokens, batch_tokens, 0)
    if not share:
        return loader.cut(order, batch_tokens)
    batches = []
    for some in loader.cut(order, max(batch_tokens, ALIKE_AMONG)):
        alike = common_beginnings([context(store[document]) for document in some])
        batches += loader.cut_alike(some, sorted(alike), batch_tokens)
    return batches


# -- by the settings of a run: what trains, probes and plans it must agree ---------------------------------------------


def loader_of(train: DataSet, settings: Settings, *, share: bool, micro_tokens: int | None = None) -> Loader:
    """The order in which a run takes its documents; `micro_tokens` stands in for those of the settings."""
    micro = int(settings.micro_tokens) if micro_tokens is None else micro_tokens
    copies = settings.device != "cpu"
    return Loader(train.store, int(settings.batch_tokens), micro, settings.seed, train.mix, share=share, copies=copies)


def heaviest_pass(
    train: DataSet, settings: Settings, micro_tokens: int | None = None, lengths: np.ndarray | None = None
) -> list[int]:
    """The documents of the heaviest pass that a run may come to; `lengths` stand in for their own."""
    micro = int(settings.micro_tokens) if micro_tokens is None else micro_tokens
    lengths = train.store.lengths if lengths is None else lengths
    return heaviest_documents(lengths, min(micro, int(settings.batch_tokens)), train.turns(settings.whole_epochs))
