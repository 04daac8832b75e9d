"""Recipe: judge a candidate on one pinned release, and move the registry's aliases if the gate agrees.

    python -m trainer promote --config promote/default --candidate FOLDER --from_scratch "[FOLDER, FOLDER]"
    python -m trainer promote --config promote/default --rollback true

Candidate, from-scratch and champion are scored outside the promotion lock, which takes as long as it takes. Under the
lock the champion is looked at again: where another promoter has changed it meanwhile, the new one is scored first.
"""

import contextlib
import datetime
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from etl.config import GraftrecError
from trainer import basket_baselines, tracking
from trainer.artifact import Artifact, ArtifactError, load_artifact
from trainer.comparison import Evaluation, evaluate_contenders
from trainer.config import EvaluationConfig, GateConfig, PromoteConfig, reads_baskets
from trainer.contenders import EvaluationSet, baseline_contenders, model_contender, read_evaluation_set
from trainer.data.dataset import pin
from trainer.distributed import join
from trainer.gate import Decision, Evidence, Slice, decide
from trainer.metrics import FloatArray, means
from trainer.ranking import SINGLE, convention_of
from trainer.registry import CANDIDATE, CHAMPION, PREVIOUS, Promotion, Registry, Version
from trainer.tracking import Run

VERSION, SCRATCH = "candidate", "from-scratch"  # labels of the evaluation
TAG_GATE = "graftrec.gate"  # what the gate said last: passed, or why not
TAG_BEFORE = "graftrec.champion_before"  # number of the champion that a promotion replaced
TAG_AUDIT = "graftrec.audit."  # + time: one entry for each promotion, refusal, replacement and rollback
TAG_CHARACTERS = 4_500
ATTEMPTS = 10  # at a champion that others keep changing


class GateRefused(GraftrecError):
    """The gate refused the candidate; no alias has moved."""

    exit_code = 3


class PromoteError(GraftrecError):
    """A promotion or rollback that can't be made."""


@dataclass(frozen=True)
class Promoted:
    """The champion that now stands."""

    version: Version
    decision: Decision | None  # None: it was the champion already, or a rollback
    replaced: int | None  # number of the champion before


def run(config: PromoteConfig) -> Promoted:
    """Promote or roll back, as configured. Raises GateRefused (exit code 3) or another GraftrecError (2)."""
    registry = Registry(config.registered_model)
    if config.rollback:
        return _roll_back(registry)
    version = _candidate(registry, config)
    if CHAMPION in version.aliases:
        print(f"{version.label} is the champion already")
        return Promoted(version, None, None)
    artifact = load_artifact(registry.folder(version))
    own, baskets = artifact.config.data, reads_baskets(artifact.config.task)
    release = pin(config.lake or artifact.lake, config.release)
    with tracking.start_run(config.tracking, name=config.name, resolved=config, release=release) as tracked:
        asked = read_evaluation_set(
            release, config.split or own.split, config.domain or own.answered, config.part,
            _with_gate_protocol(config, baskets), baskets=baskets, event_types=_event_types(registry, artifact),
        )  # fmt: skip
        evaluation, faults = _score_candidate(registry, version, config, asked)
        decision, promoted = _judge_and_move(registry, version, evaluation, faults, config, tracked)
        told = {"version": version.label, "release": release.number, "lake": release.lake} | decision.as_dict()
        place = Path(config.output) / config.name / "decision.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(told, indent=1), encoding="utf-8")
        tracked.log_artifact(place)
        tracked.set_tags({TAG_GATE: _verdict(decision), "graftrec.version": version.label})
        for check in decision.checks:
            tracked.log_metrics({f"gate/{check.name}/{name}": value for name, value in check.numbers.items()})
    print(f"gate on release {release.number}, {len(asked.users):,} users of domain {asked.domain}, {asked.part}:")
    print(decision.text())
    if promoted is None:
        raise GateRefused(f"{version.label} is not promoted: {'; '.join(decision.reasons)}")
    print(f"{promoted.version.label} is champion" + (f", after {promoted.replaced}" if promoted.replaced else ""))
    return promoted


def _candidate(registry: Registry, config: PromoteConfig) -> Version:
    """The version named, else the one with the alias `candidate`; a model folder is registered."""
    named = config.candidate
    if named is None:
        return registry.version(CANDIDATE)
    if _is_version(named):
        return registry.version(named)
    artifact = load_artifact(named)
    tags = {
        "graftrec.release": str(artifact.release),
        "graftrec.lake": artifact.lake,
        "graftrec.transfer": str(getattr(artifact.config, "transfer", "none")),
        "graftrec.parent": artifact.parent or "",
    } | {f"graftrec.metric.{name.replace('@', '_')}": f"{value:.6g}" for name, value in artifact.metrics.items()}
    version = registry.register(named, tags=tags, alias=None)
    if CHAMPION not in version.aliases:
        registry.set_alias(CANDIDATE, version.number)
    return version


def _is_version(name: str) -> bool:
    """A version's number or alias ("3", "@champion"), rather than a folder."""
    return name.isdigit() or name.startswith("@")


def _event_types(registry: Registry, candidate: Artifact) -> list[str]:
    """The kinds of event that the candidate reads, and those that the champion does."""
    found, champion = list(candidate.event_types), registry.find(CHAMPION)
    if champion is not None:
        with contextlib.suppress(ArtifactError):  # it is no bar then, which is said where it is scored
            found += load_artifact(registry.folder(champion), users=False).event_types
    return list(dict.fromkeys(found))


# --- evidence ---------------------------------------------


def _with_gate_protocol(config: PromoteConfig, baskets: bool) -> EvaluationConfig:
    """Next baskets are ranked in full only."""
    asked = [config.gate.protocol] if baskets else [*config.evaluation.protocols, config.gate.protocol]
    protocols = tuple(dict.fromkeys(asked))
    return config.evaluation.model_copy(update={"protocols": protocols})


def _score_candidate(
    registry: Registry, version: Version, config: PromoteConfig, asked: EvaluationSet
) -> tuple[Evaluation, list[str]]:
    """Candidate, its replicas, from-scratch and baselines; and why their numbers can't be trusted."""
    device = str(join(config.runtime).device)
    named = [(VERSION, name) for name in (str(version.number), *config.replicas)]
    named += [(SCRATCH, name) for name in config.from_scratch]
    contenders, faults = [], []
    for label, name in named:
        path = registry.folder(registry.version(name)) if _is_version(name) else Path(name)
        artifact = load_artifact(path, device=device)
        if broken := _not_finite(artifact.model):
            faults.append(f"weights of {path} are not finite ({', '.join(broken)})")
        contenders.append(model_contender(artifact, asked, label=label, device=device))
    if faults:  # no need to ask them
        return Evaluation(asked, {}, {}, {}), faults
    if config.gate.above:
        simple = basket_baselines.baseline_contenders if asked.baskets else baseline_contenders
        contenders += simple(asked, config.baselines)
    evaluation = evaluate_contenders(
        contenders, asked, batch_size=config.evaluation.batch_size, progress=config.runtime.progress
    )
    faults = [
        f"{count:,} scores of {label}, seed {seed}, are not numbers"
        for (label, seed), count in evaluation.broken.items()
        if count
    ]
    return evaluation, faults


def _not_finite(model: torch.nn.Module) -> list[str]:
    return [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]


def _score_champion(
    registry: Registry, champion: Version, config: PromoteConfig, asked: EvaluationSet
) -> Evaluation | None:
    """The champion on the same release, whatever it was trained on. None: its folder is gone or damaged."""
    device = str(join(config.runtime).device)
    try:
        artifact = load_artifact(registry.folder(champion), device=device)
    except ArtifactError as error:
        print(f"the champion {champion.label} can't be scored, so it is no bar: {error}")
        return None
    contender = model_contender(artifact, asked, label=CHAMPION, device=device, must_know=False)
    return evaluate_contenders([contender], asked, batch_size=config.evaluation.batch_size)


def evidence_of(
    evaluation: Evaluation, champion: Evaluation | None, gate: GateConfig, *, faults: Sequence[str] = ()
) -> Evidence:
    """What the gate is shown: the candidate's first seed is the version itself."""
    if faults:
        return Evidence(np.empty(0), faults=faults)
    seeds, scratch_seeds = evaluation.seeds(VERSION), evaluation.seeds(SCRATCH)
    paired = len(scratch_seeds) > 1 and set(scratch_seeds) <= set(seeds)

    def own(seeds_asked: Sequence[int | None], only: Any = None, metric: str = gate.metric) -> FloatArray:
        return evaluation.matrix(VERSION, gate.protocol, metric, seeds=seeds_asked, only_UR=only)

    return Evidence(
        version_U=own(seeds[:1])[0],
        scratch_SU=evaluation.matrix(SCRATCH, gate.protocol, gate.metric) if scratch_seeds else None,
        recipe_SU=own(scratch_seeds) if paired else None,
        champion_U=champion.matrix(CHAMPION, gate.protocol, gate.metric)[0] if champion else None,
        baselines={
            label: evaluation.matrix(label, gate.protocol, gate.metric)[0]
            for label in evaluation.labels
            if not evaluation.is_model(label)
        },
        slices=_slices(evaluation, champion, gate) if champion or scratch_seeds else (),
    )


def _slices(evaluation: Evaluation, champion: Evaluation | None, gate: GateConfig) -> list[Slice]:
    """Cold users: all that they hold out. Cold items: each ranked alone, in the convention `single`."""
    asked = evaluation.asked
    beside, label, name = (champion, CHAMPION, CHAMPION) if champion else (evaluation, SCRATCH, SCRATCH)
    cold_U = asked.held_out.training_items <= gate.cold_user_items
    targets_UR = asked.held_out.targets
    cold_UR = (targets_UR >= 0) & (asked.training_interactions[targets_UR] <= gate.cold_item_interactions)
    alone = SINGLE + convention_of(gate.metric)[1].replace("HR@", "Recall@").replace("F1@", "Recall@")
    first = evaluation.seeds(VERSION)[:1]
    with_cold_U = cold_UR.any(1)

    def pair(metric: str, users: Any, only: Any = None) -> tuple[FloatArray, FloatArray]:
        version = evaluation.matrix(VERSION, gate.protocol, metric, seeds=first, only_UR=only)[0]
        return version[users], beside.matrix(label, gate.protocol, metric, only_UR=only).mean(0)[users]

    return [
        Slice("cold users", *pair(gate.metric, cold_U), name),
        Slice("cold items", *pair(alone, with_cold_U, cold_UR), name),
    ]


# --- aliases ---------------------------------------------


def _judge_and_move(
    registry: Registry, version: Version, evaluation: Evaluation, faults: Sequence[str], config: PromoteConfig, run: Run
) -> tuple[Decision, Promoted | None]:
    """Decide against the champion of the moment of moving. None: refused."""
    for _ in range(ATTEMPTS):
        champion = registry.find(CHAMPION)
        scored = _score_champion(registry, champion, config, evaluation.asked) if champion and not faults else None
        decision = decide(evidence_of(evaluation, scored, config.gate, faults=faults), config.gate)
        with registry.promoting() as promotion:
            if _number(registry.find(CHAMPION)) != _number(champion):
                continue
            registry.set_tags(version.number, _test_metrics(evaluation))
            entry = _entry(decision, evaluation, champion, run)
            if not decision.passed:
                registry.set_tags(
                    version.number, {TAG_GATE: _verdict(decision)} | _audit({"action": "refused"} | entry)
                )
                return decision, None
            return decision, _crown(registry, promotion, version, champion, decision, entry)
    raise PromoteError(
        f"other promoters changed the champion {ATTEMPTS} times while {version.label} was judged; try again"
    )


def _crown(
    registry: Registry, promotion: Promotion, version: Version, champion: Version | None, decision: Decision,
    entry: dict[str, Any],
) -> Promoted:  # fmt: skip
    """Tags first: a champion without its papers is worse than papers of a promotion that did not happen."""
    before = str(champion.number) if champion else ""
    tags = {TAG_GATE: _verdict(decision), TAG_BEFORE: before} | _audit({"action": "promoted"} | entry)
    registry.set_tags(version.number, tags)
    replaced = promotion.crown(version.number)
    if (candidate := registry.find(CANDIDATE)) is not None and candidate.number == version.number:
        promotion.move(CANDIDATE, None)
    if champion is not None:
        registry.set_tags(champion.number, _audit({"action": "replaced", "by_version": version.label}))
    return Promoted(registry.version(str(version.number)), decision, replaced)


def _roll_back(registry: Registry) -> Promoted:
    """The previous champion is champion again, and the one before it `previous`."""
    with registry.promoting() as promotion:
        champion, previous = registry.find(CHAMPION), registry.find(PREVIOUS)
        if champion is None or previous is None or previous.number == champion.number:
            raise PromoteError(
                f"expected a champion and a previous version of {registry.name} to roll back to, found "
                f"champion {_number(champion)} and previous {_number(previous)}; promote a version instead"
            )
        registry.set_tags(previous.number, _audit({"action": "restored", "instead_of": champion.label}))
        promotion.move(CHAMPION, previous.number)
        before = previous.tags.get(TAG_BEFORE, "")
        known = {version.number for version in registry.versions()}
        promotion.move(PREVIOUS, int(before) if before.isdigit() and int(before) in known else None)
        registry.set_tags(champion.number, _audit({"action": "rolled back", "to_version": previous.label}))
    print(f"{previous.label} is champion again, instead of {champion.label}")
    return Promoted(registry.version(str(previous.number)), None, champion.number)


def _number(version: Version | None) -> int | None:
    return None if version is None else version.number


def _verdict(decision: Decision) -> str:
    return ("passed" if decision.passed else f"refused: {'; '.join(decision.reasons)}")[:TAG_CHARACTERS]


def _test_metrics(evaluation: Evaluation) -> dict[str, str]:
    """The version's metrics by protocol, as tags."""
    key = next((key for key in evaluation.contenders if key[0] == VERSION), None)
    if key is None:
        return {}
    asked = evaluation.asked
    return {
        f"graftrec.{asked.part}.{protocol}": json.dumps(
            {"release": asked.release.number} | means(evaluation.metrics(key, protocol))
        )
        for protocol in asked.held_out.protocols
    }


def _entry(decision: Decision, evaluation: Evaluation, champion: Version | None, run: Run) -> dict[str, Any]:
    asked = evaluation.asked
    return {
        "release": asked.release.number, "split": asked.split, "domain": asked.domain, "part": asked.part,
        "users": len(asked.users), "champion": champion.label if champion else None, "run": run.id,
        "checks": [{"name": c.name, "verdict": c.verdict, "text": c.text} for c in decision.checks],
    }  # fmt: skip


def _audit(entry: Mapping[str, Any]) -> dict[str, str]:
    """One entry of the trail, under a tag of its own: entries are added, never changed."""
    now = datetime.datetime.now(datetime.UTC)
    told = json.dumps({"time": now.isoformat(timespec="seconds"), **entry}, ensure_ascii=False)
    return {f"{TAG_AUDIT}{now:%Y%m%dT%H%M%S.%f}-{os.getpid()}": told[:TAG_CHARACTERS]}
