"""A chat template as a function of messages: text, and the spans it marks as generated. Bounded in time and memory.

A template is a program that came with a model. transformers' sandbox keeps it from reaching anything; what it may still
do is run for ever or fill the memory. So every call has a bound on processor time, on the memory it may add, and on the
size of a product or power, which are single operations that no clock interrupts.

A template may print the day (`strftime_now`). The day is an argument here, so that the same rows give the same tokens
on every day.
"""

from __future__ import annotations

import contextlib
import datetime
import resource
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from jinja2 import Environment, TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import _compile_jinja_template

MAX_TEMPLATE_BYTES = 1 << 20
MAX_SECONDS = 0.8
MAX_ADDED_BYTES = 128 << 20
MAX_PRODUCT = 1 << 16
MOST_IN_A_ROW = 2
Span = tuple[int, int]
REASONING = ("reasoning_content", "thinking", "reasoning")


class OutOfBounds(TemplateError):
    """A template ran too long or took too much memory."""


class Renderer:
    """The chat template of a tokenizer. `marked` says whether it marks generations (`{% generation %}`)."""

    def __init__(self, tokenizer: Any, today: datetime.date | None = None) -> None:
        self.template: str | dict[str, str] | None = tokenizer.chat_template
        self.marked = marks_generations(self.template)
        self._names = dict(tokenizer.special_tokens_map)
        self._today = today
        self._compiled: dict[str, Any] = {}
        self._exceeded = 0

    def prints_the_day(self) -> bool:
        """Whether what it renders depends on the day."""
        texts = self.template.values() if isinstance(self.template, dict) else [self.template or ""]
        return any("strftime_now" in text for text in texts)

    def text(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), *, answer_follows: bool = False
    ) -> str:
        """The conversation as the model reads it; with `answer_follows`, up to where its next answer begins.

        Raises TemplateError with the template's own words, also when it exceeds its bounds.
        """
        return "".join(self._blocks(messages, tools, answer_follows, None))

    def text_and_marks(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()
    ) -> tuple[str, list[Span]]:
        """The conversation, and the spans of it, [start, stop) in characters, that the template marks as generated."""
        spans: list[Span] = []
        text = "".join(self._blocks(messages, tools, False, spans))
        return text, [(start, stop) for start, stop in spans if stop > start]

    def _blocks(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], follows: bool, spans: list[Span] | None
    ) -> list[str]:
        values = {
            **self._names,
            "messages": [_with_reasoning(message) for message in messages],
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": follows,
        }
        if self._exceeded >= MOST_IN_A_ROW:
            raise TemplateError("the template exceeded its bounds, again and again, and is not asked again")
        try:
            blocks = self._render(values, bool(tools), spans)
        except OutOfBounds:
            self._exceeded += 1
            raise
        except Exception as error:  # a template is a program and fails in any way it likes
            raise TemplateError(str(error) or type(error).__name__) from error
        self._exceeded = 0
        return blocks

    def _render(self, values: dict[str, Any], with_tools: bool, spans: list[Span] | None) -> list[str]:
        with bounded():
            compiled = self._compile(with_tools)
            blocks: list[str] = []
            marks = contextlib.nullcontext() if spans is None else compiled.environment.activate_tracker(blocks, spans)
            with marks:
                for block in compiled.generate(values):  # one by one: a mark counts the characters before its block
                    blocks.append(block)
            return blocks

    def _compile(self, with_tools: bool) -> Any:
        text = self.template
        if isinstance(text, dict):
            text = text["tool_use"] if with_tools and "tool_use" in text else text["default"]
        assert text is not None, "the tokenizer has no chat template"
        if text not in self._compiled:
            if len(text) > MAX_TEMPLATE_BYTES:
                raise TemplateError(f"the template has {len(text):,} characters; {MAX_TEMPLATE_BYTES:,} are allowed")
            environment = _compile_jinja_template(text).environment
            environment.intercepted_binops = frozenset({"*", "**", "%"})
            environment.call_binop = _bounded_operation
            # Its own day: transformers hands the same environment to every renderer of this text.
            self._compiled[text] = environment.from_string(text, globals={"strftime_now": self._strftime})
        return self._compiled[text]

    def _strftime(self, pattern: str) -> str:
        return (self._today or datetime.date.today()).strftime(pattern)


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """Thoughts under each of the names that templates read; transformers does the same."""
    thoughts = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return dict(message) if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}


def marks_generations(template: str | dict[str, str] | None) -> bool:
    """Whether a chat template (or each of several) has a `{% generation %}` block, however it is spaced."""
    if isinstance(template, dict):
        return all(map(marks_generations, template.values()))
    try:
        tokens = [(kind, text) for _, kind, text in Environment().lex(template or "") if kind != "whitespace"]
    except TemplateSyntaxError:  # rendering says so, row by row
        return False
    return any(a[0] == "block_begin" and b == ("name", "generation") for a, b in pairwise(tokens))


# -- bounds ------------------------------------------------------------------------------------------------------------


def _bounded_operation(_context: Any, operator: str, left: Any, right: Any) -> Any:
    """`*`, `**` and `%` of a template, refused where one call could take for ever or return gigabytes."""
    numbers = isinstance(left, int | float) and isinstance(right, int | float)
    if operator == "%":
        if not numbers and len(str(left)) > MAX_PRODUCT:
            raise TemplateError("the template formats a text that is too large")
        return left % right
    if operator == "**":
        if not numbers or abs(right) > 64 or abs(left) > MAX_PRODUCT:
            raise TemplateError("the template raises to a power that is too large")
        return left**right
    if numbers:
        if abs(left) > 1 << 63 or abs(right) > 1 << 63:
            raise TemplateError("the template multiplies numbers that are too large")
    elif any(
        isinstance(part, int) and part * len(other) > MAX_PRODUCT for part, other in ((left, right), (right, left))
    ):
        raise TemplateError("the template repeats a text too often")
    return left * right


@contextlib.contextmanager
def bounded(seconds: float = MAX_SECONDS, added_bytes: int = MAX_ADDED_BYTES) -> Iterator[None]:
    """TemplateError when what runs inside takes more processor time or memory than this.

    Needs the main thread (signals and limits belong to the process); elsewhere the bounds on single operations remain.
    Nested calls are bounded by the outermost one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: Any) -> None:
        raise OutOfBounds(f"the template ran for more than {seconds:g} s")

    previous = signal.signal(signal.SIGVTALRM, stop)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (_data_limit(limits, added_bytes), limits[1]))
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    except MemoryError:
        raise OutOfBounds(f"the template needs more than {added_bytes >> 20} MiB") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        signal.signal(signal.SIGVTALRM, previous)


def _data_limit(limits: tuple[int, int], added_bytes: int) -> int:
    """The data that the process has now plus `added_bytes`, where the system says what it has.

    Of the address space it would be too little: any other thread reserves 128 MiB of that for its first allocation.
    """
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - runs for every row
            present = int(file.read().split()[5]) * resource.getpagesize()
    except OSError:
        return limits[0]
    wanted = present + added_bytes
    return wanted if limits[0] == resource.RLIM_INFINITY else min(wanted, limits[0])
