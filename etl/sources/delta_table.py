"""A Delta table of somebody else's as a source: a version's files, less the rows that deletion vectors delete.

`deltalake` reads the log and the vectors; the data are read with pyarrow, for a table with mapped columns is null in
most readers. Reader features other than those named below are refused by name.
"""

import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import unquote, urlparse

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError
from deltalake.fs import DeltaStorageHandler

from etl.file_config import FileConfig
from etl.lake.store_errors import store_problem
from etl.plain_path import delta_path
from etl.redaction import one_line
from etl.settings import GraftrecError
from etl.sources.delimited import Chunk
from etl.sources.files import RawFile, reading

# What a reader must know of a table. The last three change nothing for a reader of data files and deltalake's log.
_KNOWN_FEATURES = {"deletionVectors", "columnMapping", "timestampNtz", "v2Checkpoint", "vacuumProtocolCheck"}
_THREADS = 16  # that read footers and log entries


@dataclass(frozen=True)
class Step:
    """A column, or a field inside one, as data files know it."""

    name: str
    id: int | None  # of a table that maps columns by id


@dataclass(frozen=True)
class TablePart:
    """What a task must know to read the wanted columns of one data file."""

    root: str
    inner: str  # the data file below root, or an absolute path or URI
    columns: tuple[tuple[Step, ...] | pa.Scalar, ...]  # a column's place in the file, or its partition value
    deleted: bytes | None  # packed bits, a set one for each deleted row


class SourceTable:
    """A version of a Delta table, pinned when it is opened. `key` names it: (table id, version).

    Raises GraftrecError where there is no such table or version, or its readers must know more than we do.
    """

    def __init__(self, root: str, config: FileConfig, *, setting: str) -> None:
        self.setting = setting
        self.root = _root(root, config.path)
        local = "://" not in self.root
        try:
            logged = os.path.isdir(os.path.join(self.root, "_delta_log"))
            place = delta_path(self.root) if local and logged else self.root
            self._handle = DeltaTable(place, version=config.version)
        except (DeltaError, OSError, ValueError, OverflowError) as error:
            raise self._unreadable(config.version, error) from None
        _check_features(self._handle, setting, self.root)
        self.id, self.version = str(self._handle.metadata().id), int(self._handle.version())
        self.key = f"{self.id}/{self.version}"
        self._name = os.path.relpath(self.root, _root(root, "")) if local else config.path
        self._mode = self._handle.metadata().configuration.get("delta.columnMapping.mode") or "none"
        self._fields = json.loads(self._handle.schema().to_json())["fields"]
        self._parts: dict[str, tuple[dict[str, pa.Scalar], bytes | None]] = {}

    @property
    def columns(self) -> list[str]:
        return [str(field["name"]) for field in self._fields]

    def files(self) -> list[RawFile]:
        """The version's data files, the oldest first."""
        actions = pa.table(self._handle.get_add_actions())
        if not actions.num_rows:
            return []
        actions = actions.sort_by([("modification_time", "ascending"), ("path", "ascending")])
        deleted = self._deleted_rows()
        partitions = actions["partition"].combine_chunks() if "partition" in actions.column_names else None
        names = [] if partitions is None else [field.name for field in partitions.type]
        paths = [unquote(path) for path in actions["path"].to_pylist()]
        for place, path in enumerate(paths):
            values = {name: pc.struct_field(partitions, name)[place] for name in names}
            self._parts[path] = values, deleted.get(path)
        return [self._file(path, place) for place, path in enumerate(paths)]

    def added_since(self, version: int) -> list[RawFile] | None:
        """The data files that later versions than `version` have added, in their order. None where rows may have gone
        or changed since, or log entries are missing."""
        if version > self.version:
            return None
        entries = [f"_delta_log/{number:020d}.json" for number in range(version + 1, self.version + 1)]
        active = {file.name: file for file in self.files()}
        found: list[RawFile] = []
        try:
            with ThreadPoolExecutor(_THREADS) as pool:
                logged = list(pool.map(self._actions, entries))
        except (OSError, ValueError):  # removed, or not readable any more
            return None
        for action in (action for actions in logged for action in actions):
            changed = action.get("add") or action.get("remove") or {}
            if "metaData" in action or ("remove" in action and changed.get("dataChange", True)):
                return None
            if "add" in action and changed.get("dataChange", True):
                file = self._file(unquote(changed["path"]), 0)
                if file.name not in active:  # compacted meanwhile
                    return None
                found.append(active[file.name])
        return found

    def part(self, file: RawFile, wanted: Sequence[str | int]) -> TablePart:
        """How a task reads a file of `files`. Raises GraftrecError for a column that the table lacks."""
        inner = file.path
        values, deleted = self._parts[inner]
        columns = [self._column(column, values) for column in wanted]
        return TablePart(self.root, inner, tuple(columns), deleted)

    def _file(self, path: str, place: int) -> RawFile:
        return RawFile(path, str(PurePosixPath(self._name) / path), place, 0, None)

    def _actions(self, entry: str) -> list[dict[str, Any]]:
        with open_inside(self.root, entry) as file:
            return [json.loads(line) for line in file.read().decode().splitlines() if line.strip()]

    def _deleted_rows(self) -> dict[str, bytes]:
        """File -> its deleted rows as packed bits, of the files that have a deletion vector."""
        if "deletionVectors" not in (self._handle.protocol().reader_features or []):
            return {}
        try:
            vectors = pa.table(self._handle.deletion_vectors().read_all())
        except (DeltaError, OSError, ValueError) as error:
            raise self._unreadable(self.version, error) from None
        home = self._handle.table_uri.rstrip("/") + "/"
        found = {}
        for place, uri in enumerate(vectors["filepath"].to_pylist()):
            kept = vectors["selection_vector"][place].values.to_numpy(zero_copy_only=False)
            path = unquote(urlparse(uri).path if uri.startswith("file:") else uri)
            inner = path.removeprefix(unquote(urlparse(home).path if home.startswith("file:") else home))
            found[inner] = zlib.compress(np.packbits(~kept).tobytes())
        return found

    def _column(self, column: str | int, values: dict[str, pa.Scalar]) -> tuple[Step, ...] | pa.Scalar:
        names = self.columns
        if isinstance(column, int) and 0 <= column < len(names):
            column = names[column]
        if column in values:
            return values[column]
        parts = [column] if column in names else str(column).split(".")
        steps, fields = [], self._fields
        for part in parts:
            field = next((field for field in fields if field["name"] == part), None)
            if field is None:
                raise GraftrecError(
                    f"{self.setting}: expected a column {column!r} of the table {self.root}, found {', '.join(names)}; "
                    "mend the name"
                )
            mapping, inside = field.get("metadata", {}), field["type"]
            name = mapping.get("delta.columnMapping.physicalName", part) if self._mode != "none" else part
            steps.append(Step(name, mapping.get("delta.columnMapping.id") if self._mode == "id" else None))
            fields = inside["fields"] if isinstance(inside, dict) and inside.get("type") == "struct" else []
        return tuple(steps)

    def _unreadable(self, version: int | None, error: Exception) -> GraftrecError:
        reason = store_problem(self.root, error) or one_line(error)
        which = "" if version is None else f" at version {version}"
        return GraftrecError(
            f"{self.setting}: expected a Delta table{which} at {self.root}, found: {reason[:300]}; mend path or version"
        )


def row_groups(part: TablePart, file: RawFile) -> list[int]:
    """Rows of each row group of a data file. Raises GraftrecError where it can't be read."""
    with reading(file), open_inside(part.root, part.inner) as stream:
        meta = pq.ParquetFile(stream).metadata
        return [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]


def all_row_groups(parts: Sequence[tuple[TablePart, RawFile]]) -> list[list[int]]:
    """See row_groups; of many files."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda one: row_groups(*one), parts))


def chunks(part: TablePart, file: RawFile, group: int, before: int) -> Iterator[Chunk]:
    """The rows of a row group that no vector deletes; `before`: rows of the file that precede the group."""
    deleted = _deleted(part)
    with reading(file), open_inside(part.root, part.inner) as stream:
        opened = pq.ParquetFile(stream)
        places = [
            _place(opened.schema_arrow, column) if isinstance(column, tuple) else column for column in part.columns
        ]
        read = sorted({".".join(place) for place in places if isinstance(place, tuple)})
        for batch in opened.iter_batches(1 << 16, row_groups=[group], columns=read):
            size = batch.num_rows
            lines = np.arange(before, before + size)
            columns = [_cells(batch, place, size) for place in places]
            before += size
            if deleted is not None:
                gone = np.zeros(size, bool)
                known = lines < len(deleted)
                gone[known] = deleted[lines[known]]
                kept = pa.array(~gone)
                columns, lines = [column.filter(kept) for column in columns], lines[~gone]
            nothing = pa.nulls(len(lines), pa.string())
            if len(lines):
                yield Chunk(pa.array(lines + 1), columns, nothing, nothing)


def open_inside(root: str, inner: str) -> BinaryIO | pa.NativeFile:
    """A file of a table: below its root, or where an absolute path says (a clone names its source's files)."""
    if inner.startswith("file:"):
        return pafs.LocalFileSystem().open_input_file(unquote(urlparse(inner).path))
    if "://" in inner:
        root, _, inner = inner.rpartition("/")
    if "://" in root:
        return pafs.PyFileSystem(DeltaStorageHandler(root)).open_input_file(inner)
    return pafs.LocalFileSystem().open_input_file(os.path.join(root, inner))


def _deleted(part: TablePart) -> npt.NDArray[np.bool_] | None:
    if part.deleted is None:
        return None
    return np.unpackbits(np.frombuffer(zlib.decompress(part.deleted), np.uint8)).astype(bool)


def _place(schema: pa.Schema, steps: tuple[Step, ...]) -> tuple[str, ...] | None:
    """The names that a data file has for a column and fields inside it; None where it lacks them."""
    fields, names = list(schema), []
    for step in steps:
        wanted = None if step.id is None else str(step.id).encode()
        for field in fields:
            numbered = (field.metadata or {}).get(b"PARQUET:field_id")
            if numbered == wanted if wanted is not None else field.name == step.name:
                names.append(field.name)
                fields = list(field.type) if pa.types.is_struct(field.type) else []
                break
        else:
            return None
    return tuple(names)


def _cells(batch: pa.RecordBatch, place: tuple[str, ...] | pa.Scalar | None, size: int) -> pa.Array:
    if place is None:
        return pa.nulls(size, pa.string())
    if isinstance(place, pa.Scalar):
        return pa.repeat(place, size)
    cells = batch.column(place[0])
    return pc.struct_field(cells, list(place[1:])) if len(place) > 1 else cells


def _check_features(handle: DeltaTable, setting: str, root: str) -> None:
    protocol = handle.protocol()
    unknown = sorted(set(protocol.reader_features or []) - _KNOWN_FEATURES)
    if not unknown and protocol.min_reader_version > 3:
        unknown = [f"reader version {protocol.min_reader_version}"]
    if unknown:
        raise GraftrecError(
            f"{setting}: expected a Delta table whose readers need nothing but {', '.join(sorted(_KNOWN_FEATURES))}, "
            f"found {', '.join(unknown)} at {root}; rewrite the table without, or read it by format: table"
        )


def _root(root: str, path: str) -> str:
    """Where a table lies: an absolute local path, or a URI."""
    whole = path if "://" in path or path.startswith(("/", "~")) else f"{root.rstrip('/')}/{path}" if path else root
    if whole.startswith("file://"):
        whole = unquote(urlparse(whole).path)
    if re.match(r"\w+://", whole):
        return whole.rstrip("/")
    return os.path.abspath(os.path.expanduser(whole))
