"""Rows of a file to rows of a log where a line holds several: cells that hold several values, and matrices.

A rejected line stays one row. A row of a line that gives several has a `place` in it, which orders it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from etl.file_config import EdgesFileConfig, EventsFileConfig, ExplodeConfig, FileConfig
from etl.identifiers import text
from etl.settings import GraftrecError
from etl.sources import values
from etl.sources.delimited import Chunk

PLACE_BITS = 16  # of a row's order within a file; the line stands above them
MAX_PLACES, MAX_LINES = 1 << PLACE_BITS, 1 << 24
_TOO_MANY = f"more than {MAX_PLACES:,} values in a line"


def wanted(config: EventsFileConfig | EdgesFileConfig) -> list[str | int]:
    """The columns to read: a line's own, then those of each entry of `explode`."""
    own = [column for _, column in _own(config)]
    return own + [column for entry in config.explode for column in entry.columns.values()]


def rows(chunk: Chunk, config: FileConfig, matrix: Sequence[str]) -> Iterator[Chunk]:
    """A chunk of the columns `wanted` (and, behind them, of a matrix's items `matrix`) as rows of `config.roles`."""
    if not isinstance(config, EventsFileConfig | EdgesFileConfig) or not (config.explode or matrix):
        yield chunk
        return
    if len(chunk.line) and pc.max(chunk.line).as_py() >= MAX_LINES:
        raise GraftrecError(f"expected fewer than {MAX_LINES:,} lines, each of several rows, found more; cut the file")
    given = dict(zip((role for role, _ in _own(config)), chunk.columns, strict=False))
    rest = chunk.columns[len(given) :]
    failed, before = pc.is_valid(chunk.reason), np.zeros(len(chunk.line), np.int64)
    if pc.any(failed).as_py():
        yield _rejected(chunk, failed, chunk.reason, len(config.roles), before)
    if matrix:
        yield _of_matrix(chunk, given, rest, matrix, config.roles)
        return
    for entry in config.explode:
        cells, rest = rest[: len(entry.columns)], rest[len(entry.columns) :]
        yield from _exploded(chunk, given, cells, entry, config, before)


def _own(config: EventsFileConfig | EdgesFileConfig) -> list[tuple[str, str | int]]:
    if isinstance(config, EventsFileConfig):
        named = config.columns.model_dump()
    else:
        named = {"user": config.user, "friend": config.friend, "weight": config.weight}
    return [(role, column) for role, column in named.items() if column is not None]


def _rejected(
    chunk: Chunk, failed: pa.Array, reason: pa.Array, num_columns: int, place: npt.NDArray[np.int64]
) -> Chunk:
    line, raw, reason = chunk.line.filter(failed), chunk.raw.filter(failed), reason.filter(failed)
    nothing = pa.nulls(len(line), pa.string())
    return Chunk(line, [nothing] * num_columns, reason, raw, pa.array(place).filter(failed))


def _exploded(
    chunk: Chunk,
    given: dict[str, pa.Array],
    cells: Sequence[pa.Array],
    entry: ExplodeConfig,
    config: EventsFileConfig | EdgesFileConfig,
    before: npt.NDArray[np.int64],
) -> Iterator[Chunk]:
    """The rows of one entry; `before`, the number of rows that each line has given already, is raised by them."""
    lists = [_lists(column, entry.separator, drop_empty=len(cells) == 1) for column in cells]
    counts = np.stack([_lengths(one) for one in lists])
    good = pc.is_null(chunk.reason).to_numpy(zero_copy_only=False)
    uneven, too_many = (counts != counts[0]).any(axis=0), before + counts.max(axis=0) > MAX_PLACES
    failed = good & (uneven | too_many)
    if failed.any():
        said = f"expected as many values in each of {', '.join(map(str, entry.columns.values()))}"
        reasons = pc.if_else(pa.array(uneven), said, _TOO_MANY)
        yield _rejected(chunk, pa.array(failed), reasons, len(config.roles), before)
        before += failed
    count = np.where(good & ~failed, counts[0], 0)
    parts = [_kept(one, good & ~failed) for one in lists]
    owner = np.repeat(np.arange(len(count)), count)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count) + before[owner]
    before += count
    found = {role: column.take(pa.array(owner)) for role, column in given.items()}
    found |= {
        role: values.without_nulls(part, config.null_values) for role, part in zip(entry.columns, parts, strict=True)
    }
    reason, cell = pa.nulls(len(owner), pa.string()), None
    if entry.suffixes:
        items = text(found["item"])
        found["item"], found["event_type"], reason = _cut_suffixes(items, entry.suffixes)
        rejected, column = pc.is_valid(reason), str(entry.columns["item"])
        cell = (pc.if_else(rejected, column, None), pc.if_else(rejected, items, None))
    elif entry.event_type is not None:
        found["event_type"] = pa.repeat(pa.scalar(entry.event_type), len(owner))
    if entry.time is not None:
        moment = pa.scalar(values.day(entry.time, setting="explode.time"), pa.timestamp("us", "UTC"))
        found["time"] = pa.repeat(moment, len(owner))
    columns = [found.get(role, pa.nulls(len(owner), pa.string())) for role in config.roles]
    taken = pa.array(owner)
    yield Chunk(chunk.line.take(taken), columns, reason, chunk.raw.take(taken), pa.array(place), cell)


def _of_matrix(
    chunk: Chunk, given: dict[str, pa.Array], cells: Sequence[pa.Array], names: Sequence[str], roles: Sequence[str]
) -> Chunk:
    """A row for each cell that holds something."""
    if len(names) > MAX_PLACES:
        raise GraftrecError(f"expected at most {MAX_PLACES:,} columns of a matrix, found {len(names):,}; cut the file")
    if len({column.type for column in cells}) > 1:
        cells = [text(column) for column in cells]
    filled = np.stack([pc.is_valid(column).to_numpy(zero_copy_only=False) for column in cells], axis=1)
    filled[pc.is_valid(chunk.reason).to_numpy(zero_copy_only=False)] = False
    owner, place = np.nonzero(filled)
    taken = pa.array(owner)
    found = {role: column.take(taken) for role, column in given.items()}
    found["item"] = pa.array(names, pa.string()).take(pa.array(place))
    found["value"] = pa.concat_arrays(cells).take(pa.array(place * len(filled) + owner))
    return Chunk(
        chunk.line.take(taken),
        [found[role] for role in roles],
        pa.nulls(len(owner), pa.string()),
        chunk.raw.take(taken),
        pa.array(place),
    )


def _lists(cells: pa.Array, separator: str, *, drop_empty: bool) -> pa.Array:
    """Each cell's values: a list's own, or a text's parts, of which empty ones may be dropped."""
    if pa.types.is_nested(cells.type):
        if not hasattr(cells.type, "value_type") or pa.types.is_nested(cells.type.value_type):
            raise GraftrecError(f"expected lists of text or numbers, found {cells.type}; name another column")
        return cells
    return values.listed(cells, separator) if drop_empty else pc.split_pattern(text(cells), separator)


def _lengths(lists: pa.Array) -> npt.NDArray[np.int64]:
    return np.asarray(pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False), np.int64)


def _kept(lists: pa.Array, kept: npt.NDArray[np.bool_]) -> pa.Array:
    """The values of the kept rows' lists, one behind the other."""
    return pc.list_flatten(lists if kept.all() else lists.filter(pa.array(kept)))


def _cut_suffixes(words: pa.Array, suffixes: dict[str, str]) -> tuple[pa.Array, pa.Array, pa.Array]:
    """Items without their suffix, the event type that it means, and a reason where they have none."""
    bare, types = words, pa.nulls(len(words), pa.string())
    for suffix in sorted(suffixes, key=len, reverse=True):
        ends = pc.and_(pc.fill_null(pc.ends_with(words, suffix), False), pc.is_null(types))
        types = pc.if_else(ends, suffixes[suffix], types)
        bare = pc.if_else(ends, pc.utf8_slice_codeunits(words, 0, -len(suffix)) if suffix else words, bare)
    lacks = pc.and_(pc.is_null(types), pc.is_valid(words))
    said = f"item ends with none of {', '.join(suffixes)}"
    return bare, types, pc.if_else(lacks, said, pa.scalar(None, pa.string()))


def with_fixed(chunk: Chunk, fixed: dict[int, str | None]) -> Chunk:
    """The chunk with columns that have one value in the whole file, put in at their places."""
    columns = list(chunk.columns)
    for place, value in sorted(fixed.items()):
        columns.insert(place, pa.repeat(pa.scalar(value, pa.string()), len(chunk.line)))
    return replace(chunk, columns=columns)
