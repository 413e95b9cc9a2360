"""The product with finer factors has the numbers and gradients of plain autograd, whatever the blocks."""

from __future__ import annotations

import pytest
import torch

from deltaw.adapter import product


def tensors(rows, dtype, factor_dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (rows, 12), "out": (rows, 9), "A": (4, 12), "B": (9, 4), "gain": (9,), "bias": (9,)}
    drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {
        name: tensor.to(dtype if name in ("x", "out", "bias") else factor_dtype).requires_grad_(name != "bias")
        for name, tensor in drawn.items()
    }


@pytest.mark.parametrize("rows", [1, 7, 16])
@pytest.mark.parametrize("kind", ["lora", "dora", "dora without bias"])
def test_values_and_every_gradient_equal_those_of_autograd(kind, rows, monkeypatch):
    """fp32 layers with fp64 factors, against fp64 throughout: within fp32 rounding."""
    monkeypatch.setattr(product, "ROWS", 5)
    ours, exact = tensors(rows, torch.float32, torch.float64), tensors(rows, torch.float32, torch.float64)
    bias = None if kind == "dora without bias" else ours["bias"]
    if kind == "lora":
        found = product.finer_product(ours["x"], ours["out"], ours["A"], ours["B"], 0.5)
    else:
        found = product.finer_dora(ours["x"], ours["out"], ours["A"], ours["B"], 0.5, ours["gain"], bias)
    x, out = exact["x"].double(), exact["out"].double()
    wanted = out + 0.5 * (x @ exact["A"].T) @ exact["B"].T
    if kind != "lora":
        wanted = wanted + (exact["gain"] - 1) * (out - (0 if bias is None else exact["bias"].double()))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found.backward(upstream.float())
    wanted.backward(upstream.float().double())
    used = ("x", "out", "A", "B") if kind == "lora" else ("x", "out", "A", "B", "gain")
    for name in used:
        torch.testing.assert_close(ours[name].grad, exact[name].grad, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_the_result_is_rounded_once_to_the_dtype_of_the_layer():
    given = tensors(6, torch.bfloat16, torch.float32)
    found = product.finer_product(given["x"], given["out"], given["A"], given["B"], 0.5)
    exact = given["out"].float() + 0.5 * (given["x"].float() @ given["A"].T) @ given["B"].T
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, exact.bfloat16(), rtol=2**-7, atol=0)
