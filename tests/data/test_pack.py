"""A flat batch as it is, and a store that gives back what was put in, a page at a time."""

import errno
import os

import numpy as np
import pytest
import torch

from deltaw.data import store as pack
from deltaw.data.example import Example
from deltaw.data.pack import LEAST_SHARED, batch_of, common_beginnings, flat_batch, shared_batch
from deltaw.data.store import TokenStore
from deltaw.errors import DiskError


def example(tokens, weights, row=0):
    return Example(np.asarray(tokens, np.int32), np.asarray(weights, np.float32), row)


def random_examples(count, seed=0):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, 40, count)
    return [example(generator.integers(0, 999, n), generator.integers(0, 2, n), 7 * i) for i, n in enumerate(lengths)]


def test_a_flat_batch_by_eye():
    batch = flat_batch([example([11, 12, 13], [0, 0, 1]), example([21, 22], [0.5, 0.5])], [4, 9])
    assert {name: getattr(batch, name).tolist() for name in ("tokens_T", "positions_T", "weights_T")} == {
        "tokens_T": [11, 12, 13, 21, 22],
        "positions_T": [0, 1, 2, 0, 1],
        "weights_T": [0, 1, 0, 0.5, 0],
    }
    assert batch.targets_T[batch.weights_T > 0].tolist() == [13, 22]
    assert (batch.bounds, batch.documents) == ((0, 3, 5), (4, 9))
    assert (batch.tokens, batch.trained_tokens, batch.weight) == (5, 2, 1.5)
    assert [batch.tokens_T.dtype, batch.targets_T.dtype, batch.weights_T.dtype] == [torch.long, torch.long, torch.float]


def test_no_target_crosses_into_the_next_document():
    examples = random_examples(30)
    batch = flat_batch(examples)
    pairs = iter(zip(batch.tokens_T.tolist(), batch.targets_T.tolist(), batch.weights_T.tolist(), strict=True))
    for one in examples:
        for place in range(len(one.tokens)):
            token, target, weight = next(pairs)
            assert token == one.tokens[place]
            last = place == len(one.tokens) - 1
            assert (weight == 0) if last else (target, weight) == (one.tokens[place + 1], one.weights[place + 1])


def test_a_batch_moves_to_another_device_whole():
    batch = flat_batch(random_examples(3), [0, 1, 2]).to(torch.device("meta"))
    assert batch.tokens_T.device.type == batch.weights_T.device.type == "meta" and batch.documents == (0, 1, 2)


def test_a_store_gives_back_what_was_written(tmp_path):
    examples = random_examples(50)
    TokenStore.write(tmp_path / "new" / "train", iter(examples))
    store = TokenStore(tmp_path / "new" / "train")
    assert len(store) == 50 and store.lengths.tolist() == [len(e.tokens) for e in examples]
    for document, one in enumerate(examples):
        again = store[document]
        assert (again.tokens == one.tokens).all() and (again.weights == one.weights).all() and again.row == one.row
    assert store.tokens == sum(len(e.tokens) for e in examples)
    assert store.trained_tokens == sum(int(e.weights[1:].sum()) for e in examples)
    assert store.trained_tokens == flat_batch(examples).trained_tokens
    expected = flat_batch([examples[5], examples[2]], [5, 2])
    batch = batch_of(store, [5, 2])
    assert torch.equal(batch.tokens_T, expected.tokens_T) and batch.documents == (5, 2)


def test_an_empty_store_opens(tmp_path):
    store = TokenStore.write(tmp_path / "none", [])
    assert (len(store), store.tokens, store.trained_tokens) == (0, 0, 0)


def test_a_store_reads_only_what_is_asked_for(tmp_path):
    """A file of 400 GB: all but one document is a hole that no reading of the whole could get through."""
    TokenStore.write(tmp_path / "large", [example([5, 6, 7], [0, 1, 1])])
    offsets = np.array([0, 3, 10**11, 10**11 + 3], np.int64)
    offsets.tofile(tmp_path / "large.offsets")
    np.arange(3).tofile(tmp_path / "large.rows")
    for kind in ("tokens", "weights"):
        with (tmp_path / f"large.{kind}").open("r+b") as file:
            try:
                file.truncate(4 * (10**11 + 3))
            except OSError:
                pytest.skip("no sparse files here")
    store = TokenStore(tmp_path / "large")
    assert isinstance(store._tokens, np.memmap) and store._tokens.base is not None
    assert store[0].tokens.tolist() == [5, 6, 7] and store[2].tokens.tolist() == [0, 0, 0]
    assert batch_of(store, [0, 2]).tokens == 6 and store.tokens == 10**11 + 3


def test_a_full_disk_is_told_as_such(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def examples():
        yield example([1, 2], [1, 1])
        full()

    with pytest.raises(DiskError, match="No space left"):
        TokenStore.write(tmp_path / "a", examples())
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="Could not write"):
        pack.TokenStore.write(tmp_path / "file" / "train", [])


@pytest.mark.parametrize("kind", ["tokens", "weights", "offsets", "rows", "files"])
@pytest.mark.parametrize("left", [0, 5])
def test_a_token_file_that_was_cut_short_is_told_of_by_name(kind, left, tmp_path):
    TokenStore.write(tmp_path / "all", [Example(np.arange(7), np.ones(7)), Example(np.arange(3), np.ones(3))])
    assert len(TokenStore(tmp_path / "all")) == 2
    os.truncate(tmp_path / f"all.{kind}", left)
    with pytest.raises(DiskError, match=r"all\.\* were cut short. Remove"):
        TokenStore(tmp_path / "all")


# -- what documents have in common ------------------------------------------------------------------------------------


def test_a_shared_batch_by_eye():
    """Twenty tokens in common; the last stays with each document, where it predicts what follows there."""
    common = list(range(100, 120))
    examples = [
        example([*common, 7, 8], [0] * 19 + [1, 1, 1]),
        example([*common, 9], [1] * 21),
        example([5, 6], [0, 1]),
    ]
    batch = shared_batch(examples, [3, 1, 2])
    assert batch.bounds == (0, 2, 21, 24, 26) and batch.before == ((0, 0), (0, 0), (2, 21), (2, 21))
    assert batch.tokens_T.tolist() == [5, 6, *common[:19], 119, 7, 8, 119, 9]
    assert batch.positions_T.tolist() == [0, 1, *range(19), 19, 20, 21, 19, 20]
    assert batch.targets_T[2:21].tolist() == common[1:]
    assert batch.weights_T.tolist() == [1, 0, *[1] * 18, 2, 1, 1, 0, 1, 0]
    assert (batch.tokens, batch.computed_tokens, batch.trained_tokens, batch.documents) == (45, 26, 24, (3, 1, 2))


def test_where_losses_are_told_apart_nothing_that_carries_loss_is_shared():
    common = list(range(100, 120))
    late, later = [0] * 20 + [1, 1], [0] * 20 + [1]
    examples = [example([*common, 7, 8], late), example([5, 6], [0, 1]), example([*common, 7], later)]
    batch = shared_batch(examples, [3, 1, 2], scored=True)
    assert batch.bounds == (0, 2, 21, 24, 26) and batch.before == ((0, 0), (0, 0), (2, 21), (2, 21))
    assert batch.owners == (1, 0, 0, 2) and batch.weights_T.tolist() == [1, 0, *[0] * 19, 1, 1, 0, 1, 0]
    assert batch.owners_of(batch.labelled_N).tolist() == [1, 0, 0, 2]
    early = example([*common, 7, 9], [0] * 5 + [1] * 17)
    batch = shared_batch([early, early], scored=True)
    assert batch.before == () and batch.owners == (0, 1)  # four tokens are too few
    assert shared_batch([early, early]).before != ()


def test_every_prediction_of_a_shared_batch_is_one_of_the_documents_with_the_same_weight():
    generator = np.random.default_rng(0)
    starts = [generator.integers(0, 50, n) for n in (17, 40, 200)]
    examples = []
    for _ in range(30):
        tokens = np.concatenate([starts[generator.integers(3)], generator.integers(0, 50, generator.integers(1, 30))])
        examples.append(example(tokens, generator.integers(0, 2, len(tokens))))
    batch = shared_batch(examples)
    assert batch.computed_tokens < batch.tokens / 2

    def predictions(batch, before):
        """{(all tokens seen, next token): weight}"""
        found = {}
        for number, (a, b) in enumerate(zip(batch.bounds, batch.bounds[1:], strict=False)):
            seen = batch.tokens_T[slice(*before[number])].tolist() if before else []
            for row in range(a, b):
                seen = [*seen, int(batch.tokens_T[row])]
                if batch.weights_T[row]:
                    key = (tuple(seen), int(batch.targets_T[row]))
                    found[key] = found.get(key, 0) + float(batch.weights_T[row])
        return found

    assert predictions(batch, batch.before) == predictions(flat_batch(examples), ())


def test_beginnings_are_shared_where_that_saves_tokens():
    long, short = list(range(200)), list(range(30))
    documents = [np.asarray([*start, n], np.int32) for n, start in enumerate([long, short, long, long])]
    assert common_beginnings(documents) == [([1], 0), ([0, 2, 3], 199)]  # with 1, four would share 29 only
    few = [np.asarray([*range(LEAST_SHARED), n], np.int32) for n in (1, 2)]
    assert common_beginnings(few) == [([0], 0), ([1], 0)]
    same = [np.asarray(long, np.int32)] * 2
    assert common_beginnings(same) == [([0, 1], 199)]
    assert common_beginnings([]) == []
