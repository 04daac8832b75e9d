"""Whether a model of all domains answers for users who are new in the target, and a line on that.

Without it these users are served the most popular items. So it is compared with popularity, by the gate's test of a
gain over a simple baseline. The best simple baseline is shown as information, since nothing serves it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from trainer.config import GateConfig
from trainer.evaluation.baselines.names import POPULARITY
from trainer.evaluation.ranking_metrics import FloatArray
from trainer.evaluation.significance import compare, gain_text, p_text


@dataclass(frozen=True)
class Verdict:
    """`text`: the model's mean, popularity's, gain and p-value. `beside`: a line on the best simple baseline, "" where
    that is popularity."""

    is_better: bool
    text: str
    beside: str


def over_popularity(model_U: FloatArray, baselines: Mapping[str, FloatArray], gate: GateConfig) -> Verdict:
    """Compare the model with popularity in the gate's metric, on the same users in the same order."""
    popular_U = baselines[POPULARITY]
    gain = compare(model_U, popular_U)
    own, popular = float(model_U.mean()), float(popular_U.mean())
    text = (
        f"{len(model_U):,} users, {gate.metric} {own:.4f} against {popular:.4f} of {POPULARITY}, which is served to "
        f"them otherwise ({gain_text(gain.gain, gain.relative_gain)}, p {p_text(gain.p_value)})"
    )
    return Verdict(gain.gain > 0 and gain.p_value <= gate.level, text, _beside(own, popular, baselines))


def _beside(own: float, popular: float, baselines: Mapping[str, FloatArray]) -> str:
    means: dict[str, float] = {label: float(values_U.mean()) for label, values_U in baselines.items()}
    best = max(means, key=lambda label: means[label])
    if means[best] <= popular:
        return ""
    if means[best] > own:
        return f"{best} lies above it: {means[best]:.4f}"
    return f"{best}, the best simple baseline, lies below it: {means[best]:.4f}"
