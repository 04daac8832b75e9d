"""Chunks of cells to the columns of each kind of frame, with a reason for each row that can't be used.

Each function takes a file's configuration and returns a function of (chunk, file) that runs in the executors. The
chunk's columns stand in the order in which the caller named the wanted columns.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.file_config import EdgesFileConfig, EventsFileConfig, ItemsFileConfig, UsersFileConfig
from etl.identifiers import identifier, text
from etl.settings import GraftrecError
from etl.sources import reasons, values
from etl.sources.delimited import Chunk
from etl.sources.entity_keys import person_key
from etl.sources.files import RawFile
from etl.sources.reasons import Check
from etl.sources.reshape import PLACE_BITS
from etl.sources.rows import Shape
from etl.sources.schema import PEOPLE

FILE_SHIFT = 40  # source_order = file index · 2^40 + line, or, where lines give several rows, + line · 2^16 + place
_TITLE_YEAR = r"^(?P<title>.*)\((?P<year>\d{4})\)\s*$"


def events(config: EventsFileConfig, *, earliest: int | None, latest: int | None) -> Shape:
    """FOUND_EVENTS of chunks of `config.roles`; the bounds are microseconds, inclusive."""

    def shape(chunk: Chunk, file: RawFile) -> pa.Table:
        size = len(chunk.line)
        cells = dict(zip(config.roles, chunk.columns, strict=True))
        order = _order(chunk, file)
        user, user_checks = _id(cells["user"], "user", config.column("user"))
        item, item_checks = _id(cells["item"], "item", config.column("item"))
        basket, basket_checks = (
            _id(cells["basket"], "basket", config.column("basket"), required=False)
            if "basket" in cells
            else (_nulls(size), [])
        )
        event_type = text(cells["event_type"]) if "event_type" in cells else _nulls(size)
        time, time_checks = _time(cells.get("time"), order, config, earliest, latest)
        value, value_checks = _value(cells.get("value"), "value", size, config)
        if config.weights:
            value = pc.coalesce(_weights(event_type, config.weights), value)
        checks = [*user_checks, *item_checks, *basket_checks, *time_checks, *value_checks]
        columns = {"user": user, "item": item, "time": time, "event_type": event_type}
        columns |= {"value": value, "basket": basket, "source_order": order}
        return pa.table(columns | reasons.first(chunk, checks))

    return shape


def item_columns(config: ItemsFileConfig) -> list[str | int]:
    """Every column an items file is read for, in the order `items` and `people` expect."""
    wanted: list[str | int] = [config.id]
    wanted += [column for column in (config.title, config.categories) if column is not None]
    if config.year is not None and not _year_in_title(config):
        wanted.append(config.year)
    if config.category_flags is not None:
        wanted += [config.category_flags.first + place for place in range(len(config.category_flags.names))]
    wanted += config.attributes.values()
    return wanted + [column for columns in config.people.values() for column in columns]


def items(config: ItemsFileConfig) -> Shape:
    """RAW_ITEMS."""

    def shape(chunk: Chunk, file: RawFile) -> pa.Table:
        size = len(chunk.line)
        cells = iter(chunk.columns)
        item, checks = _id(next(cells), "item", str(config.id))
        title = _nulls(size) if config.title is None else text(next(cells))
        categories = None if config.categories is None else values.listed(next(cells), config.categories_separator)
        if _year_in_title(config):
            title, year = _split_title(title)
        else:
            year = pa.nulls(size, pa.int32()) if config.year is None else _year(next(cells))
        if config.category_flags is not None:
            names = config.category_flags.names
            flagged = [_flag(next(cells)) for _ in names]
            categories = _strings(names, flagged, size)
        if categories is None:
            categories = _strings((), [], size)
        columns = {"item": item, "title": title, "year": year, "categories": categories}
        columns["attributes"] = _attributes(config.attributes, [next(cells) for _ in config.attributes], size)
        return pa.table(columns | reasons.first(chunk, checks))

    return shape


def people(config: ItemsFileConfig) -> Shape:
    """PEOPLE: a row for each person an item names; rows that are rejected as items name none."""
    num_people = sum(len(columns) for columns in config.people.values())

    def shape(chunk: Chunk, file: RawFile) -> pa.Table:
        item, _ = identifier(chunk.columns[0])
        cells = iter(chunk.columns[len(chunk.columns) - num_people :])
        tables = []
        for relation, columns in config.people.items():
            for rank in range(1, len(columns) + 1):
                name = text(next(cells))
                kept = pc.and_(pc.and_(pc.is_valid(name), pc.is_valid(item)), pc.is_null(chunk.reason))
                names = name.filter(kept)
                size = len(names)
                keys = pc.dictionary_encode(names)
                key = pa.array([person_key(word) for word in keys.dictionary.to_pylist()], pa.string()).take(
                    keys.indices
                )
                ranked = [pa.repeat(pa.scalar(relation), size), pa.repeat(pa.scalar(rank, pa.int32()), size)]
                tables.append(pa.table([item.filter(kept), *ranked, names, key], schema=PEOPLE))
        return pa.concat_tables(tables)

    return shape


def users(config: UsersFileConfig) -> Shape:
    """RAW_USERS."""

    def shape(chunk: Chunk, file: RawFile) -> pa.Table:
        user, checks = _id(chunk.columns[0], "user", str(config.id))
        attributes = _attributes(config.attributes, chunk.columns[1:], len(chunk.line))
        return pa.table({"user": user, "attributes": attributes} | reasons.first(chunk, checks))

    return shape


def edges(config: EdgesFileConfig) -> Shape:
    """RAW_EDGES, one direction; the weight is 1 where the file has none. Users in lists of their own friends stay, for
    `without_oneself` to leave out; elsewhere they are rejected."""

    def shape(chunk: Chunk, file: RawFile) -> pa.Table:
        size = len(chunk.line)
        cells = dict(zip(config.roles, chunk.columns, strict=True))
        user, user_checks = _id(cells["user"], "user", config.column("user"))
        friend, friend_checks = _id(cells["friend"], "friend", config.column("friend"))
        weight, checks = _value(cells.get("weight"), "weight", size, config)
        same = pc.equal(user, friend) if not config.explode else pa.repeat(False, size)
        alone = Check(same, "user and friend are the same", config.column("friend"), friend)
        columns = {"user": user, "friend": friend, "weight": pc.cast(pc.fill_null(weight, 1.0), pa.float32())}
        return pa.table(columns | reasons.first(chunk, [*user_checks, *friend_checks, alone, *checks]))

    return shape


def without_oneself(edges: pa.Table) -> pa.Table:
    """Edges (RAW_EDGES) but for those of users with themselves."""
    return edges.filter(pc.fill_null(pc.not_equal(edges.column("user"), edges.column("friend")), True))


def _order(chunk: Chunk, file: RawFile) -> pa.Array:
    within = chunk.line if chunk.place is None else pc.add(pc.shift_left(chunk.line, PLACE_BITS), chunk.place)
    return pc.add(within, file.index << FILE_SHIFT)


def _weights(event_type: pa.Array, weights: dict[str, float]) -> pa.Array:
    """The weight of each event's type, null where it has none."""
    place = pc.index_in(event_type, pa.array(list(weights), pa.string()))
    return pa.array(list(weights.values()), pa.float64()).take(place)


def _id(cells: pa.Array, name: str, column: str, *, required: bool = True) -> tuple[pa.Array, list[Check]]:
    """Ids as text, and checks that refuse rows; `required`: also those without an id."""
    try:
        found, refused = identifier(cells)
    except GraftrecError as error:
        raise GraftrecError(f"{name}: {error}") from None
    checks = [Check(failed, f"{name} {why}", column, cells) for failed, why in refused]
    missing = [Check(pc.is_null(found), f"{name} is missing", column, cells)] if required else []
    return found, [*checks, *missing]


def _time(
    cells: pa.Array | None, order: pa.Array, config: EventsFileConfig, earliest: int | None, latest: int | None
) -> tuple[pa.Array, list[Check]]:
    if cells is None:
        return order, []
    time = values.time(cells, unit=config.time_unit, form=config.time_format, zone=config.timezone)
    checks = [(pc.invert(values.given(cells)), "time is missing"), (pc.is_null(time), "time can't be read")]
    column = config.column("time")
    if earliest is not None and latest is not None:
        if config.time_format is None and config.time_unit is not None:
            fits = values.fitting_units(cells, time, unit=config.time_unit, latest=latest)
            found = [(fit, f"time fits unit {unit}, not {config.time_unit}") for unit, fit in fits.items()]
            checks = [checks[0], *found, *checks[1:]]
        checks.append((pc.less(time, earliest), "time is before cleaning.min_time"))
        checks.append((pc.greater(time, latest), "time is after cleaning.max_time"))
    return time, [Check(failed, reason, column, cells) for failed, reason in checks]


def _value(
    cells: pa.Array | None, name: str, size: int, config: EventsFileConfig | EdgesFileConfig
) -> tuple[pa.Array, list[Check]]:
    if cells is None:
        return pa.nulls(size, pa.float64()), []
    value = values.number(values.with_point(cells) if config.decimal == "," else cells)
    unreadable, endless = pc.and_(pc.is_null(value), values.given(cells)), pc.invert(pc.is_finite(value))
    checks = [(unreadable, f"{name} is not a number"), (endless, f"{name} is not finite")]
    return value, [Check(failed, reason, config.column(name), cells) for failed, reason in checks]


def _year_in_title(config: ItemsFileConfig) -> bool:
    return config.year == "title" and config.title is not None


def _split_title(title: pa.Array) -> tuple[pa.Array, pa.Array]:
    parts = pc.extract_regex(title, _TITLE_YEAR)
    year = pc.cast(pc.struct_field(parts, "year"), pa.int32())
    return pc.coalesce(text(pc.struct_field(parts, "title")), title), year


def _year(cells: pa.Array) -> pa.Array:
    years = values.whole_number(cells)
    sane = pc.and_(pc.greater(years, 0), pc.less(years, 10_000))
    return pc.cast(pc.if_else(sane, years, None), pa.int32())


def _flag(cells: pa.Array) -> pa.Array:
    if pa.types.is_boolean(cells.type):
        return pc.fill_null(cells, False)
    return pc.fill_null(pc.is_in(text(cells), pa.array(["1", "true", "True", "TRUE", "yes"])), False)


def _strings(names: Sequence[str], flagged: Sequence[pa.Array], size: int) -> pa.Array:
    """list<string>: the names whose flag is set, row by row."""
    offsets, where = _interleave(flagged, size)
    return pa.ListArray.from_arrays(offsets, pa.array(names, pa.string()).take(pa.array(where % max(len(names), 1))))


def _attributes(named: dict[str, str | int], cells: Sequence[pa.Array], size: int) -> pa.Array:
    """ATTRIBUTES of the cells that hold something, row by row."""
    columns = [text(column) for column in cells]
    offsets, where = _interleave([pc.is_valid(column) for column in columns], size)
    places, rows = where % max(len(columns), 1), where // max(len(columns), 1)
    flat = pa.concat_arrays([*columns, pa.array([], pa.string())])
    names = pa.array(list(named), pa.string()).take(pa.array(places))
    return pa.MapArray.from_arrays(offsets, names, flat.take(pa.array(places * size + rows)))


def _interleave(flagged: Sequence[pa.Array], size: int) -> tuple[pa.Array, np.ndarray]:
    """List offsets, and the flat positions (row · columns + column) of the set flags in row order."""
    if not flagged:
        return pa.array(np.zeros(size + 1, np.int32)), np.zeros(0, np.int64)
    flags = np.stack([column.to_numpy(zero_copy_only=False) for column in flagged], axis=1).astype(bool)
    offsets = np.concatenate([[0], np.cumsum(flags.sum(axis=1))]).astype(np.int32)
    return pa.array(offsets), np.flatnonzero(flags)


def _nulls(size: int) -> pa.Array:
    return pa.nulls(size, pa.string())
