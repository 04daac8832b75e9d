"""Vectors of items, users or entities from their texts, in the Delta table `features`, and a release with them.

Executors encode in parallel, on one thread each, what has no vector yet or another text than when it was encoded. A
second run encodes nothing and reads nothing of the tables. The vectors of things that have left, or have no text any
more, leave. One commit replaces the encoder's partition, or appends to it where only new things came.
"""

import functools
from dataclasses import dataclass

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from etl import tables
from etl.jobs import features, releases
from etl.jobs.features import Encoding, FeatureError
from etl.lake import spark_io
from etl.session import held, spark_session, user_errors
from etl.settings import ConfigError
from etl.tables import FEATURES, Table
from trainer.config import FeaturesConfig
from trainer.config.features import COLUMNS, TextConfig
from trainer.data.release import Release, pin
from trainer.encoders import text_encoder
from trainer.encoders.batches import ROWS, encoded, rendered

_THINGS = {"item": tables.ITEMS, "user": tables.USERS, "entity": tables.ENTITIES}
_TEXTS = "id string, index int, text string, source_hash bigint"


@dataclass(frozen=True)
class Result:
    """What a run left: things, those with a vector, those encoded now, the release, and whether it is a new one."""

    things: int
    covered: int
    encoded: int
    release: int
    committed: bool


def run(config: FeaturesConfig) -> Result:
    """The recipe `features`. Raises GraftrecError."""
    text = config.text
    if unknown := text.unknown_columns():
        known = [*COLUMNS[text.kind], *([] if text.kind == "entity" else ["attributes.<name>"])]
        raise ConfigError(f"text.columns: expected columns of {text.kind}s ({', '.join(known)}), found {unknown[0]!r}")
    encoder = text_encoder(text.encoder)
    table = _THINGS[text.kind]
    release = pin(config.lake, config.release)
    with spark_io.writing(release.lake, FEATURES, wait_seconds=config.wait_seconds):
        release = pin(config.lake, config.release)  # another writer may have made a newer one meanwhile
        encoding = Encoding(
            kind=text.kind,
            encoder=config.name or encoder.name,
            width=encoder.width,
            weights=encoder.weights,
            template=_template(text),
            inputs={table.name: release.versions[table.name]},
        )
        before = features.check_weights(release.lake, encoding)
        if before == encoding:
            things = covered = encoded = 0
        else:
            with user_errors():
                things, covered, encoded = _renew(config, release, table, encoding, before)
        version = spark_io.current_version(release.lake, FEATURES)
        assert version is not None
        number, committed = releases.release_with(release.lake, {FEATURES.name: version})
    fate = "new" if committed else "unchanged"
    if before == encoding:
        print(
            f"features {encoding.name}: unchanged, 0 encoded; release {number} ({fate}) in {release.lake}", flush=True
        )
    else:
        share = covered / things if things else 0.0
        print(
            f"features {encoding.name}: {encoded:,} encoded, {covered:,} of {things:,} {text.kind}s ({share:.1%}) have "
            f"one, {encoding.width} wide; release {number} ({fate}) in {release.lake}",
            flush=True,
        )
    return Result(things, covered, encoded, number, committed)


def _template(text: TextConfig) -> str:
    """With what stands for no text: both decide on a thing's text."""
    without = f" without {', '.join(map(repr, sorted(text.placeholders)))}" if text.placeholders else ""
    return text.template + without


def _renew(
    config: FeaturesConfig, release: Release, table: Table, encoding: Encoding, before: Encoding | None
) -> tuple[int, int, int]:
    """Encode what is new or changed and commit it: things, those with a vector, those encoded."""
    spark = spark_session(config.spark, name="graftrec features")
    lake, text = release.lake, config.text
    things = spark_io.read(spark, lake, table, version=release.versions[table.name])
    texts = held(_texts(things, text))
    total, covered = things.count(), texts.count()
    if not covered:
        raise FeatureError(
            f"features {encoding.name}: expected a text of one of {total:,} {text.kind}s at least, found none in "
            f"{', '.join(text.columns)}; name columns that hold texts: --text.columns"
        )
    _check_shared(texts, encoding, covered, config.max_shared)
    if before is None:
        rows = held(_encoded(texts, text, covered, config.spark.shuffle_partitions))
        features.write_frame(spark, lake, rows, encoding, max_shared=config.max_shared)
        return total, covered, covered
    old = spark_io.read(spark, lake, FEATURES, partitions=encoding.partition)
    kept = old.join(texts.select("id", "source_hash"), ["id", "source_hash"], "left_semi").select(*ROWS)
    new = held(texts.join(old.select("id", "source_hash"), ["id", "source_hash"], "left_anti"))
    encoded = new.count()
    all_kept = old.count() == covered - encoded
    if all_kept and not encoded and before.template == encoding.template:
        return total, covered, 0
    rows = held(_encoded(new, text, encoded, config.spark.shuffle_partitions)) if encoded else None
    if rows is None or not all_kept:
        rows = kept if rows is None else kept.unionByName(rows)
        all_kept = False
    features.write_frame(spark, lake, rows, encoding, append=all_kept, max_shared=config.max_shared)
    return total, covered, encoded


def _check_shared(texts: DataFrame, encoding: Encoding, covered: int, max_shared: float) -> None:
    """Raise FeatureError where too many things have the same text, before any is encoded."""
    groups = texts.groupBy("source_hash").agg(F.count(F.lit(1)).alias("count"), F.min("text").alias("text"))
    found = groups.agg(F.max(F.struct("count", "text")).alias("most")).first()
    count, text = found["most"] if found is not None else (0, "")
    if count >= features.LEAST_SHARED and count > max_shared * covered:
        shown = repr(text if len(text) < 80 else f"{text[:80]}…")
        raise FeatureError(
            f"features {encoding.name}: expected a text to be that of {max_shared:.0%} of {covered:,} "
            f"{encoding.kind}s at most, found {shown} of {count:,}; give --text.placeholders if that says "
            "nothing, else add a column that tells them apart, or raise --max_shared"
        )


def _texts(things: DataFrame, text: TextConfig) -> DataFrame:
    """id, index, text and its hash, of the things that have a text."""
    columns = [
        F.col("attributes").getItem(name.removeprefix("attributes.")) if name.startswith("attributes.") else F.col(name)
        for name in text.columns
    ]
    named = [column.alias(f"_{place}") for place, column in enumerate(columns)]
    placeholders = frozenset(placeholder.strip().casefold() for placeholder in text.placeholders)
    given = things.select(F.col(text.kind).alias("id"), "index", *named)
    return given.mapInArrow(functools.partial(rendered, placeholders=placeholders), _TEXTS)


def _encoded(texts: DataFrame, text: TextConfig, count: int, parallel: int) -> DataFrame:
    """ROWS of `count` texts, spread over enough tasks to keep every core busy."""
    tasks = max(1, min(count, max(parallel, -(-count // text.texts_at_once))))
    encode = functools.partial(encoded, name=text.encoder, at_once=text.texts_at_once)
    return texts.repartition(tasks, "id").mapInArrow(encode, features.ROWS)
