"""Each comparison against its dense form, and against the value that unrelated, equal or opposite adapters must have."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Case
from dense import EXACT, KINDS, again, deltas, linear

from deltaw.adapter import Factors, LoraSpec
from deltaw.analysis.compare import (
    compare,
    cosine,
    inner_product,
    interference,
    overlap,
    principal_angles,
    shared_directions,
    sign_conflict,
)
from deltaw.analysis.spectrum import spectrum
from deltaw.analysis.truncate import truncate, uniform_ranks
from deltaw.errors import AdapterError

EACH_KIND = pytest.mark.parametrize("case", KINDS.values(), ids=KINDS.keys())
# How far means of random draws lie from their expectation: four standard errors of those that are drawn here.
DRAWN = 0.004
# Sign conflicts of unrelated updates of 200 × 300 and rank 8.
UNRELATED = 0.03
# acos near 1 turns rounding in fp64 into its root.
ANGLE = 1e-6


def scaled(adapter, factor):
    return adapter.with_factors({name: Factors(f.A, factor * f.B, f.magnitude) for name, f in adapter.factors.items()})


def random_basis(size, count, generator):
    return torch.linalg.qr(torch.randn(size, count, generator=generator, dtype=torch.float64)).Q


# -- directions -------------------------------------------------------------------------------------------------------


def test_phi_is_its_formula_and_1_for_an_adapter_with_itself():
    generator = torch.Generator().manual_seed(0)
    U, V = random_basis(30, 6, generator), random_basis(30, 4, generator)
    phi = overlap(U, V).phi
    assert phi.shape == (6, 4)
    for i in range(6):
        for j in range(4):
            naive = (U[:, : i + 1].T @ V[:, : j + 1]).square().sum() / min(i + 1, j + 1)
            assert abs(phi[i, j] - naive) <= EXACT
    assert (overlap(U, U).phi - 1).abs().diag().max() <= EXACT
    assert principal_angles(U, U).max() <= ANGLE


def test_directions_are_called_shared_where_they_are_and_seldom_where_they_are_random():
    generator = torch.Generator().manual_seed(0)
    common = random_basis(200, 3, generator)
    apart = torch.linalg.qr(torch.cat([common, torch.randn(200, 5, generator=generator, dtype=torch.float64)], 1)).Q
    other = torch.linalg.qr(torch.cat([common, torch.randn(200, 5, generator=generator, dtype=torch.float64)], 1)).Q
    assert shared_directions(apart, apart) == 8
    assert shared_directions(apart, other) == shared_directions(other, apart.flip(1)) == 3
    nothing_can_be_told = shared_directions(random_basis(16, 8, generator), random_basis(16, 8, generator))
    assert math.isnan(nothing_can_be_told)


@pytest.mark.parametrize(("first", "second"), [(1, 1), (4, 4), (2, 16), (16, 16)])
def test_random_directions_are_called_shared_once_in_a_hundred_times_or_less(first, second):
    generator, times = torch.Generator().manual_seed(0), 1000
    pairs = ((random_basis(200, first, generator), random_basis(200, second, generator)) for _ in range(times))
    called = sum(shared_directions(*pair) > 0 for pair in pairs)
    assert called <= 0.02 * times
    if first == second == 16:  # for fewer directions, the bound is higher than it need be
        assert called > 0


def test_the_mean_of_phi_over_layers_stands_beside_its_null():
    first, second = (linear(LoraSpec(rank=4, alpha=4), seed, one=(40, 30), two=(40, 50)) for seed in (1, 2))
    found = compare(first, second)
    for side, sizes in (("output", (40, 40)), ("input", (30, 50))):
        mean = found["overlap"][side]
        assert mean["first"] == mean["second"] == [1, 2, 4]
        wanted = [max(i, j) * (1 / sizes[0] + 1 / sizes[1]) / 2 for i in (1, 2, 4) for j in (1, 2, 4)]
        assert [number for row in mean["null"] for number in row] == pytest.approx(wanted)
        last = [layer[side]["phi_all"] for layer in found["layers"]]
        assert mean["phi"][-1][-1] == pytest.approx(sum(last) / 2)
    same = compare(first, first)["overlap"]["output"]["phi"]
    assert [same[k][k] for k in range(3)] == pytest.approx([1, 1, 1])


def test_the_null_of_phi_is_the_mean_over_random_subspaces():
    generator = torch.Generator().manual_seed(0)
    drawn = [overlap(random_basis(100, 8, generator), random_basis(100, 5, generator)) for _ in range(1000)]
    mean = torch.stack([each.phi for each in drawn]).mean(0)
    assert (mean - drawn[0].null).abs()[1:].max() <= DRAWN
    assert drawn[0].null[7, 4] == 8 / 100 and drawn[0].null[1, 4] == 5 / 100


def test_principal_angles_of_known_subspaces():
    angles = torch.tensor([0.1, 0.7, math.pi / 2], dtype=torch.float64)
    E = torch.eye(7, dtype=torch.float64)
    turned = E[:, :3] * angles.cos() + E[:, 3:6] * angles.sin()
    torch.testing.assert_close(principal_angles(E[:, :3], turned[:, [2, 0, 1]]), angles, atol=ANGLE, rtol=0)
    assert principal_angles(E[:, :2], turned).shape == (2,)


# -- products and signs -----------------------------------------------------------------------------------------------


@EACH_KIND
def test_inner_product_and_cosine_are_those_of_the_dense_updates(case: Case):
    model = case.model()
    first, second = case.adapter(model), again(case, model, 5, rank=3, rslora=True)
    one, two = deltas(first, model), deltas(second, model)
    for name in one:
        size = one[name].norm() * two[name].norm()
        assert abs(inner_product(first, second, name) - (one[name] * two[name]).sum()) <= EXACT * size
    flat = [torch.cat([dense.flatten() for dense in each.values()]) for each in (one, two)]
    wanted = float(torch.nn.functional.cosine_similarity(*flat, dim=0))
    assert cosine(first, second, list(one)) == pytest.approx(wanted, abs=EXACT)
    assert cosine(first, scaled(first, 3), list(one)) == pytest.approx(1, abs=EXACT)
    assert cosine(first, scaled(first, -2), list(one)) == pytest.approx(-1, abs=EXACT)
    assert cosine(first, scaled(first, 0), list(one)) == 0


def test_sign_conflict_is_its_formula_over_the_largest_fifth():
    first, second = (linear(LoraSpec(rank=2, alpha=2), seed, layer=(5, 6)) for seed in (1, 2))
    trimmed = []
    for adapter in (first, second):
        dense = (adapter.factors["layer"].B @ adapter.factors["layer"].A).flatten()
        smallest_first = dense.abs().argsort()
        trimmed.append([0.0 if i in smallest_first[:24] else float(dense[i]) for i in range(30)])
    common = [(min(abs(a), abs(b)), a * b < 0) for a, b in zip(*trimmed, strict=True)]
    wanted = sum(size for size, differ in common if differ) / sum(size for size, _ in common)
    assert 0 < wanted < 1
    assert sign_conflict(first, second, "layer") == pytest.approx(wanted, rel=1e-5)


def test_sign_conflict_of_equal_opposite_unrelated_and_zero_updates():
    first, second = (linear(LoraSpec(rank=8, alpha=8), seed, layer=(200, 300)) for seed in (1, 2))
    assert sign_conflict(first, scaled(first, 2), "layer") == 0
    assert sign_conflict(first, scaled(first, -0.5), "layer") == 1
    assert sign_conflict(first, second, "layer") == pytest.approx(0.5, abs=UNRELATED)
    assert math.isnan(sign_conflict(first, scaled(first, 0), "layer"))


# -- interference -----------------------------------------------------------------------------------------------------


def test_interference_is_its_formula_0_for_orthogonal_adapters_and_1_for_equal_ones():
    first, second = (linear(LoraSpec(rank=r, alpha=2), r, layer=(9, 11)) for r in (2, 3))
    one, two = spectrum(first, "layer"), spectrum(second, "layer")
    U, V = torch.cat([one.U_OK, two.U_OK], 1), torch.cat([one.V_IK, two.V_IK], 1)
    sigma = torch.cat([one.sigma_K, two.sigma_K])
    crossed = [(X.T @ X - torch.eye(5)).tolist() for X in (U, V)]
    naive = sum(
        abs(sum(crossed[0][a][c] * sigma.tolist()[c] * crossed[1][c][b] for c in range(5)))
        for a in range(5)
        for b in range(5)
    )
    assert interference(one, two) == pytest.approx(naive / float(sigma.sum()), rel=1e-9)
    assert interference(one, one) == pytest.approx(1, abs=EXACT)
    basis = random_basis(9, 5, torch.Generator().manual_seed(0)), random_basis(11, 5, torch.Generator().manual_seed(1))
    apart = [
        one._replace(U_OK=basis[0][:, :2], V_IK=basis[1][:, :2]),
        two._replace(U_OK=basis[0][:, 2:], V_IK=basis[1][:, 2:]),
    ]
    assert interference(*apart) <= EXACT


# -- both adapters ----------------------------------------------------------------------------------------------------


@EACH_KIND
def test_an_adapter_is_like_itself_in_every_layer(case: Case):
    adapter = case.adapter(case.model())
    found = compare(adapter, adapter)
    assert (found["only_first"], found["only_second"], found["sign_conflict"]) == ([], [], 0)
    assert found["cosine"] == pytest.approx(1, abs=EXACT)
    assert [layer["name"] for layer in found["layers"]] == list(adapter.factors)
    for layer in found["layers"]:
        assert [layer["cosine"], layer["interference"]] == pytest.approx([1, 1], abs=1e-9)
        for side in ("output", "input"):
            assert [layer[side]["phi_first"], layer[side]["phi_all"]] == pytest.approx([1, 1], abs=1e-9)
            assert layer[side]["smallest_angle_degrees"] <= math.degrees(ANGLE)


def test_directions_that_hold_nothing_are_not_compared():
    """Orthogonal adapters stay so when they are given a higher rank, whose directions are arbitrary."""
    first, second = (linear(LoraSpec(rank=2, alpha=2), seed, layer=(12, 12), zero=(5, 5)) for seed in (1, 2))
    first.factors["layer"].A[:, 6:], first.factors["layer"].B[6:] = 0, 0
    second.factors["layer"].A[:, :6], second.factors["layer"].B[:6] = 0, 0
    first.factors["zero"].B[:] = 0
    found = compare(truncate(first, uniform_ranks(first, 5)), truncate(second, uniform_ranks(second, 5)))
    layer, zero = found["layers"]
    assert abs(layer["cosine"]) + layer["interference"] <= EXACT
    for side in ("output", "input"):
        assert layer[side] == pytest.approx(
            {
                "phi_first": 0,
                "phi_first_null": 1 / 12,
                "phi_all": 0,
                "phi_all_null": 2 / 12,
                "smallest_angle_degrees": 90,
                "shared_directions": 0,
            },
            abs=1e-9,
        )
        assert all(math.isnan(number) for number in zero[side].values())
    assert (zero["cosine"], zero["interference"]) == (0, pytest.approx(0, abs=EXACT))
    assert math.isnan(zero["sign_conflict"])


def test_layers_of_one_adapter_only_are_named_and_those_of_another_shape_too():
    first = linear(LoraSpec(rank=2), a=(4, 5), b=(4, 5), c=(4, 5), d=(4, 5))
    second = linear(LoraSpec(rank=3), a=(4, 5), b=(4, 6), c=(3, 5), e=(4, 5))
    found = compare(first, second)
    assert [layer["name"] for layer in found["layers"]] == ["a"]
    assert (found["only_first"], found["only_second"]) == (["b", "c", "d"], ["b", "c", "e"])
    with pytest.raises(AdapterError, match="no layer of the same name and shape"):
        compare(first, linear(LoraSpec(rank=2), b=(4, 6)))
