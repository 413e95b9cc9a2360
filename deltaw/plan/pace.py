"""How fast this machine computes a block of a base: a few of its shapes with random weights, timed for two seconds.

Blocks are run by the code that will train them, so the time needs no model of caches, kernels or threads; it tells too
whether the kernels know the architecture. Small blocks are several, so that their weights come from memory as they
will in a run, not from the processor's cache. What was measured is kept in the cache.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import json
import statistics
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from deltaw import hardware
from deltaw.adapter import LoraSpec, choose, inject, new_adapter
from deltaw.base import forward
from deltaw.base.builtin import cache_folder
from deltaw.base.decoder import Decoder
from deltaw.base.formed import Cast
from deltaw.base.load import Base
from deltaw.base.proof import prepare_passes, prove
from deltaw.base.quant import quantised_reader
from deltaw.base.reading import Unreadable
from deltaw.base.shapes import Outline
from deltaw.disk import keep_note
from deltaw.kernels import compiled, labelled_loss
from deltaw.plan.demand import Demand, Pass

SECONDS, MOST_CALLS = 0.4, 10
HEAD_ROWS, HEAD_LABELS, GPU_HEAD_LABELS = 8192, 128, 2048  # on a GPU few labels would time the launches alone
MOST_BLOCKS, MOST_PARAMETERS = 3, 24_000_000
MOST_UPDATED = MOST_DENSE = 1 << 21
USUAL_DENSE_SECONDS = 0.5e-9
MOST_VOCABULARY = 512
_VERSION = 5  # raised when the same blocks would be timed, or proved, otherwise


@dataclass(frozen=True)
class Timed:
    """One block and one pass: seconds forward, and forward with backward."""

    tokens: int
    forward_seconds: float
    both_seconds: float


@dataclass(frozen=True)
class Pace:
    """What one block takes for a few passes, the head for a labelled token, and the rest. `way` as in Base.way."""

    way: str
    timed: tuple[Timed, ...]
    label_seconds: float
    update_seconds: float
    dense_seconds: float  # of a weight that is stored quantised
    cast_seconds: float  # of one that is stored in another dtype

    def block_seconds(self, tokens: int, *, recompute: bool = False) -> float:
        """Of one block, forward and backward, for a pass of so many tokens."""
        parts = [(t.tokens, t.both_seconds + (t.forward_seconds if recompute else 0)) for t in self.timed]
        return _between(parts, tokens)

    def forward_seconds(self, tokens: int) -> float:
        """Of one block, forward alone."""
        return _between([(t.tokens, t.forward_seconds) for t in self.timed], tokens)


def _between(parts: list[tuple[int, float]], tokens: int) -> float:
    """On the line through the first and the last of (tokens, seconds); in proportion where that would fall."""
    (t0, s0), (t1, s1) = min(parts), max(parts)
    if t0 == t1 or s1 <= s0:
        return s1 * tokens / t1
    return max(s0 * tokens / t0 if tokens < t0 else 0.0, s0 + (s1 - s0) * (tokens - t0) / (t1 - t0))


def measure_pace(demand: Demand) -> Pace:
    """Times a usual pass of the run and a part of it, or takes what was measured here before for the same."""
    passes = _usual_passes(demand)
    memory = cache_folder() / "pace" / f"{_key(demand, passes)}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # it is not there, or of no use
        known = json.loads(memory.read_text("utf-8"))
        return Pace(**{**known, "timed": tuple(Timed(**timed) for timed in known["timed"])})
    found = _measure(demand, passes)
    hardware.give_memory_back()
    keep_note(memory, json.dumps(asdict(found)))
    return found


def _usual_passes(demand: Demand) -> list[Pass]:
    """The pass of middle size among the first steps' ones, and its first quarter."""
    steps = demand.steps(int(demand.settings.micro_tokens), share=False)
    passes = sorted((one for step in steps for one in step), key=lambda one: one.tokens)
    usual = passes[len(passes) // 2]
    part: list[int] = []
    for length in usual.lengths:
        part.append(min(length, max(2, usual.tokens // 4 - sum(part))))
        if sum(part) >= usual.tokens // 4:
            break
    return [usual, Pass(tuple(part), 0)]


def _key(demand: Demand, passes: list[Pass]) -> str:
    machine, settings = hardware.look(), demand.settings
    config = demand.outline.model.config.to_json_string()
    parts = [
        _VERSION, settings.device == "cpu" and (prepare_passes(), compiled.in_use()),
        machine.cpu_name, machine.cores, machine.gpu, machine.versions, settings.device, settings.dtype,
        settings.threads, config, str(demand.stored_dtype),
        demand.ranks, demand.trained, settings.dora, settings.dropout, settings.quant,
        [list(map(int, p.lengths)) for p in passes],
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]


def _measure(demand: Demand, passes: list[Pass]) -> Pace:
    base, blocks = _few_blocks(demand)
    rank, settings = max(1, round(demand.ranks / max(1, len(demand.targets)))), demand.settings
    spec = LoraSpec(rank=rank, dora=settings.dora, dropout=settings.dropout)
    adapter = new_adapter(choose(base.model, spec), spec, seed=0)
    with inject(base.model, adapter, trainable=True, dtype=torch.float32) as injection:
        injection.train(True)
        way = base.way
        with hardware.repeatable(demand.device, strict=way == "kernels"):
            timed = [_time(base, one, blocks) for one in passes]
    del base, injection, adapter
    gc.collect()  # modules and hooks refer to each other in circles, so the blocks would stay
    hardware.give_memory_back()
    label, update, dense, cast = (
        seconds(demand) for seconds in (_label_seconds, _update_seconds, _dense_seconds, _cast_seconds)
    )
    return Pace(way, tuple(timed), label, update, dense, cast)


def likely_way(demand: Demand) -> str:
    """How a base will be computed, judged by its parts alone; its proof, when blocks are timed, may say otherwise."""
    if demand.settings.dora or demand.settings.dropout:
        return "modules"
    try:
        Decoder(demand.outline.model)
    except Unreadable:
        return "modules"
    except RuntimeError:
        pass  # its parts are known; only their numbers are not there
    return "kernels"


def timed_blocks(outline: Outline) -> int:
    """How many blocks are timed: more of small ones, yet so few that timing takes less memory than the run."""
    return min(MOST_BLOCKS, outline.layers, max(1, MOST_PARAMETERS // outline.block_parameters))


def _few_blocks(demand: Demand) -> tuple[Base, int]:
    """A base of the first few blocks, or of one of each kind that the architecture has; and how many blocks."""
    config = copy.deepcopy(demand.outline.model.config)
    text = config.get_text_config()
    count = timed_blocks(demand.outline)
    if kinds := vars(text).get("layer_types"):  # elsewhere it follows from other settings
        first = kinds[:count]
        text.layer_types = first if set(first) == set(kinds) else list(dict.fromkeys(kinds))
        count = len(text.layer_types)
    text.num_hidden_layers = count
    text.vocab_size = min(int(text.vocab_size), MOST_VOCABULARY)
    text.pad_token_id = None
    model: Any = AutoModelForCausalLM.from_config(config, dtype=demand.dtype, trust_remote_code=False)
    model = model.to(demand.device).requires_grad_(False).eval()
    return Base("pace", Path(), model, None, *prove(model)), count


def _time(base: Base, one: Pass, blocks: int) -> Timed:
    tokens_T = torch.arange(one.tokens, device=base.device) % base.vocabulary
    positions_T = torch.cat([torch.arange(n, device=base.device) for n in one.lengths])
    bounds = (0, *torch.tensor(one.lengths).cumsum(0).tolist())

    def lead(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:  # blocks above the lowest need their input's slope
        return out.detach().requires_grad_()

    handle = base.model.get_input_embeddings().register_forward_hook(lead)

    def ahead() -> None:
        with torch.no_grad():
            _states(base, tokens_T, positions_T, bounds)

    def both() -> None:
        states = _states(base, tokens_T, positions_T, bounds)
        states.backward(torch.ones_like(states))

    try:
        return Timed(one.tokens, _median(ahead, base.device) / blocks, _median(both, base.device) / blocks)
    finally:
        handle.remove()


def _states(base: Base, tokens_T: Tensor, positions_T: Tensor, bounds: tuple[int, ...]) -> Tensor:
    if base.plain_reason is None:
        return base.hidden_states(tokens_T, positions_T, bounds)
    with forward.plain_attention(base.model):
        parts = [
            base.model.base_model(input_ids=tokens_T[None, a:b], use_cache=False).last_hidden_state[0]
            for a, b in pairwise(bounds)
        ]
    return torch.cat(parts)


def _label_seconds(demand: Demand) -> float:
    rows, width = demand.outline.head_shape
    on_cpu = demand.device.type == "cpu"
    taken, labels = (min(rows, HEAD_ROWS), HEAD_LABELS) if on_cpu else (rows, GPU_HEAD_LABELS)
    W_VH = torch.randn(taken, width, device=demand.device, dtype=demand.dtype)
    h_NH = torch.randn(labels, width).to(demand.device, demand.dtype).requires_grad_()
    targets_N, weights_N = torch.zeros(labels, dtype=torch.long), torch.ones(labels)
    targets_N, weights_N = targets_N.to(demand.device), weights_N.to(demand.device)

    def call() -> None:
        labelled_loss(h_NH, lambda h: h @ W_VH.T, targets_N, weights_N, taken).backward()

    return _median(call, demand.device) / labels * rows / taken


def _update_seconds(demand: Demand) -> float:
    numbers = min(demand.trained, MOST_UPDATED)
    master = torch.zeros(numbers, device=demand.device, requires_grad=True)
    master.grad = torch.ones_like(master)
    optimiser = torch.optim.AdamW([master], fused=True)
    return _median(optimiser.step, demand.device, 0.05) * demand.trained / max(1, numbers)


def _dense_seconds(demand: Demand) -> float:
    """Of forming one weight from how it is stored; a usual figure where nothing is quantised."""
    if (kind := demand.settings.quant) == "none":
        return USUAL_DENSE_SECONDS
    layer = _small_layer(demand)
    return _median(quantised_reader(layer, kind), demand.device, 0.1) / layer.weight.numel()


def _cast_seconds(demand: Demand) -> float:
    """Of forming one weight from the dtype of the base's files; 0 where none is cast."""
    if demand.as_stored:
        return 0.0
    stored = _small_layer(demand).weight.detach().to(demand.stored_dtype)
    return _median(Cast(stored, demand.dtype), demand.device, 0.1) / stored.numel()


def _small_layer(demand: Demand) -> nn.Linear:
    """A layer as wide as the base, small enough for memory that is used again."""
    hidden = demand.outline.hidden
    rows = max(1, min(demand.outline.inner, MOST_DENSE // hidden))
    return nn.Linear(hidden, rows, bias=False, device=demand.device, dtype=demand.dtype)


def _median(call: Any, device: torch.device, seconds: float = SECONDS) -> float:
    hardware.time_calls(call, 1, device)
    found: list[float] = []
    while len(found) < 3 or (sum(found) < seconds and len(found) < MOST_CALLS):
        found.append(hardware.time_calls(call, 1, device))
    return statistics.median(found)
