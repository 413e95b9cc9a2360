"""What adapting costs elsewhere: loss on neutral text and distance from the base, at several strengths of the adapter.

The neutral text is the interpreter's own help (`pydoc_data.topics`), the same for everybody who has this Python, or any
file. The distance is taken there, and on the base's own answers to prompts that have nothing to do with the task
(prompts.txt, or any file). Strength 0 is the base.

Legend: T tokens, V vocabulary, D documents, S strengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deltaw.adapter import Injection
from deltaw.analysis.curve import FEWEST, mean_interval
from deltaw.base.load import Base
from deltaw.engine.generate import continuation, render_prompt
from deltaw.errors import DataError
from deltaw.kernels import log_probabilities

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MOST_DOCUMENTS, LONGEST_TOKENS, LEAST_TOKENS = 48, 256, 8
ANSWER_TOKENS = 16
PROMPTS = Path(__file__).parent / "prompts.txt"


class Document(NamedTuple):
    """Tokens [T], of which those from `start` on are predicted and measured."""

    tokens_T: Tensor
    start: int


class Distances(NamedTuple):
    """Sums over the measured tokens of each document: loss and KL [S, D], the base's loss and the count [D]."""

    losses_SD: np.ndarray
    kl_SD: np.ndarray
    plain_D: np.ndarray
    counts_D: np.ndarray


def neutral_texts(path: str | Path | None = None) -> list[str]:
    """Paragraph-sized texts: of a file, split at empty lines, or Python's own help. DataError when there are none."""
    if path is None:
        from pydoc_data.topics import topics

        return [text for _, text in sorted(topics.items())]
    return paragraphs(path)


def paragraphs(path: str | Path) -> list[str]:
    """What stands between the empty lines of a text file. DataError when it cannot be read, or holds nothing."""
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error
    found = [part.strip() for part in text.split("\n\n") if part.strip()]
    if not found:
        raise DataError(f"{path} holds no text.")
    return found


@torch.no_grad()
def forgetting(
    base: Base,
    injection: Injection,
    texts: Sequence[str],
    prompts: Sequence[str],
    strengths: Sequence[float] = STRENGTHS,
) -> list[dict[str, Any]]:
    """Per strength: loss on the texts (nats per token), its change against the base, and KL(base ‖ adapted) per token.

    `kl` is of the texts, `prompt_kl` of the base's own answers to the prompts (the most likely tokens, at most 16
    each). Intervals are 95 %, paired by document, and None of fewer than ten. At most 48 texts of at most 256 tokens
    and 48 prompts, spread over all. Raises DataError when no text has enough tokens.
    """
    usual = injection.strength, injection.active
    try:
        neutral, answered = list(_neutral(base, texts)), list(_answered(base, injection, prompts))  # what fails, first
        on_text, on_answers = (_distances(base, injection, some, strengths) for some in (neutral, answered))
    finally:
        injection.strength, injection.active = usual
    return [{"strength": value, **_row(number, on_text, on_answers)} for number, value in enumerate(strengths)]


def _distances(
    base: Base, injection: Injection, documents: Sequence[Document], strengths: Sequence[float]
) -> Distances:
    losses_SD, kl_SD = np.zeros((2, len(strengths), len(documents)))
    plain_D = np.zeros(len(documents))
    for column, document in enumerate(documents):
        injection.active = None
        plain_TV = _log_probabilities(base, document)
        plain_D[column] = _loss(plain_TV, document)
        for row, strength in enumerate(strengths):
            injection.active, injection.strength = (0 if strength else None), strength
            adapted_TV = _log_probabilities(base, document) if strength else plain_TV
            losses_SD[row, column] = _loss(adapted_TV, document)
            kl_SD[row, column] = float((plain_TV.exp() * (plain_TV - adapted_TV)).sum())
    counts = [len(document.tokens_T) - document.start for document in documents]
    return Distances(losses_SD, kl_SD, plain_D, np.asarray(counts, dtype=np.float64))


def _row(number: int, on_text: Distances, on_answers: Distances) -> dict[str, Any]:
    losses_D, counts_D = on_text.losses_SD[number], on_text.counts_D
    return {
        "loss": float(losses_D.sum() / counts_D.sum()),
        **_figure("change", losses_D - on_text.plain_D, counts_D),
        **_figure("kl", on_text.kl_SD[number], counts_D),
        "documents": len(counts_D),
        "tokens": int(counts_D.sum()),
        **_figure("prompt_kl", on_answers.kl_SD[number], on_answers.counts_D),
        "prompts": len(on_answers.counts_D),
        "prompt_tokens": int(on_answers.counts_D.sum()),
    }


def _figure(name: str, sums_D: np.ndarray, counts_D: np.ndarray) -> dict[str, float | None]:
    """The mean per token and its interval; None twice of so few documents that resampling them says nothing."""
    low, high = mean_interval(sums_D, counts_D) if len(counts_D) >= FEWEST else (None, None)
    return {name: float(sums_D.sum() / counts_D.sum()), f"{name}_low": low, f"{name}_high": high}


def _neutral(base: Base, texts: Sequence[str]) -> Iterator[Document]:
    found = 0
    for text in _spread(texts):
        tokens = base.tokenizer(text[: 16 * LONGEST_TOKENS], add_special_tokens=True)["input_ids"][:LONGEST_TOKENS]
        if len(tokens) >= LEAST_TOKENS:
            yield Document(torch.tensor(tokens, device=base.device), 1)
            found += 1
    if not found:
        raise DataError(f"None of the neutral texts has {LEAST_TOKENS} tokens or more.")


def _answered(base: Base, injection: Injection, prompts: Sequence[str]) -> Iterator[Document]:
    """Each prompt with what the base alone answers."""
    injection.active = None
    for prompt in _spread(prompts):
        tokens = render_prompt(base, [{"role": "user", "content": prompt}])
        answer_N = continuation(base, tokens, max_new_tokens=ANSWER_TOKENS)
        yield Document(torch.cat([torch.tensor(tokens, device=base.device), answer_N]), len(tokens))


def _spread(texts: Sequence[str]) -> list[str]:
    count = min(len(texts), MOST_DOCUMENTS)
    return [texts[number * len(texts) // count] for number in range(count)]


def _log_probabilities(base: Base, document: Document) -> Tensor:
    """Of each measured token, [T - start, V] in fp32."""
    return log_probabilities(base.document_logits(document.tokens_T)[document.start - 1 : -1].float())


def _loss(log_TV: Tensor, document: Document) -> float:
    return float(-log_TV.gather(1, document.tokens_T[document.start :, None].long()).sum())
