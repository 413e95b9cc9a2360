"""What the compiled passes gain: a training step with them beside the same step by torch, in turn, within one process.

SmolLM2-135M, rank 16 on all linear layers, documents whose lengths spread as those of versus.py's workloads do. That
both ways compute the same is shown by tests/kernels. Writes benchmarks/results/passes.json, or passes_fp32.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deltaw import hardware
from deltaw.adapter import LoraSpec, choose, inject, new_adapter
from deltaw.base.load import Base, load
from deltaw.data.example import Example
from deltaw.data.pack import Batch, flat_batch
from deltaw.engine.bench import time_by_part, useful_flops
from deltaw.engine.objective import accumulate, head_factors
from deltaw.engine.optim import FlatFactors, OptimSettings
from deltaw.kernels import compiled

RESULTS = Path(__file__).parent / "results"
# (shortest and longest document, trained share of each); a pass takes as many as fit in TOKENS
WORKLOADS = {"short chats": (24, 90, 0.08), "docstring chats": (60, 420, 0.5), "dense rows": (1024, 1024, 1.0)}
TOKENS, PAIRS, RANK = 1024, 12, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--parts", action="store_true", help="also show where the time of a step goes")
    parser.add_argument("--no-write", action="store_true", help="show, and leave the JSON as it is")
    asked = parser.parse_args()
    hardware.set_threads(None)
    base = load(asked.model, dtype=asked.dtype)
    assert compiled.in_use(), "nothing is compiled here"
    rows = [measured(base, name, asked.pairs, asked.parts) for name in WORKLOADS]
    machine = hardware.look()
    found = {"base": base.name, "dtype": str(base.dtype), "rank": RANK, "cpu": machine.cpu_name, "workloads": rows}
    found |= {"cores": torch.get_num_threads(), "torch": torch.__version__}
    if not asked.no_write:
        name = "passes" if base.dtype == torch.bfloat16 else "passes_fp32"
        (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(table(found))


def measured(base: Base, name: str, pairs: int, parts: bool) -> dict[str, Any]:
    """One workload: seconds of each step by either way, and their median ratio."""
    batch = batch_of(base, *WORKLOADS[name])
    ways = {"torch": compiled.left_out, "compiled": nullcontext}
    with stepping(base, batch) as (step, trained):
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(pairs + 2):
            for way, inside in ways.items():
                with inside():
                    taken = step()
                if number >= 2:
                    seconds[way].append(taken)
        rate = product_rate(base, batch)
        flops = useful_flops(base, batch, trained)
        shares = {}
        for way, inside in ways.items() if parts else ():
            with inside():
                shares[way] = time_by_part(step)
    row = {
        "workload": name,
        "documents": len(batch.bounds) - 1,
        "tokens": batch.tokens,
        "step_seconds": {way: statistics.median(taken) for way, taken in seconds.items()},
        "all_step_seconds": seconds,
        "ratio": statistics.median(a / b for a, b in zip(seconds["torch"], seconds["compiled"], strict=True)),
        "gemm_gflops": rate,
        "share_of_gemm": {w: flops / statistics.median(taken) / 1e9 / rate for w, taken in seconds.items()},
    }
    return {**row, "parts": shares} if parts else row


@contextmanager
def stepping(base: Base, batch: Batch) -> Iterator[tuple[Callable[[], float], int]]:
    """What takes a training step of a new adapter over this batch and gives its seconds; and how many numbers learn."""
    spec = LoraSpec(rank=RANK)
    adapter = new_adapter(choose(base.model, spec), spec, seed=0)
    with inject(base.model, adapter, trainable=True, dtype=torch.float32) as injection:
        flat = FlatFactors(injection, [OptimSettings(rate=1e-4)])

        def step() -> float:
            begun = time.perf_counter()
            accumulate(base, [batch], batch.weight, head_factors(base, injection))
            flat.clip()
            flat.step([1.0])
            return time.perf_counter() - begun

        yield step, len(flat.master)


def batch_of(base: Base, shortest: int, longest: int, share: float) -> Batch:
    random, documents, tokens = np.random.default_rng(0), [], 0
    while tokens + (length := int(random.integers(shortest, longest + 1))) <= TOKENS:
        weights = np.zeros(length, np.float32)
        weights[length - max(1, round(share * length)) :] = 1
        documents.append(Example(random.integers(0, base.vocabulary, length).astype(np.int32), weights))
        tokens += length
    return flat_batch(documents)


def product_rate(base: Base, batch: Batch) -> float:
    config = base.model.config.get_text_config()
    return hardware.measure_gemm(base.dtype, batch.tokens, config.hidden_size, config.intermediate_size)


def table(found: dict[str, Any]) -> str:
    lines = [f"{'':16}{'by torch':>10}{'compiled':>10}{'ratio':>7}{'of the multiply rate':>28}"]
    for row in found["workloads"]:
        slow, fast = (row["step_seconds"][way] for way in ("torch", "compiled"))
        shares = " → ".join(f"{row['share_of_gemm'][way]:.0%}" for way in ("torch", "compiled"))
        lines.append(f"{row['workload']:16}{slow:9.3f}s{fast:9.3f}s{row['ratio']:7.2f}{shares:>28}")
        for way, parts in row.get("parts", {}).items():
            lines += [f"  {way}: {part} {value:.1%}" for part, value in parts.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
