"""Vectors of items, users or entities from their texts, their columns, the knowledge graph or the social
network, in the Delta table `features`, and a release with them.

Executors encode in parallel, on one thread each, what has no vector yet or another text than when it was encoded. A
second run encodes nothing and reads nothing of the tables. The vectors of things that have left, or have no text any
more, leave. One commit replaces the encoder's partition, or appends to it where only new things came.
"""

import functools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from etl import tables
from etl.jobs import features, releases
from etl.jobs.features import FeatureError
from etl.lake import spark_io
from etl.lake.encodings import Encoding, encodings
from etl.plain_path import absolute
from etl.redaction import redact
from etl.session import held, spark_session, user_errors
from etl.settings import ConfigError
from etl.tables import DOMAIN_ALL, DOMAINS, FEATURES, KNOWLEDGE, SOCIAL, Table
from trainer import tracking
from trainer.arrays import FloatArray, IntArray
from trainer.config import FeaturesConfig, GraphConfig, SocialConfig
from trainer.config.columns import attribute_of, columns_read, known_columns, unknown_columns
from trainer.config.features import AttributesConfig, TextConfig
from trainer.data.documents import cells_of
from trainer.data.release import Release, pin
from trainer.encoders import TextEncoder, text_encoder
from trainer.encoders.attributes import attribute_vectors, reduced
from trainer.encoders.batches import ROWS, encoded, rendered
from trainer.encoders.text import Part, as_placeholders
from trainer.knowledge_graph.vectors import FEATURES as VECTORS
from trainer.parallel.distributed import join
from trainer.recipes import graph_features, social_features

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
    if config.graph is not None:
        return _of_run(config, config.graph)
    if config.social is not None:
        return _of_run(config, config.social)
    given = config.text if config.attributes is None else config.attributes
    if unknown := unknown_columns(given.kind, given.columns):
        setting = "text" if config.attributes is None else "attributes"
        known = known_columns(given.kind)
        raise ConfigError(f"{setting}: expected columns of {_THINGS[given.kind].name} ({known}), found {unknown[0]!r}")
    encoder = text_encoder(config.text.encoder) if config.attributes is None else None
    release, begun = pin(config.lake, config.release), time.monotonic()
    with spark_io.writing(release.lake, FEATURES, wait_seconds=config.wait_seconds):
        release = pin(config.lake, config.release)  # another writer may have made a newer one meanwhile
        if encoder is not None:
            encoding, (things, covered, encoded) = _of_texts(config, release, encoder)
        else:
            assert config.attributes is not None
            encoding, (things, covered, encoded) = _of_attributes(config, config.attributes, release)
        version = spark_io.current_version(release.lake, FEATURES)
        assert version is not None
        number, committed = releases.release_with(release.lake, {FEATURES.name: version})
    released = f"release {number} ({'new' if committed else 'unchanged'}) in {release.lake}"
    if things:
        print(
            f"features {encoding.name}: {encoded:,} encoded, {covered:,} of {things:,} {_THINGS[given.kind].name} "
            f"({covered / things:.1%}) have one, {encoding.width} wide; {released}",
            flush=True,
        )
    else:
        print(f"features {encoding.name}: unchanged, 0 encoded; {released}", flush=True)
    result = Result(things, covered, encoded, number, committed)
    if things and committed:
        _record(config, encoding, result, time.monotonic() - begun)
    return result


def _record(config: FeaturesConfig, encoding: Encoding, result: Result, seconds: float) -> None:
    """An MLflow run of what was encoded; a run that found all done leaves none."""
    name, release = encoding.encoder, pin(config.lake, result.release)
    with tracking.start_run(
        config.tracking, name=name, resolved=config, tags={"graftrec.recipe": "features"}
    ) as tracked:
        tracked.log_release(release, tables=[_THINGS[encoding.kind].name, FEATURES.name], context="output")
        tracked.log_params({"encoding.template": encoding.template, "encoding.weights": encoding.weights})
        tracked.log_metrics(
            {
                "things": result.things,
                "coverage": result.covered / result.things,
                "encoded": result.encoded,
                "width": encoding.width,
                "seconds": seconds,
                "encoded_per_second": result.encoded / seconds,
            }
        )
        tracked.describe(
            f"Vectors of {_THINGS[encoding.kind].name} by {name}, {encoding.width} wide, in release {result.release} "
            f"of `{redact(release.lake)}`: {result.encoded:,} encoded in {seconds:,.0f} s; {result.covered:,} of "
            f"{result.things:,} have one ({result.covered / result.things:.1%})."
        )


def _of_run(config: FeaturesConfig, given: GraphConfig | SocialConfig) -> Result:
    """Train an embedding of the knowledge graph or the social network, or find it trained, and write the vectors of its
    nodes. Of several processes the first one writes."""
    lake, things = absolute(given.data.lake), 0
    _refuse_name(given, lake)
    trained = graph_features.run(given) if isinstance(given, GraphConfig) else social_features.run(given)
    if not join(given.runtime).first:
        return Result(0, 0, 0, 0, False)
    with spark_io.writing(lake, FEATURES, wait_seconds=config.wait_seconds):
        for encoding, ids, index, vectors in _vectors_in(trained.folder):
            things += len(ids)
            if encodings(lake).get(encoding.name) != encoding:
                features.write_arrays(lake, ids, index, vectors, encoding, max_shared=config.max_shared)
        version = spark_io.current_version(lake, FEATURES)
        assert version is not None
        number, committed = releases.release_with(lake, {FEATURES.name: version})
    state = "new" if committed else "unchanged"
    print(f"features {given.name}: {things:,} things have one; release {number} ({state}) in {lake}", flush=True)
    return Result(things, things, things if committed else 0, number, committed)


def _refuse_name(given: GraphConfig | SocialConfig, lake: str) -> None:
    """Raises ConfigError where the table has vectors of that name by an encoder of another kind, which those of this
    run would replace."""
    setting, own = ("graph", KNOWLEDGE) if isinstance(given, GraphConfig) else ("social", SOCIAL)
    for found in encodings(lake).values():
        if found.encoder == given.name and (found.template or own.name not in found.inputs):
            raise ConfigError(
                f"{setting}.name: expected one of its own, found {given.name!r}, by which {lake} has vectors of "
                f"another encoder ({found.template or ', '.join(found.inputs) or 'of no table'}); set another name"
            )


def _vectors_in(folder: Path) -> Iterator[tuple[Encoding, list[str], IntArray, FloatArray]]:
    """Raw ids [N], global indices [N] and vectors [N, F] of each kind of thing that a run left a vector of."""
    rows = pq.read_table(folder / "model" / VECTORS)
    recorded = {key.decode(): value.decode() for key, value in rows.schema.metadata.items()}
    width = int(recorded["graftrec.width"])
    versions = {
        name: number for name, number in json.loads(recorded["graftrec.snapshots"]).items() if number is not None
    }
    for kind in rows["kind"].unique().to_pylist():
        some = rows.filter(pc.equal(rows["kind"], kind)).combine_chunks()
        encoding = Encoding(
            kind=kind,
            encoder=some["encoder"][0].as_py(),
            split=some["split"][0].as_py(),
            width=width,
            weights=recorded["graftrec.weights"],
            inputs=versions,
        )
        vectors = some["vector"].combine_chunks().flatten().to_numpy().reshape(-1, width)
        yield encoding, some["id"].to_pylist(), some["index"].to_numpy().astype(np.int64), vectors


Counts = tuple[int, int, int]  # things, those with a vector, those encoded now; zeros where nothing was read


def _of_texts(config: FeaturesConfig, release: Release, encoder: TextEncoder) -> tuple[Encoding, Counts]:
    table = _THINGS[config.text.kind]
    encoding = Encoding(
        kind=config.text.kind,
        encoder=config.name or encoder.name,
        width=encoder.width,
        weights=encoder.weights,
        template=_template(config.text),
        inputs={table.name: release.versions[table.name]},
    )
    before = features.check_weights(release.lake, encoding)
    if before == encoding:
        return encoding, (0, 0, 0)
    with user_errors():
        return encoding, _renew(config, release, table, encoding, before)


def _of_attributes(config: FeaturesConfig, given: AttributesConfig, release: Release) -> tuple[Encoding, Counts]:
    """Without Spark: a vocabulary's columns are few, and its values are counted over all of it."""
    table = _THINGS[given.kind]
    rows = release.read(table, [given.kind, "index", *columns_read(given.columns)])
    _refuse_none(len(rows), table, release)
    cells = {name: cells_of(rows, name) for name in given.columns}
    tails = _tails(release, given, rows["index"].to_numpy())
    vectors, names = attribute_vectors(
        {name: cells[name] for name in given.categorical} | tails,
        {name: cells[name] for name in given.numeric},
        min_things=given.min_things,
    )
    if given.components is not None:
        vectors = reduced(vectors, given.components)
        names = (*names, f"reduced to {vectors.shape[1]}")
    encoding = Encoding(
        kind=given.kind,
        encoder=config.name or "attributes",
        width=vectors.shape[1],
        template="; ".join(names),
        inputs={one.name: release.versions[one.name] for one in _tables_read(given)},
    )
    if features.check_weights(release.lake, encoding) == encoding:
        return encoding, (0, 0, 0)
    has = np.flatnonzero(vectors.any(axis=1))
    ids, index = rows[given.kind].take(has).to_pylist(), rows["index"].to_numpy()[has]
    # Many share all of these columns: none of them is a placeholder.
    features.write_arrays(release.lake, ids, index, vectors[has], encoding, max_shared=1)
    return encoding, (len(rows), len(has), len(has))


def _tables_read(given: AttributesConfig) -> list[Table]:
    found = [_THINGS[given.kind]]
    if given.relations:
        found.append(KNOWLEDGE)
    if not given.join_domains:
        found.append(DOMAINS)
    return found


def _tails(release: Release, given: AttributesConfig, index: IntArray) -> dict[str, list[Part]]:
    """Relation -> the tails of each item, by its global `index`. Raises ConfigError for a relation without triples."""
    if not given.relations:
        return {}
    triples = release.read(KNOWLEDGE, ["head_index", "relation", "tail", "head_kind"])
    triples = triples.filter(pc.fill_null(pc.equal(triples["head_kind"], "item"), True))
    place = {number: row for row, number in enumerate(index.tolist())}
    domains = {} if given.join_domains else _domains(release)
    found: dict[str, list[Part]] = {}
    for relation in given.relations:
        own = triples.filter(pc.equal(triples["relation"], relation))
        if not len(own):
            known = ", ".join(sorted(triples["relation"].unique().to_pylist())) or "none"
            raise ConfigError(f"attributes.relations: expected relations of items ({known}), found {relation!r}")
        tails: list[list[str]] = [[] for _ in place]
        for head, tail in zip(own["head_index"].to_pylist(), own["tail"].to_pylist(), strict=True):
            tails[place[head]] += [f"{tail} ({domain})" for domain in domains.get(head, ())] or [tail]
        found[relation] = list(tails)
    return found


def _domains(release: Release) -> dict[int, list[str]]:
    """Global index of an item -> the domains that it is in, besides all."""
    found: dict[int, list[str]] = {}
    for domain in sorted({str(part["domain"]) for part in release.partitions(DOMAINS)} - {DOMAIN_ALL}):
        for index in release.read(DOMAINS, ["index"], {"domain": domain})["index"].to_pylist():
            found.setdefault(index, []).append(domain)
    return found


def _refuse_none(count: int, table: Table, release: Release) -> None:
    """Raises FeatureError for a table without a row."""
    if not count:
        raise FeatureError(
            f"features: expected rows in the table {table.name}, found none in release {release.number} of "
            f"{release.lake}; take another release or lake"
        )


def _template(text: TextConfig) -> str:
    """With what stands for no text: both decide on a thing's text."""
    without = f" without {', '.join(map(repr, sorted(text.placeholders)))}" if text.placeholders else ""
    return text.template + without


def _renew(
    config: FeaturesConfig, release: Release, table: Table, encoding: Encoding, before: Encoding | None
) -> Counts:
    """Encode what is new or changed, and commit it."""
    spark = spark_session(config.spark, name="graftrec features")
    lake, text = release.lake, config.text
    things = spark_io.read(spark, lake, table, version=release.versions[table.name])
    texts = held(_texts(things, text))
    total, covered = things.count(), texts.count()
    _refuse_none(total, table, release)
    if not covered:
        raise FeatureError(
            f"features {encoding.name}: expected a text of one of {total:,} {table.name} at least, found none in "
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
    num_new = new.count()
    all_kept = old.count() == covered - num_new
    if all_kept and not num_new and before.template == encoding.template:
        return total, covered, 0
    rows = held(_encoded(new, text, num_new, config.spark.shuffle_partitions)) if num_new else None
    if rows is None or not all_kept:
        rows = kept if rows is None else kept.unionByName(rows)
        all_kept = False
    features.write_frame(spark, lake, rows, encoding, append=all_kept, max_shared=config.max_shared)
    return total, covered, num_new


def _check_shared(texts: DataFrame, encoding: Encoding, covered: int, max_shared: float) -> None:
    """Raise FeatureError where too many things have the same text, before any is encoded."""
    groups = texts.groupBy("source_hash").agg(F.count(F.lit(1)).alias("count"), F.min("text").alias("text"))
    found = groups.agg(F.max(F.struct("count", "text")).alias("most")).first()
    count, text = found["most"] if found is not None else (0, "")
    if count >= features.LEAST_SHARED and count > max_shared * covered:
        shown = repr(text if len(text) < 80 else f"{text[:80]}…")
        raise FeatureError(
            f"features {encoding.name}: expected a text to be that of {max_shared:.0%} of {covered:,} "
            f"{_THINGS[encoding.kind].name} at most, found {shown} of {count:,}; give --text.placeholders if that says "
            "nothing, else add a column that tells them apart, or raise --max_shared"
        )


def _texts(things: DataFrame, text: TextConfig) -> DataFrame:
    """id, index, text and its hash, of the things that have a text."""
    attributes = {name: attribute_of(name) for name in text.columns}
    columns = [
        F.col(name) if attribute is None else F.col("attributes").getItem(attribute)
        for name, attribute in attributes.items()
    ]
    named = [column.alias(f"_{place}") for place, column in enumerate(columns)]
    placeholders = as_placeholders(text.placeholders)
    given = things.select(F.col(text.kind).alias("id"), "index", *named)
    return given.mapInArrow(functools.partial(rendered, placeholders=placeholders), _TEXTS)


def _encoded(texts: DataFrame, text: TextConfig, count: int, parallel: int) -> DataFrame:
    """ROWS of `count` texts, spread over enough tasks to keep every core busy."""
    tasks = max(1, min(count, max(parallel, -(-count // text.texts_at_once))))
    encode = functools.partial(encoded, name=text.encoder, at_once=text.texts_at_once)
    return texts.repartition(tasks, "id").mapInArrow(encode, features.ROWS)
