"""A rolling backtest: its dates, its table, and a whole one beside counts by Polars."""

import datetime as dt
import json
import os

import polars as pl
import pytest

from etl.settings import ConfigError, load
from etl.text_table import aligned
from tests.fixtures.trainings import tiny
from trainer.__main__ import main
from trainer.config import BacktestConfig, PretrainConfig
from trainer.figures import metric_by_date
from trainer.recipes import training_jobs
from trainer.recipes.backtest import MODEL, DateResult, cells, shown_labels
from trainer.tracking import Run


def result(date, means, **counts):
    numbers = {"users": 90, "new_users": 30, "items": 20, "new_items": 5} | counts
    return DateResult(date, "NDCG@10", "full", means=means, baselines=tuple(means)[1:], **numbers)


RESULTS = [
    result("2024-03-01", {MODEL: 0.3, "popularity": 0.1, "item-to-item": 0.2, "transitions": 0.25}, users=1_234),
    result("2024-03-08", {MODEL: 0.1, "popularity": 0.2, "item-to-item": 0.2, "transitions": 0.05}),
]


def test_each_date_trains_before_it_and_tests_after_it():
    given = {"first": "2024-02-20", "num_dates": 3, "every_days": 10, "test_days": 5, "validation_days": 2.5}
    splits = load(BacktestConfig, "backtest/demo", [f"--{name}={value}" for name, value in given.items()]).splits()
    assert list(splits) == ["2024-02-20", "2024-03-01", "2024-03-11"]
    split = splits["2024-03-01"]
    assert split.name == "until-2024-03-01"
    assert (split.train_until, split.validate_until, split.test_until) == (
        "2024-02-27T12:00:00",
        "2024-03-01T00:00:00",
        "2024-03-06T00:00:00",
    )


def test_dates_within_a_day_have_names_of_their_own():
    config = load(BacktestConfig, "backtest/demo", ["--first=2024-02-20T06:00", "--every_days=0.5", "--num_dates=2"])
    assert [split.name for split in config.splits().values()] == [
        "until-2024-02-20T060000",
        "until-2024-02-20T180000",
    ]


def test_a_date_that_is_none_is_refused():
    with pytest.raises(ConfigError, match=r"first: .*expected a date such as 2021-06-01, found 'May'"):
        load(BacktestConfig, "backtest/demo", ["--first=May"])


def test_the_table_shows_model_popularity_and_the_baseline_that_is_best_over_all_dates():
    labels = shown_labels(RESULTS)
    assert labels == [MODEL, "popularity", "item-to-item"]
    header, rows = cells(RESULTS, labels)
    assert header == ["date", "users", "new users", "items", "new items", *labels]
    assert rows == [
        ["2024-03-01", "1,234", "30", "20", "5", "0.3000", "0.1000", "0.2000"],
        ["2024-03-08", "90", "30", "20", "5", "0.1000", "0.2000", "0.2000"],
        ["mean", "", "", "", "", "0.2000", "0.1500", "0.2000"],
        ["deviation", "", "", "", "", "0.1414", "0.0707", "0.0000"],
    ]
    assert aligned([["a", "1"], ["bcd", "23"]]) == ["a     1", "bcd  23"]
    alone = [result("2024-03-01", {MODEL: 0.3})]
    assert shown_labels(alone) == [MODEL], "without baselines"
    assert len(cells(alone, [MODEL])[1]) == 2, "one date has no deviation"


def test_the_picture_has_a_line_for_each_label_over_the_dates():
    figure = metric_by_date({"model": [0.3, 0.1], "popularity": [0.1, 0.2]}, ["a", "b"], metric="NDCG@10")
    axes = figure.axes[0]
    assert [list(line.get_ydata()) for line in axes.lines[:2]] == [[0.3, 0.1], [0.1, 0.2]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]


@pytest.mark.slow
def test_a_training_that_ended_well_and_left_another_model_is_to_be_run_again(tiny_lake, tmp_path, monkeypatch):
    """As where code or tables change between the start of a process and its end. It was exit code 0."""
    monkeypatch.setattr(training_jobs, "_finished", lambda training: None)
    job = training_jobs.TrainingJob("one", "pretrain", tiny(PretrainConfig, tmp_path, tiny_lake))
    training_jobs.run([job], folder=tmp_path, jobs=1, environment=dict(os.environ))
    assert (job.exit_code, job.failure) == (5, training_jobs.CHANGED)


@pytest.mark.slow
def test_a_whole_backtest_counts_users_and_items_as_polars_does(tmp_path, monkeypatch, spark):
    logged = []
    monkeypatch.setattr(Run, "log_metrics", lambda self, metrics, *, step=None: logged.append((step, dict(metrics))))
    settings = {
        "runs": tmp_path / "runs",
        "etl.lake": tmp_path / "lake",
        "etl.source.users": 200,
        "etl.source.items": 120,
        "etl.source.mean_events": 30,
        "etl.spark.master": "local[2]",
        "num_dates": 2,
        "pretrain.train.epochs": 1,
        "pretrain.runtime.threads": 1,
        "tracking.enabled": "false",
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    assert main(["backtest", "--config", "backtest/demo", *words]) == 0
    log = pl.read_delta(str(tmp_path / "lake" / "interactions"))
    log = log.with_columns(pl.col("time").dt.replace_time_zone(None))
    kept = pl.read_delta(str(tmp_path / "lake" / "items")).filter("kept", pl.col("categories").list.contains("source"))
    users = pl.read_delta(str(tmp_path / "lake" / "users")).filter("kept")
    log = log.filter(pl.col("item").is_in(kept["item"]), pl.col("user").is_in(users["user"]))
    found = json.loads((tmp_path / "runs" / "backtest.json").read_text())
    assert [one["date"] for one in found] == ["2021-03-01", "2021-03-31"]
    for one in found:
        date, month = dt.datetime.fromisoformat(one["date"]), dt.timedelta(days=30)
        trained = log.filter(pl.col("time") < date - month)
        tested = log.filter(pl.col("time") >= date, pl.col("time") < date + month)
        new = set(tested["user"]) - set(trained["user"])
        assert (one["users"], one["new_users"]) == (tested["user"].n_unique(), len(new))
        assert (one["items"], one["new_items"]) == (
            tested["item"].n_unique(),
            len(set(tested["item"]) - set(trained["item"])),
        )
    table = (tmp_path / "runs" / "table.txt").read_text()
    assert f"{found[0]['means']['model']:.4f}" in table
    assert (tmp_path / "runs" / "backtest.png").stat().st_size > 10_000
    assert [step for step, metrics in logged if "new_users" in metrics] == [0, 1]
