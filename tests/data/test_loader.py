"""The order is a permutation that depends on (seed, epoch) alone; a step is whole documents, cut without loss."""

import itertools

import numpy as np
import pytest

from deltaw.data.example import Example
from deltaw.data.loader import Loader, evaluated_documents, evaluation_batches, shuffled
from deltaw.data.pack import scored_batch
from deltaw.data.store import TokenStore


@pytest.fixture
def store(tmp_path):
    """97 documents of 2 to 40 tokens, and one of 300."""
    lengths = [*np.random.default_rng(0).integers(2, 41, 97), 300]
    return TokenStore.write(
        tmp_path / "store", (Example(np.full(n, i, np.int32), np.ones(n, np.float32), i) for i, n in enumerate(lengths))
    )


def order(count, seed=0, epoch=0):
    return [shuffled(index, count, seed, epoch) for index in range(count)]


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 1), (1, 0), (123456789, 7)])
def test_the_order_is_a_permutation_for_every_count(seed, epoch):
    for count in range(1, 201):
        assert sorted(order(count, seed, epoch)) == list(range(count)), count


def test_the_order_differs_by_epoch_and_seed_and_is_the_same_when_asked_again():
    orders = {tuple(order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert order(50, 3, 2) == order(50, 3, 2) != list(range(50))


def test_the_order_is_fixed_for_all_time():
    """A run that resumes with a newer version must go on in the same order."""
    assert order(10) == [0, 1, 3, 7, 9, 8, 5, 4, 6, 2]


def test_the_order_is_as_even_as_chance():
    """Where a document lands over 2,000 epochs: each of 10 places about 200 times (5 standard deviations are 67)."""
    counts = np.bincount([shuffled(3, 10, 0, epoch) for epoch in range(2000)], minlength=10)
    assert abs(counts - 200).max() < 67
    neighbours = np.bincount([(shuffled(4, 10, 0, e) - shuffled(3, 10, 0, e)) % 10 for e in range(2000)], minlength=10)
    assert neighbours[0] == 0 and abs(neighbours[1:] - 222).max() < 70


def test_steps_take_whole_documents_up_to_the_batch_and_every_document_once_an_epoch(store):
    loader = Loader(store, batch_tokens=120, micro_tokens=50, seed=1)
    position, taken = 0, []
    while position < len(store):
        step = loader.step(position, stop=len(store))
        documents = [document for batch in step.micro_batches for document in batch]
        assert documents == [loader.document(position + k) for k in range(len(documents))]
        tokens = sum(int(store.lengths[document]) for document in documents)
        assert tokens <= 120 or len(documents) == 1
        if step.next_position < len(store):
            assert tokens + store.lengths[loader.document(step.next_position)] > 120
        assert step.next_position == position + len(documents)
        position, taken = step.next_position, taken + documents
    assert sorted(taken) == list(range(len(store)))


@pytest.mark.parametrize("micro_tokens", [1, 50, 119, 10_000])
def test_micro_batches_cover_the_step_exactly_however_they_are_cut(store, micro_tokens):
    whole = Loader(store, 400, 10_000, 1)
    cut = Loader(store, 400, micro_tokens, 1)
    for position in (0, 17, 90, 500):
        one, many = whole.step(position), cut.step(position)
        assert one.next_position == many.next_position
        assert [d for batch in many.micro_batches for d in batch] == one.micro_batches[0]
        for documents, batch in zip(many.micro_batches, cut.batches(many), strict=True):
            assert batch.documents == tuple(documents)
            assert batch.tokens <= micro_tokens or len(documents) == 1
        assert sum(batch.tokens for batch in cut.batches(many)) == whole.batches(one)[0].tokens


def test_micro_batches_are_as_few_as_possible_and_the_largest_as_small_as_possible(store):
    loader = Loader(store, 400, 120, 1)
    for position in range(0, 90, 9):
        groups = loader.step(position).micro_batches
        lengths = [int(store.lengths[d]) for group in groups for d in group]
        assert len(groups) == len(loader.cut([d for group in groups for d in group], 120))
        others = itertools.combinations(range(1, len(lengths)), len(groups) - 1)
        largest = min(
            max(sum(lengths[a:b]) for a, b in itertools.pairwise((0, *cuts, len(lengths)))) for cuts in others
        )
        assert max(sum(int(store.lengths[d]) for d in group) for group in groups) == largest


def test_a_step_crosses_epochs_unless_it_is_stopped(store):
    loader = Loader(store, 10**6, 10**6, 1)
    free = Loader(store, 3000, 10**6, 1).step(90)
    assert free.next_position > len(store)
    assert loader.step(90, stop=len(store)).next_position == len(store)
    assert loader.document(len(store)) == shuffled(0, len(store), 1, 1)


def test_steps_until_counts_the_steps_that_a_run_takes(store):
    loader = Loader(store, 120, 50, 1)
    for stop in (0, 1, 50, len(store), 3 * len(store)):
        position = steps = 0
        while position < stop:
            position, steps = loader.step(position, stop).next_position, steps + 1
        assert loader.steps_until(stop) == steps and position == stop


def test_evaluation_takes_a_fair_sample_of_the_rows_once_shortest_first(store):
    batches = evaluation_batches(store, 100, 60)
    documents = [document for batch in batches for document in batch]
    assert len(set(documents)) == 60 and batches == evaluation_batches(store, 100, 60)
    thirds = np.histogram(documents, 3, (0, len(store)))[0]
    assert thirds.min() > 10, "not the first ones alone"
    lengths = store.lengths[documents]
    assert (np.diff(lengths) >= 0).all()
    assert all(len(batch) == 1 or store.lengths[batch].sum() <= 100 for batch in batches)
    assert sorted(d for batch in evaluation_batches(store, 100) for d in batch) == list(range(len(store)))


def test_evaluated_documents_that_begin_alike_fill_a_batch_with_what_they_do_not_share(tmp_path, monkeypatch):
    generator, examples = np.random.default_rng(0), []
    for number in range(60):
        tokens = [*range(40 * (number % 3), 40 * (number % 3) + 40), *generator.integers(200, 999, 1 + number % 7)]
        examples.append(Example(np.asarray(tokens, np.int32), np.asarray([0] * 40 + [1] * (len(tokens) - 40), "f"), 0))
    TokenStore.write(tmp_path / "set", iter(examples))
    store = TokenStore(tmp_path / "set")
    flat, shared = (evaluation_batches(store, 200, share=share) for share in (False, True))
    assert len(shared) < len(flat) / 3
    for batches, share in ((flat, False), (shared, True)):
        assert sorted(document for documents in batches for document in documents) == list(range(60))
        assert max(scored_batch(store, documents, share=share).computed_tokens for documents in batches) <= 200
    some = evaluation_batches(store, 200, 30, share=True)
    assert sorted(document for documents in some for document in documents) == evaluated_documents(store, 30).tolist()
    monkeypatch.setattr("deltaw.data.loader.ALIKE_AMONG", 8 * 50)
    few = evaluation_batches(store, 200, share=True)
    assert sorted(document for documents in few for document in documents) == list(range(60))
    assert len(shared) < len(few) < len(flat)


# -- mixing ------------------------------------------------------------------------------------------------------------


def drawn(loader, epochs):
    """How often each document was drawn in so many epochs."""
    positions = range(epochs * loader.epoch_documents)
    return np.bincount([loader.document(position) for position in positions], minlength=98)


def test_weights_say_how_often_a_document_of_a_source_appears(store):
    loader = Loader(store, 100, 100, 3, mix=[(40, 1.0), (30, 2.0), (28, 0.5)])
    assert loader.epoch_documents == 40 + 60 + 14
    assert drawn(loader, 1)[:40].tolist() == [1] * 40 and drawn(loader, 1)[40:70].tolist() == [2] * 30
    assert sorted(drawn(loader, 1)[70:].tolist()) == [0] * 14 + [1] * 14
    assert drawn(loader, 4).tolist() == [4] * 40 + [8] * 30 + [2] * 28


def test_a_source_with_an_odd_weight_is_gone_through_evenly(store):
    loader = Loader(store, 100, 100, 3, mix=[(40, 0.7), (58, 1.35)])
    counts = drawn(loader, 20)
    assert counts[:40].max() - counts[:40].min() <= 1 and counts[40:].max() - counts[40:].min() <= 1
    assert counts[:40].sum() == 20 * 28 and counts[40:].sum() == 20 * 78


def test_sources_are_mixed_within_an_epoch_and_the_order_is_a_function_of_the_position(store):
    loader, again = (Loader(store, 100, 100, 3, mix=[(49, 1.0), (49, 1.0)]) for _ in range(2))
    order = [loader.document(position) for position in range(98)]
    firsts = sum(document < 49 for document in order[:49])
    assert 12 < firsts < 37 and [again.document(position) for position in (97, 5, 50)] == [
        order[p] for p in (97, 5, 50)
    ]


def test_an_empty_source_takes_no_part(store):
    assert Loader(store, 100, 100, 3, mix=[(0, 5.0), (98, 1.0)]).epoch_documents == 98


def test_what_begins_alike_is_cut_by_what_is_computed(tmp_path):
    """Three beginnings of 100 tokens, ten documents of each: each group fits into one forward pass of 220 tokens."""
    starts = [np.arange(1000 * n, 1000 * n + 100) for n in range(3)]
    rows = [np.concatenate([starts[n % 3], [5000 + n] * 10]).astype(np.int32) for n in range(30)]
    store = TokenStore.write(tmp_path / "alike", (Example(row, np.ones(len(row), np.float32)) for row in rows))
    alone, together = (Loader(store, 10**6, 250, 0, share=share) for share in (False, True))
    step, plain = together.step(0, 30), alone.step(0, 30)
    assert step.next_position == plain.next_position == 30 and len(plain.micro_batches) == 15
    assert sorted(d for part in step.micro_batches for d in part) == list(range(30)) and len(step.micro_batches) == 3
    batches = together.batches(step)
    assert all(batch.computed_tokens <= 250 for batch in batches)
    assert sum(b.weight for b in batches) == sum(b.weight for b in alone.batches(plain))
    assert together.steps_until(30) == alone.steps_until(30) == 1
    copied = Loader(store, 10**6, 250, 0, share=True, copies=True)
    whole = copied.step(0, 30)
    assert len(whole.micro_batches) == 15, "no more documents than fit in full"
    assert sum(b.computed_tokens for b in copied.batches(whole)) < sum(b.computed_tokens for b in alone.batches(plain))
