"""What every source gives: the frames of raw rows, good and rejected, and the protocol that all sources follow.

Each row says where it was found (`kind`, `file`, `line`); `reason` is null in a good row. A rejected row has its
`reason` and its text (`raw`, cut), and nulls elsewhere where nothing could be read. Rows read = good rows + rejected
rows, always.

Of events only rejected rows say so, in one column; of the others `source_order` gives it. A log without event types
brings no column of them. The time of a reading is decided by what its rows bring.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession

from etl.tables import ATTRIBUTES

if TYPE_CHECKING:
    from etl.sources.delta_table import SourceTable
    from etl.sources.spark_table import SparkTable

KINDS = ("events", "items", "users", "edges")  # of files
RAW_CHARACTERS = 1_000  # of a rejected row kept for the quarantine

FOUND_FIELDS = (
    pa.field("kind", pa.string()),  # interactions | items | users | edges | knowledge
    pa.field("file", pa.string()),  # relative to the source's root where it lies under it
    pa.field("line", pa.int64()),  # 1-based; of a Parquet file: row number
    pa.field("place", pa.int64()),  # in its line, from 0, where lines give several rows; else null
    pa.field("reason", pa.string()),  # null: a good row
    pa.field("column", pa.string()),  # that the reason is about, where it is about one
    pa.field("found", pa.string()),  # in that column, cut; null: nothing
    pa.field("raw", pa.string()),  # of a rejected row, its first 1,000 characters; null in a good row
)
FOUND = tuple(field.name for field in FOUND_FIELDS)
_EVENT = [
    pa.field("user", pa.string()),
    pa.field("item", pa.string()),
    pa.field("time", pa.int64()),  # microseconds since 1970 UTC, or order
    pa.field("event_type", pa.string()),
    pa.field("value", pa.float64()),
    pa.field("basket", pa.string()),
    pa.field("source_order", pa.int64()),  # file's place among the sorted paths · 2^40 + line
]
RAW_EVENTS = pa.schema([*_EVENT, pa.field("rejected", pa.list_(pa.string()))])  # FOUND as text; null: a good row
EXTRAS = ("event_type", "value", "basket")  # of events: columns that frames of a log without them lack
FOUND_EVENTS = pa.schema([*_EVENT, *FOUND_FIELDS])  # as tasks find them
RAW_ITEMS = pa.schema(
    [
        pa.field("item", pa.string()),
        pa.field("title", pa.string()),
        pa.field("year", pa.int32()),
        pa.field("categories", pa.list_(pa.string())),
        pa.field("attributes", ATTRIBUTES),
        *FOUND_FIELDS,
    ]
)
RAW_USERS = pa.schema([pa.field("user", pa.string()), pa.field("attributes", ATTRIBUTES), *FOUND_FIELDS])
RAW_EDGES = pa.schema(
    [pa.field("user", pa.string()), pa.field("friend", pa.string()), pa.field("weight", pa.float32()), *FOUND_FIELDS]
)
PEOPLE = pa.schema(
    [
        pa.field("item", pa.string()),
        pa.field("relation", pa.string()),
        pa.field("rank", pa.int32()),
        pa.field("name", pa.string()),  # as spelled
        pa.field("key", pa.string()),  # names.person_key(name): the same however a file spells it
    ]
)


# In the place of an item's raw id, before an entity that a triple begins with; before a key, which is then an item's
# raw id. No raw id begins with it: it is white space, and stripped (`etl.identifiers`).
OTHER_END = "\x1f"
ENTITY_PREFIX = "entity:"  # of the key of a graph's entity, which is the same under every relation


class Source(Protocol):
    """A raw log and what lies beside it. Frames are lazy; a frame that the source doesn't have is None."""

    @property
    def time(self) -> Literal["timestamp", "ordinal"]:
        """What `time` of the events means: microseconds, or order only."""
        ...

    @property
    def never_rejects(self) -> bool:
        """Whether no row is ever rejected, so that none need be looked for."""
        ...

    def fingerprint(self, kinds: Sequence[str] = KINDS) -> str:
        """The content's identity: equal where all files of these kinds (or the generator's settings) are equal."""
        ...

    def deliveries(self) -> dict[str, str]:
        """Content identity -> name of the events' files; of files with equal content the first by path."""
        ...

    def table(self) -> "SourceTable | SparkTable | None":
        """The table that events come from, None for a log of files."""
        ...

    def events(self, spark: SparkSession, *, only: Mapping[str, int] | None = None) -> DataFrame:
        """RAW_EVENTS, of EXTRAS what the log has; of the files named in `only`, where given, which says each one's
        place in the log."""
        ...

    def found_in(self, places: Mapping[str, int]) -> dict[str, Column]:
        """`file`, `line` and `place` of an event, by its `source_order`. `places`: file -> its place in the log."""
        ...

    def items(self, spark: SparkSession) -> DataFrame | None:
        """RAW_ITEMS."""
        ...

    def known_items(self, spark: SparkSession) -> DataFrame | None:
        """`item` of the items that an event may name; None: any."""
        ...

    def users(self, spark: SparkSession) -> DataFrame | None:
        """RAW_USERS."""
        ...

    def edges(self, spark: SparkSession) -> DataFrame | None:
        """RAW_EDGES, both directions of an undirected edge."""
        ...

    def people(self, spark: SparkSession) -> DataFrame | None:
        """PEOPLE: metadata the source itself carries."""
        ...


_SPARK_TYPES = {
    pa.string(): "string",
    pa.int64(): "bigint",
    pa.int32(): "int",
    pa.float64(): "double",
    pa.float32(): "float",
    pa.bool_(): "boolean",
}


def spark_schema(schema: pa.Schema) -> str:
    """The Spark DDL of a pyarrow schema (of the types that this module uses)."""
    return ", ".join(f"`{field.name}` {_spark_type(field.type)}" for field in schema)


def _spark_type(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"array<{_spark_type(kind.value_type)}>"
    if pa.types.is_map(kind):
        return f"map<{_spark_type(kind.key_type)}, {_spark_type(kind.item_type)}>"
    if pa.types.is_struct(kind):
        return f"struct<{', '.join(f'{field.name}: {_spark_type(field.type)}' for field in kind)}>"
    return _SPARK_TYPES[kind]
