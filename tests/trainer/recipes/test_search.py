"""Searches on a tiny lake: even arms, honest budgets, trials that fail or are given up, and kills at any moment."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest
import yaml

from etl.settings import ConfigError, GraftrecError, load
from tests.fixtures.places import ROOT
from tests.fixtures.stores import enter_store, runs_of
from trainer import tracking
from trainer.config import FinetuneConfig, PretrainConfig, RangeConfig, SearchConfig
from trainer.inference.model_folder import load_model
from trainer.recipes import search, trials
from trainer.recipes.finetune import run as finetune
from trainer.recipes.pretrain import run as pretrain
from trainer.recipes.trials import SearchError

RECIPE = {
    "model": {"width": 8, "blocks": 1, "max_length": 16, "user_width": 4, "knowledge_width": 4},
    "train": {"batch_size": 16, "epochs": 4, "warmup_steps": 0, "checkpoint_seconds": 600, "min_epochs": 4},
    "runtime": {"progress": False, "device": "cpu", "precision": "fp32", "threads": 1},
}
SPACE = {
    "train.learning_rate": {"low": 1e-5, "high": 1e-1, "log": True},
    "train.batch_size": [8, 16, 32],
    "model.dropout": {"low": 0.0, "high": 0.5},
}


def search_file(folder, lake, *, recipe="finetune", **settings):
    """A YAML (JSON is YAML) of a tiny search in `folder`."""
    domain = "target" if recipe == "finetune" else "source"
    base = {**RECIPE, "data": {"lake": str(lake), "domain": domain}} | settings.pop("base", {})
    if recipe == "finetune":
        base = {"transfer": "none"} | base
    whole = {
        "name": "tiny",
        "output": str(folder / "runs"),
        recipe: base,
        "space": SPACE,
        "trials": 6,
        "random_trials": 3,
        "pruner": {"full_trials": 2, "warmup_epochs": 2},
        "tracking": {"enabled": False},
    } | settings
    path = Path(folder) / "search.yaml"
    path.write_text(json.dumps(whole))
    return path


def tiny(folder, lake, **settings):
    return load(SearchConfig, search_file(folder, lake, **settings))


def rows_of(folder, arm="none", name="tiny"):
    return json.loads((Path(folder) / "runs" / name / arm / "trials.json").read_text())


def untimed(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def whole(tiny_lake, tmp_path_factory):
    """The folder of a search that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    search.run(tiny(folder, tiny_lake))
    return folder


@pytest.fixture(scope="module")
def parent(tiny_lake, tmp_path_factory):
    """A pre-trained model."""
    folder = tmp_path_factory.mktemp("parent")
    settings = {**RECIPE, "data": {"lake": tiny_lake, "domain": "source"}, "output": str(folder)}
    return str(pretrain(PretrainConfig.model_validate(settings | {"tracking": {"enabled": False}})).model)


def test_first_trial_is_the_recipe_and_all_are_in_the_space(whole):
    rows = rows_of(whole)
    assert len(rows) == 6
    assert rows[0]["values"] == {"train.learning_rate": 1e-3, "train.batch_size": 16, "model.dropout": 0.1}
    for values in (row["values"] for row in rows):
        assert 1e-5 <= values["train.learning_rate"] <= 1e-1
        assert values["train.batch_size"] in (8, 16, 32)
        assert 0 <= values["model.dropout"] <= 0.5
    assert len({json.dumps(row["values"]) for row in rows}) == 6


def test_a_trial_is_given_up_exactly_where_it_is_below_the_median(whole):
    rows = rows_of(whole)
    assert {row["outcome"] for row in rows} == {"done", "pruned"}, "nothing was pruned: the test shows nothing"
    for number, row in enumerate(rows):
        before = [other["scores"] for other in rows[:number] if other["outcome"] == "done"]
        told = row["scores"]
        below = [
            epoch
            for epoch in range(2, 4)  # of four: none before the second, and the last ends it anyhow
            if len(before) >= 2 and max(told[:epoch]) < median(max(scores[:epoch]) for scores in before)
        ]
        assert len(told) == (below[0] if below else 4)
        assert row["outcome"] == ("pruned" if below else "done")
        assert ("pruned after epoch" in row["reason"]) == bool(below)


def test_winner_is_a_configuration_that_gives_the_winning_score(whole, tiny_lake, tmp_path):
    rows = rows_of(whole)
    best = max((row for row in rows if row["outcome"] == "done"), key=lambda row: row["score"])
    file = whole / "runs" / "tiny" / "none" / "best.yaml"
    settings = load(FinetuneConfig, file)
    assert settings.train.learning_rate == best["values"]["train.learning_rate"]
    assert settings.data.release is None, "a release is pinned by a run, not by its configuration"
    again = finetune(settings.model_copy(update={"output": str(tmp_path)}))
    assert again.metrics["validation/NDCG@10"] == best["score"]
    kept = list((whole / "runs" / "tiny" / "trials").glob("*/model"))
    assert [folder.parent.name for folder in kept] == [f"none-{best['trial'] - 1:04}"]
    assert load_model(kept[0]).metrics["validation/NDCG@10"] == best["score"]


def test_winner_can_stand_where_a_section_is_named(whole, tmp_path):
    file = whole / "runs" / "tiny" / "none" / "best.yaml"
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"finetune": str(file), "space": SPACE}))
    named = load(SearchConfig, tmp_path / "other.yaml", ["--finetune.train.epochs", "9"])
    assert named.finetune == load(FinetuneConfig, file, ["--train.epochs", "9"])
    with pytest.raises(ConfigError, match="no configuration"):
        load(SearchConfig, tmp_path / "other.yaml", ["--finetune", str(tmp_path / "none.yaml")])


class Interrupted(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


LATER = [pytest.mark.slow]
MOMENTS = {  # the method that the search dies in, before or after it has done its work
    "before it is proposed": (trials.optuna.Study, "ask", "before"),
    "when it is proposed": (trials.optuna.Study, "ask", "after"),
    "in the middle of its values": (trials.Trial, "suggest_categorical", "before"),
    "before an epoch is told": (search.Judge, "__call__", "before"),
    "after an epoch is told": (search.Judge, "__call__", "after"),
    "before the end is noted": (trials.Arm, "end", "before"),
    "before the end is told": (trials.optuna.Study, "tell", "before"),
    "before leftovers are removed": (trials.Arm, "tidy", "before"),
}


@pytest.mark.parametrize(
    "moment",
    [pytest.param(name, marks=[] if name == "before an epoch is told" else LATER) for name in MOMENTS],
)
def test_an_interrupted_search_ends_as_if_nothing_had_been(moment, whole, tiny_lake, tmp_path, monkeypatch):
    owner, name, when = MOMENTS[moment]
    method, calls = getattr(owner, name), []

    def dying(*arguments, **settings):
        calls.append(1)
        if len(calls) % 5 == 4 and when == "before":
            raise Interrupted
        result = method(*arguments, **settings)
        if len(calls) % 5 == 4:
            raise Interrupted
        return result

    monkeypatch.setattr(owner, name, dying)
    config = tiny(tmp_path, tiny_lake)
    deaths = 0
    while True:
        try:
            search.run(config)
            break
        except Interrupted:
            deaths += 1
            assert deaths < 30
    assert deaths
    assert untimed(rows_of(tmp_path)) == untimed(rows_of(whole))
    left, expected = (
        sorted(path.relative_to(folder) for path in (folder / "runs" / "tiny" / "trials").rglob("*") if path.is_dir())
        for folder in (tmp_path, whole)
    )
    assert left == expected


@pytest.mark.slow
def test_a_search_killed_again_and_again_ends_as_if_nothing_had_been(whole, tiny_lake, tmp_path):
    path = search_file(tmp_path, tiny_lake, base={"train": RECIPE["train"] | {"checkpoint_seconds": 0}})
    command = [sys.executable, "-u", "-m", "trainer", "search", "--config", str(path)]
    ends = []
    for signal_number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGTERM, 0):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        seen = 0
        for line in process.stdout:
            seen += line.startswith("epoch")
            if signal_number and seen == 2:
                time.sleep(0.01 * len(ends))
                process.send_signal(signal_number)
                break
        output, _ = process.communicate(timeout=120)
        ends.append(process.returncode)
    assert ends[-1] == 0, output
    assert set(ends[:-1]) <= {-signal.SIGKILL, -signal.SIGTERM, 143}, ends  # SIGTERM in a trial is answered by it
    assert untimed(rows_of(tmp_path)) == untimed(rows_of(whole))


def test_arms_are_even(tiny_lake, parent, tmp_path, monkeypatch):
    order = []
    proposed = search._next
    monkeypatch.setattr(search, "_next", lambda config, arm: (order.append(arm.name), proposed(config, arm))[1])
    arms = ["none", "shallow", "deep"]
    config = tiny(tmp_path, tiny_lake, transfers=arms, base={"parent": parent}, trials=2, random_trials=2)
    winners = search.run(config)
    assert order == arms * 2
    values = [[row["values"] for row in rows_of(tmp_path, arm)] for arm in arms]
    assert values[0] == values[1] == values[2], "random trials differ between arms"
    scores = [[row["score"] for row in rows_of(tmp_path, arm)] for arm in arms]
    assert len({tuple(told) for told in scores}) == 3, "the arms trained the same thing"
    for winner in winners:
        assert load(FinetuneConfig, winner.file).transfer == winner.arm
        assert load_model(winner.model).parent == (None if winner.arm == "none" else load_model(parent).hash)


def test_a_failed_trial_is_one_line_and_the_others_go_on(tiny_lake, tmp_path, capsys):
    space = {"train.learning_rate": [1e-3, 1e30], "model.width": [8, 10], "train.clip_norm": {"low": 1, "high": 9}}
    search.run(tiny(tmp_path, tiny_lake, space=space, trials=8, random_trials=8, pruner={"kind": "none"}))
    rows = rows_of(tmp_path)
    for row in rows:
        fails = row["values"]["train.learning_rate"] == 1e30 or row["values"]["model.width"] == 10
        assert row["outcome"] == ("failed" if fails else "done")
        assert "\n" not in row["reason"]
        assert bool(row["reason"]) == fails
    reasons = " ".join(row["reason"] for row in rows)
    assert "lower train.learning_rate" in reasons
    assert "expected a width that 4 divides (2 heads), found 10" in reasons
    failed = [row for row in rows if row["outcome"] == "failed"]
    assert len([line for line in capsys.readouterr().out.splitlines() if " failed: " in line]) == len(failed)


def test_a_search_without_a_model_says_why(tiny_lake, tmp_path):
    space = {"train.learning_rate": [1e29, 1e30]}
    with pytest.raises(SearchError, match=r"none: none of 2 trials gave a model; the first: loss"):
        search.run(tiny(tmp_path, tiny_lake, space=space, trials=2))


def test_equal_values_are_not_trained_twice(tiny_lake, tmp_path, monkeypatch):
    trained = []
    train = search._train
    monkeypatch.setattr(search, "_train", lambda *arguments: (trained.append(1), train(*arguments))[1])
    search.run(tiny(tmp_path, tiny_lake, space={"model.dropout": [0.1, 0.2]}, trials=5))
    rows = rows_of(tmp_path)
    assert len(rows) == 5
    assert len(trained) == len({row["values"]["model.dropout"] for row in rows})
    scores = {(row["values"]["model.dropout"], row["score"]) for row in rows}
    assert len(scores) == len(trained)


def test_a_larger_budget_goes_on_where_the_smaller_ended(whole, tiny_lake, tmp_path, capsys):
    search.run(tiny(tmp_path, tiny_lake, trials=2))
    search.run(tiny(tmp_path, tiny_lake, trials=4))
    assert untimed(rows_of(tmp_path)) == untimed(rows_of(whole))[:4]
    capsys.readouterr()
    search.run(tiny(tmp_path, tiny_lake, trials=4))
    assert "unchanged" in (said := capsys.readouterr().out)
    assert "epoch" not in said.replace("epochs", "")


def test_seconds_are_a_budget_too(tiny_lake, tmp_path):
    search.run(tiny(tmp_path, tiny_lake, trials=None, seconds=1e-6))
    assert len(rows_of(tmp_path)) == 1
    spent = rows_of(tmp_path)[0]["seconds"]
    search.run(tiny(tmp_path, tiny_lake, trials=None, seconds=3 * spent))
    seconds = [row["seconds"] for row in rows_of(tmp_path)]
    assert sum(seconds) >= 3 * spent > sum(seconds[:-1])


def test_seconds_end_where_there_is_nothing_new_to_try(tiny_lake, tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "IDLE_TRIALS", 4)
    search.run(tiny(tmp_path, tiny_lake, space={"model.dropout": [0.1, 0.2]}, trials=None, seconds=600))
    rows = rows_of(tmp_path)
    assert len([row for row in rows if row["epochs"]]) == 2
    assert not any(row["seconds"] for row in rows[-4:])


@pytest.mark.slow
def test_hyperband_gives_trials_up_at_its_rungs(tiny_lake, tmp_path):
    """Of 16 trials 3 to 6 were given up, at 5 seeds in fp32 and bf16; of the first 8 at times none."""
    pruner = {"kind": "hyperband", "warmup_epochs": 1, "reduction": 2}
    search.run(tiny(tmp_path, tiny_lake, pruner=pruner, trials=16))
    lengths = [len(row["scores"]) for row in rows_of(tmp_path) if row["outcome"] == "pruned"]
    assert lengths
    assert all(length < 4 for length in lengths)


def test_sections_and_what_is_in_them_can_be_searched(tiny_lake, tmp_path):
    files = {kind: tmp_path / f"{kind}.yaml" for kind in ("masked_item", "next_item")}
    for kind, file in files.items():
        file.write_text(f"kind: {kind}\n")
    space = {"task": [str(file) for file in files.values()], "task.loss.kind": ["full", "sampled"]}
    none = {"kind": "none"}  # whether one is given up depends on the batches that the lake's files make
    search.run(tiny(tmp_path, tiny_lake, recipe="pretrain", space=space, trials=4, random_trials=4, pruner=none))
    rows = rows_of(tmp_path, "pretrain")
    assert {row["outcome"] for row in rows} == {"done"}
    best = max(rows, key=lambda row: row["score"])["values"]
    won = load(PretrainConfig, tmp_path / "runs" / "tiny" / "pretrain" / "best.yaml").task
    assert (str(files[won.kind]), won.loss.kind) == (best["task"], best["task.loss.kind"])


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf" / "search").glob("*.yaml")))
def test_shipped_searches_name_settings_that_are_there_and_fit(name):
    config = load(SearchConfig, f"search/{name}")
    recipe = "pretrain" if config.finetune is None else "finetune"
    for arm, base in trials.recipes(config):
        for key, admitted in config.space.items():
            trials._check(key, base, config.space)
            ends = [admitted.low, admitted.high] if isinstance(admitted, RangeConfig) else admitted
            assert trials._admits(admitted, trials._at(base, key)), f"{arm}: the recipe's own {key} is not in the space"
            for value in ends:
                load(SearchConfig, f"search/{name}", [f"{recipe}.{key}={value}"])


# --- mistakes ---------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"space": {"train.lr": [1, 2]}}, "space: no setting train.lr; there are in train: batch_size"),
        ({"space": {"trane.lr": [1, 2]}}, "space: no setting trane.lr"),
        ({"transfers": ["deep"]}, "transfer deep needs a pre-trained model; set finetune.parent"),
        ({"transfers": ["deep"], "base": {"parent": "nowhere"}}, "no model in nowhere"),
        ({"base": {"data": {"lake": "nowhere"}}}, "nowhere"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_any_training(change, said, tiny_lake, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "_train", lambda *arguments: pytest.fail("it trained"))
    with pytest.raises(GraftrecError) as error:
        search.run(tiny(tmp_path, tiny_lake, **change))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"space": {}}, "at least one setting"),
        ({"space": {"train.batch_size": []}}, "train.batch_size: expected values to choose from"),
        ({"space": {"train.learning_rate": {"low": 2, "high": 1}}}, "expected low < high, found 2 and 1"),
        ({"space": {"model.dropout": {"low": 0, "high": 1, "log": True}}}, "expected low > 0"),
        ({"space": {"train.seed": [1, 2]}}, "train.seed can't be searched"),
        ({"space": {"data.split": ["causal", "last-5"]}}, "data.split can't be searched"),
        ({"space": {"data": ["a"]}}, "can't be searched"),
        ({"trials": None}, "expected a budget"),
        ({"transfers": ["none", "none"]}, "each of transfers once"),
        ({"pretrain": {}}, "one of the sections pretrain and finetune"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(change, said, tiny_lake, tmp_path):
    with pytest.raises(ConfigError, match=r"search\.yaml") as error:
        tiny(tmp_path, tiny_lake, **change)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"space": {**SPACE, "train.batch_size": [8, 16]}}, "search"),
        ({"seed": 1}, "search"),
        ({"base": {"train": {**RECIPE["train"], "epochs": 3}}}, "settings"),
    ],
)
def test_trials_of_another_search_are_not_gone_on_with(change, part, tiny_lake, tmp_path):
    search.run(tiny(tmp_path, tiny_lake, trials=1))
    with pytest.raises(SearchError, match=f"holds a search of none with other {part}, whose trials don't compare"):
        search.run(tiny(tmp_path, tiny_lake, trials=2, **change))
    assert len(rows_of(tmp_path)) == 1


def test_two_searches_in_one_folder_and_torchrun_are_refused(tiny_lake, tmp_path, monkeypatch):
    config = tiny(tmp_path, tiny_lake)
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    with tracking.file_lock(folder / "lock"), pytest.raises(SearchError, match="another process is searching"):
        search.run(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SearchError, match="without torchrun"):
        search.run(config)


# --- MLflow ---------------------------------------------


@pytest.mark.slow
def test_trials_are_children_of_one_run_however_often_the_search_stops(tiny_lake, tmp_path, monkeypatch):
    enter_store(tmp_path, monkeypatch)
    on = {"enabled": True, "system_metrics": False}
    space = {"train.learning_rate": [1e-3, 1e-2, 1e30], "model.dropout": {"low": 0.0, "high": 0.5}}
    for count in (2, 6):
        search.run(tiny(tmp_path, tiny_lake, space=space, trials=count, random_trials=6, tracking=on))
    runs = runs_of(tmp_path)
    whole = runs.pop("tiny")
    rows = rows_of(tmp_path)
    assert len(runs) == len(rows)
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {whole.info.run_id}
    for row in rows:
        run = runs[f"none-{row['trial'] - 1:04}"]
        assert run.info.status == ("FAILED" if row["outcome"] == "failed" else "FINISHED")
        assert ("pruned after epoch" in run.data.tags.get("graftrec.ended", "")) == (row["outcome"] == "pruned")
    assert whole.info.status == "FINISHED"
    done = [row for row in rows if row["outcome"] == "done"]
    assert whole.data.metrics["none/done"] == len(done)
    assert whole.data.metrics["none/NDCG_10"] == max(row["score"] for row in done)
    client = tracking.connect(f"sqlite:///{tmp_path}/mlflow.db")
    assert {file.path for file in client.list_artifacts(whole.info.run_id, "none")} == {
        "none/best.yaml",
        "none/trials.json",
    }
    assert {file.path for file in client.list_artifacts(whole.info.run_id, "pictures")} == {"pictures/search.png"}
    assert not any(client.list_artifacts(run.info.run_id, "model") for run in runs.values())
