"""The machine as deltaw sees it, and what it means for training."""

from __future__ import annotations

from typing import Any

import torch

from deltaw import hardware
from deltaw.base.builtin import cache_folder
from deltaw.base.proof import prepare_passes
from deltaw.base.stream import may_stream


def doctor() -> dict[str, Any]:
    """The machine as deltaw sees it (`machine`), and what it means for training (`advice`, sentences)."""
    seen = hardware.look()
    hardware.set_threads(None)
    # Emulated, one product of the usual shape would take two seconds.
    size = (EMULATED_SIZE,) * 3 if hardware.emulates_bf16(seen) else ()
    rates = {
        str(torch.float32): hardware.measure_gemm(torch.float32),
        str(torch.bfloat16): hardware.measure_gemm(torch.bfloat16, *size),
    }
    device = hardware.choose_device()
    dtype = hardware.compute_dtype(device, seen)
    unprepared = prepare_passes()
    gpu = "none" if seen.gpu is None else f"{seen.gpu.name}, {seen.gpu.total_bytes / 1e9:.0f} GB"
    machine = {
        "processor": f"{seen.cpu_name}, {seen.cores} cores",
        "instruction sets": ", ".join(seen.instruction_sets),
        "multiply rate": ", ".join(
            f"{name.removeprefix('torch.')} {rate:,.0f} GFLOP/s" for name, rate in rates.items()
        ),
        "memory": f"{seen.memory_limit_bytes / 1e9:.1f} GB ({seen.memory_limit_source}), "
        f"{seen.available_bytes / 1e9:.1f} GB free",
        "gpu": gpu,
        "compiled passes": "in use on the processor" if unprepared is None else f"none: {unprepared}",
        "platform": seen.platform,
        **{f"version of {name}": version for name, version in seen.versions.items()},
        "cache": str(cache_folder()),
    }
    return {"machine": machine, "gemm_gflops": rates, "advice": _advice(seen, device, dtype, rates)}


EMULATED_SIZE = 256


def _advice(seen: hardware.Machine, device: torch.device, dtype: torch.dtype, rates: dict[str, float]) -> list[str]:
    advice = [f"Training runs on {device} and computes in {str(dtype).removeprefix('torch.')}."]
    if device.type == "cpu":
        rate = rates[str(dtype)]
        speed = _tokens_per_second(rate, dtype)
        advice.append(
            f"A base of 135M parameters trains at roughly {speed:,.0f} tokens per second here: "
            f"{TRAINING_SHARE[dtype]:.0%} of {rate:,.0f} GFLOP/s, over {FLOP_PER_TOKEN / 1e9:.2f} GFLOP per token."
        )
        if dtype == torch.float32:
            advice.append(
                "bf16 would be slow here. A base that is stored in it keeps 2 bytes per parameter for layers of its "
                "blocks and takes 4 for the rest; one that is streamed takes none for the blocks that wait."
            )
            if not hardware.emulates_bf16(seen):
                share = rates[str(torch.bfloat16)] / rate
                advice.append(f"`--dtype bfloat16` takes less memory, at {share:.0%} of the multiply rate.")
    gpu = seen.gpu if device.type == "cuda" else None
    room = seen.memory_limit_bytes if gpu is None else gpu.total_bytes
    largest = 0.6 * room / (2 if device.type == "cpu" or dtype != torch.float32 else 4)  # bytes of most files
    ways = [*(["streamed"] if may_stream(device) else []), *(["in 4 bits"] if device.type in ("cpu", "cuda") else [])]
    advice.append(
        f"Bases of up to about {largest / 1e9:.1f}B parameters fit in memory with room to train."
        + (f" `deltaw plan` says how a larger one would be fitted: {', or '.join(ways)}." if ways else "")
    )
    return advice


# SmolLM2-135M has 106,168,320 parameters in the linear layers of its 30 blocks. Each costs 2 FLOP per token forward and
# 2 backward: a frozen weight has no gradient of its own. The head counts for labelled tokens only, and is left out.
FLOP_PER_TOKEN = 4 * 106_168_320
# What steps of short chats (rank 16, 2 CPU cores) reached of the rate of one product by this count: 1,027 tokens/s at
# 946 GFLOP/s in bf16 (benchmarks/results/versus.json), 428 at 324 and 268 at 170 in fp32 (dev/LOG.md).
TRAINING_SHARE = {torch.bfloat16: 0.45, torch.float32: 0.6}


def _tokens_per_second(gflops: float, dtype: torch.dtype) -> float:
    return TRAINING_SHARE[dtype] * gflops * 1e9 / FLOP_PER_TOKEN
