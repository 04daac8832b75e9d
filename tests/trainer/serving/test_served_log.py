"""Two versions by users, the served log, and what is learned from it: hit rates and impressions."""

import datetime as dt
import random
import time
from collections import Counter

import polars as pl
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from etl.lake import lease
from etl.settings import GraftrecError
from etl.tables import FIRST_INDEX, INTERACTIONS, SERVED
from tests.fixtures.folders import write_model
from tests.fixtures.served_models import Client, served
from tests.fixtures.stores import enter_store
from trainer.config import ServedConfig, ServedLogConfig
from trainer.inference.model_folder import load_model
from trainer.inference.recommender import Answer, Recommender, Request, RequestError
from trainer.recipes.served import run
from trainer.registry import CANDIDATE, CHAMPION, Registry
from trainer.serving.metrics import Metrics
from trainer.serving.outcomes import hit_rates, impressions, shown
from trainer.serving.served_log import ServedLog
from trainer.serving.split import Split, hash_of

HOUR = 3_600_000_000
NOTED = ["user", "version", "items"]


@pytest.fixture(scope="module")
def folders(tiny_lake, tmp_path_factory):
    root = tmp_path_factory.mktemp("split")
    return [write_model(root / f"model-{seed}", tiny_lake, seed=seed, skill=0.3) for seed in range(2)]


@pytest.fixture(scope="module")
def items(folders):
    return list(load_model(folders[0]).catalogue.raw_ids[FIRST_INDEX:])


# --- split ---------------------------------------------


def test_a_share_of_the_users_is_the_same_ones_each_time(folders, items):
    own, other = (Recommender(load_model(folder), name) for folder, name in zip(folders, ("own", "other"), strict=True))
    split = Split(own, other, 0.3, "first")
    requests = [Request(items[:2], f"user-{number}") for number in range(1_000)] + [Request(items[:2])]
    answers = split.answer(requests, 3)
    by = [answer.version for answer in answers]
    assert by[-1] == "own"  # nobody is named
    assert 0.25 < by.count("other") / 1_000 < 0.35
    assert [answer.version for answer in split.answer(requests[::-1], 3)] == by[::-1]
    for request, answer in zip(requests[:20], answers[:20], strict=True):
        alone = {"own": own, "other": other}[answer.version].answer([request], 3)[0]
        assert answer.items == alone.items
    second = [one.version for one in Split(own, other, 0.3, "second").answer(requests[:-1], 3)]
    both = sum(one == another == "other" for one, another in zip(by, second, strict=False))
    assert 50 < both < 130  # of 1,000: independent of the first
    assert {one.version for one in Split(own, other, 0.0, "").answer(requests, 3)} == {"own"}
    assert {one.version for one in Split(own, other, 1.0, "").answer(requests[:-1], 3)} == {"other"}


def test_a_bad_record_is_named_by_its_place_among_all(folders, items):
    own, other = (Recommender(load_model(folder), "x") for folder in folders)
    requests = [Request(items[:1], f"user-{number}") for number in range(10)]
    place = next(at for at in range(5, 10) if hash_of(f"user-{at}", "") < 0.5)
    requests[place] = Request([], f"user-{place}", baskets=[items[:1]])
    with pytest.raises(RequestError, match=f"record {place}: expected `items`"):
        Split(own, other, 0.5, "").answer(requests, 3)


# --- the log ---------------------------------------------


def test_lists_of_two_versions_are_logged_as_they_were_given(folders, items, tmp_path, monkeypatch):
    enter_store(tmp_path / "store", monkeypatch)
    Registry().register(folders[0], alias=CHAMPION)
    Registry().register(folders[1], alias=CANDIDATE)
    lake, given = tmp_path / "lake", []
    log = {"lake": str(lake), "seconds": 0.2}
    with served(split={"model": "candidate", "share": 0.5}, log=log) as one:
        client = Client(one)
        for number in range(40):
            body = {"inputs": [{"user": f"u{number}", "items": items[:2]}, {"items": []}], "params": {"k": 3}}
            _, answer, headers = client.ask(body)
            given.append((headers["x-request-id"], answer["predictions"]))
            time.sleep(0.01)
        text = client.get("/metrics")[1]
    rows = pl.read_delta(str(lake / SERVED.name)).sort("time", "request", "place")
    assert len(rows) == 80  # the last ones were committed at the end
    assert DeltaTable(lake / SERVED.name).version() >= 2
    found = {(row["request"], row["place"]): row for row in rows.to_dicts()}
    for number, (request, answers) in enumerate(given):
        for place, (answer, user) in enumerate(zip(answers, (f"u{number}", None), strict=True)):
            row = found[request, place]
            assert {name: row[name] for name in ("items", "scores", "version", "basis")} == {
                name: answer[name] for name in ("items", "scores", "version", "basis")
            }
            assert row["user"] == user
            assert row["day"] == row["time"].strftime("%Y-%m-%d")
    versions = Counter(rows.filter(pl.col("user").is_not_null())["version"])
    assert set(versions) == {"graftrec/1", "graftrec/2"}
    assert 'graftrec_model_info{arm="model",version="graftrec/1"} 1.0' in text
    assert 'graftrec_model_info{arm="split",version="graftrec/2"} 1.0' in text


def test_while_another_writes_to_the_lake_rows_wait_and_none_lands_twice(tmp_path, monkeypatch):
    said, lake = [], tmp_path / "lake"
    log = ServedLog(ServedLogConfig(lake=str(lake), rows=3, users=False), Metrics(), said.append)
    answer = Answer(["a"], [1.0], "model", [], "graftrec/1")
    for number in range(5):
        log.add(f"r{number}", [Request([], "somebody")], [answer], "")
    failing = {"left": 2}

    def fails_after(*arguments):
        written = commit(*arguments)
        failing["left"] -= 1
        if failing["left"] >= 0:
            raise lease.LakeBusy("another process writes")  # as if its answer were lost: it has landed
        return written

    commit = ServedLog._commit.__globals__["commit_files"]
    monkeypatch.setitem(ServedLog._commit.__globals__, "commit_files", fails_after)
    for failed in ("", "another process writes"):
        assert log._try(failed) == "another process writes"
    log.add("r5", [Request([])], [answer], "")
    log._try("")
    log._try("")
    rows = pl.read_delta(str(lake / SERVED.name))
    assert sorted(rows["request"]) == ["r2", "r3", "r4", "r5"]  # the oldest two were dropped
    assert rows["user"].to_list() == [None] * 4
    assert said == ["3 lists of the served log wait: another process writes"]


def test_a_log_in_what_is_no_lake_stops_the_start(folders, tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "something.txt").write_text("else")
    with pytest.raises(GraftrecError, match="served"), served(model=folders[0], log={"lake": str(tmp_path)}):
        pass


# --- outcomes ---------------------------------------------


def lists(*rows):
    return pa.table(
        {
            "user": pa.array([row[0] for row in rows], pa.string()),
            "time": pa.array([row[1] * HOUR for row in rows], pa.int64()),
            "version": [row[2] for row in rows],
            "items": pa.array([row[3] for row in rows], pa.list_(pa.string())),
        }
    )


def events(*rows):
    return pa.table(
        {
            "user": pa.array([row[0] for row in rows], pa.string()),
            "item": pa.array([row[1] for row in rows], pa.string()),
            "time": pa.array([int(row[2] * HOUR) for row in rows], pa.int64()),
        }
    )


def test_hits_are_counted_within_the_hours_after_a_list():
    given = lists(
        ("u", 10, "m/1", ["a", "b", "c"]),  # b at 12: a hit at 2
        ("u", 13, "m/1", ["b", "c"]),  # b before it, c too late
        ("v", 10, "m/2", ["a"]),  # at the very time of the list: no answer to it
        ("w", 10, "m/2", ["x", "a"]),  # a at 34, the last hour; x never
        ("w", 11, "m/2", []),
        (None, 10, "m/2", ["a"]),  # nobody
        ("w", 90, "m/2", ["a"]),  # its hours are not over
    )
    happened = events(("u", "b", 12), ("u", "c", 38), ("v", "a", 10), ("w", "a", 34), ("w", "a", 9), ("z", "q", 100))
    found = hit_rates(shown(given, happened, hours=24), [1, 2])
    assert [(one.version, one.lists, one.users, one.hits) for one in found] == [
        ("m/1", 2, 1, {1: 0.0, 2: 1 / 2}),
        ("m/2", 2, 2, {1: 0.0, 2: 1 / 2}),  # of lists with an item
    ]
    shown_only = impressions(shown(given, happened, hours=24), "shown")
    assert list(zip(*(shown_only[name].to_pylist() for name in ("user", "item", "event_type")), strict=True)) == [
        ("u", "a", "shown"),
        ("u", "c", "shown"),
        ("u", "b", "shown"),
        ("u", "c", "shown"),
        ("v", "a", "shown"),
        ("w", "x", "shown"),
    ]


def test_without_events_or_lists_nothing_is_found():
    assert hit_rates(shown(lists(("u", 1, "m/1", ["a"])), events(), hours=1), [1]) == []
    assert hit_rates(shown(lists(), events(("u", "a", 5)), hours=1), [1]) == []


def test_hit_rates_are_those_counted_one_by_one():
    draw = random.Random(0)
    given = [
        (f"u{draw.randrange(5)}", draw.randrange(60), f"m/{draw.randrange(2)}", draw.sample("abcdefgh", 3))
        for _ in range(200)
    ]
    happened = [(f"u{draw.randrange(5)}", draw.choice("abcdefgh"), draw.uniform(0, 100)) for _ in range(300)]
    found = hit_rates(shown(lists(*given), events(*happened), hours=5), [1, 3])
    for one in found:
        mine = [row for row in given if row[2] == one.version]
        for k in (1, 3):
            hits = sum(
                any(u == row[0] and i in row[3][:k] and row[1] < t <= row[1] + 5 for u, i, t in happened)
                for row in mine
            )
            assert one.hits[k] == pytest.approx(hits / len(mine))


def test_the_recipe_reads_both_lakes_and_writes_impressions(tmp_path, capsys):
    start = dt.datetime(2026, 11, 30, tzinfo=dt.UTC)
    log = [("u1", "a", 1, "buy"), ("u1", "b", 2, "look"), ("u2", "z", 90, "buy")]
    named = [dict(zip(("user", "item", "time", "event_type"), row, strict=True)) for row in log]
    times = [start + dt.timedelta(hours=row["time"]) for row in named]
    pl.DataFrame(named).with_columns(time=pl.Series(times)).write_delta(str(tmp_path / "lake" / INTERACTIONS.name))
    served_log = ServedLog(ServedLogConfig(lake=str(tmp_path / "served")), Metrics(), print)
    served_log.add("r1", [Request([], "u1")], [Answer(["a", "b", "c"], [3.0, 2.0, 1.0], "model", [], "graftrec/1")], "")
    served_log._rows[0]["time"] = int(start.timestamp() * 1e6)
    served_log._try("")
    settings = {"served": str(tmp_path / "served"), "lake": str(tmp_path / "lake"), "ks": [1, 2], "taken": ["look"]}
    target = tmp_path / "out" / "shown.parquet"
    found = run(ServedConfig.model_validate(settings | {"impressions": str(target)}))
    assert [(one.version, one.lists, one.hits) for one in found] == [("graftrec/1", 1, {1: 0.0, 2: 1.0})]
    rows = pl.read_parquet(target).to_dicts()
    assert rows == [{"user": "u1", "item": item, "time": start, "event_type": "impression"} for item in ("a", "c")]
    assert "| graftrec/1 | 1 |" in capsys.readouterr().out.replace("  ", " ")
    with pytest.raises(GraftrecError, match="served"):
        run(ServedConfig(served=str(tmp_path / "nowhere"), lake=str(tmp_path / "lake")))
