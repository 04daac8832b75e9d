"""Files of triples: what is used, and every other row in quarantine with its reason."""

from pathlib import Path

import polars as pl
import pytest
import yaml
from pyspark.sql import SparkSession

from etl.__main__ import main

HEAD = "head\trelation\ttail\n"
ROWS = ["i0\tmade_by\tp1", "i1\tmade_by\tp1", "i9\tmade_by\tp2", "i1\t\tp3", "i2\tmade_by\t[]", "i2\tmade_by\tUnknown"]
LINKS = "item\tentity\ni0\tm.a\ni8\tm.b\ni1\tm.c\ni9\tm.c\n"
LINKED = ["m.a\tgenre\tm.x", "m.b\tgenre\tm.x", "m.c\tgenre\tm.y", "m.x\tpart\tm.y"]


def _configured(folder: Path, rows: list[str], *, link: bool = False, **triples: bool) -> list[str]:
    """The command of a log of 6 users and 4 items, with a file of these triples."""
    events = "".join(f"u{user},i{item},{10 * user + item}\n" for user in range(6) for item in range(4))
    (folder / "log.csv").write_text("user,item,ts\n" + events)
    (folder / "graph.tsv").write_text(HEAD + "\n".join(rows) + "\n")
    (folder / "link.tsv").write_text(LINKS)
    file = {
        "name": "graph",
        "path": "graph.tsv",
        "separator": "\t",
        "by": "id",
        "id": "head",
        "triples": {"relation": "relation", "tail": "tail", **triples},
    }
    if link:
        file["link"] = {"path": "link.tsv", "separator": "\t", "item": "item", "entity": "entity"}
    config = {
        "lake": str(folder / "lake"),
        "source": {
            "kind": "log",
            "root": str(folder),
            "events": {"path": "log.csv", "columns": {"user": "user", "item": "item", "time": "ts"}},
        },
        "kcore": {"min_user": 2, "min_item": 2},
        "knowledge": {"root": str(folder), "files": [file]},
        "splits": [{"name": "last-2", "validation": 1, "test": 1}],
    }
    (folder / "etl.yaml").write_text(yaml.safe_dump(config))
    return ["all", "--config", str(folder / "etl.yaml")]


def _rejected(lake: Path) -> list[tuple[object, ...]]:
    columns = ["kind", "file", "line", "reason", "column", "found", "setting"]
    return pl.read_delta(str(lake / "quarantine")).sort("line").select(columns).rows()


def _triples(lake: Path) -> list[tuple[object, ...]]:
    return pl.read_delta(str(lake / "knowledge")).select("head", "relation", "tail").sort(pl.all()).rows()


def test_a_triple_that_cannot_be_used_is_quarantined(
    tmp_path: Path, spark: SparkSession, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_configured(tmp_path, ROWS)) == 0
    assert "4 of 6 triples quarantined" in capsys.readouterr().out
    assert _triples(tmp_path / "lake") == [("i0", "made_by", "entity:p1"), ("i1", "made_by", "entity:p1")]
    assert pl.read_delta(str(tmp_path / "lake" / "entities"))["entity"].to_list() == ["entity:p1"]
    setting = "id, triples and link of knowledge.files"
    assert _rejected(tmp_path / "lake") == [
        ("knowledge", "graph.tsv", 4, "head is no item of the log", "head", "i9", setting),
        ("knowledge", "graph.tsv", 5, "relation is missing", "relation", None, setting),
        ("knowledge", "graph.tsv", 6, "tail stands for nothing", "tail", "[]", setting),
        ("knowledge", "graph.tsv", 7, "tail stands for nothing", "tail", "Unknown", setting),
    ]
    # Mended rows leave quarantine.
    assert main(_configured(tmp_path, ROWS[:2])) == 0
    assert _rejected(tmp_path / "lake") == []


def test_what_a_link_file_makes_of_a_head_decides(tmp_path: Path, spark: SparkSession) -> None:
    """An entity between entities is left out, and no fault; one that is only an unknown item is."""
    assert main(_configured(tmp_path, LINKED, link=True)) == 0
    assert _triples(tmp_path / "lake") == [("i0", "genre", "entity:m.x"), ("i1", "genre", "entity:m.y")]
    assert [row[2:6] for row in _rejected(tmp_path / "lake")] == [(3, "head is no item of the log", "head", "i8")]
    assert main(_configured(tmp_path, LINKED, link=True, whole=True)) == 0
    assert _rejected(tmp_path / "lake") == []
    assert ("entity:m.b", "genre", "entity:m.x") in _triples(tmp_path / "lake")


def test_a_graph_about_nothing_of_the_log_is_refused(
    tmp_path: Path, spark: SparkSession, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_configured(tmp_path, ["x1\tmade_by\tp1", "x2\tmade_by\tp2"])) == 2
    said = capsys.readouterr().err
    assert "knowledge.files graph: expected triples about items of the log, found none in 2; first in graph.tsv" in said
    assert not (tmp_path / "lake" / "entities").exists()
