"""Causal attention over a flat row of documents: each attends to itself alone, and no mask of the whole row exists.

Documents are taken one by one, so the cost is the sum of their squares and not the square of their sum. Short ones use
three batched products, which on CPU beat the fused kernel's backward below about 128 tokens; longer ones use the fused
kernel. Query heads that share a key head are grouped by reshaping, never by repeating keys.

Legend: q_HTD queries, k_KTD and v_KTD keys and values; H query heads, K key heads, T tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT_TOKENS = 128


def document_attention(
    q_HTD: Tensor,
    k_KTD: Tensor,
    v_KTD: Tensor,
    bounds: Sequence[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention outputs [T, H, D]. `bounds` holds each document's first token and, last, the number of tokens.

    `window` lets a token see only itself and the `window - 1` tokens before it; `softcap` bounds the scores by
    cap·tanh(score/cap) (Gemma-2, arXiv 2408.00118 §2).
    """
    parts = []
    for start, stop in pairwise(bounds):
        q, k, v = q_HTD[:, start:stop], k_KTD[:, start:stop], v_KTD[:, start:stop]
        length = stop - start
        narrow = window if window is not None and window < length else None
        if softcap is not None or (length <= SHORT_TOKENS and q.device.type == "cpu"):
            out_HtD = _by_products(q, k, v, scale, narrow, softcap)
        else:
            out_HtD = _fused(q, k, v, scale, narrow)
        parts.append(out_HtD.transpose(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _fused(q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, scale: float, window: int | None) -> Tensor:
    mask = None if window is None else _visible(q_HTD.shape[1], window, q_HTD.device)
    out = F.scaled_dot_product_attention(
        q_HTD[None], k_KTD[None], v_KTD[None], attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
    return out[0]


def _by_products(
    q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """softmax(scale·q·kᵀ)·v with the softmax in fp32; heads of one group lie below each other in one product."""
    H, T, D = q_HTD.shape
    K = k_KTD.shape[0]
    scores = torch.bmm((q_HTD * scale).reshape(K, (H // K) * T, D), k_KTD.transpose(1, 2)).float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = ~_visible(T, window, q_HTD.device)
    scores = scores.view(K, H // K, T, T).masked_fill(hidden, float("-inf"))
    shares = scores.softmax(-1).to(v_KTD.dtype).view(K, (H // K) * T, T)
    return torch.bmm(shares, v_KTD).view(H, T, D)


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """[T, T], true where a token (row) may see another (column)."""
    visible = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return visible if window is None else visible.triu(1 - window)
