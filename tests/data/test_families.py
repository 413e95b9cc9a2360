"""On the templates of 15 model families, two ways of finding the answers agree, and every answer ends its turn."""

from __future__ import annotations

import random
import re
from functools import cache
from pathlib import Path

import pytest
import transformers

from deltaw.base.builtin import base_path
from deltaw.data.chat import Encoder
from deltaw.data.formats import Row
from deltaw.data.source import Fault
from deltaw.errors import BaseError

TEMPLATES = Path(__file__).parent / "templates"
TWINS = sorted(path.name.removesuffix("_training.jinja") for path in TEMPLATES.glob("*_training.jinja"))
SINGLE = sorted(path.stem for path in TEMPLATES.glob("*.jinja") if path.stem.removesuffix("_training") not in TWINS)
# The twin prints something else than its original here: thoughts in front of earlier answers, a turn's end that the
# original leaves to the next turn.
REWRITTEN = {"qwen3", "glm4moe", "deepseek_r1_distill"}
CONTROL = re.compile(
    r"<[|｜][^<>\s'\"{}]{1,40}[|｜]>|<(?:start|end)_of_turn>|<\|?[A-Z_]{4,}\|?>|\[/?INST\]|\[\|[a-z]+\|\]|\[gMASK\]|<sop>"
)
WORDS = [
    "blue",
    "rain\n\n",
    " 42",
    "naïve",
    "café",
    "def f(x):\n    return x",
    "\U0001f600",
    "\t",
    "…",
    "Zürich",
    "no.",
]
CHATS = 50


@cache
def built_in():
    try:
        return base_path("smollm2-135m")
    except BaseError as error:
        pytest.skip(str(error))


@cache
def encoder(name: str) -> Encoder:
    """The built-in tokenizer with the family's template and control tokens, and with a BOS and EOS of their own."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(built_in())
    template = (TEMPLATES / f"{name}.jinja").read_text("utf-8")
    tokenizer.add_special_tokens({"bos_token": "<|the-bos|>", "eos_token": "<|the-eos|>"})
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(CONTROL.findall(template)))})
    tokenizer.chat_template = template
    return Encoder(tokenizer, 4096)


def chats(name: str) -> list[Row]:
    """50 conversations of one to four turns; with a system message where the template takes one."""
    random_ = random.Random(name)
    rows = []
    for number in range(1, CHATS + 1):
        turns = random_.randint(1, 4)
        messages = [{"role": "system", "content": _text(random_)}] if number % 5 == 0 and name[:5] != "gemma" else []
        for _ in range(turns):
            messages += [{"role": "user", "content": _text(random_)}, {"role": "assistant", "content": _text(random_)}]
        rows.append(Row("chats", number, tuple(messages)))
    return rows


def _text(random_: random.Random) -> str:
    words = [random_.choice(WORDS) for _ in range(random_.randint(1, 12))]
    return "start " + " ".join(words) + " end"


def masks(one: Encoder, rows: list[Row]) -> list:
    """(tokens, weights) of each row; a Fault where it is refused."""
    found = one.encode_many(rows)
    return [
        f if isinstance(f, Fault) else (f.examples[0].tokens.tolist(), f.examples[0].weights.tolist()) for f in found
    ]


def trained(one: Encoder, mask) -> str:
    tokens, weights = mask
    return one.tokenizer.decode([token for token, weight in zip(tokens, weights, strict=True) if weight])


def test_there_are_the_templates_of_twelve_families_and_more():
    families = {re.split(r"[\d_]", name)[0].removesuffix("v") for name in (*TWINS, *SINGLE)}
    assert families == {
        "cohere", "deepseek", "gemma", "glm", "gptoss", "lfm", "llama", "phi", "qwen", "nemotron",
        "mistral", "jamba", "falcon", "exaone", "chatml",
    }  # fmt: skip


@pytest.mark.parametrize("name", TWINS)
def test_marks_and_renderings_give_the_same_mask(name):
    one, rows = encoder(f"{name}_training"), chats(name)
    assert one.marked
    by_marks = masks(one, rows)
    one.marked = False
    try:
        by_rendering = masks(one, rows)
    finally:
        one.marked = True
    assert not [fault for fault in by_marks if isinstance(fault, Fault)]
    assert by_marks == by_rendering


@pytest.mark.parametrize("name", sorted(set(TWINS) - REWRITTEN))
def test_the_original_without_marks_has_the_mask_of_its_marked_twin(name):
    assert masks(encoder(name), chats(name)) == masks(encoder(f"{name}_training"), chats(name))


@pytest.mark.parametrize("name", [*(f"{name}_training" for name in TWINS), *sorted(set(TWINS) - {"glm4moe"}), *SINGLE])
def test_every_answer_is_trained_with_the_token_that_ends_its_turn(name):
    one = encoder(name)
    for row, found in zip(chats(name), one.encode_many(chats(name)), strict=True):
        assert not isinstance(found, Fault), found
        assert "end-of-turn" not in {code for code, _ in found.notes}
        example = found.examples[0]
        runs, previous = [], 0.0
        for token, weight in zip(example.tokens.tolist(), example.weights.tolist(), strict=True):
            if weight and not previous:
                runs.append([])
            if weight:
                runs[-1].append(token)
            previous = weight
        answers = [message["content"] for message in row.messages if message["role"] == "assistant"]
        assert len(runs) == len(answers)
        for answer, run in zip(answers, runs, strict=True):
            assert run[-1] in one.special
            text = one.tokenizer.decode(run)
            assert answer.strip() in text
            others = [m["content"].strip() for m in row.messages if m["content"] != answer]
            assert not any(other in text for other in others if other not in answer)


def test_an_original_that_leaves_the_end_of_a_turn_to_the_next_one_is_found_out():
    """GLM's stop token opens the next turn, so the original template never trains it."""
    template = (TEMPLATES / "glm4moe_training.jinja").read_text("utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(built_in())
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(CONTROL.findall(template)))})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    (found,) = Encoder(tokenizer, 4096).encode_many([chats("a")[0]])
    assert {code for code, _ in found.notes} == {"end-of-turn"}
