"""Models that read times, from the lake to the answer: evaluation, recommendations and serving say the same at the same
time, and what has no times is refused."""

import dataclasses
import datetime as dt
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from etl import tables
from etl.tables import FIRST_INDEX, TIME_ORDINAL
from tests.fixtures.folders import write_model
from tests.fixtures.lakes import build_tiny_lake
from tests.fixtures.recommendations import config as recommend_config
from tests.fixtures.recommendations import histories_of, rows_of
from tests.fixtures.stores import enter_store
from tests.fixtures.trainings import config_file
from trainer.__main__ import main
from trainer.config import EvaluateConfig, PretrainConfig
from trainer.data.catalogue import read_catalogue
from trainer.data.held_out import ReadOptions
from trainer.data.release import DataError, pin
from trainer.data.sequences import SequenceDataset
from trainer.evaluation.scorers import model_scorer, read_evaluation_set
from trainer.inference import recommender
from trainer.inference.model_folder import load_model
from trainer.inference.recommender import Recommender, Request, RequestError, parse
from trainer.recipes import evaluate, pretrain, recommend

SECOND = 1_000_000
MODEL = {"user_width": 0, "knowledge": {}, "dropout": 0.0}
CAUSAL = {"kind": "next_item"}
KINDS = {
    "bias": (MODEL | {"time": {"bias": True, "intervals": True}}, CAUSAL),
    "last event": (MODEL | {"time": {"bias": True, "request_time": "last_event"}}, CAUSAL),
    "masked": (MODEL | {"time": {"bias": True}}, {"kind": "masked_item"}),
    "caser": (
        {"kind": "caser", "width": 8, "max_length": 24, "user_width": 0, "knowledge": {}, "time": {"intervals": True}},
        CAUSAL,
    ),
}


def settings(folder, lake, name, **more):
    model, task = KINDS[name]
    if "kind" in model:
        model = dict(model)
    train = {"learning_rate": 0.05, "epochs": 2, "min_epochs": 2}
    config = json.loads(config_file(folder, lake, task=task, train=train).read_text())
    config["model"] = model if "kind" in model else config["model"] | model
    config["data"] = {"lake": str(lake), "domain": "target"} | more
    return PretrainConfig.model_validate(config)


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tiny_lake, tmp_path_factory):
    folder = tmp_path_factory.mktemp("times")
    result = pretrain.run(settings(folder, tiny_lake, request.param))
    return SimpleNamespace(model=result.model, lake=tiny_lake, name=request.param, metrics=result.metrics)


def as_requests(trained_model, histories, raw_users):
    """Of histories in the model's rows."""
    found = []
    for place, user in enumerate(raw_users):
        own = slice(histories.offsets[place], histories.offsets[place + 1])
        items = [trained_model.catalogue.raw_ids[row] for row in histories.items[own]]
        seconds = (histories.times[own] / SECOND).tolist()
        found.append(Request(items, user, times=seconds, time=histories.request_times[place] / SECOND))
    return found


# --- one answer ---------------------------------------------


def test_what_evaluation_ranks_by_is_what_is_answered(trained):
    trained_model = load_model(trained.model)
    examples = read_evaluation_set(pin(trained.lake, None), "last-5", "target", "test", ReadOptions())
    histories = examples.held_out.histories
    sequences = SequenceDataset(examples.release, "last-5", "target").read_all(times=True)
    first = {
        int(u): int(sequences.times[sequences.offsets[n] + sequences.test_start[n]])
        for n, u in enumerate(sequences.users)
    }
    assert histories.request_times.tolist() == [first[int(user)] for user in examples.users]
    scores = model_scorer(trained_model, examples).score(histories).whole()
    answers = Recommender(trained_model, "m/1").answer(as_requests(trained_model, histories, examples.raw_users), 1_000)
    row_of = {raw: row for row, raw in enumerate(examples.catalogue.raw_ids)}
    for place, answer in enumerate(answers):
        expected = [scores[place, row_of[item]].item() for item in answer.items]
        np.testing.assert_allclose(answer.scores, expected, rtol=1e-5, atol=1e-5)
    # An hour later it is another question, where the model knows of it.
    later = dataclasses.replace(histories, request_times=histories.request_times + 3_600 * SECOND)
    same = torch.equal(model_scorer(trained_model, examples).score(later).whole(), scores)
    assert same == (trained.name == "last event")
    assert trained_model.config.reads_request_time != same


def test_the_recipe_evaluates_it(trained, tmp_path):
    given = {"model": str(trained.model), "output": str(tmp_path), "name": "e", "tracking": {"enabled": False}}
    given["runtime"] = {"progress": False, "threads": 1}
    assert evaluate.run(EvaluateConfig.model_validate(given))


def test_recommendations_are_what_is_answered_at_that_time(trained, spark, tmp_path, monkeypatch):
    lake, model = str(tmp_path / "lake"), str(trained.model)
    shutil.copytree(trained.lake, lake)
    enter_store(tmp_path / "store", monkeypatch)
    when = dt.datetime.fromtimestamp(1_000_001_500, dt.UTC)  # minutes after the last events
    recommend.run(recommend_config(lake, model=model, time=when))
    found, server = rows_of(lake), Recommender(load_model(model, users=False), "m/1")
    sequences = SequenceDataset(pin(lake, None), "last-5", "target").read_all(times=True)
    histories = histories_of(lake)
    seconds = {
        user: (sequences.times[start:stop] / SECOND).tolist()
        for user, start, stop in zip(histories, sequences.offsets, sequences.offsets[1:], strict=False)
    }
    for user, items in histories.items():
        (answer,) = server.answer([Request(items, None, times=seconds[user], time=when.timestamp())], k=4)
        assert [row["item"] for row in found[user]] == answer.items
        np.testing.assert_allclose([row["score"] for row in found[user]], answer.scores, rtol=1e-5, atol=1e-6)
    assert not recommend.run(recommend_config(lake, model=model, time=when)).committed
    later = recommend.run(recommend_config(lake, model=model, time=when + dt.timedelta(minutes=20)))
    knows = load_model(model).config.reads_request_time
    assert later.committed == knows
    scores = {user: [row["score"] for row in rows] for user, rows in rows_of(lake).items()}
    assert ({user: [row["score"] for row in rows] for user, rows in found.items()} != scores) == knows


def test_a_request_without_a_time_is_made_now(trained, monkeypatch):
    trained_model = load_model(trained.model)
    server, items = (
        Recommender(trained_model, "m/1"),
        list(trained_model.catalogue.raw_ids[FIRST_INDEX : FIRST_INDEX + 3]),
    )
    monkeypatch.setattr(recommender.time, "time", lambda: 1.7e9)
    times = [1.6e9, 1.65e9, 1.65e9]
    now, then = server.answer([Request(items, times=times), Request(items, times=times, time=1.7e9)])
    assert now == then
    ahead = [time + 2e8 for time in times]  # a clock that is ahead of ours: asked at the last event
    now, then = server.answer([Request(items, times=ahead), Request(items, times=ahead, time=ahead[-1])])
    assert now == then


# --- what is refused ---------------------------------------------


def test_a_request_without_times_is_refused(trained):
    trained_model = load_model(trained.model)
    items = list(trained_model.catalogue.raw_ids[FIRST_INDEX : FIRST_INDEX + 3])
    with pytest.raises(
        RequestError, match=r"record 1: expected `times`, which m/1 reads.*give when each item's event was"
    ):
        Recommender(trained_model, "m/1").answer([Request(items, times=[1.0, 2.0, 3.0]), Request(items)])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"times": [1, 2]}, "as long as `items`, found 2 times of 3 items"),
        ({"times": [1, 3, 2]}, "oldest first, found time 2 before the one"),
        ({"times": [1, "2", 3]}, "number of seconds since 1970"),
        ({"times": [1, None, 3]}, "number of seconds since 1970"),
        ({"times": [1, True, 3]}, "number of seconds since 1970"),
        ({"times": 5}, "for each of `items`, found 5"),
        ({"times": [1, 2, float("inf")]}, "number of seconds since 1970"),
        ({"times": [1, 2, 3], "time": float("-inf")}, "`time` is a number of seconds"),
        ({"times": [1, 2, 3], "time": "now"}, "`time` is a number of seconds.*found 'now'"),
        ({"times": [1, 2, 1.7e12]}, "divide milliseconds by 1,000"),
        ({"times": [1, 2, 3], "time": 1.7e15}, "microseconds by 1,000,000"),
        ({"times": [1, 2, 30], "time": 29}, "expected events until the request's `time`, 29, found one at 30"),
    ],
)
def test_times_that_can_not_be_are_refused_by_record(more, message):
    with pytest.raises(RequestError, match=message):
        parse([{"items": ["1", "2", "3"], **more}])


def test_times_are_parsed_and_may_be_left_out():
    first, second = parse([{"items": ["1", "2"], "times": [1, 1.5], "time": 2}, {"items": ["1"], "time": float("nan")}])
    assert (first.times, first.time) == ([1, 1.5], 2)
    assert (second.times, second.time) == (None, None)
    frame = parse([{"items": np.array(["1"]), "times": np.array([7.0]), "time": np.float64(8)}])[0]
    assert (frame.times, frame.time) == ([7.0], 8.0)


@pytest.fixture(scope="module")
def untimed(tmp_path_factory):
    """A lake whose times are mere order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tables.TABLES, "sequences", tables.SEQUENCES.of(TIME_ORDINAL))
        return build_tiny_lake(tmp_path_factory.mktemp("untimed") / "lake")


def test_a_log_without_times_trains_no_model_that_reads_them(untimed, tmp_path, capsys):
    config = settings(tmp_path, untimed, "bias")
    with pytest.raises(
        DataError, match=r"expected a log with times, which model bert4rec reads .* found mere order in"
    ):
        pretrain.run(config)
    assert not (tmp_path / "runs" / "tiny" / "model").exists()
    path = config_file(tmp_path, untimed, task=CAUSAL, model={"time": {"bias": True}})
    assert main(["pretrain", "--config", str(path)]) == 2
    assert "leave model.time out" in capsys.readouterr().err
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


def test_a_log_without_times_evaluates_and_answers_none(untimed, trained, tmp_path, monkeypatch):
    release = pin(untimed, None)
    examples = read_evaluation_set(release, "last-5", "target", "test", ReadOptions())
    with pytest.raises(DataError, match="found mere order in sequences"):
        model_scorer(load_model(trained.model), examples)
    enter_store(tmp_path / "store", monkeypatch)
    with pytest.raises(DataError, match="found mere order in sequences"):
        recommend.run(recommend_config(untimed, model=str(trained.model)))


# --- a model of all domains ---------------------------------------------


@pytest.fixture(scope="module")
def joint(tiny_lake, tmp_path_factory):
    """It reads all domains and predicts the target."""
    folder = tmp_path_factory.mktemp("joint")
    return pretrain.run(settings(folder, tiny_lake, "bias", domain="all", predicted="target", split="joint-5")).model


def test_a_joint_model_reads_the_times_of_all_domains_until_the_request(joint, tiny_lake):
    trained_model, release = load_model(joint), pin(tiny_lake, None)
    examples = read_evaluation_set(release, "last-5", "target", "test", ReadOptions())
    given = examples.held_out.histories
    scores = model_scorer(trained_model, examples).score(given).whole()
    whole = SequenceDataset(release, "last-5", "all").read_all(times=True)
    everything = read_catalogue(release, "all")
    target = set(examples.catalogue.raw_ids)
    place_of = {int(user): place for place, user in enumerate(whole.users)}
    row_of = {raw: row for row, raw in enumerate(examples.catalogue.raw_ids)}
    server = Recommender(trained_model, "m/1")
    for place, user in enumerate(examples.users.tolist()):
        own = slice(whole.offsets[place_of[user]], whole.offsets[place_of[user] + 1])
        asked = int(given.request_times[place])
        events = [  # a user's events are a minute apart: those before the first held-out one are the input
            (everything.raw_ids[row], int(when) / SECOND)
            for row, when in zip(everything.rows(whole.items[own]), whole.times[own], strict=True)
            if when < asked
        ]
        assert {raw for raw, _ in events} - target
        items, times = zip(*events, strict=True)
        (answer,) = server.answer([Request(list(items), times=list(times), time=asked / SECOND)], 1_000)
        expected = [scores[place, row_of[item]].item() for item in answer.items]
        np.testing.assert_allclose(answer.scores, expected, rtol=1e-5, atol=1e-5)


def test_a_companion_that_reads_times_passes_over_requests_without(joint, tiny_lake, tmp_path):
    champion = load_model(write_model(tmp_path / "champion", tiny_lake, seed=5))
    companion = Recommender(load_model(joint), "m/2")
    server = Recommender(champion, "m/1", companion=lambda: companion)
    known = set(champion.catalogue.raw_ids)
    items = [raw for raw in companion.trained_model.catalogue.raw_ids[FIRST_INDEX:] if raw not in known][:2]
    without, with_times = server.answer([Request(items), Request(items, times=[1e9, 1e9 + 60], time=1e9 + 120)])
    assert (without.basis, without.version) == ("popular", "m/1")
    assert (with_times.basis, with_times.version) == ("model", "m/2")
