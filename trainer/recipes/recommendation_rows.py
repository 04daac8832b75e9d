"""Rows of recommendations: users' histories of a release, scored on executors.

Executors score in parallel, on one thread each: a Python worker loads the model folder, which Spark ships to it, once.
Its memory is that of the model, a batch of users and a block of their scores. A user's whole known sequence is the
input, and its items are not recommended. Users without an item that the model knows, e.g. those who are new in the
domain, get the recommendations of its companion, which reads all domains; if there is none, or it knows none of their
items either, what their friends have, by an attention over friends, which also gives rows to users who have friends and
no event at all; else the popular items. The rows equal the served model's answers, up to the last bits.
"""

import atexit
import datetime as dt
import functools
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pyspark import SparkFiles
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from tqdm import tqdm

from etl import tables
from etl.archive import pack
from etl.lake import spark_io
from etl.session import engine_of
from etl.tables import DOMAIN_ALL, UNK, Table
from trainer.arrays import IntArray
from trainer.config import RecommendConfig
from trainer.data.baskets import separated
from trainer.data.events import Column, Events
from trainer.data.release import Release, domains_with_sequences, num_buckets
from trainer.data.sequences import event_type_codes
from trainer.inference.later_items import LaterItems, load_later, save_later, with_later
from trainer.inference.model_folder import USER_IDS, TrainedModel, digest_of, load_model
from trainer.inference.recommender import TopK
from trainer.inference.scorer import answered
from trainer.parallel.cores import use_threads
from trainer.social.friends_folder import FriendsModel, is_friends, load_friends, save_friends
from trainer.social.friends_recommender import FriendsRecommender

ROWS_SCHEMA = (
    "domain string, bucket int, user string, rank int, item string, score float, model_version string, release long"
)
USERS_PER_TASK = 20_000
LATER = "later.npz"  # beside a model's files: items that came after it was trained


@dataclass(frozen=True)
class Models:
    """The model, and what stands beside it, each with its label."""

    own: tuple[TrainedModel, str]
    companion: tuple[TrainedModel, str] | None = None
    friends: tuple[FriendsModel, str] | None = None

    @property
    def networks(self) -> list[tuple[TrainedModel, str]]:
        """Those that read histories."""
        return [one for one in (self.own, self.companion) if one is not None]

    @property
    def all(self) -> list[tuple[TrainedModel | FriendsModel, str]]:
        return [one for one in (*self.networks, self.friends) if one is not None]


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
    friends: bool = False  # users who have friends and no event are read, too
    encoders: tuple[str, ...] = ()  # and those whom one of these encoders has a vector of
    only: IntArray | None = None  # global indices of the users who are scored; None: all


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
        models=[(_shipped(spark, one), label) for one, label in models.all],
        count=count,
        wanted=Wanted(config.k, config.batch_size, domain, source.release.number, microseconds(config)),
    )
    return _histories(spark, source, config.spark.shuffle_partitions).mapInArrow(score, ROWS_SCHEMA)


def kept_rows(spark: SparkSession, source: HistorySource, domain: str, buckets: Sequence[int]) -> DataFrame:
    """The rows of RECOMMENDATIONS of these buckets that stay: of users of the release who are not scored again."""
    assert source.only is not None
    release = source.release
    partitions: dict[str, Sequence[Any]] = {"domain": [domain], "bucket": list(buckets)}
    rows = spark_io.read(spark, release.lake, tables.RECOMMENDATIONS, partitions=partitions)
    users = spark_io.read(spark, release.lake, tables.USERS, version=release.versions[tables.USERS.name])
    chosen = spark.createDataFrame([(int(user),) for user in source.only], "index int")
    stay = users.select("user", "index").join(chosen, "index", "left_anti").select("user")
    return rows.join(stay, "user", "left_semi").select(*tables.RECOMMENDATIONS.schema.names)


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
    if source.friends or source.encoders:
        own = _with_others(spark, source, own)
    if source.only is not None:
        chosen = spark.createDataFrame([(int(user),) for user in source.only], "user int")
        own = own.join(chosen, "user", "left_semi")
    joined = own.select(F.col("user").alias("index"), "bucket", "items", *more).join(users, "index")
    tasks = max(parallel, -(-source.num_users // USERS_PER_TASK))
    return joined.repartition(tasks, "index").select("raw", "index", "bucket", "items", *more)


def _with_others(spark: SparkSession, source: HistorySource, own: DataFrame) -> DataFrame:
    """And a row, without a history, of each user who has none, but friends, or features that users are answered by."""
    release = source.release

    def read(table: Table, partitions: dict[str, list[str]] | None = None) -> DataFrame:
        return spark_io.read(spark, release.lake, table, version=release.versions[table.name], partitions=partitions)

    found = []
    if source.friends:
        social = read(tables.SOCIAL)
        found = [social.select(F.col(name).alias("user")) for name in ("user_index", "friend_index")]
    if source.encoders:
        vectors = read(tables.FEATURES, {"kind": ["user"], "encoder": list(source.encoders)})
        found.append(vectors.select(F.col("index").alias("user")))
    others = functools.reduce(DataFrame.union, found).distinct()
    bucket = spark_io.bucket_of(num_buckets(release)).alias("bucket")
    named = read(tables.USERS).select(F.col("index").alias("user"), bucket)
    lacking = named.join(others, "user").join(own, "user", "left_anti")
    return own.unionByName(lacking, allowMissingColumns=True)


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
        self.event_types, self.model = trained_model.event_types, trained_model.model


class _Friends:
    """An attention over friends, ready to score."""

    event_types = ()

    def __init__(self, model: FriendsModel) -> None:
        self.catalogue = model.catalogue
        self.raw_ids = pa.array(model.catalogue.raw_ids, pa.string())
        self.recommender = FriendsRecommender(model, "")


_loading = threading.Lock()  # Sail's tasks are threads of one process


@functools.lru_cache(maxsize=3)  # the model and what stands beside it
def _loaded(model: str) -> _Model | _Friends:
    folder = Path(model) if "/" in model else Path(SparkFiles.getRootDirectory()) / model
    if is_friends(folder):
        return _Friends(load_friends(folder))
    own, later = load_model(folder), folder / LATER
    return _Model(with_later(own, load_later(later)) if later.is_file() else own)


def _score_batches(
    batches: Iterator[pa.RecordBatch],
    *,
    models: Sequence[tuple[str, str]],
    count: Any,
    wanted: Wanted,
) -> Iterator[pa.RecordBatch]:
    """Top-k rows of the users in `batches` (raw, index, bucket, items). `models`: place and label of the model, of its
    companion, which scores users of whom only it knows an item, and of an attention over friends, for users of whom
    none knows one."""
    use_threads(1)  # there are as many tasks at once as cores
    with _loading:
        loaded = [(_loaded(place), label) for place, label in models]
    for batch in batches:
        # Users of like lengths together: less padding.
        order = np.argsort(_lengths(batch.column("items")), kind="stable")
        for start in range(0, len(order), wanted.batch_size):
            chosen = batch.take(pa.array(order[start : start + wanted.batch_size]))
            scored_by = np.zeros(len(chosen), np.int64)
            if len(loaded) > 1:
                nobody = ~_knows(chosen, loaded[0][0], wanted.time)
                for place, (model, _) in enumerate(loaded[1:], 1):
                    scored_by[nobody & _knows(chosen, model, wanted.time)] = place
                    nobody &= scored_by == 0
            for place, (model, label) in enumerate(loaded):
                if (users := scored_by == place).any():
                    yield _best(model, label, chosen.filter(pa.array(users)), wanted)
        if count is not None:
            count.add(batch.num_rows)


def _knows(batch: pa.RecordBatch, model: _Model | _Friends, time: int) -> npt.NDArray[np.bool_]:
    """[B] of which users a model knows an item, or friends who have some."""
    if isinstance(model, _Friends):
        known: npt.NDArray[np.bool_] = model.recommender.places(batch.column("raw")) >= 0
        return known
    return answered(model.model, _as_histories(batch, model, time))


def _best(model: _Model | _Friends, label: str, chosen: pa.RecordBatch, wanted: Wanted) -> pa.RecordBatch:
    """Rows of the table RECOMMENDATIONS for the users `chosen`."""
    histories = _as_histories(chosen, model, wanted.time)
    if isinstance(model, _Friends):
        rows, best = model.recommender.best(model.recommender.places(chosen.column("raw")), histories, wanted.k)
    else:
        rows, best = model.shortlist.best(histories, wanted.k)
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


def _as_histories(batch: pa.RecordBatch, model: _Model | _Friends, time: int) -> Events:
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


def _shipped(spark: SparkSession, trained_model: TrainedModel | FriendsModel) -> str:
    """Give executors the model folder, without raw user ids, which they don't need: but an attention over friends knows
    users by these. Returns what `_loaded` finds it by.

    Sail takes no files: it runs in this process, or its server must see the folder under the same path.
    """
    if isinstance(trained_model, FriendsModel):
        folder = _scratch() / "model"
        save_friends(folder, trained_model)
        return str(folder) if engine_of(spark) == "sail" else _archived(spark, folder)
    later: LaterItems | None = trained_model.later_items
    if engine_of(spark) == "sail" and later is None:
        return str(trained_model.folder.absolute())
    if later is None:
        return _archived(spark, trained_model.folder)
    scratch = _scratch()
    save_later(scratch / LATER, later)
    if engine_of(spark) == "sail":
        for file in trained_model.folder.iterdir():
            (scratch / file.name).symlink_to(file.absolute())
        return str(scratch)
    return _archived(spark, trained_model.folder, scratch / LATER)


def _scratch() -> Path:
    """A folder that is removed with this process."""
    folder = Path(tempfile.mkdtemp(prefix="graftrec-model-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _archived(spark: SparkSession, folder: Path, *more: Path) -> str:
    """Ship the files of a folder, and more; returns the archive's name."""
    scratch = _scratch()  # kept as long as the session: it fetches the archive whenever an executor begins
    packed_model = scratch / "model.zip"
    files = [path for path in (*folder.iterdir(), *more) if path.is_file() and path.name != USER_IDS]
    pack({path.name: path for path in files}, packed_model)
    name = f"model-{digest_of(packed_model)[:32]}.zip"  # a session takes a name once
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
