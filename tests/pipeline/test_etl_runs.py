"""Slow checks of whole runs: kills at random moments, and the real logs where they are."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from pyspark.sql import SparkSession

from etl.__main__ import main
from etl.pipeline.report import Report, make_report
from etl.pipeline.run import JOBS

DATA = Path(__file__).parents[2].parent / "shared" / "data"
SMALL = {
    "source.users": "120",
    "source.items": "80",
    "source.mean_events": "20",
    "negatives.protocols": "[uniform-100, popular-100, top-100]",
    "splits": "[{name: last-5}, {name: causal, causal_target: target}]",
    "spark.master": "local[2]",
}


def _command(lake: Path, *options: str) -> list[str]:
    overrides = [word for key, value in SMALL.items() for word in (f"--{key}", value)]
    return ["all", "--config", "etl/demo", "--lake", str(lake), *overrides, *options]


def _contents(lake: Path) -> dict[str, pl.DataFrame]:
    """Every table but `releases`, in an order that doesn't depend on files."""
    found = {}
    for name in [*(job.name for job in JOBS), "quarantine"]:
        table = pl.read_delta(str(lake / name))
        scalars = [column for column in sorted(table.columns) if not isinstance(table[column].dtype, pl.List)]
        found[name] = table.select(sorted(table.columns)).sort(scalars)
    return found


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_tables(tmp_path: Path, spark: SparkSession) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "etl", *_command(whole)], check=True, timeout=900)
    seconds = time.monotonic() - began
    draw = random.Random(11)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-m", "etl", *_command(killed)], start_new_session=True, stdout=subprocess.DEVNULL
        )
        try:
            process.wait(timeout=draw.uniform(0.2, 0.9) * seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert main(_command(killed)) == 0
    expected, found = _contents(whole), _contents(killed)
    for name, table in expected.items():
        assert found[name].equals(table, null_equal=True), name
    releases = pl.read_delta(str(killed / "releases"))
    assert releases["release"].to_list() == list(range(1, len(releases) + 1))


def _report(lake: Path, *options: str) -> Report:
    assert main(["all", "--config", "etl/demo", "--lake", str(lake), "--spark.master", "local[2]", *options]) == 0
    return make_report(str(lake))


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "ml-1m").is_dir(), reason="MovieLens-1M is not at ../shared/data/ml-1m")
def test_movielens_1m_gives_the_surveys_table_1(tmp_path: Path, spark: SparkSession) -> None:
    roots = ["--source.root", str(DATA / "ml-1m"), "--knowledge.root", str(DATA)]
    report = _report(tmp_path / "lake", "--config", "etl/ml1m", *roots)
    table = {domain.name: (domain.users, domain.items, domain.interactions) for domain in report.domains}
    assert table == {
        "all": (6_040, 3_416, 999_611),
        "source": (6_040, 2_349, 724_131),
        "target": (5_983, 1_067, 275_480),
    }
    everything, _, target = report.domains
    assert target.held_out_users == 5_306
    assert everything.average_length == pytest.approx(165.5, abs=0.05)
    assert 1_000 <= everything.covered["imdb"] <= 1_100
    assert 2_700 <= report.related["director"] <= 2_850
    assert (report.duplicates, len(report.rejected)) == (0, 0)
    negatives = pl.read_delta(str(tmp_path / "lake" / "negatives"))
    assert (negatives["items"].list.n_unique() == 100).all()
    seen = pl.read_delta(str(tmp_path / "lake" / "sequences")).select("split", "domain", "user", seen="items")
    both = negatives.join(seen, on=["split", "domain", "user"])
    both = both.select(pl.col("items").list.set_intersection("seen").list.len())
    assert len(both) == len(negatives)
    assert both["items"].sum() == 0


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "ml-100k").is_dir(), reason="MovieLens-100K is not at ../shared/data/ml-100k")
def test_movielens_100k_needs_no_code_of_its_own(tmp_path: Path, spark: SparkSession) -> None:
    report = _report(tmp_path / "lake", "--config", "etl/ml100k", "--source.root", str(DATA / "ml-100k"))
    assert report.events == 100_000
    assert report.domains[0].users == 943
    titles = pl.read_delta(str(tmp_path / "lake" / "items"))["title"]
    assert titles.str.contains("é").any()


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "lastfm-2k").is_dir(), reason="Last.fm is not at ../shared/data/lastfm-2k")
def test_lastfm_brings_friends(tmp_path: Path, spark: SparkSession) -> None:
    report = _report(tmp_path / "lake", "--config", "etl/lastfm", "--source.root", str(DATA / "lastfm-2k"))
    assert report.events == 92_834
    social = pl.read_delta(str(tmp_path / "lake" / "social"))
    assert len(social) == 2 * 12_717
