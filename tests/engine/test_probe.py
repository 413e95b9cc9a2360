"""The heaviest step, evaluation and save are taken once before the run, and leave no trace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import CONFIGS, SMALL, byte_tokenizer

from deltaw.config import make_settings
from deltaw.data.example import Example
from deltaw.data.loader import heaviest_documents
from deltaw.data.store import TokenStore
from deltaw.engine import probe as probing
from deltaw.engine.prepare import prepare_run, sketch_run
from deltaw.engine.run import create_run
from deltaw.engine.train import Trainer
from deltaw.engine.watcher import Watcher


@pytest.fixture
def trainer(tmp_path, llama_folder, chats, monkeypatch):
    monkeypatch.setattr(probing, "cache_folder", lambda: tmp_path / "cache")
    settings = make_settings({
        "model": str(llama_folder), "data": [str(chats)], "out": str(tmp_path / "run"), "rank": 2, "steps": 4,
        "dropout": 0.3, "batch_tokens": 256, "device": "cpu", "dtype": "float32",
    })  # fmt: skip
    run = create_run(settings)
    return Trainer(run, settings, prepare_run(sketch_run(run, settings, Watcher()), settings, Watcher()), Watcher())


def test_a_probe_leaves_factors_optimiser_random_numbers_and_folder_as_they_were(trainer):
    before = {name: tensor.clone() for name, tensor in trainer.flat.state().items()}
    files, random_state = sorted(trainer.run.folder.rglob("*")), torch.get_rng_state()
    probing.probe(trainer)
    after = trainer.flat.state()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not trainer.flat.grad.any() and torch.equal(torch.get_rng_state(), random_state)
    assert sorted(trainer.run.folder.rglob("*")) == files


def test_a_probe_that_passed_is_remembered_until_something_changes(trainer, monkeypatch):
    steps = []
    monkeypatch.setattr(probing, "_step", lambda _trainer, documents: steps.append(documents))
    for _ in range(2):
        probing.probe(trainer)
    assert len(steps) == 1
    trainer.settings.micro_tokens = 128
    probing.probe(trainer)
    assert len(steps) == 2


def test_the_longest_document_is_probed_with_the_next_longest_that_fit_beside_it():
    lengths = np.array([5, 90, 30, 60, 8])
    assert heaviest_documents(lengths, 180) == [1, 3, 2]
    assert heaviest_documents(lengths, 150) == [1, 3]
    assert heaviest_documents(lengths, 10) == [1]
    assert heaviest_documents(lengths, 10, turns=5) == [1]
    total = int(lengths.sum())
    assert len(heaviest_documents(lengths, 10 * total)) == len(lengths)
    assert heaviest_documents(lengths, 2 * total, turns=9)[:3] == [1, 1, 1]
    assert sorted(heaviest_documents(lengths, 10 * total, turns=2)) == sorted([*range(len(lengths))] * 2)


@pytest.mark.parametrize(
    ("passed", "held_out", "probed"),
    [
        ([30, 30, 30], [30, 30, 30], False),
        ([30, 30, 30], [20, 20, 20, 20, 20, 20], False),  # 120 of them in one batch: as full as steps may be
        ([30, 30, 30], [31], True),
        ([30], [20, 20, 20, 20], True),  # nothing so large has passed
    ],
)
def test_an_evaluation_is_probed_where_nothing_as_heavy_has_passed(
    trainer, tmp_path, monkeypatch, passed, held_out, probed
):
    examples = (Example(np.zeros(n, np.int32), np.ones(n, np.float32), n) for n in held_out)
    held_out_set = SimpleNamespace(store=TokenStore.write(tmp_path / "held", examples))
    monkeypatch.setattr(type(trainer.ready), "held_out", held_out_set)
    trainer.settings.micro_tokens = 120
    scored = []
    monkeypatch.setattr(probing, "score_batch", lambda _base, batch: scored.append(batch.tokens))
    probing._evaluate(trainer, np.array(passed))
    assert scored == ([sum(held_out)] if probed else [])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits the memory as Linux does")
def test_a_row_that_does_not_fit_is_refused_at_the_start_by_name_and_without_it_the_run_trains(tmp_path):
    """In a process with a limit: one row of 16,000 tokens is too much, 40 short ones are not."""
    import transformers

    base = tmp_path / "base"
    config = transformers.LlamaConfig(**{**SMALL, "max_position_embeddings": 30_000})
    assert type(config) is type(CONFIGS["llama"]())
    transformers.LlamaForCausalLM(config).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    short = [json.dumps({"prompt": f"q {n}", "completion": "a"}) for n in range(40)]
    (tmp_path / "short.jsonl").write_text("\n".join(short))
    (tmp_path / "long.jsonl").write_text("\n".join([*short, json.dumps({"prompt": "q", "completion": "x" * 16_000})]))
    code = (  # the limit comes when base and data are there: loading them is not what is asked about
        "import resource, sys, torch\n"
        "from deltaw import cli\nfrom deltaw.engine import train\n"
        "torch.set_num_threads(1)\nprobe = train.probe\n"
        "def limited(trainer):\n"
        "    size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + (64 << 20)\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
        "    probe(trainer)\n"
        "train.probe = limited\n"
        "cli.main(sys.argv[1:])"
    )

    def train(name):
        arguments = [
            "train",
            "--model",
            base,
            "--data",
            tmp_path / f"{name}.jsonl",
            "--out",
            tmp_path / name,
            "--rank=2",
        ]
        more = ["--steps=2", "--device=cpu", "--dtype=float32", "--threads=1", "--max-length=25000"]
        command = [sys.executable, "-c", code, *map(str, arguments), *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    refused = train("long")
    assert refused.returncode == 3, refused.stderr
    assert "long.jsonl, row 41 with 16,0" in refused.stderr and "--max-length below" in refused.stderr
    assert not (tmp_path / "long").exists()
    assert train("short").returncode == 0
