"""Sums of adapters against the dense sums, trimming against entry-by-entry loops, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import Case, drawn, output
from dense import EXACT, KINDS, LOGITS, SINGLE, WITHOUT_DORA, again, deltas, far, in_dtype, linear
from models import small_model
from peft_reader import opened_by_peft

from deltaw.adapter import Factors, LoraSpec, choose, inject, new_adapter, read_adapter, write_adapter
from deltaw.analysis.arithmetic import combine
from deltaw.errors import AdapterError

EACH_KIND = pytest.mark.parametrize("case", WITHOUT_DORA.values(), ids=WITHOUT_DORA.keys())
WEIGHTS = (0.7, -1.3)
# The energy that random projections may miss of a spectrum without any gap.
PROJECTED = 0.01
# Share of 10,000 entries that a fair draw keeps: five standard errors.
KEPT = 0.025


def updates(adapter):
    """ΔW of linear layers, written out."""
    return {name: adapter.spec.scale_of(name) * f.B @ f.A for name, f in adapter.factors.items()}


def tail_share(dense, rank):
    square = torch.linalg.svdvals(dense).square()
    return float(square[..., rank:].sum()), float(square.sum())


# -- plain sums -------------------------------------------------------------------------------------------------------


@EACH_KIND
def test_the_sum_is_the_dense_sum_whatever_ranks_scales_and_patterns_the_parts_have(case: Case):
    model = case.model()
    last = case.adapter(model).pattern_name(list(case.adapter(model).factors)[-1])
    parts = [
        case.adapter(model),
        again(case, model, 5, rank=3, rslora=True, alpha=5, rank_pattern={last: 5}, alpha_pattern={last: 1}),
    ]
    dense = [deltas(part, model) for part in parts]
    combined = combine(parts, WEIGHTS)
    assert combined.discarded <= EXACT
    for name, ours in deltas(combined.adapter, model).items():
        assert far(ours, WEIGHTS[0] * dense[0][name] + WEIGHTS[1] * dense[1][name]) <= SINGLE
    assert {combined.adapter.scale_of(name) for name in dense[0]} == {1.0}


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_what_a_lower_rank_discards_is_the_dense_tail_of_the_sum(rank):
    parts = [linear(LoraSpec(rank=r, alpha=2, rslora=r == 3), r, a=(12, 9), b=(7, 20)) for r in (2, 3, 4)]
    weights = (1.0, 0.5, -2.0)
    combined = combine(parts, weights, rank)
    lost = total = 0.0
    for name, ours in updates(combined.adapter).items():
        dense = sum(weight * updates(part)[name] for part, weight in zip(parts, weights, strict=True))
        tail, energy = tail_share(dense, rank)
        assert float((dense - ours).square().sum()) == pytest.approx(tail, rel=EXACT * 100)
        lost, total = lost + tail, total + energy
    assert combined.discarded == pytest.approx(lost / total, rel=1e-9)


def test_a_layer_that_an_adapter_lacks_counts_as_zero():
    spec = LoraSpec(rank=2, alpha=3)
    first, second = linear(spec, 1, a=(5, 6), b=(5, 6)), linear(spec, 2, b=(5, 6), c=(5, 6))
    combined = combine([first, second], WEIGHTS).adapter
    one, two, ours = updates(first), updates(second), updates(combined)
    assert set(ours) == set(combined.modules) == {"a", "b", "c"}
    wanted = {"a": 0.7 * one["a"], "b": 0.7 * one["b"] - 1.3 * two["b"], "c": -1.3 * two["c"]}
    assert all(far(ours[name], dense) <= EXACT for name, dense in wanted.items())
    assert {name: len(factors.A) for name, factors in combined.factors.items()} == {"a": 2, "b": 4, "c": 2}


def test_an_adapter_minus_itself_is_zero_and_can_be_trained():
    adapter = linear(LoraSpec(rank=2, alpha=3), a=(5, 6))
    combined = combine([adapter, adapter], (1, -1))
    assert combined.adapter.factors["a"].A.any(1).all()
    assert updates(combined.adapter)["a"].norm() <= EXACT * updates(adapter)["a"].norm()
    zero = combine([adapter], (0.0,))
    assert zero.discarded == 0 and not updates(zero.adapter)["a"].any()


def test_of_the_origin_what_all_agree_on_is_kept():
    first, second = (linear(LoraSpec(rank=2, dropout=dropout), a=(5, 6)) for dropout in (0.1, 0.0))
    first.origin.update(base="m", data="x", only="1")
    second.origin.update(base="m", data="y")
    combined = combine([first, second], (1, 1)).adapter
    assert combined.origin == {"base": "m"}
    assert combined.spec.dropout == 0
    assert first.origin == {"base": "m", "data": "x", "only": "1"}


# -- TIES and DARE ----------------------------------------------------------------------------------------------------


def ties(parts, weights, density):
    """TIES entry by entry (arXiv 2306.01708 §3): trim, elect, mean of those that agree; times the sum of weights."""
    trimmed = []
    for dense, weight in zip(parts, weights, strict=True):
        count = round(density * dense.numel())
        largest = dense.abs().flatten().sort(descending=True).values[count - 1]
        trimmed.append([weight * x if abs(x) >= largest else 0.0 for x in dense.flatten().tolist()])
    merged = []
    for values in zip(*trimmed, strict=True):
        elected = sum(values)
        agreeing = [(x, abs(weight)) for x, weight in zip(values, weights, strict=True) if x * elected > 0]
        share = sum(weight for _, weight in agreeing)
        merged.append(sum(map(abs, weights)) * sum(x for x, _ in agreeing) / share if agreeing else 0.0)
    return torch.tensor(merged, dtype=torch.float64).view_as(parts[0])


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 0.3, 0.2), (1.0, -2.0, 0.0)])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_what_a_loop_over_entries_gives(weights, density):
    parts = [linear(LoraSpec(rank=r, alpha=2), r, a=(8, 11)) for r in (2, 3, 4)]
    combined = combine(parts, weights, rank=8, method="ties", density=density)
    wanted = ties([updates(part)["a"] for part in parts], weights, density)
    assert far(updates(combined.adapter)["a"], wanted) <= EXACT
    assert combined.discarded <= EXACT


def test_ties_takes_a_missing_layer_for_one_of_zeros():
    spec = LoraSpec(rank=2, alpha=2)
    first, second = linear(spec, 1, a=(6, 7), b=(6, 7)), linear(spec, 2, b=(6, 7))
    padded = linear(spec, 2, b=(6, 7), a=(6, 7))
    padded.factors["b"] = second.factors["b"]
    padded.factors["a"].B[:] = 0
    lacking, explicit = (combine([first, other], (0.6, 0.4), 6, "ties").adapter for other in (second, padded))
    for name, dense in updates(explicit).items():
        assert far(updates(lacking)[name], dense) <= EXACT
    without = combine([first, second], (0.0, 1.0), 6, "ties").adapter
    assert not updates(without)["a"].any()


def test_dare_drops_entries_at_random_and_enlarges_the_rest():
    parts = [linear(LoraSpec(rank=2, alpha=2), seed, a=(100, 100)) for seed in (1, 2)]
    one, two = (updates(part)["a"] for part in parts)
    combined = combine(parts, WEIGHTS, rank=100, method="dare", density=0.3)
    got = updates(combined.adapter)["a"]
    choices = torch.stack([(i * 0.7 * one - j * 1.3 * two) / 0.3 for i, j in itertools.product((0, 1), repeat=2)])
    distance, which = (choices - got).abs().min(0)
    assert distance.max() <= EXACT * got.abs().max() * 100
    for kept in (which % 2 == 1, which >= 2):
        assert float(kept.double().mean()) == pytest.approx(0.3, abs=KEPT)
    assert float((which == 3).double().mean()) == pytest.approx(0.3**2, abs=KEPT)
    same, other = (combine(parts, WEIGHTS, 100, "dare", 0.3, seed).adapter for seed in (0, 1))
    assert torch.equal(updates(same)["a"], got)
    assert not torch.allclose(updates(other)["a"], got)


def test_dare_that_drops_nothing_is_the_sum():
    parts = [linear(LoraSpec(rank=r, alpha=2), r, a=(8, 11)) for r in (2, 3)]
    assert far(*(updates(combine(parts, WEIGHTS, 8, method, 1.0).adapter)["a"] for method in ("dare", "sum"))) <= EXACT


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_what_trimmed_sums_lose_at_a_lower_rank_is_near_the_dense_tail(method):
    """Large layers are taken apart by random projections, which miss a little of a spectrum that falls slowly."""
    parts = [linear(LoraSpec(rank=4, alpha=2), seed, a=(200, 150)) for seed in (1, 2)]
    whole = updates(combine(parts, (1, 1), 150, method).adapter)["a"]
    combined = combine(parts, (1, 1), 8, method)
    tail, energy = tail_share(whole, 8)
    assert combined.discarded == pytest.approx(tail / energy, abs=PROJECTED)
    lost = (whole - updates(combined.adapter)["a"]).square().sum() / energy
    assert tail / energy * (1 - EXACT) <= lost <= tail / energy + PROJECTED


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_stacks_and_convolutions_are_trimmed_as_well(method):
    for kind in ("experts of one layer", "conv2d", "attention"):
        model = KINDS[kind].model()
        parts = [KINDS[kind].adapter(model), again(KINDS[kind], model, 5, rank=2)]
        dense = deltas(combine(parts, WEIGHTS, 32, "sum").adapter, model)
        found = deltas(combine(parts, WEIGHTS, 32, method, density=1.0).adapter, model)
        if method == "dare":
            assert all(far(found[name], wanted) <= SINGLE for name, wanted in dense.items())
        else:
            one, two = (deltas(part, model) for part in parts)
            for name, ours in found.items():
                assert far(ours, ties([one[name], two[name]], WEIGHTS, 1.0)) <= SINGLE


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_everything_that_does_not_fit_is_listed_at_once():
    first = linear(LoraSpec(rank=2), a=(4, 5), b=(4, 5), c=(4, 5))
    second = linear(LoraSpec(rank=3), a=(4, 6), b=(3, 5), c=(4, 5))
    third = linear(LoraSpec(rank=3, dora=True), c=(4, 7))
    third.transposed = True
    with pytest.raises(AdapterError) as raised:
        combine([first, second, third], (1, 1, 1))
    assert str(raised.value).splitlines() == [
        "These adapters cannot be combined:",
        "  - a has another shape in adapter 2",
        "  - b has another shape in adapter 2",
        "  - adapter 3 is DoRA, which is no sum with W; merge it into its base instead",
        "  - adapter 3 is for a base that stores its weights the other way round",
        "  - c has another shape in adapter 3",
    ]


@pytest.mark.parametrize(
    ("kind", "part", "shape"),
    [
        ("conv2d", "A", (4, 2, 3, 3)),
        ("conv2d", "A", (4, 3, 1, 3)),
        ("experts", "A", (3, 4, 32)),
        ("experts", "B", (4, 31, 4)),
    ],
)
def test_kernels_channels_and_experts_of_another_number_are_refused(kind, part, shape):
    case = KINDS[kind]
    adapter = case.adapter(case.model())
    name = adapter.parameter_names[0] if kind == "experts" else "first"
    other = adapter.with_factors(dict(adapter.factors))
    other.factors[name] = Factors(**(dict(adapter.factors[name].tensors()) | {part: torch.zeros(shape)}))
    with pytest.raises(AdapterError, match=f"{name} has another shape in adapter 2"):
        combine([adapter, other], (1, 1))


# -- files ------------------------------------------------------------------------------------------------------------


@EACH_KIND
def test_the_sum_is_saved_and_read_and_gives_the_same_logits_in_peft(case: Case, tmp_path):
    model, inputs = case.model(), case.inputs()
    combined = combine([case.adapter(model), again(case, model, 5, rank=3, rslora=True)], WEIGHTS, rank=5).adapter
    folder = write_adapter(combined, tmp_path / "adapter")
    with inject(model, combined):
        ours = output(model, inputs)
    with inject(model, read_adapter(folder)):
        assert torch.equal(output(model, inputs), ours)
    theirs = output(opened_by_peft(model, folder), inputs)
    torch.testing.assert_close(ours, theirs, atol=LOGITS, rtol=0)


@pytest.mark.parametrize("reverse", [False, True])
def test_stacks_that_each_adapter_has_a_part_of_nest_as_the_model_holds_them(reverse, tmp_path):
    model, inputs = small_model("mixtral"), KINDS["experts"].inputs()
    parts = []
    for seed, targets in enumerate([("experts.down_proj",), ("experts.gate_up_proj", "q_proj")]):
        spec = LoraSpec(rank=2 + seed, alpha=4, targets=targets)
        parts.append(drawn(new_adapter(choose(model, spec), spec), seed))
    combined = combine(parts[::-1] if reverse else parts, (1, 1)).adapter
    last = [name.rpartition(".")[2] for name in combined.parameter_names]
    assert last.index("gate_up_proj") < last.index("down_proj")
    with inject(model, combined):
        ours = output(model, inputs)
    folder = write_adapter(combined, tmp_path / "adapter")
    with inject(model, read_adapter(folder)):
        assert torch.equal(output(model, inputs), ours)
    torch.testing.assert_close(ours, output(opened_by_peft(model, folder), inputs), atol=LOGITS, rtol=0)


def test_the_sum_has_the_finest_dtype_of_those_that_have_the_layer_in_either_order():
    first, second = (linear(LoraSpec(rank=2), seed, a=(5, 6)) for seed in (1, 2))
    given = [in_dtype(first, torch.bfloat16), in_dtype(second, torch.float32)]
    for adapters in (given, given[::-1]):
        combined = combine(adapters, (1, 1)).adapter
        assert {tensor.dtype for _, _, tensor in combined.tensors()} == {torch.float32}
