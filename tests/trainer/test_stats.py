"""Tests, intervals and corrections against scipy, closed forms, and simulations of what they promise."""

import numpy as np
import pytest
from scipy import stats

from etl.config import GraftrecError
from trainer.stats import (
    StatsError,
    bootstrap_interval,
    compare,
    holm,
    paired_t,
    users_and_seeds_test,
)


def crossed(rng, num_seeds, num_users, *, gain=0.0, seed_sd, user_sd=1.0, rest_sd=1.0, skewed=False):
    """Differences [S, U] of the crossed model; optionally far from normal."""
    users = (rng.exponential(user_sd, num_users) - user_sd) if skewed else rng.normal(0, user_sd, num_users)
    rest = (
        rng.choice([-rest_sd, 0, rest_sd], (num_seeds, num_users))
        if skewed
        else rng.normal(0, rest_sd, (num_seeds, num_users))
    )
    return gain + rng.normal(0, seed_sd, (num_seeds, 1)) + users + rest


# --- paired t ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_users", "shift"), [(5, 0.0), (40, 0.3), (3_000, 0.02)])
def test_paired_t_equals_scipy(num_users, shift):
    rng = np.random.default_rng(num_users)
    theirs = rng.random(num_users)
    ours = theirs + rng.normal(shift, 0.5, num_users)
    found, expected = paired_t(ours, theirs), stats.ttest_rel(ours, theirs)
    interval = expected.confidence_interval(0.95)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.gain == pytest.approx(ours.mean() - theirs.mean())
    assert found.relative_gain == pytest.approx(ours.mean() / theirs.mean() - 1)
    assert (found.num_users, found.num_seeds, found.seeds_varied) == (num_users, 1, False)


def test_paired_t_of_equal_models_finds_nothing():
    found = paired_t(np.ones(10), np.ones(10))
    assert (found.gain, found.p_value, found.low, found.high) == (0, 1, 0, 0)


def test_paired_t_of_a_constant_gain_is_certain():
    assert paired_t(np.full(10, 0.75), np.full(10, 0.5)).p_value == 0


def test_paired_t_over_a_baseline_of_zero_has_no_relative_gain():
    assert np.isnan(paired_t(np.array([0.1, 0.2]), np.zeros(2)).relative_gain)


# --- users and seeds -----------------------------------------------------------------------------------------------


def test_users_and_seeds_test_with_one_seed_is_the_paired_t():
    diff = np.random.default_rng(0).normal(0.1, 1, 200)
    for given in (diff, diff[None]):
        found = users_and_seeds_test(given)
        assert found.p_value == pytest.approx(stats.ttest_1samp(diff, 0).pvalue, rel=1e-9)
        assert not found.seeds_varied


def test_users_and_seeds_test_by_hand():
    # Seeds' means 0, 2, 4 and users' means 1, 3 (x U): A = 2·4 = 8, B = 3·2 = 6, rest 0, mean 2.
    diff = np.array([[-1.0, 1.0], [1.0, 3.0], [3.0, 5.0]])
    t_seeds, t_users = stats.t.ppf(0.975, 2), stats.t.ppf(0.975, 1)
    half = np.sqrt(t_seeds**2 * 8 / 6 + t_users**2 * 6 / 6)
    found = users_and_seeds_test(diff, baseline=4.0)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))
    assert (found.gain, found.relative_gain, found.num_seeds, found.num_users) == (2, 0.5, 3, 2)


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
@pytest.mark.parametrize("gain", [0.05, 0.4, 2.0])
def test_users_and_seeds_p_value_and_interval_say_the_same(num_seeds, gain):
    diff = crossed(np.random.default_rng(num_seeds), num_seeds, 100, gain=gain, seed_sd=0.1)
    p_value = users_and_seeds_test(diff).p_value
    touching = users_and_seeds_test(diff, confidence=1 - p_value)
    assert min(abs(touching.low), abs(touching.high)) == pytest.approx(0, abs=1e-6)


def test_users_and_seeds_p_value_of_an_overwhelming_gain_is_tiny_and_finite():
    diff = crossed(np.random.default_rng(3), 5, 5_000, gain=1e6, seed_sd=1e-9)
    assert 0 <= users_and_seeds_test(diff).p_value < 1e-15
    assert users_and_seeds_test(np.full((3, 10), 0.5)).p_value == 0


def test_users_and_seeds_test_is_symmetric():
    diff = crossed(np.random.default_rng(3), 3, 50, gain=0.3, seed_sd=0.2)
    one, other = users_and_seeds_test(diff), users_and_seeds_test(-diff)
    assert one.p_value == other.p_value
    assert (one.low, one.high) == (-other.high, -other.low)


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("seed_share", [0, 1, 10])  # variance of the mean: that of the seeds over that of the users
@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_users_and_seeds_test_is_calibrated_under_the_null(num_seeds, seed_share, skewed):
    rng = np.random.default_rng([num_seeds, seed_share, skewed])
    num_users, trials = 100, 3_000
    seed_sd = np.sqrt(seed_share * num_seeds / num_users)
    p_values = [
        users_and_seeds_test(crossed(rng, num_seeds, num_users, seed_sd=seed_sd, skewed=skewed)).p_value
        for _ in range(trials)
    ]
    found = np.mean(np.array(p_values) < 0.05)
    assert found <= 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / trials), f"{found:.3f} of true nulls rejected at 0.05"


def test_a_test_over_users_alone_is_fooled_by_seeds():
    """The reason for `users_and_seeds_test`: the same data, averaged over seeds, looks significant far too often."""
    rng = np.random.default_rng(7)
    drawn = [crossed(rng, 3, 100, seed_sd=np.sqrt(3 / 100)) for _ in range(500)]
    naive = np.mean([stats.ttest_1samp(diff.mean(0), 0).pvalue < 0.05 for diff in drawn])
    ours = np.mean([users_and_seeds_test(diff).p_value < 0.05 for diff in drawn])
    assert naive > 0.1
    assert ours < 0.06


def test_users_and_seeds_test_has_power():
    """A gain as the prototype's on ML-1M: 0.045 over 5,306 users, sd 0.3 a user and seed, 0.005 a seed."""
    rng = np.random.default_rng(8)
    found = [
        users_and_seeds_test(crossed(rng, 3, 5_306, gain=0.045, seed_sd=0.005, user_sd=0.2, rest_sd=0.2)).p_value < 0.05
        for _ in range(100)
    ]
    assert np.mean(found) > 0.95


def test_compare_broadcasts_a_baseline_without_seeds():
    rng = np.random.default_rng(9)
    ours, theirs = rng.random((3, 50)), rng.random(50)
    found = compare(ours, theirs)
    assert found == compare(ours, np.tile(theirs, (3, 1)))
    assert found.relative_gain == pytest.approx(ours.mean() / theirs.mean() - 1)


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ((3, 50), (3, 49), "same seeds and users"),
        ((3, 50), (2, 50), "same seeds and users"),
        ((3, 1), (3, 1), "at least two users"),
    ],
)
def test_compare_refuses_what_is_not_paired(ours, theirs, message):
    with pytest.raises(StatsError, match=message) as caught:
        compare(np.ones(ours), np.ones(theirs))
    assert isinstance(caught.value, GraftrecError)


def test_users_and_seeds_test_refuses_nan():
    with pytest.raises(StatsError, match="found 1 that are not"):
        users_and_seeds_test(np.array([0.1, np.nan, 0.2]))


# --- bootstrap -----------------------------------------------------------------------------------------------------


def test_bootstrap_interval_depends_on_the_seed_only():
    diff = np.random.default_rng(0).normal(size=300)
    assert bootstrap_interval(diff, seed=1) == bootstrap_interval(diff, seed=1)
    assert bootstrap_interval(diff, seed=1) != bootstrap_interval(diff, seed=2)


def test_bootstrap_interval_is_close_to_scipys():
    diff = np.random.default_rng(1).choice([0.0, 0.0, 0.5, 1.0, -0.5], 400)
    expected = stats.bootstrap((diff,), np.mean, n_resamples=9_999, method="percentile", random_state=0)
    found = bootstrap_interval(diff, seed=0, resamples=9_999)
    assert found == pytest.approx(tuple(expected.confidence_interval), abs=0.004)


@pytest.mark.parametrize("kind", ["continuous", "mostly zero"])
def test_bootstrap_interval_covers_as_often_as_it_says(kind):
    rng = np.random.default_rng(2)
    covered, trials = 0, 400
    for trial in range(trials):
        diff = rng.normal(0.2, 1, 150) if kind == "continuous" else rng.choice([0, 1, -1], 150, p=[0.6, 0.3, 0.1])
        low, high = bootstrap_interval(diff, seed=trial, resamples=500)
        covered += low <= 0.2 <= high
    assert 0.91 <= covered / trials <= 0.98


def test_bootstrap_interval_refuses_seeds():
    with pytest.raises(StatsError, match="one difference per user"):
        bootstrap_interval(np.ones((3, 10)), seed=0)


# --- Holm ----------------------------------------------------------------------------------------------------------


def test_holm_by_hand():
    # Sorted 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1 = 0.02, 0.03, 0.06, 0.04, and never below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_caps_at_one_and_keeps_single_values():
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


def test_holm_rejects_all_that_bonferroni_rejects_and_nothing_above_the_level():
    rng = np.random.default_rng(3)
    for size in (2, 5, 20):
        raw = rng.random(size) ** 3
        adjusted = np.array(holm(list(raw)))
        assert (adjusted <= np.minimum(raw * size, 1) + 1e-12).all()
        assert (adjusted >= raw).all()
        assert (np.diff(adjusted[np.argsort(raw)]) >= 0).all()


def test_holm_bounds_the_family_wise_error():
    rng = np.random.default_rng(4)
    families = rng.random((2_000, 6))
    assert np.mean([min(holm(list(family))) < 0.05 for family in families]) < 0.06


@pytest.mark.parametrize("bad", [[-0.1], [1.1], [float("nan")]])
def test_holm_refuses_what_is_no_p_value(bad):
    with pytest.raises(StatsError, match="between 0 and 1"):
        holm(bad)
