"""Batch recommendations: a domain's k best items for every user, in the Delta table `recommendations`.

`recommendation_rows` scores them, by the registered model, its `companion` and, where there is one, an attention over
`friends`. `model_version` says which model a row is from. One commit replaces all of the domain's partitions or none.
It records its inputs: a rerun on the same inputs does nothing.
"""

import datetime as dt
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from trainer.inference.model_folder import MANIFEST, TrainedModel, load_model, model_hash
from trainer.recipes.changed_users import RULES, ChangedUsers, HistoryRows, changed_users, recorded_rules
from trainer.recipes.recommendation_rows import HistorySource, Models, kept_rows, microseconds, progress, score_users
from trainer.registry import COMPANION, Registry, Version
from trainer.social.friends_folder import FriendsModel, load_friends, on_release

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
    trained_model, _ = models.own
    table = tables.TABLES[trained_model.config.task.needs.table]
    for one, _ in models.networks:
        one.scorer(clicks=True)  # refuses a model that ranks no items
    own = trained_model.config.data
    predicts = own.predicted or own.domain
    split, domain = config.split or own.split, config.domain or predicts
    reads = own.domain if domain == predicts else domain  # rows are of what is predicted, whatever is read for it
    release = pin(config.lake or trained_model.lake, config.release)
    models = _of_release(models, release)
    num_users = open_dataset(table.name, release, split, reads).num_rows
    if DOMAIN_ALL in domains_with_sequences(release, split):
        num_users = SequenceDataset(release, split, DOMAIN_ALL).num_rows
    for one, by in models.networks:
        if one.config.reads_times:
            release.require_times(tables.SEQUENCES, by)
    source = HistorySource(
        release,
        split,
        reads,
        models.companion is not None or reads == DOMAIN_ALL,
        table,
        event_types=any(one.event_types for one, _ in models.networks),
        times=any(one.config.reads_times for one, _ in models.networks),
        num_users=num_users,
        friends=models.friends is not None,
        encoders=_encoders(trained_model),
    )
    if config.time is None and _reads_request_time(models):
        config = replaced(config, time=dt.datetime.now(dt.UTC))
    with spark_io.writing(release.lake, tables.RECOMMENDATIONS, wait_seconds=config.wait_seconds):
        return _renew(config, models, source, domain)


def _renew(config: RecommendConfig, models: Models, source: HistorySource, domain: str) -> Result:
    """Write the domain's rows, unless the table holds them already. Only the lake's writer may."""
    release, (trained_model, label), num_users = source.release, models.own, source.num_users
    app, identity = f"recommend/{domain}", _identity(config, models, source, domain)
    recorded = spark_io.transactions(release.lake, tables.RECOMMENDATIONS, [app, identity])
    if app in recorded and recorded.get(identity) == recorded[app]:
        version = spark_io.current_version(release.lake, tables.RECOMMENDATIONS)
        print(f"recommend: unchanged, the table at {_place(release)} has the rows of {label}, release {release.number}")
        tracking.settle(config.tracking)
        return Result(num_users, 0, version or 0, False, 0.0, _users_by_model(release.lake, domain))
    _refuse_replacement(config, label, release, domain)
    changed = _changed(config, models, source, domain)
    if changed is not None:
        source = replace(source, only=changed.users, num_users=len(changed.users))
    by = tracking.model_link(label, trained_model.hash)
    beside = {"companion": models.companion, "friends": models.friends}
    others = {role: other for role, other in beside.items() if other is not None}
    for role, (other, name) in others.items():
        whom = {"companion": "users without an item that it knows", "friends": "those whose friends alone have one"}[
            role
        ]
        by += f", and by {tracking.model_link(name, other.hash)} for {whom}"
    requested = f", requested at {config.time}" if _reads_request_time(models) else ""
    description = (
        f"Top {config.k} items of domain {domain} for {num_users:,} users{requested}, by {by}; release "
        f"{release.number} of `{redact(release.lake)}`."
    )
    read = [source.table.name, tables.ITEMS.name, tables.USERS.name]
    with tracking.start_run(config.tracking, name=config.name, resolved=config) as tracked:
        tracked.log_release(release, tables=read)
        tracked.describe(description)
        tracked.set_tags(
            {"graftrec.recipe": "recommend", "graftrec.model_version": label, "graftrec.hash": trained_model.hash}
            | {f"graftrec.{role}": name for role, (_, name) in others.items()}
        )
        number = recorded.get(app, 0) + 1
        result = _write(config, models, source, domain, (app, identity, number), changed)
        speed = result.users / max(result.seconds, 1e-9)
        tracked.log_metrics(
            {"users": result.users, "rows": result.rows, "seconds": result.seconds, "users_per_second": speed}
            | {f"{role}_users": result.by_model.get(name, 0) for role, (_, name) in others.items()}
            | (
                {}
                if changed is None
                else {"changed_users": len(changed.users), "changed_buckets": len(changed.buckets)}
            )
        )
    if changed is not None:
        print(
            f"recommend: histories of {len(changed.users):,} users in {len(changed.buckets):,} buckets have changed "
            f"since release {changed.since}; the rows of all others stay"
        )
    by_others = "".join(f", {result.by_model.get(name, 0):,} of them by {name}" for _, name in others.values())
    print(
        f"recommend: top {config.k} of {domain} for {result.users:,} users{requested} by {label}{by_others}, release "
        f"{release.number}: {result.rows:,} rows in {result.seconds:.1f} s ({speed:,.0f} users/s); "
        f"{_place(release)} version {result.version}"
    )
    return result


def _models(config: RecommendConfig) -> Models:
    """The model, and what stands beside it, each with its label in `model_version`: "graftrec/3", or
    "unregistered/<hash>" for a folder."""
    folder, label, version = _model(config, config.model)
    own = load_model(folder, users=False), label
    return Models(own, _companion(config, own[0], version), _friends(config, own[0], version))


def _of_release(models: Models, release: Release) -> Models:
    """With what a release has and the models did not see in training."""

    def later(one: TrainedModel) -> TrainedModel:
        return with_release(one, release, read_catalogue(release, one.config.data.domain))

    own, companion, friends = models.own, models.companion, models.friends
    return Models(
        (later(own[0]), own[1]),
        None if companion is None else (later(companion[0]), companion[1]),
        None if friends is None else (on_release(friends[0], release), friends[1]),
    )


def _encoders(trained_model: TrainedModel) -> tuple[str, ...]:
    """Whose vectors of users answer for those without an item."""
    given = trained_model.config.model.user_features
    return given.encoders if given.alone else ()


def _friends(config: RecommendConfig, own: TrainedModel, version: Version | None) -> tuple[FriendsModel, str] | None:
    """The attention over friends beside a model. Raises GraftrecError."""
    found = _beside(config, config.friends, version, Registry.friends)
    if found is None:
        return None
    folder, name = found
    friends = load_friends(folder)
    predicts = own.config.data.answered
    if friends.domain != predicts:
        raise GraftrecError(
            f"friends: expected a model that ranks domain {predicts!r}, found {name}, which ranks {friends.domain!r}; "
            "name another"
        )
    return friends, name


def _companion(
    config: RecommendConfig, trained_model: TrainedModel, version: Version | None
) -> tuple[TrainedModel, str] | None:
    """A model that reads all domains, beside one that reads its own. Raises GraftrecError."""
    if trained_model.config.data.domain == DOMAIN_ALL:
        return None
    found = _beside(config, config.companion, version, Registry.companion)
    if found is None:
        return None
    folder, name = found
    companion = load_model(folder, users=False)
    own, other = trained_model.config, companion.config
    reads_alike = other.task.needs == own.task.needs
    if not reads_alike and config.companion is None:  # the alias is for versions that read other histories
        return None
    if not reads_alike or other.data.domain != DOMAIN_ALL or other.data.answered != own.data.answered:
        raise GraftrecError(
            f"expected a companion that reads domain {DOMAIN_ALL!r} and predicts {own.data.answered!r}, from "
            f"{own.task.needs.table}, found {name}, which reads {other.data.domain!r} and predicts "
            f"{other.data.answered!r}, from {other.task.needs.table}; name another, or move the alias {COMPANION!r}"
        )
    return companion, name


def _beside(
    config: RecommendConfig,
    named: str | None,
    version: Version | None,
    of_version: Callable[[Registry, Version], Version | None],
) -> tuple[Path, str] | None:
    """Folder and label of what stands beside a model: as named, else what the registry has for the model's version."""
    if named is not None:
        folder, label, _ = _model(config, named)
        return folder, label
    if version is None:
        return None
    registry = Registry(config.registered_model)
    found = of_version(registry, version)
    return None if found is None else (registry.folder(found), found.label)


def _model(config: RecommendConfig, named: str) -> tuple[Path, str, Version | None]:
    """The folder, label and version (of a folder: None) of a model by alias, number or folder."""
    if (Path(named) / MANIFEST).is_file() or "/" in named:
        return Path(named), f"{UNREGISTERED}{model_hash(named)[:12]}", None
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
    return any(trained_model.config.reads_request_time for trained_model, _ in models.networks)


def _identity(config: RecommendConfig, models: Models, source: HistorySource, domain: str) -> str:
    """A hash of everything that the rows depend on."""
    release = source.release
    read = dict.fromkeys(table.name for table in (source.table, tables.SEQUENCES, tables.USERS))
    read |= {tables.SOCIAL.name: None} if source.friends else {}
    read |= {tables.FEATURES.name: None} if source.encoders else {}
    versions = [release.versions.get(name) for name in read]
    examples = [(one.hash, label) for one, label in models.all]
    parts = [examples, release.number, versions, source.split, domain, config.k, code_hash("trainer.recipes.recommend")]
    if _reads_request_time(models):
        parts.append(microseconds(config))
    return f"recommend/{domain}/{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def _rules(config: RecommendConfig, models: Models, source: HistorySource, domain: str) -> str:
    """A hash of all that decides on a user's rows besides its history; "" where more than that does: rows depend on the
    time of the request, on friends, on vectors of the release."""
    if _reads_request_time(models) or source.friends or source.encoders:
        return ""
    examples = [(one.hash, label) for one, label in models.all]
    parts = [
        examples,
        source.split,
        source.reads,
        source.reads_all,
        source.table.name,
        source.event_types,
        source.times,
    ]
    parts += [domain, config.k, code_hash("trainer.recipes.recommend")]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _changed(config: RecommendConfig, models: Models, source: HistorySource, domain: str) -> ChangedUsers | None:
    """Whose rows are to be made, where only some are."""
    rules = _rules(config, models, source, domain)
    if not config.changed_only or not rules:
        return None
    read = [HistoryRows(source.table, source.split, DOMAIN_ALL if source.reads_all else source.reads)]
    if DOMAIN_ALL in domains_with_sequences(source.release, source.split):
        read.append(HistoryRows(tables.SEQUENCES, source.split, DOMAIN_ALL, only_who=True))
    return changed_users(source.release, domain, rules, read)


def _place(release: Release) -> str:
    return spark_io.table_uri(release.lake, tables.RECOMMENDATIONS)


def _write(
    config: RecommendConfig,
    models: Models,
    source: HistorySource,
    domain: str,
    transaction: tuple[str, str, int],
    changed: ChangedUsers | None,
) -> Result:
    release, (app, identity, number) = source.release, transaction
    start = time.monotonic()
    metadata = {"job": "recommend", "model_version": models.own[1], "release": str(release.number), "k": str(config.k)}
    for role, other in (("companion", models.companion), ("friends", models.friends)):
        if other is not None:
            metadata[role] = other[1]
    rules = _rules(config, models, source, domain)
    metadata[RULES] = recorded_rules(release.lake, domain, rules, release.number)
    scope: dict[str, Sequence[Any]] = {"domain": [domain]}
    if changed is not None:
        scope["bucket"] = changed.buckets
    commit = spark_io.Commit(
        mode="partitions" if changed is None or changed.buckets else "append",
        app=app,
        app_version=number,
        metadata=metadata,
        partition_scope=scope if changed is None or changed.buckets else None,
        transactions={identity: number},
    )
    if changed is not None and not changed.buckets:
        written = spark_io.commit_files(release.lake, tables.RECOMMENDATIONS, [], commit)
    else:
        spark = spark_session(config.spark, name="graftrec recommend")
        with progress(spark, source.num_users) as count:
            rows = score_users(spark, source, models, config, domain, count)
            if changed is not None:
                rows = rows.unionByName(kept_rows(spark, source, domain, changed.buckets))
            written = spark_io.write(spark, rows, release.lake, tables.RECOMMENDATIONS, commit)
    if (
        not written.committed
        and spark_io.transactions(release.lake, tables.RECOMMENDATIONS, [identity]).get(identity) != number
    ):
        raise RunAgain(
            f"another run has written recommendations of {domain} meanwhile: these are not written; run again"
        )
    seconds = time.monotonic() - start
    by_model = _users_by_model(release.lake, domain)
    num_users = sum(by_model.values()) if source.friends or source.encoders else source.num_users
    return Result(num_users, written.rows, written.version, written.committed, seconds, by_model)
