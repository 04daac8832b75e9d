"""A source's rows without an engine: `spark.range(…).mapInArrow(…)` in this process, which is all that files need."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from etl.config import CleaningConfig, LogSource
from etl.sources.log import FileLog
from etl.sources.rows import RANGE_BYTES

Batches = Iterator[pa.RecordBatch]


class LocalFrame:
    """The rows of a range, perhaps after mapInArrow."""

    def __init__(self, batches: Callable[[], Batches]) -> None:
        self._batches = batches

    def mapInArrow(self, function: Callable[[Batches], Batches], schema: str) -> "LocalFrame":
        return LocalFrame(lambda: function(self._batches()))

    def toArrow(self) -> pa.Table:
        batches = list(self._batches())
        return pa.Table.from_batches(batches) if batches else pa.table({})


class LocalSpark:
    """As much of a session as reading files asks for."""

    def range(self, start: int, end: int, step: int, parts: int) -> LocalFrame:
        return LocalFrame(lambda: iter([pa.record_batch({"id": pa.array(range(start, end, step), pa.int64())})]))


def local_rows(root: Path | str, kind: str = "events", *, range_bytes: int = RANGE_BYTES, **settings: Any) -> list[Any]:
    """The rows, good and rejected, of the events (or items, users, directed edges) that `settings` describe, in
    order."""
    found: dict[str, Any] = {"events": {"path": ".", "columns": {"user": 0, "item": 1}}, kind: settings}
    config = LogSource.model_validate({"root": str(root)} | found)
    frame = getattr(FileLog(config, CleaningConfig(), range_bytes=range_bytes), kind)(LocalSpark())
    return sorted(frame.toArrow().to_pylist(), key=lambda row: row.get("source_order", (row["file"], row["line"])))
