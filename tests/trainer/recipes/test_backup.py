"""Backups: a lake at one release and its store, put back elsewhere, whole or refused."""

import shutil

import pytest

from etl.jobs.releases import released
from etl.lake.readers import stop_reading
from etl.maintenance.backup import BackupError
from etl.maintenance.removal import remove
from etl.settings import ConfigError, GraftrecError
from etl.tables import SEQUENCES
from tests.fixtures.daily_log import contents
from tests.fixtures.folders import write_model
from tests.fixtures.lakes import build_tiny_lake
from tests.fixtures.new_releases import new_release
from tests.fixtures.stores import enter_store
from trainer.config import BackupConfig, RestoreConfig
from trainer.data.release import DataError, pin
from trainer.inference.model_folder import load_model
from trainer.recipes import backup
from trainer.registry import CHAMPION, Registry
from trainer.tracking import TrackingError


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Two releases, and a champion in the store."""
    enter_store(tmp_path / "work", monkeypatch)
    lake = build_tiny_lake(tmp_path / "work" / "lake")
    Registry().register(write_model(tmp_path / "work" / "m", lake), alias=CHAMPION)
    stop_reading(lake)
    new_release(lake)
    return tmp_path


def copied(place, **more):
    return backup.run(BackupConfig(to=str(place / "copy"), lake=str(place / "work" / "lake"), **more))


def restored(place):
    found = RestoreConfig(source=str(place / "copy"), lake=str(place / "new" / "lake"), store=str(place / "new"))
    return backup.restore(found)


def test_lake_and_store_come_back_elsewhere_without_the_first(place, monkeypatch):
    before = contents(place / "work" / "lake", "releases")
    version = Registry().version(CHAMPION)
    assert copied(place).release == 2
    shutil.rmtree(place / "work")
    assert restored(place) == backup.Copied(2, True)
    monkeypatch.chdir(place / "new")
    assert contents(place / "new" / "lake", "releases") == before
    assert pin("lake", None).number == 2
    with pytest.raises(DataError, match=r"release 1 of .* removed them at"):
        pin("lake", 1)
    stop_reading("lake")
    again = Registry().version(CHAMPION)
    assert (again.hash, again.label) == (version.hash, version.label)
    assert load_model(Registry().folder(again)).hash == version.hash
    assert remove("lake", keep_releases=1, older_than_seconds=0, apply=True).kept == [2], "it is a lake as any other"


def test_an_older_release_is_copied_alone(place):
    files = {path.path for path in pin(str(place / "work" / "lake"), 1).files(SEQUENCES)}
    stop_reading(str(place / "work" / "lake"))
    assert copied(place, release=1).release == 1
    lake = str(place / "copy" / "lake")
    assert [(row["release"], row["removed"]) for row in released(lake)] == [(1, None)]
    folder = place / "copy" / "lake" / "sequences"
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet")}
    assert {one for one in found if "_delta_log" not in one} == files


@pytest.mark.parametrize("damage", ["changed", "missing", "more"])
def test_a_damaged_backup_is_refused_before_anything_is_put_back(damage, place):
    copied(place)
    (file, *_) = (place / "copy" / "lake" / "users").glob("*.parquet")
    if damage == "changed":
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    elif damage == "missing":
        file.unlink()
    else:
        (place / "copy" / "lake" / "users" / "more.parquet").write_bytes(b"")
    with pytest.raises(BackupError, match="expected the file that the backup recorded"):
        restored(place)
    assert not (place / "new" / "lake").exists()
    assert not (place / "new" / "mlflow.db").exists()


def test_nothing_is_written_over(place):
    copied(place)
    with pytest.raises(GraftrecError, match="to: expected a new or empty folder, found files"):
        copied(place)
    (place / "new").mkdir()
    (place / "new" / "mlflow.db").write_text("")
    with pytest.raises(TrackingError, match="expected none, found one"):
        restored(place)
    (place / "new" / "mlflow.db").unlink()
    (place / "new" / "lake").mkdir()
    (place / "new" / "lake" / "x").write_text("")
    with pytest.raises(BackupError, match="expected a new or empty folder"):
        restored(place)


def test_what_is_no_backup_or_no_release_is_said(place):
    with pytest.raises(ConfigError, match="to: expected a value, found none; give --to"):
        backup.run(BackupConfig(lake=str(place / "work" / "lake")))
    with pytest.raises(BackupError, match="expected release 7 with its files, found 1, 2"):
        copied(place, release=7)
    shutil.rmtree(place / "copy", ignore_errors=True)
    (place / "copy" / "lake").mkdir(parents=True)
    with pytest.raises(BackupError, match=r"expected a backup with .backup.json, found none"):
        restored(place)
