"""Rows of recommendations: users' histories of a release, scored on executors.

Executors score in parallel, on one thread each: a Python worker loads the model folder, which Spark ships to it, once.
Its memory is that of the model, a batch of users and a block of their scores. A user's whole known sequence is the
input, and its items are not recommended. Users without an item that the model knows, e.g. those who are new in the
domain, get the recommendations of its companion, which reads all domains; if there is none, or it knows none of their
items either, they get the popular items. The rows equal the served model's answers, up to the last bits.
"""

import atexit
import datetime as dt
import functools
import hashlib
import shutil
import tempfile
import threading
import zipfile
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
from etl.session import engine_of
from etl.tables import DOMAIN_ALL, UNK, Table
from trainer.arrays import IntArray
from trainer.config import RecommendConfig
from trainer.data.baskets import separated
from trainer.data.events import Column, Events
from trainer.data.release import Release, domains_with_sequences
from trainer.data.sequences import event_type_codes
from trainer.inference.later_items import LaterItems, load_later, save_later, with_later
from trainer.inference.model_folder import USER_IDS, TrainedModel, load_model
from trainer.inference.recommender import TopK
from trainer.inference.scorer import has_items
from trainer.parallel.cores import use_threads

ROWS_SCHEMA = (
    "domain string, bucket int, user string, rank int, item string, score float, model_version string, release long"
)
USERS_PER_TASK = 20_000
LATER = "later.npz"  # beside a model's files: items that came after it was trained
Models = Sequence[tuple[TrainedModel, str]]  # each with its label: the model, and its companion if there is one


@dataclass(frozen=True)
class HistorySource:
    """Which histories are read: those in the domain `reads`, or in all domains (`reads_all`)."""

    release: Release
    split: str
    reads: str
    reads_all: bool
    table: Table
    event_types: bool
    times: bool
    num_users: int  # with any event, in whichever domain


@dataclass(frozen=True)
class Wanted:
    """What is computed for every user."""

    k: int
    batch_size: int  # users scored at once
    domain: str
    release: int
    time: int  # of the requests: microseconds since 1970


def microseconds(config: RecommendConfig) -> int:
    """When requests are made; 0 where nothing reads it."""
    if config.time is None:
        return 0
    when = config.time if config.time.tzinfo else config.time.replace(tzinfo=dt.UTC)
    return (when - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(microseconds=1)


def score_users(
    spark: SparkSession, source: HistorySource, models: Models, config: RecommendConfig, domain: str, count: Any
) -> DataFrame:
    """The `config.k` best items of `domain` for every user, as rows of RECOMMENDATIONS, when they are read. `count`: an
    accumulator of the users scored; None: they are not counted."""
    score = functools.partial(
        _score_batches,
        models=[(_shipped(spark, trained_model), label) for trained_model, label in models],
        count=count,
        wanted=Wanted(config.k, config.batch_size, domain, source.release.number, microseconds(config)),
    )
    return _histories(spark, source, config.spark.shuffle_partitions).mapInArrow(score, ROWS_SCHEMA)


def _histories(spark: SparkSession, source: HistorySource, parallel: int) -> DataFrame:
    """raw (user id), index, bucket, items (of `baskets`: a list of each), and, where they are read, times and
    event_types; items are null for users without a history. Spread over enough tasks to keep every core busy."""
    release = source.release

    def read(table: Table, domain: str) -> DataFrame:
        partitions = {"split": [source.split], "domain": [domain]}
        return spark_io.read(spark, release.lake, table, version=release.versions[table.name], partitions=partitions)

    domain = DOMAIN_ALL if source.reads_all else source.reads
    own = _ONE_ROW_A_USER[source.table.name](read(source.table, domain))
    more = ["event_types"] if source.event_types else []
    by_time = source.reads_all and "times" in own.columns
    more += ["times"] if by_time or source.times else []
    if not by_time and DOMAIN_ALL in domains_with_sequences(release, source.split):
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
        self.reads_times = trained_model.config.reads_times


_loading = threading.Lock()  # Sail's tasks are threads of one process


@functools.lru_cache(maxsize=2)  # the model and its companion
def _loaded(model: str) -> _Model:
    folder = Path(model) if "/" in model else Path(SparkFiles.getRootDirectory()) / model
    own, later = load_model(folder), folder / LATER
    return _Model(with_later(own, load_later(later)) if later.is_file() else own)


def _score_batches(
    batches: Iterator[pa.RecordBatch],
    *,
    models: Sequence[tuple[str, str]],
    count: Any,
    wanted: Wanted,
) -> Iterator[pa.RecordBatch]:
    """Top-k rows of the users in `batches` (raw, index, bucket, items). `models`: place and label of the model, and of
    its companion, which scores users of whom only it knows an item."""
    use_threads(1)  # there are as many tasks at once as cores
    with _loading:
        loaded = [(_loaded(place), label) for place, label in models]
    for batch in batches:
        # Users of like lengths together: less padding.
        order = np.argsort(_lengths(batch.column("items")), kind="stable")
        for start in range(0, len(order), wanted.batch_size):
            chosen = batch.take(pa.array(order[start : start + wanted.batch_size]))
            by_model = [np.ones(len(chosen), bool)]
            if len(loaded) > 1:
                knows, companion_knows = (has_items(_as_histories(chosen, model, wanted.time)) for model, _ in loaded)
                by_companion = ~knows & companion_knows
                by_model = [~by_companion, by_companion]
            for (model, label), users in zip(loaded, by_model, strict=True):
                if users.any():
                    yield _best(model, label, chosen.filter(pa.array(users)), wanted)
        if count is not None:
            count.add(batch.num_rows)


def _best(model: _Model, label: str, chosen: pa.RecordBatch, wanted: Wanted) -> pa.RecordBatch:
    """Rows of the table RECOMMENDATIONS for the users `chosen`."""
    rows, best = model.shortlist.best(_as_histories(chosen, model, wanted.time), wanted.k)
    owner, place = torch.isfinite(best).numpy().nonzero()
    users = pa.array(owner)
    return pa.RecordBatch.from_arrays(
        [
            pa.repeat(wanted.domain, len(owner)),
            chosen.column("bucket").take(users),
            chosen.column("raw").take(users),
            pa.array(place + 1, pa.int32()),
            model.raw_ids.take(pa.array(rows[owner, place])),
            pa.array(best.numpy()[owner, place], pa.float32()),
            pa.repeat(label, len(owner)),
            pa.repeat(pa.scalar(wanted.release, pa.int64()), len(owner)),
        ],
        names=tables.RECOMMENDATIONS.schema.names,
    )


def _as_histories(batch: pa.RecordBatch, model: _Model, time: int) -> Events:
    """The users' items that the model knows, as its rows, by time where there are times: a row of the domain `all` may
    have held-out items at the end. `time`: of the requests, in microseconds."""
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
        times = batch.column("times").flatten()
        if pa.types.is_timestamp(times.type):
            times = times.cast(pa.timestamp("us", times.type.tz)).cast(pa.int64())
        columns["times"] = times.to_numpy(zero_copy_only=False)
    found = Events(users, offsets, columns, request_times=np.full(len(users), time))
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
    later: LaterItems | None = trained_model.later_items
    if engine_of(spark) == "sail" and later is None:
        return str(trained_model.folder.absolute())
    # Kept as long as the session: it fetches the archive whenever an executor begins.
    scratch = Path(tempfile.mkdtemp(prefix="graftrec-model-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    if later is not None:
        save_later(scratch / LATER, later)
    if engine_of(spark) == "sail":
        for file in trained_model.folder.iterdir():
            (scratch / file.name).symlink_to(file.absolute())
        return str(scratch)
    packed_model = scratch / "model.zip"
    with zipfile.ZipFile(packed_model, "w", zipfile.ZIP_STORED) as target:
        for file in [*sorted(trained_model.folder.iterdir()), scratch / LATER]:
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
def progress(spark: SparkSession, num_users: int) -> Iterator[Any]:
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
