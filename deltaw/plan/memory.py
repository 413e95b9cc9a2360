"""Peak memory of a run, by part and phase, from shapes and token counts: nothing is measured here.

Counted is what deltaw's own kernels keep, tensor by tensor (deltaw/kernels/block.py); for models that run by their
modules, what transformers' layers keep under autograd. What the process holds is given.

Legend: T tokens of the heaviest pass, N of them labelled; H hidden, A heads·width, K key heads·width, I inner width,
V vocabulary, L blocks; b bytes of a number in the compute dtype.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from deltaw.base.formed import stored_weights
from deltaw.base.load import most_together
from deltaw.hardware import prepares_products, remembered_products
from deltaw.kernels.loss import PIECE_BYTES, chunk_rows
from deltaw.kernels.tiles import TILE_TOKENS, WHOLE_TOKENS
from deltaw.plan.demand import Choice, Demand, Pass
from deltaw.plan.pace import timed_blocks

PARTS = ("fixed", "base", "factors", "optimiser", "activations", "loss", "workspace")
# Of each trained number, in fp32: a master and a gradient; the best so far, kept after an evaluation; two moments.
FACTOR_BYTES, BEST_BYTES, MOMENT_BYTES = 8, 4, 8
# While an adapter is made: its first numbers and their live copies. While it is written: what is read back.
MADE_BYTES, SAVED_BYTES = 8, 4
# Score-sized tensors that attention in tiles holds at once in backward, and the widths beside them. As a whole it holds
# less, and is planned like that in tiles.
TILES, TILE_WIDTHS = 4, 6

# Fitted to measured peaks (benchmarks/plan_accuracy.py, cases marked "fitted"), so that few of them are predicted too
# low: what a process adds to its tensors for each product that oneDNN keeps prepared, or, where others multiply, in
# all; what bitsandbytes adds; what the heap holds between kept tensors, and how often what a block needs for a moment,
# as steps of other lengths leave other gaps: less where kernels compute in fp32, with no memory of oneDNN's between.
PRODUCT_BYTES, RUNNING_BYTES, QUANT_RUNNING_BYTES = 1_100_000, 125_000_000, 150_000_000
KEPT_GAPS, GAPS = 1.2, 6
CODE_BYTES = 45_000_000  # of libraries: taken back, these pages have a step wait for the disk at every call
# How far peaks lie below and above what is predicted: the extremes of that grid, and above twice that, since a run must
# fit and may be longer than those. On GPUs no peak was measured.
MEMORY_SPREAD, UNMEASURED_SPREAD = (0.16, 0.06), (0.3, 0.3)
FP32_GAPS = {"kernels": (1.0, 4), "modules": (1.3, 6)}
# Tokens of the prompts that merging compares logits at, in the usual templates; and how many sets of them it comes to
# hold, three of them to compare: fitted to the same grid.
MERGED_POSITIONS, MERGED_LOGITS = 140, 5.5


@dataclass(frozen=True)
class Memory:
    """Bytes by phase and part. `measure` says what the peak is of, `spread` how far it may lie below and above."""

    phases: Mapping[str, Mapping[str, int]]
    measure: str
    spread: tuple[float, float]

    @property
    def peak_bytes(self) -> int:
        """The most that is held at once."""
        return max(sum(parts.values()) for parts in self.phases.values())

    @property
    def peak_phase(self) -> str:
        """When that is."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def needed_bytes(self) -> int:
        """The upper end of the peak's interval, which has to fit."""
        return self.interval(self.peak_bytes)[1]

    def interval(self, size: int) -> list[int]:
        """Bytes, [low, high], between which a predicted size lies."""
        low, high = self.spread
        return [round(size * (1 - low)), round(size * (1 + high))]


def memory(demand: Demand, choice: Choice, way: str, fixed_bytes: int, file_bytes: int = 0) -> Memory:
    """What each phase holds. `way` as in Base.way.

    `fixed_bytes` is held by the process without base and run, `file_bytes` of it as pages of files: where the measure
    is the lowest limit, only those count that every step runs through.
    """
    heavy, b = demand.heaviest(choice.micro_tokens), demand.dtype.itemsize
    kept_gaps, gaps = _gaps(demand, way)
    held = fixed_bytes - (idle_pages(file_bytes) if choice.stream else 0) + _running_bytes(demand, choice)
    fixed = {"fixed": held, "base": base_bytes(demand, choice)}
    best = demand.trained * BEST_BYTES if "eval" in demand.data else 0
    factors = demand.trained * FACTOR_BYTES + best
    step = {
        **fixed,
        "factors": factors,
        "optimiser": demand.trained * MOMENT_BYTES,
        "activations": round(kept_gaps * _kept(demand, choice, heavy, way, b)),
        "loss": _loss(demand, heavy, b),
        "workspace": _workspace(demand, choice, heavy, b, gaps),
    }
    timed = timed_blocks(demand.outline)
    whole = demand.heaviest(int(demand.settings.micro_tokens))
    phases = {
        "plan": {
            "fixed": fixed["fixed"],
            "base": timed * demand.outline.block_parameters * b,
            "activations": round(timed * whole.tokens * _block_bytes(demand, way, b)),
            "workspace": _workspace(demand, choice, whole, b, gaps),
        },
        "load": {**fixed, "factors": demand.trained * (FACTOR_BYTES + MADE_BYTES), "optimiser": step["optimiser"]},
        "step": step,
        # What a step has freed stays with the process, ready for the next one.
        "evaluation": step,
        "save": {**step, "factors": factors + demand.trained * SAVED_BYTES},
    }
    told = {name: {part: parts.get(part, 0) for part in PARTS} for name, parts in phases.items()}
    measure = "lowest memory limit" if choice.stream else "high-water mark of the process"
    if demand.device.type == "cuda":
        measure = "memory reserved on the GPU"
    return Memory(told, measure, MEMORY_SPREAD if demand.device.type == "cpu" else UNMEASURED_SPREAD)


def idle_pages(file_bytes: int) -> int:
    """How many bytes of the process's file pages a step can do without for a while."""
    return max(0, file_bytes - CODE_BYTES)


def merging(demand: Demand, fixed_bytes: int) -> dict[str, int]:
    """What `deltaw merge` will hold after the run, by part: no phase of the run, and no reason to refuse it.

    The base is opened as for training, and its logits compared with those of the merged model; a shard is written from
    its sums, one of them being made. What lies in files as it is computed with is let go before that.
    """
    shards: Counter[str] = Counter()
    for each in stored_weights(demand.outline.folder).values():
        shards[each.shard] += math.prod(each.shape) * each.dtype.itemsize
    opened, vocabulary = base_bytes(demand, Choice(0)), demand.outline.head_shape[0]
    logits = round(MERGED_LOGITS * MERGED_POSITIONS * vocabulary * 4)
    writing = max(shards.values(), default=0) - (opened if demand.as_stored else 0)
    held = fixed_bytes + _running_bytes(demand, Choice(0))
    made = max((math.prod(target.shape) for target in demand.targets), default=0) * demand.stored_dtype.itemsize
    factors = demand.trained * SAVED_BYTES
    return {"fixed": held, "base": opened, "factors": factors, "workspace": max(logits, writing) + made}


def _running_bytes(demand: Demand, choice: Choice) -> int:
    prepared = prepares_products(demand.device, demand.dtype)
    running = PRODUCT_BYTES * remembered_products() if prepared else RUNNING_BYTES
    return running + (QUANT_RUNNING_BYTES if choice.quant != "none" else 0)


def _gaps(demand: Demand, way: str) -> tuple[float, float]:
    """How often kept tensors, and those of a moment, are counted."""
    if demand.device.type != "cpu" or demand.dtype != torch.float32:
        return KEPT_GAPS, GAPS
    return FP32_GAPS["kernels" if way == "kernels" else "modules"]


def base_bytes(demand: Demand, choice: Choice) -> int:
    """What of the base has to be in memory at once; of a streamed one the block that computes."""
    outline, b = demand.outline, demand.dtype.itemsize
    block, rest = demand.block_bytes(choice), outline.parameters - outline.layers * outline.block_parameters
    looked_up = math.prod(outline.head_shape) if demand.forms(choice) and demand.forms_embedding else 0
    cast = (rest - looked_up) * b
    if choice.stream:
        return block if demand.as_stored else block + cast  # what is cast lies in no file
    return outline.layers * block + cast + looked_up * demand.stored_dtype.itemsize


def _kept(demand: Demand, choice: Choice, heavy: Pass, way: str, b: int) -> int:
    """What lies between forward and backward."""
    outline, T = demand.outline, heavy.tokens
    block = _block_bytes(demand, way, b) * T
    kept = (outline.layers - choice.recompute) * block + choice.recompute * outline.hidden * b * T
    most = most_together() * max(T, choice.micro_tokens)
    together = min(demand.tokens_a_reading(choice, way), int(demand.settings.batch_tokens), most)
    if together > T:  # inputs of every block and one slope, of several passes
        kept = (outline.layers + 1) * outline.hidden * b * together
    return round(kept + (block if choice.recompute else 0))


def _block_bytes(demand: Demand, way: str, b: int) -> float:
    """Of one token in one block."""
    o = demand.outline
    H, A, K, I = o.hidden, o.heads * o.head_width, o.key_heads * o.head_width, o.inner
    if way == "kernels":
        inputs = (2 + o.norms_behind) * H
        return b * (inputs + 2 * A + 2 * K + 2 * I + demand.ranks / o.layers)
    # transformers under autograd, its norms in fp32 where they are its own: inputs, projections, the MLP's widths.
    norms, width, inner = (12, 10, 8) if o.gated else (6, 6, 4)
    return (b / 2) * (norms * H + width * A + inner * I + 2 * demand.ranks / o.layers)


def _workspace(demand: Demand, choice: Choice, heavy: Pass, b: int, gaps: float) -> int:
    """What backward of one block comes to hold: for the gated product or for attention, whichever is more."""
    o, T = demand.outline, heavy.tokens
    A, K = o.heads * o.head_width, o.key_heads * o.head_width
    # Memory of each size is lent on its own.
    dense = sum({o.inner, A, K}) * o.hidden * b if demand.forms(choice) else 0
    gated = T * (4 * b * o.inner + (4 + 4 + b) * o.hidden)
    scores = sum(n * n for n in heavy.lengths if n <= WHOLE_TOKENS)
    scores = max(scores, *(TILE_TOKENS * n if n > WHOLE_TOKENS else 0 for n in heavy.lengths))
    attention = TILES * b * o.heads * scores + T * (TILE_WIDTHS * b * A + 2 * 4 * K)
    return round(gaps * max(gated, attention) + dense)


def _loss(demand: Demand, heavy: Pass, b: int) -> int:
    """Logits and their gradients of one chunk, the softmax of a piece, and states with gradients of labelled tokens."""
    rows, _ = demand.outline.head_shape
    kind = demand.device.type
    chunk = min(heavy.labelled, chunk_rows(rows, torch.float32 if b == 4 else torch.bfloat16, kind))
    # Elsewhere the softmax is taken of a chunk at once, from a copy in fp32 where it is none.
    piece = PIECE_BYTES if kind == "cpu" else (1 if b == 4 else 2) * chunk * rows * 4
    return 2 * chunk * rows * b + piece + 2 * heavy.labelled * demand.outline.hidden * b
