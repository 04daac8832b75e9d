"""One damaged byte in a lake is found before a row is read, or changes nothing that is read."""

import json
import random
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from etl.lake.datafile import DataFile, data_schema
from etl.lake.file_reader import check_files, open_parquet
from etl.lake.snapshots import LakeError, last_commit, snapshot_files, table_filesystem, transactions
from etl.lake.spark_io import FileWriter, data_files
from etl.settings import GraftrecError
from tests.fixtures.damage import flip
from tests.fixtures.places import ROOT
from tests.fixtures.shows import SHOWS, commit, deliver, file_of


def written(lake: Path, users: range, bucket: int = 0) -> DataFile:
    """A data file by our own writer."""
    (lake / "shows").mkdir(parents=True, exist_ok=True)
    writer = FileWriter(table_filesystem(str(lake), SHOWS), SHOWS, ("a", bucket))
    rows = [{"user": user, "items": [user], "title": f"title {user}", "score": 0.5} for user in users]
    writer.add(pa.Table.from_pylist(rows, schema=data_schema(SHOWS)).to_batches()[0])
    (file,) = data_files(writer.close()["file"].to_pylist())
    return file


def rows_of(lake: Path, file: DataFile) -> pa.Table:
    with open_parquet(str(lake), SHOWS, file.path) as opened:
        return opened.read()


def test_any_flipped_byte_of_a_data_file_is_named(tmp_path: Path) -> None:
    commit(tmp_path, [written(tmp_path, range(200))])
    (file,) = snapshot_files(str(tmp_path), SHOWS)
    path = tmp_path / "shows" / file.path
    assert file.size == path.stat().st_size
    whole, before = path.read_bytes(), rows_of(tmp_path, file)
    for place in random.Random(0).sample(range(len(whole)), 60):
        flip(path, place)
        for read in (lambda: rows_of(tmp_path, file), lambda: check_files(str(tmp_path), SHOWS, [file.path])):
            with pytest.raises(GraftrecError, match=f"{file.path}: expected the bytes once written .*; restore the "):
                read()
        path.write_bytes(whole)
    assert rows_of(tmp_path, file).equals(before)


def test_another_buckets_file_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    files = [written(tmp_path, range(10, 20), 0), written(tmp_path, range(20, 30), 1)]
    commit(tmp_path, files)
    shutil.copy(tmp_path / "shows" / files[1].path, tmp_path / "shows" / files[0].path)
    with pytest.raises(GraftrecError, match=f"{files[0].path}: expected the bytes once written"):
        rows_of(tmp_path, files[0])


def test_files_without_a_digest_are_read(tmp_path: Path) -> None:
    file = file_of(tmp_path, [1, 2])
    commit(tmp_path, [file])
    check_files(str(tmp_path), SHOWS, [file.path])
    assert rows_of(tmp_path, file)["user"].to_pylist() == [1, 2]


# --- the log ----------------------------------------------------------------------------------------------------------


def entries(lake: Path) -> list[Path]:
    return sorted((lake / "shows" / "_delta_log").glob("*.json"))


def state(lake: Path) -> object:
    """What readers and writers go by: files of every version, the last commit, what was delivered."""
    versions = [snapshot_files(str(lake), SHOWS, version) for version in range(len(entries(lake)))]
    commit = last_commit(str(lake), SHOWS)
    told = {name: commit[name] for name in str(commit["sealed"]).split(",")}
    return versions, told, transactions(str(lake), SHOWS, ["delivery-0", "delivery-1", "replacing"])


@pytest.fixture
def logged(tmp_path: Path) -> Path:
    """A lake of two deliveries and one that replaces both in one partition of two."""
    for number in range(2):
        deliver(tmp_path, number)
    commit(tmp_path, [file_of(tmp_path, [5], "b", 1)], properties=None)
    commit(tmp_path, [file_of(tmp_path, [7])], "partitions", "replacing", partition_scope={"domain": ["a"]})
    return tmp_path


def test_a_flipped_byte_of_the_log_is_refused_or_changes_nothing(logged: Path) -> None:
    before, refused = state(logged), 0
    for entry in entries(logged):
        whole = entry.read_bytes()
        for place in random.Random(1).sample(range(len(whole)), min(120, len(whole))):
            flip(entry, place, random.Random(place).randrange(8))
            try:
                after = state(logged)
            except GraftrecError as error:
                assert "\n" not in str(error)  # noqa: PT017
                refused += 1
            else:
                assert after == before, f"{entry.name}, byte {place}: {entry.read_bytes()[place - 30 : place + 30]!r}"
            entry.write_bytes(whole)
    assert refused > 150


def _without(kind: str) -> Callable[[str], str]:
    return lambda text: "".join(line for line in text.splitlines(keepends=True) if not line.startswith(f'{{"{kind}"'))


@pytest.mark.parametrize("version", [1, 3, 4])
@pytest.mark.parametrize(
    "damage",
    [_without("add"), _without("remove"), _without("txn"), lambda text: "", lambda text: "\n", lambda text: text[:-40]],
    ids=["add", "remove", "txn", "emptied", "blank", "torn"],
)
def test_a_log_entry_that_lost_something_is_refused(version: int, damage: Callable[[str], str], logged: Path) -> None:
    entry = entries(logged)[version]
    text = entry.read_text()
    if damage(text) == text:
        pytest.skip("nothing of that in this entry")
    entry.write_text(damage(text))
    with pytest.raises(LakeError, match="restore the log"):
        snapshot_files(str(logged), SHOWS)


def test_an_entry_without_its_commit_is_missed_by_the_next(logged: Path) -> None:
    """Its seal is lost with it; what the newest version should hold is known all the same."""
    entry = entries(logged)[1]
    entry.write_text("".join(line for line in entry.read_text().splitlines(keepends=True) if '"txn"' in line))
    assert len(snapshot_files(str(logged), SHOWS, 4)) == 2  # which don't depend on it
    with pytest.raises(LakeError, match="expected the files that the commit of version 2 recorded"):
        snapshot_files(str(logged), SHOWS, 2)


def test_a_file_with_a_deletion_vector_is_refused_by_name(logged: Path) -> None:
    entry = entries(logged)[2]
    actions = [json.loads(line) for line in entry.read_text().splitlines()]
    for action in actions:
        action.pop("commitInfo", {}).pop("seal", None)
        if "add" in action:
            action["add"]["deletionVector"] = {"storageType": "u", "pathOrInlineDv": uuid.uuid4().hex, "offset": 1}
    entry.write_text("\n".join(json.dumps(action) for action in actions if action))
    with pytest.raises(LakeError, match="deletionVectors"):
        snapshot_files(str(logged), SHOWS)


# --- commands ---------------------------------------------------------------------------------------------------------


_RUNS = """
import shutil, sys
from pathlib import Path
from tests.fixtures.damage import write_day, flip
from etl.__main__ import main
folder, lake = Path(sys.argv[1]), Path(sys.argv[1]) / "lake"
write_day(folder, 1)
codes = [main(["all", "--config", str(folder / "etl.yaml")])]
shutil.copytree(lake, folder / "whole")
write_day(folder, 2)
for table in sys.argv[2:]:
    path = next((lake / table).rglob("*.parquet"))
    flip(path, path.stat().st_size // 3)
    print("damaged", path.name, file=sys.stderr)
    codes.append(main(["all", "--config", str(folder / "etl.yaml")]))
    assert len(list((lake / "releases").glob("*.parquet"))) == 1
    shutil.rmtree(lake)
    shutil.copytree(folder / "whole", lake)
print(codes, file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "damaged"),
    [("spark", ["users"]), pytest.param("sail", ["interactions", "items", "users"], marks=pytest.mark.ci)],
)
def test_etl_that_reads_a_damaged_table_ends_with_2_and_makes_no_release(
    engine: str, damaged: list[str], tmp_path: Path
) -> None:
    """A second day makes every job read what the first one left."""
    config = {
        "lake": str(tmp_path / "lake"),
        "spark": {"engine": engine, "master": "local[2]", "shuffle_partitions": 2},
        "source": {
            "kind": "log",
            "root": str(tmp_path),
            "events": {"path": "days", "columns": {"user": "user", "item": "item", "time": "ts"}},
        },
        "kcore": {"min_user": 2, "min_item": 2},
        "splits": [{"name": "last-2", "validation": 1, "test": 1}],
    }
    (tmp_path / "etl.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-c", _RUNS, str(tmp_path), *damaged],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert lines[-1] == repr([0, *[2] * len(damaged)]), done.stderr
    for said, refused in zip(lines[:-1:2], lines[1:-1:2], strict=True):
        assert said.removeprefix("damaged ") in refused
