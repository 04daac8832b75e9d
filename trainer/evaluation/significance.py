"""Whether one model is better than another, by per-user metrics over one or more seeds.

Shape letters: ``U`` users, ``S`` seeds. A comparison is of paired differences: the same users, the same candidates.

Users and seeds are *crossed* random factors: every seed is scored on the same users, so a difference is
``d_su = gain + a_s + b_u + e_su`` and the mean of all S x U of them has the variance
``var(a)/S + var(b)/U + var(e)/(S U)``. A t-test over users of one seed, or of the mean over seeds, knows nothing of
``var(a)/S`` and takes the luck of an initialisation for a finding; a t-test over the S seeds' means knows nothing of
``var(b)/U``; to demand that both reject is no cure either, since the variances add (two equal parts: 17 % false
findings at 5 %). `users_and_seeds_test` adds the parts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from etl.settings import GraftrecError
from etl.text_table import with_sign

FloatArray = npt.NDArray[np.float64]

# Typical standard deviations of the difference in NDCG@10 of two models, as shares of the lower model's mean, to say
# before an experiment what it can show. Measured on the results in `tests/reproduction/results`. USER_SPREAD is near
# the largest value found: earlier/models-demo 0.69 (1,865 users), models-cpu 0.63 (5,306 users of MovieLens-1M),
# table2-cpu 0.92. SEED_SPREAD is the root mean square over the 12 comparisons of earlier/models-demo, 2 seeds each.
USER_SPREAD, SEED_SPREAD = 0.9, 0.043
MOST_SEEDS = 1_000  # nobody trains more


class StatsError(GraftrecError):
    """Differences that no test can be made of."""


@dataclass(frozen=True)
class Comparison:
    """A mean difference with its two-sided p-value and interval [low, high]."""

    gain: float
    relative_gain: float  # gain / the other model's mean; NaN where that mean is not known or is 0
    p_value: float
    low: float
    high: float
    num_users: int
    num_seeds: int  # 1: seeds were not varied, and the p-value and interval speak of users only
    confidence: float = 0.95
    user_spread: float = 0.0  # standard deviation of users' differences (of one seed: with what varies besides)
    seed_spread: float = 0.0  # standard deviation of the seeds' mean differences; 0 where seeds were not varied
    shared_spread: float = 0.0  # of what chance gave to all seeds alike (`users_and_seeds_test`)

    @property
    def seeds_varied(self) -> bool:
        return self.num_seeds > 1

    def least_shown(self, level: float) -> float:
        """The smallest gain that has p ≤ level with these seeds, users and spreads."""
        return _half_width(
            level, _parts(self.num_seeds, self.num_users, self.user_spread, self.seed_spread, self.shared_spread)
        )


def paired_t(ours_U: FloatArray, theirs_U: FloatArray, *, confidence: float = 0.95) -> Comparison:
    """Student's paired t-test over users (Student 1908). Seeds are not varied: see `users_and_seeds_test`."""
    return compare(np.asarray(ours_U)[None], np.asarray(theirs_U)[None], confidence=confidence)


def compare(
    ours_SU: FloatArray, theirs_SU: FloatArray, *, confidence: float = 0.95, shared_spread: float = 0.0
) -> Comparison:
    """`users_and_seeds_test` of ours - theirs. What has no seed (a counting baseline) may be [U] beside [S, U].

    Raises StatsError where the shapes are not of the same users and seeds.
    """
    ours, theirs = np.asarray(ours_SU, dtype=np.float64), np.asarray(theirs_SU, dtype=np.float64)
    if ours.shape[-1] != theirs.shape[-1] or (ours.ndim == theirs.ndim == 2 and len(ours) != len(theirs)):
        raise StatsError(
            f"expected metrics of the same seeds and users, found {list(ours.shape)} and {list(theirs.shape)} "
            "(seeds, users); score both models on one release, with the same seeds"
        )
    baseline = float(np.ascontiguousarray(theirs).mean())
    return users_and_seeds_test(ours - theirs, baseline=baseline, confidence=confidence, shared_spread=shared_spread)


def users_and_seeds_test(
    diff_SU: FloatArray,
    *,
    baseline: float = float("nan"),
    confidence: float = 0.95,
    shared_spread: float = 0.0,
) -> Comparison:
    """Test and interval for the mean of paired differences [S, U] (or [U]) when users and seeds both vary.

    With the mean squares of the two-way layout (seeds A, users B, rest E), the variance of the mean is
    ``A/(S U) + max(B - E, 0)/(S U)``: seeds with the rest, S - 1 degrees of freedom, and users, U - 1. The interval
    ``gain ± sqrt(t²(S - 1) A/(S U) + t²(U - 1) max(B - E, 0)/(S U))`` is Banerjee's (1960, Sankhya 22, 357-358) for a
    sum of variances, whose coverage is at least the nominal one whatever the parts are; the p-value inverts it.

    Why not Satterthwaite's degrees of freedom for the same variance, the usual choice for crossed random readers and
    cases (Dorfman, Berbaum, Metz 1992; Hillis 2007): simulated at 5 %, U = 5,000, they find falsely in up to 13 % with
    2 seeds and 8 % with 3, since few seeds that happen to agree both shrink the variance and raise the degrees of
    freedom. This one finds falsely in 1-5 %. Its price is power with 2 seeds; 3 give most of it, 5 nearly all.

    What it speaks of is the recipe (training with any seed) on users like these. What was not varied (one pre-trained
    model under all seeds of fine-tuning, one hold-out, one set of negatives) it can't speak of. With S = 1 it is the
    paired t-test over users, and `Comparison.seeds_varied` is False. `baseline`: the other model's mean, for
    `relative_gain`. `shared_spread`: standard deviation, as known from as many seeds, of what chance gave to all seeds
    alike and no number of them averages out; a third part, S - 1 degrees of freedom.
    Raises StatsError for fewer than two users, or a difference that is not a number.
    """
    diff = np.atleast_2d(np.ascontiguousarray(diff_SU, dtype=np.float64))  # the same sums, whatever the layout
    num_seeds, num_users = _checked(diff)
    gain = float(diff.mean())
    user_spread, seed_spread = _spreads(diff)
    parts = _parts(num_seeds, num_users, user_spread, seed_spread, shared_spread)

    half = _half_width(1 - confidence, parts)
    return Comparison(
        gain,
        gain / baseline if baseline else float("nan"),
        _p_value(abs(gain), parts),
        gain - half,
        gain + half,
        num_users,
        num_seeds,
        confidence,
        user_spread,
        seed_spread,
        shared_spread,
    )


def mean_over_seeds(values_SU: FloatArray) -> float:
    """The mean over users and then seeds; NaN of a user is left out. The same number wherever it is printed."""
    return float(np.nanmean(np.ascontiguousarray(values_SU), axis=1).mean())


def _checked(diff: FloatArray) -> tuple[int, int]:
    if diff.ndim != 2 or diff.shape[1] < 2 or not len(diff):
        raise StatsError(
            f"expected differences of at least two users, found {list(diff.shape)} (seeds, users); add users"
        )
    broken = int((~np.isfinite(diff)).sum())
    if broken:
        raise StatsError(
            f"expected finite differences, found {broken} that are not; leave out users without held-out items"
        )
    return diff.shape[0], diff.shape[1]


def _spreads(diff: FloatArray) -> tuple[float, float]:
    """Standard deviations of users' differences (less what is not the user's own, where seeds say), and of seeds'."""
    num_seeds, num_users = diff.shape
    of_seed, of_user, mean = diff.mean(1), diff.mean(0), diff.mean()
    if num_seeds == 1:
        return float(diff.std(ddof=1)), 0.0
    rest = float(((diff - of_seed[:, None] - of_user + mean) ** 2).sum()) / ((num_seeds - 1) * (num_users - 1))
    user_variance = max(float(of_user.var(ddof=1)) - rest / num_seeds, 0.0)
    return math.sqrt(user_variance), float(of_seed.std(ddof=1))


def _parts(
    num_seeds: int, num_users: int, user_spread: float, seed_spread: float, shared_spread: float = 0.0
) -> list[tuple[float, int]]:
    """(variance of the mean, degrees of freedom) of each part."""
    users = (user_spread**2 / num_users, num_users - 1)
    if num_seeds == 1:
        return [users]
    shared = [(shared_spread**2, num_seeds - 1)] if shared_spread else []
    return [(seed_spread**2 / num_seeds, num_seeds - 1), users, *shared]


def _half_width(tail: float, parts: list[tuple[float, int]]) -> float:
    """sqrt(sum of t²(tail, two-sided) x variance)."""
    return float(
        np.linalg.norm([special.stdtrit(freedom, tail / 2) * np.sqrt(variance) for variance, freedom in parts])
    )


def _p_value(distance: float, parts: list[tuple[float, int]]) -> float:
    """The tail whose half-width equals the distance: of the interval that just touches zero."""
    if distance == 0:
        return 1.0
    varied = [(variance, freedom) for variance, freedom in parts if variance > 0]
    alone = [2 * float(special.stdtr(freedom, -distance / np.sqrt(variance))) for variance, freedom in varied]
    least = max(alone, default=0.0)  # with more parts than one the interval is wider, the p-value larger
    if len(varied) <= 1 or least == 0:
        return least
    log_p = optimize.brentq(
        lambda log_tail: _half_width(np.exp(log_tail), varied) - distance, np.log(least) - 1e-6, 0.0, xtol=1e-10
    )
    return float(np.exp(log_p))


# --- what an experiment can show ------------------------------------------------------------------------------------


def detectable_gain(
    num_seeds: int,
    num_users: int,
    *,
    user_spread: float = USER_SPREAD,
    seed_spread: float = SEED_SPREAD,
    level: float = 0.05,
) -> float:
    """The smallest observed gain, as a share of the other model's mean, that has p ≤ level in `users_and_seeds_test`.

    Spreads are standard deviations, as shares of that mean: of users' differences, and of the seeds' mean differences.
    It is the half-width of the interval: where the true gain is just this, half of all experiments show it, and nearly
    all show one twice as large. One seed says nothing of seeds: then it is that of users alone. Raises StatsError for
    no seed, or fewer than two users.
    """
    if num_seeds < 1 or num_users < 2:
        raise StatsError(
            f"expected at least one seed and two users, found {num_seeds} and {num_users}; add seeds or users"
        )
    return _half_width(level, _parts(num_seeds, num_users, user_spread, seed_spread))


def detectable_text(
    num_seeds: int,
    num_users: int,
    *,
    user_spread: float = USER_SPREAD,
    seed_spread: float = SEED_SPREAD,
    level: float = 0.05,
) -> str:
    """`detectable_gain` as a sentence: "5 seeds of 1,865 users show gains above about 7 %"."""
    gain = detectable_gain(num_seeds, num_users, user_spread=user_spread, seed_spread=seed_spread, level=level)
    seeds = f"{num_seeds} seeds" if num_seeds > 1 else "1 seed"
    return f"{seeds} of {num_users:,} users show gains above about {_percent(gain)}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.0195 else f"{100 * share:.0f} %"


def seeds_to_show(gain: Comparison, *, level: float = 0.05) -> int | None:
    """The fewest seeds, no fewer than there are, with which the gain would have p ≤ level if gain and spreads stay as
    observed. None: no number of seeds would (it is not above zero, users alone vary too much, or more than 1,000 would
    be needed), or seeds were not varied, so that nothing is known of them."""
    if gain.gain <= 0 or not gain.seeds_varied:
        return None
    for num_seeds in range(gain.num_seeds, MOST_SEEDS + 1):
        if _half_width(level, _parts(num_seeds, gain.num_users, gain.user_spread, gain.seed_spread)) <= gain.gain:
            return num_seeds
    return None


def users_to_show(gain: Comparison, *, num_seeds: int, level: float = 0.05) -> int | None:
    """About how many users would show the gain with `num_seeds` seeds. None: no number would, seeds vary too much."""
    if gain.gain <= 0:
        return None
    of_seeds = 0.0
    if num_seeds > 1:
        of_seeds = _half_width(level, [(gain.seed_spread**2 / num_seeds, num_seeds - 1)]) ** 2
    left = gain.gain**2 - of_seeds
    if left <= 0:
        return None
    num_users = 2
    for _ in range(100):  # t falls with users, so that this rises to the fewest from below, or swings about it
        t_squared = float(special.stdtrit(max(num_users - 1, 2), level / 2)) ** 2
        wanted = max(2, math.ceil(t_squared * gain.user_spread**2 / left))
        if wanted == num_users:
            break
        num_users = wanted
    return num_users


def gain_text(gain: float, relative: float) -> str:
    """A gain as tables, messages and the gate print it: in percent; as it is where the other mean is 0."""
    return f"{with_sign(100 * relative, 1)} %" if math.isfinite(relative) else with_sign(gain, 4)


def p_text(p_value: float | None) -> str:
    """A p-value as tables, pictures and the gate print it."""
    if p_value is None:
        return ""
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


# --- other intervals, and many tests --------------------------------------------------------------------------------


def bootstrap_interval(
    diff_U: FloatArray, *, seed: int, resamples: int = 2_000, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile interval (Efron 1979) of the mean difference over users, drawn with replacement; no normality assumed.

    Users only: for [S, U] give the mean over seeds, and say that seeds are not in it. Equal differences are drawn
    together (a multinomial over distinct values is the same distribution), since many users are alike.
    Memory: a few MiB, whatever U and `resamples` are. Raises StatsError as `users_and_seeds_test`.
    """
    diff = np.asarray(diff_U, dtype=np.float64)
    _checked(np.atleast_2d(diff))
    if diff.ndim != 1:
        raise StatsError(f"expected one difference per user, found {list(diff.shape)}; average over seeds first")
    values, counts = np.unique(diff, return_counts=True)
    random = np.random.default_rng(seed)
    rows = max(1, 1_000_000 // len(values))
    means = np.concatenate(
        [
            random.multinomial(len(diff), counts / len(diff), size=min(rows, resamples - start)) @ values / len(diff)
            for start in range(0, resamples, rows)
        ]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being read together, in the order given (Holm 1979); reject where adjusted <= level.

    The family-wise error is bounded under any dependence. Raises StatsError for a p-value outside 0..1.
    """
    raw = np.asarray(p_values, dtype=np.float64)
    if raw.ndim != 1 or not ((raw >= 0) & (raw <= 1)).all():
        raise StatsError(f"expected p-values between 0 and 1, found {list(p_values)}")
    order = np.argsort(raw, kind="stable")
    stepped = np.maximum.accumulate(raw[order] * np.arange(len(raw), 0, -1))
    adjusted = np.empty_like(raw)
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in adjusted]
