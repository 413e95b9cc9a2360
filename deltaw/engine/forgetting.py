"""What adapting costs elsewhere: loss on neutral text and distance from the base, at several strengths of the adapter.

The neutral text is the interpreter's own help (`pydoc_data.topics`), the same for everybody who has this Python, or any
file. Strength 0 is the base.

Legend: T tokens, V vocabulary, D documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaw.adapter import Injection
from deltaw.analysis.curve import FEWEST, mean_interval
from deltaw.base.load import Base
from deltaw.errors import DataError
from deltaw.kernels import log_probabilities

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MOST_DOCUMENTS, LONGEST_TOKENS, LEAST_TOKENS = 48, 256, 8


def neutral_texts(path: str | Path | None = None) -> list[str]:
    """Paragraph-sized texts: of a file, split at empty lines, or Python's own help. DataError when there are none."""
    if path is None:
        from pydoc_data.topics import topics

        return [text for _, text in sorted(topics.items())]
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
    base: Base, injection: Injection, texts: Sequence[str], strengths: Sequence[float] = STRENGTHS
) -> list[dict[str, Any]]:
    """Per strength: loss on the texts (nats per token), its change against the base, and KL(base ‖ adapted) per token.

    Intervals are 95 %, paired by document, and None of fewer than ten. At most 48 documents of at most 256 tokens,
    spread over all texts. Raises DataError when no text has enough tokens.
    """
    documents = _documents(base, texts)
    counts_D = np.asarray([len(document) - 1 for document in documents], dtype=np.float64)
    usual = injection.strength, injection.active
    losses = {strength: np.zeros(len(documents)) for strength in strengths}
    distances = {strength: np.zeros(len(documents)) for strength in strengths}
    plain_D = np.zeros(len(documents))
    try:
        for number, tokens_T in enumerate(documents):
            injection.active = None
            plain_TV = _log_probabilities(base, tokens_T)
            plain_D[number] = _loss(plain_TV, tokens_T)
            for strength in strengths:
                injection.active, injection.strength = (0 if strength else None), strength
                adapted_TV = _log_probabilities(base, tokens_T) if strength else plain_TV
                losses[strength][number] = _loss(adapted_TV, tokens_T)
                distances[strength][number] = float((plain_TV.exp() * (plain_TV - adapted_TV)).sum())
    finally:
        injection.strength, injection.active = usual
    return [_row(strength, losses[strength], distances[strength], plain_D, counts_D) for strength in strengths]


def _row(
    strength: float, losses_D: np.ndarray, distances_D: np.ndarray, plain_D: np.ndarray, counts_D: np.ndarray
) -> dict[str, Any]:
    low, high = _interval(losses_D - plain_D, counts_D)
    kl_low, kl_high = _interval(distances_D, counts_D)
    total = counts_D.sum()
    return {
        "strength": strength,
        "loss": float(losses_D.sum() / total),
        "change": float((losses_D - plain_D).sum() / total),
        "change_low": low,
        "change_high": high,
        "kl": float(distances_D.sum() / total),
        "kl_low": kl_low,
        "kl_high": kl_high,
        "documents": len(counts_D),
        "tokens": int(total),
    }


def _interval(sums_D: np.ndarray, counts_D: np.ndarray) -> tuple[float | None, float | None]:
    """The interval of a mean over documents; None twice of so few that resampling them says nothing."""
    return mean_interval(sums_D, counts_D) if len(counts_D) >= FEWEST else (None, None)


def _documents(base: Base, texts: Sequence[str]) -> list[Tensor]:
    count = min(len(texts), MOST_DOCUMENTS)
    spread = [texts[number * len(texts) // count] for number in range(count)]
    found = []
    for text in spread:
        tokens = base.tokenizer(text[: 16 * LONGEST_TOKENS], add_special_tokens=True)["input_ids"][:LONGEST_TOKENS]
        if len(tokens) >= LEAST_TOKENS:
            found.append(torch.tensor(tokens, device=base.device))
    if not found:
        raise DataError(f"None of the neutral texts has {LEAST_TOKENS} tokens or more.")
    return found


def _log_probabilities(base: Base, tokens_T: Tensor) -> Tensor:
    """Of each next token, [T - 1, V] in fp32."""
    return log_probabilities(base.document_logits(tokens_T)[:-1].float())


def _loss(log_TV: Tensor, tokens_T: Tensor) -> float:
    return float(-log_TV.gather(1, tokens_T[1:, None].long()).sum())
