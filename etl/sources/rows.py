"""One described file set (delimited, objects or Parquet) to a Spark frame, read in parallel byte ranges.

The driver finds the files, looks at each one's head, and cuts ranges; a first pass counts line ends where a file has
more than one range, so that every row knows its line. Tasks then read with pyarrow alone inside mapInArrow.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from urllib.parse import unquote

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from etl.file_config import EventsFileConfig, FileConfig
from etl.settings import GraftrecError
from etl.sources import (
    delimited,
    delta_table,
    files,
    multiline,
    objects,
    parquet,
    reasons,
    reshape,
    spark_table,
    values,
)
from etl.sources.delimited import Chunk, Layout
from etl.sources.delta_table import SourceTable, TablePart
from etl.sources.files import RawFile
from etl.sources.schema import spark_schema
from etl.sources.spark_table import SparkTable

RANGE_BYTES = 16 << 20
_FIRST_FILES = 3
Shape = Callable[[Chunk, RawFile], pa.Table]


@dataclass(frozen=True)
class Range:
    """What one task reads: bytes [start, end) of a file, or row group `start` of a Parquet file."""

    file: RawFile
    start: int
    end: int
    line_ends_before: int  # Parquet: rows before
    layout: Layout | None
    names: tuple[str, ...] = ()
    table: TablePart | None = None  # of a Delta table's file
    matrix: tuple[str, ...] = ()  # items of a matrix, the last of the columns
    fixed: dict[int, str | None] = field(default_factory=dict)  # place among the wanted columns -> value of the file


class RawRows:
    """The rows of one FileConfig, of which the columns `wanted` are read. `setting` names it in messages; `found`,
    where given, are the files to read in the place of all, and `table` the Delta table that they are of.

    Raises GraftrecError where there is no file, no row, or not every wanted column.
    """

    def __init__(
        self,
        config: FileConfig,
        root: str,
        wanted: list[str | int],
        *,
        setting: str,
        range_bytes: int = RANGE_BYTES,
        found: list[RawFile] | None = None,
        table: SourceTable | SparkTable | None = None,
    ) -> None:
        self.config, self.wanted, self.setting, self.range_bytes = config, wanted, setting, range_bytes
        if config.format == "delta" and table is None:
            table = SourceTable(root, config, setting=setting)
        self.table = table
        if found is None:
            member = config.member
            found = files.find_files(root, config.path, what=setting, member=member) if table is None else table.files()
        self.files = found
        self._ranges: list[Range] | None = None

    def frame(
        self,
        spark: SparkSession,
        *,
        kind: str,
        shape: Shape,
        schema: pa.Schema,
        kept: Callable[[pa.Table], pa.Table] | None = None,
    ) -> DataFrame:
        """A lazy frame of `schema`; `shape` gives the columns before `kind`, and what `reasons.first` gives, a row for
        each row read. `kept` leaves rows out."""

        return self.map(spark, located(kind, shape, kept), schema)

    def first(self, *, kind: str, shape: Shape, schema: pa.Schema) -> pa.Table:
        """As `frame`, of the first block of a few files alone, in this process."""
        function, tables = located(kind, shape, None), [schema.empty_table()]
        for part in [part for part in self._plan() if part.start == 0][:_FIRST_FILES]:
            for found in itertools.islice(read_range(part, self.config), 1):
                for chunk in _reshaped(found, self.config, part.matrix):
                    tables.append(function(chunk, part.file).cast(schema))
        return pa.concat_tables(tables)

    def map(self, spark: SparkSession, function: Shape, schema: pa.Schema) -> DataFrame:
        """A lazy frame of `schema`: what `function` makes of each chunk."""
        config = self.config
        if isinstance(self.table, SparkTable):
            (file,) = self.files

            def shaped(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
                for found in spark_table.chunks(batches):
                    for chunk in _reshaped(found, config):
                        yield from function(chunk, file).cast(schema).to_batches()

            return self.table.rows().mapInArrow(shaped, spark_schema(schema))
        ranges = self._cut(spark)

        def read(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                for index in batch.column(0).to_pylist():
                    file = ranges[index].file
                    for found in read_range(ranges[index], config):
                        try:
                            tables = [function(chunk, file) for chunk in _reshaped(found, config, ranges[index].matrix)]
                        except GraftrecError as error:
                            raise GraftrecError(f"{file.name}: {error}") from None
                        for table in tables:
                            yield from table.cast(schema).to_batches()

        return spark.range(0, len(ranges), 1, max(len(ranges), 1)).mapInArrow(read, spark_schema(schema))

    def _cut(self, spark: SparkSession) -> list[Range]:
        """The ranges with their line numbers; kept, so that a second frame doesn't count again."""
        if self._ranges is None:
            self._ranges = _number_lines(spark, self._plan())
        return self._ranges

    def _plan(self) -> list[Range]:
        if isinstance(self.table, SourceTable):
            return self._table_plan(self.table)
        plan = self._parquet_plan() if self.config.format == "parquet" else self._text_plan()
        if not plan:
            names = ", ".join(file.name for file in self.files[:3])
            raise GraftrecError(
                f"{self.setting}: expected at least one row, found none in {len(self.files)} file(s): {names}"
            )
        return plan

    def _text_plan(self) -> list[Range]:
        plan = []
        first: tuple[str, str | None] | None = None
        for file in self.files:
            head = files.head(file)
            layout: Layout | None
            names: tuple[str, ...] = ()
            fixed, wanted = _fixed(file, self.wanted)
            delimited.check_encoding(self.config.encoding, name=file.name, head=head)
            if self.config.format != "delimited":
                layout = Layout((), 0, self.config.skip_rows + 1)
                if not head.strip():
                    continue
                names = objects.object_keys(file, head, wanted, self.config.format)
            else:
                rows = _first_rows(head, self.config)
                layout = delimited.find_layout(rows, self.config, wanted, name=file.name, matrix_from=self._matrix_from)
                if layout is None or _ends_before(head, layout.first_row):
                    continue
                first = first or (file.name, layout.header)
                if layout.header != first[1] and any(isinstance(column, int) for column in self.wanted):
                    raise GraftrecError(
                        f"{file.name}: expected the header of {first[0]}, {first[1]!r}, for columns are given by their "
                        f"positions; found {layout.header!r}; name the columns, or put the file elsewhere"
                    )
            is_whole = self.config.multiline or self.config.format == "json_array"
            plan += [
                Range(file, start, end, 0, layout, names, matrix=layout.matrix, fixed=fixed)
                for start, end in files.ranges(file, files.END if is_whole else self.range_bytes)
            ]
        return plan

    @property
    def _matrix_from(self) -> int | None:
        return self.config.matrix_from if isinstance(self.config, EventsFileConfig) else None

    def _parquet_plan(self) -> list[Range]:
        plan = []
        for file in self.files:
            columns, sizes = parquet.parquet_groups(file)
            fixed, wanted = _fixed(file, self.wanted)
            names = tuple(files.check_columns(wanted, columns, name=file.name))
            first = self._matrix_from
            matrix = () if first is None else tuple(name for name in columns[first:] if name not in names)
            before = 0
            for group, size in enumerate(sizes):
                if size:
                    part = Range(file, group, group + 1, before, None, names + matrix, matrix=matrix, fixed=fixed)
                    plan.append(part)
                before += size
        return plan

    def _table_plan(self, table: SourceTable) -> list[Range]:
        parts = [(table.part(file, self.wanted), file) for file in self.files]
        plan = []
        for (part, file), sizes in zip(parts, delta_table.all_row_groups(parts), strict=True):
            starts = [sum(sizes[:group]) for group in range(len(sizes))]
            plan += [
                Range(file, group, group + 1, start, None, table=part)
                for group, (start, size) in enumerate(zip(starts, sizes, strict=True))
                if size
            ]
        return plan


def located(kind: str, shape: Shape, kept: Callable[[pa.Table], pa.Table] | None) -> Shape:
    """As `shape`, each row with where it was found, and why it is rejected (FOUND); `kept` leaves rows out."""

    def shaped(chunk: Chunk, file: RawFile) -> pa.Table:
        rows = reasons.located(shape(chunk, file), chunk, kind, file.name)
        return rows if kept is None else kept(rows)

    return shaped


def read_range(part: Range, config: FileConfig) -> Iterator[Chunk]:
    """The rows of one range as the file has them, a block at a time."""
    for chunk in _read_range(part, config):
        yield reshape.with_fixed(chunk, part.fixed) if part.fixed else chunk


def _reshaped(chunk: Chunk, config: FileConfig, matrix: Sequence[str] = ()) -> Iterator[Chunk]:
    """A chunk's rows, of which a line may give several; cells with a null value are null."""
    columns = [values.without_nulls(column, config.null_values) for column in chunk.columns]
    return reshape.rows(replace(chunk, columns=columns), config, matrix)


def _read_range(part: Range, config: FileConfig) -> Iterator[Chunk]:
    if part.table is not None:
        yield from delta_table.chunks(part.table, part.file, part.start, part.line_ends_before)
    elif part.layout is None:
        yield from parquet.parquet_chunks(part.file, part.start, part.line_ends_before + 1, part.names)
    elif config.format == "json_array":
        yield from objects.array_chunks(part.file, config, part.names)
    else:
        rows = _lines(part, config, part.layout.first_row)
        for chunk in multiline.joined(rows, config) if config.multiline else rows:
            if len(chunk.line) == 0:
                continue
            if config.format == "delimited":
                yield delimited.split(chunk, config, part.layout)
            else:
                yield objects.object_columns(chunk, part.names, config.format)


def _lines(part: Range, config: FileConfig, first_row: int) -> Iterator[Chunk]:
    for block in files.read_blocks(part.file, part.start, part.end, part.line_ends_before):
        yield delimited.lines(block, config.encoding, first_row=first_row, keep_empty=config.multiline)


def _first_rows(head: bytes, config: FileConfig) -> Chunk:
    """Rows of a file's first bytes, less the last one, which may be cut."""
    block = files.Block(head[: head.rfind(b"\n") + 1] or head, 1)
    rows = delimited.lines(block, config.encoding, first_row=config.skip_rows + 1, keep_empty=config.multiline)
    return next(multiline.joined(iter([rows]), config)) if config.multiline else rows


def _fixed(file: RawFile, wanted: Sequence[str | int]) -> tuple[dict[int, str | None], list[str | int]]:
    """Place -> value of the wanted columns that a folder `key=value` of the file's path gives; the other columns."""
    keys = {}
    for folder in file.name.split("/")[:-1]:
        key, is_pair, value = folder.partition("=")
        if is_pair:
            keys[unquote(key)] = None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value)
    fixed = {place: keys[column] for place, column in enumerate(wanted) if isinstance(column, str) and column in keys}
    return fixed, [column for place, column in enumerate(wanted) if place not in fixed]


def _ends_before(head: bytes, first_row: int) -> bool:
    """Whether a file that fits in its head has nothing from line `first_row` on."""
    if len(head) > files.MAX_ROW_BYTES:
        return False
    return not b"".join(head.split(b"\n")[first_row - 1 :]).strip(b"\r")


def _number_lines(spark: SparkSession, plan: list[Range]) -> list[Range]:
    """Fill `line_ends_before` of text ranges: one pass over files of more than one range."""
    many = [part for part in plan if part.layout is not None and not _alone(part)]
    if not many:
        return plan

    def count(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            indices = batch.column(0).to_pylist()
            counts = [files.count_line_ends(many[i].file, many[i].start, many[i].end) for i in indices]
            yield pa.record_batch({"part": pa.array(indices, pa.int64()), "count": pa.array(counts, pa.int64())})

    counted = spark.range(0, len(many), 1, len(many)).mapInArrow(count, "part bigint, count bigint").toArrow()
    counts = dict(zip(counted.column("part").to_pylist(), counted.column("count").to_pylist(), strict=True))
    numbered: list[Range] = []
    before, file = 0, None
    rest = iter(range(len(many)))
    for part in plan:
        if part.layout is None or _alone(part):
            numbered.append(part)
            continue
        before = before if part.file == file else 0
        file = part.file
        numbered.append(replace(part, line_ends_before=before))
        before += counts[next(rest)]
    return numbered


def _alone(part: Range) -> bool:
    return part.start == 0 and part.end >= max(part.file.size, 1)
