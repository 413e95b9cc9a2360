"""The command as people and scripts meet it: start-up, exit codes, signals, and what goes to stdout and to stderr."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner
from models import save_base

from deltaw import adapters, api, cli, tables, terminal, training
from deltaw.adapter import read_adapter, write_adapter
from deltaw.config import settings_fields
from deltaw.engine.checkpoint import list_checkpoints, read_checkpoint
from deltaw.engine.log import read_metrics
from deltaw.engine.run import open_run
from deltaw.errors import command

STEP_KEYS = ["step", "loss", "tokens", "computed_tokens", "trained_tokens", "seconds", "lr", "grad_norm", "peak_bytes"]
EVALUATION_KEYS = ["step", "eval_loss", "eval_tokens", "eval_seconds"]
QUICK = ("--rank=4", "--batch-tokens=256", "--lr=1e-2", "--device=cpu", "--dtype=float32")
ESCAPE = "\x1b"


def _run(*arguments, **options):
    """The command, in this process."""
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments], **options)


def _command(*arguments):
    return [sys.executable, "-m", "deltaw", *map(str, arguments)]


def _start(*arguments):
    """The command, in a process of its own."""
    return subprocess.Popen(_command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _training(llama_folder, chats, out, *more):
    return ("train", "--model", llama_folder, "--data", chats, "--out", out, *QUICK, *more)


def _until(condition, seconds=60.0):
    """Seconds until the condition held; fails when it does not come true."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds
        time.sleep(0.005)
    return time.monotonic() - started


# -- start-up ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement", ["import deltaw", "from deltaw.cli import main; main(['--help'], standalone_mode=0)"]
)
def test_starting_imports_nothing_heavy(statement):
    code = (
        f"import sys; {statement}; print([m for m in ('torch', 'transformers', 'numpy', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_needs_no_base_does_not_wait_for_transformers(tiny_run, tmp_path):
    adapter = str(tiny_run.folder)
    verbs = (
        ["inspect", adapter, "--layers", "--against", adapter, "--page", str(tmp_path / "page.html")],
        ["combine", adapter, adapter, "--out", str(tmp_path / "sum")],
    )
    code = f"import sys; from deltaw.cli import main; [main(verb, standalone_mode=False) for verb in {verbs!r}]"
    code += "; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True False"


def test_help_is_there_in_less_than_a_third_of_a_second():
    def seconds():
        started = time.monotonic()
        subprocess.run(_command("--help"), capture_output=True, check=True)
        return time.monotonic() - started

    assert min(seconds() for _ in range(5)) < 0.3


def test_every_verb_has_help_and_every_option_of_it_a_sentence():
    assert [*cli.main.commands] == [
        *("demo", "train", "plan", "sweep", "eval", "generate", "chat", "merge"),
        *("inspect", "rank", "compress", "combine", "verify", "bench", "doctor", "data"),
    ]
    for name, verb in cli.main.commands.items():
        shown = _run(name, "--help")
        assert shown.exit_code == 0 and verb.help and verb.help.splitlines()[0] in " ".join(shown.stdout.split())
        assert all(option.help for option in verb.params if isinstance(option, click.Option))
    assert "Exit codes: 0 done" in _run("--help").stdout


def test_every_setting_is_a_flag_of_train():
    shown = _run("train", "--help").stdout
    for field in settings_fields():
        assert re.search(rf"^ +--{field.name.replace('_', '-')}\b(?!-)", shown, re.M), field.name


# -- training: a process of its own, where signals and time matter -----------------------------------------------------


LONG = ("--steps=60", "--dropout=0.1", "--checkpoint-steps=7")


@pytest.fixture(scope="module")
def stopped_twice(tmp_path_factory, llama_folder, chats):
    """A run stopped by SIGTERM, gone on with, and stopped by Ctrl-C: its folder, and what was seen each time."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    process = _start(*_training(llama_folder, chats, out, *LONG))
    stood = _until((out / "config.yaml").exists)
    config = yaml.safe_load((out / "config.yaml").read_text())
    _until(lambda: len(read_metrics(out / "metrics.jsonl")) > 3)
    process.send_signal(signal.SIGTERM)
    output, talk = process.communicate(timeout=60)
    first = {"stood": stood, "config": config, "code": process.returncode, "output": output, "talk": talk}

    def press_ctrl_c(lines):
        _until(lambda: len(read_metrics(out / "metrics.jsonl")) > lines + 3)
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # while it trains, and not later
            os.kill(os.getpid(), signal.SIGINT)

    finger = threading.Thread(target=press_ctrl_c, args=[len(read_metrics(out / "metrics.jsonl"))])
    finger.start()
    again = _run("train", "--resume", out)
    finger.join()
    return out, [first, {"code": again.exit_code, "output": again.stdout, "talk": again.stderr}]


def test_the_run_folder_stands_within_a_second_with_absolute_paths(stopped_twice, llama_folder, chats, tmp_path):
    _, (first, _) = stopped_twice
    stood = [first["stood"]]
    while min(stood) >= 1.0 and len(stood) < 3:  # others may be at work here
        process = _start(*_training(llama_folder, chats, tmp_path / f"run{len(stood)}", "--steps=1"))
        stood.append(_until((tmp_path / f"run{len(stood)}" / "config.yaml").exists))
        process.communicate(timeout=60)
    assert min(stood) < 1.0
    assert first["config"]["data"]["value"] == [str(chats)] and Path(chats).is_absolute()
    assert first["config"]["model"]["value"] == str(llama_folder) and first["config"]["lr"]["source"] == "given"


@pytest.mark.parametrize(
    ("called", "found", "says"),
    [
        ("/somewhere/.venv/bin/deltaw", False, "/somewhere/.venv/bin/deltaw"),
        ("/somewhere/.venv/bin/deltaw", True, "deltaw"),
        ("/somewhere/deltaw/__main__.py", False, f"{Path(sys.executable).name} -m deltaw"),
        ("/somewhere/pytest/__main__.py", False, "deltaw"),
        ("my_script.py", False, "deltaw"),
    ],
)
def test_commands_to_go_on_with_are_spelt_as_this_user_calls_deltaw(called, found, says, monkeypatch, tmp_path):
    if found:
        (tmp_path / "deltaw").write_text("#!/bin/sh\n")
        (tmp_path / "deltaw").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [called])
    assert command("chat run") == f"{says} chat run"


def test_signals_end_a_run_with_their_exit_code_and_say_how_to_go_on(stopped_twice):
    out, (first, second) = stopped_twice
    assert (first["code"], second["code"]) == (143, 130)
    assert "Stopping; the state will be saved" in first["talk"]
    for seen in (first, second):
        assert seen["output"] == "" and ESCAPE not in seen["talk"] and "Traceback" not in seen["talk"]
        said = rf"Go on with: (python\S* -m )?deltaw train --resume {re.escape(str(out))}"
        assert re.search(said + "$", seen["talk"].splitlines()[-1])
    assert open_run(out).read_summary()["status"] == "interrupted" and list_checkpoints(out / "checkpoints")


def test_a_run_stopped_twice_ends_as_one_that_never_was(stopped_twice, llama_folder, chats, tmp_path):
    out, _ = stopped_twice
    resumed = _run("train", "--resume", out, "--quiet")
    straight = _run(*_training(llama_folder, chats, tmp_path / "run", *LONG))
    assert (resumed.exit_code, straight.exit_code) == (0, 0)
    assert resumed.stderr == "" and "status                done" in resumed.stdout
    for folder in ("adapter", "last"):
        for file in (out / folder).iterdir():
            assert file.read_bytes() == (tmp_path / "run" / folder / file.name).read_bytes()
    timeless = [
        [{k: v for k, v in line.items() if k not in ("seconds", "peak_bytes", "eval_seconds")} for line in lines]
        for lines in (read_metrics(out / "metrics.jsonl"), read_metrics(tmp_path / "run" / "metrics.jsonl"))
    ]
    assert timeless[0] == timeless[1] and len(timeless[0]) > 60


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_the_first_step_leaves_a_run_that_goes_on(number, code, tmp_path, llama_folder, chats):
    out = tmp_path / "run"
    process = _start(*_training(llama_folder, chats, out, "--steps=2"))
    _until((out / "summary.json").exists)
    process.send_signal(number)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in talk
    if number == signal.SIGINT:
        assert re.search(rf"Stopped\. Go on with: .*deltaw train --resume {re.escape(str(out))}$", talk.strip())
    resumed = _run("train", "--resume", out)
    assert resumed.exit_code == 0, (talk, resumed.stderr)
    assert "No checkpoint yet: starting from step 0." in resumed.stderr


def test_a_reader_that_has_enough_is_no_error(tiny_run, monkeypatch, capfd):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe, monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "stdout", pipe)
        cli.main(["inspect", str(tiny_run.folder)])
    assert ended.value.code == 141 and capfd.readouterr() == ("", "")


# -- training, in this process -----------------------------------------------------------------------------------------


def test_metrics_have_exactly_these_keys(tiny_run):
    lines = read_metrics(tiny_run.metrics)
    assert {tuple(line) for line in lines} == {tuple(STEP_KEYS), tuple(EVALUATION_KEYS)}
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    for line in lines:
        assert all(isinstance(value, int | float) and value >= 0 for value in line.values())
        assert line.get("computed_tokens", 0) <= line.get("tokens", 0)  # chats of one template begin alike


def test_recipe_and_flags_together_and_targets_with_commas(tmp_path, llama_folder, chats):
    (tmp_path / "chats.jsonl").write_bytes(chats.read_bytes())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {llama_folder}\ndata: chats.jsonl\nrank: 2\nsteps: 9\nbatch-tokens: 256\n")
    done = _run("train", recipe, "--steps", 1, "--targets", "q_proj,v_proj", "--out", tmp_path / "run", "--json")
    assert done.exit_code == 0
    summary = json.loads(done.stdout)
    assert (summary["steps"], summary["status"]) == (1, "done")
    assert {target["name"].rsplit(".")[-1] for target in summary["targets"]} == {"q_proj", "v_proj"}
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert stored["rank"] == {"value": 2, "source": "recipe"} and stored["steps"] == {"value": 1, "source": "given"}
    assert stored["data"]["value"] == [str(tmp_path / "chats.jsonl")]
    assert "validation loss" in done.stderr, "talk goes on beside --json"


def test_results_go_to_stdout_and_talk_to_stderr_without_escape_codes(tmp_path, llama_folder, chats):
    done = _run(*_training(llama_folder, chats, tmp_path / "run", "--steps=1"))
    assert done.exit_code == 0 and ESCAPE not in done.stdout + done.stderr
    assert [line.split("  ")[0] for line in done.stdout.splitlines()] == [
        "status", "best validation loss", "time of the steps", "peak memory", "adapter", "report", "next",
    ]  # fmt: skip
    first_words = [line.split()[0] for line in done.stderr.splitlines()]
    assert first_words == ["plan", "base", "adapter", "data", "60", "2,387", "3", "run", "step", "step"]
    again = _run("train", "--resume", tmp_path / "run")
    assert again.exit_code == 0 and "has ended already; nothing is left to do" in again.stderr


# -- exit codes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--no-such-flag"], 2, "No such option"),
        (["--steps=3", "--epochs=1"], 2, "steps and epochs are given"),
        (["--rank=0"], 2, "rank = 0: must be above 0"),
        (["--lr=nan"], 2, "lr = 'nan': must be a finite number"),
        (["--memory=4G"], 2, "must be a number with a unit, such as 4GB"),
        (["--memory=20MB"], 3, "What would fit"),
        (["--rank=2000"], 2, "between 1 and 1024"),
        (["--targets=no_such_layer"], 2, "'no_such_layer' matches nothing"),
        (["--rank-pattern=no_such_layer=2"], 2, "'no_such_layer' matches nothing"),
        (["--adapter=absent"], 2, "--adapter brings its own rank"),
        (["--allow=nonsense"], 2, "No such finding: nonsense"),
        (["--lr=1e38", "--steps=3"], 4, "not finite"),
    ],
)
def test_train_ends_with_the_exit_code_of_its_fault(tmp_path, llama_folder, chats, arguments, code, message):
    done = _run(*_training(llama_folder, chats, tmp_path / "run"), *arguments)
    assert done.exit_code == code and message in done.stderr and done.stdout == ""


def test_a_recipe_may_ask_for_a_day_and_for_a_measured_rank(tmp_path, llama_folder, chats):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {chats}\ndate: 2026-01-31\nrank: measure\nlr: 0.02\neval_data: {chats}\n")
    done = _run("train", recipe, "--model", llama_folder, "--out", tmp_path / "run", "--steps=2", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["measured"]["documents"] == 60
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["date"]["value"] == "2026-01-31"
    planned = _run("plan", recipe, "--model", llama_folder, "--steps=2", "--json")
    assert planned.exit_code == 0 and json.loads(planned.stdout)["steps"] == 2, planned.stderr


def test_json_has_no_word_for_numbers_that_are_not_finite_and_errors_of_usage_are_json_too(tiny_run, tmp_path):
    def strict(text):
        return json.loads(text, parse_constant=pytest.fail)

    adapter = read_adapter(tiny_run.adapter)
    next(iter(adapter.factors.values())).B.zero_()
    write_adapter(adapter, tmp_path / "zero")
    done = _run("inspect", tiny_run.folder, "--against", tmp_path / "zero", "--json")
    assert strict(done.stdout)["against"]["layers"][0]["sign_conflict"] is None
    wrong = _run("eval", tiny_run.folder, "--json")
    assert wrong.exit_code == 2 and "Missing option '--data'" in wrong.stderr
    assert strict(wrong.stdout) == {"ok": False, "error": "Missing option '--data'."}
    assert "leave out the others" in _run("sweep", "--resume", tmp_path, "--seeds=3").stderr


def test_a_path_with_colons_is_shown_as_it_is(tmp_path, llama_folder, chats):
    done = _run(*_training(llama_folder, chats, tmp_path / "runs:a:1:b:1"))
    assert done.exit_code == 0 and f"deltaw chat {tmp_path}/runs:a:1:b:1" in done.stdout


def test_bad_data_existing_folders_and_full_disks_have_their_exit_codes(tmp_path, llama_folder, chats):
    bad, file = tmp_path / "bad.jsonl", tmp_path / "file"
    bad.write_text('{"messages": []}\n')
    file.write_text("")
    cases = [
        (_training(llama_folder, bad, tmp_path / "a"), 1, "bad.jsonl, row 1"),
        (_training(llama_folder, tmp_path / "absent.jsonl", tmp_path / "b"), 1, "No such data file"),
        (_training(llama_folder, chats, tmp_path), 2, "never overwritten"),
        (_training(llama_folder, chats, file / "run"), 5, "Could not make"),
        (("train", "--resume", tmp_path), 2, "not a run folder"),
        (("train", "--resume", tmp_path, "--steps=3"), 2, "leave out steps"),
        (("train", "--model", llama_folder), 2, "No training data"),
        (("generate", tmp_path), 2, "either --prompt TEXT or --data FILE"),
        (("generate", tmp_path, "--prompt=x", "--max-new-tokens=0"), 2, "not in the range"),
        (("inspect", tmp_path), 1, "not an adapter folder"),
    ]
    for arguments, code, message in cases:
        done = _run(*arguments)
        assert done.exit_code == code, (arguments, done.stderr)
        assert message in done.stderr and "Traceback" not in done.stderr


# -- the other verbs ---------------------------------------------------------------------------------------------------


def test_on_windows_every_verb_says_what_to_do(monkeypatch):
    monkeypatch.setattr("deltaw.cli.group.sys.platform", "win32")
    done = _run("doctor")
    monkeypatch.undo()
    assert done.exit_code == 2 and "install it in WSL" in done.stderr


def test_eval_prints_a_table_or_one_json_document(tiny_run, chats):
    shown = _run("eval", tiny_run.folder, "--data", chats, "--device=cpu")
    assert shown.exit_code == 0
    names = [line.split("  ")[0] for line in shown.stdout.splitlines()]
    assert names == ["loss", "perplexity", "exact match", "rows", "tokens"]
    numbers = json.loads(_run("eval", tiny_run.folder, "--data", chats, "--device=cpu", "--json").stdout)
    assert f"{numbers['loss']:.4f}" in shown.stdout and numbers["rows"] == 60


def test_eval_tells_of_rows_that_it_cut_or_could_not_use(tmp_path, llama_folder, chats):
    run = tmp_path / "run"
    short = _run(*_training(llama_folder, chats, run, "--steps=1", "--max-length=48", "--allow-lost=1"))
    assert short.exit_code == 0, short.stderr
    data = tmp_path / "held-out.jsonl"
    rows = [{"text": "long " * 40}, {"prompt": "one two three", "completion": "four " * 20}, {"prompt": "a"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = _run("eval", run, "--data", data, "--allow-lost=1")
    assert done.exit_code == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("rows ")]
    assert "1 of them cut at max-length; 1 more cannot be used" in line


def test_a_base_is_streamed_or_stored_in_4_bits_for_other_verbs_than_train_too(tiny_run, chats, tmp_path):
    def evaluated(*flags):
        done = _run("eval", tiny_run.folder, "--data", chats, "--dtype", "float32", *flags, "--json")
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)["loss"]

    wanted = evaluated()
    assert evaluated("--stream") == wanted and evaluated("--quant", "none") == wanted
    pytest.importorskip("bitsandbytes")
    assert 0 < abs(evaluated("--quant", "nf4") / wanted - 1) < 0.2
    refused = _run("merge", tiny_run.folder, "--out", tmp_path / "merged", "--quant", "nf4")  # its logits would mislead
    assert refused.exit_code == 2 and "--quant" in refused.stderr
    merged = _run("merge", tiny_run.folder, "--out", tmp_path / "merged", "--stream", "--dtype", "float32", "--json")
    assert merged.exit_code == 0 and json.loads(merged.stdout)["same_next_tokens"]


def test_eval_shows_the_base_beside_the_adapter(tiny_run, chats):
    done = _run("eval", tiny_run.folder, "--data", chats, "--base", "--json")
    found = json.loads(done.stdout)
    alone = api.load(tiny_run.settings().model, device="cpu").evaluate([chats])
    assert found["base"]["loss"] == pytest.approx(alone["loss"]) and found["loss"] < alone["loss"]
    shown = _run("eval", tiny_run.folder, "--data", chats, "--base").stdout
    assert f"loss         {found['loss']:.4f}; the base alone {alone['loss']:.4f}" in shown
    assert "the base alone" not in _run("eval", tiny_run.folder, "--data", chats).stdout


def test_eval_warns_of_another_base_even_beside_json(tiny_run, chats, tmp_path):
    other = save_base(tmp_path / "other", seed=1)
    done = _run("eval", tiny_run.folder, "--data", chats, "--model", other, "--json")
    assert done.stderr.startswith("WARNING: the weights of this base") and json.loads(done.stdout)["rows"] == 60


def test_generate_answers_a_prompt_or_every_row(tiny_run, chats, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(chats.read_text().splitlines(keepends=True)[:3]))
    common = (tiny_run.folder, "--max-new-tokens=3", "--device=cpu")
    answer = _run("generate", *common, "--prompt", "w1").stdout
    as_json = json.loads(_run("generate", *common, "--prompt", "w1", "--json").stdout)
    assert as_json == {"prompt": "w1", "answer": answer.removesuffix("\n"), "cut_at": 3}
    assert _run("generate", *common, "--prompt", "w1").stderr.endswith(
        "cut at 3 tokens; --max-new-tokens allows more.\n"
    )
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_text(json.dumps({"question": "w1"}) + "\n")
    (line,) = _run("generate", *common, "--data", renamed, "--columns", "text=question").stdout.splitlines()
    assert json.loads(line)["answer"] == as_json["answer"]
    lines = [json.loads(line) for line in _run("generate", *common, "--data", rows).stdout.splitlines()]
    assert [line["row"] for line in lines] == [1, 2, 3] and all(line["reference"] for line in lines)
    assert json.loads(_run("generate", *common, "--data", rows, "--json").stdout) == lines


def test_inspect_and_merge_and_doctor_print_one_json_document(tiny_run, tmp_path):
    facts = json.loads(_run("inspect", tiny_run.folder, "--json").stdout)
    assert facts["rank"] == 4 and facts == json.loads(json.dumps(adapters.inspect(tiny_run.folder)))
    shown = _run("inspect", tiny_run.folder).stdout
    assert all(layer["name"] in shown for layer in facts["layers"])
    merged = _run("merge", tiny_run.folder, "--out", tmp_path / "merged", "--device=cpu", "--dtype=float32", "--json")
    record = json.loads(merged.stdout)
    assert record["same_next_tokens"] and record["folder"] == str(tmp_path / "merged")
    assert merged.stderr.splitlines() == ["Writing the merged model.", "Reading it back."]
    machine = json.loads(_run("doctor", "--json").stdout)
    assert machine["advice"] and all(rate > 0 for rate in machine["gemm_gflops"].values())
    again = _run("merge", tiny_run.folder, "--out", tmp_path / "merged")
    assert again.exit_code == 2 and "never overwritten" in again.stderr


def test_chat_follows_its_commands(tiny_run):
    said = [
        "w1",
        "/base",
        "w1",
        "/scale 0.5",
        "/scale nan",
        "/adapter",
        "w1",
        "/scale",
        "/nonsense",
        "/new",
        "",
        "/both",
    ]
    flags = ("--device=cpu", "--dtype=float32", "--system", "w3", "--max-new-tokens=4")
    done = _run("chat", tiny_run.folder, *flags, input="\n".join([*said, "/quit", "w9"]))
    assert done.exit_code == 0 and " … (cut at 4 tokens; --max-new-tokens allows more)\n" in done.stdout
    asked = [{"role": "system", "content": "w3"}, {"role": "user", "content": "w1"}]
    model = api.load(tiny_run.settings().model, device="cpu", dtype="float32")
    assert f"base: {terminal.visible(model.generate(asked, max_new_tokens=4))} …" in done.stdout
    speakers = re.findall(r"^(?:> )*(base|adapter): ", done.stdout, re.MULTILINE)
    assert speakers == ["base", "adapter", "base", "adapter"]
    assert "The adapter acts at 0.5 of its strength." in done.stdout
    assert done.stdout.count("Say it like: /scale 0.5") == 2 and done.stdout.count("Commands: /base") == 2


def test_chat_ends_with_its_input_and_survives_a_prompt_that_is_too_long(tiny_run):
    done = _run("chat", tiny_run.folder, "--device=cpu", input="/adapter\n" + "w" * 300 + "\n")
    assert done.exit_code == 0 and "this base was made for 256" in done.stdout


# -- terminals ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _screen(monkeypatch, no_color=""):
    """A real terminal as stderr; what it was sent stands in the list that this gives, once the block has ended."""
    for name, value in (("NO_COLOR", no_color), ("TERM", "xterm"), ("COLUMNS", "110")):
        monkeypatch.setenv(name, value)
    far, near = pty.openpty()
    pieces, shown = [], []

    def read():
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while piece := os.read(far, 10_000):
                pieces.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(near, "w") as screen, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", screen)
        yield shown
    reader.join()
    os.close(far)
    shown.append(b"".join(pieces).decode())


@pytest.mark.parametrize(("no_color", "plain"), [("", False), ("1", True)])
def test_a_terminal_gets_a_bar_unless_no_color_is_set(monkeypatch, no_color, plain):
    with _screen(monkeypatch, no_color) as shown:
        watcher = terminal.TerminalWatcher(terminal.make_console(stderr=True))
        assert watcher.live is not plain
        watcher.say("Measuring.")
        watcher.measured(1, 2)
        watcher.measured(2, 2)
    (text,) = shown
    assert "Measuring." in text and ("2/2 rows" in text) is not plain
    assert not plain or ESCAPE not in text


def test_a_live_run_keeps_its_bar_and_its_lines_apart(monkeypatch, tmp_path, llama_folder, chats):
    given = {"rank": 2, "steps": 3, "batch_tokens": 256, "device": "cpu", "out": tmp_path / "run"}
    with _screen(monkeypatch) as shown:
        watcher = terminal.TerminalWatcher(terminal.make_console(stderr=True))
        training.train(model=llama_folder, data=chats, watcher=watcher, **given)
    (text,) = shown
    lines = [line.split("\r")[-1].split("\x1b[2K")[-1].strip() for line in text.splitlines()]
    assert sum(line.startswith("step ") and "validation loss" in line for line in lines) == 3
    assert any(line.startswith("training") and "step 3/3" in line for line in lines)
    assert text.rstrip().endswith("\x1b[?25h"), "the cursor is shown again"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (98e6, "98.0 MB"), (4.2e8, "420 MB"), (2e9, "2.0 GB")],
)
def test_sizes_are_decimal(number, text):
    assert terminal.human_bytes(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(-1, "0:00"), (59.9, "0:59"), (245, "4:05"), (3723, "1:02:03")])
def test_times_are_minutes_or_hours(seconds, text):
    assert terminal.human_seconds(seconds) == text


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path):
    """Four good rows, the last a copy of the first, and one that is no JSON."""
    path = tmp_path / "rows.jsonl"
    good = [json.dumps({"prompt": f"q {n}", "completion": f"a {n}"}) for n in (1, 2, 3, 1)]
    path.write_text("\n".join([*good[:2], "{", *good[2:]]) + "\n")
    return path


def test_data_check_is_one_page_and_exits_1_on_errors_and_0_on_warnings(rows, llama_folder):
    done = _run("data", "check", rows, "--model", llama_folder)
    assert done.exit_code == 1 and ESCAPE not in done.stdout and done.stderr == ""
    for text in (
        "rows.jsonl: 4 prompt and completion", "5 rows: 4 used, 1 left out", "ERROR rows that cannot be read: 1  [unreadable]",
        "rows.jsonl, row 3: not valid JSON", "WARNING rows that occur more than once: 1  [duplicate]", "equal to rows.jsonl, row 1",
        "Errors were found. Kinds of errors: 1, of warnings: 1.", "length     median",
    ):  # fmt: skip
        assert text in done.stdout, text
    allowed = _run("data", "check", rows, "--model", llama_folder, "--allow", "unreadable")
    assert allowed.exit_code == 0 and "ERROR, allowed rows" in allowed.stdout and "No errors." in allowed.stdout


def test_data_check_prints_one_json_document_whatever_the_exit_code(rows, llama_folder, tmp_path):
    other = tmp_path / "eval.jsonl"
    other.write_text(json.dumps({"prompt": "q 2", "completion": "a 2"}) + "\n")
    done = _run("data", "check", rows, "--model", llama_folder, "--eval", other, "--json")
    page = json.loads(done.stdout)
    assert done.exit_code == 1 and page["ok"] is False and (page["rows"], page["used"]) == (5, 4)
    assert {(f["code"], f["set"], tuple(map(tuple, f["rows"]))) for f in page["findings"]} == {
        ("unreadable", "train", (("rows.jsonl", 3),)),
        ("duplicate", "train", (("rows.jsonl", 5),)),
        ("overlap", "eval", (("eval.jsonl", 1),)),
    }
    assert sum(page["statistics"]["histogram"]["counts"]) == page["statistics"]["documents"] == 4
    absent = _run("data", "check", tmp_path / "absent.jsonl", "--model", llama_folder, "--json")
    assert absent.exit_code == 1 and json.loads(absent.stdout)["ok"] is False and "No such data file" in absent.stderr


def test_data_show_prints_what_is_trained_in_brackets_and_ids_on_request(rows, llama_folder):
    done = _run("data", "show", rows, "--model", llama_folder, "--rows", 3)
    assert done.exit_code == 0 and ESCAPE not in done.stdout
    assert "<|im_start|>user\nq 1<|im_end|>\n<|im_start|>assistant\n⟦a 1<|im_end|>⟧\n" in done.stdout
    assert "rows.jsonl, row 3" in done.stdout and "left out: not valid JSON" in done.stdout
    later = _run("data", "show", rows, "--model", llama_folder, "--row", 4, "--rows", 1, "--ids").stdout
    assert "⟦a 3{" in later and "<|im_end|>{2}⟧" in later and "row 1" not in later
    shown = json.loads(_run("data", "show", rows, "--model", llama_folder, "--json").stdout)
    assert [row["row"] for row in shown] == [1, 2, 3] and shown[2]["code"] == "unreadable"
    trained = [s["text"] for s in shown[0]["documents"][0] if s["weight"]]
    assert "".join(trained) == "a 1<|im_end|>"


def test_an_empty_file_is_an_error_and_a_row_that_is_not_there_is_said(rows, llama_folder, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    done = _run("data", "check", tmp_path / "empty.jsonl", "--model", llama_folder)
    assert done.exit_code == 1 and "[no-rows]" in done.stdout
    shown = _run("data", "show", rows, "--model", llama_folder, "--row", 99)
    assert shown.exit_code == 1 and "There is no row 99 or later." in shown.stderr and shown.stdout == ""
    absent = _run("data", "show", tmp_path / "absent.jsonl", "--model", llama_folder, "--json")
    assert absent.exit_code == 1 and "No such data file" in json.loads(absent.stdout)["error"]


def test_data_show_has_colour_and_pages_in_a_terminal(rows, llama_folder):
    """A real terminal; the pager is cat."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "PAGER": "cat", "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    arguments = _command("data", "show", rows, "--model", llama_folder)
    process = subprocess.Popen(arguments, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    output = b""
    with contextlib.suppress(OSError):
        while piece := os.read(leader, 65536):
            output += piece
    process.wait(timeout=60)
    os.close(leader)
    text = output.decode()
    assert process.returncode == 0 and ESCAPE in text and "row 5" in text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "⟦a 1<|im_end|>⟧" in plain


def test_training_says_what_the_check_found_and_a_recipe_mixes_sources(tmp_path, llama_folder, chats, rows):
    rows.write_text("".join(line + "\n" for line in rows.read_text().splitlines() if line != "{"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"data:\n  - {{path: rows.jsonl, weight: 3}}\n  - {{path: {chats}, cap: 10, weight: 0.5}}\n"
        f"model: {llama_folder}\nsteps: 2\nrank: 2\nbatch_tokens: 256\ndevice: cpu\ndtype: float32\n"
    )
    done = _run("train", recipe, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.stderr
    assert "4 prompt and completion, 10 chat in 2 files" in done.stderr
    assert "found: 1 duplicate (such as rows.jsonl, row 4: equal to rows.jsonl, row 1)" in done.stderr
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["value"]
    assert stored == [f"{rows}::weight=3", f"{chats}::cap=10,weight=0.5"]
    again = _run("train", "--resume", tmp_path / "run")
    assert again.exit_code == 0 and "has ended already" in again.stderr


def test_bench_says_how_fast_a_base_trains_and_where_the_time_goes(llama_folder, capfd):
    done = _run("bench", "--model", llama_folder, "--rank", 2, "--seconds", 0, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["way"], found["slow_reason"], found["rank"]) == ("kernels", None, 2)
    assert [row["workload"] for row in found["workloads"]] == ["short chats", "chats", "dense rows"]
    for row in found["workloads"]:
        assert row["steps"] >= 3 and row["tokens_per_second"] > 0 and 0 < row["share_of_gemm"] < 1
        parts = {name: share for name, share in row["parts"].items() if name != "matrix products, of all"}
        assert sum(parts.values()) == pytest.approx(1) and {"attention", "loss and output head"} <= parts.keys()
    shown = _run("bench", "--model", llama_folder, "--rank", 2, "--seconds", 0)
    assert "profiler" not in capfd.readouterr().err  # torch's own would write there
    assert shown.exit_code == 0 and "tokens/s" in shown.stdout and "dense rows" in shown.stdout


def test_adapters_are_measured_compressed_summed_and_shown_from_the_command_line(tiny_run, chats, tmp_path):
    shown = _run("rank", tiny_run.folder, "--data", chats, "--all", "--json")
    assert json.loads(shown.stdout)["points"][-1]["rank"] == 4
    shown = _run("rank", tiny_run.folder, "--data", chats, "--all")
    assert shown.exit_code == 0 and "rank for 99% of the gain" in shown.stdout and "verdict" in shown.stdout
    shown = _run("compress", tiny_run.folder, "--rank", 2, "--out", tmp_path / "small", "--data", chats)
    assert shown.exit_code == 0 and "50.0%" in shown.stdout and "gain kept" in shown.stdout
    budget = ("--budget", "9kB", "--out", tmp_path / "uneven")
    uneven = _run("compress", tiny_run.folder, *budget)
    assert uneven.exit_code == 0 and "elsewhere" not in shown.stdout
    for said in (uneven.stdout, _run("inspect", tmp_path / "uneven").stdout):
        assert f"deltaw compress {tmp_path / 'uneven'} --rank" in said
    assert "Give one of" in _run("compress", tiny_run.folder, "--out", tmp_path / "x").stderr
    shown = _run("combine", tiny_run.folder, tmp_path / "small", "--weights", "1,-1", "--out", tmp_path / "rest")
    assert shown.exit_code == 0 and "energy left out" in shown.stdout and (tmp_path / "rest").is_dir()
    wrong = _run("combine", tiny_run.folder, tmp_path / "small", "--weights", "a,b", "--out", tmp_path / "y")
    assert wrong.exit_code == 2 and "numbers with commas" in wrong.stderr
    shown = _run("inspect", tiny_run.folder, "--layers", "--base", "--against", tmp_path / "rest", "--json")
    facts = json.loads(shown.stdout)
    assert len(facts["spectra"]) == len(facts["beside"]) == len(facts["against"]["layers"])
    page = tiny_run.folder / "inspect.html"
    shown = _run("inspect", tiny_run.folder, "--layers", "--base", "--against", tmp_path / "rest", "--page", page)
    assert facts["spectra"][0]["name"] in page.read_text() and "Against rest" in page.read_text()
    assert "inspect.html" in (tiny_run.folder / "report.html").read_text()
    shown_eval = _run("eval", tiny_run.folder, "--data", chats, "--forgetting")
    assert shown_eval.exit_code == 0 and "KL on prompts" in shown_eval.stdout
    assert (tiny_run.folder / "forgetting.json").is_file()
    assert all(word in shown.stdout for word in ("energy@90", "amplification", "sign conflict", "intruders"))


def test_a_sweep_from_the_command_line(llama_folder, chats, tmp_path):
    given = ("--model", llama_folder, "--data", chats, "--out", tmp_path / "sweep", "--steps", 2, "--batch-tokens", 256)
    done = _run("sweep", *given, "--rank", "2,4", "--lr", "1e-2", "--device", "cpu", "--dtype", "float32")
    assert done.exit_code == 0 and "behind the best" in done.stdout and (tmp_path / "sweep" / "sweep.html").is_file()
    again = _run("sweep", "--resume", tmp_path / "sweep", "--json")
    assert [cell["rank"] for cell in json.loads(again.stdout)["cells"]] == [2, 4]
    assert _run("sweep", *given, "--rank", "2,x").exit_code == 2


def test_bench_measures_documents_no_longer_than_the_base_takes(tmp_path):
    """GPT-2 has 256 positions here, and its layers are no Linear."""
    done = _run("bench", "--model", save_base(tmp_path / "gpt2", "gpt2"), "--rank", 2, "--seconds", 0, "--json")
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)["workloads"]
    assert [row["document_tokens"] for row in rows] == [64, 256, 256]
    per_token = rows[0]["useful_gflops"] * 1e9 / rows[0]["tokens_per_second"]
    assert per_token > 4 * 2 * 12 * 32 * 32


def test_numbers_in_tables_are_never_cut_however_narrow_the_terminal_is(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = io.StringIO()
    console = terminal._Console(file=stream, width=40)
    rows = [("a-name-that-is-long-enough", "1.2e-05", "0.123456 (0.111111 to 0.222222)", "yes")]
    console.print(tables.plain_table(("cell", "rate", "behind the best", "none smaller as good"), rows))
    assert all(cell in stream.getvalue() for cell in rows[0])


def test_texts_of_data_and_models_do_not_control_the_terminal(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "a\x1b[2Jb", "completion": "c\x07\x9bd"}) + "\n")
    done = _run("data", "show", data)
    assert done.exit_code == 0 and "a␛[2Jb" in done.stdout and "\x1b" not in done.stdout and "\x9b" not in done.stdout


def test_a_chat_survives_the_end_of_an_answer_by_ctrl_c_and_bytes_that_are_no_text(tiny_run):
    class Stopping:
        asked: list[str] = []  # noqa: RUF012

        def generate(self, messages, on_text, on_cut):
            self.asked.append(messages[-1]["content"])
            on_text("half")
            if len(self.asked) == 1:
                raise KeyboardInterrupt
            return "half"

    stream = io.StringIO()
    terminal.chat_loop(terminal._Console(file=stream, width=80), Stopping(), io.StringIO("/base\none\ntwo\n"))
    assert Stopping.asked == ["one", "two"] and stream.getvalue().endswith("> \n")
    done = _run("chat", tiny_run.folder, input=b"\xff hello\n/quit\n")
    assert done.exit_code == 0, done.stderr


def test_rows_of_tokens_cannot_be_answered_and_say_so(tiny_run, tmp_path):
    data = tmp_path / "tokens.jsonl"
    data.write_text(json.dumps({"input_ids": [5, 6, 7]}) + "\n")
    (answer,) = json.loads(_run("generate", tiny_run.folder, "--data", data, "--json").stdout)
    assert "holds tokens" in answer["error"]


# -- what must not be lost when nobody listens -------------------------------------------------------------------------


@pytest.mark.parametrize("signalled", [True, False], ids=["by a signal", "by its lines"])
def test_a_run_whose_reader_is_gone_saves_its_state(signalled, tmp_path, llama_folder, chats):
    """As behind `2>&1 | tee log`: Ctrl-C ends `tee` too, before anything is said of stopping."""
    out = tmp_path / "run"
    reading, writing = os.pipe()
    evaluated = 100_000 if signalled else 40
    rare = ("--steps=4000", "--checkpoint-steps=100000", f"--eval-steps={evaluated}")
    command = _training(llama_folder, chats, out, *rare)
    process = subprocess.Popen([sys.executable, "-m", "deltaw", *map(str, command)], stdout=writing, stderr=writing)
    os.close(writing)
    _until(lambda: len(read_metrics(out / "metrics.jsonl")) > 3)
    os.close(reading)
    if signalled:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) in (130, 141)
    else:  # the line of an evaluation finds out, or one of the bar
        assert process.wait(timeout=60) == 141
    (checkpoint,) = list_checkpoints(out / "checkpoints")
    state = read_checkpoint(checkpoint)[1]
    assert state["step"] >= 3 and not state["owed"]  # an evaluation that was done is not done again


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_streams_may_be_closed(closed, tiny_run, llama_folder, chats):
    shown = f"data show {chats} --model {llama_folder} --rows 1" if "<" in closed else f"inspect {tiny_run.folder}"
    command = f"{sys.executable} -m deltaw {shown} {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, check=False, timeout=120)
    assert done.returncode == 0 and done.stderr == b""
    assert (b"tiny-llama" in done.stdout) == (closed == "2>&-")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_below_the_standard_streams_is_an_error_of_the_disk(llama_folder, chats, tmp_path, tiny_run):
    shown = f"{sys.executable} -m deltaw inspect {tiny_run.folder} >/dev/full"
    done = subprocess.run(["sh", "-c", shown], capture_output=True, check=False, text=True, timeout=120)
    assert (
        done.returncode == 5
        and done.stderr
        == "Error: A file, or what is said here, could not be read or written: No space left on device.\n"
    )
    given = f"--model {llama_folder} --data {chats} --steps 2 --rank 2 --out {tmp_path / 'run'}"
    trained = f"{sys.executable} -m deltaw train {given} 2>/dev/full"
    done = subprocess.run(["sh", "-c", trained], capture_output=True, check=False, timeout=120)
    assert done.returncode == 5


def test_lines_of_json_are_json_on_a_stdout_that_is_not_utf_8():
    code = 'from deltaw.terminal import json_line; print(json_line({"answer": "“quoted” 中"}))'
    for encoding in ("latin-1", "utf-8"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment)
        assert json.loads(done.stdout.decode(encoding)) == {"answer": "“quoted” 中"}


def test_a_stdout_that_is_not_utf_8_gets_what_it_can_hold(tiny_run):
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "-m", "deltaw", "inspect", str(tiny_run.folder)]
    done = subprocess.run(command, capture_output=True, check=False, env=environment, timeout=120)
    assert done.returncode == 0 and b"mean ?s" in done.stdout


def test_a_glob_below_a_folder_with_brackets_and_a_home_in_out(tmp_path, llama_folder, monkeypatch):
    here = tmp_path / "proj[1]"
    (here / "chats").mkdir(parents=True)
    row = json.dumps({"prompt": "a question", "completion": "an answer"})
    (here / "chats" / "one.jsonl").write_text("\n".join([row.replace("a q", f"{n} q") for n in range(20)]))
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path))
    done = _run("train", "--model", llama_folder, "--data", "chats/*.jsonl", "--out=~/runs/a", "--steps=1", "--rank=2")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "runs" / "a" / "adapter").is_dir() and not (here / "~").exists()
