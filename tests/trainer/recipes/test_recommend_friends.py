"""Users without a history in `recommend` and served: what their friends have, by the scores of the evaluation."""

import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from etl.settings import GraftrecError, load
from etl.tables import RELEASES, bucket_of
from tests.fixtures.folders import MODEL, write_model
from tests.fixtures.lakes import build_tiny_lake
from tests.fixtures.processes import recommended_on_sail
from tests.fixtures.recommendations import config, rows_of
from tests.fixtures.stores import enter_store
from trainer.config import FriendsConfig
from trainer.data.release import pin
from trainer.data.sequences import SequenceDataset
from trainer.inference.model_folder import load_model
from trainer.inference.recommender import Recommender, Request, RequestError, parse
from trainer.recipes import friends, recommend
from trainer.registry import CHAMPION, Registry, pyfunc
from trainer.registry import FRIENDS as ALIAS
from trainer.social.friends_folder import load_friends, on_release
from trainer.social.friends_recommender import FriendsRecommender

SETTINGS = ["--model.candidates", "20", "--model.epochs", "3", "--model.batch_size", "16", "--control", "false"]
LABEL = "graftrec/2"


def trained(folder, lake, *more):
    given = ["--lake", str(lake), "--output", str(folder), "--tracking.enabled", "false", *SETTINGS, *more]
    given += ["--splits", "[users-0]", "--name", "friends"]
    return friends.run(load(FriendsConfig, "friends/lastfm", given)).folder


def without_events(lake):
    """Release 2: three of the users whom users-0 holds out have no event, as on the day they came. Raw id -> what
    they had."""
    release = pin(lake, None)
    names = DeltaTable(f"{lake}/users").to_pyarrow_table(columns=["index", "user"]).to_pylist()
    raw = {row["index"]: row["user"] for row in names}
    items = {r["index"]: r["item"] for r in DeltaTable(f"{lake}/items").to_pyarrow_table().to_pylist()}
    sequences = SequenceDataset(release, "users-0", "all").read_all()
    held = [int(user) for user in sequences.users if user % 5 == 0][:3]
    had = {}
    for user in held:
        (place,) = np.flatnonzero(sequences.users == user)
        had[raw[user]] = [items[int(i)] for i in sequences.take(np.array([place])).items]
    rows = DeltaTable(f"{lake}/sequences").to_pyarrow_table()
    kept = rows.filter(pc.invert(pc.is_in(rows["user"], value_set=pa.array(held, rows["user"].type))))
    write_deltalake(f"{lake}/sequences", kept, mode="overwrite")
    table = DeltaTable(f"{lake}/sequences")
    versions = [{"table": n, "version": v} for n, v in (release.versions | {"sequences": table.version()}).items()]
    row = {"release": 2, "created": 0, "config": "{}", "config_hash": "x", "code_version": "x", "tables": versions}
    data = pa.Table.from_pylist([row], schema=RELEASES.schema)
    write_deltalake(f"{lake}/releases", data.cast(RELEASES.stored), mode="append")
    return had


@pytest.fixture(scope="module")
def done(spark, tmp_path_factory):
    """A lake with friendships of whose users three have no event, the champion, an attention over friends, rows."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("friends")
        enter_store(root / "store", patch)
        lake = build_tiny_lake(root / "lake", friends=True)
        champion = write_model(root / "champion", lake, domain="all", split="users-0", seed=5)
        run = trained(root, lake)
        had = without_events(lake)
        Registry().register(champion, alias=CHAMPION)
        Registry().register(run / "model", alias=ALIAS)
        result = recommend.run(config(lake, k=40))
        yield SimpleNamespace(lake=lake, run=run, champion=champion, had=had, result=result, root=root)


@pytest.fixture(scope="module")
def served(done):
    registry = Registry()
    return pyfunc.load(registry.stored(registry.version(CHAMPION)), "graftrec/1")


def test_rows_of_users_without_an_event_have_the_metrics_of_the_evaluation(done):
    found = rows_of(done.lake, "all")
    assert done.result.by_model == {"graftrec/1": 57, LABEL: 3}
    assert {user for user, rows in found.items() if rows[0]["model_version"] == LABEL} == set(done.had)
    evaluated = {row["user"]: row for row in pq.read_table(done.run / "users.parquet").to_pylist()}
    for user, held in done.had.items():
        best = [row["item"] for row in found[user]]
        hits = [item in held for item in best]
        ideal = sum(1 / np.log2(2 + place) for place in range(min(10, len(held))))
        ndcg = sum(hit / np.log2(2 + place) for place, hit in enumerate(hits[:10])) / ideal
        assert ndcg == pytest.approx(evaluated[user]["attention over friends/NDCG@10"], abs=1e-6)
        assert 1 / (1 + hits.index(True)) == pytest.approx(evaluated[user]["attention over friends/MRR"], abs=1e-6)
        assert all(row["bucket"] == bucket_of(user, 2) for row in found[user])


def test_a_server_says_the_same_and_who_said_it(done, served):
    found = rows_of(done.lake, "all")
    answers = served.answer([Request([], user) for user in done.had], k=40)
    for user, answer in zip(done.had, answers, strict=True):
        assert (answer.basis, answer.version, answer.unknown) == ("friends", LABEL, [])
        assert answer.items == [row["item"] for row in found[user]]
        assert answer.scores == pytest.approx([row["score"] for row in found[user]], rel=1e-4, abs=1e-5)


def test_given_friends_count_as_if_the_log_had_them(done, served):
    """Against the same attention on a network in which the stranger stands."""
    model = load_friends(done.run / "model")
    evidence = model.trained.evidence
    user = int(np.flatnonzero((evidence.size == 0) & (evidence.degree > 1))[0])
    raw = model.raw_ids.to_pylist()
    known = [raw[place] for place in evidence.edges[[user]].indices]
    alone = np.setdiff1d(np.arange(len(raw)), [user])
    without = type(evidence)(evidence.edges[alone][:, alone], evidence.taken[alone], num_candidates=20)
    places = np.array([alone.tolist().index(raw.index(name)) for name in known])
    scores = type(model.trained)(model.trained.model, without, []).scores_of_friends(places, mutual=True)
    np.testing.assert_allclose(scores[0], model.trained.scores(np.array([user]))[0], rtol=1e-4, atol=1e-5)
    answer = served.answer([Request([], friends=[*known, "nobody"])])[0]
    assert (answer.basis, answer.version) == ("friends", LABEL)


def test_friends_stand_behind_the_model_and_popularity_behind_friends(done, served):
    user, *_ = done.had
    own = Recommender(load_model(done.champion), "graftrec/1")
    known = own.trained_model.catalogue.raw_ids[7]
    assert served.answer([Request([known], user, friends=["u003"])])[0] == own.answer([Request([known], user)])[0]
    for request in (
        Request([]),
        Request([], "nobody"),
        Request([], friends=["nobody"]),
        Request(["x"], friends=[user]),
    ):
        assert served.answer([request])[0] == own.answer([request])[0]
    left_out = served.answer([Request(["x"], user)], k=40)[0]
    assert (left_out.basis, left_out.unknown) == ("friends", ["x"])


def test_its_own_version_is_served_too(done):
    registry = Registry()
    alone = pyfunc.load(registry.stored(registry.version(ALIAS)), LABEL)
    user, *_ = done.had
    given = pyfunc.answer(alone, [{"items": [], "user": user}, {"items": []}], {"k": 3, "domain": "all"})
    assert [one["basis"] for one in given] == ["friends", "popular"]
    with pytest.raises(RequestError, match="expected 'all', found 'target'"):
        pyfunc.answer(alone, [{"items": []}], {"domain": "target"})
    with pytest.raises(RequestError, match="`friends` is a list of raw user ids"):
        parse([{"items": [], "friends": "u001"}])


def test_a_rerun_writes_nothing_and_without_friends_rows_are_as_before(done, capsys):
    assert not recommend.run(config(done.lake, k=40)).committed
    lake = str(shutil.copytree(done.lake, done.root / "alone"))
    shutil.rmtree(f"{lake}/recommendations")
    recommend.run(config(lake, k=40, model=done.champion))
    alone, found = rows_of(lake, "all"), rows_of(done.lake, "all")
    assert set(found) - set(alone) == set(done.had)
    for user, rows in alone.items():
        assert [row["item"] for row in rows] == [row["item"] for row in found[user]]
    by_folder = recommend.run(config(lake, k=40, model=done.champion, friends=str(done.run / "model")))
    assert by_folder.by_model[f"unregistered/{load_friends(done.run / 'model').hash[:12]}"] == 3


def test_rows_are_the_same_on_sail(done):
    lake = str(shutil.copytree(done.lake, done.root / "sailed"))
    shutil.rmtree(f"{lake}/recommendations")
    recommended_on_sail(config(lake, k=40))
    found = {user: [row["item"] for row in rows] for user, rows in rows_of(lake, "all").items()}
    assert found == {user: [row["item"] for row in rows] for user, rows in rows_of(done.lake, "all").items()}


def test_a_renewed_model_reads_new_friendships(done):
    model = load_friends(done.run / "model")
    same = on_release(model, pin(done.lake, 2))
    np.testing.assert_allclose(
        same.trained.scores(np.arange(5)), model.trained.scores(np.arange(5)), rtol=1e-5, atol=1e-5
    )
    assert FriendsRecommender(same, "x").answer([Request([], next(iter(done.had)))])[0].basis == "friends"


def test_a_split_that_holds_out_little_is_kept_without_being_measured(done):
    lake = build_tiny_lake(done.root / "kept", friends=True)
    run = trained(done.root / "keeping", lake, "--keep", "last-5")
    model = load_friends(run / "model")
    assert model.split == "last-5"
    assert (model.trained.evidence.size > 0).sum() > (load_friends(done.run / "model").trained.evidence.size > 0).sum()
    assert set(pq.read_table(run / "users.parquet")["split"].to_pylist()) == {"users-0"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"friends": "champion"}, "expected a model of the recipe `friends` in"),
        ({"model": ALIAS}, "found an attention over friends, which stands beside one"),
        ({"friends": "none/such"}, "no model in none/such"),
    ],
    ids=["no friends", "no sequences", "no folder"],
)
def test_mistakes_are_one_line(done, settings, message):
    with pytest.raises(GraftrecError, match=message) as raised:
        recommend.run(config(done.lake, **settings))
    assert "\n" not in str(raised.value)


def test_friends_of_another_domain_are_refused(done, tmp_path):
    lake = build_tiny_lake(tmp_path / "lake", friends=True)
    target = write_model(tmp_path / "target", lake)
    with pytest.raises(
        GraftrecError, match="friends: expected a model that ranks domain 'target', found unregistered/"
    ):
        recommend.run(config(lake, model=target, friends=str(done.run / "model")))


def test_friends_stand_beside_a_model_that_reads_times(done):
    """Users without an event have no times: neither rows nor a server asks for any."""
    lake = str(shutil.copytree(done.lake, done.root / "timed"))
    shutil.rmtree(f"{lake}/recommendations")
    reads = MODEL | {"time": {"bias": True, "intervals": True}}
    timed = write_model(done.root / "timed-model", lake, domain="all", split="users-0", seed=5, model=reads)
    given = {"model": timed, "friends": str(done.run / "model"), "time": "2001-09-10", "k": 40}
    result = recommend.run(config(lake, **given))
    assert sorted(result.by_model.values()) == [3, 57]
    assert not recommend.run(config(lake, **given)).committed
    found, before = rows_of(lake, "all"), rows_of(done.lake, "all")
    friends_model = FriendsRecommender(load_friends(done.run / "model"), LABEL)
    server = Recommender(load_model(timed), "m/1", friends=lambda: friends_model)
    for user in done.had:
        (answer,) = server.answer([Request([], user)], k=40)
        assert (answer.basis, answer.version) == ("friends", LABEL)
        assert answer.items == [row["item"] for row in found[user]] == [row["item"] for row in before[user]]
    with pytest.raises(RequestError, match="expected `times`, which m/1 reads"):
        server.answer([Request([found["u003"][0]["item"]], "u003")])
