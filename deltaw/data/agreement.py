"""Do training and use render a conversation alike? Three fixed conversations with their tokens travel with an adapter.

A digest says only that a template or tokenizer changed; the examples say whether that matters, and where. They are made
up here and not taken from the training data, so that sharing an adapter gives away none of its rows.
"""

from __future__ import annotations

import datetime
import json
from typing import Any

from jinja2 import TemplateError

from deltaw.data.template import Renderer

DAY = datetime.date(2026, 1, 31)
_QUESTION = {"role": "user", "content": "What is 2 + 2?\n\nAnswer in one word."}
_ANSWER = {"role": "assistant", "content": "Four."}
CONVERSATIONS: tuple[tuple[dict[str, Any], ...], ...] = (
    (_QUESTION,),
    ({"role": "system", "content": "You are brief."}, _QUESTION),
    (_QUESTION, _ANSWER, {"role": "user", "content": " And  in Français? \U0001f600"}),
)


def examples_of(tokenizer: Any) -> str:
    """The conversations as prompts of this tokenizer and template, as JSON: a list of text and tokens, or of errors."""
    return json.dumps([_example(tokenizer, conversation) for conversation in CONVERSATIONS], ensure_ascii=False)


def _example(tokenizer: Any, conversation: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    if tokenizer.chat_template is None:
        text = "".join(message["content"] for message in conversation)
        return {"text": text, "tokens": tokenizer(text)["input_ids"]}
    try:
        text = Renderer(tokenizer, DAY).text(conversation, answer_follows=True)
    except TemplateError as error:  # it refuses system messages, say
        return {"error": str(error)}
    return {"text": text, "tokens": tokenizer(text, add_special_tokens=False)["input_ids"]}


def template_warning(stored: str | None, tokenizer: Any) -> str:
    """What to say of a tokenizer or template that is not the one the adapter was trained with."""
    if stored is None:
        return (
            "WARNING: the tokenizer or chat template is not the one the adapter was trained with; expect worse answers."
        )
    difference = first_difference(stored, tokenizer)
    if difference is None:
        return "The tokenizer or chat template changed since training, but renders the adapter's three examples alike."
    return (
        "WARNING: conversations are rendered differently from training, so expect worse answers: "
        f"{difference}. Use the template that the adapter was trained with."
    )


def first_difference(stored: str, tokenizer: Any) -> str | None:
    """Where the stored examples and those of this tokenizer part; None when they are equal."""
    for number, (then, now) in enumerate(zip(json.loads(stored), json.loads(examples_of(tokenizer)), strict=True), 1):
        if then == now:
            continue
        if then.get("text") != now.get("text"):
            return f"example {number} was {_around(then, now)!r} and is {_around(now, then)!r}"
        return f"example {number} has the same text, but other tokens"
    return None


def _around(one: dict[str, Any], other: dict[str, Any]) -> str:
    """The text of an example, or its error, around the first character in which it differs from the other."""
    text, another = (str(example.get("text", example.get("error"))) for example in (one, other))
    place = next(
        (i for i, (a, b) in enumerate(zip(text, another, strict=False)) if a != b), min(len(text), len(another))
    )
    return text[max(0, place - 20) : place + 30]
