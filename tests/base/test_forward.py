"""Packed equals unpacked: a document beside others has the loss that the model's own forward gives it alone."""

import json
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import (
    GENERAL,
    MORE,
    SMALL,
    VOCABULARY,
    byte_tokenizer,
    flat_row,
    lively_model,
    own_losses,
    small_model,
    some_documents,
)

from deltaw.base import forward
from deltaw.base.forward import EAGER, own_attention
from deltaw.base.load import load
from deltaw.base.proof import prove
from deltaw.data.example import Example
from deltaw.data.pack import flat_batch
from deltaw.engine.objective import batch_loss, score_batch
from deltaw.kernels import token_losses

FLAT = (
    "llama",
    "llama-tied",
    "mistral",
    "qwen3",
    "gemma3",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "mixtral",
    "phi3-long",
    "granite",
)
LENGTHS = (9, 2, 40, 17, 130)  # longer than the windows of 6, and on both sides of the 128 where kernels change


def flat_losses(model, documents):
    """The documents' losses from one flat row, document by document."""
    tokens, positions, bounds = flat_row(documents)
    with torch.no_grad():
        h = forward.flat_hidden_states(model, tokens, positions, bounds)
    losses, _, _ = token_losses(h, lambda x: forward.flat_logits(model, x), tokens.roll(-1), VOCABULARY)
    return [losses[start : stop - 1] for start, stop in pairwise(bounds)]


def relative(a, b):
    return abs(float(a.detach().sum()) / float(b.detach().sum()) - 1)


@pytest.mark.parametrize("kind", FLAT)
def test_a_documents_loss_does_not_change_with_its_neighbours(kind):
    model, documents = lively_model(kind), some_documents(LENGTHS)
    assert forward.prove(model) is None
    assert model.config._attn_implementation == forward.ATTENTION_NAME
    packed = flat_losses(model, documents)
    assert all(relative(a, own_losses(model, d)) < 1e-5 for a, d in zip(packed, documents, strict=True))
    order = [3, 4, 0, 2, 1]
    moved = flat_losses(model, [documents[index] for index in order])
    assert all(relative(a, packed[index]) < 1e-5 for a, index in zip(moved, order, strict=True))


@pytest.mark.parametrize("kind", FLAT)
def test_gradients_of_a_packed_row_are_those_of_its_documents(kind):
    model, documents = lively_model(kind), some_documents((9, 20))
    assert forward.prove(model) is None
    parameters = [parameter for name, parameter in model.named_parameters() if "experts" not in name]
    tokens, positions, bounds = flat_row(documents)
    logits = forward.flat_logits(model, forward.flat_hidden_states(model, tokens, positions, bounds))
    packed = F.cross_entropy(logits, tokens.roll(-1), reduction="none")[[*range(8), *range(9, 28)]].sum()
    ours = torch.autograd.grad(packed, parameters, allow_unused=True)
    alone = torch.autograd.grad(sum(own_losses(model, d).sum() for d in documents), parameters, allow_unused=True)
    for a, b in zip(ours, alone, strict=True):
        assert (a is None) == (b is None)
        assert a is None or float((a - b).norm()) <= 1e-4 * float(b.norm()) + 1e-6


@pytest.mark.parametrize(
    ("kind", "without"),
    [
        ("mistral", {"sliding_window": 200}),
        ("gemma3", {"sliding_window": 200}),
        ("gemma2", {"sliding_window": 200}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("phi3-long", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}),
        ("granite", {"logits_scaling": 1.0}),
    ],
)
def test_ignoring_a_window_a_cap_a_scale_or_long_angles_would_be_seen_above(kind, without):
    document = some_documents((40,))[0]
    assert (
        relative(own_losses(lively_model(kind), document), own_losses(lively_model(kind, **without), document)) > 1e-3
    )


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("mamba", "flat logits differ"),
        ("lfm2", "flat logits differ"),
        ("bloom", "cannot be exchanged"),
        ("llama4", "mask 64"),  # chunks longer than the proof: only what reaches attention shows that they are missing
    ],
)
def test_a_model_that_mixes_tokens_in_another_way_is_found_out_and_keeps_its_own_attention(kind, says):
    model = lively_model(kind)
    own = model.config._attn_implementation
    assert says in forward.prove(model)
    assert model.config._attn_implementation == own in ("sdpa", "eager")
    assert not forward.sees_later_tokens(model)


def test_a_convolution_over_the_border_of_documents_is_found_out_however_little_it_does():
    """By the gradient: with small weights, what leaks is less than what rounding may change."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MORE["lfm2"](), dtype=torch.float32).eval()
    assert forward.prove(model) is None and forward.mixes_documents(model)
    reason, decoder, _ = prove(model)
    assert "neighbouring documents" in reason and decoder is None
    assert model.config._attn_implementation in ("sdpa", "eager")


def test_a_model_whose_modules_give_no_gradient_goes_one_document_at_a_time(monkeypatch):
    def refuse(_model):
        raise RuntimeError("no backward here")

    monkeypatch.setattr(forward, "mixes_documents", refuse)
    reason, decoder, _ = prove(lively_model("gpt2"))
    assert "no backward here" in reason and decoder is None


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "qwen3_moe", "mixtral", "llama"])
def test_models_that_only_attend_mix_nothing(kind):
    model = lively_model(kind)
    assert forward.prove(model) is None and not forward.mixes_documents(model)


def test_a_long_document_changes_nothing_for_the_next_one(tmp_path):
    """The scaling "dynamic" chooses angles by the length, and transformers keeps those of the longest so far."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = lively_model("llama", rope_parameters=rope, max_position_embeddings=64)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    base = load(tmp_path, dtype="float32")
    short, middle, long = (
        flat_batch([Example(d.int().numpy(), torch.ones(len(d)).numpy())]) for d in some_documents((64, 80, 120))
    )
    alone = [score_batch(load(tmp_path, dtype="float32"), batch).losses_N for batch in (short, middle)]
    for batch in (long, middle, long, short, middle):
        found = score_batch(base, batch).losses_N
        for wanted, document in zip(alone, (short, middle), strict=True):
            assert batch is not document or torch.equal(found, wanted)


def test_queries_that_grow_with_their_positions_go_by_modules(tmp_path):
    """At the positions of a proof they do not yet."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 20, "rope_theta": 1e4}
    config = transformers.Ministral3Config(**SMALL, rope_parameters={**rope, "llama_4_scaling_beta": 0.5})
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    base, (document,) = load(tmp_path, dtype="float32"), some_documents((60,))
    assert base.way == "modules" and "grow with their positions" in base.slow_reason
    batch = flat_batch([Example(document.int().numpy(), torch.ones(60).numpy())])
    torch.testing.assert_close(score_batch(base, batch).losses_N, own_losses(model, document), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lfm2", "bloom"])
def test_such_a_base_goes_one_document_at_a_time_with_the_models_own_loss(kind, tmp_path):
    model = lively_model(kind)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    base = load(tmp_path, dtype="float32")
    assert base.plain_reason and base.model.config._attn_implementation in ("sdpa", "eager")
    documents = some_documents((9, 20, 6))
    batch = flat_batch([Example(d.int().numpy(), torch.ones(len(d)).numpy()) for d in documents])
    expected = torch.cat([own_losses(model, d) for d in documents])
    torch.testing.assert_close(score_batch(base, batch).losses_N, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(batch_loss(base, batch), expected.sum(), rtol=1e-5, atol=0)


def test_generation_leaves_the_flat_attention_in_place():
    model = lively_model("llama")
    assert forward.prove(model) is None
    with pytest.raises(ZeroDivisionError), forward.plain_attention(model):
        assert model.config._attn_implementation == "sdpa"
        raise ZeroDivisionError
    assert model.config._attn_implementation == forward.ATTENTION_NAME


def test_bf16_is_proven_too():
    for kind in ("llama", "gemma3", "gpt2"):
        assert forward.prove(lively_model(kind).bfloat16()) is None


def test_many_layers_in_bf16_may_differ_by_what_two_attentions_of_the_model_differ_by_and_no_more(monkeypatch):
    deep = lively_model("llama", num_hidden_layers=16).bfloat16()
    assert forward.prove(deep) is None
    monkeypatch.setattr(forward, "ROUGHNESS_FACTOR", 0)
    assert "its own from its own by" in forward.prove(deep), "the fixed tolerance alone refuses it"
    monkeypatch.undo()
    right = forward.flat_hidden_states
    monkeypatch.setattr(forward, "flat_hidden_states", lambda *args: right(*args[:-1], (0, 8, 15)))
    assert "flat logits differ" in forward.prove(deep), "one token on the wrong side of the border"


def test_a_base_that_reads_in_both_directions_is_seen(tmp_path):
    config = transformers.BertConfig(**GENERAL, intermediate_size=48)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert forward.prove(model) and forward.sees_later_tokens(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bert"
    with pytest.raises(ValueError, match="both directions"):
        load(tmp_path)


def test_a_soft_cap_is_never_left_to_an_attention_that_knows_none():
    """Older versions of transformers say that Gemma 2 may use it."""
    model = small_model("gemma2")
    model._supports_sdpa = True
    assert own_attention(model) == EAGER
    assert own_attention(small_model("llama")) == "sdpa"
