"""Features help where real ones are above none and above shuffled ones, whatever luck one assignment has."""

import numpy as np
import pytest

from trainer.evaluation.significance import StatsError, compare, holm
from trainer.evaluation.three_arms import adjusted, three_arms

S, U, SEED_SPREAD = 5, 200, 0.01


def arms(random, *, none=0.0, real=0.0, shuffled=0.0, luck=0.0, seeds=S, seed_spread=SEED_SPREAD):
    """Metrics [S, U] of each arm: an effect, users' own level, luck of an assignment (real: one, shuffled: one a
    seed), of a seed, and noise."""
    users_U = random.normal(0.3, 0.1, U)

    def arm(effect, luck_of):
        seeds_S1 = random.normal(0, seed_spread, (seeds, 1))
        return effect + users_U + luck * luck_of + seeds_S1 + random.normal(0, 0.05, (seeds, U))

    return arm(none, 0.0), arm(real, random.normal()), arm(shuffled, random.normal(size=(seeds, 1)))


@pytest.mark.parametrize(
    ("effects", "verdict"),
    [
        ({"real": 0.15}, "helps"),
        ({"real": 0.15, "shuffled": 0.15}, "not shown"),  # more parameters, or popularity
        ({"none": 0.15, "real": 0.15}, "not shown"),
        ({"none": 0.3, "real": 0.15}, "hurts"),  # above shuffled, and still worse than none
        ({}, "not shown"),
    ],
)
def test_the_verdict_follows_both_comparisons(effects, verdict):
    found = three_arms(*arms(np.random.default_rng(1), **effects))
    assert found.verdict() == verdict


def test_a_claim_is_as_sure_as_its_less_sure_test():
    none, real, shuffled = arms(np.random.default_rng(2), real=0.06, shuffled=0.03)
    found = three_arms(none, real, shuffled)
    assert found.over_none.gain == pytest.approx((real - none).mean())
    assert found.over_shuffled.gain == pytest.approx((real - shuffled).mean())
    assert found.p_helps == max(found.over_none.p_value, found.over_shuffled.p_value)
    assert found.over_none.confidence == 0.99
    holds_zero = found.over_shuffled.low < 0 < found.over_shuffled.high
    assert holds_zero == (found.over_shuffled.p_value > 0.01)


def test_without_luck_the_tests_are_those_of_users_and_seeds():
    none, real, shuffled = arms(np.random.default_rng(3), real=0.02)
    steady = shuffled - shuffled.mean(1, keepdims=True) + shuffled.mean()  # varies less than real
    assert three_arms(none, real, steady).over_none == compare(real, none, confidence=0.99)


def test_luck_widens_intervals():
    none, real, shuffled = arms(np.random.default_rng(4), luck=0.05)
    variance = shuffled.mean(1).var(ddof=1) - real.mean(1).var(ddof=1)
    found, plain = three_arms(none, real, shuffled), compare(real, none, confidence=0.99)
    assert found.over_none.shared_spread == pytest.approx(np.sqrt(variance))
    student = 4.604095  # of 4 degrees of freedom, two-sided 0.01
    half, plain_half = ((one.high - one.low) / 2 for one in (found.over_none, plain))
    assert half**2 - plain_half**2 == pytest.approx(student**2 * variance, rel=1e-5)
    assert found.over_none.least_shown(0.01) == pytest.approx(half)


def test_lucky_noise_hardly_ever_helps():
    """2 in 100 and fewer at 0.01, where tests of users and seeds alone find 4 and more."""
    random = np.random.default_rng(5)
    found = naive = 0
    for _ in range(400):
        none, real, shuffled = arms(random, luck=5 * SEED_SPREAD)
        found += three_arms(none, real, shuffled).verdict() == "helps"
        gains = [compare(real, other) for other in (none, shuffled)]
        naive += all(gain.gain > 0 and gain.p_value <= 0.01 for gain in gains)
    assert found <= 8
    assert naive >= 16


def test_claims_that_are_read_together_are_adjusted():
    random = np.random.default_rng(6)
    claims = [three_arms(*arms(random, real=effect)) for effect in (0.03, 0.1, 0.0)]
    together = adjusted(claims)
    assert [claim.p_helps for claim in together] == holm([claim.p_helps for claim in claims])
    assert together[1].over_none == claims[1].over_none


def test_arms_of_other_users_are_refused():
    none, real, shuffled = arms(np.random.default_rng(7))
    with pytest.raises(StatsError, match="same seeds and users"):
        three_arms(none[:, 1:], real, shuffled)


@pytest.mark.parametrize(("seeds", "least", "most"), [(5, 0.7, 0.9), (12, 0.985, 1.0)])
def test_twelve_seeds_show_what_is_planted(seeds, least, most):
    """The share of logs like the first five of `make bench-planted` that say *helps*: their gain is 0.143, differences
    spread by 0.027 from seed to seed, and the luck of an assignment by 0.017."""
    random = np.random.default_rng(8)
    given = {"real": 0.143, "luck": 0.017, "seeds": seeds, "seed_spread": 0.027 / np.sqrt(2)}
    share = np.mean([three_arms(*arms(random, **given)).verdict() == "helps" for _ in range(400)])
    assert least <= share <= most
