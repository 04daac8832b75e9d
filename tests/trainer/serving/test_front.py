"""The HTTP server: answers, refusals, limits, batches, metrics; the champion that moves under load; its end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from etl.settings import GraftrecError
from etl.tables import FIRST_INDEX
from tests.fixtures.folders import alike, write_model
from tests.fixtures.served_models import Client, served
from tests.fixtures.stores import enter_store, packed_as
from trainer.config import ServeConfig
from trainer.inference.model_folder import load_model
from trainer.inference.recommender import Recommender, parse
from trainer.registry import CHAMPION, COMPANION, Registry
from trainer.serving import front, server
from trainer.tracking import TrackingError


@pytest.fixture(scope="module")
def folders(tiny_lake, tmp_path_factory):
    """Three models of the domain `target`."""
    root = tmp_path_factory.mktemp("models")
    return [write_model(root / f"model-{seed}", tiny_lake, seed=seed, skill=0.3) for seed in range(3)]


@pytest.fixture
def store(tmp_path, monkeypatch):
    enter_store(tmp_path / "store", monkeypatch)
    return tmp_path / "store"


@pytest.fixture(scope="module")
def one(folders):
    """A server of a model folder, for what needs no registry."""
    with served(model=folders[0], limits={"body_bytes": 20_000, "records": 5}) as started:
        yield started


@pytest.fixture(scope="module")
def items(folders):
    return list(load_model(folders[0]).catalogue.raw_ids[FIRST_INDEX : FIRST_INDEX + 8])


# --- answers ---------------------------------------------


def test_answers_are_the_recommenders(one, folders, items):
    records = [{"user": "u007", "items": items[:2]}, {"items": ["zzz", *items[:3]]}, {"items": []}]
    status, answer, _ = Client(one).ask({"dataframe_records": records, "params": {"k": 4}})
    assert status == 200
    expected = Recommender(load_model(folders[0]), "one").answer(parse(records), k=4)
    for found, wanted in zip(answer["predictions"], expected, strict=True):
        assert found["items"] == wanted.items
        assert found["scores"] == alike(wanted.scores, folders[0])
        assert (found["basis"], found["unknown"]) == (wanted.basis, wanted.unknown)
        assert re.fullmatch(r"unregistered-\w{12}", found["version"])


def test_requests_at_once_are_answered_together_and_each_as_alone(folders, items):
    alone = Recommender(load_model(folders[0]), "one")
    results = {}
    with served(model=folders[0]) as one:
        batcher = one._front._batcher
        begun, goes_on, current = threading.Event(), threading.Event(), batcher._current

        def slow():
            begun.set()
            assert goes_on.wait(30)
            return current()

        batcher._current = slow

        def ask(number):
            body = {"inputs": [{"items": items[: 1 + number % 7]}], "params": {"k": 3 + number % 2}}
            results[number] = Client(one).ask(body)[:2]

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
        threads[0].start()
        assert begun.wait(30)  # while the first is computed, the others come
        for thread in threads[1:]:
            thread.start()
        while batcher._waiting < 11:
            time.sleep(0.01)
        goes_on.set()
        for thread in threads:
            thread.join()
        text = Client(one).get("/metrics")[1]
    assert 'graftrec_batch_records_bucket{le="1.0"} 1.0\n' in text
    assert "graftrec_batch_records_count 2.0\n" in text
    for number, (status, answer) in results.items():
        assert status == 200
        wanted = alone.answer(parse([{"items": items[: 1 + number % 7]}]), k=3 + number % 2)[0]
        assert answer["predictions"][0]["items"] == wanted.items
        assert answer["predictions"][0]["scores"] == alike(wanted.scores, folders[0])


def test_one_bad_request_in_a_batch_is_refused_alone(one, items):
    batcher = one._front._batcher
    statuses, current, goes_on = {}, batcher._current, threading.Event()
    bodies = [
        {"inputs": [{"items": items[:1]}]},
        {"inputs": [{"items": items[:2]}]},
        {"inputs": [{"items": items}, {"baskets": [items]}]},  # found only by the model, which reads items
        {"inputs": [{"items": items[:3]}]},
    ]

    def ask(place):
        statuses[place] = Client(one).ask(bodies[place])[:2]

    def slow():
        assert goes_on.wait(30)
        return current()

    batcher._current = slow
    try:
        threads = [threading.Thread(target=ask, args=(place,)) for place in range(4)]
        threads[0].start()
        while batcher._busy_since is None:
            time.sleep(0.01)
        for thread in threads[1:]:
            thread.start()
        time.sleep(0.2)
        goes_on.set()
        for thread in threads:
            thread.join()
    finally:
        batcher._current = current
    assert [statuses[place][0] for place in range(4)] == [200, 200, 400, 200]
    assert statuses[2][1]["message"].startswith("record 1: expected `items`")


def test_a_request_has_an_id(one, items):
    body = {"inputs": [{"items": items[:1]}]}
    assert Client(one).ask(body, {"X-Request-Id": "a-1.b"})[2]["x-request-id"] == "a-1.b"
    for given in ("", "x" * 65, "a b", "a;b"):
        assert re.fullmatch(r"[0-9a-f]{32}", Client(one).ask(body, {"X-Request-Id": given})[2]["x-request-id"])


# --- refusals ---------------------------------------------


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "expected JSON"),
        (b"not JSON", "expected JSON"),
        (b"\xff\xfe", "expected JSON"),
        (b"[" * 5_000 + b"]" * 5_000, "expected"),
        (b'{"inputs": [{"items": ["1"], "time": NaN}]}', "NaN is no number of JSON"),
        (b'{"inputs": [{"items": [' + b"9" * 6_000 + b"]}]}", "expected JSON"),
        ([], "expected an object with `dataframe_records`, found a list"),
        (None, "found null"),
        (5, "found a number"),
        ({}, "expected one of dataframe_records and inputs"),
        ({"dataframe_records": [], "inputs": []}, "expected one of dataframe_records and inputs, found 2"),
        ({"dataframe_records": [{"items": ["1"]}], "k": 5}, "found 'k'; leave it out"),
        ({"dataframe_records": {"items": ["1"]}}, "is a list of objects"),
        ({"dataframe_records": ["1"]}, "is a list of objects"),
        ({"dataframe_records": []}, "expected one record at least"),
        ({"dataframe_records": [{"items": ["1"]}] * 6}, "expected at most 5 records, found 6"),
        ({"dataframe_records": [{"items": ["1"], "itms": ["2"]}]}, "record 0: a record has items.*found 'itms'"),
        ({"dataframe_records": [{"user": "u007"}]}, "record 0: `items`"),
        ({"dataframe_records": [{"items": ["1"]}, {"items": "1"}]}, "record 1: `items`"),
        ({"dataframe_records": [{"items": ["1"], "user": [5]}]}, "record 0: `user`"),
        ({"dataframe_records": [{"items": ["1"]}], "params": {"k": 0}}, "k is a number of items"),
        ({"dataframe_records": [{"items": ["1"]}], "params": {"k": None}}, "k is a number of items"),
        ({"dataframe_records": [{"items": ["1"]}], "params": {"k": True}}, "k is a number of items"),
        ({"dataframe_records": [{"items": ["1"]}], "params": {"k": "5"}}, "k is a number of items"),
        ({"dataframe_records": [{"items": ["1"]}], "params": {"kk": 5}}, "found 'kk'"),
        ({"dataframe_records": [{"items": ["1"]}], "params": {"domain": "nowhere"}}, "domain: expected 'target'"),
        ({"dataframe_records": [{"items": ["1"]}], "params": {"domain": 5}}, "domain: expected a name"),
        ({"dataframe_records": [{"items": ["1"]}], "params": [5]}, "`params` is an object"),
        ({"dataframe_records": [{"items": ["1"]}], "params": None}, "`params` is an object"),
    ],
    ids=lambda given: str(given)[:40],
)
def test_a_malformed_request_is_refused_in_one_line(one, body, told):
    status, answer, _ = Client(one).ask(body)
    assert status == 400
    assert re.search(told, answer["message"])
    assert not re.search(r"\n|Traceback|\.py|/\w+/\w+", answer["message"])


def test_a_large_body_is_refused_whether_it_says_so_or_not(one):
    client = Client(one)
    assert client.ask(b" " * 20_001)[0] == 413
    client = Client(one)
    client.connection.request("POST", "/invocations", iter([b" " * 9_000] * 3), encode_chunked=True)
    assert client.connection.getresponse().status == 413


def test_other_paths_and_methods_are_refused(one):
    assert Client(one).get("/invocations")[0] == 405
    assert [Client(one).get(path)[0] for path in ("/", "/docs", "/openapi.json")] == [404] * 3


def test_a_slow_body_is_not_waited_for(folders):
    with served(model=folders[0], limits={"body_seconds": 0.3}) as one:
        with socket.create_connection(one.listener.getsockname()[:2], timeout=30) as slow:
            slow.sendall(b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
            assert b" 408 " in slow.recv(1_000)
        assert Client(one).get("/health")[0] == 200


def test_a_full_queue_and_a_late_answer_say_when_to_ask_again(folders, items):
    body = {"inputs": [{"items": items[:1]}] * 3}
    found = []
    with served(model=folders[0], limits={"queue": 5, "answer_seconds": 1}) as one:
        batcher = one._front._batcher
        goes_on, current = threading.Event(), batcher._current
        batcher._current = lambda: (goes_on.wait(30), current())[1]
        threads = [threading.Thread(target=lambda: found.append(Client(one).ask(body))) for _ in range(4)]
        threads[0].start()
        time.sleep(0.2)  # the first is with the model, the second waits, the others are too many
        for thread in threads[1:]:
            thread.start()
        for thread in threads:
            thread.join()
        goes_on.set()
        batcher._current = current
        again = Client(one).ask(body)
    assert [status for status, _, _ in found] == [503] * 4
    messages = [answer["message"] for _, answer, _ in found]
    assert sum("3 records wait" in message for message in messages) == 2
    assert sum("no answer within 1 s" in message for message in messages) == 2
    assert all(headers["retry-after"] == "1" for _, _, headers in found)
    assert again[0] == 200


def test_a_failure_of_ours_names_nothing_that_was_asked(folders, items, monkeypatch, capsys):
    def fails(self, requests, k):
        raise ValueError(f"cannot place {requests[0].user}")

    monkeypatch.setattr(Recommender, "answer", fails)
    monkeypatch.setattr(Recommender, "prepare", lambda self: None)
    with served(model=folders[0]) as one:
        asked = Client(one).ask({"inputs": [{"user": "secret-user", "items": items}]}, {"X-Request-Id": "r1"})
        assert Client(one).get("/ready")[0] == 200
    assert asked[0] == 500
    assert asked[1]["message"] == "the server failed; its log says more of request r1"
    log = capsys.readouterr().out
    assert re.search(r"request r1 failed: ValueError at test_front.py:\d+\n", log)
    assert "secret-user" not in log


# --- health and metrics ---------------------------------------------


def test_health_readiness_and_metrics(folders, items):
    with served(model=folders[0]) as one:
        client = Client(one)
        assert client.get("/health") == (200, '{"healthy": true}')
        status, body = client.get("/ready")
        assert (status, json.loads(body)["ready"]) == (200, True)
        client.ask({"inputs": [{"items": items[:2]}, {"items": []}]})
        client.ask({})
        text = client.get("/metrics")[1]
        one._front.draining = True
        assert client.get("/ready")[0] == 503
        assert client.get("/health")[0] == 200
    label = json.loads(body)["version"]
    for line in (
        'graftrec_requests_total{code="200"} 1.0',
        'graftrec_requests_total{code="400"} 1.0',
        f'graftrec_answers_total{{basis="model",version="{label}"}} 1.0',
        f'graftrec_answers_total{{basis="popular",version="{label}"}} 1.0',
        f'graftrec_model_info{{arm="model",version="{label}"}} 1.0',
        "graftrec_request_seconds_count 2.0",
        "graftrec_waiting_records 0.0",
    ):
        assert line in text.splitlines(), line


# --- following the champion ---------------------------------------------


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def version_of(one):
    return json.loads(Client(one).get("/ready")[1])["version"]


def test_the_champion_moves_under_load_and_nothing_is_lost(folders, store, items):
    registry = Registry()
    registry.register(folders[0], alias=CHAMPION)
    others = [registry.register(folder) for folder in folders[1:]]
    seen, failed, ended = [], [], threading.Event()

    def load(one):
        client, mine = Client(one), []
        while not ended.is_set():
            status, answer, _ = client.ask({"inputs": [{"items": items[:3]}]})
            if status != 200:
                failed.append((status, answer))
            else:
                mine.append(int(answer["predictions"][0]["version"].rpartition("/")[2]))
        seen.append(mine)

    with served() as one:
        threads = [threading.Thread(target=load, args=(one,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for version in others:
            time.sleep(0.3)
            registry.set_alias(CHAMPION, version.number)
            wait_for(lambda version=version: version_of(one) == version.label)
        time.sleep(0.3)
        ended.set()
        for thread in threads:
            thread.join()
        text = Client(one).get("/metrics")[1]
    assert failed == []
    assert len(seen) == 4
    for mine in seen:
        assert mine == sorted(mine)
        assert set(mine) == {1, 2, 3}
    assert "graftrec_version_changes_total 2.0" in text
    assert 'graftrec_model_info{arm="model",version="graftrec/3"} 1.0' in text
    assert "graftrec/1" not in "".join(line for line in text.splitlines() if "model_info" in line)


def test_a_rollback_is_followed_and_so_is_what_stands_beside(folders, store, tiny_lake, tmp_path, items):
    registry = Registry()
    registry.register(folders[0], alias=CHAMPION)
    registry.set_alias(CHAMPION, registry.register(folders[1]).number)
    other = write_model(tmp_path / "all", tiny_lake, domain="all", predicted="target")
    known = set(load_model(folders[0]).catalogue.raw_ids)
    source = [item for item in load_model(other).catalogue.raw_ids[FIRST_INDEX:] if item not in known]
    with served() as one:
        assert version_of(one) == "graftrec/2"
        registry.set_alias(CHAMPION, 1)
        wait_for(lambda: version_of(one) == "graftrec/1")
        body = {"inputs": [{"items": source[:2]}]}
        assert Client(one).ask(body)[1]["predictions"][0]["basis"] == "popular"
        companion = registry.register(other, alias=COMPANION)
        wait_for(lambda: Client(one).ask(body)[1]["predictions"][0]["version"] == companion.label)
        registry.drop_alias(COMPANION)
        wait_for(lambda: Client(one).ask(body)[1]["predictions"][0]["basis"] == "popular")


def test_a_version_that_cannot_be_loaded_changes_nothing(folders, store, items, capsys):
    registry = Registry()
    registry.register(folders[0], alias=CHAMPION)
    broken, good = registry.register(folders[1]), registry.register(folders[2])
    (packed_as(broken) / "artifacts" / "model.zip").unlink()
    with served() as one:
        registry.set_alias(CHAMPION, broken.number)
        wait_for(lambda: "graftrec_follow_failures_total 0.0" not in Client(one).get("/metrics")[1])
        status, answer, _ = Client(one).ask({"inputs": [{"items": items[:3]}]})
        assert (status, answer["predictions"][0]["version"]) == (200, "graftrec/1")
        registry.drop_alias(CHAMPION)
        time.sleep(0.3)
        assert version_of(one) == "graftrec/1"
        registry.set_alias(CHAMPION, good.number)
        wait_for(lambda: version_of(one) == good.label)
    log = capsys.readouterr().out
    assert "graftrec/1 goes on answering: graftrec/2 holds no model folder" in log
    assert log.count("holds no model folder") == 1


# --- start and end ---------------------------------------------


def test_without_a_champion_or_a_port_it_does_not_start(folders, store):
    with pytest.raises(TrackingError, match="no version or alias 'champion' of the registered model graftrec"):
        server.made(ServeConfig(port=0))
    Registry().register(folders[0], alias=CHAMPION)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(GraftrecError, match=f"expected to listen at 127.0.0.1 port {port}, found: Address already"):
            server.made(ServeConfig(port=port))


@pytest.mark.slow
@pytest.mark.ci
def test_a_server_that_is_stopped_answers_what_is_under_way(folders, store, items):
    Registry().register(folders[0], alias=CHAMPION)
    command = [
        sys.executable,
        "-m",
        "trainer",
        "serve",
        "--config",
        "serve/default",
        "--port",
        "0",
        "--drain_seconds",
        "1",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=store)
    try:
        address = re.search(r"http://127.0.0.1:(\d+)/", process.stdout.readline())
        assert address, process.stdout.read()
        place = ("127.0.0.1", int(address[1]))
        body = json.dumps({"inputs": [{"items": items[:2]}]}).encode()
        head = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        with (
            socket.create_connection(place, timeout=60) as under_way,
            socket.create_connection(place, timeout=60) as other,
        ):
            under_way.sendall(head + body[:10])
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            other.sendall(b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b" 503 " in other.recv(1_000)
            time.sleep(1.2)  # it takes no more connections now
            with pytest.raises(OSError):  # noqa: PT011
                socket.create_connection(place, timeout=5).close()
            under_way.sendall(body[10:])
            assert b" 200 " in under_way.recv(1_000)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 143
        assert "Traceback" not in out
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
@pytest.mark.ci
def test_the_command_says_in_one_line_that_there_is_no_champion(store):
    command = [sys.executable, "-m", "trainer", "serve", "--config", "serve/default", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=store, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"serve: no version or alias 'champion' .*; register one first\n", done.stderr)


def test_errors_name_their_place_not_the_text_of_others():
    with pytest.raises(ValueError, match="user") as raised:
        int("user")
    assert re.fullmatch(r"ValueError at test_front.py:\d+", front._told(raised.value))
