"""Peak memory of a run, by part and phase, from shapes and token counts: nothing is measured here.

Counted is what deltaw's own kernels keep, tensor by tensor (deltaw/kernels/block.py); for models that run by their
modules, what transformers' layers keep under autograd. What the process holds is given.

Legend: T tokens of the heaviest pass, N of them labelled; H hidden, A heads·width, K key heads·width, I inner width,
V vocabulary, L blocks; b bytes of a number in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from deltaw.base.quant import BYTES
from deltaw.kernels.loss import CHUNK_BYTES, PIECE_BYTES, chunk_rows
from deltaw.plan.demand import Choice, Demand, Pass

PARTS = ("fixed", "base", "factors", "activations", "loss", "workspace")
# A master, a gradient and two moments of each trained number, in fp32; and the best so far, kept after an evaluation.
STATE_BYTES, BEST_BYTES = 16, 4
# While an adapter is written: a copy of its numbers, and what is read back. A checkpoint takes none.
SAVED_BYTES = 8
MODULE_FACTOR = 1.0


@dataclass(frozen=True)
class Memory:
    """Bytes by phase and part. `measure` says what the peak is of."""

    phases: Mapping[str, Mapping[str, int]]
    measure: str

    @property
    def peak_bytes(self) -> int:
        """The most that is held at once."""
        return max(sum(parts.values()) for parts in self.phases.values())

    @property
    def peak_phase(self) -> str:
        """When that is."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))


def memory(demand: Demand, choice: Choice, way: str, fixed_bytes: int) -> Memory:
    """What each phase holds, with `fixed_bytes` for the process without base and run; `way` as in Base.way."""
    heavy, b = demand.heaviest(choice.micro_tokens), demand.dtype.itemsize
    fixed = {"fixed": fixed_bytes, "base": base_bytes(demand, choice)}
    factors = demand.trained * STATE_BYTES
    kept = _kept(demand, choice, heavy, way, b)
    loss = _loss(demand, heavy, b)
    work = _workspace(demand, choice, heavy, b)
    best = demand.trained * BEST_BYTES if "eval" in demand.data else 0
    phases = {
        "load": fixed,
        "step": {**fixed, "factors": factors + best, "activations": kept, "loss": loss, "workspace": work},
        "evaluation": {**fixed, "factors": factors + best, "loss": _scored(demand, heavy), "workspace": work},
        "save": {**fixed, "factors": factors + best + demand.trained * SAVED_BYTES},
    }
    measure = "lowest memory limit" if choice.stream else "high-water mark of the process"
    return Memory({name: {part: parts.get(part, 0) for part in PARTS} for name, parts in phases.items()}, measure)


def base_bytes(demand: Demand, choice: Choice) -> int:
    """What of the base is in memory at once."""
    outline, b = demand.outline, demand.dtype.itemsize
    per_block = outline.product_parameters / max(1, outline.layers)
    block = outline.block_parameters * b
    if choice.quant != "none":  # the linear layers small, and one of them dense at a time
        block = round(block + per_block * (BYTES[choice.quant] - b))
    rows, width = outline.head_shape
    if choice.stream:
        return 2 * block + rows * width * b
    rest = (outline.parameters - outline.layers * outline.block_parameters) * b
    return outline.layers * block + rest


def _kept(demand: Demand, choice: Choice, heavy: Pass, way: str, b: int) -> int:
    """What lies between forward and backward."""
    outline, T = demand.outline, heavy.tokens
    block = _block_bytes(demand, way, b) * T
    kept = (outline.layers - choice.recompute) * block + choice.recompute * outline.hidden * b * T
    return round(kept + (block if choice.recompute else 0))


def _block_bytes(demand: Demand, way: str, b: int) -> float:
    """Of one token in one block."""
    o = demand.outline
    H, A, K, I = o.hidden, o.heads * o.head_width, o.key_heads * o.head_width, o.inner
    if way == "kernels":
        return b * (2 * H + 2 * A + 2 * K + 2 * I + demand.ranks / o.layers)
    # transformers under autograd: fp32 copies of norms, activations and their product, inputs of adapted layers.
    return MODULE_FACTOR * (b / 2) * (12 * H + 10 * A + 8 * I + 2 * demand.ranks / o.layers)


def _workspace(demand: Demand, choice: Choice, heavy: Pass, b: int) -> int:
    """What one block holds for a moment: of the gated product in backward four widths and the stream in fp32."""
    o, T = demand.outline, heavy.tokens
    dense = 0 if choice.quant == "none" else max(o.inner, o.hidden) * o.hidden * b
    return round(T * (4 * b * o.inner + (4 + 4 + b) * o.hidden) + dense)


def _loss(demand: Demand, heavy: Pass, b: int) -> int:
    """Logits and their gradients of one chunk, the softmax of a piece, and states with gradients of labelled tokens."""
    rows, _ = demand.outline.head_shape
    chunk = min(heavy.labelled, chunk_rows(rows, torch.float32 if b == 4 else torch.bfloat16))
    return 2 * chunk * rows * b + PIECE_BYTES + 2 * heavy.labelled * demand.outline.hidden * b


def _scored(demand: Demand, heavy: Pass) -> int:
    rows, _ = demand.outline.head_shape
    return min(heavy.labelled * rows * 4, CHUNK_BYTES) * 2
