"""Raw ids that somebody chose: items in stock, users to be served. From a Delta table, Parquet, CSV, or lines of text.

The rule for ids is that of logs (`etl.identifiers`). Of a table with a column `in_stock`, only the rows where it is
true, or a number above 0, count.
"""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from etl.identifiers import identifier
from etl.plain_path import absolute
from etl.redaction import one_line, redact
from etl.settings import GraftrecError

IN_STOCK = "in_stock"
TRUE = ("true", "t", "yes", "y")  # of text


class ChosenIdsError(GraftrecError):
    """A table of ids that can't be read."""


def read_ids(place: str, column: str, *, flag: str | None = None) -> pa.Array:
    """The different ids in a column, as text. `place`: *.parquet, *.csv, *.txt (an id a line), else a Delta table.
    `flag`: a column of which only true, or positive, rows count, if the table has it. Raises ChosenIdsError."""
    rows = read_columns(place, [column], [] if flag is None else [flag])
    if flag is not None and flag in rows.column_names:
        rows = rows.filter(_is_true(_flat(rows[flag]), place, flag))
    ids, refused = identifier(_flat(rows[column]))
    for failed, why in refused:
        if pc.any(failed).as_py():
            found = rows[column].filter(failed)[0].as_py()
            raise ChosenIdsError(f"{redact(place)}: expected ids in {column}, found {str(found)[:80]!r}, which {why}")
    return pc.unique(ids.drop_null())


def read_columns(place: str, columns: Sequence[str], optional: Sequence[str] = ()) -> pa.Table:
    """Columns of a table of rows. Raises ChosenIdsError."""
    try:
        table = _read(place, columns, optional)
    except (OSError, pa.ArrowException, DeltaError, ValueError) as error:
        raise ChosenIdsError(
            f"{redact(place)}: expected a table with {', '.join(columns)} (*.parquet, *.csv, *.txt, or Delta), found: "
            f"{one_line(error, 200)}; mend the setting"
        ) from None
    if lacking := [column for column in columns if column not in table.column_names]:
        raise ChosenIdsError(
            f"{redact(place)}: expected a column {lacking[0]}, found {', '.join(table.column_names)}; rename it"
        )
    return table


def _read(place: str, columns: Sequence[str], optional: Sequence[str]) -> pa.Table:
    kind = Path(place).suffix
    if kind == ".txt":
        lines = Path(place).read_text(encoding="utf-8").splitlines()
        return pa.table({columns[0]: pa.array([line for line in lines if line.strip()], pa.string())})
    if kind == ".csv":
        texts = pacsv.ConvertOptions(column_types={name: pa.string() for name in (*columns, *optional)})
        return pacsv.read_csv(place, convert_options=texts)
    if kind == ".parquet":
        return pq.read_table(place)
    table = DeltaTable(place if "://" in place else absolute(place))
    there = [field.name for field in table.schema().fields]
    return table.to_pyarrow_table(columns=[name for name in (*columns, *optional) if name in there])


def _flat(column: pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks()
    return pa.concat_arrays(whole.chunks) if isinstance(whole, pa.ChunkedArray) else whole


def _is_true(cells: pa.Array, place: str, flag: str) -> pa.Array:
    if pa.types.is_boolean(cells.type):
        return pc.fill_null(cells, False)
    if pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type):
        words = pc.utf8_lower(pc.utf8_trim_whitespace(cells))
        is_number = pc.fill_null(pc.match_substring_regex(words, r"^[+-]?\d+(\.\d+)?$"), False)
        numbers = pc.cast(pc.if_else(is_number, words, "0"), pa.float64())
        return pc.or_(pc.is_in(words, value_set=pa.array(TRUE, words.type)), pc.greater(numbers, 0))
    if pa.types.is_integer(cells.type) or pa.types.is_floating(cells.type) or pa.types.is_decimal(cells.type):
        return pc.fill_null(pc.greater(cells, 0), False)
    raise ChosenIdsError(f"{redact(place)}: expected {flag} to be true or false, or a number, found {cells.type}")
