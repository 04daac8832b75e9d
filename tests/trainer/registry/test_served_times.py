"""A registered model that reads times, by MLflow's server: whole seconds and fractions, now by default, refusals."""

import json

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.scoring_server import invocations

from etl.tables import FIRST_INDEX
from tests.fixtures.stores import enter_store
from tests.fixtures.trainings import tiny
from trainer.config import PretrainConfig
from trainer.inference.model_folder import load_model
from trainer.inference.recommender import Recommender, Request
from trainer.recipes import pretrain
from trainer.registry import CHAMPION, Registry

MODEL = {"user_width": 0, "knowledge": {}, "dropout": 0.0, "time": {"bias": True, "intervals": True}}


@pytest.fixture(scope="module")
def served(tiny_lake, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("served-times")
        enter_store(root / "store", patch)
        result = pretrain.run(tiny(PretrainConfig, root, tiny_lake, model=MODEL, task={"kind": "next_item"}))
        Registry().register(result.model, alias=CHAMPION)
        yield load_model(result.model), mlflow.pyfunc.load_model(f"models:/graftrec@{CHAMPION}")


def post(loaded, records):
    body = json.dumps({"dataframe_records": records, "params": {"k": 4}})
    return invocations(body, "application/json", loaded, loaded.metadata.get_input_schema())


def test_numbers_of_seconds_are_served_whole_and_in_parts(served):
    trained_model, loaded = served
    items = list(trained_model.catalogue.raw_ids[FIRST_INDEX : FIRST_INDEX + 3])
    times = [1_000_000_000, 1_000_000_060, 1_000_000_060]
    records = [
        {"items": items, "times": times, "time": 1_000_000_180},
        {"items": items, "times": [second + 0.5 for second in times], "time": 1_000_000_180.5},
        {"items": items, "times": times},
    ]
    answers = json.loads(post(loaded, records).response)["predictions"]
    asked = [Request(items, times=times, time=1_000_000_180), Request(items, times=times)]
    timed, now = Recommender(trained_model, "graftrec/1").answer(asked, 4)
    for answer, expected in zip(answers, (timed, timed, now), strict=True):
        assert answer["items"] == expected.items
        assert answer["scores"] == pytest.approx(expected.scores, abs=1e-5)
    assert answers[0]["scores"] != pytest.approx(answers[2]["scores"], abs=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "expected `times`, which graftrec/1 reads"),
        ({"times": [3, 2]}, "oldest first"),
        ({"times": ["a", "b"]}, "number of seconds"),
        ({"times": [1, 2], "time": "now"}, "`time` is a number of seconds"),
        ({"times": [1_600_000_000_000, 1_600_000_000_001]}, "divide milliseconds"),
    ],
)
def test_a_request_that_says_no_time_is_a_bad_request(served, more, message):
    trained_model, loaded = served
    items = list(trained_model.catalogue.raw_ids[FIRST_INDEX : FIRST_INDEX + 2])
    with pytest.raises(MlflowException, match=message) as raised:
        post(loaded, [{"items": items, **more}])
    assert raised.value.get_http_status_code() == 400
