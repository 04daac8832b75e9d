"""Every kind of task, and one that only tests know, goes through pre-training, search, gate, pipeline, experiment and
report alike."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.fixtures.lakes import build_tiny_lake
from tests.fixtures.places import ROOT

TRAIN = {"batch_size": 16, "epochs": 2, "learning_rate": 0.01, "warmup_steps": 0, "min_epochs": 2}
PEER = {"kind": "peterrec", "width": 16, "dilations": [1, 2], "max_length": 24}
DUPN = {"kind": "dupn", "width": 16, "max_length": 24}
TASKS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {  # model, task, metric of the gate
    "toy": (PEER, {"kind": "newest_item"}, "NDCG@10"),
    "baskets": (PEER, {"kind": "next_basket"}, "basket/NDCG@10"),
    "attribute": (PEER, {"kind": "profile", "attribute": "taste"}, "log loss"),
    "events": (DUPN, {"kind": "multi", "tells": ["value", "category"]}, "value/log loss"),
    "several": (DUPN, {"kind": "multi", "tells": ["next_item", "category"]}, "NDCG@10"),
    "clicks": (PEER, {"kind": "click", "content": ["categories"], "layers": [8]}, "user AUC"),
}
# In a process of its own: the task of tests changes the configurations' types.
SCRIPT = """
import json, sys
from tests.fixtures import toy_task
from etl.settings import GraftrecError, load
from trainer.recipes import pipeline, promote, search, training_jobs
training_jobs._PRELOADED += ("tests.fixtures.toy_task",)
pipeline.build_tables = lambda config: 1  # a lake that is there
from trainer.config import SearchConfig
from trainer.recipes.pipeline_plan import PipelineConfig
settings = json.loads(sys.argv[1])
if "grid" in settings:
    from trainer.experiment import run
    from trainer.experiment.plan import ExperimentConfig
    print("exit", run.run(ExperimentConfig.model_validate(settings)))
elif "space" in settings:
    (winner,) = search.run(SearchConfig.model_validate(settings))
    print("winner", winner.score)
else:
    demo = load(PipelineConfig, "pipeline/demo").model_dump(mode="json")
    for name, values in settings.items():
        demo[name] = {**demo[name], **values} if isinstance(values, dict) else values
    print("exit", pipeline.run(PipelineConfig.model_validate(demo)))
"""


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_lake(tmp_path_factory.mktemp("lake") / "lake", num_users=200, described=True)


def done(folder: Path, settings: dict[str, Any]) -> str:
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(settings)],
        cwd=folder,
        env={
            "PYTHONPATH": str(ROOT),
            "PATH": "/usr/bin:/bin",
            "HOME": str(folder),
            "GRAFTREC_CONF": str(ROOT / "conf"),
        },
        capture_output=True,
        text=True,
        timeout=570,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:] + found.stdout[-3000:]
    return found.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_every_task_goes_through_the_pipeline(name: str, lake: str, tmp_path: Path) -> None:
    model, task, metric = TASKS[name]
    trained = {"model": model, "task": task, "train": TRAIN}
    gate = {"metric": metric, "min_users": 2, "min_seeds": 2, "min_slice_users": 2, "must_beat": ["best"]}
    told = done(
        tmp_path,
        {
            "pretrain": trained,
            "finetune": trained,
            "promote": {"gate": gate},
            "evaluate": {"evaluation": {"protocols": ["full"]}},
            "etl": {"lake": lake},
            "transfers": ["none", "deep"],
            "seeds": [0, 1],
            "reads_all": False,
            "tracking": {"enabled": False},
            "runs": "runs",
        },
    )
    assert told.strip().splitlines()[-1] in ("exit 0", "exit 3")
    summary = json.loads((tmp_path / "runs/target/evaluate/evaluation/summary.json").read_text())
    assert summary["rows"][0]["metric"] == metric.rpartition("/")[2] or summary["rows"][0]["metric"] == metric
    (planned,) = [row for row in summary["rows"] if row["planned"]]
    decision = json.loads((tmp_path / "runs/target/promote/decision.json").read_text())
    (check,) = [check for check in decision["checks"] if check["name"] == "from-scratch"]
    assert abs(check["numbers"]["gain"]) == pytest.approx(abs(planned["gain"]["gain"]), abs=0), "one and the same test"
    users = pl.read_parquet(tmp_path / "runs/target/evaluate/evaluation/users.parquet")
    assert {"none", "deep"} < set(users["label"])


@pytest.mark.slow
def test_a_task_that_only_tests_know_is_searched(lake: str, tmp_path: Path) -> None:
    model, task, _ = TASKS["toy"]
    recipe = {"data": {"lake": lake, "domain": "source"}, "model": model, "task": task, "train": TRAIN}
    settings = {"pretrain": recipe, "space": {"train.learning_rate": [0.01, 0.003]}, "trials": 2}
    told = done(tmp_path, settings | {"tracking": {"enabled": False}})
    assert float(told.strip().split()[-1]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_an_experiment_and_its_report(name: str, lake: str, tmp_path: Path) -> None:
    model, task, metric = TASKS[name]
    preset = {"model": model, "task": task, "train": TRAIN}
    settings = {
        "name": "tiny",
        "runs": "runs",
        "lake": lake,
        "grid": {"own": {"label": "ours", "preset": preset, "transfers": ["none", "deep"]}},
        "seeds": [0, 1],
        "evaluation": {"protocols": ["full"]},
        "tracking": {"enabled": False},
    }
    assert done(tmp_path, settings).strip().splitlines()[-1] == "exit 0"
    found = json.loads((tmp_path / "runs/tiny/results.json").read_text())
    rows = {row["id"]: row for row in found["rows"]}
    assert {rows[row]["status"] for row in ("own", "own-deep")} == {"done"}
    assert len([row for row in found["rows"] if row["kind"] == "baseline"]) > 1
    (compared,) = {(gain["row"], gain["against"], gain["metric"]) for gain in found["comparisons"]}
    assert compared == ("own-deep", "own", found["metric"])
    for protocol in found["protocols"]:
        for convention in found["conventions"]:
            means = [rows[row]["metrics"][protocol][convention][found["metric"]]["mean"] for row in ("own", "own-deep")]
            gains = [one for one in found["comparisons"] if one["protocol"] == protocol]
            gain = next(one["gain"] for one in gains if one["convention"] == convention)
            assert gain == pytest.approx(means[1] - means[0], abs=1e-9)
    page = (tmp_path / "runs/tiny/report/report.md").read_text(encoding="utf-8")
    assert "ours, deep" in page
    assert f"validation {found['monitor']}" in page
    if "/" not in metric:
        assert metric in page
