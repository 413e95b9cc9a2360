"""Conversations → Examples: token ids, and one weight per token (1 trained, 0 context).

Which tokens are trained is found out from the template itself. Where it marks generations, its marks are used. Else a
conversation is rendered up to each answer and behind it; what the longer text adds is the answer, and it is trained up
to and with its last special token (the end of turn). No marker text of any model is known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jinja2 import TemplateError

from deltaw.data.source import Fault, Row


@dataclass(frozen=True)
class Example:
    """One document: `tokens` (int32) and `weights` (float32, 0 = context), both [T]. `row` is its row number."""

    tokens: np.ndarray
    weights: np.ndarray
    row: int = 0


Span = tuple[int, int]


class Encoder:
    """Turns rows into examples with one tokenizer and its chat template; a row that cannot be used becomes a Fault."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.marked = "{% generation" in (tokenizer.chat_template or "").replace("{%- ", "{% ")
        self.cut_rows = 0

    def encode(self, row: Row) -> list[Example] | Fault:
        """The row's examples: one, or several where a long text is cut into pieces."""
        if row.text is not None:
            return self._encode_text(row)
        encoded = self._encode_chat(row)
        if isinstance(encoded, str):
            return Fault(row.file, row.number, encoded)
        tokens, weights = encoded
        if len(tokens) > self.max_length:
            self.cut_rows += 1
            tokens, weights = tokens[: self.max_length], weights[: self.max_length]
        if not weights[1:].any():
            return Fault(row.file, row.number, f"no trained token is left within max-length {self.max_length}")
        return [Example(tokens, weights, row.number)]

    def _encode_text(self, row: Row) -> list[Example]:
        tokens = self.tokenizer(row.text, add_special_tokens=True)["input_ids"]
        if self.tokenizer.eos_token_id is not None and tokens[-1:] != [self.tokenizer.eos_token_id]:
            tokens = [*tokens, self.tokenizer.eos_token_id]
        pieces = [tokens[start : start + self.max_length] for start in range(0, len(tokens), self.max_length)]
        return [_example(piece, np.ones(len(piece)), row.number) for piece in pieces if len(piece) > 1]

    def _encode_chat(self, row: Row) -> tuple[np.ndarray, np.ndarray] | str:
        if self.tokenizer.chat_template is None:
            return self._encode_without_template(row)
        try:
            return self._by_marks(row) if self.marked else self._by_prefixes(row)
        except (TemplateError, TypeError, ValueError) as error:
            return f"the chat template refuses it ({error})"

    def _encode_without_template(self, row: Row) -> tuple[np.ndarray, np.ndarray] | str:
        """prompt + completion + end of text, for bases that have no chat format."""
        if [message["role"] for message in row.messages] != ["user", "assistant"]:
            return "the base has no chat template, so only prompt and completion, or text, can be used"
        prompt, answer = row.messages[0]["content"], row.messages[1]["content"]
        end = self.tokenizer.eos_token or ""
        return self._mask(prompt + answer + end, [(len(prompt), len(prompt + answer + end))])

    def _by_marks(self, row: Row) -> tuple[np.ndarray, np.ndarray] | str:
        encoded = self.tokenizer.apply_chat_template(
            list(row.messages), tools=list(row.tools) or None, return_dict=True, return_assistant_tokens_mask=True
        )
        weights = np.asarray(encoded["assistant_masks"], np.float32)
        return np.asarray(encoded["input_ids"], np.int32), weights

    def _by_prefixes(self, row: Row) -> tuple[np.ndarray, np.ndarray] | str:
        whole = self.render(row.messages, row.tools)
        spans: list[Span] = []
        for position, message in enumerate(row.messages):
            if message["role"] != "assistant":
                continue
            before = self.render(row.messages[:position], row.tools, answer_follows=True)
            behind = self.render(row.messages[: position + 1], row.tools)
            if not (whole.startswith(before) and whole.startswith(behind) and len(behind) > len(before)):
                return f"the template renders message {position + 1} differently in its context, so its tokens cannot be told apart"
            spans.append((len(before), len(behind)))
        return self._mask(whole, spans)

    def render(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] = (), *, answer_follows: bool = False
    ) -> str:
        """The conversation as the model reads it; with `answer_follows`, up to where its next answer begins."""
        text: str = self.tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=answer_follows
        )
        return text

    def _mask(self, text: str, spans: list[Span]) -> tuple[np.ndarray, np.ndarray] | str:
        """Tokens of `text` with the spans trained, each up to its last special token."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
        weights = np.zeros(len(tokens), np.float32)
        starts = np.fromiter((start for start, _ in offsets), int, len(offsets))
        ends = np.fromiter((end for _, end in offsets), int, len(offsets))
        for start, stop in spans:
            if ((starts < start) & (ends > start)).any():
                return self._mask_piecewise(text, spans)
            inside = np.flatnonzero((starts >= start) & (starts < stop) & (ends > starts))
            weights[self._up_to_end_of_turn(inside, tokens)] = 1
        return np.asarray(tokens, np.int32), weights

    def _mask_piecewise(self, text: str, spans: list[Span]) -> tuple[np.ndarray, np.ndarray] | str:
        """The same with every span tokenised by itself, as it will be when the model has to continue there."""
        tokens: list[int] = []
        trained: list[int] = []
        borders = [0, *(border for span in spans for border in span), len(text)]
        for number, (start, stop) in enumerate(pairwise(borders)):
            piece = self.tokenizer(text[start:stop], add_special_tokens=False)["input_ids"] if stop > start else []
            inside = np.arange(len(tokens), len(tokens) + len(piece))
            tokens += piece
            trained += self._up_to_end_of_turn(inside, tokens).tolist() if number % 2 else []
        if self.tokenizer.decode(tokens) != text:
            return "an answer begins within a token, and cutting there changes the text"
        weights = np.zeros(len(tokens), np.float32)
        weights[trained] = 1
        return np.asarray(tokens, np.int32), weights

    def _up_to_end_of_turn(self, inside: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
        ends = [position for position, index in enumerate(inside) if tokens[index] in self.special]
        return inside[: ends[-1] + 1] if ends else inside


def _example(tokens: Sequence[int], weights: np.ndarray, row: int) -> Example:
    return Example(np.asarray(tokens, np.int32), weights.astype(np.float32), row)


def encode_rows(encoder: Encoder, rows: Iterator[Row | Fault]) -> Iterator[tuple[Row, Example] | Fault]:
    """Every example of the rows with its row, and every fault, in order."""
    for row in rows:
        encoded = row if isinstance(row, Fault) else encoder.encode(row)
        if isinstance(encoded, Fault):
            yield encoded
        else:
            assert isinstance(row, Row)
            yield from ((row, example) for example in encoded)
