"""The flat buffer against separate tensors and torch.optim, and the shape of the rate over a run."""

from __future__ import annotations

import math

import pytest
import torch
from models import small_model

from deltaw.adapter import LoraSpec, choose, inject, new_adapter
from deltaw.engine.optim import FlatFactors, OptimSettings, all_finite, rate_factor

STEPS = 4


def _flat(settings, dtype=torch.float32, **spec):
    """FlatFactors over one small adapter for each of `settings`, with B drawn so that nothing is zero."""
    model = small_model("llama")
    adapters = []
    for seed in range(len(settings)):
        wanted = LoraSpec(rank=2 + seed, targets=("q_proj", "down_proj"), **spec)
        adapter = new_adapter(choose(model, wanted), wanted, seed)
        for factors in adapter.factors.values():
            factors.B.normal_(generator=torch.Generator().manual_seed(seed))
        adapters.append(adapter)
    return FlatFactors(inject(model, *adapters, trainable=True, dtype=dtype), settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapter_that_was_given_stays_as_it_is_and_two_may_start_from_one(dtype):
    model, wanted = small_model("llama"), LoraSpec(rank=2, targets=("q_proj",))
    given = new_adapter(choose(model, wanted), wanted, 0)
    before = [tensor.clone() for _, _, tensor in given.tensors()]
    flat = FlatFactors(inject(model, given, given, trainable=True, dtype=dtype), [OptimSettings(1e-2)] * 2)
    flat.grad.normal_()
    flat.step([0.0, 1.0])
    assert all(torch.equal(a, b) for a, (_, _, b) in zip(before, given.tensors(), strict=True))
    assert all(torch.equal(a, b) for a, (_, _, b) in zip(before, flat.adapter(0).tensors(), strict=True))
    assert not all(torch.equal(a, b) for a, (_, _, b) in zip(before, flat.adapter(1).tensors(), strict=True))


def _parts(flat):
    """{(adapter, name, part): its slice of the flat buffer}."""
    return {(p.adapter, p.name, p.part): slice(p.start, p.stop) for p in flat.places}


def test_layout_is_adapter_by_adapter_and_the_A_before_the_B():
    flat = _flat([OptimSettings(1e-3)] * 2)
    kinds = [(place.adapter, place.part) for place in flat.places]
    assert kinds == [(0, "A")] * 4 + [(0, "B")] * 4 + [(1, "A")] * 4 + [(1, "B")] * 4
    edges = [place.start for place in flat.places] + [flat.places[-1].stop]
    assert edges == sorted(edges) and edges[0] == 0 and edges[-1] == len(flat.master)
    assert [place.stop for place in flat.places] == edges[1:]
    assert flat.adapter_slices == [
        (flat.places[0].start, flat.places[4].start, flat.places[8].start),
        (flat.places[8].start, flat.places[12].start, len(flat.master)),
    ]


def test_magnitudes_lie_with_the_B():
    flat = _flat([OptimSettings(1e-3)], dora=True)
    _, middle, _ = flat.adapter_slices[0]
    assert {place.part for place in flat.places if place.start >= middle} == {"B", "magnitude"}


def test_live_factors_and_their_gradients_are_views_of_the_flat_tensors():
    flat = _flat([OptimSettings(1e-3)] * 2)
    parts = _parts(flat)
    for index, layers in enumerate(flat.injection.layers):
        for name, layer in layers.items():
            for part, live in layer.tensors():
                place = parts[index, name, part]
                assert live.data_ptr() == flat.master[place].data_ptr()
                assert live.grad.data_ptr() == flat.grad[place].data_ptr()


@pytest.mark.parametrize(
    "settings",
    [
        OptimSettings(1e-2, clip=0.0),
        OptimSettings(1e-2, clip=0.0, lora_plus=8.0),
        OptimSettings(1e-2, clip=0.0, weight_decay=0.1, lora_plus=2.0),
        OptimSettings(1e-2, clip=0.5, weight_decay=0.1),
    ],
    ids=["plain", "lora+", "decay", "clip"],
)
def test_steps_equal_those_of_torch_adamw_on_separate_tensors(settings):
    other = OptimSettings(3e-3, clip=2.0)
    flat = _flat([settings, other])
    parts = _parts(flat)
    tensors = {key: torch.nn.Parameter(flat.master[place].clone()) for key, place in parts.items()}
    groups = [
        {"params": [t], "key": key, "weight_decay": (settings, other)[key[0]].weight_decay}
        for key, t in tensors.items()
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, foreach=False)
    random = torch.Generator().manual_seed(5)
    for step in range(STEPS):
        factor = 1 - step / STEPS
        flat.grad.copy_(torch.randn(len(flat.grad), generator=random))
        for key, place in parts.items():
            tensors[key].grad = flat.grad[place].clone()
        for index, chosen in enumerate((settings, other)):
            mine = [tensor for key, tensor in tensors.items() if key[0] == index]
            if chosen.clip:
                torch.nn.utils.clip_grad_norm_(mine, chosen.clip)
        for group in reference.param_groups:
            chosen = (settings, other)[group["key"][0]]
            group["lr"] = chosen.rate * factor * (1.0 if group["key"][2] == "A" else chosen.lora_plus)
        reference.step()
        flat.clip()
        flat.step([factor, factor])
        assert not flat.grad.any()
    for key, place in parts.items():
        torch.testing.assert_close(flat.master[place], tensors[key].detach(), rtol=1e-6, atol=1e-7)


def test_each_adapter_is_clipped_by_its_own_norm():
    flat = _flat([OptimSettings(1e-3, clip=1.0), OptimSettings(1e-3, clip=1.0)])
    (first, _, middle), (_, _, last) = flat.adapter_slices
    flat.grad[first:middle] = 10.0
    flat.grad[middle:last] = 1e-6
    norms = flat.clip()
    assert norms[0] == pytest.approx(10 * math.sqrt(middle), rel=1e-6)
    assert float(flat.grad[first:middle].norm()) == pytest.approx(1.0, rel=1e-5)
    assert torch.equal(flat.grad[middle:last], torch.full((last - middle,), 1e-6))


def test_micro_batch_gradients_of_a_bf16_copy_are_summed_in_fp32():
    flat = _flat([OptimSettings(1e-3)], dtype=torch.bfloat16)
    layer = next(iter(flat.injection.layers[0].values()))
    place = _parts(flat)[0, layer.target.name, "B"]
    assert layer.B.dtype == torch.bfloat16 and flat.grad.dtype == torch.float32
    small = 2.0**-9  # 1 + 2⁻⁹ has no bf16 of its own: a bf16 sum would stay at 1 for ever
    for scale in (1.0, *[small] * 64):
        (layer.B * scale).sum().backward()
        assert layer.B.grad is None
    assert torch.equal(flat.grad[place], torch.full_like(flat.grad[place], 1 + 64 * small))


def test_the_bf16_copy_follows_the_masters_after_each_step():
    flat = _flat([OptimSettings(1e-2)], dtype=torch.bfloat16)
    before = flat.work.clone()
    flat.grad.normal_()
    flat.step([1.0])
    assert not torch.equal(flat.work, before)
    assert torch.equal(flat.work, flat.master.bfloat16())
    assert flat.adapter().factors["model.layers.0.self_attn.q_proj"].A.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_back_and_forth_bit_for_bit(dtype):
    settings = [OptimSettings(1e-2, weight_decay=0.1), OptimSettings(3e-3, lora_plus=4.0)]
    straight, stopped = _flat(settings, dtype), _flat(settings, dtype)
    gradients = torch.randn(STEPS, len(straight.grad), generator=torch.Generator().manual_seed(2))
    for number, gradient in enumerate(gradients):
        if number == 2:
            state = {name: tensor.clone() for name, tensor in stopped.state().items()}
            stopped = _flat(settings, dtype)
            stopped.load_state(state)
        for flat in (straight, stopped):
            flat.grad.copy_(gradient)
            flat.step([0.5, 0.25])
    for name, tensor in straight.state().items():
        assert torch.equal(tensor, stopped.state()[name]), name
    assert torch.equal(straight.work, stopped.work)


def test_a_state_from_before_the_first_step_goes_back_too():
    flat = _flat([OptimSettings(1e-2)])
    state = {name: tensor.clone() for name, tensor in flat.state().items()}
    assert not any(state[name].any() for name in ("exp_avg", "exp_avg_sq", "step"))
    flat.grad.normal_()
    flat.step([1.0])
    assert all(flat.state()[name].any() for name in state)
    flat.load_state(state)
    assert all(torch.equal(flat.state()[name], tensor) for name, tensor in state.items())


def test_an_adapter_can_be_read_from_any_tensor_of_the_same_layout():
    flat = _flat([OptimSettings(1e-2)])
    doubled = flat.adapter(0, flat.master * 2)
    for name, part, tensor in flat.adapter().tensors():
        assert torch.equal(dict(doubled.factors[name].tensors())[part], 2 * tensor)


@pytest.mark.parametrize(
    ("schedule", "done", "wanted"),
    [
        ("linear", 0.0, 0.0), ("linear", 0.05, 0.5), ("linear", 0.1, 1.0), ("linear", 0.55, 0.5), ("linear", 1.0, 0.0),
        ("cosine", 0.05, 0.5), ("cosine", 0.1, 1.0), ("cosine", 0.55, 0.5), ("cosine", 1.0, 0.0),
        ("constant", 0.05, 0.5), ("constant", 0.1, 1.0), ("constant", 0.55, 1.0), ("constant", 1.0, 1.0),
    ],
)  # fmt: skip
def test_the_rate_has_these_values(schedule, done, wanted):
    assert rate_factor(done, schedule, warmup=0.1) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 1.0])
def test_the_rate_rises_then_falls_and_is_never_zero_between_the_ends(schedule, warmup):
    steps = 200
    rates = [rate_factor((step + 0.5) / steps, schedule, warmup) for step in range(steps)]
    peak = rates.index(max(rates))
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 17, 65_535, 99_998, 99_999])
def test_one_number_that_is_not_finite_is_found_wherever_it_stands(wrong, place):
    values = torch.randn(100_000)
    assert all_finite(values) and all_finite(torch.tensor(3.0))
    values[place] = wrong
    assert not all_finite(values) and not all_finite(torch.tensor(wrong))
