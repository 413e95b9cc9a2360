"""The halves of a decoder layer against the same formulas in plain torch with autograd: values, gradients, what is kept."""

from __future__ import annotations

import statistics
from itertools import accumulate, pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deltaw.kernels import (
    Branch,
    Heads,
    Norm,
    gated_sum,
    normed,
    normed_projections,
    projected_sum,
    rotary_attention,
    spans_of,
)

T, H, I = 11, 12, 20
DOUBLE = {"atol": 1e-9, "rtol": 1e-7}


class Scaled(nn.Module):
    """A norm's weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width), requires_grad=False)


def linear(inner: int, outer: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(inner, outer, bias=bias).requires_grad_(False)


def branch_of(layer: nn.Linear, rank: int = 3) -> Branch:
    A, B = torch.randn(rank, layer.in_features), torch.randn(layer.out_features, rank)
    return Branch(A.requires_grad_(), B.requires_grad_(), 0.7)


def plain_norm(x, norm):
    if norm is None:
        return x
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * (norm.offset + norm.layer.weight)


def plain_linear(x, layer, branch):
    y = F.linear(x, layer.weight, layer.bias)
    return y if branch is None else y + branch.scale * (x @ branch.A_RI.T.to(x.dtype) @ branch.B_OR.T.to(x.dtype))


def factors(*branches):
    return [tensor for branch in branches if branch is not None for tensor in (branch.A_RI, branch.B_OR)]


def same(ours, plain, leaves, **tolerance):
    """Outputs and, with a random upstream, the gradients of every leaf."""
    ours, plain = (list(outs) if isinstance(outs, list | tuple) else [outs] for outs in (ours, plain))
    upstream = [torch.randn_like(out) for out in plain]
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or DOUBLE))
    grads = [torch.autograd.grad(outs, leaves, upstream, allow_unused=True) for outs in (ours, plain)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or DOUBLE))


@pytest.fixture(autouse=True)
def in_double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


NORMS = {"none": None, "llama": 0.0, "gemma": 1.0}


def norm_of(kind: str, width: int = H) -> Norm | None:
    return None if NORMS[kind] is None else Norm(Scaled(width), 1e-5, NORMS[kind])


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("adapted", [(), (0,), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_layers_that_share_an_input_give_what_each_gives_alone(kind, adapted, bias):
    x, norm = torch.randn(T, H, requires_grad=True), norm_of(kind)
    layers = [linear(H, width, bias) for width in (I, 8, 8)]
    branches = [branch_of(layer, rank=2 + n) if n in adapted else None for n, layer in enumerate(layers)]
    for summed in (True, False):  # whether x is also passed on to a sum
        plain = [plain_linear(plain_norm(x, norm), layer, b) for layer, b in zip(layers, branches, strict=True)]
        ys, passed = normed_projections(x, norm, layers, branches)
        ours, plain = ([*ys, passed], [*plain, x * 1]) if summed else (ys, plain)
        same(ours, plain, [x, *factors(*branches)])


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("adapted", [False, True], ids=["frozen", "adapted"])
def test_a_projected_sum_is_residual_plus_norm_of_the_layer(kind, adapted):
    x, o = torch.randn(T, H, requires_grad=True), torch.randn(T, I, requires_grad=True)
    norm, layer = norm_of(kind), linear(I, H)
    branch = branch_of(layer) if adapted else None
    plain = x + plain_norm(plain_linear(o, layer, branch), norm)
    same(projected_sum(x, o, layer, branch, norm), plain, [x, o, *factors(branch)])


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("adapted", [False, True], ids=["frozen", "adapted"])
def test_a_gated_sum_is_residual_plus_norm_of_down_of_the_gated_product(activation, kind, adapted):
    x, g, u = (torch.randn(T, width, requires_grad=True) for width in (H, I, I))
    norm, layer = norm_of(kind), linear(I, H)
    branch = branch_of(layer) if adapted else None
    act = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh")}[activation]
    plain = x + plain_norm(plain_linear(act(g) * u, layer, branch), norm)
    same(gated_sum(x, g, u, activation, layer, branch, norm), plain, [x, g, u, *factors(branch)])


def test_a_norm_alone_is_that_norm():
    x = torch.randn(T, H, requires_grad=True)
    for kind in NORMS:
        norm = norm_of(kind)
        same(normed(x, norm), plain_norm(x, norm) + 0, [x])


def plain_attention(q, k, v, heads, angles, bounds):
    """Heads normed, rotated by complex numbers, and attended to one document and one head at a time."""
    cos, sin = angles
    turn = torch.complex(cos, sin)[:, None]

    def prepared(x, norm):
        if norm is not None:
            x = plain_norm(x.unflatten(1, (-1, norm.layer.weight.numel())), norm).flatten(1)
        x = x.unflatten(1, (-1, heads.width))
        first, second, rest = x.split([cos.shape[1], cos.shape[1], heads.width - 2 * cos.shape[1]], -1)
        turned = torch.complex(first.double(), second.double()) * turn
        return torch.cat([turned.real.to(x.dtype), turned.imag.to(x.dtype), rest], -1)

    q, k, v = prepared(q, heads.q_norm), prepared(k, heads.k_norm), v.unflatten(1, (-1, heads.width))
    rows = []
    for start, stop in pairwise(bounds):
        length = stop - start
        distance = torch.arange(length)[:, None] - torch.arange(length)[None]
        hidden = (distance < 0) | (distance >= (heads.window or length))
        per_head = []
        for head in range(q.shape[1]):
            shared = head // (q.shape[1] // k.shape[1])
            scores = heads.scale * q[start:stop, head] @ k[start:stop, shared].T
            if heads.softcap is not None:
                scores = heads.softcap * torch.tanh(scores / heads.softcap)
            per_head.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v[start:stop, shared])
        rows.append(torch.cat(per_head, -1))
    return torch.cat(rows)


@pytest.mark.parametrize("norms", ["none", "per head", "over all"])
@pytest.mark.parametrize("options", [{}, {"window": 4}, {"softcap": 1.5}, {"window": 140, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("rotated", [8, 4], ids=["whole heads", "half of each head"])
def test_attention_of_projected_heads_is_that_of_plain_formulas(norms, options, rotated):
    bounds = tuple(accumulate((5, 1, 33, 270), initial=0))
    q, k, v = (torch.randn(bounds[-1], 8 * count, requires_grad=True) for count in (4, 2, 2))
    widths = {"none": None, "per head": (8, 8), "over all": (32, 16)}[norms]
    q_norm, k_norm = (None, None) if widths is None else (norm_of("llama", widths[0]), norm_of("gemma", widths[1]))
    heads = Heads(8, 0.3, **options, q_norm=q_norm, k_norm=k_norm)
    turns = torch.cat([torch.arange(b - a) for a, b in pairwise(bounds)])[:, None] / torch.arange(1, rotated // 2 + 1)
    angles = (1.1 * turns.cos(), 1.1 * turns.sin())  # some scalings of rotary angles lengthen them too
    plain = plain_attention(q, k, v, heads, angles, bounds)
    # keys and values are summed in fp32 over tiles: gradients of double inputs agree to fp32's precision there
    same(rotary_attention(q, k, v, heads, angles, spans_of(bounds)), plain, [q, k, v], atol=1e-6, rtol=1e-6)


def llama_block(x, dtype=torch.float64, weights=torch.float64):
    """One layer of the form of Llama, every linear layer adapted: by kernels, in plain torch, and the leaves.

    `weights` is the dtype to which weights are rounded before they are held in `dtype`.
    """
    torch.manual_seed(0)
    heads = Heads(8, 8**-0.5)
    qkv, out = [linear(H, width) for width in (16, 8, 8)], linear(16, H)
    gates, down = [linear(H, I), linear(H, I)], linear(I, H)
    norms = [norm_of("llama"), norm_of("llama")]
    branches = {layer: branch_of(layer) for layer in (*qkv, out, *gates, down)}
    for module in (*qkv, out, *gates, down, *(norm.layer for norm in norms)):
        module.to(weights).to(dtype)
    turns = torch.arange(len(x))[:, None] / torch.arange(1, 5)
    angles = (turns.cos(), turns.sin())

    def kernels(x):
        (q, k, v), x = normed_projections(x, norms[0], qkv, [branches[layer] for layer in qkv])
        o = rotary_attention(q, k, v, heads, angles, spans_of((0, len(x))))
        x = projected_sum(x, o, out, branches[out], None)
        (g, u), x = normed_projections(x, norms[1], gates, [branches[layer] for layer in gates])
        return gated_sum(x, g, u, "silu", down, branches[down], None)

    def plain(x):
        n = plain_norm(x, norms[0])
        q, k, v = (plain_linear(n, layer, branches[layer]) for layer in qkv)
        x = x + plain_linear(plain_attention(q, k, v, heads, angles, (0, len(x))), out, branches[out])
        n = plain_norm(x, norms[1])
        g, u = (plain_linear(n, layer, branches[layer]) for layer in gates)
        return x + plain_linear(F.silu(g) * u, down, branches[down])

    return kernels, plain, factors(*branches.values())


def test_a_whole_layer_in_bf16_is_as_near_to_the_exact_one_as_plain_torch_in_bf16(either_way):
    """Errors of every gradient relative to its size; the same weights and inputs, already rounded, for all three."""
    x, upstream = torch.randn(40, H).bfloat16(), torch.randn(40, H).bfloat16()

    def gradients(way, dtype):
        forwards = llama_block(x, dtype, weights=torch.bfloat16)
        leaf = x.to(dtype).requires_grad_()
        return torch.autograd.grad(forwards[way](leaf), [leaf, *forwards[2]], upstream.to(dtype))

    kernels, plain, exact = gradients(0, torch.bfloat16), gradients(1, torch.bfloat16), gradients(1, torch.float64)
    ratios = [float((a - c).norm() / (b - c).norm()) for a, b, c in zip(kernels, plain, exact, strict=True)]
    assert all(ratio < 2 for ratio in ratios) and statistics.median(ratios) < 1.1
    assert all(grad.dtype == torch.float64 for grad in kernels[1:])  # factors keep their own precision


def test_a_whole_layer_in_fp32_is_that_of_plain_torch_in_fp64(either_way):
    x, upstream = torch.randn(300, H).float(), torch.randn(300, H)

    def gradients(way, dtype):
        forwards = llama_block(x, dtype, weights=torch.float32)
        leaf = x.to(dtype).requires_grad_()
        return torch.autograd.grad(forwards[way](leaf), [leaf, *forwards[2]], upstream.to(dtype))

    for found, exact in zip(gradients(0, torch.float32), gradients(1, torch.float64), strict=True):
        assert float((found - exact).norm() / exact.norm()) < 5e-5  # scores are large: plain torch in fp32 is 1e-5 off


def test_a_layer_keeps_its_inputs_q_k_v_o_gate_up_and_the_products_with_A_and_nothing_else():
    x = torch.randn(40, H, requires_grad=True)
    kernels, _, leaves = llama_block(x)
    known = {tensor.untyped_storage().data_ptr() for tensor in leaves}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kernels(x)
    numbers = H + 16 + 8 + 8 + 16 + H + 2 * I + 3 * (3 + 1 + 2 + 1)  # x, q, k, v, o, x, gate and up, A·x of each group
    angles = 2 * 40 * 4 * 8
    assert sum(size for pointer, size in kept.items() if pointer not in known) == 8 * 40 * numbers + angles


def test_below_the_lowest_adapter_nothing_is_kept_and_nothing_goes_backward():
    x, layer = torch.randn(T, H), linear(H, H)
    (y,), passed = normed_projections(x, norm_of("llama"), [layer], [None])
    assert not y.requires_grad and not passed.requires_grad
    assert not projected_sum(x, y, layer, None, None).requires_grad
    branch = branch_of(layer)
    (y,), passed = normed_projections(x, None, [layer], [branch])
    assert not passed.requires_grad
    assert y.requires_grad and y.grad_fn.next_functions[0][0] is None  # x itself is asked for no gradient


def test_no_frozen_weight_is_kept_between_forward_and_backward():
    layer = linear(H, I)
    x = torch.randn(T, H, requires_grad=True)
    weights, norm = {layer.weight.untyped_storage().data_ptr()}, norm_of("llama")
    weights.add(norm.layer.weight.untyped_storage().data_ptr())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.untyped_storage().data_ptr()) or t, lambda t: t
    ):
        (y,), _ = normed_projections(x, norm, [layer], [branch_of(layer)])
    assert kept and not weights & set(kept)
    with torch.no_grad():
        layer.weight.zero_()  # what is asked for in backward is what stands there then
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.abs().sum() > 0  # the branch's share is left
