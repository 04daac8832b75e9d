"""The embedded store is whole or not there, wherever a process that was making it died."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.places import ROOT
from tests.fixtures.stores import enter_store, runs_of
from trainer import tracking
from trainer.config import PretrainConfig, TrackingConfig
from trainer.tracking import start_run
from trainer.tracking.store import sqlite_file

QUIET = TrackingConfig(system_metrics=False, close_seconds=60)

# Dies at the n-th statement of MLflow's migrations that fills a temporary table: the next open of such a store fails.
DYING = """
import os, signal, sqlalchemy
seen = []
@sqlalchemy.event.listens_for(sqlalchemy.engine.Engine, "before_cursor_execute")
def die(connection, cursor, statement, *rest):
    if "INSERT INTO _alembic_tmp_" in statement:
        seen.append(statement)
        if len(seen) == {number}:
            os.kill(os.getpid(), signal.SIGKILL)
"""
RUN = """
from trainer.config import PretrainConfig, TrackingConfig
from trainer.tracking import start_run
with start_run(TrackingConfig(system_metrics=False, close_seconds={seconds}), name="first", resolved=PretrainConfig()) as run:
    run.log_metrics({{"loss": 1.0}})
"""  # noqa: E501


@pytest.fixture
def empty(tmp_path, monkeypatch):
    enter_store(tmp_path, monkeypatch)
    (tmp_path / "mlflow.db").unlink()
    return tmp_path


def in_process(script, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def a_run_is_taken(folder):
    with start_run(QUIET, name="next", resolved=PretrainConfig()):
        pass
    found = runs_of(folder)
    assert found["next"].info.status == "FINISHED"
    assert [path.name for path in folder.glob("mlflow.db.new*")] == []
    return found


@pytest.mark.parametrize("number", [1, pytest.param(9, marks=[pytest.mark.slow])])
def test_a_store_whose_maker_was_killed_is_made_by_the_next(number, empty):
    killed = in_process(DYING.format(number=number) + "from trainer import tracking\ntracking.connect()", empty)
    assert killed.returncode == -9, killed.stderr
    assert not (empty / "mlflow.db").exists()
    a_run_is_taken(empty)


def test_a_store_that_others_left_half_made_is_set_aside(empty, capfd):
    script = "from mlflow import MlflowClient\nMlflowClient('sqlite:///mlflow.db').search_experiments()"
    assert in_process(DYING.format(number=3) + script, empty).returncode == -9
    assert (empty / "mlflow.db").stat().st_size
    a_run_is_taken(empty)
    assert "half made" in capfd.readouterr().err
    assert (empty / "mlflow.db.broken-1").is_file()


def test_a_store_that_holds_something_is_never_set_aside(empty):
    with sqlite3.connect(empty / "mlflow.db") as connection:
        connection.execute("CREATE TABLE runs (run_uuid TEXT)")
        connection.execute("INSERT INTO runs VALUES ('one')")
    with pytest.raises(tracking.TrackingError, match="can't"), tracking.translated("can't open"):
        tracking.connect()
    assert not list(empty.glob("*.broken-*"))
    (empty / "mlflow.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(tracking.TrackingError, match="not a database"), tracking.translated("can't open"):
        tracking.connect()
    assert not list(empty.glob("*.broken-*"))


def test_a_run_that_ends_while_the_store_is_made_is_sent_by_the_next(empty):
    slow = (
        "import time\nfrom trainer.tracking import connection as tracking\nmake = tracking._make_store\n"
        "tracking._make_store = lambda path: (make(path), open('made', 'w'), time.sleep(60))\n"
    )
    until_made = "    while not os.path.exists('made'):\n        time.sleep(0.05)\n"
    done = in_process("import os\n" + slow + RUN.format(seconds=0) + until_made, empty)
    assert done.returncode == 0, done.stderr
    assert not (empty / "mlflow.db").exists()
    first = a_run_is_taken(empty)["first"]
    assert (first.info.status, first.data.metrics["loss"]) == ("FINISHED", 1.0)


@pytest.mark.slow
@pytest.mark.ci
def test_a_full_disk_while_the_store_is_made_leaves_nothing_half(empty):
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
    done = in_process(limit + RUN.format(seconds=8), empty)
    assert done.returncode == 0, done.stderr
    assert "MLflow does not answer" in done.stderr
    assert not (empty / "mlflow.db").exists()
    assert a_run_is_taken(empty)["first"].info.status == "FINISHED"


@pytest.mark.parametrize(
    ("uri", "file"),
    [
        ("sqlite:////a/b.db", "/a/b.db"),
        ("sqlite+pysqlite:////a/b.db?timeout=9", "/a/b.db"),
        ("sqlite:///b.db", "b.db"),
        ("postgresql://host/name", None),
        ("http://host:5000", None),
    ],
)
def test_the_file_of_a_stores_uri(uri, file):
    assert sqlite_file(uri) == (None if file is None else Path(file).absolute())
