"""Whether one model is better than another, told from per-user metrics over one or more seeds.

Shape letters: ``U`` users, ``S`` seeds. A comparison is of paired differences: the same users, the same candidates.

Users and seeds are *crossed* random factors: every seed is scored on the same users, so a difference is
``d_su = gain + a_s + b_u + e_su`` and the mean of all S x U of them has the variance
``var(a)/S + var(b)/U + var(e)/(S U)``. A t-test over users of one seed, or of the mean over seeds, knows nothing of
``var(a)/S`` and takes the luck of an initialisation for a finding; a t-test over the S seeds' means knows nothing of
``var(b)/U``; to demand that both reject is no cure either, since the variances add (two equal parts: 17 % false
findings at 5 %). `users_and_seeds_test` adds the parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from etl.config import GraftrecError

FloatArray = npt.NDArray[np.float64]


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

    @property
    def seeds_varied(self) -> bool:
        return self.num_seeds > 1


def paired_t(ours_U: FloatArray, theirs_U: FloatArray, *, confidence: float = 0.95) -> Comparison:
    """Student's paired t-test over users (Student 1908). Seeds are not varied: see `users_and_seeds_test`."""
    return compare(np.asarray(ours_U)[None], np.asarray(theirs_U)[None], confidence=confidence)


def compare(ours_SU: FloatArray, theirs_SU: FloatArray, *, confidence: float = 0.95) -> Comparison:
    """`users_and_seeds_test` of ours - theirs. What has no seed (a counting baseline) may be [U] beside [S, U].

    Raises StatsError where the shapes are not of the same users and seeds.
    """
    ours, theirs = np.asarray(ours_SU, dtype=np.float64), np.asarray(theirs_SU, dtype=np.float64)
    if ours.shape[-1] != theirs.shape[-1] or (ours.ndim == theirs.ndim == 2 and len(ours) != len(theirs)):
        raise StatsError(
            f"expected metrics of the same seeds and users, found {list(ours.shape)} and {list(theirs.shape)} "
            "(seeds, users); score both models on one release, with the same seeds"
        )
    return users_and_seeds_test(ours - theirs, baseline=float(theirs.mean()), confidence=confidence)


def users_and_seeds_test(
    diff_SU: FloatArray, *, baseline: float = float("nan"), confidence: float = 0.95
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
    `relative_gain`. Raises StatsError for fewer than two users, or a difference that is not a number.
    """
    diff = np.atleast_2d(np.asarray(diff_SU, dtype=np.float64))
    num_seeds, num_users = _checked(diff)
    gain = float(diff.mean())
    parts = _variance_parts(diff)

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
    )


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


def _variance_parts(diff: FloatArray) -> list[tuple[float, int]]:
    """(variance of the mean, degrees of freedom) of each part."""
    num_seeds, num_users = diff.shape
    of_seed, of_user, mean = diff.mean(1), diff.mean(0), diff.mean()
    if num_seeds == 1:
        return [(float(diff.var(ddof=1)) / num_users, num_users - 1)]
    seeds = num_users * float(of_seed.var(ddof=1))
    users = num_seeds * float(of_user.var(ddof=1))
    rest = float(((diff - of_seed[:, None] - of_user + mean) ** 2).sum()) / ((num_seeds - 1) * (num_users - 1))
    size = num_seeds * num_users
    return [(seeds / size, num_seeds - 1), (max(users - rest, 0.0) / size, num_users - 1)]


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
