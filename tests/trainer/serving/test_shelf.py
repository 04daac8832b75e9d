"""Filters of requests: excluded items, categories, stock; what they leave is in the order of evaluation's scores."""

import time

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etl.settings import GraftrecError
from etl.tables import FIRST_INDEX, UNK
from tests.fixtures.folders import write_model
from tests.fixtures.served_models import Client, served
from trainer.data.chosen_ids import ChosenIdsError, read_ids
from trainer.data.events import Events
from trainer.inference.allowed_items import AllowedItems
from trainer.inference.model_folder import load_model
from trainer.inference.recommender import Recommender, Request, RequestError, parse


@pytest.fixture(scope="module")
def folder(tiny_lake, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("shelf") / "model", tiny_lake, seed=3, skill=0.3)


@pytest.fixture(scope="module")
def trained_model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def items(trained_model):
    return list(trained_model.catalogue.raw_ids[FIRST_INDEX:])


def in_order(trained_model, history, among):
    """The items of `among` that are not in the history, by the scorer's scores."""
    row_of = {raw: row for row, raw in enumerate(trained_model.catalogue.raw_ids) if raw}
    rows = np.array([row_of[item] for item in history], dtype=np.int64)
    events = Events.of(np.array([UNK]), np.array([0, len(rows)]), rows, np.empty(0, np.int64))
    scores = trained_model.scorer().score(events)[0].tolist() if history else trained_model.popularity.tolist()
    return sorted(
        (item for item in among if item not in history), key=lambda item: (-scores[row_of[item]], row_of[item])
    )


# --- in the recommender ---------------------------------------------


@pytest.mark.parametrize("history", [[0, 3], []], ids=["model", "popular"])
def test_what_is_excluded_and_what_is_not_allowed_is_no_answer(history, trained_model, items):
    recommender, had = Recommender(trained_model, "x/1"), [items[place] for place in history]
    stock = items[::2]
    allowed = AllowedItems(pa.array([*stock, "an item that the model does not know"]))
    requests = [
        Request(had),
        Request(had, exclude=[items[5], items[6], "unknown"]),
        Request(had, allowed=allowed),
        Request(had, allowed=allowed, exclude=stock[:3]),
        Request(had, allowed=AllowedItems(pa.array([], pa.string()))),
    ]
    found = [answer.items for answer in recommender.answer(requests, k=1_000)]
    among = [items, set(items) - {items[5], items[6]}, stock, stock[3:], []]
    assert found == [in_order(trained_model, had, one) for one in among]
    for request, together in zip(requests, found, strict=True):
        assert recommender.answer([request], k=3)[0].items == together[:3]


def test_scores_of_what_is_left_are_the_same(trained_model, items):
    recommender = Recommender(trained_model, "x/1")
    whole = recommender.answer([Request(items[:2])], k=1_000)[0]
    score_of = dict(zip(whole.items, whole.scores, strict=True))
    part = recommender.answer([Request(items[:2], exclude=whole.items[::3])], k=1_000)[0]
    assert part.scores == [score_of[item] for item in part.items]


def test_categories_need_a_server_that_knows_them(trained_model, items):
    with pytest.raises(RequestError, match="record 0: expected no `only`"):
        Recommender(trained_model, "x/1").answer(parse([{"items": items[:1], "only": ["drama"]}]))


@pytest.mark.parametrize("field", [{"exclude": "i1"}, {"exclude": [True]}, {"only": "drama"}, {"only": [5]}], ids=str)
def test_malformed_filters_are_refused(field):
    with pytest.raises(RequestError, match=f"record 0: `{next(iter(field))}` is a list of"):
        parse([{"items": ["i1"], **field}])


# --- served ---------------------------------------------


def test_a_server_filters_by_category_and_stock_and_reads_them_again(folder, trained_model, items, tiny_lake, tmp_path):
    categories = dict(pl.read_delta(f"{tiny_lake}/items").select("item", "categories").iter_rows())
    names = sorted({name for item in items for name in categories[item]})
    stock = tmp_path / "stock.parquet"

    def put(in_stock):
        pq.write_table(pa.table({"item": items, "in_stock": [item in in_stock for item in items]}), tmp_path / "new")
        (tmp_path / "new").rename(stock)

    put(items[:20])
    with served(model=folder, shelf={"items": f"{tiny_lake}/items", "stock": str(stock), "seconds": 0.1}) as one:

        def ask(**fields):
            status, answer, _ = Client(one).ask({"inputs": [{"items": items[:2], **fields}], "params": {"k": 100}})
            assert status == 200, answer
            return answer["predictions"][0]["items"]

        assert ask() == in_order(trained_model, items[:2], items[:20])
        for only in ([names[0]], names[:2]):
            wanted = [item for item in items[:20] if set(categories[item]) & set(only)]
            assert ask(only=only) == in_order(trained_model, items[:2], wanted)
            assert ask(only=only, exclude=wanted[:2]) == in_order(trained_model, items[:2], wanted[2:])
        refused = Client(one).ask({"inputs": [{"items": items[:2], "only": ["none such"]}]})
        assert (refused[0], refused[1]["message"]) == (
            400,
            "only: expected categories that an item has, found 'none such'; leave it out",
        )
        put(items[10:])
        deadline = time.monotonic() + 60
        while ask() != in_order(trained_model, items[:2], items[10:]):
            assert time.monotonic() < deadline
        stock.unlink()
        while "graftrec_follow_failures_total 0.0" in (text := Client(one).get("/metrics")[1]):
            assert time.monotonic() < deadline
        assert ask() == in_order(trained_model, items[:2], items[10:])
    assert f"graftrec_stock_items {float(len(items) - 10)}" in text


def test_a_shelf_that_cannot_be_read_stops_the_start(folder, tmp_path):
    with (
        pytest.raises(GraftrecError, match="expected a table with item"),
        served(model=folder, shelf={"stock": str(tmp_path / "none.parquet")}),
    ):
        pass
    with served(model=folder) as one:
        status, answer, _ = Client(one).ask({"inputs": [{"items": ["1"], "only": ["drama"]}]})
    assert status == 400
    assert "this server knows no categories" in answer["message"]


# --- tables of ids ---------------------------------------------


def test_ids_are_read_from_any_table(tmp_path):
    pq.write_table(pa.table({"item": [1, 2, 3], "in_stock": [1.5, 0.0, None]}), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("sku,item,in_stock\nx,007,yes\ny,8, TRUE\nz,9,no\nw,10,3\nv,11,0\nu,12,\n")
    (tmp_path / "c.txt").write_text("i1\n\n i2 \ni1\n")
    pl.DataFrame({"item": ["a", "b"], "in_stock": [True, False]}).write_delta(str(tmp_path / "d"))
    pl.DataFrame({"item": ["a", None, "b"]}).write_delta(str(tmp_path / "e"))
    found = {
        name: read_ids(str(tmp_path / name), "item", flag="in_stock").to_pylist()
        for name in ("a.parquet", "b.csv", "c.txt", "d", "e")
    }
    assert found == {
        "a.parquet": ["1"],
        "b.csv": ["007", "8", "10"],
        "c.txt": ["i1", "i2"],
        "d": ["a"],
        "e": ["a", "b"],
    }


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("none.parquet", "expected a table with item"),
        ("none", "expected a table with item"),
        ("other.parquet", "expected a column item, found sku; rename it"),
        ("lost.parquet", "expected ids in item, found '1e.17'"),
        ("dates.parquet", "expected in_stock to be true or false"),
    ],
)
def test_a_table_without_ids_is_refused(name, told, tmp_path):
    pq.write_table(pa.table({"sku": [1]}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"item": [1e17]}), tmp_path / "lost.parquet")
    pq.write_table(pa.table({"item": [1], "in_stock": pa.array([0], pa.date32())}), tmp_path / "dates.parquet")
    with pytest.raises(ChosenIdsError, match=told):
        read_ids(str(tmp_path / name), "item", flag="in_stock")
