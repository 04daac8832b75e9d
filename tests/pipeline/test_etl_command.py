"""``python -m etl`` on a tiny log: days that append, what is skipped, and mistakes that end in one line."""

import gzip
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from pyspark.sql import SparkSession

from etl.__main__ import main
from etl.jobs.features import write_arrays
from etl.lake import spark_io
from etl.lake.encodings import Encoding
from etl.pipeline.report import make_report
from etl.pipeline.report_text import lines
from etl.pipeline.run import JOBS
from etl.tables import FIRST_INDEX, INTERACTIONS, RELEASES, TABLES

HEADER = "user,item,ts\n"
ITEMS = "id|title|genres|director\n" + "".join(
    f"i{n}|Title {n}|{'Drama' if n < 4 else 'Comedy'}|Person {n % 3}\n" for n in range(8)
)


def _day(day: int, users: range) -> str:
    """Each user takes items 0 to 5, a second apart."""
    return "".join(f"u{user},i{item},{1_000 + 100 * day + item}\n" for user in users for item in range(6))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, spark: SparkSession) -> Path:
    """A folder with one day's log, its items and a configuration; commands run in it make `lake`."""
    folder = tmp_path_factory.mktemp("etl")
    (folder / "days").mkdir()
    # One torn line, one unknown item, one event twice.
    bad = "torn line\nu1,i99,1000\nu1,i0,1100\n"
    (folder / "days" / "day1.csv").write_text(HEADER + _day(1, range(8)) + bad)
    (folder / "items.txt").write_text(ITEMS)
    _configure(folder)
    return folder


def _configure(folder: Path, **changed: Any) -> Path:
    config: dict[str, Any] = {
        "lake": str(folder / "lake"),
        "source": {
            "kind": "log",
            "root": str(folder),
            "events": {"path": "days", "columns": {"user": "user", "item": "item", "time": "ts"}},
            "items": {
                "path": "items.txt",
                "separator": "|",
                "id": "id",
                "title": "title",
                "categories": "genres",
                "people": {"director": ["director"]},
            },
        },
        "cleaning": {"max_quarantine_share": 0.1},
        "kcore": {"min_user": 2, "min_item": 2},
        "domains": [{"name": "drama", "any_of": ["Drama"]}, {"name": "comedy", "none_of": ["Drama"]}],
        "splits": [{"name": "last-2", "validation": 1, "test": 1}],
    }
    path = folder / "etl.yaml"
    path.write_text(yaml.safe_dump(config | changed))
    return path


def _versions(lake: Path) -> dict[str, int | None]:
    return {name: spark_io.current_version(str(lake), table) for name, table in TABLES.items()}


def _table(lake: Path, name: str) -> pl.DataFrame:
    return pl.read_delta(str(lake / name))


def test_days_append_and_what_is_unchanged_is_skipped(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lake, command = place / "lake", ["all", "--config", str(place / "etl.yaml")]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "2 of 51 rows of interactions quarantined" in said
    assert "1 exact duplicates dropped" in said
    log = _table(lake, "interactions")
    assert sorted(zip(log["user"], log["item"], log["time"].dt.epoch("us"), strict=True)) == [
        (f"u{user}", f"i{item}", (1_100 + item) * 1_000_000) for user in range(8) for item in range(6)
    ]
    bad = _table(lake, "quarantine").sort("line")
    assert bad.select("kind", "file", "line", "reason").rows() == [
        ("interactions", "days/day1.csv", 50, "expected 3 fields, found 1"),
        ("interactions", "days/day1.csv", 51, "unknown item"),
    ]
    items = _table(lake, "items").sort("index")
    assert items.select("item", "index", "kept", "degree").rows() == [
        (f"i{n}", FIRST_INDEX + n, n < 6, 8 if n < 6 else 0) for n in range(8)
    ]
    row = _table(lake, "sequences").filter(domain="drama").sort("user").row(0, named=True)
    assert (row["items"], row["valid_start"], row["test_start"], row["end"]) == ([5, 6, 7, 8], 2, 3, 4)
    release = _table(lake, "releases").row(0, named=True)
    first = _versions(lake)
    assert {entry["table"]: entry["version"] for entry in release["tables"]} == {
        name: first[name] for name in [*(job.name for job in JOBS), "quarantine"]
    }

    assert main(command) == 0
    assert capsys.readouterr().out.count("unchanged, skipped") == len(JOBS)
    (place / "days" / "copy.csv").write_bytes((place / "days" / "day1.csv").read_bytes())
    assert main(command) == 0
    assert "nothing new" in capsys.readouterr().out
    assert _versions(lake) == first

    # A later day brings two users, an item of the file that nobody had taken, and an event that is there already.
    (place / "days" / "day2.csv").write_text(
        HEADER + _day(2, range(7, 10)) + "u8,i7,1900\nu9,i7,1900\nu1,i0,1100\n" + "x\n" * 4
    )
    assert main([*command, "--cleaning.min_rows", "4"]) == 2  # 4 of 25 rows are more than 10 %
    assert main(command) == 0  # but of the whole log they are less, and they are few
    said = capsys.readouterr().out
    assert "1 new file(s); times 1970-01-01 00:18:20 to 1970-01-01 00:31:40 UTC; 4 of 25 rows of interactions" in said
    assert "quarantined; 1 exact duplicates dropped" in said
    grown = _table(lake, "interactions")
    assert len(grown) == 48 + 20
    assert grown.join(log, on=log.columns, how="semi", nulls_equal=True).height == 48
    new = grown.join(log, on=log.columns, how="anti", nulls_equal=True)
    assert new["source_order"].min() > log["source_order"].max()
    users = _table(lake, "users").sort("index")
    assert users["user"].to_list() == [f"u{n}" for n in range(10)]
    assert users["index"].to_list() == list(range(FIRST_INDEX, FIRST_INDEX + 10))
    assert _table(lake, "items").filter(item="i7")["kept"].to_list() == [True]
    assert _table(lake, "releases")["release"].sort().to_list() == [1, 2]

    report = make_report(str(lake))
    everything, comedy, drama = report.domains
    assert (everything.users, everything.items, everything.interactions) == (10, 7, 68)
    assert (comedy.name, comedy.items, comedy.interactions, comedy.average_length) == ("comedy", 3, 24, 2.4)
    assert (drama.users, drama.held_out_users, drama.interactions) == (10, 10, 44)
    assert report.shared_users == {("comedy", "drama"): 10}
    assert report.shared_items == {("comedy", "drama"): 0}
    assert (report.events, report.duplicates) == (68, 2)
    kept = _table(lake, "items").filter("kept")
    related = _table(lake, "knowledge").join(kept, left_on="head", right_on="item", how="semi")
    assert report.related == dict(related.group_by("relation").agg(pl.col("head").n_unique()).iter_rows())
    assert _table(lake, "knowledge")["head"].n_unique() > related["head"].n_unique() > 0
    assert dict(report.rejected) == {
        ("interactions", "unknown item"): 1,
        ("interactions", "expected 3 fields, found 1"): 5,
    }
    assert any("6 rows in quarantine" in line for line in lines(report))
    assert main(["report", "--lake", str(lake), "--page", str(place / "report.html")]) == 0
    page = (place / "report.html").read_text()
    for shown in (
        "<td>comedy</td>",
        "6 rows stand",
        "days/day1.csv line 51, column item",
        "<code>i99</code>",
        "<polyline",
    ):
        assert shown in page
    assert "http" not in page

    # Vectors that a recipe has written are in the next release, whatever else is unchanged, and in the report.
    encoding = Encoding(kind="item", encoder="text", width=2, inputs={"items": 1})
    write_arrays(
        str(lake), ["i0", "i4"], np.array([FIRST_INDEX, FIRST_INDEX + 4]), np.eye(2, dtype=np.float32), encoding
    )
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "release 3 (new)" in said
    assert "features item/text: 2 of 8 have one, 2 wide; of the items of all 28.6%, comedy 33.3%, drama 25.0%" in said

    # A file that was delivered may go; to read the log anew without it is refused.
    (place / "days" / "day1.csv").unlink()
    (place / "days" / "copy.csv").unlink()
    assert main(command) == 0
    with monkeypatch.context() as patch:
        patch.setattr("etl.jobs.job.job_code_version", lambda job: "newer")
        assert main(["interactions", *command[1:]]) == 0
    assert "the code has changed, but 1 delivered file(s) are gone" in capsys.readouterr().out
    before = _versions(lake)
    assert main([*command, "--cleaning.min_time", "1970-01-02"]) == 2
    assert "1 of 2 files" in capsys.readouterr().err
    assert main([*command, "--domains", "[{name: nothing, any_of: [Nope]}]"]) == 2
    assert "domain nothing: expected items" in capsys.readouterr().err
    assert _versions(lake) == before


MISTAKES: dict[str, tuple[dict[str, bytes], list[str], str]] = {
    "no file": ({}, ["--source.events.path", "nowhere.csv"], "nowhere.csv"),
    "no column": ({"days/a.csv": b"who,item,ts\nu,i1,1\n"}, [], "expected a column 'user'"),
    "empty log": ({"days/a.csv": HEADER.encode()}, [], "at least one row"),
    "nothing usable": (
        {"days/a.csv": HEADER.encode() + b"x\ny\n"},
        ["--cleaning.max_quarantine_share", "1"],
        "at least one row that can be used",
    ),
    "too many bad rows": (
        {"days/a.csv": HEADER.encode() + b"u,i1,1000\n,i1,5\n"},
        [],
        "(1, first in days/a.csv line 3, column user: ',i1,5'; see columns and null_values of source.events)",
    ),
    "unknown items": (
        {"days/a.csv": HEADER.encode() + b"u,i1,1000\nu,00I2,5\n"},
        [],
        "'; known are 'i2', 'i0', 'i1'…; see source.items.path and source.require_known_items)",
    ),
    "torn gzip": ({"days/a.csv.gz": gzip.compress(HEADER.encode() + _day(1, range(900)).encode())[:900]}, [], "gzip"),
    "not text": ({"days/a.csv": "user,item,ts\n".encode("utf-16")}, [], "UTF-16"),
    "no such setting": ({}, ["--kcore.minimum", "3"], "kcore.minimum"),
    "no such job": ({}, ["--job", "itemz"], "expected all, report or a job"),
    "no input": ({}, ["--job", "items"], "run `python -m etl all --config "),
    "no release": ({}, ["--job", "report"], "holds no release"),
    "domain twice": ({}, ["--domains", "[{name: a}, {name: a}]"], "different names"),
    "lake is a file": ({"lake": b"x"}, [], "found a file"),
    "lake is something else": ({"lake/thesis.tex": b"x"}, [], "thesis.tex"),
    "lake with a torn log": ({"lake/interactions/_delta_log/00000000000000000000.json": b'{"pro'}, [], "interactions"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_end_in_one_line_and_write_nothing(
    case: str, tmp_path: Path, spark: SparkSession, capsys: pytest.CaptureFixture[str]
) -> None:
    files, options, message = MISTAKES[case]
    (tmp_path / "items.txt").write_text(ITEMS)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    if not any(name.startswith("days/") for name in files) and case != "no file":
        (tmp_path / "days").mkdir()
        (tmp_path / "days" / "day1.csv").write_text(HEADER + _day(1, range(3)))
    job = options[1] if options[:1] == ["--job"] else "all"
    rest = [] if options[:1] == ["--job"] else options
    assert main([job, "--config", str(_configure(tmp_path)), *rest]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.count("\n") == 1
    assert "Traceback" not in told.out + told.err
    if "lake" in case:
        assert sorted(p.name for p in tmp_path.rglob("*.parquet")) == []
    else:
        assert not (tmp_path / "lake" / "releases").exists()
        assert spark_io.current_version(str(tmp_path / "lake"), INTERACTIONS) is None


def test_command_ends_with_code_2_and_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "etl", "all", "--config", str(_configure(tmp_path))],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("etl: source.events.path: expected a file")
    assert done.stderr.count("\n") == 1
    assert spark_io.current_version(str(tmp_path / "lake"), RELEASES) is None
