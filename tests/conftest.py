"""What all tests share: few threads, small bases, files of chats."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: what is tested here is the processor's way
# On bases as small as these a second thread waits for the first, and for what runs beside (test_torture.py). Tests that
# are about threads ask for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from models import save_base

from deltaw import training
from deltaw.base.builtin import BUILTIN, _is_complete, cache_folder

# A cache of our own, so that nothing which is computed here was computed by an earlier session, and nothing of the user's
# is touched; but for the built-in base, or the file it is made of, which would be fetched again.
CACHE = tempfile.TemporaryDirectory(prefix="deltaw-cache-")
for entry in [
    *filter(_is_complete, cache_folder().glob("smollm2-135m-v*")),
    cache_folder() / BUILTIN["smollm2-135m"].wheel,
]:
    if entry.exists():
        Path(CACHE.name, entry.name).symlink_to(entry)
os.environ["DELTAW_CACHE"] = CACHE.name


def pytest_collection_modifyitems(items):
    """Bases are streamed on Linux alone."""
    if sys.platform != "linux":
        for item in items:
            if "stream" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason="streaming needs Linux"))


def pytest_collection_finish(session):
    """Begins what test_torture.py waits for: one kind at a time, or two where nothing else is asked for."""
    asked = [item for item in session.items if item.path.name == "test_torture.py"]
    if asked and not session.config.option.collectonly:
        torture = asked[0].module
        at_once = 2 if len(asked) == len(session.items) else 1
        session.config.stash[torture.ATTEMPTS] = attempts = torture.Attempts(at_once)
        session.config.add_cleanup(attempts.end)


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """A small Llama base as a folder."""
    return save_base(tmp_path_factory.mktemp("bases") / "tiny-llama")


@pytest.fixture(scope="session")
def chats(tmp_path_factory) -> Path:
    """60 short chats of uneven length; the answer is the first word of the question."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = []
    for number in range(60):
        words = [f"w{(number * 7 + k) % 23}" for k in range(1 + number % 9)]
        rows.append(
            {"messages": [{"role": "user", "content": " ".join(words)}, {"role": "assistant", "content": words[0]}]}
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, llama_folder, chats):
    """A finished run of a few steps on the small base; only for reading."""
    settings = {"rank": 4, "steps": 4, "batch_tokens": 256, "lr": 1e-2, "device": "cpu", "dtype": "float32"}
    return training.train(model=llama_folder, data=chats, out=tmp_path_factory.mktemp("runs") / "tiny", **settings)
