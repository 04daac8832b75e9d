"""The first part of a file as columns: its format and spelling guessed from content, whatever its name."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from etl.file_config import FileConfig
from etl.guess.delimited_text import describe
from etl.settings import GraftrecError
from etl.sources import delimited, delta_table, files, objects, parquet
from etl.sources.delta_table import SourceTable
from etl.sources.files import RawFile

SAMPLE_BYTES = 1 << 18
_ROWS = 2_000
Column = str | int


@dataclass(frozen=True)
class Sample:
    """Some rows of a file. `settings` read it; `is_whole`: these are all of its rows. A cell is a plain value, a list,
    or None."""

    file: RawFile
    settings: dict[str, Any]
    columns: dict[Column, list[Any]]
    is_whole: bool
    doubts: list[str] = field(default_factory=list)
    shape: str = "rows"  # or "a user a line", or "matrix"

    @property
    def num_rows(self) -> int:
        return len(next(iter(self.columns.values()), []))


def sample_file(file: RawFile) -> Sample:
    """Raises GraftrecError for a file that nothing can be read from."""
    with files.reading(file), files.open_content(file) as stream:
        magic = stream.read(4)
    if magic == b"PAR1":
        return _of_parquet(file)
    head = files.head(file, SAMPLE_BYTES)
    is_whole = len(head) < SAMPLE_BYTES
    text, encoding = _decoded(file, head if is_whole else head[: head.rfind(b"\n") + 1] or head)
    start = text.lstrip()[:1]
    if start == "[" and (sample := _of_array(file, is_whole)):
        return sample
    if start == "{" and (sample := _of_objects(file, text, is_whole)):
        return sample
    settings, names, rows, doubts, shape = describe(text)
    if not rows or not names:
        raise GraftrecError(f"{file.name}: expected rows of several columns, found none; describe it by hand")
    cells = {name: [row[place] or None for row in rows] for place, name in enumerate(names)}
    if encoding != "utf-8":
        settings["encoding"] = encoding
        doubts = [*doubts, f"no UTF-8, so {encoding} is taken: look at the accents"]
    return Sample(file, settings, cells, is_whole, doubts, shape)


def sample_table(root: str, path: str) -> Sample:
    """Of a Delta table. Raises GraftrecError."""
    table = SourceTable(root, FileConfig(path=path, format="delta"), setting=path)
    found = table.files()
    if not found:
        raise GraftrecError(f"{path}: expected a Delta table with rows, found none")
    names = list(table.columns)
    chunks = delta_table.chunks(table.part(found[0], names), found[0], 0, 0)
    columns = _cells(names, next(iter(chunks)).columns)
    return Sample(replace(found[0], name=path), {"format": "delta"}, columns, False)


def with_folder_keys(sample: Sample) -> Sample:
    """The sample, with the keys of folders `key=value` as columns."""
    pairs = [folder.partition("=") for folder in sample.file.name.split("/")[:-1]]
    keys: dict[Column, list[Any]] = {key: [value] * sample.num_rows for key, is_pair, value in pairs if is_pair}
    return replace(sample, columns=sample.columns | keys)


def _decoded(file: RawFile, head: bytes) -> tuple[str, str]:
    delimited.check_encoding("utf-8", name=file.name, head=head)
    if b"\0" in head:
        raise GraftrecError(f"{file.name}: expected text, Parquet or a packed file, found other bytes")
    text = head.decode("utf-8", "replace").removeprefix("\ufeff")
    odd = [line for line in text.split("\n") if not line.isascii()] if "\ufffd" in text else []
    if 2 * sum("\ufffd" in line for line in odd) > len(odd):
        return head.decode("latin-1"), "latin-1"
    return text, "utf-8"


def _of_parquet(file: RawFile) -> Sample:
    names, sizes = parquet.parquet_groups(file)
    if not sum(sizes):
        raise GraftrecError(f"{file.name}: expected rows, found none")
    group = next(place for place, size in enumerate(sizes) if size)
    chunk = next(parquet.parquet_chunks(file, group, 1, names))
    columns = _cells(names, chunk.columns)
    return Sample(file, {"format": "parquet"}, columns, sum(sizes) <= _ROWS)


def _cells(names: Sequence[str], arrays: Sequence[pa.Array]) -> dict[Column, list[Any]]:
    """Columns of single values or lists of such, as Python has them."""
    found: dict[Column, list[Any]] = {}
    for name, array in zip(names, arrays, strict=True):
        inside = array.type.value_type if hasattr(array.type, "value_type") else array.type
        if not pa.types.is_nested(inside) and not pa.types.is_map(array.type):
            found[name] = [_plain(cell) for cell in _listed(array.slice(0, _ROWS))]
    return found


def _listed(array: pa.Array) -> list[Any]:
    try:
        cells: list[Any] = array.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):  # times that Python has none of
        cells = array.cast(pa.string()).to_pylist()
    return cells


def _plain(cell: Any) -> Any:
    if isinstance(cell, bytes):
        return cell.decode("utf-8", "replace")
    if isinstance(cell, float) and cell != cell:
        return None
    if isinstance(cell, str):
        return cell.strip() or None
    return cell


def _of_array(file: RawFile, is_whole: bool) -> Sample | None:
    texts = [element.decode("utf-8", "replace") for element in itertools.islice(objects.array_elements(file), _ROWS)]
    found = [one for text in texts if (one := objects.parsed_object(text, "json"))]
    return _of_dicts(file, found, len(texts), {"format": "json_array"}, is_whole) if found else None


def _of_objects(file: RawFile, text: str, is_whole: bool) -> Sample | None:
    lines = [line for line in text.split("\n")[:_ROWS] if line.strip()]
    for form in ("json", "python"):
        found = [one for line in lines if (one := objects.parsed_object(line, form))]
        if 2 * len(found) >= len(lines):
            return _of_dicts(file, found, len(lines), {"format": form}, is_whole)
    return None


def _of_dicts(file: RawFile, found: list[dict[str, Any]], num: int, settings: dict[str, Any], is_whole: bool) -> Sample:
    doubts = [f"{num - len(found):,} of {num:,} lines hold no object: they are rejected"] * (num > len(found))
    names = list(dict.fromkeys(key for one in found for key in objects.keys_of(one)))
    columns: dict[Column, list[Any]] = {}
    for name in names:
        cells = [objects.value_of(one, name) for one in found]
        flat = [cell for cell in cells for cell in (cell if isinstance(cell, list | tuple) else [cell])]
        if not any(isinstance(cell, dict | list | tuple | set) for cell in flat):
            columns[name] = [list(cell) if isinstance(cell, tuple) else _plain(cell) for cell in cells]
    if not columns:
        raise GraftrecError(f"{file.name}: expected objects with keys, found none")
    return Sample(file, settings, columns, is_whole and num < _ROWS, doubts)
