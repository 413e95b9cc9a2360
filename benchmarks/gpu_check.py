"""Does deltaw compute the same on a GPU, and how fast? Needs no network and no files: it makes its models itself.

    python3 benchmarks/gpu_check.py              on the first GPU, in under nine minutes
    python3 benchmarks/gpu_check.py --tiny cpu   the same steps with small models on the processor, to try the script

1. Every family of layers that deltaw knows, small, with random weights: the kernels' loss and gradients on the device
   against the model's own modules there (fp32 and bf16), and against the processor's (fp32).
2. Attention as the device computes it against the processor's; a shared beginning against the documents one by one; and
   a run of the whole program: trained, verified, evaluated, generated from and merged.
3. Bases of the shapes of Llama-3.2-1B and Llama-3.1-8B, random weights in bf16: a training step of deltaw, and of PEFT
   where it is installed, on documents of the same lengths; tokens per second, share of the device's multiply rate, and
   peak memory.

What is not installed is skipped by name. Writes benchmarks/results/gpu_check.json after every part; exit code 1 when a
comparison fails.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import transformers  # noqa: E402

from deltaw import hardware  # noqa: E402
from deltaw.adapter import Adapter, LoraSpec, choose, inject, new_adapter  # noqa: E402
from deltaw.base import forward  # noqa: E402
from deltaw.base.load import Base  # noqa: E402
from deltaw.base.proof import PROOF_TOLERANCE, prove_decoder  # noqa: E402
from deltaw.data.example import Example  # noqa: E402
from deltaw.data.pack import Batch, flat_batch, shared_batch  # noqa: E402
from deltaw.engine.bench import WORKLOADS, bench  # noqa: E402
from deltaw.engine.objective import batch_loss  # noqa: E402
from deltaw.engine.prepare import DEFAULT_MICRO_TOKENS  # noqa: E402
from deltaw.kernels import Span, document_attention, spans_of  # noqa: E402
from deltaw.kernels.attention import one_call_works  # noqa: E402

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


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--tiny", metavar="DEVICE", help="small models on this device")
    asked.add_argument("--seconds", type=float, default=8.0, help="length of each timing")
    asked.add_argument("--peft", choices=list(SHAPES), help="time PEFT on this shape alone; a part of the whole")
    options = asked.parse_args()
    if options.tiny is None and not torch.cuda.is_available():
        print(json.dumps({"skipped": f"torch {torch.__version__} finds no GPU here"}))
        return 0
    device = torch.device(options.tiny or "cuda")
    if options.peft is not None:
        sizes = {**SHAPES[options.peft], **TINY} if options.tiny else SHAPES[options.peft]
        print(json.dumps(by_peft(sizes, device, options.seconds)))
        return 0
    if device.type == "cuda":
        hardware.tune_gpu()
    check = Check(tiny=options.tiny is not None)
    check.part("families", lambda: families(device))
    check.part("attention", lambda: attention(device))
    check.part("shared beginnings", lambda: shared_beginnings(device))
    check.part("a run", lambda: whole_run(device))
    for name, shape in SHAPES.items():
        sizes = {**shape, **TINY} if options.tiny else shape
        check.part(f"{name}, deltaw", lambda sizes=sizes: by_deltaw(sizes, device, options.seconds))
        check.part(f"{name}, PEFT", lambda name=name: in_a_process_of_its_own(name, options))
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
            where = traceback.format_exc()[-3000:]
            result = {"failed": f"{type(error).__name__}: {error}"[:500], "where": where}
        self.found[name] = {**result, "seconds": round(time.monotonic() - began, 1)}
        print(name, json.dumps(self.found[name]), file=sys.stderr, flush=True)
        if self.file is not None:
            self.file.write_text(json.dumps(self.found, indent=2) + "\n", "utf-8")
        gc.collect()
        if torch.cuda.is_available():
            with contextlib.suppress(RuntimeError):  # after an illegal access every call fails
                torch.cuda.empty_cache()

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
        try:
            reference = lively_model(kind).requires_grad_(False)
            forward.prove(reference)
            on_cpu, _ = prove_decoder(reference)
            for dtype in (torch.float32, torch.bfloat16):
                model = lively_model(kind).to(device, dtype).requires_grad_(False)
                flat_reason, (decoder, reason) = forward.prove(model), prove_decoder(model)
                word = str(dtype).removeprefix("torch.")
                here[word] = "kernels" if decoder is not None else f"modules: {reason}"
                # Which experts a token goes to may turn on the last bit, so of those only fp32 has to agree.
                routed = dtype == torch.bfloat16 and hasattr(model.config, "num_experts_per_tok")
                if ((decoder is None) != (on_cpu is None) or flat_reason is not None) and not routed:
                    failed.append(f"{kind} in {word}: {flat_reason or reason}")
            here["against the processor"] = difference = across_devices(kind, device)
            if not difference <= 1e-4:
                failed.append(f"{kind}: loss or gradients are {difference:.1e} off the processor's")
        except Exception as error:  # the other families are still worth having
            failed.append(f"{kind}: {type(error).__name__}: {error}"[:300])
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
        with inject(model, filled_adapter(model), trainable=True, dtype=torch.float32) as injection:
            batch = documents(3, 40, base.vocabulary).to(place)
            loss = batch_loss(base, batch)
            loss.backward()
            grads = torch.cat([t.grad.flatten().cpu() for _, _, t in injection.trained() if t.grad is not None])
            results.append((float(loss.detach()), grads))
    return apart(*results)


def apart(one: tuple[float, torch.Tensor], other: tuple[float, torch.Tensor]) -> float:
    """The relative distance of two losses, or of their gradients if that is larger; NaN where a number is none."""
    (loss, grads), (other_loss, others) = one, other
    return worst([abs(other_loss / loss - 1), float((others - grads).norm() / grads.norm())])


def worst(distances: list[float]) -> float:
    """The largest, and NaN where one is, which `max` loses."""
    return float(torch.tensor(distances).max())


def filled_adapter(model: Any) -> Adapter:
    """One whose B is not zero, so that A has a gradient."""
    spec, dice = LoraSpec(rank=4), torch.Generator().manual_seed(1)
    adapter = new_adapter(choose(model, spec), spec, 0)
    for factors in adapter.factors.values():
        factors.B = torch.randn(factors.B.shape, generator=dice) * 0.05
    return adapter


def attention(device: torch.device) -> dict[str, Any]:
    """Outputs and gradients of attention there against the processor's in fp32, relative to the largest number."""
    found, failed = {}, []
    apart_spans = spans_of((0, 40, 340, 1364, 1400, 1464))
    continuing = (*apart_spans[:3], Span(1364, 1400, 40, 340), Span(1400, 1464, 40, 340))
    for name, spans, window, softcap in (
        ("plain", apart_spans, None, None),
        ("window", apart_spans, 100, None),
        ("continuing", continuing, None, None),
        ("continuing, window", continuing, 100, None),
        ("soft cap", continuing, None, 2.0),
    ):
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
            dice = torch.Generator().manual_seed(0)
            shapes = ((1464, 8, 64), (1464, 2, 64), (1464, 2, 64), (1464, 8, 64))
            drawn = [torch.randn(shape, generator=dice).to(dtype) for shape in shapes]
            results = []
            for place, finer in ((torch.device("cpu"), torch.float32), (device, dtype)):
                q, k, v = (x.to(place, finer).requires_grad_() for x in drawn[:3])
                out = document_attention(q, k, v, spans, 0.125, window, softcap)
                grads = torch.autograd.grad(out, (q, k, v), drawn[3].to(place, finer))
                results.append([x.detach().float().cpu() for x in (out, *grads)])
            off = worst([float((a - b).abs().max() / a.abs().max()) for a, b in zip(*results, strict=True)])
            found[f"{name}, {str(dtype).removeprefix('torch.')}"] = off
            if not off <= tolerance:
                failed.append(f"{name} in {dtype}: {off:.1e} off the processor's")
    return {**found, **many_lengths(device), **({"failed": failed} if failed else {})}


def many_lengths(device: torch.device) -> dict[str, Any]:
    """Whether torch's kernel for many lengths is taken, and what it spares in a pass of 51 documents."""
    lengths = [100 + 17 * n % 120 for n in range(51)]
    q, k, v = (torch.randn(sum(lengths), heads, 64, device=device, dtype=torch.bfloat16) for heads in (32, 8, 8))
    taken, seconds = one_call_works(q, k, None), {}
    for name, groups in (("one call", [lengths]), ("a call for each length", [[n] for n in lengths])):
        asked = [x.clone().requires_grad_() for x in (q, k, v)]

        def step(groups: list[list[int]] = groups, asked: list[torch.Tensor] = asked) -> None:
            parts = zip(*(x.split([sum(group) for group in groups]) for x in asked), strict=True)
            spans = (spans_of((0, *itertools.accumulate(group))) for group in groups)
            outs = [document_attention(*part, where, 0.125) for part, where in zip(parts, spans, strict=True)]
            torch.cat(outs).sum().backward()

        seconds[name] = median_seconds(step, device, 0.5 if device.type == "cuda" else 0.0)
    return {"one call is taken": taken, "seconds of many lengths": seconds}


def shared_beginnings(device: torch.device) -> dict[str, Any]:
    """Loss and gradients of documents whose common beginning is computed once, against each in full."""
    from models import byte_tokenizer, lively_model

    dice, results = torch.Generator().manual_seed(0), []
    common = torch.randint(0, 64, (40,), generator=dice, dtype=torch.int32)
    rows = [torch.cat([common, torch.randint(0, 64, (n,), generator=dice, dtype=torch.int32)]) for n in (9, 20, 20)]
    examples = [Example(row.numpy(), torch.ones(len(row)).numpy()) for row in rows]
    model = lively_model("llama").to(device).requires_grad_(False)
    base = Base("llama", Path(), model, byte_tokenizer(), forward.prove(model), prove_decoder(model)[0])
    for batch in (flat_batch(examples), shared_batch(examples)):
        with inject(model, filled_adapter(model), trainable=True, dtype=torch.float32) as injection:
            loss = batch_loss(base, batch.to(device))
            loss.backward()
            grads = torch.cat([t.grad.flatten().cpu() for _, _, t in injection.trained() if t.grad is not None])
            results.append((float(loss.detach()), grads))
    off = apart(*results)
    failed = {} if off <= 1e-4 else {"failed": f"{off:.1e} off the documents one by one"}
    return {"way": base.way, "off": off, **failed}


def whole_run(device: torch.device) -> dict[str, Any]:
    """The verbs of the program on a small base: that they end, that the loss falls, that a run repeats its own bits."""
    from models import save_base

    import deltaw

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        data = place / "chats.jsonl"
        rows = [{"prompt": f"what follows {n}?", "completion": str(n + 1)} for n in range(40)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {"model": str(save_base(place / "base", "llama")), "data": str(data), "device": device.type}
        run = deltaw.train(**given, rank=4, steps=12, lr=1e-2, batch_tokens=512, out=str(place / "run"))
        losses = [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines() if '"loss"' in line]
        checks = deltaw.verify(run.folder)
        model = deltaw.load(given["model"], adapter=run.folder, device=device.type)
        found = {
            "losses": losses,
            "checks": checks,
            "evaluated": model.evaluate([str(data)])["loss"],
            "generated": model.generate("what follows 3?", max_new_tokens=4),
            "merged": deltaw.merge(run.folder, place / "merged", device=device.type)["merged_weights"],
        }
    failed = [check["what"] for check in checks if not check["ok"]]
    failed += [] if losses[-1] < losses[0] else ["the loss does not fall"]
    return {**found, **({"failed": failed} if failed else {})}


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
    slow = {} if found["way"] == "kernels" else {"failed": found["slow_reason"]}
    return {**found, "weight_bytes": weight_bytes, "peak_bytes": peak(device), **slow}


def in_a_process_of_its_own(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """`by_peft` where nothing of deltaw's has set up torch."""
    command = [sys.executable, __file__, "--peft", name, "--seconds", str(options.seconds)]
    command += [] if options.tiny is None else ["--tiny", options.tiny]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def by_peft(sizes: dict[str, Any], device: torch.device, seconds: float) -> dict[str, Any]:
    """A plain PEFT loop with its model in bf16, fp32 factors, autocast and torch's fused AdamW.

    Its documents have the lengths and trained tokens of deltaw's; where the memory does not suffice, half as many rows.
    """
    try:
        import peft
    except ImportError:
        return {"skipped": "peft is not installed"}
    wanted = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(random_model(sizes, device), wanted).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    rates: dict[str, float | None] = {}
    peaks: list[int] = []

    def step(tokens: torch.Tensor, labels: torch.Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            model(input_ids=tokens, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _, length, share in WORKLOADS:
        rows = DEFAULT_MICRO_TOKENS[device.type] // length
        while rows:
            optimizer.zero_grad()
            reset_peak(device)
            tokens = torch.randint(0, sizes["vocab_size"], (rows, length), device=device)
            labels = tokens.clone()
            labels[:, : length - max(1, round(share * length))] = -100
            try:
                seconds_a_step = median_seconds(partial(step, tokens, labels), device, seconds)
            except torch.OutOfMemoryError:
                rows //= 2
                torch.cuda.empty_cache()
                continue
            rates[f"{rows} × {length}"] = tokens.numel() / seconds_a_step
            peaks.append(peak(device) or 0)
            break
        else:
            rates[f"1 × {length}"] = None
    return {"tokens_per_second": rates, "peak_bytes": max(peaks, default=0) or None}


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
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


if __name__ == "__main__":
    sys.exit(main())
