"""The gate: does the evidence allow a model version to become champion? A pure function of numbers and thresholds.

DESIGN section 7: better overall than from-scratch, not worse than the champion, non-inferior by a set margin on the
slices of cold users and cold items that have enough users to say. Every check is made and told, whether or not another
refuses.

Shape letters: ``S`` seeds, ``U`` users of the evaluation release, ``C`` users of a slice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from trainer.config import GateConfig
from trainer.metrics import FloatArray
from trainer.stats import Comparison, compare

Verdict = Literal["passed", "refused", "not judged"]
ROUNDING = 1e-9  # of means: what differs by less is equal


@dataclass(frozen=True)
class Slice:
    """A metric of some users (or of some held-out items of theirs): the version beside what it must not fall behind."""

    name: str
    version_C: FloatArray
    reference_C: FloatArray
    reference: str  # champion | from-scratch


@dataclass(frozen=True)
class Evidence:
    """One metric under one protocol, of the same users on one pinned release."""

    version_U: FloatArray  # the version that asks to be champion
    scratch_SU: FloatArray | None = None  # from-scratch; None: there is none
    recipe_SU: FloatArray | None = (
        None  # the version's recipe with the seeds of `scratch_SU`, paired; None: one seed only
    )
    champion_U: FloatArray | None = None
    baselines: Mapping[str, FloatArray] = field(default_factory=dict)  # name -> [U]
    slices: Sequence[Slice] = ()
    faults: Sequence[str] = ()  # why numbers can't be trusted, e.g. weights that are not numbers


@dataclass(frozen=True)
class Check:
    """One question, its answer, and the numbers it rests on."""

    name: str
    verdict: Verdict
    text: str
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """All checks. The gate passes when none refuses."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.verdict != "refused" for check in self.checks)

    @property
    def reasons(self) -> list[str]:
        """Why it is refused; empty where it passes."""
        return [check.text for check in self.checks if check.verdict == "refused"]

    def as_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, "reasons": self.reasons, "checks": [asdict(check) for check in self.checks]}

    def text(self) -> str:
        marks = {"passed": "✓", "refused": "✗", "not judged": "·"}
        return "\n".join(f"  {marks[check.verdict]} {check.name}: {check.text}" for check in self.checks)


def decide(evidence: Evidence, config: GateConfig) -> Decision:
    """Judge the evidence. Evidence that is no number, or of too few users, is refused without further questions."""
    faults = [*evidence.faults, *_not_finite(evidence)]
    if faults:
        return Decision((Check("sound", "refused", "; ".join(faults)),))
    num_users = len(evidence.version_U)
    if num_users < config.min_users:
        text = f"{num_users:,} evaluated users say nothing; needs {config.min_users:,} (min_users)"
        return Decision((Check("users", "refused", text, {"users": num_users}),))
    checks = [_against_scratch(evidence, config)]
    if evidence.champion_U is not None:
        checks.append(_against_champion(evidence.version_U, evidence.champion_U, config))
    checks += [_against_baseline(evidence, name, config) for name in config.above]
    checks += [_in_slice(part, config) for part in evidence.slices]
    return Decision(tuple(checks))


def _not_finite(evidence: Evidence) -> list[str]:
    named = {
        "the version": evidence.version_U,
        "from-scratch": evidence.scratch_SU,
        "the version's replicas": evidence.recipe_SU,
        "the champion": evidence.champion_U,
    }
    return [
        f"metrics of {name} are not numbers for {int((~np.isfinite(values)).sum()):,} users"
        for name, values in named.items()
        if values is not None and not np.isfinite(values).all()
    ]


def _against_scratch(evidence: Evidence, config: GateConfig) -> Check:
    """Is it better, by more than the luck of users and seeds, and by the margin?

    Where the recipe was trained with all the seeds of from-scratch, recipe is compared with recipe; else this one
    version with all seeds of from-scratch. The version itself must show the margin either way.
    """
    scratch_SU = evidence.scratch_SU
    if scratch_SU is None or len(scratch_SU) < config.min_seeds:
        found = 0 if scratch_SU is None else len(scratch_SU)
        text = (
            f"expected from-scratch models of at least {config.min_seeds} seeds, found {found}; "
            "train them with transfer none, and name them in from_scratch"
        )
        return Check("from-scratch", "refused", text)
    ours = evidence.version_U if evidence.recipe_SU is None else evidence.recipe_SU
    theirs = scratch_SU[0] if len(scratch_SU) == 1 else scratch_SU
    gain = compare(ours, theirs)
    own, bar = float(evidence.version_U.mean()), float(scratch_SU.mean())
    certain = gain.gain > 0 and gain.p_value <= config.level
    enough = own - bar > config.min_gain * abs(bar) + ROUNDING
    varied = f"users and {len(scratch_SU)} seeds" if gain.seeds_varied else "users"
    text = (
        f"{config.metric} {own:.4f} against {bar:.4f} ({_share(own - bar, bar)}, p = {gain.p_value:.2g} over {varied}; "
        f"needs more than {100 * config.min_gain:+.1f} % with p ≤ {config.level:g})"
    )
    numbers = _numbers(gain) | {"version": own, "scratch": bar}
    if certain and enough:
        return Check("from-scratch", "passed", f"better: {text}", numbers)
    return Check("from-scratch", "refused", f"no better than from-scratch: {text}", numbers)


def _against_champion(version_U: FloatArray, champion_U: FloatArray, config: GateConfig) -> Check:
    """By the mean, less the margin: a margin of 0 lets no chain of slightly worse versions through."""
    gain = compare(version_U, champion_U)
    own, bar = float(version_U.mean()), float(champion_U.mean())
    text = (
        f"{config.metric} {own:.4f} against {bar:.4f} ({_share(own - bar, bar)}, p = {gain.p_value:.2g} over users; "
        f"may be {100 * config.champion_margin:.1f} % below)"
    )
    numbers = _numbers(gain) | {"version": own, "champion": bar}
    if own - bar < -config.champion_margin * abs(bar) - ROUNDING:
        return Check("champion", "refused", f"worse than the champion: {text}", numbers)
    return Check("champion", "passed", f"not worse: {text}", numbers)


def _against_baseline(evidence: Evidence, name: str, config: GateConfig) -> Check:
    if name not in evidence.baselines:
        known = ", ".join(evidence.baselines) or "none"
        return Check(name, "refused", f"no simple baseline {name!r} was scored (there is: {known}); mend gate.above")
    own, bar = float(evidence.version_U.mean()), float(evidence.baselines[name].mean())
    text = f"{config.metric} {own:.4f} against {bar:.4f} ({_share(own - bar, bar)})"
    numbers = {"version": own, "baseline": bar}
    if own <= bar + ROUNDING:
        return Check(name, "refused", f"not above the simple baseline {name}: {text}", numbers)
    return Check(name, "passed", f"above: {text}", numbers)


def _in_slice(part: Slice, config: GateConfig) -> Check:
    """Non-inferior where the whole interval is above the margin; inferior where the mean is below it and the interval
    below zero; between the two the slice is too small to say, which refuses nothing."""
    known = np.isfinite(part.version_C) & np.isfinite(part.reference_C)
    version_C, reference_C = part.version_C[known], part.reference_C[known]
    if len(version_C) < config.min_slice_users:
        text = f"{len(version_C):,} users are too few to say (needs {config.min_slice_users:,})"
        return Check(part.name, "not judged", text, {"users": len(version_C)})
    gain = compare(version_C, reference_C)
    own, bar = float(version_C.mean()), float(reference_C.mean())
    margin = config.slice_margin * abs(bar)
    text = (
        f"{own:.4f} against {bar:.4f} of {part.reference} ({_share(own - bar, bar)}, interval "
        f"[{gain.low:+.4f}, {gain.high:+.4f}], {len(version_C):,} users; may be {100 * config.slice_margin:g} % below)"
    )
    numbers = _numbers(gain) | {"version": own, "reference": bar, "users": len(version_C)}
    if gain.low >= -margin - ROUNDING:
        return Check(part.name, "passed", f"non-inferior: {text}", numbers)
    if gain.gain < -margin and gain.high < 0:
        return Check(part.name, "refused", f"worse on {part.name}: {text}", numbers)
    return Check(part.name, "not judged", f"too few users to say: {text}", numbers)


def _share(gain: float, bar: float) -> str:
    return f"{100 * gain / abs(bar):+.1f} %" if bar else f"{gain:+.4f}"


def _numbers(gain: Comparison) -> dict[str, float]:
    return {"gain": gain.gain, "p": gain.p_value, "low": gain.low, "high": gain.high}
