"""Batch recommendations: the k best items of every user of a domain, in the Delta table `recommendations`.

Executors score in parallel, on one thread each: a Python worker loads the model folder, which Spark ships to it, once.
Its memory is that of the model, a batch of users and a block of their scores. A user's whole known sequence is the
input, and what is in it is left out of the answer; a user with no item that the model knows gets the popular ones. The
rows are those that the served model would answer, up to the last bits.

One commit replaces the domain's partitions, all or nothing. It records what it was made of: a rerun of what the table
holds already does nothing.
"""

import atexit
import functools
import hashlib
import shutil
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
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

from etl import delta, tables
from etl.config import RunAgain, code_version
from etl.session import engine_of, spark_session
from etl.tables import UNK
from trainer import tracking
from trainer.artifact import MANIFEST, USER_IDS, Artifact, load_artifact
from trainer.baselines import Histories
from trainer.config import GraftrecError, RecommendConfig, reads_baskets
from trainer.data.baskets import BasketDataset, separated
from trainer.data.dataset import Catalogue, Release, SequenceDataset, event_type_codes, pin
from trainer.registry import Registry
from trainer.serving import Shortlist

ROWS_SCHEMA = (
    "domain string, bucket int, user string, rank int, item string, score float, model_version string, release long"
)
USERS_PER_TASK = 20_000


@dataclass(frozen=True)
class Result:
    """What was written: users, rows, the table's version; `committed` False where the table held it already."""

    users: int
    rows: int
    version: int
    committed: bool
    seconds: float


def run(config: RecommendConfig) -> Result:
    """The recipe `recommend`. Raises GraftrecError."""
    folder, label = _model(config)
    artifact = load_artifact(folder, users=False)
    baskets = reads_baskets(artifact.config.task)
    artifact.scorer(baskets=baskets, clicks=True)  # refuses a model that ranks no items
    own = artifact.config.data
    predicts = own.predicted or own.domain
    split, domain = config.split or own.split, config.domain or predicts
    reads = own.domain if domain == predicts else domain  # rows are of what is predicted, whatever is read for it
    release = pin(config.lake or artifact.lake, config.release)
    num_users = (BasketDataset if baskets else SequenceDataset)(release, split, reads).num_rows
    app, identity = f"recommend/{domain}", _identity(config, artifact, label, release, split, domain)
    recorded = delta.transactions(release.lake, tables.RECOMMENDATIONS, [app, identity])
    if app in recorded and recorded.get(identity) == recorded[app]:
        version = delta.current_version(release.lake, tables.RECOMMENDATIONS)
        print(
            f"recommend: unchanged, the table at {_place(release)} holds what {label} says of release {release.number}"
        )
        return Result(num_users, 0, version or 0, False, 0.0)
    with tracking.start_run(config.tracking, name=config.name, resolved=config, release=release) as tracked:
        tracked.set_tags(
            {"graftrec.recipe": "recommend", "graftrec.model_version": label, "graftrec.hash": artifact.hash}
        )
        number = recorded.get(app, 0) + 1
        result = _write(config, artifact, label, release, split, (reads, domain), num_users, (app, identity, number))
        speed = result.users / max(result.seconds, 1e-9)
        tracked.log_metrics(
            {"users": result.users, "rows": result.rows, "seconds": result.seconds, "users_per_second": speed}
        )
    print(
        f"recommend: top {config.k} of {result.users:,} users of {domain} by {label}, release {release.number}: "
        f"{result.rows:,} rows in {result.seconds:.1f} s ({speed:,.0f} users/s); "
        f"{_place(release)} version {result.version}"
    )
    return result


def _model(config: RecommendConfig) -> tuple[Path, str]:
    """The model folder and what rows say of it: "graftrec/3", or "unregistered/<hash>" for a folder."""
    if (Path(config.model) / MANIFEST).is_file() or "/" in config.model:
        return Path(config.model), f"unregistered/{load_artifact(config.model, users=False).hash[:12]}"
    registry = Registry(config.registered_model)
    version = registry.version(config.model)
    if config.domain is not None:  # a patch beside it may be for that domain
        version = registry.for_domain(version, config.domain)
    return registry.folder(version), version.label


def _identity(
    config: RecommendConfig, artifact: Artifact, label: str, release: Release, split: str, domain: str
) -> str:  # fmt: skip
    """Names everything that the rows depend on."""
    here = Path(__file__).parent
    code = code_version(Path(__file__), here / "serving.py", here / "scoring.py", here / "models", here / "tasks")
    read = tables.BASKETS if reads_baskets(artifact.config.task) else tables.SEQUENCES
    versions = [release.versions.get(table.name) for table in (read, tables.USERS)]
    told = [artifact.hash, label, release.number, versions, split, domain, config.k, code]
    return f"recommend/{domain}/{hashlib.sha256(repr(told).encode()).hexdigest()[:16]}"


def _place(release: Release) -> str:
    return delta.table_uri(release.lake, tables.RECOMMENDATIONS)


def _write(
    config: RecommendConfig, artifact: Artifact, label: str, release: Release, split: str, domains: tuple[str, str],
    num_users: int, transaction: tuple[str, str, int],
) -> Result:  # fmt: skip
    (reads, domain), (app, identity, number) = domains, transaction
    start = time.monotonic()
    spark = spark_session(config.spark, name="graftrec recommend")
    model = _shipped(spark, artifact)
    with _progress(spark, num_users) as count:
        score = functools.partial(
            _score_batches, model=model, count=count, k=config.k, batch_size=config.batch_size, domain=domain,
            label=label, release=release.number,
        )  # fmt: skip
        histories = _histories(
            spark, release, split, reads, num_users, config.spark.shuffle_partitions,
            event_types=bool(artifact.event_types), baskets=reads_baskets(artifact.config.task),
        )  # fmt: skip
        rows = histories.mapInArrow(score, ROWS_SCHEMA)
        written = delta.write(
            spark, rows, release.lake, tables.RECOMMENDATIONS, mode="partitions", app=app, app_version=number,
            metadata={"job": "recommend", "model_version": label, "release": str(release.number), "k": str(config.k)},
            partition_scope={"domain": [domain]}, transactions={identity: number},
        )  # fmt: skip
    if (
        not written.committed
        and delta.transactions(release.lake, tables.RECOMMENDATIONS, [identity]).get(identity) != number
    ):
        raise RunAgain(
            f"another run has written recommendations of {domain} meanwhile: these are dropped; run it again"
        )
    return Result(num_users, written.rows, written.version, written.committed, time.monotonic() - start)


def _histories(
    spark: SparkSession,
    release: Release,
    split: str,
    domain: str,
    num_users: int,
    parallel: int,
    *,
    event_types: bool,
    baskets: bool,
) -> DataFrame:
    """user (raw id), index, bucket, items (of `baskets`: a list of each), event_types where asked for; spread over
    enough tasks to keep every core busy."""
    table = tables.BASKETS if baskets else tables.SEQUENCES
    sequences = delta.read(
        spark, release.lake, table, version=release.versions[table.name],
        partitions={"split": [split], "domain": [domain]},
    )  # fmt: skip
    if baskets:
        in_order = F.sort_array(F.collect_list(F.struct("basket", "items")))
        together = sequences.groupBy("user", "bucket").agg(in_order.alias("baskets"))
        sequences = together.select("user", "bucket", F.col("baskets.items").alias("items"))
    users = delta.read(spark, release.lake, tables.USERS, version=release.versions[tables.USERS.name])
    named = users.select("index", F.col("user").alias("raw"))
    kinds = ["event_types"] if event_types else []
    joined = sequences.select(F.col("user").alias("index"), "bucket", "items", *kinds).join(named, "index")
    tasks = max(parallel, -(-num_users // USERS_PER_TASK))
    return joined.repartition(tasks, "index").select("raw", "index", "bucket", "items", *kinds)


# --- in the executors ---------------------------------------------


class _Model:
    """A model folder, ready to score; kept by a worker from task to task."""

    def __init__(self, artifact: Artifact) -> None:
        self.catalogue = artifact.catalogue
        self.raw_ids = pa.array(artifact.catalogue.raw_ids, pa.string())
        self.shortlist = Shortlist(artifact)
        self.event_types = artifact.event_types


_loading = threading.Lock()  # Sail's tasks are threads of one process


@functools.lru_cache(maxsize=1)
def _loaded(model: str) -> _Model:
    return _Model(load_artifact(Path(model) if "/" in model else Path(SparkFiles.getRootDirectory()) / model))


def _score_batches(
    batches: Iterator[pa.RecordBatch], *, model: str, count: Any, k: int, batch_size: int, domain: str, label: str,
    release: int,
) -> Iterator[pa.RecordBatch]:  # fmt: skip
    """Top-k rows of the users in `batches` (raw, index, bucket, items)."""
    torch.set_num_threads(1)  # there are as many tasks at once as cores
    with _loading:
        loaded = _loaded(model)
    for batch in batches:
        # Users of like lengths together: less padding.
        order = np.argsort(pa.compute.list_value_length(batch.column("items")).to_numpy(), kind="stable")
        for start in range(0, len(order), batch_size):
            chosen = batch.take(pa.array(order[start : start + batch_size]))
            histories = _as_histories(chosen, loaded.catalogue, loaded.event_types)
            rows, best = loaded.shortlist.best(histories, k)
            owner, place = torch.isfinite(best).numpy().nonzero()
            users = pa.array(owner)
            yield pa.RecordBatch.from_arrays(
                [
                    pa.repeat(domain, len(owner)),
                    chosen.column("bucket").take(users),
                    chosen.column("raw").take(users),
                    pa.array(place + 1, pa.int32()),
                    loaded.raw_ids.take(pa.array(rows[owner, place])),
                    pa.array(best.numpy()[owner, place], pa.float32()),
                    pa.repeat(label, len(owner)),
                    pa.repeat(pa.scalar(release, pa.int64()), len(owner)),
                ],
                names=tables.RECOMMENDATIONS.schema.names,
            )
        if count is not None:
            count.add(batch.num_rows)


def _as_histories(batch: pa.RecordBatch, catalogue: Catalogue, event_types: Sequence[str]) -> Histories:
    """What the model knows of the users' items, as its rows."""
    items = batch.column("items")
    if pa.types.is_list(items.type.value_type) or pa.types.is_large_list(items.type.value_type):
        items = _in_a_row(items)
    lengths = pa.compute.list_value_length(items).to_numpy()
    rows = catalogue.rows(items.flatten().to_numpy(zero_copy_only=False)).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    users = batch.column("index").to_numpy().astype(np.int64)
    kinds = np.empty(0, np.int8)
    if event_types:
        kinds = event_type_codes(pa.chunked_array([batch.column("event_types")]), lengths.astype(np.int64), event_types)
    return Histories(users, offsets, rows, np.empty(0, dtype=np.int64), kinds).keep(rows != UNK)


def _in_a_row(baskets: pa.ListArray) -> pa.ListArray:
    """Each user's baskets as one list, a SEP behind each."""
    rows, size = separated(baskets.flatten())
    ends = np.concatenate([[0], np.cumsum(size)])
    first = np.concatenate([[0], np.cumsum(pa.compute.list_value_length(baskets).to_numpy())])
    return pa.ListArray.from_arrays(pa.array(ends[first], pa.int32()), pa.array(rows))


# --- shipping and progress ---------------------------------------------


def _shipped(spark: SparkSession, artifact: Artifact) -> str:
    """Give executors the model folder, without raw user ids, which they don't need. Returns what `_loaded` finds it by.

    Sail takes no files: it runs in this process, or its server must see the folder under the same path.
    """
    if engine_of(spark) == "sail":
        return str(artifact.folder.absolute())
    # As long as the session may still ask for it: it fetches what it was given whenever an executor begins.
    scratch = Path(tempfile.mkdtemp(prefix="graftrec-model-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    packed_model = scratch / "model.zip"
    with zipfile.ZipFile(packed_model, "w", zipfile.ZIP_STORED) as target:
        for file in sorted(artifact.folder.iterdir()):
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
