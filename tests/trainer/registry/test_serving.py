"""Answers of a served model: the scorer's own scores over raw ids, in the process and through `mlflow models serve`."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from etl.tables import FIRST_INDEX, UNK
from tests.fixtures.folders import alike, write_model
from tests.fixtures.ports import free_port
from tests.fixtures.stores import enter_store
from trainer.data.events import Events
from trainer.inference.model_folder import load_model
from trainer.inference.recommender import Recommender, Request, RequestError, parse
from trainer.registry import CHAMPION, Registry


@pytest.fixture(scope="module")
def folder(tiny_lake, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("served") / "model", tiny_lake, seed=3, skill=0.3)


@pytest.fixture(scope="module")
def trained_model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def recommender(trained_model):
    return Recommender(trained_model, "graftrec/3")


def histories(trained_model, *rows, users=None):
    """Histories of catalogue rows."""
    return Events.of(
        np.array(users or [UNK] * len(rows)),
        np.cumsum([0, *map(len, rows)]),
        np.array([row for history in rows for row in history], dtype=np.int64),
        np.empty(0, dtype=np.int64),
    )


def raw(trained_model, *rows):
    return [trained_model.catalogue.raw_ids[row] for row in rows]


# --- answers ---------------------------------------------


def test_scores_are_the_scorers_and_what_was_seen_is_left_out(trained_model, recommender):
    seen = [7, 12, 9]
    answer = recommender.answer([Request(raw(trained_model, *seen))], k=1_000)[0]
    scores = trained_model.scorer().score(histories(trained_model, seen))[0]
    rows = [row for row in range(FIRST_INDEX, len(trained_model.catalogue)) if row not in seen]
    rows.sort(key=lambda row: -float(scores[row]))
    assert answer.items == raw(trained_model, *rows)
    assert answer.scores == [float(scores[row]) for row in rows]
    assert (answer.basis, answer.unknown, answer.version) == ("model", [], "graftrec/3")


def test_k_cuts_the_list(trained_model, recommender):
    request = Request(raw(trained_model, 6, 8))
    whole, cut = recommender.answer([request], k=1_000)[0], recommender.answer([request], k=3)[0]
    assert cut.items == whole.items[:3]
    assert cut.scores == whole.scores[:3]


def test_unknown_ids_are_ignored_and_reported(trained_model, recommender):
    known = raw(trained_model, 6, 8)
    mixed = recommender.answer([Request(["nothing", known[0], "", known[1], "nothing"])])[0]
    assert mixed.unknown == ["nothing", "", "nothing"]
    assert mixed.scores == recommender.answer([Request(known)])[0].scores


@pytest.mark.parametrize("items", [[], ["nothing", "never"]])
def test_without_a_known_item_the_popular_ones_are_answered(trained_model, recommender, items):
    answer = recommender.answer([Request(items)], k=4)[0]
    counts = trained_model.popularity
    best = sorted(range(FIRST_INDEX, len(counts)), key=lambda row: (-counts[row], row))[:4]
    assert answer.items == raw(trained_model, *best)
    assert answer.scores == [float(counts[row]) for row in best]
    assert (answer.basis, answer.unknown) == ("popular", items)


def test_a_known_user_is_asked_as_that_user(trained_model, recommender):
    items, user = raw(trained_model, 6, 8), trained_model.users["u007"]
    as_user = recommender.answer([Request(items, "u007")], k=5)[0]
    scores = trained_model.scorer().score(histories(trained_model, [6, 8], users=[user]))[0]
    assert as_user.scores == pytest.approx(
        sorted(scores[FIRST_INDEX:].tolist(), reverse=True)[: len(as_user.scores)], abs=2
    )
    assert as_user.scores[0] in scores.tolist()
    stranger, anyone = recommender.answer([Request(items, "nobody"), Request(items)], k=5)
    assert stranger == anyone
    assert as_user.scores != anyone.scores


def test_many_requests_are_answered_in_order_and_like_one(folder, trained_model, recommender):
    requests = [Request(raw(trained_model, *range(FIRST_INDEX, FIRST_INDEX + n % 5))) for n in range(600)]
    answers = recommender.answer(requests, k=3)
    assert len(answers) == 600
    for n in (0, 1, 4, 599):
        alone = recommender.answer([requests[n]], k=3)[0]
        assert answers[n].items == alone.items
        assert answers[n].scores == alike(alone.scores, folder)


def test_a_model_without_its_user_table_answers(folder, trained_model):
    anonymous = Recommender(load_model(folder, users=False), "graftrec/3")
    answer = anonymous.answer([Request(raw(trained_model, 6, 8), "u007")])[0]
    assert len(answer.items) == 10


@pytest.mark.parametrize("k", [0, -1, 10_001])
def test_a_senseless_k_is_refused(recommender, k):
    with pytest.raises(RequestError, match="k is a number of items from 1 to 10000"):
        recommender.answer([Request([])], k)


@pytest.mark.parametrize(
    "record",
    [{}, {"items": "318"}, {"items": [True]}, {"items": None}, {"items": [["1"]]}, {"items": ["1"], "user": []}],
)
def test_a_malformed_record_is_refused_by_place(record):
    with pytest.raises(RequestError, match=r"record 1: `(items|user)` is a"):
        parse([{"items": []}, record])


def test_no_record_at_all_is_refused():
    with pytest.raises(RequestError, match="expected one record at least"):
        parse([])
    with pytest.raises(RequestError, match=r"record 0: a record has items, user, event_types.*, found 'item'"):
        parse([{"item": ["1"]}])


def test_ids_of_a_request_follow_the_rule_of_logs():
    items = [5, 5.0, " 5", "5.0", "28.00", 2**62 + 1, "007", 12.5, "", "nothing"]
    ids = ["5", "5", "5", "5", "28", str(2**62 + 1), "007", "12.5", "", "nothing"]
    assert parse([{"items": items, "user": 7.0}]) == [Request(ids, "7")]
    assert parse([{"baskets": [np.array([1, 2]), ["x "]]}]) == [Request([], baskets=[["1", "2"], ["x"]])]
    with pytest.raises(
        RequestError, match=r"record 0: `items`: expected an id, found 1e\+17, which may have lost digits"
    ):
        parse([{"items": ["1", 1e17]}])


def test_records_of_a_data_frame_are_parsed():
    assert parse([{"items": np.array(["1", "2"]), "user": float("nan")}]) == [Request(["1", "2"])]


# --- through MLflow, in processes of their own, away from the sources ---------------------------------------------


@pytest.fixture(scope="module")
def scoring_server(folder, tmp_path_factory):
    """`mlflow models serve` of the champion. Yields its port and its store's folder."""
    with pytest.MonkeyPatch.context() as patch:
        store = tmp_path_factory.mktemp("store")
        enter_store(store, patch)
        Registry().register(folder, alias=CHAMPION)
        port = free_port()
        command = ["mlflow", "models", "serve", "-m", "models:/graftrec@champion", "--env-manager", "local"]
        with (store / "server.log").open("w") as log:
            server = subprocess.Popen(
                [sys.executable, "-m", *command, "--port", str(port)],
                cwd=store,
                env=without_sources(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + 400
            while not answers(port):
                assert server.poll() is None, (store / "server.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.2)
            yield port, store
        finally:
            os.killpg(server.pid, 15)
            server.wait()


def without_sources():
    """An environment in which nothing is unpickled and the checkout is not on the path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    path = f"{Path(sys.executable).parent}:{environment['PATH']}"
    return environment | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "PATH": path, "CUDA_VISIBLE_DEVICES": ""}


def answers(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False


def ask(port, body):
    """(status, JSON) of a request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.slow
@pytest.mark.ci
def test_the_scoring_server_answers_raw_ids_with_the_scorers_scores(scoring_server, folder, trained_model, recommender):
    port, _ = scoring_server
    items = raw(trained_model, 6, 8)
    records = [{"user": "u007", "items": items}, {"items": ["zzz", *items]}, {"items": []}]
    status, answer = ask(port, {"dataframe_records": records, "params": {"k": 4}})
    assert status == 200
    expected = recommender.answer(parse(records), k=4)
    for found, one in zip(answer["predictions"], expected, strict=True):
        assert found["items"] == one.items
        assert found["scores"] == alike(one.scores, folder)
        assert (found["basis"], found["unknown"]) == (one.basis, one.unknown)
        assert found["version"] == "graftrec/1"
    assert ask(port, {"inputs": records[1:2], "params": {"k": 4}})[1]["predictions"] == answer["predictions"][1:2]


@pytest.mark.slow
@pytest.mark.ci
def test_a_loaded_version_runs_the_sources_that_travel_with_it(scoring_server, trained_model):
    _, store = scoring_server
    script = (
        "import json, sys, mlflow, pandas as pd\n"
        "model = mlflow.pyfunc.load_model('models:/graftrec@champion')\n"
        "answer = model.predict(pd.DataFrame({'items': [json.loads(sys.argv[1])]}), params={'k': 2})\n"
        "import etl, trainer\nanswer = answer[0]\n"
        "print(json.dumps([answer['version'], len(answer['items']), etl.__file__, trainer.__file__]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(raw(trained_model, 6, 8))],
        cwd=store,
        env=without_sources(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    version, count, *sources = json.loads(done.stdout.splitlines()[-1])
    assert (version, count) == ("graftrec/1", 2)
    assert all(Path(source).is_relative_to(store) for source in sources)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    "body",
    [
        b"not JSON",
        {},
        [],
        {"dataframe_records": []},
        {"dataframe_records": [{"user": "u007"}]},
        {"dataframe_records": [{"items": "318"}]},
        {"dataframe_records": [{"items": [318]}]},
        {"dataframe_records": [{"items": None}]},
        {"dataframe_records": [{"items": {"a": 1}}]},
        {"dataframe_records": [{"items": ["1"], "user": [5]}]},
        {"dataframe_records": [{"items": ["1"]}], "params": {"k": 0}},
        {"dataframe_records": [{"items": ["1"]}], "params": {"k": "many"}},
    ],
    ids=str,
)
def test_the_scoring_server_refuses_a_malformed_request(scoring_server, body):
    status, answer = ask(scoring_server[0], body)
    assert status == 400
    assert answer["message"]
