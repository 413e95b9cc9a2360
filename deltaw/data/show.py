"""A document as the model sees it: stretches of text that are trained, context or control tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from deltaw.data.example import Example


@dataclass(frozen=True)
class Stretch:
    """Consecutive tokens of one kind: their text and ids; `weight` 0 is context, `control` marks control tokens."""

    text: str
    tokens: tuple[int, ...]
    weight: float
    control: bool


def stretches(example: Example, tokenizer: Any, control: set[int]) -> Iterator[Stretch]:
    """The document in order, as long stretches as kinds allow: what is joined gives its text.

    A document's first token is never trained, since nothing predicts it.
    """
    weights = [0.0, *example.weights[1:].tolist()]
    placed = enumerate(zip(example.tokens.tolist(), weights, strict=True))
    for (weight, is_control), group in groupby(placed, lambda item: (item[1][1], item[1][0] in control)):
        tokens = tuple(token for _, (token, _) in group)
        text = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield Stretch(text, tokens, weight, is_control)
