"""A log split by time, with items that are taken again: from its files to evaluations, beside counts by Polars."""

import datetime as dt
import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import polars as pl
import pytest
import torch
import yaml

from etl.__main__ import main as etl
from etl.pipeline.report import make_report
from etl.settings import load
from tests.fixtures.folders import write_model
from tests.fixtures.places import ROOT
from trainer.__main__ import main as trainer
from trainer.config import EvaluateConfig, PretrainConfig, PromoteConfig
from trainer.data.catalogue import read_catalogue
from trainer.data.held_out import ReadOptions, read_held_out, without_repeats
from trainer.data.release import pin
from trainer.evaluation.gate import GateError
from trainer.evaluation.item_ranking import ranks
from trainer.evaluation.scorers import EvaluateError, model_scorer, read_evaluation_set
from trainer.inference.model_folder import load_model
from trainer.inference.scorer import Scores
from trainer.recipes.evaluate import run as evaluate
from trainer.recipes.pretrain import run as pretrain
from trainer.registry.gate_evidence import VERSION, GateEvidence

DATA = ROOT.parent / "shared" / "data"
START = dt.datetime(2024, 1, 1)
DATES = {"train_until": "2024-03-01", "validate_until": "2024-03-15", "test_until": "2024-04-01"}
BEFORE = {"train_until": "2024-02-01", "validate_until": "2024-02-15", "test_until": "2024-03-01"}
PARTS = {"train": "train_until", "validation": "validate_until", "test": "test_until"}
JOINT = {"name": "joint", "joint_target": "free", **BEFORE}
LOOPS = 20  # users who take two items in turn, over and over


def _log():
    """Users who join over ninety days, items that come out over 112; some events stand exactly at a date."""
    draw = np.random.default_rng(7)
    rows = []
    for user in range(50):
        joined = draw.integers(0, 90)
        for _ in range(draw.integers(4, 25)):
            day = min(joined + draw.exponential(15), 120)
            day = round(day) if draw.random() < 0.3 else day
            item = draw.choice([item for item in range(30) if item < 15 or day >= 8 * (item - 15)])
            rows.append((f"u{user}", f"i{item}", START + dt.timedelta(seconds=int(day * 86_400))))
    for user in range(LOOPS):
        rows += [(f"u{user}", f"l{(user + n % 2) % 4}", START + dt.timedelta(days=n, hours=user)) for n in range(12)]
    frame = pl.DataFrame(rows, schema=["user", "item", "time"], orient="row")
    return frame.unique(maintain_order=True).with_columns(domain=pl.col("item").str.head(1))


LOG = _log()


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dated")
    LOG.select("user", "item", pl.col("time").dt.strftime("%Y-%m-%d %H:%M:%S")).write_csv(folder / "events.csv")
    kind = "kind " + (pl.col("item").str.tail(1).cast(int) % 3).cast(str) + "|" + pl.col("domain")
    LOG.select("item", kind.alias("kinds")).unique().write_csv(folder / "items.csv")
    settings = {
        "lake": str(folder / "lake"),
        "source": {
            "kind": "log",
            "root": str(folder),
            "events": {
                "path": "events.csv",
                "columns": {"user": "user", "item": "item", "time": "time"},
                "time_format": "%Y-%m-%d %H:%M:%S",
                "timezone": "UTC",
            },
            "items": {"path": "items.csv", "id": "item", "categories": "kinds"},
        },
        "kcore": {"min_user": 1, "min_item": 1},
        "domains": [{"name": "free", "any_of": ["i"]}, {"name": "loop", "any_of": ["l"]}],
        "splits": [{"name": "last-5"}, {"name": "time", **DATES}, {"name": "before", **BEFORE}, JOINT],
        "baskets": {"gap_minutes": 720},
        "spark": {"engine": "sail" if find_spec("pysail") else "spark", "master": "local[2]"},  # the quicker one
    }
    (folder / "etl.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "etl", "all", "--config", str(folder / "etl.yaml")]
    subprocess.run(command, check=True, timeout=500, cwd=ROOT, stdout=subprocess.DEVNULL)
    return settings["lake"]


def _read(lake, table, **partition):
    """Rows of the newest version, with raw ids for indices of users and items."""
    ids = {name: pl.read_delta(f"{lake}/{name}s").select(name, "index") for name in ("user", "item")}
    items = dict(zip(ids["item"]["index"], ids["item"]["item"], strict=True))
    users = dict(zip(ids["user"]["index"], ids["user"]["user"], strict=True))
    rows = pl.read_delta(f"{lake}/{table}").filter(pl.all_horizontal(pl.col(k) == v for k, v in partition.items()))
    return [row | {"user": users[row["user"]], "items": [items[i] for i in row["items"]]} for row in rows.to_dicts()]


def _own(domain):
    return LOG if domain == "all" else LOG.filter(pl.col("domain") == {"free": "i", "loop": "l"}[domain])


def _until(domain, dates, part):
    return _own(domain).filter(pl.col("time") < dt.datetime.fromisoformat(dates[PARTS[part]]))


def _of_users(frame):
    """user -> items in time order; of the same time in the log's."""
    grouped = frame.sort("time", maintain_order=True).group_by("user", maintain_order=True).agg("item")
    return dict(grouped.iter_rows())


@pytest.mark.parametrize(("split", "dates"), [("time", DATES), ("before", BEFORE)])
@pytest.mark.parametrize("domain", ["all", "free", "loop"])
def test_sequences_are_cut_at_the_dates(lake, split, dates, domain):
    whole = _of_users(_own(domain))
    counts = {part: dict(_until(domain, dates, part).group_by("user").len().iter_rows()) for part in PARTS}
    rows = _read(lake, "sequences", split=split, domain=domain)
    assert {row["user"]: row["items"] for row in rows} == whole
    for row in rows:
        found = (row["valid_start"], row["test_start"], row["end"])
        assert found == tuple(counts[part].get(row["user"], 0) for part in PARTS)


@pytest.mark.parametrize("part", ["validation", "test"])
def test_negatives_are_unseen_items_that_the_log_has_by_then(lake, part):
    there, trained = (_until("free", DATES, name) for name in (part, "train"))
    popular = set(trained["item"])
    whole = _of_users(_own("free"))
    rows = _read(lake, "negatives", split="time", domain="free", part=part)
    assert len(set(there["item"]) - popular) > 0, "there is something new"
    assert len(set(_own("free")["item"]) - set(there["item"])) > 0, "and something that isn't there yet"
    for row in rows:
        known = set(there["item"]) if row["protocol"] == "uniform-100" else popular
        assert set(row["items"]) == known - set(whole[row["user"]])  # there are fewer than a hundred
    first, last = ("train", "validation") if part == "validation" else ("validation", "test")
    before = dict(_until("free", DATES, first).group_by("user").len().iter_rows())
    after = dict(_until("free", DATES, last).group_by("user").len().iter_rows())
    assert {row["user"] for row in rows} == {user for user, count in after.items() if count > before.get(user, 0)}


def _expected_ranks(split, dates, part, scores, *, repeats):
    """user -> ranks of its held-out items, each once: among what the log has by then, less what the user has had."""
    first = "train" if part == "validation" else "validation"
    there = set(_until("free", dates, part)["item"])
    given, whole = _of_users(_until("free", dates, first)), _of_users(_until("free", dates, part))
    found = {}
    for user, items in whole.items():
        had = given.get(user, [])
        wanted = list(dict.fromkeys(items[len(had) :]))
        wanted = [item for item in wanted if repeats or item not in had]
        candidates = there if repeats else there - set(had)
        if wanted:
            found[user] = sorted(1 + sum(scores[other] > scores[item] for other in candidates) for item in wanted)
    return found


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("part", ["validation", "test"])
@pytest.mark.parametrize(("split", "dates"), [("time", DATES), ("before", BEFORE)])
def test_ranks_are_those_counted_by_hand(lake, split, dates, part, repeats):
    release = pin(lake, None)
    examples = read_evaluation_set(release, split, "free", part, ReadOptions(repeats=repeats))
    draw = np.random.default_rng(3).permutation(len(examples.catalogue)).astype(np.float32)
    scores = dict(zip(examples.catalogue.raw_ids, draw.tolist(), strict=True))
    expected = _expected_ranks(split, dates, part, scores, repeats=repeats)
    found = ranks(lambda given: Scores.of(torch.from_numpy(draw).expand(len(given), -1)), examples.held_out)["full"]
    by_user = zip(examples.raw_users, found, strict=True)
    assert {user: sorted(row[row != -1].tolist()) for user, row in by_user} == expected


def test_evaluation_names_what_is_new(lake, tmp_path):
    model = write_model(tmp_path / "model", lake, domain="free", split="time")
    quiet = {"tracking": {"enabled": False}, "runtime": {"progress": False}, "output": str(tmp_path)}
    report = evaluate(EvaluateConfig.model_validate({"model": str(model), "name": "seen", **quiet}))
    summary = json.loads((report.folder / "summary.json").read_text())["new"]
    given, trained = (_of_users(_until("free", DATES, part)) for part in ("validation", "train"))
    whole = _of_users(_until("free", DATES, "test"))
    held = {u: set(items[len(given.get(u, [])) :]) - set(given.get(u, [])) for u, items in whole.items()}
    held = {user: items for user, items in held.items() if items}
    known = {item for items in trained.values() for item in items}
    taken = set.union(*held.values())
    new = {user for user in held if user not in trained}
    assert 0 < len(new) < len(held)
    assert summary["new_users"] == len(new)
    assert summary["users"] == len(held)
    assert (summary["held_out_items"], summary["new_items"]) == (len(taken), len(taken - known))
    assert f"new users ({len(new)})" in report.text
    users = pl.read_parquet(report.folder / "users.parquet")
    assert set(users.filter(pl.col("training_items") == 0)["user"]) == new
    popularity = next(one for one in summary["means"] if (one["label"], one["protocol"]) == ("popularity", "full"))
    own = users.filter(label="popularity", protocol="full", convention="list")
    assert popularity["new users"] == pytest.approx(own.filter(pl.col("training_items") == 0)["NDCG@10"].mean())
    assert popularity["known users"] == pytest.approx(own.filter(pl.col("training_items") > 0)["NDCG@10"].mean())


def test_the_gate_is_shown_the_users_of_the_same_days(lake, tmp_path):
    model = load_model(write_model(tmp_path / "model", lake, domain="free", split="time"))
    settings = {"gate": {"must_beat": []}, "runtime": {"progress": False}}
    found = GateEvidence([(VERSION, model)], (), PromoteConfig.model_validate(settings), pin(lake, None))
    given, whole = (_of_users(_until("free", DATES, part)) for part in ("validation", "test"))
    held = [user for user, items in whole.items() if set(items[len(given.get(user, [])) :]) - set(given.get(user, []))]
    assert found.num_users == len(found.evidence(None, PromoteConfig().gate).version_U) == len(held)
    settings |= {"evaluation": {"repeats": True}, "gate": {"protocol": "uniform-100", "must_beat": []}}
    with pytest.raises(GateError, match=r"gate.protocol: expected full .* found 'uniform-100'; set it to full"):
        GateEvidence([(VERSION, model)], (), PromoteConfig.model_validate(settings), pin(lake, None))


def test_training_validates_the_users_who_are_not_new(lake, tmp_path):
    data = {"lake": lake, "domain": "free", "split": "time"}
    trained = pretrain(load(PretrainConfig, _config(tmp_path, lake, data=data)))
    quiet = {"tracking": {"enabled": False}, "runtime": {"progress": False}, "output": str(tmp_path)}
    asked = {"model": str(trained.model), "part": "validation", "evaluation": {"protocols": ["full"]}}
    report = evaluate(EvaluateConfig.model_validate({**asked, **quiet}))
    new = json.loads((report.folder / "summary.json").read_text())["new"]
    assert 0 < new["new_users"] < new["users"]
    own = next(one for one in new["means"] if one["label"] == "pretrain")
    assert trained.metrics["validation/NDCG@10"] == pytest.approx(own["known users"])


def test_a_model_that_was_trained_on_later_days_is_refused(lake, tmp_path):
    release = pin(lake, None)
    names = ("time", "before", "last-5")
    models = {name: load_model(write_model(tmp_path / name, lake, domain="free", split=name)) for name in names}
    early, late = (read_evaluation_set(release, split, "free", "test", ReadOptions()) for split in ("before", "time"))
    for examples, split in ((late, "time"), (late, "before"), (early, "before")):
        model_scorer(models[split], examples)
    for examples, split in ((early, "time"), (early, "last-5"), (late, "last-5")):
        with pytest.raises(EvaluateError, match="has not seen what it is asked"):
            model_scorer(models[split], examples)
    for date, is_refused in (
        (dt.datetime(2024, 2, 1, tzinfo=dt.UTC), True),
        (dt.datetime(2024, 4, 1, tzinfo=dt.UTC), False),
    ):
        moved = replace(late, release=replace(release, number=2, by_time={"time": date}))  # the same name, other dates
        if is_refused:
            with pytest.raises(EvaluateError, match=r"trained until 2024-02-01, .* found .*, trained until 2024-03-01"):
                model_scorer(models["time"], moved)
        else:
            model_scorer(models["time"], moved)


TINY = {
    "model": {"kind": "bert4rec", "blocks": 1, "width": 16, "heads": 2, "max_length": 25, "user_width": 4},
    "task": {"kind": "next_item"},
    "train": {"epochs": 2, "min_epochs": 1, "batch_size": 16},
    "runtime": {"progress": False, "threads": 1},
    "tracking": {"enabled": False},
}


def _config(folder, lake, **more):
    settings = TINY | {"output": str(folder), "data": {"lake": lake, "domain": "loop"}} | more
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(settings))
    return folder / "pretrain.yaml"


WIDE = {"width": 16, "max_length": 25}
TASKS = {
    "masked items": (TINY["model"], {"kind": "masked_item"}),
    "several targets": ({"kind": "caser", "width": 16, "max_length": 25}, {"kind": "next_item", "targets": 2}),
    "one target": ({"kind": "peterrec", "dilations": [1], **WIDE}, {"kind": "target_item"}),
    "baskets": (TINY["model"], {"kind": "next_basket"}),
    "pairs of baskets": (TINY["model"], {"kind": "basket_pair"}),
    "several tasks": ({"kind": "dupn", **WIDE}, {"kind": "multi", "tells": ["next_item", "category"]}),
    "clicks": ({"kind": "peterrec", "dilations": [1], **WIDE}, {"kind": "click", "content": ["categories"]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_every_task_trains_and_is_evaluated_where_most_users_are_new(lake, tmp_path, name):
    """Of 50 users 17 have an event before February: batches have sequences without one, or nothing but those."""
    model, task = TASKS[name]
    data = {"lake": lake, "domain": "free", "split": "before"}
    if name == "one target":
        data |= {"domain": "all", "predicted": "free", "split": "joint"}
    train = {"epochs": 1, "min_epochs": 1, "batch_size": 2}
    trained = pretrain(load(PretrainConfig, _config(tmp_path, lake, data=data, model=model, task=task, train=train)))
    assert all(np.isfinite(value) for metric, value in trained.metrics.items() if metric.startswith("validation/"))
    quiet = {"tracking": {"enabled": False}, "runtime": {"progress": False}, "output": str(tmp_path)}
    report = evaluate(EvaluateConfig.model_validate({"model": str(trained.model), "name": "seen", **quiet}))
    assert np.isfinite([row["mean"] for row in report.rows]).all()


def test_where_all_that_is_held_out_was_had_before_the_setting_is_named(lake, tmp_path, capsys):
    assert trainer(["pretrain", "--config", str(_config(tmp_path, lake))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"none among 40 items of {LOOPS} users, so nothing can be ranked; set evaluation.repeats=true" in line


def test_repeats_are_ranked_where_set_and_beside_what_a_user_had_most_often(lake, tmp_path):
    config = _config(tmp_path, lake, evaluation={"repeats": True})
    trained = pretrain(load(PretrainConfig, config))
    quiet = {"tracking": {"enabled": False}, "runtime": {"progress": False}, "output": str(tmp_path)}
    report = evaluate(EvaluateConfig.model_validate({"model": str(trained.model), "name": "again", **quiet}))
    assert {row["protocol"] for row in report.rows} == {"full"}
    means = {row["label"]: row["mean"] for row in report.rows if row["metric"] == "Recall@10"}
    assert set(means.values()) == {1.0}, "of four items all are among ten"
    best = {row["label"]: row["mean"] for row in report.rows if row["metric"] == "NDCG@10"}
    assert best["personal frequency"] == 1.0, "of two that are had in turn both come next"
    assert best["popularity"] < 1.0


def test_some_repeats_are_left_out_and_counted(lake):
    release = pin(lake, None)
    catalogue = read_catalogue(release, "free")
    held_out = read_held_out(release, "last-5", "free", catalogue, "test")
    new = without_repeats(held_out, where="the log")
    given, again, users = _of_users(_own("free")), 0, []
    for user, items in given.items():
        if len(items) >= 6:
            repeated = [item for item in items[-3:] if item in items[:-3]]
            again += len(repeated)
            users += [user] if len(repeated) < 3 else []
    assert 0 < again == new.num_repeats
    assert len(new) == len(users)


def test_the_report_says_how_many_users_and_items_are_new(lake):
    for split, dates in (("before", BEFORE), ("time", DATES)):
        found = next(one for one in make_report(lake).time_splits if (one.split, one.domain) == (split, "free"))
        train, validation, test = (_until("free", dates, part) for part in PARTS)
        trained, given = set(train["user"]), _of_users(validation)
        tested = {user for user, items in _of_users(test).items() if len(items) > len(given.get(user, []))}
        assert found.trained == len(trained)
        assert (found.tested, found.new_users) == (len(tested), len(tested - trained))
        assert (found.items, found.new_items) == (test["item"].n_unique(), len(set(test["item"]) - set(train["item"])))
        assert f"{len(tested)} tested until {dates['test_until']} ({len(tested - trained)} new)" in found.line()


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "ml-1m").is_dir(), reason="MovieLens-1M is not at ../shared/data/ml-1m")
def test_movielens_by_time_says_how_few_users_it_can_evaluate(tmp_path, spark):
    """Most users of MovieLens-1M live less than a day, so nearly all who do something in a week are new."""
    split = {"name": "time", "train_until": "2000-11-20", "validate_until": "2000-11-27", "test_until": "2000-12-04"}
    roots = {"source.root": DATA / "ml-1m", "knowledge.root": DATA, "lake": tmp_path, "spark.master": "local[2]"}
    given = {**roots, "splits": json.dumps([split])}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    assert etl(["all", "--config", "etl/ml1m", *words]) == 0
    found = next(one for one in make_report(str(tmp_path)).time_splits if one.domain == "all")
    kept = {name: pl.read_delta(str(tmp_path / f"{name}s")).filter("kept")[name] for name in ("user", "item")}
    log = pl.read_delta(str(tmp_path / "interactions")).with_columns(pl.col("time").dt.replace_time_zone(None))
    log = log.filter(pl.col("user").is_in(kept["user"].implode()), pl.col("item").is_in(kept["item"].implode()))
    dates = {name: dt.datetime.fromisoformat(split[name]) for name in PARTS.values()}
    trained = log.filter(pl.col("time") < dates["train_until"])
    tested = log.filter(pl.col("time") >= dates["validate_until"], pl.col("time") < dates["test_until"])
    assert found.trained == trained["user"].n_unique()
    assert found.tested == tested["user"].n_unique()
    assert found.new_users == len(set(tested["user"]) - set(trained["user"]))
    assert found.new_users > found.tested / 2
