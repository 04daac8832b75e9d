"""Protocol cards: what they say, what their hash depends on, and that figures of two cards are not compared."""

import dataclasses
import json

import polars as pl
import pytest

from etl.config import SplitConfig
from etl.settings import replaced
from tests.fixtures.folders import MODEL, write_model
from tests.fixtures.orders import LOO, LOO_ALL, SCRAMBLED, add_splits
from tests.fixtures.trainings import TINY
from trainer.config import EvaluateConfig, PretrainConfig, PromoteConfig
from trainer.data.release import pin
from trainer.evaluation.card import (
    ProtocolCard,
    card_of,
    card_of_model,
    check_cards,
    check_stored,
    differences,
    lines,
    stored,
)
from trainer.evaluation.scorers import EvaluateError
from trainer.recipes import evaluate, promote
from trainer.registry import Registry
from trainer.registry.version import audit_trail

QUIET = {"runtime": {"progress": False}, "tracking": {"enabled": False}}


@pytest.fixture(scope="module")
def lake(tiny_lake, tmp_path_factory):
    return add_splits(tiny_lake, tmp_path_factory.mktemp("orders") / "lake", (LOO, LOO_ALL, SCRAMBLED))


@pytest.fixture(scope="module")
def release(lake):
    return pin(lake, None)


def card(release, split="loo", **more):
    given = {"domain": "target", "part": "test", "table": "sequences", "max_users": None, "repeats": False}
    return card_of(release, split=split, **given | more)


# --- what a card says ---------------------------------------------


def test_a_card_says_in_one_line_what_was_measured(release):
    found = card(release)
    assert found.text() == (
        f"card {found.hash} (full): test: each user's last 1; trained on all but the last 2 (n−2); ties in time: as in "
        "the log's files; all items of domain target, less those in the input; users of 5 events and items of 5 at "
        "least; the request's time is unknown"
    )
    assert "all but the last 1 (n−1)" in card(release, "loo-all").text()
    assert "ties in time: scrambled, seed 2" in card(release, "scrambled").text()
    assert "the 1 before each user's last 1" in card(release, part="validation").text()
    assert "those in the input too" in card(release, repeats=True).text()
    assert "of about 500 users" in card(release, max_users=500).text()
    assert "ranked" not in card(release, repeats=None).text()


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"train_until": "2020-01-01", "test_until": "2020-02-01"}, "by time (train_until 2020-01-01, test_until"),
        ({"random": [0.1, 0.2]}, "a share of each user's items by chance (0.1, 0.2)"),
        ({"user_folds": 5, "fold": 2}, "all items of fold 2 of 5 of the users"),
        ({"cold_users": 0.1, "joint_target": "target"}, "all items of 10 % of the users of target"),
        ({"cold_items": {"share": 0.15}}, "all events of 15 % of the items, and of the others each user's last 3"),
        ({"joint_target": "target"}, "each user's last 3 of domain target; trained on all but the last 5 (n−5)"),
        ({"causal_target": "target"}, "nothing later than the first held-out item of target read"),
    ],
)
def test_every_kind_of_split_has_words(release, rule, words):
    split = SplitConfig(name="one", **rule)
    other = dataclasses.replace(release, etl={**release.etl, "splits": [split.model_dump(mode="json")]})
    assert words in card(other, "one").text()


def test_the_hash_is_of_the_rule_and_not_of_its_name(release):
    renamed = [dict(split, name=f"my-{split['name']}") for split in release.etl["splits"]]
    other = dataclasses.replace(release, etl={**release.etl, "splits": renamed})
    assert card(other, "my-loo") == card(release)
    different = {
        card(release, **more).hash
        for more in (
            {},
            {"split": "loo-all"},
            {"split": "scrambled"},
            {"split": "last-5"},
            {"domain": "all"},
            {"part": "validation"},
            {"max_users": 9},
            {"repeats": True},
            {"repeats": None},
        )
    }
    different.add(card(dataclasses.replace(release, etl={**release.etl, "kcore": {"min_user": 1, "min_item": 1}})).hash)
    different.add(replaced(card(release), request_time="known").hash)
    different.add(replaced(card(release), candidates="uniform-100").hash)
    assert len(different) == 12


def test_a_release_of_before_has_a_card_too(tiny_lake):
    found = card(pin(tiny_lake, None), "last-5")
    assert "what split last-5 holds out" in found.text()
    assert "k-core not recorded" in found.text()
    assert ProtocolCard.model_validate(found.entry()["card"]) == found


# --- figures of two cards ---------------------------------------------


def test_what_differs_is_named(release):
    with pytest.raises(
        EvaluateError,
        match=r"found card \w+ of ours and card \w+ of theirs, which differ in ties file "
        r"and scrambled, seed 2; compare each with figures of its own card$",
    ):
        check_cards([("ours", card(release)), ("theirs", card(release, "scrambled"))])
    assert differences(card(release), card(release, "loo-all"), allowed=["trained_on"]) == [
        'split {"validation": 1, "test": 1} and {"validation": 0, "test": 1}'
    ]


def test_stored_evaluations_of_two_cards_are_not_put_together(release):
    one, other = ({"cards": [card(release, split).entry()]} for split in ("loo", "scrambled"))
    assert stored(one) == [card(release)]
    check_stored({"a": one, "b": one})
    with pytest.raises(EvaluateError, match="ties file and scrambled"):
        check_stored({"a": one, "b": other})
    with pytest.raises(EvaluateError, match="found none in b, which was made before there were any"):
        check_stored({"a": one, "b": {}})
    check_stored({"b": {}})


def evaluated(lake, folder, models, **more):
    given = {"models": [{"model": model} for model in models], "split": "loo", "output": str(folder), **QUIET}
    return evaluate.run(EvaluateConfig.model_validate(given | {"evaluation": {"protocols": ["full"]}} | more))


def test_models_of_n_1_and_n_2_are_compared_where_that_is_asked(lake, tmp_path):
    """Both are evaluated on the same last items, so neither has seen them."""
    models = [
        write_model(tmp_path / name, lake, split=split, transfer=name)
        for name, split in (("none", "loo"), ("deep", "loo-all"))
    ]
    with pytest.raises(EvaluateError, match=r"differ in trained_on all but the last 2 .* set across to \[trained_on\]"):
        evaluated(lake, tmp_path, models)
    assert not list(tmp_path.glob("*/evaluation/*"))
    report = evaluated(lake, tmp_path, models, across=["trained_on"])
    summary = json.loads((report.folder / evaluate.SUMMARY).read_text())
    assert [(entry["card"]["trained_on"][-5:], entry["labels"][:1]) for entry in summary["cards"]] == [
        ("(n−2)", ["none"]),
        ("(n−1)", ["deep"]),
    ]
    assert f"card {summary['cards'][0]['hash']} (full)" in report.text
    assert f"card {summary['cards'][1]['hash']} (full): as {summary['cards'][0]['hash']}, but trained on" in report.text
    assert report.text.rstrip().endswith("; of deep")


@pytest.mark.parametrize(("trained", "asked"), [("scrambled", "loo"), ("loo", "last-5")])
def test_a_model_that_saw_the_held_out_items_in_another_split_is_refused(lake, tmp_path, trained, asked):
    """In another order of ties as many events are trained on, but not the same ones."""
    model = write_model(tmp_path / "leaky", lake, split=trained)
    rows = pl.read_delta(f"{lake}/sequences").filter(pl.col("domain") == "target")
    parts = {
        split: {row["user"]: row for row in rows.filter(pl.col("split") == split).to_dicts()}
        for split in (trained, asked)
    }
    leaked = 0
    for user, row in parts[asked].items():
        if row["test_start"] < row["end"]:
            seen = parts[trained][user]
            leaked += len(set(seen["items"][: seen["valid_start"]]) - set(row["items"][: row["test_start"]]))
    assert leaked > 0
    with pytest.raises(EvaluateError, match=f"found {leaked:,} held-out interactions"):
        evaluated(lake, tmp_path, [model], split=asked)


def test_cards_are_kept_in_summary_run_and_table(lake, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    import mlflow

    report = evaluated(
        lake,
        tmp_path,
        [write_model(tmp_path / "one", lake, split="loo")],
        evaluation={"protocols": ["full"]},
        tracking={"system_metrics": False},
    )
    (entry,) = json.loads((report.folder / evaluate.SUMMARY).read_text())["cards"]
    assert entry["text"] in report.text
    assert entry["text"] in (report.folder / evaluate.TABLE).read_text()
    run = mlflow.get_run(report.run_id)
    assert run.data.tags["graftrec.card"] == entry["hash"]
    assert run.data.params["card.0"] == entry["text"]
    assert f"Under {entry['text']}" in run.data.tags["mlflow.note.content"]


def test_the_gate_keeps_the_card_and_refuses_a_champion_of_another(lake, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    first, second = (
        write_model(tmp_path / name, lake, split="loo", skill=3.0, noise=0.0, seed=seed, model=MODEL | {"time": time})
        for name, seed, time in (("untold", 1, {}), ("told", 2, {"bias": True}))
    )
    gate = {"min_users": 2, "must_beat": [], "min_slice_users": 1_000, "champion_margin": 1.0}

    def config(model, **more):
        given = {"candidate": model, "split": "loo", "gate": gate, "runtime": {"progress": False}}
        return PromoteConfig.model_validate(given | {"tracking": {"system_metrics": False}} | more)

    promoted = promote.run(config(first))
    (entry,) = json.loads((tmp_path / "runs" / "promote" / "decision.json").read_text())["cards"]
    assert "(n−2)" in entry["text"]
    version = Registry("graftrec").version("@champion")
    assert version.tags["graftrec.card"] == entry["hash"]
    assert audit_trail(version)[-1]["cards"] == [{"hash": entry["hash"], "text": entry["text"]}]
    with pytest.raises(EvaluateError, match=r"differ in request_time known and unknown; .* set across"):
        promote.run(config(second))
    assert Registry("graftrec").version("@champion").number == promoted.version.number
    promote.run(config(second, across=["request_time"]))
    assert Registry("graftrec").version("@champion").number != promoted.version.number


@pytest.mark.parametrize(
    ("time", "known"),
    [
        ({}, "unknown"),
        ({"bias": True}, "known"),
        ({"intervals": True}, "known"),
        ({"bias": True, "intervals": True, "request_time": "last_event"}, "unknown"),
    ],
)
def test_a_card_says_whether_a_model_is_told_the_time(release, time, known):
    settings = TINY | {"model": TINY["model"] | {"time": time}, "data": {"domain": "target", "split": "loo"}}
    config = PretrainConfig.model_validate(settings)
    found = card_of_model(card(release), config, release)
    assert found.request_time == known
    assert (found == card(release)) == (known == "unknown")
    assert f"the request's time is {known}" in found.text()


def test_lines_name_only_what_differs(release):
    first, second = (replaced(card(release), candidates=name) for name in ("full", "uniform-100"))
    found = lines([first.entry(["a"]), second.entry(["a"])])
    assert found[0] == first.text()
    assert found[1] == (
        f"card {second.hash} (uniform-100): as {first.hash}, but 100 items drawn uniformly of domain target"
    )
