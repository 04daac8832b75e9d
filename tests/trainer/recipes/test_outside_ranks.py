"""Other software's scores beside models and baselines: against ranx on the same file, and what is refused or noted."""

import json

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from etl.settings import ConfigError
from tests.fixtures.folders import write_model
from tests.fixtures.lake_rows import literal, rows_of
from trainer.config import EvaluateConfig
from trainer.recipes import evaluate

QUIET = {"runtime": {"progress": False}, "tracking": {"enabled": False}}


@pytest.fixture(scope="module")
def raw(tiny_lake):
    """Raw ids of users and items, by index."""
    return {name: {row["index"]: row[name[:-1]] for row in rows_of(tiny_lake, name)} for name in ("users", "items")}


@pytest.fixture(scope="module")
def target(tiny_lake, raw):
    """Raw ids of the target's kept items."""
    kept = {row["index"] for row in rows_of(tiny_lake, "items") if row["kept"]}
    return sorted(
        raw["items"][row["index"]] for row in rows_of(tiny_lake, "domains", domain="target") if row["index"] in kept
    )


@pytest.fixture(scope="module")
def asked(tiny_lake, raw):
    """User -> (items in the input, held-out items), raw ids."""
    return {
        raw["users"][user]: tuple([raw["items"][item] for item in part] for part in parts[:2])
        for user, parts in literal(tiny_lake, "last-5", "target", "test").items()
    }


def some_scores(asked, target, *, seed=0, most=None):
    """Of each user a list of distinct scores, best first where `most` cuts it; with items of the input."""
    draw = np.random.default_rng(seed)
    rows = []
    for user in asked:
        order = draw.permutation(target)[:most]
        rows += [{"user": user, "item": item, "score": float(len(order) - place)} for place, item in enumerate(order)]
    return pl.DataFrame(rows)


def config(tiny_lake, folder, *files, **more):
    given = {"lake": tiny_lake, "split": "last-5", "domain": "target", "output": str(folder), **QUIET}
    given["evaluation"] = {"protocols": ["full"]} | more.pop("evaluation", {})
    return EvaluateConfig.model_validate(given | {"ranks": [str(file) for file in files]} | more)


def written(frame, place):
    frame.write_parquet(place)
    return place


@pytest.mark.parametrize("most", [None, 6])
def test_ranks_of_a_file_agree_with_ranx(tiny_lake, tmp_path, asked, target, most):
    """Without a model of ours; of lists of six items of sixteen, too; and with scores of what the user has had."""
    ranx = pytest.importorskip("ranx")
    frame = some_scores(asked, target, most=most)
    report = evaluate.run(config(tiny_lake, tmp_path, written(frame, tmp_path / "theirs.parquet")))
    own = pl.read_parquet(report.folder / evaluate.USERS).filter(pl.col("label") == "theirs")
    own = {row["user"]: row for row in own.filter(pl.col("convention") == "single").to_dicts()}
    assert own.keys() == asked.keys()
    for user, (seen, held_out) in asked.items():
        listed = {
            item: score
            for item, score in frame.filter(pl.col("user") == user).select("item", "score").iter_rows()
            if item not in seen
        }
        theirs = []
        for item in held_out:  # the convention `single`: each held-out item by itself
            run = {one: score for one, score in listed.items() if one == item or one not in held_out}
            if run:
                found = ranx.evaluate(
                    ranx.Qrels({"q": {item: 1}}), ranx.Run({"q": run}), ["ndcg@10", "hit_rate@10", "mrr"]
                )
                theirs.append([float(found[name]) for name in ("ndcg@10", "hit_rate@10", "mrr")])
            else:
                theirs.append([0.0, 0.0, 0.0])
        expected = np.mean(theirs, axis=0)
        assert [own[user][name] for name in ("NDCG@10", "Recall@10", "MRR")] == pytest.approx(expected.tolist())
    summary = json.loads((report.folder / evaluate.SUMMARY).read_text())
    assert summary["contenders"][0]["label"] == "theirs"
    if most is not None:
        assert "fewer than 10 candidates" in report.text
        assert sum(own[user]["MRR"] == 0 for user in own) > 0


def test_the_export_of_each_user_is_a_contract(tiny_lake, tmp_path, asked, target):
    """Its columns, their types and order are documented in trainer/evaluation/README.md. Means over users are those of
    the summary."""
    place = written(some_scores(asked, target), tmp_path / "theirs.parquet")
    report = evaluate.run(config(tiny_lake, tmp_path, place, evaluation={"protocols": ["full", "uniform-100"]}))
    metrics = ["NDCG@1", "Recall@1", "NDCG@5", "Recall@5", "NDCG@10", "Recall@10", "MRR"]
    assert [(field.name, str(field.type)) for field in pq.read_schema(report.folder / evaluate.USERS)] == [
        ("label", "string"),
        ("seed", "int64"),
        ("protocol", "string"),
        ("convention", "string"),
        ("user", "string"),
        ("training_items", "int64"),
        *((name, "double") for name in metrics),
    ]
    users = pl.read_parquet(report.folder / evaluate.USERS)
    assert not users.select("label", "seed", "protocol", "convention", "user").is_duplicated().any()
    assert users.group_by("label", "protocol", "convention").len()["len"].unique().to_list() == [len(asked)]
    assert set(users["user"]) == asked.keys()
    lengths = {user: len(parts[0]) for user, parts in asked.items()}  # with the validation items
    assert all(row["training_items"] == lengths[row["user"]] - 2 for row in users.to_dicts())
    summary = json.loads((report.folder / evaluate.SUMMARY).read_text())
    for one in summary["contenders"]:
        for protocol, means in one["means"].items():
            own = users.filter((pl.col("label") == one["label"]) & (pl.col("protocol") == protocol))
            for convention, prefix in (("list", ""), ("single", "single/")):
                found = own.filter(pl.col("convention") == convention).select(pl.col(metrics).mean()).to_dicts()[0]
                assert found == pytest.approx({name: means[prefix + name] for name in metrics})


def test_ties_count_against_the_held_out_item(tiny_lake, tmp_path, asked, target):
    frame = some_scores(asked, target).with_columns(score=pl.lit(1))
    report = evaluate.run(config(tiny_lake, tmp_path, written(frame, tmp_path / "tied.parquet"), metrics=["MRR"]))
    own = pl.read_parquet(report.folder / evaluate.USERS)
    own = own.filter((pl.col("label") == "tied") & (pl.col("convention") == "single"))
    for row in own.to_dicts():
        seen, held_out = asked[row["user"]]
        rank = len(target) - len(seen) - len(held_out) + 1
        assert row["MRR"] == pytest.approx(1 / rank)


def test_a_file_of_labels_and_seeds_stands_beside_models(tiny_lake, tmp_path, asked, target):
    """Gains over ours are tested; protocols that its lists don't suffice for are left out, by name."""
    model = write_model(tmp_path / "none", tiny_lake, seed=1, transfer="none")
    frames = [
        some_scores(asked, target, seed=seed, most=12).with_columns(label=pl.lit("theirs"), seed=pl.lit(seed))
        for seed in (1, 2)
    ]
    place = written(pl.concat(frames), tmp_path / "theirs.parquet")
    given = config(
        tiny_lake,
        tmp_path,
        place,
        models=[{"model": model}],
        evaluation={"protocols": ["full", "uniform-100"]},
        split=None,
        domain=None,
        lake=None,
    )
    report = evaluate.run(given)
    row = next(row for row in report.rows if row["label"] == "theirs")
    assert (row["num_seeds"], row["is_model"]) == (2, True)
    assert row["p_value"] is not None
    assert {row["protocol"] for row in report.rows} == {"full"}
    assert "uniform-100 is left out" in report.text
    assert "its file doesn't say" in report.text
    assert evaluate.run(given).skipped
    place.write_bytes(written(frames[0], tmp_path / "other.parquet").read_bytes())
    assert not evaluate.run(given).skipped
    whole = written(some_scores(asked, target), tmp_path / "whole.parquet")
    report = evaluate.run(
        config(tiny_lake, tmp_path / "whole", whole, evaluation={"protocols": ["full", "uniform-100"]})
    )
    assert {row["protocol"] for row in report.rows} == {"full", "uniform-100"}


def test_what_is_passed_over_is_noted(tiny_lake, tmp_path, asked, target, raw):
    users = list(asked)
    frame = some_scores(asked, target).filter(~pl.col("user").is_in(users[:2]))
    elsewhere = next(row for row in rows_of(tiny_lake, "domains", domain="source"))
    others = [user for user in raw["users"].values() if user not in asked]
    more = pl.DataFrame(
        [
            {"user": users[3], "item": raw["items"][elsewhere["index"]], "score": 99.0},
            {"user": others[0], "item": target[0], "score": 1.0},
        ]
    )
    report = evaluate.run(config(tiny_lake, tmp_path, written(pl.concat([frame, more]), tmp_path / "x.parquet")))
    assert (
        f"x: 2 of {len(asked)} evaluated users have no score (e.g. '{min(users[:2])}', '{max(users[:2])}')"
        in report.text
    )
    assert "x: passed over: 1 users who hold nothing out here" in report.text
    assert "x: passed over: 1 scores of items that are no candidates in domain target" in report.text
    seen = sum(len(parts[0]) for user, parts in asked.items() if user not in users[:2])
    assert f"x: passed over: {seen} scores of items in their users' input" in report.text
    assert "fewer than 10 candidates" not in report.text  # more there aren't
    own = pl.read_parquet(report.folder / evaluate.USERS)
    own = own.filter((pl.col("label") == "x") & pl.col("user").is_in(users[:2]))
    assert own["NDCG@10"].to_list() == [0] * 4
    assert own["MRR"].to_list() == [0] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.drop("score"), "expected the columns user, item and score in .* add score"),
        (lambda frame: frame.clear(), "found no row"),
        (lambda frame: frame.with_columns(score=pl.lit(float("nan"))), "expected finite scores .* nan of user"),
        (lambda frame: frame.with_columns(score=pl.lit(float("inf"))), "expected finite scores .* inf of user"),
        (lambda frame: frame.with_columns(score=pl.lit(None, pl.Float64)), "expected a score in each row"),
        (lambda frame: frame.with_columns(score=pl.lit("high")), "expected score as numbers"),
        (lambda frame: frame.with_columns(user=pl.lit(0.5)), "expected user as raw ids"),
        (lambda frame: pl.concat([frame, frame[:3]]), "found several of 3 pairs, e.g. user"),
        (lambda frame: frame.with_columns(user=pl.col("user") + "?"), "expected users of the log .* e.g. '"),
        (lambda frame: frame.unique("user").with_columns(item=pl.lit(7)), "expected items of the log .* e.g. '7'"),
    ],
)
def test_files_that_say_nothing_are_refused(tiny_lake, tmp_path, asked, target, change, message):
    place = written(change(some_scores(asked, target, most=3)), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=message):
        evaluate.run(config(tiny_lake, tmp_path, place))
    assert not list(tmp_path.glob("*/evaluation/*"))


def test_without_a_model_lake_split_and_domain_are_named(tiny_lake, tmp_path, asked, target):
    place = written(some_scores(asked, target), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match="found no split, no domain; give --split … --domain …"):
        evaluate.run(config(tiny_lake, tmp_path, place, split=None, domain=None))
    with pytest.raises(ConfigError, match=r"found none at .*y\.parquet"):
        evaluate.run(config(tiny_lake, tmp_path, tmp_path / "y.parquet"))
    (tmp_path / "z.parquet").write_text("no table")
    with pytest.raises(ConfigError, match="can't be read as Parquet"):
        evaluate.run(config(tiny_lake, tmp_path, tmp_path / "z.parquet"))
    assert EvaluateConfig(ranks="one.parquet").ranks == ("one.parquet",)
