"""One recipe under each of several protocol cards, beside what others published under them: a heading a card.

    graftrec protocols --experiment demo [--data FOLDER] [--section.key value …]

Figures under different cards are never put side by side: one table has a heading for each card, and below it the
recipe's mean over seeds, the best simple baseline, and figures of others as their source has them. Trainings are
processes that are skipped once they are done, so the same command continues what was stopped anywhere. Writes table.txt
and results.json to <runs>/<name>. Exit codes: 0; 1 where trainings are missing; 2 for a mistake in settings or data.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from etl.config import check_root
from etl.settings import ConfigError, replaced
from etl.text_table import aligned
from trainer.config import EvaluateConfig, EvaluatedModel, PretrainConfig
from trainer.experiment.command import build_tables, run_named
from trainer.experiment.protocols_plan import CardPlan, ProtocolsConfig
from trainer.experiment.run import RUNS_MISSING
from trainer.recipes.training_jobs import TrainingJob

if TYPE_CHECKING:
    from trainer.data.release import Release
    from trainer.recipes.evaluate import EvaluationReport
    from trainer.tracking import Run

METRICS = ("NDCG@10", "Recall@10")
RESULTS, TABLE = "results.json", "table.txt"


@dataclass
class CardResult:
    """What one card came to. `reason`: why there is no figure of ours."""

    plan: CardPlan
    label: str  # of the recipe
    trainings: list[TrainingJob] = field(default_factory=list)
    report: "EvaluationReport | None" = None
    cards: list[Mapping[str, Any]] = field(default_factory=list)
    reason: str = ""


def run(config: ProtocolsConfig) -> int:
    """All cards. Gives the exit code: 0, or 1 where trainings are missing."""
    from trainer import tracking
    from trainer.data.release import pin
    from trainer.recipes import training_jobs
    from trainer.recipes.alone import alone
    from trainer.recipes.pipeline import jobs_of

    if config.etl is not None:
        check_root(config.etl.source, "etl.source.root")
    found = {
        name: CardResult(card, config.label, reason=_not_available(config, card)) for name, card in config.shown.items()
    }
    with alone(config.folder, "protocols"):
        training_jobs.prepare()
        tags = {"graftrec.recipe": "protocols"}
        with tracking.start_run(config.tracking, name=config.name, resolved=config, tags=tags) as tracked:
            release = pin(*build_tables(config))
            if mistake := config.mistake({split.name: split for split in release.splits}):
                raise ConfigError(mistake)
            environment = tracking.child_environment(tracked)
            for follows in (False, True):  # how many epochs, the first ones say
                jobs = _jobs(config, found, release, follows=follows)
                training_jobs.run(
                    jobs,
                    folder=config.folder,
                    jobs=jobs_of(config.jobs, config.recipe.runtime, max(len(jobs), 1)),
                    environment=environment,
                )
            for name, one in found.items():
                if any(not job.failure for job in one.trainings):
                    _evaluate(config, name, one)
            _check_apart(found)
            text = _keep(config, found, tracked)
    print(f"\n{text}\n\nresults  {config.folder / RESULTS}", flush=True)
    missing = [f"{job.name}: {job.failure}" for one in found.values() for job in one.trainings if job.failure]
    for line in missing:
        print(f"missing  {line}", file=sys.stderr)
    return RUNS_MISSING if missing else 0


def _recipe(config: ProtocolsConfig, card: CardPlan) -> PretrainConfig | None:
    return config.recipe if card.request_time == "unknown" else config.timed


def _not_available(config: ProtocolsConfig, card: CardPlan) -> str:
    """Why a card has no figure of ours; "" where it will have one."""
    recipe = _recipe(config, card)
    if recipe is None:
        return "not available: no recipe here reads the request's time (timed)"
    if recipe.reads_request_time != (card.request_time == "known"):
        reads = "reads" if recipe.reads_request_time else "does not read"
        return f"not available: the recipe {reads} the request's time, which is {card.request_time} under this card"
    return ""


def _jobs(
    config: ProtocolsConfig, found: Mapping[str, CardResult], release: "Release", *, follows: bool
) -> list[TrainingJob]:
    """The trainings of cards that take their number of epochs from another one, or of the others."""
    jobs = []
    for name, one in found.items():
        recipe, card = _recipe(config, one.plan), one.plan
        if one.reason or recipe is None or (card.epochs_of is not None) != follows:
            continue
        if card.epochs_of is not None:
            epochs = _best_epoch(found.get(card.epochs_of))
            if epochs is None:
                one.reason = f"missing: card {card.epochs_of}, which says how many epochs, was not trained"
                continue
            recipe = replaced(recipe, train=replaced(recipe.train, epochs=epochs))
        for seed in config.seeds:
            made = replaced(
                recipe,
                name=f"{name}-{seed}",
                output=str(config.folder),
                data=replaced(recipe.data, lake=release.lake, release=release.number, split=card.split),
                train=replaced(recipe.train, seed=seed),
                tracking=config.tracking,
            )
            one.trainings.append(TrainingJob(f"{name}-{seed}", "pretrain", made))
        jobs += one.trainings
    return jobs


def _best_epoch(one: CardResult | None) -> int | None:
    """Mean over seeds, rounded."""
    best = [job.metrics["best_epoch"] for job in (one.trainings if one else ()) if job.metrics is not None]
    return round(sum(best) / len(best)) if best else None


def _evaluate(config: ProtocolsConfig, name: str, one: CardResult) -> None:
    from trainer.recipes import evaluate

    models = [
        EvaluatedModel(model=str(job.model), label=config.label, seed=job.config.train.seed)
        for job in one.trainings
        if not job.failure
    ]
    one.report = evaluate.run(
        EvaluateConfig(
            name=name,
            output=str(config.folder),
            models=tuple(models),
            split=one.plan.split,
            evaluation=config.evaluation,
            baselines=config.baselines,
            metrics=METRICS,
            runtime=config.recipe.runtime,
            tracking=config.tracking,
        )
    )
    one.cards = list(one.report.cards)


def _check_apart(found: Mapping[str, CardResult]) -> None:
    """Raises ConfigError for two headings of one card: their figures are of one protocol and may be compared."""
    first: dict[str, str] = {}
    for name, one in found.items():
        for entry in one.cards[:1]:
            if (other := first.setdefault(entry["hash"], name)) != name:
                raise ConfigError(
                    f"cards: expected a protocol card of its own for each, found card {entry['hash']} of {other} and "
                    f"of {name}; leave one out"
                )


# --- the table ---------------------------------------------


def rows_of(one: CardResult) -> list[dict[str, Any]]:
    """Ours, the best simple baseline, and those of others, under one card."""
    rows: list[dict[str, Any]] = []
    if one.report is not None:
        first = one.report.rows[0]["protocol"]
        own = [row for row in one.report.rows if row["protocol"] == first]
        head = [row for row in own if row["metric"] == METRICS[0]]
        best = max((row for row in head if not row["is_model"]), key=lambda row: row["mean"], default=None)
        for chosen in [*(row for row in head if row["is_model"]), *([best] if best else [])]:
            means = {row["metric"]: row["mean"] for row in own if row["label"] == chosen["label"]}
            seeds = f"{chosen['num_seeds']} seed{'s' if chosen['num_seeds'] > 1 else ''}, here"
            source = seeds if chosen["is_model"] else "best simple baseline, here"
            rows.append({"label": chosen["label"], "kind": "ours" if chosen["is_model"] else "baseline"} | means)
            rows[-1] |= {"source": source}
    for figure in one.plan.published:
        values = dict(zip(METRICS, (figure.ndcg, figure.recall), strict=True))
        rows.append({"label": figure.model, "kind": "published", **values, "source": figure.source})
    return rows


def text_of(found: Mapping[str, CardResult]) -> str:
    """One table, with a heading a card."""
    from trainer.evaluation.card import lines

    lengths = [len(label) for one in found.values() for label in (one.label, *(row["label"] for row in rows_of(one)))]
    width = max(lengths)
    blocks = []
    for one in found.values():
        cells = [["model".ljust(width), *METRICS, "source"]]
        for row in rows_of(one):
            values = ["–" if row[name] is None else f"{row[name]:.4f}" for name in METRICS]
            cells.append([row["label"].ljust(width), *values, row["source"]])
        if one.reason:
            cells.append([one.label.ljust(width), "–", "–", one.reason])
        heads = [one.plan.heading, *lines(one.cards)]
        blocks.append("\n".join([*heads, *aligned(cells, rule=True)]))
    return "\n\n".join(blocks)


def _keep(config: ProtocolsConfig, found: Mapping[str, CardResult], tracked: "Run") -> str:
    """Table and results, in the folder and in MLflow. Gives the table."""
    from trainer.evaluation.card import record
    from trainer.experiment.results import finite, machine
    from trainer.tracking import provenance

    text = text_of(found)
    (config.folder / TABLE).write_text(text + "\n", encoding="utf-8")
    results = {
        "experiment": config.name,
        "code": provenance.code_version(),
        "machine": machine(),
        "seeds": list(config.seeds),
        "headings": {
            name: {"heading": one.plan.heading, "cards": one.cards, "rows": rows_of(one), "reason": one.reason}
            for name, one in found.items()
        },
    }
    kept = config.folder / RESULTS
    kept.write_text(json.dumps(finite(results), indent=1, allow_nan=False), encoding="utf-8")
    record(tracked, [entry for one in found.values() for entry in one.cards])
    tracked.log_artifact(kept)
    tracked.log_text(text, TABLE)
    tracked.describe(f"One recipe under {len(found)} protocol cards.\n\n```\n{text}\n```")
    means = {
        f"{name}/{metric}": row[metric]
        for name, one in found.items()
        for row in rows_of(one)
        if row["kind"] == "ours"
        for metric in METRICS
    }
    tracked.log_metrics(means)
    return text


def main(arguments: Sequence[str] | None = None, *, program: str = "graftrec protocols") -> int:
    return run_named(
        ProtocolsConfig,
        "protocols",
        run,
        program=program,
        description="One recipe under each protocol card.",
        arguments=arguments,
    )
