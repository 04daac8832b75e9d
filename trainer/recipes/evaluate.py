"""Recipe: score model folders on one pinned release, beside the simple baselines, and compare them.

    python -m trainer evaluate --config evaluate/default --model runs/finetune/model

Writes to <output>/<name>/evaluation: users.parquet (every user's metrics under every protocol and convention),
summary.json (means, comparisons, snapshots, models), table.txt and gains.png. An unchanged rerun is skipped. Without a
name the folder is named after the models, and an evaluation of other models in that place is kept.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from etl.settings import ConfigError, replaced
from etl.tables import BASKETS, FIRST_INDEX, SEQUENCES
from trainer import tracking
from trainer.code_hash import code_hash
from trainer.config import EvaluateConfig, EvaluatedModel, PretrainConfig, ranks_items, reads_baskets
from trainer.data.release import Release, pin
from trainer.evaluation import click_table, next_event_table, profile_table
from trainer.evaluation.baselines import next_basket
from trainer.evaluation.click_table import ClickPredictions
from trainer.evaluation.comparison import Evaluation, Row, compare_table, evaluate_scorers, render
from trainer.evaluation.item_ranking import BASKET, FULL, SINGLE, convention_of
from trainer.evaluation.predictions import ClassPredictions, Predictions
from trainer.evaluation.ranking_metrics import FloatArray, means
from trainer.evaluation.scorers import (
    EvaluationSet,
    Scorer,
    baseline_scorers,
    model_scorer,
    raw_users,
    read_evaluation_set,
    repeats_of,
)
from trainer.evaluation.significance import gain_text, p_text
from trainer.figures import Gain, confusions, reliability_curves, transfer_gains
from trainer.inference.model_folder import TrainedModel, config_of, load_model, model_hash
from trainer.parallel.distributed import join
from trainer.registry import descriptions

USERS, SUMMARY, TABLE, GAINS = "users.parquet", "summary.json", "table.txt", "gains.png"
SMALL = "small-"  # begins the name of a picture's copy in MLflow, for descriptions
CONFUSIONS, RELIABILITY = "confusions.png", "reliability.png"
ITEM_METRICS = ("NDCG@10", "Recall@10", "MRR")
BASKET_METRICS = tuple(f"{BASKET}{name}" for name in ("NDCG@10", "Recall@10", "F1@10", "HR@10"))


@dataclass(frozen=True)
class EvaluationReport:
    """Where the results lie, and the table."""

    folder: Path
    rows: list[dict[str, Any]]  # of the comparison, as in summary.json
    text: str
    skipped: bool  # nothing had changed since the last run
    run_id: str = ""  # of the MLflow run that made them; "" where that is unknown


def run(config: EvaluateConfig) -> EvaluationReport:
    """Evaluate as configured. Raises GraftrecError (a model, lake, release or protocol that is not there…)."""
    chosen = _chosen(config)
    first = load_model(chosen[0].model)
    release = pin(config.lake or first.lake, config.release if config.release or config.lake else first.release)
    settings = [config_of(Path(model.model))[0] for model in chosen]
    _check_candidate(config, chosen, settings)
    identity = _identity(config, chosen, release)
    config = replaced(config, name=config.name or _name(config, chosen, settings, identity))
    assert config.name is not None
    folder = Path(config.output) / config.name / "evaluation"
    key = _key(config, [model_hash(model.model) for model in chosen], release.versions)
    if (done := _done(folder, key)) is not None:
        print(f"evaluate: nothing has changed since the last run, skipped ({folder})")
        print(done.text)
        tracking.note_reused(config.name, done.run_id)
        tracking.settle(config.tracking)
        return done
    baskets = reads_baskets(first.config.task)
    with (
        _noted(folder),
        tracking.start_run(
            config.tracking,
            name=config.name,
            resolved=config,
            release=release,
            tags={"graftrec.recipe": "evaluate"},
            tables=_read_tables(baskets),
            context="evaluation",
            must_record=True,
        ) as run,
    ):
        device = str(join(config.runtime).device)
        models = [load_model(model.model, device=device) for model in chosen]
        if not ranks_items(first.config.task):
            return _evaluate_told(config, chosen, models, release, run, folder, {"key": key, "of": identity})
        if baskets:  # no others are drawn for them
            repeats = repeats_of(config.evaluation, models)
            config = replaced(config, evaluation=replaced(config.evaluation, protocols=(FULL,), repeats=repeats))
        events: list[Row] = []  # of what is told beside items
        metrics = config.metrics or (BASKET_METRICS if baskets else ITEM_METRICS)
        examples = read_evaluation_set(
            release,
            config.split or first.config.data.split,
            config.domain or first.config.data.answered,
            config.part,
            config.evaluation,
            baskets=baskets,
            event_types=list(dict.fromkeys(name for one in models for name in one.event_types)),
        )
        evaluation = evaluate_scorers(
            _contenders(config, chosen, models, examples),
            examples,
            batch_size=config.evaluation.batch_size,
            progress=config.runtime.progress,
        )
        rows = compare_table(
            evaluation,
            against=config.against,
            protocols=config.evaluation.protocols,
            metrics=metrics,
            candidate=config.candidate,
        )
        text = render(rows, examples, against=config.against)
        if first.config.task.kind == "multi":
            for _, own, table in _next_events(config, chosen, models, release):
                text += f"\n\n{table}"
                events += own
        print(text)
        _begin(folder)
        write_users(evaluation, folder / USERS)
        (folder / TABLE).write_text(text + "\n", encoding="utf-8")
        gains = _picture(rows, examples, config.against)
        if gains is not None:
            gains.savefig(folder / GAINS, dpi=130)
            run.log_figure(gains, f"evaluation/{GAINS}")
        data = [asdict(row) for row in (*rows, *events)]
        summary = {"key": key, "of": identity, "run": run.id, "rows": data} | _summary(evaluation, config)
        _keep(summary, folder, run)
        report = EvaluationReport(folder, data, text, skipped=False, run_id=summary["run"])
        _describe(
            run,
            report,
            config.part,
            drawn=GAINS if gains is not None else "",
            where=(
                f"{len(examples.users):,} users of domain {examples.domain}, split {examples.split}, "
                f"release {release.number}"
            ),
        )
        for trained_model, ((label, seed), scorer) in zip(models, evaluation.scorers.items(), strict=False):
            if trained_model.config.data.answered == examples.domain:
                numbers = {
                    f"{config.part}/{protocol}/{name}": value
                    for protocol in examples.held_out.protocols
                    for name, value in means(evaluation.metrics((label, seed), protocol)).items()
                    if name in metrics
                }
                run.log_model_metrics(scorer.facts["hash"], numbers, release, _read_tables(baskets)[0])
    return report


def _read_tables(baskets: bool) -> list[str]:
    """Names of the tables that an evaluation reads, the one with the histories first."""
    return [(BASKETS if baskets else SEQUENCES).name, "items", "users", "domains", "negatives"]


def _describe(run: tracking.Run, report: EvaluationReport, part: str, *, where: str, drawn: str = "") -> None:
    """Log the comparison as metrics, and as a table with its picture in the run's description."""
    run.log_metrics(descriptions.result_metrics(report.rows, part))
    picture = f"evaluation/{SMALL}{drawn}" if drawn else ""
    if drawn:
        run.log_thumbnail(report.folder / drawn, picture)
    heading = f"{part.capitalize()} results of {where}."
    run.describe(descriptions.results(report.rows, notes=heading, picture=picture))


def show(run: tracking.Run, reports: Mapping[str, EvaluationReport], *, notes: Mapping[str, str] | None = None) -> None:
    """Log evaluations to another run, e.g. a pipeline's: metrics, pictures, and tables in description and table.md.

    `reports` by target domain. Where there are several, the name of a domain begins its metrics, is the folder of its
    files, and heads its table. `notes`: Markdown below each table.
    """
    parts = []
    for domain, report in reports.items():
        inside = f"{domain}/" if len(reports) > 1 else ""
        summary = json.loads((report.folder / SUMMARY).read_text(encoding="utf-8"))
        first = [row for row in report.rows if row["protocol"] == report.rows[0]["protocol"]]
        numbers = descriptions.result_metrics(first, summary["part"])
        run.log_metrics({f"{inside}{name}": value for name, value in numbers.items()})
        drawn = next((name for name in (GAINS, CONFUSIONS, RELIABILITY) if (report.folder / name).is_file()), "")
        if drawn:
            run.log_artifact(report.folder / drawn, inside.rstrip("/"))
            run.log_thumbnail(report.folder / drawn, f"{inside}{SMALL}{drawn}")
        run.log_text(descriptions.results(report.rows), f"{inside}table.md")
        parts.append(
            descriptions.results(
                report.rows,
                heading=f"### {domain}" if inside else "",
                notes=(notes or {}).get(domain, ""),
                picture=f"{inside}{SMALL}{drawn}" if drawn else "",
            )
        )
    run.describe(descriptions.paragraphs(*parts))


def _begin(folder: Path) -> None:
    """Remove an earlier evaluation, its summary first."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMMARY).unlink(missing_ok=True)


def _keep(summary: Mapping[str, Any], folder: Path, run: tracking.Run) -> None:
    text = json.dumps(summary, indent=1)
    (folder / (SUMMARY + ".new")).write_text(text, encoding="utf-8")
    run.log_text(text, f"evaluation/{SUMMARY}")
    for name in (USERS, TABLE):
        run.log_artifact(folder / name, "evaluation")


@contextmanager
def _noted(folder: Path) -> Iterator[None]:
    """Give the summary its final name, which marks the evaluation as done, once MLflow's run has ended or is queued."""
    yield
    (folder / (SUMMARY + ".new")).replace(folder / SUMMARY)


def _evaluate_told(
    config: EvaluateConfig,
    chosen: Sequence[EvaluatedModel],
    models: Sequence[TrainedModel],
    release: Release,
    run: tracking.Run,
    folder: Path,
    about: dict[str, str],
) -> EvaluationReport:
    """Models that rank no items: they tell what users are, or what they take."""
    predictions: Predictions
    if models[0].config.task.kind == "multi":
        tables = _next_events(config, chosen, models, release)
        predictions, rows = tables[-1][0], [row for _, own, _ in tables for row in own]
        text = "\n\n".join(table for *_, table in tables)
        picture, drawn = (
            _confusions(predictions),
            CONFUSIONS,
        )  # of what is told last, value where it is told: fewest classes
        users = pa.concat_tables(_events_told(one, release) for one, *_ in tables)
    elif models[0].config.task.kind == "click":
        predictions = click_table.tell(config, chosen, models, release)
        rows = predictions.rows(against=config.against, candidate=config.candidate)
        text = click_table.render(predictions, rows, against=config.against)
        picture, drawn = _reliability(predictions), RELIABILITY
        users = _pairs_told(predictions, release)
    else:
        predictions = profile_table.tell(config, chosen, models, release)
        rows = predictions.rows(against=config.against, candidate=config.candidate)
        text = profile_table.render(predictions, rows, against=config.against)
        picture, drawn = _confusions(predictions), CONFUSIONS
        users = _users_told(predictions, release)
    print(text)
    _begin(folder)
    pq.write_table(users, folder / USERS, compression="zstd")
    (folder / TABLE).write_text(text + "\n", encoding="utf-8")
    picture.savefig(folder / drawn, dpi=130)
    run.log_figure(picture, f"evaluation/{drawn}")
    data = [asdict(row) for row in rows]
    run_id = run.id
    summary = {
        **about,
        "run": run_id,
        "rows": data,
        "lake": release.lake,
        "release": release.number,
        "versions": release.versions,
        "split": predictions.split,
        "domain": predictions.domain,
        "part": predictions.part,
        "against": config.against,
        "task": models[0].config.task.model_dump(mode="json"),
    }
    _keep(summary, folder, run)
    report = EvaluationReport(folder, data, text, skipped=False, run_id=run_id)
    where = f"domain {predictions.domain}, split {predictions.split}, release {release.number}"
    _describe(run, report, config.part, where=where, drawn=drawn)
    for trained_model, one in zip(models, predictions.probabilities, strict=False):
        numbers = {f"{config.part}/{name}": value for name, value in predictions.metrics(one).items()}
        run.log_model_metrics(trained_model.hash, numbers, release, SEQUENCES.name)
    return report


def _next_events(
    config: EvaluateConfig, chosen: Sequence[EvaluatedModel], models: Sequence[TrainedModel], release: Release
) -> list[tuple[ClassPredictions, list[Row], str]]:
    """Of each thing that is told beside the item: what was told, its rows, its table."""
    found = []
    candidate = None if ranks_items(models[0].config.task) else config.candidate  # items' test is the planned one
    for predictions in next_event_table.tell(config, chosen, models, release):
        rows, candidate = predictions.rows(against=config.against, candidate=candidate), None
        table = next_event_table.render(predictions, rows, against=config.against)
        found.append((predictions, [replace(row, protocol=predictions.name) for row in rows], table))
    return found


def _users_told(predictions: ClassPredictions, release: Release) -> pa.Table:
    """Label, seed, user (raw id), what the user is, and a column of probabilities for each class."""

    def columns(given: FloatArray) -> dict[str, Any]:
        of_class = {f"is {name}": given[:, place] for place, name in enumerate(predictions.names)}
        return {predictions.name: [predictions.names[one] for one in predictions.examples.class_N], **of_class}

    return _told_table(predictions, raw_users(release, predictions.examples.histories.users), columns)


def _events_told(predictions: ClassPredictions, release: Release) -> pa.Table:
    """Label, seed, user (raw id), what is told, what it was, and the probability given to that."""
    is_N = predictions.examples.class_N

    def columns(given: FloatArray) -> dict[str, Any]:
        of_that = given[np.arange(len(is_N)), is_N]
        return {
            "told": [predictions.name] * len(is_N),
            "is": [predictions.names[one] for one in is_N],
            "probability": of_that,
        }

    return _told_table(predictions, raw_users(release, predictions.examples.histories.users), columns)


def _pairs_told(predictions: ClickPredictions, release: Release) -> pa.Table:
    """Label, seed, user (raw id), whether an item of the user's pairs was taken, and what was told of it."""
    users = pa.array(raw_users(release, predictions.pairs.histories.users), pa.string()).take(
        pa.array(predictions.pairs.owner_N)
    )
    return _told_table(predictions, users, lambda given: {"taken": predictions.pairs.taken_N, "probability": given})


def _told_table(
    predictions: Predictions, users: Sequence[str] | pa.Array, columns: Callable[[FloatArray], dict[str, Any]]
) -> pa.Table:
    """A row for each example and contender: label, seed, user, and `columns` of what it told."""
    return pa.concat_tables(
        pa.table(
            {
                "label": pa.array([label] * len(users), pa.string()),
                "seed": pa.array([seed] * len(users), pa.int64()),
                "user": pa.array(users, pa.string()),
                **columns(given),
            }
        )
        for (label, seed), given in predictions.probabilities.items()
    )


def _confusions(predictions: ClassPredictions) -> Figure:
    shares = {label: predictions.confusion(label) for label in predictions.labels}
    return confusions(shares, predictions.names, title=f"{predictions.name}, {len(predictions.examples):,} users, %")


def _reliability(predictions: ClickPredictions) -> Figure:
    curves = {label: predictions.curve(label) for label in predictions.labels}
    return reliability_curves(curves, title=f"{predictions.domain}, {len(predictions.pairs):,} users")


def _chosen(config: EvaluateConfig) -> list[EvaluatedModel]:
    chosen = [*([EvaluatedModel(model=config.model)] if config.model else []), *config.models]
    if not chosen:
        raise ConfigError(
            "expected a model to evaluate, found none; give --model FOLDER, or `models` in the configuration"
        )
    return chosen


def _contenders(
    config: EvaluateConfig, chosen: Sequence[EvaluatedModel], models: Sequence[TrainedModel], examples: EvaluationSet
) -> list[Scorer]:
    device = str(join(config.runtime).device)
    found = [
        model_scorer(trained_model, examples, label=named.label, seed=named.seed, device=device)
        for named, trained_model in zip(chosen, models, strict=True)
    ]
    if not config.baselines.enabled:
        return found
    if examples.baskets:
        return found + next_basket.baseline_scorers(examples, config.baselines)
    return found + baseline_scorers(examples, config.baselines)


# --- what is written ---------------------------------------------


def write_users(evaluation: Evaluation, path: Path) -> None:
    """Per-user metrics as Parquet: label, seed, protocol, convention, user (raw id) and a column a metric."""
    users = pa.array(evaluation.examples.raw_users, pa.string())
    prefixes = {"list": "", "single": SINGLE} | ({"basket": BASKET} if evaluation.examples.baskets else {})
    lacking = np.full(len(users), np.nan)
    unfinished = path.with_name(path.name + ".new")
    writer: pq.ParquetWriter | None = None
    for (label, seed), by_protocol in evaluation.ranks.items():
        for protocol in by_protocol:
            metrics = evaluation.metrics((label, seed), protocol)
            names = list(dict.fromkeys(convention_of(name)[1] for name in metrics))
            for convention, prefix in prefixes.items():
                columns: dict[str, Any] = {
                    "label": pa.array([label] * len(users), pa.string()),
                    "seed": pa.array([seed] * len(users), pa.int64()),
                    "protocol": pa.array([protocol] * len(users), pa.string()),
                    "convention": pa.array([convention] * len(users), pa.string()),
                    "user": users,
                } | {name: metrics.get(prefix + name, lacking) for name in names}
                part = pa.table(columns)
                writer = writer or pq.ParquetWriter(unfinished, part.schema, compression="zstd")
                writer.write_table(part)
    if writer is not None:
        writer.close()
        unfinished.replace(path)


def _summary(evaluation: Evaluation, config: EvaluateConfig) -> dict[str, Any]:
    examples = evaluation.examples
    return {
        "lake": examples.release.lake,
        "release": examples.release.number,
        "versions": examples.release.versions,
        "split": examples.split,
        "domain": examples.domain,
        "part": examples.part,
        "users": len(examples.users),
        "items": len(examples.catalogue) - FIRST_INDEX,
        "against": config.against,
        "contenders": [
            {"label": label, "seed": seed, "reads": scorer.reads, "is_model": scorer.is_model}
            | {"facts": scorer.facts, "scores_not_a_number": evaluation.broken[label, seed]}
            | {"means": {p: means(evaluation.metrics((label, seed), p)) for p in examples.held_out.protocols}}
            for (label, seed), scorer in evaluation.scorers.items()
        ],
    }


def _picture(rows: Sequence[Row], examples: EvaluationSet, against: str) -> Figure | None:
    """Gains in the first metric of the first protocol; None where nothing was compared."""
    shown = [r for r in rows if r.gain and (r.protocol, r.metric) == (rows[0].protocol, rows[0].metric)]
    gains = [
        Gain(
            row.label,
            row.gain.gain,
            row.gain.low,
            row.gain.high,
            gain_text(row.gain.gain, row.gain.relative_gain) + (f", p {p_text(row.p_value)}" if row.is_model else ""),
            is_baseline=not row.is_model,
            marked=row.is_candidate,
        )
        for row in shown
        if row.gain
    ]
    if not gains:
        return None
    over = "from scratch" if against == "none" else against
    title = f"{examples.domain}, {rows[0].protocol} ranking, {len(examples.users):,} users"
    return transfer_gains(gains, metric=rows[0].metric, over=over, title=title)


# --- reuse ---------------------------------------------


def _check_candidate(
    config: EvaluateConfig, chosen: Sequence[EvaluatedModel], settings: Sequence[PretrainConfig]
) -> None:
    """Raises ConfigError for a candidate that is no label of the models."""
    labels = [_label(named, own) for named, own in zip(chosen, settings, strict=True)]
    if config.candidate is not None and config.candidate not in labels:
        raise ConfigError(
            f"candidate: expected a label of the models ({', '.join(dict.fromkeys(labels))}), found "
            f"{config.candidate!r}; mend the name"
        )


def _label(named: EvaluatedModel, settings: PretrainConfig) -> str:
    return named.label or str(getattr(settings, "transfer", settings.name))


def _identity(config: EvaluateConfig, chosen: Sequence[EvaluatedModel], release: Release) -> str:
    """Hash of models, data and `against`: only an evaluation of the same may replace this one."""
    models = [[str(Path(model.model).resolve()), model.label, model.seed] for model in chosen]
    text = json.dumps([models, release.lake, config.split, config.domain, config.part, config.against])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _name(
    config: EvaluateConfig, chosen: Sequence[EvaluatedModel], settings: Sequence[PretrainConfig], identity: str
) -> str:
    """After the run of the only model, or the labels of several; numbered where another evaluation has that name."""
    labels = list(dict.fromkeys(_label(named, own) for named, own in zip(chosen, settings, strict=True)))
    about = settings[0].name.replace("/", "-") if len(chosen) == 1 else "-".join(labels)[:60]
    base = f"evaluate-{about}"

    def is_free(name: str) -> bool:
        summary = Path(config.output) / name / "evaluation" / SUMMARY
        return not summary.is_file() or _read_summary(summary).get("of") == identity

    return next(name for name in itertools.chain([base], (f"{base}-{n}" for n in itertools.count(2))) if is_free(name))


def _read_summary(summary: Path) -> dict[str, Any]:
    """Empty where it is missing or damaged."""
    try:
        found: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _key(config: EvaluateConfig, hashes: Sequence[str], versions: dict[str, int]) -> str:
    """Of everything that the results depend on."""
    settings = config.model_dump(mode="json", exclude={"tracking", "runtime", "output", "name"})
    predictions = json.dumps([settings, list(hashes), versions, code_hash("trainer.recipes.evaluate")], sort_keys=True)
    return hashlib.sha256(predictions.encode()).hexdigest()[:32]


def _done(folder: Path, key: str) -> EvaluationReport | None:
    summary = _read_summary(folder / SUMMARY)
    try:
        text = (folder / TABLE).read_text(encoding="utf-8").rstrip("\n")
    except (OSError, ValueError):
        return None
    if summary.get("key") != key or not (folder / USERS).is_file():
        return None
    return EvaluationReport(folder, summary["rows"], text, skipped=True, run_id=summary.get("run", ""))
