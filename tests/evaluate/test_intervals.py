"""Intervals: by the book, honest about pictures that share a prompt, and sound at the edges."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gobelin.evaluate.intervals import Auc, Mean, Share


@given(hits=st.integers(0, 60), misses=st.integers(0, 60), size=st.integers(1, 5))
def test_intervals_hold_their_share(hits, misses, size):
    outcomes = [True] * hits + [False] * misses
    for groups in (None, [at // size for at in range(len(outcomes))]):
        share = Share.of(outcomes, groups)
        assert share.n == hits + misses
        if share.n:
            assert 0 <= share.low <= share.value <= share.high <= 1
            assert share.low < share.high


def test_an_interval_known_from_the_books():
    share = Share.of([True] * 8 + [False] * 2)  # Wilson's interval for 8 of 10
    assert (share.low, share.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


def test_groups_of_one_are_no_groups_and_groups_that_agree_count_once():
    outcomes = [True] * 14 + [False] * 6
    assert Share.of(outcomes, list(range(20))) == Share.of(outcomes)
    four_of_each = Share.of([outcome for outcome in outcomes for _ in range(4)], [at // 4 for at in range(80)])
    once = Share.of(outcomes)
    assert four_of_each.low == pytest.approx(once.low, abs=0.002)
    assert four_of_each.high == pytest.approx(once.high, abs=0.002)
    mixed = Share.of([True, True, True, False] * 20, [at // 4 for at in range(80)])  # all prompts are alike
    assert mixed.high - mixed.low == pytest.approx(0.186, abs=0.01), "as wide as of 80 independent pictures"


def test_one_failure_more_never_raises_an_end_of_the_interval():
    groups = [at // 4 for at in range(400)]
    shares = [Share.of([False] * failures + [True] * (400 - failures), groups) for failures in range(40)]
    for better, worse in pairwise(shares):
        assert worse.low < better.low + 2e-3
        assert worse.high <= better.high


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_an_interval_of_grouped_pictures_covers_the_truth(probability):
    rng = np.random.default_rng(0)
    trials, prompts, pictures, alike = 300, 60, 4, 1.0  # Beta(p, 1 - p): half of the variance is between prompts
    groups = [at // pictures for at in range(prompts * pictures)]
    covered = {"grouped": 0, "not": 0}
    for _ in range(trials):
        each = rng.beta(probability * alike, (1 - probability) * alike, prompts)
        outcomes = (rng.random((prompts, pictures)) < each[:, None]).ravel().tolist()
        for name, share in (("grouped", Share.of(outcomes, groups)), ("not", Share.of(outcomes))):
            covered[name] += share.low <= probability <= share.high
    assert 0.92 <= covered["grouped"] / trials <= 0.99
    assert covered["not"] / trials < 0.90, "or the test could not fail"


def test_a_mean_of_shares_is_narrower_than_each_and_has_a_width_at_one():
    one, other = Share.of([True] * 60 + [False] * 40), Share.of([True] * 20 + [False] * 80)
    mean = Share.mean([one, other])
    assert mean.value == pytest.approx(0.4)
    assert mean.n == 200
    assert mean.high - mean.low < min(share.high - share.low for share in (one, other))
    assert Share.mean([one]) == one
    perfect = Share.mean([Share.of([True] * 100)] * 6)
    assert perfect.high == 1
    assert 0.95 < perfect.low < 0.995


def test_a_mean_of_shares_covers_the_truth():
    rng = np.random.default_rng(1)
    truth = (0.2, 0.5, 0.95, 0.9, 0.05, 0.7)
    covered = 0
    for _ in range(400):
        mean = Share.mean([Share.of((rng.random(100) < share).tolist()) for share in truth])
        covered += mean.low <= np.mean(truth) <= mean.high
    assert 0.92 <= covered / 400 <= 0.985


def test_the_margin_knows_which_words_share_a_picture() -> None:
    apart = Mean.of([[0.0], [1.0]] * 50)
    together = Mean.of([[0.0, 0.0], [1.0, 1.0]] * 25)
    assert apart.value == together.value == 0.5
    assert apart.n == together.n == 100
    assert together.margin == pytest.approx(apart.margin * 2**0.5, rel=0.02)
    assert apart.margin == pytest.approx(1.96 * 0.5 / 10, rel=0.02)


def test_the_area_under_the_curve_is_the_share_of_pairs_told_apart():
    rng = np.random.default_rng(3)
    present = rng.random(80) < 0.3
    scores = np.round(present + rng.normal(size=80), 1)  # with ties
    pairs = [(a > b) + (a == b) / 2 for a in scores[present] for b in scores[~present]]
    auc = Auc.of(scores.tolist(), present.tolist(), range(80))
    assert auc.value == pytest.approx(np.mean(pairs))
    assert 0.5 < auc.low < auc.value < auc.high < 1
    assert auc == Auc.of(scores.tolist(), present.tolist(), range(80))


def test_groups_that_agree_make_the_interval_of_an_area_wide():
    rng = np.random.default_rng(4)
    present = np.tile([True, False], 40)
    scores = present + 2 * rng.normal(size=80)
    alone = Auc.of(scores.tolist(), present.tolist(), range(80))
    fours = [np.repeat(one, 4).tolist() for one in (scores, present, np.arange(80))]
    together = Auc.of(*fours)
    assert together.value == pytest.approx(alone.value)
    assert together.high - together.low == pytest.approx(alone.high - alone.low, rel=0.15)
    many = Auc.of(fours[0], fours[1], range(320))
    assert many.high - many.low < 0.7 * (alone.high - alone.low)


def test_an_area_without_both_kinds_is_none():
    for present in ([True, True], [False, False], []):
        auc = Auc.of([0.5] * len(present), present, range(len(present)))
        assert np.isnan([auc.value, auc.low, auc.high]).all()
    assert Auc.of([1, 0], [True, False], ["a", "a"]).value == 1
    assert Auc.of([1, 1], [True, False], ["a", "a"]).value == 0.5
