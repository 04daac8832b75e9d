"""Users without an item, answered by their features alone: evaluated, recommended and served alike."""

import datetime as dt
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from pydantic import ValidationError

from etl.tables import FIRST_INDEX, USERS
from tests.fixtures.feature_lakes import write_vectors
from tests.fixtures.lakes import NUM_TASTES
from tests.fixtures.recommendations import config, rows_of
from tests.fixtures.trainings import tiny
from trainer.config import Bert4RecConfig, PretrainConfig
from trainer.config.evaluation import BaselinesConfig
from trainer.data.held_out import ReadOptions
from trainer.data.release import pin
from trainer.evaluation.item_ranking import rank
from trainer.evaluation.scorers import baseline_scorers, model_scorer, read_evaluation_set
from trainer.inference.model_folder import load_model
from trainer.inference.recommender import Recommender, Request
from trainer.recipes import recommend
from trainer.recipes.pretrain import run as pretrain

BY_TASTE = {"encoders": ["taste"], "width": 8, "id_dropout": 0.5, "alone": True}
MODEL = {"width": 16, "user_width": 8, "knowledge": {}, "user_features": BY_TASTE}


@pytest.fixture(scope="module")
def done(spark, tiny_lake, tmp_path_factory):
    """A lake with each user's taste as a vector, but of one in eleven; a model of the target that reads it."""
    root = tmp_path_factory.mktemp("by_features")
    lake = str(shutil.copytree(tiny_lake, root / "lake"))
    users = [row for row in pin(lake, None).read(USERS, ["user", "index"]).to_pylist() if row["index"] % 11]
    index = np.array([row["index"] for row in users])
    vectors = np.eye(NUM_TASTES, dtype=np.float32)[(index - FIRST_INDEX) % NUM_TASTES]
    vectors += 0.05 * np.random.default_rng(0).normal(size=vectors.shape).astype(np.float32)  # no two are the same
    write_vectors(lake, users, vectors, kind="user", encoder="taste")
    train = {"epochs": 40, "min_epochs": 0, "learning_rate": 0.01, "batch_size": 16}
    settings = {"data": {"domain": "target", "split": "cold-users"}, "train": train}
    run = pretrain(tiny(PretrainConfig, root, lake, name="alone", model=MODEL, **settings))
    named = {row["user"] for row in users}
    return SimpleNamespace(lake=lake, model=str(run.model), named=named, root=root)


def test_held_out_users_are_ranked_by_their_taste(done):
    examples = read_evaluation_set(pin(done.lake, None), "cold-users", "target", "test", ReadOptions())
    assert not examples.held_out.histories.lengths.any()
    trained = load_model(done.model)
    ours = model_scorer(trained, examples)
    popular = next(one for one in baseline_scorers(examples, BaselinesConfig()) if one.label == "popularity")
    by = {one.label: rank(one.score, examples.held_out)["full"]["NDCG@10"] for one in (ours, popular)}
    has = np.array([user in done.named for user in examples.raw_users])
    model, counts = by[ours.label], by["popularity"]
    assert model[has].mean() > counts[has].mean() + 0.03
    assert np.array_equal(model[~has], counts[~has])  # of whom nothing is known
    without = trained.config.model.user_features.model_copy(update={"alone": False})
    trained.model.config = trained.config.model.model_copy(update={"user_features": without})
    before = rank(model_scorer(trained, examples).score, examples.held_out)["full"]["NDCG@10"]
    assert np.array_equal(before, counts)


def test_rows_are_the_answers_and_the_evaluations(done):
    recommend.run(config(done.lake, model=done.model, k=16, domain="target", split="last-5"))
    found = rows_of(done.lake)
    served = Recommender(load_model(done.model), "x")
    new = "u000"  # has no item of the target, and a taste
    assert new in done.named
    answer = served.answer([Request([], new)], k=16)[0]
    assert answer.basis == "model"
    assert answer.items == [row["item"] for row in found[new]]
    assert answer.scores == pytest.approx([row["score"] for row in found[new]], rel=1e-4, abs=1e-5)
    examples = read_evaluation_set(pin(done.lake, None), "cold-users", "target", "test", ReadOptions())
    scores = model_scorer(load_model(done.model), examples).score(examples.held_out.histories).whole().numpy()
    raw_ids = examples.catalogue.raw_ids
    for user, row in zip(examples.raw_users, scores, strict=True):
        alone = served.answer([Request([], user)], k=16)[0]
        assert alone.basis == ("model" if user in done.named else "popular")
        best = np.argsort(-row[FIRST_INDEX:], kind="stable") + FIRST_INDEX
        if user in done.named:
            assert alone.items == [raw_ids[place] for place in best[: len(alone.items)]]


def test_a_model_that_reads_times_answers_by_features_when_it_is_asked(done):
    """Without an event there is no time but the request's, which nothing is added for."""
    model = MODEL | {"time": {"bias": True, "intervals": True}}
    settings = {"data": {"domain": "target", "split": "cold-users"}, "task": {"kind": "next_item"}}
    train = {"epochs": 2, "min_epochs": 2, "learning_rate": 0.05}
    run = pretrain(tiny(PretrainConfig, done.root, done.lake, name="timed", model=model, train=train, **settings))
    lake = str(shutil.copytree(done.lake, done.root / "timed-lake"))
    recommend.run(config(lake, model=str(run.model), k=16, domain="target", split="last-5", time="2001-09-10"))
    found, served = rows_of(lake), Recommender(load_model(run.model), "x")
    asked = dt.datetime(2001, 9, 10, tzinfo=dt.UTC).timestamp()
    answer = served.answer([Request([], "u000", time=asked)], k=16)[0]
    assert answer.basis == "model"
    assert answer.items == [row["item"] for row in found["u000"]]
    assert answer.scores == pytest.approx([row["score"] for row in found["u000"]], rel=1e-4, abs=1e-5)
    examples = read_evaluation_set(pin(done.lake, None), "cold-users", "target", "test", ReadOptions())
    scores = model_scorer(load_model(run.model), examples).score(examples.held_out.histories).whole().numpy()
    place = next(place for place, user in enumerate(examples.raw_users) if user in done.named)
    alone = served.answer([Request([], examples.raw_users[place], time=asked)], k=16)[0]
    row_of = {raw: row for row, raw in enumerate(examples.catalogue.raw_ids)}
    expected = [scores[place, row_of[item]] for item in alone.items]
    np.testing.assert_allclose(alone.scores, expected, rtol=1e-4, atol=1e-5)


def test_who_is_not_known_gets_what_is_popular(done):
    served = Recommender(load_model(done.model), "x")
    popular = served.answer([Request([])])[0]
    assert popular.basis == "popular"
    assert served.answer([Request([], "nobody")])[0] == popular
    assert Recommender(load_model(done.model, users=False), "x").answer([Request([], "u000")])[0] == popular


def test_features_alone_must_be_seen_in_training():
    with pytest.raises(ValidationError, match="alone: expected an id_dropout above 0, found 0"):
        Bert4RecConfig(user_features={"encoders": ["taste"], "alone": True})
