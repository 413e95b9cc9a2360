"""Causal attention over a flat row of documents: each attends to itself alone, and no mask of the whole row exists.

On CPU by deltaw/kernels/tiles.py; elsewhere through torch's fused kernels, in one call for all documents where
there is one for many lengths.

Legend: q_THD queries, k_TKD and v_TKD keys and values; H query heads, K key heads, T tokens, D head width; n documents
of a length, L queries and M keys of each.
"""

from __future__ import annotations

import importlib
import math
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deltaw.kernels.tiles import Span, tiled_attention

WIDEST_GROUPED = 256  # numbers of a head, of torch's fused kernel for groups of query heads
ONE_CALL_TOLERANCE = 3e-2  # of the largest number, in bf16


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
    way = tiled_attention if q_THD.device.type == "cpu" else fused_attention
    return way(q_THD, k_TKD, v_TKD, spans, scale, window, softcap)


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
