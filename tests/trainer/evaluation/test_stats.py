"""Tests, intervals and corrections against scipy, closed forms, and simulations of what they promise."""

import numpy as np
import pytest
from scipy import stats

from etl.settings import GraftrecError
from trainer.evaluation.significance import (
    Comparison,
    StatsError,
    bootstrap_interval,
    compare,
    detectable_gain,
    detectable_text,
    holm,
    mean_over_seeds,
    paired_t,
    seeds_to_show,
    users_and_seeds_test,
    users_to_show,
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


# --- what an experiment can show -----------------------------------------------------------------------------------


def test_detectable_gain_by_hand():
    """3 seeds of 1,865 users, the documented spreads: t(2) 4.303·0.043/√3, and t(1864) 1.961·0.9/√1865."""
    expected = np.hypot(stats.t.ppf(0.975, 2) * 0.043 / np.sqrt(3), stats.t.ppf(0.975, 1_864) * 0.9 / np.sqrt(1_865))
    assert expected == pytest.approx(0.114, abs=0.001)
    assert detectable_gain(3, 1_865) == pytest.approx(expected)
    assert detectable_text(3, 1_865) == "3 seeds of 1,865 users show gains above about 11 %"
    assert detectable_text(5, 1_865) == "5 seeds of 1,865 users show gains above about 7 %"
    assert detectable_text(5, 10**6, seed_spread=0.01) == "5 seeds of 1,000,000 users show gains above about 1.3 %"
    alone = stats.t.ppf(0.975, 99) * 0.9 / 10
    assert detectable_gain(1, 100) == pytest.approx(alone), "one seed says nothing of seeds"
    assert detectable_gain(3, 1_865, level=0.01) > detectable_gain(3, 1_865) > detectable_gain(4, 1_865)


@pytest.mark.parametrize(("num_seeds", "num_users"), [(0, 100), (3, 1)])
def test_detectable_gain_of_nothing_is_refused(num_seeds, num_users):
    with pytest.raises(StatsError, match="at least one seed and two users"):
        detectable_gain(num_seeds, num_users)


def test_least_shown_is_where_the_p_value_is_the_level():
    diff = crossed(np.random.default_rng(5), 4, 100, seed_sd=0.2)
    for level in (0.01, 0.05, 0.2):
        least = users_and_seeds_test(diff).least_shown(level)
        assert users_and_seeds_test(diff - diff.mean() + least).p_value == pytest.approx(level, rel=1e-6)


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_detectable_gain_is_shown_by_half_of_all_experiments_and_twice_as_much_by_most(num_seeds):
    rng, num_users = np.random.default_rng(num_seeds), 400
    spreads = {"user_spread": 1.0, "seed_spread": float(np.hypot(0.05, 0.3 / np.sqrt(num_users)))}  # the rest, too
    gain = detectable_gain(num_seeds, num_users, **spreads)
    shown = {
        factor: np.mean(
            [
                users_and_seeds_test(
                    crossed(rng, num_seeds, num_users, gain=factor * gain, seed_sd=0.05, user_sd=1.0, rest_sd=0.3)
                ).p_value
                <= 0.05
                for _ in range(400)
            ]
        )
        for factor in (0, 1, 2)
    }
    assert shown[0] <= 0.07
    assert 0.4 <= shown[1] <= 0.75
    assert shown[2] >= 0.9


def shown_with(gain, user_spread, seed_spread, *, num_seeds=3, num_users=1_000):
    return Comparison(gain, float("nan"), 0.5, 0.0, 0.0, num_users, num_seeds, 0.95, user_spread, seed_spread)


def test_seeds_to_show_by_hand():
    # t(3) 3.182·0.02/2 = 0.0318, t(4) 2.776·0.02/√5 = 0.0248; users 1.962·0.05/√1000 = 0.0031
    assert seeds_to_show(shown_with(0.03, 0.05, 0.02)) == 5
    assert seeds_to_show(shown_with(0.032, 0.05, 0.02)) == 4
    assert seeds_to_show(shown_with(0.1, 0.05, 0.02)) == 3, "as many as there are"
    assert seeds_to_show(shown_with(0.003, 0.05, 0.0)) is None, "users alone vary too much"
    assert seeds_to_show(shown_with(-0.03, 0.05, 0.02)) is None, "no gain"
    assert seeds_to_show(shown_with(0.03, 0.05, 0.0, num_seeds=1)) is None, "nothing is known of seeds"
    assert seeds_to_show(shown_with(0.0001, 0.0, 1.0)) is None, "more than anyone trains"


def test_users_to_show_by_hand():
    # (1.962·0.05/0.003)² = 1,069
    assert users_to_show(shown_with(0.003, 0.05, 0.0), num_seeds=3) == pytest.approx(1_069, abs=5)
    assert users_to_show(shown_with(0.003, 0.05, 0.02), num_seeds=3) is None, "seeds alone vary too much"
    assert users_to_show(shown_with(-0.1, 0.05, 0.0), num_seeds=3) is None


def test_seeds_to_show_are_enough_about_as_often_as_not():
    """A pilot of 4 seeds that did not show a gain names a number; with so many, new seeds and the same gain and
    spreads, half of the experiments show it (the median pilot's number; one pilot knows little of seeds' spread)."""
    rng, gain, num_users = np.random.default_rng(11), 0.12, 400

    def experiment(num_seeds):
        return users_and_seeds_test(crossed(rng, num_seeds, num_users, gain=gain, seed_sd=0.12, user_sd=0.5))

    true = Comparison(gain, float("nan"), 0.5, 0, 0, num_users, 4, 0.95, 0.5, float(np.hypot(0.12, 0.05)))
    enough = seeds_to_show(true)
    assert enough > 4
    assert 0.4 <= np.mean([experiment(enough).p_value <= 0.05 for _ in range(300)]) <= 0.75
    named = [seeds_to_show(found) for found in (experiment(4) for _ in range(300)) if found.p_value > 0.05]
    assert enough / 2 <= np.median([number or 1_000 for number in named]) <= 2 * enough


def test_mean_over_seeds_is_the_same_whatever_the_layout():
    values = np.random.default_rng(0).random((5, 1_001))
    assert mean_over_seeds(values) == mean_over_seeds(np.asfortranarray(values)) == values.mean(1).mean()
    turned = np.asfortranarray(values - 0.5)
    assert users_and_seeds_test(turned, baseline=1.0) == users_and_seeds_test(values - 0.5, baseline=1.0)
