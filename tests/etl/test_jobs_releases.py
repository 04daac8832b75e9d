"""A release holds tables that were made from each other."""

from pathlib import Path

import pytest
from deltalake import DeltaTable

from etl.jobs.releases import check_inputs
from etl.lake.commit import Commit, commit_files
from etl.lake.snapshots import current_version
from etl.settings import RunAgain
from etl.tables import INTERACTIONS, ITEMS, QUARANTINE, USERS, Table


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
