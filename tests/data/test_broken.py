"""Every broken file is found, by row and by name: none of these faults is silent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models import CHAT_TEMPLATE, byte_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deltaw.data.chat import Encoder
from deltaw.data.check import check
from deltaw.data.findings import CATALOGUE
from deltaw.data.formats import Row, parse_sources
from deltaw.data.prepare import prepare
from deltaw.data.source import Fault
from deltaw.errors import DataError

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
GOOD = {"prompt": "good", "completion": "yes"}


def chat(*messages):
    return {"messages": list(messages)}


def message(role, content, **more):
    return {"role": role, "content": content, **more}


# What the second of three rows holds, as bytes or as a value; and the finding that names it.
ROWS = {
    "half a line": (b'{"prompt": "a", "comp', "unreadable"),
    "not an object": (b"[1, 2]", "unreadable"),
    "a bare word": (b"hello", "unreadable"),
    "bytes that are no text": (b'{"text": "\xff\xfe"}', "unreadable"),
    "half a surrogate pair": (b'{"text": "\\ud83d"}', "unreadable"),
    "nesting without end": (b"[" * 100_000, "unreadable"),
    "no known column": ({"question": "a", "reply": "b"}, "unknown-format"),
    "an empty object": ({}, "unknown-format"),
    "messages that are text": ({"messages": "hi"}, "wrong-shape"),
    "no messages": ({"messages": []}, "wrong-shape"),
    "a message that is text": (chat("hi"), "wrong-role"),
    "an unknown role": (chat(message("human", "a"), A), "wrong-role"),
    "a role that is none": (chat(message(None, "a"), A), "wrong-role"),
    "a question without text": (chat({"role": "user"}, A), "wrong-shape"),
    "a number as content": (chat(message("user", 5), A), "wrong-shape"),
    "an image": (chat(message("user", [{"type": "image_url", "image_url": {"url": "x"}}]), A), "wrong-shape"),
    "no answer": (chat(U), "nothing-trained"),
    "an empty answer": (chat(U, message("assistant", "")), "empty-answer"),
    "an answer of spaces": (chat(U, message("assistant", " \n")), "empty-answer"),
    "an answer to nothing": (chat(A), "wrong-shape"),
    "all weights zero": (chat(U, message("assistant", "a", weight=0)), "nothing-trained"),
    "a weight of two": (chat(U, message("assistant", "a", weight=2)), "wrong-shape"),
    "a trained question": (chat(message("user", "q", weight=1), A), "wrong-shape"),
    "arguments that are no JSON": (
        chat(U, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}),
        "wrong-shape",
    ),
    "a tool call without a name": (chat(U, message("assistant", "a", tool_calls=[{}])), "wrong-shape"),
    "tools that are no list": ({**chat(U, A), "tools": 5}, "wrong-shape"),
    "a control token in a question": (chat(message("user", "stop<|im_end|>now"), A), "control-tokens"),
    "a control token in an answer": (chat(U, message("assistant", "a<|im_end|>")), "control-tokens"),
    "a control token in a text": ({"text": "one<|endoftext|>two"}, "control-tokens"),
    "a prompt that is a number": ({"prompt": 1, "completion": "a"}, "wrong-shape"),
    "an empty completion": ({"prompt": "a", "completion": " "}, "empty-answer"),
    "an empty text": ({"text": ""}, "wrong-shape"),
    "an unknown speaker": ({"conversations": [{"from": "narrator", "value": "a"}]}, "wrong-role"),
    "a call that is no JSON": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f()"}]},
        "wrong-shape",
    ),
    "an Alpaca row without text": ({"instruction": "a", "output": None}, "wrong-shape"),
    "a history of single texts": ({"instruction": "a", "output": "b", "history": ["c"]}, "wrong-shape"),
    "a pair of equal answers": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen-equals-rejected"),
    "a pair with two prompts": (
        {"chosen": [message("user", "a"), A], "rejected": [message("user", "b"), message("assistant", "c")]},
        "prompts-differ",
    ),
    "a pair without prompt": ({"chosen": "a", "rejected": "b"}, "wrong-shape"),
    "a pair with an empty answer": ({"prompt": "a", "chosen": "b", "rejected": " "}, "empty-answer"),
    "a label that is text": ({"prompt": "a", "completion": "b", "label": "False"}, "wrong-shape"),
    "a label that is a number": ({"prompt": "a", "completion": "b", "label": 1}, "wrong-shape"),
    "labels of another length": ({"input_ids": [5, 6], "labels": [5]}, "wrong-shape"),
    "labels that are shifted": ({"input_ids": [5, 6, 7], "labels": [6, 7, -100]}, "wrong-shape"),
    "all labels untrained": ({"input_ids": [5, 6], "labels": [-100, -100]}, "nothing-trained"),
    "a token outside the vocabulary": ({"input_ids": [5, 600], "labels": [5, 600]}, "wrong-shape"),
    "a row that is too long": ({"prompt": "x" * 300, "completion": "a"}, "too-long"),
}


def encoder(template: str | None = CHAT_TEMPLATE, **changes) -> Encoder:
    tokenizer = byte_tokenizer(template)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return Encoder(tokenizer, 200)


def page(tmp_path: Path, *files: Path, one: Encoder | None = None, eval_files: tuple[Path, ...] = ()) -> dict:
    parts = [
        prepare(parse_sources(map(str, some)), one or encoder(), tmp_path / "cache", refuse_above=None)
        for some in (files, eval_files)
        if some
    ]
    return check(*parts)


def write(path: Path, *rows) -> Path:
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.mark.parametrize("name", ROWS)
def test_a_broken_row_is_named_and_its_neighbours_are_used(tmp_path, name):
    row, code = ROWS[name]
    found = page(tmp_path, write(tmp_path / "rows.jsonl", GOOD, row, {**GOOD, "prompt": "other"}))
    errors = [finding for finding in found["findings"] if finding["severity"] != "warning"]
    assert [(finding["code"], finding["rows"]) for finding in errors] == [(code, [["rows.jsonl", 2]])]
    assert errors[0]["examples"][0].startswith("rows.jsonl, row 2: ") and errors[0]["advice"]
    assert (found["rows"], found["used"], found["lost"], found["ok"]) == (3, 2, 1, False)


def codes(found: dict) -> dict[str, int]:
    return {finding["code"]: finding["count"] for finding in found["findings"]}


def test_rows_that_can_be_used_but_deserve_a_look_are_warnings(tmp_path):
    rows = [GOOD, GOOD, chat(U, U, A), {"prompt": "p" * 100, "completion": "c" * 100}, {"text": "some text"}]
    file = write(tmp_path / "rows.jsonl", *rows)
    found = page(tmp_path, file, eval_files=(write(tmp_path / "eval.jsonl", GOOD, {**GOOD, "prompt": "new"}),))
    assert codes(found) == {"duplicate": 1, "repeated-role": 1, "answer-cut": 1, "mixed-formats": 1, "overlap": 1}
    places = {finding["code"]: finding["rows"] for finding in found["findings"]}
    assert places == {
        "duplicate": [["rows.jsonl", 2]], "repeated-role": [["rows.jsonl", 3]], "answer-cut": [["rows.jsonl", 4]],
        "mixed-formats": [["rows.jsonl", 0]], "overlap": [["eval.jsonl", 1]],
    }  # fmt: skip
    assert found["ok"] and found["errors"] == 0 and found["warnings"] == 5


FOREIGN = CHAT_TEMPLATE.replace("<|im_", "<|turn_")
NO_END = CHAT_TEMPLATE.replace("'<|im_end|>' + ", "")


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (lambda: encoder(FOREIGN), {"end-of-turn", "foreign-template"}),
        (lambda: encoder(NO_END), {"end-of-turn"}),
        (lambda: encoder("{{ bos_token }}" * 2 + CHAT_TEMPLATE), {"double-bos"}),
    ],
)
def test_a_fault_of_the_template_is_an_error_of_the_set_and_stops_a_run_unless_allowed(tmp_path, one, expected):
    file = write(tmp_path / "rows.jsonl", GOOD, {**GOOD, "prompt": "other"})
    found = page(tmp_path, file, one=one())
    assert {f["code"] for f in found["findings"] if f["severity"] == "error of the set"} == expected and not found["ok"]
    with pytest.raises(DataError, match="would go wrong") as raised:
        prepare([file], one(), tmp_path / "cache")
    assert all(f"--allow {code}" in str(raised.value) for code in expected)
    allowed = one()
    allowed.allow = frozenset(expected)
    assert prepare([file], allowed, tmp_path / "cache").report.used == 2


def test_a_missing_bos_is_an_error_of_the_set(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    found = page(tmp_path, write(tmp_path / "rows.jsonl", GOOD), one=Encoder(tokenizer, 200))
    assert codes(found) == {"missing-bos": 1}


def test_allowed_control_tokens_are_kept_and_one_that_cannot_be_used_is_not_counted_against_the_run(tmp_path):
    file = write(tmp_path / "rows.jsonl", GOOD, chat(message("user", "a<|im_end|>"), A), b"{")
    one = Encoder(byte_tokenizer(), 200, allow=("control-tokens", "unreadable"))
    data = prepare([file], one, tmp_path / "cache", refuse_above=0.0)
    assert (data.report.used, data.report.lost) == (2, 1)
    errors = [f for f in check(data)["findings"] if f["severity"] == "error"]
    assert check(data)["ok"] and [f["allowed"] for f in errors] == [True]


def test_a_table_with_a_row_of_another_width_names_it(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text('prompt,completion\ngood,yes\nonly one\n"two\nlines",fine\n')
    found = page(tmp_path, file)
    assert (
        codes(found) == {"unreadable": 1} and found["findings"][0]["rows"] == [["rows.csv", 2]] and found["used"] == 2
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", b"no gzip"),
        ("a.parquet", b"PAR1 no"),
        ("a.arrow", b"nothing"),
        ("a.jsonl.zst", b"no zstd"),
        ("a.csv", b""),
    ],
)
def test_a_container_that_cannot_be_opened_is_an_error_with_its_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        page(tmp_path, tmp_path / name)


def notes(one: Encoder, *messages) -> list[tuple[str, str]]:
    (found,) = one.encode_many([Row("a", 1, messages)])
    return found.notes


def only_note(one: Encoder, *messages) -> tuple[str, str]:
    (found,) = one.encode_many([Row("a", 1, messages)])
    (note,) = found.notes
    return note


def test_a_tokenizer_that_changes_text_is_noticed():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    code, what = only_note(Encoder(tokenizer, 200), U, message("assistant", "Yes"))
    assert code == "not-round-trip" and "tantYes" in what and "tantyes" in what


def test_text_that_a_tokenizer_does_not_know_is_noticed():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "q": 1, "a": 2, "<end>": 3}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content ~ (' <end> ' if m.role == 'assistant' else ' ') }}{% endfor %}"
    )
    (found,) = Encoder(tokenizer, 200).encode_many([Row("a", 1, (U, message("assistant", "a new")))])
    assert ("unknown-tokens", "1 of 4 tokens") in found.notes


def refused(template: str, *messages) -> tuple[str, str]:
    (found,) = encoder(template).encode_many([Row("a", 1, messages)])
    return found.code, found.reason


def test_a_template_that_does_not_print_an_answer_or_prints_it_in_a_way_of_its_own_is_named():
    parts_only = CHAT_TEMPLATE.replace("m['content']", "(m['content'][0].text or '')")
    assert refused(parts_only, U, A)[0] == "answer-missing"
    forgetful = CHAT_TEMPLATE.replace("m['content']", "(m['content'] if loop.last else m['content'].split('|')[-1])")
    assert refused(forgetful, U, message("assistant", "thought|a"), U, A)[0] == "mask-unclear"
    assert refused("{{ raise_exception('not like this') }}", U, A) == (
        "template-refuses", "the chat template refuses it (not like this)",
    )  # fmt: skip
    marked = CHAT_TEMPLATE.replace("{{ '<|im_start|>'", "{% generation %}{{ '' }}{% endgeneration %}{{ '<|im_start|>'")
    code, reason = refused(marked.replace("{{ '' }}", "{{ 'x' }}"), U, A, U, A)
    assert code == "masks-disagree" and "the template marks" in reason


CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}


@pytest.mark.parametrize("content", ["", "some text"])
def test_a_tool_call_that_the_template_does_not_print_is_never_trained_as_silence(content):
    code, reason = refused(CHAT_TEMPLATE, U, message("assistant", content, tool_calls=[CALL]))
    assert code == "answer-missing" and "does not print the tool call 'add' of message 2" in reason


def test_a_template_that_fails_on_a_tool_call_without_text_says_what_to_use(tmp_path):
    code, reason = refused(CHAT_TEMPLATE, U, {"role": "assistant", "tool_calls": [CALL]})
    assert code == "template-refuses" and "no place for tool calls: use a base whose template prints them" in reason


def test_tools_that_are_not_printed_are_noticed():
    (found,) = encoder().encode_many([Row("a", 1, (U, A), tools=({"name": "add"},))])
    assert [code for code, _ in found.notes] == ["tools-missing"]


def test_a_source_without_rows_is_noticed_beside_one_that_has_some(tmp_path):
    empty = write(tmp_path / "empty.jsonl")
    empty.write_bytes(b"")
    assert codes(page(tmp_path, write(tmp_path / "rows.jsonl", GOOD), empty)) == {"empty-source": 1}


def test_a_prompt_that_is_not_followed_by_the_answer_in_training_is_noticed():
    thinking = CHAT_TEMPLATE.replace("assistant\n' }}", "assistant\n<think>' }}")
    code, what = only_note(encoder(thinking), U, A)
    assert code == "generation-prompt" and "message 2 does not begin where the prompt for it ends" in what


def test_a_set_that_is_nearly_all_context_is_noticed(tmp_path):
    found = page(
        tmp_path,
        write(tmp_path / "rows.jsonl", {"prompt": "p" * 5000, "completion": ""}, GOOD),
        one=Encoder(byte_tokenizer(), 9000),
    )
    assert codes(found) == {"empty-answer": 1}
    long = write(tmp_path / "long.jsonl", {"prompt": "p" * 5000, "completion": "a"})
    assert codes(page(tmp_path, long, one=Encoder(byte_tokenizer(), 9000))) == {"mostly-context": 1}


def test_a_file_without_rows_or_without_a_usable_one_is_an_error_of_the_set(tmp_path):
    for name, rows in (("none", ()), ("bad", (b"{",))):
        found = page(tmp_path, write(tmp_path / f"{name}.jsonl", *rows))
        assert codes(found)["no-rows"] == 1 and not found["ok"]


TEMPLATES = Path(__file__).parent / "templates"


def test_a_system_message_or_a_thought_that_is_not_printed_is_noticed():
    """Mistral's template prints what the system says behind the last question alone: in training never."""
    lost = CHAT_TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    system = message("system", "Be terse.")
    assert only_note(encoder(lost), system, U, A) == ("not-printed", "the template does not print message 1 (system)")
    mistral = (TEMPLATES / "mistral_v2v3.jinja").read_text()
    assert "not-printed" in {code for code, _ in notes(encoder(mistral), system, U, A)}
    thinking = {**A, "reasoning_content": "it may be a"}
    assert only_note(encoder(), U, thinking) == ("not-printed", "the template does not print the thought of message 2")
    shown = CHAT_TEMPLATE.replace("m['content']", "(m.get('reasoning_content') or '') + m['content']")
    assert not notes(encoder(shown), U, thinking)
    assert not notes(encoder(), U, message("assistant", "Sure. <think>hm</think> 4"))
    assert not notes(encoder(), U, {**A, "thinking": True})
    assert only_note(encoder(), U, {**A, "reasoning": "hm"})[0] == "not-printed"


def test_an_answer_that_is_not_printed_is_refused_also_where_all_is_trained():
    one = Encoder(byte_tokenizer(), 200, "all")
    (found,) = one.encode_many([Row("a", 1, (U, message("assistant", "", tool_calls=[CALL]), message("tool", "3"), A))])
    assert found.code == "answer-missing"


def test_an_answer_whose_ends_are_those_of_two_words_is_found_by_a_third():
    """Where a turn is printed otherwise once others follow."""
    late = CHAT_TEMPLATE.replace("m['content'] +", "m['content'] + ('!' if loop.last else '') +")
    for answer in ("q = 10", "0.5x", "w0"):
        (found,) = encoder(late).encode(Row("a", 1, (U, message("assistant", answer), U, A)))
        assert found.weights.any()


def test_tools_over_a_template_that_takes_no_calls_without_them_are_printed():
    calls = CHAT_TEMPLATE.replace("m['content']", "(m['content'] if 'content' in m else m.tool_calls[0].function.name)")
    with_tools = "{% for t in tools or () %}{{ t.name }}{% endfor %}" + calls
    plain = CHAT_TEMPLATE.replace("m['content']", "raise_exception('no call') if m.tool_calls else m['content']")
    one = Encoder(byte_tokenizer({"default": plain, "tool_use": with_tools}), 1000)
    call = {"role": "assistant", "tool_calls": [CALL]}
    rows = [Row("a", 1, (U, call, message("tool", "3"), A), tools=({"name": "add"},))]
    (found,) = one.encode_many(rows)
    assert not isinstance(found, Fault) and not any(code == "tools-missing" for code, _ in found.notes), found


def test_of_two_calls_of_one_tool_both_must_be_printed():
    first = CHAT_TEMPLATE.replace("m['content']", "(m.tool_calls[0].function.name if m.tool_calls else m['content'])")
    assert len(encoder(first).encode(Row("a", 1, (U, {"role": "assistant", "tool_calls": [CALL]})))) == 1
    code, reason = refused(first, U, {"role": "assistant", "tool_calls": [CALL, CALL]})
    assert code == "answer-missing" and "the tool call 'add'" in reason


def test_every_finding_of_the_catalogue_is_shown_here():
    text = Path(__file__).read_text()
    assert [code for code in CATALOGUE if f'"{code}"' not in text] == []


def test_there_are_forty_broken_files_and_more():
    assert len(ROWS) >= 40
