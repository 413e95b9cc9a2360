"""Conversations → Examples: token ids, and one weight per token (1 trained, 0 context).

Which tokens are trained is found out from the template itself. Where it marks generations, its marks are used. Else a
conversation is rendered up to each answer and behind it; what the longer text adds is the answer. Either way it is
trained up to and with its last special token (the end of turn). No marker text of any model is known here.

Text before an answer is tokenised as it will be when the model has to go on from there: where the tokens of the whole
do not begin with those of the part, the parts are tokenised one by one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jinja2 import Environment, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from deltaw.data.source import Fault, Row


@dataclass(frozen=True)
class Example:
    """One document: `tokens` (int32) and `weights` (float32, 0 = context), both [T]. `row` is its row number.

    `cut` says that its row was longer and lost its end.
    """

    tokens: np.ndarray
    weights: np.ndarray
    row: int = 0
    cut: bool = False


Span = tuple[int, int]
Encoded = tuple[list[int], list[Span]]


class Encoder:
    """Turns rows into examples with one tokenizer and its chat template; a row that cannot be used becomes a Fault."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        assert max_length > 1, "a document of one token predicts nothing"
        self.tokenizer, self.max_length = tokenizer, max_length
        self.added = set(tokenizer.added_tokens_decoder)
        self.special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special |= set(tokenizer.all_special_ids)
        self.marked = marks_generations(tokenizer.chat_template)

    def encode(self, row: Row) -> list[Example] | Fault:
        """The row's examples: one, or several where a long text is cut into pieces."""
        encoded = self._encode_text(row) if row.text is not None else self._encode_chat(row)
        return Fault(row.file, row.number, encoded) if isinstance(encoded, str) else encoded

    def _encode_text(self, row: Row) -> list[Example] | str:
        """All of the text, and its end. Pieces overlap by one token: each token but the first is predicted once."""
        tokens = self.tokenizer(row.text, add_special_tokens=True)["input_ids"]
        if self.tokenizer.eos_token_id is not None and tokens[-1:] != [self.tokenizer.eos_token_id]:
            tokens = [*tokens, self.tokenizer.eos_token_id]
        if len(tokens) < 2:
            return "it has a single token, so there is nothing to predict"
        starts = range(0, len(tokens) - 1, self.max_length - 1)
        return [_example(tokens[s : s + self.max_length], [(0, self.max_length)], row.number) for s in starts]

    def _encode_chat(self, row: Row) -> list[Example] | str:
        encoded = self._tokens_and_answers(row)
        if isinstance(encoded, str):
            return encoded
        tokens, answers = encoded
        whole = _example(tokens, answers, row.number)
        if not whole.weights[1:].any():
            return "the chat template leaves nothing of its answers to train"
        if len(tokens) <= self.max_length:
            return [whole]
        part = Example(whole.tokens[: self.max_length], whole.weights[: self.max_length], row.number, cut=True)
        if not part.weights[1:].any():
            return f"no trained token is left within max-length {self.max_length}"
        return [part]

    def _tokens_and_answers(self, row: Row) -> Encoded | str:
        if self.tokenizer.chat_template is None:
            return self._without_template(row)
        if row.messages[0]["role"] == "assistant":
            return "its first message is an answer to nothing"
        try:
            found = self._by_marks(row) if self.marked else self._by_prefixes(row)
        except Exception as error:  # a template is a program and fails in any way it likes
            return f"the chat template refuses it ({str(error) or type(error).__name__})"
        return found if isinstance(found, str) else self._tokenise(*found)

    def _without_template(self, row: Row) -> Encoded | str:
        """prompt + completion + end of text, for bases that have no chat format."""
        if [message["role"] for message in row.messages] != ["user", "assistant"]:
            return "the base has no chat template, so only prompt and completion, or text, can be used"
        begins = self.tokenizer("", add_special_tokens=True)["input_ids"][:1] == [self.tokenizer.bos_token_id]
        prompt = (self.tokenizer.bos_token if begins else "") + row.messages[0]["content"]
        whole = prompt + row.messages[1]["content"] + (self.tokenizer.eos_token or "")
        return self._tokenise(whole, [(len(prompt), len(whole))])

    def _by_marks(self, row: Row) -> tuple[str, list[Span]]:
        """The conversation and where the template marks generations in it."""
        tools = list(row.tools) or None
        rendered: Any = render_jinja_template(
            conversations=[list(row.messages)],
            tools=tools,
            chat_template=self.tokenizer.get_chat_template(tools=tools),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        (text,), (marks,) = rendered
        return text, [(start, stop) for start, stop in marks if stop > start]

    def _by_prefixes(self, row: Row) -> tuple[str, list[Span]] | str:
        """The conversation and what each of its answers adds to it."""
        whole = self.render(row.messages, row.tools)
        spans: list[Span] = []
        for position, message in enumerate(row.messages):
            if message["role"] != "assistant":
                continue
            before = self.render(row.messages[:position], row.tools, answer_follows=True)
            behind = self.render(row.messages[: position + 1], row.tools)
            if not (whole.startswith(before) and whole.startswith(behind) and len(behind) > len(before)):
                return (
                    f"the template renders message {position + 1} differently in its context, "
                    "so its tokens cannot be told apart"
                )
            spans.append((len(before), len(behind)))
        return whole, spans

    def render(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] = (), *, answer_follows: bool = False
    ) -> str:
        """The conversation as the model reads it; with `answer_follows`, up to where its next answer begins."""
        text: str = self.tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=answer_follows
        )
        return text

    def _tokenise(self, text: str, spans: list[Span]) -> Encoded | str:
        """Tokens of `text`, and where among them the spans lie, each up to its last special token."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=self.tokenizer.is_fast)
        tokens, offsets = encoded["input_ids"], encoded.get("offset_mapping", [])
        added = [(start, index) for index, (start, _) in enumerate(offsets) if tokens[index] in self.added]
        places = [self._place(text, tokens, added, border) for span in spans for border in span]
        found = [place for place in places if place is not None]
        if len(found) < len(places):
            return self._tokenise_piecewise(text, spans)
        return tokens, [self._up_to_end_of_turn(tokens, *span) for span in _pairs(found)]

    def _place(self, text: str, tokens: list[int], added: list[Span], border: int) -> int | None:
        """The number of tokens before the border; None where the text before it, by itself, has other tokens.

        That text is tokenised from its last added token on: these tokens are cut out of a text first, so that nothing
        before one depends on what follows it. `added` lists their characters and numbers.
        """
        if border == len(text):
            return len(tokens)
        last = bisect_left(added, (border, 0))
        start, index = added[last - 1] if last else (0, 0)
        head = self._ids(text[start:border])
        return index + len(head) if tokens[index : index + len(head)] == head else None

    def _tokenise_piecewise(self, text: str, spans: list[Span]) -> Encoded | str:
        """The same with every span, and what lies between them, tokenised by itself."""
        tokens: list[int] = []
        places = []
        borders = [0, *(border for span in spans for border in span), len(text)]
        for start, stop in pairwise(borders):
            places.append(len(tokens))
            tokens += self._ids(text[start:stop])
        if self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False) != text:
            return "an answer begins or ends within a token, and cutting there changes the text"
        return tokens, [self._up_to_end_of_turn(tokens, *span) for span in _pairs(places[1:])]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _up_to_end_of_turn(self, tokens: Sequence[int], start: int, stop: int) -> Span:
        ends = [place for place in range(start, stop) if tokens[place] in self.special]
        return start, ends[-1] + 1 if ends else stop


def marks_generations(template: str | dict[str, str] | None) -> bool:
    """Whether a chat template (or each of several) has a `{% generation %}` block, however it is spaced."""
    if isinstance(template, dict):
        return all(map(marks_generations, template.values()))
    try:
        tokens = [(kind, text) for _, kind, text in Environment().lex(template or "") if kind != "whitespace"]
    except TemplateSyntaxError:  # rendering says so, row by row
        return False
    return any(a[0] == "block_begin" and b == ("name", "generation") for a, b in pairwise(tokens))


def _pairs(places: Sequence[int]) -> list[Span]:
    return list(zip(places[::2], places[1::2], strict=True))


def _example(tokens: Sequence[int], trained: Sequence[Span], row: int) -> Example:
    weights = np.zeros(len(tokens), np.float32)
    for start, stop in trained:
        weights[start:stop] = 1
    return Example(np.asarray(tokens, np.int32), weights, row)


def encode_rows(encoder: Encoder, rows: Iterator[Row | Fault]) -> Iterator[tuple[Row, Example] | Fault]:
    """Every example of the rows with its row, and every fault, in order."""
    for row in rows:
        encoded = row if isinstance(row, Fault) else encoder.encode(row)
        if isinstance(encoded, Fault):
            yield encoded
        else:
            assert isinstance(row, Row)
            yield from ((row, example) for example in encoded)
