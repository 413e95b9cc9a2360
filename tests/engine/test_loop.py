"""The loop on a small real model: how a batch is cut, several adapters at once, and what stops a run."""

from __future__ import annotations

import itertools
import math
import time

import pytest
import torch
from models import chat_store, small_base

from deltaw.adapter import LoraSpec, choose, inject, new_adapter
from deltaw.data.loader import Loader, Step
from deltaw.engine.loop import Length, Progress, Track, fit, forward_backward
from deltaw.engine.optim import FlatFactors, OptimSettings
from deltaw.errors import AdapterError, NotFiniteError

PAIRS = [("q" * (3 + 5 * n % 17), "answer " * (1 + n * n % 7)) for n in range(8)]
RATE = OptimSettings(1e-2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return chat_store(tmp_path_factory.mktemp("loop") / "train", PAIRS)


def _start(base, stores, settings=None, spec=None, batch_tokens=200, seeds=None, stop=None):
    """(flat, progress) of one adapter for each store, ready for `fit`."""
    settings = settings or [RATE] * len(stores)
    spec = spec or LoraSpec(rank=4, targets=("q_proj", "down_proj"))
    seeds = seeds or range(len(stores))
    adapters = [new_adapter(choose(base.model, spec), spec, seed) for seed in seeds]
    flat = FlatFactors(inject(base.model, *adapters, trainable=True), settings)
    tracks = [Track(Loader(s, batch_tokens, 80, seed), stop=stop) for s, seed in zip(stores, seeds, strict=True)]
    return flat, Progress(tracks=tracks)


def _fit(base, flat, progress, steps, observe=None, **options):
    records = []

    def keep(record, _progress):
        records.append(record)
        return observe(record) if observe else True

    whole = fit(base, flat.injection, flat, progress, Length(steps), keep, **options)
    return whole, records


def _gradient(base, store, size):
    """The gradient of one step over all documents, in micro-batches of `size` documents."""
    flat, progress = _start(base, [store])
    documents = range(len(store))
    for factors in flat.injection.layers[0].values():
        factors.B.data.normal_(generator=torch.Generator().manual_seed(1))
    step = Step([list(documents[first : first + size]) for first in range(0, len(store), size)], len(store))
    (result,) = forward_backward(base, flat.injection, progress, [step], lambda: False)
    gradient = flat.grad.clone()
    flat.injection.eject()
    return gradient, result.loss


@pytest.mark.parametrize("plain", [None, "as the test wants it"], ids=["flat", "plain"])
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(store, plain):
    base = small_base()
    assert base.plain_reason is None
    base.plain_reason = plain
    whole, loss = _gradient(base, store, 8)
    assert whole.norm() > 0
    for size in (4, 2, 1):
        cut, cut_loss = _gradient(base, store, size)
        assert float((cut - whole).norm() / whole.norm()) < 1e-6
        assert cut_loss == pytest.approx(loss, rel=1e-6)


def test_the_flat_and_the_plain_path_give_the_same_gradient(store):
    base = small_base()
    flat, flat_loss = _gradient(base, store, 4)
    base.plain_reason = "as the test wants it"
    plain, plain_loss = _gradient(base, store, 4)
    assert float((flat - plain).norm() / plain.norm()) < 1e-5
    assert flat_loss == pytest.approx(plain_loss, rel=1e-6)


def test_the_loss_of_a_step_is_the_mean_over_its_trained_tokens(store):
    base = small_base()
    flat, progress = _start(base, [store])
    _, (record,) = _fit(base, flat, progress, 1, lambda _: True)
    assert record.trained_tokens[0] > 0 and record.tokens[0] > record.trained_tokens[0]
    assert record.losses[0] == pytest.approx(math.log(base.vocabulary), rel=0.05)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_two_adapters_at_once_equal_two_runs_bit_for_bit(store, tmp_path, dropout):
    other = chat_store(tmp_path / "other", [(a, q) for q, a in PAIRS])
    settings = [OptimSettings(1e-2), OptimSettings(3e-3, schedule="cosine", lora_plus=4.0)]
    spec = LoraSpec(rank=4, targets=("q_proj", "down_proj"), dropout=dropout)
    base = small_base()
    both, progress = _start(base, [store, other], settings, spec)
    _, together = _fit(base, both, progress, 5)
    both.injection.eject()
    for index, data in enumerate((store, other)):
        one, alone = _start(base, [data], [settings[index]], spec, seeds=[index])
        _, records = _fit(base, one, alone, 5)
        one.injection.eject()
        for (name, part, joint), (_, _, single) in zip(
            both.adapter(index).tensors(), one.adapter().tensors(), strict=True
        ):
            assert torch.equal(joint, single), (name, part)
        assert [r.losses[index] for r in together] == [r.losses[0] for r in records]
        assert [r.rates[index] for r in together] == [r.rates[0] for r in records]


def test_an_adapter_whose_data_has_ended_keeps_its_numbers(store):
    base = small_base()
    flat, progress = _start(base, [store, store])
    progress.tracks[0].stop = progress.tracks[0].loader.step(0).next_position
    seen = []
    _fit(base, flat, progress, 4, lambda _: seen.append(flat.adapter(0)) or True)
    for later in seen[1:]:
        for (_, _, first), (_, _, now) in zip(seen[0].tensors(), later.tensors(), strict=True):
            assert torch.equal(first, now)


def test_a_factor_that_is_not_finite_stops_the_run_and_names_the_rows(store):
    base = small_base()
    flat, progress = _start(base, [store])
    _fit(base, flat, progress, 1)
    flat.injection.layers[0]["model.layers.1.mlp.down_proj"].A.data[0, 0] = float("nan")
    before = {name: tensor.clone() for name, tensor in flat.state().items()}
    track = progress.tracks[0]
    documents = [d for part in track.loader.step(track.position).micro_batches for d in part]
    rows = "; ".join(f"row {row}" for row in sorted(int(store.rows[d]) for d in documents))
    with pytest.raises(NotFiniteError, match=rf"^Step 2: .*held {rows}\."):
        _fit(base, flat, progress, 2)
    for name, tensor in flat.state().items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name
    assert progress.step == 1 and not flat.grad.any()


def test_a_layer_that_the_forward_never_uses_is_named(store):
    base = small_base()
    base.model.model.layers[0].spare = torch.nn.Linear(4, 4).requires_grad_(False)
    flat, progress = _start(base, [store], spec=LoraSpec(rank=2, targets=("q_proj", "spare")))
    with pytest.raises(AdapterError, match=r"received no gradient(.|\n)*\n  - model\.layers\.0\.spare\n.*--exclude"):
        _fit(base, flat, progress, 1)
    assert progress.step == 0


def test_the_base_is_bit_for_bit_the_same_after_training(store):
    base = small_base()
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    flat, progress = _start(base, [store])
    _fit(base, flat, progress, 3)
    after = base.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in base.model.parameters())


def test_the_loss_falls(store):
    base = small_base()
    flat, progress = _start(base, [store], [OptimSettings(2e-2)])
    _, records = _fit(base, flat, progress, 30)
    assert records[-1].losses[0] < records[0].losses[0] - 0.4


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "mixtral"])
def test_the_loss_falls_on_other_architectures(store, kind):
    base = small_base(kind)
    flat, progress = _start(base, [store], [OptimSettings(1e-2)], LoraSpec(rank=4))
    _, records = _fit(base, flat, progress, 8)
    assert records[-1].losses[0] < records[0].losses[0]


def test_an_interrupted_step_is_abandoned(store):
    base = small_base()
    flat, progress = _start(base, [store], batch_tokens=400)
    _fit(base, flat, progress, 1)
    before = {name: tensor.clone() for name, tensor in flat.state().items()}
    position = progress.tracks[0].position
    calls = itertools.count()
    whole, records = _fit(base, flat, progress, 3, interrupted=lambda: next(calls) == 1)
    assert not whole and records == []
    assert (progress.step, progress.tracks[0].position) == (1, position)
    assert all(torch.equal(tensor, before[name]) for name, tensor in flat.state().items())
    assert not flat.grad.any()


def test_the_observer_can_end_the_run(store):
    base = small_base()
    flat, progress = _start(base, [store])
    whole, records = _fit(base, flat, progress, 9, lambda record: record.step < 3)
    assert whole and [record.step for record in records] == [1, 2, 3]


def test_a_run_ends_with_its_last_epoch_and_sees_every_document_once_per_epoch(store):
    base = small_base()
    flat, progress = _start(base, [store], stop=2 * len(store))
    _fit(base, flat, progress, 1000)
    assert progress.tracks[0].position == 2 * len(store)
    assert progress.tracks[0].tokens == 2 * store.tokens
    assert progress.tracks[0].trained_tokens == 2 * store.trained_tokens


def test_seconds_count_from_the_end_of_the_step_before_except_for_what_is_no_training(store):
    base = small_base()
    flat, progress = _start(base, [store])

    def pause(record):
        time.sleep(1)  # a small step takes a hundredth of it, and less than it on the busiest machine
        if record.step == 1:
            progress.away_seconds += 1  # an evaluation, which has seconds of its own
        return True

    started = time.monotonic()
    _, records = _fit(base, flat, progress, 3, pause)
    assert records[1].seconds < 1 <= records[2].seconds
    assert progress.seconds == sum(record.seconds for record in records) < time.monotonic() - started - 2


def test_dropout_acts_in_training_and_not_in_between(store):
    base = small_base()
    flat, progress = _start(base, [store], spec=LoraSpec(rank=2, targets=("q_proj",), dropout=0.5))
    layers = list(flat.injection.layers[0].values())
    between = []
    _fit(base, flat, progress, 2, lambda _: between.append(any(layer.training for layer in layers)) or True)
    assert between == [False, False] and not any(layer.training for layer in layers)


def test_a_run_of_minutes_has_a_rate_above_zero_in_its_first_step(store):
    base = small_base()
    flat, progress = _start(base, [store])
    records = []
    fit(base, flat.injection, flat, progress, Length(None, 1.0), lambda r, _: records.append(r) or True)
    assert records[0].rates[0] > 0
    assert progress.seconds >= 1.0 and sum(record.seconds for record in records) == pytest.approx(progress.seconds)


# -- coverage ----------------------------------------------------------------------------------------------------------


def test_a_factor_A_without_a_gradient_in_the_second_step_stops_the_run(store):
    base = small_base()
    flat, progress = _start(base, [store])
    layer = flat.injection.layers[0]["model.layers.1.mlp.down_proj"]
    handle = []

    def cut(record):
        if record.step == 1:  # from now on nothing reaches A
            handle.append(layer.A.register_hook(torch.zeros_like))
        return True

    with pytest.raises(AdapterError, match=r"factors A of these adapted layers(.|\n)*layers\.1\.mlp\.down_proj"):
        _fit(base, flat, progress, 4, cut)
    assert progress.step == 1
    flat.injection.eject()


def test_a_frozen_weight_that_changes_in_training_stops_the_run(store):
    base = small_base()
    flat, progress = _start(base, [store])
    norm = base.model.model.norm.weight

    def touch(record):
        with torch.no_grad():
            norm.mul_(1.0)
        return True

    with pytest.raises(AdapterError, match=r"frozen weights were changed(.|\n)*model\.norm\.weight"):
        _fit(base, flat, progress, 4, touch)
    flat.injection.eject()
