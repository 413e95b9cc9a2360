"""What is minimised: the sum of weighted token losses of a batch, flat where the base allows it, else one by one.

A sum and never a mean: the caller divides once by the weight of the whole optimiser step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw import hardware
from deltaw.adapter import Injection
from deltaw.base.decoder import Row
from deltaw.base.forward import plain_attention
from deltaw.base.load import Base, most_together
from deltaw.data.loader import evaluation_batches
from deltaw.data.pack import Batch, scored_batch
from deltaw.data.store import TokenStore
from deltaw.kernels import continued_spans, labelled_loss, log_probabilities, token_losses


class Scores(NamedTuple):
    """The N labelled tokens of a batch, scored.

    Loss, whether it is the most likely token, logits of the columns asked for, the position that predicts it, weight.
    """

    losses_N: Tensor
    hits_N: Tensor
    logits_NC: Tensor
    places_N: Tensor
    weights_N: Tensor

    @property
    def weighted_N(self) -> Tensor:
        """What each token adds to a loss."""
        return self.losses_N * self.weights_N


def batch_loss(base: Base, batch: Batch, head_factors: Sequence[Tensor] = ()) -> Tensor:
    """Σ weight·(−log p(next token)) over the batch, one fp32 number with gradients."""
    labelled_N = batch.labelled_N
    if base.plain_reason is not None:
        losses_N, _ = _plain_losses(base, batch)
        return (losses_N * batch.weights_T[labelled_N]).sum()
    h_NH = base.hidden_states(batch.tokens_T, batch.positions_T, batch.bounds, labelled_N, batch.before)
    targets_N, weights_N = batch.targets_T[labelled_N], batch.weights_T[labelled_N]
    return labelled_loss(h_NH, base.logits, targets_N, weights_N, base.vocabulary, head_factors)


def accumulate(
    base: Base,
    batches: Sequence[Batch],
    weight: float,
    head_factors: Sequence[Tensor] = (),
    interrupted: Callable[[], bool] = lambda: False,
) -> float | None:
    """Σ weighted losses of a step's passes, the gradients of Σ/`weight` added to the factors; None when interrupted.

    Where reading the base costs, one reading serves several passes: to the bit the same.
    """
    losses: list[Tensor] = []
    with hardware.repeatable(base.device, strict=base.way == "kernels"):
        for group in _groups(base, batches):
            if interrupted():
                return None
            if len(group) > 1 and weight:
                losses += _accumulate_together(base, group, weight, head_factors)
                continue
            for batch in group:
                loss = batch_loss(base, batch, head_factors)
                if loss.requires_grad and weight:
                    (loss / weight).backward()
                losses.append(loss.detach())
    # Read at the end, since a GPU is waited for; one by one, as `sum` rounds otherwise in Python 3.12.
    total = 0.0
    for loss in losses:
        total += float(loss)
    return total


def _groups(base: Base, batches: Sequence[Batch]) -> Iterator[list[Batch]]:
    """The passes that one reading of the base serves."""
    most, group = base.tokens_a_reading, list[Batch]()
    for batch in batches:
        tokens = sum(one.computed_tokens for one in (*group, batch))
        if group and (tokens > most or len(group) == most_together()):
            yield group
            group = []
        group.append(batch.to(base.device))
    if group:
        yield group


def _accumulate_together(
    base: Base, group: Sequence[Batch], weight: float, head_factors: Sequence[Tensor]
) -> list[Tensor]:
    """The loss of each pass."""
    assert base.decoder is not None, "tokens_a_reading is 0 without one"
    rows = [
        Row(batch.tokens_T, batch.positions_T, continued_spans(batch.bounds, batch.before), batch.labelled_N)
        for batch in group
    ]
    losses = []

    def loss(number: int, h_NH: Tensor) -> Tensor:
        batch = group[number]
        targets_N, weights_N = (x[batch.labelled_N] for x in (batch.targets_T, batch.weights_T))
        found = labelled_loss(h_NH, base.logits, targets_N, weights_N, base.vocabulary, head_factors)
        losses.append(found.detach())
        return found / weight

    base.decoder.accumulate(rows, loss)
    return losses


def batches_to_score(base: Base, store: TokenStore, batch_tokens: int, most_rows: int | None = None) -> Iterator[Batch]:
    """The evaluated documents, or `most_rows` of them, on the base's device.

    What they have in common before their losses is computed once where `scores_shared`.
    """
    share = scores_shared(base)
    for documents in evaluation_batches(store, batch_tokens, most_rows, share=share):
        yield scored_batch(store, documents, share=share).to(base.device)


def scores_shared(base: Base) -> bool:
    """Whether scored documents share their beginnings: where the base can, as it stands now, on a processor.

    On a GPU documents by themselves are one call of attention, which short beginnings are not worth splitting for.
    """
    return base.device.type == "cpu" and base.shares_prefixes


@torch.no_grad()
def score_batch(base: Base, batch: Batch, columns: Sequence[int] = ()) -> Scores:
    """Every labelled token of the batch scored, without gradients."""
    labelled_N = batch.labelled_N
    weights_N = batch.weights_T[labelled_N]
    if base.plain_reason is not None:
        losses_N, logits_NV = _plain_losses(base, batch)
        hits_N = logits_NV.argmax(-1) == batch.targets_T[labelled_N]
        return Scores(losses_N, hits_N, logits_NV[:, list(columns)], labelled_N, weights_N)
    h_NH = base.hidden_states(batch.tokens_T, batch.positions_T, batch.bounds, labelled_N, batch.before)
    scored = token_losses(h_NH, base.logits, batch.targets_T[labelled_N], base.vocabulary, columns)
    return Scores(*scored, labelled_N, weights_N)


def _plain_losses(base: Base, batch: Batch) -> tuple[Tensor, Tensor]:
    """(losses [N], logits [N, V]) of the labelled tokens, each document through the model's own forward."""
    logits = []
    with plain_attention(base.model):
        for start, stop in pairwise(batch.bounds):
            logits_tV = base.model(input_ids=batch.tokens_T[None, start:stop], use_cache=False).logits[0]
            logits.append(logits_tV[batch.weights_T[start:stop] != 0])
    logits_NV = torch.cat(logits).float()
    targets_N = batch.targets_T[batch.weights_T != 0]
    return -log_probabilities(logits_NV).gather(1, targets_N[:, None])[:, 0], logits_NV


def head_factors(base: Base, injection: Injection) -> list[Tensor]:
    """The trained tensors of the active adapter inside the output head: empty unless the head itself is adapted."""
    if injection.active is None:
        return []
    head = base.model.get_output_embeddings()
    layers = injection.layers[injection.active].values()
    return [tensor for layer in layers if layer.target.owner is head for _, tensor in layer.tensors()]
