"""Batch recommendations: a domain's k best items for every user, in the Delta table `recommendations`.

Executors score in parallel, on one thread each: a Python worker loads the model folder, which Spark ships to it, once.
Its memory is that of the model, a batch of users and a block of their scores. A user's whole known sequence is the
input, and its items are not recommended. Users without an item that the model knows, e.g. those who are new in the
domain, get the recommendations of the registered model's `companion`, which reads all domains; if there is none, or it
knows none of their items either, they get the popular items. `model_version` says which model a row is from. The rows
equal the served model's answers, up to the last bits.

One commit replaces all of the domain's partitions or none. It records its inputs: a rerun on the same inputs does
nothing.
"""

import atexit
import functools
import hashlib
import shutil
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyspark import SparkFiles
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from tqdm import tqdm

from etl import tables
from etl.lake import spark_io
from etl.lake.file_reader import open_parquet
from etl.lake.snapshots import snapshot_files
from etl.redaction import redact
from etl.session import engine_of, spark_session
from etl.settings import GraftrecError, RunAgain
from etl.tables import DOMAIN_ALL, UNK, Table
from trainer import tracking
from trainer.arrays import IntArray
from trainer.code_hash import code_hash
from trainer.config import RecommendConfig
from trainer.data.baskets import open_dataset, separated
from trainer.data.events import Column, Events
from trainer.data.release import Release, domains_with_sequences, pin
from trainer.data.sequences import SequenceDataset, event_type_codes
from trainer.inference.model_folder import MANIFEST, USER_IDS, TrainedModel, load_model
from trainer.inference.recommender import TopK
from trainer.inference.scorer import has_items
from trainer.parallel.cores import use_threads
from trainer.registry import COMPANION, Registry, Version

ROWS_SCHEMA = (
    "domain string, bucket int, user string, rank int, item string, score float, model_version string, release long"
)
USERS_PER_TASK = 20_000
UNREGISTERED = "unregistered/"  # what labels of model folders begin with
Models = Sequence[tuple[TrainedModel, str]]  # each with its label: the model, and its companion if there is one


@dataclass(frozen=True)
class Result:
    """What was written: users, rows, the table's version; `committed` False where the table held it already."""

    users: int
    rows: int
    version: int
    committed: bool
    seconds: float
    by_model: dict[str, int]  # users that each model version has rows for


@dataclass(frozen=True)
class _Source:
    """Which histories are read: those in the domain `reads`, or in all domains (`reads_all`)."""

    release: Release
    split: str
    reads: str
    reads_all: bool
    table: Table
    event_types: bool
    num_users: int  # with any event, in whichever domain


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
    num_users = open_dataset(table.name, release, split, reads).num_rows
    if DOMAIN_ALL in domains_with_sequences(release, split):
        num_users = SequenceDataset(release, split, DOMAIN_ALL).num_rows
    kinds = any(one.event_types for one, _ in models)
    source = _Source(release, split, reads, companion != "" or reads == DOMAIN_ALL, table, kinds, num_users)
    with spark_io.writing(release.lake, tables.RECOMMENDATIONS, wait_seconds=config.wait_seconds):
        return _renew(config, models, source, domain)


def _renew(config: RecommendConfig, models: Models, source: _Source, domain: str) -> Result:
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
    description = (
        f"Top {config.k} items of domain {domain} for {num_users:,} users, by {by}; release {release.number} of "
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
        f"recommend: top {config.k} of {domain} for {result.users:,} users by {label}{by_companion}, release "
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


def _identity(config: RecommendConfig, models: Models, source: _Source, domain: str) -> str:
    """A hash of everything that the rows depend on."""
    release = source.release
    read = dict.fromkeys(table.name for table in (source.table, tables.SEQUENCES, tables.USERS))
    versions = [release.versions.get(name) for name in read]
    examples = [(trained_model.hash, label) for trained_model, label in models]
    parts = [examples, release.number, versions, source.split, domain, config.k, code_hash("trainer.recipes.recommend")]
    return f"recommend/{domain}/{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def _place(release: Release) -> str:
    return spark_io.table_uri(release.lake, tables.RECOMMENDATIONS)


def _write(
    config: RecommendConfig, models: Models, source: _Source, domain: str, transaction: tuple[str, str, int]
) -> Result:
    release, (app, identity, number) = source.release, transaction
    start = time.monotonic()
    spark = spark_session(config.spark, name="graftrec recommend")
    shipped = [(_shipped(spark, trained_model), label) for trained_model, label in models]
    metadata = {"job": "recommend", "model_version": models[0][1], "release": str(release.number), "k": str(config.k)}
    if len(models) > 1:
        metadata["companion"] = models[1][1]
    with _progress(spark, source.num_users) as count:
        score = functools.partial(
            _score_batches,
            models=shipped,
            count=count,
            k=config.k,
            batch_size=config.batch_size,
            domain=domain,
            release=release.number,
        )
        rows = _histories(spark, source, config.spark.shuffle_partitions).mapInArrow(score, ROWS_SCHEMA)
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


def _histories(spark: SparkSession, source: _Source, parallel: int) -> DataFrame:
    """raw (user id), index, bucket, items (of `baskets`: a list of each), and, where they are read, times and
    event_types; items are null for users without a history. Spread over enough tasks to keep every core busy."""
    release = source.release

    def read(table: Table, domain: str) -> DataFrame:
        partitions = {"split": [source.split], "domain": [domain]}
        return spark_io.read(spark, release.lake, table, version=release.versions[table.name], partitions=partitions)

    domain = DOMAIN_ALL if source.reads_all else source.reads
    own = _ONE_ROW_A_USER[source.table.name](read(source.table, domain))
    more = ["event_types"] if source.event_types else []
    more += ["times"] if source.reads_all and "times" in own.columns else []
    if "times" not in more and DOMAIN_ALL in domains_with_sequences(release, source.split):
        everyone = read(tables.SEQUENCES, DOMAIN_ALL).select("user", "bucket")
        own = everyone.join(own.drop("bucket"), "user", "left")
    vocabulary = spark_io.read(spark, release.lake, tables.USERS, version=release.versions[tables.USERS.name])
    users = vocabulary.select("index", F.col("user").alias("raw"))
    joined = own.select(F.col("user").alias("index"), "bucket", "items", *more).join(users, "index")
    tasks = max(parallel, -(-source.num_users // USERS_PER_TASK))
    return joined.repartition(tasks, "index").select("raw", "index", "bucket", "items", *more)


def _joined(baskets: DataFrame) -> DataFrame:
    """A user's baskets in one row, as lists of items in order."""
    in_order = F.sort_array(F.collect_list(F.struct("basket", "items")))
    together = baskets.groupBy("user", "bucket").agg(in_order.alias("baskets"))
    return together.select("user", "bucket", F.col("baskets.items").alias("items"))


_ONE_ROW_A_USER: dict[str, Callable[[DataFrame], DataFrame]] = {
    tables.SEQUENCES.name: lambda sequences: sequences,
    tables.BASKETS.name: _joined,
}


# --- in the executors ---------------------------------------------


class _Model:
    """A model folder, ready to score; kept by a worker from task to task."""

    def __init__(self, trained_model: TrainedModel) -> None:
        self.catalogue = trained_model.catalogue
        self.raw_ids = pa.array(trained_model.catalogue.raw_ids, pa.string())
        self.shortlist = TopK(trained_model)
        self.event_types = trained_model.event_types


_loading = threading.Lock()  # Sail's tasks are threads of one process


@functools.lru_cache(maxsize=2)  # the model and its companion
def _loaded(model: str) -> _Model:
    return _Model(load_model(Path(model) if "/" in model else Path(SparkFiles.getRootDirectory()) / model))


def _score_batches(
    batches: Iterator[pa.RecordBatch],
    *,
    models: Sequence[tuple[str, str]],
    count: Any,
    k: int,
    batch_size: int,
    domain: str,
    release: int,
) -> Iterator[pa.RecordBatch]:
    """Top-k rows of the users in `batches` (raw, index, bucket, items). `models`: place and label of the model, and of
    its companion, which scores users of whom only it knows an item."""
    use_threads(1)  # there are as many tasks at once as cores
    with _loading:
        loaded = [(_loaded(place), label) for place, label in models]
    for batch in batches:
        # Users of like lengths together: less padding.
        order = np.argsort(_lengths(batch.column("items")), kind="stable")
        for start in range(0, len(order), batch_size):
            chosen = batch.take(pa.array(order[start : start + batch_size]))
            by_model = [np.ones(len(chosen), bool)]
            if len(loaded) > 1:
                knows, companion_knows = (has_items(_as_histories(chosen, model)) for model, _ in loaded)
                by_companion = ~knows & companion_knows
                by_model = [~by_companion, by_companion]
            for (model, label), users in zip(loaded, by_model, strict=True):
                if users.any():
                    yield _best(model, label, chosen.filter(pa.array(users)), k, domain, release)
        if count is not None:
            count.add(batch.num_rows)


def _best(model: _Model, label: str, chosen: pa.RecordBatch, k: int, domain: str, release: int) -> pa.RecordBatch:
    """Rows of the table RECOMMENDATIONS for the users `chosen`."""
    rows, best = model.shortlist.best(_as_histories(chosen, model), k)
    owner, place = torch.isfinite(best).numpy().nonzero()
    users = pa.array(owner)
    return pa.RecordBatch.from_arrays(
        [
            pa.repeat(domain, len(owner)),
            chosen.column("bucket").take(users),
            chosen.column("raw").take(users),
            pa.array(place + 1, pa.int32()),
            model.raw_ids.take(pa.array(rows[owner, place])),
            pa.array(best.numpy()[owner, place], pa.float32()),
            pa.repeat(label, len(owner)),
            pa.repeat(pa.scalar(release, pa.int64()), len(owner)),
        ],
        names=tables.RECOMMENDATIONS.schema.names,
    )


def _as_histories(batch: pa.RecordBatch, model: _Model) -> Events:
    """The users' items that the model knows, as its rows, by time where there are times: a row of the domain `all` may
    have held-out items at the end."""
    items = batch.column("items")
    if pa.types.is_list(items.type.value_type) or pa.types.is_large_list(items.type.value_type):
        items = _in_a_row(items)
    lengths = _lengths(items)
    rows = model.catalogue.rows(items.flatten().to_numpy(zero_copy_only=False)).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    users = batch.column("index").to_numpy().astype(np.int64)
    columns: dict[str, Column] = {"items": rows}
    if model.event_types:
        kinds = pa.chunked_array([batch.column("event_types")])
        columns["event_types"] = event_type_codes(kinds, lengths, model.event_types)
    if "times" in batch.schema.names:
        columns["times"] = batch.column("times").flatten().to_numpy(zero_copy_only=False)
    found = Events(users, offsets, columns)
    found = found.in_time_order() if "times" in columns else found
    return found.keep(found.items != UNK)


def _lengths(lists: pa.Array) -> IntArray:
    """Of a null list: 0."""
    lengths: IntArray = pa.compute.list_value_length(lists).fill_null(0).to_numpy().astype(np.int64)
    return lengths


def _in_a_row(baskets: pa.ListArray) -> pa.ListArray:
    """Each user's baskets as one list, a SEP behind each."""
    rows, size = separated(baskets.flatten())
    ends = np.concatenate([[0], np.cumsum(size)])
    first = np.concatenate([[0], np.cumsum(_lengths(baskets))])
    return pa.ListArray.from_arrays(pa.array(ends[first], pa.int32()), pa.array(rows))


# --- shipping and progress ---------------------------------------------


def _shipped(spark: SparkSession, trained_model: TrainedModel) -> str:
    """Give executors the model folder, without raw user ids, which they don't need. Returns what `_loaded` finds it by.

    Sail takes no files: it runs in this process, or its server must see the folder under the same path.
    """
    if engine_of(spark) == "sail":
        return str(trained_model.folder.absolute())
    # Kept as long as the session: it fetches the archive whenever an executor begins.
    scratch = Path(tempfile.mkdtemp(prefix="graftrec-model-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    packed_model = scratch / "model.zip"
    with zipfile.ZipFile(packed_model, "w", zipfile.ZIP_STORED) as target:
        for file in sorted(trained_model.folder.iterdir()):
            if file.is_file() and file.name != USER_IDS:
                entry = zipfile.ZipInfo(file.name)  # without a time: the same model is the same archive
                with file.open("rb") as source, target.open(entry, "w", force_zip64=True) as packed:
                    shutil.copyfileobj(source, packed)
    with packed_model.open("rb") as source:
        name = f"model-{hashlib.file_digest(source, 'sha256').hexdigest()[:32]}.zip"  # a session takes a name once
    archive = str(packed_model.rename(scratch / name))
    if engine_of(spark) == "spark":
        spark.sparkContext.addArchive(archive)
    else:
        spark.addArtifacts(archive, archive=True)
    return name


@contextmanager
def _progress(spark: SparkSession, num_users: int) -> Iterator[Any]:
    """A bar of the users scored, fed by an accumulator; yields the accumulator, None where the engine has none."""
    if engine_of(spark) != "spark":
        yield None
        return
    count, ended = spark.sparkContext.accumulator(0), threading.Event()
    with tqdm(total=num_users, unit=" users", desc="recommend", mininterval=1, leave=False, disable=None) as bar:

        def follow() -> None:
            while not ended.wait(0.5):
                bar.update(min(count.value, num_users) - bar.n)

        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        try:
            yield count
        finally:
            ended.set()
            follower.join()
