"""A synthetic two-domain log of any size, written in parallel, the same bytes from a seed whatever the partitions.

Users live in communities whose members have like tastes, and taste holds in both domains (unless `share_tastes` is
off). What a user takes is drawn by popularity and taste; a share of events (`sequential`) follows from the one
before: an item near it in taste. An item is taken once by a user. Events come in baskets, with a value by how well
the item fits.

Users are made in blocks of BLOCK, each user from a random stream of its own, and partitions hold whole blocks: so a
user's events depend on the configuration and the user's number alone. Cost per user doesn't grow with the catalogue.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame, SparkSession

from etl.config import GeneratorSource, code_version, config_hash
from etl.sources.names import person_key
from etl.sources.schema import KINDS, PEOPLE, RAW_EDGES, RAW_EVENTS, RAW_ITEMS, RAW_USERS, spark_schema
from etl.sources.world import ACTORS, Floats, Ints, Shelf, categories, generator, person_name, title, unit, world

BLOCK = 256  # users
_COMMUNITY = 32  # users
_ALIKE = 0.5  # share of a user's taste that is the community's
_OUTSIDE = 0.15  # share of friends that are anybody
_CANDIDATES = 2_048  # a larger shelf is first sampled by popularity
_BASKET = 3.0  # events, mean
_START = 1_577_836_800  # 2020-01-01, seconds
_DAY = 86_400
_LIFE = 200 * _DAY  # about how long a user stays
_USERS, _COMMUNITIES, _FRIENDS = 1, 2, 3  # random streams


@dataclass(frozen=True)
class Picks:
    """What a block of `B` users takes in one domain, in order, padded to `T` picks."""

    item_BT: Ints  # positions on the shelf
    kept_BT: npt.NDArray[np.bool_]
    match_BT: Floats  # taste match, about standard normal over items


class Generator:
    """A GeneratorSource. No file, nothing rejected."""

    def __init__(self, config: GeneratorSource, *, partitions: int | None = None) -> None:
        self.config, self._partitions = config, partitions

    @property
    def time(self) -> Literal["timestamp", "ordinal"]:
        return "timestamp"

    @property
    def flawless(self) -> bool:
        return True

    def fingerprint(self, kinds: Sequence[str] = KINDS) -> str:
        here = Path(__file__)
        return f"{config_hash(self.config)}-{code_version(here, here.with_name('world.py'))}"

    def deliveries(self) -> dict[str, str]:
        return {self.fingerprint(): "generator"}

    def events(self, spark: SparkSession, *, only: Sequence[str] | None = None, before: int = 0) -> DataFrame:
        return self._frame(spark, self.config.users, RAW_EVENTS, lambda config, users: events(config, users))

    def items(self, spark: SparkSession) -> DataFrame:
        return self._frame(spark, self.config.items, RAW_ITEMS, lambda config, items: _items(config, items))

    def known_items(self, spark: SparkSession) -> None:
        return None

    def users(self, spark: SparkSession) -> DataFrame:
        return self._frame(spark, self.config.users, RAW_USERS, lambda config, users: _users(config, users))

    def edges(self, spark: SparkSession) -> DataFrame:
        return self._frame(spark, self.config.users, RAW_EDGES, lambda config, users: edges(config, users))

    def people(self, spark: SparkSession) -> DataFrame:
        return self._frame(spark, self.config.items, PEOPLE, lambda config, items: _people(config, items))

    def _frame(
        self, spark: SparkSession, size: int, schema: pa.Schema, make: Callable[[GeneratorSource, Ints], pa.Table]
    ) -> DataFrame:
        config = self.config
        blocks = -(-size // BLOCK)
        partitions = min(blocks, self._partitions or max(8, blocks // 64))

        def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                for block in batch.column(0).to_pylist():
                    numbers = np.arange(block * BLOCK, min((block + 1) * BLOCK, size))
                    yield from make(config, numbers).cast(schema).to_batches()

        return spark.range(0, blocks, 1, partitions).mapInArrow(run, spark_schema(schema))


def user_tastes(config: GeneratorSource, users: Ints) -> Floats:
    """[2, B, K] unit vectors: the users' tastes in the source and in the target domain."""
    own = np.stack([generator(config.seed, _USERS, int(u)).standard_normal((2, config.tastes)) for u in users], axis=1)
    communities, which = np.unique(users // _COMMUNITY, return_inverse=True)
    centres = np.stack(
        [generator(config.seed, _COMMUNITIES, int(c)).standard_normal((2, config.tastes)) for c in communities], axis=1
    )
    taste = unit(np.sqrt(_ALIKE) * unit(centres)[:, which] + np.sqrt(1 - _ALIKE) * unit(own))
    if config.share_tastes:
        taste[1] = taste[0]
    return taste.astype(np.float32)


def events(config: GeneratorSource, users: Ints) -> pa.Table:
    """RAW_EVENTS of whole users (one aligned block at most), each user's in time order."""
    place = world(config)
    taste_DBK = user_tastes(config, users)
    draws = [generator(config.seed, _USERS, int(user) | 1 << 55) for user in users]
    activity = np.exp(0.5 * np.stack([draw.standard_normal(3) for draw in draws]))
    joined = np.array([draw.integers(0, 2 * 365 * _DAY) for draw in draws])
    parts = []
    for domain, share in enumerate((1 - config.target_event_share, config.target_event_share)):
        shelf = place.shelves[domain]
        mean = config.mean_events * share
        scale = mean * activity[:, 0] * np.sqrt(activity[:, 1 + domain]) / np.exp(0.125 + 0.03125)
        most = max(1, min(len(shelf.items), _CANDIDATES) // 2)
        counts = np.clip(np.round(scale), 1, most).astype(np.int64)
        picks = _pick(config, shelf, taste_DBK[domain], counts, draws)
        parts.append(_timed(picks, shelf, joined, draws, domain))
    merged = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((merged["position"], merged["domain"], merged["time"], merged["row"]))
    merged = {name: column[order] for name, column in merged.items()}
    return _table(users, merged)


def edges(config: GeneratorSource, users: Ints) -> pa.Table:
    """RAW_EDGES: friends are mostly of one's own community; each edge in both directions."""
    left, right = [], []
    for user in users.tolist():
        draw = generator(config.seed, _FRIENDS, user)
        base = user - user % _COMMUNITY
        size = min(_COMMUNITY, config.users - base)
        for _ in range(int(draw.poisson(config.friends / 2))):
            near = base + (user - base + int(draw.integers(1, max(size, 2)))) % size
            anybody = int(draw.integers(0, config.users))
            friend = anybody if draw.random() < _OUTSIDE else near
            if friend != user:
                left.append(user)
                right.append(friend)
    ends = np.array([left + right, right + left], np.int64)
    size = ends.shape[1]
    table = pa.table({"user": _ids("u", ends[0]), "friend": _ids("u", ends[1]), "weight": np.ones(size, np.float32)})
    return _found(table, "edges", ends[0] << 20 | np.arange(size))


def _pick(
    config: GeneratorSource, shelf: Shelf, taste_BK: Floats, counts: Ints, draws: list[np.random.Generator]
) -> Picks:
    order_BT = _by_taste(config, shelf, taste_BK, int(counts.max()), draws)
    uniform_2BT = np.ones((2, *order_BT.shape))
    for row, (draw, count) in enumerate(zip(draws, counts, strict=True)):
        uniform_2BT[:, row, :count] = draw.random((2, count))
    follow_BT = uniform_2BT[0] < config.sequential
    item_BT = order_BT.copy()
    kept_BT = np.arange(order_BT.shape[1]) < counts[:, None]
    for step in range(1, order_BT.shape[1]):
        before_BT = item_BT[:, :step]
        cell = shelf.cell_V[item_BT[:, step - 1]]
        size = shelf.cell_start[cell + 1] - shelf.cell_start[cell]
        place = (np.square(uniform_2BT[1, :, step]) * size).astype(np.int64)  # squared: the popular ones rather
        near = shelf.cell_items[shelf.cell_start[cell] + np.minimum(place, size - 1)]
        fresh = ~(before_BT == near[:, None]).any(axis=1)
        item_BT[:, step] = np.where(follow_BT[:, step] & fresh, near, order_BT[:, step])
        kept_BT[:, step] &= ~(before_BT == item_BT[:, step, None]).any(axis=1)
    match_BT = _match(taste_BK, shelf.taste_VK[item_BT])
    return Picks(item_BT, kept_BT, match_BT)


def _by_taste(
    config: GeneratorSource, shelf: Shelf, taste_BK: Floats, num_picks: int, draws: list[np.random.Generator]
) -> Ints:
    """[B, T] positions on the shelf without replacement, by popularity and taste (Gumbel top-k, Kool et al. 2019)."""
    num_items = len(shelf.items)
    if num_items <= _CANDIDATES:
        match_BV = np.einsum("bk,vk->bv", taste_BK, shelf.taste_VK) * np.float32(np.sqrt(config.tastes))
        logit_BV = config.taste_strength * match_BV + shelf.log_popularity_V
        uniform = np.stack([draw.random(num_items) for draw in draws])
        return _top(logit_BV, uniform, num_picks)
    sampled = np.stack([draw.random((2, _CANDIDATES)) for draw in draws], axis=1)
    candidate_BC = np.searchsorted(shelf.cumulative_V, sampled[0])
    logit_BC = config.taste_strength * _match(taste_BK, shelf.taste_VK[candidate_BC])
    return np.take_along_axis(candidate_BC, _top(logit_BC, sampled[1], num_picks), axis=1)


def _top(logit: Floats, uniform: npt.NDArray[np.float64], num: int) -> Ints:
    noisy = logit - np.log(-np.log(np.maximum(uniform, 1e-300)))
    if num < noisy.shape[1]:
        top = np.argpartition(-noisy, num - 1, axis=1)[:, :num]
    else:
        top = np.broadcast_to(np.arange(noisy.shape[1]), noisy.shape)
    return np.take_along_axis(top, np.argsort(-np.take_along_axis(noisy, top, axis=1), axis=1), axis=1)


def _match(taste_BK: Floats, taste_BTK: Floats) -> Floats:
    match: Floats = np.einsum("bk,btk->bt", taste_BK, taste_BTK) * np.float32(np.sqrt(taste_BK.shape[1]))
    return match


def _timed(
    picks: Picks, shelf: Shelf, joined: Ints, draws: list[np.random.Generator], domain: int
) -> dict[str, npt.NDArray[Any]]:
    """The kept picks as flat columns, with times, baskets and values."""
    num_picks = picks.kept_BT.sum(axis=1)
    shape = picks.kept_BT.shape
    uniform, noise = np.zeros((3, *shape)), np.zeros(shape)
    for row, (draw, num) in enumerate(zip(draws, num_picks, strict=True)):
        at = picks.kept_BT[row]
        uniform[:, row, at] = draw.random((3, num))
        noise[row, at] = draw.standard_normal(num)
    first = np.zeros(shape, bool)
    first[np.arange(shape[0]), picks.kept_BT.argmax(axis=1)] = True
    new_basket = picks.kept_BT & (first | (uniform[0] < 1 / _BASKET))
    between = np.minimum(-np.log1p(-uniform[1]) * _LIFE / (num_picks[:, None] / _BASKET + 1), _LIFE)
    gap = np.where(new_basket, 3_600 + between, 20 + 600 * uniform[1]) * picks.kept_BT
    seconds = _START + joined[:, None] + np.cumsum(gap.astype(np.int64), axis=1)
    value = np.clip(np.round(2.5 + 0.9 * picks.match_BT + 0.6 * noise), 1, 5)
    columns = {
        "row": np.broadcast_to(np.arange(shape[0])[:, None], shape),
        "domain": np.full(shape, domain),
        "position": np.broadcast_to(np.arange(shape[1]), shape),
        "item": shelf.items[picks.item_BT],
        "time": seconds * 1_000_000,
        "basket": np.cumsum(new_basket, axis=1),
        "value": value,
        "bought": (value >= 4) & (uniform[2] < 0.5),
    }
    return {name: column[picks.kept_BT] for name, column in columns.items()}


def _table(users: Ints, merged: dict[str, npt.NDArray[Any]]) -> pa.Table:
    number = users[merged["row"]]
    size = len(number)
    starts = np.concatenate([[0], np.cumsum(np.bincount(merged["row"], minlength=len(users)))])
    order = number << 20 | (np.arange(size) - starts[merged["row"]])
    user = _ids("u", number)
    domain = pa.array(["s", "t"]).take(pa.array(merged["domain"]))
    basket = pc.binary_join_element_wise(user, domain, pc.cast(pa.array(merged["basket"]), pa.string()), "-")
    table = pa.table(
        {
            "user": user,
            "item": _ids("i", merged["item"]),
            "time": merged["time"],
            "event_type": pa.array(["view", "purchase"]).take(pa.array(merged["bought"].astype(np.int64))),
            "value": merged["value"].astype(np.float64),
            "basket": basket,
            "source_order": order,
        }
    )
    return _found(table, "interactions", order)


def _items(config: GeneratorSource, items: Ints) -> pa.Table:
    place = world(config)
    numbers = items.tolist()
    table = pa.table(
        {
            "item": _ids("i", items),
            "title": [title(place, item) for item in numbers],
            "year": pa.array(place.year_V[items], pa.int32()),
            "categories": [categories(place, item) for item in numbers],
            "attributes": pa.array([[] for _ in numbers], RAW_ITEMS.field("attributes").type),
        }
    )
    return _found(table, "items", items)


def _users(config: GeneratorSource, users: Ints) -> pa.Table:
    named = [[{"name": "community", "value": str(user // _COMMUNITY)}] for user in users.tolist()]
    attributes = pa.array(named, RAW_USERS.field("attributes").type)
    return _found(pa.table({"user": _ids("u", users), "attributes": attributes}), "users", users)


def _people(config: GeneratorSource, items: Ints) -> pa.Table:
    place = world(config)
    who = np.concatenate([place.director_V[items, None], place.actors_VA[items]], axis=1)
    size = len(items)
    names = [person_name(number) for number in who.ravel().tolist()]
    return pa.table(
        {
            "item": _ids("i", np.repeat(items, 1 + ACTORS)),
            "relation": ["director", *["actor"] * ACTORS] * size,
            "rank": pa.array([1, *range(1, ACTORS + 1)] * size, pa.int32()),
            "name": names,
            "key": [person_key(name) for name in names],
        }
    )


def _found(table: pa.Table, kind: str, order: Ints) -> pa.Table:
    size = table.num_rows
    nothing = pa.nulls(size, pa.string())
    columns = {"kind": pa.repeat(kind, size), "file": pa.repeat("generator", size), "line": pa.array(order + 1)}
    for name, column in (columns | {"reason": nothing, "raw": nothing}).items():
        table = table.append_column(name, column)
    return table


def _ids(letter: str, numbers: Ints) -> pa.Array:
    return pc.binary_join_element_wise(letter, pc.cast(pa.array(numbers), pa.string()), "")
