"""A file of triples (head, relation, tail) beside the log: a knowledge graph, in RecBole's form or any other.

A head is an item by its raw id, or by what a link file makes of it. Rows that can't be read, that lack a part or whose
item the log doesn't know are rejected. A tail that stands for nothing (`[]`, `unknown`) is no entity.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.window import Window

from etl.config import KnowledgeConfig, KnowledgeFileConfig
from etl.identifiers import identifier, is_no_text
from etl.settings import GraftrecError
from etl.sources import reasons
from etl.sources.delimited import Chunk
from etl.sources.files import RawFile
from etl.sources.reasons import Check
from etl.sources.rows import RawRows
from etl.sources.schema import ENTITY_PREFIX, FOUND, FOUND_FIELDS, OTHER_END

UNKNOWN_HEAD = "head is no item of the log"
_PARTS = ("head", "relation", "tail")
_TRIPLES = pa.schema(
    [pa.field("position", pa.string()), *(pa.field(name, pa.string()) for name in _PARTS), *FOUND_FIELDS]
)
_LINKS = pa.schema([pa.field("item", pa.string()), pa.field("head", pa.string())])


Keep = Callable[[str, Callable[[], DataFrame]], DataFrame]  # a frame by name: made, or the one that was made before


def anew(name: str, make: Callable[[], DataFrame]) -> DataFrame:
    """Keeps nothing."""
    return make()


@dataclass(frozen=True)
class _Graph:
    """`triples`: _TRIPLES. `heads`: item, head, and whether the log knows the item (`known`)."""

    triples: DataFrame
    heads: DataFrame


def graph_triples(
    spark: SparkSession, config: KnowledgeFileConfig, root: str, items: DataFrame, *, setting: str, keep: Keep
) -> DataFrame:
    """item, relation, rank, name, key, source of a file of triples, whose heads are items or linked to them; of a whole
    graph, those with other ends too (OTHER_END)."""
    assert config.triples is not None
    graph = _read(spark, config, root, items, setting=setting, keep=keep)
    triples, heads = graph.triples.where("reason is null"), graph.heads.where("known").select("item", "head")
    entity, key = F.lit(ENTITY_PREFIX), F.concat(F.lit(ENTITY_PREFIX), F.col("tail"))
    if config.triples.whole:
        other = F.concat(F.lit(OTHER_END), entity, F.col("head"))
        found = triples.join(heads, "head", "left").withColumn("item", F.coalesce("item", other))
        tails = heads.select(F.col("head").alias("tail"), F.concat(F.lit(OTHER_END), "item").alias("_tail"))
        found = found.join(tails, "tail", "left")
        key = F.coalesce("_tail", key)
    else:
        found = triples.join(heads, "head")
    order = Window.partitionBy("item", "relation").orderBy("position", *(["_tail"] if config.triples.whole else []))
    ranked = found.withColumn("rank", F.row_number().over(order))
    for relation, limit in config.max_rank.items():
        ranked = ranked.where((F.col("relation") != relation) | (F.col("rank") <= limit))
    return ranked.select(
        "item", "relation", "rank", F.col("tail").alias("name"), key.alias("key"), F.lit(config.name).alias("source")
    )


def triple_rows(
    spark: SparkSession, config: KnowledgeConfig, items: DataFrame, *, keep: Keep = anew
) -> DataFrame | None:
    """FOUND of the rows of all files of triples, and `source`, the file's name; None: there is no such file.

    Of a whole graph, or one with a link file, a head that is linked to no item is an entity, and no fault.
    """
    found: DataFrame | None = None
    for position, file in enumerate(config.files):
        if file.triples is None:
            continue
        graph = _read(spark, file, config.root, items, setting=f"knowledge.files[{position}]", keep=keep)
        rows = graph.triples
        if not file.triples.whole:
            # An entity may be several items: one known of them is enough.
            heads = graph.heads.groupBy("head").agg(F.bool_or("known").alias("_known"), F.min("item").alias("_item"))
            rows = rows.join(heads, "head", "left")
            lacking = ~F.col("_known") if file.link else F.col("_known").isNull()
            unknown = F.col("reason").isNull() & lacking
            why = {
                "reason": F.lit(UNKNOWN_HEAD),
                "column": F.lit(str(file.id)),
                "found": F.coalesce("_item", "head"),
                "raw": F.concat_ws(", ", *_PARTS),
            }
            rows = rows.withColumns({name: F.when(unknown, of).otherwise(F.col(name)) for name, of in why.items()})
        rows = rows.select(*FOUND, F.lit(file.name).alias("source"))
        found = rows if found is None else found.unionByName(rows)
    return found


def _read(
    spark: SparkSession, config: KnowledgeFileConfig, root: str, items: DataFrame, *, setting: str, keep: Keep
) -> _Graph:
    assert config.triples is not None
    if config.id is None:
        raise GraftrecError(f"{setting}.id: expected the column of heads, found none; set it")
    wanted = [config.id, config.triples.relation, config.triples.tail]
    rows = RawRows(config, root, wanted, setting=f"{setting}.path")
    triples = keep(setting, lambda: rows.frame(spark, kind="knowledge", shape=_triples, schema=_TRIPLES))
    known = items.select("item", F.lit(True).alias("known"))
    if config.link is None:
        return _Graph(triples, known.withColumn("head", F.col("item")))
    link = config.link
    pairs = RawRows(link, root, [link.item, link.entity], setting=f"{setting}.link.path")
    linked = keep(f"{setting}.link", lambda: pairs.map(spark, _links, _LINKS).distinct())
    heads = linked.join(known, "item", "left")
    return _Graph(triples, heads.select("item", "head", F.coalesce("known", F.lit(False)).alias("known")))


def _triples(chunk: Chunk, file: RawFile) -> pa.Table:
    """Rows to _TRIPLES."""
    cells: dict[str, pa.Array] = {}
    checks: list[Check] = []
    for name, column in zip(_PARTS, chunk.columns, strict=True):
        cells[name], refused = identifier(column)
        checks += [Check(failed, f"{name} {why}", name, column) for failed, why in refused]
        checks.append(Check(pc.is_null(cells[name]), f"{name} is missing", name, column))
    says_nothing = pa.array([tail is not None and is_no_text(tail) for tail in cells["tail"].to_pylist()], pa.bool_())
    checks.append(Check(says_nothing, "tail stands for nothing", "tail", cells["tail"]))
    position = pa.array([f"{file.index:06}:{line:012}" for line in chunk.line.to_pylist()], pa.string())
    return pa.table({"position": position} | cells | reasons.first(chunk, checks))


def _links(chunk: Chunk, file: RawFile) -> pa.Table:
    cells = [identifier(column)[0] for column in chunk.columns]
    return pa.table(cells, schema=_LINKS).filter(chunk.reason.is_null()).drop_null()
