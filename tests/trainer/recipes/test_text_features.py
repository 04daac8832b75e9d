"""The recipe `features`: only what is new or changed is encoded; a release has the vectors; mistakes write nothing."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from deltalake import DeltaTable, write_deltalake
from pyspark.sql import SparkSession

from etl.jobs import releases
from etl.lake import spark_io
from etl.lake.encodings import encodings
from etl.settings import GraftrecError, RunAgain
from etl.tables import FEATURES, ITEMS, RELEASES
from tests.fixtures.stores import enter_store, runs_of
from trainer import tracking
from trainer.config import FeaturesConfig
from trainer.data.release import pin
from trainer.encoders import text_encoder
from trainer.recipes import features

pytest.importorskip("wordllama")


def config(lake: Path, **settings: Any) -> FeaturesConfig:
    given = {"lake": str(lake), "spark": {"shuffle_partitions": 1}, "tracking": {"enabled": False}}
    return FeaturesConfig.model_validate(given | settings)


def vectors_of(lake: Path) -> dict[str, list[float]]:
    return {row["id"]: row["vector"] for row in pl.read_delta(str(lake / "features")).to_dicts()}


def change_items(lake: Path, change: Any) -> None:
    """A new version of ITEMS, `change` of its rows, and a release with it."""
    table = DeltaTable(lake / "items")
    rows = change(table.to_pyarrow_table().to_pylist())
    write_deltalake(table, ITEMS.schema.empty_table().from_pylist(rows, schema=ITEMS.schema), mode="overwrite")
    with spark_io.writing(str(lake), RELEASES):
        releases.release_with(str(lake), {"items": DeltaTable(lake / "items").version()})


def retitled(rows: list[dict[str, Any]], titles: dict[str, str]) -> list[dict[str, Any]]:
    return [row | {"title": titles.get(row["item"], row["title"])} for row in rows]


def copied(tiny_lake: str, folder: Path) -> Path:
    shutil.copytree(tiny_lake, folder)
    return folder


def test_only_what_is_new_or_changed_is_encoded(
    spark: SparkSession, tiny_lake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lake = copied(tiny_lake, tmp_path / "lake")
    first = features.run(config(lake))
    assert (first.things, first.covered, first.encoded, first.release) == (40, 40, 40, 2)
    assert "features item/wordllama: 40 encoded, 40 of 40 items (100.0%)" in capsys.readouterr().out
    written = vectors_of(lake)
    items = {row["item"]: row for row in pl.read_delta(str(lake / "items")).to_dicts()}
    texts = [f"{row['title']}. {', '.join(row['categories'])}" for row in items.values()]
    expected = dict(zip(items, text_encoder("wordllama").encode(texts).tolist(), strict=True))
    assert written == expected
    index = {row["id"]: row["index"] for row in pl.read_delta(str(lake / "features")).to_dicts()}
    assert index == {item: row["index"] for item, row in items.items()}
    encoding = encodings(str(lake))["item/wordllama"]
    assert (encoding.width, encoding.template, encoding.inputs) == (256, "{title}. {categories}", {"items": 1})
    assert encoding.weights == text_encoder("wordllama").weights
    assert pin(str(lake), None).versions == pin(str(lake), 1).versions | {"features": 1}

    again = features.run(config(lake))
    assert (again.encoded, again.release, again.committed) == (0, 2, False)
    assert "unchanged, 0 encoded; release 2 (unchanged)" in capsys.readouterr().out

    change_items(lake, lambda rows: retitled(rows, {"i05": "Heat"}))
    changed = features.run(config(lake))
    assert (changed.covered, changed.encoded, changed.release) == (40, 1, 4)
    differing = {item for item, vector in vectors_of(lake).items() if vector != written[item]}
    assert differing == {"i05"}
    assert pin(str(lake), 2).versions["features"] == 1  # the release of before stands

    new = {"item": "new", "index": 99, "kept": True, "degree": 0, "title": "New"}
    change_items(lake, lambda rows: [*rows, rows[0] | new])
    grown = features.run(config(lake))
    assert (grown.covered, grown.encoded) == (41, 1)
    assert len(DeltaTable(lake / "features").file_uris()) > 1  # appended
    assert vectors_of(lake).keys() == {*items, "new"}

    change_items(lake, lambda rows: retitled(rows, {"i06": "[]", "i07": "unknown"}))
    blank = features.run(config(lake, text={"columns": ["title"]}))
    assert (blank.things, blank.covered) == (41, 39)
    assert vectors_of(lake).keys() == {*items, "new"} - {"i06", "i07"}


def test_sail_leaves_what_spark_leaves_and_held_out_events_play_no_part(
    spark: SparkSession, tiny_lake: str, tmp_path: Path
) -> None:
    """Bit for bit, on a lake with the held-out events of every user in reverse order."""
    ours, theirs = (copied(tiny_lake, tmp_path / name) for name in ("spark", "sail"))
    sequences = DeltaTable(theirs / "sequences")
    rows = sequences.to_pyarrow_table().to_pylist()
    permuted = [
        row | {"items": [*row["items"][: row["valid_start"]], *row["items"][row["valid_start"] :][::-1]]}
        for row in rows
    ]
    assert permuted != rows
    schema = sequences.to_pyarrow_table().schema
    write_deltalake(sequences, schema.empty_table().from_pylist(permuted, schema=schema), mode="overwrite")
    texts = {"texts_at_once": 7, "columns": ["title", "attributes.studio", "categories"]}
    features.run(config(ours, text=texts))
    script = (
        "import sys; from trainer.recipes import features; from trainer.config import FeaturesConfig;"
        "given = FeaturesConfig.model_validate_json(sys.argv[1]); features.run(given); print(features.run(given))"
    )
    given = config(theirs, text=texts, spark={"engine": "sail", "shuffle_partitions": 2})
    done = subprocess.run(
        [sys.executable, "-c", script, given.model_dump_json()], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "encoded=0, release=2, committed=False" in done.stdout
    assert len(vectors_of(ours)) == 40
    assert vectors_of(theirs) == vectors_of(ours)
    found = pl.read_delta(str(theirs / "features"))
    assert set(found["split"]) == {None}
    assert found["index"].to_list() == sorted(found["index"])


def test_what_was_encoded_is_a_run_and_what_was_not_is_none(
    spark: SparkSession, tiny_lake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = copied(tiny_lake, tmp_path / "lake")
    enter_store(tmp_path / "store", monkeypatch)
    given = config(lake, tracking={"enabled": True, "system_metrics": False}, name="words")
    features.run(given)
    (run,) = runs_of(tmp_path / "store").values()
    assert run.info.run_name == "words"
    assert {name: run.data.metrics[name] for name in ("things", "coverage", "encoded", "width")} == {
        "things": 40,
        "coverage": 1,
        "encoded": 40,
        "width": 256,
    }
    assert run.data.params["encoding.template"] == "{title}. {categories}"
    assert run.data.tags["graftrec.recipe"] == "features"
    assert "40 encoded" in run.data.tags["mlflow.note.content"]
    features.run(given)
    client = tracking.connect(f"sqlite:///{tmp_path}/store/mlflow.db")
    assert len(client.search_runs([run.info.experiment_id])) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": {"columns": ["plot"]}}, r"text: expected columns of items \(title, year, categories, attr"),
        ({"text": {"encoder": "bert"}}, r"expected a text encoder \(minilm, wordllama\), found 'bert'"),
        (
            {"text": {"columns": ["attributes.plot"]}},
            "expected a text of one of 40 items at least, found none in attri",
        ),
        ({"text": {"columns": ["categories"]}}, "expected a text to be that of 1% of 40 items at most, found 'source'"),
        ({"release": 9}, "no release 9 in the lake"),
    ],
)
def test_mistakes_write_nothing(
    spark: SparkSession, tiny_lake: str, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    lake = copied(tiny_lake, tmp_path / "lake")
    with pytest.raises(GraftrecError, match=message) as raised:
        features.run(config(lake, **settings))
    assert "\n" not in str(raised.value)
    assert not (lake / FEATURES.name).exists()
    assert pin(str(lake), None).number == 1


@pytest.mark.parametrize("settings", [{}, {"attributes": {"categorical": ["categories"]}}], ids=["text", "columns"])
def test_a_table_without_a_row_is_named(
    spark: SparkSession, tiny_lake: str, tmp_path: Path, settings: dict[str, Any]
) -> None:
    lake = copied(tiny_lake, tmp_path / "lake")
    change_items(lake, lambda rows: [])
    with pytest.raises(GraftrecError, match="expected rows in the table items, found none in release 2 of"):
        features.run(config(lake, **settings))
    assert not (lake / FEATURES.name).exists()


def test_a_name_is_one_word() -> None:
    assert FeaturesConfig(name="text-2.plots").name == "text-2.plots"
    with pytest.raises(ValueError, match="expected letters, digits"):
        FeaturesConfig(name="item/text")


def test_placeholders_that_the_settings_name_are_no_text(spark: SparkSession, tiny_lake: str, tmp_path: Path) -> None:
    lake = copied(tiny_lake, tmp_path / "lake")
    plots = {f"i{number:02d}": "No plot yet" for number in range(5, 9)}
    change_items(lake, lambda rows: retitled(rows, plots))
    with pytest.raises(GraftrecError, match=r"1% of 40 items at most, found 'No plot yet' of 4; give --text.placeh"):
        features.run(config(lake, text={"columns": ["title"]}))
    result = features.run(config(lake, text={"columns": ["title"], "placeholders": ["no plot yet"]}))
    assert (result.things, result.covered) == (40, 36)


def test_columns_are_encoded_without_spark(tiny_lake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lake = copied(tiny_lake, tmp_path / "lake")
    given = {"kind": "user", "categorical": ["attributes.taste"], "numeric": ["attributes.born"]}
    assert dataclasses.astuple(features.run(config(lake, attributes=given))) == (60, 60, 60, 2, True)
    names = [*(f"attributes.taste=t{taste}" for taste in range(4)), "attributes.born", "attributes.born known"]
    encoding = encodings(str(lake))["user/attributes"]
    assert (encoding.template, encoding.width, encoding.weights) == ("; ".join(names), 6, "")
    assert vectors_of(lake)["u001"][:4] == [0, 1, 0, 0]
    assert {tuple(vector[5:]) for vector in vectors_of(lake).values()} == {(1.0,)}
    assert features.run(config(lake, attributes=given)).committed is False
    assert "features user/attributes: unchanged, 0 encoded; release 2 (unchanged)" in capsys.readouterr().out
    items = {"categorical": ["categories"], "min_things": 20}
    features.run(config(lake, attributes=items, name="domain"))
    assert encodings(str(lake))["item/domain"].template == "categories=source"
    assert len(vectors_of(lake)) == 60 + 24  # those of the other domain have none
    for wrong, message in (
        ({"categorical": ["plot"]}, r"attributes: expected columns of items \(title, year, .*, found 'plot'"),
        (
            {"categorical": ["attributes.studio"]},
            "attributes.studio: expected a value that 2 have at least, found none",
        ),
        ({"numeric": ["title"]}, "title: expected numbers, found none"),
    ):
        with pytest.raises(GraftrecError, match=message):
            features.run(config(lake, attributes=wrong))
    assert pin(str(lake), None).number == 3


def test_another_writer_is_waited_for_then_left_alone(tiny_lake: str, tmp_path: Path) -> None:
    lake = copied(tiny_lake, tmp_path / "lake")
    script = "import sys, time; from etl.lake.lease import writing; from etl.tables import ITEMS\n"
    script += "with writing(sys.argv[1], ITEMS):\n    print('there', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script, str(lake)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(RunAgain):
            features.run(config(lake, wait_seconds=0))
        other.kill()


def test_triples_are_flags(tiny_lake: str, tmp_path: Path) -> None:
    """One for each thing that several items stand in the relation to; an item of none of them has no vector."""
    lake = copied(tiny_lake, tmp_path / "lake")
    given = {"kind": "item", "relations": ["actor", "director"]}
    features.run(config(lake, attributes=given, name="flags"))
    names = encodings(str(lake))["item/flags"].template.split("; ")
    triples = pl.read_delta(str(lake / "knowledge")).to_dicts()
    expected: dict[str, set[str]] = {}
    for row in triples:
        expected.setdefault(row["head"], set()).add(f"{row['relation']}={row['tail']}")
    assert set(names) == set().union(*expected.values())
    found = {
        item: {name for name, flag in zip(names, vector, strict=True) if flag}
        for item, vector in vectors_of(lake).items()
    }
    assert found == expected
    assert encodings(str(lake))["item/flags"].inputs.keys() == {"items", "knowledge"}
    reduced = given | {"components": 9}  # of four tastes there are three directions
    features.run(config(lake, attributes=reduced, name="reduced"))
    assert encodings(str(lake))["item/reduced"].width == 3
    with pytest.raises(GraftrecError, match=r"relations of items \(actor, director\), found 'plot'"):
        features.run(config(lake, attributes=given | {"relations": ["plot"]}, name="other"))
    with pytest.raises(ValueError, match="relations: expected kind item, found user"):
        config(lake, attributes={"kind": "user", "relations": ["actor"]})


def test_flags_of_one_domain_join_none(tiny_lake: str, tmp_path: Path) -> None:
    """People who make items of both domains are a flag in each; without `join_domains: false`, one of both."""
    lake = copied(tiny_lake, tmp_path / "lake")
    given = {"relations": ["actor", "director"], "min_things": 1}
    features.run(config(lake, attributes=given, name="joined"))
    features.run(config(lake, attributes=given | {"join_domains": False}, name="apart"))
    domains: dict[str, list[str]] = {}
    for row in pl.read_delta(str(lake / "domains")).to_dicts():
        if row["domain"] != "all":
            domains.setdefault(row["item"], []).append(row["domain"])
    assert set(map(tuple, domains.values())) == {("source",), ("target",)}
    expected: dict[str, set[str]] = {}
    for row in pl.read_delta(str(lake / "knowledge")).to_dicts():
        (domain,) = domains[row["head"]]
        expected.setdefault(row["head"], set()).add(f"{row['relation']}={row['tail']} ({domain})")
    found = encodings(str(lake))
    names = found["item/apart"].template.split("; ")
    assert set(names) == set().union(*expected.values())
    assert found["item/apart"].width > found["item/joined"].width  # somebody works in both
    assert found["item/apart"].inputs.keys() == {"items", "knowledge", "domains"}
    rows = pl.read_delta(str(lake / "features")).filter(pl.col("encoder") == "apart")
    for item, vector in zip(rows["id"], rows["vector"], strict=True):
        assert {name for name, flag in zip(names, vector, strict=True) if flag} == expected[item]
    with pytest.raises(ValueError, match="join_domains: expected relations that could join them, found none"):
        config(lake, attributes={"categorical": ["categories"], "join_domains": False})
