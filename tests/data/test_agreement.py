"""Three fixed conversations tell whether use renders as training did, and where not."""

from __future__ import annotations

import json

from models import CHAT_TEMPLATE, byte_tokenizer

from deltaw.data.agreement import CONVERSATIONS, examples_of, first_difference, template_warning


def test_examples_hold_the_prompts_and_their_tokens():
    tokenizer = byte_tokenizer()
    examples = json.loads(examples_of(tokenizer))
    assert len(examples) == len(CONVERSATIONS) == 3
    for example, conversation in zip(examples, CONVERSATIONS, strict=True):
        assert tokenizer.decode(example["tokens"]) == example["text"]
        theirs = tokenizer.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=True)
        assert example["text"] == theirs


def test_equal_rendering_is_no_difference_whatever_the_template_is_called():
    stored = examples_of(byte_tokenizer())
    changed = byte_tokenizer("{# another text of the same meaning #}" + CHAT_TEMPLATE)
    assert first_difference(stored, changed) is None
    assert template_warning(stored, changed).endswith("renders the adapter's three examples alike.")


def test_a_difference_is_shown_where_it_begins():
    stored = examples_of(byte_tokenizer())
    found = template_warning(stored, byte_tokenizer(CHAT_TEMPLATE.replace("assistant\n", "assistant:")))
    assert found.startswith("WARNING") and "'|im_start|>assistant\\n' and is '|im_start|>assistant:'" in found
    tokens = byte_tokenizer()
    tokens.add_tokens(["What"])
    assert first_difference(stored, tokens) == "example 1 has the same text, but other tokens"


def test_a_template_that_refuses_system_messages_is_compared_by_what_it_says():
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
    stored = examples_of(byte_tokenizer(refusing))
    assert json.loads(stored)[1] == {"error": "no system"}
    assert first_difference(stored, byte_tokenizer(refusing)) is None
    assert "example 2 was 'no system' and is" in first_difference(stored, byte_tokenizer())


def test_a_base_without_a_template_has_examples_too():
    stored = examples_of(byte_tokenizer(None))
    assert first_difference(stored, byte_tokenizer(None)) is None and json.loads(stored)[0]["text"].startswith("What")


def test_an_adapter_without_examples_gets_the_plain_warning():
    assert template_warning(None, byte_tokenizer()).startswith("WARNING: the tokenizer or chat template is not the one")


def test_each_example_is_rendered_by_itself():
    """A renderer gives up on a template that ran too long twice; the third example still says what it does."""
    endless = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
    examples = json.loads(examples_of(byte_tokenizer(endless)))
    assert [set(each) for each in examples] == [{"error"}] * len(CONVERSATIONS)
    assert all("ran for more than" in each["error"] for each in examples)
