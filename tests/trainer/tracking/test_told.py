"""What is done is told to MLflow, wherever the process was killed: each run ends once, with its last metric."""

import os
import subprocess
import sys

import pytest

from etl.settings import load
from tests.fixtures.places import ROOT
from tests.fixtures.stores import enter_store, runs_of
from tests.fixtures.trainings import config_file, tiny
from trainer import tracking
from trainer.config import EvaluateConfig, PretrainConfig
from trainer.recipes.evaluate import run as evaluate
from trainer.recipes.pretrain import run as pretrain

TRACKED = {"enabled": True, "system_metrics": False, "close_seconds": 60}

# `trainer` with a function that kills its process, when it is called for the n-th time.
DYING = """
import os, signal, sys
from importlib import import_module
module = import_module("trainer.{module}")
calls = []
def dies(*given, **more):
    calls.append(1)
    if len(calls) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*given, **more)
whole = module.{function}
module.{function} = dies
from trainer.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def killed(folder, recipe, path, module, function, number=1):
    script = DYING.format(module=module, function=function, number=number)
    command = [sys.executable, "-c", script, recipe, "--config", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -9, done.stderr


@pytest.mark.parametrize(
    ("module", "function", "number"),
    [
        ("training.checkpoint", "clear", 1),  # just behind done.json
        pytest.param("tracking.queue", "SendQueue.close", 1, marks=[pytest.mark.slow]),  # nothing is sent, maybe
        ("training.loop", "_finish_epoch", 3),  # in mid-run
        pytest.param("recipes.pretrain", "log_epoch", 3, marks=[pytest.mark.slow]),  # behind the last checkpoint
    ],
)
def test_a_killed_run_that_is_run_again_is_one_finished_run(module, function, number, tiny_lake, tmp_path, monkeypatch):
    store = tmp_path / "store"
    enter_store(store, monkeypatch)
    settings = {"name": "told", "tracking": TRACKED}
    killed(store, "pretrain", config_file(tmp_path, tiny_lake, **settings), module, function, number)
    result = pretrain(tiny(PretrainConfig, tmp_path, tiny_lake, **settings))
    assert result.reused == (function == "clear")
    client = tracking.connect()
    (run,) = client.search_runs([client.get_experiment_by_name("graftrec").experiment_id])
    assert run.info.run_id == result.run_id
    assert run.info.status == "FINISHED"
    assert run.data.metrics["best/NDCG_10"] == result.metrics["validation/NDCG@10"]
    assert sorted(point.step for point in client.get_metric_history(result.run_id, "train/loss")) == [1, 2, 3]
    assert tracking.ERROR not in run.data.tags
    assert not (result.folder / "checkpoints").exists()
    assert not list((store / "mlflow-unsent").glob("*"))


def test_an_unchanged_run_sends_what_no_server_took(tiny_lake, tmp_path, monkeypatch, capsys):
    store = tmp_path / "store"
    enter_store(store, monkeypatch)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("a file where the store's folder should be")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{elsewhere}/mlflow.db")
    settings = {"name": "told", "train": {"epochs": 1, "min_epochs": 0}}
    pretrain(tiny(PretrainConfig, tmp_path, tiny_lake, **settings, tracking=TRACKED | {"close_seconds": 0.5}))
    assert list((store / "mlflow-unsent").glob("*/unsent.json"))
    elsewhere.unlink()
    elsewhere.mkdir()
    (store / "mlflow.db").rename(elsewhere / "mlflow.db")
    result = pretrain(tiny(PretrainConfig, tmp_path, tiny_lake, **settings, tracking=TRACKED))
    assert result.reused
    run = runs_of(elsewhere)["told"]
    assert (run.info.status, run.data.metrics["best/NDCG_10"]) == ("FINISHED", result.metrics["validation/NDCG@10"])
    assert not list((store / "mlflow-unsent").glob("*"))


@pytest.mark.slow
def test_what_was_neither_taken_nor_kept_is_told_again(tiny_lake, tmp_path, monkeypatch):
    store = tmp_path / "store"
    enter_store(store, monkeypatch)
    whole = store / "mlflow.db"
    settings = {"name": "told", "train": {"epochs": 1, "min_epochs": 0}}
    impatient, tracked = (TRACKED | {"close_seconds": seconds} for seconds in (0.5, 60))
    models = [{"model": str(tmp_path / "runs" / "told" / "model")}]

    def train(tracking):
        return pretrain(tiny(PretrainConfig, tmp_path, tiny_lake, **settings, tracking=tracking))

    def judge(tracking):
        return evaluate(EvaluateConfig(models=models, name="told", output=str(tmp_path / "runs"), tracking=tracking))

    for work in (train, judge):
        elsewhere = whole.rename(tmp_path / "elsewhere.db")
        whole.mkdir()  # MLflow can't open it
        (store / "mlflow-unsent").write_text("no folder")
        with pytest.raises(tracking.Unrecorded, match="expected room to keep what MLflow did not take") as found:
            work(impatient)
        assert found.value.exit_code == 2
        whole.rmdir()
        elsewhere.rename(whole)
        (store / "mlflow-unsent").unlink()
        work(tracked)
    result = train(tracked)
    assert result.reused
    assert judge(tracked).skipped
    client = tracking.connect()
    of_recipe = {
        run.data.tags["graftrec.recipe"]: run
        for run in client.search_runs([client.get_experiment_by_name("graftrec").experiment_id])
    }
    assert {name: run.info.status for name, run in of_recipe.items()} == {
        "pretrain": "FINISHED",
        "evaluate": "FINISHED",
    }
    trained = of_recipe["pretrain"]
    assert trained.data.metrics["best/NDCG_10"] == result.metrics["validation/NDCG@10"]
    assert trained.info.run_id == result.run_id


@pytest.mark.slow
@pytest.mark.ci
def test_an_evaluation_killed_before_it_was_told_is_not_skipped(tiny_lake, tmp_path, monkeypatch):
    store = tmp_path / "store"
    enter_store(store, monkeypatch)
    model = pretrain(tiny(PretrainConfig, tmp_path, tiny_lake, train={"epochs": 1, "min_epochs": 0})).model
    path = tmp_path / "evaluate.yaml"
    path.write_text(
        f"{{models: [{{model: {model}}}], name: told, output: {tmp_path / 'runs'}, tracking: "
        "{system_metrics: false, close_seconds: 60}, evaluation: {protocols: [full]}}"
    )
    killed(store, "evaluate", path, "tracking.queue", "SendQueue.close")
    assert not evaluate(load(EvaluateConfig, path)).skipped
    assert evaluate(load(EvaluateConfig, path)).skipped
    client = tracking.connect()
    runs = client.search_runs([client.get_experiment_by_name("graftrec").experiment_id])
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    assert runs[0].info.status == "FINISHED"
    assert "evaluation/summary.json" in {file.path for file in client.list_artifacts(runs[0].info.run_id, "evaluation")}
