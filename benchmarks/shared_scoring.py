"""What it saves to compute once what held-out documents have in common, beside each document by itself.

SmolLM2-135M scores three files by either way, in turn within one process: some of the demo's test texts, which begin
with the same system prompt; chats of versus.py behind a system prompt of 500 tokens; and the first again with answers
that begin alike, so that each label is scored whole. Losses and accuracies of both ways lie beside the times.
Writes benchmarks/results/shared_scoring.json.
"""

from __future__ import annotations

import gzip
import json
import statistics
import sys
import tempfile
from itertools import islice, takewhile
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.append(str(Path(__file__).parent / "rivals"))

from workloads import PREFIX_TOKENS, shared_chats

import deltaw
from deltaw import hardware
from deltaw.base.load import Base
from deltaw.demonstration import snippets

RESULT = Path(__file__).parent / "results" / "shared_scoring.json"
BASE = "smollm2-135m"
ROUNDS, TEXTS, CHATS, LABELLED = 3, 400, 32, 48
ALIKE = {"positive": "it is good", "negative": "it is bad", "neutral": "it is neither"}


def main() -> None:
    hardware.set_threads(None)
    model = deltaw.load(BASE)
    with tempfile.TemporaryDirectory() as work:
        files = write(Path(work), model.base.tokenizer)
        common = common_tokens(files["demo"], model.base.tokenizer)
        found = {name: scored(model, file) for name, file in files.items()}
    machine = {"base": BASE, "cpu": hardware.look().cpu_name, "cores": torch.get_num_threads()}
    machine["dtype"] = str(model.base.dtype).removeprefix("torch.")
    RESULT.write_text(json.dumps(machine | {"demo_common_tokens": common, "files": found}, indent=1) + "\n", "utf-8")
    print(sentence(found, common))


def write(folder: Path, tokenizer: Any) -> dict[str, Path]:
    """The three files."""
    with gzip.open(snippets("test"), "rt", encoding="utf-8") as file:
        texts = [json.loads(line) for line, _ in zip(file, range(TEXTS), strict=False)]
    alike = []
    for row in texts[:LABELLED]:
        question, answer = row["messages"]
        alike.append({"messages": [question, {**answer, "content": ALIKE[answer["content"]]}]})
    rows = {
        "demo": texts,
        "long prompt": list(islice(shared_chats(tokenizer), CHATS)),
        "labels that begin alike": alike,
    }
    files = {}
    for name, some in rows.items():
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in some), "utf-8")
    return files


def common_tokens(file: Path, tokenizer: Any) -> int:
    """How many first tokens all rows of a file have in common."""
    rows = [json.loads(line)["messages"] for line in file.read_text("utf-8").splitlines()]
    tokens = [tokenizer.apply_chat_template(row, return_dict=False) for row in rows]
    return len(list(takewhile(lambda column: len(set(column)) == 1, zip(*tokens, strict=False))))


def scored(model: deltaw.Model, file: Path) -> dict[str, Any]:
    """Median seconds, loss and accuracy by either way."""
    runs: dict[str, list[dict[str, Any]]] = {"shared": [], "alone": []}
    for _ in range(ROUNDS):
        for way, each in runs.items():
            with mock.patch.object(Base, "shares_prefixes", way == "shared"):
                each.append(model.evaluate([file]))
    seconds = {way: statistics.median(numbers["seconds"] for numbers in each) for way, each in runs.items()}
    told = {way: {name: each[0].get(name) for name in ("rows", "loss", "accuracy")} for way, each in runs.items()}
    return {way: {"seconds": seconds[way], **told[way]} for way in runs}


def sentence(found: dict[str, Any], common: int) -> str:
    """What the changelog says."""
    times = {name: each["alone"]["seconds"] / each["shared"]["seconds"] for name, each in found.items()}
    return (
        f"the demo's test texts, with {common} tokens in common, are scored {times['demo']:.1f} times as fast, "
        f"chats behind a system prompt of {PREFIX_TOKENS} tokens {times['long prompt']:.1f} times, "
        f"and labels that begin alike {times['labels that begin alike']:.1f} times"
    )


if __name__ == "__main__":
    main()
