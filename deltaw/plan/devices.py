"""Machines that are not here: what `deltaw plan --on` knows of them, from their makers' data sheets.

`tflops` is the dense rate in the dtype that deltaw would compute in; training sustains `GPU_SHARE` or `CPU_SHARE` of
it. Nothing here was measured by deltaw, so every such plan is marked as uncalibrated.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Device(NamedTuple):
    """A machine by its data sheet."""

    name: str
    kind: str
    memory_bytes: int
    tflops: float
    dtype: torch.dtype
    source: str
    streams: bool = False  # whether blocks can be read from mapped files: on Linux and a CPU


GPU_SHARE, CPU_SHARE = 0.4, 0.5
_GIB = 1 << 30
DEVICES = {
    device.name: device
    for device in (
        Device("h200", "cuda", 141 * 10**9, 989, torch.bfloat16, "NVIDIA H200 data sheet, SXM, dense bf16"),
        Device("h100-80gb", "cuda", 80 * 10**9, 989, torch.bfloat16, "NVIDIA H100 data sheet, SXM, dense bf16"),
        Device("a100-80gb", "cuda", 80 * 10**9, 312, torch.bfloat16, "NVIDIA A100 data sheet, dense bf16"),
        Device("a100-40gb", "cuda", 40 * 10**9, 312, torch.bfloat16, "NVIDIA A100 data sheet, dense bf16"),
        Device("l4-24gb", "cuda", 24 * 10**9, 121, torch.bfloat16, "NVIDIA L4 data sheet, half of the sparse rate"),
        Device("rtx4090-24gb", "cuda", 24 * _GIB, 165, torch.bfloat16, "NVIDIA Ada white paper, fp32 accumulation"),
        Device("rtx3090-24gb", "cuda", 24 * _GIB, 71, torch.bfloat16, "NVIDIA GA102 white paper, fp32 accumulation"),
        Device("t4-16gb", "cuda", 15 * _GIB, 8.1, torch.float32, "NVIDIA T4 data sheet, fp32 (it has no bf16)"),
        Device("m-cpu-8core", "cpu", 16 * _GIB, 1.5, torch.float32, "Apple M1: about 1.5 TFLOP/s by Accelerate"),
        Device("cpu-8core-avx2", "cpu", 16 * _GIB, 0.7, torch.float32, "8 cores · 32 fp32 operations · 2.8 GHz", True),
        Device("cpu-16core-bf16", "cpu", 64 * _GIB, 6.6, torch.bfloat16, "16 cores · 128 · 3.2 GHz (AVX-512)", True),
    )
}  # fmt: skip
