"""What isn't a lake, a table or a whole log is refused in one line; orphans go, held versions stay."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from etl.lake.retention import remove_orphans
from etl.lake.snapshots import LakeError, UnsupportedFeature, current_version, last_commit, snapshot_files, table_uri
from tests.fixtures.shows import SHOWS, commit, deliver, file_of, users_of


def log_entry(lake: Path, version: int) -> Path:
    return lake / "shows" / "_delta_log" / f"{version:020d}.json"


def a_file(lake: Path) -> None:
    lake.write_text("not a lake")


def foreign_folder(lake: Path) -> None:
    lake.mkdir()
    (lake / "holiday.jpg").write_text("x")


def single_table(lake: Path) -> None:
    write_deltalake(lake, pa.table({"x": [1]}))


def table_is_a_file(lake: Path) -> None:
    lake.mkdir()
    (lake / "shows").write_text("x")


def table_is_foreign(lake: Path) -> None:
    (lake / "shows").mkdir(parents=True)
    (lake / "shows" / "episode.csv").write_text("x")


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (a_file, "found a file"),
        (foreign_folder, "found holiday.jpg"),
        (single_table, "found a single table"),
        (table_is_a_file, "found a file"),
        (table_is_foreign, "found episode.csv"),
    ],
)
def test_what_is_no_lake_is_refused(make: Callable[[Path], None], found: str, tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    make(lake)
    before = sorted(tmp_path.rglob("*"))
    for use in (
        lambda: current_version(str(lake), SHOWS),
        lambda: last_commit(str(lake), SHOWS),
        lambda: snapshot_files(str(lake), SHOWS),
        lambda: commit(lake, [], "overwrite"),
    ):
        with pytest.raises(LakeError) as refused:
            use()
        assert found in str(refused.value)
        assert "\n" not in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_lake_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LakeError, match="make a folder"):
        commit(tmp_path / "file" / "lake", [], "overwrite")


def test_no_table_yet(tmp_path: Path) -> None:
    for lake in (tmp_path, tmp_path / "nowhere"):
        assert current_version(str(lake), SHOWS) is None
        assert last_commit(str(lake), SHOWS) == {}
        with pytest.raises(LakeError, match="run its job first"):
            snapshot_files(str(lake), SHOWS)
    assert not (tmp_path / "nowhere").exists()


def test_version_that_is_not_there(tmp_path: Path) -> None:
    deliver(tmp_path, 0)
    for version in (2, 99, -1):
        with pytest.raises(LakeError, match=f"expected version {version}"):
            snapshot_files(str(tmp_path), SHOWS, version)
    assert [file.path for file in snapshot_files(str(tmp_path), SHOWS, 0)] == []


@pytest.mark.parametrize("damage", ["torn", "empty", "gap"])
def test_damaged_log_is_refused(damage: str, tmp_path: Path) -> None:
    for number in range(3):
        deliver(tmp_path, number)
    if damage == "gap":
        log_entry(tmp_path, 2).unlink()
    else:
        entry = log_entry(tmp_path, 3)
        entry.write_bytes(entry.read_bytes()[:100] if damage == "torn" else b"")
    for use in (lambda: current_version(str(tmp_path), SHOWS), lambda: deliver(tmp_path, 3)):
        with pytest.raises(LakeError, match="restore the log"):
            use()


def test_stray_checkpoint_pointer_does_no_harm(tmp_path: Path) -> None:
    deliver(tmp_path, 0)
    (tmp_path / "shows" / "_delta_log" / "_last_checkpoint").write_text("garbage")
    assert users_of(tmp_path) == list(range(10))
    deliver(tmp_path, 1)
    assert current_version(str(tmp_path), SHOWS) == 2


def test_missing_and_changed_data_files_are_named(tmp_path: Path) -> None:
    deliver(tmp_path, 0)
    (file,) = snapshot_files(str(tmp_path), SHOWS)
    path = tmp_path / "shows" / file.path
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(LakeError, match=f"{file.path}.*another size"):
        snapshot_files(str(tmp_path), SHOWS)
    path.unlink()
    with pytest.raises(LakeError, match=f"{file.path}.*none"):
        snapshot_files(str(tmp_path), SHOWS)


@pytest.mark.parametrize(
    ("protocol", "configuration", "feature"),
    [
        (
            {
                "minReaderVersion": 3,
                "minWriterVersion": 7,
                "readerFeatures": ["deletionVectors"],
                "writerFeatures": ["deletionVectors"],
            },
            {},
            "deletionVectors",
        ),
        ({"minReaderVersion": 2, "minWriterVersion": 5}, {"delta.columnMapping.mode": "name"}, "columnMapping"),
        (
            {
                "minReaderVersion": 3,
                "minWriterVersion": 7,
                "readerFeatures": ["v2Checkpoint"],
                "writerFeatures": ["v2Checkpoint"],
            },
            {},
            "v2Checkpoint",
        ),
    ],
)
def test_unsupported_features_are_refused_by_name(
    protocol: dict[str, object], configuration: dict[str, str], feature: str, tmp_path: Path
) -> None:
    deliver(tmp_path, 0)
    entry = log_entry(tmp_path, 0)
    actions = [json.loads(line) for line in entry.read_text().splitlines()]
    for action in actions:
        if "protocol" in action:
            action["protocol"] = protocol
        if "metaData" in action:
            action["metaData"]["configuration"] = configuration
            fields = json.loads(action["metaData"]["schemaString"])
            for number, field in enumerate(fields["fields"] if feature == "columnMapping" else []):
                physical = field["name"] if field["name"] in SHOWS.partition_by else f"column-{number}"
                field["metadata"] = {"delta.columnMapping.id": number + 1, "delta.columnMapping.physicalName": physical}
            action["metaData"]["schemaString"] = json.dumps(fields)
    entry.write_text("\n".join(map(json.dumps, actions)))
    for use in (lambda: snapshot_files(str(tmp_path), SHOWS), lambda: deliver(tmp_path, 1)):
        with pytest.raises(UnsupportedFeature, match=feature):
            use()


def test_snapshot_of_some_partitions(tmp_path: Path) -> None:
    commit(tmp_path, [file_of(tmp_path, [n], domain, n % 2) for n, domain in enumerate(["a", "b", "a", None])])
    found = snapshot_files(str(tmp_path), SHOWS, partitions={"domain": ["a", None], "bucket": [0, 1]})
    assert [(file.partition["domain"], file.partition["bucket"]) for file in found].count(("a", "0")) == 2
    assert len(found) == 3
    assert len(snapshot_files(str(tmp_path), SHOWS, partitions={"bucket": [1]})) == 2


def test_file_uri_is_the_local_folder(tmp_path: Path) -> None:
    deliver(tmp_path, 0)
    assert table_uri(tmp_path.as_uri(), SHOWS) == str(tmp_path / "shows")
    assert table_uri("s3://bucket/lake/", SHOWS) == "s3://bucket/lake/shows"
    assert current_version(tmp_path.as_uri(), SHOWS) == 1


# --- orphans ----------------------------------------------------------------------------------------------------------


def age(lake: Path, seconds: float) -> None:
    """Make all data files and folders, and the log, look `seconds` older than now."""
    then = time.time() - seconds
    for path in (lake / "shows").rglob("*"):
        os.utime(path, (then, then))
    for entry in (lake / "shows" / "_delta_log").glob("*.json"):
        actions = [json.loads(line) for line in entry.read_text().splitlines()]
        for action in actions:
            if "commitInfo" in action:
                action["commitInfo"]["timestamp"] = int(then * 1000)
        entry.write_text("\n".join(map(json.dumps, actions)) + "\n")


def test_orphans_go_and_held_versions_stay(tmp_path: Path) -> None:
    odd = "50% é/x"
    old = [file_of(tmp_path, [1], odd), file_of(tmp_path, [2], odd), file_of(tmp_path, [3], odd)]
    for file in old:
        commit(tmp_path, [file], "overwrite")
    abandoned = file_of(tmp_path, [4])
    staging = tmp_path / "shows" / "_staging-1" / "domain=a"
    staging.mkdir(parents=True)
    (staging / "x.parquet").write_text("x")
    age(tmp_path, 7_200)
    fresh = file_of(tmp_path, [5])  # a commit may be about to name it
    versions = current_version(str(tmp_path), SHOWS)
    gone = sorted([old[1].path, abandoned.path, "_staging-1/domain=a/x.parquet"])

    def remove(**more: bool) -> list[str]:
        return remove_orphans(str(tmp_path), SHOWS, older_than_seconds=3_600, keep_versions=[1], **more)

    assert remove(dry_run=True) == gone
    assert remove() == gone
    assert remove() == []
    assert not (tmp_path / "shows" / "_staging-1" / "domain=a" / "x.parquet").exists()
    assert (tmp_path / "shows" / fresh.path).exists()
    assert [file.path for file in snapshot_files(str(tmp_path), SHOWS, 1)] == [old[0].path]
    with pytest.raises(LakeError, match="found none"):
        snapshot_files(str(tmp_path), SHOWS, 2)
    assert users_of(tmp_path) == [3]
    assert current_version(str(tmp_path), SHOWS) == versions  # the log isn't touched
    commit(tmp_path, [fresh])
    assert users_of(tmp_path) == [3, 5]


def test_what_was_replaced_just_now_stays(tmp_path: Path) -> None:
    commit(tmp_path, [file_of(tmp_path, [1])])
    age(tmp_path, 7_200)
    commit(tmp_path, [file_of(tmp_path, [2])], "overwrite")
    assert remove_orphans(str(tmp_path), SHOWS, older_than_seconds=3_600, keep_versions=[]) == []
    assert len(snapshot_files(str(tmp_path), SHOWS, 1)) == 1


def test_nothing_goes_where_a_held_version_is_lost(tmp_path: Path) -> None:
    commit(tmp_path, [file_of(tmp_path, [1])])
    orphan = file_of(tmp_path, [2])
    age(tmp_path, 7_200)
    with pytest.raises(LakeError, match="expected version 9"):
        remove_orphans(str(tmp_path), SHOWS, older_than_seconds=0, keep_versions=[1, 9])
    assert (tmp_path / "shows" / orphan.path).exists()


def test_lake_copied_elsewhere_is_the_same(tmp_path: Path) -> None:
    """Paths in the log are relative."""
    deliver(tmp_path / "lake", 0)
    shutil.copytree(tmp_path / "lake", tmp_path / "copy [1] {2} é")
    shutil.rmtree(tmp_path / "lake")
    assert len(snapshot_files(str(tmp_path / "copy [1] {2} é"), SHOWS)) == 1
    assert DeltaTable(tmp_path / "copy [1] {2} é" / "shows").version() == 1


def test_a_table_that_another_process_begins_meanwhile_is_not_foreign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shows"
    folder.mkdir()
    listed = Path.iterdir

    def begun_before_listing(path: Path) -> object:
        if path == folder:
            (folder / "_delta_log").mkdir(exist_ok=True)
        return listed(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", begun_before_listing)
        assert current_version(str(tmp_path), SHOWS) is None
    (folder / "_delta_log").rmdir()
    (folder / "_delta_log").write_text("a file of that name is no log")
    with pytest.raises(LakeError, match="found _delta_log"):
        current_version(str(tmp_path), SHOWS)
