"""Maintenance: what is listed, what goes, and that a training that reads an old release is not hurt."""

import os
import time

import pytest
from deltalake import DeltaTable

from etl.jobs.releases import released
from etl.lake.readers import readers, stop_reading
from etl.tables import SEQUENCES
from tests.fixtures.folders import write_model
from tests.fixtures.lakes import build_tiny_lake
from tests.fixtures.new_releases import new_release
from tests.fixtures.stores import enter_store
from tests.fixtures.trainings import config_file, start
from trainer import tracking
from trainer.config import MaintainConfig, TrackingConfig
from trainer.data.release import DataError, pin
from trainer.recipes import maintain
from trainer.registry import CHAMPION, Registry


@pytest.fixture
def lake(tmp_path, monkeypatch):
    enter_store(tmp_path, monkeypatch)
    return build_tiny_lake(tmp_path / "lake")


def config(lake, **more):
    return MaintainConfig(**{"lake": lake, "older_than_hours": 0, "keep_releases": 1, **more})


def files_of(lake, name):
    return (
        set(os.listdir(f"{lake}/{name}"))
        if not DeltaTable(f"{lake}/{name}").metadata().partition_columns
        else {os.path.join(where, file) for where, _, files in os.walk(f"{lake}/{name}") for file in files}
    )


def test_nothing_goes_without_apply_and_then_what_was_listed(lake, capsys):
    assert [new_release(lake) for _ in range(3)] == [2, 3, 4]
    before = {name: files_of(lake, name) for name in ("sequences", "negatives", "releases")}
    listed = maintain.run(config(lake, keep_releases=2))
    assert {name: files_of(lake, name) for name in before} == before
    assert (listed.lake.kept, listed.lake.removed) == ([3, 4], [1, 2])
    assert "nothing was removed; add --apply true" in capsys.readouterr().out
    applied = maintain.run(config(lake, keep_releases=2, apply=True))
    gone = sum(len(before[name] - files_of(lake, name)) for name in ("sequences", "negatives"))
    assert gone == sum(applied.lake.files[name] for name in ("sequences", "negatives")) > 0
    assert applied.lake.bytes_freed >= listed.lake.bytes_freed > 0
    for number in (3, 4):
        assert pin(lake, number).files(SEQUENCES)
    with pytest.raises(DataError, match=r"release 2 of .* removed them at 20\d\d-.*; pin one that is there: 3, 4"):
        pin(lake, 2)
    stop_reading(lake)
    again = maintain.run(config(lake, keep_releases=2, apply=True))
    assert (again.lake.removed, again.lake.kept) == ([], [3, 4])


def test_what_was_replaced_lately_stays(lake):
    new_release(lake)
    before = files_of(lake, "sequences")
    maintain.run(config(lake, older_than_hours=1, apply=True))
    assert files_of(lake, "sequences") == before


def test_a_training_that_reads_an_old_release_is_not_hurt(lake, tmp_path):
    """It reads each epoch's rows from the lake's files, and ends with the weights of one that nobody disturbed."""
    alone = start(tmp_path, lake, name="alone", train={"epochs": 60, "min_epochs": 60})
    assert alone.communicate(timeout=300)[0] is not None
    assert alone.returncode == 0
    trains = start(tmp_path, lake, name="trains", train={"epochs": 60, "min_epochs": 60})
    deadline = time.monotonic() + 120
    while not list((tmp_path / "runs" / "trains").glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert trains.poll() is None
    new_release(lake)
    new_release(lake)
    found = maintain.run(config(lake, apply=True))
    still = trains.poll() is None
    said = trains.communicate(timeout=300)[0]
    assert trains.returncode == 0, said
    assert still, "the training ended before maintenance; give it more epochs"
    assert found.lake.kept == [1, 3]
    assert str(trains.pid) in found.lake.read[1][0]
    assert found.lake.removed == [2]
    weights = [
        (tmp_path / "runs" / name / "model" / "weights.safetensors").read_bytes() for name in ("alone", "trains")
    ]
    assert weights[0] == weights[1]
    assert readers(lake) == {}
    assert maintain.run(config(lake, apply=True)).lake.removed == [1]
    assert [row["release"] for row in released(lake) if not row["removed"]] == [3]


def test_the_release_of_a_champion_stays(lake, tmp_path):
    folder = write_model(tmp_path / "m", lake)
    stop_reading(lake)
    Registry().register(folder, alias=CHAMPION)
    new_release(lake)
    assert maintain.run(config(lake)).lake.kept == [1, 2]
    assert maintain.run(config(lake, keep_registered=False)).lake.kept == [2]


def test_abandoned_runs_and_unsent_records_are_listed_and_settled(lake, tmp_path, monkeypatch, capsys):
    process = start(tmp_path, lake, name="left", train={"epochs": 500, "min_epochs": 500})
    deadline = time.monotonic() + 120
    while not list((tmp_path / "runs" / "left").glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    busy = maintain.run(config(lake, abandoned_days=0))
    assert busy.abandoned == {}, "somebody trains in it"
    process.kill()
    process.wait()
    process.stdout.close()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    settings = {"close_seconds": 0.2, "system_metrics": False, "unsent": "spool/here"}
    with tracking.start_run(TrackingConfig(**settings), name="lost", resolved=config(lake)) as run:
        run.log_metrics({"x": 1.0})
    (kept,) = (tmp_path / "spool" / "here").iterdir()
    listed = maintain.run(config(lake, abandoned_days=0, tracking=TrackingConfig(enabled=False)))
    assert [str(folder) for folder in listed.abandoned] == ["runs/left"]
    assert (tmp_path / "runs" / "left" / "checkpoints").exists()
    assert kept.exists()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    applied = maintain.run(config(lake, abandoned_days=0, apply=True, tracking=TrackingConfig(**settings)))
    assert (applied.unsent, list(applied.abandoned)) == (1, ["runs/left"])
    assert not (tmp_path / "runs" / "left" / "checkpoints").exists()
    assert config_file(tmp_path, lake, name="left").exists()
