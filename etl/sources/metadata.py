"""Knowledge from files beside the log: who directed an item, who acts in it, and whatever else a column says.

A file is joined to the items by their raw id, or by normalised title and year. By title, the year must be equal; a
year off by one is accepted only where neither side has another candidate. Two different works of one title and year
match nothing. A file of triples: see `triples`. A name that stands for none (`unknown`) is no one's. Files stand in
order of trust: a later one supplies only what the earlier ones lack for an item and relation.
"""

from collections.abc import Iterator

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.window import Window

from etl.config import KnowledgeConfig, KnowledgeFileConfig
from etl.identifiers import is_no_text, text
from etl.settings import GraftrecError
from etl.sources import values
from etl.sources.delimited import Chunk
from etl.sources.delta_table import SourceTable
from etl.sources.entity_keys import listed_names, person_key, title_keys
from etl.sources.files import RawFile, find_files, fingerprint
from etl.sources.rows import RawRows, Shape
from etl.sources.schema import PEOPLE, spark_schema
from etl.sources.triples import Keep, anew, graph_triples

_WORKS = pa.schema(
    [
        pa.field("work", pa.string()),  # "<file>:<line>"
        pa.field("id", pa.string()),
        pa.field("titles", pa.list_(pa.string())),  # keys
        pa.field("year", pa.int64()),
        pa.field("people", pa.list_(pa.struct([f for f in PEOPLE if f.name != "item"]))),
        pa.field("signature", pa.string()),  # tells two works of one title and year from a work listed twice
    ]
)
_NAMED = [field.name for field in PEOPLE if field.name != "item"]


def knowledge(spark: SparkSession, config: KnowledgeConfig, items: DataFrame, *, keep: Keep = anew) -> DataFrame:
    """item, relation, rank, name, key, source of all files, for `items` (item, title, year). `keep`: of files of
    triples, for who reads them again. Raises GraftrecError."""
    found: DataFrame | None = None
    for position, file in enumerate(config.files):
        rows = file_triples(spark, file, config.root, items, setting=f"knowledge.files[{position}]", keep=keep)
        if found is None:
            found = rows
            continue
        known = found.select("item", "relation").distinct()
        found = found.unionByName(rows.join(known, ["item", "relation"], "left_anti"))
    if found is None:
        return spark.createDataFrame([], spark_schema(PEOPLE)).withColumn("source", F.lit(""))
    return found


def knowledge_fingerprint(config: KnowledgeConfig) -> str:
    """The files' content identity; "" where there is none."""
    files, tables = [], ""
    for position, described in enumerate(config.files):
        setting = f"knowledge.files[{position}].path"
        if described.format == "delta":
            tables += SourceTable(config.root, described, setting=setting).key
        else:
            files += find_files(config.root, described.path, what=setting, member=described.member)
        if (link := described.link) is not None:
            files += find_files(
                config.root, link.path, what=f"knowledge.files[{position}].link.path", member=link.member
            )
    return (fingerprint(files) if files else "") + tables


def file_triples(
    spark: SparkSession, config: KnowledgeFileConfig, root: str, items: DataFrame, *, setting: str, keep: Keep = anew
) -> DataFrame:
    """item, relation, rank, name, key, source of one file."""
    if config.triples is not None:
        return graph_triples(spark, config, root, items, setting=setting, keep=keep)
    wanted = _wanted(config, setting)
    rows = RawRows(config, root, list(wanted), setting=f"{setting}.path")
    works = rows.map(spark, _works(config), _WORKS)
    if config.by == "id":
        matched = items.select("item").join(works.withColumnRenamed("id", "item"), "item")
        place = F.row_number().over(Window.partitionBy("item").orderBy("work"))
        matched = matched.select("item", "people", place.alias("_place")).where("_place = 1")
    else:
        matched = match_titles(items, works).join(works.select("work", "people"), "work")
    people = matched.select("item", F.explode("people").alias("person"))
    return people.select("item", *(f"person.{name}" for name in _NAMED)).withColumn("source", F.lit(config.name))


def match_titles(items: DataFrame, works: DataFrame) -> DataFrame:
    """item, work: items (item, title, year) that are works (work, titles, year, signature), by title and year."""
    wanted = items.mapInArrow(_keys, "item string, place int, key string, year bigint")
    titled = works.select("work", F.posexplode("titles").alias("place", "key"), "year", "signature").where(
        "year is not null"
    )
    offered = (
        titled.groupBy("key", "year")
        .agg(F.min("work").alias("work"), F.countDistinct("signature").alias("num_works"))
        .where("num_works = 1")
        .select("key", "year", "work")
    )
    best = Window.partitionBy("item").orderBy("place", "work")
    exact = (
        wanted.join(offered, ["key", "year"])
        .withColumn("order", F.row_number().over(best))
        .where("order = 1")
        .select("item", "work")
    )
    near = (
        wanted.join(exact.select("item"), "item", "left_anti")
        .withColumn("near", F.explode(F.array(F.col("year") - 1, F.col("year") + 1)))
        .join(offered.withColumnRenamed("year", "near"), ["key", "near"])
        .join(exact.select("work"), "work", "left_anti")
        .select("item", "work")
        .distinct()
    )
    only = near.join(near.groupBy("item").count().where("count = 1").select("item"), "item")
    only = only.join(near.groupBy("work").count().where("count = 1").select("work"), "work")
    return exact.unionByName(only.select("item", "work"))


def _wanted(config: KnowledgeFileConfig, setting: str) -> list[str | int]:
    keys = [config.id] if config.by == "id" else [config.title, config.year]
    named = ["id"] if config.by == "id" else ["title", "year"]
    for name, column in zip(named, keys, strict=True):
        if column is None:
            raise GraftrecError(f"{setting}.{name}: expected a column, since rows are joined by {config.by}; set it")
    people = [column for columns in config.relations.values() for column in columns]
    return [column for column in keys if column is not None] + people


def _works(config: KnowledgeFileConfig) -> Shape:
    """Rows of the file to _WORKS. Rejected rows are left out: a file of knowledge is no log."""
    num_keys = 1 if config.by == "id" else 2

    def shape(chunk: Chunk, file: RawFile) -> pa.Table:
        size = len(chunk.line)
        first = text(chunk.columns[0]).to_pylist()
        years = values.whole_number(chunk.columns[1]).to_pylist() if num_keys == 2 else [None] * size
        cells = [text(column).to_pylist() for column in chunk.columns[num_keys:]]
        people = [_people([column[row] for column in cells], config) for row in range(size)]
        table = pa.table(
            {
                "work": [f"{file.index:06}:{line:012}" for line in chunk.line.to_pylist()],
                "id": pa.array(first, pa.string()),
                "titles": [title_keys(title or "") if num_keys == 2 else [] for title in first],
                "year": pa.array(years, pa.int64()),
                "people": pa.array(people, _WORKS.field("people").type),
                "signature": ["|".join(str(p["key"]) for p in row if p["rank"] == 1) for row in people],
            },
            schema=_WORKS,
        )
        return table.filter(chunk.reason.is_null())

    return shape


def _people(cells: list[str | None], config: KnowledgeFileConfig) -> list[dict[str, object]]:
    """The people of one row; one who is named twice in a relation counts once, at the better rank."""
    found: list[dict[str, object]] = []
    rest = iter(cells)
    for relation, columns in config.relations.items():
        names: dict[str, str] = {}
        for _ in columns:
            cell = next(rest) or ""
            if config.list_columns:
                spelled = listed_names(cell, underscores=config.underscores)
            else:
                spelled = [" ".join((cell.replace("_", " ") if config.underscores else cell).split())]
            for name in spelled:
                if not is_no_text(name) and (key := person_key(name)):
                    names.setdefault(key, name)
        limit = config.max_rank.get(relation, len(names))
        found += [
            {"relation": relation, "rank": rank, "name": name, "key": key}
            for rank, (key, name) in enumerate(list(names.items())[:limit], start=1)
        ]
    return found


def _keys(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Items (item, title, year) to a row for each title an item goes by."""
    for batch in batches:
        rows = [
            (item, place, key, year)
            for item, title, year in zip(
                *(batch.column(name).to_pylist() for name in ("item", "title", "year")), strict=True
            )
            if title is not None and year is not None
            for place, key in enumerate(title_keys(title))
        ]
        columns = zip(*rows, strict=True) if rows else ((), (), (), ())
        types = [pa.string(), pa.int32(), pa.string(), pa.int64()]
        arrays = [pa.array(column, kind) for column, kind in zip(columns, types, strict=True)]
        yield pa.RecordBatch.from_arrays(arrays, ["item", "place", "key", "year"])
