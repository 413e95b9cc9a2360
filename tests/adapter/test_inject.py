"""Choosing, applying, switching and taking off: what is listed, what is changed, and that nothing else is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import CASES, Case, Convolutional, VisionTransformer, drawn, images, loss_of, made, output, tokens
from models import small_model
from torch import Tensor, nn

from deltaw.adapter import LoraSpec, choose, inject, new_adapter
from deltaw.errors import AdapterError

EACH_KIND = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def listed(model: nn.Module, **settings: Any) -> list[tuple[str, str, tuple[int, ...], int]]:
    return [(t.name, t.kind, t.shape, t.rank) for t in choose(model, LoraSpec(**{"rank": 4, **settings}))]


def everything(model: nn.Module) -> dict[str, Any]:
    """All that an injection might touch: bits, flags, classes, hooks and plain attributes of every module."""
    modules = dict(model.named_modules())
    return {
        "bits": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "classes": {name: type(module) for name, module in modules.items()},
        "hooks": {name: [list(v) for k, v in vars(module).items() if "hooks" in k] for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["bits"].keys() == after["bits"].keys()
    assert all(torch.equal(before["bits"][name], after["bits"][name]) for name in before["bits"])
    for part in ("flags", "classes", "hooks", "attributes"):
        assert before[part] == after[part], part


# -- choose -----------------------------------------------------------------------------------------------------------


def test_choose_lists_name_kind_shape_and_rank_of_every_linear_layer_but_the_head():
    block = [
        ("self_attn.q_proj", (32, 32)),
        ("self_attn.k_proj", (16, 32)),
        ("self_attn.v_proj", (16, 32)),
        ("self_attn.o_proj", (32, 32)),
        ("mlp.gate_proj", (48, 32)),
        ("mlp.up_proj", (48, 32)),
        ("mlp.down_proj", (32, 48)),
    ]
    expected = [(f"model.layers.{n}.{name}", "linear", shape, 4) for n in (0, 1) for name, shape in block]
    assert listed(small_model("llama")) == expected


def test_choose_lists_the_parameters_of_every_kind():
    assert listed(small_model("mixtral"), layers=(1,), exclude=("self_attn.q_proj", "k_proj", "v_proj", "o_proj")) == [
        ("model.layers.1.mlp.experts.gate_up_proj", "parameter", (4, 96, 32), 4),
        ("model.layers.1.mlp.experts.down_proj", "parameter", (4, 32, 48), 4),
    ]
    attention = [
        ("encoder.layers.0.self_attn.in_proj_weight", "parameter_attention", (48, 16), 4),
        ("encoder.layers.0.self_attn.out_proj.weight", "parameter_attention", (16, 16), 4),
    ]
    assert listed(made(VisionTransformer), targets=("self_attn",), layers=(0,)) == attention
    assert listed(small_model("gpt2"), targets=("c_attn", "wte"), exclude=("h.1.attn.c_attn",)) == [
        ("transformer.wte", "embedding", (259, 32), 4),
        ("transformer.h.0.attn.c_attn", "transposed", (32, 96), 4),
    ]


@EACH_KIND
def test_the_count_of_parameters_is_what_is_trained(case: Case):
    model = case.model()
    targets, adapter = choose(model, case.spec), case.adapter(model)
    assert [target.parameters for target in targets] == [factors.parameters for factors in adapter.factors.values()]
    assert [target.A_shape for target in targets] == [factors.A.shape for factors in adapter.factors.values()]
    assert [target.B_shape for target in targets] == [factors.B.shape for factors in adapter.factors.values()]


def test_a_position_parameter_is_no_stack_of_experts():
    names = [target.name for target in choose(made(VisionTransformer), LoraSpec())]
    assert "positions" not in names
    assert "classifier" in names


def test_suffixes_match_whole_parts_of_a_name():
    names = [name for name, *_ in listed(small_model("llama"), targets=("layers.1.self_attn.q_proj", "up_proj"))]
    assert names == ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    with pytest.raises(AdapterError, match="'proj' matches nothing"):
        listed(small_model("llama"), targets=("proj",))


def test_patterns_set_rank_and_scale_and_the_first_match_wins():
    spec = LoraSpec(
        rank=8,
        alpha=16,
        targets=("q_proj", "v_proj"),
        rank_pattern={"v_proj": 2},
        alpha_pattern={"1.self_attn.v_proj": 3, "v_proj": 5},
    )
    chosen = [(t.name[13:], t.rank, t.alpha, t.scale) for t in choose(small_model("llama"), spec)]
    assert chosen == [
        ("0.self_attn.q_proj", 8, 16, 2.0),
        ("0.self_attn.v_proj", 2, 5, 2.5),
        ("1.self_attn.q_proj", 8, 16, 2.0),
        ("1.self_attn.v_proj", 2, 3, 1.5),
    ]


def test_selection_names_exactly_the_chosen_modules():
    model = small_model("llama")
    assert choose(model, LoraSpec(targets=("q_proj", "up_proj")))[0].selection == ("q_proj", "up_proj")
    one = choose(model, LoraSpec(targets=("q_proj",), layers=(1,)))[0]
    assert one.selection == ("model.layers.1.self_attn.q_proj",)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"targets": ("q_prj",)}, "'q_prj' matches nothing; the nearest names are 'q_proj'"),
        ({"targets": ("q_proj",), "exclude": ("self_attn.k_prok",)}, "the nearest names are 'self_attn.k_proj'"),
        ({"rank_pattern": {"lm_head": 2}}, "'lm_head' matches nothing that is adapted"),
        ({"alpha_pattern": {"upproj": 2}}, "'upproj' matches nothing that is adapted; the nearest names are 'up_proj'"),
        ({"layers": (0, 7)}, "the model has no layer number 7"),
        ({"targets": ("q_proj",), "exclude": ("q_proj",)}, "no layer is left to adapt"),
        ({"targets": ("embed_tokens",), "dropout": 0.1}, "dropout has no meaning for token ids"),
    ],
)
def test_a_wish_that_cannot_be_met_raises_with_the_nearest_names_and_changes_nothing(settings, said):
    model = small_model("llama")
    before = everything(model)
    with pytest.raises(AdapterError, match=said.replace("'", ".")):
        choose(model, LoraSpec(**settings))
    assert_same(before, everything(model))


def test_all_faults_of_a_choice_are_listed_at_once():
    with pytest.raises(AdapterError) as raised:
        choose(made(VisionTransformer), LoraSpec(targets=("nowhere", "self_attn", "patchez"), dora=True))
    assert all(word in str(raised.value) for word in ("nowhere", "patchez", "1.self_attn.out_proj.weight: DoRA"))


@pytest.mark.parametrize("odd", [{"groups": 3}, {"dilation": 2}, {"padding_mode": "circular"}])
def test_a_convolution_that_the_format_has_no_place_for_is_refused(odd):
    with pytest.raises(AdapterError, match=next(iter(odd))):
        choose(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, **odd)), LoraSpec(targets=("0",)))


def test_half_of_an_attention_module_is_refused():
    with pytest.raises(AdapterError, match="adapted together or not at all"):
        choose(made(VisionTransformer), LoraSpec(exclude=("0.self_attn.out_proj.weight",)))


def test_an_adapter_that_lost_whole_layers_is_refused_although_each_pair_is_complete():
    model = small_model("llama")
    adapter = CASES["plain"].adapter(model)
    half = {name: factors for name, factors in adapter.factors.items() if "layers.0" in name}
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn\.q_proj: the adapter's target_modules select it"):
        inject(model, adapter.with_factors(half))


def test_an_adapter_of_another_model_does_not_fit_and_leaves_it_untouched():
    adapter = CASES["plain"].adapter(small_model("llama"))
    other = small_model("gpt2")
    before = everything(other)
    with pytest.raises(AdapterError, match="the model has no such layer"):
        inject(other, adapter)
    bad = adapter.factors["model.layers.0.mlp.up_proj"]
    bad.A = bad.A[:, :5].clone()
    with pytest.raises(AdapterError, match=r"A has shape \[4, 5\], the model needs \[4, 32\]"):
        inject(small_model("llama"), adapter)
    assert_same(before, everything(other))


# -- apply and eject --------------------------------------------------------------------------------------------------


@EACH_KIND
def test_eject_restores_the_model_exactly(case: Case):
    model, inputs = case.model(), case.inputs()
    next(iter(model.parameters())).requires_grad_(False)
    before, base = everything(model), output(model, inputs)
    adapter = case.adapter(model)
    with inject(model, adapter, trainable=True) as injection:
        assert not torch.equal(output(model, inputs), base)
        loss_of(output(model, inputs)).backward()
        assert all(tensor.grad is not None for _, _, tensor in injection.trained())
    assert_same(before, everything(model))
    assert torch.equal(output(model, inputs), base)
    injection.eject()
    injection.reapply()
    injection.eject()
    assert_same(before, everything(model))


@EACH_KIND
def test_a_forward_changes_no_parameter_and_no_name(case: Case):
    model, inputs = case.model(), case.inputs()
    before = everything(model)
    with inject(model, case.adapter(model)):
        output(model, inputs)
        after = everything(model)
        model.load_state_dict(before["bits"], strict=True)
        assert [n for n, _ in model.named_parameters()] == list(before["flags"])
    assert list(before["bits"]) == list(after["bits"])
    assert all(torch.equal(before["bits"][name], after["bits"][name]) for name in before["bits"])


def test_a_base_checkpoint_loads_strictly_before_and_after_injection_with_the_same_result():
    checkpoint = small_model("llama", seed=9).state_dict()
    early, late = small_model("llama", seed=1), small_model("llama", seed=1)
    adapter = CASES["plain"].adapter(early)
    early.load_state_dict(checkpoint, strict=True)
    with inject(early, adapter), inject(late, adapter):
        late.load_state_dict(checkpoint, strict=True)
        assert torch.equal(output(early, tokens()), output(late, tokens()))


def test_an_error_inside_a_layer_leaves_no_shadow_weight():
    model = small_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    adapter = CASES["experts"].adapter(model)
    with inject(model, adapter), pytest.raises(RuntimeError):
        experts(torch.randn(2, 3), torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 2))
    assert "gate_up_proj" not in vars(experts)


@EACH_KIND
def test_strength_zero_and_no_active_adapter_are_the_base_bit_for_bit(case: Case):
    model, inputs = case.model(), case.inputs()
    base = output(model, inputs)
    with inject(model, case.adapter(model)) as injection:
        full = output(model, inputs)
        injection.strength = 0.0
        assert torch.equal(output(model, inputs), base)
        injection.strength, injection.active = 1.0, None
        assert torch.equal(output(model, inputs), base)
        injection.active, injection.strength = 0, 0.5
        half = output(model, inputs)
    assert 0 < (half - base).norm() < (full - base).norm()


def test_a_new_adapter_leaves_the_outputs_as_they_are():
    for case in CASES.values():
        model, inputs = case.model(), case.inputs()
        base = output(model, inputs)
        with inject(model, new_adapter(choose(model, case.spec), case.spec)):
            torch.testing.assert_close(output(model, inputs), base, atol=2e-6, rtol=0)


def test_two_adapters_in_one_injection_are_those_of_two_injections():
    model = small_model("mixtral")
    first, second = CASES["experts"].adapter(model, 0), CASES["experts of one layer"].adapter(model, 1)
    alone = []
    for adapter in (first, second):
        with inject(model, adapter):
            alone.append(output(model, tokens()))
    with inject(model, first, second) as injection:
        for index in (1, 0, 1):
            injection.active = index
            assert torch.equal(output(model, tokens()), alone[index])
        extracted, name = injection.extract(1), "model.layers.0.self_attn.q_proj"
        assert torch.equal(extracted.factors[name].B, second.factors[name].B)
        with pytest.raises(AdapterError, match="has adapters already"):
            inject(model, first)
        with pytest.raises(AdapterError, match="has adapters already"):
            injection.reapply()


def test_arguments_are_left_unchanged():
    model = small_model("llama")
    targets, rank_pattern = ["q_proj", "v_proj"], {"v_proj": 2}
    spec = LoraSpec(rank=4, targets=tuple(targets), rank_pattern=rank_pattern)
    adapter = drawn(new_adapter(choose(model, spec), spec))
    kept = copy.deepcopy(adapter)
    with inject(model, adapter, dtype=torch.bfloat16, trainable=True) as injection:
        for _, _, tensor in injection.trained():
            with torch.no_grad():
                tensor.add_(1)
        injection.extract()
    assert (targets, rank_pattern) == (["q_proj", "v_proj"], {"v_proj": 2})
    assert adapter.spec == kept.spec and adapter.origin == kept.origin
    for (_, _, mine), (_, _, theirs) in zip(adapter.tensors(), kept.tensors(), strict=True):
        assert torch.equal(mine, theirs) and not mine.requires_grad


def test_a_start_depends_on_the_seed_and_the_name_only():
    model = small_model("llama")
    many = new_adapter(choose(model, LoraSpec()), LoraSpec(), seed=3)
    torch.manual_seed(99)
    few_spec = LoraSpec(targets=("up_proj",), layers=(1,))
    few = new_adapter(choose(model, few_spec), few_spec, seed=3)
    other = new_adapter(choose(model, few_spec), few_spec, seed=4)
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(many.factors[name].A, few.factors[name].A)
    assert not torch.equal(few.factors[name].A, other.factors[name].A)
    assert not torch.equal(many.factors[name].A, many.factors["model.layers.0.mlp.up_proj"].A)


def test_inputs_of_one_dimension_and_keyword_inputs_are_adapted():
    layer = nn.Sequential(nn.Linear(4, 3))
    adapter = drawn(new_adapter(choose(layer, LoraSpec(rank=2)), LoraSpec(rank=2)))
    x = torch.randn(2, 4)
    with inject(layer, adapter):
        assert torch.allclose(layer(x)[1], layer(x[1]))
        assert torch.equal(layer[0](input=x), layer(x))


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@EACH_KIND
def test_base_and_factors_may_have_different_dtypes(case: Case, base, factors):
    model = case.model()
    inputs, adapter = case.inputs(), case.adapter(model)
    with inject(model, adapter):
        exact = output(model, inputs)
    model.to(base)
    inputs = inputs.to(base) if inputs.is_floating_point() else inputs
    with inject(model, adapter, dtype=factors, trainable=True) as injection:
        rounded = output(model, inputs)
        loss_of(rounded).backward()
        assert {tensor.grad.dtype for _, _, tensor in injection.trained()} == {factors}
    assert rounded.dtype == base
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


def test_dropout_acts_in_training_only_and_on_the_low_rank_branch_only():
    model = small_model("llama")
    spec = LoraSpec(rank=4, dropout=0.5)
    with inject(model, drawn(new_adapter(choose(model, spec), spec))) as injection:
        quiet = output(model, tokens())
        assert torch.equal(quiet, output(model, tokens()))
        injection.train()
        assert not torch.equal(output(model, tokens()), output(model, tokens()))
        injection.train(False)
        assert torch.equal(quiet, output(model, tokens()))
    plain = output(model, tokens())
    with inject(model, new_adapter(choose(model, spec), spec)) as injection:  # B is zero, so nothing is left to drop
        injection.train()
        assert torch.equal(output(model, tokens()), plain)


# -- networks without text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_the_fused_encoder_of_pytorch_does_not_bypass_the_adapter(padded, gradients):
    model = made(VisionTransformer).eval()
    padding = torch.tensor([[False, False, False, True]] * 4) if padded else None
    adapter = CASES["attention"].adapter(model)
    training = made(VisionTransformer)
    with inject(training, adapter):
        expected = training(images(8, 8), padding)
    with inject(model, adapter, trainable=True), torch.set_grad_enabled(gradients):
        torch.testing.assert_close(model(images(8, 8), padding), expected, atol=2e-6, rtol=0)
    assert model.encoder.use_nested_tensor


@pytest.mark.parametrize(
    ("network", "shape", "targets"),
    [(VisionTransformer, (8, 8), ("all-linear", "patches")), (partial(Convolutional, 2), (8, 8), ("first", "second"))],
    ids=["vision transformer", "convolutional"],
)
def test_networks_without_text_are_trained(network: Callable[[], nn.Module], shape, targets):
    model, x = made(network), images(*shape)
    spec = LoraSpec(rank=4, alpha=8, targets=targets)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with inject(model, new_adapter(choose(model, spec), spec), trainable=True) as injection:
        optimizer = torch.optim.Adam([tensor for _, _, tensor in injection.trained()], lr=0.02)
        losses = [_train_step(model, x, optimizer) for _ in range(12)]
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def _train_step(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = loss_of(model(x))
    loss.backward()
    optimizer.step()
    return loss.item()
