"""k-core: the largest set of users and items in which each user has `min_user` interactions and each item `min_item`.

Decided on the whole log, before domains (survey 4.1: "at least five interactions", done once). A repeated interaction
counts each time. The k-core is unique (Seidman 1983), so a user belongs to it exactly when enough of its interactions
are with kept items: the users' job needs the kept items only, and no second search.

A log that only grows has a core that only grows. So after a new day whoever was kept stays, whoever has too few
interactions at all goes, and only the *free* are to be decided, by the interactions that have a free end.
"""

from dataclasses import dataclass

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from etl.config import KCoreConfig
from etl.jobs.job import digest
from etl.lake.spark_io import bucket_of
from etl.session import held

_BROADCAST_ROWS = 1_000_000  # ids that each executor may hold
_OF_LOG = "degree > more"  # of an id: the log so far has some of it


@dataclass(frozen=True)
class GrownLog:
    """The log as it was, and what was appended to it; its users lie in so many buckets."""

    log: DataFrame
    appended: DataFrame
    buckets: int


def kept_items(interactions: DataFrame, config: KCoreConfig, degrees: DataFrame | None = None) -> DataFrame:
    """`item` of the items that stay. `degrees`: item, degree, where they are known already."""
    if degrees is None:
        degrees = interactions.groupBy("item").agg(F.count(F.lit(1)).alias("degree"))
    enough = degrees.where(F.col("degree") >= config.min_item).select("item")
    if not config.iterate:
        return enough
    edges = interactions.select("user", "item", F.lit(True).alias("free_user"), F.lit(True).alias("free_item"))
    enough = held(enough)
    return peel(edges, enough, config, num_items=enough.count(), num_edges=interactions.count())


def kept_users(interactions: DataFrame, kept_items: DataFrame, config: KCoreConfig) -> DataFrame:
    """`user` of the users that stay, given the kept items (`item`). Lazy."""
    if config.iterate:
        interactions = interactions.join(kept_items.select("item"), "item", "left_semi")
    return interactions.groupBy("user").count().where(F.col("count") >= config.min_user).select("user")


def peel(edges: DataFrame, items: DataFrame, config: KCoreConfig, *, num_items: int, num_edges: int) -> DataFrame:
    """`item` of the free items that stay, of `items`, the free ones that may.

    `edges`: user, item, free_user, free_item; an end that isn't free stays. A round counts each user's edges with what
    stays, then each item's edges with the users that do. Edges are read anew from their source until half of them are
    gone; then the rest is set aside, and so on, so that rounds that drop little cost no more than reading.
    """
    while True:
        stays = broadcast(items.withColumn("_stays", F.lit(True)), num_items)
        alive = edges.join(stays, "item", "left").where(~F.col("free_item") | F.col("_stays")).drop("_stays")
        users = alive.where("free_user").groupBy("user").count().where(F.col("count") < config.min_user)
        dropped = held(users.select("user"))
        num_dropped = dropped.count()
        if num_dropped == 0:
            return items
        alive = alive.join(broadcast(dropped, num_dropped), "user", "left_anti")
        counts = alive.where("free_item").groupBy("item").agg(F.count(F.lit(1)).alias("count"))
        counts = held(counts.where(F.col("count") >= config.min_item))
        totals = counts.agg(F.count(F.lit(1)), F.sum("count")).first()
        assert totals is not None
        items, left = counts.select("item"), int(totals[0])
        if left in (0, num_items):
            return items
        num_items = left
        if int(totals[1]) < num_edges / 2:
            edges, num_edges = held(alive), int(totals[1])


def grown_items(
    old: DataFrame, appended: DataFrame, items: DataFrame, users: DataFrame, config: KCoreConfig, *, buckets: int
) -> DataFrame:
    """`item` of the items that stay by what was `appended` to `old`, the log so far, and did not before.

    `items`, `users`: id, degree (in both), more (of it, in `appended`), and kept, as it was, of all ids. `buckets`: of
    the lake.
    """
    free = {"item": _free(items, config.min_item), "user": _free(users, config.min_user)}
    edges, (num_items, _) = _open_edges(old, appended, free, buckets)
    if num_items == 0:
        return items.where("false").select("item")
    for column, found in (("item", items), ("user", users)):
        stayed = found.where("kept").select(column, F.lit(True).alias("_stayed"))
        edges = edges.join(stayed, column, "left").where(F.col(f"free_{column}") | F.col("_stayed")).drop("_stayed")
    edges = held(edges)
    counts = edges.where("free_item").groupBy("item").count()
    enough = held(counts.where(F.col("count") >= config.min_item).select("item"))
    return peel(edges, enough, config, num_items=enough.count(), num_edges=0)  # few, and set aside already


def grown_users(
    old: DataFrame, appended: DataFrame, kept_items: DataFrame, users: DataFrame, config: KCoreConfig, *, buckets: int
) -> DataFrame:
    """`user` of the users that stay by now and did not before. `kept_items`: item; `users`: see grown_items."""
    edges, (num_users,) = _open_edges(old, appended, {"user": _free(users, config.min_user)}, buckets)
    return kept_users(edges, kept_items, config) if num_users else users.where("false").select("user")


def _free(found: DataFrame, least: int) -> DataFrame:
    """Those of `found` that aren't kept and may be."""
    return found.where(~F.col("kept") & (F.col("degree") >= least))


def _open_edges(
    old: DataFrame, appended: DataFrame, free: dict[str, DataFrame], buckets: int
) -> tuple[DataFrame, tuple[int, ...]]:
    """user, item and free_<column> of each column of `free` (column -> ids): the interactions with a free end. And the
    number of free ids of each column.

    Of the log so far only the buckets are read that free users of it are in; all, where a free item is of it.
    """
    edges, any_free = appended.select("user", "item"), F.lit(False)
    sizes, num_old = {}, {}
    for column, ids in free.items():
        totals = ids.agg(F.count(F.lit(1)), F.count_if(F.expr(_OF_LOG))).first()
        assert totals is not None
        sizes[column], num_old[column] = int(totals[0]), int(totals[1])
    if any(num_old.values()):
        if not num_old.get("item"):
            rows = free["user"].where(_OF_LOG).select(bucket_of(buckets).alias("bucket")).distinct().collect()
            old = old.where(F.col("bucket").isin(*(row["bucket"] for row in rows)))
        edges = edges.unionByName(old.select("user", "item"))
    for column, ids in free.items():
        flag = f"free_{column}"
        marked = broadcast(ids.select(column, F.lit(True).alias(flag)), sizes[column])
        edges = edges.join(marked, column, "left").withColumn(flag, F.coalesce(flag, F.lit(False)))
        any_free = any_free | F.col(flag)
    return edges.where(any_free), tuple(sizes.values())


def rules(config: KCoreConfig) -> str:
    """What a table's commit says of how its `kept` came about."""
    return digest(config.model_dump())


def broadcast(ids: DataFrame, rows: int) -> DataFrame:
    """A hint to join `ids` by sending them to every executor, where there are few enough."""
    return F.broadcast(ids) if rows <= _BROADCAST_ROWS else ids
