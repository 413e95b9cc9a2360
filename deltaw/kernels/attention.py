"""Causal attention over a flat row of documents: each attends to itself alone, and no mask of the whole row exists.

On CPU the work is cut into tiles of queries and the keys that they may see, and each tile is a handful of batched
matrix products, which run at the processor's full rate where the fused kernel's backward does not. Documents up to 256
tokens are taken whole, those of similar length side by side in one tile; longer ones in tiles of 256 queries that end
at their last key, so nothing above the diagonal is computed. Query heads that share a key head lie below each other in
one product. The probabilities are not kept: backward forms them again, from the same numbers in the same way.

A document may continue other rows of the flat row, which several documents have in common: it sees them before its own.

Legend: q_THD queries, k_TKD and v_TKD keys and values; H query heads, K key heads, G = H/K, T tokens, D head width;
n documents of one tile, L queries and M keys of each.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

TILE_TOKENS = 256
VECTOR = 16
TILE_PRODUCTS = 6  # of one tile: two forward, four more backward
WIDEST_GROUPED = 256  # numbers of a head, of torch's fused kernel for groups of query heads
ONE_CALL_TOLERANCE = 3e-2  # of the largest number, in bf16
SIDE_BY_SIDE = (32, 64, 96, 128, 192, TILE_TOKENS)


class Rows(NamedTuple):
    """Rows of a tile in the flat row: `padded` [n·L]; of these, those at `places` are real and are `tokens`."""

    padded: Tensor
    places: Tensor
    tokens: Tensor


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


@dataclass(frozen=True)
class Tile:
    """The queries of `count` documents and the keys they may see: those `before` all of them, and each its own.

    `bias` is −∞ where a query must not see a key and 0 elsewhere, for the last columns of the scores: of the shape
    [n, K, G, L, M] where documents lie side by side, [L, columns] for a tile of one document.
    """

    count: int
    queries: slice | Rows
    before: slice
    keys: slice | Rows
    bias: Tensor


Tiles = tuple[Tile, ...]


def document_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    spans: tuple[Span, ...],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention outputs [T, H, D] of the documents whose rows `spans` names.

    `window` lets a token see only itself and the `window - 1` tokens before it; `softcap` bounds the scores by
    cap·tanh(score/cap) (Gemma-2, arXiv 2408.00118 §2).
    """
    if q_THD.device.type == "cpu":
        tiles = tiles_of(spans, window, k_TKD.shape[1], q_THD.shape[1] // k_TKD.shape[1], q_THD.dtype)
        out: Tensor = _TiledAttention.apply(q_THD, k_TKD, v_TKD, tiles, scale, softcap)
        return out
    return fused_attention(q_THD, k_TKD, v_TKD, spans, scale, window, softcap)


# -- torch's own kernels, where there are fused ones ------------------------------------------------------------------


def fused_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    spans: tuple[Span, ...],
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """`document_attention` through torch's kernels: one call for all documents, or for those of a length that continue
    alike.
    """
    lengths = [span.stop - span.start for span in spans]
    continues = any(span.before_start < span.before_stop for span in spans)
    if not continues and softcap is None and len(set(lengths)) > 1 and one_call_works(q_THD, k_TKD, window):
        return attention_in_one_call(q_THD, k_TKD, v_TKD, tuple(lengths), scale, window)
    alike: dict[tuple[int, int, int], list[int]] = {}
    for number, span in enumerate(spans):
        alike.setdefault((lengths[number], span.before_start, span.before_stop), []).append(number)
    # Split once: the backward of a slice writes zeros as long as the whole row, for each document.
    qs, ks, vs = (x.split(lengths) for x in (q_THD, k_TKD, v_TKD))
    outs: list[Tensor] = [q_THD] * len(spans)
    for (_, start, stop), numbers in alike.items():
        q_nLHD, k_nLKD, v_nLKD = (torch.stack([x[number] for number in numbers]) for x in (qs, ks, vs))
        if start < stop:
            common = [x[start:stop].expand(len(numbers), -1, -1, -1) for x in (k_TKD, v_TKD)]
            k_nLKD, v_nLKD = torch.cat([common[0], k_nLKD], 1), torch.cat([common[1], v_nLKD], 1)
        found = alike_documents(q_nLHD, k_nLKD, v_nLKD, scale, window, softcap)
        for number, out_LHD in zip(numbers, found, strict=True):
            outs[number] = out_LHD
    return torch.cat(outs)


def attention_in_one_call(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, lengths: tuple[int, ...], scale: float, window: int | None
) -> Tensor:
    """All documents at once, by the kernel that torch has for many lengths: on GPUs since Ampere, in bf16 and fp16."""
    varlen: Any = importlib.import_module("torch.nn.attention.varlen")  # older torches have none
    ends, most = _ends(lengths, q_THD.device), max(lengths)
    options: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if q_THD.shape[1] > k_TKD.shape[1]:
        options["enable_gqa"] = True
    out: Tensor = varlen.varlen_attn(q_THD, k_TKD, v_TKD, ends, ends, most, most, **options)
    return out


def one_call_works(q_THD: Tensor, k_TKD: Tensor, window: int | None) -> bool:
    """Whether `attention_in_one_call` does for such heads; tried once a process, against documents one by one."""
    kind = (*q_THD.shape[1:], k_TKD.shape[1], window is not None, q_THD.dtype, q_THD.device)
    return q_THD.device.type == "cuda" and q_THD.dtype != torch.float32 and _agrees_in_one_call(*kind)


@lru_cache(maxsize=8)
def _agrees_in_one_call(
    heads: int, width: int, key_heads: int, windowed: bool, dtype: torch.dtype, device: torch.device
) -> bool:
    dice, lengths = torch.Generator().manual_seed(0), (5, 19, 3)
    shapes = [(sum(lengths), count, width) for count in (heads, key_heads, key_heads, heads)]
    *given, slope = (torch.randn(shape, generator=dice).to(device, dtype) for shape in shapes)
    scale, window = width**-0.5, 4 if windowed else None

    def one_by_one(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        parts = zip(*(x[None].split(lengths, 1) for x in (q_THD, k_TKD, v_TKD)), strict=True)
        return torch.cat([alike_documents(q, k, v, scale, window, None)[0] for q, k, v in parts])

    def at_once(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        return attention_in_one_call(q_THD, k_TKD, v_TKD, lengths, scale, window)

    found = []
    try:
        for way in (one_by_one, at_once):
            with torch.enable_grad():
                asked = [x.clone().requires_grad_() for x in given]
                out = way(*asked)
                found.append([x.detach().float() for x in (out, *torch.autograd.grad(out, asked, slope))])
    except (ImportError, RuntimeError, TypeError, ValueError):  # another torch, or a GPU that its kernel does not know
        return False
    return all(float((a - b).abs().max() / a.abs().max()) <= ONE_CALL_TOLERANCE for a, b in zip(*found, strict=True))


@lru_cache(maxsize=4)
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each document ends, behind a 0: the same for every layer."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def alike_documents(
    q_nLHD: Tensor, k_nMKD: Tensor, v_nMKD: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """The last L of M tokens of n documents, [n, L, H, D]; in plain products, computed again in backward, if capped."""
    q, k, v = (x.transpose(1, 2) for x in (q_nLHD, k_nMKD, v_nMKD))
    L, M, D = q.shape[2], k.shape[2], q.shape[3]
    group = q.shape[1] // k.shape[1]
    plain = M == L and (window is None or window >= M)
    # The kernels that know groups of heads know no mask, no fp32 and no wide heads; elsewhere torch would fall back
    # to products that keep all scores.
    grouped = plain and softcap is None and q.dtype != torch.float32 and D <= WIDEST_GROUPED
    if group > 1 and not grouped:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    visible = None if plain and softcap is None else _visible(L, M, window, q.device)
    if softcap is None:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=plain, scale=scale, enable_gqa=grouped and group > 1
        )
    else:  # one by one: their scores are all there at once
        rest: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        outs = [checkpoint(_capped, *each, visible, scale, softcap, **rest) for each in zip(q, k, v, strict=True)]
        out = torch.stack(outs)
    return out.transpose(1, 2)


def _capped(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float) -> Tensor:
    scores = softcap * torch.tanh(scale / softcap * (q @ k.transpose(1, 2)).float())
    return scores.masked_fill(~visible, -math.inf).softmax(-1).to(v.dtype) @ v


@lru_cache(maxsize=2)
def _visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """What `_hidden` leaves, once for all layers."""
    return ~_hidden(queries, keys, window, device)


def _hidden(queries: int, keys: int, window: int | None, device: torch.device | None = None) -> Tensor:
    """[queries, keys], true where a query must not see a key; the last query is at the last key."""
    ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
    later = ones.triu(keys - queries + 1)
    return later if window is None else later | ones.tril(keys - queries - window)


# -- tiles ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def tiles_of(spans: tuple[Span, ...], window: int | None, heads: int, group: int, dtype: torch.dtype) -> Tiles:
    """The tiles of a flat row for K key heads of G query heads each; every layer of a model uses the same."""
    tiles: list[Tile] = []
    side_by_side: dict[tuple[int, int, int], list[Span]] = {}
    for span in spans:
        if span.stop - span.start > TILE_TOKENS:
            tiles += _in_parts(span, window, dtype)
        else:
            size = next(size for size in SIDE_BY_SIDE if span.stop - span.start <= size)
            side_by_side.setdefault((size, span.before_start, span.before_stop), []).append(span)
    return (*(_whole(documents, window, (heads, group), dtype) for documents in side_by_side.values()), *tiles)


def products(spans: tuple[Span, ...], windows: Iterable[int | None] = (None,)) -> int:
    """How many products of different shapes attention to these documents takes on CPU, forward and backward."""
    tiles = [tile for window in windows for tile in tiles_of(spans, window, 1, 1, torch.float32)]
    shapes = {(tile.count, _rows(tile.queries), _rows(tile.before) + _rows(tile.keys)) for tile in tiles}
    return TILE_PRODUCTS * len(shapes)


def _rows(rows: slice | Rows) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows.padded)


def _in_parts(span: Span, window: int | None, dtype: torch.dtype) -> list[Tile]:
    tiles = []
    before = slice(span.before_start, span.before_stop)
    for first in range(span.start, span.stop, TILE_TOKENS):
        last = min(span.stop, first + TILE_TOKENS)
        if window is None:
            low, columns = span.start, last - first
        else:  # what no query sees any more is left out of the keys
            low = max(span.start, first - window + 1)
            reach = max(0, window - 1 - (first - span.start))
            before = slice(max(span.before_start, span.before_stop - reach), span.before_stop)
            columns = last - low + before.stop - before.start
        bias = _bias(_hidden(last - first, columns, window), dtype)
        tiles.append(Tile(1, slice(first, last), before, slice(low, last), bias))
    return tiles


def _whole(documents: list[Span], window: int | None, heads_and_group: tuple[int, int], dtype: torch.dtype) -> Tile:
    """Documents side by side, each padded to one length with rows that nothing sees."""
    before = slice(documents[0].before_start, documents[0].before_stop)
    shared = before.stop - before.start
    # A row of the softmax that is no multiple of the vector's width takes three times as long.
    longest = max(span.stop - span.start for span in documents)
    longest += -(shared + longest) % VECTOR
    starts_n1 = torch.tensor([span.start for span in documents])[:, None]
    lengths_n1 = torch.tensor([span.stop - span.start for span in documents])[:, None]
    real_nL = torch.arange(longest) < lengths_n1
    padded = (starts_n1 + torch.arange(longest) * real_nL).flatten()
    places = real_nL.flatten().nonzero().squeeze(1)
    # A padding query sees the real keys before it, so its softmax is a number.
    visible_nM = torch.cat([real_nL.new_ones(len(documents), shared), real_nL], 1)
    hidden_nLM = _hidden(longest, shared + longest, window) | ~visible_nM[:, None]
    if window is not None:
        hidden_nLM &= real_nL[:, :, None]
    bias = _bias(hidden_nLM, dtype)[:, None, None].expand(-1, *heads_and_group, -1, -1).contiguous()
    rows = Rows(padded, places, padded[places])
    return Tile(len(documents), rows, before, rows, bias)


def _bias(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)


# -- forward and backward over tiles ----------------------------------------------------------------------------------


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, tiles: Tiles, scale: float, softcap: float | None
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(q_THD, k_TKD, v_TKD)
        ctx.rest = (tiles, scale, softcap)
        return attend(q_THD, k_TKD, v_TKD, tiles, scale, softcap)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *attend_backward(upstream[0], *ctx.saved_tensors, *ctx.rest), None, None, None


def attend(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, tiles: Tiles, scale: float, softcap: float | None) -> Tensor:
    """Attention outputs [T, H, D], tile by tile; rows of no document are zero."""
    out_THD = torch.zeros(q_THD.shape, dtype=q_THD.dtype)
    for tile in tiles:
        q, k, v = _taken(q_THD, k_TKD, v_TKD, tile)
        shares, _ = _shares(q, k, tile, scale, softcap)
        _put(out_THD, torch.bmm(shares, v), tile.queries, tile.count, add=False)
    return out_THD


def attend_backward(
    d_THD: Tensor,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    tiles: Tiles,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of `attend`."""
    dq_THD = torch.zeros(q_THD.shape, dtype=q_THD.dtype)
    # A key gathers what all tiles say of it: summed in fp32.
    finer = torch.promote_types(k_TKD.dtype, torch.float32)
    dk_TKD, dv_TKD = (torch.zeros(x.shape, dtype=finer) for x in (k_TKD, v_TKD))
    for tile in tiles:
        q, k, v = _taken(q_THD, k_TKD, v_TKD, tile)
        d = _take(d_THD, tile.queries, tile.count, k_TKD.shape[1], padding=0.0)
        shares, slope = _shares(q, k, tile, scale, softcap)
        _add_keys(dv_TKD, torch.bmm(shares.transpose(1, 2), d), tile)
        d_shares = torch.bmm(d, v.transpose(1, 2))
        d_scores = torch._softmax_backward_data(d_shares, shares, -1, shares.dtype)
        if slope is not None:
            d_scores = (d_scores * slope).to(shares.dtype)
        _put(dq_THD, _scaled_product(d_scores, k, scale), tile.queries, tile.count, add=False)
        _add_keys(dk_TKD, _scaled_product(d_scores.transpose(1, 2), q, scale), tile)
    return dq_THD, dk_TKD.to(k_TKD.dtype), dv_TKD.to(v_TKD.dtype)


def _taken(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    q = _take(q_THD, tile.queries, tile.count, k_TKD.shape[1])
    return q, _take_keys(k_TKD, tile), _take_keys(v_TKD, tile)


def _take_keys(x_TKD: Tensor, tile: Tile) -> Tensor:
    own = _take(x_TKD, tile.keys, tile.count, x_TKD.shape[1])
    if tile.before.start == tile.before.stop:
        return own
    return torch.cat([x_TKD[tile.before].transpose(0, 1).repeat(tile.count, 1, 1), own], 1)


def _add_keys(out_TKD: Tensor, x: Tensor, tile: Tile) -> None:
    """Adds what `_take_keys` would take."""
    shared = tile.before.stop - tile.before.start
    if shared:
        common = x[:, :shared].unflatten(0, (tile.count, -1)).sum(0, dtype=out_TKD.dtype)
        out_TKD[tile.before] += common.transpose(0, 1)
    _put(out_TKD, x[:, shared:], tile.keys, tile.count, add=True)


def _shares(q: Tensor, k: Tensor, tile: Tile, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """softmax(scale·q·kᵀ) [n·K, G·L, M], zero where hidden; and the slope of the soft cap, if there is one."""
    scores, slope = _scaled_product(q, k.transpose(1, 2), scale), None
    if softcap is not None:
        bounded = torch.tanh(scores.float() / softcap)
        slope, scores = 1 - bounded.square(), softcap * bounded
    L, columns = tile.bias.shape[-2:]
    scores.view(tile.count, -1, q.shape[1] // L, L, scores.shape[2])[..., -columns:] += tile.bias
    return scores.softmax(-1).to(q.dtype), slope


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale·a·b for each pair of matrices, scaled before it is rounded."""
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


def _take(x_TND: Tensor, rows: slice | Rows, count: int, heads: int, padding: float | None = None) -> Tensor:
    """The rows of a tile as [n·K, N/K·L, D], heads of one group below each other; padding rows zero if asked."""
    T, N, D = x_TND.shape
    if isinstance(rows, slice):
        x_nLND = x_TND[None, rows]
    else:
        x_nLND = x_TND.reshape(T, N * D).index_select(0, rows.padded).view(count, -1, N, D)
        if padding is not None and len(rows.places) < len(rows.padded):
            real = torch.zeros(len(rows.padded), 1, dtype=x_TND.dtype).index_fill_(0, rows.places, 1.0)
            x_nLND *= real.view(count, -1, 1, 1)
    by_head = x_nLND.unflatten(2, (heads, N // heads)).permute(0, 2, 3, 1, 4)
    return by_head.reshape(count * heads, -1, D)


def _put(out_TND: Tensor, x: Tensor, rows: slice | Rows, count: int, *, add: bool) -> None:
    """Writes what `_take` would take, or adds it."""
    T, N, D = out_TND.shape
    heads = x.shape[0] // count
    x_nLND = (
        x.unflatten(0, (count, heads)).unflatten(2, (N // heads, -1)).permute(0, 3, 1, 2, 4).reshape(count, -1, N, D)
    )
    if isinstance(rows, slice):
        if add:
            out_TND[rows] += x_nLND[0]
        else:
            out_TND[rows] = x_nLND[0]
        return
    real = x_nLND.reshape(-1, N * D)
    if len(rows.places) < len(rows.padded):
        real = real.index_select(0, rows.places)
    out_TX = out_TND.view(T, N * D)
    if add:
        out_TX.index_add_(0, rows.tokens, real.to(out_TX.dtype))
    else:
        out_TX.index_copy_(0, rows.tokens, real)
