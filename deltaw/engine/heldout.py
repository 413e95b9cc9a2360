"""What held-out documents lose under one adapter after another, over one base: what rank is measured with.

Documents are taken in a shuffled order, so that the first of them, as many as there is time for, are a fair sample.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from deltaw.adapter import Adapter, inject
from deltaw.base.load import Base
from deltaw.data.loader import evaluation_batches
from deltaw.data.pack import Batch, batch_of
from deltaw.data.store import TokenStore
from deltaw.engine.objective import batches_to_score, score_batch
from deltaw.errors import NotFiniteError

FIRST_DOCUMENTS, MORE_DOCUMENTS = 16, 256
Progress = Callable[[int, int], None]


class HeldOut:
    """A sample of a data set over a base that has no adapter. `documents` is how many of them are measured.

    A document is a row of the data: the pieces of a long text stay together, as they tell no more than one text does.
    """

    def __init__(self, base: Base, store: TokenStore, batch_tokens: int, seed: int = 0) -> None:
        starts, sizes = _pieces(store)
        drawn = np.random.default_rng(seed).permutation(len(starts))
        self._stops = np.cumsum(sizes[drawn])  # in the store, of each document
        order = np.repeat(starts[drawn] - self._stops + sizes[drawn], sizes[drawn]) + np.arange(len(store))
        self._order = order if store.chosen is None else store.chosen[order]
        self.base, self.batch_tokens = base, batch_tokens
        self.store = TokenStore(store.stem, self._order)
        self.given = self.documents = len(starts)

    @property
    def tokens_D(self) -> np.ndarray:
        """How many tokens of each measured document carry loss, each counted by its weight."""
        return self._by_document(self.store.weight, self.documents)

    @property
    def tokens(self) -> int:
        """How many tokens of the measured documents carry loss."""
        return int(self._by_document(self.store.trained, self.documents).sum())

    def fit_into(self, seconds: float, adapter: Adapter, passes: int) -> None:
        """Measures as many documents as `passes` passes take so long for, by the time that a few of them take.

        Many documents have more in common than a few: of each read token, fewer are computed.
        """
        count, more = min(FIRST_DOCUMENTS, self.given), min(MORE_DOCUMENTS, self.given)
        with inject(self.base.model, adapter, dtype=self.base.dtype):
            self._losses(count)  # the first pass pays for what later ones find prepared
            since = time.monotonic()
            self._losses(count)
            spent = time.monotonic() - since
            few, many = self._computed(count), self._computed(more)
        read = self._by_document(self.store.lengths, self.given).cumsum()
        each = spent / max(1, few) * many / max(1.0, read[more - 1])
        affordable = seconds / max(1, passes) / each
        self.documents = max(count, int(np.searchsorted(read, affordable, side="right")))

    def _computed(self, count: int) -> int:
        """How many tokens pass through the model for the first documents."""
        return sum(batch.computed_tokens for batch in self._batches(count))

    def _batches(self, count: int) -> Iterator[Batch]:
        part = TokenStore(self.store.stem, self._order[: int(self._stops[count - 1])])
        return batches_to_score(self.base, part, self.batch_tokens)

    def losses(self, adapter: Adapter | None, documents: int | None = None) -> np.ndarray:
        """The loss summed over each measured document's tokens, [D]. Raises NotFiniteError when one is not finite."""
        count = self.documents if documents is None else documents
        if adapter is None:
            return self._losses(count)
        with inject(self.base.model, adapter, dtype=self.base.dtype):
            return self._losses(count)

    def curve_losses(self, adapters: Sequence[Adapter | None], progress: Progress | None = None) -> np.ndarray:
        """`losses` of each, [K, D]."""
        found = []
        for number, adapter in enumerate(adapters):
            if progress is not None:
                progress(number, len(adapters))
            found.append(self.losses(adapter))
        return np.stack(found)

    def batches(self, first: int, stop: int) -> list[Batch]:
        """The documents from `first` to `stop` of the sample's order, in batches."""
        begin, end = (int(self._stops[number - 1]) if number else 0 for number in (first, stop))
        part = TokenStore(self.store.stem, self._order[begin:end])
        cut = evaluation_batches(part, self.batch_tokens)
        return [batch_of(part, documents).to(self.base.device) for documents in cut]

    def _losses(self, count: int) -> np.ndarray:
        losses = np.zeros(int(self._stops[count - 1]))
        for batch in self._batches(count):
            scores, pieces = score_batch(self.base, batch), list(batch.documents)
            owners_N = batch.owners_of(scores.places_N).cpu().numpy()
            losses[pieces] = np.bincount(owners_N, scores.weighted_N.cpu().double().numpy(), len(pieces))
        if not math.isfinite(losses.sum()):
            raise NotFiniteError(f"The loss over these {count} documents is {losses.sum()}: the model is broken.")
        return self._by_document(losses, count)

    def _by_document(self, values: np.ndarray, count: int) -> np.ndarray:
        """What the pieces of each of the first documents add up to, [D]."""
        stops = self._stops[:count]
        return np.add.reduceat(values[: stops[-1]].astype(np.float64), np.append(0, stops[:-1]))


def _pieces(store: TokenStore) -> tuple[np.ndarray, np.ndarray]:
    """Where the pieces of each row begin in the store, in which they follow each other, and how many there are."""
    places = [store.place(number) for number in range(len(store))]
    starts = np.array([n for n, place in enumerate(places) if not n or place != places[n - 1]], np.int64)
    return starts, np.diff(np.append(starts, len(store)))
