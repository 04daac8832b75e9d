"""Kinds of event (views, purchases) beside items: read from the tables and by a model, told, served, refused."""

import json

import numpy as np
import polars as pl
import pytest
import torch

from etl.settings import ConfigError
from etl.tables import FIRST_INDEX, UNK
from tests.fixtures.lakes import build_tiny_lake
from tests.fixtures.networks import NUM_ITEMS, descend
from tests.fixtures.recommendations import rows_of as recommended
from tests.fixtures.stores import enter_store
from tests.fixtures.trainings import TINY
from trainer.config import (
    DataConfig,
    DupnConfig,
    EvaluateConfig,
    EvaluatedModel,
    FinetuneConfig,
    MultiConfig,
    NextItemConfig,
    PretrainConfig,
    PromoteConfig,
    RecommendConfig,
)
from trainer.data.batch import Batch
from trainer.data.catalogue import read_catalogue
from trainer.data.events import Events
from trainer.data.held_out import ReadOptions, read_held_out
from trainer.data.loader import Loader
from trainer.data.release import pin
from trainer.data.sequences import SequenceDataset
from trainer.evaluation.scorers import model_scorer, read_evaluation_set
from trainer.inference.model_folder import load_model
from trainer.inference.recommender import Recommender, Request, RequestError, parse
from trainer.models import ModelSizes, build_model
from trainer.models.time import EventInputs
from trainer.recipes import promote, recommend
from trainer.recipes.evaluate import run as evaluate
from trainer.recipes.finetune import run as finetune
from trainer.recipes.pretrain import run as pretrain
from trainer.registry import CHAMPION, Registry
from trainer.tasks import Multi, NextItem
from trainer.training.transfer import TransferError

KINDS = ("look", "buy")
MODEL = {"kind": "dupn", "width": 16, "max_length": 24, "user_width": 0, "dropout": 0.0, "event_types": True}
TRAINED = {"batch_size": 16, "epochs": 3, "learning_rate": 0.02, "warmup_steps": 0, "min_epochs": 3}


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    return build_tiny_lake(tmp_path_factory.mktemp("kinds") / "lake", num_users=150, described=True)


def settings(kind, folder, lake, **more):
    data = {"lake": str(lake), "domain": "source", "event_types": KINDS} | more.pop("data", {})
    given = {"data": data, "model": MODEL, "task": {"kind": "next_item"}, "train": TRAINED}
    return kind.model_validate({**TINY, "output": str(folder / "runs"), **given, **more})


def rows_of(lake, domain="source"):
    return (
        pl.read_delta(f"{lake}/sequences")
        .filter((pl.col("split") == "last-5") & (pl.col("domain") == domain))
        .to_dicts()
    )


def code_of(kind):
    return KINDS.index(kind) + 1 if kind in KINDS else 0


def kinds_in(row):
    return row["event_types"] or [None] * len(row["items"])


# --- read ---------------------------------------------


def test_kinds_lie_beside_items(lake):
    found = SequenceDataset(pin(lake, None), "last-5", "source", event_types=KINDS).read_all()
    expected = {row["user"]: [code_of(kind) for kind in kinds_in(row)] for row in rows_of(lake)}
    assert {0, 1, 2} == {code for codes in expected.values() for code in codes}
    assert set(expected[FIRST_INDEX + 9]) == {0}
    for place, user in enumerate(found.users):
        own = found.event_types[found.offsets[place] : found.offsets[place + 1]]
        assert own.tolist() == expected[user]
    some = found.take(np.array([3, 1]))
    assert some.event_types.tolist() == expected[found.users[3]] + expected[found.users[1]]


def test_a_kind_that_is_not_named_is_as_none(lake):
    found = SequenceDataset(pin(lake, None), "last-5", "source", event_types=("buy",)).read_all()
    whole = SequenceDataset(pin(lake, None), "last-5", "source", event_types=KINDS).read_all()
    np.testing.assert_array_equal(found.event_types, whole.event_types == 2)


def test_a_log_without_kinds_has_none(tiny_lake):
    found = SequenceDataset(pin(tiny_lake, None), "last-5", "source", event_types=KINDS).read_all()
    assert len(found.event_types) == len(found.items)
    assert not found.event_types.any()


def test_batches_hold_the_kinds_of_their_items(lake):
    release = pin(lake, None)
    catalogue = read_catalogue(release, "source")
    kind_of = {
        (row["user"], item): code_of(kind)
        for row in rows_of(lake)
        for item, kind in zip(row["items"], kinds_in(row), strict=True)
    }
    dataset = SequenceDataset(release, "last-5", "source", event_types=KINDS)
    seen = set()
    for batch in Loader(dataset, catalogue, DataConfig(unknown_users=0.0), batch_size=16, max_length=6, seed=0):
        for row, length in enumerate(batch.lengths.tolist()):
            for place in range(length):
                key = int(batch.users[row]), int(catalogue.global_index[batch.items[row, place]])
                assert batch.event_types[row, place].item() == kind_of[key]
                seen.add(kind_of[key])
    assert seen == {0, 1, 2}


def test_histories_keep_the_kinds_of_what_is_kept():
    given = Events.of(
        np.array([3, 4]),
        np.array([0, 3, 5]),
        np.array([10, 11, 12, 13, 14]),
        np.empty(0, np.int64),
        np.array([1, 2, 0, 1, 2], np.int8),
    )
    assert given.until(np.array([2, 1])).event_types.tolist() == [1, 2, 1]
    assert given.newest(1).event_types.tolist() == [0, 2]
    assert given.take(np.array([1])).event_types.tolist() == [1, 2]


def test_held_out_users_have_the_kinds_of_their_input(lake):
    release = pin(lake, None)
    catalogue = read_catalogue(release, "source")
    held_out = read_held_out(release, "last-5", "source", catalogue, "test", ReadOptions(event_types=KINDS))
    by_user = {row["user"]: row for row in rows_of(lake)}
    for place, user in enumerate(held_out.users.tolist()):
        row, own = by_user[user], held_out.histories.take(np.array([place]))
        codes = [code_of(kind) for kind in kinds_in(row)]
        assert own.event_types.tolist() == codes[: row["test_start"]]
        examples = codes[row["test_start"] : row["end"]]
        assert held_out.event_types[place, : len(examples)].tolist() == examples


# --- the network ---------------------------------------------


def network(kinds=2, **more):
    config = DupnConfig(width=16, max_length=16, dropout=0.0, user_width=0, event_types=True, **more)
    return build_model(
        config,
        ModelSizes(num_users=9, num_entities=0, knowledge_VS=torch.zeros(NUM_ITEMS, 0), num_event_types=kinds),
        seed=0,
    )


def hidden(model, items_BT, kinds_BT):
    lengths, every = torch.full((len(items_BT),), items_BT.shape[1]), torch.ones_like(items_BT, dtype=torch.bool)
    given = {"causal": True, "events": EventInputs(kinds_BT)}
    return model(items_BT, lengths, torch.zeros(len(items_BT)).long(), every, **given).view(*items_BT.shape, -1)


def test_a_kind_changes_what_comes_at_it_and_behind_it():
    model = network().eval()
    items = torch.randint(FIRST_INDEX, NUM_ITEMS, (1, 8))
    kinds = torch.zeros_like(items)
    plain = hidden(model, items, kinds)
    assert torch.equal(plain, hidden(model, items, None))
    kinds[0, 4] = 2
    other = hidden(model, items, kinds)
    assert torch.equal(plain[:, :4], other[:, :4])
    assert ((plain - other)[:, 4:].abs().amax(-1) > 0).all()


def planted(random, step):
    """The item behind a buy is the one above, behind a look the one below; a kind follows on the item's parity."""
    item, items, kinds = random.integers(0, 30, 32), [], []
    for _ in range(8):
        kind = random.integers(1, 3, 32)
        items.append(item)
        kinds.append(kind)
        item = (item + np.where(kind == 2, 1, -1)) % 30
    stacked = (torch.from_numpy(np.stack(x, axis=1)) for x in (items, kinds))
    items_BT, kinds_BT = stacked
    lengths, users = torch.full((32,), 8), torch.zeros(32).long()
    return Batch(
        items_BT + FIRST_INDEX, lengths, users, 32, slice(0, 32), (0, 0, step), event_types=kinds_BT
    ), torch.from_numpy(item) + FIRST_INDEX


def test_it_learns_what_only_kinds_tell():
    task, found = NextItem(NextItemConfig()), {}
    for reads in (True, False):
        model, random = network().train(), np.random.default_rng(0)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for step in range(200):
            batch, _ = planted(random, step)
            batch.event_types = batch.event_types if reads else None
            descend(task, model, batch, optimizer)
        batch, behind = planted(random, 0)
        batch.event_types = batch.event_types if reads else None
        best_B = model.eval().scores(task.query(model, batch))[:, FIRST_INDEX:NUM_ITEMS].argmax(1) + FIRST_INDEX
        found[reads] = (best_B == behind).float().mean()
    assert found[True] > 0.95
    assert found[False] < 0.75


def test_a_kind_is_told_by_what_came_before():
    """A buy follows on each look, and a look on each buy; events of no kind are not asked about."""
    model = network()
    model.add_task_head("event_type", 2)
    task = Multi(MultiConfig(tells=("event_type",)))
    random, optimizer = np.random.default_rng(0), torch.optim.Adam(model.parameters(), lr=0.02)

    def users(step):
        kinds = 1 + (random.integers(0, 2, 32)[:, None] + np.arange(7)) % 2
        items = torch.from_numpy(random.integers(FIRST_INDEX, NUM_ITEMS, kinds.shape))
        given = torch.full((32,), 7), torch.zeros(32).long(), 32, slice(0, 32), (0, 0, step)
        return Batch(items, *given, event_types=torch.from_numpy(kinds))

    batch = users(0)
    batch.event_types[:, 1:] = 0
    only_first, count = task.loss(model, batch)
    scores = model.task_heads["event_type"](
        hidden(model, torch.full((32, 1), 2), torch.zeros(32, 1).long())[:, 0]  # behind CLS alone
    )
    by_hand = torch.nn.functional.cross_entropy(scores, batch.event_types[:, 0] - 1, reduction="sum")
    torch.testing.assert_close(only_first, by_hand)
    assert count == 32 * 7
    for step in range(120):
        descend(task, model, users(step), optimizer)
    batch = users(0)
    told = model.task_heads["event_type"](task.query(model.eval(), batch)).argmax(1)
    assert (told + 1 == 3 - batch.event_types[:, -1]).float().mean() > 0.95


# --- trained, evaluated, served ---------------------------------------------


@pytest.fixture(scope="module")
def trained(lake, tmp_path_factory):
    folder = tmp_path_factory.mktemp("read")
    task = {"kind": "multi", "tells": ["next_item", "event_type"]}
    parent = pretrain(settings(PretrainConfig, folder, lake, name="parent", task=task)).model
    more = {"name": "child", "parent": str(parent), "data": {"domain": "target"}}
    return folder, parent, finetune(settings(FinetuneConfig, folder, lake, **more)).model


def evaluated(tmp_path, models):
    return evaluate(
        EvaluateConfig(
            name="kinds",
            output=str(tmp_path),
            tracking={"enabled": False},
            runtime={"progress": False},
            models=tuple(EvaluatedModel(model=str(model), label=label) for label, model in models.items()),
            baselines={"enabled": True},
            against="none",
        )
    )


def test_a_trained_model_is_asked_with_kinds(trained, lake, tmp_path):
    """NDCG of the first user found anew: the model over the input with its kinds, and not over that without."""
    _, _, child = trained
    report = evaluated(tmp_path, {"none": child})
    users = pl.read_parquet(report.folder / "users.parquet").filter(
        (pl.col("label") == "none") & (pl.col("protocol") == "full") & (pl.col("convention") == "list")
    )
    trained_model, release = load_model(child), pin(lake, None)
    catalogue = read_catalogue(release, "target")
    held_out = read_held_out(release, "last-5", "target", catalogue, "test", ReadOptions(event_types=KINDS))
    found, without = [], []
    for given, ndcg in ((held_out.histories, found), (bare(held_out.histories), without)):
        scores = trained_model.scorer().score(given)
        for place, targets in enumerate(held_out.targets):
            row = scores[place].clone()
            row[torch.from_numpy(held_out.histories.take(np.array([place])).items)] = -torch.inf
            order = row.argsort(descending=True)[:10].tolist()
            wanted = [t for t in targets.tolist() if t >= 0]
            gains = sum(1 / np.log2(rank + 2) for rank, item in enumerate(order) if item in wanted)
            ndcg.append(gains / sum(1 / np.log2(rank + 2) for rank in range(min(len(wanted), 10))))
    np.testing.assert_allclose(users["NDCG@10"].to_numpy(), found, atol=1e-6)
    assert not np.allclose(found, without)


def bare(histories):
    return Events.of(histories.users, histories.offsets, histories.items, histories.times)


def test_kinds_are_told_beside_the_users_own_past(trained, lake, tmp_path):
    report = evaluated(tmp_path, {"none": trained[1]})
    own = {
        row["label"]: row["mean"]
        for row in report.rows
        if (row["protocol"], row["metric"]) == ("event_type", "log loss")
    }
    assert own.keys() == {"none", "shares of all", "the user's own past"}
    rows = [row for row in rows_of(lake) if row["test_start"] < row["end"] and row["event_types"]]
    everyone = [k for r in rows for k in r["event_types"][: r["valid_start"]] if k]
    share = everyone.count("buy") / len(everyone)
    losses = []
    for row in rows:
        if kind := row["event_types"][row["test_start"]]:
            before = [k for k in row["event_types"][: row["test_start"]] if k]
            buys = (before.count("buy") + 5 * share) / (len(before) + 5)
            losses.append(-np.log(buys if kind == "buy" else 1 - buys))
    assert own["the user's own past"] == pytest.approx(np.mean(losses))


def test_a_server_takes_kinds_where_it_is_given_them(trained):
    trained_model = load_model(trained[2])
    items = list(trained_model.catalogue.raw_ids[FIRST_INDEX : FIRST_INDEX + 3])
    server = Recommender(trained_model, "graftrec/1")
    plain, same, other, strange = server.answer(
        [
            Request(items),
            Request(items, None, ["", "x", ""]),
            Request(items, None, ["buy", "look", "buy"]),
            Request([*items, "nothing"], None, ["buy", "look", "buy", "look"]),
        ],
        k=5,
    )
    assert plain == same
    assert plain.scores != other.scores
    assert (strange.items, strange.scores) == (other.items, other.scores)
    rows = trained_model.catalogue
    history = Events.of(
        np.array([UNK]),
        np.array([0, 3]),
        np.arange(FIRST_INDEX, FIRST_INDEX + 3),
        np.empty(0, np.int64),
        np.array([2, 1, 2], np.int8),
    )
    scores = trained_model.scorer().score(history)[0]
    by_raw = dict(zip(rows.raw_ids, scores.tolist(), strict=True))
    assert other.scores == pytest.approx([by_raw[item] for item in other.items], abs=1e-6)
    parsed = parse([{"items": np.array(["1"], dtype=object), "event_types": np.array(["buy"], dtype=object)}])
    assert parsed == [Request(["1"], None, ["buy"])]
    assert parse([{"items": ["1"], "user": float("nan"), "event_types": float("nan")}]) == [Request(["1"])]
    with pytest.raises(RequestError, match="`event_types` is a list of strings as long as `items`"):
        parse([{"items": ["1", "2"], "event_types": ["buy"]}])


def test_recommendations_are_what_the_server_answers(spark, trained, lake, tmp_path, monkeypatch):
    enter_store(tmp_path / "store", monkeypatch)
    recommend.run(RecommendConfig.model_validate({"lake": lake, "model": str(trained[2]), "k": 3}))
    trained_model = load_model(trained[2])
    server, found = Recommender(trained_model, "graftrec/1"), recommended(lake)
    raw = dict(pl.read_delta(f"{lake}/items").select("index", "item").iter_rows())
    users = dict(pl.read_delta(f"{lake}/users").select("index", "user").iter_rows())
    for row in rows_of(lake, "target"):
        kinds = None if row["event_types"] is None else [kind or "" for kind in row["event_types"]]
        request = Request([raw[i] for i in row["items"]], users[row["user"]], kinds)
        answer = server.answer([request], k=3)[0]
        own = found[users[row["user"]]]
        assert [one["item"] for one in own] == answer.items
        assert [one["score"] for one in own] == pytest.approx(answer.scores, rel=1e-5, abs=1e-6)


# --- refused ---------------------------------------------


def test_names_that_no_event_has_are_refused(lake, tiny_lake, tmp_path):
    with pytest.raises(ConfigError, match=r"data.event_types: expected event types of .* no event of rent in"):
        pretrain(settings(PretrainConfig, tmp_path, lake, data={"event_types": ("buy", "rent")}))
    with pytest.raises(ConfigError, match="found no event of look, buy in"):
        pretrain(settings(PretrainConfig, tmp_path, tiny_lake))


def test_a_parent_of_other_kinds_is_refused(trained, lake, tmp_path):
    more = {"parent": str(trained[1]), "data": {"domain": "target", "event_types": KINDS[::-1]}}
    with pytest.raises(TransferError, match=r"expected data.event_types to be the parent's \(look, buy\), found buy"):
        finetune(settings(FinetuneConfig, tmp_path, lake, **more))


def test_models_of_other_kinds_are_compared_each_by_its_own(trained, lake, tmp_path):
    other = {"name": "other", "transfer": "none", "data": {"domain": "target", "event_types": ("buy",)}}
    model = finetune(settings(FinetuneConfig, tmp_path, lake, **other)).model
    alone = evaluated(tmp_path / "alone", {"none": model})
    beside = evaluated(tmp_path / "beside", {"other": trained[2], "none": model})
    own = [[row["mean"] for row in report.rows if row["label"] == "none"] for report in (alone, beside)]
    assert own[0] == own[1]


def test_a_champion_that_reads_kinds_is_no_wall(trained, lake, tmp_path, monkeypatch):
    """A candidate without kinds is judged beside it; each is asked in its own way."""
    enter_store(tmp_path / "store", monkeypatch)
    plain = {"data": {"domain": "target", "event_types": ()}, "model": MODEL | {"event_types": False}}
    hardly = TRAINED | {"learning_rate": 1e-9}  # as good as untrained, on any machine
    without = finetune(
        settings(FinetuneConfig, tmp_path, lake, name="plain", transfer="none", train=hardly, **plain)
    ).model
    Registry().register(trained[2], alias=CHAMPION)
    other = finetune(
        settings(FinetuneConfig, tmp_path, lake, name="other", transfer="none", train=TRAINED | {"seed": 1}, **plain)
    ).model
    given = {"candidate": str(without), "from_scratch": [str(other)], "tracking": {"enabled": False}}
    gate = {"min_seeds": 1, "min_users": 20, "must_beat": []}
    with pytest.raises(promote.GateRefused, match="than from-scratch"):
        promote.run(PromoteConfig.model_validate(given | {"gate": gate}))
    told = json.loads((tmp_path / "store" / "runs" / "promote" / "decision.json").read_text())
    assert {check["name"] for check in told["checks"]} >= {"from-scratch", "champion"}
    expected = evaluated(tmp_path / "expected", {"none": trained[2]})
    ndcg = next(
        r["mean"] for r in expected.rows if (r["label"], r["protocol"], r["metric"]) == ("none", "full", "NDCG@10")
    )
    champion = next(check for check in told["checks"] if check["name"] == "champion")
    assert champion["numbers"]["champion"] == pytest.approx(ndcg)


def test_a_model_of_all_domains_reads_the_kinds_of_all(lake, tmp_path):
    """What it is asked with, by hand: all events before the first held-out one, in time order, with their kinds."""
    more = {"data": {"domain": "all", "predicted": "target", "split": "joint-5"}}
    model = finetune(settings(FinetuneConfig, tmp_path, lake, name="all", transfer="none", **more)).model
    trained_model, release = load_model(model), pin(lake, None)
    examples = read_evaluation_set(release, "joint-5", "target", "test", ReadOptions(event_types=KINDS))
    scorer, some = model_scorer(trained_model, examples), np.arange(0, len(examples.users), 7)
    scores = scorer.score(examples.held_out.histories.take(some)).whole()
    rows = {
        (row["domain"], row["user"]): row
        for row in pl.read_delta(f"{lake}/sequences").filter(pl.col("split") == "joint-5").to_dicts()
    }
    for place, user in enumerate(examples.users[some].tolist()):
        own, target = rows["all", user], rows["target", user]
        first = target["times"][target["test_start"]]
        events = zip(own["times"], own["items"], kinds_in(own), strict=True)
        read = sorted((time, item, code_of(kind)) for time, item, kind in events if time < first)
        items = trained_model.catalogue.rows(np.array([item for _, item, _ in read], dtype=np.int64)).astype(np.int64)
        codes = np.array([code for *_, code in read], dtype=np.int8)
        history = Events.of(np.array([UNK]), np.array([0, len(read)]), items, np.empty(0, np.int64), codes)
        expected = trained_model.scorer().score(history)[0]
        of_target = trained_model.catalogue.rows(examples.catalogue.global_index[FIRST_INDEX:])
        torch.testing.assert_close(scores[place, FIRST_INDEX:], expected[torch.from_numpy(of_target.copy()).long()])


def test_settings_that_make_no_sense_are_refused():
    reads = DupnConfig(event_types=True)
    for given, message in [
        ({"model": reads, "task": NextItemConfig()}, "expected names of kinds of event, found none"),
        ({"model": reads, "task": {"kind": "click"}, "data": {"event_types": KINDS}}, "found click, which reads items"),
        ({"task": {"kind": "multi", "tells": ["event_type"]}, "data": {"event_types": ("buy",)}}, "two kinds of event"),
        ({"data": {"event_types": KINDS}}, "expected a model that reads kinds of event"),
        ({"data": {"event_types": ("buy", "buy")}}, "expected each kind once"),
    ]:
        with pytest.raises(ValueError, match=message):
            PretrainConfig.model_validate(given)
