"""The main job: what its steps are given, and, slowly, the whole path on the demo's own settings."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from etl.settings import ConfigError, GraftrecError, load, replaced
from tests.fixtures.places import ROOT
from trainer.config import FinetuneConfig, GateConfig
from trainer.recipes import companion, pipeline, pipeline_plan
from trainer.recipes.pipeline_plan import PipelineConfig, Trained


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
    config, planned = pipeline_plan.plan(demo("--etl.lake", "elsewhere"))
    models = trained(none=[0.1, 0.1], deep=[0.2, 0.3])
    trainings, _ = pipeline_plan.training_jobs(config, planned, 7)
    assert {(training.config.data.lake, training.config.data.release) for training in trainings} == {("elsewhere", 7)}
    for made in (
        pipeline_plan.evaluate_config(config, "target", 7, models),
        pipeline_plan.promote_config(config, "target", 7, models),
        pipeline_plan.recommend_config(config, "target", 7),
    ):
        assert (made.lake, made.release, made.domain) == ("elsewhere", 7, "target")


@pytest.mark.parametrize("name", ["pipeline/demo", "pipeline/ml1m"])
def test_gate_takes_its_thresholds_from_its_yaml(name: str) -> None:
    wanted = load(GateConfig, "gate/default")
    assert wanted != GateConfig(), "the file says nothing that the type doesn't"
    config = load(PipelineConfig, name)
    assert pipeline_plan.promote_config(config, "target", 1, trained(none=[0.1], deep=[0.2])).gate == wanted


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            (
                "--finetune.base",
                "preset/caser_w64",
                "--pretrain.base",
                "preset/caser_w64",
                "--transfers",
                "[none, patch]",
            ),
            "transfer patch: expected a model with blocks",
        ),
        (
            ("--finetune.task", "{kind: target_item}", "--finetune.data", "{domain: all, predicted: target}"),
            "task target_item tells one domain's items by what was done elsewhere",
        ),
    ],
)
def test_settings_that_go_with_no_training_are_refused_before_tables_are_made(
    overrides: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = demo(*overrides, "--tracking.enabled", "false", "--targets", "[target]")
    with pytest.raises(ConfigError, match=told):
        pipeline.run(config)
    assert list(tmp_path.iterdir()) == []


def test_only_transfers_share_items_with_a_parent() -> None:
    config, planned = pipeline_plan.plan(demo("--finetune.shared_items", "true"))
    _, of_target = pipeline_plan.training_jobs(config, planned, 1)
    shared = {label: training.config.shared_items for (label, _), training in of_target["target"].items()}
    assert shared == {"none": False, "shallow": True, "deep": True, "all-domains": False, "cold-users": False}


def test_each_training_has_a_folder_of_its_own() -> None:
    config, planned = pipeline_plan.plan(shop("music", "films", targets="[music, films]"))
    trainings, of_target = pipeline_plan.training_jobs(config, planned, 1)
    assert (
        len({training.folder for training in trainings})
        == len(trainings)
        == 1 + 2 * (len(config.seeds) * (len(config.transfers) + 1) + 1)
    )
    deep = of_target["films"]["deep", 2]
    assert (deep.config.train.seed, deep.config.transfer, deep.config.data.domain) == (2, "deep", "films")
    assert deep.parent is of_target["music"]["shallow", 0].parent is trainings[0]
    assert deep.config.parent == str(trainings[0].model)
    assert (trainings[0].config.data.domain, of_target["films"]["none", 2].parent) == ("books", None)


def test_a_model_of_all_domains_predicts_the_target_on_a_split_that_holds_its_items_out() -> None:
    config, planned = pipeline_plan.plan(shop("music", "films", targets="[music, films]"))
    _, of_target = pipeline_plan.training_jobs(config, planned, 1)
    for target in ("music", "films"):
        data = of_target[target]["all-domains", 0].config.data
        split = next(split for split in config.etl.splits if split.name == data.split)
        assert (data.domain, data.predicted, split.joint_target) == ("all", target, target)
    plain = next(split for split in config.etl.splits if split.name == "last-5")
    assert (split.validation, split.test, split.min_train) == (plain.validation, plain.test, plain.min_train)
    assert pipeline_plan.plan(config)[0].etl.splits == config.etl.splits  # found, not added again


def test_movielens_has_the_split_for_all_domains_already() -> None:
    config = load(PipelineConfig, "pipeline/ml1m")
    planned = pipeline_plan.plan(config)
    assert (planned[1].joint_splits, planned[0].etl.splits) == ({"target": "joint-5"}, config.etl.splits)


def shop(*targets_of_log: str, targets: str = "[]", source: str = "books") -> PipelineConfig:
    """A log with these domains beside `books`; none at all where none are named."""
    names = ["books", *targets_of_log] if targets_of_log else []
    domains = str([{"name": name, "any_of": [name]} for name in names])
    return demo("--etl.domains", domains, "--targets", targets, "--source", source)


BARE = ("--finetune.model.user_width", "0", "--finetune.model.knowledge", "{}")


def test_a_transfer_that_would_copy_nothing_is_left_out_of_several() -> None:
    config, planned = pipeline_plan.plan(demo(*BARE))
    assert planned.transfers == ("none", "deep")
    assert len(planned.notes) == 1
    assert planned.notes[0].startswith("shallow is left out: transfer shallow copies user and knowledge embeddings")
    _, of_target = pipeline_plan.training_jobs(config, planned, 1)
    assert {label for label, _ in of_target["target"]} == {"none", "deep", "all-domains", "cold-users"}
    assert pipeline_plan.plan(demo())[1].notes == ()


def test_a_transfer_that_would_copy_nothing_is_refused_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for transfers in ("[none, shallow]", "[shallow]"):
        assert pipeline.main(["--config", "pipeline/demo", *BARE, "--transfers", transfers]) == 2
        assert re.fullmatch(
            r"pipeline: transfers: transfer shallow copies .*transfer deep.*\n", capsys.readouterr().err
        )


def test_a_transfer_is_left_out_where_domains_share_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of that target only; the other keeps it."""
    config, planned = pipeline_plan.plan(shop("music", "films", targets="[music, films]"))

    def empty(made: FinetuneConfig, release: object, source: str) -> str:
        return "they share no user" if (made.transfer, made.data.domain) == ("shallow", "music") else ""

    monkeypatch.setattr("trainer.training.empty_transfer.empty_by_data", empty)
    release = SimpleNamespace(number=1)
    found = pipeline_plan.without_empty(config, planned, release)
    assert capsys.readouterr().out == "music/shallow is left out: they share no user\n"
    _, of_target = pipeline_plan.training_jobs(config, found, 1)
    assert {label for label, _ in of_target["films"]} - {label for label, _ in of_target["music"]} == {"shallow"}
    alone = replaced(config, transfers=("none", "shallow"))
    with pytest.raises(ConfigError, match="transfers: they share no user; transfer deep"):
        pipeline_plan.without_empty(alone, pipeline_plan.plan(alone)[1], release)


def test_without_domains_one_model_of_the_whole_log_is_trained() -> None:
    _, planned = pipeline_plan.plan(shop())
    assert (planned.source, planned.targets, planned.transfers) == (None, ("all",), ("none",))
    assert planned.joint_splits == {}


@pytest.mark.parametrize("given", [(), ("--source", "music"), ("--source", "music", "--targets", "[music]")])
def test_of_one_domain_nothing_is_transferred_and_the_gate_asks_for_no_from_scratch(given: Sequence[str]) -> None:
    config = demo("--etl.domains", "[{name: music, any_of: [music]}]", *given)
    config, planned = pipeline_plan.plan(config)
    assert (planned.source, planned.targets, planned.transfers) == (None, ("music",), ("none",))
    examples = pipeline_plan.promote_config(config, "music", 1, trained(none=[0.1, 0.3]))
    assert (examples.candidate, examples.from_scratch) == (str(Path("runs/none-1/model")), ())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: shop("music", targets="[musik]"), r"targets: .*books, music, all.* found musik"),
        (
            lambda: shop("music", targets="[music]", source="book"),
            r"source: .*books, music.* found 'book'",
        ),
        (lambda: shop("music", targets="[music, books]"), r"targets: expected domains other than 'books'"),
        (lambda: shop("music", targets="[books]"), r"targets: expected domains other than 'books', .*set source to"),
        (lambda: demo("--etl.domains", "[{name: a}]", "--source", "b"), r"source: .*\(a, all\), found 'b'"),
        (lambda: demo("--targets", "[source]"), r"targets: expected domains other than 'source'"),
        (lambda: demo("--targets", "[Books]"), r"targets: .*source, target, all.* found Books"),
        (lambda: demo("--finetune.data.split", "last5"), r"finetune\.data\.split: .*last-5, .* found 'last5'"),
        (lambda: demo("--pretrain.data.split", "x", "--reads_all", "false"), r"pretrain\.data\.split: .* found 'x'"),
        (lambda: shop("music"), r"targets: .*found target"),
    ],
)
def test_domains_that_do_not_fit_the_log_are_named(config: Callable[[], PipelineConfig], message: str) -> None:
    with pytest.raises(GraftrecError, match=message):
        pipeline_plan.plan(config())


def test_a_target_that_is_the_source_is_trained_where_nothing_is_to_be_transferred() -> None:
    for config in (
        replaced(shop("music", targets="[books]"), transfers=("none",)),
        demo("--etl.domains", "[{name: source}]"),
    ):
        _, planned = pipeline_plan.plan(config)
        assert (planned.source, planned.transfers) == (None, ("none",))
        assert len(planned.targets) == 1


def test_each_target_has_a_registered_model_and_folders_of_its_own() -> None:
    config = demo("--registered_model", "shop")
    made = [pipeline_plan.promote_config(config, domain, 1, trained(none=[0.1], deep=[0.2])) for domain in ("a", "b")]
    assert [one.registered_model for one in made] == ["shop-a", "shop-b"]
    assert pipeline_plan.recommend_config(config, "b", 1).registered_model == "shop-b"
    assert len({(one.output, one.name) for one in made}) == 2


def test_candidate_is_the_best_seed_of_the_transfer_that_is_best_on_the_whole() -> None:
    models = trained(none=[0.9, 0.9], shallow=[0.1, 0.6], deep=[0.4, 0.5])
    assert [(model.label, model.seed) for model in pipeline_plan.choose(models)] == [("deep", 1), ("deep", 0)]
    examples = pipeline_plan.promote_config(demo(), "target", 1, models)
    assert examples.candidate == str(Path("runs/deep-1/model"))
    assert examples.replicas == (str(Path("runs/deep-0/model")),)
    assert len(examples.from_scratch) == 2


def test_from_scratch_is_the_candidate_only_where_it_is_alone() -> None:
    assert {model.label for model in pipeline_plan.choose(trained(none=[0.1, 0.2]))} == {"none"}


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


# --- what it prints ---------------------------------------------------------------------------------------------------

USERS = np.random.default_rng(0).random(200) / 10  # what users differ by


@pytest.mark.parametrize(
    ("model", "best", "is_better", "beside"),
    [
        (0.40, 0.42, True, "item-to-item lies above it: 0.4200"),  # nothing serves item-to-item, so it is no bar
        (0.40, 0.30, True, "item-to-item, the best simple baseline, lies below it: 0.3000"),
        (0.40, 0.02, True, ""),
        (0.03, 0.42, False, "item-to-item lies above it: 0.4200"),
    ],
)
def test_a_companion_must_beat_the_popular_items_that_are_served_without_it(
    model: float, best: float, is_better: bool, beside: str
) -> None:
    noise = USERS - USERS.mean()
    baselines = {"popularity": 0.04 + noise, "item-to-item": best + noise}
    found = companion.over_popularity(model - noise, baselines, GateConfig())
    assert (found.is_better, found.beside) == (is_better, beside)
    assert f"200 users, NDCG@10 {model:.4f} against 0.0400 of popularity, which is served" in found.text


def test_a_companion_that_chance_may_have_lifted_is_refused() -> None:
    rng = np.random.default_rng(1)
    found = companion.over_popularity(
        0.05 + rng.normal(0, 0.3, 50), {"popularity": 0.04 + rng.normal(0, 0.3, 50)}, GateConfig()
    )
    assert not found.is_better


def test_columns_of_the_table_stay_apart_however_large_a_gain_is() -> None:
    def row(label: str, metric: str, mean: float, gain: float | None) -> dict[str, Any]:
        return {
            "label": label,
            "metric": metric,
            "protocol": "full",
            "mean": mean,
            "is_model": label != "popularity",
            "is_candidate": label == "deep",
            "p_value": None if gain is None else 1e-9,
            "gain": None if gain is None else {"gain": 0.5, "relative_gain": gain},
        }

    gains = {"none": None, "deep": 12_345.678, "popularity": float("nan")}
    table = pipeline.gain_table(
        [
            row(label, metric, 1.0, gain)
            for metric in ("NDCG@10", "a metric of a long name")
            for label, gain in gains.items()
        ]
    )
    head, *lines = [re.split(r"  +", line) for line in table.splitlines()[:4]]
    assert head == ["model", "NDCG@10", "gain", "p", "a metric of a long name"]
    assert ["deep *", "1.0000", "+1234567.8 %", "<0.001", "1.0000"] in lines
    assert ["popularity", "1.0000", "+0.5000", "<0.001", "1.0000"] in lines  # popularity may have a mean of 0
    assert len({len(line) for line in table.splitlines()[:4]}) == 1


# --- the whole path ---------------------------------------------------------------------------------------------------


def run(folder: Path, *arguments: str, config: str = "pipeline/demo") -> subprocess.CompletedProcess[str]:
    """The command in that folder, as `make demo` runs it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "GRAFTREC_"))}
    command = [sys.executable, "-m", "graftrec", "pipeline", "--config", config, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def gains(output: str) -> dict[str, float]:
    """Model (the candidate's ends with a star) -> gain in the gate's metric, in percent, from the closing table."""
    table = output[output.rindex("\nmodel ") :]
    rows = re.findall(r"^((?:shallow|deep|all-domains)(?: \*)?) +[0-9.]+ +([+-][0-9.]+) %", table, re.M)
    return {name: float(gain) for name, gain in rows}


def candidates_gain(output: str) -> float:
    (gain,) = (gain for name, gain in gains(output).items() if name.endswith("*"))
    return gain


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(1_800)
def test_demo_moves_knowledge_promotes_and_recommends(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert candidates_gain(done.stdout) > 5
    assert "models:/graftrec-target@champion" in done.stdout

    again = run(tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    trainings = re.findall(r"^\[\d+/\d+\] (?:pretrain|target).*$", again.stdout, re.M)
    assert len(trainings) == 1 + 4 * 5 + 1
    assert all(": unchanged, " in line for line in trainings)
    assert gains(again.stdout) == gains(done.stdout)
    assert "version 1: unchanged" in again.stdout

    odd = tmp_path / "été à Gênes"  # Polars' reader of Delta tables finds nothing below such a folder
    shutil.copytree(tmp_path / "lake", odd / "lake")
    pages = [(ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "etl/README.md")]
    for snippet in re.findall(r"```python\n(.*?)```", "".join(pages), re.S):
        read = subprocess.run([sys.executable, "-c", snippet], cwd=odd, capture_output=True, text=True, check=False)
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
def test_demo_whose_source_teaches_nothing_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "--etl.source.source_teaches", "false")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "gate             refused" in done.stdout
    assert "no recommendations are written" in done.stdout
    assert "what now" in done.stdout


# --- a log of one's own -----------------------------------------------------------------------------------------------

DEPARTMENTS = ("books", "music", "films")


def write_shop(folder: Path, *, users: int = 300, apart: bool = False) -> None:
    """A log of three departments, whose users' tastes hold in all of them, and the settings of its pipeline. `apart`:
    each user is in one department only."""
    random = np.random.default_rng(0)
    folder.mkdir()
    rows = []
    for user in range(users):
        taste, time = random.integers(4), 1_600_000_000 + int(random.integers(1_000_000))
        for _ in range(int(random.integers(25, 45))):
            group = taste if random.random() < 0.8 else random.integers(4)
            time += int(random.integers(60, 9_000))
            department = DEPARTMENTS[user % 3 if apart else random.integers(3)]
            rows.append(f"u{user},{department}-{group * 10 + random.integers(10)},{time}\n")
    (folder / "events.csv").write_text("customer,sku,at\n" + "".join(rows))
    items = [f"{name}-{item},{name}\n" for name in DEPARTMENTS for item in range(40)]
    (folder / "products.csv").write_text("sku,department\n" + "".join(items))
    source = {
        "kind": "log",
        "root": str(folder),
        "events": {"path": "events.csv", "columns": {"user": "customer", "item": "sku", "time": "at"}},
        "items": {"path": "products.csv", "id": "sku", "categories": "department"},
    }
    domains = [{"name": name, "any_of": [name]} for name in DEPARTMENTS]
    etl = {"lake": "lake", "source": source, "domains": domains, "spark": {"engine": "sail"}}
    (folder / "etl.yaml").write_text(json.dumps(etl))
    model = {"kind": "bert4rec", "max_length": 100}
    pretrain = {"model": model, "task": {"kind": "masked_item"}, "train": {"epochs": 3, "learning_rate": 0.003}}
    settings = {
        "name": "shop",
        "registered_model": "shop",
        "runs": "runs",
        "etl": str(folder / "etl.yaml"),
        "pretrain": pretrain,
        "finetune": pretrain,
        "promote": "default",
        "source": "books",
        "transfers": ["none", "patch"],
        "seeds": [0, 1, 2],
        "targets": ["music", "films"],
    }
    (folder / "shop.yaml").write_text(json.dumps(settings))


def models_in(folder: Path) -> dict[str, bytes]:
    """Run -> what its model's manifest says of all its files."""
    return {str(path.parent.parent): path.read_bytes() for path in sorted(folder.rglob("model/manifest.json"))}


@pytest.mark.slow
@pytest.mark.timeout(1_200)
def test_two_targets_one_domain_and_none_each_keep_their_own(tmp_path: Path) -> None:
    write_shop(tmp_path / "log")
    base = str(tmp_path / "log" / "shop.yaml")
    done = run(tmp_path, config=base)
    assert done.returncode in (0, 3), done.stdout + done.stderr  # three epochs show nothing to speak of
    assert "Traceback" not in done.stderr
    first = models_in(tmp_path / "runs")
    assert len(first) == 1 + 2 * (3 * 3 + 1)
    registered = names_of_versions(tmp_path)
    assert {name for name in registered if name.endswith(("music", "films"))} == {"shop-music", "shop-films"}
    for domain in ("music", "films"):
        decision = json.loads((tmp_path / "runs" / domain / "promote" / "decision.json").read_text())
        assert decision["version"] == f"shop-{domain}/1"
        assert (tmp_path / "runs" / domain / "evaluate" / "evaluation" / "summary.json").is_file()

    again = run(tmp_path, "--targets", "[films]", config=base)
    assert "unchanged, validation" in again.stdout
    assert models_in(tmp_path / "runs") == first

    for domains, target in (("[{name: music, any_of: [music]}]", "music"), ("[]", "all")):
        alone = run(
            tmp_path,
            "--etl.domains",
            domains,
            "--etl.lake",
            f"lake-{target}",
            "--source",
            "null",
            "--targets",
            "[]",
            "--runs",
            f"runs-{target}",
            "--registered_model",
            "alone",
            config=base,
        )
        assert alone.returncode in (0, 3), alone.stdout + alone.stderr
        assert "nothing is transferred" in alone.stdout
        assert {Path(name).name for name in models_in(tmp_path / f"runs-{target}")} == {"none-0", "none-1", "none-2"}
    assert models_in(tmp_path / "runs") == first
    assert {"alone-music", "alone-all"} <= names_of_versions(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_domains_without_common_users_run_to_the_end(tmp_path: Path) -> None:
    """Nobody is new in a target there, so that nobody can be held out to measure it."""
    write_shop(tmp_path / "log", users=150, apart=True)
    done = run(tmp_path, "--targets", "[music]", config=str(tmp_path / "log" / "shop.yaml"))
    assert done.returncode in (0, 3), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "new in music     not measured" in done.stdout
    plain = ["--pretrain.model.knowledge", "{}", "--finetune.model.knowledge", "{}", "--runs", "alone"]
    config, transfers = str(tmp_path / "log" / "shop.yaml"), ["--transfers", "[none, shallow]"]
    alone = run(tmp_path, "--targets", "[music]", *transfers, *plain, config=config)
    assert alone.returncode == 2, alone.stdout + alone.stderr
    assert "domains 'books' and 'music' share no user" in alone.stderr
    assert [file.name for file in (tmp_path / "alone").iterdir()] == ["lock"]  # and nothing is trained
    assert (tmp_path / "runs" / "music" / "promote" / "decision.json").is_file()


def names_of_versions(folder: Path) -> set[str]:
    from mlflow import MlflowClient

    return {version.name for version in MlflowClient(f"sqlite:///{folder}/mlflow.db").search_model_versions()}
