"""Recipe: compare a candidate on one pinned release, and move the registry's aliases if the gate passes.

    python -m trainer promote --config promote/default --candidate FOLDER --replicas "[FOLDER, FOLDER]" \
        --from_scratch "[FOLDER, FOLDER, FOLDER]"
    python -m trainer promote --config promote/default --rollback true

Mistakes that need no scoring (too few seeds, a misspelt baseline or metric, no from-scratch) are refused first.

Candidate, from-scratch and champion are scored outside the promotion lock, since that may take long. Under the lock the
champion is read again: if another promoter has changed it meanwhile, the new one is scored first.
"""

import contextlib
import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from etl.settings import GraftrecError, RunAgain
from trainer import tracking
from trainer.config import PretrainConfig, PromoteConfig, RecommendConfig, event_types_read
from trainer.data.release import Release, pin
from trainer.evaluation.comparison import Results
from trainer.evaluation.gate import (
    BEST_BASELINE,
    FROM_SCRATCH,
    Decision,
    Evidence,
    check_gate,
    contrast_seeds,
    decide,
    next_steps,
)
from trainer.evaluation.item_ranking import SINGLE
from trainer.inference.model_folder import ModelFolderError, config_of, lake_of, load_model, model_hash
from trainer.parallel.distributed import join
from trainer.recipes.hints import recommend_command
from trainer.registry import CANDIDATE, CHAMPION, PREVIOUS, Promotion, Registry, Version, descriptions
from trainer.registry.gate_evidence import SCRATCH, VERSION, GateEvidence, was_transferred
from trainer.tracking import Run

TAG_GATE = "graftrec.gate"  # the gate's last result: passed, or why not
TAG_BEFORE = "graftrec.champion_before"  # number of the champion that a promotion replaced
TAG_CHARACTERS = 500  # of the verdict; the description of the version holds all of it
ATTEMPTS = 10  # at a champion that others keep changing


class GateRefused(GraftrecError):
    """The gate refused the candidate; no alias has moved. `model`: the candidate's folder. `champion`: the label of the
    version that stays."""

    exit_code = 3

    def __init__(self, message: str, decision: Decision, model: str, champion: str | None) -> None:
        super().__init__(message)
        self.decision, self.model, self.champion = decision, model, champion


class PromoteError(GraftrecError):
    """A promotion or rollback that can't be made."""


@dataclass(frozen=True)
class Promoted:
    """The champion now."""

    version: Version
    decision: Decision | None  # None: it was the champion already, or a rollback
    replaced: int | None  # number of the champion before


def run(config: PromoteConfig) -> Promoted:
    """Promote or roll back, as configured. Raises GateRefused (exit code 3) or another GraftrecError (2)."""
    registry = Registry(config.registered_model, family=config.family)
    if config.rollback:
        return _roll_back(registry)
    compared = _compared(registry, config)
    version = _candidate(registry, config)
    if CHAMPION in version.aliases:
        print(f"{version.label} is the champion already")
        tracking.settle(config.tracking)
        return Promoted(version, None, None)
    release = pin(config.lake or lake_of(compared.candidate.folder), config.release)
    with tracking.start_run(
        config.tracking,
        name=config.name,
        resolved=config,
        release=release,
        tags={"graftrec.recipe": "promote"},
        tables=("sequences", "baskets", "items", "domains", "negatives"),
        context="evaluation",
    ) as tracked:
        found, faults = _ask(registry, version, compared, config, release)
        decision, promoted = _judge_and_move(registry, version, found, faults, config, tracked)
        record = {"version": version.label, "release": release.number, "lake": release.lake} | decision.as_dict()
        place = Path(config.output) / config.name / "decision.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(record, indent=1), encoding="utf-8")
        tracked.log_artifact(place)
        tracked.set_tags({TAG_GATE: _verdict(decision), "graftrec.version": version.label})
        tracked.describe(descriptions.promotion(version.label, version.hash, decision, _examples(found)))
        for check in decision.checks:
            tracked.log_metrics({f"gate/{check.name}/{name}": value for name, value in check.numbers.items()})
    if found is not None:
        print(f"gate on release {release.number}, {found.num_users:,} users of domain {found.domain}, {found.part}:")
    print(decision.text())
    if shown := detectable(decision, config.gate.level):
        print(f"  {shown}")
    if promoted is None:
        model, champion = str(compared.candidate.folder), registry.find(CHAMPION)
        refusal = GateRefused(
            f"{version.label} is not promoted: {'; '.join(decision.reasons)}",
            decision,
            model,
            champion.label if champion else None,
        )
        for step in next_steps(decision, recommend=_recommend(config, compared, refusal), champion=refusal.champion):
            print(f"  → {step}")
        raise refusal
    print(f"{promoted.version.label} is champion" + (f", after {promoted.replaced}" if promoted.replaced else ""))
    return promoted


def detectable(decision: Decision, level: float) -> str:
    """The smallest gain that these seeds and users can show: "5 seeds of 1,865 users show gains above 6.1 % over
    from-scratch"; empty if nothing was tested."""
    for check in decision.checks:
        if check.name in (FROM_SCRATCH, BEST_BASELINE) and "detectable" in check.numbers:
            found = check.numbers
            seeds = f"{found['seeds']} seeds" if found["seeds"] > 1 else "1 seed"
            return (
                f"{seeds} of {found['users']:,} users show gains above {100 * found['detectable']:.1f} % over "
                f"{check.name}, with p ≤ {level:g}"
            )
    return ""


@dataclass(frozen=True)
class ModelInfo:
    """What is read of a model without loading its weights. `parent`: its parent's hash."""

    folder: Path
    config: PretrainConfig
    parent: str | None
    hash: str


@dataclass(frozen=True)
class Compared:
    """The models that the gate compares."""

    candidate: ModelInfo
    replicas: tuple[ModelInfo, ...]
    scratch: tuple[ModelInfo, ...]


def _recommend(config: PromoteConfig, compared: Compared, refusal: GateRefused) -> str | None:
    """The command that recommends by the candidate. None: it ranks no items."""
    if not compared.candidate.config.task.scores_items:
        return None
    wanted = RecommendConfig(
        registered_model=config.registered_model,
        model=refusal.model,
        lake=config.lake,
        domain=config.domain,
        replace=refusal.champion is not None,
    )
    return recommend_command(wanted)


def _compared(registry: Registry, config: PromoteConfig) -> Compared:
    """Find all models, and check them before anything is registered or scored. If nothing was transferred, from-scratch
    models that are the candidate and its replicas themselves are left out. Raises GraftrecError."""
    candidate = _model_info(registry, config.candidate or f"@{CANDIDATE}")
    replicas = tuple(_model_info(registry, name) for name in config.replicas)
    scratch = tuple(_model_info(registry, name) for name in config.from_scratch)
    transferred = was_transferred(candidate.config, candidate.parent)
    for one in scratch:
        if was_transferred(one.config, one.parent):
            raise PromoteError(
                f"from_scratch: expected models of transfer none, found {one.folder}, which has a parent; name it in "
                "replicas if it has the candidate's settings"
            )
    if not transferred and {one.hash for one in scratch} <= {one.hash for one in (candidate, *replicas)}:
        scratch = ()
    recipe, other = ([one.config.train.seed for one in models] for models in ((candidate, *replicas), scratch))
    check_gate(
        config.gate,
        task=candidate.config.task,
        seeds=contrast_seeds(recipe, other),
        transferred=transferred,
        has_scratch=bool(scratch),
        baselines=config.baselines,
    )
    return Compared(candidate, replicas, scratch)


def _model_info(registry: Registry, name: str) -> ModelInfo:
    folder = registry.folder(registry.version(name)) if _is_version(name) else Path(name)
    digest = model_hash(folder)
    return ModelInfo(folder, *config_of(folder), digest)


def _candidate(registry: Registry, config: PromoteConfig) -> Version:
    """The version named, else the one with the alias `candidate`; a model folder is registered."""
    named = config.candidate
    if named is None:
        return registry.version(CANDIDATE)
    if _is_version(named):
        return registry.version(named)
    trained_model = load_model(named)
    tags = {
        "graftrec.release": str(trained_model.release),
        "graftrec.transfer": str(getattr(trained_model.config, "transfer", "none")),
    } | ({"graftrec.parent": trained_model.parent} if trained_model.parent else {})
    version = registry.register(named, tags=tags, alias=None)
    if CHAMPION not in version.aliases:
        registry.set_alias(CANDIDATE, version.number)
    return version


def _is_version(name: str) -> bool:
    """A version's number or alias ("3", "@champion"), rather than a folder."""
    return name.isdigit() or name.startswith("@")


# --- evidence ---------------------------------------------


def _ask(
    registry: Registry, version: Version, compared: Compared, config: PromoteConfig, release: Release
) -> tuple[GateEvidence | None, list[str]]:
    """The version, its replicas and from-scratch, evaluated; and why their numbers can't be trusted. None: not
    needed."""
    device = str(join(config.runtime).device)
    named = [(VERSION, registry.folder(version)), *((VERSION, one.folder) for one in compared.replicas)]
    named += [(SCRATCH, one.folder) for one in compared.scratch]
    models, faults = [], []
    for label, path in named:
        trained_model = load_model(path, device=device)
        if broken := _not_finite(trained_model.model):
            faults.append(f"weights of {path} are not finite ({', '.join(broken)})")
        models.append((label, trained_model))
    if faults:
        return None, faults
    found = GateEvidence(models, _event_types_of_champion(registry), config, release)
    return found, found.faults


def _not_finite(model: torch.nn.Module) -> list[str]:
    return [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]


def _event_types_of_champion(registry: Registry) -> tuple[str, ...]:
    """Event types that it reads; none where it can't be read, which is reported where it is scored."""
    champion = registry.find(CHAMPION)
    if champion is not None:
        with contextlib.suppress(GraftrecError, OSError, ValueError):
            return event_types_read(config_of(registry.stored(champion))[0])
    return ()


def _score_champion(
    registry: Registry, champion: Version, config: PromoteConfig, found: GateEvidence
) -> Results | None:
    """The champion on the same examples. None: its folder is gone or damaged."""
    try:
        trained_model = load_model(registry.folder(champion), device=str(join(config.runtime).device))
    except ModelFolderError as error:
        print(f"the champion {champion.label} can't be scored, so the candidate is not compared with it: {error}")
        return None
    return found.champion(trained_model)


# --- aliases ---------------------------------------------


def _judge_and_move(
    registry: Registry,
    version: Version,
    found: GateEvidence | None,
    faults: Sequence[str],
    config: PromoteConfig,
    run: Run,
) -> tuple[Decision, Promoted | None]:
    """Decide against the champion of the moment of moving. None: refused."""
    for _ in range(ATTEMPTS):
        champion = registry.find(CHAMPION)
        if found is None or faults:
            evidence = Evidence(np.empty(0), faults=faults)
        else:
            scored = _score_champion(registry, champion, config, found) if champion else None
            evidence = found.evidence(scored, config.gate)
        decision = decide(evidence, config.gate)
        with registry.promoting() as promotion:
            if _number(registry.find(CHAMPION)) != _number(champion):
                continue
            if found and not faults:
                numbers = {
                    f"{found.part}/{name}/{k}": v for name, means in _means(found).items() for k, v in means.items()
                }
                registry.log_metrics(version, numbers, found.release, found.table)
            said = _gate_section(decision, None if faults else found, run)
            registry.describe(version.number, descriptions.GATE, said)
            entry = _entry(decision, found, champion, run)
            if not decision.passed:
                registry.set_tags(version.number, {TAG_GATE: _verdict(decision)})
                registry.audit(version.number, _audit("refused", entry))
                return decision, None
            return decision, _crown(registry, promotion, version, champion, decision, entry)
    raise RunAgain(
        f"other promoters changed the champion {ATTEMPTS} times while {version.label} was compared; run again"
    )


def _crown(
    registry: Registry,
    promotion: Promotion,
    version: Version,
    champion: Version | None,
    decision: Decision,
    entry: dict[str, Any],
) -> Promoted:
    """Tags first: a champion without its decision is worse than the decision of a promotion that did not happen."""
    before = str(champion.number) if champion else ""
    registry.set_tags(version.number, {TAG_GATE: _verdict(decision), TAG_BEFORE: before})
    registry.audit(version.number, _audit("promoted", entry))
    replaced = promotion.crown(version.number)
    if (candidate := registry.find(CANDIDATE)) is not None and candidate.number == version.number:
        promotion.move(CANDIDATE, None)
    if champion is not None:
        registry.audit(champion.number, _audit("replaced", {"by_version": version.label}))
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
        registry.audit(previous.number, _audit("restored", {"instead_of": champion.label}))
        promotion.move(CHAMPION, previous.number)
        before = previous.tags.get(TAG_BEFORE, "")
        known = {version.number for version in registry.versions()}
        promotion.move(PREVIOUS, int(before) if before.isdigit() and int(before) in known else None)
        registry.audit(champion.number, _audit("rolled back", {"to_version": previous.label}))
    print(f"{previous.label} is champion again, instead of {champion.label}")
    return Promoted(registry.version(str(previous.number)), None, champion.number)


def _number(version: Version | None) -> int | None:
    return None if version is None else version.number


def _verdict(decision: Decision) -> str:
    return ("passed" if decision.passed else f"refused: {'; '.join(decision.reasons)}")[:TAG_CHARACTERS]


def _means(found: GateEvidence) -> dict[str, dict[str, float]]:
    """The version's metrics by protocol or task, each held-out item counted once in one list."""
    return {
        name: {metric: value for metric, value in numbers.items() if not metric.startswith(SINGLE)}
        for name, numbers in found.means().items()
    }


def _gate_section(decision: Decision, found: GateEvidence | None, run: Run) -> str:
    """The decision in a version's description."""
    link = tracking.run_link("The gate's run", run.id) + " holds decision.json." if run.id else ""
    scores = f"This version:\n\n{descriptions.scores(found.part, _means(found))}" if found is not None else ""
    return descriptions.paragraphs(descriptions.gate(decision, _examples(found)), scores, link)


def _examples(found: GateEvidence | None) -> str:
    """The examples of the gate's numbers, in words."""
    if found is None:
        return ""
    return f"release {found.release.number}, {found.num_users:,} users of domain {found.domain}, {found.part}"


def _entry(decision: Decision, found: GateEvidence | None, champion: Version | None, run: Run) -> dict[str, Any]:
    examples: dict[str, Any] = {}
    if found is not None:
        examples = {
            "release": found.release.number,
            "split": found.split,
            "domain": found.domain,
            "part": found.part,
            "users": found.num_users,
        }
    return examples | {
        "champion": champion.label if champion else None,
        "run": run.id,
        "checks": {check.name: check.verdict for check in decision.checks},  # numbers: the run's decision.json
    }


def _audit(action: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of the trail: entries are added, never changed."""
    now = datetime.datetime.now(datetime.UTC)
    return {"time": now.isoformat(timespec="seconds"), "action": action, **entry}
