"""Click prediction by content: what is read, drawn and told, metrics beside scikit-learn's, a planted taste."""

import dataclasses
import sys

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics as sk

from etl import tables
from etl.settings import ConfigError
from etl.tables import CLS, FIRST_INDEX, MASK
from tests.fixtures.lakes import build_tiny_lake
from tests.fixtures.networks import NUM_ITEMS, batch_of, descend, model_of
from tests.fixtures.processes import trained_by
from tests.fixtures.trainings import TINY
from trainer.config import (
    Bert4RecConfig,
    CaserConfig,
    ClickConfig,
    EvaluateConfig,
    EvaluatedModel,
    FinetuneConfig,
    MlpConfig,
    PairHeadConfig,
    PeterRecConfig,
    PretrainConfig,
)
from trainer.data import item_features
from trainer.data.batch import Batch
from trainer.data.catalogue import read_catalogue
from trainer.data.events import Events
from trainer.data.item_features import read_content
from trainer.data.release import pin
from trainer.evaluation import click_metrics, click_prediction
from trainer.evaluation.evaluator import Question
from trainer.evaluation.scorers import EvaluateError
from trainer.inference.model_folder import ModelFolderError, load_model
from trainer.recipes.evaluate import run as evaluate
from trainer.recipes.finetune import run as finetune
from trainer.recipes.pretrain import run as pretrain
from trainer.tasks import Click
from trainer.tasks.click import HEAD

NETWORKS = {
    "bert4rec": Bert4RecConfig(width=16, blocks=1, heads=2, max_length=13, dropout=0.0, user_width=0, knowledge={}),
    "peterrec": PeterRecConfig(width=16, dilations=(1, 2), max_length=13, dropout=0.0),
    "caser": CaserConfig(width=16, max_length=13, dropout=0.0, user_width=3, knowledge={}),
}
WIDTH = 6  # of content
SMALL = {"kind": "peterrec", "width": 16, "dilations": [1, 2], "max_length": 24}
TRAINED = {
    "batch_size": 16,
    "epochs": 8,
    "learning_rate": 0.01,
    "warmup_steps": 0,
    "min_epochs": 8,
    "checkpoint_seconds": 0,
}
TASK = {"kind": "click", "content": ["categories", "text"], "layers": [8], "negatives": 3}


def settings(kind, folder, lake, **more):
    given = {"data": {"lake": str(lake), "domain": "target"}, "model": SMALL, "task": TASK, "train": TRAINED}
    return kind.model_validate({**TINY, "output": str(folder / "runs"), **given, **more})


def described(config, *, seed=0):
    model = model_of(config, slots=0)
    torch.manual_seed(seed)
    model.add_task_head(HEAD, PairHeadConfig(content=WIDTH, layers=(8,)))
    model.describe(torch.randn(NUM_ITEMS, WIDTH, generator=torch.Generator().manual_seed(seed)))
    return model.double()


def plain_logit(model, hidden_D, item):
    """f(u, v), layer by layer."""
    head = model.task_heads[HEAD]
    item_D = head.content.weight @ model.content_VF[item].double() + head.content.bias
    x = torch.cat([hidden_D, item_D, hidden_D * item_D])
    x = head.layers[0].weight @ x + head.layers[0].bias
    x = head.layers[1].weight @ F.gelu(x) + head.layers[1].bias
    return x[0]


# --- content ---------------------------------------------


def test_categories_are_flags_and_texts_are_near_where_they_are_alike(tiny_lake):
    release = pin(tiny_lake, None)
    catalogue = read_catalogue(release, "all")
    told = read_content(release, catalogue, ("categories",))
    assert told.categories == ("source", "target")
    found = told.vectors_VF
    assert found.shape == (len(catalogue), 2)  # source and target
    assert not found[:FIRST_INDEX].any()
    target = set(read_catalogue(release, "target").raw_ids)
    for row in range(FIRST_INDEX, len(catalogue)):
        assert found[row].tolist() == ([0, 1] if catalogue.raw_ids[row] in target else [1, 0])
    both = read_content(release, catalogue, ("text", "categories")).vectors_VF
    assert both.shape[1] > 2
    np.testing.assert_array_equal(both[:, -2:], found)
    np.testing.assert_allclose(np.linalg.norm(both[FIRST_INDEX:, :-2], axis=1), 1, rtol=1e-5)
    like, cartoon, other = item_features._texts(
        ["a funny cartoon", "an animated film for children", "bank accounting"], [[]] * 3
    )
    cosine = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in ((like, cartoon), (like, other))]
    assert cosine[0] > cosine[1] + 0.1


def test_a_part_that_no_item_has_is_named(tmp_path, tiny_lake, monkeypatch):
    release, catalogue = pin(tiny_lake, None), read_catalogue(pin(tiny_lake, None), "all")
    monkeypatch.setattr(item_features, "_flags", lambda categories, names: np.zeros((len(categories), 1), np.float32))
    with pytest.raises(ConfigError, match=r"no item of release 1 .* has a category; leave categories out"):
        read_content(release, catalogue, ("categories",))
    monkeypatch.setitem(sys.modules, "wordllama", None)
    with pytest.raises(ConfigError, match=r"needs the package wordllama.*pip install graftrec\[text\]"):
        read_content(release, catalogue, ("text",))


# --- the task ---------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_each_item_is_told_by_those_before(name):
    model, batch = described(NETWORKS[name]), batch_of([5, 11, 1])
    task = Click(ClickConfig(negatives=3, layers=(8,)))
    loss, count = task.loss(model, batch)
    drawn_BTK = task._drawn(batch, model.num_items)
    assert drawn_BTK.min() >= FIRST_INDEX
    expected, pairs = 0.0, 0
    for row, length in enumerate(batch.lengths.tolist()):
        own = batch.items[row, :length].tolist()
        read = torch.tensor([[CLS, *own[:-1]]])
        every = torch.ones_like(read, dtype=torch.bool)
        hidden_TD = model(read, torch.tensor([length]), batch.users[row, None], every, causal=True)
        for place, item in enumerate(own):
            expected += F.softplus(-plain_logit(model, hidden_TD[place], item)).item()
            others = [i for i in drawn_BTK[row, place].tolist() if i not in own]
            expected += sum(F.softplus(plain_logit(model, hidden_TD[place], i)).item() for i in others)
            pairs += 1 + len(others)
    assert int(count) == pairs
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["bert4rec", "peterrec"])
def test_a_network_of_masked_items_is_asked_by_a_mask(name):
    model, batch = described(NETWORKS[name]), batch_of([5, 12, 1])
    task = Click(ClickConfig(negatives=2, layers=(8,), causal=False, cuts=4))
    hidden_ND, row_N, place_N = task._asked(model, batch, batch.mask_BT)
    assert torch.bincount(row_N).tolist() == [4, 4, 4]
    assert (place_N < batch.lengths[row_N]).all()
    assert len(set(place_N[row_N == 1].tolist())) > 1
    for hidden_D, row, place in zip(hidden_ND, row_N, place_N, strict=True):
        read = torch.tensor([[*batch.items[row, :place].tolist(), MASK]])
        given = read, torch.tensor([read.shape[1]]), batch.users[row, None], read == MASK
        torch.testing.assert_close(hidden_D, model(*given, causal=False)[0])
    assert torch.isfinite(task.loss(model, batch)[0])


@pytest.mark.parametrize("causal", [True, False])
def test_a_user_is_asked_after_all_that_is_read(causal):
    model, batch = described(NETWORKS["peterrec"]), batch_of([5, 12])
    found = Click(ClickConfig(causal=causal)).query(model, batch)
    for row, length in enumerate(batch.lengths.tolist()):
        own = batch.items[row, :length].tolist()
        read = torch.tensor([[CLS, *own] if causal else [*own, MASK]])
        last = torch.arange(read.shape[1])[None] == read.shape[1] - 1
        hidden = model(read, torch.tensor([read.shape[1]]), batch.users[row, None], last, causal=causal)
        torch.testing.assert_close(found[row], hidden[0])


def test_a_rank_draws_what_one_process_would():
    model, whole = described(NETWORKS["peterrec"]), batch_of([5, 12, 3, 8])
    for causal in (True, False):
        task = Click(ClickConfig(layers=(8,), causal=causal))
        loss, count = task.loss(model, whole)
        parts = [
            task.loss(model, Batch(whole.items[rows], whole.lengths[rows], whole.users[rows], 4, rows, whole.draw))
            for rows in (slice(0, 2), slice(2, 4))
        ]
        assert sum(part[0].item() for part in parts) == pytest.approx(loss.item())
        assert sum(int(part[1]) for part in parts) == int(count)


@pytest.mark.parametrize("causal", [True, False])
def test_a_planted_pattern_holds_for_items_never_seen(causal):
    """Users take items of one kind of three, which only the content tells: so it is told of new items too."""
    model = described(NETWORKS["bert4rec"]).float().train()
    kind_V = torch.arange(NUM_ITEMS) % 3
    model.describe(F.one_hot(kind_V, WIDTH).float())
    task = Click(ClickConfig(layers=(8,), causal=causal))
    random, optimizer = np.random.default_rng(0), torch.optim.Adam(model.parameters(), lr=0.01)

    def users(step):
        taste = random.integers(0, 3, 24)
        items = torch.from_numpy(6 + (taste[:, None] + 3 * random.integers(0, 6, (24, 8))))  # of 6 to 23
        return taste, Batch(items, torch.full((24,), 8), torch.zeros(24).long(), 24, slice(0, 24), (0, 0, step))

    for step in range(150):
        descend(task, model, users(step)[1], optimizer)
    taste, batch = users(999)
    hidden_BD = task.query(model.eval(), batch)
    new = torch.arange(24, NUM_ITEMS)
    told = task.logits(model, hidden_BD[:, None], new.expand(24, -1)) > 0
    assert (told == (new % 3 == torch.from_numpy(taste)[:, None])).float().mean() > 0.9


# --- impressions ---------------------------------------------


def shown(batch, *, seed=0):
    """A third of the events are impressions, and some items were shown first and taken later."""
    batch.event_types = (torch.rand(batch.items.shape, generator=torch.Generator().manual_seed(seed)) < 0.35).long()
    batch.items[1, 2], batch.event_types[1, 2] = batch.items[1, 7], 1
    batch.event_types[1, 7] = 0
    return batch


@pytest.mark.parametrize("name", NETWORKS)
def test_what_was_shown_is_told_by_what_was_taken_before(name):
    model, batch = described(NETWORKS[name]), shown(batch_of([5, 11, 1, 3]))
    batch.event_types[3] = 1  # a user who took nothing
    task = Click(ClickConfig(negatives=2, layers=(8,), impressions=("shown",)))
    loss, count = task.loss(model, batch)
    drawn_BTK = task._drawn(batch, model.num_items)
    expected, pairs, again = 0.0, 0, 0
    for row, length in enumerate(batch.lengths.tolist()):
        events = list(zip(batch.items[row, :length].tolist(), batch.event_types[row, :length].tolist(), strict=True))
        all_taken = [item for item, kind in events if not kind]
        for place, (item, kind) in enumerate(events):
            before = [i for i, k in events[:place] if not k]
            read = torch.tensor([[CLS, *before]])
            last = torch.arange(read.shape[1])[None] == len(before)
            hidden_D = model(read, torch.tensor([read.shape[1]]), batch.users[row, None], last, causal=True)[0]
            if kind and item in all_taken:
                again += 1
                continue
            examples = [(item, not kind)]
            examples += [] if kind else [(i, False) for i in drawn_BTK[row, place].tolist() if i not in all_taken]
            for one, yes in examples:
                logit = plain_logit(model, hidden_D, one)
                expected += F.softplus(-logit if yes else logit).item()
            pairs += len(examples)
    assert again
    assert int(count) == pairs
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("causal", [True, False])
def test_a_rank_whose_users_did_nothing_has_nothing_to_say(causal):
    model, batch = described(NETWORKS["bert4rec"]), batch_of([0, 0], width=1)
    task = Click(ClickConfig(layers=(8,), causal=causal))
    loss, count = task.loss(model, batch)
    assert (loss.item(), int(count)) == (0, 0)
    loss.backward()


def test_a_network_of_masked_items_reads_only_what_was_taken():
    model, batch = described(NETWORKS["bert4rec"]), shown(batch_of([5, 12, 1]))
    task = Click(ClickConfig(negatives=2, layers=(8,), causal=False, cuts=6, impressions=("shown",)))
    is_taken = batch.mask_BT & (batch.event_types == 0)
    hidden_ND, row_N, place_N = task._asked(model, batch, is_taken)
    assert not is_taken[row_N, place_N].all()
    for hidden_D, row, place in zip(hidden_ND, row_N, place_N, strict=True):
        before = batch.items[row, :place][is_taken[row, :place]].tolist()
        read = torch.tensor([[*before, MASK]])
        given = read, torch.tensor([read.shape[1]]), batch.users[row, None], read == MASK
        torch.testing.assert_close(hidden_D, model(*given, causal=False)[0])


@pytest.mark.parametrize("causal", [True, False])
def test_what_is_passed_over_is_learned_from_impressions_alone(causal):
    """Users take what is of the kind of their first item, and pass over all else; nothing is drawn."""
    model = described(NETWORKS["bert4rec"]).float().train()
    kind_V = torch.arange(NUM_ITEMS) % 3
    model.describe(F.one_hot(kind_V, WIDTH).float())
    task = Click(ClickConfig(layers=(8,), causal=causal, negatives=0, impressions=("shown",)))
    random, optimizer = np.random.default_rng(0), torch.optim.Adam(model.parameters(), lr=0.01)

    def users(step):
        items = torch.from_numpy(random.integers(FIRST_INDEX, NUM_ITEMS, (24, 9)))
        given = torch.full((24,), 9), torch.zeros(24).long(), 24, slice(0, 24), (0, 0, step)
        return Batch(items, *given, event_types=(kind_V[items] != kind_V[items[:, :1]]).long())

    for step in range(150):
        descend(task, model, users(step), optimizer)
    batch = users(999)
    taste_B = kind_V[batch.items[:, 0]]
    only_taken = Batch(batch.items[:, :1], torch.ones(24).long(), batch.users, 24, slice(0, 24), batch.draw)
    hidden_BD = task.query(model.eval(), only_taken)
    told = task.logits(model, hidden_BD[:, None], torch.arange(FIRST_INDEX, NUM_ITEMS).expand(24, -1)) > 0
    assert (told == (kind_V[FIRST_INDEX:] == taste_B[:, None])).float().mean() > 0.9


@pytest.fixture(scope="module")
def lake_of_kinds(tmp_path_factory):
    return build_tiny_lake(tmp_path_factory.mktemp("shown") / "lake", num_users=200, described=True)


@pytest.mark.parametrize("negatives", [0, 2])
def test_pairs_are_what_was_taken_and_what_was_shown(negatives, lake_of_kinds):
    release = pin(lake_of_kinds, None)
    catalogue = read_catalogue(release, "target")
    task = ClickConfig(negatives=negatives, impressions=("look",))
    pairs = click_prediction.read_pairs(release, "last-5", "target", catalogue, "test", task)
    expected = {}
    rows = pl.read_delta(f"{lake_of_kinds}/sequences").filter(
        (pl.col("split") == "last-5") & (pl.col("domain") == "target")
    )
    for row in rows.to_dicts():
        kinds = row["event_types"] or [None] * len(row["items"])
        events = list(zip(row["items"], kinds, strict=True))
        history = [item for item, kind in events[: row["test_start"]] if kind != "look"]
        examples = events[row["test_start"] : row["end"]]
        if examples:
            expected[row["user"]] = (
                history,
                [i for i, k in examples if k != "look"],
                [i for i, k in examples if k == "look"],
            )
    found = {}
    for place, user in enumerate(pairs.histories.users.tolist()):
        own, history = pairs.owner_N == place, pairs.histories.take(np.array([place]))
        yes, no = (
            catalogue.global_index[pairs.row_N[own & flags]].tolist() for flags in (pairs.taken_N, ~pairs.taken_N)
        )
        found[user] = catalogue.global_index[history.items].tolist(), yes, no[: len(expected[user][2])]
        assert len(no) == len(expected[user][2]) + min(negatives * len(yes), len(no) - len(expected[user][2]))
        assert not negatives or len(no) > len(expected[user][2]) or not yes
    assert found == expected


def test_models_are_asked_about_what_was_shown(lake_of_kinds, tmp_path):
    task = TASK | {"negatives": 0, "impressions": ["look"]}
    made = settings(FinetuneConfig, tmp_path, lake_of_kinds, name="made", transfer="none", task=task)
    model = finetune(made).model
    config = EvaluateConfig(
        name="asked",
        output=str(tmp_path),
        tracking={"enabled": False},
        runtime={"progress": False},
        models=(EvaluatedModel(model=str(model)),),
    )
    report = evaluate(config)
    own = {row["label"]: row["mean"] for row in report.rows if row["metric"] == "AUC"}
    assert own["none"] > 0.7  # what is bought is of the user's taste, which categories tell
    assert "shown and not taken (look)" in report.text
    wrong = settings(PretrainConfig, tmp_path, lake_of_kinds, task=task | {"impressions": ["seen"]})
    with pytest.raises(ConfigError, match=r"task.impressions: expected event types .* found no event of seen"):
        pretrain(wrong)


# --- pairs and metrics ---------------------------------------------


def test_pairs_are_held_out_items_and_fixed_negatives(tiny_lake):
    release = pin(tiny_lake, None)
    catalogue = read_catalogue(release, "target")
    pairs = click_prediction.read_pairs(release, "last-5", "target", catalogue, "test", ClickConfig(negatives=2))
    again = click_prediction.read_pairs(release, "last-5", "target", catalogue, "test", ClickConfig(negatives=2))
    assert (pairs.row_N == again.row_N).all()
    rows = pl.read_delta(f"{tiny_lake}/sequences").filter(
        (pl.col("split") == "last-5") & (pl.col("domain") == "target")
    )
    drawn = pl.read_delta(f"{tiny_lake}/negatives").filter(
        (pl.col("split") == "last-5")
        & (pl.col("domain") == "target")
        & (pl.col("protocol") == "uniform-100")
        & (pl.col("part") == "test")
    )
    negatives = {row["user"]: row["items"] for row in drawn.to_dicts()}
    held = {r["user"]: r["items"][r["test_start"] : r["end"]] for r in rows.to_dicts() if r["end"] > r["test_start"]}
    assert pairs.histories.users.tolist() == sorted(held)
    for place, user in enumerate(pairs.histories.users.tolist()):
        own = pairs.owner_N == place
        taken = catalogue.global_index[pairs.row_N[own & pairs.taken_N]].tolist()
        others = catalogue.global_index[pairs.row_N[own & ~pairs.taken_N]].tolist()
        assert taken == held[user]
        assert set(others) <= set(negatives[user])
        assert len(others) == len(set(others)) == min(2 * len(taken), len(negatives[user]))
    some = np.array([3, 1])
    taken = pairs.take(some)
    assert taken.histories.users.tolist() == pairs.histories.users[some].tolist()
    for new, old in enumerate(some):
        assert (taken.row_N[taken.owner_N == new] == pairs.row_N[pairs.owner_N == old]).all()


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_scikit_learns(seed):
    random = np.random.default_rng(seed)
    owner = np.sort(random.integers(0, 40, 600))
    told = random.integers(1, 20, 600) / 20  # with ties
    taken = random.random(600) < told
    found = click_metrics.metrics_of(taken, told, owner)
    assert found["AUC"] == pytest.approx(sk.roc_auc_score(taken, told))
    assert found["log loss"] == pytest.approx(sk.log_loss(taken, told))
    own = [sk.roc_auc_score(taken[owner == u], told[owner == u]) for u in range(40) if len(set(taken[owner == u])) == 2]
    assert found["user AUC"] == pytest.approx(np.mean(own))
    assert click_metrics.metrics_of(taken, taken * 0.98 + 0.01, owner)["calibration error"] == pytest.approx(
        0.01, abs=1e-3
    )
    off = click_metrics.metrics_of(taken, np.full(600, 0.9), owner)["calibration error"]
    assert off >= abs(0.9 - taken.mean()) - 1e-9


def test_reliability_is_of_equally_many_pairs():
    told = np.linspace(0.01, 0.99, 300)
    curve = click_metrics.reliability(told > 0.5, told)
    assert curve[:, 2].tolist() == [20] * 15
    assert (np.diff(curve[:, 0]) > 0).all()
    assert set(curve[:7, 1]) == {0.0}
    assert set(curve[8:, 1]) == {1.0}


# --- trained, transferred, evaluated ---------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """More users than in the tiny lake; a parent of the source's next items, and models of the target's clicks."""
    folder = tmp_path_factory.mktemp("clicks")
    lake = build_tiny_lake(folder / "lake", num_users=200)
    source = {"data": {"lake": str(lake), "domain": "source"}, "task": {"kind": "next_item"}}
    parent = pretrain(settings(PretrainConfig, folder, lake, name="parent", **source)).model
    models = {"none": finetune(settings(FinetuneConfig, folder, lake, name="none", transfer="none")).model}
    for transfer in ("deep", "patch"):
        more = {"name": transfer, "transfer": transfer, "parent": str(parent)}
        models[transfer] = finetune(settings(FinetuneConfig, folder, lake, **more)).model
    return lake, parent, models


def test_a_model_keeps_what_items_are(trained):
    lake, _, models = trained
    trained_model = load_model(models["deep"])
    release = pin(lake, None)
    told = read_content(release, read_catalogue(release, "target"), ("categories", "text"))
    expected = told.vectors_VF
    assert trained_model.categories == told.categories
    torch.testing.assert_close(trained_model.model.content_VF, torch.from_numpy(expected), atol=1e-3, rtol=1e-2)
    assert 0 < trained_model.metrics["validation/log loss"] < np.log(2)
    with pytest.raises(ModelFolderError, match=r"expected a model that ranks items, found .* predicts a user's clicks"):
        trained_model.scorer()


def test_models_are_compared_on_held_out_items(trained, tmp_path):
    _, _, models = trained
    config = EvaluateConfig(
        name="asked",
        output=str(tmp_path),
        tracking={"enabled": False},
        runtime={"progress": False},
        models=tuple(EvaluatedModel(model=str(model)) for model in models.values()),
    )
    report = evaluate(config)
    told = pl.read_parquet(report.folder / "users.parquet")
    labels = {*models, "popularity", "popularity and item-to-item"}
    assert {row["label"] for row in report.rows} == labels
    for label in labels:
        own = told.filter(pl.col("label") == label)
        rows = {row["metric"]: row for row in report.rows if row["label"] == label}
        assert rows["AUC"]["mean"] == pytest.approx(sk.roc_auc_score(own["taken"], own["probability"]))
        assert rows["log loss"]["mean"] == pytest.approx(sk.log_loss(own["taken"], own["probability"]))
    tested = {row["metric"] for row in report.rows if row["p_value"] is not None}
    assert tested == {"user AUC", "log loss"}
    assert (report.folder / "reliability.png").stat().st_size > 10_000
    assert "drawn uniformly, which were not" in report.text
    assert evaluate(config).skipped


def test_an_item_that_a_model_does_not_know_is_told_by_what_it_is(trained):
    """As a newer release asks for: it is read by nobody, and asked about like one that the model knows."""
    lake, _, models = trained
    release, trained_model = pin(lake, None), load_model(models["none"])
    strange = FIRST_INDEX + 2
    ids = list(trained_model.catalogue.raw_ids)
    ids[strange] = "not there"
    stranger = dataclasses.replace(trained_model, catalogue=dataclasses.replace(trained_model.catalogue, raw_ids=ids))
    given = Events.of(
        np.array([tables.FIRST_INDEX, tables.FIRST_INDEX + 1]),
        np.array([0, 2, 5]),
        np.array([FIRST_INDEX, FIRST_INDEX + 1, FIRST_INDEX + 4, strange, FIRST_INDEX + 5]),
        np.empty(0, np.int64),
    )
    row = np.array([strange, FIRST_INDEX + 3, strange, FIRST_INDEX + 6])
    examples = {"items": row, "taken": np.array([True, False, True, False])}
    pairs = click_prediction.Pairs(given, Events(given.users, np.array([0, 2, 4]), examples))
    (evaluator,) = click_prediction.ClickPrediction.read(Question(EvaluateConfig(), [trained_model], release))
    evaluator.pairs, evaluator.raw_users = pairs, ["u000", "u001"]
    before = trained_model.model.content_VF
    found = {name: evaluator.probabilities(one) for name, one in (("known", trained_model), ("not", stranger))}
    assert trained_model.model.content_VF is before, "evaluation changes no model"
    np.testing.assert_allclose(found["not"][:2], found["known"][:2], rtol=1e-3)  # what is known was kept in 16 bits
    assert abs(found["not"][3] - found["known"][3]) > 1e-5  # the second user's history lacks an item
    unlike = item_features._flags([["new", "target"], ["new"]], ("source", "target"))
    np.testing.assert_array_equal(unlike, [[0, 1], [0, 0]])


def test_models_of_other_questions_are_not_compared(trained, tmp_path):
    lake, _, models = trained
    task = TASK | {"negatives": 5}
    other = finetune(settings(FinetuneConfig, tmp_path, lake, name="other", transfer="none", task=task)).model
    config = EvaluateConfig(
        output=str(tmp_path),
        tracking={"enabled": False},
        models=tuple(EvaluatedModel(model=str(model)) for model in (models["none"], other)),
    )
    with pytest.raises(EvaluateError, match=r"kind click, negatives 3, impressions \(\).*negatives 5"):
        evaluate(config)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"expected a model of kind .*, found mlp"):
        PretrainConfig(model=MlpConfig(), task=ClickConfig())
    with pytest.raises(ValueError, match="expected each part once"):
        ClickConfig(content=("text", "text"))
    with pytest.raises(ValueError, match="leave them out"):
        PretrainConfig(task=ClickConfig(), data={"domain": "all", "predicted": "target"})
    with pytest.raises(ValueError, match="negatives 0 leaves no noes"):
        ClickConfig(negatives=0)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_two_processes_see_what_one_sees(causal, tiny_lake, tmp_path):
    found = {}
    for processes in (1, 2):
        config = settings(
            PretrainConfig,
            tmp_path,
            tiny_lake,
            name=f"by{processes}",
            model=SMALL | {"dropout": 0.0},
            train={**TRAINED, "epochs": 2, "table_optimizer": "rowwise" if causal else "adamw"},
            task=TASK | {"causal": causal},
            runtime={"progress": False, "threads": 1, "precision": "fp64"},
        )
        found[processes] = trained_by(processes, config, tmp_path)
    for name, one in found[1].model.state_dict().items():
        torch.testing.assert_close(found[2].model.state_dict()[name], one)
    before, after = (found[processes].metrics for processes in (1, 2))
    assert after["validation/log loss"] == pytest.approx(before["validation/log loss"])
    assert after["validation/AUC"] == pytest.approx(before["validation/AUC"], abs=1e-3)  # some pairs are all but tied
