"""What lies in a run's folder: others' files stay, and a disk that is full costs no checkpoint."""

import os
import resource
import subprocess
import sys
import time

import pytest
from safetensors import SafetensorError

from etl.command import is_full, run_command
from tests.fixtures.trainings import tiny
from trainer.config import PretrainConfig
from trainer.recipes.pretrain import run as pretrain
from trainer.recipes.run_folder import RunError
from trainer.training import checkpoint

SHORT = {"epochs": 1, "min_epochs": 0}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mark", [None, b"-----BEGIN KEY-----", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["model/thesis.tex", "checkpoints/holiday.jpg", "evaluation/marks.csv", "done.json"])
def test_a_folder_of_something_else_is_left_alone(tiny_lake, tmp_path, monkeypatch, name, mark):
    theirs = tmp_path / "someones-folder"
    (theirs / name).parent.mkdir(parents=True)
    (theirs / name).write_bytes(b"years of work")
    if mark:
        (theirs / "identity").write_bytes(mark)
    monkeypatch.chdir(tmp_path)
    before = contents(theirs)
    config = tiny(PretrainConfig, tmp_path, tiny_lake, output=".", name="someones-folder", train=SHORT)
    with pytest.raises(
        RunError, match=r"expected a new folder, or one of an earlier training, found .*set another name"
    ):
        pretrain(config)
    after = contents(theirs)
    assert after == before


def test_a_folder_of_a_run_is_replaced_and_files_beside_it_stay(tiny_lake, tmp_path):
    first = pretrain(tiny(PretrainConfig, tmp_path, tiny_lake, train=SHORT))
    (first.folder / "notes.txt").write_text("mine")
    (first.folder / "identity").write_text("")  # as a kill may leave it
    second = pretrain(tiny(PretrainConfig, tmp_path, tiny_lake, train={**SHORT, "seed": 5}))
    assert (second.folder, second.reused) == (first.folder, False)
    assert (first.folder / "notes.txt").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of another process are Linux's")
def test_a_disk_that_is_full_at_a_checkpoint_is_one_line_and_keeps_the_one_before(tiny_lake, tmp_path):
    train = {"epochs": 400, "min_epochs": 400, "checkpoint_seconds": 0, "patience": 400}
    config = tiny(PretrainConfig, tmp_path, tiny_lake, tracking={"enabled": False}, train=train)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    command = [sys.executable, "-m", "trainer", "pretrain", "--config", str(tmp_path / "config.json")]
    folder = tmp_path / "runs" / config.name
    checkpoints = folder / "checkpoints"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(checkpoints.glob("step-*[0-9]/manifest.json")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2_000, resource.RLIM_INFINITY))
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2, error
    assert error.count("\n") == 1
    assert error.startswith("pretrain: expected room on the disk, found none (")
    assert [path.name for path in checkpoints.iterdir() if not path.name.removeprefix("step-").isdigit()] == []
    kept = checkpoint.newest(checkpoints, warn=pytest.fail)
    assert kept is not None
    assert kept.state["progress"]["step"] > 0
    again = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # with room again
    said = iter(again.stdout)
    assert next(line for line in said if line.startswith("resuming at"))
    again.terminate()
    assert again.wait(60) == 143


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
        RuntimeError("(sqlite3.OperationalError) database or disk is full"),
        RuntimeError(  # of a Python worker of Spark
            "An exception was thrown from the Python worker. Please see the stack trace below.\n"
            'Traceback (most recent call last):\n  File "worker.py", line 1, in main\n    process()\n'
            "  File \"writer.py\", line 9, in write\nOSError: [Errno 28] No space left on device: 'a file'\n\n"
            "JVM stacktrace:\norg.apache.spark.SparkException"
        ),
    ],
)
def test_every_full_disk_is_one_line(error, capsys):
    assert is_full(error)

    def work():
        raise error

    assert run_command("pretrain", work) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "Traceback" not in printed
    assert not is_full(OSError(5, "Input/output error"))


def test_what_a_kill_left_half_made_is_tidied(tmp_path):
    for name in ("step-0000000001", "step-0000000002.new", "step-0000000003.old", "step-0000000001.old", "notes.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / checkpoint.MANIFEST).write_text(name)
    checkpoint.tidy(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["notes.new", "step-0000000001", "step-0000000003"]
    assert (tmp_path / "step-0000000001" / checkpoint.MANIFEST).read_text() == "step-0000000001"
