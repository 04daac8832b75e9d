"""What is kept of the gate's decision: in the version's tags, its description, and its audit trail."""

import datetime
from collections.abc import Mapping
from typing import Any

from trainer import tracking
from trainer.evaluation.card import lines
from trainer.evaluation.gate import Decision
from trainer.evaluation.item_ranking import SINGLE
from trainer.registry import Version, descriptions
from trainer.registry.gate_evidence import GateEvidence
from trainer.tracking import Run

TAG_CHARACTERS = 500  # of the verdict; the description of the version holds all of it


def verdict_of(decision: Decision) -> str:
    return ("passed" if decision.passed else f"refused: {'; '.join(decision.reasons)}")[:TAG_CHARACTERS]


def means_of(found: GateEvidence) -> dict[str, dict[str, float]]:
    """The version's metrics by protocol or task, each held-out item counted once in one list."""
    return {
        name: {metric: value for metric, value in numbers.items() if not metric.startswith(SINGLE)}
        for name, numbers in found.means().items()
    }


def gate_section(decision: Decision, found: GateEvidence | None, run: Run) -> str:
    """The decision in a version's description."""
    link = tracking.run_link("The gate's run", run.id) + " holds decision.json." if run.id else ""
    scores = f"This version:\n\n{descriptions.scores(found.part, means_of(found))}" if found is not None else ""
    under = "" if found is None else "\n".join(f"Under {line}." for line in lines(found.cards))
    return descriptions.paragraphs(descriptions.gate(decision, examples_text(found)), scores, under, link)


def examples_text(found: GateEvidence | None) -> str:
    """The examples of the gate's numbers, in words."""
    if found is None:
        return ""
    return f"release {found.release.number}, {found.num_users:,} users of domain {found.domain}, {found.part}"


def audit_entry(decision: Decision, found: GateEvidence | None, champion: Version | None, run: Run) -> dict[str, Any]:
    examples: dict[str, Any] = {}
    if found is not None:
        examples = {
            "release": found.release.number,
            "split": found.split,
            "domain": found.domain,
            "part": found.part,
            "users": found.num_users,
            "cards": [{"hash": entry["hash"], "text": entry["text"]} for entry in found.cards],
        }
    return examples | {
        "champion": champion.label if champion else None,
        "run": run.id,
        "checks": {check.name: check.verdict for check in decision.checks},  # numbers: the run's decision.json
    }


def audited(action: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of the trail: entries are added, never changed."""
    now = datetime.datetime.now(datetime.UTC)
    return {"time": now.isoformat(timespec="seconds"), "action": action, **entry}
