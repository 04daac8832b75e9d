"""A release holds tables that were made from each other."""

import json
from pathlib import Path

import pytest
from deltalake import DeltaTable

from etl.config import DomainConfig, EtlConfig, SplitConfig
from etl.jobs.releases import check_inputs
from etl.lake.commit import Commit, commit_files
from etl.lake.snapshots import current_version
from etl.pipeline.run import removed_sequences
from etl.settings import RunAgain, load, replaced
from etl.tables import INTERACTIONS, ITEMS, QUARANTINE, SEQUENCES, USERS, Table
from tests.fixtures.written_lakes import write_table


def made(lake: Path, table: Table, inputs: str) -> None:
    """A new version of a table, made from `inputs`."""
    commit_files(
        str(lake),
        table,
        [],
        Commit(
            mode="overwrite",
            app="x",
            app_version=(current_version(str(lake), table) or 0) + 1,
            metadata={"inputs": inputs},
        ),
    )


def test_a_release_holds_only_tables_made_from_each_other(tmp_path: Path) -> None:
    made(tmp_path, INTERACTIONS, "{}")
    made(tmp_path, ITEMS, '{"interactions": 1}')
    made(tmp_path, QUARANTINE, '{"interactions": 0}')
    versions = {"interactions": 1, "items": 1, "quarantine": 1}
    check_inputs(str(tmp_path), versions)

    made(tmp_path, INTERACTIONS, "{}")  # another run's
    made(tmp_path, USERS, '{"interactions": 2, "items": 1}')
    for interactions, wrong in ((1, "users"), (2, "items")):
        with pytest.raises(RunAgain, match=f"expected {wrong} to be made from interactions version") as told:
            check_inputs(str(tmp_path), {**versions, "interactions": interactions, "users": 1})
        assert told.value.exit_code == 5


def test_a_release_takes_a_version_that_others_compacted(tmp_path: Path) -> None:
    made(tmp_path, INTERACTIONS, "{}")
    DeltaTable(tmp_path / "interactions").alter.set_table_properties({"by": "others"}, raise_if_not_exists=False)
    made(tmp_path, ITEMS, '{"interactions": 2}')
    check_inputs(str(tmp_path), {"interactions": 1, "items": 1})


def test_a_configuration_without_splits_and_domains_of_the_lake_is_warned_of(tmp_path: Path) -> None:
    rows = [
        {"split": split, "domain": domain, "bucket": 0, "user": 2, "items": [2], "valid_start": 1, "test_start": 1}
        | {"end": 1, "times": None, "event_types": None, "values": None}
        for split in ("last-5", "last-5-joint-music")
        for domain in ("all", "music", "films")
    ]
    domains = [{"name": "music"}, {"name": "books"}]
    config = load(EtlConfig, "etl/demo", ["--lake", str(tmp_path), "--domains", json.dumps(domains)])
    assert removed_sequences(config) == ""
    write_table(tmp_path, SEQUENCES, rows)
    assert "split last-5-joint-music; domain films; " in removed_sequences(config)
    splits = (*config.splits, SplitConfig(name="last-5-joint-music"))
    whole = replaced(config, splits=splits, domains=(*config.domains, DomainConfig(name="films")))
    assert removed_sequences(whole) == ""
