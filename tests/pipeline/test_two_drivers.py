"""A second pipeline or experiment in the same folder is refused at its start, as long as the first one lives."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.fixtures.places import ROOT

# Holds the folder as a driver does, in place of all that a driver computes there.
_HOLDS = """
import sys, time
from pathlib import Path
from trainer.recipes.alone import alone
with alone(Path(sys.argv[1]), "pipeline"):
    print("held", flush=True)
    time.sleep(600)
"""
DRIVERS: dict[str, tuple[Sequence[str], str]] = {
    "pipeline": (("--config", "pipeline/demo", "--runs", "runs"), "runs"),
    "experiment": (("--experiment", "demo", "--runs", "runs"), "runs/demo-experiment"),
}


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.fixture
def holder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the folder of a driver."""
    _, folder = DRIVERS[request.param]
    command = [sys.executable, "-c", _HOLDS, folder]
    process = subprocess.Popen(command, cwd=tmp_path, env=_environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def _run(driver: str, folder: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    arguments, _ = DRIVERS[driver]
    command = [sys.executable, "-m", "graftrec", driver, *arguments, *more]
    return subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("driver", "holder"), [(name, name) for name in DRIVERS], indirect=["holder"])
def test_a_second_driver_in_the_folder_is_refused_at_its_start(
    driver: str, holder: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    refused = _run(driver, tmp_path)
    assert refused.returncode == 5
    assert re.fullmatch(
        rf"{driver}: runs\S*: expected no other {driver} to run there, found process {holder.pid} of .*; run again "
        r"when it has ended, or set another folder\n",
        refused.stderr,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize("holder", ["pipeline"], indirect=True)
def test_a_killed_driver_holds_nothing(holder: "subprocess.Popen[str]", tmp_path: Path) -> None:
    holder.kill()
    holder.wait()
    missing = ("--etl.source", "{kind: movielens, root: missing}", "--tracking.enabled", "false")
    ended = _run("pipeline", tmp_path, *missing)
    assert (ended.returncode, "expected no other" in ended.stderr) == (2, False), ended.stderr
