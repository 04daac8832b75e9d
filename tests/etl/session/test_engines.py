"""The engines leave the same tables, row for row and file for file as the contract has them: Spark, a Spark Connect
server, and Sail.

A process has one engine, so each run that isn't on the shared Spark is a command of its own.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pyspark
import pytest
import yaml
from pyspark.sql import SparkSession

from etl.__main__ import main
from etl.config import SparkConfig
from etl.lake import spark_io
from etl.pipeline.run import JOBS
from etl.session import choose_engine, num_bytes
from etl.settings import ConfigError
from etl.tables import DELIVERIES, QUARANTINE, RELEASES, TABLES, Table
from tests.fixtures.places import ROOT
from tests.fixtures.ports import free_port

# When, where and on what a release was made, and when a file came.
DIFFERS = {RELEASES.name: ["created", "config", "config_hash"], DELIVERIES.name: ["delivered"]}
WRITTEN = [*(job.table for job in JOBS), QUARANTINE, RELEASES]
GENERATED = {
    "source": {"kind": "generator", "users": 120, "items": 80, "mean_events": 25},
    "domains": [{"name": "source", "any_of": ["source"]}, {"name": "target", "any_of": ["target"]}],
}


def _log(folder: Path) -> dict[str, Any]:
    """Files of several formats, with rows that can't be used, and the configuration that reads them."""
    days = folder / "days"
    days.mkdir(parents=True)
    (days / "day1.dat").write_text(_day(1, users=range(24)), encoding="utf-8")
    titles = ["Ōkami::Night", "Fargo", "Solaris", "Alien", "Brazil", "Gattaca", "Heat", "Ikiru", "Jaws", "Kes"]
    items = [
        {
            "id": f"i{k}",
            "name": f"{title} ({1980 + k})",
            "tags": "Drama|War" if k % 3 else "Comedy",
            "studio": f"s{k % 2}",
        }
        for k, title in enumerate(titles)
    ]
    lines = [json.dumps(item, ensure_ascii=False) for item in items]
    (folder / "items.jsonl").write_text("\n".join([*lines, "{torn"]) + "\n", encoding="utf-8")
    users = pl.DataFrame({"user": [f"ü{k}" for k in range(20)], "age": [18 + k % 5 for k in range(20)]})
    users.write_parquet(folder / "users.parquet")
    edges = [f"ü{k}\tü{(k * 7 + 1) % 24}\t{1 + k % 3}" for k in range(24)]
    (folder / "edges.tsv").write_text("\n".join([*edges, "ü1\tü2\tnear"]) + "\n", encoding="utf-8")
    films = [f"{title}|{1980 + k}|Director {k % 4}|Actor {k}|Actor {k % 2}" for k, title in enumerate(titles)]
    (folder / "films.txt").write_text("title|year|director|first|second\n" + "\n".join(films) + "\n", encoding="utf-8")
    columns = {"user": 0, "time": 2, "event_type": 3, "value": 4, "basket": 5}
    explode = [{"columns": {"item": 1}, "separator": "+"}]
    return {
        "source": {
            "kind": "log",
            "root": str(folder),
            "events": {"path": "days", "separator": "::", "header": False, "columns": columns, "explode": explode},
            "items": {
                "path": "items.jsonl",
                "format": "json",
                "id": "id",
                "title": "name",
                "year": "title",
                "categories": "tags",
                "attributes": {"studio": "studio"},
            },
            "users": {"path": "users.parquet", "format": "parquet", "id": "user", "attributes": {"age": "age"}},
            "edges": {
                "path": "edges.tsv",
                "separator": "\t",
                "header": False,
                "user": 0,
                "friend": 1,
                "weight": 2,
            },
        },
        "knowledge": {
            "root": str(folder),
            "files": [
                {
                    "name": "films",
                    "path": "films.txt",
                    "separator": "|",
                    "by": "title",
                    "title": "title",
                    "year": "year",
                    "relations": {"director": ["director"], "actor": ["first", "second"]},
                }
            ],
        },
        "cleaning": {"max_quarantine_share": 0.2},
        "kcore": {"min_user": 5, "min_item": 4},
        "domains": [
            {"name": "drama", "any_of": ["Drama"]},
            {"name": "comedy", "none_of": ["Drama"]},
            {"name": "studio", "attribute": "studio", "any_of": ["s1"]},
        ],
        "splits": [
            {"name": "last-2", "validation": 1, "test": 1},
            {"name": "causal", "validation": 1, "test": 1, "causal_target": "comedy"},
            {"name": "cold", "cold_users": 0.3, "joint_target": "comedy", "causal_target": "comedy"},
        ],
        "negatives": {"protocols": ["uniform-100", "popular-100", "top-100"]},
        "buckets": 3,
    }


def _day(day: int, users: range) -> str:
    draw = random.Random(day)
    lines = []
    for user in users:
        for number in range(draw.randint(3, 12)):
            item, at = f"i{draw.randint(0, 9)}", 1_000_000 + day * 86_400 + draw.randint(0, 50)
            kind, value = draw.choice(["view", "buy", ""]), draw.choice(["1", "2.5", ""])
            lines.append(f"ü{user}::{item}::{at}::{kind}::{value}::{f'b{number // 3}' if user % 2 else ''}")
    bad = ["torn", f"ü1::i99::{1_000_000 + day}::view::1::", "ü1::i1::yesterday::view::1::", "::i1::5::view::1::"]
    return "\n".join([*lines, *lines[:5], f"ü2::i1+i2 +i3::{1_000_000 + day}::view::1::b0", *bad]) + "\n"


def _configure(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "etl.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    return path


def _run(config: Path, lake: Path, *settings: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m etl all` in a process of its own."""
    command = [sys.executable, "-m", "etl", "all", "--config", str(config), "--lake", str(lake), *settings]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SPARK", "PYSPARK", "SAIL"))}
    return subprocess.run(
        command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, timeout=500, check=False
    )


def _command(config: Path, lake: Path, *settings: str, **environment: str) -> str:
    """As _run, of a run that must end well; gives what it said."""
    done = _run(config, lake, *settings, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def _rows(lake: Path, table: Table) -> list[str]:
    found = pl.read_delta(str(lake / table.name)).select(table.schema.names).drop(DIFFERS.get(table.name, []))
    return sorted(map(repr, found.rows()))


def _assert_same(lake: Path, other: Path) -> None:
    for table in WRITTEN:
        assert _rows(lake, table) == _rows(other, table), table.name
    assert set(TABLES) - {table.name for table in WRITTEN} == {
        "recommendations",
        "served",
        "features",
    }  # none of the ETL is forgotten


def _assert_layout(lake: Path) -> None:
    """Zstd, a row group's bounds, hive folders, rows sorted within each file."""
    for table in WRITTEN:
        files = spark_io.snapshot_files(str(lake), table)
        assert files or table is QUARANTINE, table.name
        for file in files:
            folders = [f"{name}={file.partition[name]}" for name in table.partition_by]
            assert [part.partition("=")[0] for part in file.path.split("/")[:-1]] == list(table.partition_by), folders
            read = pq.ParquetFile(lake / table.name / file.path)
            groups = [read.metadata.row_group(k) for k in range(read.num_row_groups)]
            assert {group.column(0).compression for group in groups} == {"ZSTD"}
            assert all(0 < group.num_rows <= spark_io.ROW_GROUP_ROWS for group in groups)
            keys = [tuple(row.values()) for row in read.read(list(table.order)).to_pylist()]
            assert keys == sorted(keys, key=_nulls_first), (table.name, file.path)


def _nulls_first(key: tuple[Any, ...]) -> list[Any]:
    return [(value is not None, value.encode() if isinstance(value, str) else value) for value in key]


def test_sail_leaves_what_spark_leaves(tmp_path: Path, spark: SparkSession) -> None:
    config = _configure(tmp_path, _log(tmp_path))
    assert main(["all", "--config", str(config), "--lake", str(tmp_path / "spark")]) == 0
    # Nothing on the PATH, so no Java: what runs by default.
    said = _command(config, tmp_path / "sail", PATH=str(tmp_path), JAVA_HOME="")
    assert "going on with Sail" in said
    assert "rows of interactions quarantined" in said
    assert len(_rows(tmp_path / "sail", QUARANTINE)) == 6
    _assert_same(tmp_path / "spark", tmp_path / "sail")
    _assert_layout(tmp_path / "sail")
    cold = pl.read_delta(str(tmp_path / "sail" / "sequences")).filter(split="cold", domain="comedy", valid_start=0)
    assert set(cold["test_start"] == 0) == {True, False}  # users held out for test, and for validation


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Spark Connect server on a free port of the loopback; gives its address."""
    home, folder = Path(pyspark.__file__).parent, tmp_path_factory.mktemp("connect")
    (jar,) = (home / "jars").glob("spark-connect_*.jar")
    port = free_port()
    settings = {
        "spark.connect.grpc.binding.address": "127.0.0.1",
        "spark.connect.grpc.binding.port": str(port),
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.defaultJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
        "spark.ui.enabled": "false",
    }
    options = [word for key, value in settings.items() for word in ("--conf", f"{key}={value}")]
    name = "org.apache.spark.sql.connect.service.SparkConnectServer"
    command = [home / "bin" / "spark-submit", "--master", "local[2]", "--class", name, *options, jar]
    environment = os.environ | {
        "SPARK_HOME": str(home),
        "PYSPARK_PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "SPARK_LOCAL_IP": "127.0.0.1",
    }
    environment.pop("PYSPARK_GATEWAY_PORT", None)
    with (folder / "log").open("w") as log:
        started = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    try:
        for _ in range(600):
            if "Spark Connect server started" in (folder / "log").read_text():
                break
            assert started.poll() is None, (folder / "log").read_text()
            time.sleep(0.2)
        else:
            pytest.fail("no Spark Connect server after two minutes: " + (folder / "log").read_text()[-2_000:])
        yield f"sc://127.0.0.1:{port}"
    finally:
        started.terminate()
        started.wait(30)


@pytest.mark.slow
def test_all_engines_leave_the_same_after_a_new_day(tmp_path: Path, server: str, spark: SparkSession) -> None:
    log = _log(tmp_path)
    log["source"]["events"] |= {"keep": ["view", "buy"], "weights": {"buy": 2.0}, "until": "1970-01-20"}
    config = _configure(tmp_path, log)
    days = {day: _day(day, users=range(18 * (day - 1), 20 + 6 * day)) for day in (1, 2)}
    steps = [(1, days[1], "new lake"), (2, days[2], "1 new file(s)")]
    steps.append((1, days[1].replace("::yesterday::", "::1086425::"), "1 mended file(s)"))
    for day, content, step in steps:
        (tmp_path / "days" / f"day{day}.dat").write_text(content, encoding="utf-8")
        assert main(["all", "--config", str(config), "--lake", str(tmp_path / "spark")]) == 0
        said = _command(config, tmp_path / "connect", "--spark.master", server)
        assert (step in said) == (step != "new lake")
        _command(config, tmp_path / "sail", "--spark.engine", "sail")
        for name in ("connect", "sail"):
            _assert_same(tmp_path / "spark", tmp_path / name)
            _assert_layout(tmp_path / name)


@pytest.mark.slow
def test_a_lake_of_one_engine_is_gone_on_with_by_another(tmp_path: Path, spark: SparkSession) -> None:
    config = _configure(tmp_path, _log(tmp_path))
    for day in (1, 2):
        (tmp_path / "days" / f"day{day}.dat").write_text(
            _day(day, users=range(18 * (day - 1), 20 + 6 * day)), encoding="utf-8"
        )
        of_spark, of_sail = ("one", "other") if day == 1 else ("other", "one")
        assert main(["all", "--config", str(config), "--lake", str(tmp_path / of_spark)]) == 0
        _command(config, tmp_path / of_sail, "--spark.engine", "sail")
    _assert_same(tmp_path / "one", tmp_path / "other")


@pytest.mark.slow
def test_all_engines_leave_the_same_of_a_generated_log(tmp_path: Path, server: str) -> None:
    config = _configure(tmp_path, GENERATED)
    _command(config, tmp_path / "spark", "--spark.engine", "spark")
    _command(config, tmp_path / "connect", "--spark.engine", "connect", SPARK_REMOTE=server)
    _command(config, tmp_path / "sail", "--spark.engine", "sail", "--spark.master", "local[3]")
    for name in ("connect", "sail"):
        _assert_same(tmp_path / "spark", tmp_path / name)
        _assert_layout(tmp_path / name)


def test_choose_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("SPARK_REMOTE", "PYSPARK_GATEWAY_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert choose_engine(SparkConfig()) == "spark"
    assert choose_engine(SparkConfig(master="sc://host:15002")) == "connect"
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert choose_engine(SparkConfig()) == "sail"
    assert "going on with Sail" in capsys.readouterr().err
    assert choose_engine(SparkConfig(master="spark://host:7077")) == "spark"
    assert choose_engine(SparkConfig(engine="spark")) == "spark"
    monkeypatch.setenv("SPARK_REMOTE", "sc://host:15002")
    assert choose_engine(SparkConfig()) == "connect"
    assert choose_engine(SparkConfig(engine="sail")) == "sail"


@pytest.mark.parametrize(("text", "size"), [("1g", 1 << 30), ("512m", 512 << 20), ("2GB", 2 << 30), ("1024", 1024)])
def test_num_bytes(text: str, size: int) -> None:
    assert num_bytes(text) == size


def test_num_bytes_refuses_what_is_no_size() -> None:
    with pytest.raises(ConfigError, match="expected a size"):
        num_bytes("much")


@pytest.mark.parametrize(
    ("engine", "said"), [("spark", "Spark needs Java"), ("connect", "name the server"), ("duck", "spark.engine")]
)
def test_an_engine_that_cannot_be_had_is_told_in_a_line(tmp_path: Path, engine: str, said: str) -> None:
    config = _configure(tmp_path, GENERATED)
    done = _run(config, tmp_path / "lake", "--spark.engine", engine, PATH=str(tmp_path), JAVA_HOME="")
    assert (done.returncode, said in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr
