"""How far the gradients of a step are from exact ones: PEFT, and deltaw by modules and by kernels, on a bf16 base.

Exact is PEFT in fp32. The base is SmolLM2-135M, the rows are the demo's training rows, the adapter is random with B
drawn around zero. Writes benchmarks/results/gradient_error.json.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from deltaw import demonstration, hardware
from deltaw.adapter import Adapter, Factors, LoraSpec, choose, inject, new_adapter, write_adapter
from deltaw.base.load import Base, load
from deltaw.data.chat import Encoder
from deltaw.data.example import Example
from deltaw.data.formats import parse_sources, read_rows
from deltaw.data.pack import flat_batch
from deltaw.data.source import Fault
from deltaw.engine.objective import batch_loss

RESULT = Path(__file__).parent / "results" / "gradient_error.json"
ROWS, SEEDS, RANK = 6, 5, 16
Gradients = dict[str, Tensor]


def main() -> None:
    hardware.set_threads(None)
    bases = {dtype: load("smollm2-135m", dtype=dtype) for dtype in ("float32", "bfloat16")}
    examples = demo_examples(bases["float32"])
    found = [one_seed(bases, examples[seed * ROWS : (seed + 1) * ROWS], seed) for seed in range(SEEDS)]
    RESULT.write_text(json.dumps({"rows": ROWS, "rank": RANK, "seeds": found}, indent=2) + "\n")
    for name in found[0]:
        totals = [seed[name]["total"] for seed in found]
        medians = [seed[name]["median"] for seed in found]
        print(f"{name:20s} all gradients {statistics.median(totals):.4f}  one tensor {statistics.median(medians):.4f}")


def demo_examples(base: Base) -> list[Example]:
    """The first rows of the demo's training data as the model reads them."""
    encoder = Encoder(base.tokenizer, 2048)
    rows = read_rows(parse_sources([str(demonstration.snippets("train"))], ()))
    examples: list[Example] = []
    for row in rows:
        if not isinstance(row, Fault):
            examples += encoder.encode(row)
        if len(examples) >= ROWS * SEEDS:
            break
    return examples


def random_adapter(base: Base, seed: int) -> Adapter:
    spec = LoraSpec(rank=RANK, alpha=2 * RANK)
    adapter = new_adapter(choose(base.model, spec), spec, seed)
    random = torch.Generator().manual_seed(seed)
    return adapter.with_factors(
        {name: Factors(f.A, 0.02 * torch.randn(f.B.shape, generator=random)) for name, f in adapter.factors.items()}
    )


def one_seed(bases: dict[str, Base], examples: list[Example], seed: int) -> dict[str, Any]:
    adapter = random_adapter(bases["float32"], seed)
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(adapter, Path(folder) / "adapter")
        exact, theirs = (
            by_peft(bases["float32"], Path(folder) / "adapter", d, examples) for d in (torch.float32, torch.bfloat16)
        )
    base = bases["bfloat16"]
    decoder = base.decoder
    kernels = by_deltaw(base, adapter, examples)
    base.decoder = None
    modules = by_deltaw(base, adapter, examples)
    base.decoder = decoder
    return {
        name: errors(found, exact) for name, found in (("PEFT", theirs), ("modules", modules), ("kernels", kernels))
    }


def by_peft(base: Base, folder: Path, dtype: torch.dtype, examples: list[Example]) -> Gradients:
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base.folder, dtype=dtype), folder, is_trainable=True
    )
    weight = sum(float(example.weights[1:].sum()) for example in examples)
    for example in examples:
        tokens = torch.from_numpy(example.tokens).long()
        losses = F.cross_entropy(model(input_ids=tokens[None]).logits[0, :-1].float(), tokens[1:], reduction="none")
        ((losses * torch.from_numpy(example.weights[1:])).sum() / weight).backward()
    return {
        name.removeprefix("base_model.model.").replace(".lora_", ".").removesuffix(".default.weight"): p.grad.float()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def by_deltaw(base: Base, adapter: Adapter, examples: list[Example]) -> Gradients:
    with inject(base.model, adapter, trainable=True, dtype=torch.float32) as injection:
        batch = flat_batch(examples)
        (batch_loss(base, batch) / batch.weight).backward()
        return {f"{name}.{part}": tensor.grad.clone() for name, part, tensor in injection.trained()}


def errors(found: Gradients, exact: Gradients) -> dict[str, float]:
    """Distance from the exact gradients relative to their size: of all together, and of the median tensor."""
    assert found.keys() == exact.keys()
    apart = {name: float((found[name] - exact[name]).norm()) for name in exact}
    size = {name: float(exact[name].norm()) for name in exact}
    total = sum(a * a for a in apart.values()) ** 0.5 / sum(s * s for s in size.values()) ** 0.5
    return {"total": total, "median": statistics.median(apart[name] / size[name] for name in exact)}


if __name__ == "__main__":
    main()
