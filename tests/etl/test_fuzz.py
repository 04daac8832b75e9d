"""Bytes of every format, spoilt at random: rows read = good + rejected rows, or one line that names the file."""

import bz2
import gzip
import io
import json
import math
import random
import zipfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etl.settings import GraftrecError
from tests.etl.local_rows import local_rows

_SCRAPS = [b"\n", b"\r\n", b"\r", b",", b'"', b"\\", b"{", b"}", b"[", b"]", b":", b"'", b"\0", b"\xff", b""]
_SCRAPS += [b"NaN", b"1e999", b"-1", b"null", b"\xed\xa0\xbd", b"\\ud83d", b"9" * 30, b"PAR1", b"user"]
_SCRAPS += [b"\xef\xbb\xbf", b"\xe2\x80\xa8"]
_COLUMNS = {"user": "user", "item": "item", "time": "time", "value": "value"}
_EXPLODE = [{"columns": {"item": "items", "time": "times"}, "separator": " "}]
_SEQUENCES = {"columns": {"user": "user"}, "explode": _EXPLODE}


def _rows(draw: random.Random, number: int) -> list[dict[str, Any]]:
    users = ["a", "é b", 'q"x"', 7, 7.0, None, 2**60 + 1]
    return [
        {"user": draw.choice(users), "item": f"i{n}", "time": 10**9 + n, "value": draw.choice([1.5, None, 3])}
        for n in range(number)
    ]


def _csv(rows: list[dict[str, Any]]) -> bytes:
    cells = [[str("" if cell is None else cell).replace('"', '""') for cell in row.values()] for row in rows]
    lines = ["user,item,time,value", *(f'"{row[0]}",' + ",".join(row[1:]) for row in cells)]
    return "\n".join(lines).encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    table = pa.Table.from_pylist([row | {"user": None if row["user"] is None else str(row["user"])} for row in rows])
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=7, compression=random.Random(len(rows)).choice(["none", "snappy"]))
    return sink.getvalue()


def _zip(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("log.csv", _csv(rows))
    return sink.getvalue()


def _lists(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"user": row["user"], "items": [row["item"], "x"], "times": [row["time"], 5]} for row in rows]


def _sequences(rows: list[dict[str, Any]]) -> bytes:
    lines = [f"{row['user']},{' '.join(row['items'])},{' '.join(map(str, row['times']))}" for row in _lists(rows)]
    return "\n".join(["user,items,times", *lines]).encode()


Content = Callable[[list[dict[str, Any]]], bytes]
_FORMATS: dict[str, tuple[str, dict[str, Any], Content]] = {
    "csv": ("log", {}, _csv),
    "csv by position": ("log", {"header": False, "columns": {"user": 0, "item": 1, "time": 2}}, _csv),
    "csv of latin-1": ("log", {"encoding": "latin-1", "escape": "\\", "decimal": ","}, _csv),
    "multiline": ("log", {"multiline": True, "escape": "\\"}, _csv),
    "matrix": ("log", {"columns": {"user": "user"}, "matrix_from": 2}, _csv),
    "sequences": ("log", _SEQUENCES, _sequences),
    "a user a line": (
        "log",
        {"columns": {"user": 0}, "fields": 2, "quote": None, "header": False, "explode": [{"columns": {"item": 1}}]},
        _csv,
    ),
    "json": ("log", {"format": "json"}, lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    "json of lists": (
        "log",
        {"format": "json", **_SEQUENCES},
        lambda rows: "\n".join(map(json.dumps, _lists(rows))).encode(),
    ),
    "json_array": ("log", {"format": "json_array"}, lambda rows: json.dumps(rows, indent=1).encode()),
    "python": ("log", {"format": "python"}, lambda rows: "\n".join(map(repr, rows)).encode()),
    "parquet": ("log", {"format": "parquet"}, _parquet),
    "gz": ("log.gz", {}, lambda rows: gzip.compress(_csv(rows), mtime=0)),
    "bz2": ("log.bz2", {}, lambda rows: bz2.compress(_csv(rows))),
    "zst": ("log.zst", {}, lambda rows: pa.compress(_csv(rows), "zstd", asbytes=True)),
    "zip": ("log.zip", {}, _zip),
}


def _spoilt(content: bytes, draw: random.Random) -> bytes:
    """A few bytes replaced, taken out or put in, a piece doubled or the end cut off."""
    spoilt = bytearray(content)
    for _ in range(draw.choice([0, 1, 1, 2, 8])):
        place, length = draw.randrange(len(spoilt) + 1), draw.choice([0, 1, 1, 2, 20])
        spoilt[place : place + length] = draw.choice([*_SCRAPS, draw.randbytes(3), bytes(spoilt[place : place + 40])])
    return bytes(spoilt if draw.random() < 0.8 else spoilt[: draw.randrange(len(spoilt) + 1)])


def _read(folder: Path, form: str, seed: int) -> None:
    name, settings, content = _FORMATS[form]
    draw = random.Random(f"{form} {seed}")
    written = _spoilt(content(_rows(draw, draw.choice([1, 30]))), draw)
    (folder / name).write_bytes(written)
    settings = {"columns": _COLUMNS, **settings}
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


@pytest.mark.parametrize("form", _FORMATS)
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
@pytest.mark.parametrize("form", _FORMATS)
def test_no_more_bytes_end_in_a_traceback(tmp_path: Path, form: str) -> None:
    for seed in range(1_000, 1_150):
        _read(tmp_path, form, seed)
