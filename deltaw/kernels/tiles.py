"""Causal attention on CPU, in tiles of queries and the keys that they may see: each a handful of batched products.

These run at the processor's full rate, where the fused kernel's backward does not. Documents up to 384 tokens are
taken whole, those of similar length side by side in one tile; longer ones in tiles of 256 queries that end at their
last key, so nothing above the diagonal is computed. Query heads that share a key head lie below each other in one
product. The probabilities are not kept: backward forms them again, from the same numbers in the same way.

A document may continue other rows of the flat row, which several documents have in common: it sees them before its own.

Where no score is capped, the library of deltaw/kernels/compiled.py computes attention as a whole if a head's width is a
multiple of 32, in fp32, and in bf16 where the processor multiplies it; else it copies and takes the softmax between the
products. What stands here beside it is the same in torch.

Legend: q_THD queries, k_TKD and v_TKD keys and values, x_TND either; H query heads, K key heads, G = H/K, T tokens,
D head width; n documents of one tile, L queries and M keys of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.kernels import compiled

TILE_TOKENS, WHOLE_TOKENS = 256, 384
TILE_PRODUCTS = 6  # of one tile: two forward, four more backward
SIDE_BY_SIDE = (32, 64, 96, 128, 192, 256, WHOLE_TOKENS)


class Span(NamedTuple):
    """One document's rows in a flat row, and the rows that it continues (none where these are empty)."""

    start: int
    stop: int
    before_start: int = 0
    before_stop: int = 0


def spans_of(bounds: Sequence[int]) -> tuple[Span, ...]:
    """The spans of documents that continue nothing."""
    return tuple(Span(start, stop) for start, stop in pairwise(bounds))


def continued_spans(bounds: Sequence[int], before: Sequence[tuple[int, int]]) -> tuple[Span, ...]:
    """The spans of documents that continue the rows in `before`; nothing where that is empty."""
    spans = spans_of(bounds)
    return tuple(Span(*span[:2], *rows) for span, rows in zip(spans, before, strict=True)) if before else spans


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of the flat row that the documents of a tile take, one after the other; below 0 a padding row of zeros."""

    number: Tensor

    @cached_property
    def run(self) -> slice | None:
        """The real rows as a slice, if they are one, with all padding behind them."""
        first, count = int(self.number[0]), len(self.real)
        return slice(first, first + count) if torch.equal(self.number[:count], _run(first, first + count)) else None

    @cached_property
    def places(self) -> Tensor:
        """Where among them the real rows stand."""
        return (self.number >= 0).nonzero().squeeze(1)

    @cached_property
    def real(self) -> Tensor:
        """The numbers of the real rows."""
        return self.number[self.places].long()


@dataclass(frozen=True, eq=False)
class Tile:
    """The queries of `count` documents and the keys they may see: `queries` [n·L] and `keys` [n·M].

    Query l of document n sees its keys from `low_nL` to below `high_nL`, at least one.
    """

    count: int
    queries: Rows
    keys: Rows
    low_nL: Tensor
    high_nL: Tensor

    @cached_property
    def hidden_nLm(self) -> Tensor:
        """What its queries do not see, of the last m keys: all see those before."""
        keys = len(self.keys.number) // self.count
        first = 0 if self.low_nL.any() else min(keys - 1, int(self.high_nL.min()))
        column = _run(first, keys)
        return (column < self.low_nL[..., None]) | (column >= self.high_nL[..., None])


Tiles = tuple[Tile, ...]
PARTS, PART_TOKENS, PART_STEP = 4, 256, 32  # at most so many of a document, those beyond so long, of whole steps


@lru_cache(maxsize=4)
def tiles_of(spans: tuple[Span, ...], window: int | None) -> Tiles:
    """The tiles of a flat row; every layer of a model uses the same."""
    tiles: list[Tile] = []
    side_by_side: dict[tuple[int, int, int], list[Span]] = {}
    for span in (span for span in spans if span.start < span.stop):
        if span.stop - span.start > WHOLE_TOKENS:
            tiles += _in_parts(span, window)
        else:
            size = next(size for size in SIDE_BY_SIDE if span.stop - span.start <= size)
            side_by_side.setdefault((size, span.before_start, span.before_stop), []).append(span)
    return (*(_whole(documents, window) for documents in side_by_side.values()), *tiles)


@lru_cache(maxsize=4)
def parts_of(spans: tuple[Span, ...], window: int | None) -> compiled.Parts:
    """The parts of a flat row that attention as a whole takes by themselves; every layer of a model uses the same."""
    parts = []
    for span in spans:
        length = span.stop - span.start
        size = -(-length // min(PARTS, -(-length // PART_TOKENS) or 1))
        for first in range(span.start, span.stop, max(1, size + -size % PART_STEP)):
            last, own, before = min(span.stop, first + size + -size % PART_STEP), span.start, span.before_start
            if window is not None:  # what no query sees any more is left out
                own = max(own, first - window + 1)
                before = max(before, span.before_stop - max(0, window - 1 - (first - span.start)))
            parts.append((first, last, own, before, max(before, span.before_stop)))
    keys = [last - own + before_end - before for _, last, own, before, before_end in parts]
    keys = [count + -count % compiled.WIDTHS for count in keys]
    return compiled.Parts(torch.tensor(parts, dtype=torch.int32).reshape(-1, 5), sum(keys), max(keys, default=0))


def attends_whole(device: torch.device, dtype: torch.dtype, width: int, softcap: float | None) -> bool:
    """Whether attention to such heads is computed as a whole, without tiles and their products."""
    return softcap is None and compiled.attends(device, dtype, width)


def products(spans: tuple[Span, ...], windows: Iterable[int | None] = (None,)) -> int:
    """How many products of different shapes attention to these documents takes on CPU at most, forward and backward."""
    tiles = [tile for window in windows for tile in tiles_of(spans, window)]
    return TILE_PRODUCTS * len({(tile.count, len(tile.queries.number), len(tile.keys.number)) for tile in tiles})


def _in_parts(span: Span, window: int | None) -> list[Tile]:
    tiles = []
    for first in range(span.start, span.stop, TILE_TOKENS):
        last = min(span.stop, first + TILE_TOKENS)
        low, common = span.start, _run(span.before_start, span.before_stop)
        if window is not None:  # what no query sees any more is left out of the keys
            low = max(span.start, first - window + 1)
            reach = max(0, window - 1 - (first - span.start))
            common = common[max(0, len(common) - reach) :]
        keys = torch.cat([common, _run(low, last)])
        high_1L = _run(len(keys) - (last - first) + 1, len(keys) + 1)[None]
        keys = F.pad(keys, (0, -len(keys) % compiled.VECTOR), value=-1)
        tiles.append(_tile(_run(first, last)[None], keys[None], high_1L, window))
    return tiles


def _whole(documents: list[Span], window: int | None) -> Tile:
    """Documents side by side, each padded to one length with rows that nothing sees."""
    common = _run(documents[0].before_start, documents[0].before_stop)
    longest = max(span.stop - span.start for span in documents)
    longest += -(len(common) + longest) % compiled.VECTOR  # also in torch, other rows take three times as long
    starts_n1 = torch.tensor([span.start for span in documents], dtype=torch.int32)[:, None]
    lengths_n1 = torch.tensor([span.stop - span.start for span in documents], dtype=torch.int32)[:, None]
    step_L = _run(0, longest)
    rows_nL = torch.where(step_L < lengths_n1, starts_n1 + step_L, -1)
    # A padding query sees the real keys before it, so its softmax is a number.
    high_nL = len(common) + torch.minimum(step_L + 1, lengths_n1)
    return _tile(rows_nL, torch.cat([common.expand(len(documents), -1), rows_nL], 1), high_nL, window)


def _tile(queries_nL: Tensor, keys_nM: Tensor, high_nL: Tensor, window: int | None) -> Tile:
    low_nL = torch.zeros_like(high_nL) if window is None else (high_nL - window).clamp_(min=0)
    return Tile(len(queries_nL), Rows(queries_nL.flatten()), Rows(keys_nM.flatten()), low_nL, high_nL)


def _run(start: int, stop: int) -> Tensor:
    return torch.arange(start, stop, dtype=torch.int32)


# -- forward and backward over tiles ----------------------------------------------------------------------------------


def tiled_attention(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, spans: tuple[Span, ...], scale: float, window: int | None,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """`document_attention` by tiles."""
    out: Tensor = _TiledAttention.apply(q_THD, k_TKD, v_TKD, spans, scale, window, softcap)
    return out


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, spans: tuple[Span, ...], scale: float,
        window: int | None, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(q_THD, k_TKD, v_TKD)
        ctx.rest = (spans, scale, window, softcap)
        return attend(q_THD, k_TKD, v_TKD, *ctx.rest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *attend_backward(upstream[0], *ctx.saved_tensors, *ctx.rest), None, None, None, None


def attend(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, spans: tuple[Span, ...], scale: float, window: int | None,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """Attention outputs [T, H, D]; rows of no document are zero."""
    assert len(q_THD) == len(k_TKD) == len(v_TKD) and all(max(span) <= len(q_THD) for span in spans)
    if attends_whole(q_THD.device, q_THD.dtype, q_THD.shape[2], softcap):
        return compiled.attend(q_THD, k_TKD, v_TKD, parts_of(spans, window), scale, window)
    q_THD, k_TKD, v_TKD = (x.contiguous() for x in (q_THD, k_TKD, v_TKD))
    out_THD = torch.zeros(q_THD.shape, dtype=q_THD.dtype)
    for tile in tiles_of(spans, window):
        q, k, v = _taken(q_THD, k_TKD, v_TKD, tile)
        shares, _ = _shares(q, k, tile, scale, softcap)
        _put(out_THD, torch.bmm(shares, v), tile.queries, tile.count, k_TKD.shape[1])
    return out_THD


def attend_backward(
    d_THD: Tensor,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    spans: tuple[Span, ...],
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of `attend`, which was given the same."""
    assert d_THD.shape == q_THD.shape
    if attends_whole(q_THD.device, q_THD.dtype, q_THD.shape[2], softcap):
        return compiled.attend_backward(d_THD, q_THD, k_TKD, v_TKD, parts_of(spans, window), scale, window)
    d_THD, q_THD, k_TKD, v_TKD = (x.contiguous() for x in (d_THD, q_THD, k_TKD, v_TKD))
    dq_THD = torch.zeros(q_THD.shape, dtype=q_THD.dtype)
    # A key gathers what all tiles say of it: summed in fp32.
    finer = torch.promote_types(k_TKD.dtype, torch.float32)
    dk_TKD, dv_TKD = (torch.zeros(x.shape, dtype=finer) for x in (k_TKD, v_TKD))
    heads = k_TKD.shape[1]
    for tile in tiles_of(spans, window):
        q, k, v = _taken(q_THD, k_TKD, v_TKD, tile)
        d = _take(d_THD, tile.queries, tile.count, heads)
        shares, slope = _shares(q, k, tile, scale, softcap)
        _add(dv_TKD, torch.bmm(shares.transpose(1, 2), d), tile.keys, tile.count)
        d_scores, left = _softmax_backward(torch.bmm(d, v.transpose(1, 2)), shares, slope, tile, scale)
        _put(dq_THD, _scaled_product(d_scores, k, left), tile.queries, tile.count, heads)
        _add(dk_TKD, _scaled_product(d_scores.transpose(1, 2), q, left), tile.keys, tile.count)
    return dq_THD, dk_TKD.to(k_TKD.dtype), dv_TKD.to(v_TKD.dtype)


def _taken(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    heads = k_TKD.shape[1]
    q = _take(q_THD, tile.queries, tile.count, heads)
    return q, _take(k_TKD, tile.keys, tile.count, heads), _take(v_TKD, tile.keys, tile.count, heads)


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale·a·b for each pair of matrices, scaled before it is rounded."""
    if scale == 1.0:
        return torch.bmm(a, b)
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


def _shares(q: Tensor, k: Tensor, tile: Tile, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """softmax(scale·q·kᵀ) [n·K, G·L, M], zero where hidden; and the slope of the soft cap, if there is one."""
    if softcap is None and compiled.takes(q):
        return compiled.softmax_(torch.bmm(q, k.transpose(1, 2)), tile.low_nL, tile.high_nL, scale), None
    scores, slope = _scaled_product(q, k.transpose(1, 2), scale), None
    if softcap is not None:
        bounded = torch.tanh(scores.float() / softcap)
        slope, scores = 1 - bounded.square(), softcap * bounded
    hidden_nLm = tile.hidden_nLm
    by_query = scores.view(tile.count, -1, hidden_nLm.shape[1], scores.shape[2])
    by_query[..., -hidden_nLm.shape[2] :].masked_fill_(hidden_nLm[:, None], -math.inf)
    return scores.softmax(-1).to(q.dtype), slope


def _softmax_backward(
    d_shares: Tensor, shares: Tensor, slope: Tensor | None, tile: Tile, scale: float
) -> tuple[Tensor, float]:
    """The slopes of the scores from those of the shares; and by what their products are still to be scaled."""
    if slope is None and compiled.takes(d_shares):
        return compiled.softmax_backward_(d_shares, shares, tile.low_nL, tile.high_nL, scale), 1.0
    d_scores = torch._softmax_backward_data(d_shares, shares, -1, shares.dtype)
    return (d_scores if slope is None else (d_scores * slope).to(shares.dtype)), scale


def _take(x_TND: Tensor, rows: Rows, count: int, heads: int) -> Tensor:
    """The rows of a tile as [n·K, N/K·L, D], heads of one group below each other; padding rows are zero."""
    if compiled.takes(x_TND):
        return compiled.take(x_TND, rows.number, count, heads)
    T, N, D = x_TND.shape
    if rows.run is not None:
        taken = F.pad(x_TND[rows.run], (0, 0, 0, 0, 0, len(rows.number) - len(rows.real)))
    else:
        taken = x_TND.new_zeros(len(rows.number), N, D)
        taken.view(-1, N * D).index_copy_(0, rows.places, x_TND.reshape(T, N * D).index_select(0, rows.real))
    by_head = taken.unflatten(1, (heads, N // heads)).unflatten(0, (count, -1)).permute(0, 2, 3, 1, 4)
    return by_head.reshape(count * heads, -1, D)


def _put(out_TND: Tensor, x: Tensor, rows: Rows, count: int, heads: int) -> None:
    """Writes what `_take` would take."""
    if compiled.takes(x):
        compiled.put(out_TND, x, rows.number, count, heads)
    elif rows.run is not None:
        out_TND[rows.run] = _in_rows(x, count, *out_TND.shape[1:])[: len(rows.real)].view(-1, *out_TND.shape[1:])
    else:
        real = _in_rows(x, count, *out_TND.shape[1:]).index_select(0, rows.places)
        out_TND.view(len(out_TND), -1).index_copy_(0, rows.real, real)


def _add(out_TND: Tensor, x: Tensor, rows: Rows, count: int) -> None:
    """Adds what `_take` would take, one head to a group; several times where several documents take a row."""
    if compiled.takes(x):
        compiled.add(out_TND, x, rows.number, count)
        return
    in_rows = _in_rows(x, count, *out_TND.shape[1:])
    if rows.run is not None:
        out_TND[rows.run] += in_rows[: len(rows.real)].view(-1, *out_TND.shape[1:])
    else:
        real = in_rows.index_select(0, rows.places).to(out_TND.dtype)
        out_TND.view(len(out_TND), -1).index_add_(0, rows.real, real)


def _in_rows(x: Tensor, count: int, heads: int, width: int) -> Tensor:
    """[n·K, G·L, D] as [n·L, N·D] again."""
    length = x.numel() // (count * heads * width)
    return x.view(count, heads, length, width).transpose(1, 2).reshape(count * length, heads * width)
