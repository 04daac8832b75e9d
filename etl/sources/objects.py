"""Objects, of JSON or of Python, to columns: the same `Chunk` that delimited text gives.

JSON: one object a line. pyarrow parses a block at once where all its lines are plain; a block with any oddity (a line
that is no object, cells of several kinds) is read line by line. Python literals: the same, by `ast.literal_eval`. A
JSON array: its elements one by one; a row's line is its number.
"""

import ast
import codecs
import itertools
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pa_json

from etl.file_config import FileConfig
from etl.settings import GraftrecError
from etl.sources.delimited import Chunk, lines
from etl.sources.files import MAX_ROW_BYTES, Block, RawFile, check_columns, mentions, open_content, reading

_KINDS = {str: pa.string(), int: pa.int64(), float: pa.float64()}
_EXACT = 2.0**53  # a float64 holds each whole number below it
_OBJECTS = {"json": "a JSON object", "json_array": "a JSON object", "python": "a Python dict"}
READ_BYTES = 1 << 20
_BLOCK_ROWS = 1 << 12  # elements of an array at once


def object_columns(rows: Chunk, wanted: Sequence[str], form: str = "json") -> Chunk:
    """The wanted keys of each line; an absent key is null. Lines that are no object get a reason."""
    columns = None if form == "python" else _json_block(rows, wanted)
    if columns is not None:
        return Chunk(rows.line, columns, rows.reason, rows.raw)
    no_object = f"not {_OBJECTS[form]}"
    reasons: list[str | None] = []
    cells: list[list[Any]] = [[] for _ in wanted]
    for line, reason in zip(rows.raw.to_pylist(), rows.reason.to_pylist(), strict=True):
        found: dict[str, Any] = {}
        if reason is None:
            parsed = parsed_object(line, form)
            found, reason = ({}, no_object) if parsed is None else (parsed, None)
        reasons.append(reason)
        for column, key in zip(cells, wanted, strict=True):
            column.append(_cell(value_of(found, key)))
    arrays = [_column(column) for column in cells]
    return Chunk(rows.line, arrays, pa.array(reasons, pa.string()), rows.raw)


def array_chunks(file: RawFile, config: FileConfig, wanted: Sequence[str]) -> Iterator[Chunk]:
    """The wanted keys of each element of a file that is one JSON array."""
    elements, first = array_elements(file), 1
    while block := list(itertools.islice(elements, _BLOCK_ROWS)):
        data = b"\n".join(element.replace(b"\n", b" ").replace(b"\r", b" ") for element in block)
        yield object_columns(lines(Block(data, first), config.encoding), wanted)
        first += len(block)


def array_elements(file: RawFile) -> Iterator[bytes]:
    """The elements of one JSON array. Raises GraftrecError where it is none, or damaged."""
    decoder, found, at = json.JSONDecoder(), 0, 0
    with reading(file), open_content(file) as stream:
        buffer = stream.read(READ_BYTES).removeprefix(codecs.BOM_UTF8).decode("latin-1").lstrip()
        if buffer and not buffer.startswith("["):
            raise GraftrecError(f"{file.name}: expected a JSON array, found {buffer[:60]!r}; see format: json")
        buffer = buffer[1:]
        while True:
            at = _next_mark(buffer, at)
            try:
                end = decoder.raw_decode(buffer, at)[1]
                mark = _next_mark(buffer, end)
            except (ValueError, RecursionError):
                end = mark = len(buffer)
            if buffer[mark : mark + 1] in (",", "]") and buffer[mark : mark + 1]:
                yield buffer[at:end].encode("latin-1")
                found, at = found + 1, mark + 1
                if buffer[mark] == ",":
                    continue
            elif not (buffer[at : at + 1] == "]" and found == 0):  # more is needed
                more = stream.read(READ_BYTES) if len(buffer) - at <= MAX_ROW_BYTES else b""
                if more:
                    buffer, at = buffer[at:] + more.decode("latin-1"), 0
                    continue
                raise GraftrecError(
                    f"{file.name}: expected an array of JSON objects, each of at most {MAX_ROW_BYTES:,} bytes, found "
                    f"none behind element {found:,}: {buffer[at : at + 60]!r}; mend it, or write one object a line"
                )
            else:
                at += 1
            rest = buffer[at:].strip() or stream.read(READ_BYTES).decode("latin-1").strip()
            if rest:
                raise GraftrecError(
                    f"{file.name}: expected one JSON array, found {rest[:60]!r} behind it; write one object a line"
                )
            return


def _next_mark(text: str, at: int) -> int:
    """The first place from `at` on that holds no white space."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def object_keys(file: RawFile, head: bytes, wanted: Sequence[str | int], form: str) -> tuple[str, ...]:
    """The wanted keys, of which each stands in a file, whose first bytes are `head`.

    Raises GraftrecError for one that doesn't, and where none of the first hundred lines is an object.
    """
    if form == "json_array":
        texts = [element.decode("utf-8", "replace") for element in itertools.islice(array_elements(file), 100)]
    else:
        texts = head.decode("utf-8", "replace").removeprefix("\ufeff").split("\n")[:100]
    objects = [found for text in texts if (found := parsed_object(text, form)) is not None]
    if not objects:
        raise GraftrecError(f"{file.name}: expected {_OBJECTS[form]} on each line, found {_hint(texts, form)}")
    keys = list(dict.fromkeys(key for found in objects for key in keys_of(found)))
    quote = "'" if form == "python" else '"'
    late = [str(key) for key in wanted if key not in keys]
    keys += [key for key in late if mentions(file, f"{quote}{key.rsplit('.', 1)[-1]}{quote}")]
    return tuple(check_columns(wanted, keys, name=file.name))


def _hint(texts: Sequence[str], form: str) -> str:
    first = next((text.strip() for text in texts if text.strip()), "")
    hint = "write one object a line"
    if first.startswith("["):
        hint = "for an array set format: json_array"
    elif form == "json" and first.startswith("{") and "'" in first:
        hint = "for Python's spelling of a dict set format: python"
    return f"{first[:60]!r}; {hint}"


def keys_of(found: dict[str, Any], prefix: str = "", depth: int = 8) -> Iterator[str]:
    """Keys of an object, and of objects in it, or in a list in it, as `outer.inner`."""
    for key, value in found.items():
        yield f"{prefix}{key}"
        inside = next(iter(value), None) if isinstance(value, list) else value
        if isinstance(inside, dict) and depth:
            yield from keys_of(inside, f"{prefix}{key}.", depth - 1)


def value_of(found: dict[str, Any], key: str) -> Any:
    """The value of a key, else of `outer.inner` inside, of a list's objects a list; null where there is none."""
    if key in found or "." not in key:
        return found.get(key)
    outer, inner = key.split(".", 1)
    inside = found.get(outer)
    if isinstance(inside, list):
        return [value_of(one, inner) if isinstance(one, dict) else None for one in inside]
    return value_of(inside, inner) if isinstance(inside, dict) else None


def parsed_object(line: str, form: str) -> dict[str, Any] | None:
    try:
        if form == "python":
            with warnings.catch_warnings():  # of escapes that Python doesn't know
                warnings.simplefilter("ignore")
                parsed = ast.literal_eval(line.strip())
        else:
            parsed = json.loads(line)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def _json_block(rows: Chunk, wanted: Sequence[str]) -> list[pa.Array] | None:
    """All lines at once, or None where any of them needs a closer look."""
    if rows.reason.null_count < len(rows.reason) or not len(rows.raw) or any("." in key for key in wanted):
        return None
    trimmed = pc.ascii_trim_whitespace(rows.raw)
    objects = pc.and_(pc.starts_with(trimmed, "{"), pc.ends_with(trimmed, "}"))
    if not pc.all(objects).as_py():
        return None
    try:
        first = json.loads(rows.raw[0].as_py())
    except ValueError:
        return None
    fields = [pa.field(key, _KINDS.get(type(first.get(key)), pa.string())) for key in dict.fromkeys(wanted)]
    options = pa_json.ParseOptions(explicit_schema=pa.schema(fields), unexpected_field_behavior="ignore")
    data = "\n".join(rows.raw.to_pylist()).encode()
    try:
        table = pa_json.read_json(
            pa.BufferReader(data), pa_json.ReadOptions(use_threads=False, block_size=len(data) + 1), options
        )
    except pa.ArrowInvalid:
        return None
    columns = [table.column(key).combine_chunks() for key in wanted]
    if table.num_rows != len(rows.raw) or any(map(_may_have_lost_digits, columns)):
        return None
    return columns


def _may_have_lost_digits(column: pa.Array) -> bool:
    """Whether a float stands where a whole number of too many digits may have been written."""
    return pa.types.is_floating(column.type) and bool(pc.any(pc.greater_equal(pc.abs(column), _EXACT)).as_py())


def _cell(value: Any) -> Any:
    """Numbers and text as they are; lists, also of lists, as lists of text; anything else as JSON text."""
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return _whole_characters(value)
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, list | tuple | set):
        return [part for one in value for part in (_cell(one) if isinstance(one, list | tuple) else [_part(one)])]
    return (
        value.decode("utf-8", "replace") if isinstance(value, bytes) else json.dumps(value, default=str, skipkeys=True)
    )


def _part(value: Any) -> str | None:
    return None if value is None else _spelled(_cell(value))


def _column(cells: list[Any]) -> pa.Array:
    if any(isinstance(cell, list) for cell in cells):
        return pa.array(
            [cell if isinstance(cell, list) or cell is None else [str(cell)] for cell in cells], pa.list_(pa.string())
        )
    kinds = {type(cell) for cell in cells if cell is not None}
    is_mixed = kinds == {int, float} and not all(map(_is_exact_float, cells))
    if str in kinds or is_mixed or not all(map(_is_exact, cells)):
        return pa.array([None if cell is None else _spelled(cell) for cell in cells], pa.string())
    if float in kinds:
        return pa.array([None if cell is None else float(cell) for cell in cells], pa.float64())
    return pa.array(cells, pa.int64())


def _whole_characters(text: str) -> str:
    """U+FFFD for half of a surrogate pair, which is no character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_exact(cell: Any) -> bool:
    return not isinstance(cell, int) or abs(cell) < 1 << 62


def _is_exact_float(cell: Any) -> bool:
    return cell is None or abs(cell) < _EXACT or not math.isfinite(cell)


def _spelled(cell: Any) -> str:
    """A cell as text; a float as Arrow spells it, whatever else its column holds."""
    if isinstance(cell, float) and math.isfinite(cell):
        return (
            str(pc.cast(pa.scalar(cell), pa.string()))
            if not cell.is_integer() or abs(cell) >= _EXACT
            else str(int(cell))
        )
    if isinstance(cell, float):
        return "NaN" if math.isnan(cell) else str(cell)
    return cell if isinstance(cell, str) else str(cell)
