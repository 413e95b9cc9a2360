"""The same factors in PEFT and in deltaw: logits both ways, loss and gradients of a training step, error in bf16."""

from __future__ import annotations

import copy
import importlib
import statistics
import warnings
from pathlib import Path

import peft
import pytest
import torch
from cases import CASES, Case, loss_of, output
from models import lively_model, small_model
from peft_reader import opened_by_peft
from torch import Tensor, nn

from deltaw.adapter import LoraSpec, choose, inject, new_adapter, read_adapter, write_adapter
from deltaw.adapter.inject import _ONCE_UNSTACKED
from deltaw.adapter.keys import to_keys
from deltaw.adapter.value import Factors
from deltaw.errors import AdapterError

EACH_KIND = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def difference(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def peft_gradients(model: nn.Module) -> dict[str, Tensor]:
    named = ((name.replace(".default", ""), parameter) for name, parameter in model.named_parameters())
    return {
        name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): parameter.grad
        for name, parameter in named
        if parameter.requires_grad
    }


def our_gradients(injection) -> dict[str, Tensor]:
    factors = {
        name: Factors(**{part: tensor.grad for part, tensor in layer.tensors()})
        for name, layer in injection.layers[0].items()
    }
    return to_keys(injection.adapters[0].with_factors(factors))


def as_peft_sees_it(key: str, ours: Tensor) -> Tensor:
    """PEFT adds the output projection's ΔW twice and differentiates one of the two: its gradients are half the slope.

    With B halved in the file, half the slope in B is our gradient (which `to_keys` halved), and half ours in A.
    """
    if key.endswith("out_proj.lora_A.weight"):
        return ours / 2
    return ours * 2 if key.endswith("out_proj.lora_B.weight") else ours


# -- logits -----------------------------------------------------------------------------------------------------------


@EACH_KIND
def test_our_folder_gives_the_same_logits_in_peft(case: Case, tmp_path):
    model, inputs = case.model(), case.inputs()
    adapter = case.adapter(model)
    write_adapter(adapter, tmp_path / "adapter")
    base = output(model, inputs)
    with inject(model, adapter):
        ours = output(model, inputs)
    theirs = output(opened_by_peft(model, tmp_path / "adapter"), inputs)
    assert (ours - base).abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def peft_config(case: Case, model: nn.Module) -> peft.LoraConfig:
    """The same wish in PEFT's words."""
    targets = choose(model, case.spec)
    stacked = [target.name for target in targets if len(target.A_shape) == 3 and target.is_parameter]
    return peft.LoraConfig(
        r=case.spec.rank,
        lora_alpha=case.spec.alpha,
        use_rslora=case.spec.rslora,
        use_dora=case.spec.dora,
        rank_pattern=dict(case.spec.rank_pattern),
        alpha_pattern=dict(case.spec.alpha_pattern),
        target_modules=list(targets[0].selection),
        target_parameters=stacked[::-1] or None,
        fan_in_fan_out=any(target.kind == "transposed" for target in targets),
    )


@EACH_KIND
def test_a_folder_of_peft_gives_the_same_logits_here(case: Case, tmp_path):
    base, inputs = case.model(), case.inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), peft_config(case, base)).train(base.training)
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                nn.init.normal_(parameter, 0, 0.3 if "embedding" in name else 0.02)
            elif "magnitude" in name:
                parameter.data.mul_(1.1)
        theirs.save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    assert list(adapter.factors) and set(adapter.factors) == {target.name for target in choose(base, case.spec)}
    with inject(base, adapter):
        torch.testing.assert_close(output(base, inputs), output(theirs, inputs), atol=1e-5, rtol=0)
    write_adapter(adapter, tmp_path / "again")
    again = output(opened_by_peft(case.model(), tmp_path / "again"), inputs)
    torch.testing.assert_close(again, output(theirs, inputs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["falcon_mamba", "mamba", "glm4_moe"])
def test_all_linear_means_what_peft_can_read_in_a_model_of_this_type(kind, tmp_path):
    """It refuses Mamba's output projection, and takes the names of dense layers for those of experts (glm4_moe)."""
    model, inputs = lively_model(kind), torch.arange(9)[None] * 7
    spec = LoraSpec(rank=4, exclude=() if kind == "glm4_moe" else ("dt_proj",))
    targets = choose(model, spec)
    adapter = new_adapter(targets, spec)
    for factors in adapter.factors.values():
        nn.init.normal_(factors.B, 0, 0.02)
    write_adapter(adapter, tmp_path / "adapter")
    base = output(model, inputs)
    with inject(model, adapter):
        ours = output(model, inputs)
    assert not torch.equal(ours, base)
    theirs = output(opened_by_peft(model, tmp_path / "adapter"), inputs)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    named = "down_proj" if kind == "glm4_moe" else "out_proj"
    assert not any(target.name.endswith(named) and not target.is_parameter for target in targets)
    with pytest.raises(AdapterError, match=rf"{named}: PEFT .*; leave it out"):
        choose(lively_model(kind), LoraSpec(targets=("q_proj", named) if kind == "glm4_moe" else (named,)))


def test_the_types_whose_experts_were_layers_once_are_those_of_transformers():
    known = importlib.import_module("transformers.conversion_mapping")._MODEL_TO_CONVERSION_PATTERN
    types = {name for name, pattern in known.items() if pattern == "qwen2_moe" and name.islower()}
    assert types <= _ONCE_UNSTACKED


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_the_usual_recipe_for_experts_is_read_as_peft_saves_it(kind, tmp_path):
    """Named as layers, as before transformers 5: PEFT turns that into bare parameters and a pattern of twice the rank."""
    model, inputs = small_model(kind), torch.arange(9)[None] * 7
    names = ["w1", "w2", "w3"] if kind == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "o_proj", *names])
        theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, 0, 0.05)
        theirs.save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    assert {adapter.rank_of(name) for name in adapter.parameter_names} == {2, 4}
    with inject(model, adapter):
        torch.testing.assert_close(output(model, inputs), output(theirs, inputs), atol=1e-5, rtol=0)


def test_peft_still_adds_the_output_projection_twice():
    """Why deltaw.adapter.keys.OUT_PROJ_TIMES is 2. When this fails, PEFT is repaired: set it to 1, drop this test."""
    torch.manual_seed(0)
    attention = nn.Sequential()
    attention.add_module("attn", nn.MultiheadAttention(8, 2, batch_first=True))
    plain = copy.deepcopy(attention)
    adapted = peft.get_peft_model(attention, peft.LoraConfig(r=2, lora_alpha=2, target_modules=["attn"]))
    layer = adapted.base_model.model.attn
    nn.init.normal_(layer.base_layer.out_proj.lora_B["default"].weight)
    delta = layer.base_layer.out_proj.get_delta_weight("default").detach()
    plain.attn.out_proj.weight.data += 2 * delta
    x = torch.randn(1, 3, 8)
    torch.testing.assert_close(layer(x, x, x)[0], plain.attn(x, x, x)[0])


# -- one training step ------------------------------------------------------------------------------------------------


@EACH_KIND
def test_loss_and_every_gradient_equal_those_of_peft(case: Case, tmp_path):
    model, inputs = case.model(), case.inputs()
    adapter = case.adapter(model)
    write_adapter(adapter, tmp_path / "adapter")
    with inject(model, adapter, trainable=True) as injection:
        loss = loss_of(output(model, inputs))
        loss.backward()
        ours = our_gradients(injection)
    theirs = opened_by_peft(model, tmp_path / "adapter")
    their_loss = loss_of(output(theirs, inputs))
    their_loss.backward()
    expected = peft_gradients(theirs)
    assert difference(loss.detach(), their_loss.detach()) <= 1e-5
    assert ours.keys() == expected.keys()
    far = {key: difference(as_peft_sees_it(key, ours[key]).view_as(expected[key]), expected[key]) for key in ours}
    assert all(value < 1e-5 for value in far.values()), {key: value for key, value in far.items() if not value < 1e-5}


# -- bf16 -------------------------------------------------------------------------------------------------------------


def bf16_ratios(tmp_path: Path, spec: LoraSpec, factors: torch.dtype, seeds: int) -> list[float]:
    """Error of our gradient / error of PEFT's, both against PEFT in fp32, of every tensor; the base is in bf16.

    PEFT keeps its factors in fp32 there (autocast_adapter_dtype, its default).
    """
    ratios = []
    for seed in range(seeds):
        model = small_model("llama", seed).to(torch.bfloat16)
        case = Case(lambda: None, spec, lambda: None)
        folder = write_adapter(case.adapter(model, seed), tmp_path / f"{seed}-{factors}")
        inputs = torch.randint(3, 259, (2, 40), generator=torch.Generator().manual_seed(seed))
        gradients = []
        for base in (copy.deepcopy(model).float(), copy.deepcopy(model)):
            theirs = opened_by_peft(base, folder)
            loss_of(output(theirs, inputs)).backward()
            gradients.append(peft_gradients(theirs))
        with inject(model, read_adapter(folder), dtype=factors, trainable=True) as injection:
            loss_of(output(model, inputs)).backward()
            ours = our_gradients(injection)
        exact, theirs_bf16 = gradients
        ratios += [difference(ours[k], exact[k]) / difference(theirs_bf16[k], exact[k]) for k in exact]
    return ratios


@pytest.mark.parametrize(("dora", "median", "largest"), [(False, 1.001, 1.05), (True, 1.01, 1.5)])
def test_in_bf16_gradients_of_fp32_factors_are_as_exact_as_those_of_peft(dora, median, largest, tmp_path):
    """What training uses. Measured over 5 seeds: LoRA 1.000 for each tensor; DoRA 0.9996, the worst tensor 1.33."""
    ratios = bf16_ratios(tmp_path, LoraSpec(rank=8, alpha=16, dora=dora), torch.float32, seeds=3)
    assert statistics.median(ratios) <= median
    assert all(ratio <= largest for ratio in ratios)


@pytest.mark.parametrize(("dora", "median", "largest"), [(False, 1.2, 1.7), (True, 1.3, 2.2)])
def test_in_bf16_gradients_of_a_bf16_working_copy_lose_a_stated_part(dora, median, largest, tmp_path):
    """Measured over 5 seeds: LoRA 1.15, DoRA 1.24 times PEFT's error (the median), which is 0.7 % of the gradient.

    Most of the excess is the rounding of the factors themselves: with the branch computed in fp32 from the same bf16
    factors, 1.13 became 1.10 only. So training takes fp32 factors (the test above); a bf16 copy is for generation.
    """
    ratios = bf16_ratios(tmp_path, LoraSpec(rank=8, alpha=16, dora=dora), torch.bfloat16, seeds=3)
    assert statistics.median(ratios) <= median
    assert all(ratio <= largest for ratio in ratios)
