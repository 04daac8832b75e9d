"""SIGINT and SIGTERM end every command with 143, at any moment, without a traceback and without a process left."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import pytest
import yaml

from tests.chaos.invariants import orphans
from tests.fixtures.places import ROOT

WAIT_SECONDS = 60  # pyspark's own retries take ten minutes
COMMANDS: dict[str, Sequence[str]] = {
    "etl": ("-m", "etl", "all", "--config", "etl/demo"),
    "trainer": ("-m", "trainer", "pretrain", "--config", "pretrain/demo"),
    "page": ("-m", "trainer.page"),
    "report": ("-m", "trainer.report"),
    "pipeline": ("-m", "graftrec", "pipeline", "--config", "pipeline/demo"),
    "experiment": ("-m", "graftrec", "experiment", "--experiment", "demo"),
    "run_etl": ("-m", "graftrec", "run-etl", "all", "--config", "etl/demo"),
}


def _started(command: Sequence[str], folder: Path, *path: Path) -> "subprocess.Popen[str]":
    """A command in a process group of its own; modules in `path` come before others."""
    environment: Mapping[str, str] = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _configure(folder: Path, *, users: int, engine: str = "sail") -> None:
    """A log of these users, and settings that make its tables."""
    (folder / "events.csv").write_text(
        "user,item,ts\n" + "".join(f"u{n // 12},i{n % 12},{n}\n" for n in range(12 * users))
    )
    config = {
        "lake": "lake",
        "source": {
            "kind": "log",
            "events": {"path": "events.csv", "columns": {"user": "user", "item": "item", "time": "ts"}},
        },
        "kcore": {"min_user": 2, "min_item": 2},
        "spark": {"engine": engine, "shuffle_partitions": 2},
    }
    (folder / "etl.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_stopped_while_it_imports(command: str, number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "pydantic.py").write_text(f"import os, time\nos.kill(os.getpid(), {number:d})\ntime.sleep(60)\n")
    stopped = _started(COMMANDS[command], tmp_path, tmp_path)
    assert stopped.communicate(timeout=WAIT_SECONDS) == ("", "")
    assert stopped.returncode == 143


@pytest.mark.parametrize(
    ("engine", "number", "to_group"),
    [
        ("sail", signal.SIGINT, True),
        ("sail", signal.SIGINT, False),
        ("sail", signal.SIGTERM, True),
        ("sail", signal.SIGTERM, False),
        ("spark", signal.SIGINT, True),
        ("spark", signal.SIGTERM, False),
    ],
)
def test_etl_is_stopped_by_a_signal(engine: str, number: signal.Signals, to_group: bool, tmp_path: Path) -> None:
    _configure(tmp_path, users=7, engine=engine)
    running = _started(("-m", "etl", "all", "--config", "etl.yaml"), tmp_path)
    assert running.stdout is not None
    assert "[1/11]" in running.stdout.readline()
    (os.killpg if to_group else os.kill)(running.pid, number)
    _, errors = running.communicate(timeout=WAIT_SECONDS)
    assert (running.returncode, errors) == (143, "etl: stopped; run the same command to continue\n")


_ENDS_BESIDE_A_TASK = """
from etl import stopping
stopping.begin()
import contextlib, sys, threading, time
from etl.command import run_command
from etl.config import SparkConfig
from etl.settings import GraftrecError
from etl.session import spark_session

def rows(batches):
    for batch in batches:
        print("running", flush=True)
        while True:
            time.sleep(0.001)
        yield batch

def collect(frame):
    with contextlib.suppress(Exception):
        frame.collect()

def work():
    frame = spark_session(SparkConfig(engine="sail", master="local[2]")).range(1).mapInArrow(rows, "id long")
    threading.Thread(target=collect, args=(frame,), daemon=True).start()
    sys.stdin.readline()
    raise GraftrecError("a mistake")

stopping.leave(run_command("work", work))
"""


_ENGINE_FAILS_AFTER_A_SIGNAL = """
from etl import stopping
stopping.begin()
import logging, os, signal
from etl.command import run_command

class Row:
    def __del__(self):
        raise RuntimeError("no server")

def work():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        row = Row()
        del row
        logging.error("Exception while sending command")
        raise RuntimeError("connection refused")

stopping.leave(run_command("work", work))
"""


def test_what_fails_after_a_signal_is_the_stop(tmp_path: Path) -> None:
    _, errors = (stopped := _started(("-c", _ENGINE_FAILS_AFTER_A_SIGNAL), tmp_path)).communicate(timeout=WAIT_SECONDS)
    assert (stopped.returncode, errors) == (143, "work: stopped; run the same command to continue\n")


def test_a_command_ends_while_a_task_of_sail_still_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _ENDS_BESIDE_A_TASK]
    ended = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert ended.stdout is not None
    assert ended.stdout.readline() == "running\n"
    _, errors = ended.communicate("\n", timeout=WAIT_SECONDS)
    assert (ended.returncode, errors) == (2, "work: a mistake\n")


_PREPARES = """
from etl import stopping
stopping.begin()
import time, sys
from trainer.recipes import training_jobs
from etl.command import run_command
training_jobs._PRELOADED = ("endless_import",)

def work():
    training_jobs.prepare()
    time.sleep(60)

stopping.leave(run_command("work", work))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks from a server on Linux only")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_server_of_trainings_is_stopped_while_it_imports(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "endless_import.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    running = _started(("-c", _PREPARES), tmp_path, tmp_path)
    assert running.stdout is not None
    assert running.stdout.readline() == "importing\n"
    children = psutil.Process(running.pid).children(recursive=True)
    os.killpg(running.pid, number)
    _, errors = running.communicate(timeout=WAIT_SECONDS)
    assert (running.returncode, errors) == (143, "work: stopped; run the same command to continue\n")
    assert not psutil.wait_procs(children, timeout=WAIT_SECONDS)[1]


def test_etl_that_is_stopped_in_a_table_leaves_no_file_that_no_version_names(tmp_path: Path) -> None:
    _configure(tmp_path, users=3_000)
    running = _started(("-m", "etl", "all", "--config", "etl.yaml"), tmp_path)
    table = tmp_path / "lake" / "sequences"
    while not list(table.rglob("*.parquet")):
        assert running.poll() is None
    os.kill(running.pid, signal.SIGTERM)
    _, errors = running.communicate(timeout=WAIT_SECONDS)
    assert (running.returncode, errors) == (143, "etl: stopped; run the same command to continue\n")
    assert (table / "_delta_log").exists() or not table.exists()
    assert [path for log in tmp_path.glob("lake/*/_delta_log") for path in orphans(log.parent)] == []
