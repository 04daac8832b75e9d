"""Training on all but what is tested (n−1): no validation part, a fixed number of epochs."""

import json

import polars as pl
import pytest

from tests.fixtures.orders import add_splits
from tests.fixtures.trainings import tiny
from trainer.config import PretrainConfig, SearchConfig
from trainer.inference.model_folder import load_model
from trainer.recipes import pretrain, search
from trainer.recipes.trials import SearchError


@pytest.fixture(scope="module")
def lake(tiny_lake, tmp_path_factory):
    return add_splits(tiny_lake, tmp_path_factory.mktemp("orders") / "lake")


def trained(lake, folder, split, **more):
    train = {"epochs": 4, "min_epochs": 1, "patience": 1} | more
    config = tiny(PretrainConfig, folder, lake, name=split, data={"split": split, "domain": "target"}, train=train)
    return pretrain.run(config)


def test_all_epochs_are_trained_on_all_but_the_last_item(lake, tmp_path, capsys):
    result = trained(lake, tmp_path, "loo-all", learning_rate=0.5)  # it would stop, had it anything to go by
    history = json.loads((result.folder / "history.json").read_text())
    assert [line["epoch"] for line in history] == [1, 2, 3, 4]
    assert all(line["metrics"] == {} for line in history)
    assert (result.metrics["epochs"], result.metrics["best_epoch"]) == (4, 4)
    assert not [name for name in result.metrics if name.startswith("validation/")]
    printed = capsys.readouterr().out
    assert "split loo-all has no validation part: all 4 epochs are trained" in printed
    assert "loo-all: 4 epochs, " in printed
    rows = pl.read_delta(f"{lake}/sequences").filter((pl.col("split") == "loo-all") & (pl.col("domain") == "target"))
    lengths = rows["items"].list.len()
    assert load_model(result.folder / "model").popularity.sum() == (lengths - (lengths > 1)).sum()


def test_a_split_with_validation_stops_as_before(lake, tmp_path):
    result = trained(lake, tmp_path, "loo", learning_rate=0.5)
    assert "validation/NDCG@10" in result.metrics


def test_a_search_needs_a_validation_part(lake, tmp_path):
    recipe = tiny(PretrainConfig, tmp_path, lake, data={"split": "loo-all", "domain": "target"})
    given = {"pretrain": recipe, "trials": 1, "output": str(tmp_path / "runs"), "tracking": {"enabled": False}}
    space = {"train.learning_rate": [0.001, 0.003]}
    with pytest.raises(SearchError, match="expected a split with a validation part, by which trials are compared"):
        search.run(SearchConfig.model_validate({"name": "searched", "space": space} | given))
