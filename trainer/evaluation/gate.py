"""The gate: does the evidence allow a model version to become champion? A pure function of numbers and thresholds.

A version passes if its recipe is better than from-scratch and the best simple baseline, and if the version itself is
not worse than the champion and not inferior, by a set margin, on the slices of cold users, of cold items (never seen)
and of rare items (seldom seen). Slices with too few users are not compared. Every check is made and shown, whether or
not another refuses.

A *recipe* is a configuration trained with several seeds. Its mean over seeds is compared with from-scratch trained with
the same seeds, by `evaluation.significance.compare`: the same contrast, to the last bit, that `evaluate` shows for its
`candidate`. The mean of the registered version, which is one seed, is shown beside it. A refusal is `worse` (the
interval excludes the required gain) or `not shown`; then it says how many seeds or users would show the gain.

Shape letters: ``S`` seeds, ``U`` users of the evaluation release, ``C`` users of a slice.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np

from etl.settings import GraftrecError
from trainer.config import BaselinesConfig, GateConfig, TaskSettings
from trainer.evaluation.evaluators import evaluator_of
from trainer.evaluation.ranking_metrics import FloatArray
from trainer.evaluation.significance import (
    Comparison,
    compare,
    gain_text,
    mean_over_seeds,
    p_text,
    seeds_to_show,
    users_to_show,
)

Verdict = Literal["passed", "refused", "not judged"]
Refusal = Literal["worse", "not shown", "unusable"]
BEST = "best"  # in `must_beat`: the simple baseline with the highest mean
FROM_SCRATCH, VERSION, BEST_BASELINE = "from-scratch", "this version", "best baseline"  # checks
ROUNDING = 1e-9  # of means: what differs by less is equal


class GateError(GraftrecError):
    """Thresholds that no evidence can meet, known before a model is trained or scored."""


@dataclass(frozen=True)
class Slice:
    """A metric of some users (or of some held-out items of theirs): the version beside what it must not fall behind."""

    name: str
    version_C: FloatArray
    reference_C: FloatArray
    reference: str  # champion | from-scratch


@dataclass(frozen=True)
class Evidence:
    """One metric under one protocol, of the same users on one pinned release. Rows [S] are in the order of seeds."""

    version_U: FloatArray  # the version that asks to be champion
    version_seed: int | None = None
    recipe_SU: FloatArray | None = None  # the version's recipe with every seed, this one's too; None: this one only
    recipe_seeds: Sequence[int | None] = ()
    scratch_SU: FloatArray | None = None  # from-scratch; None: there is none
    scratch_seeds: Sequence[int | None] = ()
    champion_U: FloatArray | None = None
    baselines: Mapping[str, FloatArray] = field(default_factory=dict)  # name -> [U]
    slices: Sequence[Slice] = ()
    faults: Sequence[str] = ()  # why numbers can't be trusted, e.g. weights that are not numbers
    transferred: bool = True  # False: trained from scratch itself, so from-scratch models beside it are optional

    @property
    def recipe(self) -> FloatArray:
        """[S, U]"""
        return self.version_U[None] if self.recipe_SU is None else self.recipe_SU


@dataclass(frozen=True)
class Check:
    """One question, its answer, and the numbers it rests on."""

    name: str
    verdict: Verdict
    text: str
    numbers: dict[str, float] = field(default_factory=dict)
    refusal: Refusal | None = None  # of a verdict `refused`
    remedy: str = ""  # of `not shown`: what would show it
    seeds: tuple[int, ...] = ()  # of `not shown`: the seeds that would


@dataclass(frozen=True)
class Decision:
    """All checks. The gate passes when none refuses."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return not self.refused

    @property
    def refused(self) -> list[Check]:
        return [check for check in self.checks if check.verdict == "refused"]

    @property
    def reasons(self) -> list[str]:
        """Why it is refused; empty where it passes."""
        return [check.text for check in self.refused]

    def as_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, "reasons": self.reasons, "checks": [asdict(check) for check in self.checks]}

    def text(self) -> str:
        marks = {"passed": "✓", "refused": "✗", "not judged": "·"}
        return "\n".join(f"  {marks[check.verdict]} {check.name}: {check.text}" for check in self.checks)


# --- before anything is trained or scored ----------------------------------------------------------------------------


def check_gate(
    gate: GateConfig,
    *,
    task: TaskSettings,
    seeds: Sequence[int],
    transferred: bool,
    has_scratch: bool,
    baselines: BaselinesConfig,
) -> None:
    """Refuse settings with which the gate could never pass. `task`: of the candidate. `seeds`: those that candidate and
    from-scratch will share. `transferred`: whether the candidate starts from a parent; then from-scratch is required.

    Raises GateError: a metric or protocol that models of this task don't have, a baseline that isn't there, no
    from-scratch, or too few seeds of it.
    """
    evaluator = evaluator_of(task)
    metrics = evaluator.metrics_of(task).per_user
    if gate.metric not in metrics:
        raise GateError(
            f"gate.metric: expected a metric that task {task.kind} has for each user ({', '.join(metrics)}), found "
            f"{gate.metric!r}; set gate.metric to one of them"
        )
    if evaluator.protocols and gate.protocol not in evaluator.protocols:
        known = ", ".join(evaluator.protocols)
        raise GateError(
            f"gate.protocol: expected {known} for task {task.kind}, found {gate.protocol!r}; set it to {known}"
        )
    if gate.must_beat and not baselines.enabled:
        raise GateError(
            f"gate.must_beat: expected simple baselines to be scored for {', '.join(gate.must_beat)}, found "
            "baselines.enabled false; set it to true, or must_beat to []"
        )
    check_must_beat(gate, evaluator.metrics_of(task).baselines)
    if transferred and not has_scratch:
        raise GateError(
            "expected from-scratch models beside a candidate that was transferred, found none; train them with "
            "transfer none (pipeline: transfers), and name them in from_scratch"
        )
    if has_scratch and len(set(seeds)) < gate.min_seeds:
        found = f"{len(set(seeds))} ({', '.join(map(str, seeds))})" if seeds else "0"
        raise GateError(
            f"expected from-scratch models of at least {gate.min_seeds} seeds (gate.min_seeds), found {found}; train "
            f"more with transfer none and with the candidate's (pipeline: --seeds "
            f"{seed_list(more_seeds(seeds, gate.min_seeds))})"
        )


def check_must_beat(gate: GateConfig, names: Sequence[str]) -> None:
    """Raises GateError for a simple baseline that is not among `names`."""
    if unknown := [name for name in gate.must_beat if name not in (BEST, *names)]:
        raise GateError(
            f"gate.must_beat: expected simple baselines among {BEST}, {'; '.join(names)}, found {', '.join(unknown)}; "
            "mend the name"
        )


def more_seeds(seeds: Sequence[int | None], number: int) -> tuple[int, ...]:
    """`number` seeds: those given, and the smallest others."""
    found = [seed for seed in dict.fromkeys(seeds) if seed is not None]
    others = (seed for seed in range(number + len(found)) if seed not in found)
    return tuple(sorted([*found, *(next(others) for _ in range(number - len(found)))]))


def seed_list(seeds: Sequence[int]) -> str:
    """Seeds as a command-line value."""
    return f'"[{", ".join(map(str, seeds))}]"'


SeedT = TypeVar("SeedT", int, int | None)


def contrast_seeds(recipe: Sequence[SeedT], scratch: Sequence[SeedT]) -> list[SeedT]:
    """The seeds to compare: those that both have; if these are fewer than two, all of from-scratch's."""
    both = [seed for seed in scratch if seed in recipe]
    return both if len(both) > 1 else list(scratch)


# --- the decision ----------------------------------------------------------------------------------------------------


def decide(evidence: Evidence, config: GateConfig) -> Decision:
    """Judge the evidence. Evidence that is no numbers, or too few users, are refused without further questions."""
    faults = [*evidence.faults, *_not_finite(evidence)]
    if faults:
        return Decision((Check("sound", "refused", "; ".join(faults), refusal="unusable"),))
    num_users = len(evidence.version_U)
    if num_users < config.min_users:
        text = f"expected at least {config.min_users:,} evaluated users (gate.min_users), found {num_users:,}"
        return Decision((Check("users", "refused", text, {"users": num_users}, "unusable"),))
    checks = _against_scratch(evidence, config)
    if evidence.champion_U is not None:
        checks.append(_against_champion(evidence.version_U, evidence.champion_U, config))
    checks += [_against_baseline(evidence, name, config) for name in config.must_beat]
    checks += [_in_slice(part, config) for part in evidence.slices]
    if any(check.verdict == "refused" and not check.seeds for check in checks):
        checks = [_without_seeds(check) for check in checks]
    return Decision(tuple(checks))


def _without_seeds(check: Check) -> Check:
    """The check without advice to add seeds, where another would refuse all the same."""
    if not check.seeds:
        return check
    return replace(check, text=check.text.removesuffix(f"; {check.remedy}"), remedy="", seeds=())


def _not_finite(evidence: Evidence) -> list[str]:
    named = {
        "the version": evidence.version_U,
        "from-scratch": evidence.scratch_SU,
        "the version's recipe": evidence.recipe_SU,
        "the champion": evidence.champion_U,
    } | {f"the baseline {name}": values for name, values in evidence.baselines.items()}
    broken = {
        name: int((~np.isfinite(values)).sum())
        for name, values in named.items()
        if values is not None and not np.isfinite(values).all()
    }
    for part in evidence.slices:  # who has nothing to be scored there is NaN on both sides
        both = np.isnan(part.version_C) & np.isnan(part.reference_C)
        if count := int((~(both | np.isfinite(part.version_C - part.reference_C))).sum()):
            broken[f"the version or {part.reference} in the slice {part.name}"] = count
    return [f"metrics of {name} are not numbers for {count:,} users" for name, count in broken.items()]


def _against_scratch(evidence: Evidence, config: GateConfig) -> list[Check]:
    """Is the recipe significantly better, and by the margin? And is the version itself above from-scratch's mean?

    Recipes are compared over the seeds that both have. With fewer than two of those, this one version is compared with
    all seeds of from-scratch, and the luck of its seed is part of the result.
    """
    scratch_SU = evidence.scratch_SU
    if scratch_SU is None and not evidence.transferred:
        return [Check(FROM_SCRATCH, "not judged", "not asked: nothing was transferred")]
    seeds = contrast_seeds(evidence.recipe_seeds, evidence.scratch_seeds)
    if scratch_SU is None or len(seeds) < config.min_seeds:
        text = (
            f"expected from-scratch models of at least {config.min_seeds} seeds, found "
            f"{0 if scratch_SU is None else len(seeds)}; train them with transfer none, and name them in from_scratch"
        )
        return [Check(FROM_SCRATCH, "refused", text, refusal="unusable")]
    both = len(seeds) > 1 and set(seeds) <= set(evidence.recipe_seeds)
    theirs = scratch_SU[[list(evidence.scratch_seeds).index(seed) for seed in seeds]]
    if both:
        recipe = evidence.recipe[[list(evidence.recipe_seeds).index(seed) for seed in seeds]]
        gain = compare(recipe, theirs)
    else:
        recipe = evidence.version_U[None]
        gain = compare(evidence.version_U, theirs[0] if len(theirs) == 1 else theirs)
    bar = mean_over_seeds(theirs)
    opponent = _Opponent(FROM_SCRATCH, "from-scratch", "scratch", bar, config.min_gain)
    checks = [_is_better(gain, recipe, opponent, evidence, config)]
    own = float(evidence.version_U.mean())
    if both and own <= bar + ROUNDING:
        text = (
            f"{_this(evidence)}: {config.metric} {own:.4f} is not above from-scratch's mean {bar:.4f}; "
            "register another seed"
        )
        checks.append(Check(VERSION, "refused", text, {"version": own, "scratch": bar}, "worse"))
    return checks


def _against_baseline(evidence: Evidence, name: str, config: GateConfig) -> Check:
    """Is the recipe, over all its seeds, better than a baseline? BEST is the one with the highest mean on these users;
    that choice can only raise the bar."""
    check, label = (BEST_BASELINE, None) if name == BEST else (name, name)
    if label is None and evidence.baselines:
        label = max(evidence.baselines, key=lambda one: float(evidence.baselines[one].mean()))
    if label is None or label not in evidence.baselines:
        known = ", ".join(evidence.baselines) or "none"
        text = f"no simple baseline {name!r} was scored (there is: {known}); mend gate.must_beat"
        return Check(check, "refused", text, refusal="unusable")
    base_U, recipe = evidence.baselines[label], evidence.recipe
    over = f"the {'best ' if name == BEST else ''}simple baseline, {label}"
    gain = compare(recipe[0] if len(recipe) == 1 else recipe, base_U)
    return _is_better(gain, recipe, _Opponent(check, over, "baseline", float(base_U.mean())), evidence, config)


@dataclass(frozen=True)
class _Opponent:
    """What a recipe must be better than."""

    check: str  # its name
    over: str  # the opponent in words
    key: str  # of its mean among the check's numbers
    mean: float
    margin: float = 0.0  # the gain that is required, a share of the mean


def _is_better(
    gain: Comparison, recipe: FloatArray, opponent: _Opponent, evidence: Evidence, config: GateConfig
) -> Check:
    """Passes with a gain over the opponent above its margin and p ≤ level."""
    name, over, bar, margin = opponent.check, opponent.over, opponent.mean, opponent.margin
    own, version = mean_over_seeds(recipe), float(evidence.version_U.mean())
    certain = gain.gain > 0 and gain.p_value <= config.level
    enough = gain.gain > margin * abs(bar) + ROUNDING
    relative = _relative(gain, bar)
    numbers = _numbers(gain) | {
        "version": version,
        "recipe": own,
        opponent.key: bar,
        "relative_gain": relative,
        "detectable": gain.least_shown(config.level) / abs(bar) if bar else float("nan"),
    }
    of = f" (mean of {len(recipe)} seeds; {_this(evidence)}: {version:.4f})" if len(recipe) > 1 else ""
    varied = f"users and {gain.num_seeds} seeds" if gain.seeds_varied else "users"
    needs = f"more than {100 * margin:+.1f} %" if margin else "a gain"
    text = (
        f"{config.metric} {own:.4f}{of} against {bar:.4f} ({gain_text(gain.gain, relative)}, {_p(gain)} over {varied}; "
        f"needs {needs} with p ≤ {config.level:g})"
    )
    numbers = {key: value for key, value in numbers.items() if math.isfinite(value)}
    if certain and enough:
        return Check(name, "passed", f"better than {over}: {text}", numbers)
    if gain.gain < 0 and gain.p_value <= config.level:
        return Check(name, "refused", f"worse than {over}: {text}", numbers, "worse")
    limit = margin * abs(bar)
    if margin and gain.high <= limit:
        least = f"no gain of {100 * margin:g} % over {over}: {text}, and its interval ends at {gain.high:+.4f}"
        return Check(name, "refused", least, numbers, "worse")
    if certain:
        least = f"not shown to be {100 * margin:g} % better than {over}: {text}"
        return Check(name, "refused", least, numbers, "not shown")
    remedy, seeds = _remedy(gain, evidence, config)
    return Check(
        name, "refused", f"not shown to be better than {over}: {text}; {remedy}", numbers, "not shown", remedy, seeds
    )


def _remedy(gain: Comparison, evidence: Evidence, config: GateConfig) -> tuple[str, tuple[int, ...]]:
    """How many seeds or users would show the observed gain, in words; and those seeds, if seeds would."""
    if gain.gain <= 0:
        return "there is no gain to show: more seeds or users would only make that surer", ()
    if (number := seeds_to_show(gain, level=config.level)) is not None:
        seeds = more_seeds(evidence.recipe_seeds, number)
        return f"{number} seeds would show it if the gain stays as observed", seeds
    for num_seeds in dict.fromkeys((gain.num_seeds, max(gain.num_seeds, 10), max(gain.num_seeds, 30))):
        if (users := users_to_show(gain, num_seeds=num_seeds, level=config.level)) is not None:
            of = f"{num_seeds} seeds" if num_seeds > 1 else "one seed"
            return (
                f"no number of seeds would show it, users differ too much: about {_rounded(users):,} users with {of} "
                f"would, where {gain.num_users:,} were evaluated"
            ), ()
    return "neither 30 seeds nor more users would show so small a gain", ()


def _rounded(users: int) -> int:
    """To two digits, upwards."""
    unit = int(10 ** max(len(str(users)) - 2, 0))
    return -(-users // unit) * unit


def _against_champion(version_U: FloatArray, champion_U: FloatArray, config: GateConfig) -> Check:
    """By the mean, less the margin: a margin of 0 lets no chain of slightly worse versions through."""
    gain = compare(version_U, champion_U)
    own, bar = float(version_U.mean()), float(champion_U.mean())
    relative = _relative(gain, bar)
    text = (
        f"{config.metric} {own:.4f} against {bar:.4f} ({gain_text(gain.gain, relative)}, {_p(gain)} over users; "
        f"may be {100 * config.champion_margin:.1f} % below)"
    )
    numbers = _numbers(gain) | {"version": own, "champion": bar, "relative_gain": relative}
    numbers = {key: value for key, value in numbers.items() if math.isfinite(value)}
    if own - bar >= -config.champion_margin * abs(bar) - ROUNDING:
        return Check("champion", "passed", f"not worse: {text}", numbers)
    if gain.p_value <= config.level:
        return Check("champion", "refused", f"worse than the champion: {text}", numbers, "worse")
    return Check("champion", "refused", f"not shown to be as good as the champion: {text}", numbers, "not shown")


def _in_slice(part: Slice, config: GateConfig) -> Check:
    """Non-inferior where the whole interval is above the margin; inferior where the mean is below it and the interval
    below zero; between the two the slice is too small to say, which refuses nothing."""
    known = np.isfinite(part.version_C) & np.isfinite(part.reference_C)
    version_C, reference_C = part.version_C[known], part.reference_C[known]
    if len(version_C) < config.min_slice_users:
        text = (
            f"only {len(version_C):,} users are in this slice; it is compared from {config.min_slice_users:,} on "
            "(gate.min_slice_users)"
        )
        return Check(part.name, "not judged", text, {"users": len(version_C)})
    gain = compare(version_C, reference_C)
    own, bar = float(version_C.mean()), float(reference_C.mean())
    margin = config.slice_margin * abs(bar)
    relative = _relative(gain, bar)
    text = (
        f"{own:.4f} against {bar:.4f} of {part.reference} ({gain_text(gain.gain, relative)}, interval "
        f"[{gain.low:+.4f}, {gain.high:+.4f}], {len(version_C):,} users; may be {100 * config.slice_margin:g} % below)"
    )
    numbers = _numbers(gain) | {"version": own, "reference": bar}
    if gain.low >= -margin - ROUNDING:
        return Check(part.name, "passed", f"non-inferior: {text}", numbers)
    if gain.gain < -margin and gain.high < 0:
        return Check(part.name, "refused", f"worse on {part.name}: {text}", numbers, "worse")
    return Check(part.name, "not judged", f"no clear difference with so few users: {text}", numbers)


def _this(evidence: Evidence) -> str:
    return VERSION if evidence.version_seed is None else f"{VERSION}, seed {evidence.version_seed}"


def _p(gain: Comparison) -> str:
    text = p_text(gain.p_value)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def _relative(gain: Comparison, bar: float) -> float:
    """Above zero for a gain, also where means are negative (log loss has its sign turned)."""
    return gain.relative_gain if bar >= 0 else -gain.relative_gain


def _numbers(gain: Comparison) -> dict[str, float]:
    return {
        "gain": gain.gain,
        "p": gain.p_value,
        "low": gain.low,
        "high": gain.high,
        "seeds": gain.num_seeds,
        "users": gain.num_users,
    }


# --- after it --------------------------------------------------------------------------------------------------------


def next_steps(
    decision: Decision, *, recommend: str | None, champion: str | None = None, results: str | None = None
) -> list[str]:
    """What a user can do after a refusal, a line each; empty after a pass.

    `recommend`: the command that recommends by the refused candidate; None: it ranks nothing. `champion`: the version
    whose rows that command replaces. `results`: the folder of the comparison's table and picture, of a pipeline.
    """
    if decision.passed:
        return []
    steps = []
    if recommend is not None and not any(check.name == "sound" for check in decision.refused):
        instead = f"instead of the champion {champion}, whose rows it replaces" if champion else "all the same"
        steps.append(f"recommend by this model {instead}: {recommend}")
    if results is not None:
        steps.append(f"look at the comparison: {results}")
    seeds = max((check.seeds for check in decision.refused), key=len, default=())
    if seeds:
        steps.append(
            f"add seeds: run the same command with --seeds {seed_list(seeds)}"
            if results is not None
            else f"train the candidate's recipe and from-scratch with seeds {seed_list(seeds)}, and name them in "
            "replicas and from_scratch"
        )
    beaten_by = [c for c in decision.refused if c.refusal == "worse" and c.name not in (FROM_SCRATCH, VERSION)]
    if any("baseline" in check.numbers for check in beaten_by):
        steps.append("a simple baseline is better here than this model (see the table)")
    return steps
