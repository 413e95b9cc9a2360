"""A training step by kernels beside the same step in PEFT: loss and gradients, in fp32 and on a bf16 base."""

from __future__ import annotations

import math
import statistics
import warnings
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from models import byte_tokenizer, lively_model, some_documents
from torch import Tensor

from deltaw.adapter import Factors, LoraSpec, choose, inject, new_adapter, write_adapter
from deltaw.base import forward
from deltaw.base.load import Base
from deltaw.base.proof import prove_decoder
from deltaw.data.example import Example
from deltaw.data.pack import flat_batch
from deltaw.engine.objective import batch_loss


def base_of(kind: str, dtype: torch.dtype) -> Base:
    model = lively_model(kind).to(dtype).requires_grad_(False)
    assert forward.prove(model) is None
    decoder, reason = prove_decoder(model)
    assert decoder is not None, reason
    return Base("tiny", Path(), model, byte_tokenizer(), None, decoder)


def drawn_adapter(model, seed: int):
    spec = LoraSpec(rank=8, alpha=16)
    adapter = new_adapter(choose(model, spec), spec, seed)
    random = torch.Generator().manual_seed(seed)
    return adapter.with_factors(
        {n: Factors(f.A, 0.05 * torch.randn(f.B.shape, generator=random)) for n, f in adapter.factors.items()}
    )


def by_peft(kind: str, dtype: torch.dtype, folder: Path, documents) -> tuple[float, dict[str, Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(lively_model(kind).to(dtype), folder, is_trainable=True)
    losses = [
        F.cross_entropy(model(input_ids=d[None]).logits[0, :-1].float(), d[1:], reduction="sum") for d in documents
    ]
    sum(losses).backward()
    named = {name: p for name, p in model.named_parameters() if p.grad is not None}
    short = (
        name.removeprefix("base_model.model.").replace(".lora_", ".").removesuffix(".default.weight") for name in named
    )
    return float(sum(losses).detach()), {name: p.grad.float() for name, p in zip(short, named.values(), strict=True)}


def by_kernels(base: Base, adapter, documents) -> tuple[float, dict[str, Tensor]]:
    with inject(base.model, adapter, trainable=True, dtype=torch.float32) as injection:
        assert base.way == "kernels"
        loss = batch_loss(base, flat_batch([Example(d.int().numpy(), torch.ones(len(d)).numpy()) for d in documents]))
        loss.backward()
        return float(loss.detach()), {
            f"{name}.{part}": tensor.grad.clone() for name, part, tensor in injection.trained()
        }


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "phi3", "olmo2"])
def test_in_fp32_loss_and_every_gradient_are_those_of_peft(kind, tmp_path):
    base, documents = base_of(kind, torch.float32), some_documents((9, 40, 17))
    adapter = drawn_adapter(base.model, 0)
    wanted_loss, wanted = by_peft(kind, torch.float32, write_adapter(adapter, tmp_path / "a"), documents)
    loss, ours = by_kernels(base, adapter, documents)
    assert loss == pytest.approx(wanted_loss, rel=1e-5) and ours.keys() == wanted.keys()
    largest = max(float(grad.norm()) for grad in wanted.values())
    for name, grad in wanted.items():
        assert float((ours[name] - grad).norm()) <= 1e-4 * float(grad.norm()) + 1e-6 * largest, name


def test_on_a_bf16_base_gradients_are_about_as_far_from_exact_ones_as_those_of_peft(tmp_path):
    """Two layers: the rounding of the factors to bf16 shows most. Measured over 5 seeds: 1.0 to 1.6 for the median.

    On SmolLM2-135M, whose 30 layers round far more than the factors do, all gradients together are nearer than PEFT's
    (benchmarks/gradient_error.py: 4.1 % against 4.3 %).
    """
    base = base_of("llama", torch.bfloat16)
    ratios = []
    for seed in range(3):
        torch.manual_seed(seed)
        documents = some_documents((40, 40))
        adapter = drawn_adapter(base.model, seed)
        folder = write_adapter(adapter, tmp_path / str(seed))
        exact, theirs = (by_peft("llama", dtype, folder, documents)[1] for dtype in (torch.float32, torch.bfloat16))
        ours = by_kernels(base, adapter, documents)[1]
        ratios += [float((ours[n] - exact[n]).norm() / (theirs[n] - exact[n]).norm()) for n in exact]
    assert all(map(math.isfinite, ratios)) and statistics.median(ratios) < 1.8
