"""Held-out numbers against the model's own forward and against real greedy generation."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from models import small_base

from deltaw.adapter import LoraSpec, choose, inject, new_adapter
from deltaw.base.forward import plain_attention
from deltaw.base.load import Base
from deltaw.data.chat import Encoder
from deltaw.data.loader import Loader, evaluated_documents
from deltaw.data.pack import batch_of
from deltaw.data.prepare import prepare
from deltaw.engine.evaluate import evaluate, held_out_loss, wilson
from deltaw.engine.generate import generate
from deltaw.engine.heldout import HeldOut
from deltaw.engine.loop import Length, Progress, Track, fit
from deltaw.engine.objective import batch_loss, batches_to_score
from deltaw.engine.optim import FlatFactors, OptimSettings

WORDS = ["ab", "c"]


def _prepare(base, folder, pairs):
    file = folder / "rows.jsonl"
    rows = [{"prompt": question, "completion": answer} for question, answer in pairs]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare([file], Encoder(base.tokenizer, 256), folder / "set", keep_rows=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base that has learned by heart what two questions are answered with."""
    base = small_base()
    data = _prepare(base, tmp_path_factory.mktemp("heart"), [(f"{n} {word}", word) for n, word in enumerate(WORDS)])
    spec = LoraSpec(rank=8, targets=("all-linear", "lm_head"))
    injection = inject(base.model, new_adapter(choose(base.model, spec), spec, 0), trainable=True)
    flat = FlatFactors(injection, [OptimSettings(1e-2)])
    fit(base, injection, flat, Progress(tracks=[Track(Loader(data.store, 1000, 1000, 0))]), Length(40), lambda *_: True)
    return base


@torch.no_grad()
def _own_losses(base, tokens, weights):
    """−log p of each trained token, by the model's own forward over one document."""
    with plain_attention(base.model):
        logits = base.model(input_ids=torch.tensor(tokens).long()[None]).logits[0, :-1]
    trained = torch.tensor(weights)[1:] > 0
    targets = torch.tensor(tokens).long()[1:]
    return F.cross_entropy(logits[trained], targets[trained], reduction="none"), logits[trained]


@pytest.mark.parametrize("plain", [None, "as the test wants it"], ids=["flat", "plain"])
def test_loss_and_perplexity_are_those_of_the_models_own_forward(tmp_path, plain):
    base = small_base()
    base.plain_reason = plain
    data = _prepare(base, tmp_path, [("q" * n, "some answer"[: 1 + n % 9]) for n in range(1, 20)])
    own = torch.cat([_own_losses(base, data.store[d].tokens, data.store[d].weights)[0] for d in range(len(data.store))])
    for batch_tokens in (1, 100, 10_000):
        numbers = evaluate(base, data, batch_tokens).as_dict()
        assert numbers["tokens"] == len(own) == data.store.trained_tokens
        assert numbers["rows"] == 19
        assert numbers["loss"] == pytest.approx(float(own.mean()), rel=1e-5)
        assert numbers["perplexity"] == pytest.approx(math.exp(float(own.mean())), rel=1e-5)
    loss, tokens, _ = held_out_loss(base, data.store, 100, most_rows=500)
    assert (loss, tokens) == (pytest.approx(float(own.mean()), rel=1e-5), len(own))


def test_the_loss_during_training_looks_at_a_sample_of_so_many_rows(tmp_path):
    base = small_base()
    data = _prepare(base, tmp_path, [("q" * (20 - n), "a" * (1 + n)) for n in range(12)])
    sample = evaluated_documents(data.store, 5)
    assert len(sample) == 5 and sample.max() > 4
    own = torch.cat([_own_losses(base, data.store[d].tokens, data.store[d].weights)[0] for d in sample.tolist()])
    loss, tokens, _ = held_out_loss(base, data.store, 60, most_rows=5)
    assert (loss, tokens) == (pytest.approx(float(own.mean()), rel=1e-5), len(own))


@pytest.mark.parametrize("plain", [None, "as the test wants it"], ids=["flat", "plain"])
def test_a_token_counts_by_its_weight_as_in_training(tmp_path, plain):
    """An answer of weight 0.01 is hardly trained, and hardly decides which step was best."""
    base = small_base()
    base.plain_reason = plain
    chats = [
        [
            {"role": "user", "content": "q" * n},
            {"role": "assistant", "content": "noise", "weight": 0.01},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": "an answer"[: 1 + n % 9]},
        ]
        for n in range(1, 9)
    ]
    path = tmp_path / "weighted.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    data = prepare([path], Encoder(base.tokenizer, 256), tmp_path / "cache", keep_rows=True)
    batches = [batch_of(data.store, [number]) for number in range(len(data.store))]
    with torch.no_grad():
        sums = [float(batch_loss(base, batch.to(base.device))) for batch in batches]
    weights = [batch.weight for batch in batches]
    assert data.store.weight == pytest.approx(weights) and sum(weights) < data.store.trained_tokens - 8
    mean = sum(sums) / sum(weights)
    assert held_out_loss(base, data.store, 100, None)[0] == pytest.approx(mean, rel=1e-5)
    assert evaluate(base, data, 100).loss == pytest.approx(mean, rel=1e-5)
    held_out = HeldOut(base, data.store, 100)
    assert held_out.losses(None).sum() / held_out.tokens_D.sum() == pytest.approx(mean, rel=1e-5)


def test_exact_match_is_what_greedy_generation_says(trained, tmp_path):
    pairs = [(f"{n} {word}", word) for n, word in enumerate(WORDS)]
    pairs += [("0 ab", "ax"), ("0 ab", "abc"), ("1 c", "d"), ("9 z", "never seen")]
    data = _prepare(trained, tmp_path, pairs)
    said = [generate(trained, row.messages[:-1], max_new_tokens=30) == row.answer for row in data.prompts]
    assert any(said) and not all(said)
    result = evaluate(trained, data, 100)
    assert result.exact == sum(said)
    for document, hit in enumerate(said):
        alone = _prepare(trained, tmp_path, [pairs[document]])
        assert evaluate(trained, alone, 100).exact == hit


def test_accuracy_compares_the_first_tokens_of_the_labels(tmp_path):
    base = small_base()
    labels = ["blue", "green", "red"]
    pairs = [("q" * (1 + 7 * n % 23), labels[n * n % 3 if n % 4 else 2]) for n in range(24)]
    data = _prepare(base, tmp_path, pairs)
    firsts = [base.tokenizer(label)["input_ids"][0] for label in labels]
    assert len(set(firsts)) == 3
    own = [
        int(_own_losses(base, data.store[d].tokens, data.store[d].weights)[1][0, firsts].argmax()) for d in range(24)
    ]
    result = evaluate(base, data, 120)
    assert result.choices == own, "in the order of the rows, though batches are sorted by length"
    assert result.correct == sum(labels[choice] == answer for choice, (_, answer) in zip(own, pairs, strict=True))
    assert result.as_dict()["accuracy"] == result.correct / 24


def test_labels_that_begin_alike_are_scored_whole(tmp_path):
    base = small_base()
    labels = ["apple", "apricot", "avocado"]
    pairs = [("q" * (1 + 5 * n % 19), labels[n % 3]) for n in range(12)]
    data = _prepare(base, tmp_path, pairs)
    encoder, own = Encoder(base.tokenizer, 256), []
    for row in data.prompts:
        sums = []
        for label in labels:
            (example,) = encoder.encode(type(row)("", 1, (row.messages[0], {"role": "assistant", "content": label})))
            sums.append(float(_own_losses(base, example.tokens, example.weights)[0].sum()))
        own.append(sums.index(min(sums)))
    result = evaluate(base, data, 100)
    assert result.choices == own
    assert result.correct == sum(labels[choice] == answer for choice, (_, answer) in zip(own, pairs, strict=True))


@pytest.mark.parametrize("labels", [["blue", "green", "red"], ["apple", "apricot", "avocado"]], ids=["first", "whole"])
def test_what_documents_have_in_common_is_computed_once_and_every_number_stays(labels, tmp_path, monkeypatch):
    base = small_base()
    prompt = "a long prompt that all of them have in common: "
    data = _prepare(base, tmp_path, [(prompt + "q" * (1 + 5 * n % 19), labels[n * n % 3]) for n in range(24)])

    def numbers():
        found = evaluate(base, data, 200)
        computed = sum(batch.computed_tokens for batch in batches_to_score(base, data.store, 200))
        losses = HeldOut(base, data.store, 200).losses(None)
        told = [found.loss, held_out_loss(base, data.store, 200, 9)[0], *losses]
        return computed, told, (found.tokens, found.exact, found.correct, found.choices)

    computed, told, counted = numbers()
    monkeypatch.setattr(Base, "shares_prefixes", False)
    computed_flat, told_flat, counted_flat = numbers()
    assert computed_flat == data.store.tokens > 2 * computed
    assert told == pytest.approx(told_flat, rel=1e-5) and counted == counted_flat


@pytest.mark.parametrize("question", ["q", "a question that is long enough to be shared"])
@pytest.mark.parametrize("shares", [True, False])
def test_whole_labels_are_scored_in_passes_as_small_as_all_others(question, shares, tmp_path, monkeypatch):
    base, passes = small_base(), []
    data = _prepare(base, tmp_path, [(question, f"label {n % 20:02}") for n in range(60)])
    longest = int(data.store.lengths.max())
    monkeypatch.setattr(Base, "shares_prefixes", shares)
    hidden_states = base.hidden_states
    monkeypatch.setattr(base, "hidden_states", lambda x, *rest: passes.append(len(x)) or hidden_states(x, *rest))
    assert evaluate(base, data, 30 * longest).correct is not None
    assert 15 * longest < max(passes) <= 30 * longest


def test_as_many_documents_are_measured_as_there_is_time_for_with_what_they_share(tmp_path, monkeypatch):
    base = small_base()
    data = _prepare(base, tmp_path, [("one long beginning of all of them " * 5 + str(n), "c") for n in range(300)])
    adapter = new_adapter(choose(base.model, LoraSpec(rank=2)), LoraSpec(rank=2), 0)
    clock = itertools.count()
    monkeypatch.setattr("deltaw.engine.heldout.time.monotonic", lambda: float(next(clock)))  # the few take a second
    numbers = {}
    for shares in (True, False):
        monkeypatch.setattr(Base, "shares_prefixes", shares)
        held_out = HeldOut(base, data.store, 1000)
        held_out.fit_into(8.0, adapter, 1)
        numbers[shares] = held_out.documents
    assert numbers[False] == pytest.approx(8 * 16, abs=3) and 1.15 * numbers[False] < numbers[True] < 300


def test_answers_that_are_no_labels_have_no_accuracy(tmp_path):
    base = small_base()
    result = evaluate(base, _prepare(base, tmp_path, [("q", f"answer {n}") for n in range(12)]), 500)
    assert result.correct is None and "accuracy" not in result.as_dict()


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_are_those_in_newcombes_table_of_1998(hits, count, low, high):
    assert wilson(hits, count) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    mirrored = wilson(count - hits, count)
    assert mirrored == (pytest.approx(1 - high, abs=5e-5), pytest.approx(1 - low, abs=5e-5))


def test_nothing_measured_says_nothing():
    assert wilson(0, 0) == (0.0, 1.0)
