"""Requests of any kind: each gets an answer, or a line that names what is wrong and nothing of the server."""

import gc
import json
import tracemalloc
from pathlib import Path

import mlflow
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.pyfunc import scoring_server

from tests.fixtures.folders import write_model
from tests.fixtures.hostile import EXAMPLES, SEEDED, copied, json_values, sealed, spoilt
from tests.fixtures.stores import enter_store
from trainer.inference.model_folder import ModelFolderError, load_model
from trainer.inference.recommender import MAX_ABSENT, RETRY_SECONDS, Kept, Recommender, RequestError, parse
from trainer.registry import CHAMPION, Registry, pyfunc

HUGE = 10**400
REQUEST = {
    "items": ["i001", "i002"],
    "user": "u007",
    "event_types": ["look", "buy"],
    "features": [{"item": "new", "encoder": "e", "vector": [1.0, 2]}],
    "friends": ["u001"],
    "times": [1e9, 1e9 + 1],
    "time": 1e9 + 2,
}
ODD = {
    "null": None,
    "text": "x",
    "number": 3,
    "infinite": float("inf"),
    "huge": HUGE,
    "true": True,
    "object": {"a": 1},
    "nested": [[[["x"]]]],
    "deep": json.loads("[" * 400 + "]" * 400),
    "NaN in a list": [float("nan"), float("nan")],
    "infinite in a list": [float("inf")] * 2,
    "huge in a list": [HUGE, HUGE],
    "half a character": ["\ud800", "\udfff"],
    "NUL": ["a\0", "b"],
    "mixed": ["a", 1, None],
    "long": ["x" * 100_000] * 2,
    "empty": [],
    "objects": [{}, {}],
}
PARAMS = {
    "k": [None, "5", 2.5, 2.0, True, float("nan"), float("inf"), [], {}, HUGE, -1, 0, 10**9],
    "domain": [None, [], {}, 3, True, "x" * 10_000, "a/b", "a:b", "a@b", "a\0b", "\ud800", "a'b\"", "books", " ", "é"],
}


@pytest.fixture(scope="module")
def folder(tiny_lake, tmp_path_factory):
    return Path(write_model(tmp_path_factory.mktemp("asked") / "model", tiny_lake, seed=3, skill=0.3))


@pytest.fixture(scope="module")
def recommender(folder):
    return Recommender(load_model(folder), "graftrec/3")


def refused_or_answered(recommender, records, params):
    """The line that refuses, or ""."""
    try:
        answers = pyfunc.answer(recommender, records, params)
    except RequestError as error:
        said = str(error)
    else:
        json.dumps(answers)
        assert len(answers) == len(records)
        return ""
    assert said
    assert len(said.splitlines()) == 1
    assert len(said) < 2_000
    assert str(recommender.trained_model.folder) not in said
    return said


# --- records and params ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["items", "user", "event_types", "baskets", "features", "friends", "times", "time"])
@pytest.mark.parametrize("odd", ODD)
def test_an_odd_field_is_refused_or_answered(recommender, name, odd):
    refused_or_answered(recommender, [{"items": ["i001", "i002"], name: ODD[odd]}], {})


@pytest.mark.parametrize("name", ["items", "user", "event_types", "baskets", "features", "friends", "times", "time"])
@pytest.mark.parametrize("odd", ["deep", "huge", "huge in a list", "half a character", "true", "object"])
def test_what_no_field_holds_is_refused_by_place(name, odd):
    if (name, odd) == ("event_types", "half a character"):
        return  # a name of a kind that no event has
    with pytest.raises(RequestError, match=r"record 1|expected fields of at most"):
        parse([{"items": []}, {"items": ["i001", "i002"], name: ODD[odd]}])


@pytest.mark.parametrize("record", [None, [], 3, "x", True, ["items"]])
def test_a_record_that_is_no_object_is_refused(record):
    with pytest.raises(RequestError, match="record 0: expected an object"):
        parse([record])


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in PARAMS.items() for value in values])
def test_odd_params_are_refused_or_answered(recommender, name, value):
    said = refused_or_answered(recommender, [{"items": ["i001"]}], {name: value})
    fine = value in (None, 2.0) if name == "domain" else value == 2.0 and value is not True
    assert bool(said) != fine


@given(st.data())
@settings(SEEDED, max_examples=10 * EXAMPLES)
def test_any_record_is_refused_or_answered(recommender, data):
    records = data.draw(st.lists(spoilt(REQUEST) | json_values, max_size=3))
    params = data.draw(spoilt({"k": 3, "domain": "target"}) | json_values)
    if isinstance(params, dict):
        refused_or_answered(recommender, records, params)


# --- what is beside a model -----------------------------------------------------------------------------------------


def test_unknown_domains_take_no_memory_and_are_looked_up_again(folder):
    now, there, asked = [0.0], {}, []

    def look_up(domain):
        asked.append(domain)
        return there.get(domain)

    kept = Kept(look_up, clock=lambda: now[0])
    for number in range(10):  # what Python allocates once
        kept(f"d{number}")
    gc.collect()
    tracemalloc.start()
    for number in range(MAX_ABSENT):
        kept(f"domain-{number}")
    before = tracemalloc.get_traced_memory()[0]
    for number in range(20 * MAX_ABSENT):
        kept(f"other-domain-{number}")
    asked.clear()
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 100_000
    assert kept("early") is None
    assert kept("early") is None
    assert asked == ["early"], "nobody is asked again at once"
    there["early"] = "a champion"
    now[0] += RETRY_SECONDS + 1
    assert kept("early") == "a champion"
    del there["early"]
    assert kept("early") == "a champion", "what is there is read once"


def test_a_recommender_finds_a_domain_that_came_later(folder, monkeypatch):
    monkeypatch.setattr("trainer.inference.recommender.RETRY_SECONDS", 0.0)
    own, there = load_model(folder), {}
    recommender = Recommender(own, "m/1", there.get, there.get("companion", lambda: None))
    with pytest.raises(RequestError, match="domain: expected"):
        recommender.of_domain("books")
    there["books"] = Recommender(own, "m/2")
    assert recommender.of_domain("books").version == "m/2"


def test_names_that_no_model_can_have_are_asked_of_nobody(folder):
    asked = []
    recommender = Recommender(load_model(folder), "m/1", lambda domain: asked.append(domain))
    for domain in ("x" * 10_000, "a/b", "../x", "a:b", "a@b", "a\0", "a\nb", "\ud800"):
        with pytest.raises(RequestError) as caught:
            recommender.of_domain(domain)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500
    assert asked == []


# --- through MLflow's scoring server --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(folder, tmp_path_factory):
    """MLflow's scoring server of the champion, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        enter_store(tmp_path_factory.mktemp("store"), patch)
        patch.setattr("sys.path", [*__import__("sys").path])  # to which MLflow adds the version's code
        Registry().register(folder, alias=CHAMPION)
        model = mlflow.pyfunc.load_model("models:/graftrec@champion", suppress_warnings=True)
        with TestClient(scoring_server.init(model), raise_server_exceptions=False) as client:
            yield client


def one_line(answer):
    """The text of an answer that is no list of items, without a word of the server."""
    text = answer.json()["message"] if answer.headers["content-type"] == "application/json" else answer.text
    assert "\n" not in text
    assert len(text) < 2_000
    for word in ("Traceback", "site-packages", "sqlite", 'File "', "stack_trace", str(Path.cwd()), "/tmp"):
        assert word not in answer.text
    return text


def ask(client, body, kind="application/json"):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post("/invocations", content=data, headers={"content-type": kind})


@pytest.mark.parametrize("value", PARAMS["k"])
def test_the_server_answers_an_odd_k_in_a_line(client, value):
    answer = ask(client, {"dataframe_records": [{"items": ["i001"]}], "params": {"k": value}})
    if answer.status_code != 200:
        assert answer.status_code == 400
        one_line(answer)


@pytest.mark.parametrize("name", ["items", "user", "features", "friends", "times", "time", "baskets"])
@pytest.mark.parametrize("odd", [odd for odd in ODD if odd not in ("long", "deep")])
def test_the_server_answers_an_odd_field_in_a_line(client, name, odd):
    answer = ask(client, {"dataframe_records": [{"items": ["i001", "i002"], name: ODD[odd]}]})
    if answer.status_code != 200:
        assert answer.status_code == 400
        one_line(answer)


@pytest.mark.parametrize("kind", ["application/json", "text/csv", "application/vnd.apache.parquet"])
@pytest.mark.parametrize("body", [b"", b"x", b"\xff", b"[]", b"null", b"{}", b'{"dataframe_records": 3}', b"a,b\n1"])
def test_the_server_answers_what_is_no_request_in_a_line(client, body, kind):
    answer = ask(client, body, kind)
    assert answer.status_code in (400, 415)
    one_line(answer)


def test_a_failure_of_the_server_is_told_to_its_log_only(client, monkeypatch, capfd):
    def fails(*given):
        raise ModelFolderError("/secret/place is damaged")

    monkeypatch.setattr(Recommender, "of_domain", fails)
    import trainer.inference.recommender as loaded

    monkeypatch.setattr(loaded.Recommender, "of_domain", fails)
    answer = ask(client, {"dataframe_records": [{"items": ["i001"]}]})
    if answer.status_code == 200:
        pytest.skip("the version runs its own copy of the code here")
    assert answer.status_code == 500
    assert "/secret" not in answer.text
    assert one_line(answer) == "the server failed to answer; its log says why"
    assert "/secret/place is damaged" in capfd.readouterr().err


def test_another_model_in_the_place_of_a_registered_one_is_refused(folder, tiny_lake, tmp_path, monkeypatch):
    enter_store(tmp_path / "store", monkeypatch)
    registry = Registry("exchanged")
    version = registry.register(folder, alias=CHAMPION)
    other = Path(write_model(tmp_path / "other", tiny_lake, seed=9))
    stored = registry.stored(version)
    copied(other, stored)
    with pytest.raises(ModelFolderError, match=r"expected the model .* that was registered"):
        pyfunc.load(sealed(stored), version.label)
