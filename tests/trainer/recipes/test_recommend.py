"""Batch recommendations: what the served model would say, for every user, committed once."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from etl.settings import GraftrecError, RunAgain
from etl.tables import UNK, bucket_of
from tests.fixtures.folders import alike, write_model
from tests.fixtures.processes import recommended_on_sail
from tests.fixtures.recommendations import config, histories_of, rows_of
from tests.fixtures.stores import enter_store, runs_of
from trainer.data.release import pin
from trainer.data.sequences import SequenceDataset
from trainer.inference.model_folder import load_model
from trainer.inference.recommender import Recommender, Request
from trainer.recipes import recommend, recommendation_rows
from trainer.registry import CHAMPION, Registry

BUCKETS = 2  # of the tiny lake


@pytest.fixture(scope="module")
def done(spark, tiny_lake, tmp_path_factory):
    """A lake with the champion's top 4, and its result, store, model folder."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("recommend")
        enter_store(root / "store", patch)
        lake = str(root / "lake")
        shutil.copytree(tiny_lake, lake)
        folder = write_model(root / "model", lake, seed=5, skill=0.2)
        Registry().register(folder, alias=CHAMPION)
        result = recommend.run(config(lake))
        yield SimpleNamespace(lake=lake, folder=folder, store=root / "store", result=result, root=root)


def test_every_user_gets_what_the_served_model_answers(done):
    """Users who are new in the domain get what a request without a history gets."""
    found, histories = rows_of(done.lake), histories_of(done.lake)
    strangers = histories_of(done.lake, "all").keys() - histories.keys()
    assert strangers == {"u000"}
    histories |= {user: [] for user in strangers}
    assert found.keys() == histories.keys()
    server = Recommender(load_model(done.folder), "graftrec/1")
    answers = server.answer([Request(items, user) for user, items in histories.items()], k=4)
    for (user, items), answer in zip(histories.items(), answers, strict=True):
        rows = found[user]
        assert [row["item"] for row in rows] == answer.items
        assert [row["score"] for row in rows] == alike(answer.scores, done.folder)
        assert not set(answer.items) & set(items)


def test_rows_say_where_they_come_from(done):
    rows = [row for rows in rows_of(done.lake).values() for row in rows]
    assert {row["model_version"] for row in rows} == {"graftrec/1"}
    assert {row["release"] for row in rows} == {1}
    assert all(row["bucket"] == bucket_of(row["user"], BUCKETS) for row in rows)
    for own in rows_of(done.lake).values():
        assert [row["rank"] for row in own] == list(range(1, len(own) + 1))
    assert DeltaTable(f"{done.lake}/recommendations").metadata().partition_columns == ["domain", "bucket"]


def test_the_run_is_tracked_with_its_speed(done):
    found = runs_of(done.store)["recommend"]
    assert found.data.tags["graftrec.model_version"] == "graftrec/1"
    assert found.data.metrics["users"] == len(histories_of(done.lake, "all"))
    assert found.data.metrics["users_per_second"] > 0
    assert done.result.rows == found.data.metrics["rows"] == sum(map(len, rows_of(done.lake).values()))


def test_an_unchanged_rerun_writes_nothing(done, capsys):
    again = recommend.run(config(done.lake))
    assert not again.committed
    assert DeltaTable(f"{done.lake}/recommendations").version() == done.result.version == again.version
    assert "unchanged" in capsys.readouterr().out


def test_another_setting_replaces_the_domains_rows_and_no_others(done):
    lake = str(done.root / "other")
    shutil.copytree(done.lake, lake)
    source = write_model(done.root / "source", lake, domain="source", seed=6)
    recommend.run(config(lake, model=source, k=2))
    before = rows_of(lake, "source")
    assert before.keys() == histories_of(lake, "source").keys()
    assert {row["model_version"] for rows in before.values() for row in rows} == {
        f"unregistered/{load_model(source).hash[:12]}"
    }
    assert recommend.run(config(lake, k=1)).committed
    assert {len(rows) for rows in rows_of(lake).values()} == {1}
    assert rows_of(lake, "source") == before
    assert recommend.run(config(lake)).committed  # back to what an earlier run had written
    assert rows_of(lake) == rows_of(done.lake)


def test_rows_are_the_same_on_sail(done):
    lake = str(done.root / "sailed")
    shutil.copytree(done.lake, lake)
    shutil.rmtree(f"{lake}/recommendations")
    recommended_on_sail(config(lake))
    found, expected = rows_of(lake), rows_of(done.lake)
    assert found.keys() == expected.keys()
    for user, rows in expected.items():
        assert [row | {"score": None} for row in found[user]] == [row | {"score": None} for row in rows]
        assert [row["score"] for row in found[user]] == alike([row["score"] for row in rows], done.folder)


def test_of_two_runs_at_once_the_one_that_lost_says_so(done, monkeypatch):
    lake = str(done.root / "raced")
    shutil.copytree(done.lake, lake)
    stale = recommend.spark_io.transactions

    def before_the_other(lake, table, apps):
        return {} if "recommend/target" in apps else stale(lake, table, apps)

    monkeypatch.setattr(recommend.spark_io, "transactions", before_the_other)
    with pytest.raises(GraftrecError, match="another run has written recommendations of target meanwhile"):
        recommend.run(config(lake, k=3))
    assert rows_of(lake) == rows_of(done.lake)


def test_unknown_and_missing_items_are_no_obstacle(done):
    trained_model = load_model(done.folder, users=False)
    catalogue = trained_model.catalogue
    index = catalogue.global_index
    beyond = int(index.max()) + 1_000
    batch = pa.RecordBatch.from_arrays(
        [
            pa.array(["a", "b", "c", "d"]),
            pa.array([7, 10_000, UNK, 8], pa.int32()),
            pa.array([0, 1, 0, 1], pa.int32()),
            pa.array([[beyond], [int(index[6]), beyond, int(index[9])], [], None], pa.list_(pa.int32())),
        ],
        names=["raw", "index", "bucket", "items"],
    )
    settings = {"count": None, "wanted": recommendation_rows.Wanted(3, 2, "d", 9, 0)}
    settings["models"] = [(str(done.folder), "l")]
    rows = pa.Table.from_batches(recommendation_rows._score_batches(iter([batch]), **settings)).to_pylist()
    popular = sorted(range(5, len(catalogue)), key=lambda row: (-trained_model.popularity[row], row))[:3]
    for user in "acd":
        assert [row["item"] for row in rows if row["user"] == user] == [catalogue.raw_ids[row] for row in popular]
    own = [row["item"] for row in rows if row["user"] == "b"]
    assert len(own) == 3
    assert not {catalogue.raw_ids[6], catalogue.raw_ids[9]} & set(own)


def test_scoring_is_the_same_whatever_the_batches(done):
    histories = histories_of(done.lake)
    release = pin(done.lake, None)
    sequences = SequenceDataset(release, "last-5", "target").read_all()
    whole = pa.RecordBatch.from_arrays(
        [
            pa.array(list(histories)),
            pa.array(sequences.users, pa.int32()),
            pa.array(np.zeros(len(sequences)), pa.int32()),
            pa.ListArray.from_arrays(pa.array(sequences.offsets, pa.int32()), pa.array(sequences.items)),
        ],
        names=["raw", "index", "bucket", "items"],
    )
    settings = {"models": [(str(done.folder), "l")], "count": None}

    def scored(batches, batch_size):
        tables = pa.Table.from_batches(
            recommendation_rows._score_batches(
                iter(batches), wanted=recommendation_rows.Wanted(4, batch_size, "d", 1, 0), **settings
            )
        )
        return {(row["user"], row["rank"]): (row["item"], row["score"]) for row in tables.to_pylist()}

    one, other = scored([whole], 256), scored([whole.slice(0, 11), whole.slice(11)], 7)
    assert one.keys() == other.keys()
    assert {key: item for key, (item, _) in one.items()} == {key: item for key, (item, _) in other.items()}
    scores = [[by_rank[key][1] for key in one] for by_rank in (one, other)]
    assert scores[0] == alike(scores[1], done.folder)


def test_a_model_folder_replaces_no_registered_versions_rows_unless_told_to(done):
    lake = str(done.root / "replaced")
    shutil.copytree(done.lake, lake)
    folders = [write_model(done.root / f"other-{seed}", lake, seed=seed) for seed in (8, 9)]
    with pytest.raises(GraftrecError, match=r"found those of graftrec/1 at .*--replace true") as raised:
        recommend.run(config(lake, model=folders[0]))
    assert raised.value.exit_code == 2
    assert "\n" not in str(raised.value)
    assert rows_of(lake) == rows_of(done.lake)
    labels = [f"unregistered/{load_model(folder).hash[:12]}" for folder in folders]
    assert recommend.run(config(lake, model=folders[0], replace=True)).by_model == {labels[0]: 60}
    assert recommend.run(config(lake, model=folders[1])).by_model == {labels[1]: 60}  # over rows of a folder
    assert recommend.run(config(lake)).by_model == {"graftrec/1": 60}
    with pytest.raises(GraftrecError, match="graftrec/1"):  # also what the table has held before
        recommend.run(config(lake, model=folders[1]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "nobody"}, "no version or alias 'nobody' of the registered model graftrec, it has 1 @champion"),
        ({"model": "some/folder"}, "no model in some/folder"),
        ({"release": 9}, "no release 9"),
        ({"domain": "moon"}, "no sequences of split 'last-5' and domain 'moon'"),
    ],
    ids=lambda value: next(iter(value.values()), "") if isinstance(value, dict) else "",
)
def test_mistakes_are_one_line(done, settings, message):
    with pytest.raises(GraftrecError, match=message) as raised:
        recommend.run(config(done.lake, **settings))
    assert "\n" not in str(raised.value)


def test_waits_for_another_writer_of_the_lake_then_ends_with_run_again(done, tmp_path):
    lake = shutil.copytree(done.lake, tmp_path / "lake")
    before = DeltaTable(lake / "recommendations").version()
    hold = (
        "import sys; from etl.lake.lease import writing; from etl.tables import RELEASES\n"
        "with writing(sys.argv[1], RELEASES):\n    print('holding', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(lake)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "holding\n"
        with pytest.raises(RunAgain, match=f"found process {holder.pid} of"):
            recommend.run(config(str(lake), k=3, wait_seconds=0.1))
        holder.kill()
    assert DeltaTable(lake / "recommendations").version() == before
