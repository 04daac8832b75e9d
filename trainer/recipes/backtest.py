"""Recipe: a rolling backtest. At each of several dates, train on what was before it and test on the days after it.

    python -m trainer backtest --config backtest/demo

One ETL run makes a split by time for each date; trainings run side by side; an unchanged step is skipped. Writes to
`runs`: table.txt, backtest.json and backtest.png, which the MLflow run has too, with the metric of each date as a step.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from etl.config import check_root
from etl.settings import replaced
from etl.text_table import aligned
from trainer import figures, tracking
from trainer.config import EvaluatedModel
from trainer.config.backtest import BacktestConfig
from trainer.evaluation.baselines.names import POPULARITY
from trainer.evaluation.card import check_stored
from trainer.recipes import evaluate, training_jobs
from trainer.recipes.alone import alone
from trainer.recipes.pipeline import TrainingFailed, jobs_of, step
from trainer.recipes.training_jobs import TrainingJob
from trainer.registry import descriptions

TABLE, NUMBERS, PICTURE = "table.txt", "backtest.json", "backtest.png"
MODEL = "model"  # label


@dataclass(frozen=True)
class DateResult:
    """The test days after one date. `means`: label -> mean of the metric; the model's is MODEL."""

    date: str
    metric: str
    protocol: str
    users: int
    new_users: int
    items: int
    new_items: int
    means: dict[str, float]
    baselines: tuple[str, ...]


def run(config: BacktestConfig) -> list[DateResult]:
    """Run the backtest as configured. Raises GraftrecError."""
    check_root(config.etl.source, "etl.source.root")
    with alone(Path(config.runs), "backtest"):
        return _run(config)


def _run(config: BacktestConfig) -> list[DateResult]:
    from trainer.recipes import run_etl

    splits = config.splits()
    names = {split.name for split in splits.values()}
    kept = tuple(split for split in config.etl.splits if split.name not in names)
    etl = replaced(config.etl, splits=(*splits.values(), *kept))
    training_jobs.prepare()
    tags = {"graftrec.recipe": "backtest"}
    with tracking.start_run(config.tracking, name=config.name, resolved=config, tags=tags) as tracked:
        with step("tables"):
            release = run_etl.run(etl, config.tracking)
        trainings = {date: _training(config, date, split.name, release) for date, split in splits.items()}
        with step("train"):
            training_jobs.run(
                list(trainings.values()),
                folder=Path(config.runs),
                jobs=jobs_of(config.jobs, config.pretrain.runtime, len(trainings)),
                environment=tracking.child_environment(tracked),
            )
        if failed := next((one for one in trainings.values() if one.failure), None):
            raise TrainingFailed(f"{failed.name}: {failed.failure}", failed.exit_code)
        results, cards = list[DateResult](), dict[str, dict[str, Any]]()
        for date, training in trainings.items():
            with step(f"evaluate {date}"):
                results.append(_evaluated(config, date, training, cards))
        check_stored(cards, allowed=["split"])  # which is of other dates
        _show(config, results, tracked)
    return results


def _training(config: BacktestConfig, date: str, split: str, release: int) -> TrainingJob:
    data = replaced(config.pretrain.data, lake=config.etl.lake, release=release, split=split)
    made = replaced(config.pretrain, name=date, output=config.runs, data=data, tracking=config.tracking)
    return TrainingJob(date, "pretrain", made)


def _evaluated(
    config: BacktestConfig, date: str, training: TrainingJob, cards: dict[str, dict[str, Any]]
) -> DateResult:
    """Adds the evaluation's protocol cards to `cards`."""
    report = evaluate.run(
        replaced(
            config.evaluate,
            name=date,
            output=config.runs,
            model=None,
            models=(EvaluatedModel(model=str(training.model), label=MODEL),),
            tracking=config.tracking,
        )
    )
    cards[date] = {"cards": report.cards}
    first = report.rows[0]
    shown = [row for row in report.rows if (row["protocol"], row["metric"]) == (first["protocol"], first["metric"])]
    new = json.loads((report.folder / evaluate.SUMMARY).read_text(encoding="utf-8")).get("new", {})
    return DateResult(
        date,
        first["metric"],
        first["protocol"],
        new.get("users", 0),
        new.get("new_users", 0),
        new.get("held_out_items", 0),
        new.get("new_items", 0),
        {row["label"]: row["mean"] for row in shown},
        tuple(row["label"] for row in shown if not row["is_model"]),
    )


def _show(config: BacktestConfig, results: Sequence[DateResult], tracked: tracking.Run) -> None:
    """Print, write and log the table and the picture."""
    folder, first = Path(config.runs), results[0]
    labels = shown_labels(results)
    header, rows = cells(results, labels)
    days = f"{config.name}, the {config.test_days:g} days after each date"
    title = f"{first.metric} ({first.protocol}) of {days}; trained on all before it but {config.validation_days:g} days"
    text = "\n".join([title, *aligned([header, *rows])])
    print(f"\n{text}", flush=True)
    (folder / TABLE).write_text(text + "\n", encoding="utf-8")
    (folder / NUMBERS).write_text(json.dumps([asdict(result) for result in results], indent=1), encoding="utf-8")
    series = {label: [result.means[label] for result in results] for label in labels}
    picture = figures.metric_by_date(series, [result.date for result in results], metric=first.metric, title=days)
    picture.savefig(folder / PICTURE, dpi=130)
    for number, result in enumerate(results):
        named = {f"test/{result.protocol}/{result.metric}/{label}": mean for label, mean in result.means.items()}
        counts = {"users": result.users, "new_users": result.new_users, "new_items": result.new_items}
        tracked.log_metrics(named | counts, step=number)
    tracked.log_figure(picture, PICTURE)
    tracked.log_thumbnail(folder / PICTURE, evaluate.SMALL + PICTURE)
    tracked.log_artifact(folder / NUMBERS)
    table = descriptions.table(header, rows)
    tracked.log_text(table, "table.md")
    image = f"![{first.metric} by date](artifact:{evaluate.SMALL}{PICTURE})"
    tracked.describe(descriptions.paragraphs(f"{title}.", table, image))


def shown_labels(results: Sequence[DateResult]) -> list[str]:
    """The model, popularity, and the baseline that is best over all dates."""
    known = set.intersection(*(set(result.means) for result in results))
    baselines = [label for label in results[0].baselines if label in known]
    best = max(baselines, key=lambda label: np.mean([result.means[label] for result in results]), default=None)
    return [MODEL, *(label for label in baselines if label in (POPULARITY, best))]


def cells(results: Sequence[DateResult], labels: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and a line a date; below them the mean over dates and its spread."""
    header = ["date", "users", "new users", "items", "new items", *labels]
    rows = [
        [
            result.date,
            *(f"{count:,}" for count in (result.users, result.new_users, result.items, result.new_items)),
            *(f"{result.means[label]:.4f}" for label in labels),
        ]
        for result in results
    ]
    of_label = {label: [result.means[label] for result in results] for label in labels}
    rows.append(["mean", "", "", "", "", *(f"{np.mean(of_label[label]):.4f}" for label in labels)])
    if len(results) > 1:
        spread = [f"{np.std(of_label[label], ddof=1):.4f}" for label in labels]
        rows.append(["deviation", "", "", "", "", *spread])
    return header, rows
