"""The contract between ETL and everything that reads its tables: names, schemas, keys, order, reserved ids.

A table is a Delta table at ``<lake>/<name>``. Raw ids are strings, whatever the log called them; an *index* is the
dense global int32 a vocabulary table (`items`, `users`, `entities`) gives a raw id, once and for ever. This module
imports pyarrow and nothing heavier, so that trainers can read the contract without Spark.
"""

import hashlib
import zlib
from dataclasses import dataclass, replace

import pyarrow as pa

# Reserved indices, the same in every vocabulary (users use PAD and UNK only). The first raw id gets FIRST_INDEX.
PAD, MASK, CLS, SEP, UNK = range(5)
FIRST_INDEX = 5

DOMAIN_ALL = "all"  # the domain that holds every item
PARTS = ("train", "validation", "test")

# Table properties (Delta `configuration`) that tell a reader what the values mean.
PROPERTY_BUCKETS = "graftrec.buckets"  # number of user buckets of this lake
PROPERTY_TIME = "graftrec.time"  # of tables with times: "timestamp" or, for order only, "ordinal"
TIME_TIMESTAMP, TIME_ORDINAL = "timestamp", "ordinal"
PROPERTY_FORMAT = "graftrec.format"  # how a table is stored; without it: 1

# Format 2 changed six tables:
#   interactions.time, sequences.times, baskets.time, releases.created: timestamps, were integers (microseconds, UTC);
#   they stay integers where they are mere order (PROPERTY_TIME)
#   items.attributes, users.attributes: maps, were lists of structs {name, value}
# Tables of an older format are refused; `python -m etl migrate` brings a lake to this one. Columns added at a table's
# end that may be null need no new format: a table gains them with the next commit.
FORMAT = 2


@dataclass(frozen=True)
class Table:
    """One table: `schema` of its rows in memory, in column order, `key` unique columns, `partition_by` Delta
    partitions, `order` inside a file.

    `times`: columns that are integers in memory, microseconds since 1970 UTC, and timestamps in files. Where `time` is
    "ordinal" they are mere order, and integers in files too. `format`: see FORMAT.
    """

    name: str
    schema: pa.Schema
    key: tuple[str, ...]
    partition_by: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    times: tuple[str, ...] = ()
    time: str = TIME_TIMESTAMP
    format: int = 1

    @property
    def stored(self) -> pa.Schema:
        """The schema of its files and of the Delta log."""
        times = self.times if self.time == TIME_TIMESTAMP else ()
        fields = [field.with_type(_timed(field.type)) if field.name in times else field for field in self.schema]
        return pa.schema(fields)

    @property
    def properties(self) -> dict[str, str]:
        """The table properties that say how it is stored."""
        time = {PROPERTY_TIME: self.time} if self.times else {}
        return time if self.format == 1 else {PROPERTY_FORMAT: str(self.format), **time}

    def of(self, time: str) -> "Table":
        """The table in a lake whose times are "timestamp" or "ordinal"."""
        return replace(self, time=time)


def _timed(kind: pa.DataType) -> pa.DataType:
    return pa.list_(_timed(kind.value_type)) if pa.types.is_list(kind) else pa.timestamp("us", "UTC")


def bucket_of(raw_user_id: str, num_buckets: int) -> int:
    """Bucket of a user: CRC-32 of the UTF-8 raw id, modulo; the same in Spark (`crc32`), zlib and any other reader."""
    return zlib.crc32(raw_user_id.encode()) % num_buckets


def cold_user_hash(raw_user_id: str, domain: str) -> float:
    """BLAKE2b of "<domain>/<raw id>" as a number in [0, 1), the same on every engine and day.

    A split with `cold_users: 0.1` holds out the users below 0.1 in its target domain for test, and those below 0.2 for
    validation. The domain is part of the hash, so that different targets hold out different users.
    """
    return _unit_hash(f"{domain}/{raw_user_id}")


def cold_item_hash(raw_item_id: str, seed: int) -> float:
    """BLAKE2b of "<seed>/<raw id>" as a number in [0, 1), the same on every engine and day, and in all domains.

    A split with `cold_items: {share: 0.15, validation: 0.05}` holds out the items below 0.15 for test, and those below
    0.2 for validation.
    """
    return _unit_hash(f"{seed}/{raw_item_id}")


def _unit_hash(text: str) -> float:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2.0**53


def _field(name: str, kind: pa.DataType, *, null: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=null)


_STRING, _INT, _LONG = pa.string(), pa.int32(), pa.int64()
ATTRIBUTES = pa.map_(_STRING, _STRING)  # name -> value, each name once

INTERACTIONS = Table(
    "interactions",
    pa.schema(
        [
            _field("bucket", _INT),
            _field("user", _STRING),
            _field("item", _STRING),
            _field("time", _LONG),  # in files a timestamp, unless it is mere order: see Table
            _field("event_type", _STRING, null=True),
            _field("value", pa.float64(), null=True),
            _field("basket", _STRING, null=True),
            _field("source_order", _LONG),  # breaks ties in time; later files and later lines are larger
        ]
    ),
    key=("user", "item", "time", "event_type", "value", "basket"),
    partition_by=("bucket",),
    times=("time",),
    format=FORMAT,
)

# What was delivered when: a row for each file of the log (a file of a Delta table is one), appended when it is read. A
# file that is read again, since it was mended or everything is read anew, gets another row.
DELIVERIES = Table(
    "deliveries",
    pa.schema(
        [
            _field("interactions", _LONG),  # the version of that table that has its events
            _field("delivered", _LONG),  # in files a timestamp, whatever the log's times are
            _field("digest", _STRING),  # of a file's content; of a table: its id
            _field("path", _STRING),  # below the source's root
            _field("table_version", _LONG, null=True),  # of a table; null: of a file
            _field("place", _LONG),  # in the log: its events have source_order >> 40 = place
            _field("first_time", _LONG, null=True),  # microseconds since 1970 UTC, or mere order; null: no new event
            _field("last_time", _LONG, null=True),
            _field("rows", _LONG),  # events that it added
            _field("rejects", _LONG),  # rows in quarantine
        ]
    ),
    key=("interactions", "place"),
    order=("interactions", "place"),
    times=("delivered",),
    format=FORMAT,
)

QUARANTINE = Table(
    "quarantine",
    pa.schema(
        [
            _field("kind", _STRING),  # interactions | items | users | edges | knowledge
            _field("file", _STRING),
            _field("line", _LONG),  # 1-based; of a Parquet file: row number
            _field("reason", _STRING),
            _field("raw", _STRING, null=True),  # the row as found, cut at 1,000 characters
            _field("place", _LONG, null=True),  # of a value in its line, from 0, where lines hold several; else null
            _field("column", _STRING, null=True),  # that the reason is about, where it is about one
            _field("found", _STRING, null=True),  # in that column; null: nothing, or a null marker
            _field("setting", _STRING, null=True),  # that decides on the reason
        ]
    ),
    key=("kind", "file", "line", "place"),
    partition_by=("kind", "file"),  # so that a file read again replaces its own rows
)

ITEMS = Table(
    "items",
    pa.schema(
        [
            _field("item", _STRING),
            _field("index", _INT),
            _field("kept", pa.bool_()),  # by k-core, decided on the whole log
            _field("degree", _LONG),  # interactions after cleaning, before k-core
            _field("title", _STRING, null=True),
            _field("year", _INT, null=True),
            _field("categories", pa.list_(_STRING)),  # genres, markets…; empty where unknown
            _field("attributes", ATTRIBUTES),
        ]
    ),
    key=("item",),
    order=("index",),
    format=FORMAT,
)

USERS = Table(
    "users",
    pa.schema(
        [
            _field("user", _STRING),
            _field("index", _INT),
            _field("kept", pa.bool_()),
            _field("degree", _LONG),
            _field("attributes", ATTRIBUTES),
        ]
    ),
    key=("user",),
    order=("index",),
    format=FORMAT,
)

ENTITIES = Table(
    "entities",
    pa.schema(
        [
            _field("entity", _STRING),  # "<kind>:<normalised name>", e.g. "person:james cameron"
            _field("index", _INT),
            _field("kind", _STRING),
            _field("name", _STRING),
        ]
    ),
    key=("entity",),
    order=("index",),
)

DOMAINS = Table(
    "domains",
    pa.schema(
        [
            _field("domain", _STRING),
            _field("item", _STRING),
            _field("index", _INT),  # the item's global index
            _field("rule", _STRING),  # the rule that put it there, as configured
        ]
    ),
    key=("domain", "item"),
    partition_by=("domain",),
    order=("index",),
)

KNOWLEDGE = Table(
    "knowledge",
    pa.schema(
        [
            _field("head", _STRING),  # raw id of an item or entity
            _field("relation", _STRING),  # director | actor | …; never the inverse of one that is there
            _field("tail", _STRING),  # raw id of an entity or item
            _field("rank", _INT),  # 1 = first actor, 2 = second…
            _field("source", _STRING),  # where it came from: imdb | dbpedia | generator | the log's own name
            _field("head_index", _INT),
            _field("tail_index", _INT),
            _field("head_kind", _STRING, null=True),  # whose vocabulary has the head: item | entity; null: item
            _field("tail_kind", _STRING, null=True),  # and the tail; null: entity
        ]
    ),
    key=("head_kind", "head", "relation", "tail_kind", "tail"),
    order=("head_index", "relation", "rank"),
)

SOCIAL = Table(
    "social",
    pa.schema(
        [
            _field("user", _STRING),
            _field("friend", _STRING),
            _field("weight", pa.float32()),
            _field("user_index", _INT),
            _field("friend_index", _INT),
        ]
    ),
    key=("user", "friend"),
    order=("user_index", "friend_index"),
)

# Vectors of items, users and entities by encoders: of text, of graphs. What an encoder has no vector of has no row. The
# partition of an encoder is written whole, or gains rows; its commit records what the vectors were made by and from
# (`etl.lake.encodings`).
FEATURES = Table(
    "features",
    pa.schema(
        [
            _field("kind", _STRING),  # item | user | entity
            _field("id", _STRING),  # raw id
            _field("index", _INT),  # its global index
            _field("encoder", _STRING),
            # Whose training part was read; "", which Delta spells as null, where no interaction was.
            _field("split", _STRING, null=True),
            _field("vector", pa.list_(pa.float32())),  # finite, not zero, as wide as all others of its encoder
            _field("source_hash", _LONG, null=True),  # 8 bytes of BLAKE2b of the text it was made from; null: of none
        ]
    ),
    key=("kind", "id", "encoder", "split"),
    partition_by=("kind", "encoder", "split"),
    order=("index",),
)

# items[:valid_start] is the training part, items[valid_start:test_start] validation, items[test_start:end] test; what
# lies past `end` belongs to no part (the `causal` split cuts there). Rows of the domain `all` under a joint split are
# three runs, each in time order: trained on, held out, past the end. A user too short for a hold-out has all three
# equal. A split with cold users holds out their whole row of its target domain (valid_start = 0): for test where
# test_start = 0 too, else for validation. A split by time has them where its dates fall in `times`, the same for all:
# valid_start = 0 is a user who is new since training. A split with cold items has three runs, each in time order: what
# is trained on, all of it warm; the events of cold validation items, and the last warm items that are held out for
# validation; the same for test. What is read before either part is items[:valid_start]: no cold item is ever input.
# Rows of a split by chance (`random`) are three runs too, one a part; a split with `user_folds` holds out users' whole
# rows for test.
SEQUENCES = Table(
    "sequences",
    pa.schema(
        [
            _field("split", _STRING),
            _field("domain", _STRING),
            _field("bucket", _INT),
            _field("user", _INT),  # global user index
            _field(
                "items", pa.list_(_INT)
            ),  # global item indices in (time, the split's rule for ties); kept items only
            _field("times", pa.list_(_LONG), null=True),  # in files timestamps, as in interactions
            _field("event_types", pa.list_(_STRING), null=True),
            _field("values", pa.list_(pa.float32()), null=True),
            _field("valid_start", _INT),
            _field("test_start", _INT),
            _field("end", _INT),
        ]
    ),
    key=("split", "domain", "user"),
    partition_by=("split", "domain", "bucket"),
    order=("user",),
    times=("times",),
    format=FORMAT,
)

# The last basket of a user is the test part, the one before it validation, where there are at least three. A split by
# time cuts baskets at its dates; what is later than the last one is left out.
BASKETS = Table(
    "baskets",
    pa.schema(
        [
            _field("split", _STRING),
            _field("domain", _STRING),
            _field("bucket", _INT),
            _field("user", _INT),
            _field("basket", _INT),  # 0, 1, 2… in time order
            _field("time", _LONG),  # of its first item
            _field("part", _STRING),
            _field("items", pa.list_(_INT)),
        ]
    ),
    key=("split", "domain", "user", "basket"),
    partition_by=("split", "domain", "bucket"),
    order=("user", "basket"),
    times=("time",),
    format=FORMAT,
)

NEGATIVES = Table(
    "negatives",
    pa.schema(
        [
            _field("split", _STRING),
            _field("domain", _STRING),
            _field("bucket", _INT),
            _field("protocol", _STRING),  # uniform-100 | popular-100 | top-100
            _field("part", _STRING),  # validation | test
            _field("user", _INT),
            # Never an item the user has interacted with, in any part; of a split by time only items that the log has
            # before the part ends.
            _field("items", pa.list_(_INT)),
        ]
    ),
    key=("split", "domain", "protocol", "part", "user"),
    partition_by=("split", "domain", "bucket"),
    order=("protocol", "part", "user"),
)

RECOMMENDATIONS = Table(
    "recommendations",
    pa.schema(
        [
            _field("domain", _STRING),
            _field("bucket", _INT),
            _field("user", _STRING),
            _field("rank", _INT),  # 1 = best
            _field("item", _STRING),
            _field("score", pa.float32()),
            _field("model_version", _STRING),  # "<registered model>/<version>"
            _field("release", _LONG),
        ]
    ),
    key=("domain", "user", "rank"),
    partition_by=("domain", "bucket"),
    order=("user", "rank"),
)

# Each list that a server gave (`trainer/serving`), best in a lake of its own: a lake has one writer. In no release.
SERVED = Table(
    "served",
    pa.schema(
        [
            _field("day", _STRING),  # of `time`, UTC: 2026-11-30
            _field("request", _STRING),  # its id
            _field("place", _INT),  # of the record in the request
            _field("time", _LONG),  # in files a timestamp, whatever the log's times are
            _field("user", _STRING, null=True),  # raw id, as the request named it; personal data
            _field("domain", _STRING, null=True),  # as the request named it
            _field("version", _STRING),  # "<registered model>/<version>"
            _field("basis", _STRING),  # model | friends | popular
            _field("items", pa.list_(_STRING)),  # best first
            _field("scores", pa.list_(pa.float64())),
        ]
    ),
    key=("day", "request", "place"),
    partition_by=("day",),
    order=("time", "request", "place"),
    times=("time",),
    format=FORMAT,
)

RELEASES = Table(
    "releases",
    pa.schema(
        [
            _field("release", _LONG),  # 1, 2, 3…
            _field("created", _LONG),  # in files a timestamp, whatever the log's times are
            _field("tables", pa.list_(pa.struct([pa.field("table", _STRING), pa.field("version", _LONG)]))),
            _field("config", _STRING),  # the ETL configuration, JSON
            _field("config_hash", _STRING),
            _field("code_version", _STRING),
            # When maintenance removed what only this release held, ISO 8601 in UTC; null: it can be read.
            _field("removed", _STRING, null=True),
        ]
    ),
    key=("release",),
    order=("release",),
    times=("created",),
    format=FORMAT,
)

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        INTERACTIONS,
        DELIVERIES,
        QUARANTINE,
        ITEMS,
        USERS,
        ENTITIES,
        DOMAINS,
        KNOWLEDGE,
        SOCIAL,
        FEATURES,
        SEQUENCES,
        BASKETS,
        NEGATIVES,
        RECOMMENDATIONS,
        SERVED,
        RELEASES,
    )
}
