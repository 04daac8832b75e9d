"""Bytes of every format, spoilt at random: rows read = good + rejected rows, or one line that names the file."""

import math
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etl.settings import GraftrecError
from tests.fixtures.local_rows import local_rows
from tests.fixtures.spoilt_logs import COLUMNS, FORMATS, rows_of, spoilt_bytes


def _read(folder: Path, form: str, seed: int) -> None:
    name, settings, content = FORMATS[form]
    draw = random.Random(f"{form} {seed}")
    written = spoilt_bytes(content(rows_of(draw, draw.choice([1, 30]))), draw)
    (folder / name).write_bytes(written)
    settings = {"columns": COLUMNS, **settings}
    try:
        rows, refusal = local_rows(folder, path=name, range_bytes=draw.choice([50, 1 << 20]), **settings), ""
    except GraftrecError as error:
        rows, refusal = [], str(error)
    except Exception as error:
        raise AssertionError(f"{form} {seed}: {written!r}") from error
    if refusal:
        assert "\n" not in refusal, (form, seed)
        assert name in refusal, (form, seed)
        return
    for row in rows:  # good or rejected
        assert (row["reason"] is None) == (row["raw"] is None), (form, seed)
        if row["reason"] is None:
            assert None not in (row["user"], row["item"], row["time"]), (form, seed)
            assert row["user"] == row["user"].strip() != "", (form, seed)
    if form in ("csv", "csv of latin-1", "json", "python"):
        _each_line_once(written, rows, (form, seed))


def _each_line_once(written: bytes, rows: list[Any], case: tuple[str, int]) -> None:
    """Each line that holds something is one row, good or rejected; a header may be none."""
    texts = [line.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r") for line in written.split(b"\n")]
    lines = [number for number, text in enumerate(texts, 1) if text]
    found = [row["line"] for row in rows]
    assert found == (lines[1:] if case[0].startswith("csv") else lines), case


@pytest.mark.parametrize("form", FORMATS)
def test_no_bytes_end_in_a_traceback(tmp_path: Path, form: str) -> None:
    for seed in range(25):
        _read(tmp_path, form, seed)


_TYPED: dict[str, pa.Array] = {
    "large text": pa.array(["a", None, "5"], pa.large_string()),
    "binary": pa.array([b"a", None, b"\xff"]),
    "bool": pa.array([True, None, False]),
    "null": pa.nulls(3),
    "uint64": pa.array([2**64 - 1, None, 1], pa.uint64()),
    "float16": pa.array([1.5, None, math.inf], pa.float32()).cast(pa.float16()),
    "float64": pa.array([1.5, None, 1e300]),
    "decimal": pa.array([Decimal("1.50"), None, Decimal("2.00")]),
    "timestamp": pa.array([1, None, 2], pa.timestamp("ns")),
    "date": pa.array([1, None, 2], pa.date32()),
    "time": pa.array([1, None, 2], pa.time64("us")),
    "duration": pa.array([1, None, 2], pa.duration("us")),
    "dictionary": pa.array([1, None, 2]).dictionary_encode(),
    "list": pa.array([[1], None, [2, 3]]),
    "list of lists": pa.array([[["a"]], None, [["b"], []]]),
    "fixed list": pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int8(), 2)),
    "struct": pa.array([{"a": 1}, None, {"a": 2}]),
    "list of structs": pa.array([[{"a": 1}], None, []]),
    "map": pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int64())),
}


@pytest.mark.parametrize("kind", _TYPED)
def test_no_type_of_a_column_ends_in_a_traceback(tmp_path: Path, kind: str) -> None:
    column, text = _TYPED[kind], pa.array(["x", "y", "z"])
    pq.write_table(pa.table({"key": text, "odd": column, "number": [5, 6, 7]}), tmp_path / "log")
    for role in ("user", "item", "time", "event_type", "value", "basket"):
        columns = {"user": "key", "item": "key", role: "odd"}
        for unit in ("s", "ordinal", None) if role == "time" else ("s",):
            _read_typed(tmp_path, "events", columns=columns, time_unit=unit)
    for more in ({"explode": [{"columns": {"item": "odd"}}]}, {"matrix_from": 1}):
        _read_typed(tmp_path, "events", columns={"user": "key"}, **more)
    _read_typed(tmp_path, "events", columns={"user": "key", "item": "odd.a"})
    _read_typed(tmp_path, "edges", user="key", friend="number", weight="odd", directed=True)
    for name in ("title", "year", "categories"):
        _read_typed(tmp_path, "items", id="key", **{name: "odd"})
    _read_typed(tmp_path, "users", id="key", attributes={"odd": "odd"})


def _read_typed(folder: Path, kind: str, **settings: Any) -> None:
    try:
        rows = local_rows(folder, kind, path="log", format="parquet", **settings)
    except GraftrecError as error:
        refusal = str(error)
        assert refusal.startswith("log: "), (settings, refusal)
    else:
        if "explode" not in settings and "matrix_from" not in settings:
            assert [row["line"] for row in rows] == [1, 2, 3], settings


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_no_more_bytes_end_in_a_traceback(tmp_path: Path, form: str) -> None:
    for seed in range(1_000, 1_150):
        _read(tmp_path, form, seed)
