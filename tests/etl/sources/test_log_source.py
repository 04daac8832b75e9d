"""Raw logs: every row read is either good or rejected with its file, line and reason, however the file is spelled or
cut."""

import bz2
import codecs
import gzip
import json
import random
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from etl.config import CleaningConfig, LogSource
from etl.identifiers import identifier, text
from etl.session import user_errors
from etl.settings import GraftrecError
from etl.sources import delimited, files, objects, values
from etl.sources.files import RawFile
from etl.sources.log import FileLog
from tests.fixtures.local_rows import LocalSpark
from tests.fixtures.local_rows import read_rows as rows_of_log

Rows = list[dict[str, Any]]


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Rows]:
    """Reads tmp_path's files as an events (or other) file by settings; rows by source order."""
    return _reader(LocalSpark(), tmp_path)


@pytest.fixture
def read_by_engine(spark: SparkSession, tmp_path: Path) -> Callable[..., Rows]:
    return _reader(spark, tmp_path)


def _reader(spark: SparkSession | LocalSpark, tmp_path: Path) -> Callable[..., Rows]:

    def read_rows(
        part: str = "events", cleaning: CleaningConfig | None = None, range_bytes: int = 1 << 20, **set: Any
    ) -> Rows:
        events = {"path": "log", "columns": {"user": "user", "item": "item", "time": "time", "value": "value"}}
        config = {"root": str(tmp_path), "events": events | (set if part == "events" else {})}
        if part != "events":
            config[part] = {"path": "log"} | set
        source = FileLog(LogSource.model_validate(config), cleaning or CleaningConfig(), range_bytes=range_bytes)
        with user_errors():
            return sorted(rows_of_log(source, part, spark), key=lambda row: (row["file"], row["line"]))

    return read_rows


def _reasons(rows: Rows) -> dict[int, str]:
    return {row["line"]: row["reason"] for row in rows if row["reason"]}


def test_events_bad_rows_each_with_line_and_reason(read_by_engine: Callable[..., Rows], tmp_path: Path) -> None:
    lines = [
        b"\xef\xbb\xbfuser,item,time,value",
        b"a,x,100,1.5",
        b"a,y,101",  # 3: too few
        b"a,y,101,1,extra",  # 4: too many
        b"",  # 5: empty: no row
        b",x,100,1",  # 6
        b"a, ,100,1",  # 7
        b"a,x,,1",  # 8
        b"a,x,soon,1",  # 9
        b"a,x,100,much",  # 10
        b"a,x,100,nan",  # 11
        b"a,x,100,-inf",  # 12
        b"a,x,-1,1",  # 13: before 1970
        b"a,x,99999999999,1",  # 14: after tomorrow
        b"a,x,nan,1",  # 15
        b"a,x,99999999999999999999999999,1",  # 16
        b"a\xff,x,100,1",  # 17: undecodable
        b'a,"x,100,1',  # 18: open quote
        b'"a,b","say ""x""",100,',  # 19: good
        b"a,x,1e2,1\r",  # 20: good
        b"a,x,100.25, 2 ",  # 21: good
        b"last,x,100,1",  # 22: good, no line end
    ]
    (tmp_path / "log").write_bytes(b"\n".join(lines))
    rows = read_by_engine()
    assert len(rows) == 20
    assert _reasons(rows) == {
        3: "expected 4 fields, found 3",
        4: "expected 4 fields, found 5",
        6: "user is missing",
        7: "item is missing",
        8: "time is missing",
        9: "time can't be read",
        10: "value is not a number",
        11: "value is not finite",
        12: "value is not finite",
        13: "time is before cleaning.min_time",
        14: "time is after cleaning.max_time",
        15: "time can't be read",
        16: "time can't be read",
        17: "not utf-8: byte 0xff at 2",
        18: "malformed quoting",
    }
    good = {row["line"]: row for row in rows if not row["reason"]}
    assert (good[2]["user"], good[2]["item"], good[2]["time"], good[2]["value"]) == ("a", "x", 100_000_000, 1.5)
    assert (good[19]["user"], good[19]["item"], good[19]["value"]) == ("a,b", 'say "x"', None)
    assert [good[n]["time"] for n in (20, 21, 22)] == [100_000_000, 100_250_000, 100_000_000]
    assert all(row["file"] == "log" and row["kind"] == "interactions" for row in rows)
    assert {row["line"]: row["raw"] for row in rows}[3] == "a,y,101"
    assert good[22]["raw"] is None


def test_events_lines_exact_when_a_file_is_cut(read_by_engine: Callable[..., Rows], tmp_path: Path) -> None:
    body = [f"u{n % 7}::i{n}::{n}" if n % 10 else f"u{n}::broken" for n in range(500)]
    (tmp_path / "log").write_text("\n".join(body) + "\n")
    columns = {"user": 0, "item": 1, "time": 2}
    rows = read_by_engine(range_bytes=97, separator="::", header=False, quote=None, columns=columns)
    assert [row["line"] for row in rows] == list(range(1, 501))
    assert sorted(_reasons(rows)) == list(range(1, 501, 10))
    assert {row["line"]: row["raw"] for row in rows if row["reason"]}[301] == "u300::broken"
    assert [row["source_order"] for row in rows] == list(range(1, 501))


def test_events_of_many_files_in_path_order(read: Callable[..., Rows], tmp_path: Path) -> None:
    folder = tmp_path / "log"
    (folder / "day=2").mkdir(parents=True)
    header = "item|value|user|time\n"
    (folder / "a.csv").write_text("user|item|time|value\nu1|i1|1|1\n")
    (folder / "day=2" / "b.csv.gz").write_bytes(gzip.compress((header + "i2|2|u2|2\n\n").encode()))
    (folder / "day=2" / "c.csv.bz2").write_bytes(bz2.compress((header + "i3|3|u3|3\n").encode()))
    (folder / "day=2" / "d.csv.zst").write_bytes(pa.compress((header + "i4|4|u4|4\n").encode(), "zstd", asbytes=True))
    (folder / "e.csv").write_text("")
    (folder / "_SUCCESS").write_text("")
    (folder / ".hidden.csv").write_text("no,thing\n")
    rows = read(separator="|")
    assert [(row["user"], row["item"], row["time"], row["file"]) for row in rows] == [
        ("u1", "i1", 1_000_000, "log/a.csv"),
        ("u2", "i2", 2_000_000, "log/day=2/b.csv.gz"),
        ("u3", "i3", 3_000_000, "log/day=2/c.csv.bz2"),
        ("u4", "i4", 4_000_000, "log/day=2/d.csv.zst"),
    ]
    orders = [row["source_order"] for row in rows]
    assert orders == sorted(orders)
    assert [row["user"] for row in read(separator="|", path="log/**/*.csv.gz")] == ["u2"]


def test_events_json_lines(read: Callable[..., Rows], tmp_path: Path) -> None:
    lines = [
        '{"user": 12, "item": "x", "time": 5, "value": 4, "extra": {"deep": [1]}}',
        '{"user": "12", "item": "x", "time": "6", "value": 4.5}',
        "",
        '{"user": 12.0, "item": "x", "time": 7.5, "value": null}',
        '{"user": 13, "item": "x", "time": 5',
        "[1, 2]",
        '{"item": "x", "time": 5}',
        '{"user": 1, "item": "x", "time": 5} {"user": 2, "item": "x", "time": 5}',
        '{"user": 1, "item": "x", "time": NaN}',
        '{"user": 1, "item": "x", "time": 5, "value": "a lot"}',
    ]
    (tmp_path / "log").write_text("\n".join(lines))
    rows = read(format="json")
    assert len(rows) == 9
    assert _reasons(rows) == {
        5: "not a JSON object",
        6: "not a JSON object",
        7: "user is missing",
        8: "not a JSON object",
        9: "time is missing",
        10: "value is not a number",
    }
    assert [(r["user"], r["time"]) for r in rows if not r["reason"]] == [
        ("12", 5_000_000),
        ("12", 6_000_000),
        ("12", 7_500_000),
    ]


def test_events_parquet_with_typed_columns(read: Callable[..., Rows], tmp_path: Path) -> None:
    table = pa.table(
        {
            "user": pa.array([1.0, 2.0, None, 4.0]),
            "item": pa.array(["x", "y", "z", None]).dictionary_encode(),
            "time": pa.array([1, 2, 3, 4], pa.timestamp("ms", tz="Europe/Berlin")),
            "value": pa.array([1, 2, 3, 4], pa.int8()),
        }
    )
    pq.write_table(table, tmp_path / "log", row_group_size=1)
    rows = read(format="parquet")
    assert [(r["line"], r["user"], r["item"], r["time"]) for r in rows if not r["reason"]] == [
        (1, "1", "x", 1000),
        (2, "2", "y", 2000),
    ]
    assert _reasons(rows) == {3: "user is missing", 4: "item is missing"}


def test_events_rejected_from_parquet_show_their_cells(read: Callable[..., Rows], tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"user": ["a", None], "item": [1, 2], "time": [5, 6], "value": [1.0, 2.0]}), tmp_path / "log"
    )
    assert [row["raw"] for row in read(format="parquet")] == [None, "null, 2, 6, 2.0"]


def test_events_without_time_take_the_order_of_the_source(read: Callable[..., Rows], tmp_path: Path) -> None:
    (tmp_path / "log").write_text("2\n9\nu\ti\nu\tj\n")
    columns = {"user": 0, "item": 1}
    rows = read(separator="\t", header=False, skip_rows=2, columns=columns)
    assert [(row["item"], row["time"], row["line"]) for row in rows] == [("i", 3, 3), ("j", 4, 4)]


def test_events_row_longer_than_a_mebibyte_is_rejected_whole(read: Callable[..., Rows], tmp_path: Path) -> None:
    long = "x" * (3 << 20)
    (tmp_path / "log").write_text(f"user,item,time,value\na,b,1,1\na,{long},1,1\nc,d,2,2\n")
    for range_bytes in (1 << 18, 1 << 30):
        rows = read(range_bytes=range_bytes)
        assert [row["line"] for row in rows] == [2, 3, 4]
        assert _reasons(rows) == {3: delimited.TOO_LONG}
        assert rows[1]["raw"] == f"a,{long}"[:1000]


def test_items_title_year_flags_attributes_people(
    read: Callable[..., Rows], spark: SparkSession, tmp_path: Path
) -> None:
    text = "1|Été, L' (1968)|0|1|1|fr|Ann Lee|Bo\n2|No year|1|0|0|||\n|x|1|0|0|||\n4|(1999)|0|0|0|en||Ann Lee\n"
    (tmp_path / "log").write_bytes(text.encode("latin-1"))
    described = {
        "separator": "|",
        "header": False,
        "encoding": "latin-1",
        "id": 0,
        "title": 1,
        "year": "title",
        "category_flags": {"first": 2, "names": ["Drama", "War", "Noir"]},
        "attributes": {"language": 5},
        "people": {"actor": [6, 7]},
    }
    rows = read("items", **described)
    assert [(r["item"], r["title"], r["year"], r["categories"]) for r in rows] == [
        ("1", "Été, L'", 1968, ["War", "Noir"]),
        ("2", "No year", None, ["Drama"]),
        (None, "x", None, ["Drama"]),
        ("4", "(1999)", 1999, []),
    ]
    assert rows[0]["attributes"] == [("language", "fr")]
    assert rows[1]["attributes"] == []
    assert _reasons(rows) == {3: "item is missing"}
    events = {"path": "log", "columns": {"user": 0, "item": 1}}
    config = LogSource.model_validate({"root": str(tmp_path), "events": events, "items": {"path": "log"} | described})
    people = FileLog(config, CleaningConfig()).people(spark)
    assert people is not None
    found = [(r.item, r.relation, r.rank, r.name, r.key) for r in people.collect()]
    assert sorted(found) == [
        ("1", "actor", 1, "Ann Lee", "ann lee"),
        ("1", "actor", 2, "Bo", "bo"),
        ("4", "actor", 2, "Ann Lee", "ann lee"),
    ]


def test_items_categories_by_separator_and_year_column(read: Callable[..., Rows], tmp_path: Path) -> None:
    (tmp_path / "log").write_text("id;genres;y\na;Drama| War||;1999\nb;;soon\n")
    rows = read("items", separator=";", id="id", categories="genres", year="y")
    assert [(r["categories"], r["year"]) for r in rows] == [(["Drama", "War"], 1999), ([], None)]


def test_users_and_edges_both_directions(read_by_engine: Callable[..., Rows], tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a,b,0.5\nb,b,1\nb,,1\nb,c,none\nc,d,\n")
    rows = read_by_engine("users", header=False, id=0, attributes={"friend": 1, "weight": 2})
    assert rows[0]["attributes"] == [("friend", "b"), ("weight", "0.5")]
    rows = read_by_engine("edges", header=False, user=0, friend=1, weight=2)
    assert sorted((r["user"], r["friend"], r["weight"]) for r in rows if not r["reason"]) == [
        ("a", "b", 0.5),
        ("b", "a", 0.5),
        ("c", "d", 1.0),
        ("d", "c", 1.0),
    ]
    assert _reasons(rows) == {2: "user and friend are the same", 3: "friend is missing", 4: "weight is not a number"}
    assert len(read_by_engine("edges", header=False, user=0, friend=1, weight=2, directed=True)) == 5


@pytest.mark.parametrize(
    ("content", "settings", "said"),
    [
        (None, {}, "found no file at"),
        (b"", {}, "expected at least one row"),
        (b"user,item,time,value\n\n\r\n", {}, "expected at least one row"),
        (b"user,thing,time,value\na,b,1,1\n", {}, "'item'; found columns: user, thing, time, value"),
        (b"user,item,item,time,value\na,b,1,1\n", {}, "single column 'item'"),
        (b"a,b,1\n", {"header": False}, "found the name 'user'"),
        (
            b"a,b,1\n",
            {"header": False, "columns": {"user": 0, "item": 7}},
            "position 7 (the first is 0), found 3 fields",
        ),
        (b"a,b,1\n", {"columns": {"user": 0}}, "source.events.columns.item"),
        ("user,item,time,value\n".encode("utf-16"), {}, "found UTF-16 text"),
        (b"user,item,time,value\n", {"encoding": "utf-16"}, "found utf-16"),
        (b"user,item,time,value\n", {"encoding": "klingon"}, "unknown encoding 'klingon'"),
        (gzip.compress(b"user,item,time,value\na,b,1,1\n", mtime=0), {}, "found gzip data"),
        (b"PK\x03\x04....", {}, "found zip data"),
        (b"no parquet", {"format": "parquet"}, "log: expected a readable file"),
        (b'{"who": 1}\n', {"format": "json"}, "found columns: who"),
        (b"{'user': 'a', 'item': 'x'}\n" * 300, {"format": "json"}, "Python's spelling of a dict"),
        (b'[\n{"user": "a"},\n{"user": "b"}]\n', {"format": "json"}, "for an array set format: json_array"),
        (b"user,item,time,value\ra,x,5,1\rb,x,5,1\r", {}, "found CR alone; convert it"),
    ],
)
def test_events_mistakes_are_one_clear_line(
    read: Callable[..., Rows], tmp_path: Path, content: bytes | None, settings: dict[str, Any], said: str
) -> None:
    if content is not None:
        (tmp_path / "log").write_bytes(content)
    with pytest.raises(GraftrecError) as error:
        read(**settings)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_events_a_header_met_again_is_rejected_by_line(read: Callable[..., Rows], tmp_path: Path) -> None:
    (tmp_path / "log").write_text("user,item,time,value\na,x,5,1\nuser,item,time,value\nb,x,5,1\n")
    assert _reasons(read(columns={"user": "user", "item": "item"})) == {3: "the header again"}


def test_events_header_of_another_file_is_compared_where_positions_count(
    read: Callable[..., Rows], tmp_path: Path
) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "1.csv").write_text("user,item,time\na,x,5\n")
    (tmp_path / "log" / "2.csv").write_text("b,y,6\nc,z,7\n")
    with pytest.raises(GraftrecError, match=r"^log/2\.csv: expected the header of log/1\.csv, 'user,item,time'"):
        read(columns={"user": 0, "item": 1, "time": 2})


def test_events_one_file_packed_and_unpacked_is_refused(read: Callable[..., Rows], tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    lines = b"user,item,time,value\na,x,5,1\n"
    (tmp_path / "log" / "a.csv").write_bytes(lines)
    (tmp_path / "log" / "a.csv.gz").write_bytes(gzip.compress(lines))
    with pytest.raises(GraftrecError, match=r"found log/a\.csv and log/a\.csv\.gz; remove one"):
        read()
    assert len(read(path="log/*.csv")) == 1


def test_a_name_that_exists_is_no_pattern(read: Callable[..., Rows], tmp_path: Path) -> None:
    (tmp_path / "log[1].csv").write_text("user,item,time,value\na,x,5,1\n")
    (tmp_path / "log1.csv").write_text("user,item,time,value\nb,x,5,1\nc,x,5,1\n")
    assert [row["user"] for row in read(path="log[1].csv")] == ["a"]


def test_events_escapes_and_a_decimal_comma(read: Callable[..., Rows], tmp_path: Path) -> None:
    lines = ["user;item;time;value", '"a";"x \\"new\\"; y";5;"1,5"', "b;x\\;y;6;-2,25", "c;z;7;3"]
    (tmp_path / "log").write_text("\n".join(lines))
    rows = read(separator=";", escape="\\", decimal=",")
    assert [(row["user"], row["item"], row["value"]) for row in rows] == [
        ("a", 'x "new"; y', 1.5),
        ("b", "x;y", -2.25),
        ("c", "z", 3.0),
    ]


def test_events_json_with_a_key_that_comes_late_and_half_a_character(read: Callable[..., Rows], tmp_path: Path) -> None:
    lines = [
        json.dumps({"user": f"u{n}", "item": "x", "time": n} | ({"value": 4} if n > 150 else {})) for n in range(200)
    ]
    lines.append('{"user": "half \\ud83d", "item": "x", "time": 5}')
    (tmp_path / "log").write_text("\n".join(lines))
    rows = read(format="json")
    assert [row["value"] for row in rows] == [None] * 151 + [4.0] * 49 + [None]
    assert rows[-1]["user"] == "half \ufffd"


def test_events_of_nested_keys_are_the_same_in_json_and_parquet(read: Callable[..., Rows], tmp_path: Path) -> None:
    rows = [
        {"user": {"id": 1 << 60, "name": "n"}, "item": "x", "at": {"time": {"s": 5}}, "at.value": 1.5},
        {"user": {"id": None, "name": "n"}, "item": "x", "at": {"time": {"s": 6}}, "at.value": None},
        {"user": None, "item": "y", "at": None, "at.value": 2.5},
    ]
    columns = {"user": "user.id", "item": "item", "time": "at.time.s", "value": "at.value"}
    (tmp_path / "log").write_text("\n".join(map(json.dumps, rows)))
    found = [read(format="json", columns=columns)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "log")
    found.append(read(format="parquet", columns=columns))
    for one in found:
        assert (one[0]["user"], one[0]["time"], one[0]["value"]) == (str(1 << 60), 5_000_000, 1.5)
        assert _reasons(one) == {2: "user is missing", 3: "user is missing"}
    with pytest.raises(GraftrecError, match=r"expected a column 'user.ix'; found columns: user, user.id, user.name, "):
        read(format="parquet", columns=columns | {"user": "user.ix"})


def test_a_time_format_that_names_zones_is_refused() -> None:
    events = {"path": "log", "columns": {"user": "user", "item": "item"}, "time_format": "%Y-%m-%d %Z"}
    with pytest.raises(ValueError, match="what zone %Z names depends on the machine"):
        LogSource.model_validate({"events": events})


def test_events_truncated_gzip_is_refused_by_name(read_by_engine: Callable[..., Rows], tmp_path: Path) -> None:
    body = "user,item,time,value\n" + "".join(f"u{random.random()},i,1,1\n" for _ in range(200_000))
    packed = gzip.compress(body.encode())
    (tmp_path / "log.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(GraftrecError, match=r"^log.gz: expected a whole gzip file, found: .*; deliver it again$"):
        read_by_engine(path="log.gz")


def test_events_missing_root_is_named(spark: SparkSession, tmp_path: Path) -> None:
    config = LogSource.model_validate(
        {"root": str(tmp_path / "none"), "events": {"path": "x", "columns": {"user": 0, "item": 1}}}
    )
    with pytest.raises(GraftrecError, match=r"is no folder: set source.root"):
        FileLog(config, CleaningConfig()).events(spark)


def test_cleaning_bounds_are_dates_and_inclusive(read: Callable[..., Rows], tmp_path: Path) -> None:
    (tmp_path / "log").write_text("user,item,time,value\na,b,1995-01-31,1\na,b,1995-02-01,1\na,b,1995-02-02,1\n")
    cleaning = CleaningConfig(min_time="1995-02-01", max_time="1995-02-01")
    assert sorted(_reasons(read(cleaning=cleaning, time_format="%Y-%m-%d"))) == [2, 4]
    with pytest.raises(GraftrecError, match=r"cleaning.min_time: expected a date"):
        read(cleaning=CleaningConfig(min_time="long ago"))


def test_fingerprint_follows_content_alone(tmp_path: Path) -> None:
    config = LogSource.model_validate(
        {"root": str(tmp_path), "events": {"path": "*.csv", "columns": {"user": 0, "item": 1}}}
    )
    (tmp_path / "a.csv").write_text("1,2\n")
    first = FileLog(config, CleaningConfig()).fingerprint()
    (tmp_path / "a.csv").write_text("1,2\n")
    assert FileLog(config, CleaningConfig()).fingerprint() == first
    (tmp_path / "b.csv").write_text("1,2\n")
    second = FileLog(config, CleaningConfig()).fingerprint()
    (tmp_path / "b.csv").write_text("1,3\n")
    assert len({first, second, FileLog(config, CleaningConfig()).fingerprint()}) == 3


# --- without Spark --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_read_blocks_gives_each_line_once_whatever_the_cuts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 50)
    monkeypatch.setattr(files, "_CHUNK_BYTES", rng.choice([7, 64, 1000]))
    lines = [
        rng.choice([b"", b"ab", b"x" * rng.randrange(49), b"y" * rng.randrange(60, 300)])
        for _ in range(rng.randrange(60))
    ]
    content = b"\n".join(lines) + rng.choice([b"", b"\n"])
    path = tmp_path / "f"
    path.write_bytes(content)
    file = RawFile(str(path), "f", 0, len(content), None)
    before, found = 0, []
    for start, end in files.ranges(file, rng.choice([1, 3, 17, 120, 10_000])):
        for block in files.read_blocks(file, start, end, before):
            inner = block.data.split(b"\n")
            if block.data.endswith(b"\n"):
                inner.pop()
            found += [(block.first_line + n, line, block.too_long) for n, line in enumerate(inner)]
        before += files.count_line_ends(file, start, end)
    expected = content.split(b"\n")
    if content.endswith(b"\n") or not content:
        expected.pop()
    assert [line for line, _, _ in found] == list(range(1, len(expected) + 1))
    for (_, line, too_long), whole in zip(found, expected, strict=True):
        assert whole.startswith(line) if too_long else whole == line


@pytest.mark.parametrize("separator", [",", "::", "|", ".*", "\t", "^$", "\\", " - ", "§"])
@pytest.mark.parametrize("quote", ['"', "'", None])
def test_split_agrees_with_the_fields_written(separator: str, quote: str | None) -> None:
    rng = random.Random(separator + str(quote))
    config = LogSource.model_validate(
        {"events": {"path": "f", "separator": separator, "quote": quote, "columns": {}, "header": False}}
    ).events
    alphabet = ["a", "é", "0", "☃", " "] + ([separator, quote, quote, "b"] if quote else [])
    written, texts = [], []
    for _ in range(300):
        fields = ["".join(rng.choices(alphabet, k=rng.randrange(6))) for _ in range(3)]
        written.append(fields)
        texts.append(separator.join(f"{quote}{f.replace(quote, quote * 2)}{quote}" if quote else f for f in fields))
    block = files.Block(("\r\n".join(texts)).encode(), 1)
    chunk = delimited.split(delimited.lines(block, "utf-8"), config, delimited.Layout((2, 0), 3))
    assert chunk.reason.null_count == 300
    assert chunk.columns[0].to_pylist() == [fields[2] for fields in written]
    assert chunk.columns[1].to_pylist() == [fields[0] for fields in written]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "cp1252", "shift_jis", "gbk"])
def test_lines_decode_and_point_at_what_cannot_be(encoding: str) -> None:
    text = {"shift_jis": "表十ソ", "gbk": "中文", "utf-8": "ñ☃"}.get(encoding, "ñé")
    data = f"{text},1\r\n{text},2\n".encode(encoding)
    chunk = delimited.lines(files.Block(data, 5), encoding)
    assert chunk.raw.to_pylist() == [f"{text},1", f"{text},2"]
    assert chunk.line.to_pylist() == [5, 6]
    if encoding != "latin-1":
        chunk = delimited.lines(files.Block(data + b"bad\x81\xff\n", 5), encoding)
        assert chunk.reason.null_count == 2
        assert chunk.reason[2].as_py().startswith(f"not {encoding}: byte 0x")


def test_lines_a_byte_order_mark_begins_no_text() -> None:
    data = codecs.BOM_UTF8 + b"a\n" + codecs.BOM_UTF8 + b"b\nc" + codecs.BOM_UTF8 + b"\n"
    for first_line in (1, 2):
        found = delimited.lines(files.Block(data, first_line), "utf-8")
        assert found.raw.to_pylist() == ["a", "b", "c\ufeff"]


@pytest.mark.parametrize(
    ("cells", "unit", "form", "expected"),
    [
        (
            ["1", "+2", "-3", "4.5", "x", "", "0x1", "1e3", "9223372036854775807"],
            "s",
            None,
            [1e6, 2e6, -3e6, 4.5e6, None, None, None, 1e9, None],
        ),
        (["1", "1.5"], "ms", None, [1000, 1500]),
        (["1999", "-1"], "ns", None, [1, 0]),
        (["7", "7.0", "7.5", "seven"], "ordinal", None, [7, 7, None, None]),
        (
            ["31/01/1995", "1/2/1995", "31/02/1995", "01/01/95", "no"],
            None,
            "%d/%m/%Y",
            [791510400e6, 791596800e6, None, None, None],
        ),
        (["1970-01-01 00:00:01.5", "1970-01-01 00:00:01"], None, "%Y-%m-%d %H:%M:%S.%f", [1.5e6, None]),
        (["1970-01-01T01:00:00+0100"], None, "%Y-%m-%dT%H:%M:%S%z", [0]),
        (["1970-01-01T00:00:01", "1970-01-01", "1970-01-01T01:00:00+01:00", "no"], None, None, [1e6, 0, 0, None]),
        (["02-Jan-1970", "02-jan-1970", "2-Foo-1970"], None, "%d-%b-%Y", [86400e6, 86400e6, None]),
    ],
)
def test_time_units_and_formats(
    cells: list[str], unit: str | None, form: str | None, expected: list[float | None]
) -> None:
    assert values.time(pa.array(cells), unit=unit, form=form).to_pylist() == expected


@pytest.mark.parametrize(
    ("local", "utc"),
    [
        ("2015-07-01 08:00:00", "2015-07-01 12:00:00"),
        ("2015-01-01 08:00:00", "2015-01-01 13:00:00"),
        ("2015-11-01 01:30:00", "2015-11-01 05:30:00"),  # twice: the first
        ("2015-11-01 02:00:00", "2015-11-01 07:00:00"),
        ("2015-01-01 08:00:00+02:00", "2015-01-01 06:00:00"),  # an offset counts
    ],
)
def test_time_without_a_zone_is_of_the_setting(local: str, utc: str) -> None:
    expected = values.day(utc, setting="")
    zone = "America/New_York"
    assert values.time(pa.array([local, None]), unit=None, form=None, zone=zone).to_pylist() == [expected, None]
    form = "%Y-%m-%d %H:%M:%S%z" if "+" in local else "%Y-%m-%d %H:%M:%S"
    assert values.time(pa.array([local]), unit=None, form=form, zone=zone).to_pylist() == [expected]
    if "+" not in local:
        odd = pa.array([local.replace(" ", " 0")[:11] + local[11:]])
        assert values.time(odd, unit=None, form="%Y-%m-%d %H:%M:%S", zone=zone).to_pylist() == [expected]
        typed = pc.cast(pa.array([local]), pa.timestamp("s"))
        assert values.time(typed, unit="s", form=None, zone=zone).to_pylist() == [expected]


@pytest.mark.parametrize(
    ("unit", "fits"), [("s", "ms"), ("s", "us"), ("s", "ns"), ("ms", "s"), ("us", "s"), ("ns", "ms")]
)
def test_events_in_another_unit_are_rejected_with_the_one_that_fits(
    read: Callable[..., Rows], tmp_path: Path, unit: str, fits: str
) -> None:
    scale = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
    lines = [f"a,x,{1_500_000_000 * scale[one]},1" for one in (unit, fits)]
    (tmp_path / "log").write_text("\n".join(["user,item,time,value", *lines]))
    assert _reasons(read(time_unit=unit)) == {3: f"time fits unit {fits}, not {unit}"}


@pytest.mark.parametrize("zone", ["Mars/Olympus", "../etc/passwd", ""])
def test_a_zone_that_is_none_is_refused(zone: str) -> None:
    events = {"path": "log", "columns": {"user": "user", "item": "item"}, "timezone": zone}
    with pytest.raises(ValueError, match="expected a zone such as Europe/Rome"):
        LogSource.model_validate({"events": events})


def test_time_of_typed_cells() -> None:
    assert values.time(pa.array([1, None], pa.int32()), unit="s", form=None).to_pylist() == [1_000_000, None]
    assert values.time(pa.array([1.5, float("nan"), float("inf")]), unit="s", form=None).to_pylist() == [
        1_500_000,
        None,
        None,
    ]
    assert values.time(pa.array([1, 2**64 - 1], pa.uint64()), unit="s", form=None).to_pylist() == [1_000_000, None]
    assert values.whole_number(pa.array([1, 2**64 - 1], pa.uint64())).to_pylist() == [1, None]
    assert values.time(pa.array([1], pa.date32()), unit="s", form=None).to_pylist() == [86_400_000_000]
    assert values.time(pa.array([1_999], pa.timestamp("ns")), unit="s", form=None).to_pylist() == [1]


def test_number_spellings() -> None:
    cells = pa.array(["1", " -2.5 ", "+3", ".5", "6.", "1e3", "1,5", "NaN", "-Infinity", "", None, "٣", "1_000"])
    found = values.number(cells).to_pylist()
    assert found[:6] == [1.0, -2.5, 3.0, 0.5, 6.0, 1000.0]
    assert found[6] is None
    assert all(not abs(value) < float("inf") for value in found[7:9])
    assert found[9:] == [None, None, None, None]


@pytest.mark.parametrize(
    ("cells", "ids"),
    [
        (
            pa.array([" 5", "5.0", "28.00", "007", "12e45", "9007199254740993.0", "-0.0", ""]),
            ["5", "5", "28", "007", "12e45", "9007199254740993", "0", None],
        ),
        (pa.array([5, -(2**63), 2**63 - 1], pa.int64()), ["5", str(-(2**63)), str(2**63 - 1)]),
        (pa.array([2**64 - 1], pa.uint64()), [str(2**64 - 1)]),
        (pa.array([5.0, None], pa.float32()).cast(pa.float16()), ["5", None]),
        (
            pa.array([5.0, 2.0**53 - 1, 12.5, -0.0, float("nan"), float("inf")]),
            ["5", str(2**53 - 1), "12.5", "0", None, None],
        ),
        (pa.array([Decimal("28.00"), Decimal("123456789012345678.00")]), ["28", "123456789012345678"]),
        (pa.array([Decimal("28.00")]).dictionary_encode(), ["28"]),
        (pa.array([b"a"], pa.large_binary()), ["a"]),
        (pa.array(["nan", "-INF", "Infinity"]), [None, None, None]),
    ],
    ids=str,
)
def test_identifier_is_one_rule_for_every_type(cells: pa.Array, ids: list[str | None]) -> None:
    found, refused = identifier(cells)
    assert found.to_pylist() == ids
    assert not any(pc.any(failed).as_py() for failed, _ in refused)


@pytest.mark.parametrize(
    ("cells", "why"),
    [
        (pa.array([2.0**53]), "is a float too large to be exact"),
        (pa.array([2.0**24], pa.float32()), "is a float too large to be exact"),
        (pa.array([-(2.0**64)]), "is a float too large to be exact"),
        (pa.array(["1.8446744073709552e+19"]), "is in scientific notation"),
        (pa.array(['{"id": 5}']), "is an object"),
    ],
    ids=str,
)
def test_identifier_refuses_what_has_lost_digits(cells: pa.Array, why: str) -> None:
    _, refused = identifier(cells)
    assert next(said for failed, said in refused if pc.any(failed).as_py()).startswith(why)


@pytest.mark.parametrize("seed", range(4))
def test_ids_are_the_same_whatever_the_format(read: Callable[..., Rows], tmp_path: Path, seed: int) -> None:
    """Ids as CSV, JSON lines and Parquet spell them: the same text comes out, or the row is rejected by line."""
    draw = random.Random(seed)
    whole = [draw.choice([draw.randrange(100), draw.randrange(2**53), draw.randrange(2**62, 2**63)]) for _ in range(40)]
    parts = [draw.choice([number, str(number), f" {number} ", f"u{number}", f"{number}.0"]) for number in whole]
    odd = {7: float("nan"), 11: None, 13: 12.5, 17: 1.5e300, 19: float("inf")}
    cells = [odd.get(place, cell) for place, cell in enumerate(parts)]
    expected: list[str | None] = [str(cell).strip().removesuffix(".0") for cell in parts]
    for place, value in {7: None, 11: None, 13: "12.5", 17: None, 19: None}.items():
        expected[place] = value

    def text(cell: object) -> str:
        return "" if cell is None else str(cell)

    spelled = {
        "delimited": "\n".join(["user,item,time", *(f"{text(cell)},x,5" for cell in cells)]),
        "json": "\n".join(json.dumps({"user": cell, "item": "x", "time": 5}) for cell in cells),
    }
    for form, written in spelled.items():
        (tmp_path / "log").write_text(written)
        rows = read(format=form, columns={"user": "user", "item": "item", "time": "time"})
        assert [None if row["reason"] else row["user"] for row in rows] == expected, form
    columns = {
        "int64": pa.array(whole, pa.int64()),
        "uint64": pa.array(whole, pa.uint64()),
        "string": pa.array(map(str, whole)),
        "dictionary": pa.array(map(str, whole)).dictionary_encode(),
        "decimal": pa.array([Decimal(number) for number in whole], pa.decimal128(25, 2)),
        "float": pa.array(map(float, whole)),
    }
    for kind, column in columns.items():
        pq.write_table(pa.table({"user": column, "item": ["x"] * 40, "time": [5] * 40}), tmp_path / "log")
        rows = read(format="parquet", columns={"user": "user", "item": "item", "time": "time"})
        exact = [str(number) if kind != "float" or number < 2**53 else None for number in whole]
        assert [None if row["reason"] else row["user"] for row in rows] == exact, kind


def test_null_values_are_missing_and_a_setting(read: Callable[..., Rows], tmp_path: Path) -> None:
    (tmp_path / "log").write_text("user,item,time,value\nNULL,x,5,1\na, \\N ,5,1\na,x,NA,1\na,x,5,NaN\nNone,x,5,1\n")
    assert _reasons(read()) == {2: "user is missing", 3: "item is missing", 4: "time is missing", 6: "user is missing"}
    rows = read(null_values=["", "NaN"], columns={"user": "user", "item": "item", "value": "value"})
    assert [row["user"] for row in rows if not row["reason"]] == ["NULL", "a", "a", "a", "None"]
    pq.write_table(pa.table({"user": ["a"], "item": ["x"], "time": [5], "value": [float("nan")]}), tmp_path / "log")
    assert [(row["value"], row["reason"]) for row in read(format="parquet")] == [(None, None)]


def test_events_a_list_as_id_is_refused_by_file_column_and_type(
    read_by_engine: Callable[..., Rows], tmp_path: Path
) -> None:
    pq.write_table(pa.table({"user": [["a"]], "item": ["x"], "time": [5]}), tmp_path / "log")
    with pytest.raises(
        GraftrecError, match=r"^log: user: expected text or numbers, found list<.*string>; name a column"
    ):
        read_by_engine(format="parquet", columns={"user": "user", "item": "item", "time": "time"})


def test_text_of_whole_floats_has_no_fraction() -> None:
    assert text(pa.array([1.0, 1.5, None, 1e20])).to_pylist()[:3] == ["1", "1.5", None]
    assert text(pa.array([b"a", b"\xff"])).to_pylist() == ["a", "\ufffd"]


@pytest.mark.parametrize("seed", range(10))
def test_json_block_agrees_with_json_line_by_line(seed: int) -> None:
    rng = random.Random(seed)
    kinds = [lambda: rng.randrange(100), lambda: "é" * rng.randrange(3), lambda: None, lambda: rng.random()]
    if seed % 2:
        kinds = kinds[:1]
    described_rows = [{"a": rng.choice(kinds)(), "b": "x", "c": [1]} for _ in range(50)]
    block = files.Block("\n".join(json.dumps(o) for o in described_rows).encode(), 1)
    chunk = objects.object_columns(delimited.lines(block, "utf-8"), ["b", "a"])
    assert chunk.reason.null_count == 50
    found = text(chunk.columns[1]).to_pylist()
    for word, described in zip(found, described_rows, strict=True):
        value = described["a"]
        assert word == (None if value in (None, "") else str(value)) or float(word) == value
