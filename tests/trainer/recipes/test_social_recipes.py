"""The recipes on the social network from a lake to a table: vectors, held-out events, users without a history."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from etl import tables
from etl.jobs import releases
from etl.lake import spark_io
from etl.settings import ConfigError, load
from tests.fixtures.lakes import NUM_TASTES, build_tiny_lake
from trainer.config import FeaturesConfig, FriendsConfig
from trainer.config.evaluation import BaselinesConfig
from trainer.data.catalogue import read_catalogue
from trainer.data.held_out import ReadOptions
from trainer.data.release import DataError, pin
from trainer.data.sequences import SequenceDataset
from trainer.data.social import read_network, read_training
from trainer.evaluation.scorers import baseline_scorers, read_evaluation_set
from trainer.recipes import features, friends, social_features
from trainer.training.loop import NonFiniteLoss

RUN = {"runtime": {"progress": False, "threads": 1}, "tracking": {"enabled": False}}
NODE2VEC = {"kind": "node2vec", "width": 8, "walks": 3, "length": 8, "epochs": 2}
LIGHTGCN = {"kind": "lightgcn", "width": 8, "epochs": 6, "batch_size": 256, "negatives": 16, "validate_every": 2}


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_lake(tmp_path_factory.mktemp("social") / "lake", friends=True)


def features_of(folder: Path, lake: str, model: dict[str, object], **more: object) -> FeaturesConfig:
    data = {"lake": lake} | ({"split": "last-5"} if model["kind"] == "lightgcn" else {})
    social = {"name": "vectors", "output": str(folder), "data": data, "model": model, **RUN} | more
    return load(FeaturesConfig, _written(folder, "features", {"social": social}))


def friends_of(folder: Path, lake: str, **more: object) -> FriendsConfig:
    model = {"candidates": 20, "epochs": 4, "batch_size": 16}
    given = {"output": str(folder), "lake": lake, "domain": "all", "model": model, **RUN, **more}
    return load(FriendsConfig, _written(folder, "friends", given))


def _written(folder: Path, name: str, settings: object) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(json.dumps(settings))
    return str(folder / f"{name}.yaml")


@pytest.mark.parametrize(
    ("model", "split", "kinds"), [(NODE2VEC, None, {"user"}), (LIGHTGCN, "last-5", {"user", "item"})]
)
def test_vectors_are_written_with_the_split_that_was_read(
    model: dict[str, object],
    split: str | None,
    kinds: set[str],
    lake: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    lake = str(shutil.copytree(lake, tmp_path / "lake"))
    config = features_of(tmp_path, lake, model)
    before = pin(lake, None)
    assert features.run(config).committed
    rows = DeltaTable(f"{lake}/features").to_pyarrow_table()
    assert set(rows["kind"].to_pylist()) == kinds
    assert set(rows["split"].to_pylist()) == {split}
    assert set(rows["encoder"].to_pylist()) == {"vectors"}
    assert set(pc.list_value_length(rows["vector"]).to_pylist()) == {8}
    for kind, table in (("user", tables.USERS), ("item", tables.ITEMS)):
        known = {row[kind]: row["index"] for row in before.read(table, [kind, "index"]).to_pylist()}
        for row in rows.filter(pc.equal(rows["kind"], kind)).to_pylist():
            assert known[row["id"]] == row["index"]
    assert pin(lake, None).number == before.number + 1
    assert not features.run(config).committed
    assert "unchanged" in capsys.readouterr().out


def _exchanged(part: str) -> Callable[..., object]:
    read = SequenceDataset.read_group

    def exchange(self: SequenceDataset, group: int, **options: bool) -> object:
        sequences = read(self, group, **options)
        whole = read(self, group)
        first = (whole.valid_start if part == "validation" else whole.test_start)[whole.owners]
        last = (whole.test_start if part == "validation" else whole.end)[whole.owners]
        places = np.flatnonzero((whole.positions >= first) & (whole.positions < last))
        items = sequences.items.copy()
        items[places] = np.random.default_rng(0).permutation(items[places])
        assert len(places)
        return sequences.with_columns(items=items)

    return exchange


@pytest.mark.parametrize(
    ("part", "more"),
    [("validation", {}), ("test", {}), ("test", {"best_epoch": True}), ("validation", {"friends": 1.0})],
)
def test_held_out_events_change_no_bit(
    part: str, more: dict[str, object], lake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {**LIGHTGCN, **more}
    first = social_features.run(features_of(tmp_path / "first", lake, model).social)
    monkeypatch.setattr(SequenceDataset, "read_group", _exchanged(part))
    second = social_features.run(features_of(tmp_path / "second", lake, model).social)
    for name in ("features.parquet", "tables.safetensors"):
        assert (first.model / name).read_bytes() == (second.model / name).read_bytes()
    assert first.metrics != second.metrics


def test_lightgcns_metrics_are_those_of_the_vectors_it_writes(lake: str, tmp_path: Path) -> None:
    result = social_features.run(features_of(tmp_path, lake, LIGHTGCN).social)
    found = pq.read_table(result.model / "features.parquet").to_pylist()
    vectors = {(row["kind"], row["index"]): np.array(row["vector"]) for row in found}
    items = [index for kind, index in vectors if kind == "item"]
    sequences = SequenceDataset(pin(lake, None), "last-5", "all").read_all()
    gains = []
    for row in range(len(sequences)):
        (user,), own = sequences.users[row : row + 1], sequences.take(np.array([row]))
        start, end = int(own.test_start[0]), int(own.end[0])
        given, held = set(own.items[:start].tolist()), set(own.items[start:end].tolist())
        if held:
            scores = {item: vectors["user", user] @ vectors["item", item] for item in items if item not in given}
            best = sorted(scores, key=lambda item: -scores[item])[:10]
            ideal = sum(1 / np.log2(2 + place) for place in range(min(10, len(held))))
            gains.append(sum(1 / np.log2(2 + place) for place, item in enumerate(best) if item in held) / ideal)
    assert result.metrics["test/NDCG@10"] == pytest.approx(np.mean(gains), abs=1e-9)
    rows = pq.read_table(result.folder / "users.parquet")
    assert np.mean(rows["NDCG@10"]) == pytest.approx(np.mean(gains), abs=1e-9)
    assert "popularity" in (result.folder / "report.md").read_text()


def test_an_edge_one_way_is_a_friendship_of_both_and_weighs_once(lake: str, tmp_path: Path) -> None:
    release = pin(lake, None)
    both = read_network(release)
    rows = release.read(tables.SOCIAL, ["user_index", "friend_index"]).to_pylist()
    assert both.edges.nnz == len(rows)
    assert set(both.edges.data) == {1.0}
    one_way = str(shutil.copytree(lake, tmp_path / "lake"))
    table = DeltaTable(f"{one_way}/social")
    table.delete("user_index > friend_index")
    half = read_network(_at(pin(one_way, None), "social", DeltaTable(f"{one_way}/social").version()))
    assert (half.edges != both.edges).nnz == 0


def _at(release, table: str, version: int):
    return type(release)(release.lake, release.number, {**release.versions, table: version})


def test_friends_held_out_items_are_hidden_from_the_baseline(lake: str) -> None:
    release = pin(lake, None)
    catalogue = read_catalogue(release, "all")
    users, _ = read_training(release, "users-0", "all", catalogue)
    assert not (users % 5 == 0).any()  # whoever is held out has nothing that counts
    examples = read_evaluation_set(release, "users-0", "all", "test", ReadOptions())
    (scorer,) = [one for one in baseline_scorers(examples, BaselinesConfig()) if one.label == "friends' items"]
    scores = scorer.score(examples.held_out.histories).whole().numpy()
    sequences = SequenceDataset(release, "users-0", "all").read_all()
    had = {int(user): set(sequences.take(np.array([row])).items) for row, user in enumerate(sequences.users)}
    rows = release.read(tables.SOCIAL, ["user_index", "friend_index"]).to_pylist()
    for user, row in zip(examples.users.tolist(), scores, strict=True):
        seen = [had[r["friend_index"]] for r in rows if r["user_index"] == user and r["friend_index"] % 5]
        for item, score in zip(catalogue.global_index[5:].tolist(), row[5:], strict=True):
            assert int(score) == sum(item in items for items in seen)


def test_without_friendships_there_is_no_such_baseline(tiny_lake: str) -> None:
    examples = read_evaluation_set(pin(tiny_lake, None), "last-5", "target", "test", ReadOptions())
    assert "friends' items" not in [one.label for one in baseline_scorers(examples, BaselinesConfig())]


def test_the_recipe_friends_measures_and_keeps_influence(lake: str, tmp_path: Path) -> None:
    result = friends.run(friends_of(tmp_path, lake))
    release = pin(lake, None)
    users = release.read(tables.USERS, ["user", "index"]).to_pylist()
    held = {row["user"] for row in users if row["index"] % 5 == 0}
    rows = pq.read_table(result.folder / "users.parquet")
    assert set(rows["user"].to_pylist()) == held
    influence = pq.read_table(result.folder / "influence.parquet").to_pylist()
    index = {row["user"]: row["index"] for row in users}
    for row in influence:
        assert row["user"] in held
        assert row["friend"] not in held
        assert (index[row["user"]] - index[row["friend"]]) % NUM_TASTES == 0
    of_one = [row["share"] for row in influence if row["user"] == influence[0]["user"]]
    assert sum(of_one) == pytest.approx(1, abs=1e-5)
    # Friends have one taste: what they have is worth more than what all have.
    assert result.metrics["counted/NDCG@10"] > result.metrics["popularity/NDCG@10"]
    report = (result.folder / "report.md").read_text()
    assert "swapped at random" in report
    again = friends.run(friends_of(tmp_path / "again", lake))
    assert again.metrics == result.metrics
    before = {path: path.read_bytes() for path in result.folder.rglob("*") if path.is_file()}
    same = friends.run(friends_of(tmp_path, lake))  # unchanged
    assert (same.metrics, same.gain) == (result.metrics, result.gain)
    with pytest.raises(DataError, match="split 'last-9'"):
        friends.run(friends_of(tmp_path, lake, keep="last-9"))  # a mistake removes nothing
    assert {path: path.read_bytes() for path in result.folder.rglob("*") if path.is_file()} == before


def test_users_whom_the_vocabulary_lacks_are_no_traceback(lake: str, tmp_path: Path) -> None:
    lake = str(shutil.copytree(lake, tmp_path / "lake"))
    write_deltalake(f"{lake}/users", DeltaTable(f"{lake}/users").to_pyarrow_table().slice(3), mode="overwrite")
    with spark_io.writing(lake, tables.RELEASES):
        releases.release_with(lake, {"users": DeltaTable(f"{lake}/users").version()})
    for run in (
        lambda: friends.run(friends_of(tmp_path, lake)),
        lambda: social_features.run(features_of(tmp_path, lake, NODE2VEC).social),
    ):
        with pytest.raises(DataError, match=r"expected \d+ users of other tables in the table users"):
            run()


def test_steps_that_are_too_large_are_no_result(lake: str, tmp_path: Path) -> None:
    model = {"candidates": 20, "epochs": 2, "batch_size": 16, "learning_rate": 1e30}
    with pytest.raises(NonFiniteLoss, match=r"lower model\.learning_rate"):
        friends.run(friends_of(tmp_path, lake, model=model))
    assert not (tmp_path / "friends" / "model").exists()


def test_a_name_that_another_encoder_has_is_refused(lake: str, tmp_path: Path) -> None:
    lake = str(shutil.copytree(lake, tmp_path / "lake"))
    features.run(features_of(tmp_path, lake, NODE2VEC))
    graph = {"name": "vectors", "output": str(tmp_path / "graphs"), "data": {"lake": lake}, **RUN}
    before = DeltaTable(f"{lake}/features").version()
    with pytest.raises(ConfigError, match=r"graph\.name: expected one of its own, found 'vectors'"):
        features.run(load(FeaturesConfig, _written(tmp_path, "graph", {"graph": graph})))
    assert DeltaTable(f"{lake}/features").version() == before
    assert not (tmp_path / "graphs").exists()


def test_a_mistake_removes_no_vectors(lake: str, tmp_path: Path) -> None:
    found = social_features.run(features_of(tmp_path, lake, LIGHTGCN).social)
    before = (found.model / "features.parquet").read_bytes()
    for data in ({"lake": lake, "split": "last-9"}, {"lake": lake, "split": "last-5", "domain": "moon"}):
        with pytest.raises(DataError):
            social_features.run(features_of(tmp_path, lake, LIGHTGCN, data=data).social)
    assert (found.model / "features.parquet").read_bytes() == before
    assert social_features.run(features_of(tmp_path, lake, LIGHTGCN).social).reused


def test_mistakes_are_one_line(lake: str, tiny_lake: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected last-5 to hold out users' whole histories, found 60 of 60"):
        friends.run(friends_of(tmp_path, lake, splits=["last-5"]))
    for run in (
        lambda: friends.run(friends_of(tmp_path, tiny_lake)),
        lambda: social_features.run(features_of(tmp_path, tiny_lake, NODE2VEC).social),
    ):
        with pytest.raises(DataError, match="expected friendships in the table social"):
            run()
    assert not (tmp_path / "vectors" / "model").exists()
    with pytest.raises(ConfigError, match=r"expected a split for lightgcn, and none for node2vec, found none"):
        features_of(tmp_path, lake, LIGHTGCN, data={"lake": lake})
    with pytest.raises(ConfigError, match="'last-5', which node2vec doesn't read"):
        features_of(tmp_path, lake, NODE2VEC, data={"lake": lake, "split": "last-5"})
