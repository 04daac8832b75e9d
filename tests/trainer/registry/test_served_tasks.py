"""Models of next baskets, clicks, profiles and several things: served, recommended from, judged by the gate."""

import json
from contextlib import nullcontext

import numpy as np
import polars as pl
import pytest
import torch

from etl.tables import FIRST_INDEX, SEP, UNK
from tests.fixtures.lakes import build_tiny_lake
from tests.fixtures.recommendations import rows_of as recommended
from tests.fixtures.stores import enter_store
from tests.fixtures.trainings import TINY
from trainer.config import EvaluateConfig, EvaluatedModel, FinetuneConfig, PromoteConfig, RecommendConfig
from trainer.data.events import Events
from trainer.evaluation.gate import GateError
from trainer.inference.model_folder import ModelFolderError, load_model
from trainer.inference.recommender import Recommender, Request, RequestError, parse
from trainer.recipes import promote, recommend
from trainer.recipes.evaluate import run as evaluate
from trainer.recipes.finetune import run as finetune
from trainer.registry import CHAMPION, Registry

PETERREC = {"kind": "peterrec", "width": 16, "dilations": [1, 2], "max_length": 24}
TRAIN = {"batch_size": 16, "epochs": 3, "learning_rate": 0.01, "warmup_steps": 0, "min_epochs": 3}
CLICK = {"kind": "click", "content": ["categories", "text"], "layers": [8], "negatives": 2, "impressions": ["look"]}


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    return build_tiny_lake(tmp_path_factory.mktemp("tasks") / "lake", num_users=150, described=True)


@pytest.fixture(scope="module")
def models(lake, tmp_path_factory):
    """Folders by name."""
    folder = tmp_path_factory.mktemp("made")

    def made(name, **more):
        given = {"data": {"lake": str(lake), "domain": "source"}, "model": PETERREC, "train": TRAIN}
        given |= {"name": name, "output": str(folder), "transfer": "none"}
        return str(finetune(FinetuneConfig.model_validate({**TINY, **given, **more})).model)

    basket = {"kind": "next_basket"}
    return {
        "baskets": made("baskets", task=basket),
        "other": made("other", task=basket, train=TRAIN | {"seed": 1}),
        "once": made("once", task=basket, evaluation={"repeats": False}),
        "clicks": made("clicks", task=CLICK),
        "items": made("items", task={"kind": "next_item"}),
    }


def baskets_of(lake):
    """raw user id -> lists of raw item ids."""
    raw = dict(pl.read_delta(f"{lake}/items").select("index", "item").iter_rows())
    users = dict(pl.read_delta(f"{lake}/users").select("index", "user").iter_rows())
    rows = pl.read_delta(f"{lake}/baskets").filter((pl.col("split") == "last-5") & (pl.col("domain") == "source"))
    found = {}
    for row in rows.sort("user", "basket").to_dicts():
        found.setdefault(users[row["user"]], []).append([raw[item] for item in row["items"]])
    return found


def in_rows(trained_model, *lists):
    """One user's history of raw ids; a SEP behind each list."""
    row_of = {raw: row for row, raw in enumerate(trained_model.catalogue.raw_ids)}
    rows = np.array([row for items in lists for row in (*(row_of[item] for item in items), SEP)], dtype=np.int64)
    return Events.of(np.array([UNK]), np.array([0, len(rows)]), rows, np.empty(0, np.int64))


# --- served ---------------------------------------------


@pytest.mark.parametrize("name", ["baskets", "once"])
def test_next_baskets_are_answered_from_baskets(name, models):
    trained_model = load_model(models[name])
    items = list(trained_model.catalogue.raw_ids[FIRST_INDEX : FIRST_INDEX + 5])
    given = [items[:2], items[2:]]
    answer = Recommender(trained_model, "graftrec/1").answer([Request([], baskets=given)], k=1_000)[0]
    scores = trained_model.scorer().score(in_rows(trained_model, *given))[0]
    left_out = [] if name == "baskets" else range(FIRST_INDEX, FIRST_INDEX + 5)
    rows = [row for row in range(FIRST_INDEX, len(trained_model.catalogue)) if row not in left_out]
    rows.sort(key=lambda row: -float(scores[row]))
    assert answer.items == [trained_model.catalogue.raw_ids[row] for row in rows]
    assert answer.scores == pytest.approx([float(scores[row]) for row in rows], abs=1e-6)
    assert (answer.basis, answer.unknown) == ("model", [])


def test_what_is_not_known_of_a_basket_is_passed_over(models):
    trained_model = load_model(models["baskets"])
    items = list(trained_model.catalogue.raw_ids[FIRST_INDEX : FIRST_INDEX + 3])
    examples = [[items[0], "x"], items[1:]], [[items[0]], items[1:]], [], [["x"], []]
    server = Recommender(trained_model, "graftrec/1")
    mixed, known, none, strange = server.answer([Request([], baskets=baskets) for baskets in examples], k=3)
    assert mixed.items == known.items
    assert mixed.scores == pytest.approx(known.scores, abs=1e-6)
    assert (mixed.unknown, strange.unknown) == (["x"], ["x"])
    assert (none.basis, strange.basis) == ("popular", "popular")
    assert none.items == strange.items


def test_a_model_says_what_it_reads(models):
    for name, request, message in [
        ("baskets", Request(["a"]), "record 1: expected `baskets`, which graftrec/1 reads, found `items`"),
        ("items", Request([], baskets=[["a"]]), "record 1: expected `items`, which graftrec/1 reads, found `baskets`"),
    ]:
        fine = Request([]) if name == "items" else Request([], baskets=[])
        with pytest.raises(RequestError, match=message):
            Recommender(load_model(models[name]), "graftrec/1").answer([fine, request])


def test_records_of_baskets_are_parsed():
    nested = np.array([np.array(["1", "2"], dtype=object), np.array([], dtype=object)], dtype=object)
    assert parse([{"baskets": nested, "items": float("nan")}]) == [Request([], baskets=[["1", "2"], []])]
    assert parse([{"baskets": [[1, 2.0]]}]) == [Request([], baskets=[["1", "2"]])]
    for wrong in ("1", ["1"], [["1"], None]):
        with pytest.raises(RequestError, match="`baskets`, in the place of `items`, is a list of lists"):
            parse([{"baskets": wrong}])
    with pytest.raises(RequestError, match="in the place of `items`"):
        parse([{"baskets": [["1"]], "items": ["1"]}])


def test_clicks_are_answered_by_how_likely_each_item_is(models):
    trained_model = load_model(models["clicks"])
    items = list(trained_model.catalogue.raw_ids[FIRST_INDEX : FIRST_INDEX + 4])
    kinds = ["buy", "look", "", "look"]
    server = Recommender(trained_model, "graftrec/1")
    answer, taken = server.answer([Request(items, None, kinds), Request([items[0], items[2]])], k=1_000)
    read = Events.of(np.array([UNK]), np.array([0, 2]), np.array([FIRST_INDEX, FIRST_INDEX + 2]), np.empty(0, np.int64))
    hidden = trained_model.user_scorer().hidden(read)
    rows = torch.arange(FIRST_INDEX, len(trained_model.catalogue))
    with torch.inference_mode():
        logits = trained_model.task.logits(trained_model.model, hidden, rows[None])[0]
    by_raw = {trained_model.catalogue.raw_ids[row]: float(logit) for row, logit in zip(rows, logits, strict=True)}
    assert answer.scores == pytest.approx([by_raw[item] for item in answer.items], abs=1e-6)
    assert answer.scores == sorted(answer.scores, reverse=True)
    assert set(answer.items) == set(by_raw) - set(items), "what was shown is left out as well"
    assert set(taken.items) == set(by_raw) - {items[0], items[2]}
    assert {
        item: s for item, s in zip(taken.items, taken.scores, strict=True) if item in answer.items
    } == pytest.approx(dict(zip(answer.items, answer.scores, strict=True)), abs=1e-6)
    with pytest.raises(ModelFolderError, match="expected a model that ranks items"):
        trained_model.scorer()


def test_popular_is_what_was_taken(lake, models):
    trained_model = load_model(models["clicks"])
    rows = pl.read_delta(f"{lake}/sequences").filter((pl.col("split") == "last-5") & (pl.col("domain") == "source"))
    counts = np.zeros(len(trained_model.catalogue), dtype=np.int64)
    for row in rows.to_dicts():
        kinds = row["event_types"] or [None] * len(row["items"])
        taken = [i for i, kind in list(zip(row["items"], kinds, strict=True))[: row["valid_start"]] if kind != "look"]
        np.add.at(counts, trained_model.catalogue.rows(np.array(taken, dtype=np.int64)), 1)
    assert trained_model.popularity.tolist() == counts.tolist()


# --- recommended, judged ---------------------------------------------


@pytest.mark.parametrize("name", ["baskets", "clicks"])
def test_every_user_gets_what_the_server_answers(name, spark, lake, models, tmp_path, monkeypatch):
    enter_store(tmp_path / "store", monkeypatch)
    recommend.run(RecommendConfig.model_validate({"lake": lake, "model": models[name], "k": 4, "batch_size": 16}))
    server, found = Recommender(load_model(models[name]), "graftrec/1"), recommended(lake, "source")
    if name == "baskets":
        examples = {user: Request([], user, baskets=baskets) for user, baskets in baskets_of(lake).items()}
    else:
        examples = clicks_of(lake)
    assert found.keys() == examples.keys()
    for (user, request), answer in zip(examples.items(), server.answer(list(examples.values()), k=4), strict=True):
        assert [row["item"] for row in found[user]] == answer.items, request
        assert [row["score"] for row in found[user]] == pytest.approx(answer.scores, rel=1e-5, abs=1e-6)


def clicks_of(lake):
    raw = dict(pl.read_delta(f"{lake}/items").select("index", "item").iter_rows())
    users = dict(pl.read_delta(f"{lake}/users").select("index", "user").iter_rows())
    rows = pl.read_delta(f"{lake}/sequences").filter((pl.col("split") == "last-5") & (pl.col("domain") == "source"))
    return {
        users[row["user"]]: Request(
            [raw[item] for item in row["items"]],
            users[row["user"]],
            None if row["event_types"] is None else [kind or "" for kind in row["event_types"]],
        )
        for row in rows.to_dicts()
    }


def test_the_gate_judges_next_baskets(models, tmp_path, monkeypatch, capsys):
    enter_store(tmp_path / "store", monkeypatch)

    def judged(**gate):
        return PromoteConfig.model_validate(
            {
                "candidate": models["baskets"],
                "from_scratch": [models["other"]],
                "runtime": {"progress": False},
                "tracking": {"enabled": False},
                "gate": {"min_seeds": 1, "min_users": 20, "metric": "basket/F1@5", "must_beat": []} | gate,
            }
        )

    with pytest.raises(promote.GateRefused, match=r"than from-scratch: basket/F1@5 0\."):
        promote.run(judged())
    with pytest.raises(GateError, match="popularity; personal frequency; Markov chain, found item-to-item"):
        promote.run(judged(must_beat=["item-to-item"]))
    with pytest.raises(GateError, match="expected full for task next_basket"):
        promote.run(judged(protocol="uniform-100"))
    told = capsys.readouterr().out
    assert "cold items" in told
    with pytest.raises(promote.GateRefused, match=r"simple baseline, Markov chain|better than from-scratch"):
        promote.run(judged(must_beat=["Markov chain", "personal frequency"]))
    version = Registry().version("1")
    assert "- test, full: " in version.description
    assert "basket/F1@5 0." in version.description
    assert CHAMPION not in version.aliases


UNTRAINED = TRAIN | {"epochs": 1, "min_epochs": 1, "learning_rate": 1e-12}
TOLD = {  # task, metric of the gate, a simple baseline of it
    "profile": ({"kind": "profile", "attribute": "taste"}, "accuracy", "most frequent value"),
    "clicks": (CLICK, "user AUC", "popularity"),
    "several": ({"kind": "multi", "tells": ["category", "value"]}, "category/accuracy", "shares of all"),
}


@pytest.fixture(scope="module")
def told(lake, tmp_path_factory):
    """Folders by name: a model of each task, one not trained, and one of another seed."""
    folder = tmp_path_factory.mktemp("told")

    def made(name, task, train):
        given = {"data": {"lake": str(lake), "domain": "source"}, "model": PETERREC, "train": train, "task": task}
        given |= {"name": name, "output": str(folder), "transfer": "none"}
        return str(finetune(FinetuneConfig.model_validate({**TINY, **given})).model)

    longer = TRAIN | {"epochs": 30, "min_epochs": 30, "learning_rate": 0.01}
    return {
        name: {"good": made(f"{name}-good", task, longer), "poor": made(f"{name}-poor", task, UNTRAINED)}
        for name, (task, _, _) in TOLD.items()
    }


@pytest.mark.parametrize("name", TOLD)
def test_the_gate_judges_what_is_told(name, told, tmp_path, monkeypatch):
    enter_store(tmp_path / "store", monkeypatch)
    _, metric, simple = TOLD[name]

    def judged(candidate, scratch, **gate):
        return PromoteConfig.model_validate(
            {
                "candidate": told[name][candidate],
                "from_scratch": [told[name][scratch]],
                "runtime": {"progress": False},
                "tracking": {"enabled": False},
                "gate": {"min_seeds": 1, "min_users": 10, "level": 0.2, "metric": metric, "must_beat": [simple]} | gate,
            }
        )

    learns = name != "several"  # of 150 users too little is learned to pass
    with nullcontext() if learns else pytest.raises(promote.GateRefused):
        promote.run(judged("good", "poor"))
    version = Registry().version("1")
    assert (CHAMPION in version.aliases) == learns
    decision = json.loads((tmp_path / "store" / "runs" / "promote" / "decision.json").read_text())
    config = EvaluateConfig(
        name="asked",
        output=str(tmp_path),
        tracking={"enabled": False},
        runtime={"progress": False},
        models=(EvaluatedModel(model=told[name]["good"], label="good"),),
        against="good",
    )
    rows = evaluate(config).rows
    wanted = metric.rpartition("/")[2]
    places = "users", metric.partition("/")[0]
    means = {r["label"]: r["mean"] for r in rows if r["metric"] == wanted and r["protocol"] in places}
    checks = {check["name"]: check["numbers"] for check in decision["checks"]}
    assert checks["from-scratch"]["version"] == pytest.approx(means["good"])
    assert checks[simple]["baseline"] == pytest.approx(means[simple])
    assert f"- test, {TOLD[name][0]['kind']}: " in version.description
    assert f"{wanted} {means['good']:.4f}" in version.description

    with pytest.raises(GateError, match=r"gate.metric: expected a metric that task .* found 'NDCG@10'"):
        promote.run(judged("poor", "good", metric="NDCG@10"))
    if learns:
        with pytest.raises(promote.GateRefused, match="than from-scratch") as refused:
            promote.run(judged("poor", "good", must_beat=[]))
        assert "than the champion" in str(refused.value) or "as good as the champion" in str(refused.value)


def test_the_smaller_loss_is_the_better(told, tmp_path, monkeypatch):
    enter_store(tmp_path / "store", monkeypatch)
    given = {"runtime": {"progress": False}, "tracking": {"enabled": False}}
    gate = {"min_seeds": 1, "min_users": 10, "metric": "log loss", "must_beat": ["popularity"]}
    models = told["clicks"]
    examples = given | {"candidate": models["good"], "from_scratch": [models["poor"]], "gate": gate}
    decision = promote.run(PromoteConfig.model_validate(examples)).decision
    numbers = {check.name: check.numbers for check in decision.checks}["from-scratch"]
    assert numbers["scratch"] < numbers["version"] < 0
    strict = gate | {"min_gain": 0.9, "must_beat": []}
    with pytest.raises(promote.GateRefused, match="needs more than"):
        promote.run(PromoteConfig.model_validate(examples | {"gate": strict, "registered_model": "other"}))
