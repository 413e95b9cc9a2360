"""Trained is what the model has to say and where it has to stop, in any template; context is what it will read."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import transformers
from models import CHAT_TEMPLATE, byte_tokenizer
from tokenizers import Tokenizer, normalizers
from tokenizers.processors import TemplateProcessing

from deltaw.base.builtin import base_path
from deltaw.data.chat import Encoder
from deltaw.data.formats import Row, read_rows
from deltaw.data.source import Fault
from deltaw.data.template import marks_generations
from deltaw.engine.generate import render_prompt
from deltaw.errors import BaseError

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
    "+ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = (  # as reasoning models do: earlier answers lose their thoughts
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENDS = {
    "chatml": (CHAT_TEMPLATE, "<|im_end|>", ()),
    "llama3": (LLAMA3, "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "gemma": (GEMMA, "<end_of_turn>", ("<start_of_turn>", "<end_of_turn>")),
    "mistral": (MISTRAL, "</s>", ("[INST]", "[/INST]", "</s>")),
    "marked": (MARKED, "<|im_end|>", ()),
}


def tokenizer_for(template, special=()):
    tokenizer = byte_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def merging_tokenizer(template, *merges, **parts):
    """The byte tokenizer with further tokens made of two others; "Ċ" is a newline, "Ġ" a space."""
    content = byte_tokenizer(template).backend_tokenizer
    vocabulary = content.get_vocab()
    description = json.loads(content.to_str())
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
        description["model"]["merges"].append([left, right])
    description["model"]["vocab"] = vocabulary
    changed = Tokenizer.from_str(json.dumps(description))
    for name, part in parts.items():
        setattr(changed, name, part)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=changed, bos_token="<|endoftext|>", eos_token="<|im_end|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template
    return tokenizer


def chat(*texts, roles=("user", "assistant")):
    messages = [{"role": roles[place % len(roles)], "content": text} for place, text in enumerate(texts)]
    return Row("chats.jsonl", 3, tuple(messages))


def encoded(tokenizer, row, max_length=500):
    (example,) = Encoder(tokenizer, max_length).encode(row)
    return example


def trained_text(tokenizer, example):
    return tokenizer.decode(example.tokens[example.weights > 0])


def fault(tokenizer, row, max_length=500):
    found = Encoder(tokenizer, max_length).encode(row)
    assert isinstance(found, Fault) and (found.file, found.number) == (row.file, row.number)
    return found.reason


def starts_as_it_will_be_read(tokenizer, example, row):
    prompt = render_prompt(SimpleNamespace(tokenizer=tokenizer, context_tokens=256), row.messages[:-1])
    return example.tokens[: len(prompt)].tolist() == prompt and example.weights[len(prompt)] == 1


# -- templates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENDS)
def test_trained_are_the_answers_with_their_ends_of_turn_and_nothing_else(name):
    template, end, special = ENDS[name]
    tokenizer = tokenizer_for(template, special)
    lead = " " if name == "mistral" else ""
    for row in (chat("2 + 2?", "4"), chat("hé\U0001f600?", "naïve\n\nanswer: 5", "and?", "6\tno")):
        example = encoded(tokenizer, row)
        answers = [message["content"] for message in row.messages[1::2]]
        assert trained_text(tokenizer, example) == "".join(f"{lead}{answer}{end}" for answer in answers)
        whole = tokenizer.apply_chat_template(list(row.messages), return_dict=True)["input_ids"]
        assert example.tokens.tolist() == whole and example.row == 3 and not example.cut
        assert (example.tokens.dtype, example.weights.dtype) == (np.int32, np.float32)
        assert starts_as_it_will_be_read(tokenizer, encoded(tokenizer, chat(*answers[:1] * 2)), chat(*answers[:1] * 2))


def test_marks_give_the_mask_of_transformers_and_that_of_prefixes():
    tokenizer = tokenizer_for(MARKED)
    row = chat("a", "b c", "d", "é")
    by_marks = encoded(tokenizer, row)
    theirs = tokenizer.apply_chat_template(list(row.messages), return_dict=True, return_assistant_tokens_mask=True)
    assert by_marks.weights.tolist() == theirs["assistant_masks"]
    encoder = Encoder(tokenizer, 500)
    assert encoder.marked
    encoder.marked = False
    (by_prefixes,) = encoder.encode(row)
    assert (by_marks.tokens == by_prefixes.tokens).all() and (by_marks.weights == by_prefixes.weights).all()


@pytest.mark.parametrize("block", ["{% G %}", "{%- G -%}", "{%G%}", "{%+ G %}", "{%-  G-%}", "{%\n G\n%}"])
def test_marks_are_seen_however_they_are_spaced(block):
    assert marks_generations("a" + block.replace("G", "generation") + "b{% endgeneration %}")


@pytest.mark.parametrize(
    "template",
    [
        None,
        "",
        "{# {% generation %} #}",
        "{{ '{% generation %}' }}",
        "{% set generation = 1 %}",
        "{% raw %}{% generation %}{% endraw %}",
        "{% if",
    ],
)
def test_what_only_looks_like_marks_is_none(template):
    assert not marks_generations(template)


def test_several_templates_are_marked_when_each_is():
    assert marks_generations({"default": MARKED, "tool_use": MARKED})
    assert not marks_generations({"default": MARKED, "tool_use": CHAT_TEMPLATE})
    tokenizer = tokenizer_for({"default": MARKED, "tool_use": CHAT_TEMPLATE})
    assert trained_text(tokenizer, encoded(tokenizer, chat("a", "b"))) == "b<|im_end|>"


def test_system_and_tool_turns_are_context():
    tokenizer = tokenizer_for(CHAT_TEMPLATE)
    row = chat("be short", "2 + 2?", "add(2, 2)", "4", "It is 4.", roles=("system", "user", "assistant", "tool"))
    row = Row("a", 1, (*row.messages[:4], {"role": "assistant", "content": "It is 4."}))
    assert trained_text(tokenizer, encoded(tokenizer, row)) == "add(2, 2)<|im_end|>It is 4.<|im_end|>"


def test_tools_reach_the_template():
    tokenizer = tokenizer_for("{% for t in tools or [] %}{{ t['name'] }}{% endfor %}" + CHAT_TEMPLATE)
    row = Row("a", 1, chat("a", "b").messages, tools=({"name": "adder"},))
    example = encoded(tokenizer, row)
    assert tokenizer.decode(example.tokens).startswith("adder<|im_start|>")
    assert trained_text(tokenizer, example) == "b<|im_end|>"


def test_a_template_that_refuses_a_row_is_a_fault_with_its_own_words():
    gemma = tokenizer_for(GEMMA, ENDS["gemma"][2])
    assert "System role not supported" in fault(gemma, chat("be short", "4", roles=("system", "assistant")))
    assert "refuses" in fault(tokenizer_for("{{ messages[0]['content'] / 2 }}"), chat("a", "b"))
    assert "refuses" in fault(tokenizer_for("{% if"), chat("a", "b"))
    assert "answer to nothing" in fault(gemma, chat("hello", roles=("assistant",)))
    marks_nothing = MARKED.replace("{% generation %}", "{% generation %}{% endgeneration %}", 1)
    marks_nothing = marks_nothing.replace("{% endgeneration %}{% else %}", "{% else %}")
    assert "nothing of its answers" in fault(tokenizer_for(marks_nothing), chat("a", "b"))


def test_a_template_that_forgets_earlier_turns_is_a_fault_that_names_the_message():
    tokenizer = tokenizer_for(FORGETFUL)
    assert trained_text(tokenizer, encoded(tokenizer, chat("a", "so</think>b"))) == "so</think>b<|im_end|>"
    assert trained_text(tokenizer, encoded(tokenizer, chat("a", "b", "c", "d"))) == "b<|im_end|>d<|im_end|>"
    assert "message 2 differently" in fault(tokenizer, chat("a", "so</think>b", "c", "d"))


# -- token borders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["\n\nhello", " hello", "\nhello", "hello\n\n", "\n\n", "  \n\n x"])
def test_an_answer_that_begins_within_a_token_is_tokenised_from_its_own_beginning(answer):
    tokenizer = merging_tokenizer(CHAT_TEMPLATE, ("Ċ", "Ċ"), ("Ġ", "h"))
    for row in (chat("a", answer), chat("a", answer, "b", answer)):
        example = encoded(tokenizer, row)
        assert trained_text(tokenizer, example) == f"{answer}<|im_end|>" * (len(row.messages) // 2)
        assert tokenizer.decode(example.tokens) == Encoder(tokenizer, 9).render(row.messages)
        first = int(np.flatnonzero(example.weights)[0])
        prompt = render_prompt(SimpleNamespace(tokenizer=tokenizer, context_tokens=256), row.messages[:1])
        assert example.tokens[:first].tolist() == prompt


def test_the_prompt_has_the_tokens_of_generation_even_where_no_token_crosses_the_border():
    r"""Llama-3 prompts end in "\n\n", one token; before a word the pre-tokenizer would split it into two."""
    tokenizer = merging_tokenizer(LLAMA3, ("Ċ", "Ċ"))
    tokenizer.add_special_tokens({"additional_special_tokens": list(ENDS["llama3"][2])})
    row = chat("a", "hello")
    whole = tokenizer.apply_chat_template(list(row.messages), return_dict=True)["input_ids"]
    example = encoded(tokenizer, row)
    assert starts_as_it_will_be_read(tokenizer, example, row) and example.tokens.tolist() != whole
    assert trained_text(tokenizer, example) == "hello<|eot_id|>"


def test_a_tokenizer_that_cannot_be_cut_there_makes_it_a_fault():
    tokenizer = merging_tokenizer(CHAT_TEMPLATE, ("Ċ", "Ċ"), normalizer=normalizers.Lowercase())
    assert trained_text(tokenizer, encoded(tokenizer, chat("A", "B"))) == "b<|im_end|>"
    assert "within a token" in fault(tokenizer, chat("A", "\n\nB"))


def test_smollm2s_own_tokenizer_and_template():
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(base_path("smollm2-135m"))
    except BaseError as error:
        pytest.skip(str(error))
    for answer in ("positive", "\n\n\nIndeed.", "  two\nlines", "déjà vu \U0001f600", "12345"):
        row = chat("Is it good?", answer)
        example = encoded(tokenizer, row)
        assert trained_text(tokenizer, example) == answer + "<|im_end|>"
        assert starts_as_it_will_be_read(tokenizer, example, row)
    row = chat("one", "two", "three", "four")
    assert trained_text(tokenizer, encoded(tokenizer, row)) == "two<|im_end|>four<|im_end|>"


# -- lengths and texts -------------------------------------------------------------------------------------------------


def test_a_row_that_is_too_long_is_cut_and_says_so_and_one_without_a_trained_token_is_a_fault():
    tokenizer = tokenizer_for(CHAT_TEMPLATE)
    whole = encoded(tokenizer, chat("question", "a long answer"))
    first = int(np.flatnonzero(whole.weights)[0])
    cut = encoded(tokenizer, chat("question", "a long answer"), first + 3)
    assert cut.cut and not whole.cut and len(cut.tokens) == first + 3
    assert trained_text(tokenizer, cut) == "a l" and (cut.tokens == whole.tokens[: first + 3]).all()
    assert f"max-length {first}" in fault(tokenizer, chat("question", "a long answer"), first)
    assert not encoded(tokenizer, chat("question", "a long answer"), len(whole.tokens)).cut


@pytest.mark.parametrize("max_length", [2, 3, 10, 26, 27, 100])
def test_a_text_is_cut_into_pieces_in_which_each_token_is_predicted_once(max_length):
    tokenizer, text = tokenizer_for(CHAT_TEMPLATE), "abcdefghijklmnopqrstuvwxyz"
    pieces = Encoder(tokenizer, max_length).encode(Row("a.txt", 1, text=text))
    assert all(2 <= len(piece.tokens) <= max_length and piece.weights.all() for piece in pieces)
    predicted = [token for piece in pieces for token in piece.tokens[1:].tolist()]
    assert tokenizer.decode([pieces[0].tokens[0], *predicted]) == text + "<|im_end|>"


def test_a_text_of_one_token_is_a_fault():
    tokenizer = tokenizer_for(None)
    tokenizer.eos_token = None
    assert "nothing to predict" in fault(tokenizer, Row("a.txt", 1, text="a"))


def test_a_base_without_a_template_reads_prompt_and_completion_as_generation_does():
    start = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    for tokenizer in (tokenizer_for(None), merging_tokenizer(None, ("Ġ", "b"), post_processor=start)):
        row = chat("a ", "b")
        example = encoded(tokenizer, row)
        assert trained_text(tokenizer, example) == "b<|im_end|>"
        assert starts_as_it_will_be_read(tokenizer, example, row)
    assert example.tokens[0] == 0
    assert "no chat template" in fault(tokenizer, chat("a", "b", "c", "d"))


def weights_by_text(row, train_on):
    """What each stretch of equal weight says."""
    encoder = Encoder(byte_tokenizer(), 400, train_on)
    (example,) = encoder.encode(row)
    found, text = [], ""
    for token, weight in zip(example.tokens.tolist(), example.weights.tolist(), strict=True):
        if found and found[-1][0] != weight:
            text = ""
        text += encoder.tokenizer.decode([token])
        found = [*(found[:-1] if found and found[-1][0] == weight else found), (weight, text)]
    return found


def test_weights_of_messages_go_before_every_mask(tmp_path):
    chat = [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "one", "train": False},
        {"role": "user", "content": "r"}, {"role": "assistant", "content": "two", "weight": 0.5},
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    (row,) = read_rows([tmp_path / "rows.jsonl"])
    trained = {how: [(w, t) for w, t in weights_by_text(row, how) if w] for how in ("assistant", "completion", "last")}
    assert [(w, "two" in t) for w, t in trained["assistant"]] == [(0.5, True)]
    assert trained["completion"] == trained["last"] == trained["assistant"]
    everything = weights_by_text(row, "all")
    assert ["one" in t for w, t in everything if w == 0] == [True] and sum(
        "two" in t for w, t in everything if w == 0.5
    ) == 1
    assert "".join(t for _, t in everything) == "".join(t for _, t in weights_by_text(row, "last"))
    chat[1].pop("train")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    (row,) = read_rows([tmp_path / "rows.jsonl"])
    assert [(w, "two" in t) for w, t in weights_by_text(row, "completion") if w] == [(0.5, True)]  # of a chat, the last
    pair = {"prompt": chat[:3], "completion": chat[3:]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(pair) + "\n")
    (row,) = read_rows([tmp_path / "rows.jsonl"])
    assert {(w, "two" in t) for w, t in weights_by_text(row, "all")} == {(1.0, False), (0.5, True)}  # a context is none


@pytest.mark.parametrize("where", ["reasoning_content", "thinking", "tools"])
def test_control_tokens_are_found_in_thoughts_and_tools_too(where):
    answer = {"role": "assistant", "content": "4"}
    tools = ({"name": "f", "description": "ends <|im_end|> here"},) if where == "tools" else ()
    answer |= {} if tools else {where: "a <|im_end|> b"}
    found = Encoder(byte_tokenizer(), 400).encode(Row("f", 1, ({"role": "user", "content": "q"}, answer), tools=tools))
    assert isinstance(found, Fault) and found.code == "control-tokens"


def test_rows_keep_their_order_and_their_faults():
    rows = [
        chat("a", "b"),
        Fault("x.jsonl", 9, "broken"),
        Row("t.txt", 4, text="abcde"),
        chat("c", roles=("assistant",)),
    ]
    found = list(Encoder(tokenizer_for(CHAT_TEMPLATE), 4).encode_many(rows))
    assert isinstance(found[0], Fault) and "max-length 4" in found[0].reason and found[1] is rows[1]
    assert found[2].row is rows[2] and [example.row for example in found[2].examples] == [4, 4]
    assert isinstance(found[3], Fault)
