"""The factors' singular values against the dense matrix's, and each measure of rank on numbers checked by eye."""

from __future__ import annotations

import pytest
import torch
from cases import Case
from dense import EXACT, KINDS, deltas, far, linear

from deltaw.adapter import LoraSpec, choose, new_adapter
from deltaw.analysis.spectrum import Ranks, energy_rank, held, ranks_of, spectra, spectrum

EACH_KIND = pytest.mark.parametrize("case", KINDS.values(), ids=KINDS.keys())


@EACH_KIND
def test_singular_values_and_vectors_are_those_of_the_dense_update(case: Case):
    model = case.model()
    adapter = case.adapter(model)
    dense = deltas(adapter, model)
    found = spectra(adapter)
    assert found.keys() == dense.keys()
    for name, (U, sigma, V) in found.items():
        theirs = torch.linalg.svdvals(dense[name])
        count = sigma.shape[-1]
        assert count == min(adapter.rank_of(name), *dense[name].shape[-2:])
        assert (sigma - theirs[..., :count]).abs().max() <= EXACT * theirs.max()
        assert theirs[..., count:].sum() <= EXACT * theirs.max()
        assert far(U * sigma[..., None, :] @ V.mT, dense[name]) <= EXACT
        for vectors in (U, V):
            assert (vectors.mT @ vectors - torch.eye(count)).abs().max() <= EXACT


@EACH_KIND
def test_an_update_of_zero_has_singular_values_of_zero_and_no_nan(case: Case):
    adapter = new_adapter(choose(case.model(), case.spec), case.spec)
    for found in spectra(adapter).values():
        assert all(part.isfinite().all() for part in found)
        assert not found.sigma_K.any()
        assert ranks_of(found.sigma_K) == Ranks(0.0, 0.0, 0.0, 0)


@pytest.mark.parametrize(
    ("sigma", "expected"),
    [
        ([1.0, 1.0, 1.0, 1.0], Ranks(4, 4, 4, 4)),
        ([5.0, 0.0, 0.0], Ranks(1, 1, 1, 1)),
        ([2.0, 1.0], Ranks(3 / 2 ** (2 / 3), 5 / 4, 25 / 17, 2)),
        ([3.0, 1.0], Ranks(4 / 3**0.75, 10 / 9, 100 / 82, 1)),
        ([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]], Ranks(3, 3, 3, 3)),
        ([2e-90, 1e-90], Ranks(3 / 2 ** (2 / 3), 5 / 4, 25 / 17, 2)),
        ([2e90, 1e90], Ranks(3 / 2 ** (2 / 3), 5 / 4, 25 / 17, 2)),
    ],
)
def test_each_measure_of_rank_on_numbers_checked_by_hand(sigma, expected):
    found = ranks_of(torch.tensor(sigma, dtype=torch.float64))
    for name in ("effective", "stable", "participation", "energy_90"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-12), name


@pytest.mark.parametrize(("share", "rank"), [(0.1, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.95, 3), (0.96, 4), (1.0, 4)])
def test_energy_rank_is_the_least_number_that_reaches_the_share(share, rank):
    assert energy_rank(torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).sqrt(), share) == rank


def test_directions_that_hold_nothing_are_left_out():
    adapter = linear(LoraSpec(rank=6, alpha=6), layer=(20, 30))
    adapter.factors["layer"].B[:, 2:4] = 0
    adapter.factors["layer"].A[5] = adapter.factors["layer"].A[4]
    found = spectrum(adapter, "layer")
    assert [part.shape[-1] for part in held(found)] == [3, 3, 3]
    assert (
        far(held(found).U_OK * held(found).sigma_K @ held(found).V_IK.mT, found.U_OK * found.sigma_K @ found.V_IK.mT)
        <= EXACT
    )
    adapter.factors["layer"].B[:] = 0
    assert held(spectrum(adapter, "layer")).sigma_K.shape == (0,)
