"""A base that is read block by block, or computes blocks twice, gives the bits of one that lies in memory."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from models import CONFIGS, MORE, SMALL, byte_tokenizer, lively_model, slopes, some_batch

from deltaw import hardware
from deltaw.adapter import Factors, LoraSpec, choose, inject, new_adapter
from deltaw.adapter.weight import ON_READ, READER, dense_weight, stored_tensors
from deltaw.base.decoder import ROW_STEP, Decoder
from deltaw.base.formed import FormedLinear, linear_layers
from deltaw.base.forward import plain_attention
from deltaw.base.load import Base, load, open_model
from deltaw.base.stream import Pager, blocks_of, release
from deltaw.engine.objective import accumulate, batch_loss, head_factors
from deltaw.errors import BaseError
from deltaw.hardware import REMEMBERED

KINDS = ("llama", "llama-tied", "gemma3", "gpt_neox", "gpt2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("bases") / kind
            lively_model(kind).save_pretrained(made[kind])
            byte_tokenizer().save_pretrained(made[kind])
        return made[kind]

    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_streamed_base_computes_the_same_bits(folders, kind):
    plain, streamed = load(folders(kind), dtype="float32"), load(folders(kind), dtype="float32", stream=True)
    try:
        for one, other in zip(slopes(plain), slopes(streamed), strict=True):
            assert torch.equal(one, other)
        assert 0 <= streamed.pager.current <= len(blocks_of(streamed.model))
    finally:
        streamed.pager.close()


def test_a_base_in_many_shards_streams_the_same_bits(folders, tmp_path):
    plain = load(folders("llama"), dtype="float32")
    plain.model.save_pretrained(tmp_path, max_shard_size="20KB")
    byte_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    streamed = load(tmp_path, dtype="float32", stream=True)
    try:
        assert all(map(torch.equal, slopes(plain), slopes(streamed)))
    finally:
        streamed.pager.close()


@pytest.mark.parametrize("kind", [*KINDS, "qwen3_moe"])
@pytest.mark.parametrize("count", [1, 2])
def test_blocks_that_are_computed_again_give_the_same_bits(folders, kind, count):
    base = load(folders(kind), dtype="float32")
    wanted = slopes(base)
    base.recompute(count)
    way = base.way
    for one, other in zip(wanted, slopes(base), strict=True):
        assert torch.equal(one, other)
    base.recompute(0)
    assert base.way == way and all("forward" not in block.__dict__ for block in blocks_of(base.model))


def gradients(base, sizes, layers=None, most=10**6):
    """What `accumulate` adds to random factors for several batches, and the loss."""
    spec = LoraSpec(rank=3, alpha=6, **({} if layers is None else {"layers": layers}))
    adapter = new_adapter(choose(base.model, spec), spec, 0)
    generator = torch.Generator().manual_seed(0)
    filled = {n: Factors(f.A, 0.05 * torch.randn(f.B.shape, generator=generator)) for n, f in adapter.factors.items()}
    batches = [some_batch(seed, lengths) for seed, lengths in enumerate(sizes)]
    with inject(base.model, adapter.with_factors(filled), trainable=True, dtype=torch.float32) as injection:
        injection.train(True)
        assert base.tokens_a_reading in (0, most)
        loss = accumulate(base, batches, 7.0, head_factors(base, injection))
        return [torch.tensor(loss), *(tensor.grad for _, _, tensor in injection.trained())]


SIZES = ((40, 9), (130,), (17, 33, 8))


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gemma3", "qwen3_moe"])
@pytest.mark.parametrize("layers", [None, [1]], ids=["every block", "the upper block"])
@pytest.mark.parametrize("step", [1, ROW_STEP])
def test_passes_that_share_a_reading_give_the_bits_of_passes_one_by_one(folders, kind, layers, step, monkeypatch):
    monkeypatch.setattr("deltaw.base.decoder.row_step", lambda _: step)
    base = load(folders(kind), dtype="float32")
    base.recompute(2)
    alone = gradients(base, SIZES, layers)
    monkeypatch.setattr(Base, "tokens_a_reading", 10**6)
    monkeypatch.setenv(REMEMBERED, "128")
    calls = []
    monkeypatch.setattr(base.decoder, "accumulate", lambda *a: calls.append(1) or Decoder.accumulate(base.decoder, *a))
    for one, other in zip(alone, gradients(base, SIZES, layers), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert calls == [1]


def test_as_many_passes_share_a_reading_as_products_are_remembered_and_tokens_served(folders, monkeypatch):
    base = load(folders("llama"), dtype="float32")
    base.recompute(2)
    shared = []
    monkeypatch.setattr(
        base.decoder,
        "accumulate",
        lambda rows, loss: shared.append(len(rows)) or Decoder.accumulate(base.decoder, rows, loss),
    )
    for products, most, groups in (
        (128, 10**6, [4, 2]),
        (128, 60, [3, 3]),
        (128, 20, []),
        (80, 10**6, [2, 2, 2]),
        (1, 10**6, []),
    ):
        shared.clear()
        monkeypatch.setenv(REMEMBERED, str(products))
        monkeypatch.setattr(Base, "tokens_a_reading", most)
        gradients(base, [(20,)] * 6, most=most)
        assert shared == groups


def test_adapted_embeddings_and_heads_learn_the_same_when_passes_share_a_reading(folders, monkeypatch):
    base = load(folders("llama"), dtype="float32")
    base.recompute(2)
    spec = LoraSpec(rank=3, alpha=6, targets=["embed_tokens", "q_proj", "lm_head"])
    found = []
    for most in (0, 10**6):
        monkeypatch.setattr(Base, "tokens_a_reading", most)
        adapter = new_adapter(choose(base.model, spec), spec, 0)
        with inject(base.model, adapter, trainable=True, dtype=torch.float32) as injection:
            for _, part, tensor in injection.trained():
                torch.nn.init.normal_(tensor, std=0.05, generator=torch.Generator().manual_seed(ord(part[0])))
            batches = [some_batch(seed, lengths) for seed, lengths in enumerate(SIZES)]
            accumulate(base, batches, 7.0, head_factors(base, injection))
            found.append([tensor.grad for _, _, tensor in injection.trained()])
    assert all(torch.equal(one, other) and other.count_nonzero() for one, other in zip(*found, strict=True))


def test_a_streamed_base_is_read_twice_for_all_passes_of_a_step_that_it_serves_together(wide, monkeypatch):
    monkeypatch.setenv(REMEMBERED, "128")
    streamed = load(wide, dtype="float32", stream=True)
    asked = []
    enter = streamed.pager.enter
    for number, section in enumerate(blocks_of(streamed.model)):
        for module in section.modules():
            module.__dict__[ON_READ] = lambda number=number: (asked.append(number), enter(number))
    most = {}
    for blocks in (0, 8):
        streamed.recompute(blocks)
        asked.clear()
        most[blocks] = streamed.tokens_a_reading
        found = gradients(streamed, ((40, 9), (60,), (17, 33, 8)), most=most[blocks])
        visits = sum(a != b for a, b in itertools.pairwise(asked))
        assert visits == (3 * 14 if blocks == 0 else 14)
        if blocks == 0:
            wanted = found
    assert most[0] == 0 and most[8] > 200
    assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))
    streamed.pager.close()


def test_blocks_with_dora_and_dropout_are_computed_again_with_the_same_random_numbers(folders):
    base = load(folders("llama"), dtype="float32")
    torch.manual_seed(5)
    wanted = slopes(base, dora=True, dropout=0.3)
    base.recompute(2)
    torch.manual_seed(5)
    for one, other in zip(wanted, slopes(base, dora=True, dropout=0.3), strict=True):
        assert torch.equal(one, other)


def test_what_is_recomputed_is_not_kept(folders):
    base = load(folders("llama"), dtype="float32")

    def kept():
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.nbytes) or t, lambda t: t):
            spec = LoraSpec(rank=3)
            with inject(base.model, new_adapter(choose(base.model, spec), spec, 0), trainable=True) as injection:
                batch_loss(base, some_batch(), head_factors(base, injection))
        return sum(held)

    whole = kept()
    base.recompute(2)
    assert kept() < whole / 4


# -- pages ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Eight blocks of 1.6 MB, so that pages can be told apart."""
    folder = tmp_path_factory.mktemp("wide")
    config = transformers.LlamaConfig(
        **{**SMALL, "num_hidden_layers": 8, "hidden_size": 128, "intermediate_size": 1024}
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def resident_bytes(folder):
    """What of the folder's weight files is in this process's memory."""
    total, ours = 0, False
    with Path("/proc/self/smaps").open() as lines:
        for line in lines:
            if "-" in line.split(maxsplit=1)[0]:
                ours = str(folder) in line
            elif ours and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
    return total


def test_at_most_a_few_blocks_are_in_memory_while_a_streamed_base_trains(wide):
    streamed = load(wide, dtype="float32", stream=True)
    block = sum(parameter.nbytes for parameter in blocks_of(streamed.model)[0].parameters())
    seen = []
    enter = streamed.pager.enter

    def watched(number):
        enter(number)
        if not seen or seen[-1][0] != number:
            seen.append((number, resident_bytes(wide)))

    for number, section in enumerate(blocks_of(streamed.model)):
        for module in section.modules():
            module.__dict__["_deltaw_on_read"] = lambda number=number: watched(number)
    release(streamed.model.parameters())
    slopes(streamed)
    numbers = [number for number, _ in seen]
    turns = [a for a, b in itertools.pairwise(numbers) if a != b]
    assert turns[:15] == [0, 1, 2, 3, 4, 5, 6, 7, 6, 5, 4, 3, 2, 1, 0]
    assert max(size for _, size in seen) < 4 * block
    streamed.pager.close()
    release(streamed.model.parameters())
    assert resident_bytes(wide) < block / 4


@pytest.mark.parametrize("kind", [*CONFIGS, *sorted(MORE.keys() - CONFIGS.keys())])
def test_a_base_that_is_stored_in_bf16_has_the_weights_that_transformers_would_cast(tmp_path, kind):
    """Those too that modules work out by themselves, as the factor of Gemma's embedding."""
    lively_model(kind).to(torch.bfloat16).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    wanted, found = open_model(tmp_path, torch.float32), load(tmp_path, dtype="float32").model
    for (name, one), (_, other) in zip(wanted.named_parameters(), found.named_parameters(), strict=True):
        module = found.get_submodule(name.rpartition(".")[0])
        value = dense_weight(module) if name.endswith(".weight") else other
        assert other.dtype == value.dtype == one.dtype and torch.equal(one, value), name
    for (name, one), (_, other) in zip(wanted.named_buffers(), found.named_buffers(), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other), name


def test_layers_stay_in_the_files_as_they_are_stored_and_of_the_rest_no_two_copies_are_held(
    wide, tmp_path, monkeypatch
):
    folder, released = tmp_path / "bf16", []
    open_model(wide, torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    monkeypatch.setattr("deltaw.base.formed.release", lambda tensors: released.extend(tensors) or release(tensors))
    base = load(folder, dtype="float32")
    layers = [layer for block in blocks_of(base.model) for _, layer in linear_layers(block)]
    assert len(layers) == 7 * 8 and base.dtype == torch.float32
    for layer in layers:
        (stored,) = stored_tensors(layer)
        assert stored.dtype == torch.bfloat16 and stored.shape == layer.weight.shape
    others = [module for module in base.model.modules() if READER not in module.__dict__]
    rest = sum(parameter.numel() for module in others for parameter in module.parameters(recurse=False))
    assert sum(tensor.numel() for tensor in released) == rest > 0
    # The layers do lie in the files.
    slopes(base)
    used = sum(layer.weight.numel() * 2 for layer in layers)
    assert resident_bytes(folder) > 0.9 * used
    release(tensor for layer in layers for tensor in stored_tensors(layer))
    assert resident_bytes(folder) < 0.1 * used


def test_what_is_cast_is_let_go_part_by_part_so_that_no_two_copies_are_held(tmp_path, monkeypatch):
    """GPT-2's layers are none that stay as they are stored."""
    folder, held = tmp_path / "gpt2", []
    config = transformers.GPT2Config(vocab_size=400, n_positions=64, n_embd=256, n_layer=8, n_head=4)
    transformers.GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)

    def watched(tensors):
        held.append(resident_bytes(folder))
        release(tensors)

    monkeypatch.setattr("deltaw.base.formed.release", watched)
    base = load(folder, dtype="float32")
    block = sum(parameter.nbytes for parameter in blocks_of(base.model)[0].parameters()) / 2
    assert base.dtype == torch.float32 and len(held) > 9 and held[0] > block / 2  # it does come from the files
    assert all(later < sooner - block / 2 for sooner, later in itertools.pairwise(held[:9])), held
    assert resident_bytes(folder) < block / 4


@pytest.mark.parametrize(
    ("stored", "computed"), [("bfloat16", "float32"), ("float16", "float32"), ("float32", "bfloat16")]
)
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gemma3", "gpt_neox"])
def test_a_base_that_is_stored_in_another_dtype_computes_the_bits_of_one_cast_whole_streamed_or_not(
    tmp_path, kind, stored, computed
):
    folder, cast = tmp_path / kind, tmp_path / "cast"
    lively_model(kind).to(getattr(torch, stored)).save_pretrained(folder)
    open_model(folder, getattr(torch, computed)).save_pretrained(cast)
    for each in (folder, cast):
        byte_tokenizer().save_pretrained(each)
    plain, streamed = load(cast, dtype=computed), load(folder, dtype=computed, stream=True)
    try:
        assert not any(type(module) is FormedLinear for module in plain.model.modules())
        for one, other in zip(slopes(plain), slopes(load(folder, dtype=computed)), strict=True):
            assert torch.equal(one, other)
        assert streamed.dtype == plain.dtype and streamed.parameters == plain.parameters
        assert streamed.way == plain.way
        *blocks, head = streamed.pager.sections
        assert all(blocks) and not head
        for one, other in zip(slopes(plain), slopes(streamed), strict=True):
            assert torch.equal(one, other)
        embedding = streamed.model.get_input_embeddings()
        # One that is the head's too, or scales what it looks up, is cast when the base is opened.
        formed = kind in ("llama", "gpt_neox")
        assert [tensor.dtype for tensor in stored_tensors(embedding)] == [
            getattr(torch, stored if formed else computed)
        ]
        for one, other in zip(plain.model.parameters(), streamed.model.parameters(), strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype
        prompt = torch.arange(5)[None]
        plain_attention(plain.model).__enter__()
        plain_attention(streamed.model).__enter__()
        wanted, found = (base.model.generate(prompt, max_new_tokens=4, do_sample=False) for base in (plain, streamed))
        assert torch.equal(wanted, found)
    finally:
        streamed.pager.close()


@pytest.mark.parametrize("kind", ["mamba", "rwkv"])
def test_a_base_that_reads_weights_past_its_layers_is_refused_and_by_rule_opened_whole(tmp_path, kind, monkeypatch):
    lively_model(kind).to(torch.bfloat16).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(BaseError, match="cannot be streamed"):
        load(tmp_path, dtype="float32", stream=True)
    seen = dataclasses.replace(hardware.look(), available_bytes=1000)
    monkeypatch.setattr("deltaw.base.load.look", lambda: seen)
    whole = load(tmp_path, dtype="float32", stream="auto")
    assert whole.pager is None and all(bool(p.isfinite().all()) for p in whole.model.parameters())


def test_files_of_several_dtypes_are_opened_as_they_are_computed_so_that_none_is_rounded(tmp_path):
    model = lively_model("llama").to(torch.bfloat16)
    model.model.norm.to(torch.float32).weight.data.add_(1e-6)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    found = load(tmp_path, dtype="float32").model
    assert torch.equal(found.model.norm.weight, model.model.norm.weight)
    with pytest.raises(BaseError, match="would be rounded"):
        load(tmp_path, dtype="float32", stream=True)


@pytest.mark.parametrize(("kind", "dtype"), [("gpt2", "bfloat16"), ("qwen3_moe", "float32"), ("qwen3_moe", "bfloat16")])
def test_a_base_whose_weights_are_stacked_or_would_be_converted_is_refused(folders, kind, dtype):
    with pytest.raises(BaseError, match="cannot be streamed"):
        load(folders(kind), dtype=dtype, stream=True)


def test_files_that_are_links_to_names_without_an_ending_are_streamed(folders, tmp_path):
    """As the hub's cache has them: blobs named by digests, and links to them."""
    for file in folders("llama").iterdir():
        blob = tmp_path / "blobs" / f"{hash(file.name):x}"
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(file.read_bytes())
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        (tmp_path / "snapshot" / file.name).symlink_to(blob)
    plain, streamed = load(folders("llama"), dtype="float32"), load(tmp_path / "snapshot", dtype="float32", stream=True)
    try:
        assert all(torch.equal(one, other) for one, other in zip(slopes(plain), slopes(streamed), strict=True))
        assert all(streamed.pager.sections)
    finally:
        streamed.pager.close()


def test_only_pages_of_mapped_files_are_let_go():
    mine = torch.arange(1 << 16)
    release([mine])
    assert torch.equal(mine, torch.arange(1 << 16))


def test_the_pager_turns_at_both_ends_and_holds_two_sections():
    pager = Pager([[] for _ in range(4)])
    held = []
    for number in (0, 1, 2, 3, 2, 1, 0, 1, 3, 0):
        pager.enter(number)
        held.append(pager.held)
    pager.close()
    assert held == [{0, 1}, {1, 2}, {2, 3}, {3, 2}, {2, 1}, {1, 0}, {0, 1}, {1, 2}, {3, 2}, {0, 1}]


def test_modules_that_run_in_place_of_the_kernels_are_followed_as_long_as_they_do(folders):
    base = load(folders("llama"), dtype="float32", stream=True)
    entered = []
    usual = base.pager.enter

    def enter(number):
        entered.append(number)
        usual(number)

    for section in (*blocks_of(base.model), base.model.get_output_embeddings()):
        for module in section.modules():
            module.__dict__[ON_READ] = partial(enter, module.__dict__[ON_READ].args[0])
    try:
        for options, by_modules in (({"dropout": 0.3}, True), ({}, False)):
            spec = LoraSpec(rank=2, **options)
            with inject(base.model, new_adapter(choose(base.model, spec), spec, 0), trainable=True) as injection:
                injection.train(True)
                entered.clear()
                batch_loss(base, some_batch()).backward()
                assert (base.way == "modules") == by_modules and bool(base._followed) == by_modules
                assert {0, 1} <= set(entered)
    finally:
        base.pager.close()
