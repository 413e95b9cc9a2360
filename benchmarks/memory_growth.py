"""How a run's memory grows while every step has another number of tokens, with and without a bound on oneDNN's memory.

    python benchmarks/memory_growth.py [STEPS]

Two fresh processes train the built-in base on the same random short chats: one with the bound that `deltaw.load` sets,
one with the 1,024 prepared products that oneDNN and torch's layer above it keep by themselves. Writes
results/memory_growth.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "memory_growth.json"
VARIABLES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
AFTER = (3, 15, 27, 39)  # steps


def child(steps: int) -> None:
    """Trains, and prints the peak after some of the steps and the seconds that a token took."""
    import numpy as np
    import torch

    from deltaw import hardware
    from deltaw.adapter import LoraSpec, choose, inject, new_adapter
    from deltaw.base.load import load
    from deltaw.data.example import Example
    from deltaw.data.pack import flat_batch
    from deltaw.engine.objective import batch_loss
    from deltaw.engine.optim import FlatFactors, OptimSettings

    base = load("smollm2-135m", threads=hardware.usable_cores())
    spec = LoraSpec(rank=16)
    adapter = new_adapter(choose(base.model, spec), spec, 0)
    random = np.random.default_rng(0)
    peaks, seconds, tokens = {}, 0.0, 0
    with inject(base.model, adapter, trainable=True, dtype=torch.float32) as injection:
        flat = FlatFactors(injection, [OptimSettings(rate=1e-4)])
        for step in range(1, steps + 1):
            lengths = random.integers(35, 80, 18)
            drawn = [random.integers(10, base.vocabulary, length).astype(np.int32) for length in lengths]
            weights = [(np.arange(length) >= length - 3).astype(np.float32) for length in lengths]
            batch = flat_batch([Example(t, w) for t, w in zip(drawn, weights, strict=True)])
            began = time.perf_counter()
            (batch_loss(base, batch) / batch.weight).backward()
            flat.step([1.0])
            seconds, tokens = seconds + time.perf_counter() - began, tokens + batch.tokens
            if step in AFTER or step == steps:
                peaks[step] = hardware.peak_rss_bytes()
    print(json.dumps({"peak_bytes_after_step": peaks, "tokens_per_second": tokens / seconds}))


def main(steps: int) -> None:
    found = {}
    for name, bound in (("bounded", None), ("unbounded", "1024"), ("bounded again", None)):
        environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}
        environment |= dict.fromkeys(VARIABLES, bound) if bound else {}
        command = [sys.executable, __file__, "--child", str(steps)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, found[name])
    RESULTS.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(int(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else AFTER[-1])
