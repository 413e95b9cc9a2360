"""A run proves on its user's machine that it repeats and resumes bit for bit, and finds what was changed."""

from __future__ import annotations

import json
import shutil

import pytest

from deltaw import api, training
from deltaw.base.builtin import token_cache
from deltaw.config import make_settings
from deltaw.engine.checkpoint import list_checkpoints
from deltaw.engine.prepare import sketch_run
from deltaw.engine.run import create_run, open_run
from deltaw.engine.watcher import Watcher
from deltaw.errors import UsageError

GIVEN = {
    "rank": 4, "steps": 6, "batch_tokens": 256, "lr": 1e-2, "dropout": 0.1, "device": "cpu", "dtype": "float32",
    "checkpoint_steps": 2, "eval_steps": 3,
}  # fmt: skip


@pytest.fixture
def run(tmp_path, llama_folder, chats):
    return training.train(model=llama_folder, data=chats, out=tmp_path / "run", **GIVEN)


def outcome(run):
    return {check["what"]: check["ok"] for check in api.verify(run.folder)}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_repeats_and_resumes_bit_for_bit_and_is_left_as_it_was(run):
    before = contents(run.folder)
    checks = api.verify(run.folder)
    assert [check["what"] for check in checks] == [
        "checkpoints/step-00000006.ckpt", "checkpoints/step-00000004.ckpt", "adapter/", "last/", "tokens of the train data",
        "base, data, settings and way of computing are those of the run", "the adapters are those of the last checkpoint", "the first steps: repeated, and resumed",
        "the steps behind step-00000004.ckpt: repeated, and resumed",
    ]  # fmt: skip
    assert all(check["ok"] for check in checks), checks
    assert checks[-1]["detail"].startswith("steps 5 to 6, sha256 ")
    assert contents(run.folder) == before


def test_adapters_that_are_not_the_runs_own_and_changed_tokens_are_found(run, tmp_path, llama_folder, chats):
    other = training.train(model=llama_folder, data=chats, out=tmp_path / "other", **{**GIVEN, "seed": 1})
    kept = tmp_path / "kept"
    shutil.copytree(run.adapter, kept)
    shutil.rmtree(run.adapter)
    assert not outcome(run)["the adapters are those of the last checkpoint"]
    shutil.copytree(other.adapter, run.adapter)
    found = outcome(run)
    assert found["adapter/"] and not found["the adapters are those of the last checkpoint"]
    shutil.rmtree(run.adapter)
    shutil.copytree(kept, run.adapter)
    (tokens,) = {entry for entry in token_cache(run.tokens).glob("*/all.tokens") if str(entry) in stems(run)}
    damaged = bytearray(tokens.read_bytes())
    damaged[-4] ^= 1
    tokens.write_bytes(damaged)
    found = outcome(run)
    assert not found.pop("tokens of the train data") and found["the adapters are those of the last checkpoint"]
    shutil.rmtree(tokens.parent)


def stems(run):
    """The token files that a run reads."""
    settings = run.settings()
    data = sketch_run(run, settings, Watcher()).data
    return {f"{part.store.stem}.tokens" for part in data.values()}


def test_a_run_without_a_step_proves_nothing(tmp_path, llama_folder, chats):
    run = create_run(make_settings({"model": llama_folder, "data": chats, "out": tmp_path / "run", **GIVEN}))
    with pytest.raises(UsageError, match="has taken no step yet"):
        api.verify(run.folder)


@pytest.mark.parametrize(
    "ways",
    [
        {"stream": True, "recompute": 1},
        {"quant": "nf4"},
        {"quant": "nf4", "stream": True, "recompute": 1},
        {"quant": "int8", "stream": True, "recompute": 2},
    ],
    ids=["streamed", "quantised", "all of it in 4 bits", "all of it in 8 bits"],
)
def test_a_run_over_a_base_that_is_streamed_or_quantised_is_verified_too(tmp_path, llama_folder, chats, ways):
    run = training.train(model=llama_folder, data=chats, out=tmp_path / "run", **GIVEN, **ways)
    assert set(outcome(run).values()) == {True}


def test_a_run_of_minutes_is_verified_with_what_its_clock_decided(tmp_path, llama_folder, chats):
    given = {"rank": 4, "minutes": 0.02, "batch_tokens": 256, "device": "cpu", "dtype": "float32"}
    run = training.train(model=llama_folder, data=chats, out=tmp_path / "run", **given)
    before = contents(run.folder)
    assert set(outcome(run).values()) == {True} and contents(run.folder) == before


def test_a_changed_log_checkpoint_adapter_or_data_is_found(run, chats, tmp_path):
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    lines[1]["loss"] += 1e-7
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    checks = {check["what"]: check for check in api.verify(run.folder)}
    assert checks["the first steps: repeated, and resumed"]["detail"] == "step 2 differs from the log in loss"
    path = list_checkpoints(run.checkpoints)[0]
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    weights = run.adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    found = outcome(run)
    assert not found["checkpoints/step-00000006.ckpt"] and not found["adapter/"] and found["last/"]
    moved = tmp_path / "moved"
    shutil.copytree(run.folder, moved)
    config = moved / "config.yaml"
    config.write_text(config.read_text().replace("lr:\n  value: 0.01", "lr:\n  value: 0.02"))
    checks = {check["what"]: check for check in api.verify(open_run(moved).folder)}
    assert "cannot go on exactly" in checks["base, data, settings and way of computing are those of the run"]["detail"]
