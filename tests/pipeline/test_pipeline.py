"""The main job: what its steps are given, and, slowly, the whole path on the demo's own settings."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from etl.config import GraftrecError, load

sys.path.insert(0, str(Path(__file__).parents[2] / "mlflow_projects"))  # scripts, no package

import pipeline
from pipeline import PipelineConfig, Trained

from trainer.config import GateConfig

ROOT = Path(__file__).parents[2]


def demo(*overrides: str) -> PipelineConfig:
    return load(PipelineConfig, "pipeline/demo", overrides)


def trained(**scores: list[float]) -> list[Trained]:
    return [
        Trained(label, seed, Path("runs") / f"{label}-{seed}" / "model", score)
        for label, of_seeds in scores.items()
        for seed, score in enumerate(of_seeds)
    ]


# --- settings ---------------------------------------------------------------------------------------------------------


def test_lake_and_release_flow_through_every_step() -> None:
    config, planned = pipeline.plan(demo("--etl.lake", "elsewhere"))
    models = trained(none=[0.1, 0.1], deep=[0.2, 0.3])
    cells, _ = pipeline.cells_of(config, planned, 7)
    assert {(cell.config.data.lake, cell.config.data.release) for cell in cells} == {("elsewhere", 7)}
    for made in (
        pipeline.evaluate_config(config, "target", 7, models),
        pipeline.promote_config(config, "target", 7, models),
        pipeline.recommend_config(config, "target", 7),
    ):
        assert (made.lake, made.release, made.domain) == ("elsewhere", 7, "target")


@pytest.mark.parametrize("name", ["pipeline/demo", "pipeline/ml1m"])
def test_gate_takes_its_thresholds_from_its_yaml(name: str) -> None:
    wanted = load(GateConfig, "gate/default")
    assert wanted != GateConfig(), "the file says nothing that the type doesn't"
    config = load(PipelineConfig, name)
    assert pipeline.promote_config(config, "target", 1, trained(none=[0.1], deep=[0.2])).gate == wanted


def test_each_training_has_a_folder_of_its_own() -> None:
    config, planned = pipeline.plan(shop("music", "films", targets="[music, films]"))
    cells, of_target = pipeline.cells_of(config, planned, 1)
    assert len({cell.folder for cell in cells}) == len(cells) == 1 + 2 * len(config.seeds) * (len(config.transfers) + 1)
    deep = of_target["films"]["deep", 2]
    assert (deep.config.train.seed, deep.config.transfer, deep.config.data.domain) == (2, "deep", "films")
    assert deep.parent is of_target["music"]["shallow", 0].parent is cells[0]
    assert deep.config.parent == str(cells[0].model)
    assert (cells[0].config.data.domain, of_target["films"]["none", 2].parent) == ("books", None)


def test_a_model_of_all_domains_predicts_the_target_on_a_split_that_holds_its_items_out() -> None:
    config, planned = pipeline.plan(shop("music", "films", targets="[music, films]"))
    _, of_target = pipeline.cells_of(config, planned, 1)
    for target in ("music", "films"):
        data = of_target[target]["all-domains", 0].config.data
        split = next(split for split in config.etl.splits if split.name == data.split)
        assert (data.domain, data.predicted, split.joint_target) == ("all", target, target)
    plain = next(split for split in config.etl.splits if split.name == "last-5")
    assert (split.validation, split.test, split.min_train) == (plain.validation, plain.test, plain.min_train)
    assert pipeline.plan(config)[0].etl.splits == config.etl.splits  # found, not added again


def test_movielens_has_the_split_for_all_domains_already() -> None:
    config = load(PipelineConfig, "pipeline/ml1m")
    planned = pipeline.plan(config)
    assert (planned[1].joint_splits, planned[0].etl.splits) == ({"target": "joint-5"}, config.etl.splits)


def shop(*targets_of_log: str, targets: str = "[]", source: str = "books") -> PipelineConfig:
    """A log with these domains beside `books`; none at all where none are named."""
    names = ["books", *targets_of_log] if targets_of_log else []
    domains = str([{"name": name, "any_of": [name]} for name in names])
    return demo("--etl.domains", domains, "--targets", targets, "--pretrain.data.domain", source)


def test_without_domains_one_model_of_the_whole_log_is_trained() -> None:
    _, planned = pipeline.plan(shop())
    assert (planned.source, planned.targets, planned.transfers) == (None, ("all",), ("none",))
    assert planned.joint_splits == {}


def test_of_one_domain_nothing_is_transferred_and_the_gate_asks_for_no_from_scratch() -> None:
    config = demo("--etl.domains", "[{name: music, any_of: [music]}]")
    config, planned = pipeline.plan(config)
    assert (planned.source, planned.targets, planned.transfers) == (None, ("music",), ("none",))
    asked = pipeline.promote_config(config, "music", 1, trained(none=[0.1, 0.3]))
    assert (asked.candidate, asked.from_scratch) == (str(Path("runs/none-1/model")), ())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: shop("music", targets="[musik]"), r"targets: .*books, music, all.* found musik"),
        (
            lambda: shop("music", targets="[music]", source="book"),
            r"pretrain\.data\.domain: .*books, music.* found 'book'",
        ),
        (lambda: shop("music", targets="[music, books]"), r"targets: expected domains other than 'books'"),
        (lambda: shop("music"), r"targets: .*found target"),
    ],
)
def test_domains_that_do_not_fit_the_log_are_named(config: Callable[[], PipelineConfig], message: str) -> None:
    with pytest.raises(GraftrecError, match=message):
        pipeline.plan(config())


def test_each_target_has_a_registered_model_and_folders_of_its_own() -> None:
    config = demo("--registered_model", "shop")
    made = [pipeline.promote_config(config, domain, 1, trained(none=[0.1], deep=[0.2])) for domain in ("a", "b")]
    assert [one.registered_model for one in made] == ["shop-a", "shop-b"]
    assert pipeline.recommend_config(config, "b", 1).registered_model == "shop-b"
    assert len({(one.output, one.name) for one in made}) == 2


def test_candidate_is_the_best_seed_of_the_transfer_that_is_best_on_the_whole() -> None:
    models = trained(none=[0.9, 0.9], shallow=[0.1, 0.6], deep=[0.4, 0.5])
    assert [(model.label, model.seed) for model in pipeline.choose(models)] == [("deep", 1), ("deep", 0)]
    asked = pipeline.promote_config(demo(), "target", 1, models)
    assert asked.candidate == str(Path("runs/deep-1/model"))
    assert asked.replicas == (str(Path("runs/deep-0/model")),)
    assert len(asked.from_scratch) == 2


def test_from_scratch_is_the_candidate_only_where_it_is_alone() -> None:
    assert {model.label for model in pipeline.choose(trained(none=[0.1, 0.2]))} == {"none"}


def test_movielens_without_knowledge_files_trains_without_knowledge(tmp_path: Path) -> None:
    config = pipeline.movielens_in(load(PipelineConfig, "pipeline/ml1m"), tmp_path)
    assert config.etl.knowledge.files == ()
    assert config.pretrain.model.knowledge == config.finetune.model.knowledge == {}


def test_movielens_takes_the_knowledge_files_that_are_there(tmp_path: Path) -> None:
    folder = tmp_path / "ml-1m"
    folder.mkdir()
    (folder / "dbpedia.csv").touch()
    config = pipeline.movielens_in(load(PipelineConfig, "pipeline/ml1m"), folder)
    assert [file.name for file in config.etl.knowledge.files] == ["dbpedia"]
    assert config.finetune.model.knowledge != {}


def test_data_is_refused_for_another_source() -> None:
    with pytest.raises(GraftrecError, match="MovieLens"):
        pipeline.movielens_in(demo(), Path("data"))


def test_unknown_setting_ends_with_two_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline.main(["--config", "pipeline/demo", "--finetune.train.epoch", "3"]) == 2
    assert re.fullmatch(r"pipeline: .*finetune\.train\.epoch.*\n", capsys.readouterr().err)


# --- the whole path ---------------------------------------------------------------------------------------------------


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The script in an empty folder, as `make demo` runs it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "GRAFTREC_"))}
    command = [sys.executable, str(ROOT / "mlflow_projects" / "pipeline.py"), "--config", "pipeline/demo", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def gains(output: str) -> dict[str, float]:
    """Transfer -> gain in the first metric, in percent, from the closing table."""
    table = output[output.rindex("transfer ") :]
    return {
        name: float(gain)
        for name, gain in re.findall(r"^(shallow|deep|all-domains) +[0-9.]+ +([+-][0-9.]+) %", table, re.M)
    }


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(1_800)
def test_demo_moves_knowledge_promotes_and_recommends(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert min(gains(done.stdout).values()) > 5
    assert "models:/graftrec-target@champion" in done.stdout

    again = run(tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "epoch" not in again.stdout  # nothing is trained twice
    assert gains(again.stdout) == gains(done.stdout)
    assert "version 1: unchanged" in again.stdout

    for snippet in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S):
        read = subprocess.run(
            [sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert read.returncode == 0, read.stderr

    check_tracked(tmp_path)


def check_tracked(folder: Path) -> None:
    """One parent run, each step its child, all finished, and no pickle among what was logged."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("graftrec")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1_000)
    parents = [run for run in runs if run.data.tags.get("graftrec.recipe") == "pipeline"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[-1].info.run_id]
    assert {"etl", "pretrain-0", "target/none-0", "target/deep-2", "target/evaluate", "target/promote"} <= {
        run.info.run_name for run in children
    }
    assert {run.info.status for run in runs} == {"FINISHED"}
    suffixes = {path.suffix for path in (folder / "mlartifacts").rglob("*")}
    assert not suffixes & {".pkl", ".pickle", ".pt", ".pth", ".bin"}


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_demo_without_shared_tastes_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "--etl.source.share_tastes", "false")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "gate             refused" in done.stdout
    assert "no recommendations are written" in done.stdout
    assert gains(done.stdout)["shallow"] < 5
