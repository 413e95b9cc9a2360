"""The four workloads and the start adapters, made once and read by every tool. A script: python workloads.py FOLDER

All rows are encoded by deltaw's own Encoder and stored as token files; a rival gets the same ids and labels. The texts
are the shipped reviews and the running Python's standard library, so nothing is fetched and everything can be redone.

- short:      a review, answered with one word
- docstrings: a function's module and signature, answered with its docstring
- dense:      standard library source in rows of exactly 1,024 tokens, all of them trained
- shared:     one system prompt of 500 tokens before every chat of about 60; of n chats in a step, sharing computes
              500 + n·60 tokens instead of n·560
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import inspect
import json
import platform
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from settings import BASE, WORKLOADS, Workload

from deltaw.adapter import LoraSpec, choose, new_adapter, write_adapter
from deltaw.base.load import load
from deltaw.base.locate import locate, open_tokenizer
from deltaw.data.chat import Encoder
from deltaw.data.prepare import prepare
from deltaw.data.store import TokenStore
from deltaw.demonstration import snippets

MAX_TOKENS, PREFIX_TOKENS = 1024, 500
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "ensurepip", "__pycache__"}
DOCSTRING_CHARACTERS = (200, 2400)
CHAT_TOKENS = (52, 68)  # of a chat behind the shared prefix


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = open_tokenizer(locate(BASE))
    texts: dict[str, Iterator[dict[str, Any]]] = {
        "short": reviews(),
        "docstrings": docstring_chats(),
        "dense": sources(),
        "shared": shared_chats(tokenizer),
    }
    written = {name: write(folder / name, rows, tokenizer, WORKLOADS[name]) for name, rows in texts.items()}
    write_start_adapters(folder)
    found = {"base": BASE, "python": platform.python_version(), "workloads": written}
    (folder / "workloads.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")


# -- texts ------------------------------------------------------------------------------------------------------------


def reviews() -> Iterator[dict[str, Any]]:
    """The demo's training chats."""
    with gzip.open(snippets("train"), "rt", encoding="utf-8") as file:
        for line in file:
            yield {"messages": json.loads(line)["messages"]}


def docstring_chats() -> Iterator[dict[str, Any]]:
    """One chat per documented public function of the standard library, in an order that its text decides."""
    chats = {text: chat for path in library_files() for text, chat in _documented(path)}
    for text in sorted(chats, key=lambda text: hashlib.sha256(text.encode()).digest()):
        yield chats[text]


def _documented(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    source = path.read_text("utf-8", errors="replace")
    module = ".".join(path.relative_to(library()).with_suffix("").parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            text = inspect.cleandoc(ast.get_docstring(node) or "")
            if DOCSTRING_CHARACTERS[0] <= len(text) <= DOCSTRING_CHARACTERS[1]:
                signature = f"def {node.name}({ast.unparse(node.args)})"
                question = f"Write the docstring of this function of the module {module}:\n\n{signature}"
                yield text, _chat(question, text)


def sources() -> Iterator[dict[str, Any]]:
    """The standard library's source files, whole."""
    paths = sorted(library_files(), key=lambda path: hashlib.sha256(path.name.encode()).digest())
    for path in paths:
        yield {"text": path.read_text("utf-8", errors="replace")}


def shared_chats(tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Reviews of about 60 tokens, each behind the same system prompt."""
    prompt = shared_prompt(tokenizer)
    prefix = [{"role": "system", "content": prompt}]
    for row in reviews():
        messages = prefix + row["messages"]
        length = len(tokenizer.apply_chat_template(messages, return_dict=False)) - PREFIX_TOKENS
        if CHAT_TOKENS[0] <= length <= CHAT_TOKENS[1]:
            yield {"messages": messages}


def shared_prompt(tokenizer: Any) -> str:
    """A text whose system turn has exactly 500 tokens: what a moderator of reviews might be told, then examples."""
    head = "You read film reviews and short messages, and say how their author feels. Examples of careful reading:\n"
    listed = [row["messages"] for row, _ in zip(reviews(), range(60), strict=False)]
    body = "\n".join(f"- {question['content'].split(chr(10))[0]} ({answer['content']})" for question, answer in listed)
    ids = tokenizer(head + body, add_special_tokens=False)["input_ids"]
    for count in range(PREFIX_TOKENS - 40, PREFIX_TOKENS + 1):
        text = tokenizer.decode(ids[:count])
        turn = tokenizer.apply_chat_template([{"role": "system", "content": text}], return_dict=False)
        if len(turn) == PREFIX_TOKENS:
            return text
    raise ValueError(f"no cut of the text has a system turn of {PREFIX_TOKENS} tokens")


def _chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def library() -> Path:
    """Where the running Python's standard library lies."""
    return Path(sysconfig.get_path("stdlib"))


def library_files() -> list[Path]:
    """Its modules, tests and tools left out, in order of their names."""
    root = library()
    return sorted(path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts[:-1]))


# -- files ------------------------------------------------------------------------------------------------------------


def write(folder: Path, rows: Iterator[dict[str, Any]], tokenizer: Any, workload: Workload) -> dict[str, Any]:
    """Encodes rows into the token stores `train` and `held_out` of a folder; what they hold in numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / "rows.jsonl"
    with listed.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    data = prepare([listed], Encoder(tokenizer, MAX_TOKENS), folder / "encoded", refuse_above=None)
    dense = workload.name == "dense"
    wanted = [i for i, length in enumerate(data.store.lengths) if length == MAX_TOKENS or not dense][: workload.rows]
    examples = [data.store[i] for i in wanted]
    held_out, train = examples[: workload.held_out], examples[workload.held_out :]
    TokenStore.write(folder / "held_out", held_out)
    store = TokenStore.write(folder / "train", train)
    digest = hashlib.sha256(b"".join((folder / f"train.{kind}").read_bytes() for kind in ("tokens", "weights")))
    return {
        "rows": len(store),
        "held_out_rows": len(held_out),
        "examples_per_step": workload.examples_per_step,
        "mean_tokens": round(store.tokens / len(store), 1),
        "context_tokens": round(float((store.lengths**2).sum() / store.lengths.sum()), 1),
        "labelled_share": round(store.trained_tokens / store.tokens, 4),
        "sha256": digest.hexdigest(),
    }


def write_start_adapters(folder: Path) -> None:
    """`start` (B zero), and `filled`, whose B is not, so that the gradient of A can be compared in the first step."""
    base = load(BASE, device="cpu")
    adapter = new_adapter(choose(base.model, LoraSpec(rank=16, alpha=32.0)), LoraSpec(rank=16, alpha=32.0), seed=0)
    write_adapter(adapter, folder / "start")
    dice = torch.Generator().manual_seed(1)
    for factors in adapter.factors.values():
        factors.B = torch.randn(factors.B.shape, generator=dice) * 0.01
    write_adapter(adapter, folder / "filled")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
