"""Every formula against the dense matrix that it avoids."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CASES, Case, drawn
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from deltaw.adapter import LoraSpec, choose, inject, new_adapter
from deltaw.adapter import math as formulas
from deltaw.adapter.product import ROWS, finer_product
from deltaw.errors import AdapterError


def test_scale_is_alpha_over_rank_or_over_its_root():
    assert formulas.scale(32, 16) == 2
    assert formulas.scale(32, 16, rslora=True) == 8
    assert LoraSpec(rank=4, alpha=8, rslora=True, rank_pattern={"q": 16}).scale_of("a.q") == 2


def test_row_norm_is_the_norm_of_the_dense_sum():
    W, A, B = torch.randn(7, 5), torch.randn(3, 5), torch.randn(7, 3)
    torch.testing.assert_close(formulas.row_norm(W, A, B, 1.5), torch.linalg.norm(W + 1.5 * B @ A, dim=1))
    assert formulas.row_norm(W.bfloat16(), A, B, 1.5).dtype == torch.float32


def test_row_norm_of_a_row_that_the_update_cancels_is_zero_and_not_nan():
    W, A, B = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[-1.0]])
    assert formulas.row_norm(W, A, B, 1.0).tolist() == [0.0]


def test_dora_weight_equals_the_weight_norm_of_pytorch():
    W, A, B, m = torch.randn(4, 6), torch.randn(2, 6), torch.randn(4, 2), torch.rand(4)
    layer = nn.Linear(6, 4, bias=False)
    layer.weight.data = W + 0.5 * B @ A
    nn.utils.parametrizations.weight_norm(layer, dim=0)
    layer.parametrizations.weight.original0.data = m[:, None]
    torch.testing.assert_close(formulas.dora_weight(W, A, B, 0.5, m), layer.weight.detach())


def test_dora_keeps_a_row_of_zeros_and_makes_no_nan_of_it():
    W, A, B, m = torch.zeros(2, 3), torch.randn(1, 3), torch.zeros(2, 1), torch.tensor([0.0, 2.0])
    assert not formulas.dora_weight(W, A, B, 1.0, m).any()


def test_a_start_is_that_of_a_linear_layer():
    """Kaiming with a = √5, as in PEFT and in torch.nn.Linear: uniform within ±1/√fan_in."""
    A = formulas.init_A((64, 100), 100, torch.Generator().manual_seed(0))
    theirs = nn.Linear(100, 64).weight
    assert A.abs().max() <= 1 / math.sqrt(100)
    assert A.std().item() == pytest.approx(theirs.std().item(), rel=0.05)
    assert A.mean().abs() < 2e-3


def test_a_new_adapter_has_no_update_and_a_start_within_the_bounds_of_its_kind():
    for case in CASES.values():
        model = case.model()
        adapter = new_adapter(choose(model, case.spec), case.spec)
        for target, factors in zip(choose(model, case.spec), adapter.factors.values(), strict=True):
            still, moving = (factors.A, factors.B) if target.kind == "embedding" else (factors.B, factors.A)
            assert not still.any() and moving.any()
            assert target.kind == "embedding" or moving.abs().max() <= 1 / math.sqrt(target.fan_in)
            if factors.magnitude is not None:
                torch.testing.assert_close(factors.magnitude, target.weight_matrix().norm(dim=1))


def dense_delta(target, A, B):
    """ΔW the slow way, one expert and one kernel position at a time."""
    out = torch.zeros(target.shape)
    if target.kind == "conv":
        for place in torch.cartesian_prod(*(torch.arange(size) for size in target.shape[2:])).reshape(-1, out.ndim - 2):
            at = tuple(place.tolist())
            out[(slice(None), slice(None), *at)] = target.scale * B.flatten(1) @ A[(slice(None), slice(None), *at)]
    elif A.ndim == 3:
        for expert in range(len(A)):
            product = target.scale * B[expert] @ A[expert]
            out[expert] = product.T if target.transposed else product
    else:
        product = target.scale * B @ A
        out = product.T if target.transposed else product
    return out


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_delta_of_each_kind_is_the_dense_product(case: Case):
    model = case.model()
    adapter = case.adapter(model)
    for target in choose(model, case.spec):
        factors = adapter.factors[target.name]
        torch.testing.assert_close(target.delta(factors.A, factors.B), dense_delta(target, factors.A, factors.B))


class _Sum(nn.Module):
    """W + s·B·A as a parametrization of PyTorch: its autograd is the oracle."""

    def __init__(self, A, B, s):
        super().__init__()
        self.A, self.B, self.s = nn.Parameter(A.clone()), nn.Parameter(B.clone()), s

    def forward(self, W):
        return W + self.s * self.B @ self.A


def test_gradients_of_an_attention_layer_are_those_of_its_dense_weights():
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    spec = LoraSpec(rank=2, alpha=4)
    adapter = drawn(new_adapter(choose(model, spec), spec))
    x = torch.randn(5, 1, 8)
    with inject(model, adapter, trainable=True) as injection:
        model["attn"](x, x, x)[0].square().sum().backward()
        ours = {(name, part): tensor.grad for name, part, tensor in injection.trained()}
    sums = {}
    for name, factors in adapter.factors.items():
        owner, _, parameter = name.rpartition(".")
        sums[name] = _Sum(factors.A, factors.B, 2.0)
        register_parametrization(model.get_submodule(owner), parameter, sums[name])
    model["attn"](x, x, x)[0].square().sum().backward()
    for (name, part), gradient in ours.items():
        torch.testing.assert_close(gradient, getattr(sums[name], part).grad)


def test_finer_product_is_the_full_cast_rounded_once_and_so_are_its_gradients():
    x = torch.randn(ROWS + 7, 12).bfloat16()
    out = torch.randn(ROWS + 7, 9).bfloat16()
    A, B = torch.randn(3, 12), torch.randn(9, 3)
    upstream = torch.randn(ROWS + 7, 9).bfloat16()
    gradients = []
    for compute in (finer_product, lambda x, out, A, B, s: (out.float() + s * (x.float() @ A.T) @ B.T).bfloat16()):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, out, A, B)]
        result = compute(*leaves, 0.5)
        result.backward(upstream)
        gradients.append([result.detach(), *(leaf.grad for leaf in leaves)])
    for mine, theirs in zip(*gradients, strict=True):
        assert mine.dtype == theirs.dtype
        # One step of bf16 where two roundings of fp32 fall on different sides of a boundary.
        torch.testing.assert_close(mine, theirs, rtol=2**-8 if mine.dtype == torch.bfloat16 else 1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 0},
        {"rank": 2.0},
        {"rank": True},
        {"rank": 5000},
        {"alpha": 0},
        {"alpha": float("nan")},
        {"alpha": "8"},
        {"dropout": 1},
        {"dropout": "x"},
        {"targets": ()},
        {"rank_pattern": {"q_proj": -1}},
        {"alpha_pattern": {"q_proj": None}},
    ],
)
def test_a_setting_without_meaning_is_refused(settings):
    with pytest.raises(AdapterError, match="cannot be used"):
        LoraSpec(**settings)


def test_all_settings_without_meaning_are_named_at_once():
    with pytest.raises(AdapterError, match=r"(?s)rank must.*alpha must.*dropout must"):
        LoraSpec(rank=0, alpha=-1, dropout=2)
