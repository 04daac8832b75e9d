"""A lake of format 1 is refused by name until it is migrated; then it is the one that is made today."""

import contextlib
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from deltalake import DeltaTable

from etl.__main__ import main
from etl.lake.snapshots import OtherFormat, check_formats
from etl.pipeline import migrate as migration
from etl.tables import TABLES
from tests.fixtures.lakes import build_tiny_lake
from tests.fixtures.old_lakes import in_format_1
from trainer.config.task import ProfileConfig
from trainer.data.release import DataError, pin
from trainer.data.sequences import SequenceDataset
from trainer.tasks.profile import read_classes


@pytest.fixture(scope="module")
def today(tmp_path_factory):
    return Path(build_tiny_lake(tmp_path_factory.mktemp("today"), described=True))


@pytest.fixture
def old(today, tmp_path):
    return in_format_1(today, tmp_path / "old lake")


def rows(lake, table):
    found = DeltaTable(lake / table.name).to_pyarrow_table()
    return found.schema, found.sort_by([(name, "ascending") for name in table.key]).to_pylist()


def check_migrated(old, today):
    check_formats(str(old))
    for table in TABLES.values():
        if not (today / table.name).is_dir():
            continue
        expected, found = DeltaTable(today / table.name), DeltaTable(old / table.name)
        assert found.schema() == expected.schema()
        assert found.metadata().configuration == expected.metadata().configuration
        if table.name != "releases":
            assert rows(old, table) == rows(today, table)
    release = pin(str(old), None)
    assert release.number == 2
    newest = {name: DeltaTable(old / name).version() for name in release.versions}
    assert release.versions == newest


def test_an_old_lake_is_refused_by_name_until_it_is_migrated(old, today, capsys):
    command = rf"python -m etl migrate --lake '{old}'"
    with pytest.raises(DataError, match=f"releases of format 1; run `{command}`"):
        pin(str(old), None)
    with pytest.raises(OtherFormat, match=f"interactions of format 1|items of format 1; run `{command}`"):
        check_formats(str(old))
    assert main(["report", "--lake", str(old)]) == 2
    assert command in capsys.readouterr().err
    assert main(["migrate", "--lake", str(old)]) == 0
    check_migrated(old, today)
    assert main(["migrate", "--lake", str(old)]) == 0
    assert "already" in capsys.readouterr().out
    assert pin(str(old), None).number == 2


def test_old_and_new_releases_are_read_alike(old, today):
    migration.migrate(str(old))
    task = ProfileConfig.model_validate({"kind": "profile", "attribute": "taste", "min_users": 3})
    expected = SequenceDataset(pin(str(today), None), "last-5", "all").read_all(times=True)
    for number in (1, 2):
        release = pin(str(old), number)
        found = SequenceDataset(release, "last-5", "all").read_all(times=True)
        assert found.times.dtype == np.int64
        order, wanted = np.argsort(found.users), np.argsort(expected.users)
        assert np.array_equal(found.take(order).times, expected.take(wanted).times)
        assert np.array_equal(read_classes(release, task).class_U, read_classes(pin(str(today), None), task).class_U)


class Killed(BaseException):
    pass


def test_a_migration_that_is_killed_before_any_commit_goes_on(today, tmp_path, monkeypatch):
    """With the files of the commit left behind."""
    some = shutil.copytree(today, tmp_path / "some")
    for name in set(TABLES) - {"items", "entities", "baskets", "releases"}:
        shutil.rmtree(some / name, ignore_errors=True)
    old = in_format_1(some, tmp_path / "old")
    killed = 0
    while True:
        lake = shutil.copytree(old, tmp_path / str(killed))
        left = itertools.count(killed, -1)

        def dying(function, left=left):
            def call(*arguments, **named):
                if next(left) == 0:
                    raise Killed
                return function(*arguments, **named)

            return call

        with monkeypatch.context() as patched:
            for name in ("commit_files", "set_properties"):
                patched.setattr(migration, name, dying(getattr(migration, name)))
            patched.setattr(migration, "unfinished_removed", lambda lake, table: contextlib.nullcontext())
            try:
                migration.migrate(str(lake))
            except Killed:
                killed += 1
            else:
                break
        with pytest.raises(DataError, match="format 1"):
            pin(str(lake), None)
        migration.migrate(str(lake))
        check_migrated(lake, some)
    assert killed == 9
