"""A chat template renders as transformers renders it, and a hostile one ends soon, small, and with a clear error."""

from __future__ import annotations

import datetime
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jinja2 import TemplateError
from models import CHAT_TEMPLATE, byte_tokenizer

from deltaw.data.chat import Encoder
from deltaw.data.formats import Row
from deltaw.data.source import Fault
from deltaw.data.template import Renderer, bounded

CHAT = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})
# What a template may try, and what is said of it.
HOSTILE = {
    "a class of python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__call__.__globals__['os'].system('true') }}",
    "globals of cycler": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "import by attribute": "{{ self._TemplateReference__context.environment.__init__ }}",
    "format of an attribute": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "changing a message": "{% set _ = messages.append(1) %}",
    "underscore in a namespace": "{% set ns = namespace(__class__=1) %}{{ ns.__class__ }}",
    "a string of 1 GB": "{{ 'a' * 10**9 }}",
    "a list of 1 GB": "{{ ([0] * 10**9)|length }}",
    "doubling": "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "joining": "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s]|join %}{% endfor %}",
    "a wide format": "{{ '%1000000000d' % 1 }}",
    "a wide center": "{{ 'a'|center(1000000000) }}",
    "a wide indent": "{{ 'a\na'|indent(1000000000) }}",
    "a huge power": "{{ 10 ** 10 ** 8 }}",
    "squaring": "{% set ns = namespace(n=3) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "a long range": "{% for i in range(10**12) %}{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested loops that print": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "an include": "{% include '/etc/passwd' %}",
    "a megabyte of template": "{# " + "x" * (1 << 20) + " #}",
}  # fmt: skip


def renderer(template: str) -> Renderer:
    return Renderer(byte_tokenizer(template))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_an_error_within_two_seconds(name):
    started = time.process_time()
    with pytest.raises(Exception) as raised:
        renderer(HOSTILE[name]).text(CHAT)
    assert time.process_time() - started < 2
    assert isinstance(raised.value, Exception) and str(raised.value)
    found = Encoder(byte_tokenizer(HOSTILE[name] + CHAT_TEMPLATE), 256).encode(Row("a", 1, CHAT))
    assert (
        isinstance(found, Fault) and found.code == "template-refuses" and "the chat template refuses it" in found.reason
    )


def test_hostile_templates_take_less_than_256_mb_together(tmp_path):
    """In a process of its own: its high-water mark after all of them, over the one before."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from deltaw.hardware import peak_rss_bytes\n"
        "from test_template import HOSTILE, CHAT, renderer\n"
        "renderer('a').text(CHAT)\n"
        "before = peak_rss_bytes()\n"  # the kernel's other counter begins with the peak of whoever started it
        "for template in HOSTILE.values():\n"
        "    try: renderer(template).text(CHAT)\n"
        "    except Exception: pass\n"
        "print(peak_rss_bytes() - before)\n"
    )
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code, str(here)],
        env={"PYTHONPATH": str(here.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0 < int(done.stdout) < 256e6


def test_a_hostile_template_leaves_limits_and_the_next_row_as_they_were():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    for template in HOSTILE.values():
        with pytest.raises(Exception):  # noqa: B017 - each in its own way
            renderer(template).text(CHAT)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert renderer(CHAT_TEMPLATE).text(CHAT).endswith("hello<|im_end|>\n")
    assert len(bytearray(300 << 20)) == 300 << 20


def test_only_one_row_falls_to_a_template_that_turns_hostile_on_it():
    template = "{% if messages[0]['content'] == 'boom' %}{{ 'a' * 10**9 }}{% endif %}" + CHAT_TEMPLATE
    rows = [Row("a", n, ({"role": "user", "content": text}, CHAT[1])) for n, text in enumerate(("a", "boom", "b"), 1)]
    found = list(Encoder(byte_tokenizer(template), 256).encode_many(rows))
    assert [isinstance(one, Fault) for one in found] == [False, True, False]
    assert "repeats a text too often" in found[1].reason


def test_a_template_that_never_ends_is_not_asked_for_every_row():
    """A set of many rows must not take a second for each."""
    rows = [Row("a", number, CHAT) for number in range(200)]
    started = time.process_time()
    found = list(Encoder(byte_tokenizer(HOSTILE["nested loops"] + CHAT_TEMPLATE), 256).encode_many(rows))
    assert all(isinstance(one, Fault) for one in found) and time.process_time() - started < 3
    assert "not asked again" in found[-1].reason


def test_bounds_name_what_was_exceeded():
    with pytest.raises(TemplateError, match=r"ran for more than 0\.1 s"), bounded(seconds=0.1):
        while True:
            pass
    with pytest.raises(TemplateError, match="needs more than 16 MiB"), bounded(added_bytes=16 << 20):
        bytearray(2 << 30)  # more than what this process keeps of freed memory


@pytest.mark.parametrize("tools", [(), ({"type": "function", "function": {"name": "add"}},)])
def test_text_is_what_transformers_renders(tools):
    template = (
        "{{ bos_token }}{% if tools %}{{ tools|tojson }}{% endif %}{% for m in messages %}"
        "{{ m['role'] ~ ': ' ~ m['content']|trim }}{% if m.reasoning_content %} ({{ m.reasoning_content }}){% endif %}\n"
        "{%- if loop.index == 99 %}{% break %}{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = byte_tokenizer(template)
    messages = [CHAT[0], {**CHAT[1], "thinking": "hm"}, {"role": "user", "content": " é \U0001f600 <b> "}]
    for follows in (False, True):
        theirs = tokenizer.apply_chat_template(
            messages, tools=list(tools) or None, tokenize=False, add_generation_prompt=follows
        )
        assert Renderer(tokenizer).text(messages, tools, answer_follows=follows) == theirs


def test_a_day_that_a_template_prints_is_the_one_given():
    tokenizer = byte_tokenizer("{{ strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE)
    for day in (datetime.date(2026, 1, 31), datetime.date(2031, 12, 1)):
        rendered = Renderer(tokenizer, day)
        assert rendered.prints_the_day() and rendered.text(CHAT).startswith(day.strftime("%d %b %Y<|im_start|>"))
    digests = {Encoder(tokenizer, 256, today=datetime.date(2026, 1, day)).digest for day in (1, 2)}
    assert len(digests) == 2, "other tokens may not be found under the same name"
    plain = byte_tokenizer(CHAT_TEMPLATE)
    assert len({Encoder(plain, 256, today=datetime.date(2026, 1, day)).digest for day in (1, 2)}) == 1


def test_messages_are_left_as_they_were():
    messages = [{"role": "assistant", "content": "a", "thinking": "b"}]
    before = json.dumps(messages)
    renderer("{{ messages[0].reasoning_content }}").text(messages)
    assert json.dumps(messages) == before
