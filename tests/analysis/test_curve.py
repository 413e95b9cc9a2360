"""Retained gain on losses whose answer is known, intervals against another bootstrap, and every verdict."""

from __future__ import annotations

import numpy as np
import pytest

from deltaw.analysis.curve import Curve, Needed, Point, retained_gain

# Documents whose gains are in one ratio leave the bootstrap nothing to vary.
EXACT = 1e-12
# Bounds of two bootstraps of 2,000 resamples.
SAMPLED = 0.01
# Of 200 intervals that should each hold the truth with 95 %: four standard errors below, and small samples' loss.
COVERED = 0.88


def losses(gains, documents=60, noise=0.0, seed=0, improvement=0.4):
    """(base [D], losses [K, D], tokens [D]) of documents that differ much in loss, and gain these shares at each rank."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 60, documents)
    base = tokens * rng.uniform(1, 5, documents)
    whole = tokens * improvement * rng.uniform(0.5, 1.5, documents)
    kept = np.array([gain * whole + noise * tokens * rng.normal(size=documents) for gain in gains[:-1]] + [whole])
    return base, base - kept, tokens


def test_losses_that_gain_in_one_ratio_give_it_back_with_no_interval():
    """The documents' own difficulty, which is ten times the gain, cancels."""
    base, kept, tokens = losses([-0.1, 0.5, 0.9, 1.0])
    curve = retained_gain(base, kept, tokens, [1, 2, 4, 8])
    assert [point.rank for point in curve.points] == [1, 2, 4, 8]
    for point, gain in zip(curve.points, [-0.1, 0.5, 0.9, 1.0], strict=True):
        assert [point.gain, point.low, point.high] == pytest.approx([gain] * 3, abs=EXACT)
    assert [point.loss for point in curve.points] == pytest.approx(list(kept.sum(1) / tokens.sum()))
    assert curve.base_loss == pytest.approx(base.sum() / tokens.sum())
    assert curve.improvement[0] == pytest.approx(curve.base_loss - curve.points[-1].loss)
    assert (curve.documents, curve.tokens, curve.improves) == (60, tokens.sum(), True)


def test_intervals_are_those_of_a_bootstrap_written_out():
    base, kept, tokens = losses([0.3, 0.8, 1.0], noise=0.2)
    curve = retained_gain(base, kept, tokens, [1, 2, 4])
    rng = np.random.default_rng(99)
    drawn = []
    for _ in range(2000):
        who = rng.integers(0, len(base), len(base))
        gained = (base - kept[-1])[who].sum()
        drawn.append([(base - loss)[who].sum() / gained for loss in kept] + [gained / tokens[who].sum()])
    bounds = np.percentile(drawn, [2.5, 97.5], axis=0).T
    for point, (low, high) in zip(curve.points, bounds, strict=False):
        assert [point.low, point.high] == pytest.approx([low, high], abs=SAMPLED)
        assert point.low <= point.gain <= point.high
    assert curve.improvement[1:] == pytest.approx(bounds[-1], abs=SAMPLED)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    held = 0
    for seed in range(200):
        point = retained_gain(*losses([0.7, 1.0], noise=0.3, seed=seed), [1, 2]).points[0]
        held += point.low <= 0.7 <= point.high
    assert held >= COVERED * 200


def test_the_same_losses_give_the_same_curve():
    data = losses([0.3, 0.8, 1.0], noise=0.2)
    assert retained_gain(*data, [1, 2, 4]) == retained_gain(*data, [1, 2, 4])
    assert retained_gain(*data, [1, 2, 4]) != retained_gain(*data, [1, 2, 4], seed=1)


def curve_of(*points, improvement=(0.4, 0.3, 0.5)):
    """A curve from (rank, gain, low, high)."""
    return Curve(tuple(Point(rank, 2.0, *gain) for rank, *gain in points), 2.5, improvement, 1200, 99_000)


WHOLE = (16, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("points", "needed", "determined"),
    [
        ([(1, 0.5, 0.4, 0.6), (2, 0.97, 0.95, 0.98), (4, 0.99, 0.98, 1), WHOLE], (2, 2), True),
        ([(1, 0.5, 0.4, 0.6), (2, 0.94, 0.9, 0.96), (4, 0.99, 0.98, 1), WHOLE], (2, 4), True),
        ([(1, 0.9, 0.8, 1.1), (2, 0.94, 0.9, 0.96), (4, 0.99, 0.98, 1), WHOLE], (1, 4), False),
        ([(1, 0.9, 0.8, 0.9), (2, 0.9, 0.8, 0.96), (4, 0.9, 0.8, 1), WHOLE], (2, 16), False),
        ([(1, 0.9, 0.8, 0.94), (2, 0.9, 0.8, 0.94), (4, 0.9, 0.8, 0.94), WHOLE], (16, 16), True),
    ],
)
def test_needed_goes_from_the_first_rank_that_may_reach_the_share_to_the_first_that_does(points, needed, determined):
    found = curve_of(*points).needed(0.95)
    assert found == Needed(0.95, *needed)
    assert found.determined == determined


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([(8, 0.995, 0.991, 0.999), WHOLE], "Halve it: half the rank keeps 99.5% of the gain (99.1% to 99.9%), so rank 8 is enough."),
        ([(8, 0.95, 0.93, 0.969), WHOLE], "Too small: half the rank keeps 95.0% of the gain (93.0% to 96.9%); the last directions still matter, so try rank 32."),
        ([(8, 0.98, 0.971, 0.989), WHOLE], "Enough: half the rank keeps 98.0% of the gain (97.1% to 98.9%); rank 16 is neither wasteful nor surely short."),
        ([(1, 1.0, 1.0, 1.0)], "Rank 1 cannot be halved; train at a higher rank to learn whether more would help."),
        ([(4, 0.9, 0.9, 0.9), WHOLE], "Undetermined: half of rank 16 was not measured."),
    ],
)  # fmt: skip
def test_each_verdict_gives_its_evidence(points, said):
    assert curve_of(*points).verdict() == said


def test_without_a_sure_improvement_nothing_is_said_of_ranks():
    curve = curve_of((8, 0.995, 0.991, 0.999), WHOLE, improvement=(0.01, -0.02, 0.04))
    assert not curve.improves
    assert curve.verdict() == (
        "Undetermined: on these 1,200 documents the adapter is not surely better than the base "
        "(+0.0100 nats per token, -0.0200 to +0.0400), so there is no gain to retain."
    )
    assert curve.needed(0.99) == Needed(0.99, 0, 16)
    assert not curve.needed(0.99).determined


@pytest.mark.parametrize(("improvement", "noise"), [(0.0, 0.0), (-0.4, 0.1)])
def test_an_adapter_that_changes_nothing_or_harms_is_no_error(improvement, noise):
    curve = retained_gain(*losses([0.5, 1.0], improvement=improvement, noise=noise), [1, 2])
    assert not curve.improves
    assert not curve.needed(0.9).determined
    assert curve.verdict().startswith("Undetermined")
