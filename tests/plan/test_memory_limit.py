"""What a plan promises, held against the kernel: real processes in memory cgroups as small as what they were given."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import re
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import transformers
from cgroups import new_cgroup
from models import SMALL, byte_tokenizer

from deltaw.config import parse_bytes

LIMIT, SWAP = ("memory.max", "memory.limit_in_bytes"), ("memory.swap.max", "memory.swappiness")
MB = 1_000_000
# 12 blocks of 13.6 MB: a base that weighs, beside a process of a few hundred.
LARGER = {
    **SMALL, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_key_value_heads": 4,
    "head_dim": 128, "max_position_embeddings": 2048,
}  # fmt: skip


class Refused(NamedTuple):
    limit_bytes: int
    read_bytes: int
    ways: list[str]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("larger")
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**LARGER), dtype=torch.float32)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    assert (folder / "model.safetensors").stat().st_size > 150 * MB
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """40 texts of 200 to 1,000 tokens: cut anywhere, they can still be trained."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": "one two " * (25 + (k * 37) % 100)}) + "\n" for k in range(40)))
    return path


@pytest.fixture(scope="module")
def train(base, texts, tmp_path_factory):
    """`deltaw train` with more arguments, in a cgroup of so many bytes; the files of the base in nobody's cache."""
    folder = tmp_path_factory.mktemp("runs")
    fixed = ["--model", base, "--data", texts, "--rank=8", "--steps=3", "--batch-tokens=1024", "--threads=1"]

    def run(*more, limit=None):
        out = folder / str(len(list(folder.iterdir())))
        command = [
            sys.executable,
            "-m",
            "deltaw",
            "train",
            *map(str, fixed),
            "--device=cpu",
            "--dtype=float32",
            f"--out={out}",
            *more,
        ]
        forget(base / "model.safetensors")
        with contextlib.ExitStack() as stack:
            if limit is not None:
                group = stack.enter_context(new_cgroup("memory", {LIMIT: str(limit), SWAP: "0"}))
                if group is None:
                    pytest.skip("may not make a memory cgroup here")
                command = ["sh", "-c", f'echo $$ > "{group}/cgroup.procs" && exec "$@"', "sh", *command]
            done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120)
        return done, out

    return run


@pytest.fixture(scope="module")
def least(train):
    """The least memory that the plan accepts, as the refusal of next to nothing has it. Token lengths are cached now."""
    done, _ = train("--memory=1MB")
    assert done.returncode == 3, done.stderr
    return parse_bytes(re.search(r"needs at least (\S+)", done.stderr)[1])


@pytest.fixture(scope="module")
def refused(base, train, least):
    """A run that is given a little too little: limit, bytes of weights that were read, ways out."""
    limit, weights = round(0.95 * least), base / "model.safetensors"
    forget(weights)
    if held_bytes(weights):
        pytest.skip("this file system keeps its files in memory")
    done, out = train(f"--memory={limit}B")
    assert done.returncode == 3 and not out.exists(), done.stderr
    return Refused(limit, held_bytes(weights), re.findall(r"^ *- (--.*)$", done.stderr, re.M))


def forget(file):
    """Has the system drop what it holds of a file."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def held_bytes(file):
    """How much of a file the system holds."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        place = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(place), ctypes.c_size_t(len(mapped)), pages)
        del place
    assert failed == 0
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def test_what_cannot_fit_is_refused_before_the_base_is_opened(base, refused):
    # The system reads ahead of its header.
    assert refused.read_bytes < (base / "model.safetensors").stat().st_size / 4
    assert len(refused.ways) == 3


def test_the_least_memory_that_a_refusal_names_suffices(train, least):
    finishes(*train(f"--memory={least}B", limit=least))


@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2))])
def test_each_way_out_of_a_refusal_finishes_in_a_cgroup_of_its_memory(train, refused, number):
    flags = dict(re.findall(r"(--[a-z-]+) (\S+)", refused.ways[number]))
    limit = flags.setdefault("--memory", f"{refused.limit_bytes}B")
    finishes(*train(*(f"{name}={value}" for name, value in flags.items()), limit=parse_bytes(limit)))


def finishes(done, out):
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout)
    assert summary["steps"] == 3 and summary["plan"]["choice"]["stream"]
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
