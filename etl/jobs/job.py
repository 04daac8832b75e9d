"""What a job is, what it is given when it runs, and when it need not run.

A job writes one table. It runs again when a snapshot it reads, the content of a raw file it reads, its part of the
configuration or its own sources differ from what its table's last commit records.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from pyspark.sql import DataFrame, SparkSession

from etl.config import EtlConfig, etl_command
from etl.jobs.open_source import open_source
from etl.jobs.suppressed import without_forgotten
from etl.lake import spark_io
from etl.plain_path import absolute
from etl.session import spark_session
from etl.settings import GraftrecError
from etl.source_hash import source_hash
from etl.sources.schema import Source
from etl.tables import DELIVERIES, INTERACTIONS, Table

Frame = TypeVar("Frame", DataFrame, DataFrame | None)

# What runs, reads and writes for every job alike: a change there changes no table's content.
_MACHINERY = {
    "etl.command",
    "etl.config",
    "etl.settings",
    "etl.lake",
    "etl.jobs.job",
    "etl.plain_path",
    "etl.redaction",
    "etl.session",
    "etl.source_hash",
    "etl.stopping",
}
_OF_USERS = {"users": ("user",), "edges": ("user", "friend")}  # columns of raw files that name users


class MissingInput(GraftrecError):
    """A job whose input table isn't there."""


@dataclass(frozen=True)
class Job:
    """`run` writes `table` from the tables `reads`, raw files, and `settings` of the configuration.

    `files`: the content identity of the raw files it reads. `needs_source`: the sources' code is part of its own.
    """

    table: Table
    run: Callable[["Run"], "Outcome"]
    reads: tuple[Table, ...] = ()
    settings: Callable[[EtlConfig], Any] = lambda config: None
    files: Callable[[Source, EtlConfig], str] = lambda source, config: ""
    needs_source: bool = False

    @property
    def name(self) -> str:
        return self.table.name


@dataclass(frozen=True)
class Outcome:
    """What a job left: its table's version and rows written, whether it committed, and lines for the reader."""

    version: int
    rows: int
    committed: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class JobReport:
    """What one run of a job took and left; `rejected`: rows of raw files that went to quarantine."""

    job: str
    version: int
    rows: int
    rejected: int
    seconds: float
    committed: bool

    def as_fields(self) -> dict[str, Any]:
        """As a record of a log has them."""
        numbers = {"job": self.job, "version": self.version, "rows": self.rows, "rejected": self.rejected}
        return numbers | {"seconds": round(self.seconds, 3), "unchanged": not self.committed}


class RunContext:
    """What the jobs of one command share: the configuration, and, made at first use, Spark and the source."""

    def __init__(self, config: EtlConfig) -> None:
        self.config = config
        self.done: list[JobReport] = []  # of the jobs that were run, in order
        self._kept: dict[str, DataFrame | None] = {}

    @functools.cached_property
    def spark(self) -> SparkSession:
        return spark_session(self.config.spark, name="graftrec etl")

    @functools.cached_property
    def source(self) -> Source:
        return open_source(self.config, lambda: self.spark)

    def raw(self, kind: str) -> DataFrame | None:
        """The source's `items`, `users`, `edges` or `people`, None where it has none."""

        def read() -> DataFrame | None:
            found: DataFrame | None = getattr(self.source, kind)(self.spark)
            columns = _OF_USERS.get(kind)
            return found if found is None or columns is None else without_forgotten(self.config.lake, found, columns)

        return self.kept(kind, read)

    def kept(self, name: str, make: Callable[[], Frame]) -> Frame:
        """A frame that several jobs use, made once and held by Spark until the command ends."""
        if name not in self._kept:
            frame = make()
            self._kept[name] = None if frame is None else frame.persist()
        return cast(Frame, self._kept[name])  # type: ignore[redundant-cast]


@dataclass
class Run:
    """One run of a job, given to its `run`."""

    job: Job
    engine: RunContext
    inputs: Mapping[str, int]  # pinned versions of the tables it reads
    base: int | None  # its own table's version before the run
    last: Mapping[str, Any]  # its own table's last commit
    provenance: Mapping[str, str]  # what its commit records; see `plan_run`
    notes: list[str] = field(default_factory=list)
    rejected: int = 0  # rows of raw files that went to quarantine

    @property
    def config(self) -> EtlConfig:
        return self.engine.config

    @property
    def spark(self) -> SparkSession:
        return self.engine.spark

    @property
    def lake(self) -> str:
        """As executors find it, which have folders of their own."""
        return absolute(self.config.lake)

    @property
    def same_rules(self) -> bool:
        """Whether the table's last commit was made by these settings and this code (of other inputs, then)."""
        return all(self.last.get(key) == self.provenance[key] for key in ("job", "config_hash", "code_version"))

    @functools.cached_property
    def table(self) -> Table:
        """The job's table, as a lake with this kind of time stores it."""
        table = self.job.table
        if not table.times or table is DELIVERIES:  # whose time isn't the log's
            return table
        if INTERACTIONS in self.job.reads:
            return table.of(spark_io.last_commit(self.lake, INTERACTIONS)["time"])
        return table.of(self.engine.source.time)

    def read(self, table: Table) -> DataFrame:
        """A table as pinned when the run began."""
        return spark_io.read(self.spark, self.lake, table, version=self.inputs[table.name])

    @functools.cached_property
    def before(self) -> Mapping[str, int] | None:
        """The versions of its inputs that the table's last commit read, None where it followed other rules."""
        if self.base is None or not self.same_rules:
            return None
        return cast(dict[str, int], json.loads(self.last["inputs"]))

    def read_before(self, table: Table) -> DataFrame:
        """A table as it was when the job's own table was last written. Only where there is a `before`."""
        assert self.before is not None
        return spark_io.read(self.spark, self.lake, table, version=self.before[table.name])

    def appended_files(self, table: Table) -> list[spark_io.DataFile] | None:
        """The files that a table has gained since `before`; None where it was rewritten, or there is no `before`: those
        of the pinned version that the earlier one lacks, where it still has all of the earlier ones.
        """
        if self.before is None or table.name not in self.before:
            return None
        now = spark_io.snapshot_files(self.lake, table, self.inputs[table.name])
        try:
            earlier = {file.path for file in spark_io.snapshot_files(self.lake, table, self.before[table.name])}
        except spark_io.LakeError:  # maintenance has removed that version
            return None
        return [file for file in now if file.path not in earlier] if earlier <= {file.path for file in now} else None

    def appended(self, table: Table) -> DataFrame | None:
        """The rows of a table that were appended since `before`; None: see appended_files."""
        new = self.appended_files(table)
        return None if new is None else spark_io.read(self.spark, self.lake, table, files=new)

    def own(self, times: tuple[int, int] | None = None) -> DataFrame | None:
        """The job's own table as it was, None where there is none yet. `times`: see spark_io.read."""
        if self.base is None:
            return None
        return spark_io.read(self.spark, self.lake, self.job.table, version=self.base, times=times)

    def commit(
        self,
        frame: DataFrame,
        *,
        mode: spark_io.Mode = "overwrite",
        metadata: Mapping[str, str] | None = None,
        properties: Mapping[str, str] | None = None,
        partition_scope: Mapping[str, Sequence[Any]] | None = None,
        transactions: Mapping[str, int] | None = None,
        partitioned: bool = False,
    ) -> Outcome:
        """Write the job's table. Twins that began from the same base commit once. `partitioned`: see spark_io.write."""
        written = spark_io.write(
            self.spark,
            frame,
            self.lake,
            self.table,
            spark_io.Commit(
                mode=mode,
                app=f"job/{self.job.name}",
                app_version=0 if self.base is None else self.base + 1,
                metadata={**self.provenance, **(metadata or {})},
                properties=properties,
                partition_scope=partition_scope,
                transactions=transactions,
            ),
            partitioned=partitioned,
        )
        return self._outcome(written)

    def commit_files(
        self,
        files: Sequence[spark_io.DataFile],
        *,
        mode: spark_io.Mode = "overwrite",
        properties: Mapping[str, str] | None = None,
        partition_scope: Mapping[str, Sequence[Any]] | None = None,
    ) -> Outcome:
        """As `commit`, of data files that tasks have written."""
        written = spark_io.commit_files(
            self.lake,
            self.table,
            files,
            spark_io.Commit(
                mode=mode,
                app=f"job/{self.job.name}",
                app_version=0 if self.base is None else self.base + 1,
                metadata=self.provenance,
                properties=properties,
                partition_scope=partition_scope,
            ),
        )
        return self._outcome(written)

    def _outcome(self, written: spark_io.Written) -> Outcome:
        if not written.committed:
            self._check_twin()
        return Outcome(written.version, written.rows, written.committed, tuple(self.notes))

    def _check_twin(self) -> None:
        """Another run began from the same base and was faster. Raises CommitConflict unless it did the same work."""
        theirs = spark_io.last_commit(self.lake, self.job.table)
        if any(theirs.get(key) != value for key, value in self.provenance.items()):
            raise spark_io.CommitConflict(
                f"{self.job.name}: another run with other inputs or settings wrote the table meanwhile; run again"
            )


def plan_run(job: Job, engine: RunContext) -> Run | Outcome:
    """The run that is to be made, or, where nothing it depends on has changed, what the last one left.

    Raises MissingInput.
    """
    lake = engine.config.lake
    inputs: dict[str, int] = {}
    for table in job.reads:
        version = spark_io.current_version(lake, table)
        if version is None:
            raise MissingInput(
                f"{job.name} reads the table {table.name}, which the lake {lake} lacks; run {etl_command(lake)} first"
            )
        inputs[table.name] = version
    provenance = {
        "job": job.name,
        "config_hash": digest(job.settings(engine.config)),
        "code_version": job_code_version(job),
        "inputs": json.dumps(inputs, sort_keys=True),
        "files": job.files(engine.source, engine.config),
    }
    base = spark_io.current_version(lake, job.table)
    last = spark_io.last_commit(lake, job.table)
    if last and all(last.get(key) == value for key, value in provenance.items()):
        return Outcome(int(last["version"]), int(last["rows"]), False)
    return Run(job, engine, inputs, base, last, provenance)


def job_code_version(job: Job) -> str:
    """A hash of the job's own module, the modules of ours it imports, and, where it reads raw files, the sources."""
    sources = ["etl.jobs.open_source"] if job.needs_source else []
    return source_hash(job.run.__module__, *sources, without=_MACHINERY)


def digest(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
