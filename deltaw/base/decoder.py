"""Decoder: the layers of a Llama-like model run by the kernels of deltaw instead of by their modules.

Weights stay in the modules and are read from there. Whether the model was read rightly is shown by deltaw/base/proof.py
on every loaded model; and where someone else changed what a module does, or an adapter needs more than the kernels
have, the modules run as they are (`refusal`).
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaw.adapter import AdaptedLayer, Injection, injection_of
from deltaw.base.forward import Recomputed
from deltaw.base.reading import Block, Gate, Unreadable, read_block, read_norm
from deltaw.hardware import prepares_products
from deltaw.kernels import Branch, Span, gated_sum, normed, normed_projections, projected_sum, rotary_attention

Live = Mapping[int, AdaptedLayer]

# On a processor, products in bf16 are prepared anew for each number of rows, which may take as long as one product.
# Rows come in multiples of this there: the last ones are zeros at the start, see nothing, and nothing sees them.
ROW_STEP = 32


class Row(NamedTuple):
    """A flat row of documents as `hidden_states` takes it, and the N of its places whose hidden states are wanted.

    There may be more positions than tokens: ROW_STEP.
    """

    tokens_T: Tensor
    positions_T: Tensor
    spans: tuple[Span, ...]
    rows_N: Tensor | None = None

    @property
    def wanted(self) -> int:
        """How many hidden states are asked for."""
        return len(self.tokens_T if self.rows_N is None else self.rows_N)


class Decoder:
    """A model's decoder layers as the kernels run them."""

    def __init__(self, model: Any) -> None:
        """Raises Unreadable when a part is not known."""
        inner = model.base_model
        parts = dict(inner.named_children())
        if set(parts) != {"embed_tokens", "layers", "norm", "rotary_emb"}:
            raise Unreadable(f"it is made of {', '.join(parts)}")
        self.model, self.inner = model, inner
        self.following = set[int]()  # hooks of a pager
        self.recompute = 0  # so many blocks, from the first on, keep only their input for backward and compute again
        by_kind = "layer_type" in inspect.signature(inner.rotary_emb.forward).parameters
        kinds = inner.config.layer_types if by_kind else [None] * len(inner.layers)
        self.blocks = [read_block(layer, kind) for layer, kind in zip(inner.layers, kinds, strict=True)]
        self.norm = read_norm(inner.norm)
        self.known = {id(layer) for block in self.blocks for layer in block.layers()}
        self.inside = {id(module) for layer in inner.layers for module in layer.modules()}
        self.bypassed = list(self._bypassed())

    def _bypassed(self) -> Iterator[nn.Module]:
        """The modules that are not called, so that nobody's hook on them would run."""
        yield from (self.inner, self.inner.norm)
        for block, layer in zip(self.blocks, self.inner.layers, strict=True):
            called = set() if block.other is None else set(block.other.modules())
            yield from (module for module in layer.modules() if module not in called)

    def refusal(self) -> str | None:
        """Why the model as it stands now must run by its modules; None when it need not."""
        injection = injection_of(self.model)
        ours = self.following | (set() if injection is None else injection.hook_ids)
        for module in self.bypassed:
            hooks = (*module._forward_hooks, *module._forward_pre_hooks)
            if any(hook not in ours for hook in hooks) or not isinstance(
                module.__dict__.get("forward"), Recomputed | None
            ):
                return f"someone else changed what its {type(module).__name__} does"
        for layer in _live(injection).values():
            if id(layer.target.owner) in self.known and layer.magnitude is not None:
                return "DoRA runs by the model's modules"
            if id(layer.target.owner) in self.inside and layer.dropout:
                return "dropout runs by the model's modules"
        return None

    def hidden_states(
        self, tokens_T: Tensor, positions_T: Tensor, spans: tuple[Span, ...], rows_N: Tensor | None = None
    ) -> Tensor:
        """Final hidden states [T, H] of a flat row of documents, or [N, H] of some rows of it."""
        row = Row(tokens_T, positions_T, spans, rows_N)
        wanted = row.wanted
        tokens_T, positions_T, spans, rows_N = self._rounded(row)
        live, strength = self._adapters()
        angles = self._all_angles(positions_T)
        x_TH = self._embedded(tokens_T, len(positions_T))
        for number, block in enumerate(self.blocks):
            wanted_N = rows_N if block is self.blocks[-1] else None
            rest = (angles[block.angles], spans, live, strength, wanted_N)
            if number < self.recompute and torch.is_grad_enabled():
                x_TH = checkpoint(_run, block, x_TH, *rest, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TH = _run(block, x_TH, *rest)
        return normed(x_TH, self.norm)[:wanted]

    def accumulate(self, rows: Sequence[Row], loss: Callable[[int, Tensor], Tensor]) -> None:
        """Adds to the factors the gradients of `loss(number, hidden states)` of every row, blocks outermost.

        Each block serves all rows before the next one does, so its weights are read twice and not twice a row; kept are
        the inputs of blocks alone, and the rest is computed again. To the bit what backward of one row after the other
        gives, since each factor sums up the rows in their order.
        """
        wanted = [row.wanted for row in rows]
        rows = [self._rounded(row) for row in rows]
        live, strength = self._adapters()
        angles = [self._all_angles(row.positions_T) for row in rows]
        embedded = id(self.inner.embed_tokens) in live
        adapted = (n for n, layer in enumerate(self.inner.layers) if any(id(part) in live for part in layer.modules()))
        lowest = 0 if embedded else next(adapted, len(self.blocks))  # nothing below it needs a gradient

        def run(number: int, row: int, x_TH: Tensor) -> Tensor:
            block = self.blocks[number]
            wanted_N = rows[row].rows_N if block is self.blocks[-1] else None
            return _run(block, x_TH, angles[row][block.angles], rows[row].spans, live, strength, wanted_N)

        stops = itertools.accumulate((len(row.positions_T) for row in rows), initial=0)
        places = [slice(*ends) for ends in itertools.pairwise(stops)]
        with torch.no_grad():
            first = torch.cat([self._embedded(row.tokens_T, len(row.positions_T)) for row in rows])
            inputs_LTH = first.new_empty(len(self.blocks), *first.shape)  # whole, so that it leaves no gaps in the heap
            inputs_LTH[0] = first
            del first
            for number in range(len(self.blocks) - 1):
                for row, place in enumerate(places):
                    inputs_LTH[number + 1, place] = run(number, row, inputs_LTH[number, place])
            last = [run(len(self.blocks) - 1, row, inputs_LTH[-1, place]) for row, place in enumerate(places)]
        slopes = []
        for row, x_NH in enumerate(last):
            loss(row, normed(x_NH.requires_grad_(), self.norm)[: wanted[row]]).backward()
            slopes.append(x_NH.grad)
        for number in reversed(range(lowest, len(self.blocks))):
            for row, place in enumerate(places):
                x_TH = inputs_LTH[number, place].detach().requires_grad_(embedded or number > lowest)
                run(number, row, x_TH).backward(slopes[row])
                slopes[row] = x_TH.grad
        if embedded:
            for one, slope in zip(rows, slopes, strict=True):
                self._embedded(one.tokens_T, len(one.positions_T)).backward(slope)

    def _rounded(self, row: Row) -> Row:
        """The row with as many places, and as many of them wanted, as products are prepared for."""
        step = row_step(self.inner.embed_tokens.weight)
        if step == 1:
            return row
        positions_T, rows_N = F.pad(row.positions_T, (0, -len(row.positions_T) % step)), row.rows_N
        if rows_N is not None:
            rows_N = F.pad(rows_N, (0, -len(rows_N) % step), value=len(positions_T) - 1)
        return row._replace(positions_T=positions_T, rows_N=rows_N)

    def _embedded(self, tokens_T: Tensor, rows: int) -> Tensor:
        """The embedded tokens, and zeros up to so many rows."""
        x_TH: Tensor = self.inner.embed_tokens(tokens_T)
        return F.pad(x_TH, (0, 0, 0, rows - len(x_TH))) if rows > len(x_TH) else x_TH

    def _adapters(self) -> tuple[Live, float]:
        """The adapted layers at work, and how strong they are."""
        injection = injection_of(self.model)
        return _live(injection), 1.0 if injection is None else injection.strength

    def _all_angles(self, positions_T: Tensor) -> dict[str | None, tuple[Tensor, Tensor]]:
        """Those of each kind of layer."""
        return {kind: self._angles(positions_T, kind) for kind in {block.angles for block in self.blocks}}

    def _angles(self, positions_T: Tensor, kind: str | None) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, half of the rotated width], in fp32."""
        like = torch.empty(0, dtype=torch.float32, device=positions_T.device)
        found = self.inner.rotary_emb(like, positions_T[None], *(() if kind is None else (kind,)))
        cos_TE, sin_TE = (x[0, :, : x.shape[-1] // 2].contiguous() for x in found)
        return cos_TE, sin_TE


def row_step(weight: Tensor) -> int:
    """Of what the number of rows in a product with this weight is made a multiple."""
    return ROW_STEP if prepares_products(weight.device, weight.dtype) else 1


def _live(injection: Injection | None) -> Live:
    """The adapted layers at work, by the identity of the module that each stands beside."""
    if injection is None or injection.active is None or injection.strength == 0:
        return {}
    return {id(layer.target.owner): layer for layer in injection.layers[injection.active].values()}


def _run(
    block: Block,
    x_TH: Tensor,
    angles: tuple[Tensor, Tensor],
    spans: tuple[Span, ...],
    live: Live,
    strength: float,
    rows_N: Tensor | None,
) -> Tensor:
    def branch(layer: nn.Module) -> Branch | None:
        adapted = live.get(id(layer))
        return None if adapted is None else Branch(adapted.A, adapted.B, adapted.scale * strength)

    qkv, x_TH = normed_projections(x_TH, block.before_attention, block.qkv, [branch(layer) for layer in block.qkv])
    q, k, v = qkv if len(qkv) == 3 else qkv[0].split(block.widths, 1)
    o_TX = rotary_attention(q, k, v, block.heads, angles, spans)
    if rows_N is not None:  # behind the last attention, only what a label needs
        x_TH, o_TX = x_TH[rows_N], o_TX[rows_N]
    x_TH = projected_sum(x_TH, o_TX, block.out, branch(block.out), block.after_attention)
    if isinstance(block.mlp, Gate):
        gate, down = block.mlp, block.mlp.down
        branches = [branch(layer) for layer in gate.layers]
        gates, x_TH = normed_projections(x_TH, block.before_mlp, gate.layers, branches)
        g, u = gates if len(gates) == 2 else gates[0].chunk(2, 1)
        return gated_sum(x_TH, g, u, gate.activation, down, branch(down), block.after_mlp)
    assert block.other is not None
    return x_TH + normed(block.other(normed(x_TH, block.before_mlp)[None])[0], block.after_mlp)
