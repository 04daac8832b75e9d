"""Recipe: compare a candidate on one pinned release, and move the registry's aliases if the gate passes.

    python -m trainer promote --config promote/default --candidate FOLDER --replicas "[FOLDER, FOLDER]" \
        --from_scratch "[FOLDER, FOLDER, FOLDER]"
    python -m trainer promote --config promote/default --rollback true

Mistakes that need no scoring (too few seeds, a misspelt baseline or metric, no from-scratch) are refused first.

Candidate, from-scratch and champion are scored outside the promotion lock, since that may take long. Under the lock the
champion is read again: if another promoter has changed it meanwhile, the new one is scored first.
"""

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from etl.settings import GraftrecError, RunAgain, replaced
from trainer import tracking
from trainer.config import PromoteConfig, RecommendConfig, event_types_read
from trainer.data.release import Release, pin
from trainer.evaluation import card
from trainer.evaluation.comparison import Results
from trainer.evaluation.gate import (
    BEST_BASELINE,
    FROM_SCRATCH,
    Decision,
    Evidence,
    decide,
    next_steps,
)
from trainer.inference.model_folder import ModelFolderError, config_of, lake_of, load_model
from trainer.parallel.distributed import join
from trainer.recipes.compared_models import Compared, PromoteError, candidate_version, compared_models
from trainer.recipes.hints import recommend_command
from trainer.recipes.promotion_record import audit_entry, audited, examples_text, gate_section, means_of, verdict_of
from trainer.registry import CANDIDATE, CHAMPION, PREVIOUS, Promotion, Registry, Version, descriptions
from trainer.registry.gate_evidence import SCRATCH, VERSION, GateEvidence
from trainer.tracking import Run

TAG_GATE = "graftrec.gate"  # the gate's last result: passed, or why not
TAG_BEFORE = "graftrec.champion_before"  # number of the champion that a promotion replaced
ATTEMPTS = 10  # at a champion that others keep changing


class GateRefused(GraftrecError):
    """The gate refused the candidate; no alias has moved. `model`: the candidate's folder. `champion`: the label of the
    version that stays."""

    exit_code = 3

    def __init__(self, message: str, decision: Decision, model: str, champion: str | None) -> None:
        super().__init__(message)
        self.decision, self.model, self.champion = decision, model, champion


@dataclass(frozen=True)
class Promoted:
    """The champion now."""

    version: Version
    decision: Decision | None  # None: it was the champion already, or a rollback
    replaced: int | None  # number of the champion before


def run(config: PromoteConfig, recommend: RecommendConfig | None = None) -> Promoted:
    """Promote or roll back, as configured. `recommend`: settings of the command that is printed after a refusal; None:
    the default ones. Raises GateRefused (exit code 3) or another GraftrecError (2)."""
    registry = Registry(config.registered_model, family=config.family)
    if config.rollback:
        return _roll_back(registry)
    compared = compared_models(registry, config)
    version = candidate_version(registry, config)
    if CHAMPION in version.aliases:
        print(f"{version.label} is the champion already")
        tracking.settle(config.tracking)
        return Promoted(version, None, None)
    release = pin(config.lake or lake_of(compared.candidate.folder), config.release)
    tags = {"graftrec.recipe": "promote"}
    with tracking.start_run(config.tracking, name=config.name, resolved=config, tags=tags) as tracked:
        tracked.log_release(
            release, context="evaluation", tables=("sequences", "baskets", "items", "domains", "negatives")
        )
        found, faults = _ask(registry, version, compared, config, release)
        decision, promoted = _judge_and_move(registry, version, found, faults, config, tracked)
        cards = [] if found is None else found.cards
        record = {"version": version.label, "release": release.number, "lake": release.lake, "cards": cards}
        record |= decision.as_dict()
        place = Path(config.output) / config.name / "decision.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(record, indent=1), encoding="utf-8")
        tracked.log_artifact(place)
        tracked.set_tags({TAG_GATE: verdict_of(decision), "graftrec.version": version.label})
        card.record(tracked, cards)
        tracked.describe(descriptions.promotion(version.label, version.hash, decision, examples_text(found)))
        for check in decision.checks:
            tracked.log_metrics({f"gate/{check.name}/{name}": value for name, value in check.numbers.items()})
    if found is not None:
        print(f"gate on release {release.number}, {found.num_users:,} users of domain {found.domain}, {found.part}:")
        print("\n".join([*card.lines(cards), decision.text()]))
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
        ranks = compared.candidate.config.task.scores_items
        if recommend is None:
            recommend = RecommendConfig(
                registered_model=config.registered_model, lake=config.lake, domain=config.domain
            )
        command = refused_command(refusal, recommend) if ranks else None
        for step in next_steps(decision, recommend=command, champion=refusal.champion):
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


def refused_command(refusal: GateRefused, settings: RecommendConfig) -> str:
    """The command that recommends by the refused candidate."""
    replace = refusal.champion is not None
    return recommend_command(replaced(settings, model=refusal.model, release=None, replace=replace))


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
                    f"{found.part}/{name}/{k}": v for name, means in means_of(found).items() for k, v in means.items()
                }
                registry.log_metrics(version, numbers, found.release, found.table)
            said = gate_section(decision, None if faults else found, run)
            registry.describe(version.number, descriptions.GATE, said)
            entry = audit_entry(decision, found, champion, run)
            if not decision.passed:
                registry.set_tags(version.number, {TAG_GATE: verdict_of(decision)})
                registry.audit(version.number, audited("refused", entry))
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
    cards = {card.CARD_TAG: card.hashes(entry["cards"])} if entry.get("cards") else {}
    registry.set_tags(version.number, {TAG_GATE: verdict_of(decision), TAG_BEFORE: before} | cards)
    registry.audit(version.number, audited("promoted", entry))
    replaced = promotion.crown(version.number)
    if (candidate := registry.find(CANDIDATE)) is not None and candidate.number == version.number:
        promotion.move(CANDIDATE, None)
    if champion is not None:
        registry.audit(champion.number, audited("replaced", {"by_version": version.label}))
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
        registry.audit(previous.number, audited("restored", {"instead_of": champion.label}))
        promotion.move(CHAMPION, previous.number)
        before = previous.tags.get(TAG_BEFORE, "")
        known = {version.number for version in registry.versions()}
        promotion.move(PREVIOUS, int(before) if re.fullmatch("[0-9]{1,15}", before) and int(before) in known else None)
        registry.audit(champion.number, audited("rolled back", {"to_version": previous.label}))
    print(f"{previous.label} is champion again, instead of {champion.label}")
    return Promoted(registry.version(str(previous.number)), None, champion.number)


def _number(version: Version | None) -> int | None:
    return None if version is None else version.number
