"""A synthetic two-domain log of any size, written in parallel, the same bytes from a seed whatever the partitions.

`synthetic_catalogue.py` makes the catalogue and `behaviour.py` samples what users take from it. This module adds times,
baskets and values: a session is a basket, and an event's value grows with the match of item and taste.

Users are made in blocks of BLOCK, each user from a random stream of its own, and partitions hold whole blocks: so a
user's events depend on the configuration and the user's number alone. Cost per user doesn't grow with the catalogue.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame, SparkSession

from etl.config import GeneratorSource
from etl.generator.behaviour import COMMUNITY, DomainActivity, Picks, draw_tastes, most_picks, pick
from etl.generator.calendar import gaps, lives
from etl.generator.synthetic_catalogue import (
    ACTORS,
    BEGINNING,
    YEAR,
    YEARS,
    DomainItems,
    Ints,
    categories,
    generator,
    person_name,
    title,
    world,
)
from etl.settings import config_hash
from etl.source_hash import source_hash
from etl.sources import found_events
from etl.sources.entity_keys import person_key
from etl.sources.schema import KINDS, PEOPLE, RAW_EDGES, RAW_EVENTS, RAW_ITEMS, RAW_USERS, spark_schema

BLOCK = 256  # users
_SPREAD = 0.7  # of the logarithm of users' activity
_OUTSIDE = 0.15  # share of friends that are anybody
_LATE = (0.5, 0.9)  # share of their source events that users have taken who come to the target late
_USERS, _FRIENDS, _SAID = 1, 3, 9  # random streams


class Generator:
    """A GeneratorSource. No file, nothing rejected."""

    def __init__(self, config: GeneratorSource, *, partitions: int | None = None) -> None:
        self.config, self._partitions = config, partitions

    @property
    def time(self) -> Literal["timestamp", "ordinal"]:
        return "timestamp"

    @property
    def never_rejects(self) -> bool:
        return True

    def fingerprint(self, kinds: Sequence[str] = KINDS) -> str:
        return f"{config_hash(self.config)}-{source_hash(__name__, without=('etl.config',))}"

    def deliveries(self) -> dict[str, str]:
        return {self.fingerprint(): "generator"}

    def table(self) -> None:
        return None

    def events(self, spark: SparkSession, *, only: Mapping[str, int] | None = None) -> DataFrame:
        return self._frame(spark, self.config.users, RAW_EVENTS, lambda config, users: events(config, users))

    def found_in(self, places: Mapping[str, int]) -> dict[str, Column]:
        return found_events.found_in(places, several=False)

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


def events(config: GeneratorSource, users: Ints) -> pa.Table:
    """RAW_EVENTS of whole users (one aligned block at most), each user's in time order."""
    place = world(config)
    tastes = draw_tastes(config, place, users)
    draws = [generator(config.seed, _USERS, int(user) | 1 << 55) for user in users]
    activity = np.exp(_SPREAD * np.stack([draw.standard_normal(3) for draw in draws]))
    joined = np.array([draw.integers(0, YEARS * YEAR) for draw in draws])
    late_2B = np.stack([draw.random(2) for draw in draws], axis=1)
    passed = np.where(late_2B[0] < config.late_share, _LATE[0] + (_LATE[1] - _LATE[0]) * late_2B[1], 0)
    begins = BEGINNING + joined
    calendar = lives(config, users, begins) if config.has_calendar else None
    parts: list[dict[str, npt.NDArray[Any]]] = []
    for domain, share in enumerate((1 - config.target_event_share, config.target_event_share)):
        shelf = place.shelves[domain]
        mean = config.mean_events * share
        scale = mean * activity[:, 0] * np.sqrt(activity[:, 1 + domain]) / np.exp(0.625 * _SPREAD**2)
        counts = np.clip(np.round(scale), 1, most_picks(shelf)).astype(np.int64)
        if domain == 1:
            begins = _time_after(parts[0], passed, begins)
        age = passed if domain == 1 else np.zeros_like(passed)
        picks = pick(config, shelf, tastes, DomainActivity(domain, counts, begins, age, calendar), draws)
        parts.append(_timed(config, picks, shelf, begins, draws, domain))
    merged = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((merged["position"], merged["domain"], merged["time"], merged["row"]))
    merged = {name: column[order] for name, column in merged.items()}
    return _table(users, merged)


def _time_after(source: dict[str, npt.NDArray[Any]], share: npt.NDArray[np.float64], begins: Ints) -> Ints:
    """[B] seconds: when each user has taken this share of the source events; `begins` where it is 0."""
    starts = np.searchsorted(source["row"], np.arange(len(begins) + 1))
    at = np.minimum(starts[:-1] + (share * np.diff(starts)).astype(np.int64), starts[1:] - 1)
    return np.where(share > 0, source["time"][at] // 1_000_000, begins)


def edges(config: GeneratorSource, users: Ints) -> pa.Table:
    """RAW_EDGES: friends are mostly of one's own community; each edge in both directions. Below a
    `feature_strength` of 1 more of them are anybody: with 0, all."""
    outside = _OUTSIDE + (1 - _OUTSIDE) * (1 - config.feature_strength)
    left, right = [], []
    for user in users.tolist():
        draw = generator(config.seed, _FRIENDS, user)
        base = user - user % COMMUNITY
        size = min(COMMUNITY, config.users - base)
        for _ in range(int(draw.poisson(config.friends / 2))):
            near = base + (user - base + int(draw.integers(1, max(size, 2)))) % size
            anybody = int(draw.integers(0, config.users))
            friend = anybody if draw.random() < outside else near
            if friend != user:
                left.append(user)
                right.append(friend)
    ends = np.array([left + right, right + left], np.int64)
    size = ends.shape[1]
    table = pa.table({"user": _ids("u", ends[0]), "friend": _ids("u", ends[1]), "weight": np.ones(size, np.float32)})
    return _found(table, "edges", ends[0] << 20 | np.arange(size))


def _timed(
    config: GeneratorSource,
    picks: Picks,
    shelf: DomainItems,
    begins: Ints,
    draws: list[np.random.Generator],
    domain: int,
) -> dict[str, npt.NDArray[Any]]:
    """The kept picks as flat columns, with times, baskets and values."""
    num_picks = picks.kept_BT.sum(axis=1)
    shape = picks.kept_BT.shape
    uniform, noise = np.zeros((2, *shape)), np.zeros(shape)
    for row, (draw, num) in enumerate(zip(draws, num_picks, strict=True)):
        at = picks.kept_BT[row]
        uniform[:, row, at] = draw.random((2, num))
        noise[row, at] = draw.standard_normal(num)
    sessions = num_picks[:, None] / config.session_events
    if picks.seconds_BT is None:
        seconds = begins[:, None] + np.cumsum(gaps(picks.begins_BT, uniform[0], sessions, picks.kept_BT), axis=1)
    else:
        seconds = picks.seconds_BT
    value = np.clip(np.round(2.5 + 0.9 * picks.match_BT + 0.6 * noise), 1, 5)
    columns = {
        "row": np.broadcast_to(np.arange(shape[0])[:, None], shape),
        "domain": np.full(shape, domain),
        "position": np.broadcast_to(np.arange(shape[1]), shape),
        "item": shelf.items[picks.item_BT],
        "time": seconds * 1_000_000,
        "basket": np.cumsum(picks.begins_BT, axis=1),
        "value": value,
        "bought": (value >= 4) & (uniform[1] < 0.5),
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
    return table.append_column("rejected", pa.nulls(size, RAW_EVENTS.field("rejected").type))


def _items(config: GeneratorSource, items: Ints) -> pa.Table:
    place = world(config)
    numbers = items.tolist()
    table = pa.table(
        {
            "item": _ids("i", items),
            "title": [title(place, item) for item in numbers],
            "year": pa.array(place.year_V[place.shown_V[items]], pa.int32()),
            "categories": [categories(place, item) for item in numbers],
            "attributes": pa.array([[] for _ in numbers], RAW_ITEMS.field("attributes").type),
        }
    )
    return _found(table, "items", items)


def _users(config: GeneratorSource, users: Ints) -> pa.Table:
    named = [[("community", str(_community(config, user)))] for user in users.tolist()]
    attributes = pa.array(named, RAW_USERS.field("attributes").type)
    return _found(pa.table({"user": _ids("u", users), "attributes": attributes}), "users", users)


def _community(config: GeneratorSource, user: int) -> int:
    """What a user is said to be of: below a `feature_strength` of 1 often anybody's community."""
    draw = generator(config.seed, _SAID, user)
    if config.feature_strength == 1 or draw.random() < config.feature_strength:
        return user // COMMUNITY
    return int(draw.integers(0, config.users)) // COMMUNITY


def _people(config: GeneratorSource, items: Ints) -> pa.Table:
    place = world(config)
    shown = place.shown_V[items]
    who = np.concatenate([place.director_V[shown, None], place.actors_VA[shown]], axis=1)
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
    columns["place"] = pa.nulls(size, pa.int64())
    for name, column in (columns | dict.fromkeys(("reason", "column", "found", "raw"), nothing)).items():
        table = table.append_column(name, column)
    return table


def _ids(letter: str, numbers: Ints) -> pa.Array:
    return pc.binary_join_element_wise(letter, pc.cast(pa.array(numbers), pa.string()), "")
