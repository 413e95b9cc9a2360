"""This machine's rate at SmolLM2-135M's shapes, 1,024 tokens, in bf16 or fp32. A script; prints one JSON line."""

from __future__ import annotations

import json

import torch

from deltaw.hardware import compute_dtype, look, measure_gemm, set_threads

# (inputs, outputs, how many per block): q and o, k and v, gate and up, down; then the head, once.
BLOCK = [(576, 576, 2), (576, 192, 2), (576, 1536, 2), (1536, 576, 1)]
NUM_BLOCKS, HEAD = 30, (576, 49152)


def main() -> None:
    set_threads(None)
    dtype = compute_dtype(torch.device("cpu"), look())
    shapes = [(k, n, NUM_BLOCKS * count) for k, n, count in BLOCK] + [(*HEAD, 1)]
    rates = {f"{k}x{n}": measure_gemm(dtype, 1024, k, n, seconds=1.0) for k, n, _ in shapes}
    work = sum(k * n * count for k, n, count in shapes)
    time = sum(k * n * count / rates[f"{k}x{n}"] for k, n, count in shapes)
    print(json.dumps({"gflops": work / time, "gflops_by_shape": rates}))


if __name__ == "__main__":
    main()
