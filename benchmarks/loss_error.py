"""How far a bf16 base's losses of single tokens are from those in fp32: by transformers, by the kernels in torch, and
by the kernels with the compiled library.

The base is SmolLM2-135M; answers are those of the demo's rows, texts are the interpreter's own in pieces of 1,024
tokens. The mean is what all tokens have in common, the spread is of one token. Writes
benchmarks/results/loss_error.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import deltaw
from deltaw import demonstration, hardware
from deltaw.base.load import Base, load
from deltaw.data.chat import Encoder
from deltaw.data.example import Example
from deltaw.data.formats import parse_sources, read_rows
from deltaw.data.pack import Batch, flat_batch
from deltaw.data.source import Fault
from deltaw.engine.forgetting import neutral_texts
from deltaw.engine.objective import score_batch
from deltaw.kernels import compiled

RESULT = Path(__file__).parent / "results" / "loss_error.json"
BASE = "smollm2-135m"
ROWS, TEXTS, TEXT_TOKENS, PASS_TOKENS = 400, 16, 1024, 2048


def main() -> None:
    hardware.set_threads(None)
    base = load(BASE, dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(deltaw.base_path(BASE), dtype=torch.bfloat16)
    assert compiled.in_use(), "nothing is compiled here"
    documents = {"answers": answers(base), "texts": texts(base)}
    ways: dict[str, Callable[[Batch], Tensor]] = {
        "modules": lambda batch: by_modules(model, batch),
        "torch": lambda batch: by_kernels(base, batch, False),
        "compiled": lambda batch: by_kernels(base, batch, True),
    }
    found = {(kind, way): losses(documents[kind], of) for kind in documents for way, of in ways.items()}
    exact = load(BASE, dtype="float32")
    rows = []
    for kind, examples in documents.items():
        true = losses(examples, lambda batch: by_kernels(exact, batch, False))
        for way in ways:
            off = (found[kind, way] - true).double()
            row = {"tokens": kind, "way": way, "count": len(off), "mean": float(off.mean()), "spread": float(off.std())}
            rows.append(row)
            print("{tokens:8} {way:9} {count:6} tokens: {mean:+.4f} nats, spread {spread:.4f}".format(**row))
    RESULT.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


def answers(base: Base) -> list[Example]:
    """Rows of the demo as the model reads them."""
    encoder = Encoder(base.tokenizer, 2048)
    rows = read_rows(parse_sources([str(demonstration.snippets("train"))], ()))
    return [example for row in rows if not isinstance(row, Fault) for example in encoder.encode(row)][:ROWS]


def texts(base: Base) -> list[Example]:
    """Pieces of the interpreter's own texts, all tokens counted."""
    tokens = np.array(base.tokenizer.encode("\n\n".join(neutral_texts(None))), np.int32)
    pieces = tokens[: len(tokens) // TEXT_TOKENS * TEXT_TOKENS].reshape(-1, TEXT_TOKENS)[:TEXTS]
    weights = np.ones(TEXT_TOKENS, np.float32)
    weights[0] = 0
    return [Example(piece, weights) for piece in pieces]


def losses(examples: list[Example], of: Callable[[Batch], Tensor]) -> Tensor:
    """The loss of every labelled token, passes of so many tokens at a time."""
    parts, waiting = [], list[Example]()
    for example in [*examples, None]:
        if waiting and (example is None or sum(len(x.tokens) for x in (*waiting, example)) > PASS_TOKENS):
            parts.append(of(flat_batch(waiting)))
            waiting = []
        waiting += [] if example is None else [example]
    return torch.cat(parts)


def by_kernels(base: Base, batch: Batch, with_library: bool) -> Tensor:
    with nullcontext() if with_library else compiled.left_out():
        return score_batch(base, batch).losses_N.float()


@torch.no_grad()
def by_modules(model: nn.Module, batch: Batch) -> Tensor:
    """By transformers alone."""
    found = []
    for start, stop in pairwise(batch.bounds):
        logits = model(input_ids=batch.tokens_T[None, start:stop], use_cache=False).logits[0].float()
        here = batch.weights_T[start:stop] != 0
        targets = batch.targets_T[start:stop][here]
        found.append(torch.nn.functional.cross_entropy(logits[here], targets, reduction="none"))
    return torch.cat(found)


if __name__ == "__main__":
    main()
