"""Generation: greedy is transformers' greedy, pieces join to the answer, and no character is ever cut."""

from __future__ import annotations

import pytest
import torch
from models import CHAT_TEMPLATE, SPECIAL, byte_tokenizer, small_base

from deltaw.adapter import LoraSpec, choose, inject, new_adapter
from deltaw.base.forward import plain_attention
from deltaw.engine.generate import UNFINISHED, _Streamer, end_tokens, generate, render_prompt
from deltaw.errors import DataError

CHAT = [{"role": "user", "content": "What is it?"}]


def _wild(base):
    """An adapter that makes the base say different things at every place."""
    spec = LoraSpec(rank=8, targets=("all-linear", "lm_head"))
    adapter = new_adapter(choose(base.model, spec), spec)
    for factors in adapter.factors.values():
        factors.B.normal_()
    return inject(base.model, adapter)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "mixtral"])
def test_greedy_is_what_transformers_generates(kind):
    base = small_base(kind)
    _wild(base)
    text = base.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    prompt = base.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with plain_attention(base.model):
        output = base.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24, eos_token_id=2,
            pad_token_id=0,
        )  # fmt: skip
    wanted = base.tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
    answer = generate(base, CHAT, max_new_tokens=24)
    assert answer == wanted and len(set(answer)) > 3


def test_greedy_takes_the_most_likely_token_whatever_the_generation_config_wishes():
    base = small_base()
    _wild(base)
    plain = generate(base, CHAT, max_new_tokens=24)
    base.model.generation_config.update(repetition_penalty=1.5, top_k=3, temperature=0.1, do_sample=True)
    assert generate(base, CHAT, max_new_tokens=24) == plain


def test_the_flat_attention_is_back_after_generating():
    base = small_base()
    before = base.model.config._attn_implementation
    generate(base, CHAT, max_new_tokens=2)
    assert base.plain_reason is None and base.model.config._attn_implementation == before


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_streamed_pieces_join_to_the_answer(temperature):
    base = small_base()
    _wild(base)
    for seed in range(3):
        pieces = []
        answer = generate(
            base, CHAT, max_new_tokens=40, temperature=temperature, seed=seed, on_text=pieces.append
        )  # fmt: skip
        assert "".join(pieces) == answer and len(pieces) > 1 and all(pieces)


def test_characters_of_several_bytes_are_never_split():
    text = "añ → 日本 🙂 ok"
    tokenizer, pieces = byte_tokenizer(), []
    streamer = _Streamer(tokenizer, pieces.append)
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) == len(text.encode())
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt, which is not shown
    for token in tokens:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert pieces == list(text)


def test_an_answer_cut_within_a_character_is_shown_as_it_is_returned():
    tokenizer, pieces = byte_tokenizer(), []
    streamer = _Streamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([[1]]))
    tokens = tokenizer("a日")["input_ids"][:-1]
    for token in tokens:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(pieces) == tokenizer.decode(tokens) and pieces[-1].endswith(UNFINISHED)


def test_sampling_depends_on_the_seed_and_leaves_the_callers_random_numbers_alone():
    base = small_base()
    before = torch.get_rng_state()
    answers = [generate(base, CHAT, max_new_tokens=12, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_an_answer_ends_where_training_ends_it():
    template = CHAT_TEMPLATE.replace("<|im_end|>", "<|endoftext|>")
    base = small_base(template=template)
    base.tokenizer.eos_token = "<|im_start|>"
    base.model.generation_config.eos_token_id = [2]
    assert end_tokens(base) == sorted(map(base.tokenizer.convert_tokens_to_ids, SPECIAL))
    base.tokenizer.chat_template = None
    assert end_tokens(base) == [1, 2]


def test_a_prompt_is_what_the_template_puts_before_an_answer():
    base = small_base()
    assert base.tokenizer.decode(render_prompt(base, CHAT)) == (
        "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    base.tokenizer.chat_template = None
    assert base.tokenizer.decode(render_prompt(base, CHAT)) == "What is it?"


def test_an_answer_ends_with_the_context_at_the_latest():
    base, pieces = small_base("gpt2"), []  # it has a table of 256 positions, and none behind them
    base.model.generation_config.eos_token_id = None
    _wild(base)
    generate(base, CHAT, max_new_tokens=10_000, on_text=pieces.append)
    assert 1 < len(pieces) <= base.context_tokens - len(render_prompt(base, CHAT))


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        ([{"role": "user", "content": "x" * 300}], CHAT_TEMPLATE, r"prompt has \d+ tokens; this base was made for 256"),
        ([{"role": "user", "content": ""}], None, "The prompt is empty"),
        (CHAT, "{{ raise_exception('no users here') }}", "template refuses this conversation: no users here"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_refused(messages, template, message):
    base = small_base(template=template)
    with pytest.raises(DataError, match=message):
        generate(base, messages)
