"""k-core: the largest set of users and items in which each user has `min_user` interactions and each item `min_item`.

Decided on the whole log, before domains (survey 4.1: "at least five interactions", done once). A repeated interaction
counts each time. The k-core is unique (Seidman 1983), so a user belongs to it exactly when enough of its interactions
are with kept items: the users' job needs the kept items only, and no second search.
"""

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from etl.config import KCoreConfig


def kept_items(interactions: DataFrame, config: KCoreConfig) -> DataFrame:
    """`item` of the items that stay. One action per round until a round drops nothing; lazy where `iterate` is off."""
    if not config.iterate:
        return _enough(interactions.select("item", F.lit(1).alias("weight")), "item", config.min_item)
    edges = interactions.groupBy("user", "item").agg(F.count(F.lit(1)).alias("weight")).persist()
    size = edges.count()
    while True:
        smaller = _round(edges, config).localCheckpoint(eager=False)  # cuts the plan, which would grow with the rounds
        left = smaller.count()
        edges.unpersist()
        edges = smaller
        if left == size:
            return edges.select("item").distinct()
        size = left


def kept_users(interactions: DataFrame, kept_items: DataFrame, config: KCoreConfig) -> DataFrame:
    """`user` of the users that stay, given the kept items (`item`). Lazy."""
    if config.iterate:
        interactions = interactions.join(kept_items.select("item"), "item", "left_semi")
    return _enough(interactions.select("user", F.lit(1).alias("weight")), "user", config.min_user)


def _round(edges: DataFrame, config: KCoreConfig) -> DataFrame:
    edges = edges.join(_enough(edges, "item", config.min_item), "item", "left_semi")
    return edges.join(_enough(edges, "user", config.min_user), "user", "left_semi")


def _enough(edges: DataFrame, column: str, least: int) -> DataFrame:
    return edges.groupBy(column).agg(F.sum("weight").alias("weight")).where(F.col("weight") >= least).select(column)
