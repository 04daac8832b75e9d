"""Batch recommendations: a domain's k best items for every user, in the Delta table `recommendations`.

`recommendation_rows` scores them, by the registered model and its `companion`. `model_version` says which model a row
is from. One commit replaces all of the domain's partitions or none. It records its inputs: a rerun on the same inputs
does nothing.
"""

import datetime as dt
import hashlib
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from etl import tables
from etl.lake import spark_io
from etl.lake.file_reader import open_parquet
from etl.lake.snapshots import snapshot_files
from etl.redaction import redact
from etl.session import spark_session
from etl.settings import GraftrecError, RunAgain, replaced
from etl.tables import DOMAIN_ALL
from trainer import tracking
from trainer.code_hash import code_hash
from trainer.config import RecommendConfig
from trainer.data.baskets import open_dataset
from trainer.data.catalogue import read_catalogue
from trainer.data.release import Release, domains_with_sequences, pin
from trainer.data.sequences import SequenceDataset
from trainer.inference.later_items import with_release
from trainer.inference.model_folder import MANIFEST, TrainedModel, load_model
from trainer.recipes.recommendation_rows import HistorySource, Models, microseconds, progress, score_users
from trainer.registry import COMPANION, Registry, Version

UNREGISTERED = "unregistered/"  # what labels of model folders begin with


@dataclass(frozen=True)
class Result:
    """What was written: users, rows, the table's version; `committed` False where the table held it already."""

    users: int
    rows: int
    version: int
    committed: bool
    seconds: float
    by_model: dict[str, int]  # users that each model version has rows for


def run(config: RecommendConfig) -> Result:
    """The recipe `recommend`. Raises GraftrecError."""
    models = _models(config)
    trained_model = models[0][0]
    companion = models[1][1] if len(models) > 1 else ""
    table = tables.TABLES[trained_model.config.task.needs.table]
    for one, _ in models:
        one.scorer(clicks=True)  # refuses a model that ranks no items
    own = trained_model.config.data
    predicts = own.predicted or own.domain
    split, domain = config.split or own.split, config.domain or predicts
    reads = own.domain if domain == predicts else domain  # rows are of what is predicted, whatever is read for it
    release = pin(config.lake or trained_model.lake, config.release)
    models = [(with_release(one, release, read_catalogue(release, one.config.data.domain)), by) for one, by in models]
    trained_model = models[0][0]
    num_users = open_dataset(table.name, release, split, reads).num_rows
    if DOMAIN_ALL in domains_with_sequences(release, split):
        num_users = SequenceDataset(release, split, DOMAIN_ALL).num_rows
    for one, by in models:
        if one.config.reads_times:
            release.require_times(tables.SEQUENCES, by)
    source = HistorySource(
        release,
        split,
        reads,
        companion != "" or reads == DOMAIN_ALL,
        table,
        event_types=any(one.event_types for one, _ in models),
        times=any(one.config.reads_times for one, _ in models),
        num_users=num_users,
    )
    if config.time is None and _reads_request_time(models):
        config = replaced(config, time=dt.datetime.now(dt.UTC))
    with spark_io.writing(release.lake, tables.RECOMMENDATIONS, wait_seconds=config.wait_seconds):
        return _renew(config, models, source, domain)


def _renew(config: RecommendConfig, models: Models, source: HistorySource, domain: str) -> Result:
    """Write the domain's rows, unless the table holds them already. Only the lake's writer may."""
    release, (trained_model, label), num_users = source.release, models[0], source.num_users
    companion = models[1][1] if len(models) > 1 else ""
    app, identity = f"recommend/{domain}", _identity(config, models, source, domain)
    recorded = spark_io.transactions(release.lake, tables.RECOMMENDATIONS, [app, identity])
    if app in recorded and recorded.get(identity) == recorded[app]:
        version = spark_io.current_version(release.lake, tables.RECOMMENDATIONS)
        print(f"recommend: unchanged, the table at {_place(release)} has the rows of {label}, release {release.number}")
        tracking.settle(config.tracking)
        return Result(num_users, 0, version or 0, False, 0.0, _users_by_model(release.lake, domain))
    _refuse_replacement(config, label, release, domain)
    by = tracking.model_link(label, trained_model.hash)
    if companion:
        by += f", and by {tracking.model_link(companion, models[1][0].hash)} for users without an item that it knows"
    asked = f", requested at {config.time}" if _reads_request_time(models) else ""
    description = (
        f"Top {config.k} items of domain {domain} for {num_users:,} users{asked}, by {by}; release {release.number} of "
        f"`{redact(release.lake)}`."
    )
    read = [source.table.name, tables.ITEMS.name, tables.USERS.name]
    with tracking.start_run(config.tracking, name=config.name, resolved=config) as tracked:
        tracked.log_release(release, tables=read)
        tracked.describe(description)
        tracked.set_tags(
            {"graftrec.recipe": "recommend", "graftrec.model_version": label, "graftrec.hash": trained_model.hash}
            | ({"graftrec.companion": companion} if companion else {})
        )
        number = recorded.get(app, 0) + 1
        result = _write(config, models, source, domain, (app, identity, number))
        speed = result.users / max(result.seconds, 1e-9)
        tracked.log_metrics(
            {"users": result.users, "rows": result.rows, "seconds": result.seconds, "users_per_second": speed}
            | ({"companion_users": result.by_model.get(companion, 0)} if companion else {})
        )
    by_companion = f", {result.by_model.get(companion, 0):,} of them by {companion}" if companion else ""
    print(
        f"recommend: top {config.k} of {domain} for {result.users:,} users{asked} by {label}{by_companion}, release "
        f"{release.number}: {result.rows:,} rows in {result.seconds:.1f} s ({speed:,.0f} users/s); "
        f"{_place(release)} version {result.version}"
    )
    return result


def _models(config: RecommendConfig) -> list[tuple[TrainedModel, str]]:
    """The model, and its companion if it has one, each with its label in `model_version`: "graftrec/3", or
    "unregistered/<hash>" for a folder."""
    folder, label, version = _model(config, config.model)
    trained_model = load_model(folder, users=False)
    if trained_model.config.data.domain == DOMAIN_ALL:
        return [(trained_model, label)]
    if config.companion is not None:
        folder, name, _ = _model(config, config.companion)
    else:
        registry = Registry(config.registered_model) if version is not None else None
        found = registry.companion(version) if registry is not None and version is not None else None
        if registry is None or found is None:
            return [(trained_model, label)]
        folder, name = registry.folder(found), found.label
    companion = load_model(folder, users=False)
    own, other = trained_model.config, companion.config
    reads_alike = other.task.needs == own.task.needs
    if not reads_alike and config.companion is None:  # the alias is for versions that read other histories
        return [(trained_model, label)]
    if not reads_alike or other.data.domain != DOMAIN_ALL or other.data.answered != own.data.answered:
        raise GraftrecError(
            f"expected a companion that reads domain {DOMAIN_ALL!r} and predicts {own.data.answered!r}, from "
            f"{own.task.needs.table}, found {name}, which reads {other.data.domain!r} and predicts "
            f"{other.data.answered!r}, from {other.task.needs.table}; name another, or move the alias {COMPANION!r}"
        )
    return [(trained_model, label), (companion, name)]


def _model(config: RecommendConfig, named: str) -> tuple[Path, str, Version | None]:
    """The folder, label and version (of a folder: None) of a model by alias, number or folder."""
    if (Path(named) / MANIFEST).is_file() or "/" in named:
        return Path(named), f"{UNREGISTERED}{load_model(named, users=False).hash[:12]}", None
    registry = Registry(config.registered_model)
    version = registry.version(named)
    if config.domain is not None:  # a patch beside it may be for that domain
        version = registry.for_domain(version, config.domain)
    return registry.folder(version), version.label, version


def _refuse_replacement(config: RecommendConfig, label: str, release: Release, domain: str) -> None:
    """Raises GraftrecError where an unregistered model would replace what a registered version recommends."""
    if config.replace or not label.startswith(UNREGISTERED):
        return
    registered = [name for name in _users_by_model(release.lake, domain) if not name.startswith(UNREGISTERED)]
    if registered:
        raise GraftrecError(
            f"expected no recommendations of {domain} by a registered version, which a model folder would replace, "
            f"found those of {', '.join(sorted(registered))} at {_place(release)}; register and promote the model, or "
            "give --replace true"
        )


def _users_by_model(lake: str, domain: str) -> dict[str, int]:
    """Users of a domain that have rows in the table now, by model version."""
    found: Counter[str] = Counter()
    if spark_io.current_version(lake, tables.RECOMMENDATIONS) is None:
        return {}
    for file in snapshot_files(lake, tables.RECOMMENDATIONS, None, {"domain": [domain]}):
        with open_parquet(lake, tables.RECOMMENDATIONS, file.path) as opened:
            for batch in opened.iter_batches(columns=["rank", "model_version"]):
                best = batch.filter(pa.compute.equal(batch["rank"], 1))
                for counted in best["model_version"].cast(pa.string()).value_counts().to_pylist():
                    found[counted["values"]] += counted["counts"]
    return dict(found)


def _reads_request_time(models: Models) -> bool:
    return any(trained_model.config.reads_request_time for trained_model, _ in models)


def _identity(config: RecommendConfig, models: Models, source: HistorySource, domain: str) -> str:
    """A hash of everything that the rows depend on."""
    release = source.release
    read = dict.fromkeys(table.name for table in (source.table, tables.SEQUENCES, tables.USERS))
    versions = [release.versions.get(name) for name in read]
    examples = [(trained_model.hash, label) for trained_model, label in models]
    parts = [examples, release.number, versions, source.split, domain, config.k, code_hash("trainer.recipes.recommend")]
    if _reads_request_time(models):
        parts.append(microseconds(config))
    return f"recommend/{domain}/{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def _place(release: Release) -> str:
    return spark_io.table_uri(release.lake, tables.RECOMMENDATIONS)


def _write(
    config: RecommendConfig, models: Models, source: HistorySource, domain: str, transaction: tuple[str, str, int]
) -> Result:
    release, (app, identity, number) = source.release, transaction
    start = time.monotonic()
    spark = spark_session(config.spark, name="graftrec recommend")
    metadata = {"job": "recommend", "model_version": models[0][1], "release": str(release.number), "k": str(config.k)}
    if len(models) > 1:
        metadata["companion"] = models[1][1]
    with progress(spark, source.num_users) as count:
        rows = score_users(spark, source, models, config, domain, count)
        written = spark_io.write(
            spark,
            rows,
            release.lake,
            tables.RECOMMENDATIONS,
            spark_io.Commit(
                mode="partitions",
                app=app,
                app_version=number,
                metadata=metadata,
                partition_scope={"domain": [domain]},
                transactions={identity: number},
            ),
        )
    if (
        not written.committed
        and spark_io.transactions(release.lake, tables.RECOMMENDATIONS, [identity]).get(identity) != number
    ):
        raise RunAgain(
            f"another run has written recommendations of {domain} meanwhile: these are not written; run again"
        )
    seconds = time.monotonic() - start
    by_model = _users_by_model(release.lake, domain)
    return Result(source.num_users, written.rows, written.version, written.committed, seconds, by_model)
