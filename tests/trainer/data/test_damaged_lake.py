"""The trainer reads the rows that a release recorded, or refuses by name; never fewer or others."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from etl import tables
from etl.lake.commit import Commit, commit_files
from etl.lake.forms import in_memory
from etl.lake.snapshots import log_digest, table_filesystem
from etl.lake.spark_io import FileWriter, data_files
from etl.tables import TABLES
from tests.fixtures.lakes import build_tiny_lake
from trainer.__main__ import main
from trainer.data.catalogue import read_catalogue
from trainer.data.release import DataError, pin
from trainer.data.sequences import SequenceDataset

REWRITTEN = ("items", "users", "domains", "sequences")


def commit_rows(lake, table, rows, **metadata):
    """Replace a table's rows, as ETL writes them."""
    files = []
    for key in sorted({tuple(row[name] for name in table.partition_by) for row in rows}):
        own = [row for row in rows if tuple(row[name] for name in table.partition_by) == key]
        writer = FileWriter(table_filesystem(lake, table), table, key)
        writer.add(pa.Table.from_pylist(own, schema=table.schema).combine_chunks().to_batches()[0])
        files += data_files(writer.close()["file"].to_pylist())
    return commit_files(lake, table, files, Commit(mode="overwrite", app="t", app_version=1, metadata=metadata)).version


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The tiny lake with two tables of ETL's own writing, and a release 2 that records them."""
    lake = build_tiny_lake(tmp_path_factory.mktemp("made") / "lake")
    versions = dict(pin(lake, None).versions)
    for name in REWRITTEN:
        rows = in_memory(DeltaTable(f"{lake}/{name}").to_pyarrow_table()).to_pylist()
        versions[name] = commit_rows(lake, TABLES[name], rows)
    digests = {name: log_digest(lake, TABLES[name], version) for name, version in versions.items()}
    row = {
        "release": 2,
        "created": 0,
        "config": "{}",
        "config_hash": "tiny",
        "code_version": "tiny",
        "tables": [{"table": name, "version": version} for name, version in versions.items()],
    }
    commit_rows(lake, tables.RELEASES, [row], release="2", digests=json.dumps(digests))
    return lake


@pytest.fixture
def lake(made, tmp_path):
    return shutil.copytree(made, tmp_path / "lake")


def read(lake):
    """All that a training reads of items and sequences."""
    release = pin(str(lake), None)
    catalogue = read_catalogue(release, "target")
    return list(catalogue.raw_ids), len(SequenceDataset(release, "last-5", "target").read_all())


def entry(lake, table, version=-1):
    return sorted((Path(lake) / table / "_delta_log").glob("*.json"))[version]


def files(lake, table):
    """The data files of ETL's writing, which have digests in their names."""
    return sorted(Path(lake, table).rglob("part-????????????????????????????????.????????.zstd.parquet"))


def refuse(lake, said):
    with pytest.raises(DataError, match=said) as refused:
        read(lake)
    assert "\n" not in str(refused.value)


def test_whole_lakes_are_read(lake, tiny_lake):
    assert pin(str(lake), None).digests.keys() == pin(tiny_lake, None).versions.keys()
    assert read(lake) == read(tiny_lake)


@pytest.mark.parametrize("table", ["items", "domains", "sequences", "releases"])
def test_a_flipped_byte_is_refused_by_the_files_name(table, lake):
    of_target = {"domains": "domain=target", "sequences": "split=last-5/domain=target"}
    path = next(path for path in files(lake, table) if of_target.get(table, "") in path.as_posix())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    refuse(lake, f"{path.name}: expected the bytes once written")


def test_another_buckets_file_is_refused(lake):
    first, second = (path for path in files(lake, "sequences") if "split=last-5/domain=target" in path.as_posix())
    shutil.copy(second, first)
    refuse(lake, f"{first.name}: expected the bytes once written")


@pytest.mark.parametrize("table", ["releases", "sequences"])
@pytest.mark.parametrize("left", [b"", b"\n"])
def test_an_emptied_newest_entry_is_refused(left, table, lake):
    entry(lake, table).write_bytes(left)
    refuse(lake, "found an empty file; restore the log")


def test_a_lost_entry_is_refused(lake):
    entry(lake, "sequences", 1).unlink()
    refuse(lake, "expected the entry of version 1, found none")


@pytest.mark.parametrize("sealed", [True, False])
def test_a_lost_add_is_refused(sealed, lake):
    """Also where the entry's seal is lost with it: the release knows."""
    path = entry(lake, "sequences")
    lines = [line for line in path.read_text().splitlines(keepends=True) if '"commitInfo"' not in line or sealed]
    lines.remove(next(line for line in lines if line.startswith('{"add"') and "domain=target" in line))
    path.write_text("".join(lines))
    refuse(lake, "as its commit sealed it" if sealed else "as release 2 recorded it")


def alter(path, change):
    """Rewrite a log entry without its seal."""
    actions = [json.loads(line) for line in path.read_text().splitlines()]
    for action in actions:
        action.get("commitInfo", {}).pop("seal", None)
        action.get("commitInfo", {}).pop("sealed", None)
        change(action)
    path.write_text("\n".join(map(json.dumps, actions)))


def test_renamed_columns_are_refused_by_name(lake):
    def rename(action):
        if "metaData" in action:
            action["metaData"]["schemaString"] = action["metaData"]["schemaString"].replace('"title"', '"name"')

    alter(entry(lake, "items", 0), rename)
    refuse(lake, "expected the columns title, found name instead")


def test_deletion_vectors_are_refused_by_name(lake):
    def delete(action):
        if "add" in action:
            action["add"]["deletionVector"] = {
                "storageType": "i",
                "pathOrInlineDv": "x",
                "sizeInBytes": 1,
                "cardinality": 1,
            }

    alter(entry(lake, "items"), delete)
    refuse(lake, "deletionVectors")


def test_a_recipe_ends_with_2_and_one_line(lake, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = files(lake, "items")[0]
    data = bytearray(path.read_bytes())
    data[-20] ^= 1  # of the footer
    path.write_bytes(data)
    given = ["--data.lake", str(lake), "--tracking.enabled", "false", "--data.domain", "source"]
    assert main(["pretrain", "--config", "pretrain/demo", *given]) == 2
    said = capsys.readouterr().err.strip()
    assert path.name in said
    assert "\n" not in said
