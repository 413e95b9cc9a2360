"""Plans: what is counted where, the choice that is made, ways out that work, and other machines."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
from models import VOCABULARY, byte_tokenizer, lively_model, save_base
from transformers import AutoConfig, AutoModelForCausalLM

from deltaw import api, hardware, planning, terminal, training
from deltaw.adapter import LoraSpec, choose, inject, new_adapter
from deltaw.adapter.weight import stored_tensors
from deltaw.base.builtin import cache_folder
from deltaw.base.formed import stored_dtype
from deltaw.base.load import load, most_together
from deltaw.base.shapes import outline
from deltaw.base.stream import blocks_of
from deltaw.config import make_settings, parse_bytes, steps_between
from deltaw.engine.prepare import DEFAULT_MICRO_TOKENS, SHARING_PRODUCTS, sketch_run
from deltaw.engine.run import create_run
from deltaw.engine.watcher import Watcher
from deltaw.errors import DoesNotFitError, UsageError
from deltaw.kernels import compiled
from deltaw.plan import pace
from deltaw.plan.choose import Room, _changes, _choices, _plan, _wanted_pages, make_plan
from deltaw.plan.demand import Choice, Demand, Pass
from deltaw.plan.devices import DEVICES
from deltaw.plan.memory import (
    FP32_GAPS,
    MERGED_LOGITS,
    MERGED_POSITIONS,
    PARTS,
    PRODUCT_BYTES,
    RUNNING_BYTES,
    base_bytes,
    memory,
)
from deltaw.plan.pace import Pace, Timed, measure_pace
from deltaw.plan.speed import Clock

MB = 1_000_000
# One block of the small models: 2 ms for 64 tokens and 8 ms for 512, a third of it forward.
PACE = Pace("kernels", (Timed(64, 0.0007, 0.002), Timed(512, 0.0027, 0.008)), 1e-5, 1e-4, 1e-9, 1e-10)


@pytest.fixture
def demand(llama_folder, chats, tmp_path):
    """A run of a small base over the tests' chats, as far as it is known before the base is opened."""

    def make(**changes):
        given = {"model": str(llama_folder), "data": [str(chats)], "dtype": "float32", "rank": 4, "steps": 3, **changes}
        settings = make_settings({**given, "out": str(tmp_path / f"run{len(list(tmp_path.iterdir()))}")})
        sketch = sketch_run(create_run(settings), settings, Watcher())
        return Demand(sketch.outline, settings, sketch.targets, sketch.data)

    return make


def room(limit, fixed=0):
    return Room(limit, "--memory", fixed)


def plan(demand, limit, fixed=0):
    return make_plan(demand, room(limit, fixed), Clock(demand, PACE))


def needed(demand, choice):
    """The limit under which this choice just fits: the upper end of what its peak may be."""
    return memory(demand, choice, "kernels", 0).needed_bytes


# -- shapes and memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gemma3", "gpt_neox", "gpt2", "mixtral", "mamba", "rwkv"])
def test_a_base_takes_what_its_plan_counts_whatever_it_is_stored_in(kind, stored, demand, tmp_path):
    lively_model(kind).to(stored).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    base = api.load(tmp_path / "base", dtype="float32").base
    biases = [parameter for name, parameter in base.model.named_parameters() if name.endswith("bias")]
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*stored_tensors(base.model), *biases)}
    if kind in ("llama", "gemma3"):
        assert (sum(held.values()) < 3 * base.parameters) == (stored != torch.float32)
    counted = base_bytes(demand(model=str(tmp_path / "base")), Choice(1024))
    assert counted == pytest.approx(sum(held.values()), rel=1e-3)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gemma3", "gpt_neox", "gpt2", "qwen3_moe", "phi3"])
def test_an_outline_counts_what_the_opened_model_holds(kind, tmp_path):
    known = outline(save_base(tmp_path / kind, kind))
    assert all(parameter.is_meta for parameter in known.model.parameters())
    base = api.load(tmp_path / kind).base
    assert known.parameters == base.parameters and known.head_shape[0] == base.vocabulary
    assert known.layers == 2 and known.hidden == 32 and known.heads == 4
    assert known.context_tokens == base.context_tokens and stored_dtype(known.folder) == torch.float32
    linear = sum(
        m.weight.numel()
        for n, m in base.model.named_modules()
        if isinstance(m, torch.nn.Linear) and m is not base.model.get_output_embeddings()
    )
    assert known.linear_parameters == linear  # of experts none, though tokens are multiplied with some
    other = {"gpt2": 2 * 12 * 32 * 32, "qwen3_moe": 2 * 2 * 3 * 24 * 32}  # Conv1D; two experts of three weights each
    assert known.product_parameters == linear + other.get(kind, 0)


def test_every_choice_changes_the_parts_that_it_should_and_no_other(demand):
    asked = demand(micro_tokens=256)
    plain = memory(asked, Choice(256), "kernels", 100 * MB).phases["step"]
    assert set(plain) == set(PARTS) and plain["fixed"] == 100 * MB + RUNNING_BYTES
    for choice, lower in (
        (Choice(128), {"activations", "loss", "workspace"}),
        (Choice(256, recompute=2), {"activations"}),
        (Choice(256, stream=True), {"base"}),
    ):
        other = memory(asked, choice, "kernels", 100 * MB).phases["step"]
        assert {part for part in PARTS if other[part] < plain[part]} >= lower - {"loss"}
        assert all(other[part] == plain[part] for part in set(PARTS) - lower)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "olmo2"])
def test_what_is_counted_for_backward_is_what_the_blocks_keep(kind, demand, tmp_path):
    """To 10 %: the last norm's input and the angles are not counted."""
    asked = demand(model=str(save_base(tmp_path / kind, kind)))
    T, spec = 97, LoraSpec(rank=4)
    counted = memory(asked, Choice(256), "kernels", 0).phases["step"]["activations"] / FP32_GAPS["kernels"][0]
    base, kept = load(tmp_path / kind, dtype="float32"), {}
    with inject(base.model, new_adapter(choose(base.model, spec), spec, 0), trainable=True) as injection:
        injection.train(True)
        lasting = {x.data_ptr() for x in (*base.model.parameters(), *(x for _, _, x in injection.trained()))}

        def keep(x):
            storage = x.untyped_storage()
            if storage.data_ptr() not in lasting:
                kept[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            hidden = base.hidden_states(torch.arange(T), torch.arange(T), (0, 40, T))
    assert base.way == "kernels" and hidden.requires_grad
    assert 1 <= sum(kept.values()) / T / (counted / asked.heaviest(256).tokens) < 1.1


def test_a_base_in_memory_a_streamed_and_a_quantised_one_are_counted_by_their_weights(demand):
    asked = demand()
    known = asked.outline
    assert base_bytes(asked, Choice(64)) == 4 * known.parameters
    assert base_bytes(asked, Choice(64, stream=True)) == 4 * known.block_parameters
    small = base_bytes(asked, Choice(64, quant="nf4"))
    assert small < base_bytes(asked, Choice(64, quant="int8")) < base_bytes(asked, Choice(64))
    assert 4 * known.parameters - small == pytest.approx(known.product_parameters * (4 - 0.516), rel=0.01)


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_a_streamed_base_what_is_cast_stays_in_memory_but_for_an_embedding_of_its_own(demand, dtype, quant):
    asked = demand(dtype=dtype)
    known, b = asked.outline, asked.dtype.itemsize
    assert stored_dtype(known.folder) == torch.float32
    looked_up = known.model.get_input_embeddings().weight.numel()
    rest = b * (known.parameters - known.layers * known.block_parameters - looked_up) if dtype == "bfloat16" else 0
    choice = Choice(64, stream=True, quant=quant)
    assert base_bytes(asked, choice) == asked.block_bytes(choice) + rest
    assert asked.may_stream("nf4") and asked.may_stream("none")
    base = load(known.folder, dtype=dtype, quant=quant, stream=True)
    base.pager.close()
    if quant == "none":  # bitsandbytes' tables weigh more than layers as small as these
        assert asked.block_bytes(choice) == sum(t.nbytes for t in stored_tensors(blocks_of(base.model)[0]))
    cast = [
        t for module in (base.model.get_output_embeddings(), base.model.base_model.norm) for t in stored_tensors(module)
    ]
    assert rest in (0, sum(tensor.nbytes for tensor in cast))


def test_experts_are_not_counted_as_quantised(demand, tmp_path):
    asked = demand(model=str(save_base(tmp_path / "moe", "qwen3_moe")))
    known = asked.outline
    saved = base_bytes(asked, Choice(64)) - base_bytes(asked, Choice(64, quant="nf4"))
    assert saved == pytest.approx(known.linear_parameters * (4 - 0.516), rel=0.02)
    assert known.linear_parameters < known.product_parameters


def test_more_blocks_than_there_are_cannot_be_computed_twice(demand):
    assert demand(recompute=99).settings.recompute == 2


def test_passes_that_share_a_reading_cost_one_reading_and_the_inputs_of_all(demand, llama_folder, monkeypatch):
    monkeypatch.setenv(hardware.REMEMBERED, str(SHARING_PRODUCTS))
    asked = dataclasses.replace(demand(batch_tokens=1024, micro_tokens=20), longest_tokens=20)
    shared, apart = Choice(20, recompute=2, stream=True), Choice(20, recompute=1, stream=True)
    base = load(llama_folder, dtype="float32", stream=True)
    base.recompute(2)
    most = base.tokens_a_reading
    base.pager.close()
    assert asked.tokens_a_reading(shared, "kernels") == pytest.approx(most, rel=0.02) and 80 <= most < 100
    assert {asked.tokens_a_reading(*other) for other in ((apart, "kernels"), (shared, "modules"))} == {0}
    kept = memory(asked, shared, "kernels", 0).phases["step"]["activations"]
    alone = memory(asked, shared, "modules", 0).phases["step"]["activations"]
    assert (2 + 1) * 32 * 4 * most <= kept and alone / FP32_GAPS["modules"][0] < kept / FP32_GAPS["kernels"][0]
    passes = [Pass((20,), 5)] * 8
    clock = Clock(asked, PACE)
    clock.__dict__["disk_bytes_per_second"] = 2 * 2 * base_bytes(asked, shared)  # a reading takes a second
    assert clock.step(apart, passes) == pytest.approx(8, rel=0.01)
    assert clock.step(shared, passes) == pytest.approx(2, rel=0.01)


def test_the_heaviest_pass_is_the_longest_documents_that_fit_together(demand):
    asked = demand()
    lengths = np.sort(asked.data["train"].store.lengths)[::-1]
    assert asked.heaviest(1).lengths == (int(lengths[0]),)
    heavy = asked.heaviest(int(lengths[:3].sum()))
    assert heavy.lengths == tuple(int(n) for n in lengths[:3])
    assert 0 < heavy.labelled < heavy.tokens
    cut = dataclasses.replace(asked, longest_tokens=20).heaviest(40)
    assert cut.lengths == (20, 20)


# -- choices ----------------------------------------------------------------------------------------------------------


def test_documents_that_come_again_within_a_pass_are_counted_again(demand):
    """A run of three steps goes on over the ends of epochs; one of one epoch does not."""
    again, once = demand(batch_tokens=8192, micro_tokens=8192), demand(batch_tokens=8192, micro_tokens=8192, steps=None)
    lengths = again.data["train"].store.lengths
    assert once.heaviest(8192).tokens == lengths.sum() < 8192 - lengths.max()
    assert 8192 - lengths.max() < again.heaviest(8192).tokens <= 8192
    assert [sum(one.tokens for one in step) for step in once.steps(8192, share=False)] == [lengths.sum()]
    assert all(sum(one.tokens for one in step) > 8192 - lengths.max() for step in again.steps(8192, share=False))


def test_as_many_evaluations_are_counted_as_the_run_has(demand):
    assert demand(steps=12).evaluations == 6
    assert demand(steps=12, eval_steps=1).evaluations == 12
    assert demand(steps=3, eval_steps=2).evaluations == 2
    assert demand(steps=None, minutes=1).evaluations == 6


def test_what_fits_is_left_as_it_is(demand):
    asked = demand()
    made = plan(asked, 10**12)
    assert made.choice == Choice(int(asked.settings.micro_tokens))
    assert made.calibrated and made.steps == 3 and made.run_seconds > 3 * made.step_seconds > 0


def test_the_fastest_exact_choice_that_fits_is_made_and_less_memory_never_costs_less_time(demand):
    asked = demand()
    least = needed(asked, Choice(64, 2, True))
    most = needed(asked, Choice(int(asked.settings.micro_tokens)))
    seconds, exact = [], [choice for choice in _choices(asked) if choice.quant == "none"]
    for number, limit in enumerate(np.linspace(most, least, 12).astype(int).tolist()):
        made = plan(asked, limit)
        assert made.needed_bytes <= limit and made.choice.quant == "none"
        seconds.append(made.step_seconds)
        if number % 4:
            continue
        others = [_plan(asked, choice, room(limit), Clock(asked, PACE)) for choice in exact]
        fastest = min(other.step_seconds for other in others if other.needed_bytes <= limit)
        assert made.step_seconds == fastest or made.choice == exact[0], "what fits as it stands is left so"
    assert seconds == sorted(seconds)


def test_a_streamed_run_waits_for_what_is_read_again_where_pages_of_libraries_have_no_room(demand):
    asked = demand(stream=True, recompute=0, micro_tokens=64)
    pages = 100 * MB
    tight = memory(asked, Choice(64, stream=True), "kernels", pages, pages).needed_bytes
    assert 0 < tight - needed(asked, Choice(64, stream=True)) < pages / 2
    rooms = [Room(tight + more, "--memory", pages, file_bytes=pages) for more in (0, pages // 4, 2 * pages, 3 * pages)]
    clock = Clock(asked, PACE)
    clock.__dict__["disk_bytes_per_second"] = 1e9
    seconds = [make_plan(asked, room, clock).step_seconds for room in rooms]
    assert seconds[0] > seconds[1] > seconds[2] == seconds[3]


def test_a_streamed_base_waits_for_the_disk_only_where_its_blocks_do_not_stay_in_memory(demand):
    asked = demand(stream=True, recompute=0, micro_tokens=64)
    size = asked.outline.layers * asked.block_bytes(Choice(64, stream=True))
    tight, clock = needed(asked, Choice(64, stream=True)), Clock(asked, PACE)
    tight += _wanted_pages(asked, Choice(64, stream=True), room(tight))
    clock.__dict__["disk_bytes_per_second"] = size / 10
    seconds = [make_plan(asked, room(tight + more), clock).step_seconds for more in (size - 1, size, 10**12)]
    assert seconds[0] > 20 > 1 > seconds[1] == seconds[2]


def test_what_the_user_set_is_not_changed(demand):
    asked = demand(micro_tokens=512, recompute=0, stream=False, quant="none")
    peak = needed(asked, Choice(512))
    assert plan(asked, peak).choice == Choice(512)
    with pytest.raises(DoesNotFitError):
        plan(asked, peak - 1)


def test_a_refusal_names_three_ways_out_and_each_of_them_fits(demand):
    asked = demand()
    with pytest.raises(DoesNotFitError) as caught:
        plan(asked, 1000, fixed=50 * MB)
    ways = re.findall(r"^  - (.*)$", str(caught.value), re.M)
    least = re.search(r"at least (\S+)", str(caught.value))[1]
    assert len(ways) == 3 and ways[0] == f"--memory {least}"
    for way in ways:
        flags = dict(re.findall(r"--([a-z-]+) (\S+)", way))
        limit = parse_bytes(flags.pop("memory", "1000b"))
        changed = {name.replace("-", "_"): int(value) for name, value in flags.items()}
        assert plan(demand(**changed, allow_lost=1.0), limit, fixed=50 * MB).needed_bytes <= limit


def test_quantised_storage_is_offered_where_it_was_not_tried(demand, monkeypatch):
    offered = "--quant nf4"
    assert not any(text.startswith(offered) for text, _ in _changes(demand()))  # by rule it was among the choices
    asked = demand(quant="none")
    changed = {text: other for text, other in _changes(asked) if text.startswith(offered)}
    assert list(changed) == [offered] and asked.settings.quant == "none"
    assert {choice.quant for choice in _choices(changed[offered])} == {"nf4"}
    monkeypatch.setattr("deltaw.plan.choose.has_bitsandbytes", lambda: False)
    assert f"{offered} (pip install bitsandbytes)" in dict(_changes(demand()))


def test_bf16_is_offered_where_fp32_was_chosen_for_its_speed_and_bf16_is_not_emulated(demand, monkeypatch):
    offered = "--dtype bfloat16"
    monkeypatch.setattr("deltaw.base.load.compute_dtype", lambda *_: torch.float32)
    monkeypatch.setattr(hardware, "emulates_bf16", lambda _: True)
    assert offered not in dict(_changes(demand(dtype="auto")))
    monkeypatch.setattr(hardware, "emulates_bf16", lambda _: False)
    assert offered not in dict(_changes(demand()))  # fp32 was asked for
    asked = demand(dtype="auto")
    changed = dict(_changes(asked))[offered]
    assert (asked.dtype, changed.dtype) == (torch.float32, torch.bfloat16)
    assert base_bytes(changed, Choice(64)) == base_bytes(asked, Choice(64)) / 2
    asked.settings.dtype = "auto"
    planning.place_on("t4-16gb", asked.settings)
    assert asked.settings.device == "cuda" and offered not in dict(_changes(asked))  # what is here says nothing of it


def test_a_base_that_cannot_be_streamed_is_refused_before_it_is_opened(demand, tmp_path, monkeypatch):
    """Conv1D layers would be cast when they are opened."""
    folder = str(save_base(tmp_path / "gpt2", "gpt2"))
    with pytest.raises(UsageError, match="cannot be read block by block"):
        planning.plan(model=folder, data=demand().settings.data, dtype="bfloat16", stream=True, steps=1)
    monkeypatch.setattr("deltaw.base.stream.sys.platform", "darwin")
    with pytest.raises(UsageError, match="needs Linux and a CPU"):
        load(folder, dtype="float32", stream=True)


@pytest.mark.parametrize(
    ("fast", "emulated", "said"),
    [
        (torch.bfloat16, False, ""),
        (torch.float32, True, "bfloat16 is emulated on this cpu"),
        (torch.float32, False, "in bfloat16 half as fast as in float32"),
    ],
)
def test_a_dtype_that_is_slow_here_is_said(fast, emulated, said, monkeypatch, tmp_path, llama_folder, chats):
    heard = []
    watcher = Watcher()
    watcher.say = heard.append
    monkeypatch.setattr(hardware, "compute_dtype", lambda *_: fast)
    monkeypatch.setattr(hardware, "emulates_bf16", lambda _: emulated)
    given = {"model": str(llama_folder), "data": [str(chats)], "dtype": "bfloat16", "device": "cpu", "steps": 1}
    settings = make_settings({**given, "out": str(tmp_path / "run")})
    sketch_run(create_run(settings), settings, watcher)
    about = [text for text in heard if "bfloat16" in text]
    assert len(about) == bool(said) and said in "".join(about)


def test_no_more_memory_is_offered_than_the_machine_could_give(demand):
    asked = demand()
    small = Room(1000, "RAM", 50 * MB, most_bytes=60 * MB)
    with pytest.raises(DoesNotFitError) as caught:
        make_plan(asked, small, Clock(asked, PACE))
    ways = re.findall(r"^  - (.*)$", str(caught.value), re.M)
    assert len(ways) == 3 and "--memory" not in str(caught.value)
    assert re.fullmatch(r"\d+MB of memory, which is more than is free \(RAM\)", ways[0])


def test_another_rank_is_no_way_out_for_a_run_that_goes_on_with_an_adapter(demand):
    asked = demand()
    asked.settings.adapter = "somewhere"
    with pytest.raises(DoesNotFitError) as caught:
        plan(asked, 1000)
    assert "--rank" not in str(caught.value)


def test_what_may_be_taken_is_what_is_free_and_what_is_held_but_for_pages_of_files(demand, monkeypatch):
    """Those count as free already. A limit that is asked for is kept also where it is all that there is."""
    seen = dataclasses.replace(hardware.look(), available_bytes=700 * MB, memory_limit_source="cgroup", gpu=None)
    monkeypatch.setattr(hardware, "look", lambda: seen)
    monkeypatch.setattr(hardware, "rss_bytes", lambda: 500 * MB)
    monkeypatch.setattr(hardware, "file_rss_bytes", lambda: 200 * MB)
    settings = demand().settings
    free = planning._room(settings, None)
    assert free.limit_bytes == round(0.95 * 1000 * MB) and free.source == "cgroup"
    settings.memory = "1000MB"
    assert planning._room(settings, None).limit_bytes == 1000 * MB
    settings.memory = "1100MB"
    assert planning._room(settings, None).source == "cgroup"
    settings.memory, settings.device = None, "cuda"
    there = planning._room(settings, DEVICES["h200"])
    assert there.fixed_bytes == 0 and there.limit_bytes == round(0.95 * (141e9 - planning.GPU_CONTEXT_BYTES))


# -- time -------------------------------------------------------------------------------------------------------------


def test_a_block_is_measured_for_two_passes_and_remembered(demand, monkeypatch):
    asked, timed, time = demand(), [], pace._measure
    monkeypatch.setattr(pace, "_measure", lambda *given: timed.append(True) or time(*given))
    shutil.rmtree(cache_folder() / "pace", ignore_errors=True)
    found = measure_pace(asked)
    assert timed == [True]
    assert found.way == "kernels" and len(found.timed) == 2 and found.label_seconds > 0
    usual, part = (timed.tokens for timed in found.timed)
    assert part <= usual // 4 + 2
    measured = []
    monkeypatch.setattr(pace, "_measure", lambda *_: measured.append(True) or found)
    assert measure_pace(asked) == found and not measured
    for file in (cache_folder() / "pace").iterdir():
        file.write_text('{"way": "kernels", "speed": 3}')  # of another deltaw, or broken
    assert measure_pace(asked) == found and measured == [True]
    other = dataclasses.replace(hardware.look(), gpu=hardware.Gpu("another", 10**10, (9, 0), True))
    monkeypatch.setattr(hardware, "look", lambda: other)
    assert measure_pace(asked) == found and len(measured) == 2


def test_blocks_are_timed_in_the_way_in_which_the_run_will_compute(demand):
    assert measure_pace(demand(dropout=0.1)).way == "modules"
    assert Clock(demand(dropout=0.1), None, DEVICES["h200"]).way == "modules"
    assert Clock(demand(), None, DEVICES["h200"]).way == "kernels"


def test_times_lie_on_the_line_through_what_was_measured():
    assert PACE.block_seconds(512) == 0.008 and PACE.block_seconds(64) == 0.002
    assert PACE.block_seconds(288) == pytest.approx(0.005)
    assert PACE.block_seconds(512, recompute=True) == pytest.approx(0.0107)
    assert PACE.block_seconds(32) == pytest.approx(0.002 - 32 * 0.006 / 448)
    noisy = Pace("kernels", (Timed(64, 0.1, 0.1), Timed(512, 0.01, 0.02)), 0, 0, 0, 0)
    assert noisy.block_seconds(256) == pytest.approx(0.01)


def test_recomputing_and_quantising_take_longer_and_streaming_waits_for_the_disk(demand):
    asked = demand()
    clock, passes = Clock(asked, PACE), [Pass((100, 50), 30)]
    plain = clock.step(Choice(256), passes)
    assert plain == pytest.approx(2 * PACE.block_seconds(150) + 30 * 1e-5 + 1e-4)
    assert clock.step(Choice(256, recompute=1), passes) > plain
    assert clock.step(Choice(256, quant="nf4"), passes) > plain
    held_out = Demand(asked.outline, asked.settings, asked.targets, {**asked.data, "eval": asked.data["train"]})
    weights, counts = asked.outline.linear_parameters, []
    for size in (256, 128):
        evaluation = Clock(held_out, PACE).evaluation
        formed = evaluation(Choice(size, quant="nf4")) - evaluation(Choice(size))
        counts.append(len(held_out.evaluation(size, share=True)))
        assert formed == pytest.approx(counts[-1] * weights * 1e-9)
    assert 1 < counts[0] < counts[1]
    alone = dataclasses.replace(PACE, way="modules")  # as fast, but each document computes all of its tokens
    assert Clock(held_out, alone).evaluation(Choice(256)) > Clock(held_out, PACE).evaluation(Choice(256))
    elsewhere = Clock(held_out, None, DEVICES["h200"]).evaluation
    assert elsewhere(Choice(256, quant="nf4")) > elsewhere(Choice(256))
    as_read = evaluation(Choice(256))
    held_out.__dict__.update(stored_dtype=torch.bfloat16, keeps_stored=True)
    assert evaluation(Choice(256)) - as_read == pytest.approx(counts[0] * weights * 1e-10)
    clock.__dict__["disk_bytes_per_second"] = 1000.0
    read = 2 * 2 * asked.outline.block_parameters * 4 / 1000
    assert clock.step(Choice(256, stream=True), passes) == pytest.approx(read + 1e-4)


def test_nothing_is_timed_before_memory_is_bounded(llama_folder, chats, monkeypatch):
    hardware.tune_memory.cache_clear()
    bounded = []
    monkeypatch.setattr(
        planning, "measure_pace", lambda _: bounded.append(hardware.tune_memory.cache_info().currsize) or PACE
    )
    planning.plan(model=llama_folder, data=[chats], steps=3)
    assert bounded == [1]


@pytest.mark.parametrize(
    ("given", "shared_bytes", "more"),
    [
        ({}, 0, False),
        ({"stream": True}, 10**9, True),
        ({"memory": "100kB"}, 0, True),
        ({"memory": "100kB"}, 10**9, False),
    ],
    ids=["in memory", "streamed", "large", "small"],
)
def test_more_products_are_remembered_where_passes_may_share_a_reading(
    llama_folder, tmp_path, monkeypatch, given, shared_bytes, more
):
    """Streamed, or a large base that takes much of the memory; these documents alone need fewer."""
    monkeypatch.setattr("deltaw.engine.prepare.SHARED_BYTES", shared_bytes)
    data = tmp_path / "short.jsonl"
    data.write_text("".join(json.dumps({"prompt": "a", "completion": f"{n:03}"}) + "\n" for n in range(60)))
    monkeypatch.setenv(hardware.REMEMBERED, "")
    monkeypatch.delenv(hardware.REMEMBERED)
    hardware.tune_memory.cache_clear()
    monkeypatch.setattr(planning, "measure_pace", lambda _: PACE)
    with contextlib.suppress(DoesNotFitError):
        planning.plan(model=llama_folder, data=[data], steps=3, dtype="bfloat16", **given)
    if more:
        assert hardware.remembered_products() >= SHARING_PRODUCTS and most_together() == 4
    else:
        assert hardware.remembered_products() < SHARING_PRODUCTS


def test_a_plan_counts_each_product_that_is_remembered(demand, monkeypatch):
    asked, held = demand(dtype="bfloat16"), {}
    for products in (64, 160):
        monkeypatch.setenv(hardware.REMEMBERED, str(products))
        held[products] = memory(asked, Choice(256), "kernels", 0).phases["step"]["fixed"]
    assert held[160] - held[64] == 96 * PRODUCT_BYTES


def test_who_runs_in_a_process_that_remembers_too_few_products_is_told(demand, monkeypatch):
    monkeypatch.setenv(hardware.REMEMBERED, "16")
    said = []
    monkeypatch.setattr(Watcher, "say", lambda _, line: said.append(line))
    demand(dtype="float32")
    assert said == []
    demand(dtype="bfloat16")
    assert any("remembers 16 prepared products, and passes of these documents need" in line for line in said)


@pytest.mark.parametrize("head_width", [8, 32])
@pytest.mark.parametrize("length", [60, 1000])
def test_longer_documents_have_more_products_remembered_unless_attention_is_a_whole(
    tmp_path, monkeypatch, length, head_width
):
    base = save_base(tmp_path / "base")
    if head_width != 8:
        config = AutoConfig.from_pretrained(base, head_dim=head_width)
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
    assert outline(str(base)).head_width == head_width
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"prompt": str(n), "completion": "x" * length}) + "\n" for n in range(40)))
    monkeypatch.setenv(hardware.REMEMBERED, "")
    monkeypatch.delenv(hardware.REMEMBERED)
    hardware.tune_memory.cache_clear()
    monkeypatch.setattr(planning, "measure_pace", lambda _: PACE)
    planning.plan(model=base, data=[data], steps=3, stream=False, max_length=2048, dtype="bfloat16")
    whole = compiled.attends(torch.device("cpu"), torch.bfloat16, head_width)
    assert (hardware.remembered_products() > 80) == (length == 1000 and not whole)


# -- from outside -----------------------------------------------------------------------------------------------------


def test_a_plan_reads_no_weight_and_leaves_nothing_behind(llama_folder, chats, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deltaw.base.load.open_model", lambda *_: pytest.fail("opened"))
    made = planning.plan(model=llama_folder, data=[chats], steps=3)
    assert list(tmp_path.iterdir()) == []
    written = made.as_dict()
    low, high = written["peak_bytes_interval"]
    assert low < written["peak_bytes"] < high
    assert list(written["phases"]) == list(written["phases_interval"]) == ["plan", "load", "step", "evaluation", "save"]
    step, (low, high) = written["phases"]["step"], written["phases_interval"]["step"]
    assert low < sum(step.values()) < high and step["factors"] == 1.5 * step["optimiser"] > 0


@pytest.mark.parametrize("name", DEVICES)
def test_other_machines_are_planned_by_their_data_sheet_and_marked(llama_folder, chats, name):
    made = planning.plan(model=llama_folder, data=[chats], steps=3, on=name)
    assert not made.calibrated and made.machine == name and made.step_seconds > 0
    assert made.room.limit_bytes < DEVICES[name].memory_bytes
    assert made.choice.micro_tokens == min(1024, DEFAULT_MICRO_TOKENS[DEVICES[name].kind])
    on_gpu, (low, high) = DEVICES[name].kind == "cuda", made.as_dict()["peak_bytes_interval"]
    assert (made.memory.measure == "memory reserved on the GPU") == on_gpu
    assert ((high - low) / made.memory.peak_bytes > 0.5) == on_gpu, "no peak was measured on a GPU"


def test_merging_is_told_of_and_is_no_phase_of_the_run(llama_folder, chats, capsys):
    made = planning.plan(model=llama_folder, data=[chats], steps=3, dtype="float32").as_dict()
    stored = sum(file.stat().st_size for file in llama_folder.glob("*.safetensors"))
    assert made["merging"]["base"] == pytest.approx(stored, rel=0.1) and "merging" not in made["phases"]
    logits = MERGED_LOGITS * MERGED_POSITIONS * VOCABULARY * 4  # more than the shard's sums
    assert logits < made["merging"]["workspace"] < 1.2 * logits and made["merging"]["factors"] > 0
    cast = planning.plan(model=llama_folder, data=[chats], steps=3, dtype="bfloat16").as_dict()["merging"]
    assert cast["base"] < made["merging"]["base"] and cast["workspace"] == made["merging"]["workspace"]
    terminal.plan_page(terminal.make_console(), made)
    assert re.search(r"^merging .* [0-9.]+ [MG]B$", capsys.readouterr().out, re.M)


def test_another_machine_is_planned_with_its_own_passes_and_ways_whatever_is_here(llama_folder, tmp_path, monkeypatch):
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps({"text": f"{n} " + "one two three " * 120}) + "\n" for n in range(40)))
    given = {"model": llama_folder, "data": [long], "steps": 3, "max_length": 256, "batch_tokens": 8192}
    passes = {name: planning.plan(**given, on=name).choice.micro_tokens for name in ("rtx4090-24gb", "cpu-16core-bf16")}
    assert passes == {"rtx4090-24gb": 8192, "cpu-16core-bf16": 1024}
    assert planning.plan(**given, on="cpu-8core-avx2", stream=True).choice.stream
    with pytest.raises(UsageError, match="block by block on m-cpu-8core"):
        planning.plan(**given, on="m-cpu-8core", stream=True)
    recipe = make_settings({**given, "device": "cuda"})  # a recipe for that machine names what is not here
    assert planning.plan(recipe, on="rtx4090-24gb").choice.micro_tokens == 8192


@pytest.mark.parametrize(("steps", "evaluations"), [(1, 1), (3, 3), (7, 4), (13, 5), (120, 6)])
def test_a_plan_counts_the_evaluations_that_the_run_will_have(demand, steps, evaluations):
    asked = demand(steps=steps)
    assert asked.evaluations == evaluations == -(-steps // steps_between(steps))


def test_a_dtype_that_a_data_sheet_does_not_tell_of_is_refused(llama_folder, chats):
    with pytest.raises(UsageError, match="read for bfloat16; leave out --dtype"):
        planning.plan(model=llama_folder, data=[chats], steps=3, on="h200", dtype="float32")


def test_an_unknown_machine_is_refused_with_the_known_ones(llama_folder, chats):
    with pytest.raises(UsageError, match="rtx4090-24gb"):
        planning.plan(model=llama_folder, data=[chats], on="cray")


def test_a_run_keeps_its_plan_and_carries_it_out_and_says_so(llama_folder, chats, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "rss_bytes", lambda: 400 * MB)  # what other tests left here says nothing of the run
    said = []

    class Listening(Watcher):
        def planned(self, plan):
            said.append(plan)

    given = {"model": llama_folder, "data": [chats], "steps": 2, "rank": 4}
    plain = training.train(out=tmp_path / "plain", watcher=Listening(), **given)
    assert said[0]["choice"]["recompute"] == 0 and said[0]["peak_bytes"] > 0
    summary = plain.read_summary()
    assert summary["plan"] == said[0]
    tight = said[0]["peak_bytes_interval"][1] - said[0]["phases"]["step"]["activations"] // 2
    fitted = training.train(out=tmp_path / "fitted", memory=f"{tight}B", watcher=Listening(), **given)
    settings = fitted.settings()
    assert said[1]["choice"] != said[0]["choice"] == said[1]["unfitted"]["choice"] and "unfitted" not in said[0]
    usual = terminal.human_bytes(said[0]["peak_bytes"])
    assert f"; as it stands {usual} and " in list(terminal.plan_lines(said[1]))[1]
    assert len(list(terminal.plan_lines(said[0]))) == 1, "nothing was done to fit"
    for name, value in said[1]["choice"].items():
        assert getattr(settings, name) == value


@pytest.mark.parametrize("planned", [False, True], ids=["before the plan", "after it"])
def test_a_run_that_was_stopped_before_its_base_was_open_goes_on_by_its_plan(
    planned, llama_folder, chats, tmp_path, monkeypatch
):
    monkeypatch.setattr(hardware, "rss_bytes", lambda: 400 * MB)
    given = {"model": llama_folder, "data": [chats], "steps": 2, "rank": 4}
    known = planning.plan(**given).as_dict()
    tight = known["peak_bytes_interval"][1] - known["phases"]["step"]["activations"] // 2
    part = "deltaw.engine.train.prepare_run" if planned else "deltaw.api.plan_sketch"
    with monkeypatch.context() as stopping, pytest.raises(KeyboardInterrupt):
        stopping.setattr(part, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        training.train(out=tmp_path / "run", memory=f"{tight}B", **given)
    assert (tmp_path / "run" / "plan.json").exists() == planned
    run = training.train(resume=tmp_path / "run")
    choice, settings = json.loads(run.plan.read_text())["choice"], run.settings()
    assert choice != known["choice"] and all(getattr(settings, name) == value for name, value in choice.items())


@pytest.mark.parametrize(
    ("text", "number"),
    [("4GB", 4 * 10**9), ("900 MiB", 900 << 20), ("1.5gib", 3 << 29), ("77B", 77), ("1622210340B", 1622210340)],
)
def test_sizes_are_read_with_their_units(text, number):
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "4", "4G", "-1GB", "0MB", "1e9B", "4 GBs", "nanGB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="must be a number with a unit"):
        parse_bytes(text)


@pytest.mark.parametrize(("kind", "way"), [("llama", "kernels"), ("gemma3", "kernels"), ("gpt_neox", "modules")])
def test_a_refusal_needs_no_timing_because_the_way_is_read_from_the_parts(kind, way, tmp_path, chats, monkeypatch):
    monkeypatch.setattr(planning, "measure_pace", lambda _: pytest.fail("timed"))
    seen = []
    usual = planning.likely_way
    monkeypatch.setattr(planning, "likely_way", lambda demand: seen.append(usual(demand)) or seen[-1])
    with pytest.raises(DoesNotFitError, match="at least"):
        planning.plan(model=save_base(tmp_path / kind, kind), data=[chats], steps=3, memory="1MB")
    assert seen == [way]


def test_a_base_whose_weights_do_not_stand_in_its_files_as_they_are_used_is_not_planned_to_be_streamed(
    demand, tmp_path
):
    assert demand().may_stream("none") and demand().may_stream("nf4")
    apart = demand(model=str(save_base(tmp_path / "experts", "qwen3_moe")))
    assert apart.as_stored and not apart.may_stream("none") and not apart.may_stream("nf4")
    assert not any(choice.stream for choice in _choices(apart))


def test_documents_longer_than_a_base_has_positions_are_refused(tmp_path):
    folder, data = save_base(tmp_path / "gpt2", "gpt2"), tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": f"{n} one two" * (5 + 40 * (n == 3))}) + "\n" for n in range(12)))
    with pytest.raises(UsageError, match=r"knows 256 positions\. Give --max-length 256"):
        planning.plan(model=folder, data=data, max_length=600, steps=1)
    assert planning.plan(model=folder, data=data, max_length=256, steps=1).steps == 1
