"""conf/source/ describes public logs: each reads a few lines in the shape of the files that it names."""

from pathlib import Path

import pytest
import yaml

from etl.config import CleaningConfig, LogSource
from etl.sources.log import FileLog
from tests.fixtures.local_rows import read_rows
from tests.fixtures.places import ROOT
from tests.fixtures.public_logs import LOGS, write_log

# source -> files, events as (user, item, event type, value), items as (item, title, year, categories)
_OTHER = {"delta", "table", "generator", "ml1m"}  # read by tests of their own


def test_every_source_of_conf_has_an_example() -> None:
    assert {path.stem for path in (ROOT / "conf" / "source").glob("*.yaml")} == LOGS.keys() | _OTHER


@pytest.mark.parametrize("name", LOGS)
def test_a_public_log_is_read_as_described(tmp_path: Path, name: str) -> None:
    files, events, items = LOGS[name]
    write_log(tmp_path, files)
    described = yaml.safe_load((ROOT / "conf" / "source" / f"{name}.yaml").read_text())
    if "edges" in described:
        described["edges"]["directed"] = True  # both directions are made by the engine
    config = LogSource.model_validate(described | {"root": str(tmp_path)})
    log = FileLog(config, CleaningConfig())
    rows = {}
    for kind in ("events", "items", "users", "edges"):
        rows[kind] = read_rows(log, kind)
        assert [row["reason"] for row in rows[kind] if row["reason"]] == []
        assert bool(rows[kind]) == (getattr(config, kind) is not None)
    ordered = sorted(rows["events"], key=lambda row: row["source_order"])
    assert [(row["user"], row["item"], row["event_type"], row["value"]) for row in ordered] == events
    assert [(row["item"], row["title"], row["year"], row["categories"]) for row in rows["items"]] == items
