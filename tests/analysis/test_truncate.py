"""Truncation against the dense SVD, growth against the adapter itself, and what PEFT makes of the result."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import Case, drawn, output
from dense import EXACT, KINDS, LOGITS, SINGLE, WITHOUT_DORA, deltas, far, in_dtype, linear, uneven
from peft_reader import opened_by_peft

from deltaw.adapter import LoraSpec, choose, choose_for, inject, new_adapter, read_adapter, write_adapter
from deltaw.adapter.spec import MAX_RANK
from deltaw.analysis.spectrum import spectra
from deltaw.analysis.truncate import discarded_energy, magnitudes, ranks_within, truncate, uniform_ranks
from deltaw.errors import AdapterError

EACH_KIND = pytest.mark.parametrize("case", KINDS.values(), ids=KINDS.keys())
EACH_WITHOUT_DORA = pytest.mark.parametrize("case", WITHOUT_DORA.values(), ids=WITHOUT_DORA.keys())
WITH_DORA = {name: case for name, case in KINDS.items() if case.spec.dora}
# Two factors rounded to this dtype once each.
ROUNDED = {torch.float32: SINGLE, torch.float16: 2**-10, torch.bfloat16: 2**-7}
SHAPES = {"up": (12, 9), "down": (9, 12), "gate": (20, 9), "wide": (9, 30)}


def full_ranks(adapter):
    return {name: adapter.rank_of(name) for name in adapter.factors}


# -- truncation -------------------------------------------------------------------------------------------------------


@EACH_KIND
def test_each_layer_is_the_best_approximation_of_its_rank(case: Case):
    """Eckart & Young: the squared error is the energy of the singular values that are left out."""
    model = case.model()
    adapter = in_dtype(case.adapter(model), torch.float64)
    ranks = uneven(adapter)
    found = truncate(adapter, ranks)
    wanted, kept = deltas(adapter, model), deltas(found, model)
    lost = total = 0.0
    for name, dense in wanted.items():
        tail = torch.linalg.svdvals(dense)[..., ranks[name] :].square().sum()
        assert abs((dense - kept[name]).square().sum() - tail) <= EXACT * dense.square().sum()
        lost, total = lost + float(tail), total + float(dense.square().sum())
    assert discarded_energy(spectra(adapter), ranks) == pytest.approx(lost / total, rel=1e-9)


@EACH_KIND
def test_the_result_says_its_ranks_and_needs_no_scale(case: Case):
    adapter = case.adapter(case.model())
    ranks = uneven(adapter)
    found = truncate(adapter, ranks)
    keys = {name: found.pattern_name(name) for name in found.factors}
    assert {name: found.spec.rank_of(key) for name, key in keys.items()} == ranks
    assert {found.spec.scale_of(key) for key in keys.values()} == {1.0}
    assert (found.spec.rslora, found.spec.dora) == (False, adapter.spec.dora)
    assert list(found.factors) == list(adapter.factors)


@pytest.mark.parametrize("dtype", ROUNDED)
@EACH_WITHOUT_DORA
def test_the_full_rank_gives_the_same_update_in_the_dtype_of_the_file(case: Case, dtype):
    model = case.model()
    adapter = in_dtype(case.adapter(model), dtype)
    found = truncate(adapter, full_ranks(adapter))
    wanted = deltas(adapter, model)
    assert {tensor.dtype for _, _, tensor in found.tensors()} == {dtype}
    assert all(far(ours, wanted[name]) <= ROUNDED[dtype] for name, ours in deltas(found, model).items())


def test_the_argument_stays_as_it_was():
    adapter = linear(LoraSpec(rank=4, alpha=8, rslora=True), **SHAPES)
    before = {(name, part): tensor.clone() for name, part, tensor in adapter.tensors()}
    truncate(adapter, uniform_ranks(adapter, 2))
    assert adapter.spec == LoraSpec(rank=4, alpha=8, rslora=True)
    assert all(torch.equal(tensor, before[name, part]) for name, part, tensor in adapter.tensors())


def test_names_that_end_with_one_another_keep_their_own_ranks(tmp_path):
    """A pattern is a suffix too: "layers.0.fc" would also match "decoder.layers.0.fc"."""
    adapter = linear(
        LoraSpec(rank=4, alpha=4),
        layers_0_fc=(6, 7),
        decoder_layers_0_fc=(6, 7),
        big_decoder_layers_0_fc=(6, 7),
        layers_1_fc=(6, 7),
    )
    for ranks in itertools.product((1, 2, 3), repeat=4):
        wanted = dict(zip(adapter.factors, ranks, strict=True))
        found = truncate(adapter, wanted)
        assert {name: found.spec.rank_of(name) for name in found.factors} == wanted
        assert {found.spec.scale_of(name) for name in found.factors} == {1.0}
    ranks = dict(zip(adapter.factors, (1, 2, 3, 2), strict=True))
    read = read_adapter(write_adapter(in_dtype(truncate(adapter, ranks), torch.float32), tmp_path / "adapter"))
    assert {name: len(factors.A) for name, factors in read.factors.items()} == ranks


# -- growth -----------------------------------------------------------------------------------------------------------


@EACH_WITHOUT_DORA
def test_a_higher_rank_is_exact_and_its_new_directions_can_be_trained(case: Case):
    model = case.model()
    adapter = in_dtype(case.adapter(model), torch.float64)
    more = {name: rank + 3 for name, rank in full_ranks(adapter).items()}
    found = truncate(adapter, more)
    wanted = deltas(adapter, model)
    assert full_ranks(found) == more
    for name, dense in deltas(found, model).items():
        assert far(dense, wanted[name]) <= EXACT
        A, B = found.factors[name].A, found.factors[name].B
        rows, columns = (1, 2) if name in found.parameter_names and A.ndim == 3 else (0, 1)
        assert not B.narrow(columns, B.shape[columns] - 3, 3).any()
        assert A.movedim(rows, 0).flatten(1).any(1).all()


def test_new_directions_are_not_those_that_the_adapter_started_from():
    """A moves little in training, so drawing the start's numbers again would give the directions that are there."""
    spec = LoraSpec(rank=4, alpha=4)
    case = KINDS["plain"]
    adapter = drawn(new_adapter(choose(case.model(), spec), spec, seed=0))
    for rank in (8, 12):
        adapter = truncate(adapter, uniform_ranks(adapter, rank))
        for factors in adapter.factors.values():
            rows = factors.A / factors.A.norm(dim=1, keepdim=True)
            assert torch.linalg.svdvals(rows)[-1] > 0.1


def test_no_direction_has_two_factors_of_zero_since_no_gradient_would_reach_it():
    adapter = linear(LoraSpec(rank=4, alpha=4), zero=(8, 9), half=(8, 9))
    adapter.factors["zero"].B[:] = 0
    adapter.factors["half"].B[:, 2:] = 0
    found = truncate(adapter, uniform_ranks(adapter, 4))
    for name, held in (("zero", 0), ("half", 2)):
        factors = found.factors[name]
        assert factors.A.any(1).all()
        assert factors.B.any(0).tolist() == [True] * held + [False] * (4 - held)


# -- choosing ranks ---------------------------------------------------------------------------------------------------


@EACH_KIND
def test_chosen_ranks_stay_within_the_numbers_and_leave_little_unused(case: Case):
    adapter = case.adapter(case.model())
    known = spectra(adapter)
    least = truncate(adapter, uniform_ranks(adapter, 1)).parameters
    for allowed in (least, (least + adapter.parameters) // 2, adapter.parameters):
        ranks = ranks_within(adapter, known, allowed)
        found = truncate(adapter, ranks, known)
        assert found.parameters <= allowed
        assert all(1 <= ranks[name] <= full for name, full in full_ranks(adapter).items())
        assert len({(found.pattern_name(name), rank) for name, rank in ranks.items()}) == len(
            {*map(found.pattern_name, ranks)}
        )
    with pytest.raises(AdapterError, match=f"Rank 1 in every layer already takes {least:,} numbers"):
        ranks_within(adapter, known, least - 1)


def test_chosen_ranks_keep_the_most_energy_that_any_ranks_keep():
    """Against every choice there is, for layers of one size."""
    adapter = linear(LoraSpec(rank=4, alpha=4), a=(9, 9), b=(9, 9), c=(9, 9))
    for name, size in (("a", 3.0), ("b", 1.0), ("c", 0.3)):
        adapter.factors[name].B.mul_(size)
    known = spectra(adapter)
    for allowed in range(3, 13):
        choices = [c for c in itertools.product(range(1, 5), repeat=3) if sum(c) <= allowed]
        least = min(discarded_energy(known, dict(zip("abc", choice, strict=True))) for choice in choices)
        ranks = ranks_within(adapter, known, 18 * allowed)
        assert discarded_energy(known, ranks) == pytest.approx(least, rel=1e-9, abs=1e-15)


def test_energy_counts_per_number_so_small_layers_win_at_equal_energy():
    adapter = linear(LoraSpec(rank=2, alpha=2), large=(40, 40), small=(4, 4))
    for factors in adapter.factors.values():
        torch.nn.init.eye_(factors.A)
        torch.nn.init.eye_(factors.B)
    assert ranks_within(adapter, spectra(adapter), 8 + 80 + 8) == {"small": 2, "large": 1}
    assert ranks_within(adapter, spectra(adapter), 8 + 80 + 80) == {"small": 2, "large": 1}
    assert ranks_within(adapter, spectra(adapter), 8 + 80 + 88) == {"small": 2, "large": 2}


def test_a_direction_that_holds_nothing_takes_no_numbers():
    adapter = linear(LoraSpec(rank=3, alpha=3), zero=(8, 9), full=(8, 9))
    adapter.factors["zero"].B[:] = 0
    assert ranks_within(adapter, spectra(adapter), adapter.parameters) == {"zero": 1, "full": 3}


@pytest.mark.parametrize("rank", [0, -1, MAX_RANK + 1])
def test_a_rank_that_no_file_can_hold_is_refused(rank):
    with pytest.raises(AdapterError, match="A rank lies between 1 and 1024"):
        uniform_ranks(linear(LoraSpec(rank=2), a=(3, 3)), rank)


# -- DoRA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", WITH_DORA.values(), ids=WITH_DORA.keys())
def test_dora_keeps_its_magnitudes_and_with_them_the_norm_of_each_output(case: Case):
    """Exact at full rank; below, rows keep their norms and turn, and the low-rank part is the best of its rank."""
    model, inputs = case.model(), case.inputs()
    adapter = case.adapter(model)
    with inject(model, adapter):
        wanted = output(model, inputs)
    with inject(model, truncate(adapter, full_ranks(adapter))):
        torch.testing.assert_close(output(model, inputs), wanted, atol=LOGITS, rtol=0)
    found = truncate(adapter, uniform_ranks(adapter, 1))
    assert magnitudes(found) == magnitudes(adapter) > 0
    for target in choose_for(model, found):
        factors, before = found.factors[target.name], adapter.factors[target.name]
        assert torch.equal(factors.magnitude, before.magnitude)
        merged = target.merged_weight(factors.A, factors.B, factors.magnitude)
        merged = merged.T if target.transposed else merged.flatten(1)
        norms = torch.where(target.row_norm() > 0, before.magnitude.abs(), 0)
        torch.testing.assert_close(merged.norm(dim=1), norms, rtol=SINGLE, atol=SINGLE)
    with inject(model, found):
        assert not torch.allclose(output(model, inputs), wanted, atol=LOGITS, rtol=0)


# -- files ------------------------------------------------------------------------------------------------------------


@EACH_KIND
def test_the_result_is_saved_and_read_and_gives_the_same_logits_in_peft(case: Case, tmp_path):
    model, inputs = case.model(), case.inputs()
    found = truncate(case.adapter(model), uneven(case.adapter(model)))
    folder = write_adapter(found, tmp_path / "adapter")
    read = read_adapter(folder)
    assert read.spec.with_(targets=found.spec.targets, layers=found.spec.layers) == found.spec
    with inject(model, found):
        ours = output(model, inputs)
    with inject(model, read):
        assert torch.equal(output(model, inputs), ours)
    theirs = output(opened_by_peft(model, folder), inputs)
    torch.testing.assert_close(ours, theirs, atol=LOGITS, rtol=0)


def test_peft_forms_the_best_approximation_from_the_saved_file(tmp_path):
    case = KINDS["patterns"]
    model = case.model()
    adapter = case.adapter(model)
    ranks = uneven(adapter)
    dense = deltas(adapter, model)
    theirs = opened_by_peft(model, write_adapter(truncate(adapter, ranks), tmp_path / "adapter"))
    for name, wanted in dense.items():
        U, sigma, Vh = torch.linalg.svd(wanted, full_matrices=False)
        best = U[:, : ranks[name]] * sigma[: ranks[name]] @ Vh[: ranks[name]]
        got = theirs.base_model.model.get_submodule(name).get_delta_weight("default").detach().double()
        assert far(got, best) <= SINGLE
