"""Items that came after training: ranked, and read, by their features; what was there is scored as before."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from deltalake import DeltaTable, write_deltalake

from etl.settings import replaced
from etl.tables import FIRST_INDEX, ITEMS, UNK
from tests.fixtures.feature_lakes import write_vectors
from tests.fixtures.recommendations import config, histories_of, rows_of
from tests.fixtures.trainings import TINY
from trainer.config import Bert4RecConfig, PretrainConfig
from trainer.data.catalogue import read_catalogue, rows_by_raw_id
from trainer.data.events import Events
from trainer.data.held_out import ReadOptions
from trainer.data.release import pin
from trainer.evaluation.scorers import model_scorer, read_evaluation_set
from trainer.inference.later_items import (
    LaterItems,
    LaterItemsError,
    later_vectors,
    load_later,
    save_later,
    with_later,
    with_release,
)
from trainer.inference.model_folder import load_model
from trainer.inference.recommender import Recommender, Request, RequestError, parse
from trainer.models import FeatureTable, ModelSizes, build_model
from trainer.recipes import recommend
from trainer.recipes.pretrain import run as pretrain
from trainer.registry import loading, pyfunc

WIDTH, LATER = 10, ("new0", "new1", "bare")  # bare: without a vector
NETWORKS = {
    "bert4rec": {"kind": "bert4rec", "blocks": 1},
    "cosines": {"kind": "bert4rec", "blocks": 1, "score": "cosine"},
    "caser": {"kind": "caser"},
    "peterrec": {"kind": "peterrec", "dilations": [1, 2]},
    "dupn": {"kind": "dupn"},
    "mlp": {"kind": "mlp", "score": "dot", "user_width": 16, "knowledge": {}},
    "ridge": {"kind": "mlp", "score": "dot", "user_width": 16, "knowledge": {}, "features": {"aggregate": "ridge"}},
    "bert4rec-ridge": {"kind": "bert4rec", "blocks": 1, "features": {"aggregate": "ridge"}},
}
FEATURED = {"encoders": ["text"], "width": 6, "id_dropout": 0.3}


def overwrite(lake, name, change):
    table = DeltaTable(f"{lake}/{name}")
    found = table.to_pyarrow_table()
    rows = change(found.to_pylist())
    write_deltalake(table, found.schema.empty_table().from_pylist(rows, schema=found.schema), mode="overwrite")
    return DeltaTable(f"{lake}/{name}").version()


def next_day(lake, vectors):
    """Three more items, of both domains' catalogue, the first two with vectors; each user's last test item becomes the
    first of them."""
    rows = pin(lake, None).read(ITEMS, ["item", "index"]).to_pylist()
    first = FIRST_INDEX + len(rows)
    new = [{"item": raw, "index": first + place} for place, raw in enumerate(LATER)]
    changed = {
        "items": overwrite(
            lake,
            "items",
            lambda old: [*old, *({**old[-1], **one, "title": one["item"], "kept": True} for one in new)],
        ),
        "domains": overwrite(
            lake,
            "domains",
            lambda old: [*old, *({**one, "domain": name, "rule": "tiny"} for one in new for name in ("target", "all"))],
        ),
        "sequences": overwrite(
            lake,
            "sequences",
            lambda old: [
                row | {"items": [*row["items"][:-1], first]}
                if (row["split"], row["domain"]) == ("last-5", "target") and row["test_start"] < row["end"]
                else row
                for row in old
            ],
        ),
    }
    write_vectors(lake, [*rows, *new[:2]], vectors, versions=changed)


@pytest.fixture(scope="module")
def done(tiny_lake, tmp_path_factory):
    """A model of each network, trained on a release; and a later one, with more items."""
    root = tmp_path_factory.mktemp("later")
    lake = str(root / "lake")
    shutil.copytree(tiny_lake, lake)
    rows = pin(lake, None).read(ITEMS, ["item", "index"]).to_pylist()
    vectors = np.random.default_rng(0).normal(size=(len(rows) + 2, WIDTH)).astype(np.float32) + 1
    vectors[-2] = vectors[7]  # new0 is of the same features as the eighth item
    vectors[-2] += 1e-3  # all but
    write_vectors(lake, rows, vectors[:-2])
    models = {}
    for name, network in NETWORKS.items():
        train = {"epochs": 2, "min_epochs": 0, "learning_rate": 0.01}
        sizes = {"width": 16, "max_length": 24, "user_width": 4} | network
        sizes["features"] = {"encoders": ["text"]} | network["features"] if "features" in network else FEATURED
        data = {"lake": lake, "domain": "target"}
        small = {"model": sizes, "train": TINY["train"] | train, "task": {"kind": "next_item"}, "data": data}
        named = {"name": name, "output": str(root / "runs")}
        models[name] = pretrain(PretrainConfig.model_validate(TINY | small | named)).model
    next_day(lake, vectors)
    return SimpleNamespace(lake=lake, root=root, models=models, rows=rows, vectors=vectors)


def extended(done, name):
    own, release = load_model(done.models[name]), pin(done.lake, None)
    return own, with_release(own, release, read_catalogue(release, "target"))


def histories(rows, users=3):
    random = np.random.default_rng(1)
    items = random.integers(FIRST_INDEX, rows, 6 * users)
    return Events(np.full(users, UNK), np.arange(0, 6 * users + 1, 6), {"items": items})


@pytest.mark.parametrize("name", NETWORKS)
def test_scores_of_the_models_own_items_stay_as_they_are_to_the_bit(done, name):
    own, later = extended(done, name)
    V = own.model.num_items
    assert list(later.catalogue.raw_ids[V:]) == list(LATER[:2])
    given = histories(V)
    before, after = own.scorer().score(given), later.scorer().score(given)
    assert after.shape == (3, V + 2)
    assert torch.equal(after[:, :V], before)
    assert torch.isfinite(after[:, V:]).all()
    some = np.array([V, 9, 6, V + 1, 12])
    among = later.scorer().score(given, some)
    assert torch.equal(among[:, [1, 2, 4]], own.scorer().score(given, some[[1, 2, 4]]))
    torch.testing.assert_close(among[:, [0, 3]], after[:, V:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_later_item_is_what_an_item_of_its_features_is_that_nobody_has_had(done, name):
    """The same vector of features, without an id and without metadata."""
    own, later = extended(done, name)
    row = int(own.catalogue.rows(np.array([done.rows[7]["index"]]))[0])
    if row == UNK:
        row = next(r for r in range(FIRST_INDEX, own.model.num_items))
    untrained = torch.zeros(own.model.num_items, dtype=torch.bool)
    untrained[row] = True
    own.model.mark_untrained(untrained)
    own.model.knowledge_VS[row] = UNK
    own.model.features["scored"].vectors_0[row] = torch.from_numpy(later.later_items.vectors["text"][0]).float()
    own.model.features["scored"].lacks_0[row] = False
    given = Events(np.array([UNK]), np.array([0, 2]), {"items": np.array([r for r in (9, 11) if r != row] + [12])[:2]})
    expected = own.scorer().score(given)[0, row]
    found = later.scorer().score(given)[0, own.model.num_items]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_later_item_is_read_in_histories(done):
    _, later = extended(done, "bert4rec")
    V = later.model.num_items
    with_new, without = (
        Events(np.array([UNK]), np.array([0, len(items)]), {"items": np.array(items)}) for items in ([8, V], [8])
    )
    assert not torch.equal(later.scorer().score(with_new), later.scorer().score(without))


def test_a_model_of_shuffled_features_takes_no_real_ones_of_later_items(done):
    own, later = extended(done, "bert4rec")
    features = replaced(own.config.model.features, shuffled=True)
    config = replaced(own.config, model=replaced(own.config.model, features=features))
    control, release = dataclasses.replace(own, config=config), pin(done.lake, None)
    assert with_release(control, release, read_catalogue(release, "target")) is control
    assert later is not own


def test_evaluation_recommend_and_the_served_model_rank_later_items_alike(done, tmp_path, monkeypatch):
    own, later = extended(done, "bert4rec")
    release = pin(done.lake, None)
    examples = read_evaluation_set(release, "last-5", "target", "test", ReadOptions())
    place = int(np.flatnonzero(np.asarray(examples.catalogue.raw_ids) == "new0")[0])
    scores = model_scorer(own, examples).score(examples.held_out.histories).whole()
    assert torch.isfinite(scores[:, place]).all()
    save_later(tmp_path / "later.npz", later.later_items)
    shipped = with_later(load_model(done.models["bert4rec"]), load_later(tmp_path / "later.npz"))
    monkeypatch.setenv(loading.RELEASE_OF_FEATURES, f"{done.lake}@{release.number}")
    served = pyfunc.load(done.models["bert4rec"], "")
    rows = rows_by_raw_id(later.catalogue, examples.catalogue)
    for user in range(0, len(examples.users), 11):
        given = examples.held_out.histories.take(np.array([user]))
        raw = [examples.catalogue.raw_ids[item] for item in given.items]
        expected = scores[user].clone()
        expected[given.items] = -torch.inf
        order = expected.argsort(descending=True, stable=True)[:15].tolist()
        best = [examples.catalogue.raw_ids[one] for one in order]
        for one in (served, Recommender(shipped, "")):
            (answer,) = one.answer([Request(raw, user=examples.raw_users[user])], k=15)
            assert answer.items[:15] == [item for item in best if item != "bare"][: len(answer.items)]
            np.testing.assert_allclose(
                answer.scores[:5], expected[order[:5]].numpy(), rtol=1e-5
            )  # and by the same scores
    assert rows[place] == own.model.num_items


def test_an_item_with_neither_is_unknown_and_the_answer_says_so(done):
    _, later = extended(done, "bert4rec")
    known = later.catalogue.raw_ids[8]
    (answer,) = Recommender(later, "v/1").answer([Request([known, "bare", "new0"])], k=50)
    assert answer.unknown == ["bare"]
    assert "bare" not in answer.items
    assert "new1" in answer.items
    (old,) = Recommender(load_model(done.models["bert4rec"]), "v/1").answer([Request([known, "bare", "new0"])], k=50)
    assert old.unknown == ["bare", "new0"]


def test_a_request_brings_vectors_of_its_own(done):
    """The numbers of the encoder, as they are in the table: the answer is that with the release's."""
    own, later = extended(done, "bert4rec")
    known = own.catalogue.raw_ids[8]
    given = [
        {"item": item, "encoder": "text", "vector": vector.tolist()}
        for item, vector in zip(LATER[:2], done.vectors[-2:], strict=True)
    ]
    records = json.loads(json.dumps([{"items": [known, "new0"], "features": given}, {"items": [known, "new0"]}]))
    with_own, without = Recommender(own, "v/1").answer(parse(records), k=50)
    (expected,) = Recommender(later, "v/1").answer(parse(records[1:]), k=50)
    assert with_own == expected
    assert without.unknown == ["new0"]
    for wrong, message in [
        ([{"item": "new0", "encoder": "other", "vector": [1.0]}], "expected encoders that v/1 reads"),
        ([{"item": "new0", "encoder": "text", "vector": [1.0]}], "expected 10 finite numbers by 'text', found 1"),
        ([{"item": "new0", "vector": [1.0]}], "`features` is a list of objects"),
    ]:
        with pytest.raises(RequestError, match=message):
            Recommender(own, "v/1").answer(parse([{"items": [known], "features": wrong}]))


def test_vectors_by_another_encoder_of_that_name_are_refused(done, tmp_path):
    lake = str(tmp_path / "lake")
    shutil.copytree(done.lake, lake)
    release = pin(lake, None)
    rows = release.read(ITEMS, ["item", "index"]).to_pylist()
    vectors = np.random.default_rng(2).normal(size=(len(rows), WIDTH)).astype(np.float32)
    own = load_model(done.models["bert4rec"])
    write_vectors(lake, rows, vectors, weights="f00d")
    with pytest.raises(LaterItemsError, match=r"expected vectors by 'text' as .* found others .*weights f00d"):
        with_release(own, pin(lake, None), read_catalogue(pin(lake, None), "target"))


def test_recommend_ships_later_items_to_its_workers(spark, done):
    """The table has what the served model answers."""
    recommend.run(config(done.lake, model=str(done.models["bert4rec"]), release=None, k=15))
    _, later = extended(done, "bert4rec")
    found = rows_of(done.lake)
    assert {"new0", "new1"} <= {row["item"] for rows in found.values() for row in rows}
    served, histories = Recommender(later, ""), histories_of(done.lake)
    for user in sorted(histories)[::7]:
        (answer,) = served.answer([Request(histories[user], user=user)], k=15)
        assert [row["item"] for row in found[user]] == answer.items


def test_features_of_users_are_no_features_of_later_items():
    """With two encoders of items and one of users, later items have the vectors that they have without users'."""
    random, num = np.random.default_rng(0), FIRST_INDEX + 9
    has = torch.arange(num) >= FIRST_INDEX
    items = tuple(FeatureTable(torch.from_numpy(random.normal(size=(num, width))), has) for width in (3, 4))
    users = (FeatureTable(torch.from_numpy(random.normal(size=(num, 5))), has),)
    later = LaterItems(
        np.array([-1, -1]),
        ["a", "b"],
        ["", ""],
        {"one": random.normal(size=(2, 3)).astype(np.float16), "two": random.normal(size=(2, 4)).astype(np.float16)},
        {"one": np.ones(2, bool), "two": np.ones(2, bool)},
    )
    found = []
    for user_features in ((), users):
        joined = {"user_features": {"encoders": ["three"]}} if user_features else {}
        config = Bert4RecConfig(
            width=8, heads=2, blocks=1, user_width=4, knowledge={}, features={"encoders": ["one", "two"]}, **joined
        )
        sizes = ModelSizes(
            num_users=num,
            num_entities=0,
            knowledge_VS=torch.zeros(num, 0, dtype=torch.int32),
            features=items,
            user_features=user_features,
        )
        model = build_model(config, sizes, seed=1)
        torch.nn.init.ones_(model.features["scored"].out.weight)
        found.append(later_vectors(model, later))
    assert found[0].vectors_NQ.any()
    assert torch.equal(found[0].vectors_NQ, found[1].vectors_NQ)
