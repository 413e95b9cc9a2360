"""What a checkpoint of the demo's run costs: seconds to write, fsync and rename it, and its size.

Writes benchmarks/results/checkpoint_cost.json. Usage: python benchmarks/checkpoint_cost.py [FOLDER]
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from deltaw.engine.checkpoint import list_checkpoints, save_checkpoint

RESULTS = Path(__file__).parent / "results" / "checkpoint_cost.json"
PARAMETERS = 4_884_480  # of SmolLM2-135M at rank 16, all linear layers


def main(where: str | None) -> None:
    tensors = {name: torch.randn(PARAMETERS) for name in ("master", "exp_avg", "exp_avg_sq", "best")}
    with tempfile.TemporaryDirectory(dir=where) as folder:
        seconds = []
        for step in range(9):
            started = time.perf_counter()
            save_checkpoint(Path(folder), step, {**tensors, "step": torch.zeros(2)}, {"step": step}, keep=2)
            seconds.append(time.perf_counter() - started)
        size = list_checkpoints(Path(folder))[0].stat().st_size
    found = {"parameters": PARAMETERS, "bytes": size, "median_seconds": statistics.median(seconds), "seconds": seconds}
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
