"""Whether features help, by three arms: none, real, and shuffled among things of like popularity.

Real above none alone may be the work of more parameters or of the popularity that goes with features; real above
shuffled alone may still be worse than no features. So features *help* where real is above both.

Both tests know users and seeds (`significance`), and a third source of chance: real features are one assignment of
vectors to items, the same under every seed, and may suit the few held-out items of a slice by luck. Shuffled ones are
another assignment under each seed, so that luck is seen in how much more they vary from seed to seed than real ones do.
Simulated with features of noise, luck of two and five times the spread of seeds, 5 seeds and 200 users, tests at 0.01
without this part find *helps* in 2.4 and 5.3 %, with it in 0.5 and 0.4 %.

A claim is as sure as the less sure of its two tests (an intersection-union test, Berger 1982), and Holm's method
adjusts the claims that are read together.

Shape letters: ``S`` seeds, ``U`` users.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from trainer.evaluation.significance import Comparison, FloatArray, compare, holm

LEVEL = 0.01
Verdict = Literal["helps", "hurts", "not shown"]


@dataclass(frozen=True)
class Claim:
    """That features help, and that they hurt. p-values are adjusted once `adjusted` has seen all claims."""

    over_none: Comparison
    over_shuffled: Comparison
    p_helps: float  # of both gains being above zero; 1 where one is not
    p_hurts: float  # of real being below none; 1 where it isn't

    def verdict(self, level: float = LEVEL) -> Verdict:
        return "helps" if self.p_helps <= level else "hurts" if self.p_hurts <= level else "not shown"


def three_arms(none_SU: FloatArray, real_SU: FloatArray, shuffled_SU: FloatArray, *, level: float = LEVEL) -> Claim:
    """The claim of a metric's values [S, U] in each arm, seed by seed of the same users. Intervals are of confidence
    1 - level. Raises StatsError for other shapes, or values that are not numbers."""
    luck = _luck(real_SU, shuffled_SU)
    over_none, over_shuffled = (
        compare(real_SU, other_SU, confidence=1 - level, shared_spread=luck) for other_SU in (none_SU, shuffled_SU)
    )
    above = over_none.gain > 0 and over_shuffled.gain > 0
    return Claim(
        over_none,
        over_shuffled,
        max(over_none.p_value, over_shuffled.p_value) if above else 1.0,
        over_none.p_value if over_none.gain < 0 else 1.0,
    )


def adjusted(claims: Sequence[Claim]) -> list[Claim]:
    """Holm's method over all claims that features help, and over all that they hurt."""
    helps, hurts = holm([claim.p_helps for claim in claims]), holm([claim.p_hurts for claim in claims])
    return [
        replace(claim, p_helps=help_, p_hurts=hurt) for claim, help_, hurt in zip(claims, helps, hurts, strict=True)
    ]


def _luck(real_SU: FloatArray, shuffled_SU: FloatArray) -> float:
    """Standard deviation of what an assignment of features to items gives by chance."""
    if len(real_SU) < 2:
        return 0.0
    excess = shuffled_SU.mean(1).var(ddof=1) - real_SU.mean(1).var(ddof=1)
    return math.sqrt(max(float(excess), 0.0))
