"""Whatever the session reads as a table, as a source: Iceberg, Hive and other catalogues, JDBC, Kafka's landing tables.

The engine reads it, so nothing is known of its files or versions: its content is hashed by a scan, and a table that
has changed is compared with the lake as a whole.
"""

import hashlib
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
from py4j.protocol import Py4JError  # type: ignore[import-untyped]
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from etl.file_config import FileConfig
from etl.redaction import one_line
from etl.settings import GraftrecError
from etl.sources.delimited import Chunk
from etl.sources.files import RawFile

_ROWS = 24  # bits of a row's number within its partition; the partition's stand above them
_MODULI = (2**31, 2**31 - 1)  # of two sums of hashes


class SparkTable:
    """`spark.table(path)`, or, with `reader`, `spark.read.format(reader).options(…).load(path)`; `wanted`: columns.

    Raises GraftrecError where the session knows no such table, or it lacks a column.
    """

    def __init__(self, spark: SparkSession, config: FileConfig, wanted: Sequence[str | int], *, setting: str) -> None:
        self.id = f"{config.reader or 'table'}:{config.path}"
        self.root = config.path or str(config.reader)
        try:
            if config.reader is None:
                whole = spark.table(config.path)
            else:
                options = {key: str(value) for key, value in config.options.items()}
                whole = spark.read.format(config.reader).options(**options).load(config.path or None)
            names = whole.columns
            given = [names[name] if isinstance(name, int) and name < len(names) else str(name) for name in wanted]
            self._frame = whole.select(*(F.col(name).alias(f"c{place}") for place, name in enumerate(given)))
            assert self._frame.columns  # analysed here
        except (PySparkException, Py4JError) as error:
            reason = one_line(error)
            raise GraftrecError(
                f"{setting}: expected a table {self.root} with the columns {', '.join(map(str, wanted))}, found: "
                f"{reason}; mend path, reader, options or columns, or give the session its catalogue by spark.settings"
            ) from None
        self.version = self._digest()
        self.key = f"{self.id}/{self.version}"

    def files(self) -> list[RawFile]:
        return [RawFile(self.root, self.root, 0, 0, None)]

    def added_since(self, version: int) -> list[RawFile] | None:
        """None where the content is another: then all of it is compared."""
        return [] if version == self.version else None

    def rows(self) -> DataFrame:
        """The wanted columns, c0, c1…, and behind them `_row`, a number of the row's own."""
        return self._frame.withColumn("_row", F.monotonically_increasing_id())

    def _digest(self) -> int:
        """A number that is the same where the rows are, whatever their order."""
        hashed = F.xxhash64(F.to_json(F.struct(*self._frame.columns)))
        sums = [F.sum(F.pmod(hashed, F.lit(number))).alias(f"s{number}") for number in _MODULI]
        found = self._frame.agg(F.count(F.lit(1)).alias("rows"), *sums).first()
        return int.from_bytes(hashlib.blake2b(repr(tuple(found or ())).encode(), digest_size=8).digest()) >> 2


def chunks(batches: Iterator[pa.RecordBatch]) -> Iterator[Chunk]:
    """One task's rows of `SparkTable.rows`."""
    for batch in batches:
        if not batch.num_rows:
            continue
        row = batch.column(batch.num_columns - 1)
        place = pc.bit_wise_and(row, (1 << 33) - 1)
        if pc.max(place).as_py() >= 1 << _ROWS:
            raise GraftrecError(
                f"expected at most {1 << _ROWS:,} rows a partition of the table, found more; repartition it"
            )
        line = pc.add(pc.bit_wise_or(pc.shift_left(pc.shift_right(row, 33), _ROWS), place), 1)
        nothing = pa.nulls(batch.num_rows, pa.string())
        yield Chunk(line, batch.columns[:-1], nothing, nothing)
