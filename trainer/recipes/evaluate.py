"""Recipe: score model folders on one pinned release, beside the simple baselines, and compare them.

    python -m trainer evaluate --config evaluate/default --model runs/finetune/model

Writes to <output>/<name>/evaluation: users.parquet (every user's metrics under every protocol and convention),
summary.json (means, comparisons, snapshots, models), table.txt and gains.png. An unchanged rerun is skipped. Without a
name the folder is named after the models, and an evaluation of other models in that place is kept.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from etl.settings import ConfigError, replaced
from trainer import tracking
from trainer.code_hash import code_hash
from trainer.config import EvaluateConfig, EvaluatedModel, NextItemConfig, PretrainConfig
from trainer.data.release import Release, pin
from trainer.evaluation import card
from trainer.evaluation.class_prediction import CONFUSIONS
from trainer.evaluation.click_prediction import RELIABILITY
from trainer.evaluation.comparison import Key, Results, Row, compare_table
from trainer.evaluation.evaluator import Evaluator, Question
from trainer.evaluation.evaluators import evaluators_of
from trainer.evaluation.item_prediction import GAINS
from trainer.evaluation.outside import OutsideRanks, read_ranks
from trainer.evaluation.scorers import label_of
from trainer.inference.model_folder import TrainedModel, config_of, load_model, model_hash
from trainer.parallel.distributed import join
from trainer.registry import descriptions

USERS, SUMMARY, TABLE = "users.parquet", "summary.json", "table.txt"
PICTURES = (GAINS, CONFUSIONS, RELIABILITY)
SMALL = "small-"  # begins the name of a picture's copy in MLflow, for descriptions


@dataclass(frozen=True)
class EvaluationReport:
    """Where the results lie, and the table."""

    folder: Path
    rows: list[dict[str, Any]]  # of the comparison, as in summary.json
    text: str
    skipped: bool  # nothing had changed since the last run
    run_id: str = ""  # of the MLflow run that made them; "" where that is unknown
    cards: Sequence[Mapping[str, Any]] = ()  # protocol cards, as in summary.json


def run(config: EvaluateConfig) -> EvaluationReport:
    """Evaluate as configured. Raises GraftrecError (a model, lake, release or protocol that is not there…)."""
    chosen = _chosen(config)
    first = load_model(chosen[0].model) if chosen else None
    task = first.config.task if first else NextItemConfig()
    files = [read_ranks(place) for place in config.ranks]
    release = _release(config, first)
    settings = [config_of(Path(model.model))[0] for model in chosen]
    labels = [_label(named, own) for named, own in zip(chosen, settings, strict=True)]
    labels = list(dict.fromkeys([*labels, *(label for file in files for label, _ in file.keys)]))
    _check_candidate(config, labels)
    identity = _identity(config, chosen, release)
    named = settings[0].name.replace("/", "-") if len(chosen) == 1 and not files else "-".join(labels)[:60]
    config = replaced(config, name=config.name or _name(config, named, identity))
    assert config.name is not None
    folder = Path(config.output) / config.name / "evaluation"
    hashes = [*(model_hash(model.model) for model in chosen), *(file.sha256 for file in files)]
    key = _key(config, hashes, release.versions)
    if (done := _done(folder, key)) is not None:
        print(f"evaluate: nothing has changed since the last run, skipped ({folder})")
        print(done.text)
        tracking.note_reused(config.name, done.run_id)
        tracking.settle(config.tracking)
        return done
    with (
        _noted(folder),
        tracking.start_run(
            config.tracking,
            name=config.name,
            resolved=config,
            tags={"graftrec.recipe": "evaluate"},
            must_record=True,
        ) as run,
    ):
        read = [task.needs.table, "items", "users", "domains", "negatives"]
        run.log_release(release, context="evaluation", tables=read)
        device = str(join(config.runtime).device)
        models = [load_model(model.model, device=device) for model in chosen]
        found, remarks = _evaluated(Question(config, models, release), chosen, files)
        # What the first metric is of stands first; else a task's leading evaluator has the picture and the summary.
        wanted = config.metrics[0].partition("/")[0] if config.metrics else ""
        found.sort(key=lambda one: one[0].name != wanted)
        evaluator, results = found[0] if found[0][0].name == wanted else _leading(found)[-1]
        compared = [
            (one, compare_table(one, against=config.against, candidate=None if place else config.candidate))
            for place, (_, one) in enumerate(found)
        ]
        own = next(rows for one, rows in compared if one is results)
        rows = [row for _, rows in compared for row in rows]
        cards = _cards(config, chosen, models, found)
        text = "\n\n".join(one.text(rows, against=config.against) for one, rows in compared)
        text = "\n".join([text, *remarks, "", *card.lines(cards)])
        print(text)
        _begin(folder)
        _write_users((table for _, one in _leading(found) for table in one.tables()), folder / USERS)
        (folder / TABLE).write_text(text + "\n", encoding="utf-8")
        drawn = _draw(results, own, config.against, folder, run)
        data = [asdict(row) for row in rows]
        about = {
            "lake": release.lake,
            "release": release.number,
            "versions": release.versions,
            "split": evaluator.split,
            "domain": evaluator.domain,
            "part": evaluator.part,
            "against": config.against,
            "cards": cards,
        }
        card.record(run, cards)
        summary = {"key": key, "of": identity, "run": run.id, "rows": data} | about | results.summary()
        _keep(summary, folder, run)
        report = EvaluationReport(folder, data, text, skipped=False, run_id=run.id, cards=cards)
        where = f"{results.num_users:,} users of domain {evaluator.domain}, split {evaluator.split}"
        where = f"{where}, release {release.number}"
        _describe(run, report, config.part, where=where, drawn=drawn, under=card.lines(cards)[0])
        shown = {row.metric for row in own}
        for model, of_model in zip(models, results.scorers, strict=False):
            if model.config.data.answered == evaluator.domain:
                run.log_model_metrics(
                    model.hash, _numbers(results, of_model, config.part, shown), release, task.needs.table
                )
    print(f"evaluate: {config.name}: results in {folder}")
    return report


def _evaluated(
    question: Question, chosen: Sequence[EvaluatedModel], files: Sequence[OutsideRanks]
) -> tuple[list[tuple[Evaluator, Results]], list[str]]:
    """What every evaluator of the task finds, the leading one first; and notes on other software's scores."""
    found: list[tuple[Evaluator, Results]] = []
    config, models = question.config, question.models
    notes: list[str] = []
    for kind in evaluators_of(question.task):
        for evaluator in kind.read(question):
            evaluator.check_cards(models, across=config.across)
            scorers = [
                evaluator.scorer(model, label=named.label, seed=named.seed)
                for named, model in zip(chosen, models, strict=True)
            ]
            if files:
                outside, notes = evaluator.outside(files)
                scorers += outside
            if config.baselines.enabled:
                scorers += evaluator.baselines(config.baselines)
            found.append((evaluator, evaluator.predict(scorers)))
    return found, notes


def _cards(
    config: EvaluateConfig,
    chosen: Sequence[EvaluatedModel],
    models: Sequence[TrainedModel],
    found: Sequence[tuple[Evaluator, Results]],
) -> list[dict[str, Any]]:
    """The protocol cards of all tables."""
    entries: list[dict[str, Any]] = []
    for evaluator, results in found:
        of_label = {
            _label(one, model.config): evaluator.card_of_model(model.config, model.lake, model.release)
            for one, model in zip(chosen, models, strict=True)
        }
        entries += evaluator.cards(of_label, results)
    return list({entry["hash"]: entry for entry in entries}.values())


def _leading(found: Sequence[tuple[Evaluator, Results]]) -> list[tuple[Evaluator, Results]]:
    """The results of the first evaluator, whose users' numbers are kept: rows of one table."""
    return [(evaluator, results) for evaluator, results in found if type(evaluator) is type(found[0][0])]


def _draw(results: Results, rows: Sequence[Row], against: str, folder: Path, run: tracking.Run) -> str:
    """Write and log the picture; gives its name, "" where there is none."""
    if (drawn := results.figure(rows, against=against)) is None:
        return ""
    name, picture = drawn
    picture.savefig(folder / name, dpi=130)
    run.log_figure(picture, f"evaluation/{name}")
    return name


def _numbers(results: Results, key: Key, part: str, shown: set[str]) -> dict[str, float]:
    """The metrics of one model that the table shows, by name."""
    return {
        "/".join([part, *([protocol] if protocol in results.protocols else []), metric]): value
        for protocol, numbers in results.means(key).items()
        for metric, value in numbers.items()
        if metric in shown
    }


def _describe(
    run: tracking.Run, report: EvaluationReport, part: str, *, where: str, under: str, drawn: str = ""
) -> None:
    """Log the comparison as metrics, and as a table with its picture in the run's description."""
    run.log_metrics(descriptions.result_metrics(report.rows, part))
    picture = f"evaluation/{SMALL}{drawn}" if drawn else ""
    if drawn:
        run.log_thumbnail(report.folder / drawn, picture)
    heading = f"{part.capitalize()} results of {where}. Under {under}."
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
        drawn = next((name for name in PICTURES if (report.folder / name).is_file()), "")
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


def _chosen(config: EvaluateConfig) -> list[EvaluatedModel]:
    chosen = [*([EvaluatedModel(model=config.model)] if config.model else []), *config.models]
    if not chosen and not config.ranks:
        raise ConfigError(
            "expected a model to evaluate, found none; give --model FOLDER, `models` in the configuration, or --ranks "
            "FILE"
        )
    return chosen


def _release(config: EvaluateConfig, first: TrainedModel | None) -> Release:
    """The one to evaluate on. Raises ConfigError where nothing says which."""
    if first is not None:
        return pin(config.lake or first.lake, config.release if config.release or config.lake else first.release)
    given = {"lake": config.lake, "split": config.split, "domain": config.domain}
    if lacking := [name for name, value in given.items() if value is None]:
        raise ConfigError(
            f"ranks: expected lake, split and domain beside them where no model of ours says which, found no "
            f"{', no '.join(lacking)}; give {' '.join(f'--{name} …' for name in lacking)}"
        )
    assert config.lake is not None
    return pin(config.lake, config.release)


def _write_users(tables: Iterator[pa.Table], path: Path) -> None:
    """Per-user metrics, or predictions, as Parquet."""
    unfinished = path.with_name(path.name + ".new")
    writer: pq.ParquetWriter | None = None
    for table in tables:
        writer = writer or pq.ParquetWriter(unfinished, table.schema, compression="zstd")
        writer.write_table(table)
    if writer is not None:
        writer.close()
        unfinished.replace(path)


# --- reuse ---------------------------------------------


def _check_candidate(config: EvaluateConfig, labels: Sequence[str]) -> None:
    """Raises ConfigError for a candidate that is no label of the models."""
    if config.candidate is not None and config.candidate not in labels:
        raise ConfigError(
            f"candidate: expected a label of the models ({', '.join(labels)}), found {config.candidate!r}; mend the "
            "name"
        )


def _label(named: EvaluatedModel, settings: PretrainConfig) -> str:
    return named.label or label_of(settings)


def _identity(config: EvaluateConfig, chosen: Sequence[EvaluatedModel], release: Release) -> str:
    """Hash of models, data and `against`: only an evaluation of the same may replace this one."""
    models = [[str(Path(model.model).resolve()), model.label, model.seed] for model in chosen]
    parts = [models, release.lake, config.split, config.domain, config.part, config.against]
    text = json.dumps([*parts, *([[str(Path(place).resolve()) for place in config.ranks]] if config.ranks else [])])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _name(config: EvaluateConfig, about: str, identity: str) -> str:
    """`about`: the run of the only model, or the labels of several. Numbered where another evaluation has that name."""
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
    run, cards = summary.get("run", ""), summary.get("cards", ())
    return EvaluationReport(folder, summary["rows"], text, skipped=True, run_id=run, cards=cards)
