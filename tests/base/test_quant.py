"""Bases in 4 and 8 bits: near the original, the same by kernels and modules, streamed or not, evaluated or not."""

from __future__ import annotations

import pytest
import torch
import transformers
from models import SMALL, byte_tokenizer, slopes, some_batch

from deltaw.adapter.weight import dense_weight, stored_tensors
from deltaw.base.formed import FormedLinear
from deltaw.base.load import load
from deltaw.base.quant import BYTES, quantised_reader
from deltaw.base.stream import blocks_of
from deltaw.engine.objective import score_batch
from deltaw.errors import DiskError

pytest.importorskip("bitsandbytes")
# Of the weights, as a share of their norm: 4 bits and 8 bits of normally distributed numbers.
ERROR = {"nf4": 0.1, "int8": 0.015}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    config = transformers.LlamaConfig(**{**SMALL, "hidden_size": 64, "head_dim": 16, "intermediate_size": 128})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path))


@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_near_and_take_as_many_bytes_as_is_said(folder, kind, dtype):
    plain, small = load(folder, dtype=dtype), load(folder, dtype=dtype, quant=kind)
    for block, other in zip(blocks_of(plain.model), blocks_of(small.model), strict=True):
        for name, layer in block.named_modules():
            if isinstance(layer, torch.nn.Linear):
                quantised = other.get_submodule(name)
                assert type(quantised) is FormedLinear and quantised.weight.shape == layer.weight.shape
                W, Q = layer.weight.detach().float(), dense_weight(quantised)
                assert Q.dtype == plain.dtype
                assert 0.1 * ERROR[kind] < float((Q.float() - W).norm() / W.norm()) < ERROR[kind]
        linear = sum(m.weight.numel() for m in block.modules() if isinstance(m, torch.nn.Linear))
        held = sum(t.nbytes for m in other.modules() if isinstance(m, FormedLinear) for t in stored_tensors(m))
        # What bitsandbytes adds for each tensor (its tables) weighs only in layers as small as these.
        tables = sum(
            t.nbytes
            for m in other.modules()
            if isinstance(m, FormedLinear)
            for t in stored_tensors(m)
            if t.numel() <= 256
        )
        assert held - tables <= BYTES[kind] * linear <= held
    assert small.parameters == plain.parameters and small.way == "kernels"


@pytest.mark.parametrize("kind", BYTES)
def test_kernels_modules_streaming_and_recomputing_agree_to_the_bit_or_to_rounding(folder, kind):
    base = load(folder, dtype="float32", quant=kind)
    wanted = slopes(base)
    streamed = load(folder, dtype="float32", quant=kind, stream=True)
    base.recompute(1)
    for one, again, other in zip(wanted, slopes(base), slopes(streamed), strict=True):
        assert torch.equal(one, again) and torch.equal(one, other)
    streamed.pager.close()
    by_modules = load(folder, dtype="float32", quant=kind)
    by_modules.decoder, by_modules.module_reason = None, "asked for"
    for one, other in zip(wanted, slopes(by_modules), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(one.abs().max()))


@pytest.mark.parametrize("kind", BYTES)
def test_a_base_that_is_computed_in_another_dtype_is_streamed_quantised_and_its_head_stays(folder, kind):
    plain = load(folder, dtype="bfloat16", quant=kind)
    streamed = load(folder, dtype="bfloat16", quant=kind, stream=True)
    *blocks, head = streamed.pager.sections
    assert all(blocks) and not head
    for one, other in zip(slopes(plain), slopes(streamed), strict=True):
        assert torch.equal(one, other)
    streamed.pager.close()


@pytest.mark.parametrize("kind", BYTES)
def test_an_evaluation_between_two_passes_changes_nothing(folder, kind):
    """bitsandbytes' own Linear4bit repacks its weights in evaluation, and what it computes afterwards is wrong."""
    base = load(folder, dtype="bfloat16", quant=kind)
    held = [tensor.clone() for tensor in stored_tensors(base.model)]
    before = score_batch(base, some_batch()).losses_N
    found = slopes(base)  # two equal passes with an evaluation behind each
    half = len(found) // 2
    assert all(torch.equal(one, other) for one, other in zip(found[:half], found[half:], strict=True))
    base.model.train()
    base.model.eval()
    assert torch.equal(score_batch(base, some_batch()).losses_N, before)
    assert all(torch.equal(one, other) for one, other in zip(held, stored_tensors(base.model), strict=True))


def test_a_base_is_quantised_once_and_then_read_from_the_cache(folder, tmp_path):
    said = []
    first = load(folder, quant="nf4", tell=said.append)
    assert len(said) == 2 and "block 2 of 2" in said[1]
    second = load(folder, quant="nf4", tell=said.append)
    assert len(said) == 2 and len(list(tmp_path.glob("quantised/*/block-*.safetensors"))) == 2
    for one, other in zip(stored_tensors(first.model), stored_tensors(second.model), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("shape", [(96, 64), (1030, 2048), (577, 1537)])
def test_a_weight_is_formed_in_pieces_to_the_bit_and_its_memory_is_lent_again_but_never_while_held(kind, shape):
    functional = pytest.importorskip("bitsandbytes.functional")
    layer = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16)
    weight = layer.weight.detach()
    if kind == "nf4":
        codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        whole = functional.dequantize_4bit(codes, state)
    else:
        codes, state = functional.quantize_blockwise(weight, blocksize=64)
        whole = functional.dequantize_blockwise(codes, state).view(shape)
    read = quantised_reader(layer, kind)
    first, second = read(), read()
    assert torch.equal(first, whole.to(torch.bfloat16)) and torch.equal(second, first)
    places = {first.data_ptr(), second.data_ptr()}
    kept = second[:1].detach()  # a view holds the memory as its owner does
    assert len(places) == 2
    del first, second
    assert read().data_ptr() in places - {kept.data_ptr()}
    third, fourth = read(), read()
    assert kept.data_ptr() not in (third.data_ptr(), fourth.data_ptr())


def test_a_block_that_is_gone_from_the_cache_is_quantised_again_and_a_cache_that_cannot_be_written_is_said(
    folder, tmp_path, monkeypatch
):
    wanted = list(stored_tensors(load(folder, quant="nf4").model))
    next(tmp_path.glob("quantised/*/block-0001.safetensors")).unlink()
    for one, other in zip(wanted, stored_tensors(load(folder, quant="nf4").model), strict=True):
        assert torch.equal(one, other)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DiskError, match="file"):
        load(folder, quant="nf4")
