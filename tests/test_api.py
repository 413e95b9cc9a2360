"""From training to a merged model with the calls that a program makes, on a small real base."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import shutil
import signal

import pytest
import torch
import transformers
import yaml
from models import byte_tokenizer, lively_model, save_base, small_model

import deltaw
from deltaw import adapters, api, demonstration, doctor, hardware, planning, ranks, training
from deltaw.adapter import read_adapter
from deltaw.base import forward
from deltaw.cli.runs import _show_demo
from deltaw.config import make_settings
from deltaw.engine import generate as generating
from deltaw.engine import train as engine
from deltaw.engine.prepare import origin_warnings
from deltaw.engine.run import create_run
from deltaw.engine.train import Watcher
from deltaw.errors import AdapterError, BaseError, DataError, DiskError, Interrupted, UsageError

QUICK = {"rank": 4, "steps": 2, "batch_tokens": 256, "lr": 1e-2, "device": "cpu", "dtype": "float32"}


class Listener(Watcher):
    """Remembers what was said."""

    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


def _loss(model, data):
    return model.evaluate([data])["loss"]


def test_a_run_leaves_everything_that_it_promises(tiny_run):
    names = {path.name for path in tiny_run.folder.iterdir()}
    assert names == {
        "adapter", "checkpoints", "config.yaml", "last", "metrics.jsonl", "plan.json", "report.html", "summary.json",
    }  # fmt: skip
    summary = tiny_run.read_summary()
    assert (summary["status"], summary["verb"], summary["steps"]) == ("done", "train", 4)
    assert summary["sizes"]["trained_parameters"] == sum(target["parameters"] for target in summary["targets"])
    assert summary["sizes"]["adapter_bytes"] == (tiny_run.adapter / "adapter_model.safetensors").stat().st_size
    assert summary["data"]["train"]["used"] + summary["data"]["eval"]["used"] == 60
    json.loads(tiny_run.summary.read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(("kind", "exclude"), [("falcon_mamba", ["dt_proj"]), ("rwkv", []), ("bloom", [])])
def test_models_that_do_not_attend_as_others_are_planned_and_trained(kind, exclude, tmp_path, chats):
    lively_model(kind).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    run = training.train(model=tmp_path / "base", data=chats, out=tmp_path / "run", exclude=exclude, **QUICK)
    summary = run.read_summary()
    assert summary["status"] == "done" and summary["slow_reason"]
    assert summary["way"] == summary["plan"]["way"] == "plain"


def test_a_base_that_runs_otherwise_than_its_plan_counted_on_says_so(tmp_path, llama_folder, chats, monkeypatch):
    refused = "this test refuses its kernels"
    monkeypatch.setattr("deltaw.base.load.prove", lambda model: (forward.prove(model), None, refused))
    listener = Listener()
    settings = make_settings({"model": llama_folder, "data": chats, "out": tmp_path / "run", **QUICK})
    summary = training.train(settings, watcher=listener).read_summary()
    assert any("The plan counted on kernels" in line for line in listener.said)
    assert summary["plan"]["way"] == "kernels" and summary["way"] == "modules"
    assert summary["slow_reason"] == refused


def test_what_training_put_up_with_in_the_data_is_put_up_with_in_evaluation(tmp_path, llama_folder, chats):
    base = shutil.copytree(llama_folder, tmp_path / "base")
    template = base / "chat_template.jinja"
    template.write_text(template.read_text().replace("'<|im_end|>' + ", ""))
    with pytest.raises(DataError, match="--allow end-of-turn"):
        training.train(model=base, data=chats, out=tmp_path / "run", **QUICK)
    run = training.train(model=base, data=chats, out=tmp_path / "run", allow=("end-of-turn",), **QUICK)
    assert api.evaluate(run.folder, [chats], str(base))["rows"] == 60
    assert ranks.rank(run.folder, [chats], str(base), everything=True)["documents"] == 60
    with pytest.raises(DataError, match="--allow end-of-turn"):
        api.load(base).evaluate([chats])
    assert api.load(base).evaluate([chats], allow=("end-of-turn",))["rows"] == 60


def test_an_adapter_is_evaluated_on_documents_as_long_and_with_the_day_as_in_its_training(
    tmp_path, llama_folder, chats
):
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps({"prompt": "q" * 700, "completion": f"a{n}"}) + "\n" for n in range(30)))
    given = {"model": llama_folder, "data": data, "out": tmp_path / "run", "max_length": 1000, "date": "2026-01-31"}
    run = training.train(**given, **QUICK)
    opened = api.open_adapter(run.folder)
    assert opened.encoder().max_length == 1000 and str(opened.encoder().today) == "2026-01-31"
    assert api.evaluate(run.folder, [data])["rows"] == 30
    told = api.evaluate(run.folder, [data], train_on="all", max_length=500)
    assert (told["rows_cut"], told["tokens"]) == (30, 30 * 499)
    with pytest.raises(UsageError, match="max_length = 'long': must be a whole number"):
        api.evaluate(run.folder, [data], max_length="long")
    with pytest.raises(UsageError, match="Nothing of how data is read: rank"):
        opened.evaluate([data], rank=3)
    with pytest.raises(UsageError, match="Of how --data FILE is read: --max-length; give --data too"):
        ranks.rank(run.folder, max_length=500)


def test_where_every_token_is_trained_no_accuracy_of_labels_is_made_up(tmp_path, llama_folder):
    rows = [{"prompt": f"is {n} even?", "completion": "yes" if n % 2 == 0 else "no"} for n in range(30)]
    data = tmp_path / "labels.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for train_on in ("assistant", "all"):
        run = training.train(model=llama_folder, data=data, out=tmp_path / train_on, train_on=train_on, **QUICK)
        assert ("accuracy" in api.evaluate(run.folder, [data])) == (train_on == "assistant")


def test_settings_are_written_as_resolved_with_their_sources(tiny_run, llama_folder, chats):
    stored = yaml.safe_load(tiny_run.config.read_text())
    assert stored["rank"] == {"value": 4, "source": "given"}
    assert stored["model"]["value"] == str(llama_folder) and stored["data"]["value"] == [str(chats)]
    assert stored["micro_tokens"] == {"value": 256, "source": "rule: the batch, at most 1024"}
    assert "auto" not in {entry["value"] for name, entry in stored.items() if name in ("rank", "lr", "max_length")}


def test_training_helps_and_strength_turns_it_down_to_the_base(tiny_run, llama_folder, chats):
    model = api.load(llama_folder, tiny_run.folder, device="cpu", dtype="float32")
    base = api.load(llama_folder, device="cpu", dtype="float32")
    plain = _loss(base, chats)
    assert model.strength == 1.0 and base.strength == 0.0
    full = _loss(model, chats)
    model.strength = 0.5
    half = _loss(model, chats)
    assert full < half < plain
    model.strength = 0.0
    assert _loss(model, chats) == plain and model.strength == 0.0
    model.strength = 1.0
    assert _loss(model, chats) == full
    for value in (float("nan"), float("inf")):
        with pytest.raises(UsageError, match="finite"):
            model.strength = value
    base.strength = 0.0
    with pytest.raises(UsageError, match="no adapter"):
        base.strength = 1.0


def test_the_adapter_is_the_one_that_peft_readers_find(tiny_run, llama_folder):
    config = json.loads((tiny_run.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == llama_folder.name and config["task_type"] == "CAUSAL_LM"
    origin = read_adapter(tiny_run.adapter).origin
    assert origin["base"] == llama_folder.name and origin["deltaw_version"] == deltaw.__version__
    assert all(len(origin[f"{what}_digest"]) == 64 for what in ("base", "data", "template"))
    for path in (tiny_run.adapter / "adapter_config.json", tiny_run.adapter / "deltaw.json"):
        assert str(llama_folder.parent) not in path.read_text() and str(tiny_run.folder) not in path.read_text()


@pytest.mark.parametrize("spelling", ["absolute", "relative", "dots", "trailing slash"])
def test_the_name_of_the_base_is_never_a_path_of_the_user(tmp_path, monkeypatch, chats, spelling):
    folder = save_base(tmp_path / "deep" / "tiny-base")
    monkeypatch.chdir(folder if spelling == "dots" else tmp_path)
    name = {"absolute": str(folder), "relative": "deep/tiny-base", "dots": ".", "trailing slash": f"{folder}/"}[
        spelling
    ]
    settings = make_settings({**QUICK, "model": name, "data": [str(chats)], "out": str(tmp_path / "run")})
    trainer = api.engine.train(create_run(settings), settings, Watcher())
    config = json.loads((trainer.run.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-base"


def test_the_base_is_found_from_the_run(tiny_run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for path in (tiny_run.folder, tiny_run.adapter, tiny_run.last):
        assert api.open_adapter(path, device="cpu").injection is not None


def test_an_adapter_alone_asks_for_its_base(tiny_run, llama_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alone = shutil.copytree(tiny_run.adapter, tmp_path / "moved")
    with pytest.raises(AdapterError, match=r"does not say where its base 'tiny-llama' lies; give --model FOLDER"):
        api.open_adapter(alone)
    assert api.open_adapter(alone, str(llama_folder), device="cpu").strength == 1.0


def test_another_base_of_the_same_shape_is_said(tiny_run, tmp_path):
    said = []
    other = save_base(tmp_path / "other", seed=1)
    api.open_adapter(tiny_run.folder, str(other), said.append, device="cpu", dtype="float32")
    assert len(said) == 1 and said[0].startswith("WARNING: the weights of this base are not those")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(other)
    api.open_adapter(tiny_run.folder, str(other), said.append, device="cpu", dtype="float32")
    assert said[-1].startswith("WARNING: conversations are rendered differently from training")
    assert "was 'im_start|>assistant\\n' and is 'im_start|>assistant\\n '" in said[-1]
    tokenizer.chat_template = "{# the same #}" + byte_tokenizer().chat_template
    tokenizer.save_pretrained(other)
    api.open_adapter(tiny_run.folder, str(other), said.append, device="cpu", dtype="float32")
    assert said[-1].endswith("but renders the adapter's three examples alike.")


def test_a_base_stored_otherwise_than_in_training_is_said(tiny_run):
    adapter = read_adapter(tiny_run.adapter)
    adapter.origin["config"] = json.dumps({**adapter.settings, "quant": "nf4"})
    base = api.load(tiny_run.settings().model, device="cpu", dtype="float32").base
    (line,) = origin_warnings(adapter, base)
    assert "over its base in nf4, and here the base is as it is" in line and "--quant nf4" in line
    base.quant = "nf4"
    assert origin_warnings(adapter, base) == []


def test_the_adapter_alone_names_its_base_to_load(tiny_run):
    opened = api.load(adapter=tiny_run.folder, device="cpu", dtype="float32")
    assert opened.base.name == "tiny-llama" and opened.strength == 1.0
    with pytest.raises(UsageError, match="a base, an adapter, or both"):
        api.load()


def test_base_paths_are_folders_for_other_tools(llama_folder):
    assert deltaw.base_path(llama_folder) == llama_folder
    with pytest.raises(BaseError, match="no such folder"):
        deltaw.base_path("nowhere")


def test_training_goes_on_from_an_adapter(tiny_run, llama_folder, chats, tmp_path):
    given = {name: value for name, value in QUICK.items() if name != "rank"}
    run = training.train(model=llama_folder, data=chats, out=tmp_path / "more", adapter=tiny_run.folder, **given)
    losses = [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines() if '"loss"' in line]
    start = [json.loads(line)["loss"] for line in tiny_run.metrics.read_text().splitlines() if '"loss"' in line]
    assert losses[0] < start[0] - 0.01
    stored = yaml.safe_load(run.config.read_text())
    assert stored["adapter"]["value"] == str(tiny_run.adapter)
    assert stored["rank"] == {"value": 4, "source": "the adapter it starts from"}


def test_an_adapter_of_another_shape_is_refused(tiny_run, chats, tmp_path):
    wider = transformers.LlamaConfig(**{**small_model("llama").config.to_dict(), "hidden_size": 64})
    transformers.LlamaForCausalLM(wider).save_pretrained(tmp_path / "wide")
    byte_tokenizer().save_pretrained(tmp_path / "wide")
    given = {name: value for name, value in QUICK.items() if name != "rank"}
    with pytest.raises(
        AdapterError, match=r"does not fit the model(.|\n)*has shape \[4, 32\], the model needs \[4, 64\]"
    ):
        training.train(model=tmp_path / "wide", data=chats, out=tmp_path / "run", adapter=tiny_run.adapter, **given)
    assert not (tmp_path / "run").exists()  # nothing was trained, and the corrected command may use the name


def test_evaluating_a_run_agrees_with_its_own_evaluation(llama_folder, chats, tmp_path):
    run = training.train(model=llama_folder, data=chats, eval_data=[chats], out=tmp_path / "run", **QUICK)
    numbers = api.evaluate(run.folder, [chats], device="cpu", dtype="float32")
    assert numbers["rows"] == 60
    assert {"loss", "perplexity", "exact_match", "exact_match_low", "exact_match_high", "seconds"} <= numbers.keys()
    summary = run.read_summary()
    assert numbers["loss"] == pytest.approx(summary["best_eval_loss"], rel=1e-5)
    alone = api.load(llama_folder, device="cpu", dtype="float32").evaluate([chats])["loss"]
    assert alone == pytest.approx(summary["base_eval_loss"], rel=1e-5) and alone > numbers["loss"]


def test_a_signal_while_the_base_is_measured_ends_that_alone(llama_folder, chats, tmp_path, monkeypatch):
    measured = engine.Trainer.measure_base

    def signalled(trainer):
        os.kill(os.getpid(), signal.SIGTERM)
        measured(trainer)

    monkeypatch.setattr(engine.Trainer, "measure_base", signalled)
    run = training.train(model=llama_folder, data=chats, out=tmp_path / "run", **QUICK)
    summary = run.read_summary()
    assert (summary["status"], summary["base_eval_loss"]) == ("done", None) and run.adapter.is_dir()


def test_a_base_that_takes_more_memory_than_is_free_is_streamed_and_said_to_be(tiny_run, chats, tmp_path, monkeypatch):
    """Whoever trained it so could not use it otherwise."""
    wanted = api.open_adapter(tiny_run.folder, device="cpu", dtype="float32")
    seen, said = dataclasses.replace(hardware.look(), available_bytes=100_000), []
    monkeypatch.setattr("deltaw.base.load.look", lambda: seen)
    found = api.open_adapter(tiny_run.folder, say=said.append, device="cpu", dtype="float32")
    assert wanted.base.pager is None and found.base.pager is not None and found.base.way == "kernels"
    assert len(said) == 1 and "0.0 GB are free" in said[0]
    assert _loss(found, chats) == _loss(wanted, chats)
    assert found.generate("w1 w2", max_new_tokens=4) == wanted.generate("w1 w2", max_new_tokens=4)
    assert found.base.way == "kernels"  # nothing of the generation is left behind
    assert found.base.pager.current == len(found.base.pager.sections) - 1  # which followed the blocks, head last
    assert api.open_adapter(tiny_run.folder, device="cpu", dtype="float32", stream=False).base.pager is None
    stacked = save_base(tmp_path / "moe", "qwen3_moe")  # its experts lie apart in the files
    assert api.load(stacked, device="cpu", dtype="float32").base.pager is None and len(said) == 1


def test_inspect_counts_every_parameter_and_gives_the_norm_of_the_update(tiny_run):
    facts = adapters.inspect(tiny_run.folder)
    adapter = read_adapter(tiny_run.adapter)
    assert sum(layer["parameters"] for layer in facts["layers"]) == facts["parameters"] == adapter.parameters
    assert sum(layer["count"] for layer in facts["layers"]) == len(adapter.factors) == 14
    (layer,) = [layer for layer in facts["layers"] if layer["name"] == "down_proj"]
    dense = [
        layer["scale"] * factors.B @ factors.A
        for name, factors in adapter.factors.items()
        if name.endswith("down_proj")
    ]
    assert layer["update_norm"] == pytest.approx(float(torch.stack(dense).flatten(1).norm(dim=1).mean()), rel=1e-5)
    assert layer["scale"] == 32 / 4 and (layer["A"], layer["B"]) == ([4, 48], [32, 4])


def test_merge_reads_back_what_it_wrote_and_records_the_difference(tiny_run, tmp_path):
    out = tmp_path / "merged"
    record = api.merge(tiny_run.folder, out, device="cpu", dtype="float32")
    assert record["max_logit_difference"] < 1e-5 < record["max_logit_change_by_adapter"]
    assert record["same_next_tokens"] and record["merged_weights"] == len(read_adapter(tiny_run.adapter).factors)
    stored = json.loads((out / "merge.json").read_text())
    assert stored == {name: value for name, value in record.items() if name != "folder"}
    assert stored["dtype_of_files"] == "float32" and stored["origin"]["base"] == "tiny-llama"
    assert str(tmp_path) not in (out / "merge.json").read_text()
    merged, adapted = api.load(out, device="cpu"), api.open_adapter(tiny_run.folder, device="cpu", dtype="float32")
    assert merged.generate("w1 w2", max_new_tokens=8) == adapted.generate("w1 w2", max_new_tokens=8)
    with pytest.raises(UsageError, match="never overwritten"):
        api.merge(tiny_run.folder, out)


def test_answers_leave_the_last_answer_out_and_name_rows_that_cannot_be_used(tiny_run, tmp_path):
    rows = tmp_path / "rows.jsonl"
    user, assistant = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}
    lines = [
        {"messages": [user, assistant]},
        {"messages": [user, assistant, user]},
        {"text": "w1"},
        {"nothing": 1},
        {"text": "w" * 500},
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = api.open_adapter(tiny_run.folder, device="cpu", dtype="float32")
    found = list(api.answers(model, None, [rows], max_new_tokens=3))
    assert [answer["row"] for answer in found] == [1, 2, 3, 4, 5]
    assert found[0] == {
        "file": "rows.jsonl",
        "row": 1,
        "answer": model.generate("w1", max_new_tokens=3),
        "cut_at": 3,
        "reference": "w2",
    }
    asked = model.generate([user, assistant, user], max_new_tokens=3)
    assert found[1] == {"file": "rows.jsonl", "row": 2, "answer": asked, "cut_at": 3}
    assert found[2] == {"file": "rows.jsonl", "row": 3, "answer": found[0]["answer"], "cut_at": 3}
    assert "none of messages" in found[3]["error"] and "this base was made for 256" in found[4]["error"]
    (single,) = api.answers(model, "w1", [], max_new_tokens=3)
    assert single == {"prompt": "w1", "answer": found[0]["answer"], "cut_at": 3}
    system = {"role": "system", "content": "w5"}
    rows.write_text("".join(json.dumps({"messages": [*before, user]}) + "\n" for before in ([], [system])))
    told = list(api.answers(model, "w1", [rows], system="w3", max_new_tokens=3))
    wanted = [model.generate([{"role": "system", "content": text}, user], max_new_tokens=3) for text in ("w3", "w5")]
    assert [answer["answer"] for answer in told] == [wanted[0], *wanted]


def test_an_answer_that_came_to_its_end_is_not_cut(tiny_run, monkeypatch):
    model = api.open_adapter(tiny_run.folder, device="cpu", dtype="float32")
    cut: list[int] = []
    model.generate("w1", max_new_tokens=5, on_cut=cut.append)
    assert cut == [5]
    monkeypatch.setattr(generating, "end_tokens", lambda base: list(range(base.vocabulary)))
    model.generate("w1", max_new_tokens=5, on_cut=cut.append)
    assert cut == [5]


def test_a_finished_run_has_nothing_left_to_do(tiny_run):
    listener, before = Listener(), tiny_run.metrics.read_bytes()
    assert training.train(resume=tiny_run.folder, watcher=listener).folder == tiny_run.folder
    assert listener.said == [f"{tiny_run.folder} has ended already; nothing is left to do."]
    assert tiny_run.metrics.read_bytes() == before


def test_what_cannot_be_trained_is_refused_before_a_folder_is_made(tmp_path, llama_folder, chats, tiny_run):
    with pytest.raises(DataError, match=r"No such data file: absent\.jsonl"):
        training.train(model=llama_folder, data="absent.jsonl", out=tmp_path / "run")
    with pytest.raises(UsageError, match="No training data"):
        training.train(model=llama_folder, out=tmp_path / "run")
    with pytest.raises(UsageError, match="one of steps, epochs, minutes"):
        training.train(model=llama_folder, data=chats, out=tmp_path / "run", steps=1, epochs=1)
    with pytest.raises(UsageError, match=r"never overwritten\. Go on with it by --resume"):
        training.train(model=llama_folder, data=chats, out=tiny_run.folder)
    assert not (tmp_path / "run").exists()


def test_a_base_that_is_not_there_leaves_the_name_of_the_run_free(tmp_path, chats):
    with pytest.raises(BaseError, match="There is no base"):
        training.train(model="./absent", data=chats, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def small_snippets(tmp_path, monkeypatch):
    """The demo's data with fewer and shorter texts."""
    answers = ["Positive", "negative", "neutral"]
    for split in ("train", "validation", "test"):
        rows = [{"prompt": f"{split} {n}\n\nWhich?", "completion": answers[n % 3]} for n in range(18)]
        with gzip.open(tmp_path / f"{split}.jsonl.gz", "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    rules = {"best": "a", "num_rows": 18, "settings": {"a": {"accuracy": 0.5, "accuracy_95": [0.3, 0.7]}}}
    (tmp_path / "vader.json").write_text(json.dumps(rules))
    monkeypatch.setattr(demonstration, "DEMO_SAMPLES", 2)
    monkeypatch.setattr(demonstration, "snippets", lambda split: tmp_path / f"{split}.jsonl.gz")


class Stopping(Listener):
    """Presses Ctrl-C in the first step."""

    def step(self, line, progress, length):
        if line["step"] == 1:
            os.kill(os.getpid(), signal.SIGINT)


def test_the_demo_measures_before_and_after_also_when_it_was_interrupted(
    small_snippets, llama_folder, tmp_path, capsys
):
    given = {"model": str(llama_folder), "steps": 3, "device": "cpu", "dtype": "float32", "lr": 1e-2}
    straight = demonstration.demo(out=str(tmp_path / "straight"), **given)
    assert [row["label"] for row in straight["results"]] == ["base model", "VADER rules", "adapter"]
    assert straight["results"][2]["loss"] < straight["results"][0]["loss"] and len(straight["samples"]) == 2
    assert straight["verb"] == "demo" and straight["results"][0]["labels"] == ["Positive", "negative", "neutral"]
    with pytest.raises(Interrupted):
        demonstration.demo(Stopping(), out=str(tmp_path / "stopped"), **given)
    resumed = training.train(resume=tmp_path / "stopped").read_summary()
    for before, after in zip(straight["results"], resumed["results"], strict=True):
        assert {k: v for k, v in before.items() if k != "seconds"} == {k: v for k, v in after.items() if k != "seconds"}
    assert resumed["samples"] == straight["samples"]
    _show_demo(straight)
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("base model", "VADER rules", "people say", "Try next", "deltaw merge"))


def test_the_front_door_hands_on_what_it_lists():
    for name in deltaw.__all__:
        assert getattr(deltaw, name) is not None


def test_the_advice_counts_the_parameters_of_the_base_that_it_speaks_of():
    blocks, hidden, key, inner = 30, 576, 192, 1536
    linear = blocks * (2 * hidden * hidden + 2 * hidden * key + 3 * hidden * inner)
    assert 4 * linear == doctor.FLOP_PER_TOKEN


def test_what_was_measured_of_an_adapter_stays_where_a_resume_is_refused(tmp_path, llama_folder, chats):
    class Stop(Listener):
        def step(self, line, progress, length):
            if progress.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    data = shutil.copy(chats, tmp_path / "chats.jsonl")
    given = {"model": llama_folder, "data": data, "out": tmp_path / "run", **QUICK, "steps": 4}
    with pytest.raises(Interrupted):
        training.train(watcher=Stop(), **given)
    measured, page = tmp_path / "run" / "forgetting.json", tmp_path / "run" / "inspect.html"
    for told in (measured, page):
        told.write_text("[]")
    kept = data.read_text()
    data.write_text(kept.replace("w1", "w2"))
    with pytest.raises(UsageError):
        training.train(resume=tmp_path / "run")
    assert measured.read_text() == "[]"
    data.write_text(kept)
    training.train(resume=tmp_path / "run")
    assert not measured.exists() and not page.exists(), "they told of other factors"


def test_a_run_of_minutes_ends_in_time_its_rate_falls_with_the_budget_and_it_goes_on_after_a_stop(
    tmp_path, llama_folder, chats
):
    class Stop(Listener):
        def step(self, line, progress, length):
            if progress.seconds > 1.0 and not self.said.count("stop"):
                self.said.append("stop")
                os.kill(os.getpid(), signal.SIGTERM)

    given = {name: value for name, value in QUICK.items() if name != "steps"}
    with pytest.raises(Interrupted):
        training.train(model=llama_folder, data=chats, out=tmp_path / "run", minutes=0.05, watcher=Stop(), **given)
    run = training.train(resume=tmp_path / "run")
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    steps, evaluations = [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    seconds = sum(line["seconds"] for line in steps)
    assert 3.0 <= seconds < 3.0 + 2 * max(line["seconds"] for line in steps)
    behind = (seconds - steps[-1]["seconds"]) / 3.0  # a share of the budget
    assert (
        0 <= steps[-1]["lr"] <= max(0.0, QUICK["lr"] * (1 - behind) / 0.97)
        and steps[-1]["lr"] < steps[len(steps) // 2]["lr"]
    )
    assert len(evaluations) >= 4
    assert run.read_summary()["status"] == "done"


def test_a_missing_adapter_or_one_of_a_stopped_run_is_named_and_no_folder_is_made(tmp_path, llama_folder, chats):
    with pytest.raises(AdapterError, match=r"--adapter nope: there is no adapter in nope"):
        training.train(model=llama_folder, data=chats, out=tmp_path / "run", adapter="nope", steps=1)
    assert not (tmp_path / "run").exists()
    given = {name: value for name, value in QUICK.items() if name != "steps"}
    with pytest.raises(Interrupted):
        training.train(model=llama_folder, data=chats, out=tmp_path / "stopped", steps=50, watcher=Stopping(), **given)
    with pytest.raises(AdapterError, match=r"has no adapter yet: it was stopped.*--resume"):
        adapters.inspect(tmp_path / "stopped")


def test_one_file_is_given_as_it_is_and_nothing_that_is_given_is_dropped(tiny_run, llama_folder, chats, tmp_path):
    model = api.open_adapter(tiny_run.folder)
    assert model.evaluate(str(chats)) == {**model.evaluate([chats]), "seconds": pytest.approx(0, abs=1e3)}
    settings = make_settings({"model": llama_folder, "data": chats, "steps": 1})
    for call in (planning.plan, training.train):
        with pytest.raises(UsageError, match="not both: rank"):
            call(settings, rank=8)
    for given in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}):
        with pytest.raises(UsageError, match=next(iter(given))):
            model.generate("one", **given)


def test_a_run_folder_that_could_not_be_filled_does_not_stay(tiny_run, llama_folder, chats, tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deltaw.engine.run.shutil.copytree", full)
    with pytest.raises(DiskError, match="No space left"):
        training.train(model=llama_folder, data=chats, out=tmp_path / "run", adapter=tiny_run.folder, steps=1)
    assert not (tmp_path / "run").exists()


def test_documents_of_two_tokens_are_trained(llama_folder, tmp_path):
    """Their one prediction is made by a token that sees itself alone, so queries and keys have no gradient."""
    data = tmp_path / "short.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("yes", "no", "maybe", "well")))
    run = training.train(model=llama_folder, data=data, out=tmp_path / "run", max_length=2, allow_lost=1.0, **QUICK)
    assert run.read_summary()["status"] == "done"


def test_a_merge_into_bf16_files_says_what_rounding_does_beside_what_the_adapter_does(tmp_path, tiny_run):
    base = tmp_path / "base"
    small_model("llama").bfloat16().save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    record = api.merge(tiny_run.folder, tmp_path / "merged", model=str(base), device="cpu", dtype="float32")
    assert record["dtype_of_files"] == "bfloat16" and record["computed_in"] == "float32"
    assert record["merged_weights"] == len(read_adapter(tiny_run.adapter).factors)
    assert 1e-3 * record["max_logit"] < record["max_logit_difference"] < record["max_logit_change_by_adapter"]
