"""Does deltaw compute the same on a GPU, and how fast? Needs no network and no files: it makes its models itself.

    python3 benchmarks/gpu_check.py              on the first GPU, in under nine minutes
    python3 benchmarks/gpu_check.py --tiny cpu   the same steps with small models on the processor, to try the script

1. Every family of layers that deltaw knows, small, with random weights: the kernels' loss and gradients on the device
   against the model's own modules there (fp32 and bf16), and against the processor's (fp32).
2. Bases of the shapes of Llama-3.2-1B and Llama-3.1-8B, random weights in bf16: a training step of deltaw, and of PEFT
   where it is installed, on the same tokens; tokens per second, share of the device's multiply rate, peak memory.

What is not installed is skipped by name. Writes benchmarks/results/gpu_check.json after every part; exit code 1 when a
comparison fails.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import transformers  # noqa: E402

from deltaw import hardware  # noqa: E402
from deltaw.adapter import LoraSpec, choose, inject, new_adapter  # noqa: E402
from deltaw.base import forward  # noqa: E402
from deltaw.base.load import Base  # noqa: E402
from deltaw.base.proof import PROOF_TOLERANCE, prove_decoder  # noqa: E402
from deltaw.data.example import Example  # noqa: E402
from deltaw.data.pack import Batch, flat_batch  # noqa: E402
from deltaw.engine.bench import bench  # noqa: E402
from deltaw.engine.objective import batch_loss  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "gpu_check.json"
SECONDS = 420  # no part begins later; none takes two minutes
LLAMA = {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        **LLAMA,
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
    },
    "Llama-3.1-8B": {
        **LLAMA,
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False},
    },
}
TINY = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 512},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}
PEFT_SHAPES = ((16, 64), (4, 256), (1, 1024))  # rows × tokens, those of deltaw.engine.bench


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--tiny", metavar="DEVICE", help="small models on this device")
    asked.add_argument("--seconds", type=float, default=8.0, help="length of each timing")
    options = asked.parse_args()
    if options.tiny is None and not torch.cuda.is_available():
        print(json.dumps({"skipped": f"torch {torch.__version__} finds no GPU here"}))
        return 0
    device = torch.device(options.tiny or "cuda")
    check = Check(tiny=options.tiny is not None)
    check.part("families", lambda: families(device))
    for name, shape in SHAPES.items():
        sizes = {**shape, **TINY} if options.tiny else shape
        check.part(f"{name}, deltaw", lambda sizes=sizes: by_deltaw(sizes, device, options.seconds))
        check.part(f"{name}, PEFT", lambda sizes=sizes: by_peft(sizes, device, options.seconds))
    return check.end()


class Check:
    """What was found so far, in a file that is whole after every part."""

    def __init__(self, *, tiny: bool) -> None:
        self.started, self.file = time.monotonic(), None if tiny else RESULTS
        self.found: dict[str, Any] = {"machine": asdict(hardware.look())}

    def part(self, name: str, act: Callable[[], Any]) -> None:
        began = time.monotonic()
        if began - self.started > SECONDS:
            self.found[name] = {"skipped": "out of time"}
            return
        try:
            result = act()
        except Exception as error:  # the other parts are still worth having
            result = {"failed": f"{type(error).__name__}: {error}"[:500]}
        self.found[name] = {**result, "seconds": round(time.monotonic() - began, 1)}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(name, json.dumps(self.found[name]), file=sys.stderr, flush=True)
        if self.file is not None:
            self.file.write_text(json.dumps(self.found, indent=2) + "\n", "utf-8")

    def end(self) -> int:
        failed = [name for name, part in self.found.items() if isinstance(part, dict) and part.get("failed")]
        print(json.dumps({"failed": failed, "seconds": round(time.monotonic() - self.started, 1)}))
        return 1 if failed else 0


# ---- does it compute the same?


def families(device: torch.device) -> dict[str, Any]:
    """Each family on the device; "failed" lists those that should run by kernels and do not agree."""
    from models import CONFIGS, lively_model

    found, failed = {}, []
    for kind in CONFIGS:
        here: dict[str, Any] = {}
        reference = lively_model(kind).requires_grad_(False)
        forward.prove(reference)
        on_cpu, _ = prove_decoder(reference)
        for dtype in (torch.float32, torch.bfloat16):
            model = lively_model(kind).to(device, dtype).requires_grad_(False)
            flat_reason, (decoder, reason) = forward.prove(model), prove_decoder(model)
            word = str(dtype).removeprefix("torch.")
            here[word] = "kernels" if decoder is not None else f"modules: {reason}"
            if (decoder is None) != (on_cpu is None) or flat_reason is not None:
                failed.append(f"{kind} in {word}: {flat_reason or reason}")
        here["against the processor"] = difference = across_devices(kind, device)
        if difference > 1e-4:
            failed.append(f"{kind}: loss or gradients are {difference:.1e} off the processor's")
        found[kind] = here
    tolerance = {str(dtype).removeprefix("torch."): limits for dtype, limits in PROOF_TOLERANCE.items()}
    return {"families": found, "tolerance": tolerance, **({"failed": failed} if failed else {})}


def across_devices(kind: str, device: torch.device) -> float:
    """Relative distance of loss and gradient, in fp32, between this device and the processor; the worse of the two."""
    from models import byte_tokenizer, lively_model

    results = []
    for place in (torch.device("cpu"), device):
        model = lively_model(kind).to(place).requires_grad_(False)
        base = Base(kind, Path(), model, byte_tokenizer(), forward.prove(model), prove_decoder(model)[0])
        spec = LoraSpec(rank=4)
        with inject(model, new_adapter(choose(model, spec), spec, 0), trainable=True, dtype=torch.float32) as injection:
            batch = documents(3, 40, base.vocabulary).to(place)
            loss = batch_loss(base, batch)
            loss.backward()
            grads = torch.cat([t.grad.flatten().cpu() for _, _, t in injection.trained() if t.grad is not None])
            results.append((float(loss.detach()), grads))
    (loss, grads), (other_loss, others) = results
    return max(abs(other_loss / loss - 1), float((others - grads).norm() / grads.norm()))


def documents(count: int, length: int, vocabulary: int) -> Batch:
    """So many documents of random tokens, all trained."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, vocabulary, (count, length), generator=generator, dtype=torch.int32)
    return flat_batch([Example(row.numpy(), torch.ones(length).numpy()) for row in rows])


# ---- how fast is it?


def random_model(sizes: dict[str, Any], device: torch.device) -> Any:
    """A frozen Llama of these sizes with random weights, made on the device in bf16."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def by_deltaw(sizes: dict[str, Any], device: torch.device, seconds: float) -> dict[str, Any]:
    """What `deltaw bench` says of the base, and the peak of the device's memory."""
    from models import byte_tokenizer

    model = random_model(sizes, device)
    weight_bytes = memory(device)
    flat_reason, (decoder, reason) = forward.prove(model), prove_decoder(model)
    base = Base("random", Path(), model, byte_tokenizer(), flat_reason, decoder, reason)
    reset_peak(device)
    found = bench(base, 16, seconds, lambda text: print(" ", text, file=sys.stderr))
    return {**found, "weight_bytes": weight_bytes, "peak_bytes": peak(device)}


def by_peft(sizes: dict[str, Any], device: torch.device, seconds: float) -> dict[str, Any]:
    """A plain PEFT loop with its model in bf16, fp32 factors, autocast and torch's fused AdamW on the same shapes."""
    try:
        import peft
    except ImportError:
        return {"skipped": "peft is not installed"}
    wanted = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(random_model(sizes, device), wanted).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    reset_peak(device)
    rates = {}
    for rows, length in PEFT_SHAPES:
        tokens = torch.randint(0, sizes["vocab_size"], (rows, length), device=device)

        def step(tokens: torch.Tensor = tokens) -> None:
            with torch.autocast(device.type, torch.bfloat16):
                model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        rates[f"{rows} × {length}"] = tokens.numel() / median_seconds(step, device, seconds)
    return {"tokens_per_second": rates, "peak_bytes": peak(device)}


def median_seconds(step: Callable[[], None], device: torch.device, seconds: float) -> float:
    """The median of repeated steps, each waited for, after two to warm up."""
    times: list[float] = []
    hardware.time_calls(step, 2, device)
    while len(times) < 3 or sum(times) < seconds:
        times.append(hardware.time_calls(step, 1, device))
    return statistics.median(times)


def memory(device: torch.device) -> int | None:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


if __name__ == "__main__":
    sys.exit(main())
