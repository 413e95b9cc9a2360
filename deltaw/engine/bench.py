"""How fast a base trains on this machine: tokens per second, share of its multiply rate, and where the time goes.

The work is that of `deltaw train`: the same loop's forward, backward and optimiser step, on random tokens. Useful
floating-point operations are counted by formula, so that what is recomputed or padded counts for nothing.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from deltaw import hardware
from deltaw.adapter import LoraSpec, choose, inject, new_adapter
from deltaw.base.load import Base
from deltaw.base.shapes import mlp_width, multiplied_parameters
from deltaw.data.example import Example
from deltaw.data.pack import Batch, flat_batch
from deltaw.engine.objective import accumulate, head_factors
from deltaw.engine.optim import FlatFactors, OptimSettings
from deltaw.engine.prepare import DEFAULT_MICRO_TOKENS
from deltaw.engine.train import peak_bytes

# (what it is called, tokens of a document, share of them that is trained)
WORKLOADS = (("short chats", 64, 0.1), ("chats", 256, 0.5), ("dense rows", 1024, 1.0))
# Time inside these calls, as torch's profiler names them, belongs to a part; what is left is "everything else".
PARTS = {
    "q, k, v, gate and up, with their norm": ("_NormedProjections", "_NormedProjectionsBackward"),
    "attention": ("_RotaryAttention", "_RotaryAttentionBackward", "_TiledAttention", "_TiledAttentionBackward"),
    "attention's output": ("_ProjectedSum", "_ProjectedSumBackward"),
    "gated product and down": ("_GatedSum", "_GatedSumBackward"),
    "loss and output head": ("_LabelledLoss", "_LabelledLossBackward"),
    "optimiser": ("aten::_fused_adamw_",),
}


def bench(base: Base, rank: int, seconds: float, tell: Callable[[str], None]) -> dict[str, Any]:
    """Measures every workload for `seconds`; returns {"base", "way", "rank", "dtype", "workloads": [...]}."""
    spec = LoraSpec(rank=rank)
    adapter = new_adapter(choose(base.model, spec), spec, seed=0)
    with inject(base.model, adapter, trainable=True, dtype=torch.float32) as injection:
        flat = FlatFactors(injection, [OptimSettings(rate=1e-4)])

        def step(batch: Batch) -> None:
            accumulate(base, [batch], batch.weight, head_factors(base, injection))
            flat.clip()
            flat.step([1.0])

        found = [_workload(base, step, len(flat.master), *workload, seconds, tell) for workload in WORKLOADS]
        return {
            "base": base.name,
            "way": base.way,
            "slow_reason": base.plain_reason or base.slow_reason,
            "rank": rank,
            "dtype": str(base.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "workloads": found,
        }


def _workload(
    base: Base,
    step: Callable[[Batch], None],
    trained: int,
    name: str,
    length: int,
    share: float,
    seconds: float,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    length = min(length, base.context_tokens)
    tell(f"{name}: documents of {length} tokens, {share:.0%} of them trained")
    random = np.random.default_rng(0)
    count = DEFAULT_MICRO_TOKENS[base.device.type] // length
    documents = [_document(random, base.vocabulary, length, share) for _ in range(count)]
    batch = _warmed(step, documents, DEFAULT_MICRO_TOKENS["cpu"] // length)
    rates = [_gemm(base, batch.tokens)]
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        times.append(hardware.time_calls(lambda: step(batch), 1, base.device))
    rates.append(_gemm(base, batch.tokens))
    step_seconds, gemm = statistics.median(times), statistics.mean(rates)
    useful = useful_flops(base, batch, trained)
    return {
        "workload": name,
        "document_tokens": length,
        "trained_share": share,
        "tokens_per_second": batch.tokens / step_seconds,
        "step_seconds": step_seconds,
        "steps": len(times),
        "useful_gflops": useful / step_seconds / 1e9,
        "gemm_gflops": gemm,
        "share_of_gemm": useful / step_seconds / 1e9 / gemm,
        "peak_bytes": peak_bytes(),
        # Elsewhere the processor only says what is to be done.
        "parts": time_by_part(lambda: step(batch)) if base.device.type == "cpu" else {},
    }


def _warmed(step: Callable[[Batch], None], documents: Sequence[Example], least: int) -> Batch:
    """A batch that two steps were taken with: of all documents, or on a GPU of as many halves of them as fit."""
    while True:
        batch = flat_batch(documents)
        try:
            for _ in range(2):
                step(batch)
            return batch
        except torch.OutOfMemoryError:
            if len(documents) <= least:
                raise
        documents = documents[: len(documents) // 2]
        torch.cuda.empty_cache()


def _document(random: np.random.Generator, vocabulary: int, length: int, share: float) -> Example:
    weights = np.zeros(length, np.float32)
    weights[length - max(1, round(share * length)) :] = 1
    return Example(random.integers(0, vocabulary, length).astype(np.int32), weights)


def _gemm(base: Base, tokens: int) -> float:
    """The rate of one product of the batch's tokens with the widest layer of a block."""
    config = base.model.config.get_text_config()
    width = int(getattr(config, "hidden_size", 576))
    return hardware.measure_gemm(base.dtype, tokens, width, mlp_width(config, width), device=base.device)


def useful_flops(base: Base, batch: Batch, trained: int) -> float:
    """Operations that training these tokens needs, nothing recomputed: a frozen layer needs two products, not three.

    4·N of the layers for each token, 4·N of the head for each labelled one, 6 for each trained number, and 7·L·a·t
    for attention over t tokens (its backward counted as two and a half of its forward, as is usual), a = heads·width.
    """
    head = base.model.get_output_embeddings()
    config = base.model.config.get_text_config()
    layers = multiplied_parameters([module for module in base.model.modules() if module is not head], config)
    heads = int(getattr(config, "num_attention_heads", 0))
    width = int(getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // max(1, heads))
    squares = sum((stop - start) ** 2 for start, stop in zip(batch.bounds, batch.bounds[1:], strict=False))
    attention = 7 * int(getattr(config, "num_hidden_layers", 0)) * heads * width * squares
    labelled = batch.trained_tokens
    return 4.0 * layers * batch.tokens + 4.0 * head.weight.numel() * labelled + 6.0 * trained * batch.tokens + attention


def time_by_part(step: Callable[[], None]) -> dict[str, float]:
    """Shares of a step's processor time by part, and within all parts the share of matrix products."""
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would write on stderr when it begins and ends
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    events = {event.key: event for event in profiled.key_averages()}
    total = sum(event.self_cpu_time_total for event in events.values())
    shares = {part: _share(events, names, total) for part, names in PARTS.items()}
    products = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
    return {
        **{part: share for part, share in shares.items() if share},
        "everything else": 1 - sum(shares.values()),
        "matrix products, of all": sum(events[n].self_cpu_time_total for n in products if n in events) / total,
    }


def _share(events: dict[str, Any], names: Sequence[str], total: float) -> float:
    return sum(float(events[name].cpu_time_total) for name in names if name in events) / total
