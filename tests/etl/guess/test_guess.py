"""`python -m etl guess`: what it writes for logs of many shapes reads every row of them."""

import datetime as dt
import gzip
import json
import os
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from deltalake import write_deltalake

from etl.__main__ import main
from etl.config import CleaningConfig, EtlConfig, LogSource
from etl.guess.configuration import configuration
from etl.guess.lines import yaml_text
from etl.guess.survey import survey
from etl.guess.times import PATTERNS, guess_times
from etl.settings import GraftrecError
from etl.sources.log import FileLog
from tests.fixtures.local_rows import read_rows
from tests.fixtures.places import ROOT
from tests.fixtures.public_logs import LOGS, write_log
from tests.fixtures.spoilt_logs import FORMATS, rows_of, spoilt_bytes

BEGIN = dt.datetime(2019, 3, 5, 14, 7, 9)
Row = tuple[str, str, int, float]  # user, item, seconds since BEGIN, value


def _events(users: int = 30, each: int = 9) -> list[Row]:
    draw = random.Random(3)
    return [
        (f"u{user}", f"i{item}", draw.randrange(40 * 86_400), draw.choice([1.0, 2.0, 3.5, 5.0]))
        for user in range(users)
        for item in draw.sample(range(25), each)
    ]


def _epoch(second: int) -> int:
    return int(BEGIN.replace(tzinfo=dt.UTC).timestamp()) + second


def _stamp(second: int, form: str) -> str:
    return (BEGIN + dt.timedelta(seconds=second)).strftime(form)


def _lines(rows: list[Row], line: Callable[[Row], str], head: str = "") -> bytes:
    return "\n".join([*([head] if head else []), *map(line, rows)]).encode()


def _csv(rows: list[Row]) -> bytes:
    return _lines(rows, lambda r: f"{r[0]},{r[1]},{_epoch(r[2])},{r[3]}", "user_id,item_id,timestamp,rating")


def _write_csv(folder: Path, rows: list[Row]) -> None:
    (folder / "ratings.csv").write_bytes(_csv(rows))


def _write_dat(folder: Path, rows: list[Row]) -> None:
    """MovieLens-1M's files."""
    content = _lines(rows, lambda r: f"{r[0][1:]}::{r[1][1:]}::{r[3]:.0f}::{_epoch(r[2])}")
    (folder / "ratings.dat").write_bytes(content)
    movies = [f"{item}::Filmé {item} (19{50 + item})::Drama|War" for item in range(25)]
    (folder / "movies.dat").write_bytes("\n".join(movies).encode("latin-1"))
    (folder / "users.dat").write_text(
        "\n".join(f"{user}::{'MF'[user % 2]}::{user % 7}::1::0{user}" for user in range(30))
    )
    (folder / "README").write_text("about it")


def _write_semicolons(folder: Path, rows: list[Row]) -> None:
    def line(row: Row) -> str:
        value = f"{row[3]:.1f}".replace(".", ",")
        return ";".join(f'"{cell}"' for cell in (row[0], row[1], value, _stamp(row[2], "%d.%m.%Y %H:%M")))

    (folder / "log.csv").write_bytes(_lines(rows, line, '"User-ID";"ISBN";"Book-Rating";"Date"'))


def _write_json(folder: Path, rows: list[Row]) -> None:
    objects = [
        {"user": {"id": r[0]}, "asin": r[1], "at": _stamp(r[2], "%Y-%m-%dT%H:%M:%SZ"), "overall": r[3]} for r in rows
    ]
    (folder / "reviews.json.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, objects)).encode()))
    meta = [{"asin": f"i{n}", "title": f"T {n}", "categories": [["A", "B"]]} for n in range(25)]
    (folder / "meta.json").write_text("\n".join(map(json.dumps, meta)))


def _write_python(folder: Path, rows: list[Row]) -> None:
    objects = [{"username": r[0], "product_id": r[1], "hours": r[3], "date": _stamp(r[2], "%Y-%m-%d")} for r in rows]
    (folder / "reviews.json").write_text("\n".join(map(str, objects)))


def _write_array(folder: Path, rows: list[Row]) -> None:
    objects = [{"visitorid": r[0], "itemid": r[1], "ts": _epoch(r[2]) * 1000, "event": "view"} for r in rows]
    (folder / "events.json").write_text(json.dumps(objects, indent=1))


def _write_parquet_days(folder: Path, rows: list[Row]) -> None:
    for day in range(3):
        (folder / f"dt=2020-01-0{day + 1}").mkdir()
        own = rows[day::3]
        table = pa.table({"customer": [r[0] for r in own], "sku": [r[1] for r in own], "qty": [r[3] for r in own]})
        pq.write_table(table, folder / f"dt=2020-01-0{day + 1}" / "part.parquet")


def _write_delta(folder: Path, rows: list[Row]) -> None:
    table = pa.table({"user_id": [r[0] for r in rows], "item_id": [r[1] for r in rows]})
    times = pa.array([BEGIN + dt.timedelta(seconds=r[2]) for r in rows], pa.timestamp("us", "UTC"))
    write_deltalake(str(folder / "events"), table.append_column("event_time", times))


def _write_recbole(folder: Path, rows: list[Row]) -> None:
    head = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    content = _lines(rows, lambda r: f"{r[0]}\t{r[1]}\t{r[3]}\t{_epoch(r[2])}", head)
    (folder / "set.inter").write_bytes(content)
    items = [f"i{n}\tThe {n}\t{1950 + n}\tDrama War" for n in range(25)]
    head = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
    (folder / "set.item").write_text("\n".join([head, *items]))


def _write_zip(folder: Path, rows: list[Row]) -> None:
    with zipfile.ZipFile(folder / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("set/README.txt", "about it")
        archive.writestr("set/ratings.csv", _csv(rows))
        archive.writestr("set/movies.csv", "movieId,title\n" + "".join(f"i{n},T {n} (1990)\n" for n in range(25)))


def _write_user_lines(folder: Path, rows: list[Row]) -> None:
    users = dict.fromkeys(row[0] for row in rows)
    lines = [" ".join([user[1:], *(r[1][1:] for r in rows if r[0] == user)]) for user in users]
    (folder / "Beauty.txt").write_text("\n".join(lines))


def _write_matrix(folder: Path, rows: list[Row]) -> None:
    cells = {(r[0], r[1]): str(r[3]) for r in rows}
    lines = [",".join([f"u{u}", *(cells.get((f"u{u}", f"i{n}"), "") for n in range(25))]) for u in range(30)]
    (folder / "m.csv").write_text("\n".join([",".join(["user", *(f"i{n}" for n in range(25))]), *lines]))


def _write_impressions(folder: Path, rows: list[Row]) -> None:
    for part, own in (("train", rows[::2]), ("dev", rows[1::2])):
        (folder / part).mkdir()
        at = "%m/%d/%Y %I:%M:%S %p"
        lines = [f"{n}\t{r[0]}\t{_stamp(r[2], at)}\t\t{r[1]}-1" for n, r in enumerate(own)]
        lines = [line.replace("\t\t", "\tN1 N2\t") + " N7-0" * (n % 2) for n, line in enumerate(lines)]
        (folder / part / "behaviors.tsv").write_text("\n".join(lines))


def _write_sessions(folder: Path, rows: list[Row]) -> None:
    users: dict[str, list[Row]] = {}
    for row in rows:
        users.setdefault(row[0], []).append(row)
    objects = [
        {"session": user, "events": [{"aid": r[1], "ts": _epoch(r[2]) * 1000, "type": "clicks"} for r in own]}
        for user, own in users.items()
    ]
    (folder / "sessions-1.jsonl").write_text("\n".join(map(json.dumps, objects[::2])))
    (folder / "sessions-2.jsonl").write_text("\n".join(map(json.dumps, objects[1::2])))


def _write_counts(folder: Path, rows: list[Row]) -> None:
    (folder / "user_artists.dat").write_bytes(
        _lines(rows, lambda r: f"{r[0][1:]}\t{r[1][1:]}\t{r[2] % 900}", f"30\n{len(rows)}")
    )
    (folder / "artists.dat").write_text("id\tname\n" + "".join(f'{n}\tThe "{n}" Band\n' for n in range(25)))
    (folder / "user_friends.dat").write_text("2\n2\n" + "".join(f"{n}\t{(n + 1) % 30}\n" for n in range(30)))


def _write_review_texts(folder: Path, rows: list[Row]) -> None:
    content = _lines(rows, lambda r: f'{r[0]},{r[1]},"line one\nline ""two""",{_epoch(r[2])}', "user,item,review,time")
    (folder / "a.csv").write_bytes(content)


def _write_lastfm1k(folder: Path, rows: list[Row]) -> None:
    name = "userid-timestamp-artid-artname-traid-traname.tsv"
    line = "{}\t{}\t{}\tName of it\t\tF (Live)"
    (folder / name).write_bytes(_lines(rows, lambda r: line.format(r[0], _stamp(r[2], "%Y-%m-%dT%H:%M:%SZ"), r[1])))


SHAPES: dict[str, Callable[[Path, list[Row]], None]] = {
    name.removeprefix("_write_"): function for name, function in list(globals().items()) if name.startswith("_write_")
}
# Shape -> what its times are, where it has any.
UNTIMED = {"user_lines", "matrix", "counts"}
DAYS = {"python", "parquet_days"}


def _guess(folder: Path) -> tuple[dict[str, Any], str]:
    text = configuration(survey(str(folder)), str(folder))
    return yaml.safe_load(text), text


@pytest.mark.parametrize("shape", SHAPES)
def test_the_guess_reads_every_row(tmp_path: Path, shape: str) -> None:
    rows = _events()
    SHAPES[shape](tmp_path, rows)
    guessed, text = _guess(tmp_path)
    config = EtlConfig.model_validate(guessed).source
    assert isinstance(config, LogSource)
    log = FileLog(config, CleaningConfig())
    found = read_rows(log, "events")
    assert [row["reason"] for row in found if row["reason"]] == [], text
    pairs = {(row["user"].removeprefix("u"), row["item"].removeprefix("i")) for row in found}
    expected = {(r[0].removeprefix("u"), r[1].removeprefix("i")) for r in rows}
    assert expected <= pairs, text
    assert shape == "impressions" or len(found) == len(rows), text
    if shape not in {*UNTIMED, *DAYS, "semicolons", "impressions"}:
        assert sorted(row["time"] for row in found) == sorted(_epoch(r[2]) * 1_000_000 for r in rows), text
    assert (log.time == "ordinal") == (shape in UNTIMED), text
    for kind in ("items", "users"):
        if getattr(config, kind) is not None:
            assert all(row["reason"] is None for row in read_rows(log, kind)), text


def test_what_lies_beside_the_log_and_what_is_doubtful_is_said(tmp_path: Path) -> None:
    _write_dat(tmp_path, _events())
    guessed, text = _guess(tmp_path)
    assert guessed["source"]["items"] | {"path": ""} == {
        "path": "",
        "separator": "::",
        "quote": None,
        "header": False,
        "encoding": "latin-1",
        "id": 0,
        "title": 1,
        "year": "title",
        "categories": 2,
    }
    assert guessed["source"]["users"]["attributes"] == {"column1": 1, "column2": 2}
    assert "#   - {name: drama, any_of: [Drama]}   # 25 items" in text
    assert "# ? no name shows the users: column 0 is taken" in text
    assert "require_known_items" not in text


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    lines = _csv(_events()).decode().split("\n")
    lines[3], lines[7] = "u1,i2,soon,1", "u1,i2"
    (tmp_path / "a.csv").write_text("\n".join(lines))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(_csv(_events())))
    (tmp_path / "b.bin").write_bytes(b"\0\1")
    _, text = _guess(tmp_path)
    assert "1 of the first 269 rows are rejected: time can't be read (first in a.csv line 4)" in text
    assert "1 of the first 269 rows are rejected: expected 4 fields, found 2 (first in a.csv line 8)" in text
    assert "# ? not used: a.csv.gz (it is packed, and stands unpacked beside it)" in text
    assert "# ? not used: b.bin (b.bin: expected text, Parquet or a packed file, found other bytes)" in text
    assert "time_unit: s" in text


def test_a_pattern_that_is_guessed_reads_the_times() -> None:
    draw = random.Random(1)
    for form in draw.sample(PATTERNS, 40):
        moments = [BEGIN.replace(tzinfo=dt.UTC) + dt.timedelta(seconds=draw.randrange(10**8)) for _ in range(40)]
        words = [moment.strftime(form) for moment in moments]
        times = guess_times(words)
        assert times is not None, words[:3]
        if (guessed := times.settings.get("time_format")) is not None:
            read = [dt.datetime.strptime(word, guessed) for word in words]
            assert read == [dt.datetime.strptime(word, form) for word in words] or "fits as well" in str(times.doubts)


@pytest.mark.parametrize(
    "text", ["a b", "é", "\U0001f600", "\u2028", "\x7f", "null", "007", "- x", "x: y", "#", "", "\ufeff"]
)
def test_yaml_gives_a_text_back(text: str) -> None:
    assert yaml.safe_load(f"[{yaml_text(text)}]") == [text]


def test_units_zones_and_numbers_that_are_no_times() -> None:
    seconds = [1_500_000_000 + n for n in range(20)]
    for unit, factor in (("s", 1), ("ms", 1_000), ("us", 10**6), ("ns", 10**9)):
        times = guess_times([str(second * factor) for second in seconds])
        assert times is not None
        assert times.settings == {"time_unit": unit}
    assert guess_times(list(range(20))) is None
    assert guess_times(["a", "b"]) is None
    named = guess_times(["2015-07-01 08:00:00 EDT"] * 3)
    assert named is not None
    assert "name zones" in named.doubts[0]


@pytest.mark.parametrize("form", FORMATS)
def test_no_bytes_end_in_a_traceback(tmp_path: Path, form: str) -> None:
    name, _, content = FORMATS[form]
    for seed in range(3):
        draw = random.Random(f"guess {form} {seed}")
        written = spoilt_bytes(content(rows_of(draw, draw.choice([1, 30]))), draw)
        (tmp_path / name).write_bytes(written)
        try:
            guessed, refusal = _guess(tmp_path)[0], ""
        except GraftrecError as error:
            guessed, refusal = {}, str(error)
        if refusal:
            assert "\n" not in refusal, written
            assert name in refusal, written
        else:
            EtlConfig.model_validate(guessed)


def test_the_command_prints_yaml_or_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write_csv(tmp_path, _events())
    assert main(["guess", str(tmp_path)]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["source"]["events"]["path"] == "ratings.csv"
    assert main(["guess", str(tmp_path / "nowhere")]) == 2
    assert re.fullmatch(r"etl: .*nowhere: expected a log, .* found no file; .*\n", capsys.readouterr().err)
    for words in (["guess"], ["guess", str(tmp_path), "--lake", "x"], ["all", str(tmp_path), "--config", "etl/demo"]):
        with pytest.raises(SystemExit, match="2"):
            main(words)


@pytest.mark.slow
def test_what_is_guessed_runs_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("pysail")
    (tmp_path / "log").mkdir()
    _write_dat(tmp_path / "log", _events())
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "etl"]
    guessed = subprocess.run([*command, "guess", "log"], cwd=tmp_path, env=environment, capture_output=True, check=True)
    (tmp_path / "my.yaml").write_bytes(guessed.stdout)
    words = ["all", "--config", "my.yaml", "--spark.engine", "sail"]
    done = subprocess.run(
        [*command, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "270 events after cleaning" in done.stdout


@pytest.mark.parametrize("name", LOGS)
def test_a_line_of_each_public_log_is_enough_for_a_guess(tmp_path: Path, name: str) -> None:
    write_log(tmp_path, LOGS[name][0])
    try:
        guessed = _guess(tmp_path)[0]
    except GraftrecError as error:
        refusal = str(error)
    else:
        refusal = ""
        EtlConfig.model_validate(guessed)
    assert "\n" not in refusal
    assert refusal == "" or name in ("lastfm", "jester")  # of which a line alone shows too little
