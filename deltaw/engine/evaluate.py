"""Held-out numbers from one flat pass: loss, perplexity, exact match, and accuracy where answers are labels.

Exact match needs no generation: greedy decoding gives the reference answer if and only if each of its tokens, the end
of turn included, is the most likely one after the tokens before it. For labels, the answer is the label whose first
token is likelier than the other labels' first tokens; where two labels begin alike, the whole label is scored.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltaw.base.load import Base
from deltaw.data.example import Example
from deltaw.data.pack import LEAST_SHARED, flat_batch, shared_batch
from deltaw.data.prepare import DataSet, Labels
from deltaw.data.store import TokenStore
from deltaw.engine.objective import batches_to_score, score_batch, scores_shared
from deltaw.errors import NotFiniteError

Progress = Callable[[int, int], None]


@dataclass
class Evaluation:
    """`loss_sum` over `tokens` trained tokens of `rows` documents, each token counted by its weight, `weight` in all.

    Accuracy and its labels only where they apply.
    """

    loss_sum: float
    weight: float
    tokens: int
    rows: int
    exact: int
    seconds: float
    correct: int | None = None
    choices: list[int] | None = None

    @property
    def loss(self) -> float:
        """Mean loss per trained token, in nats, as training means it."""
        return self.loss_sum / (self.weight or 1.0)

    def as_dict(self) -> dict[str, float | int]:
        """The numbers for tables and JSON, with 95 % Wilson intervals for shares."""
        low, high = wilson(self.exact, self.rows)
        result: dict[str, float | int] = {
            "rows": self.rows,
            "tokens": self.tokens,
            "loss": self.loss,
            "perplexity": math.exp(min(self.loss, 700.0)),
            "exact_match": self.exact / max(1, self.rows),
            "exact_match_low": low,
            "exact_match_high": high,
            "seconds": self.seconds,
        }
        if self.correct is not None:
            low, high = wilson(self.correct, self.rows)
            result |= {"accuracy": self.correct / max(1, self.rows), "low": low, "high": high}
        return result


def wilson(hits: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927): right also near 0 and 1, where ± standard error is not."""
    if count == 0:
        return 0.0, 1.0
    share, square = hits / count, z * z
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def held_out_loss(base: Base, store: TokenStore, batch_tokens: int, most_rows: int | None) -> tuple[float, int, float]:
    """(mean loss, trained tokens, seconds) over a fair sample of `most_rows` documents, or over all.

    The mean is that of training: each token counts by its weight.
    """
    started, loss_sum, weight, tokens = time.monotonic(), 0.0, 0.0, 0
    for batch in batches_to_score(base, store, batch_tokens, most_rows):
        scores = score_batch(base, batch)
        loss_sum += float(scores.weighted_N.cpu().sum(dtype=torch.float64))
        weight += batch.weight
        tokens += len(scores.losses_N)
    return loss_sum / (weight or 1.0), tokens, time.monotonic() - started


def evaluate(base: Base, data: DataSet, batch_tokens: int, progress: Progress | None = None) -> Evaluation:
    """All numbers of `Evaluation` over a data set, with whatever adapter is active in the base."""
    store, labels = data.store, data.labels()
    started = time.monotonic()
    first_tokens = None if labels is None else _first_tokens(data, labels)
    result = Evaluation(0.0, 0.0, 0, len(store), 0, 0.0)
    choices = np.full(len(store), -1)
    done = 0
    for batch in batches_to_score(base, store, batch_tokens):
        scores, count = score_batch(base, batch, first_tokens or ()), len(batch.documents)
        result.loss_sum += float(scores.weighted_N.cpu().sum(dtype=torch.float64))
        result.weight += batch.weight
        result.tokens += len(scores.losses_N)
        owners_N = batch.owners_of(scores.places_N)
        result.exact += count - len(owners_N[~scores.hits_N].unique())
        if first_tokens is not None:
            starts_D = _answer_starts(scores.places_N, owners_N, count)
            choices[list(batch.documents)] = scores.logits_NC[starts_D].argmax(1).cpu().numpy()
        done += count
        if progress is not None:
            progress(done, len(store))
    if not math.isfinite(result.loss):
        raise NotFiniteError(f"The loss over these {len(store)} documents is {result.loss}: the model is broken.")
    if labels is not None:
        chosen = choices.tolist() if first_tokens is not None else _score_whole_labels(base, data, labels, batch_tokens)
        result.choices = chosen
        result.correct = sum(choice == truth for choice, truth in zip(chosen, labels.of_document, strict=True))
    result.seconds = time.monotonic() - started
    return result


def _answer_starts(places_N: Tensor, owners_N: Tensor, count: int) -> Tensor:
    """Which of the labelled places predicts the first token of each document's last trained stretch, [D]."""
    apart_N = (places_N.diff() != 1) | (owners_N.diff() != 0)
    begins = torch.cat([apart_N.new_ones(1), apart_N]).nonzero()[:, 0]
    return begins.new_zeros(count).scatter_reduce(0, owners_N[begins], begins, "amax")


def _answer_tokens(data: DataSet, labels: Labels) -> list[list[int]]:
    """The tokens of each label as they stand in a document that has it."""
    documents = {label: document for document, label in enumerate(labels.of_document)}
    answers = []
    for label in range(len(labels.names)):
        example = data.store[documents[label]]
        begin = _last_answer(example)
        answers.append(example.tokens[begin:][example.weights[begin:] > 0].tolist())
    return answers


def _last_answer(example: Example) -> int:
    """Where the last trained stretch of a document begins."""
    trained = example.weights > 0
    return int(np.flatnonzero(trained & ~np.append(False, trained[:-1]))[-1])


def _first_tokens(data: DataSet, labels: Labels) -> list[int] | None:
    answers = _answer_tokens(data, labels)
    firsts = [answer[0] for answer in answers]
    return firsts if len(set(firsts)) == len(labels.names) else None


def _score_whole_labels(base: Base, data: DataSet, labels: Labels, batch_tokens: int) -> list[int]:
    """The label with the lowest summed loss for each document, each label put in the answer's place."""
    answers, choices = _answer_tokens(data, labels), list[int]()
    for documents in _labelled_batches(base, data.store, answers, batch_tokens):
        variants = [_answered(data.store[document], answer) for document in documents for answer in answers]
        batch = shared_batch(variants, scored=True) if scores_shared(base) else flat_batch(variants)
        batch = batch.to(base.device)
        scores = score_batch(base, batch)
        sums = scores.losses_N.new_zeros(len(variants)).index_add_(0, batch.owners_of(scores.places_N), scores.losses_N)
        choices += sums.reshape(-1, len(answers)).argmin(1).tolist()
    return choices


def _labelled_batches(
    base: Base, store: TokenStore, answers: Sequence[Sequence[int]], batch_tokens: int
) -> Iterator[list[int]]:
    """The documents in order, so many at once that with each answer they have at most `batch_tokens` tokens."""
    share, documents, total = scores_shared(base), list[int](), 0
    for document in range(len(store)):
        begin = _last_answer(store[document])
        alone = 1 if share and begin > LEAST_SHARED else begin  # tokens of the context that each answer has for itself
        tokens = begin - alone + sum(alone + len(answer) for answer in answers)
        if documents and total + tokens > batch_tokens:
            yield documents
            documents, total = [], 0
        documents.append(document)
        total += tokens
    yield documents


def _answered(example: Example, answer: Sequence[int]) -> Example:
    """A document whose last answer is another one, which alone carries loss."""
    begin = _last_answer(example)
    tokens = np.append(example.tokens[:begin], answer).astype(np.int32)
    return Example(tokens, np.append(np.zeros(begin), np.ones(len(answer))).astype(np.float32))
