"""Several processes decide alike, whatever each one's clock says; one that is gone ends the others, with its state."""

import json
import signal
import time

import pytest

from tests.fixtures.places import ROOT
from tests.fixtures.ranks import start_ranks

SETTINGS = {
    "model": {"width": 16, "blocks": 1, "max_length": 24, "user_width": 4, "knowledge_width": 4},
    "train": {"batch_size": 8, "epochs": 1, "min_epochs": 0, "warmup_steps": 0},
    "tracking": {"enabled": False},
}
RUNTIME = {"progress": False, "device": "cpu", "precision": "fp32", "threads": 1}


def configured(folder, lake, *, checkpoint_seconds, epochs=1, collective_seconds=60):
    settings = {
        **SETTINGS,
        "name": "run",
        "output": str(folder / "runs"),
        "data": {"lake": lake, "domain": "source"},
        "train": SETTINGS["train"] | {"checkpoint_seconds": checkpoint_seconds, "epochs": epochs, "min_epochs": epochs},
        "runtime": RUNTIME | {"collective_seconds": collective_seconds},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(settings))
    return path


def said_by(process, seconds):
    said, _ = process.communicate(timeout=seconds)
    return said


@pytest.mark.parametrize("fast", [pytest.param(0, marks=[pytest.mark.slow, pytest.mark.ci]), 1])
def test_ranks_save_together_though_one_clock_runs_fast(fast, tiny_lake, tmp_path):
    config = configured(tmp_path, tiny_lake, checkpoint_seconds=60)
    script = str(ROOT / "tests/fixtures/fast_clock.py")
    ranks = start_ranks(tmp_path, script, str(fast), str(config))
    try:
        said = [said_by(rank, 90) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert (tmp_path / "runs" / "run" / "done.json").is_file()


@pytest.mark.parametrize(
    ("lost", "number"),
    [
        pytest.param(1, signal.SIGSTOP, marks=[pytest.mark.slow]),
        pytest.param(0, signal.SIGSTOP, marks=[pytest.mark.slow]),  # it holds the store too
        pytest.param(1, signal.SIGKILL, marks=[pytest.mark.slow]),
    ],
)
def test_a_lost_rank_ends_the_other_with_the_state_of_each(lost, number, tiny_lake, tmp_path):
    config = configured(tmp_path, tiny_lake, checkpoint_seconds=0, epochs=500, collective_seconds=3)
    ranks = start_ranks(tmp_path, "-m", "trainer", "pretrain", "--config", str(config))
    try:
        deadline = time.monotonic() + 90
        while not list((tmp_path / "runs").glob("run/checkpoints/step-*/manifest.json")):
            assert all(rank.poll() is None for rank in ranks)
            assert time.monotonic() < deadline
            time.sleep(0.01)
        ranks[lost].send_signal(number)
        other = ranks[1 - lost]
        said = said_by(other, 90)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert other.returncode == 5, said
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if "process 0: " in line]
    assert "waits for" in line
    assert "run the same command to go on" in line
    if lost == 1:
        assert "process 1: " in line
        assert "gave no sign of life" in line
    if number == signal.SIGSTOP:
        assert "runtime.collective_seconds is 3" in line


@pytest.mark.slow
@pytest.mark.ci
def test_a_rank_that_fails_is_named_with_its_reason(tiny_lake, tmp_path):
    """Its folder is held by another run, which only the first rank sees."""
    from trainer import tracking

    config = configured(tmp_path, tiny_lake, checkpoint_seconds=60)
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    with tracking.file_lock(folder / "lock"):
        ranks = start_ranks(tmp_path, "-m", "trainer", "pretrain", "--config", str(config))
        said = [said_by(rank, 90) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [5, 5], said
    assert "another process is training in" in said[0]
    assert "Traceback" not in said[0] + said[1]
