"""Two runs at once on one lake: one after the other, or one of them ends with "run again"; never a mixture."""

import os
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
import yaml

from etl.config import EtlConfig
from etl.pipeline.run import JOBS
from tests.fixtures.places import ROOT

DAYS = {"a": range(8), "b": range(3, 14)}  # users of either log


def _configure(folder: Path, name: str) -> Path:
    """The configuration of the log `name`, with the lake that both logs are written to."""
    (folder / name).mkdir()
    rows = [f"u{user},i{item},{1_000 + item}\n" for user in DAYS[name] for item in range(6)]
    (folder / name / "log.csv").write_text("user,item,ts\n" + "".join(rows))
    config = {
        "lake": str(folder / "lake"),
        "source": {
            "kind": "log",
            "root": str(folder / name),
            "events": {"path": "log.csv", "columns": {"user": "user", "item": "item", "time": "ts"}},
        },
        "kcore": {"min_user": 2, "min_item": 2},
        "splits": [{"name": "last-2", "validation": 1, "test": 1}],
        "spark": {"engine": "sail"},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _users(lake: Path, release: dict[str, int], table: str) -> set[str]:
    """Raw ids of the users in a table as a release has it."""
    names = pl.read_delta(str(lake / "users"), version=release["users"]).select("index", "user")
    if table == "interactions":
        return set(pl.read_delta(str(lake / table), version=release[table])["user"])
    rows = pl.read_delta(str(lake / table), version=release[table]).select(index="user")
    return set(rows.join(names, on="index")["user"])


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("offset", [0.0, 0.5, 1.0, 1.5])
def test_two_runs_with_different_logs_never_mix(offset: float, tmp_path: Path) -> None:
    configs = [_configure(tmp_path, name) for name in DAYS]
    running = []
    for number, config in enumerate(configs):
        if number:
            time.sleep(offset)
        command = [sys.executable, "-m", "etl", "all", "--config", str(config)]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT))
    told = [process.communicate(timeout=300) for process in running]
    codes = [process.returncode for process in running]
    # The later run may find that the lake holds another log's files.
    assert sorted(codes)[0] == 0, told
    assert set(codes) <= {0, 2, 5}, told
    assert all(err.count("\n") == (code != 0) for (_, err), code in zip(told, codes, strict=True)), told
    lake = tmp_path / "lake"
    for row in pl.read_delta(str(lake / "releases")).to_dicts():
        release = {entry["table"]: entry["version"] for entry in row["tables"]}
        assert release.keys() >= {job.name for job in JOBS}
        logs = {_log_of(_users(lake, release, table)) for table in ("interactions", "sequences")}
        source = EtlConfig.model_validate_json(row["config"]).source
        assert logs <= {Path(source.root).name, "both"}, (logs, release)
        assert len(logs) == 1, (logs, release)


INTERRUPTED = """
import subprocess, sys
from etl.__main__ import main
from etl.pipeline import run as pipeline
real, rival = pipeline.run_job, sys.argv[2:]

def run_job(job, engine, **named):
    outcome = real(job, engine, **named)
    if job.name == "interactions":
        print("rival ended with", subprocess.run(rival, stdout=subprocess.DEVNULL).returncode, flush=True)
    return outcome

pipeline.run_job = run_job
sys.exit(main(["all", "--config", sys.argv[1]]))
"""


@pytest.mark.slow
def test_a_run_between_another_runs_jobs_waits(tmp_path: Path) -> None:
    first, second = (_configure(tmp_path, name) for name in DAYS)
    rival = [sys.executable, "-m", "etl", "all", "--config", str(second), "--wait_seconds", "0.5"]
    command = [sys.executable, "-c", INTERRUPTED, str(first), *rival]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    release = pl.read_delta(str(tmp_path / "lake" / "releases")).sort("release").to_dicts()[-1]
    versions = {entry["table"]: entry["version"] for entry in release["tables"]}
    users = {table: _users(tmp_path / "lake", versions, table) for table in ("interactions", "sequences")}
    assert users["interactions"] == users["sequences"]
    assert "rival ended with 5" in done.stdout


def _log_of(users: set[str]) -> str:
    for name, numbers in DAYS.items():
        if users == {f"u{number}" for number in numbers}:
            return name
    return "both" if users == {f"u{n}" for numbers in DAYS.values() for n in numbers} else f"neither: {sorted(users)}"


def test_a_run_ends_with_5_where_another_is_writing(tmp_path: Path) -> None:
    config = _configure(tmp_path, "a")
    hold = (
        "import sys; from etl.lake.lease import writing; from etl.tables import RELEASES\n"
        "with writing(sys.argv[1], RELEASES):\n    print('holding', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "lake")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holding\n"
        for job in ("all", "items"):
            done = subprocess.run(
                [sys.executable, "-m", "etl", job, "--config", str(config), "--wait_seconds", "0.1"],
                capture_output=True,
                text=True,
                timeout=120,
                cwd=ROOT,
                env={**os.environ},
            )
            assert done.returncode == 5
            assert f"found process {holder.pid} of" in done.stderr
            assert done.stderr.count("\n") == 1
        holder.kill()
    assert sorted(path.name for path in (tmp_path / "lake").iterdir()) == [".writer"]
