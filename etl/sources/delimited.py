"""Blocks of delimited text to columns, vectorised in Arrow; a line that has oddities is looked at alone.

Rejected: undecodable bytes, a line longer than 1 MiB, a wrong number of fields, a quote that isn't closed. Empty
lines are no rows. With quoting on, a separator inside quotes is text, and a doubled quote is a quote; a line end inside
quotes is one where `multiline` says so, else both halves are rejected as malformed. Encodings must keep a line end one
byte (UTF-8, Latin-1 and its kin, the usual double-byte ones); UTF-16 and UTF-32 are refused.
"""

import codecs
import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.file_config import FileConfig
from etl.settings import GraftrecError
from etl.sources.files import MAX_ROW_BYTES, Block
from etl.sources.schema import RAW_CHARACTERS

csv.field_size_limit(MAX_ROW_BYTES * 2)
_STAND_INS = "\x1f\x1e\x1d\x1c\x01"  # for a separator of several characters, inside the csv module
_HEADER_AGAIN = "the header again"
_TYPED = re.compile(r":(token|float)(_seq)?$")  # of RecBole's headers: user_id:token
TOO_LONG = f"longer than {MAX_ROW_BYTES:,} bytes"


@dataclass(frozen=True)
class Chunk:
    """Rows as read: `line` int64, one array per wanted column, `reason` (null: good so far), `raw` text of each row.

    Rows with a reason have nulls in the columns. `raw` may be null throughout where the format has no text (Parquet).
    `place`, where lines may give several rows: the row's int64 place in its line. `cell`, where a reason is about one:
    its column and what it holds, null elsewhere.
    """

    line: pa.Array
    columns: list[pa.Array]
    reason: pa.Array
    raw: pa.Array
    place: pa.Array | None = None
    cell: tuple[pa.Array, pa.Array] | None = None


@dataclass(frozen=True)
class Layout:
    """Where the wanted columns stand in one file, how many fields a row has, and on which line its rows begin."""

    positions: tuple[int, ...]
    num_fields: int
    first_row: int = 1  # 1-based line
    header: str | None = None  # the header's line; met again, it is no row
    matrix: tuple[str, ...] = ()  # items of the last positions


def check_encoding(encoding: str, *, name: str, head: bytes) -> None:
    """Raises GraftrecError for an encoding that can't be cut into lines, or that the file's first bytes belie."""
    try:
        codec = codecs.lookup(encoding).name
    except LookupError:
        raise GraftrecError(f"{name}: unknown encoding {encoding!r}; try utf-8 or latin-1") from None
    wide = codec.startswith(("utf-16", "utf-32")) or head.startswith((b"\xff\xfe", b"\xfe\xff"))
    if wide:
        found = codec if codec.startswith(("utf-16", "utf-32")) else "UTF-16 text"
        raise GraftrecError(
            f"{name}: expected text whose line end is one byte, found {found}; convert it: iconv -t UTF-8"
        )


def lines(block: Block, encoding: str, *, first_row: int = 1, keep_empty: bool = False) -> Chunk:
    """The rows of a block as text (in `raw`), with line numbers and no columns. Empty lines are left out."""
    if block.too_long:
        head = block.data[: RAW_CHARACTERS * 4].decode(encoding, "replace")
        return Chunk(pa.array([block.first_line], pa.int64()), [], pa.array([TOO_LONG]), pa.array([head]))
    data = block.data
    if codecs.BOM_UTF8 in data and _is_utf8(encoding):  # files that were put one behind the other have several
        data = (b"\n" + data).replace(b"\n" + codecs.BOM_UTF8, b"\n")[1:]
    texts, reason = _decoded(data, encoding)
    if block.data.endswith(b"\n"):
        texts, reason = texts[:-1], reason[:-1]
    if b"\r" in data:
        texts = pc.ascii_rtrim(texts, characters="\r")
    if len(data) > MAX_ROW_BYTES:
        reason = pc.if_else(pc.greater(pc.binary_length(texts), MAX_ROW_BYTES), TOO_LONG, reason)
    numbers = pa.array(np.arange(block.first_line, block.first_line + len(texts)))
    keep = pa.repeat(True, len(texts)) if keep_empty else pc.not_equal(texts, "")
    if block.first_line < first_row:
        keep = pc.and_(keep, pc.greater_equal(numbers, first_row))
    if pc.all(keep).as_py() is False:
        numbers, texts, reason = numbers.filter(keep), texts.filter(keep), reason.filter(keep)
    return Chunk(numbers, [], reason, texts)


def split(rows: Chunk, config: FileConfig, layout: Layout) -> Chunk:
    """Cut each row into fields and take the wanted ones."""
    good = pc.is_null(rows.reason)
    plain = good
    for mark in (config.quote, config.escape):
        if mark:
            plain = pc.and_(plain, pc.invert(pc.match_substring(rows.raw, mark)))
    max_splits = None if config.fields is None else config.fields - 1
    fields = pc.split_pattern(pc.if_else(plain, rows.raw, None), config.separator, max_splits=max_splits)
    right = pc.equal(pc.list_value_length(fields), layout.num_fields)
    reason = rows.reason
    if pc.all(right).as_py() is False or fields.null_count:
        quoted = pc.and_(good, pc.invert(plain))
        wrong = pc.fill_null(pc.invert(right), False)
        counts = pc.cast(pc.list_value_length(fields), pa.string())
        said = pc.binary_join_element_wise(f"expected {layout.num_fields} fields, found ", counts, "")
        reason = pc.if_else(wrong, said, reason)
        right = pc.fill_null(right, False)
        if pc.any(quoted).as_py():
            fields, right, reason = _mend_quoted(rows.raw, fields, right, reason, quoted, config, layout)
        safe = pa.array([""] * layout.num_fields, pa.string())
        fields = _replace(fields, right, safe)
    columns = [pc.list_element(fields, position) for position in layout.positions]
    if layout.header is not None:
        again = pc.and_(right, pc.equal(rows.raw, layout.header))
        if pc.any(again).as_py():
            right, reason = pc.and_(right, pc.invert(again)), pc.if_else(again, _HEADER_AGAIN, reason)
    if pc.all(right).as_py() is False:
        columns = [pc.if_else(right, column, None) for column in columns]
    return Chunk(rows.line, columns, reason, rows.raw)


def parse_line(line: str, config: FileConfig) -> list[str]:
    """The fields of one line. Raises ValueError with the reason where it is malformed."""
    separator = config.separator
    if not any(mark and mark in line for mark in (config.quote, config.escape)):
        return line.split(separator, -1 if config.fields is None else config.fields - 1)
    stand_in = separator
    if len(separator) > 1:
        free = [mark for mark in _STAND_INS if mark not in line]
        if not free:
            raise ValueError("malformed quoting")
        stand_in = free[0]
        line = line.replace(separator, stand_in)
    try:
        reader = csv.reader(
            (line,),
            delimiter=stand_in,
            quotechar=config.quote,
            quoting=csv.QUOTE_MINIMAL if config.quote else csv.QUOTE_NONE,
            escapechar=config.escape,
            strict=True,
        )
        fields = next(reader)
    except (csv.Error, StopIteration):
        raise ValueError("malformed quoting") from None
    return [field.replace(stand_in, separator) for field in fields] if stand_in != separator else fields


def find_layout(
    rows: Chunk, config: FileConfig, wanted: Sequence[str | int], *, name: str, matrix_from: int | None = None
) -> Layout | None:
    """Where the wanted columns are, and those of a matrix, from a file's first rows. None: the file has no row.

    Without a header the number of fields is that of most of the first hundred rows. Raises GraftrecError for a column
    that isn't there.
    """
    parsed: list[list[str]] = []
    for line, reason in zip(rows.raw[:101].to_pylist(), rows.reason[:101].to_pylist(), strict=True):
        try:
            parsed.append([] if reason else parse_line(line, config))
        except ValueError:
            parsed.append([])
    if not parsed:
        return None
    if config.header:
        names = [field.strip() for field in parsed[0]]
        positions = tuple(_position(column, names, name=name) for column in wanted)
        matrix = _matrix(positions, len(names), matrix_from, name=name)
        header, titles = rows.raw[0].as_py(), tuple(names[position] for position in matrix)
        first_row = rows.line[0].as_py() + 1 + header.count("\n")
        return Layout((*positions, *matrix), len(names), first_row, header, titles)
    widths = [len(fields) for fields in parsed if fields]
    width = max(set(widths), key=widths.count) if widths else 0
    for column in wanted:
        if not isinstance(column, int):
            raise GraftrecError(f"{name}: has no header, so expected a column's position, found the name {column!r}")
        if not 0 <= column < width:
            raise GraftrecError(
                f"{name}: expected a column at position {column} (the first is 0), found {width} fields "
                f"separated by {config.separator!r}; mend the position or the separator"
            )
    positions = tuple(int(column) for column in wanted)
    matrix = _matrix(positions, width, matrix_from, name=name)
    return Layout((*positions, *matrix), width, config.skip_rows + 1, matrix=tuple(map(str, matrix)))


def _matrix(others: Sequence[int], width: int, first: int | None, *, name: str) -> tuple[int, ...]:
    """Positions of a matrix's columns, none where there is no matrix."""
    if first is None:
        return ()
    found = tuple(position for position in range(first, width) if position not in others)
    if not found:
        raise GraftrecError(
            f"{name}: expected columns of a matrix from position {first} on, found {width} columns in all"
        )
    return found


def _position(column: str | int, names: list[str], *, name: str) -> int:
    if isinstance(column, int) and 0 <= column < len(names):
        return column
    if isinstance(column, str) and names.count(column) == 1:
        return names.index(column)
    bare = [_TYPED.sub("", one) for one in names]
    if isinstance(column, str) and bare.count(column) == 1:
        return bare.index(column)
    how = "a single column" if isinstance(column, str) and column in names else "a column"
    raise GraftrecError(
        f"{name}: expected {how} {column!r}; found columns: {', '.join(names)}; mend the name or the separator"
    )


def _is_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")


def _decoded(data: bytes, encoding: str) -> tuple[pa.Array, pa.Array]:
    """Lines as text, and a reason for those that can't be decoded."""
    try:
        whole = data.decode("utf-8" if _is_utf8(encoding) else encoding)
        texts = pc.split_pattern(pa.array([whole]), "\n").flatten()
        return texts, pa.nulls(len(texts), pa.string())
    except UnicodeDecodeError:
        pass
    texts_read: list[str] = []
    reasons: list[str | None] = []
    for line in data.split(b"\n"):
        try:
            texts_read.append(line.decode(encoding))
            reasons.append(None)
        except UnicodeDecodeError as error:
            texts_read.append(line.decode(encoding, "replace"))
            reasons.append(f"not {encoding}: byte 0x{line[error.start]:02x} at {error.start + 1}")
    return pa.array(texts_read, pa.string()), pa.array(reasons, pa.string())


def _mend_quoted(
    raw: pa.Array,
    fields: pa.Array,
    right: pa.Array,
    reason: pa.Array,
    quoted: pa.Array,
    config: FileConfig,
    layout: Layout,
) -> tuple[pa.Array, pa.Array, pa.Array]:
    """Fields of the lines that hold a quote, one by one."""
    at = np.flatnonzero(quoted.to_numpy(zero_copy_only=False))
    parsed: list[list[str] | None] = []
    reasons: list[str | None] = []
    for line in raw.take(pa.array(at)).to_pylist():
        try:
            row = parse_line(line, config)
            short = len(row) != layout.num_fields
            parsed.append(None if short else row)
            reasons.append(f"expected {layout.num_fields} fields, found {len(row)}" if short else None)
        except ValueError as error:
            parsed.append(None)
            reasons.append(str(error))
    mended = pa.array(parsed, pa.list_(pa.string()))
    where = np.arange(len(fields))
    where[at] = len(fields) + np.arange(len(at))
    take = pa.array(where)
    fields = pa.concat_arrays([fields, mended]).take(take)
    right = pa.concat_arrays([right, pc.is_valid(mended)]).take(take)
    return fields, right, pa.concat_arrays([reason, pa.array(reasons, pa.string())]).take(take)


def _replace(fields: pa.Array, right: pa.Array, safe: pa.Array) -> pa.Array:
    """`fields` with `safe` in the place of each list of another length, so that positions can be taken."""
    where = np.where(right.to_numpy(zero_copy_only=False), np.arange(len(fields)), len(fields))
    one = pa.ListArray.from_arrays(pa.array([0, len(safe)], pa.int32()), safe)
    return pa.concat_arrays([fields, one]).take(pa.array(where))
