"""What lies between the products, in one pass over memory each, and attention as a whole: the compiled library, called.

On Linux, where there is g++ (or what `CXX` names), `prepare` has deltaw/kernels/library.py make it in a few seconds, in
a folder of caches, and takes it into use. Nothing but the last bits depends on it: without, the kernels compute the
same by torch, in more passes over memory. So whoever calls a function of this module has asked `takes` first.
`DELTAW_COMPILED=0` leaves it out. What a function asserts, torch would have found.

Legend: x_TND heads of a flat row; n documents of a tile, L rows of each; N rows of logits, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.kernels.library import Library, NoLibraryError, open_library

WIDTHS = 32  # of which a head's is a multiple where attention.cpp takes it; and keys are filled up to multiples
VECTOR = 16  # numbers of the widest vector in passes.cpp: rows of scores are multiples of it
ROOM = 1 << 23  # numbers for what parts find for keys, before it is added; fewer parts at a time where they need more
NO_MEMORY = "out of memory for attention"


class Parts(NamedTuple):
    """What attention as a whole takes by themselves, and their keys in multiples of WIDTHS: of all, and of the largest.

    `rows_n5`: some queries of a document, from one row to below another; the first row of its own whose key they see;
    and the rows before, which it continues, from one to below another.
    """

    rows_n5: Tensor
    keys: int
    most_keys: int


@dataclass
class _State:
    """Of this process: the library, why there can be none, and how many ask that torch does the work."""

    library: Library | None = None
    refused: str | None = None
    failed: dict[Path, str] = field(default_factory=dict)
    left_out: int = 0


_state = _State()


def prepare(folder: Path) -> str | None:
    """Takes the library in `folder` into use, made there if need be; None, or why torch goes on doing the work."""
    if os.environ.get("DELTAW_COMPILED") == "0":
        return "DELTAW_COMPILED is 0"
    if _state.library is not None:
        return None
    if reason := _state.refused or _state.failed.get(folder):
        return reason
    try:
        _state.library = open_library(folder)
    except NoLibraryError as error:
        if error.lasting:
            _state.failed[folder] = str(error)
        return str(error)
    return None


def in_use() -> str | None:
    """The digest of the library that takes part in what this process computes on its processor; None without one."""
    return None if _state.library is None or _state.left_out else _state.library.digest


@contextmanager
def left_out() -> Iterator[None]:
    """While inside, torch does the work."""
    _state.left_out += 1
    try:
        yield
    finally:
        _state.left_out -= 1


def leave_out(reason: str) -> None:
    """Has torch do the work from now on."""
    _state.library, _state.refused = None, reason


def takes(x: Tensor) -> bool:
    """Whether the functions below are there for such a tensor."""
    library = _state.library
    return library is not None and not _state.left_out and x.device.type == "cpu" and x.dtype in library.functions


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """`pointwise.rms_norm`."""
    x, out, width = x.contiguous(), _like(x), x.shape[-1]
    _call("rms_norm", x.dtype, out, x, _gain(gain, width), eps, x.numel() // width, width)
    return out


def rms_norm_backward(d: Tensor, x: Tensor, gain: Tensor, eps: float, more: Tensor | None) -> Tensor:
    """`pointwise.rms_norm_backward`."""
    d, x, out, width = d.contiguous(), x.contiguous(), _like(x), x.shape[-1]
    more = None if more is None else more.contiguous()
    assert all((given.shape, given.dtype) == (x.shape, x.dtype) for given in (d, *(() if more is None else (more,))))
    _call("rms_norm_backward", x.dtype, out, d, x, _gain(gain, width), more, eps, x.numel() // width, width)
    return out


def rotate(x_TND: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """`pointwise.rotate`."""
    x_TND, out = x_TND.contiguous(), _like(x_TND)
    cos_TE, sin_TE = (angles.float().contiguous() for angles in (cos_TE, sin_TE))
    T, _, D = x_TND.shape
    assert cos_TE.shape == sin_TE.shape == (T, cos_TE.shape[-1]) and 2 * cos_TE.shape[-1] <= D
    _call("rotate", x_TND.dtype, out, x_TND, cos_TE, sin_TE, *x_TND.shape, cos_TE.shape[-1])
    return out


def gated(g: Tensor, u: Tensor) -> Tensor:
    """`pointwise.gated` by silu."""
    g, u, out = g.contiguous(), u.contiguous(), _like(g)
    assert (u.shape, u.dtype) == (g.shape, g.dtype)
    _call("gated", g.dtype, out, g, u, g.numel())
    return out


def gated_backward(d: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`pointwise.gated_backward` by silu."""
    d, g, u = d.contiguous(), g.contiguous(), u.contiguous()
    dg, du, value = _like(g), _like(g), _like(g)
    assert (d.shape, d.dtype) == (u.shape, u.dtype) == (g.shape, g.dtype)
    _call("gated_backward", g.dtype, dg, du, value, d, g, u, g.numel())
    return dg, du, value


def take(x_TND: Tensor, rows: Tensor, count: int, heads: int) -> Tensor:
    """`tiles._take` of the rows with these numbers."""
    _, N, D = x_TND.shape
    length = len(rows) // count
    out = x_TND.new_empty(count * heads, N // heads * length, D)
    _call("take", x_TND.dtype, out, x_TND.contiguous(), rows, count, length, heads, N // heads, D)
    return out


def put(out_TND: Tensor, x: Tensor, rows: Tensor, count: int, heads: int) -> None:
    """`tiles._put`."""
    _, N, D = out_TND.shape
    assert out_TND.is_contiguous()
    _call("put", x.dtype, out_TND, x.contiguous(), rows, count, len(rows) // count, heads, N // heads, D)


def add(out_TND: Tensor, x: Tensor, rows: Tensor, count: int) -> None:
    """`tiles._add`, into fp32."""
    _, N, D = out_TND.shape
    assert out_TND.is_contiguous() and out_TND.dtype == torch.float32
    _call("add", x.dtype, out_TND, x.contiguous(), rows, count, len(rows) // count, N, D)


def softmax_(scores: Tensor, low_nL: Tensor, high_nL: Tensor, scale: float) -> Tensor:
    """softmax of scale·scores [n·K, G·L, M] in their own place; each query sees its keys from low to below high."""
    count, length = low_nL.shape
    assert scores.is_contiguous() and scores.shape[2] % VECTOR == 0
    heads = scores.shape[0] * scores.shape[1] // (count * length)
    _call("softmax", scores.dtype, scores, low_nL, high_nL, scale, count, heads, length, scores.shape[2])
    return scores


def softmax_backward_(d: Tensor, shares: Tensor, low_nL: Tensor, high_nL: Tensor, scale: float) -> Tensor:
    """The slopes of the scores before they were scaled, in the place of those of the shares."""
    count, length = low_nL.shape
    assert d.is_contiguous() and shares.is_contiguous() and d.shape[2] % VECTOR == 0
    assert (shares.shape, shares.dtype) == (d.shape, d.dtype)
    heads = d.shape[0] * d.shape[1] // (count * length)
    _call("softmax_backward", d.dtype, d, shares, low_nL, high_nL, scale, count, heads, length, d.shape[2])
    return d


def attends(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether there is attention as a whole for such heads."""
    library = _state.library
    if library is None or _state.left_out or device.type != "cpu":
        return False
    return "attend" in library.functions.get(dtype, ()) and width % WIDTHS == 0


def attend(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, parts: Parts, scale: float, window: int | None) -> Tensor:
    """`tiles.attend` of the parts that `tiles.parts_of` names."""
    q_THD, k_TKD, v_TKD = (x.contiguous() for x in (q_THD, k_TKD, v_TKD))
    shape = _shape(q_THD, k_TKD, v_TKD, parts)
    out_THD = torch.zeros_like(q_THD)
    if _call("attend", q_THD.dtype, out_THD, q_THD, k_TKD, v_TKD, parts.rows_n5, scale, *shape, window or 0):
        raise MemoryError(NO_MEMORY)
    return out_THD


def attend_backward(
    d_THD: Tensor, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, parts: Parts, scale: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`tiles.attend_backward` of the parts that `tiles.parts_of` names."""
    d_THD, q_THD, k_TKD, v_TKD = (x.contiguous() for x in (d_THD, q_THD, k_TKD, v_TKD))
    shape = _shape(q_THD, k_TKD, v_TKD, parts)
    assert (d_THD.shape, d_THD.dtype) == (q_THD.shape, q_THD.dtype)
    dq_THD = torch.zeros_like(q_THD)
    dk_TKD, dv_TKD = (torch.zeros(x.shape, dtype=torch.float32) for x in (k_TKD, v_TKD))
    of_a_key = 2 * k_TKD.shape[1] * k_TKD.shape[2]
    found = torch.empty(max(of_a_key * parts.most_keys, min(of_a_key * parts.keys, ROOM)), dtype=torch.float32)
    given = (found, d_THD, q_THD, k_TKD, v_TKD, parts.rows_n5, scale, len(found), *shape, window or 0)
    if _call("attend_backward", q_THD.dtype, dq_THD, dk_TKD, dv_TKD, *given):
        raise MemoryError(NO_MEMORY)
    return dq_THD, dk_TKD.to(k_TKD.dtype), dv_TKD.to(v_TKD.dtype)


def _shape(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, parts: Parts) -> tuple[int, int, int, int]:
    """How many parts, query heads and key heads, and their width."""
    (T, H, D), K, rows = q_THD.shape, k_TKD.shape[1], parts.rows_n5
    assert k_TKD.shape == v_TKD.shape == (T, K, D) and q_THD.dtype == k_TKD.dtype == v_TKD.dtype and H % K == 0
    assert rows.dtype == torch.int32 and rows.is_contiguous() and rows.shape[1] == 5
    assert not len(rows) or 0 <= int(rows.min()) <= int(rows.max()) <= T
    return len(rows), H, K, D


def losses_and_slopes(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor]:
    """`loss._losses_and_slopes`."""
    N, V = logits_NV.shape
    assert targets_N.shape == weights_N.shape == (N,)
    assert N == 0 or 0 <= int(targets_N.min()) <= int(targets_N.max()) < V
    logits_NV, slopes_NV = logits_NV.contiguous(), _like(logits_NV)
    losses_N = logits_NV.new_empty(N, dtype=torch.float32)
    given = (logits_NV, targets_N.long().contiguous(), weights_N.float().contiguous())
    _call("losses_and_slopes", logits_NV.dtype, losses_N, slopes_NV, *given, N, V)
    return losses_N, slopes_NV


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _gain(gain: Tensor, width: int) -> Tensor:
    return gain.expand(width).contiguous()


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | float | None) -> int | None:
    given = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    assert _state.library is not None
    returned: int | None = _state.library.functions[dtype][name](*given)
    return returned
