"""Logs whose lines are no events: several values a cell, an item a column, objects in arrays, packed files; filters."""

import bz2
import gzip
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from etl.settings import GraftrecError
from etl.sources import files, reshape
from tests.fixtures.local_rows import local_rows

COLUMNS = {"user": "user", "item": "item", "time": "time"}
IMPRESSIONS = {
    "separator": "\t",
    "header": False,
    "quote": None,
    "columns": {"user": 0, "time": 1},
    "time_format": "%m/%d/%Y %I:%M:%S %p",
    "explode": [
        {"columns": {"item": 2}, "separator": " ", "event_type": "history", "time": "2019-11-01"},
        {"columns": {"item": 3}, "separator": " ", "suffixes": {"-0": "shown", "-1": "clicked"}},
    ],
}


def events(folder: Path, content: str | bytes, **settings: Any) -> list[Any]:
    (folder / "log").write_bytes(content.encode() if isinstance(content, str) else content)
    return local_rows(folder, path="log", **{"columns": COLUMNS, **settings})


def told(rows: list[Any], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in names) for row in rows if row["reason"] is None]


def reasons(rows: list[Any]) -> list[tuple[int, str]]:
    return [(row["line"], row["reason"]) for row in rows if row["reason"] is not None]


def test_explode_gives_histories_and_impressions_types_of_their_own(tmp_path: Path) -> None:
    lines = [
        "U1\t11/9/2019 1:00:00 PM\tN7 N8  N7\tN1-0 N2-1",
        "U2\t11/9/2019 2:00:00 AM\t\tN1-1 N9",
        "\t11/9/2019 3:00:00 AM\tN7\t",
        "U3\t11/9/2019",
    ]
    rows = events(tmp_path, "\n".join(lines), **IMPRESSIONS)
    first, afternoon, night = 1572566400_000000, 1573304400_000000, 1573264800_000000
    assert told(rows, "user", "item", "time", "event_type", "line") == [
        ("U1", "N7", first, "history", 1),
        ("U1", "N8", first, "history", 1),
        ("U1", "N7", first, "history", 1),
        ("U1", "N1", afternoon, "shown", 1),
        ("U1", "N2", afternoon, "clicked", 1),
        ("U2", "N1", night, "clicked", 2),
    ]
    assert reasons(rows) == [
        (2, "item ends with none of -0, -1"),
        (3, "user is missing"),
        (4, "expected 4 fields, found 2"),
    ]
    orders = [row["source_order"] for row in rows]
    assert orders == sorted(set(orders))


def test_explode_side_by_side_lists_of_parquet_json_and_text(tmp_path: Path) -> None:
    sessions = [
        {"user": 1, "items": [5, 6, None], "at": [10, 20, 30]},
        {"user": 2, "items": [], "at": []},
        {"user": 3, "items": [5, 6], "at": [10]},
        {"user": 4, "items": None, "at": None},
    ]
    settings: dict[str, Any] = {
        "columns": {"user": "user"},
        "explode": [{"columns": {"item": "items", "time": "at"}, "separator": ";"}],
    }
    expected = [("1", "5", 10_000_000), ("1", "6", 20_000_000)]
    rejected = [(1, "item is missing"), (3, "expected as many values in each of items, at")]
    pq.write_table(pa.Table.from_pylist(sessions), tmp_path / "log")
    found = {"parquet": local_rows(tmp_path, path="log", format="parquet", **settings)}
    found["json"] = events(tmp_path, "\n".join(map(json.dumps, sessions)), format="json", **settings)
    found["python"] = events(tmp_path, "\n".join(map(str, sessions)), format="python", **settings)
    text = "user,items,at\n1,5;6;,10;20;30\n2,,\n3,5;6,10\n4,,\n"
    found["delimited"] = events(tmp_path, text, **settings)
    for form, rows in found.items():
        assert told(rows, "user", "item", "time") == expected, form
        lines = [(line - 1 if form == "delimited" else line, reason) for line, reason in reasons(rows)]
        assert sorted(lines) == rejected, form


def test_explode_objects_in_lists(tmp_path: Path) -> None:
    sessions = [
        {
            "user": "a",
            "did": [{"item": 5, "at": {"s": 10}, "kind": "view"}, {"item": 6, "at": {"s": 11}, "kind": "buy"}],
        },
        {"user": "b", "did": [{"item": 7, "at": {"s": 12}, "kind": "buy"}]},
    ]
    columns = {"item": "did.item", "time": "did.at.s", "event_type": "did.kind"}
    settings: dict[str, Any] = {"columns": {"user": "user"}, "explode": [{"columns": columns}]}
    expected = [("a", "5", 10_000_000, "view"), ("a", "6", 11_000_000, "buy"), ("b", "7", 12_000_000, "buy")]
    rows = events(tmp_path, "\n".join(map(json.dumps, sessions)), format="json", **settings)
    assert told(rows, "user", "item", "time", "event_type") == expected
    pq.write_table(pa.Table.from_pylist(sessions), tmp_path / "log")
    rows = local_rows(tmp_path, path="log", format="parquet", **settings)
    assert told(rows, "user", "item", "time", "event_type") == expected


def test_explode_friends_in_a_cell(tmp_path: Path) -> None:
    people = [{"id": "a", "friends": "b, c"}, {"id": "b", "friends": "None"}, {"id": "c", "friends": "a,,c"}]
    (tmp_path / "log").write_text("\n".join(map(json.dumps, people)))
    explode = [{"columns": {"friend": "friends"}}]
    rows = local_rows(tmp_path, "edges", path="log", format="json", user="id", directed=True, explode=explode)
    assert sorted(told(rows, "user", "friend", "weight")) == [("a", "b", 1.0), ("a", "c", 1.0), ("c", "a", 1.0)]
    assert reasons(rows) == []  # a user among the user's own friends is left out


@pytest.mark.parametrize("lengths", [[3, 3, 3], [1, 4, 2]])
def test_a_user_a_line(tmp_path: Path, lengths: list[int]) -> None:
    lines = [" ".join(map(str, [user, *range(10, 10 + length)])) for user, length in enumerate(lengths)]
    settings = {"separator": " ", "header": False, "quote": None, "fields": 2, "columns": {"user": 0}}
    rows = events(tmp_path, "\n".join([*lines, "9"]), explode=[{"columns": {"item": 1}, "separator": " "}], **settings)
    expected = [(str(user), str(item)) for user, length in enumerate(lengths) for item in range(10, 10 + length)]
    assert told(rows, "user", "item") == expected
    assert reasons(rows) == [(4, "expected 2 fields, found 1")]
    times = [row["time"] for row in rows if row["reason"] is None]
    assert times == sorted(set(times))


def test_a_line_of_too_many_values_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reshape, "MAX_PLACES", 3)
    settings: dict[str, Any] = {
        "columns": {"user": "user"},
        "explode": [{"columns": {"item": "items"}, "separator": " "}],
    }
    rows = events(tmp_path, "user,items\na,1 2 3\nb,1 2 3 4\n", **settings)
    assert told(rows, "user", "item") == [("a", "1"), ("a", "2"), ("a", "3")]
    assert reasons(rows) == [(3, "more than 65,536 values in a line")]


def test_a_matrix_names_items_by_its_header_or_by_position(tmp_path: Path) -> None:
    text = "user,age,x,y,z\na,30,1,,2.5\nb,31,,,\nc,32,1\nd,33,,5,five\n"
    settings: dict[str, Any] = {"columns": {"user": "user"}, "matrix_from": 2}
    rows = events(tmp_path, text, **settings)
    assert told(rows, "user", "item", "value") == [("a", "x", 1.0), ("a", "z", 2.5), ("d", "y", 5.0)]
    assert reasons(rows) == [(4, "expected 5 fields, found 3"), (5, "value is not a number")]
    bare = events(tmp_path, "3,99,4\n99,1,99\n", columns={"user": 0}, header=False, matrix_from=1, null_values=["99"])
    assert told(bare, "user", "item", "value") == [("3", "2", 4.0)]
    assert [reason for _, reason in reasons(bare)] == ["user is missing"]
    pq.write_table(
        pa.table({"x": [1.5, None], "user": ["a", "b"], "y": pa.array([None, 2], pa.int8())}), tmp_path / "log"
    )
    typed = local_rows(tmp_path, path="log", format="parquet", columns={"user": "user"}, matrix_from=0)
    assert told(typed, "user", "item", "value") == [("a", "x", 1.5), ("b", "y", 2.0)]


def test_typed_headers_are_names(tmp_path: Path) -> None:
    text = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n7\t9\t4.5\t100\n"
    columns = {"user": "user_id", "item": "item_id", "value": "rating", "time": "timestamp:float"}
    assert told(events(tmp_path, text, separator="\t", columns=columns), "user", "item", "value", "time") == [
        ("7", "9", 4.5, 100_000_000)
    ]


@pytest.mark.parametrize("layout", [{}, {"indent": 1}, {"separators": (",", ":")}])
@pytest.mark.parametrize("size", [7, 1 << 20])
def test_a_json_array_is_read_element_by_element(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: dict[str, Any], size: int
) -> None:
    monkeypatch.setattr("etl.sources.objects.READ_BYTES", size)
    found = [{"user": "é, ]\n[", "item": n, "time": n} for n in range(30)] + [5, {"item": 1, "time": 1}]
    rows = events(tmp_path, json.dumps(found, ensure_ascii=False, **layout), format="json_array")
    assert told(rows, "user", "item", "line") == [("é, ]\n[", str(n), n + 1) for n in range(30)]
    assert reasons(rows) == [(31, "not a JSON object"), (32, "user is missing")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"user": 1}', "expected a JSON array, found"),
        ('[{"user": 1, "item": 2, "time": 3}, {"user": ', "none behind element 1"),
        ('[{"user": 1, "item": 2, "time": 3} {"user": 4}]', "none behind element 0"),
        ('[{"user": 1, "item": 2, "time": 3}] [1]', "found '[1]' behind it"),
        ("[" * 100_000, "none behind element 0"),
        ("[]", "expected a JSON object on each line, found ''"),
    ],
)
def test_a_damaged_json_array_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(GraftrecError) as error:
        events(tmp_path, text, format="json_array")
    assert str(error.value).startswith("log: ")
    assert said in str(error.value)


def test_python_literals_are_read_but_never_run(tmp_path: Path) -> None:
    lines = [
        "{u'user': u'it\\'s', 'item': 5, 'time': 7.0, 'more': (1, None, True, b'x')}",
        "{'user': __import__('os').getpid(), 'item': 5, 'time': 7}",
        "{'user': 'a\\d', 'item': 2.0, 'time': 7}",
        "{'user': 'a', 'item': 5, 'time': 7",
        "(" * 5000,
        "{[]: 1}",
        "{'user': {'id': 1}, 'item': 5, 'time': 7}",
    ]
    rows = events(tmp_path, "\n".join(lines), format="python")
    assert told(rows, "user", "item", "time") == [("it's", "5", 7_000_000), ("a\\d", "2", 7_000_000)]
    refused = "user is an object; name a column of single values"
    assert reasons(rows) == [(2, "not a Python dict"), *((n, "not a Python dict") for n in (4, 5, 6)), (7, refused)]


def _zipped(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".zst", lambda part: pa.compress(part, "zstd", asbytes=True)),
    ],
)
def test_packed_files_of_several_members_are_read_whole(
    tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    parts = [b"user,item,time\na,x,1\n", b"b,y,2\nc,", b"z,3\n"]
    (tmp_path / f"log{suffix}").write_bytes(b"".join(map(pack, parts)))
    assert told(local_rows(tmp_path, path=f"log{suffix}", columns=COLUMNS), "user", "item", "line") == [
        ("a", "x", 2),
        ("b", "y", 3),
        ("c", "z", 4),
    ]


def test_zip_archives_give_one_file(tmp_path: Path) -> None:
    log = b"user,item,time\na,x,1\n"
    _zipped(tmp_path / "one.zip", {"__MACOSX/._log.csv": b"?", "log.csv": log})
    assert told(local_rows(tmp_path, path="one.zip", columns=COLUMNS), "user", "file") == [("a", "one.zip")]
    _zipped(tmp_path / "two.zip", {"d/log.csv": log, "d/items.csv": b"item\nx\n"})
    for member in ("d/log.csv", "*/log*"):
        rows = local_rows(tmp_path, path="two.zip", columns=COLUMNS, member=member)
        assert told(rows, "user", "item") == [("a", "x")]
    with pytest.raises(GraftrecError, match=r"^two.zip: expected one file inside, found 2 \(d/log.csv, d/items.csv\)"):
        local_rows(tmp_path, path="two.zip", columns=COLUMNS)
    with pytest.raises(GraftrecError, match=r"^two.zip: expected one file 'log.csv' inside, found 0"):
        local_rows(tmp_path, path="two.zip", columns=COLUMNS, member="log.csv")
    whole = (tmp_path / "two.zip").read_bytes()
    for damaged in (whole[:-30], whole[:40] + b"\0" * 9 + whole[49:]):
        (tmp_path / "two.zip").write_bytes(damaged)
        with pytest.raises(GraftrecError, match=r"^two.zip: expected a whole zip file, found"):
            local_rows(tmp_path, path="two.zip", columns=COLUMNS, member="d/log.csv")


def test_keys_of_folders_are_columns(tmp_path: Path) -> None:
    for day, kind in (("2020-01-01", "view"), ("2020-01-02", "a%2Fb"), ("2020-01-03", "__HIVE_DEFAULT_PARTITION__")):
        folder = tmp_path / f"dt={day}" / f"kind={kind}"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"user": ["a"], "item": [5]}), folder / "part.parquet")
        (folder / "part.csv").write_text("user,item\na,5\n")
        (folder / "part.json").write_text('{"user": "a", "item": 5}\n')
    columns = {"user": "user", "item": "item", "time": "dt", "event_type": "kind"}
    for form, suffix in (("parquet", "parquet"), ("delimited", "csv"), ("json", "json")):
        rows = local_rows(tmp_path, path=f"**/*.{suffix}", format=form, columns=columns, time_unit=None)
        days = [(1577836800 + 86400 * day) * 1_000_000 for day in range(3)]
        assert told(rows, "user", "item", "event_type", "time") == [
            ("a", "5", kind, day) for kind, day in zip(("view", "a/b", None), days, strict=True)
        ], form


def test_line_ends_inside_quotes(tmp_path: Path) -> None:
    text = 'user,"it\nem",time\na,"x ""1""\n\n y",1\nb,y,2\n\n"c\nc",z,3\r\nd,5" disk,4\ne,w,5\n'
    settings = {"multiline": True, "columns": {"user": "user", "item": 1, "time": "time"}}
    rows = events(tmp_path, text, **settings)
    assert told(rows, "user", "item", "line") == [
        ("a", 'x "1"\n\n y', 3),
        ("b", "y", 6),
        ("c\nc", "z", 8),
        ("e", "w", 11),
    ]
    assert reasons(rows) == [(10, "a quote that nothing closes")]
    escaped = events(tmp_path, 'user,item,time\n"a","x\\"\ny\\\\",1\n"b",z,2\n', multiline=True, escape="\\")
    assert told(escaped, "user", "item") == [("a", 'x"\ny\\'), ("b", "z")]


@pytest.mark.parametrize("seed", range(20))
def test_line_ends_inside_quotes_whatever_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    draw = random.Random(seed)
    monkeypatch.setattr(files, "_CHUNK_BYTES", draw.choice([1, 9, 100]))
    written = [["".join(draw.choices('a\n",b', k=draw.randrange(1, 9))) for _ in range(2)] for _ in range(40)]
    fields = [[f"u{user}", f"i{item}"] for user, item in written]
    text = "\n".join(",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in fields)
    rows = events(tmp_path, text, multiline=True, header=False, columns={"user": 0, "item": 1})
    assert told(rows, "user", "item") == [tuple(cell.strip() for cell in row) for row in fields]


def test_files_put_one_behind_the_other(tmp_path: Path) -> None:
    part = b"\xef\xbb\xbfuser,item,time\n%s,x,1\n"
    rows = events(tmp_path, part % b"a" + part % b"b" + b"\xef\xbb\xbfc,x,1\n")
    assert told(rows, "user", "line") == [("a", 2), ("b", 4), ("c", 5)]
    assert reasons(rows) == [(3, "the header again")]


def test_filters_leave_rows_out_without_rejecting_them(tmp_path: Path) -> None:
    lines = ["a,1,view,", "a,2,buy,3", "b,3,buy,nothing", "b,,buy,1", "c,,view,1", "c,5,,1", ",6,view,1", "d,7,buy,9"]
    text = "\n".join(["user,time,type,value", *lines])
    columns = {"user": "user", "item": "user", "time": "time", "event_type": "type", "value": "value"}
    everything = events(tmp_path, text, columns=columns)
    assert len(everything) == 8
    rows = events(tmp_path, text, columns=columns, keep=["buy"])
    assert told(rows, "user", "value") == [("a", 3.0), ("d", 9.0)]
    assert reasons(rows) == [(4, "value is not a number"), (5, "time is missing")]
    for settings, expected in (
        ({"min_value": 2}, ["a", "d"]),
        ({"max_value": 3}, ["a", "c"]),
        ({"since": "1970-01-01T00:00:02", "until": "1970-01-01T00:00:07"}, ["a", "c"]),
        ({"weights": {"view": 1, "buy": 5}, "min_value": 5}, ["a", "d"]),
    ):
        assert [user for (user,) in told(events(tmp_path, text, columns=columns, **settings), "user")] == expected
    weighted = events(tmp_path, text, columns=columns, weights={"view": 1, "buy": 5})
    assert told(weighted, "user", "value") == [("a", 1.0), ("a", 5.0), ("c", 1.0), ("d", 5.0)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"explode": [{"columns": {"thing": 1}}]}, "found 'thing'"),
        ({"explode": [{"columns": {"item": 1}, "time": "soon"}]}, "expected a date such as"),
        ({"explode": [{"columns": {"item": 1}, "time": "2020-01-01"}, {"columns": {"item": 2}}]}, "in all entries"),
        ({"explode": [{"columns": {"item": 1}, "suffixes": {"-0": "a"}, "event_type": "b"}]}, "no event_type"),
        ({"matrix_from": 1, "columns": {"user": 0, "item": 1}}, "matrix_from: expected no explode"),
        ({"matrix_from": 1, "format": "json"}, "expected format delimited or parquet"),
        ({"fields": 2}, "set quote: null"),
        ({"multiline": True, "quote": None}, "multiline: expected a quote"),
        ({"keep": ["buy"]}, "set columns.event_type"),
        ({"min_value": 1}, "set columns.value"),
        ({"since": "2020-01-01"}, "set columns.time"),
        ({"since": "2020-01-01", "columns": {"user": 0, "time": 1}, "time_unit": "ordinal"}, "found mere order"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        local_rows(tmp_path, path="log", **{"columns": {"user": 0}, **settings})
