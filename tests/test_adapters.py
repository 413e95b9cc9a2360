"""Ranks measured, adapters compressed, summed and compared, sweeps: on a small real base, as a program calls them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading

import numpy as np
import pytest
import torch
from torch import nn

from deltaw import adapters, api, compression, hardware, planning, ranks, sweeps, training
from deltaw.adapter import Factors, LoraSpec, choose, inject, new_adapter, read_adapter, write_adapter
from deltaw.analysis.spectrum import matrices, spectra
from deltaw.analysis.truncate import truncate
from deltaw.base import forward
from deltaw.base.forward import plain_attention
from deltaw.config import make_settings
from deltaw.engine.generate import end_tokens, render_prompt
from deltaw.engine.heldout import HeldOut
from deltaw.engine.log import read_metrics
from deltaw.engine.orders import by_activations, by_loss
from deltaw.engine.run import open_run
from deltaw.engine.watcher import Watcher
from deltaw.errors import (
    AdapterError,
    DataError,
    DeltawError,
    DiskError,
    DoesNotFitError,
    Interrupted,
    NotFiniteError,
    UsageError,
)

HERE = {"device": "cpu", "dtype": "float32"}
QUICK = {"steps": 4, "batch_tokens": 256, **HERE}


def dense(adapter, name):
    A, B = matrices(adapter, name)
    return adapter.scale_of(name) * (B @ A)


@pytest.fixture(scope="module")
def learned(tmp_path_factory, llama_folder, chats):
    """A run long enough that the adapter is surely better than its base."""
    out = tmp_path_factory.mktemp("runs") / "learned"
    return training.train(model=llama_folder, data=chats, out=out, rank=4, lr=3e-2, **{**QUICK, "steps": 40})


@pytest.fixture
def held_out(learned, chats, tmp_path):
    return ranks.open_held_out(learned.folder, [chats], None, tmp_path / "tokens", **HERE)


# -- rank --------------------------------------------------------------------------------------------------------------


def test_losses_of_documents_are_those_of_an_evaluation_in_the_order_of_the_sample(learned, held_out, chats):
    losses, tokens = held_out.losses(read_adapter(learned.adapter)), held_out.tokens_D
    whole = api.evaluate(learned.folder, [chats], **HERE)
    assert losses.sum() / tokens.sum() == pytest.approx(whole["loss"], rel=1e-5) and len(losses) == whole["rows"]
    alone = HeldOut(held_out.base, held_out.store, 64)  # other batches, another order
    places = {held_out.store.place(i): loss for i, loss in enumerate(losses)}
    other = alone.losses(read_adapter(learned.adapter))
    for document, loss in enumerate(other):
        assert loss == pytest.approx(places[alone.store.place(document)], rel=1e-4, abs=1e-5)


def test_the_curve_goes_from_the_base_to_the_whole_adapter_and_says_what_it_stands_on(learned, chats):
    found = ranks.rank(learned.folder, [chats], everything=True, **HERE)
    assert [point["rank"] for point in found["points"]] == [1, 2, 4]
    assert found["points"][-1]["gain"] == 1 and found["improvement"]["low"] > 0
    losses = [point["loss"] for point in found["points"]]
    assert found["base_loss"] > losses[0] > losses[-1]
    assert found["points"][-1]["loss"] == pytest.approx(api.evaluate(learned.folder, [chats], **HERE)["loss"], rel=1e-3)
    assert found["documents"] == found["documents_given"] == 60
    assert [need["share"] for need in found["needed"]] == [0.95, 0.99] and found["verdict"]
    json.dumps(found)
    sums, tokens = np.array(found["by_document"]["losses"]), np.array(found["by_document"]["tokens"])
    assert sums.shape == (4, 60) and sums.sum(1) / tokens.sum() == pytest.approx([found["base_loss"], *losses])
    other = ranks.rank(learned.folder, [chats], everything=True, ranks=[3], **HERE)
    assert [point["rank"] for point in other["points"]] == [2, 3, 4]
    assert losses[1] > other["points"][1]["loss"] > losses[2]
    with pytest.raises(UsageError, match="cut to ranks from 1 to 4, not to 0, 5"):
        ranks.rank(learned.folder, [chats], ranks=[0, 2, 5], **HERE)


def test_the_time_it_may_take_bounds_the_documents(learned, chats):
    few = ranks.rank(learned.folder, [chats], seconds=1e-6, **HERE)
    assert few["documents"] == 16 < few["documents_given"]
    assert ranks.allowed_seconds(learned.folder) == pytest.approx(0.15 * learned.read_summary()["train_seconds"])


def test_orders_keep_the_whole_update_and_each_keeps_best_what_it_orders_by(learned, held_out):
    adapter = read_adapter(learned.adapter)
    batches = held_out.batches(0, 30)
    by_input = by_activations(held_out.base, adapter, batches)
    by_gate, worth = by_loss(held_out.base, adapter, spectra(adapter), batches)
    for name in adapter.factors:
        wanted = dense(adapter, name)
        for known in (by_input, by_gate):
            U, sigma, V = known[name]
            assert torch.allclose(U * sigma @ V.mT, wanted, atol=1e-9 * float(wanted.abs().max()) + 1e-12)
        assert (worth[name].sigma_K.diff() <= 0).all() and worth[name].sigma_K.isfinite().all()
    # The part of a layer's output that rank 1 loses, over the inputs it was ordered by: less than by plain σ.
    name = next(name for name in adapter.factors if name.endswith("layers.1.mlp.up_proj"))
    inputs = []
    module = held_out.base.model.get_submodule(name)
    with inject(held_out.base.model, adapter, dtype=torch.float32):
        handle = module.register_forward_pre_hook(
            lambda _m, args: inputs.append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for batch in batches:
            held_out.base.hidden_states(batch.tokens_T, batch.positions_T, batch.bounds)
        handle.remove()
    x_TI = torch.cat(inputs).double()
    lost = []
    for known in (spectra(adapter), by_input):
        cut = truncate(adapter, dict.fromkeys(adapter.factors, 1), known)
        lost.append(float((x_TI @ (dense(adapter, name) - dense(cut, name)).mT).norm()))
    assert lost[1] < lost[0]


def test_orders_are_compared_on_documents_that_did_not_order(learned, chats):
    found = ranks.rank(learned.folder, [chats], everything=True, orders=True, **HERE)
    assert found["documents"] + found["documents_for_ordering"] == 60 and found["documents_for_ordering"] == 15
    assert len(found["orders"]) == 4
    for points in found["orders"].values():
        assert points[-1]["gain"] == 1 and all(np.isfinite(point["gain"]) for point in points)


# -- compress ----------------------------------------------------------------------------------------------------------


def test_a_compressed_adapter_at_its_own_rank_gives_the_same_logits(learned, llama_folder, tmp_path):
    record = compression.compress(learned.folder, tmp_path / "same", rank=4)
    assert record["discarded_energy"] < 1e-12 and record["parameters"] == record["parameters_before"]
    tokens_T, logits, base = torch.arange(1, 20), [], api.load(llama_folder, **HERE).base
    base.model.double()  # the files are fp32; in a forward of fp32 its own rounding is as large as what is looked for
    for folder in (learned.adapter, tmp_path / "same"):
        with (
            inject(base.model, read_adapter(folder), dtype=torch.float64),
            plain_attention(base.model),
            torch.no_grad(),
        ):
            logits.append(base.model(input_ids=tokens_T[None], use_cache=False).logits)
    assert float((logits[0] - logits[1]).abs().max()) <= 1e-6 * float(logits[0].abs().max())


def test_rank_budget_and_keep_decide_the_size_and_data_tells_the_loss(learned, chats, tmp_path):
    half = compression.compress(learned.folder, tmp_path / "half", rank=2, data=[chats], **HERE)
    assert half["parameters"] * 2 == half["parameters_before"] and 0 < half["discarded_energy"] < 1
    assert half["loss_base"] > half["loss_after"] >= half["loss_before"] - 1e-4
    size = (learned.adapter / "adapter_model.safetensors").stat().st_size
    small = compression.compress(learned.folder, tmp_path / "small", budget=f"{size * 2 // 3}B")
    assert small["bytes"] <= size * 2 // 3 and small["ranks"]["least"] < small["ranks"]["most"]
    kept = compression.compress(learned.folder, tmp_path / "kept", keep=0.5, data=[chats], **HERE)
    assert kept["retained_gain_interval"][0] >= 0.5 and kept["parameters"] < kept["parameters_before"]
    grown = compression.compress(learned.folder, tmp_path / "grown", rank=8)
    assert grown["discarded_energy"] == 0 and read_adapter(tmp_path / "grown").spec.rank == 8


def test_a_budget_is_kept_whatever_the_names_of_the_layers_are(tmp_path):
    """Of long names, the header takes as much as some ranks do."""
    layers = {f"a_name_of_a_layer_that_is_as_long_as_some_models_have_them_{n}": nn.Linear(24, 24) for n in range(40)}
    spec = LoraSpec(rank=8)
    adapter = new_adapter(choose(nn.ModuleDict(layers), spec), spec, 0)
    for factors in adapter.factors.values():
        factors.B.normal_()
    write_adapter(adapter, tmp_path / "long")
    for budget in (40_000, 60_000):
        found = compression.compress(tmp_path / "long", tmp_path / f"{budget}", budget=f"{budget}B")
        assert 0.8 * budget < found["bytes"] <= budget


def test_healing_trains_what_was_cut(learned, chats, tmp_path):
    cut = compression.compress(learned.folder, tmp_path / "cut", rank=1, data=[chats], **HERE)
    healed = compression.compress(
        learned.folder, tmp_path / "healed", rank=1, data=[chats], heal=10, train_data=[chats], **HERE
    )
    assert healed["loss_after"] < cut["loss_after"] and healed["parameters"] == cut["parameters"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "one of --rank, --keep and --budget"),
        ({"rank": 2, "keep": 0.9}, "one of --rank"),
        ({"keep": 0.9}, "needs --data"),
        ({"keep": 1.5, "data": ["x"]}, "at most 1"),
        ({"rank": 2, "heal": 3}, "belong together"),
        ({"budget": "100B"}, "rank 1 in every layer takes 8KB already"),
        ({"budget": "2XB"}, "must be a number with a unit"),
        ({"rank": 5000}, "lies between 1 and"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_leaves_nothing(learned, tmp_path, given, message):
    with pytest.raises((UsageError, AdapterError), match=message):
        compression.compress(learned.folder, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_measured_rank_is_trained_measured_cut_and_healed(llama_folder, chats, tmp_path):
    given = {"model": str(llama_folder), "data": [str(chats)], "eval_data": [str(chats)], "lr": 3e-2}
    settings = make_settings({**given, **QUICK, "steps": 40, "out": str(tmp_path / "run")})
    found = training.train_measured(settings)
    measured = found["measured"]
    assert json.loads((tmp_path / "run" / "rank.json").read_text()) == measured
    need = measured["needed"][1]
    assert measured["documents"] == 60 and need["share"] == 0.99
    smaller = need["determined"] and need["high"] < measured["rank"]
    assert (found["compressed"] is not None) == smaller
    if smaller:
        assert read_adapter(tmp_path / "run" / "compressed").spec.rank == need["high"]
    again = ranks.rank(tmp_path / "run", everything=True)
    assert [p["loss"] for p in again["points"]] == [p["loss"] for p in measured["points"]]


def test_a_task_of_one_direction_is_cut_to_few_and_healed(llama_folder, tmp_path, monkeypatch):
    """Every answer is the same word: one direction of the output does it, whatever the rank that was trained."""
    monkeypatch.setattr("deltaw.config.MOST_SHARE", 0.6)  # 4 % of a base this small is no more than rank 1
    rows = [
        {"prompt": " ".join(f"w{(5 * n + k) % 19}" for k in range(3 + n % 4)), "completion": "w3"} for n in range(60)
    ]
    data = tmp_path / "same.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"model": str(llama_folder), "data": [str(data)], "eval_data": [str(data)], "lr": 1e-2}
    settings = make_settings({**given, **QUICK, "steps": 60, "out": str(tmp_path / "run")})
    found = training.train_measured(settings)
    made, reference = found["compressed"], found["measured"]["rank"]
    small = read_adapter(tmp_path / "run" / "compressed")
    assert made["ranks"]["most"] == small.spec.rank <= reference // 2
    assert small.parameters < read_adapter(tmp_path / "run" / "adapter").parameters
    healed = api.evaluate(tmp_path / "run" / "compressed", [data], str(llama_folder), **HERE)["loss"]
    assert healed < 1.1 * found["measured"]["points"][-1]["loss"] + 0.01


def test_a_measured_rank_that_was_stopped_goes_on_to_its_end(llama_folder, chats, tmp_path):
    class Stopping(Watcher):
        def step(self, line, progress, length):
            if line["step"] == 3:
                os.kill(os.getpid(), signal.SIGINT)

    given = {"model": str(llama_folder), "data": [str(chats)], "eval_data": [str(chats)], "lr": 3e-2, **QUICK}
    with pytest.raises(Interrupted):
        training.train_measured(make_settings({**given, "out": str(tmp_path / "run")}), Stopping())
    assert not (tmp_path / "run" / "rank.json").exists()
    run = training.train(resume=tmp_path / "run")
    measured = json.loads((tmp_path / "run" / "rank.json").read_text())
    assert run.read_summary()["status"] == "done" and measured["documents"] == 60
    (tmp_path / "run" / "rank.json").unlink()  # as when the measurement was stopped
    training.train(resume=tmp_path / "run")
    again = json.loads((tmp_path / "run" / "rank.json").read_text())
    assert again["points"] == measured["points"]


def test_healing_reads_its_data_as_the_run_did(llama_folder, chats, tmp_path):
    data = tmp_path / "some.jsonl"
    data.write_text(chats.read_text() + '{"prompt": "no answer"}\n' * 10)
    run = training.train(model=llama_folder, data=data, out=tmp_path / "run", rank=2, allow_lost=0.5, **QUICK)
    healed = compression.compress(run.folder, tmp_path / "out", rank=1, heal=2, train_data=[data], **HERE)
    assert healed["ranks"]["most"] == 1
    alone = write_adapter(read_adapter(run.adapter), tmp_path / "alone")
    made = compression.compress(
        alone, tmp_path / "more", rank=1, heal=2, train_data=[data], model=str(llama_folder), allow_lost=0.5, **HERE
    )
    assert made["ranks"]["most"] == 1


def test_a_few_documents_are_no_evidence(learned, chats, llama_folder, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(chats.read_text().splitlines(keepends=True)[:3]))
    found = ranks.rank(learned.folder, [few], everything=True, **HERE)
    assert found["documents"] == 3 and found["verdict"].startswith("Undetermined: 3 held-out documents are too few")
    assert not any(need["determined"] for need in found["needed"])
    with pytest.raises(AdapterError, match="too few"):
        compression.compress(learned.folder, tmp_path / "out", keep=0.9, data=[few], **HERE)


def test_half_of_any_rank_is_measured_so_that_there_is_a_verdict(llama_folder, chats, tmp_path):
    run = training.train(
        model=llama_folder, data=chats, out=tmp_path / "run", rank=6, lr=3e-2, **{**QUICK, "steps": 30}
    )
    found = ranks.rank(run.folder, [chats], everything=True, **HERE)
    assert [point["rank"] for point in found["points"]] == [1, 2, 3, 4, 6]
    assert found["verdict"].split(":")[0] in ("Halve it", "Enough", "Too small") and "half the rank" in found["verdict"]


def test_what_a_run_held_out_is_measured_where_it_is_told_to_and_only_while_its_data_is_the_same(
    llama_folder, chats, tmp_path
):
    data, moved = tmp_path / "data.jsonl", tmp_path / "moved"
    data.write_text(chats.read_text())
    base = shutil.copytree(llama_folder, tmp_path / "base")
    run = training.train(model=base, data=data, out=tmp_path / "run", rank=2, **QUICK)
    base.rename(moved)
    found = ranks.rank(run.folder, everything=True, model=str(moved), dtype="float32")
    assert found["documents"] == run.read_summary()["data"]["eval"]["used"]
    data.write_text(data.read_text() + '{"prompt": "one more", "completion": "row"}\n')
    with pytest.raises(UsageError, match="would be other rows now"):
        ranks.rank(run.folder, model=str(moved))


def test_without_data_and_without_a_run_there_is_nothing_to_measure_on(learned, tmp_path):
    alone = write_adapter(read_adapter(learned.adapter), tmp_path / "alone")
    with pytest.raises(UsageError, match="give --data"):
        ranks.rank(alone)


# -- combine and compare -----------------------------------------------------------------------------------------------


def test_a_sum_is_the_sum_and_a_difference_with_itself_is_nothing(learned, tiny_run, tmp_path):
    record = adapters.combine([learned.folder, tiny_run.folder], tmp_path / "sum", [0.7, 0.3])
    made, first, second = (read_adapter(path) for path in (tmp_path / "sum", learned.adapter, tiny_run.adapter))
    assert record["ranks"] == {"least": 8, "most": 8} and record["discarded_energy"] < 1e-12
    for name in made.factors:
        wanted = 0.7 * dense(first, name) + 0.3 * dense(second, name)
        assert torch.allclose(dense(made, name), wanted, atol=1e-6 * float(wanted.abs().max()))
    adapters.combine([learned.folder, learned.folder], tmp_path / "none", [1, -1], rank=2)
    none = read_adapter(tmp_path / "none")
    assert max(float(dense(none, name).abs().max()) for name in none.factors) < 1e-7
    with pytest.raises(UsageError, match="2 adapters and 1 weights"):
        adapters.combine([learned.folder, tiny_run.folder], tmp_path / "x", [1.0])
    with pytest.raises(UsageError, match="finite numbers, not nan, 1"):
        adapters.combine([learned.folder, tiny_run.folder], tmp_path / "x", [float("nan"), 1])


def test_healing_takes_from_a_run_what_was_asked_for_and_not_what_suited_its_machine(tiny_run, tmp_path):
    adapter, alone = read_adapter(tiny_run.adapter), tmp_path / "alone"
    shutil.copytree(tiny_run.adapter, alone)
    alike, known = (compression._healed_alike(path, adapter, {}) for path in (tiny_run.folder, alone))
    assert alike["dtype"] == "float32" and "dtype" not in known  # of which nobody knows who chose it
    for found in (alike, known):
        assert found["batch_tokens"] == 256 and not {"stream", "recompute", "micro_tokens", "quant"} & found.keys()
    given = {"max_length": 99, "allow_lost": 0.2, "allow": ["end-of-turn"], "threads": 1}
    found = compression._healed_alike(tiny_run.folder, adapter, given)
    assert {name: found[name] for name in given} == given and found["batch_tokens"] == 256


def test_compared_with_itself_an_adapter_is_alike_in_everything(learned):
    found = adapters.compare(learned.folder, learned.folder)
    assert found["cosine"] == pytest.approx(1) and found["sign_conflict"] == 0
    assert all(layer["output"]["phi_all"] == pytest.approx(1) for layer in found["layers"])


def test_beside_its_base_the_numbers_of_an_update_are_those_of_dense_matrices(learned, llama_folder, tmp_path):
    rows = {row["name"]: row for row in api.beside_base(learned.folder, **HERE)}
    adapter, base = read_adapter(learned.adapter), api.load(llama_folder, **HERE).base
    assert rows.keys() == adapter.factors.keys()
    name = next(iter(rows))
    W, update = base.model.get_submodule(name).weight.detach().double(), dense(adapter, name)
    U, sigma, V = torch.linalg.svd(update)
    count = int((sigma > 1e-10 * sigma[0]).sum())
    assert rows[name]["relative_norm"] == pytest.approx(float(update.norm() / W.norm()), rel=1e-6)
    wanted = float(update.norm() / (U[:, :count].mT @ W @ V[:count].mT).norm())
    assert rows[name]["amplification"] == pytest.approx(wanted, rel=1e-6)
    strongest = torch.linalg.svdvals(W)[:count]
    assert rows[name]["own"] == pytest.approx(float(update.norm() / strongest.norm()), rel=1e-6)
    before, after = (torch.linalg.svd(matrix)[0] for matrix in (W, W + update))
    stored = tmp_path / "bf16"  # what counts is the dtype of the files, which is what a merge rounds to
    shutil.copytree(llama_folder, stored)
    base.model.to(torch.bfloat16).save_pretrained(stored)
    coarse = {row["name"]: row for row in api.beside_base(learned.folder, str(stored), **HERE)}
    assert 0.5 < coarse[name]["rounding"] / rows[name]["rounding"] / 2**16 < 2  # bits of mantissa: 7 and 23
    alike = (before.mT @ after[:, :10]).abs().amax(0)
    assert rows[name]["intruders"] == int((alike < 0.5).sum())


# -- forgetting --------------------------------------------------------------------------------------------------------


def test_forgetting_is_nothing_at_strength_0_and_counted_as_by_hand_at_1(learned, llama_folder, tmp_path):
    text = tmp_path / "neutral.txt"
    text.write_text("The first of two paragraphs about nothing.\n\nThe second, which is longer than the first one.\n")
    model = api.load(llama_folder, learned.folder, **HERE)
    rows = model.forgetting(text, (0.0, 0.5, 1.0))
    assert rows[0]["change"] == rows[0]["kl"] == 0 and rows[0]["documents"] == 2
    assert min(rows[1]["kl"], rows[2]["kl"]) > 0 and model.strength == 1.0
    base, kl, loss, count = model.base, 0.0, 0.0, 0
    for part in text.read_text().strip().split("\n\n"):
        tokens = torch.tensor(base.tokenizer(part)["input_ids"])
        both = []
        for strength in (0.0, 1.0):
            model.strength = strength
            both.append(_log_softmax(base, tokens.tolist())[:-1])
        kl += float(torch.nn.functional.kl_div(both[1], both[0], log_target=True, reduction="sum"))
        loss += float(torch.nn.functional.nll_loss(both[1], tokens[1:], reduction="sum"))
        count += len(tokens) - 1
    assert rows[2]["kl"] == pytest.approx(kl / count, rel=1e-4) and rows[2]["loss"] == pytest.approx(
        loss / count, rel=1e-5
    )
    model.strength = 0.0  # how strong it happens to be changes nothing
    assert model.forgetting(text, (1.0,))[0]["kl"] == rows[2]["kl"] and model.strength == 0.0
    assert model.forgetting(strengths=(1.0,))[0]["documents"] > 40  # Python's own help
    with pytest.raises(DataError, match="cannot be read"):
        model.forgetting(tmp_path / "none.txt")


def test_the_distance_on_prompts_is_counted_as_by_hand_along_the_bases_own_answers(learned, llama_folder, tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text("What is the time?\n\nName a day\nof this week.\n")
    model = api.load(llama_folder, learned.folder, **HERE)
    row = model.forgetting(strengths=(0.0, 1.0), prompts=text)
    assert row[0]["prompt_kl"] == 0 and row[1]["prompts"] == 2 and row[1]["prompt_kl_low"] is None
    kl, count = 0.0, 0
    for prompt in ("What is the time?", "Name a day\nof this week."):
        asked = answered = render_prompt(model.base, [{"role": "user", "content": prompt}])
        model.strength = 0.0
        while len(answered) < len(asked) + 16 and answered[-1] not in end_tokens(model.base):
            answered = [*answered, int(_log_softmax(model.base, answered)[-1].argmax())]
        plain = _log_softmax(model.base, answered)[len(asked) - 1 : -1]
        model.strength = 1.0
        adapted = _log_softmax(model.base, answered)[len(asked) - 1 : -1]
        kl += float(torch.nn.functional.kl_div(adapted, plain, log_target=True, reduction="sum"))
        count += len(plain)
    assert row[1]["prompt_tokens"] == count and row[1]["prompt_kl"] == pytest.approx(kl / count, rel=1e-4)
    assert kl > 0 and model.forgetting(strengths=(1.0,))[0]["prompts"] == 24  # deltaw's own


def _log_softmax(base, tokens):
    with torch.no_grad():
        h = base.hidden_states(torch.tensor(tokens), torch.arange(len(tokens)), (0, len(tokens)))
        return base.logits(h).double().log_softmax(-1)


def test_what_another_adapter_forgets_does_not_stand_in_the_report_of_the_run(learned, tmp_path):
    rows = [{"strength": 1.0, "loss": 1.0}]
    compression.compress(learned.folder, learned.folder / "small", rank=1)
    assert api.keep_forgetting(learned.folder / "small", rows) is None and not learned.forgetting.exists()
    shutil.rmtree(learned.folder / "small")


# -- sweep -------------------------------------------------------------------------------------------------------------


def settings_of(llama_folder, chats, out, **changes):
    given = {"model": str(llama_folder), "data": [str(chats)], "out": str(out), **QUICK, **changes}
    return make_settings(given)


def test_a_sweep_gives_the_bits_of_separate_runs_and_compares_them(llama_folder, chats, tmp_path):
    found = sweeps.sweep(
        settings_of(llama_folder, chats, tmp_path / "sweep"), ranks=[2, 4], rates=[1e-2, 3e-2], seeds=2
    )
    assert len(found["cells"]) == 8 and (tmp_path / "sweep" / "sweep.html").is_file()
    for cell in found["cells"][::3]:
        alone = training.train(
            settings_of(
                llama_folder, chats, tmp_path / f"alone-{cell['name']}",
                rank=cell["rank"], lr=cell["lr"], seed=cell["seed"],
            )
        )  # fmt: skip
        for part in ("adapter", "last"):
            wanted, got = read_adapter(alone.folder / part), read_adapter(tmp_path / "sweep" / cell["name"] / part)
            for (name, kind, one), (_, _, other) in zip(wanted.tensors(), got.tensors(), strict=True):
                assert torch.equal(one, other), (cell["name"], part, name, kind)
        assert alone.read_summary()["best_step"] == cell["best_step"]
        summary = json.loads((tmp_path / "sweep" / cell["name"] / "summary.json").read_text())
        assert (summary["status"], summary["best_step"]) == ("done", cell["best_step"])
        assert (tmp_path / "sweep" / cell["name"] / "report.html").is_file()
    best = min(found["cells"], key=lambda cell: cell["loss"])
    assert best["behind"] == 0 and best["pareto"]
    assert {(each["rank"], each["lr"], each["seeds"]) for each in found["groups"]} == {
        (rank, lr, 2) for rank in (2, 4) for lr in (1e-2, 3e-2)
    }
    for each in found["groups"]:
        alike = [cell["loss"] for cell in found["cells"] if (cell["rank"], cell["lr"]) == (each["rank"], each["lr"])]
        assert each["loss"] == pytest.approx(sum(alike) / 2)
    assert min(each["behind"] for each in found["groups"]) == 0
    assert all(cell["behind_low"] <= cell["behind"] <= cell["behind_high"] for cell in found["cells"])
    page = (tmp_path / "sweep" / "sweep.html").read_text()
    assert all(cell["name"] in page for cell in found["cells"]) and page.count("<svg") == 4
    by_document, first = found["by_document"], found["cells"][0]
    total = sum(by_document["tokens"])
    assert sum(by_document["cells"][first["name"]]) / total == pytest.approx(first["loss"])
    assert found["base_loss"] == pytest.approx(sum(by_document["base"]) / total)
    assert found["base_loss"] == pytest.approx(alone.read_summary()["base_eval_loss"], rel=1e-5)
    assert f"the base alone {found['base_loss']:.4f}" in page


def test_cells_of_epochs_end_with_their_own_data_as_separate_runs_do(llama_folder, chats, tmp_path):
    """An epoch takes another number of steps in another order, and the rank that none is given for is the rule's."""
    given = {"steps": None, "epochs": 1.0, "batch_tokens": 150}
    found = sweeps.sweep(settings_of(llama_folder, chats, tmp_path / "sweep", **given), rates=[1e-2], seeds=4)
    counts = {}
    for cell in found["cells"]:
        alone = training.train(
            settings_of(
                llama_folder, chats, tmp_path / f"alone-{cell['name']}", lr=cell["lr"], seed=cell["seed"], **given
            )
        )
        for part in ("adapter", "last"):
            wanted, got = read_adapter(alone.folder / part), read_adapter(tmp_path / "sweep" / cell["name"] / part)
            assert all(torch.equal(a[2], b[2]) for a, b in zip(wanted.tensors(), got.tensors(), strict=True))
        assert cell["rank"] == wanted.spec.rank and cell["best_step"] == alone.read_summary()["best_step"]
        kept = ("step", "loss", "lr", "tokens", "eval_loss")
        lines = [
            [{key: line.get(key) for key in kept} for line in map(json.loads, path.read_text().splitlines())]
            for path in (alone.metrics, tmp_path / "sweep" / cell["name"] / "metrics.jsonl")
        ]
        assert lines[0] == lines[1]
        counts[cell["seed"]] = max(line["step"] for line in lines[0])
        summary = json.loads((tmp_path / "sweep" / cell["name"] / "summary.json").read_text())
        assert summary["steps"] == counts[cell["seed"]]
    assert len(set(counts.values())) > 1


def test_a_cell_that_diverges_ends_and_the_others_go_on_also_after_a_stop(llama_folder, chats, tmp_path):
    said = []

    class Stopping(Watcher):
        def step(self, line, progress, length):
            if line["step"] == 4:
                os.kill(os.getpid(), signal.SIGINT)

        def say(self, text):
            said.append(text)

    whole = sweeps.sweep(
        settings_of(llama_folder, chats, tmp_path / "alone", steps=6), ranks=[2], rates=[1e-2], seeds=2
    )
    given = {"ranks": [2], "rates": [1e-2, 1e30], "watcher": Stopping()}
    with pytest.raises(Interrupted):
        sweeps.sweep(settings_of(llama_folder, chats, tmp_path / "sweep", steps=6, eval_steps=6), **given)
    assert any("1e+30-s0 ends here, the others go on. Step" in line for line in said)
    good, bad = sweeps.resume_sweep(tmp_path / "sweep")["cells"]
    assert good["fault"] is None and "Nothing was updated" in bad["fault"] and bad["loss"] is None
    one, other = (
        read_adapter(tmp_path / run / "last") for run in (f"sweep/{good['name']}", f"alone/{whole['cells'][0]['name']}")
    )
    assert all(torch.equal(a[2], b[2]) for a, b in zip(one.tensors(), other.tensors(), strict=True))
    summary = json.loads((tmp_path / "sweep" / bad["name"] / "summary.json").read_text())
    assert (summary["status"], summary["message"]) == ("failed", bad["fault"])
    assert f"Diverged, and left out: {bad['name']}." in (tmp_path / "sweep" / "sweep.html").read_text()
    with pytest.raises(NotFiniteError, match="A lower --lr"):
        sweeps.sweep(
            settings_of(llama_folder, chats, tmp_path / "all", steps=6, eval_steps=6), ranks=[2, 4], rates=[1e30]
        )


def test_a_cell_that_diverges_in_its_last_step_is_left_out_of_the_comparison(llama_folder, chats, tmp_path):
    found = sweeps.sweep(settings_of(llama_folder, chats, tmp_path / "one", steps=1), ranks=[2], rates=[1e-2, 1e30])
    good, bad = found["cells"]
    assert good["loss"] and "validation loss is" in bad["fault"] and bad["loss"] is None
    both = sweeps.sweep(settings_of(llama_folder, chats, tmp_path / "both", steps=1), ranks=[2, 4], rates=[1e30])
    assert all(cell["fault"] and cell["loss"] is None for cell in both["cells"])
    assert "Diverged, and left out" in (tmp_path / "both" / "sweep.html").read_text()


def test_a_sweep_does_not_go_on_with_other_held_out_data(llama_folder, chats, tmp_path):
    class Stopping(Watcher):
        def step(self, line, progress, length):
            if line["step"] == 3:
                os.kill(os.getpid(), signal.SIGINT)

    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text(chats.read_text())
    given = settings_of(llama_folder, chats, tmp_path / "sweep", eval_data=[str(held_out)])
    with pytest.raises(Interrupted):
        sweeps.sweep(given, ranks=[2, 4], watcher=Stopping())
    held_out.write_text("".join(chats.read_text().splitlines(keepends=True)[:30]))
    with pytest.raises(UsageError, match="other cells, data or base"):
        sweeps.resume_sweep(tmp_path / "sweep")


def test_an_interrupted_sweep_goes_on_to_the_same_bits(llama_folder, chats, tmp_path):
    class Stopping(Watcher):
        def step(self, line, progress, length):
            if line["step"] == 3 and threading.current_thread() is threading.main_thread():
                os.kill(os.getpid(), signal.SIGINT)

    whole = sweeps.sweep(settings_of(llama_folder, chats, tmp_path / "whole", steps=6), ranks=[2, 4])
    with pytest.raises(Interrupted, match="sweep --resume"):
        sweeps.sweep(settings_of(llama_folder, chats, tmp_path / "cut", steps=6), ranks=[2, 4], watcher=Stopping())
    with pytest.raises(UsageError, match="part of a sweep"):
        training.train(resume=tmp_path / "cut" / whole["cells"][0]["name"])
    again = sweeps.resume_sweep(tmp_path / "cut")
    for cell in whole["cells"]:
        one, other = (read_adapter(tmp_path / run / cell["name"] / "last") for run in ("whole", "cut"))
        assert all(torch.equal(a[2], b[2]) for a, b in zip(one.tensors(), other.tensors(), strict=True))
        lines = (tmp_path / "cut" / cell["name"] / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines if "lr" in line] == [1, 2, 3, 4, 5, 6]
    assert [c["loss"] for c in again["cells"]] == [c["loss"] for c in whole["cells"]]
    assert sweeps.resume_sweep(tmp_path / "cut") == again


@pytest.mark.parametrize("signalled", [True, False], ids=["by a signal", "as nobody can be told"])
def test_a_sweep_does_not_wait_for_evaluations_and_makes_up_for_them(llama_folder, chats, tmp_path, signalled):
    class Stopping(Watcher):
        def step(self, line, progress, length):
            if line["step"] == 4 and signalled:
                os.kill(os.getpid(), signal.SIGINT)
            elif line["step"] == 4:
                raise OSError(28, "No space left on device")

    given = {"steps": 6, "eval_steps": 2}
    sweeps.sweep(settings_of(llama_folder, chats, tmp_path / "whole", **given), ranks=[2, 4])
    with pytest.raises(Interrupted if signalled else DiskError):
        sweeps.sweep(settings_of(llama_folder, chats, tmp_path / "cut", **given), ranks=[2, 4], watcher=Stopping())
    cells = sorted(path.parent for path in (tmp_path / "cut").glob("*/metrics.jsonl"))
    assert [read_metrics(cell / "metrics.jsonl")[-1]["step"] for cell in cells] == [4, 4]
    assert not any("eval_loss" in read_metrics(cell / "metrics.jsonl")[-1] for cell in cells)
    sweeps.resume_sweep(tmp_path / "cut")
    for cell in cells:
        logs = (read_metrics(run / cell.name / "metrics.jsonl") for run in (tmp_path / "whole", tmp_path / "cut"))
        measured = [[(line["step"], line["eval_loss"]) for line in log if "eval_loss" in line] for log in logs]
        assert measured[0] == measured[1] and [step for step, _ in measured[0]] == [2, 4, 6]


def test_a_sweep_says_that_it_runs_otherwise_than_planned(llama_folder, chats, tmp_path, monkeypatch):
    class Listening(Watcher):
        def say(self, text):
            said.append(text)

    said = []
    monkeypatch.setattr("deltaw.base.load.prove", lambda model: (forward.prove(model), None, "this test refuses them"))
    settings = settings_of(llama_folder, chats, tmp_path / "sweep", steps=1)
    sweeps.sweep(settings, ranks=[2, 4], watcher=Listening())
    assert "By the model's own modules, which is slower: this test refuses them." in said
    assert any("The plan counted on kernels" in line for line in said)


def test_a_sweep_is_planned_as_a_whole_and_its_cells_are_fitted_alike(llama_folder, chats, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "rss_bytes", lambda: 400_000_000)  # what other tests left here says nothing of it
    monkeypatch.setattr(hardware, "file_rss_bytes", lambda: 0)
    given = {"model": llama_folder, "data": chats, "lr": 1e-2, **{**QUICK, "steps": 2}}
    alone = planning.plan(**given, rank=4).as_dict()
    sweeps.sweep(**given, out=tmp_path / "sweep", ranks=[4, 8, 512])
    told = json.loads((tmp_path / "sweep" / "plan.json").read_text())
    factors = [plan["phases"]["step"]["factors"] for plan in (alone, told)]
    assert factors[1] == pytest.approx(factors[0] * (4 + 8 + 512) / 4, rel=1e-3)
    given_ranks = {"rank_pattern": ["down_proj=4"], "ranks": [4, 512]}
    sweeps.sweep(**given, **given_ranks, out=tmp_path / "patterns")
    patterned = json.loads((tmp_path / "patterns" / "plan.json").read_text())["phases"]["step"]["factors"]
    assert factors[0] < patterned < 0.95 * factors[0] * (4 + 512) / 4  # what has a rank of its own is counted as it is
    assert told["phases"]["step"]["base"] == alone["phases"]["step"]["base"]
    assert alone["peak_bytes"] < told["largest_alone_bytes"] < told["peak_bytes"]
    assert "; the largest alone " in (tmp_path / "sweep" / "sweep.html").read_text()
    assert told["steps"] == 2 and told["step_seconds_interval"][0] < told["step_seconds"]
    assert told["choice"] == {"micro_tokens": 256, "recompute": 0, "stream": False, "quant": "none"}
    recomputed = planning.plan(**given, rank=4, recompute=2).as_dict()
    saved = alone["peak_bytes_interval"][1] - recomputed["peak_bytes_interval"][1]
    tight = told["peak_bytes_interval"][1] - saved // 2
    sweeps.sweep(**given, out=tmp_path / "tight", ranks=[4, 8, 512], memory=f"{tight}B")
    chosen = json.loads((tmp_path / "tight" / "plan.json").read_text())["choice"]
    assert chosen != told["choice"]
    for path in (tmp_path / "tight").glob("*/config.yaml"):
        cell = open_run(path.parent).settings()
        assert {name: getattr(cell, name) for name in chosen} == chosen


def test_a_sweep_that_was_moved_says_where_its_page_is_and_makes_it_anew(llama_folder, chats, tmp_path):
    given = {"model": llama_folder, "data": chats, "out": tmp_path / "sweep", "lr": 1e-2, **{**QUICK, "steps": 2}}
    found = sweeps.sweep(**given, ranks=[2, 4])
    moved = tmp_path / "moved"
    (tmp_path / "sweep").rename(moved)
    page = moved / "sweep.html"
    text = page.read_text()
    page.unlink()
    assert sweeps.resume_sweep(moved) == {**found, "folder": str(moved)}
    assert page.read_text() == text.replace("<h1>sweep", "<h1>moved").replace("<title>sweep", "<title>moved")


def test_a_cell_of_a_sweep_is_not_measured_on_rows_that_it_was_trained_on(llama_folder, chats, tmp_path):
    data = tmp_path / "chats.jsonl"
    lines = chats.read_text().splitlines(keepends=True)
    data.write_text("".join(lines))
    sweeps.sweep(settings_of(llama_folder, data, tmp_path / "sweep", steps=2), ranks=[2, 4])
    cell = next(path for path in sorted((tmp_path / "sweep").iterdir()) if path.is_dir() and (path / "last").is_dir())
    summary = json.loads((cell / "summary.json").read_text())
    logged = [line["seconds"] for line in read_metrics(cell / "metrics.jsonl") if "seconds" in line]
    assert summary["train_seconds"] == pytest.approx(sum(logged)) and "eval" in summary["data"]
    data.write_text("".join(lines[: len(lines) // 2]))
    for known in (summary, {"status": "interrupted", "verb": "sweep"}):  # of a stopped run nothing is summed up
        (cell / "summary.json").write_text(json.dumps(known))
        with pytest.raises(UsageError, match="would be other rows now"):
            ranks.rank(cell)


def test_orders_of_an_adapter_of_rank_1_have_one_point(llama_folder, chats, tmp_path):
    run = training.train(model=llama_folder, data=chats, out=tmp_path / "run", rank=1, lr=3e-2, **QUICK)
    found = ranks.rank(run.folder, [chats], orders=True, everything=True)
    assert {title: len(points) for title, points in found["orders"].items()} == dict.fromkeys(found["orders"], 1)


def test_a_sweep_of_one_cell_or_into_what_exists_is_refused(llama_folder, chats, tmp_path):
    with pytest.raises(UsageError, match="several --rank"):
        sweeps.sweep(settings_of(llama_folder, chats, tmp_path / "one"), ranks=[4])
    with pytest.raises(UsageError, match="knows no --patience"):
        sweeps.sweep(settings_of(llama_folder, chats, tmp_path / "one", patience=2), ranks=[2, 4])
    with pytest.raises(DoesNotFitError, match="needs at least"):
        sweeps.sweep(settings_of(llama_folder, chats, tmp_path / "one", memory="50MB"), ranks=[2, 4])
    assert not (tmp_path / "one").exists()
    with pytest.raises(UsageError, match="none may be auto"):
        sweeps.sweep(settings_of(llama_folder, chats, tmp_path / "one"), ranks=[4, "auto"])
    with pytest.raises(UsageError, match="lr"):
        sweeps.sweep(settings_of(llama_folder, chats, tmp_path / "one"), rates=[1e-3, -1e-3])
    with pytest.raises(DeltawError):
        sweeps.sweep(settings_of(llama_folder, tmp_path / "none.jsonl", tmp_path / "gone"), ranks=[2, 4])
    assert not (tmp_path / "gone").exists()  # the corrected command may use the name
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="never overwritten"):
        sweeps.sweep(settings_of(llama_folder, chats, tmp_path / "there"), ranks=[2, 4])


def test_an_adapter_that_gains_nothing_has_nothing_to_keep(llama_folder, learned, chats, tmp_path):
    adapter = read_adapter(learned.adapter)
    idle = adapter.with_factors(
        {name: Factors(each.A, torch.zeros_like(each.B)) for name, each in adapter.factors.items()}
    )
    write_adapter(idle, tmp_path / "idle")
    found = ranks.rank(tmp_path / "idle", [chats], str(llama_folder), everything=True, **HERE)
    assert "Undetermined" in found["verdict"] and not found["needed"][0]["determined"]
    with pytest.raises(AdapterError, match="none can be kept"):
        compression.compress(tmp_path / "idle", tmp_path / "x", keep=0.9, data=[chats], model=str(llama_folder), **HERE)
    record = compression.compress(
        tmp_path / "idle", tmp_path / "small", rank=1, data=[chats], model=str(llama_folder), **HERE
    )
    assert record["retained_gain"] is None is record["retained_gain_interval"]
    assert record["verdict"].startswith("Undetermined") and record["loss_before"] == record["loss_base"]


def test_the_pieces_of_a_long_text_are_one_document(learned, tmp_path):
    texts = [" ".join(f"{n} {k} and so on" for k in range(40 + 60 * n)) for n in range(6)]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    held_out = ranks.open_held_out(learned.folder, [data], None, tmp_path / "tokens", **HERE)
    assert held_out.given == held_out.documents == 6 < len(held_out.store)
    whole = api.evaluate(learned.folder, [data], **HERE)
    losses, tokens = held_out.losses(read_adapter(learned.adapter)), held_out.tokens_D
    assert len(losses) == 6 and losses.sum() / tokens.sum() == pytest.approx(whole["loss"], rel=1e-5)
    assert sum(batch.tokens for batch in held_out.batches(0, 6)) == held_out.store.tokens
    found = ranks.rank(learned.folder, [data], everything=True, **HERE)
    assert found["documents"] == 6 and "too few to tell" in found["verdict"] and not found["improves"]


def test_layers_of_unequal_rank_get_a_curve_and_no_verdict(learned, llama_folder, chats, tmp_path):
    compression.compress(learned.folder, tmp_path / "uneven", budget="9KB")
    found = ranks.rank(tmp_path / "uneven", [chats], str(llama_folder), everything=True, **HERE)
    least, most = found["ranks"].values()
    assert least < most == found["rank"] == found["points"][-1]["rank"]
    assert found["verdict"].startswith(f"Undetermined: layers have ranks from {least} to {most}")


def test_a_sum_keeps_how_the_data_of_its_parts_was_read(llama_folder, chats, tmp_path):
    given = {"model": llama_folder, "data": chats, "rank": 2, "train_on": "last", "max_length": 100, **QUICK}
    runs = [training.train(**given, seed=seed, out=tmp_path / f"run{seed}") for seed in (0, 1)]
    adapters.combine([run.folder for run in runs], tmp_path / "sum")
    known = read_adapter(tmp_path / "sum").settings
    assert (known["train_on"], known["max_length"]) == ("last", 100) and "seed" not in known


def test_adapters_of_one_seed_are_said_to_have_it(learned, llama_folder, chats, tmp_path):
    for seed, same in ((0, True), (1, False)):
        out = tmp_path / f"run{seed}"
        other = training.train(model=llama_folder, data=chats, rank=2, seed=seed, out=out, **QUICK)  # of another rank
        assert adapters.compare(learned.folder, other.folder)["same_seed"] == same
