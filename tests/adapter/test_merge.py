"""Folding in and taking out: the same logits, the same bits afterwards, and the loss by rounding told."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import CASES, Case, drawn, output, tokens
from models import small_model

from deltaw.adapter import LoraSpec, choose, inject, merge_, new_adapter
from deltaw.errors import AdapterError

EACH_KIND = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
WITHOUT_DORA = {name: case for name, case in CASES.items() if not case.spec.dora}


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_bits(model, expected):
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@EACH_KIND
def test_merged_logits_equal_adapted_ones(case: Case):
    model, inputs = case.model(), case.inputs()
    adapter = case.adapter(model)
    base = output(model, inputs)
    with inject(model, adapter):
        adapted = output(model, inputs)
    merge_(model, adapter)
    assert (adapted - base).abs().max() > 1e-3
    torch.testing.assert_close(output(model, inputs), adapted, atol=1e-5, rtol=0)


@EACH_KIND
def test_unmerge_restores_every_bit_when_originals_are_kept(case: Case):
    model = case.model().to(torch.bfloat16)
    before, ties = bits(model), len(list(model.parameters()))
    merged = merge_(model, case.adapter(model))
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    merged.unmerge()
    assert_bits(model, before)
    assert len(list(model.parameters())) == ties


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", WITHOUT_DORA.values(), ids=WITHOUT_DORA.keys())
def test_unmerge_by_subtraction_stays_within_two_roundings(case: Case, dtype):
    model = case.model().to(dtype)
    before, adapter = bits(model), case.adapter(model)
    targets = choose(model, case.spec)
    bounds = {}
    for target in targets:
        weight, factors = getattr(target.holder, target.parameter).detach(), adapter.factors[target.name]
        size = weight.float().abs() + target.delta(factors.A, factors.B).abs()
        bounds[target.name] = (weight.clone(), size * torch.finfo(dtype).eps * 1.01)
    merge_(model, adapter, keep_originals=False).unmerge()
    for target in targets:
        weight, bound = bounds[target.name]
        assert ((getattr(target.holder, target.parameter).float() - weight.float()).abs() <= bound).all()
    adapted = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert all(any(name.startswith(target.name) for target in targets) for name in adapted)


def test_dora_keeps_originals_even_if_not_asked():
    model = small_model("llama")
    before = bits(model)
    merge_(model, CASES["dora"].adapter(model), keep_originals=False).unmerge()
    assert_bits(model, before)


def test_a_tied_head_is_untied_and_the_embedding_is_unchanged():
    model = small_model("llama-tied")
    embedding = model.model.embed_tokens.weight
    before = embedding.clone()
    merged = merge_(model, CASES["tied head"].adapter(model))
    assert merged.untied == ["lm_head"]
    assert model.model.embed_tokens.weight is embedding and torch.equal(embedding, before)
    assert not torch.equal(model.lm_head.weight, before)
    assert model.config.tie_word_embeddings is False
    merged.unmerge()
    assert model.lm_head.weight is embedding and torch.equal(embedding, before)
    assert model.config.tie_word_embeddings is True


@pytest.mark.parametrize("keep_originals", [True, False])
def test_head_and_embedding_that_are_tied_and_both_adapted_are_parted_and_joined_again(keep_originals):
    model = small_model("llama-tied")
    spec = LoraSpec(rank=4, alpha=8, targets=("lm_head", "embed_tokens"))
    adapter = drawn(new_adapter(choose(model, spec), spec))
    shared = model.lm_head.weight
    before = shared.clone()
    with inject(model, adapter):
        adapted = output(model, tokens())
    merged = merge_(model, adapter, keep_originals=keep_originals)
    torch.testing.assert_close(output(model, tokens()), adapted, atol=1e-5, rtol=0)
    merged.unmerge()
    assert model.lm_head.weight is shared and model.model.embed_tokens.weight is shared
    torch.testing.assert_close(shared, before, atol=0 if keep_originals else 1e-6, rtol=0)


def test_what_rounding_loses_is_reported():
    exact, rounded = small_model("llama"), small_model("llama").to(torch.bfloat16)
    adapter = CASES["plain"].adapter(exact)
    assert merge_(exact, adapter).rounding_loss == 0
    assert 1e-3 < merge_(rounded, adapter).rounding_loss < 1
    light = adapter.with_factors({n: type(f)(f.A, f.B * 1e-4) for n, f in adapter.factors.items()})
    assert merge_(small_model("llama").to(torch.bfloat16), light).rounding_loss > 0.9


def test_rounding_loss_is_the_share_that_a_dense_sum_loses():
    model = small_model("llama").to(torch.bfloat16)
    spec = LoraSpec(rank=4, targets=("up_proj",), layers=(0,))
    adapter = drawn(new_adapter(choose(model, spec), spec))
    factors = adapter.factors["model.layers.0.mlp.up_proj"]
    W, delta = model.model.layers[0].mlp.up_proj.weight.float(), 8 * factors.B @ factors.A
    lost = (W + delta).bfloat16().float() - (W + delta)
    assert merge_(model, adapter).rounding_loss == pytest.approx(float((lost.norm() / delta.norm()).detach()), rel=1e-4)


def test_an_adapter_that_does_not_fit_leaves_the_model_untouched():
    model = small_model("gpt2")
    before = bits(model)
    with pytest.raises(AdapterError, match="does not fit"):
        merge_(model, CASES["plain"].adapter(small_model("llama")))
    assert_bits(model, before)


def test_merging_is_refused_while_adapters_are_at_work():
    model = small_model("llama")
    adapter = CASES["plain"].adapter(model)
    with inject(model, adapter), pytest.raises(AdapterError, match="has adapters already"):
        merge_(model, adapter)


def test_factors_stored_in_bf16_are_taken_out_as_they_went_in():
    model = small_model("llama")
    adapter = CASES["plain"].adapter(model)
    before = bits(model)
    stored = {n: type(f)(f.A.bfloat16(), f.B.bfloat16()) for n, f in adapter.factors.items()}
    merge_(model, adapter.with_factors(stored), keep_originals=False).unmerge()
    close = partial(torch.testing.assert_close, atol=1e-7, rtol=0)
    for name, tensor in model.state_dict().items():
        close(tensor, before[name])
