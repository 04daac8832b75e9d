"""The survey's experiment: its plan, what it refuses, its numbers beside `evaluate`'s, and, slowly, kills and holes."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from etl.settings import ConfigError
from tests.fixtures.folders import write_model
from tests.fixtures.lakes import build_tiny_lake
from trainer.config import FinetuneConfig
from trainer.data.held_out import ReadOptions
from trainer.data.release import pin
from trainer.evaluation.item_prediction import evaluate_scorers
from trainer.evaluation.ranking_metrics import means
from trainer.evaluation.scorers import model_scorer, read_evaluation_set
from trainer.experiment import plan as experiment_plan
from trainer.experiment import results, run
from trainer.experiment.plan import ExperimentConfig, Row, planned, training_jobs
from trainer.experiment.run import load_experiment
from trainer.inference.model_folder import load_model
from trainer.report import survey
from trainer.report.hypotheses import from_scratch_of

SMALL = {"width": 8, "max_length": 24, "user_width": 4, "knowledge_width": 4}
TRAIN = {"epochs": 2, "min_epochs": 1, "batch_size": 16, "warmup_steps": 0, "checkpoint_seconds": 0}


def plan(kind: str = "bert4rec", **more: Any) -> dict[str, Any]:
    model = SMALL | {"kind": kind} | ({"blocks": 1} if kind == "bert4rec" else {"window": 3})
    trained = {"model": model, "train": TRAIN, "task": {"kind": "masked_item"}}
    return {"pretrain": trained, "finetune": trained, "pretrain_tasks": [{"kind": "next_item"}]} | more


def settings(lake: str, folder: Path, **more: Any) -> dict[str, Any]:
    given = {"name": "tiny", "runs": str(folder), "lake": lake, "bert4rec": plan()}
    tracking = {"tracking": {"system_metrics": False}}
    return given | {"seeds": [0], "knowledge": [False], "extras": False, "joint": False} | tracking | more


# --- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["cpu", "paper"])
def test_table_2_has_the_surveys_rows_each_beside_its_from_scratch(preset: str) -> None:
    config = load_experiment("table2", preset)
    rows = planned(config, "lake", 1)
    assert {row.id for row in rows if row.kind == "model"} == set(survey.TABLE_2)
    assert {row.id for row in rows if row.kind == "joint"} == {
        f"joint/{model}/{known}" for model in ("bert4rec", "caser") for known in ("plain", "knowledge")
    }
    assert {row.task for row in rows if row.model == "bert4rec" and row.kind in ("model", "joint")} == {"masked_item"}
    assert {row.task for row in rows if row.model == "caser" and row.kind != "extra"} == {"next_item"}
    told = [vars(row) for row in rows]
    for row in told:
        is_scratch = row["kind"] == "model" and row["transfer"] == "none"
        assert (from_scratch_of(row, told) is None) == is_scratch


def test_presets_differ_and_unknown_ones_are_refused_by_name() -> None:
    small, large = (load_experiment("table2", preset) for preset in ("cpu", "paper"))
    assert small.bert4rec is not None
    assert large.bert4rec is not None
    assert large.bert4rec.finetune.model.width == large.bert4rec.pretrain.model.width == 128
    assert small.folder != large.folder
    with pytest.raises(ConfigError, match=r"table2_huge.*table2_paper"):
        load_experiment("table2", "huge")


def test_cells_are_shared_seeded_and_in_folders_of_their_own() -> None:
    config = load_experiment("table2", "cpu")
    rows = planned(config, "elsewhere", 7)
    trainings = training_jobs(rows)
    assert len({training.folder for training in trainings}) == len(trainings) == 3 * (28 + 8 + 2)
    place = {training.name: number for number, training in enumerate(trainings)}
    parents: dict[str, set[tuple[str, int]]] = {}
    for row, seed in itertools.product(rows, config.seeds):
        training = row.trainings[seed]
        data, train = training.config.data, training.config.train
        assert (data.lake, data.release, train.seed) == ("elsewhere", 7, seed)
        where = ("all", "joint-5", "target") if row.kind == "joint" else ("target", "last-5", None)
        assert (data.domain, data.split, data.ranked) == where
        assert bool(training.config.model.knowledge) == row.knowledge
        assert training.config.task.kind == row.task
        assert (training.parent is None) == (row.transfer == "none")
        if training.parent is not None:
            trained = training.parent.config
            assert place[training.parent.name] < place[training.name]
            assert trained.data.domain == "source"
            assert (trained.task.kind, trained.train.seed, trained.model.kind) == (row.pretrain_task, seed, row.model)
            assert trained.model.knowledge == training.config.model.knowledge
            parents.setdefault(training.parent.name, set()).add((row.transfer, seed))
    assert len(parents) == 3 * 8
    assert {frozenset(given) for given in parents.values()} == {
        frozenset({("shallow", seed), ("deep", seed)}) for seed in config.seeds
    }
    # the first seed's table is whole before the second's begins
    seeds = [training.config.train.seed for training in trainings]
    assert seeds == sorted(seeds)


def test_only_the_rows_asked_for_are_trained() -> None:
    wanted = "bert4rec/deep/next_item/plain"
    rows = planned(load_experiment("table2", "cpu", ["--rows", f"[{wanted}]", "--seeds", "[4]"]), "lake", 1)
    assert [training.name for training in training_jobs(rows)] == [
        "bert4rec-pretrain-next_item-plain-4",
        "bert4rec-deep-next_item-plain-4",
    ]
    assert {row.id for row in rows if not row.reason} == {wanted}
    assert list(run._missing(rows)) == []  # not requested is no failure


def test_a_searchs_winners_are_for_the_rows_of_their_transfer(tmp_path: Path) -> None:
    files = {}
    for transfer, dropout in (("none", 0.4), ("deep", 0.1)):
        files[transfer] = tmp_path / f"{transfer}.yaml"
        files[transfer].write_text(f"transfer: {transfer}\nmodel: {{kind: bert4rec, dropout: {dropout}}}\n")
    given = [word for name, file in files.items() for word in (f"--bert4rec.tuned.{name}", str(file))]
    config = load_experiment("table2", "cpu", ["--seeds", "[0]", *given])
    assert config.bert4rec is not None
    own = config.bert4rec.finetune.model.dropout
    expected = {"none": 0.4, "shallow": own, "deep": 0.1}
    for row in planned(config, "lake", 1):
        if row.model == "bert4rec" and row.kind != "custom":
            trained = row.trainings[0].config
            assert isinstance(trained, FinetuneConfig)
            assert trained.model.dropout == expected[row.transfer]
            assert trained.transfer == row.transfer
            if row.trainings[0].parent is not None:  # pre-training is the same for all
                assert row.trainings[0].parent.config.model.dropout == config.bert4rec.pretrain.model.dropout
    files["none"].write_text("model: {kind: bert4rec}\ntask: {kind: next_item}\n")
    with pytest.raises(ConfigError, match=r"tuned.none: expected .* by masked_item, .*found bert4rec by next_item"):
        load_experiment("table2", "cpu", given)


OWN = {
    "alone": {"label": "target alone", "finetune": {"transfer": "none", "task": {"kind": "next_item"}}},
    "joint": {
        "label": "joint",
        "against": "alone",
        "pretrain": {"data": {"domain": "all", "ranked": "target", "split": "joint-5"}, "task": {"kind": "next_item"}},
    },
    "grafted": {
        "label": "grafted on the joint one",
        "against": "alone",
        "pretrain": {"data": {"domain": "all", "ranked": "target", "split": "joint-5"}, "task": {"kind": "next_item"}},
        "finetune": {
            "shared_items": True,
            "task": {"kind": "next_item"},
            "data": {"domain": "all", "predicted": "target", "split": "joint-5"},
        },
    },
}


def own_rows() -> dict[str, Any]:
    """OWN for the tiny lake."""
    rows: dict[str, Any] = json.loads(json.dumps(OWN))
    for row in rows.values():
        for section in [row[name] for name in ("pretrain", "finetune") if name in row]:
            section |= {"model": SMALL | {"blocks": 1}, "train": TRAIN}
    return rows


def test_rows_of_ones_own_share_what_they_are_grafted_on(tmp_path: Path) -> None:
    config = ExperimentConfig.model_validate(settings("lake", tmp_path, bert4rec=None, custom=own_rows(), seeds=[0, 3]))
    rows = {row.id: row for row in planned(config, "lake", 7)}
    assert len(training_jobs(list(rows.values()))) == 2 * 3
    for seed in (0, 3):
        alone, joint, grafted = (rows[name].trainings[seed] for name in OWN)
        assert grafted.parent is joint
        assert grafted.config.model_dump()["parent"] == str(joint.folder / "model")
        assert {training.config.train.seed for training in (alone, joint, grafted)} == {seed}
        assert [training.config.data.predicted for training in (alone, joint, grafted)] == [None, None, "target"]
    told = [vars(row) for row in rows.values()]
    assert [(from_scratch_of(row, told) or {}).get("id") for row in told] == [None, "alone", "alone"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"joint": {"label": "x", "against": "nobody"}}, "expected a section pretrain, finetune"),
        ({"x": OWN["alone"] | {"label": "x", "against": "nobody"}}, "expected another row, one of .*found nobody"),
        ({"x": OWN["grafted"] | {"pretrain": None}}, "expected a section pretrain for transfer deep"),
        ({"x": OWN["grafted"] | {"finetune": {"transfer": "none"}}}, "expected no section pretrain"),
    ],
)
def test_rows_of_ones_own_that_make_no_sense_are_refused(more: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        ExperimentConfig.model_validate(settings("lake", tmp_path, bert4rec=None, custom=more))


def test_a_grid_is_each_model_by_each_transfer() -> None:
    config = load_experiment("models", None)
    rows = {row.id: row for row in planned(config, "lake", 1)}
    assert len(rows) == 20
    assert {row.against for row in rows.values()} == {None, *config.grid}
    lora, parallel = (rows[name].trainings[0] for name in ("peterrec-lora", "peterrec-parallel"))
    assert rows["peterrec-lora"].label == "PeterRec, next item, LoRA"
    assert lora.parent is parallel.parent
    found = [training.config for training in (lora, parallel) if isinstance(training.config, FinetuneConfig)]
    assert [(one.transfer, one.patch.kind, one.patch.place) for one in found] == [
        ("patch", "lora", "serial"),
        ("patch", "adapter", "parallel"),
    ]
    assert rows["next"].trainings[0].parent is None
    on_loo = load_experiment("models", None, ["--split", "loo", "--target", "all", "--rows", "[next-deep]"])
    (deep,) = (row.trainings[0] for row in planned(on_loo, "lake", 1) if row.trainings)
    assert (deep.config.data.domain, deep.config.data.split) == ("all", "loo")


def test_a_grid_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    grid = {"x": {"label": "x", "preset": {"task": {"kind": "next_item"}}, "transfers": ["none"]}}
    click = {"x": {"label": "x", "preset": {"task": {"kind": "click", "causal": True}}}}
    for given, told in (
        ({"own": OWN}, "own is now custom; rename it"),
        ({"grid": grid, "custom": {"x": OWN["alone"]}}, "custom: expected other names than grid makes, found x"),
        (
            {"grid": grid, "custom": {"y": {"label": "y", "pretrain": click["x"]["preset"]}}},
            "custom.y: expected a task that predicts the same as next_item, that of grid.x, found click",
        ),
        ({"grid": click, "metric": "NDCG@10"}, r"metric: expected .* under task click \(user AUC\), found NDCG@10"),
    ):
        with pytest.raises(ValueError, match=told):
            ExperimentConfig.model_validate(settings("lake", tmp_path, bert4rec=None, **given))


@pytest.mark.slow
def test_an_experiment_of_ones_own_rows(lake: str, tmp_path: Path) -> None:
    own = own_rows()
    for kind in ("serial", "lora"):
        own[kind] = json.loads(json.dumps(own["grafted"]))
        own[kind] |= {"label": f"patched by {kind}"}
        own[kind]["finetune"] |= {"transfer": "patch", "patch": {"bottleneck": 1, "rank": 1}}
        own[kind]["finetune"]["patch"] |= {"kind": "lora" if kind == "lora" else "adapter"}
    own["lora"]["finetune"]["shared_items"] = False  # so that items are its own
    given = settings(lake, tmp_path, bert4rec=None, custom=own, seeds=[0, 1])
    file = tmp_path / "own.yaml"
    file.write_text(json.dumps(given | {"evaluation": {"protocols": ["full"]}}))
    assert run.main(["--experiment", str(file)]) == 0
    found = json.loads((tmp_path / "tiny" / "results.json").read_text())
    rows = {row["id"]: row for row in found["rows"] if row["kind"] == "custom"}
    assert {row["status"] for row in rows.values()} == {"done"}
    assert {(one["row"], one["against"]) for one in found["comparisons"]} == {(row, "alone") for row in own} - {
        ("alone", "alone")
    }
    assert found["hypotheses"] == []
    assert [run["parent_hash"] for run in rows["grafted"]["seeds"]] == [
        run["model_hash"] for run in rows["joint"]["seeds"]
    ]
    assert "all domains" in rows["joint"]["reads"]
    page = (tmp_path / "tiny" / "report" / "report.html").read_text(encoding="utf-8")
    assert "Table 2" not in page
    assert "grafted on the joint one" in page
    assert [(one["seed"], one["rows"]) for one in found["patches"]] == [
        (0, ["serial", "lora"]),
        (1, ["serial", "lora"]),
    ]
    for one in found["patches"]:
        folders = [Path(run["folder"]) / "model" for row in one["rows"] for run in rows[row]["seeds"]]
        whole = [sum(file.stat().st_size for file in folder.iterdir()) / 1e6 for folder in folders]
        assert one["whole"]["mb"] == pytest.approx(sum(whole) / 2, rel=0.02)  # of both seeds, who are alike
        assert 0 < one["items_mb"] < one["patches_mb"] < one["whole"]["mb"]
        assert one["patched"]["mb"] > one["patches_mb"]
        assert min(one[way][what] for way in ("whole", "patched") for what in ("seconds", "ms")) > 0
    assert "Patches beside whole copies" in page
    assert "patched by serial, patched by lora, seed 0" in page


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--sasrec", "{pretrain: ml1m}"], "unknown setting sasrec"),
        (["--rows", "[bert4rec/deep/next_item]"], "rows: expected some of .*found bert4rec/deep/next_item"),
        (["--target", "source"], "two domains"),
        (["--target", "elsewhere"], "elsewhere"),
        (["--joint_split", "last"], "etl.splits: expected last"),
        (["--lake", "somewhere"], "one of etl"),
        (["--bert4rec.finetune.base", "preset/caser_w64"], "the same model"),
        (["--caser.pretrain_tasks", "[]"], "at least one"),
        (["--seeds", "[]"], "seeds"),
    ],
)
def test_settings_that_make_no_experiment_are_one_line(
    more: Sequence[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["--experiment", "table2", *more]) == 2
    assert re.fullmatch(rf"experiment: .*{told}.*\n", capsys.readouterr().err)


# --- data that rows make no sense on, and scores ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_lake(tmp_path_factory.mktemp("lake")))


def test_table_1_counts_what_the_lake_holds(lake: str, tmp_path: Path) -> None:
    config = ExperimentConfig.model_validate(settings(lake, tmp_path))
    release = pin(lake, None)
    facts = results.data_facts(release, config)
    from deltalake import DeltaTable

    found = DeltaTable(f"{lake}/sequences").to_pandas()
    heads = set(DeltaTable(f"{lake}/knowledge").to_pandas()["head_index"])
    kept = set(DeltaTable(f"{lake}/items").to_pandas().query("kept")["index"])
    members = DeltaTable(f"{lake}/domains").to_pandas()
    own = found[found["split"] == "last-5"].groupby("domain")
    for told in facts.domains:
        rows = own.get_group(told["domain"])
        items = set(members[members["domain"] == told["domain"]]["index"]) & kept
        assert told["users"] == len(rows)
        assert told["interactions"] == sum(map(len, rows["items"]))
        assert told["average_length"] == pytest.approx(rows["items"].map(len).mean())
        assert (told["items"], told["items_with_knowledge"]) == (len(items), len(items & heads))
    users = {name: set(rows["user"]) for name, rows in own}
    assert facts.shared_users == len(users["source"] & users["target"])


def test_rows_that_would_be_others_under_a_wrong_name_are_holes() -> None:
    config = load_experiment("table2", "cpu")
    domains = [{"domain": name, "items_with_knowledge": known} for name, known in (("source", 0), ("target", 9))]
    apart = results.DataFacts(domains, shared_users=0)
    reasons = {row.id: results.why_not(row, apart, config) for row in planned(config, "lake", 1)}
    assert "share no user" in reasons["bert4rec/shallow/next_item/plain"]
    assert "domain 'source' has metadata" in reasons["caser/deep/masked_item/knowledge"]
    assert reasons["bert4rec/none/-/knowledge"] == reasons["bert4rec/deep/next_item/plain"] == ""
    bare = results.DataFacts([row | {"items_with_knowledge": 0} for row in domains], shared_users=5)
    reasons = {row.id: results.why_not(row, bare, config) for row in planned(config, "lake", 1)}
    assert {name for name, reason in reasons.items() if reason} == {name for name in reasons if "knowledge" in name}


BARE = ["--bert4rec.finetune.model.user_width", "0", "--caser", "null", "--knowledge", "[false]"]


def test_rows_whose_transfer_would_copy_nothing_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    rows = planned(load_experiment("table2", "cpu", BARE), "lake", 1)
    empty = [row for row in rows if row.reason]
    assert {row.transfer for row in empty} == {"shallow"}
    assert not any(row.trainings for row in empty)
    experiment_plan.check_rows(rows)
    assert capsys.readouterr().out.splitlines() == [f"{row.id} is left out: {row.reason}" for row in empty]


def test_an_experiment_of_such_rows_alone_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    examples = ["--rows", "[bert4rec/shallow/next_item/plain]"]
    assert run.main(["--experiment", "table2", "--preset", "cpu", *BARE, *examples]) == 2
    assert re.fullmatch(r"experiment: rows: bert4rec/shallow.*transfer deep.*\n", capsys.readouterr().err)


def test_scores_equal_those_of_evaluate_also_when_read_again(lake: str, tmp_path: Path) -> None:
    config = ExperimentConfig.model_validate(settings(lake, tmp_path, rows=["bert4rec/none/-/plain"]))
    config.folder.mkdir()
    release = pin(lake, None)
    options = ReadOptions(config.evaluation.protocols, max_users=config.evaluation.max_users)
    examples = read_evaluation_set(release, "last-5", "target", "test", options)
    row: Row = next(row for row in planned(config, lake, release.number) if row.transfer == "none")
    training = row.trainings[0]
    artifact = load_model(write_model(training.folder / "model", lake, skill=1.0))
    expected = evaluate_scorers([model_scorer(artifact, examples, label="x", seed=0)], examples)

    def scored() -> dict[str, dict[str, float]]:
        given = results.Scored(config, release, [training])
        given.add_model(row, 0, training)
        (found,) = given.results
        assert list(found.conventions) == ["list", "single"]
        return {protocol: found.averages((row.id, 0), protocol) for protocol in found.protocols}

    first = scored()
    for protocol in config.evaluation.protocols:
        assert first[protocol] == pytest.approx(means(expected.metrics(("x", 0), protocol)))
    assert scored() == first
    assert len(list((config.folder / "outputs").iterdir())) == 1
    write_model(training.folder / "model", lake, skill=-1.0)  # another model in that place is scored anew
    assert scored() != first


def test_numbers_that_are_none_become_null() -> None:
    given = {"a": [float("nan"), np.float64(1.5), np.int32(2)], "b": (float("inf"), "x", None, True)}
    assert json.loads(json.dumps(results.finite(given), allow_nan=False)) == {
        "a": [None, 1.5, 2],
        "b": [None, "x", None, True],
    }


# --- processes --------------------------------------------------------------------------------------------------------


def start(folder: Path, given: dict[str, Any], log: str) -> subprocess.Popen[bytes]:
    (folder / "tiny.yaml").write_text(json.dumps(given))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "GRAFTREC_"))}
    command = [sys.executable, "-m", "graftrec", "experiment", "--experiment", "tiny.yaml"]
    with (folder / log).open("wb") as out:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out)


def results_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "tiny" / "results.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_experiment_goes_on_and_ends_as_if_nothing_had_been(lake: str, tmp_path: Path) -> None:
    """Killed with a grafted cell under way: its process ends too, and all ends as where nothing was killed."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        given = settings(lake, folder, transfers=["deep"])
        if folder == killed:
            process = start(folder, given, "first.log")
            under_way = folder / "tiny" / "cells" / "bert4rec-deep-next_item-plain-0"
            while not (under_way / "checkpoints").exists() and not (under_way / "done.json").exists():
                assert process.poll() is None, (folder / "first.log").read_text()
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
        process = start(folder, given, "last.log")
        assert process.wait() == 0, (folder / "last.log").read_text()
    for one, other in zip(results_in(whole)["rows"], results_in(killed)["rows"], strict=True):
        assert (one["id"], one["metrics"]) == (other["id"], other["metrics"])
        assert one["kind"] == "baseline" or one["status"] == "done"
    assert "pretrain-next_item-plain-0: unchanged" in (killed / "last.log").read_text()
    assert (killed / "tiny" / "report" / "report.html").is_file()
    check_tracked(whole, results_in(whole))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_cell_that_fails_is_a_hole_and_the_others_go_on(lake: str, tmp_path: Path) -> None:
    """A loss that is no number ends fine-tuning; the joint model has the settings of pre-training, and stands."""
    given = settings(lake, tmp_path, joint=True, transfers=["none", "deep"])
    given["bert4rec"]["finetune"] = plan()["finetune"] | {"train": TRAIN | {"learning_rate": 1e30, "clip_norm": 1e30}}
    process = start(tmp_path, given, "log")
    assert process.wait() == 1
    told = (tmp_path / "log").read_text()
    assert "Traceback" not in told
    assert re.search(r"missing  bert4rec/deep/next_item/plain, seed 0: .*\n", told)
    rows = {row["id"]: row for row in results_in(tmp_path)["rows"]}
    assert (rows["bert4rec/none/-/plain"]["status"], rows["joint/bert4rec/plain"]["status"]) == ("missing", "done")
    reason = rows["bert4rec/none/-/plain"]["reason"]
    assert reason.startswith("seed 0: ")
    assert reason[8:50] in (tmp_path / "tiny" / "report" / "report.md").read_text()


def check_tracked(folder: Path, found: dict[str, Any]) -> None:
    """One run with its cells as children; the results are its artifacts."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("graftrec").experiment_id], max_results=100)
    (parent,) = [run for run in runs if run.data.tags.get("graftrec.recipe") == "experiment"]
    children = {run.info.run_id for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert children == {run.info.run_id for run in runs} - {parent.info.run_id}
    assert {run["run"] for row in found["rows"] for run in row["seeds"]} < children
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {"results.json", "report"}
