"""Your own log, described by YAML: an events file, and optionally items, users and edges beside it.

Every source of files is this one with a configuration; MovieLens too. A row is rejected, with a reason, for: what
`delimited` and `objects` reject, a missing user or item, a number or time that can't be read, NaN or infinity, a
time before `cleaning.min_time` or after `cleaning.max_time` (unless times are mere order).
"""

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession

from etl.config import CleaningConfig, LogSource
from etl.file_config import FileConfig
from etl.settings import GraftrecError
from etl.sources import columns, files, filters, found_events, reshape, values
from etl.sources.delimited import Chunk
from etl.sources.delta_table import SourceTable
from etl.sources.rows import RANGE_BYTES, RawRows, Shape, located
from etl.sources.schema import EXTRAS, FOUND_EVENTS, KINDS, PEOPLE, RAW_EDGES, RAW_EVENTS, RAW_ITEMS, RAW_USERS
from etl.sources.spark_table import SparkTable


class FileLog:
    """A LogSource. Raises GraftrecError for files, columns or rows that aren't there, when the frame is made."""

    def __init__(
        self,
        config: LogSource,
        cleaning: CleaningConfig,
        *,
        range_bytes: int = RANGE_BYTES,
        session: Callable[[], SparkSession] | None = None,
    ) -> None:
        self._session = session
        self.config, self.cleaning, self.range_bytes = config, cleaning, range_bytes
        self._rows: dict[str, RawRows] = {}
        self._tables: dict[str, SourceTable | SparkTable] = {}

    @property
    def time(self) -> Literal["timestamp", "ordinal"]:
        events = self.config.events
        ordered = "time" not in events.roles or (events.time_unit == "ordinal" and events.time_format is None)
        return "ordinal" if ordered else "timestamp"

    @property
    def never_rejects(self) -> bool:
        return False

    def fingerprint(self, kinds: Sequence[str] = KINDS) -> str:
        tables = [table.key for kind in kinds if (table := self.table(kind)) is not None]
        found = [file for kind in kinds if self.table(kind) is None for file in self._files(kind)]
        return "+".join([files.fingerprint(found), *tables] if found else tables or [files.fingerprint([])])

    def table(self, kind: str = "events") -> SourceTable | SparkTable | None:
        config = getattr(self.config, kind)
        if config is None or config.format not in ("delta", "table"):
            return None
        setting = f"source.{kind}.path"
        if config.format == "table" and kind not in self._tables:
            assert self._session is not None
            self._tables[kind] = SparkTable(self._session(), config, self._wanted(kind), setting=setting)
        if kind not in self._tables:  # pinned: its version stays the same while a command runs
            self._tables[kind] = SourceTable(self.config.root, config, setting=setting)
        return self._tables[kind]

    def deliveries(self) -> dict[str, str]:
        found = self._files("events")
        named: dict[str, str] = {}
        for content, file in zip(files.digests(found), found, strict=True):
            named.setdefault(content, file.name)
        return named

    def events(self, spark: SparkSession, *, only: Mapping[str, int] | None = None) -> DataFrame:
        config, table = self.config.events, self.table()
        found = self._files("events") if table is None else table.files()
        if only is not None:
            found = [replace(file, index=only[file.name]) for file in found if file.name in only]
        rows = RawRows(
            config,
            self.config.root,
            self._wanted("events"),
            setting="source.events.path",
            found=found,
            range_bytes=self.range_bytes,
            table=table,
        )
        found_rows = located("interactions", self._event_shape(), filters.kept(config))
        given = {*config.roles, *(["value"] if config.weights else [])}
        schema = pa.schema([field for field in RAW_EVENTS if field.name not in EXTRAS or field.name in given])

        def packed(chunk: Chunk, file: files.RawFile) -> pa.Table:
            return found_events.pack(found_rows(chunk, file)).select(schema.names)

        return rows.map(spark, packed, schema)

    def found_in(self, places: Mapping[str, int]) -> dict[str, Column]:
        events = self.config.events
        several = bool(events.explode) or events.matrix_from is not None
        return found_events.found_in(places, several=several)

    def first_events(self) -> pa.Table:
        """FOUND_EVENTS of the first block of a few files, read in this process."""
        config = self.config.events
        rows = RawRows(config, self.config.root, self._wanted("events"), setting="source.events.path")
        return rows.first(kind="interactions", shape=self._event_shape(), schema=FOUND_EVENTS)

    def _event_shape(self) -> Shape:
        config = self.config.events
        for name in ("user", "item"):
            if name not in config.roles:
                raise GraftrecError(
                    f"source.events.columns.{name}: expected a column's name or position, found none; set it"
                )
        earliest, latest = self._time_bounds()
        return columns.events(config, earliest=earliest, latest=latest)

    def items(self, spark: SparkSession) -> DataFrame | None:
        config = self.config.items
        if config is None:
            return None
        rows = self._open("items", config, self._wanted("items"))
        return rows.frame(spark, kind="items", shape=columns.items(config), schema=RAW_ITEMS)

    def known_items(self, spark: SparkSession) -> DataFrame | None:
        described = self.items(spark) if self.config.require_known_items else None
        return None if described is None else described.where("reason is null").select("item").distinct()

    def users(self, spark: SparkSession) -> DataFrame | None:
        config = self.config.users
        if config is None:
            return None
        rows = self._open("users", config, self._wanted("users"))
        return rows.frame(spark, kind="users", shape=columns.users(config), schema=RAW_USERS)

    def edges(self, spark: SparkSession) -> DataFrame | None:
        config = self.config.edges
        if config is None:
            return None
        rows = self._open("edges", config, self._wanted("edges"))
        kept = columns.without_oneself if config.explode else None
        edges = rows.frame(spark, kind="edges", shape=columns.edges(config), schema=RAW_EDGES, kept=kept)
        if config.directed:
            return edges
        back = edges.where("reason is null").selectExpr("friend as user", "user as friend", *RAW_EDGES.names[2:])
        return edges.unionByName(back)

    def people(self, spark: SparkSession) -> DataFrame | None:
        config = self.config.items
        if config is None or not config.people:
            return None
        return self._open("items", config, self._wanted("items")).map(spark, columns.people(config), PEOPLE)

    def _wanted(self, kind: str) -> list[str | int]:
        """The columns that a kind of file is read for, in the order that `shapes` expects."""
        config = self.config
        if kind == "events":
            return reshape.wanted(config.events)
        if kind == "items":
            return [] if config.items is None else columns.item_columns(config.items)
        if kind == "users":
            return [] if config.users is None else [config.users.id, *config.users.attributes.values()]
        return [] if config.edges is None else reshape.wanted(config.edges)

    def _files(self, kind: str) -> list[files.RawFile]:
        described = getattr(self.config, kind)
        if described is None:
            return []
        return files.find_files(self.config.root, described.path, what=f"source.{kind}.path", member=described.member)

    def _open(self, name: str, config: FileConfig, wanted: Sequence[str | int]) -> RawRows:
        if name not in self._rows:
            setting = f"source.{name}.path"
            root, size, table = self.config.root, self.range_bytes, self.table(name)
            self._rows[name] = RawRows(config, root, list(wanted), setting=setting, range_bytes=size, table=table)
        return self._rows[name]

    def _time_bounds(self) -> tuple[int, int] | tuple[None, None]:
        if self.time == "ordinal":
            return None, None
        tomorrow = (dt.datetime.now(dt.UTC) + dt.timedelta(days=1)).isoformat()
        return (
            values.day(self.cleaning.min_time, setting="cleaning.min_time"),
            values.day(self.cleaning.max_time or tomorrow, setting="cleaning.max_time"),
        )
