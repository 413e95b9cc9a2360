"""Where the answers lie in a rendered conversation, found out from the template itself. No model's markers are known.

An answer begins where the prompt that asks for it ends (the generation prompt), and ends where the conversation up to
and with it ends. Templates that print a turn differently once others follow (a thought that is dropped, an end of text
that only the last turn has) have no such end; then the answer's text is exchanged for another one, and what changes in
the print is the answer. Where a template marks generations, its marks must name the same text.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from deltaw.data.template import REASONING, Renderer, Span

Code = tuple[str, str]
# Words of which no two begin or end alike: one of three shares neither end with any given text.
_SUBSTITUTES = ("qxjqxjqx", "0vkz0vkz0", "wjkwjkwj")
_THOUGHT_END = "</think>"


@dataclass
class Located:
    """The printed conversation, the spans of its answers by message number, and why others have none."""

    text: str
    spans: dict[int, Span] = field(default_factory=dict)
    faults: dict[int, Code] = field(default_factory=dict)
    notes: list[Code] = field(default_factory=list)


class Locator:
    """Finds the answers of one conversation. `control` matches the control tokens of the tokenizer in a text."""

    def __init__(
        self,
        renderer: Renderer,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[Any],
        control: re.Pattern[str] | None,
    ) -> None:
        self.renderer, self.messages, self.tools, self.control = renderer, list(messages), tools, control
        self.whole = renderer.text(self.messages, tools)

    def locate(self) -> Located:
        """Every answer of the conversation, in order."""
        located = Located(self.whole, notes=list(self.unprinted()))
        answers = [position for position, message in enumerate(self.messages) if message["role"] == "assistant"]
        for position in answers:
            self._locate(position, located)
        if _loses_a_thought(self.messages[answers[-1]], self.whole):
            what = f"the template does not print the thought of message {answers[-1] + 1}"
            located.notes.append(("not-printed", what))
        return located

    def _locate(self, position: int, located: Located) -> None:
        start, exact = self._start(position)
        stop = self._stop(position)
        found = start is not None and stop is not None and start < stop
        # An answer may begin like what the prompt goes on with, as HTML does where that is a tag for thoughts.
        changed = None if found and exact else self._by_substitution(position)
        if changed is not None:
            start = changed[0] if start is None or start > changed[0] else start
            stop = stop if found else self._through_end_of_turn(changed[1])
        if start is None or stop is None or stop <= start:
            why = f"the template renders message {position + 1} differently in its context"
            why += ", so its tokens cannot be told apart"
            located.faults[position] = ("mask-unclear", why)
        elif (missing := self._missing(position, (start, stop))) is not None:
            what = f"the template does not print {missing} of message {position + 1}"
            located.faults[position] = ("answer-missing", what)
        else:
            located.spans[position] = (start, stop)
            if not exact:
                what = f"message {position + 1} does not begin where the prompt for it ends"
                located.notes.append(("generation-prompt", what))

    def _start(self, position: int) -> tuple[int | None, bool]:
        """Where the answer begins, and whether all of the generation prompt stands before it."""
        prompt = self._partly(position, answer_follows=True)
        if prompt is None:
            return None, True
        if self.whole.startswith(prompt):
            return len(prompt), True
        context = self._partly(position)
        common = _common(prompt, self.whole)
        if context is not None and self.whole.startswith(context) and common > len(context):
            return common, False
        return None, True

    def _stop(self, position: int) -> int | None:
        if position + 1 == len(self.messages):
            return len(self.whole)
        behind = self._partly(position + 1)
        return len(behind) if behind is not None and self.whole.startswith(behind) else None

    def _partly(self, count: int, *, answer_follows: bool = False) -> str | None:
        """The first `count` messages printed; None where the template refuses to print so few."""
        try:
            return self.renderer.text(self.messages[:count], self.tools, answer_follows=answer_follows)
        except TemplateError:  # it has printed the whole: what it says about a part is not the user's fault
            return None

    def _by_substitution(self, position: int) -> Span | None:
        """What changes in the print when the answer's text is exchanged: exactly that text, or None."""
        message = self.messages[position]
        answer = str(message.get("content") or "").strip()
        if not answer or message.get("tool_calls"):
            return None
        word = next(w for w in _SUBSTITUTES if answer[0] != w[0] and answer[-1] != w[-1])
        changed = [*self.messages[:position], {**message, "content": word}, *self.messages[position + 1 :]]
        try:
            other = self.renderer.text(changed, self.tools)
        except TemplateError:  # as above
            return None
        start = _common(self.whole, other)
        shared = _common(self.whole[start:][::-1], other[start:][::-1])
        stop = len(self.whole) - shared
        return (start, stop) if self.whole[start:stop].strip() == answer else None

    def _through_end_of_turn(self, stop: int) -> int:
        """Behind the control token that follows the answer at once, if one does."""
        found = None if self.control is None else re.compile(rf"\s*(?:{self.control.pattern})").match(self.whole, stop)
        return stop if found is None else found.end()

    def _missing(self, position: int, span: Span) -> str | None:
        """What of the answer does not stand in its span: its text, or a tool call by its name; None when all does.

        Thoughts before a text may be printed in another form.
        """
        message, printed = self.messages[position], self.whole[slice(*span)]
        if str(message.get("content") or "").split(_THOUGHT_END)[-1].strip() not in printed:
            return "the text"
        names = Counter(call.get("function", call)["name"] for call in message.get("tool_calls") or [])
        return next((f"the tool call {name!r}" for name, count in names.items() if printed.count(name) < count), None)

    def unprinted(self) -> Iterator[Code]:
        """Messages of others whose text the template leaves out, such as a system message that comes too late."""
        for position, message in enumerate(self.messages, 1):
            text = str(message.get("content") or "").strip()
            if message["role"] != "assistant" and text not in self.whole and not self._prints_as_json(text):
                yield "not-printed", f"the template does not print message {position} ({message['role']})"

    def _prints_as_json(self, text: str) -> bool:
        """As some templates print what tools return."""
        return any(json.dumps(text, ensure_ascii=ascii)[1:-1] in self.whole for ascii in (True, False))


def join_marks(located: Located, messages: Sequence[dict[str, Any]], text: str, marks: Sequence[Span]) -> Located:
    """The answers where the template's marks and the renderings agree; a fault where they do not.

    They agree when both hold the message's own text: what they may differ in is what the template adds before and
    behind it. Then training begins at the later beginning and goes to the later end.
    """
    joined = Located(located.text, notes=located.notes)
    positions = [position for position, message in enumerate(messages) if message["role"] == "assistant"]
    if text != located.text:
        for position in positions:
            joined.faults[position] = (
                "masks-disagree",
                "the template prints it differently while it marks generations",
            )
        return joined
    if not marks:
        for position in positions:
            joined.faults[position] = ("nothing-trained", "the chat template leaves nothing of its answers to train")
        return joined
    for position, mark in _marks_of(positions, located, marks).items():
        span = located.spans.get(position)
        if mark is None:
            joined.faults[position] = ("masks-disagree", f"the template marks nothing of message {position + 1}")
        elif span is None:
            joined.spans[position] = mark
        elif _same_answer(text, mark, span, messages[position]):
            joined.spans[position] = (max(mark[0], span[0]), max(mark[1], span[1]))
        else:
            shown = f"the template marks {_short(text, mark)}, its rendering adds {_short(text, span)}"
            joined.faults[position] = ("masks-disagree", f"message {position + 1}: {shown}")
    return joined


def _marks_of(positions: Sequence[int], located: Located, marks: Sequence[Span]) -> dict[int, Span | None]:
    """The marks of each answer as one span: those that overlap it, or in order where no rendering found it."""
    if len(marks) == len(positions):
        return dict(zip(positions, marks, strict=True))
    found: dict[int, Span | None] = {}
    for position in positions:
        span = located.spans.get(position)
        mine = [] if span is None else [mark for mark in marks if mark[0] < span[1] and span[0] < mark[1]]
        found[position] = (mine[0][0], mine[-1][1]) if mine else None
    return found


def _same_answer(text: str, mark: Span, span: Span, message: dict[str, Any]) -> bool:
    answer = str(message.get("content") or "").split(_THOUGHT_END)[-1].strip()
    both = text[max(mark[0], span[0]) : min(mark[1], span[1])]
    return answer in both and bool(both.strip())


def _loses_a_thought(message: dict[str, Any], whole: str) -> bool:
    """Whether a thought of the last answer is not printed; those of earlier ones are left out on purpose by many."""
    content, end, _ = str(message.get("content") or "").partition(_THOUGHT_END)
    given = [content.rpartition("<think>")[2] if end else "", *(message.get(name) for name in REASONING)]
    return any(thought.strip() not in whole for thought in given if isinstance(thought, str))


def _common(left: str, right: str) -> int:
    """How many characters two texts begin with alike."""
    shorter = min(len(left), len(right))
    return next((place for place in range(shorter) if left[place] != right[place]), shorter)


def _short(text: str, span: Span) -> str:
    shown = text[span[0] : span[1]]
    return repr(shown if len(shown) <= 60 else shown[:40] + " … " + shown[-15:])
